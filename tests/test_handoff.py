"""The hand-off page names this very directory."""

from pathlib import Path

import pytest

from halfbyte.export import handoff
from halfbyte.training.config import Format, Quantize, Recipe


@pytest.mark.parametrize(
    ("number_format", "commands"),
    [
        (Format.nvfp4, ["trtllm-serve", "vllm serve", "sglang.launch_server"]),
        (Format.w4a16_nvfp4, ["trtllm-serve", "vllm serve", "sglang.launch_server"]),
        (Format.mxfp4, ["vllm serve"]),
    ],
)
def test_handoff_names_this_directory(tmp_path: Path, number_format: Format, commands: list[str]):
    out = tmp_path / "my export" / "hf"
    out.mkdir(parents=True)
    sizes = {"bytes_before": 4e6, "bytes_after": 1e6, "files": 1, "tensors": 3, "quantized": 2}
    verdict = {"verdict": "failed", "reasons": ["lambada: -0.9 pp"]}
    page = handoff.write_handoff(
        out, Recipe(quantize=Quantize(format=number_format)), verdict, sizes, {"torch": "2.11"}
    )
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
