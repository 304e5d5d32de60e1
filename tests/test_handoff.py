"""The hand-off page names this very directory."""

import hashlib
import json
from pathlib import Path

import pytest
import yaml

from halfbyte.export import handoff
from halfbyte.training.config import Format, Recipe


def test_the_card_shows_what_the_gate_measured(tmp_path: Path):
    from halfbyte.export.card import card_text
    from halfbyte.export.record import record_verdict

    numbers = {"unit": "pp", "candidate": 34.0, "baseline": 36.5, "delta": -2.5, "interval": [-4.0, -1.0]}
    task = {"n": 200, "measures": {"accuracy": "fail"}, "numbers": {"accuracy": numbers}}
    verdict = {"verdict": "fail", "reasons": ["lambada: accuracy -2.50 pp"], "tasks": {"lambada": task}}
    run, sizes = Recipe(), {"bytes_before": 4e6, "bytes_after": 1e6, "files": 1, "tensors": 3, "quantized": 2}
    run.model.path = "/home/you/models/SmolLM2"
    text = card_text(run, [Format.nvfp4] * 2, verdict, sizes, licensed=True)
    front, body = text.removeprefix("---\n").split("---\n", 1)
    assert yaml.safe_load(front) == {"base_model": "SmolLM2", "tags": ["halfbyte", "nvfp4"]}
    assert "| lambada (200) | accuracy | 36.5 | 34 | -2.5 pp [-4, -1] | fail |" in body
    assert "## Accuracy gate: fail" in body
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
            ["trtllm-serve", "vllm serve"],
            ["- 1 of the linears: FP8, W8A8", "- 2 of the linears: NVFP4, W4A4", "MIXED_PRECISION", "SM89", "SM100"],
        ),
    ],
)
def test_handoff_names_this_directory(tmp_path: Path, formats: list[Format], commands: list[str], words: list[str]):
    out = tmp_path / "my export" / "hf"
    out.mkdir(parents=True)
    sizes = {"bytes_before": 4e6, "bytes_after": 1e6, "files": 1, "tensors": 3, "quantized": 2}
    verdict = {"verdict": "failed", "reasons": ["lambada: -0.9 pp"]}
    page = handoff.write_handoff(out, Recipe(), formats, verdict, sizes, {"torch": "2.11"})
    assert page == out.parent / "HANDOFF.md"
    text = page.read_text()
    block = text.split("```bash\n")[1].split("```")[0].splitlines()
    assert len(block) == len(commands)
    for line, command in zip(block, commands, strict=True):
        assert command in line
        assert f"'{out}'" in line  # quoted: the path has a space
    assert "**failed**" in text
    assert "lambada: -0.9 pp" in text
    assert "4.00 times smaller" in text
    for word in words:
        assert word in text
