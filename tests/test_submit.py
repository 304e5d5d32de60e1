"""The sbatch file, letter by letter and under bash, what submitting says, and the status."""

import os
import re
import subprocess
import textwrap
from pathlib import Path

import pytest

from halfbyte.launch import revision, sbatch
from halfbyte.launch.cli import main
from halfbyte.launch.jobs import submitted
from halfbyte.launch.status import follow, status
from halfbyte.launch.submit import submit
from halfbyte.training.config import Recipe
from halfbyte.training.errors import FAILED, OK, USAGE, RecipeError, UserError
from halfbyte.training.files import write_json
from halfbyte.training.resolve import load, save
from halfbyte.training.run_rules import seconds_of

GOLDEN = """\
#!/bin/bash
# llama: halfbyte run 'runs/my llama/submit.yaml'
# halfbyte at git revision 0123456789ab-dirty
#SBATCH --job-name=llama
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --time=04:00:00
#SBATCH --signal=B:USR1@120
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=runs/llama/slurm-%j.log
#SBATCH --partition=gpu
#SBATCH --account=team

set -uo pipefail
export PATH=/opt/halfbyte/bin:$PATH
export SLURM_EXIT_ERROR=6
MASTER_ADDR="$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)"
export MASTER_ADDR MASTER_PORT=$((20000 + SLURM_JOB_ID % 10000))

{nccl}

# SIGTERM to the processes lets them save: Slurm's own signal to them, for srun answers one by killing them. On
# preemption Slurm has sent it already. bash runs a trap only between commands, hence the wait.
ending=
trap 'ending=time; scancel --signal=TERM "$SLURM_JOB_ID"' USR1
trap 'ending=preempted' TERM

attempt=0
while true; do
  rm -f runs/llama/errors/cause
  srun --kill-on-bad-exit=1 halfbyte run 'runs/my llama/submit.yaml' &
  step=$!
  while kill -0 "$step" 2>/dev/null; do wait "$step"; done
  wait "$step"
  code=$?
  # srun has the highest code of all, of processes that it ended itself as well; the first that knew why left its own.
  if [ "$code" -ne 0 ] && [ -s runs/llama/errors/cause ]; then code=$(cat runs/llama/errors/cause); fi
  # 1 to 4 would only come again. Above: a process hung, was killed or lost its GPU, or it is Slurm's own error.
  if [ "$code" -le 4 ]; then break; fi
  if [ -n "$ending" ] || [ "$attempt" -ge 3 ]; then break; fi
  attempt=$((attempt + 1))
  echo "restart $attempt of 3 from the newest checkpoint (srun ended with $code)" >&2
done
if [ "$ending" = time ] && [ "${{SLURM_RESTART_COUNT:-0}}" -lt 100 ]; then
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
"""


HERE = Path("/home/me")


def recipe(tensor=2, pipeline=2, data=4, per_node=8) -> Recipe:
    made = Recipe()
    made.run.name, made.run.dir = "llama", "runs/llama"
    made.parallel.tensor, made.parallel.pipeline, made.parallel.data = tensor, pipeline, data
    made.launch.gpus_per_node = per_node
    return made


def test_golden():
    made = recipe()
    made.launch.partition, made.launch.account = "gpu", "team"
    (job,) = sbatch.jobs(made, Path("runs/my llama/submit.yaml"), 2)
    text = sbatch.text(made, job, programs="/opt/halfbyte/bin", revision="0123456789ab-dirty", here=HERE)
    assert text == GOLDEN.format(nccl=sbatch.NCCL)
    assert all(line.startswith("#") for line in sbatch.NCCL.splitlines())


def test_a_small_world_takes_as_many_tasks_as_it_has_processes():
    made = recipe(data=1)
    made.launch.port, made.launch.gpus, made.launch.max_restarts = 29500, False, 0
    (job,) = sbatch.jobs(made, Path("submit.yaml"), 1)
    text = sbatch.text(made, job, programs=None, revision=None, here=HERE)
    assert "#SBATCH --ntasks-per-node=4\n#SBATCH --time" in text
    assert "MASTER_PORT=29500\n" in text
    assert "PATH=" not in text
    assert "revision" not in text
    assert '[ "$attempt" -ge 0 ]; then break' in text


def test_cores_are_asked_for_and_handed_on_to_srun():
    made = recipe()
    made.launch.cpus_per_task = 14
    (job,) = sbatch.jobs(made, Path("submit.yaml"), 2)
    text = sbatch.text(made, job, programs=None, revision=None, here=HERE)
    assert "#SBATCH --gpus-per-node=8\n#SBATCH --cpus-per-task=14\n" in text
    assert text.index("export SRUN_CPUS_PER_TASK=14\n") < text.index("srun --kill-on-bad-exit=1")


@pytest.mark.parametrize(
    ("folder", "option"),
    [
        ("runs/a-b.c_1", "--output=runs/a-b.c_1/slurm-%j.log"),
        ("my runs/x", '--output="my runs/x/slurm-%j.log"'),
        ("50%", "--output=50%%/slurm-%j.log"),
        ("größe#1", '--output="größe#1/slurm-%j.log"'),
        ('a"b\\c', '--output="a\\"b\\\\c/slurm-%j.log"'),
    ],
)
def test_the_log_of_a_job_is_in_the_run_folder_whatever_its_name(folder, option):
    assert sbatch.log_option(Path(folder) / "slurm-%j.log") == option


def test_a_container_sees_what_the_recipe_names(tmp_path):
    """Folders at their own places, none twice or inside another; links with their targets; files by their folders."""
    made, here = recipe(), tmp_path / "project"
    for name in ("project/runs", "store/model", "texts"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "texts" / "train.jsonl").touch()
    (tmp_path / "link").symlink_to(tmp_path / "store" / "model")
    made.model.path, made.data.train = f"{tmp_path}/link", f"{tmp_path}/texts/train.jsonl"
    assert sbatch.container_options(made, here) == []
    made.launch.container = "nvcr.io/pytorch:25.10"
    image, mounts, start = sbatch.container_options(made, here)
    assert (image, start) == ("--container-image=nvcr.io/pytorch:25.10", f"--container-workdir={here}")
    seen = [tmp_path / name for name in ("link", "project", "store/model", "texts")]
    assert mounts == "--container-mounts=" + ",".join(f"{folder}:{folder}" for folder in seen)
    made.run.dir = "../elsewhere"
    assert f"{tmp_path}/elsewhere:{tmp_path}/elsewhere," in sbatch.container_options(made, here)[1]
    (job,) = sbatch.jobs(made, Path("submit.yaml"), 2)
    text = sbatch.text(made, job, programs=None, revision=None, here=here)
    assert f"srun --kill-on-bad-exit=1 {image} --container-mounts={tmp_path}/elsewhere:" in text
    made.model.path = "/models/a,b"
    with pytest.raises(
        RecipeError, match=r"launch.container = nvcr.io/pytorch:25.10: /models/a,b: a container sees no"
    ):
        submit(made, 2, dry_run=True)


@pytest.mark.parametrize(("task", "requeued"), [(1, False), (4, False), (5, True)])
def test_of_jobs_in_a_row_only_the_last_goes_back_into_the_queue(task, requeued, tmp_path):
    """Any other one leaves its place to the next. By its number alone a real Slurm put back the whole array."""
    (job,) = sbatch.jobs(recipe(), Path("submit.yaml"), 2, array=5)
    text = sbatch.text(recipe(), job, programs=None, revision=None, here=HERE)
    assert "#SBATCH --array=1-5%1\n" in text
    assert "#SBATCH --output=runs/llama/slurm-%A_%a.log\n" in text
    assert 'scancel --signal=TERM "${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID"' in text
    end = f"ending=time code=0{text.rpartition('done')[2]}"
    fake(tmp_path / "scontrol", f'echo "$@" > {tmp_path}/called')
    array = {
        "SLURM_JOB_ID": "12",
        "SLURM_ARRAY_JOB_ID": "12",
        "SLURM_ARRAY_TASK_ID": str(task),
        "SLURM_ARRAY_TASK_MAX": "5",
    }
    search = {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    subprocess.run(["bash", "-euc", end], env=array | search, check=True)
    called = tmp_path / "called"
    assert (called.read_text() if called.exists() else None) == ("requeue 12_5\n" if requeued else None)
    with pytest.raises(RecipeError, match="--jobs = 0: must be positive"):
        sbatch.jobs(recipe(), Path("submit.yaml"), 2, array=0)


def test_the_script_restarts_what_died_and_hands_signals_on(tmp_path):
    """The file itself under bash, with small programs in the place of Slurm's."""
    made = recipe(data=1)
    made.run.dir, made.launch.max_restarts = str(tmp_path), 3
    (job,) = sbatch.jobs(made, tmp_path / "submit.yaml", 1)
    script = tmp_path / "submit.sbatch"
    script.write_text(sbatch.text(made, job, programs=str(tmp_path), revision=None, here=HERE))
    # Killed, hung, a lost GPU, and then it works until SIGTERM comes, on which it saves.
    srun = """
        echo start >> $0.log
        case $(wc -l < $0.log) in 1) kill -9 $$ ;; 2) exit 5 ;; 3) exit $SLURM_EXIT_ERROR ;; esac
        trap 'echo saved >> $0.log; exit 0' TERM
        echo $$ > $0.pid
        kill -USR1 $PPID
        sleep 10 & wait
    """
    programs = {"srun": srun, "scontrol": 'echo "$@" >> $0.log; echo node1'}
    programs |= {"scancel": f'[ "$*" = "--signal=TERM 4711" ] && kill -TERM $(cat {tmp_path}/srun.pid)'}
    for name, content in programs.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{textwrap.dedent(content)}\n")
        (tmp_path / name).chmod(0o755)
    slurm = os.environ | {"SLURM_JOB_NODELIST": "node[1-2]", "SLURM_JOB_ID": "4711"}
    done = subprocess.run(["bash", script], env=slurm, capture_output=True, text=True, timeout=30, check=False)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "srun.log").read_text().split() == ["start"] * 4 + ["saved"]
    restarts = [line for line in done.stderr.splitlines() if line.startswith("restart")]
    assert restarts == [
        "restart 1 of 3 from the newest checkpoint (srun ended with 137)",
        "restart 2 of 3 from the newest checkpoint (srun ended with 5)",
        "restart 3 of 3 from the newest checkpoint (srun ended with 6)",
    ]
    assert (tmp_path / "scontrol.log").read_text().splitlines() == ["show hostnames node[1-2]", "requeue 4711"]


@pytest.mark.parametrize(
    ("srun", "code", "starts", "withdrawn"),
    [
        ("exit 0", 0, 1, False),
        ("exit 2", 2, 1, True),  # a bad recipe
        ("exit 3", 3, 1, True),  # the gate
        ("echo 1 > errors/cause; kill -9 $$", 1, 1, True),  # a full disk; srun killed who waited for that process
        ("kill -9 $$", 137, 2, False),  # the next job may get a better node
        ("exit 6", 6, 2, False),
        ("kill -USR1 $PPID; sleep 0.2; exit 1", 1, 1, False),  # time was up in a stage that has nothing to save
    ],
)
def test_an_array_repeats_only_what_may_end_otherwise(srun, code, starts, withdrawn, tmp_path):
    made = recipe(data=1)
    made.run.dir, made.launch.max_restarts = str(tmp_path / "my run"), 1
    (job,) = sbatch.jobs(made, tmp_path / "submit.yaml", 1, array=3)
    errors = tmp_path / "my run" / "errors"
    errors.mkdir(parents=True)
    (errors / "cause").write_text("2\n")  # of an earlier start
    fake(tmp_path / "srun", f"cd '{tmp_path}/my run'; echo >> starts; {srun}")
    fake(tmp_path / "scontrol", f'echo "$@" >> {tmp_path}/asked')
    fake(tmp_path / "scancel", f'echo "$@" >> {tmp_path}/asked')
    slurm = {"SLURM_JOB_NODELIST": "node1", "SLURM_JOB_ID": "13", "SLURM_ARRAY_JOB_ID": "12"}
    slurm |= {"SLURM_ARRAY_TASK_ID": "1", "SLURM_ARRAY_TASK_MAX": "3"}
    script = sbatch.text(made, job, programs=str(tmp_path), revision=None, here=HERE)
    done = subprocess.run(["bash", "-c", script], env=os.environ | slurm, capture_output=True, text=True, check=False)
    assert done.returncode == code, done.stderr
    assert (tmp_path / "my run" / "starts").read_text() == "\n" * starts
    asked = (tmp_path / "asked").read_text().splitlines()
    assert (asked[-2:] == ["hold 12_3", "--state=PENDING 12"]) is withdrawn
    assert ("which would only come again" in done.stderr) is withdrawn


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
        sbatch.jobs(recipe(data=data), Path("submit.yaml"), nodes)
    assert caught.value.code == USAGE
    assert len(caught.value.problems) == 1


@pytest.mark.parametrize(
    ("tensor", "data", "per_node", "noted"),
    [(8, 2, 8, False), (16, 1, 8, True), (8, 1, 4, True), (3, 4, 4, True), (3, 1, 4, False), (1, 16, 4, False)],
)
def test_tensor_parallelism_across_nodes_gets_a_note(tensor, data, per_node, noted, tmp_path):
    """Not a refusal: in a rack of GB200 NVL72, four GPUs a node, NVLink does join them."""
    made = recipe(tensor=tensor, pipeline=1, data=data, per_node=per_node)
    made.run.dir = str(tmp_path)
    first = submit(made, -(-made.world_size // per_node), dry_run=True).splitlines()[0]
    said = f"note: parallel.tensor = {tensor}: spans nodes (launch.gpus_per_node = {per_node}), and every layer waits"
    assert first.startswith(said) == noted
    assert not noted or "a rack of GB200-NVL72 (72 GPUs); elsewhere take a divisor" in first
    made.launch.gpus = False
    assert sbatch.links_note(made) is None


@pytest.fixture
def made(tmp_path):
    made = recipe()
    made.run.dir = str(tmp_path / "run")
    made.model.path = "/models/llama"
    return made


def fake(program, script):
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(0o755)


def fake_sbatch(folder, monkeypatch, script):
    folder.mkdir()
    fake(folder / "sbatch", script)
    monkeypatch.setenv("PATH", str(folder), prepend=":")


def test_dry_run_writes_and_calls_nothing(made, tmp_path, monkeypatch):
    fake_sbatch(tmp_path / "bin", monkeypatch, f"touch {tmp_path}/called")
    said = submit(made, 2, dry_run=True)
    written = (tmp_path / "run/submit.sbatch").read_text()
    assert said == f"{tmp_path}/run/submit.sbatch\n\n{written}"
    assert not (tmp_path / "called").exists()


def test_the_job_number_comes_back(made, tmp_path, monkeypatch):
    fake_sbatch(tmp_path / "bin", monkeypatch, f'echo "$@" > {tmp_path}/called; echo "4711;cluster"')
    assert "submit.sbatch: submitted as job 4711\n" in submit(made, 2)
    assert (tmp_path / "called").read_text() == f"--parsable {tmp_path}/run/submit.sbatch\n"
    assert load(tmp_path / "run" / "submit.yaml") == load(tmp_path / "run" / "resolved.yaml") == made


@pytest.mark.parametrize(("array", "last"), [(1, "1"), (3, "1_3")])
def test_evaluation_and_export_wait_for_what_they_need(made, tmp_path, monkeypatch, array, last):
    count = f'echo "$@" >> {tmp_path}/called; wc -l < {tmp_path}/called'
    fake_sbatch(tmp_path / "bin", monkeypatch, count)
    fake(
        tmp_path / "bin" / "squeue",
        f'[ "$2" = --jobs=3 ] && echo "3 llama-export PENDING"; echo "$@" > {tmp_path}/asked',
    )
    said = submit(made, 2, array=array, separate=True)
    folder = tmp_path / "run"
    assert (tmp_path / "called").read_text().splitlines() == [
        f"--parsable {folder}/submit.sbatch",
        f"--parsable --dependency=afterok:{last} --kill-on-invalid-dep=yes {folder}/evaluate.sbatch",
        f"--parsable --dependency=afterok:2 --kill-on-invalid-dep=yes {folder}/export.sbatch",
    ]
    assert said.endswith(f"export.sbatch: submitted as job 3\nhalfbyte status {folder} follows it")
    export = (folder / "export.sbatch").read_text()
    assert f"bash -c 'halfbyte gate {folder} && halfbyte export {folder}' &\n" in export
    assert "--gpus" not in export
    assert "#SBATCH --nodes=1\n#SBATCH --ntasks-per-node=1\n" in export
    assert status(made) == f"llama: qat, {folder}\n  job 3 llama-export PENDING\n  no checkpoint yet"


def test_status_of_a_run_folder(made, tmp_path, monkeypatch):
    folder = tmp_path / "run"
    (folder / "checkpoints" / "step_00000040").mkdir(parents=True)
    (folder / "errors").mkdir()
    write_json(folder / "state.json", {"evaluate.bf16": 0, "train": 100})
    write_json(folder / "gate.json", {"verdict": "inconclusive"})
    for rank, when in ((0, 2.0), (1, 1.0)):
        write_json(folder / "errors" / f"rank{rank}.json", {"time": when, "message": f"of rank {rank}"})
    shown = []
    follow(made, shown.append)  # ends at once: nothing is in a queue
    assert shown == [
        f"llama: qat, {folder}\n  no job in the queue\n  checkpoint after step 40 of 100\n"
        "  done: evaluate.bf16, train\n  gate: inconclusive\n  last message: of rank 1"
    ]
    write_json(folder / "submit.json", {"jobs": [{"id": "7", "name": "llama", "file": "submit.sbatch"}]})
    (tmp_path / "bin").mkdir()
    write_json(folder / "submit.json", {"jobs": [7]})
    with pytest.raises(UserError, match=r"submit\.json: damaged"):
        status(made)


@pytest.fixture
def submitted_run(made, tmp_path):
    """A run folder that names a job."""
    write_json(tmp_path / "run" / "submit.json", {"jobs": [{"id": "7", "name": "llama", "file": "submit.sbatch"}]})
    return made


def test_status_without_slurm_says_what_the_folder_holds(submitted_run, tmp_path, monkeypatch, capsys):
    """The folder may lie on a disk that a workstation sees, too. What it cannot follow to its end, it says."""
    monkeypatch.setenv("PATH", str(tmp_path))
    save(submitted_run, tmp_path / "run" / "resolved.yaml")
    said = (
        f"llama: qat, {tmp_path}/run\n  jobs unknown: squeue: not found on this machine; ask on a Slurm login node\n"
        "  no checkpoint yet\n"
    )
    assert main(["status", str(tmp_path / "run")]) == OK
    assert capsys.readouterr() == (said, "")
    assert main(["status", str(tmp_path / "run"), "--follow"]) == FAILED
    assert capsys.readouterr() == (said, "error: squeue: not found on this machine; ask on a Slurm login node\n")


def test_a_busy_controller_is_asked_again(submitted_run, tmp_path, monkeypatch):
    monkeypatch.setattr("halfbyte.launch.status.FOLLOW_S", 0)
    busy = f"echo 'slurm_load_jobs error: Unable to contact slurm controller' >&2; echo >> {tmp_path}/asked; exit 1"
    (tmp_path / "bin").mkdir()
    fake(tmp_path / "bin" / "squeue", f"[ -s {tmp_path}/asked ] || {{ {busy}; }}")
    monkeypatch.setenv("PATH", str(tmp_path / "bin"), prepend=":")
    shown = []
    follow(submitted_run, shown.append)
    assert [text.splitlines()[1] for text in shown] == [
        "  jobs unknown: squeue: slurm_load_jobs error: Unable to contact slurm controller",
        "  no job in the queue",
    ]


def test_what_sbatch_says_is_passed_on(made, tmp_path, monkeypatch):
    fake_sbatch(tmp_path / "bin", monkeypatch, "echo 'sbatch: error: invalid account' >&2; exit 1")
    with pytest.raises(UserError, match="invalid account"):
        submit(made, 2)


def test_a_later_job_that_is_refused_names_those_that_were_not(made, tmp_path, monkeypatch):
    one = f'[ -e {tmp_path}/called ] && {{ echo "sbatch: error: no such partition" >&2; exit 1; }}'
    fake_sbatch(tmp_path / "bin", monkeypatch, f"{one}; touch {tmp_path}/called; echo 12")
    with pytest.raises(UserError) as caught:
        submit(made, 2, separate=True)
    assert str(caught.value) == (
        f"sbatch refused {tmp_path}/run/evaluate.sbatch: sbatch: error: no such partition; submitted before it: job "
        "12, which scancel takes back"
    )
    assert [job["id"] for job in submitted(tmp_path / "run")] == ["12"]


def test_a_run_whose_job_is_in_the_queue_is_not_submitted_again(made, tmp_path, monkeypatch):
    fake_sbatch(tmp_path / "bin", monkeypatch, "echo 12")
    fake(tmp_path / "bin" / "squeue", "echo '12 llama PENDING, 0:00 of 4:00:00, (Priority)'")
    submit(made, 2)
    before = (tmp_path / "run" / "submit.yaml").read_text()
    made.train.steps = 7
    for dry_run in (False, True):
        with pytest.raises(UserError, match=r"run: job 12 llama PENDING, .* is in the queue for this run; wait for it"):
            submit(made, 2, dry_run=dry_run)
    assert (tmp_path / "run" / "submit.yaml").read_text() == before  # what the job will run
    fake(tmp_path / "bin" / "squeue", "echo 'slurm_load_jobs error: Invalid job id specified' >&2; exit 1")
    submit(made, 2)
    assert [job["id"] for job in submitted(tmp_path / "run")] == ["12", "12"]


def test_an_answer_without_a_number_is_one_line(made, tmp_path, monkeypatch):
    fake_sbatch(tmp_path / "bin", monkeypatch, "echo Welcome; echo to the cluster; echo 12")
    with pytest.raises(UserError, match=r"submit.sbatch: answered 'Welcome\\nto the cluster\\n12', which is no job's"):
        submit(made, 2)


@pytest.mark.parametrize("content", ["{}", '{"jobs": 3}', '{"jobs": [{"id": 3}]}', "[]"])
def test_a_damaged_record_is_found_before_anything_is_submitted(made, tmp_path, monkeypatch, content):
    fake_sbatch(tmp_path / "bin", monkeypatch, f"touch {tmp_path}/called; echo 12")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "submit.json").write_text(content)
    with pytest.raises(UserError, match=r"submit\.json: damaged"):
        submit(made, 2)
    assert not (tmp_path / "called").exists()


@pytest.mark.parametrize(
    ("limit", "seconds"),
    [("30", 1800), ("2:30", 150), ("1:02:03", 3723), ("1-2", 93600), ("1-2:03", 93780), ("1-2:03:04", 93784), ("0", 0)],
)
def test_a_time_limit_is_read_as_slurm_reads_it(limit, seconds):
    assert seconds_of(limit) == seconds


def test_the_revision_is_halfbyte_s_own(tmp_path, monkeypatch):
    """An installed copy inside somebody else's repository has none."""
    git = ["git", "-C", str(tmp_path), "-c", "user.name=x", "-c", "user.email=x"]
    subprocess.run([*git, "init", "-q"], check=True)
    subprocess.run([*git, "commit", "-q", "--allow-empty", "-m", "theirs"], check=True)
    place = tmp_path / "revision.py"
    place.write_text("")
    monkeypatch.setattr(revision, "__file__", str(place))
    assert revision.revision(12) is None
    subprocess.run([*git, "add", "revision.py"], check=True)
    assert re.fullmatch(r"[0-9a-f]{12}-dirty", revision.revision(12) or "")


def test_no_slurm_here(made, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match="sbatch: not found"):
        submit(made, 2)
