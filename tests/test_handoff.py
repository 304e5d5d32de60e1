"""The hand-off page names this very directory."""

import hashlib
import json
from pathlib import Path

import pytest
import yaml

from halfbyte.export import handoff, serving
from halfbyte.training.choices import Container
from halfbyte.training.config import Format, LayerFormat, Recipe
from halfbyte.training.formats import SPECS
from halfbyte.training.kv_format import KVCache

VERDICT = {
    "verdict": "pass",
    "release": True,
    "reasons": ["better"],
    "tasks": {},
    "rule": "better_than_ptq",
    "baseline": "ptq",
    "against_bf16": None,
    "against_control": None,
}


def test_the_card_shows_what_the_gate_measured(tmp_path: Path):
    from halfbyte.export.card import CONVERTED, card_text, converted_card
    from halfbyte.export.record import record_verdict

    numbers = {"unit": "pp", "candidate": 34.0, "baseline": 36.5, "delta": -2.5, "interval": [-4.0, -1.0]}
    task = {"n": 200, "measures": {"accuracy": "fail"}, "numbers": {"accuracy": numbers}}
    beside = {"verdict": "fail", "reasons": ["lambada: accuracy -2.50 pp against BF16"], "tasks": {"lambada": task}}
    better = {"lambada": task | {"measures": {"accuracy": "pass"}, "numbers": {"accuracy": numbers | {"delta": 1.0}}}}
    verdict = VERDICT | {"tasks": better, "against_bf16": beside}
    run, sizes = Recipe(), {"bytes_before": 4e6, "bytes_after": 1e6, "files": 1, "tensors": 3, "quantized": 2}
    run.model.path = "/home/you/models/SmolLM2"
    run.quantize.kv_cache = KVCache.fp8
    made = (run, [Format.nvfp4] * 2, verdict, sizes, {"torch": "2.11"})
    text = card_text(*made, "Qwen2ForCausalLM", licensed=True)
    front, body = text.removeprefix("---\n").split("---\n", 1)
    assert yaml.safe_load(front) == {"base_model": "SmolLM2", "tags": ["halfbyte", "nvfp4"]}
    assert "| task (items) | measure | PTQ | this checkpoint | difference | |" in body
    assert "| lambada (200) | accuracy | 36.5 | 34 | 1 pp [-4, -1] | pass |" in body
    assert "| task (items) | measure | BF16 | this checkpoint | difference | |" in body
    assert "| lambada (200) | accuracy | 36.5 | 34 | -2.5 pp [-4, -1] | fail |" in body
    # a pass under one rule does not hide what the other says
    rule = "perplexity and KL below PTQ's, no other score significantly lower"
    assert f"Verdict: **pass**, by the rule `better_than_ptq`: {rule}.\n- better" in body
    assert "Within the thresholds of BF16: **fail**.\n- lambada: accuracy -2.50 pp against BF16" in body
    # whoever has this folder and nothing else can serve it
    assert "\nvllm serve FOLDER --kv-cache-dtype fp8_e4m3\n" in body
    assert "--model-path FOLDER --quantization modelopt_fp4 --kv-cache-dtype bfloat16\n" in body
    assert "SGLang drops the cache's scales of Qwen2 models" in body
    assert "where they are BF16 or W4A8, its source does not load them" in body
    for container in CONVERTED:  # measured as its source, served in its own way
        other = converted_card(text, container)
        assert other.startswith(text[: text.index("## Serving")])
        assert CONVERTED[container] in other
        assert "modelopt_fp4" not in other
        assert "\nMade with torch 2.11.\n" in other
    assert converted_card("# Somebody's own card", Container.dequantized) == "# Somebody's own card"
    assert "--kv-cache-dtype bfloat16" not in card_text(*made, "Qwen3ForCausalLM", licensed=True)
    assert "Blackwell (SM100, SM103, SM120)" in body
    assert "Made with torch 2.11." in body
    assert "/home" not in text  # a card is published
    (tmp_path / "halfbyte.json").write_text('{"files": {"a": {}}, "gate": null}')
    record_verdict(tmp_path, verdict, text)
    listed = json.loads((tmp_path / "halfbyte.json").read_text())["files"]
    assert listed["README.md"]["sha256"] == hashlib.sha256((tmp_path / "README.md").read_bytes()).hexdigest()
    record_verdict(tmp_path, None)
    assert json.loads((tmp_path / "halfbyte.json").read_text()) == {"files": {"a": {}}, "gate": None}
    assert not (tmp_path / "README.md").exists()


@pytest.mark.parametrize(
    ("number_format", "command"),
    [("mxfp4", "vllm serve"), ("nvfp4+fp8", "trtllm-serve"), ("bf16", "trtllm-serve")],
)
def test_the_summary_names_a_server_that_reads_it(tmp_path: Path, number_format: str, command: str):
    from halfbyte.launch.summary import _shipped

    out = tmp_path / "export" / "hf"
    out.mkdir(parents=True)
    (out / "halfbyte.json").write_text(json.dumps({"format": number_format, "kv_cache": "none"}))
    (out / "config.json").write_text('{"architectures": ["LlamaForCausalLM"]}')
    (out.parent / "export.json").write_text('{"sizes": {"bytes_before": 4, "bytes_after": 1}}')
    assert f"  serve it:   {command} {out}" in _shipped(tmp_path)


@pytest.mark.parametrize(
    ("formats", "commands", "words"),
    [
        ([], ["trtllm-serve", "vllm serve", "sglang.launch_server"], ["BF16, not quantized"]),
        ([Format.nvfp4] * 2, ["trtllm-serve", "vllm serve", "quantization modelopt_fp4"], ["NVFP4, W4A4"]),
        ([Format.w4a16_nvfp4], ["trtllm-serve", "vllm serve", "quantization modelopt_fp4"], ["NVFP4, W4A16"]),
        ([Format.mxfp4], ["vllm serve"], ["MXFP4, W4A4"]),
        ([Format.w4a16_mxfp4], ["vllm serve"], ["MXFP4, W4A16"]),
        ([Format.w4a8_nvfp4_fp8], ["trtllm-serve"], ["W4A8", "Blackwell only"]),
        ([Format.fp8], ["trtllm-serve", "vllm serve", "quantization modelopt_fp8"], ["FP8, W8A8", "SM89"]),
        (
            [Format.nvfp4, Format.fp8, Format.nvfp4],
            ["trtllm-serve", "vllm serve", "sglang.launch_server"],
            ["- 1 of the linears: FP8, W8A8", "- 2 of the linears: NVFP4, W4A4", "MIXED_PRECISION", "SM89", "SM100"],
        ),
    ],
)
def test_handoff_names_this_directory(tmp_path: Path, formats: list[Format], commands: list[str], words: list[str]):
    out = tmp_path / "my export" / "hf"
    out.mkdir(parents=True)
    sizes = {"bytes_before": 4e6, "bytes_after": 1e6, "files": 1, "tensors": 3, "quantized": 2}
    page = handoff.write_handoff(out, Recipe(), formats, VERDICT, sizes, {"torch": "2.11"}, "LlamaForCausalLM")
    assert page == out.parent / "HANDOFF.md"
    text = page.read_text()
    block = text.split("```bash\n")[1].split("```")[0].splitlines()
    assert len(block) == len(commands)
    for line, command in zip(block, commands, strict=True):
        assert command in line
        assert f"'{out}'" in line  # quoted: the path has a space
    assert "Verdict: **pass**, by the rule `better_than_ptq`" in text
    assert "\n- better\n" in text
    assert "4.00 times smaller" in text
    for word in words:
        assert word in text


def test_every_format_is_in_every_table():
    """A format that is missing in one of them would stop a run at its release, after all of the training."""
    assert {*serving.READERS} == {*handoff.FORMATS} == {*handoff.HARDWARE} == {*SPECS} == {*Format}
    assert {*LayerFormat} == {*Format} | {"bf16"}
