"""The sbatch file, letter by letter, and what submitting says."""

import pytest

from halfbyte.launch.submit import sbatch_text, submit
from halfbyte.training.config import Recipe
from halfbyte.training.errors import USAGE, RecipeError, UserError

GOLDEN = """\
#!/bin/bash
#SBATCH --job-name=llama
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --time=04:00:00
#SBATCH --signal=TERM@120
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=runs/llama/slurm-%j.log
#SBATCH --partition=gpu
#SBATCH --account=team

set -euo pipefail
export PATH=/opt/halfbyte/bin:$PATH
export MASTER_ADDR="$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)"
export MASTER_PORT=$((20000 + SLURM_JOB_ID % 10000))

srun --kill-on-bad-exit=1 --container-image=nvcr.io/pytorch:25.10 halfbyte run llama.yaml \
parallel.data=4 'run.project=my project'
"""


def recipe(tensor=2, pipeline=2, data=4, per_node=8) -> Recipe:
    made = Recipe()
    made.run.name, made.run.dir = "llama", "runs/llama"
    made.parallel.tensor, made.parallel.pipeline, made.parallel.data = tensor, pipeline, data
    made.launch.gpus_per_node = per_node
    return made


def test_golden():
    made = recipe()
    made.launch.partition, made.launch.account, made.launch.container = "gpu", "team", "nvcr.io/pytorch:25.10"
    overrides = ["parallel.data=4", "run.project=my project"]
    assert sbatch_text(made, "llama.yaml", overrides, 2, programs="/opt/halfbyte/bin") == GOLDEN


def test_a_small_world_takes_as_many_tasks_as_it_has_processes():
    made = recipe(data=1)
    made.launch.port = 29500
    text = sbatch_text(made, "llama.yaml", [], 1)
    assert "#SBATCH --ntasks-per-node=4\n#SBATCH --gpus-per-node=4\n" in text
    assert "export MASTER_PORT=29500\n" in text
    assert "PATH=" not in text
    assert text.endswith("srun --kill-on-bad-exit=1 halfbyte run llama.yaml\n")


@pytest.mark.parametrize(
    ("data", "nodes", "remedy"),
    [
        (4, 1, "give --nodes 2"),
        (4, 3, "give --nodes 2"),
        (1, 2, "give --nodes 1"),
        (3, 2, "change parallel"),
        (4, 0, "at least 1"),
    ],
)
def test_nodes_that_do_not_fit(data, nodes, remedy):
    with pytest.raises(RecipeError, match=remedy) as caught:
        sbatch_text(recipe(data=data), "llama.yaml", [], nodes)
    assert caught.value.code == USAGE
    assert len(caught.value.problems) == 1


@pytest.fixture
def made(tmp_path):
    made = recipe()
    made.run.dir = str(tmp_path / "run")
    return made


def fake_sbatch(folder, monkeypatch, script):
    folder.mkdir()
    (folder / "sbatch").write_text(f"#!/bin/sh\n{script}\n")
    (folder / "sbatch").chmod(0o755)
    monkeypatch.setenv("PATH", str(folder), prepend=":")


def test_dry_run_writes_and_calls_nothing(made, tmp_path, monkeypatch):
    fake_sbatch(tmp_path / "bin", monkeypatch, f"touch {tmp_path}/called")
    said = submit(made, "llama.yaml", [], 2, dry_run=True)
    written = (tmp_path / "run/submit.sbatch").read_text()
    assert said == f"{tmp_path}/run/submit.sbatch\n\n{written}"
    assert not (tmp_path / "called").exists()


def test_the_job_number_comes_back(made, tmp_path, monkeypatch):
    fake_sbatch(tmp_path / "bin", monkeypatch, f'echo "$@" > {tmp_path}/called; echo "4711;cluster"')
    assert submit(made, "llama.yaml", [], 2, dry_run=False).endswith("submitted as job 4711")
    assert (tmp_path / "called").read_text() == f"--parsable {tmp_path}/run/submit.sbatch\n"


def test_what_sbatch_says_is_passed_on(made, tmp_path, monkeypatch):
    fake_sbatch(tmp_path / "bin", monkeypatch, "echo 'sbatch: error: invalid account' >&2; exit 1")
    with pytest.raises(UserError, match="invalid account"):
        submit(made, "llama.yaml", [], 2, dry_run=False)


def test_no_slurm_here(made, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match="sbatch: not found"):
        submit(made, "llama.yaml", [], 2, dry_run=False)
