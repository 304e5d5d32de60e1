"""A calibration that changes weights, as a run of the tiny recipe: exported, verified, and restarted."""

import json
import shutil

import pytest

pytestmark = pytest.mark.slow
OPTIONS = (
    *("method=qat", "train.steps=1", "run.wandb=disabled", "verify.items=1", "gate.judges=trained"),
    *("evaluate.tasks.lambada.limit=2", "evaluate.tasks.english.limit=2", "gate.perplexity_ratio=1e100"),
    *("quantize.smoothing=awq_duo", "quantize.block_scale=mse", "quantize.weights=gptq"),
)


def test_a_restart_goes_on_from_the_calibrated_weights(halfbyte, tmp_path):
    first, again = tmp_path / "first", tmp_path / "again"
    done = halfbyte("run", "tiny", *OPTIONS, f"run.dir={first}")
    assert done.returncode == 0, done.stdout + done.stderr
    assert json.loads((first / "verify.json").read_text())["ok"]
    again.mkdir()
    for name in ("resolved.yaml", "quantize.json"):
        shutil.copy(first / name, again / name)
    shutil.copytree(first / "calibrated", again / "calibrated", symlinks=True)
    restarted = halfbyte("run", "tiny", *OPTIONS, f"run.dir={again}")
    assert restarted.returncode == 0, restarted.stdout + restarted.stderr
    assert "as in quantize.json" in restarted.stdout
    files = [(run / "export" / "hf" / "model.safetensors").read_bytes() for run in (first, again)]
    assert files[0] == files[1]
