"""The command as a user meets it: exit codes, one line per problem, what `run` and the stage commands hand on."""

import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import save_file

from halfbyte.launch import cli, start
from halfbyte.launch.check import export_bytes, plan_text
from halfbyte.launch.pipeline import SCORED, STAGES
from halfbyte.launch.plan_memory import memory_per_rank
from halfbyte.launch.plan_model import Architecture, Layout
from halfbyte.training import fetch
from halfbyte.training.errors import FAILED, GATE_FAILED, OK, USAGE
from halfbyte.training.resolve import load, resolve, shipped
from halfbyte.training.rules import find_shape


@pytest.fixture
def calls(tmp_path, monkeypatch):
    """Stands in for the workers and for `fetch`; the list of what was asked of them."""
    made = []

    def launched(recipe, stages, *, allow_failed_gate=False):
        assert load(Path(recipe.run.dir) / "resolved.yaml") == recipe  # written before anything starts
        made.append((recipe, list(stages), allow_failed_gate))
        return GATE_FAILED if allow_failed_gate else OK

    def fetched(name, directory):
        made.append(("fetch", name, directory))
        directory.mkdir(parents=True)
        for file in ("tokenizer.json", "model.safetensors"):
            (directory / file).touch()
        (directory / "config.json").write_text(
            (Path(cli.__file__).parent.parent / "recipes/shapes/tiny.json").read_text()
        )
        return directory

    monkeypatch.chdir(tmp_path)
    for name in ("RANK", "SLURM_PROCID"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(start, "launch", launched)
    monkeypatch.setattr(start, "run_here", launched)
    monkeypatch.setattr(fetch, "fetch", fetched)
    return made


def errors(capsys) -> list[str]:
    lines = capsys.readouterr().err.splitlines()
    assert all(line.startswith("error: ") for line in lines), lines
    return [line.removeprefix("error: ") for line in lines]


@pytest.mark.parametrize("name", shipped())
def test_shipped_recipes_pass_check(name, capsys):
    assert cli.main(["check", name]) == OK
    plan = capsys.readouterr().out.splitlines()
    assert len(plan) <= 50
    assert plan[0].split() == ["recipe", name]
    # The header comment holds the commands that run the recipe.
    assert f"halfbyte run {name}" in shipped()[name].read_text().replace("recipes/", "").replace(".yaml", "")


def test_check_reports_everything_and_starts_nothing(calls, capsys):
    assert cli.main(["check", "tiny", "train.stepz=4", "parallel.tensor=3", "foo"]) == USAGE
    found = errors(capsys)
    assert len(found) == 3
    assert calls == []


def test_what_the_system_refuses_is_one_line(capsys):
    assert cli.main(["report", "a" * 300]) == FAILED
    (said,) = errors(capsys)
    assert said.endswith("/resolved.yaml: File name too long; mend that and give the command again")


def test_a_folder_that_another_process_works_in_is_left_alone(calls, capsys, tmp_path):
    folder = tmp_path / "runs" / "tiny"
    with start.holding(folder):
        assert cli.main(["run", "tiny", f"run.dir={folder}"]) == FAILED
        assert sorted(path.name for path in folder.iterdir()) == [".lock"]
    holder = f"process {os.getpid()} on {socket.gethostname()}"
    (said,) = errors(capsys)
    assert said == f"run.dir = {folder}: {holder} is at work there; wait until it has ended, or choose another run.dir"
    assert cli.main(["run", "tiny", f"run.dir={folder}"]) == OK
    with start.holding(folder):
        assert cli.main(["gate", str(folder)]) == FAILED
    assert cli.main(["gate", str(folder)]) == OK


def test_recipes_are_listed_with_a_description(capsys):
    assert cli.main(["recipes"]) == OK
    lines = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines())
    assert lines.keys() == shipped().keys()


def test_a_reader_that_leaves_is_no_error(command, environment):
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run([*command, "recipes"], stdout=write, stderr=subprocess.PIPE, env=environment, check=False)
    os.close(write)
    assert (done.returncode, done.stderr) == (OK, b"")


def test_run_fetches_saves_and_launches_all_stages(calls, tmp_path, capsys):
    assert cli.main(["run", "tiny", "train.steps=3", "--allow-failed-gate", "train.seed=5"]) == GATE_FAILED
    fetching, (recipe, stages, allowed) = calls
    assert fetching == ("fetch", "tiny", tmp_path / "models/tiny-llama")
    assert (recipe.train.steps, recipe.train.seed) == (3, 5)  # an option may stand between overrides
    assert stages == list(STAGES)
    assert allowed
    assert (tmp_path / "runs/tiny/resolved.yaml").is_file()
    assert "resuming" not in capsys.readouterr().out
    cli.main(["run", "tiny", "train.steps=3", "train.seed=5", "run.dir=runs/b", "distill.top_k=4"])
    said = capsys.readouterr().out.splitlines()
    assert said[-1] == "note: method qat does not read distill.top_k"


def test_a_run_without_an_export_needs_a_gate_that_can_do_without(calls, capsys):
    assert cli.main(["run", "tiny", "--no-export"]) == USAGE
    assert errors(capsys) == ["--no-export leaves nothing for gate.judges = exported to judge; add gate.judges=trained"]
    assert [call[0] for call in calls] == ["fetch"]
    cli.main(["run", "tiny", "--no-export", "gate.judges=trained"])
    assert calls[-1][1] == list(SCORED)


def test_run_on_an_existing_folder_resumes_only_the_same_run(calls, tmp_path, capsys):
    assert cli.main(["run", "tiny"]) == OK
    assert cli.main(["run", "tiny", "parallel.pipeline=2", "train.steps=9"]) == OK
    assert "resuming runs/tiny\n" in capsys.readouterr().out
    saved = (tmp_path / "runs/tiny/resolved.yaml").read_text()
    assert cli.main(["run", "tiny", "train.learning_rate=1", "quantize.format=mxfp4"]) == USAGE
    found = errors(capsys)
    assert [line.partition(" = ")[0] for line in found] == ["quantize.format", "train.learning_rate"]
    assert all("runs/tiny" in line and "new run.dir" in line for line in found)
    assert (tmp_path / "runs/tiny/resolved.yaml").read_text() == saved
    assert len(calls) == 3  # fetch and two launches


def test_run_needs_weights(calls, capsys):
    assert cli.main(["run", "llama31_8b_nvfp4_qat"]) == USAGE
    (line,) = errors(capsys)
    assert line.startswith("model.path = ")
    assert calls == []


def test_processes_under_srun_do_not_fetch(calls, monkeypatch, capsys):
    for name, value in {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    assert cli.main(["run", "tiny"]) == USAGE
    assert "halfbyte fetch tiny" in errors(capsys)[0]


@pytest.mark.parametrize("stage", ["train", "evaluate", "gate", "export", "verify"])
def test_stage_commands_run_their_stage_in_the_folder(calls, tmp_path, stage):
    cli.main(["run", "tiny"])
    (tmp_path / "runs/tiny").rename(tmp_path / "moved")
    assert cli.main([stage, "moved", "gate.threshold_pp=1"]) == OK
    recipe, stages, allowed = calls[-1]
    assert recipe.run.dir == "moved"
    assert recipe.gate.threshold_pp == 1
    assert stages == [stage]
    assert not allowed


def test_stage_commands_keep_to_the_run(calls, tmp_path, capsys):
    assert cli.main(["gate", "nowhere"]) == USAGE
    assert "nowhere: holds no resolved.yaml" in errors(capsys)[0]
    cli.main(["run", "tiny"])
    capsys.readouterr()
    assert cli.main(["export", "runs/tiny", "train.seed=1"]) == USAGE
    assert cli.main(["gate", "runs/tiny", "gate.confidence=7"]) == USAGE
    assert [line.partition(" = ")[0] for line in errors(capsys)] == ["train.seed", "gate.confidence"]
    # Training needs the model; judging what was scored does not.
    (tmp_path / "models/tiny-llama/model.safetensors").unlink()
    assert cli.main(["train", "runs/tiny"]) == USAGE
    assert cli.main(["gate", "runs/tiny"]) == OK


def test_submit_dry_run_prints_the_file(calls, capsys):
    assert cli.main(["submit", "tiny", "--nodes", "1", "--dry-run", "parallel.pipeline=2"]) == OK
    out = capsys.readouterr().out
    assert out.startswith("runs/tiny/submit.sbatch\n")
    assert "halfbyte run runs/tiny/submit.yaml &" in out
    assert "  pipeline: 2" in Path("runs/tiny/submit.yaml").read_text()
    assert calls == []
    assert cli.main(["submit", "tiny", "--nodes", "2", "--dry-run"]) == USAGE
    assert "--nodes = 2" in errors(capsys)[0]


def test_fetch(calls, tmp_path, capsys):
    assert cli.main(["fetch", "tiny"]) == OK
    assert cli.main(["fetch", "tiny", "elsewhere"]) == OK
    assert [call[2] for call in calls] == [Path("models/tiny-llama"), Path("elsewhere")]
    assert cli.main(["fetch", "gpt"]) == USAGE
    assert "smollm2, tiny" in errors(capsys)[0]


def test_ctrl_c_is_one_line(monkeypatch, capsys):
    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr("halfbyte.training.resolve.resolve", interrupted)
    assert cli.main(["check", "tiny"]) == FAILED
    assert errors(capsys) == ["stopped by SIGINT"]


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["nope"], "halfbyte: argument COMMAND: invalid choice: 'nope' (choose from 'run', "),
        (["run"], "halfbyte run: the following arguments are required: RECIPE; see halfbyte run --help"),
        (["run", "tiny", "--frob"], "halfbyte: unrecognized arguments: --frob"),
        (["submit", "tiny"], "halfbyte submit: the following arguments are required: --nodes"),
        (["recipes", "extra"], "halfbyte: unrecognized arguments: extra"),
        (["tail", "run", "--lines", "many"], "halfbyte tail: argument --lines: invalid int value: 'many'"),
    ],
)
def test_bad_usage_is_one_line_and_code_2(argv, says, capsys):
    with pytest.raises(SystemExit) as caught:
        cli.main(argv)
    assert caught.value.code == USAGE
    (line,) = errors(capsys)
    assert line.startswith(says)
    assert line.endswith(" --help")


def test_no_command_shows_the_help(capsys):
    assert cli.main([]) == USAGE
    assert "COMMAND" in capsys.readouterr().err


@pytest.mark.parametrize("argv", [["--version"], ["recipes"], ["check", "tiny"]])
def test_who_has_read_enough_is_no_error(argv, capsys, nobody_reads):
    """`halfbyte check tiny | head -1`: neither a line about it nor another exit code."""
    nobody_reads()
    assert cli.main(argv) == OK
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("words", "streams", "code"),
    [
        ("--version", ">&-", OK),
        ("check nope", ">&- 2>&-", USAGE),
        ("check nope", "2>/dev/full", USAGE),
        ("recipes", ">/dev/full", FAILED),
    ],
)
def test_the_exit_code_stands_where_nobody_listens(words, streams, code, command):
    done = subprocess.run(f"{command[0]} {words} {streams}", shell=True, capture_output=True, text=True)
    assert done.returncode == code
    assert "Traceback" not in done.stderr


def test_no_file_takes_the_place_of_a_closed_stream(tmp_path):
    """What a library prints would end up in it, and it may be a checkpoint."""
    code = (
        "import os; from halfbyte.training.environment import open_standard_streams; open_standard_streams(); "
        "file = open('numbers', 'w'); print('to nobody', flush=True); "
        "file.write(f'{file.fileno()} {[os.get_inheritable(n) for n in range(3)]}')"
    )
    subprocess.run(f'{sys.executable} -c "{code}" <&- >&- 2>&-', shell=True, cwd=tmp_path, check=True)
    assert re.fullmatch(r"[3-9] \[True, True, True\]", (tmp_path / "numbers").read_text())


def test_help_answers_at_once():
    before = os.times()
    subprocess.run([sys.executable, "-m", "halfbyte.launch.cli", "--help"], check=True, capture_output=True)
    after = os.times()  # of processor time: other processes may be busy
    assert sum(after[2:4]) - sum(before[2:4]) < 0.6


@pytest.mark.parametrize(
    ("form", "scale", "scalars"),
    [
        ("nvfp4", "float8_e4m3fn", 2),
        ("w4a16_nvfp4", "float8_e4m3fn", 1),
        ("w4a8_nvfp4_fp8", "float8_e4m3fn", 2),
        ("mxfp4", "uint8", 0),
    ],
)
def test_export_bytes_equal_a_file_of_these_tensors(tmp_path, form, scale, scalars):
    """The promise of `check` against the data section of a real safetensors file of that layout."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    recipe = resolve("tiny", [f"quantize.format={form}", "quantize.exclude=[lm_head, '*.0.*']"])
    shape, _ = find_shape(recipe)
    assert shape is not None
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig.from_json_file(recipe.model.config))
    tensors = {}
    for name, weight in model.state_dict().items():
        if "_proj" not in name or ".layers.0." in name:
            tensors[name] = torch.zeros(weight.shape, dtype=torch.bfloat16)
            continue
        n, k = weight.shape
        block = 32 if form in ("mxfp4", "w4a8_nvfp4_fp8") else 16
        tensors[name] = torch.zeros(n, k // 2, dtype=torch.uint8)
        tensors[f"{name}_scale"] = torch.zeros(n, k // block, dtype=getattr(torch, scale))
        tensors |= {f"{name}.{i}": torch.zeros(()) for i in range(scalars)}
    save_file(tensors, tmp_path / "model.safetensors")
    raw = (tmp_path / "model.safetensors").read_bytes()
    assert export_bytes(recipe, shape) == len(raw) - 8 - int.from_bytes(raw[:8], "little")


def test_memory_follows_the_layout():
    def total(*overrides):
        recipe = resolve("llama31_8b_nvfp4_qat", list(overrides))
        shape, _ = find_shape(recipe)
        assert shape is not None
        return sum(memory_per_rank(recipe, Architecture.dense("", shape), Layout.of(recipe)).values())

    plain = total()
    assert total("parallel.tensor=4") < plain
    assert total("parallel.pipeline=4") < plain
    assert total("parallel.data=8") < plain
    assert total("train.distributed_optimizer=false") > plain
    assert total("train.recompute=true") < plain
    assert total("method=qad") > plain
    assert total("parallel.tensor=1", "parallel.sequence=false") > 1.8 * plain  # the optimizer's state is sharded


def test_plan_names_what_stays_unquantized_and_where_it_goes(tmp_path):
    recipe = resolve("tiny", ["quantize.exclude=[lm_head, '*.0.mlp.*']", f"run.dir={tmp_path}"])
    shape, _ = find_shape(recipe)
    assert shape is not None
    (tmp_path / "resolved.yaml").touch()
    plan = plan_text(recipe, shape)
    assert "25 of 28 linears; not quantized: lm_head, *.0.mlp.* (3 linears)" in plan
    assert "3/4" in plan
    assert f"{tmp_path} (there already: `halfbyte run` resumes it)" in plan
