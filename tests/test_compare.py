"""`halfbyte compare`, `halfbyte gate --against`, gate.control and gate.judges on run folders written by hand."""

import json
import math
import random
from pathlib import Path

import pytest

from halfbyte.launch import cli, handover
from halfbyte.launch.summary import score_rows, summary_text
from halfbyte.training.errors import FAILED, GATE_FAILED, GATE_INCONCLUSIVE, OK, USAGE, RecipeError, UserError
from halfbyte.training.files import read_json, write_json
from halfbyte.training.resolve import load, resolve, save

TASKS = ("lambada", "english")
SMALL = ("gate.threshold_pp=5", "gate.perplexity_ratio=1.5")
"""What 1,000 items can decide."""


def rows(seed, *, shift=0.0, items=1000, kl=None):
    """One task's scores: a difficulty that all models share, this model's noise, and what it is better by, nats."""
    noise, scores = random.Random(f"noise {seed}"), []
    for i in range(items):
        value = random.Random(i).gauss(-4, 2) + noise.gauss(0, 0.05) + shift
        score = {"item": i, "content": f"item {i}", "loglikelihood": value, "tokens": 2, "bytes": 9}
        score |= {"correct": value > -3}
        scores.append(score | {"kl": kl, "agreement": None if kl is None else 0.9})
    return scores


def write_stage(folder: Path, stage: str, scores: dict[str, list]) -> None:
    (folder / "evaluate").mkdir(parents=True, exist_ok=True)
    for task, items in scores.items():
        lines = "".join(json.dumps(row) + "\n" for row in items)
        (folder / "evaluate" / f"{stage}.{task}.jsonl").write_text(lines)
    path = folder / "evaluate.json"
    summary = {}
    for task, items in scores.items():
        weight = len(items) if task == "lambada" else sum(row["tokens"] for row in items)
        perplexity = math.exp(-math.fsum(row["loglikelihood"] for row in items) / weight)
        accuracy = {"accuracy": sum(row["correct"] for row in items) / len(items)} if task == "lambada" else {}
        summary[task] = accuracy | {"perplexity": perplexity, "n": len(items)}
    write_json(path, (read_json(path) if path.exists() else {}) | {stage: summary})


@pytest.fixture
def make_run(tmp_path, monkeypatch):
    """make_run("a", shift=...): a run folder with all stages, the exported files `shift` nats better than BF16."""
    monkeypatch.chdir(tmp_path)

    def make(name, *overrides, shift=0.0, items=1000):
        folder = tmp_path / name
        recipe = resolve("tiny", [f"run.dir={folder}", "model.path=models/tiny-llama", *SMALL, *overrides])
        save(recipe, folder / "resolved.yaml")
        last = "bf16_trained" if recipe.method == "bf16" else str(recipe.method)
        for stage in dict.fromkeys(("bf16", last if last == "bf16_trained" else "ptq", last, "exported")):
            moved = shift if stage in ("exported", "bf16_trained") else 0.0
            kl = None if stage == "bf16" else 0.1
            write_stage(folder, stage, {t: rows((name, stage, t), shift=moved, items=items, kl=kl) for t in TASKS})
        (folder / "checkpoints" / "step_00000006").mkdir(parents=True)
        marks = dict.fromkeys(("train", f"evaluate.{last}", "evaluate.exported"), 6)
        write_json(folder / "state.json", marks)
        return folder

    return make


def run(*words) -> int:
    return cli.main([str(word) for word in words])


def errors(capsys) -> str:
    return "".join(line for line in capsys.readouterr().err.splitlines(keepends=True) if line.startswith("error: "))


# compare --------------------------------------------------------------------------------------------------------------


def test_runs_of_equal_quality_pass_and_nothing_is_written(make_run, capsys):
    a, b = make_run("a"), make_run("b")
    before = sorted(path.stat().st_mtime_ns for folder in (a, b) for path in folder.rglob("*"))
    assert run("compare", a, b) == OK
    assert sorted(path.stat().st_mtime_ns for folder in (a, b) for path in folder.rglob("*")) == before
    out = capsys.readouterr().out
    assert f"A  {a} (qat, exported)" in out
    assert f"B  {b} (qat, exported)" in out
    assert "B against A: PASS" in out
    assert "95 % for all 3 intervals together, 98.333 % each" in out
    table = [line.split() for line in out.splitlines() if line.startswith(("  lambada (1000)", "  english (1000)"))]
    assert [(row[0], row[2].rstrip(","), row[-1]) for row in table] == [
        ("lambada", "accuracy", "pass"),
        ("lambada", "perplexity", "pass"),
        ("english", "perplexity", "pass"),
    ]


@pytest.mark.parametrize(("shift", "code", "word"), [(-2.0, GATE_FAILED, "FAIL"), (-0.42, GATE_INCONCLUSIVE, "INCONC")])
def test_a_worse_run_does_not_pass(make_run, capsys, shift, code, word):
    a, b = make_run("a"), make_run("b", shift=shift)
    loose = ("gate.threshold_pp=50",) if word == "INCONC" else ()
    tight = ("gate.perplexity_ratio=1.52",) if word == "INCONC" else ()
    assert run("compare", a, b, *loose, *tight) == code
    assert f"B against A: {word}" in capsys.readouterr().out
    assert run("compare", b, a, *loose) == OK  # the other way it is an improvement


def test_the_gate_of_the_command_line_counts_and_json_has_the_numbers(make_run, tmp_path, capsys):
    a, b = make_run("a"), make_run("b", shift=-0.5)
    wide = ("gate.threshold_pp=50", "gate.perplexity_ratio=3")
    assert run("compare", a, b, *wide, "--json", tmp_path / "deep" / "out.json") == OK
    out = read_json(tmp_path / "deep" / "out.json")
    assert (out["verdict"], out["release"], out["judges"]) == ("pass", True, "exported")
    assert out["baseline"] == {"run": str(a), "method": "qat", "stage": "exported"}
    ratio = out["tasks"]["english"]["numbers"]["perplexity"]
    assert ratio["delta"] == pytest.approx(2.718 ** (0.5 / 2), rel=0.01)  # 0.5 nats over 2 tokens
    assert ratio["bound"] == 3
    assert load(b / "resolved.yaml").gate.threshold_pp == 5  # nothing is kept
    assert run("compare", a, b, "gate.judges=trained") == OK  # only the exported files differ
    assert "(qat, qat)" in capsys.readouterr().out


def test_inconclusive_releases_where_the_recipe_says_so(make_run, capsys):
    a, b = make_run("a", items=40), make_run("b", "gate.inconclusive=release", items=40)
    assert run("compare", b, a, "gate.threshold_pp=0.1") == GATE_INCONCLUSIVE
    assert run("compare", a, b, "gate.threshold_pp=0.1") == OK
    assert "B against A: INCONCLUSIVE (released: gate.inconclusive = release)" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("train.steps=3",), "train.steps: a comparison takes gate.* only"),
        (("gate.confidence=2",), "gate.confidence = 2.0: must lie between 0.5 and 0.9999"),
        (("gate.thresholds_pp.nope=1",), "gate.thresholds_pp.nope = 1.0: no such task; evaluate.tasks has lambada"),
        (("gate.treshold_pp=1",), "gate.treshold_pp = 1: no such key"),
    ],
)
def test_bad_words_are_usage_errors(make_run, capsys, words, said):
    a, b = make_run("a", items=5), make_run("b", items=5)
    for command in (("compare", a, b), ("gate", b, "--against", a)):
        assert run(*command, *words) == USAGE
        assert said in errors(capsys)


def test_a_folder_that_is_no_run_is_a_usage_error(make_run, tmp_path, capsys):
    a = make_run("a", items=5)
    for command in (("compare", a, tmp_path), ("compare", tmp_path, a), ("gate", a, "--against", tmp_path)):
        assert run(*command) == USAGE
        assert f"{tmp_path}: holds no resolved.yaml; give the folder of a run" in errors(capsys)


def drop_stage(folder):
    content = read_json(folder / "evaluate.json")
    del content["exported"]
    write_json(folder / "evaluate.json", content)


def other_items(folder):
    write_stage(folder, "exported", {t: [r | {"item": r["item"] + 1} for r in rows(t, items=20)] for t in TASKS})


def other_tokens(folder):
    write_stage(folder, "exported", {t: [r | {"tokens": 3} for r in rows(t, items=20)] for t in TASKS})


def other_content(folder):
    """As of an edited data file: the sizes of all items are the same."""
    changed = [r | {"content": "another"} if r["item"] >= 7 else r for r in rows("t", items=20)]
    write_stage(folder, "exported", dict.fromkeys(TASKS, changed))


def other_summary(folder):
    content = read_json(folder / "evaluate.json")
    content["exported"]["lambada"]["accuracy"] = 0.99
    write_json(folder / "evaluate.json", content)


def fewer_items(folder):
    write_stage(folder, "exported", {t: rows(t, items=19) for t in TASKS})


def fewer_tasks(folder):
    write_stage(folder, "exported", {"lambada": rows("x", items=20)})


def no_number(folder):
    write_stage(
        folder, "exported", {t: [r | {"loglikelihood": float("nan")} for r in rows(t, items=20)] for t in TASKS}
    )


def other_recipe(folder):
    save(load(folder / "resolved.yaml", ["evaluate.tasks.english.kind=continuation"]), folder / "resolved.yaml")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (drop_stage, r"stage exported has no scores (there: bf16, ptq, qat); run halfbyte evaluate"),
        (other_items, "were scored on different items (20 and 20, first item 0)"),
        (other_tokens, "were scored on different items (20 and 20, first item 0)"),
        (other_content, "were scored on different items (20 and 20, first item 7)"),
        (other_summary, "evaluate.json says accuracy = 0.99 for"),
        (fewer_items, "were scored on different items (20 and 19)"),
        (fewer_tasks, "exported was scored on ['english', 'lambada']"),
        (no_number, "loglikelihood = nan is not a finite score"),
        (other_recipe, "english (text), lambada (continuation); compare runs of equal tasks"),
        (lambda folder: (folder / "evaluate.json").write_text("{"), "evaluate.json: damaged"),
        (lambda folder: (folder / "evaluate.json").write_text('{"exported": 3}'), "evaluate.json: damaged"),
        (lambda folder: (folder / "evaluate" / "exported.english.jsonl").unlink(), "exported.english.jsonl: not there"),
    ],
    ids=lambda value: value.__name__ if callable(value) else None,
)
def test_what_cannot_be_compared_is_one_line(make_run, capsys, change, said):
    a, b = make_run("a", items=20), make_run("b", items=20)
    change(a)
    assert run("compare", a, b, "gate.threshold_pp=100", "gate.perplexity_ratio=1e9") == FAILED
    assert said in errors(capsys)


# gate --against -------------------------------------------------------------------------------------------------------


def test_against_a_baseline_writes_its_own_verdict_only(make_run, capsys):
    run_dir, baseline = make_run("new", shift=-0.3), make_run("old", shift=-0.3)
    write_json(run_dir / "gate.json", {"verdict": "the old one"})
    resolved = (run_dir / "resolved.yaml").read_text()
    assert run("gate", run_dir, "--against", baseline, "gate.perplexity_ratio=1.2") == OK
    assert read_json(run_dir / "gate.json") == {"verdict": "the old one"}
    assert (run_dir / "resolved.yaml").read_text() == resolved
    result = read_json(run_dir / "gate.against.json")
    assert (result["verdict"], result["checkpoint"]) == ("pass", "step_00000006")
    assert result["candidate"]["run"] == str(run_dir)
    assert f"against {baseline}" in result["reasons"][0]
    assert result["reasons"][0] in capsys.readouterr().out
    worse = make_run("worse", shift=-2.0)
    assert run("gate", worse, "--against", baseline) == GATE_FAILED
    assert read_json(worse / "gate.against.json")["verdict"] == "fail"


def test_against_judges_the_newest_checkpoint_or_nothing(make_run, capsys):
    run_dir, baseline = make_run("new", items=50), make_run("old", items=50)
    (run_dir / "checkpoints" / "step_00000009").mkdir()
    assert run("gate", run_dir, "--against", baseline) == FAILED
    assert "the newest checkpoint is step_00000009; evaluate it first" in errors(capsys)
    assert not (run_dir / "gate.against.json").exists()
    (baseline / "checkpoints" / "step_00000009").mkdir()  # an archived baseline needs none
    (run_dir / "checkpoints" / "step_00000009").rmdir()
    assert run("gate", run_dir, "--against", baseline, "gate.threshold_pp=90", "gate.perplexity_ratio=9") == OK
    assert run("gate", run_dir, "--against", baseline, "--allow-failed-gate") == USAGE


# judge ----------------------------------------------------------------------------------------------------------------


def test_the_gate_judges_the_exported_files_and_the_summary_prints_it(make_run, capsys):
    folder = make_run("a", shift=-2.0)
    recipe = load(folder / "resolved.yaml")
    verdict = handover.judge(recipe, folder)
    assert (verdict["verdict"], verdict["judges"], verdict["checkpoint"]) == ("fail", "exported", "step_00000006")
    assert read_json(folder / "gate.json") == verdict
    handover.check_verdict(folder, verdict)
    marks = read_json(folder / "state.json")
    del marks["gate"]  # as scoring does
    write_json(folder / "state.json", marks)
    with pytest.raises(UserError, match=r"gate.json is older than the scores; gate it first"):
        handover.check_verdict(folder, verdict)
    recipe = load(folder / "resolved.yaml", ["gate.judges=trained", "gate.kl=0.2", "gate.agreement=0.5"])
    verdict = handover.judge(recipe, folder)
    assert (verdict["verdict"], verdict["control"]) == ("pass", None)
    text = summary_text(recipe, folder)
    assert "gate (bf16): PASS" in text
    assert all(reason in text for reason in verdict["reasons"])
    assert "KL to BF16 0.1000 nats" in text
    assert "within the thresholds of" not in text
    recipe = load(folder / "resolved.yaml", ["gate.rule=better_than_ptq", "gate.judges=trained"])
    assert "within the thresholds of BF16: PASS" in (handover.judge(recipe, folder) and summary_text(recipe, folder))


def test_a_control_takes_the_originals_place(make_run):
    control = make_run("control", "method=bf16", "train.steps=5", shift=-2.0)
    folder = make_run("a", f"gate.control={control}", shift=-2.0)
    recipe = load(folder / "resolved.yaml")
    verdict = handover.judge(recipe, folder)
    assert (verdict["verdict"], verdict["baseline"]) == ("pass", "control")
    assert verdict["control"] == {"run": str(control), "differs": ["train.steps = 5, here 6"]}
    assert verdict["against_bf16"]["verdict"] == "fail"
    text = summary_text(recipe, folder)
    assert "within the thresholds of BF16: FAIL" in text
    assert "note: the BF16 control was trained otherwise: train.steps = 5, here 6" in text
    recipe.gate.rule = type(recipe.gate.rule).better_than_ptq
    text = handover.judge(recipe, folder) and summary_text(recipe, folder)
    assert "within the thresholds of the BF16 control: PASS" in text
    assert "within the thresholds of BF16: FAIL" in text


def test_a_control_must_be_a_scored_bf16_run_of_the_same_items(make_run, tmp_path):
    folder, other = make_run("a", items=20), make_run("qat", items=20)
    recipe = load(folder / "resolved.yaml")
    short = make_run("short", "method=bf16", items=19)
    unscored = make_run("unscored", "method=bf16", items=20)
    (unscored / "evaluate.json").write_text('{"bf16": {}}')
    for control, said in (
        (other, "a run of method qat; give one of method bf16"),
        (short, r"were scored on different items \(20 and 19\)"),
        (unscored, r"stage bf16_trained has no scores \(there: bf16\); run halfbyte evaluate"),
        (tmp_path / "none", "holds no resolved.yaml"),
    ):
        recipe.gate.control = str(control)
        with pytest.raises(UserError, match=said):
            handover.judge(recipe, folder)
    assert not (folder / "gate.json").exists()


def test_a_run_without_exported_scores_names_the_command(make_run):
    folder = make_run("a", items=20)
    drop_stage(folder)
    with pytest.raises(
        UserError, match=r"stage exported has no scores \(there: bf16, ptq, qat\); run halfbyte evaluate"
    ):
        handover.judge(load(folder / "resolved.yaml"), folder)


# Keys of the gate -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["gate.thresholds_pp={nope: 1}"], "gate.thresholds_pp.nope = 1.0: no such task; evaluate.tasks has lambada"),
        (["gate.thresholds_pp.english=1"], "has a perplexity only; gate.perplexity_ratio bounds it"),
        (["gate.thresholds_pp.lambada=-1"], "gate.thresholds_pp.lambada = -1.0: must be a number of percentage points"),
        (["gate.thresholds_pp.lambada=.nan"], "gate.thresholds_pp.lambada = nan: must be a number"),
        (["gate.thresholds_pp.lambada=much"], "gate.thresholds_pp.lambada = much: must be a number"),
        (["gate.thresholds_pp=3"], "gate.thresholds_pp = 3: must be a mapping, {name: value}, each value a number"),
        (["gate.kl=0"], "gate.kl = 0.0: must be positive"),
        (["gate.kl=1", "evaluate.kl_positions=0"], "gate.kl = 1.0: evaluate.kl_positions = 0 compares no token"),
        (["gate.agreement=90"], "gate.agreement = 90.0: must lie between 0 and 1; give a share such as 0.9"),
        (["gate.control=nowhere"], "nowhere: no run there; start the BF16 control first"),
        (["gate.correction=holm"], "gate.correction = holm: must be one of bonferroni, none"),
    ],
)
def test_bad_keys_of_the_gate_are_recipe_errors(overrides, said):
    with pytest.raises(RecipeError) as caught:
        resolve("tiny", overrides)
    assert len(caught.value.problems) == 1
    assert said in caught.value.problems[0]


def test_a_tasks_threshold_and_a_control_survive_the_run_folder(make_run, tmp_path):
    control = make_run("control", "method=bf16", items=5)
    folder = make_run("a", "gate.thresholds_pp.lambada=0.5", "gate.control=control", items=5)
    gate = load(folder / "resolved.yaml").gate
    assert gate.thresholds_pp == {"lambada": 0.5}
    assert gate.control == str(control)  # from any working directory
    with pytest.raises(RecipeError, match="is this run; give the folder of a run of method bf16"):
        resolve("tiny", [f"run.dir={folder}", f"gate.control={folder}"])


def test_the_summary_shows_what_a_task_of_lm_eval_measured():
    scores = {"bf16": {"piqa": {"n": 3, "acc": 0.5, "bits_per_byte": 1.25}}, "ptq": {"piqa": {"n": 3, "acc": 0.25}}}
    assert score_rows(scores)[1:] == [
        ["piqa (3)", "acc, %", "50.00", "25.00"],
        ["piqa (3)", "bits per byte", "1.2500", "-"],
    ]
