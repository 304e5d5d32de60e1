"""Training methods under every layout: the losses are those of one process. Float64, as in test_layouts.py."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow
WORKER = Path(__file__).with_name("workers") / "methods.py"
TORCHRUN = ["-m", "torch.distributed.run", "--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0"]
VARIANTS = ("forward_kl", "everything", "top_k", "files")


@pytest.fixture(scope="module")
def found(tiny_model, environment, tmp_path_factory) -> dict[str, dict[str, list[float]]]:
    """Layout -> variant -> losses."""
    measured: dict[str, dict[str, list[float]]] = {}
    for processes in (1, 2):
        out = tmp_path_factory.mktemp("methods") / "found.json"
        start = [*TORCHRUN, "--nproc-per-node", str(processes)] if processes > 1 else []
        done = subprocess.run(
            [sys.executable, *start, str(WORKER), str(tiny_model), str(out)],
            env=environment | {"CUDA_VISIBLE_DEVICES": ""},
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )
        assert done.returncode == 0, done.stderr[-4000:]
        measured |= json.loads(out.read_text())
    return measured


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("layout", ["tp2_sp", "pp2", "dp2"])
def test_every_layout_gives_the_losses_of_one_process(found, layout, variant):
    assert found[layout][variant] == pytest.approx(found["one"][variant], rel=1e-6)


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_weights_move(found, variant):
    assert len(set(found["one"][variant])) == 2


def test_files_give_the_losses_of_their_teacher(found):
    assert found["one"]["files"] == pytest.approx(found["one"]["top_k"], rel=1e-12)
