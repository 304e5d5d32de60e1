"""The benchmark: what it says without CUDA, its figures' arithmetic, and its steps on the CPU."""

import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from halfbyte.bench.plan import ARMS, LAYOUTS, Size
from halfbyte.bench.plan_cases import Case
from halfbyte.bench.profile import summary
from halfbyte.bench.table import document
from halfbyte.training.config import Method

SMALL = Size(layers=2, hidden=64, ffn=96, heads=4, kv_heads=2, vocab=64, sequence=32, micro_batches=2)


def bench(environment, *words: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "halfbyte.bench", *words]
    return subprocess.run(command, capture_output=True, text=True, env=environment, check=False)


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is CUDA")
def test_without_cuda_it_says_so(environment, tmp_path):
    done = bench(environment, f"--out={tmp_path}/bench.md")
    assert (done.returncode, done.stdout) == (0, "skipped: needs CUDA\n")
    assert not (tmp_path / "bench.md").exists()


def test_an_unknown_arm_is_named(environment):
    done = bench(environment, "--arms=nvfp4,int3")
    assert done.returncode == 2
    assert done.stderr.startswith("error: --arms int3: not known; use some of bf16, nvfp4")


def test_what_does_not_divide_is_named(environment):
    done = bench(environment, "--layouts=pp4,dp4", "--layers=6", "--micro-batches=2")
    assert done.returncode == 2
    assert done.stderr.splitlines() == [
        "error: --layers 6: pp4 needs a multiple of 4",
        "error: --micro-batches 2: dp4 needs a multiple of 4",
    ]


def test_the_work_of_a_llama_3_8b_layer():
    size = Size()
    assert size.layer_parameters == 4096 * (4096 + 2 * 1024) + 4096 * 4096 + 3 * 4096 * 14336
    one = Size(layers=0, micro_batches=1)
    assert one.step_flops == 6 * 32000 * 4096 * 4096  # logits only: three GEMMs of 2 M N K


def test_the_table_divides_by_bf16():
    common = {"first_step": 1.0, "peak_bytes": 10_000_000_000, "losses": [2.0, 0.5]}
    arms = {
        "bf16": common | {"seconds": [0.2, 0.19, 0.21], "median": 0.2},
        "nvfp4": common | {"seconds": [0.203], "median": 0.203, "first_step": 1.5, "peak_bytes": 12_500_000_000},
        "modelopt_nvfp4": {"seconds": [], "median": None, "first_step": None, "failed": "NotImplementedError: TP"},
    }
    kernels = {
        "kernels": {
            "copy": {"microseconds": 100.0, "bytes_per_second": 4e12},
            "nvfp4": {"microseconds": 110.0, "bytes_per_second": 3.8e12},
        },
        "gemm_flops": 7.5e14,
    }
    four = {"bf16": common | {"seconds": [0.1], "median": 0.1, "losses": [2.0, 0.75]}}
    text = document(SMALL, {"tp1": arms, "pp4": four}, kernels, {"GPU": "one"}, ["tp2 skipped: needs 2 GPUs, 1 found"])
    assert "| tp1 | nvfp4 | 203.0 | 1.015 | 0.0 % | 1.5 | 12.50 | +2.50 |" in text
    assert "| tp1 | bf16 | 200.0 | 1.000 | 10.0 % |" in text
    assert "| nvfp4 | 110.0 | 3800 | 95 % |" in text
    assert "| tp1 | modelopt_nvfp4 | failed | NotImplementedError: TP |" in text
    limit = 4 * 2 / (2 + 3)  # two micro-batches in four stages
    assert f"| 2.00x | {limit:.2f}x | 2.5e-01 |" in text
    assert "- tp2 skipped: needs 2 GPUs, 1 found" in text


@pytest.mark.slow
def test_an_arm_of_modelopt_that_fails_is_named_and_ours_go_on():
    helpers = runpy.run_path(str(Path(__file__).with_name("workers") / "world.py"))
    from halfbyte.bench import worker

    with helpers["world_of_one"]() as runtime:  # ModelOpt's own fake quantization refuses CPU tensors
        found = worker.measure(
            SMALL, LAYOUTS["tp1"], [ARMS["modelopt_nvfp4"], ARMS["bf16"]], runtime, steps=1, rounds=2
        )
    assert found["modelopt_nvfp4"]["failed"].startswith("AssertionError: ")
    assert len(found["bf16"]["seconds"]) == 2


@pytest.mark.slow
def test_a_case_of_the_plan_is_measured():
    helpers = runpy.run_path(str(Path(__file__).with_name("workers") / "world.py"))
    from halfbyte.bench import plan_measure

    case = Case("small", "tiny", 1, method=Method.qad, rows=2, sequence=32, count=2, recompute=True)
    with helpers["world_of_one"]() as runtime:
        found = plan_measure.measure(case, runtime, 2)
    assert len(found["seconds"]) == 2
    assert 0 < found["loss"] < 0.1  # the teacher is the student's own BF16 model
    assert "peak_allocated" not in found


@pytest.mark.slow
def test_every_arm_of_ours_takes_its_steps():
    helpers = runpy.run_path(str(Path(__file__).with_name("workers") / "world.py"))
    from halfbyte.bench import worker

    arms = [ARMS["bf16"], ARMS["nvfp4"], ARMS["mxfp4"]]
    with helpers["world_of_one"]() as runtime:
        found = worker.measure(SMALL, LAYOUTS["tp1"], arms, runtime, steps=2, rounds=2)
    assert all(len(entry["seconds"]) == 4 and entry["first_step"] > 0 for entry in found.values())
    assert not any(entry["graphs"] for entry in found.values())  # on a CPU
    losses = [entry["losses"][-1] for entry in found.values()]
    assert len(set(losses)) == 3  # the same weights and tokens, three arithmetics
    assert max(losses) - min(losses) < 0.1


def test_a_profile_separates_computing_waiting_for_others_and_waiting_for_python():
    spans = [
        ("gemm", 0, 4_000_000),
        ("ncclDevKernel_AllGather", 2_000_000, 6_000_000),  # 2 ms behind the GEMM, 2 ms alone
        ("norm", 7_000_000, 8_000_000),  # after 1 ms of nothing
        ("gemm", 7_500_000, 9_000_000),
    ]
    found = summary(reversed(spans))
    assert (found["extent_ms"], found["computing_ms"], found["exposed_ms"], found["idle_ms"]) == (9.0, 6.0, 2.0, 1.0)
    assert found["launches"] == 4
    assert found["kernels"]["gemm"] == [2, 5.5]
