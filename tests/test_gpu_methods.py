"""Every method on a GPU against the CPU's FP32: the same losses, and weights that export finds again to the bit."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

WORKER = Path(__file__).with_name("workers") / "gpu_methods.py"
CASES = (
    *("ptq_four_over_six", "ptq_mxfp4_mse", "w4a8", "kv_nvfp4", "qad_top_k"),
    *("lsq", "lsq_mxfp4", "lora", "lora_lsq"),
)
TOLERANCE = {"float32": 5e-3, "bfloat16": 3e-2}
"""Relative, of every step's loss. Rounding is discontinuous: where a GPU sums in another order, a code may flip."""


def start(out: Path, environment: dict[str, str], *dtypes: str) -> dict:
    """What the worker leaves."""
    done = subprocess.run(
        [sys.executable, str(WORKER), str(out), *dtypes],
        env=environment,
        capture_output=True,
        text=True,
        timeout=500,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(out.read_text())


@pytest.fixture(scope="module")
def found(environment, tmp_path_factory) -> dict:
    """Device -> dtype -> case -> what came out."""
    place = tmp_path_factory.mktemp("gpu")
    gpu = start(place / "gpu.json", environment, "float32", "bfloat16")
    return {"gpu": gpu, "cpu": start(place / "cpu.json", environment | {"CUDA_VISIBLE_DEVICES": ""}, "float32")}


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("case", CASES)
def test_a_gpu_learns_what_a_cpu_learns(found, case, dtype):
    gpu, cpu = found["gpu"][dtype][case], found["cpu"]["float32"][case]
    assert gpu["losses"] == pytest.approx(cpu["losses"], rel=TOLERANCE[dtype])
    assert gpu["error"] == pytest.approx(cpu["error"], rel=TOLERANCE[dtype])
    assert gpu["seen"] == pytest.approx(gpu["error"], rel=TOLERANCE[dtype])
    assert len(set(cpu["losses"])) == 4


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("case", CASES)
def test_export_finds_a_gpus_weights_to_the_bit(found, case, dtype):
    assert found["gpu"][dtype][case]["exact"]
