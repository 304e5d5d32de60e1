"""The benchmarks of four GPUs, in four processes on the CPU: every layout does one GPU's work and exports its bytes."""

import json
from pathlib import Path
from typing import Any

import pytest

from halfbyte.bench.layout_export import PARTS, verdict
from halfbyte.bench.table import largest_difference

pytestmark = pytest.mark.slow
WORKER = Path(__file__).with_name("workers") / "four.py"
FOUR = ("tp4", "tp2pp2", "pp4", "dp4")


@pytest.fixture(scope="module")
def found(forks, tmp_path_factory) -> dict[str, Any]:
    """Layout -> what the worker left of it; one process makes the checkpoint that four load."""
    folder = tmp_path_factory.mktemp("four")
    for ranks in (1, 4):
        forks.script(WORKER.with_name("start.py"), WORKER, folder, ranks=ranks)
    return json.loads((folder / "1.json").read_text()) | json.loads((folder / "4.json").read_text())


@pytest.mark.parametrize("layout", FOUR)
def test_the_loss_curve_is_that_of_one_gpu(found, layout):
    one, mine = found["tp1"]["measured"], found[layout]["measured"]
    assert len(set(one["nvfp4"]["losses"])) == 2  # the weights move
    assert largest_difference(mine["bf16"]["losses"], one["bf16"]["losses"]) < 1e-5
    assert largest_difference(mine["nvfp4"]["losses"], one["nvfp4"]["losses"]) < 1e-3  # another sum flips a code
    assert len(mine["nvfp4"]["seconds"]) == 1


def test_gradients_are_summed_beside_the_backward_pass(found):
    first, second = False, True  # Megatron learns in a model's first step which gradients a bucket waits for
    assert found["dp4"]["early"] == [first, second] * 2  # of both arms
    assert not any(found["tp4"]["early"])  # nothing to sum


def test_a_slow_rank_is_named_beside_those_that_wait_for_it(found):
    """In a pipeline of four, every stage has one rank and nobody to compare it with."""
    for layout in ("tp4", "tp2pp2", "dp4"):
        (line,) = found[layout]["slow"]
        assert line.startswith("rank 2 on ")
    assert found["pp4"]["slow"] == []
    blamed, (line,) = found["slow group"]
    assert [name[:10] for name in blamed] == ["rank 2 on ", "rank 3 on "]  # which is wrong of rank 3
    assert line.startswith("one of the tensor-parallel ranks 2, 3 on ")
    assert "makes all of them take 0.5 s without waiting, 10.00 x the median of their pipeline stage" in line


@pytest.mark.parametrize("layout", FOUR)
def test_the_export_is_byte_for_byte_that_of_one_gpu(found, layout):
    one, mine = found["tp1"]["files"], found[layout]["files"]
    assert len([name for name in one["carried"] if name.endswith(".safetensors")]) == 4
    assert one["calibrated"] != one["carried"]  # one GPU trained in between
    for part in PARTS:
        assert mine[part] == one[part]
    assert all(line.endswith("all the same") for line in verdict(layout, mine, one))
