"""Verdicts of the gate from synthetic scores: rules, thresholds, corrections, and what must never pass."""

import dataclasses
import json
import math
import random
import subprocess
import sys

import numpy as np
import pytest

from halfbyte.training import bootstrap, gate, statistics
from halfbyte.training.config import Correction, Gate, GateRule, Inconclusive, Judges, Method, TaskKind
from halfbyte.training.errors import GATE_FAILED, GATE_INCONCLUSIVE, OK, USAGE, UserError
from halfbyte.training.pairing import Stage


def make(rng, n=300, *, shift=0.0, noise=0.2, kl=None, tokens=2, base=None):
    """Scores of a model whose log-likelihoods are those of a common base, shifted, with noise of its own."""
    base = base if base is not None else [-4 + 2 * random.Random(i).gauss(0, 1) for i in range(n)]
    values = [value + shift * tokens + rng.gauss(0, noise) for value in base[:n]]
    return [
        {
            "item": i,
            "content": f"item {i}",
            "loglikelihood": value,
            "tokens": tokens,
            "bytes": 9,
            "correct": value > -3,
            "kl": None if kl is None else abs(rng.gauss(kl, 0.02)),
            "agreement": None,
        }
        for i, value in enumerate(values)
    ]


def stage(name, rows):
    return Stage(name, rows, {task: {"n": len(items)} for task, items in rows.items()})


def judge(stages, *, method="qat", kind=TaskKind.continuation, control=None, **changes):
    """Judge the trained model of {stage: {task: rows}}; every task is of one kind."""
    changes = {"judges": Judges.trained} | changes
    kinds = {task: kind for by_task in stages.values() for task in by_task}
    made = {name: stage(name, rows) for name, rows in stages.items()}
    control = control and stage("the control", control)
    return gate.judge(Gate(**changes), method=Method(method), kinds=kinds, stages=made, control=control)


def three(rng, *, ptq=-0.2, qat=-0.1, ptq_kl=0.2, qat_kl=0.1, n=300):
    return {
        "bf16": {"t": make(rng, n)},
        "ptq": {"t": make(rng, n, shift=ptq, kl=ptq_kl)},
        "qat": {"t": make(rng, n, shift=qat, kl=qat_kl)},
    }


BETTER = {"rule": GateRule.better_than_ptq}


BETTER = {"rule": GateRule.better_than_ptq}


def numbers(result, measure, task="t"):
    return result["tasks"][task]["numbers"][measure]


# Rules ------------------------------------------------------------------------------------------------------------


def test_a_clear_improvement_passes_and_the_bf16_verdict_stands_beside_it():
    verdict = judge(three(random.Random(0)), **BETTER)
    assert (verdict["verdict"], verdict["candidate"], verdict["rule"]) == ("pass", "qat", "better_than_ptq")
    assert (verdict["judges"], verdict["baseline"], verdict["release"]) == ("trained", "ptq", True)
    assert verdict["tasks"]["t"]["measures"] == {"accuracy": "pass", "perplexity": "pass", "kl": "pass"}
    assert verdict["against_bf16"]["verdict"] == "fail"
    assert len(verdict["reasons"]) == 3
    assert "t: perplexity" in verdict["reasons"][1]
    json.dumps(verdict, allow_nan=False)


@pytest.mark.parametrize(
    ("changes", "verdict"),
    [
        ({"qat_kl": 0.3}, "fail"),
        ({"qat": -0.4}, "fail"),
        ({"qat_kl": 0.2}, "inconclusive"),
        ({"qat": -0.2}, "inconclusive"),
    ],
)
def test_worse_in_one_measure_fails_and_equal_does_not_decide(changes, verdict):
    assert judge(three(random.Random(0), **changes), **BETTER)["verdict"] == verdict


def test_a_model_that_did_not_change_is_not_better_than_itself():
    stages = three(random.Random(0))
    stages["qat"] = stages["ptq"]
    result = judge(stages, **BETTER)
    assert result["verdict"] == "inconclusive"
    assert numbers(result, "kl")["items_to_decide"] is None


def test_a_significant_loss_of_accuracy_fails_whatever_the_perplexity():
    stages = three(random.Random(0))
    for row in stages["qat"]["t"]:
        row["correct"] = False
    result = judge(stages, **BETTER)
    assert result["tasks"]["t"]["measures"]["accuracy"] == "fail"
    assert numbers(result, "accuracy")["mcnemar_p"] < 1e-9
    assert result["verdict"] == "fail"


def test_rule_bf16_passes_fails_or_says_how_many_items_it_needs():
    rng = random.Random(1)
    same = make(rng, 3000)
    stages = {"bf16": {"t": same}, "ptq": {"t": same}}
    assert judge(stages, method="ptq")["verdict"] == "pass"
    few = {stage: {"t": rows["t"][:100]} for stage, rows in stages.items()}
    result = judge(few, method="ptq")
    assert result["verdict"] == "inconclusive"
    assert numbers(result, "accuracy")["items_to_decide"] == statistics.mean_to_decide(0, 0, 100, -0.002, 0.975)
    assert "would decide" in result["reasons"][0]
    worse = {"bf16": stages["bf16"], "ptq": {"t": make(rng, 3000, shift=-1.0)}}
    result = judge(worse, method="ptq")
    assert result["tasks"]["t"]["measures"] == {"accuracy": "fail", "perplexity": "fail"}
    assert numbers(result, "accuracy")["delta"] < -5
    assert judge(worse, method="ptq", threshold_pp=100, perplexity_ratio=1000)["verdict"] == "pass"


def test_a_loss_that_may_be_tolerable_is_inconclusive():
    rows = make(random.Random(1), 3000)
    changed = [dict(row) for row in rows]
    for row in [row for row in changed if row["correct"]][:4]:
        row["correct"] = False
    result = judge({"bf16": {"t": rows}, "ptq": {"t": changed}}, method="ptq")
    low, high = numbers(result, "accuracy")["interval"]
    assert low < -0.2 < high < 0.2
    assert result["tasks"]["t"]["measures"]["accuracy"] == "inconclusive"
    tolerant = {"method": "ptq", "thresholds_pp": {"t": 0.6}}
    result = judge({"bf16": {"t": rows}, "ptq": {"t": changed}}, **tolerant)
    assert (result["verdict"], numbers(result, "accuracy")["bound"]) == ("pass", -0.6)


def test_a_failure_outweighs_what_is_undecided():
    rng = random.Random(2)
    few, many = make(rng, 100), make(rng, 1500)
    stages = {"bf16": {"a": few, "b": many}, "ptq": {"a": few, "b": make(rng, 1500, shift=-1.0)}}
    result = judge(stages, method="ptq")
    assert [result["tasks"][task]["verdict"] for task in "ab"] == ["inconclusive", "fail"]
    assert result["verdict"] == "fail"


def test_one_bad_task_fails_the_whole():
    rng = random.Random(2)
    same = make(rng, 4000)
    stages = {"bf16": {"a": same, "b": same}, "ptq": {"a": same, "b": make(rng, 4000, shift=-1.0)}}
    result = judge(stages, method="ptq")
    assert [result["tasks"][task]["verdict"] for task in "ab"] == ["pass", "fail"]
    assert result["verdict"] == "fail"


def test_texts_are_compared_per_token_without_accuracy():
    rng = random.Random(3)
    base = [-30.0] * 60
    stages = {
        "bf16": {"t": make(rng, 60, base=base, tokens=10)},
        "qat": {"t": make(rng, 60, base=base, tokens=10, shift=-math.log(1.2))},
    }
    result = judge(stages, kind=TaskKind.text)
    assert list(result["tasks"]["t"]["measures"]) == ["perplexity"]
    found = numbers(result, "perplexity")
    assert found["delta"] == pytest.approx(1.2, abs=0.02)
    assert found["candidate"] / found["baseline"] == pytest.approx(found["delta"])
    assert found["interval"][0] < 1.2 < found["interval"][1]


def test_the_control_is_not_judged():
    result = gate.judge(Gate(), method=Method.bf16, kinds={}, stages={})
    assert result["verdict"] == "not_applicable"
    assert result["reasons"]
    assert gate.exit_code(result) == OK


def test_a_control_is_the_baseline_and_the_original_stands_beside_it():
    rng = random.Random(4)
    original, control = make(rng, 4000), make(rng, 4000, shift=-0.5)
    candidate = [dict(row) for row in control]
    result = judge({"bf16": {"t": original}, "qat": {"t": candidate}}, control={"t": control})
    assert (result["verdict"], result["baseline"]) == ("pass", "control")
    assert "against the BF16 control" in result["reasons"][0]
    assert (result["against_bf16"]["verdict"], result["against_control"]["verdict"]) == ("fail", "pass")
    with pytest.raises(UserError, match="qat and the control were scored on different items"):
        judge({"bf16": {"t": original}, "qat": {"t": candidate}}, control={"t": control[1:]})


def test_the_exported_files_are_judged_unless_the_recipe_says_otherwise():
    stages = three(random.Random(5), n=200)
    with pytest.raises(
        UserError, match=r"stage exported has no scores \(there: bf16, ptq, qat\); run halfbyte evaluate"
    ):
        judge(stages, judges=Judges.exported)
    stages["exported"] = {"t": make(random.Random(6), 200, shift=-2.0)}
    assert judge(stages, judges=Judges.exported)["verdict"] == "fail"  # another model than was trained
    wide = {"threshold_pp": 50, "perplexity_ratio": 3}
    assert judge(stages, **wide)["verdict"] == "pass"
    result = judge(stages, judges=Judges.exported, **wide)
    assert (result["verdict"], result["judges"], result["candidate"]) == ("fail", "exported", "qat")


# Levels and bounds ------------------------------------------------------------------------------------------------


def test_every_interval_of_a_verdict_is_corrected_for_their_number():
    rng = random.Random(7)
    stages = {"bf16": {"a": make(rng), "b": make(rng)}, "qat": {"a": make(rng, kl=0.2), "b": make(rng, kl=0.2)}}
    result = judge(stages, kl=0.3)
    assert (result["confidence"], result["intervals"]) == (0.95, 6)  # accuracy, perplexity and KL of two tasks
    assert result["corrected_confidence"] == pytest.approx(1 - 0.05 / 6)
    found = numbers(result, "accuracy", "a")
    expected = statistics.paired_proportions(found["gained"], found["lost"], 300, 1 - 0.05 / 6)
    assert found["interval"] == pytest.approx([100 * expected.low, 100 * expected.high])
    alone = judge(stages, kl=0.3, correction=Correction.none)
    assert alone["corrected_confidence"] == alone["confidence"] == 0.95
    for measure in ("accuracy", "perplexity", "kl_bound"):
        wide, narrow = (numbers(each, measure, "b")["interval"] for each in (result, alone))
        assert wide[0] < narrow[0] < narrow[1] < wide[1]


@pytest.mark.parametrize(("kl", "verdict"), [(0.15, "fail"), (0.2, "inconclusive"), (0.25, "pass")])
def test_kl_has_an_absolute_bound(kl, verdict):
    rng = random.Random(8)
    stages = {"bf16": {"t": make(rng)}, "qat": {"t": make(rng, kl=0.2)}}
    result = judge(stages, kl=kl, threshold_pp=50, perplexity_ratio=2)
    assert result["tasks"]["t"]["measures"] == {"accuracy": "pass", "perplexity": "pass", "kl_bound": verdict}
    assert result["verdict"] == verdict
    assert numbers(result, "kl_bound")["candidate"] == pytest.approx(0.2, abs=0.01)


@pytest.mark.parametrize(("agreement", "verdict"), [(0.9, "fail"), (0.8, "inconclusive"), (0.7, "pass")])
def test_agreement_has_an_absolute_bound(agreement, verdict):
    rng = random.Random(9)
    stages = {"bf16": {"t": make(rng)}, "qat": {"t": make(rng)}}
    for i, row in enumerate(stages["qat"]["t"]):
        row["agreement"] = 0.6 + 0.4 * (i % 2)
    result = judge(stages, agreement=agreement, threshold_pp=50, perplexity_ratio=2)
    assert result["tasks"]["t"]["measures"]["agreement_bound"] == verdict
    assert result["verdict"] == verdict


def test_bounds_hold_under_either_rule_and_need_their_data():
    stages = three(random.Random(0))
    assert judge(stages, kl=0.15, **BETTER)["verdict"] == "pass"
    assert judge(stages, kl=0.05, **BETTER)["verdict"] == "fail"
    for limit in ({"agreement": 0.5}, {"kl": 0.5}):
        bare = {"bf16": stages["bf16"], "qat": stages["bf16"]}
        with pytest.raises(UserError, match=f"task t has no KL to BF16, which gate.{next(iter(limit))} bounds"):
            judge(bare, **limit)


def test_inconclusive_is_held_unless_the_recipe_releases_it():
    same = {"t": make(random.Random(1), 100)}
    stages = {"bf16": same, "qat": same}
    held, waived = judge(stages), judge(stages, inconclusive=Inconclusive.release)
    assert [(r["verdict"], r["release"], gate.exit_code(r)) for r in (held, waived)] == [
        ("inconclusive", False, GATE_INCONCLUSIVE),
        ("inconclusive", True, OK),
    ]
    failed = judge(
        {"bf16": same, "qat": {"t": make(random.Random(1), 100, shift=-3)}}, inconclusive=Inconclusive.release
    )
    assert (failed["verdict"], failed["release"], gate.exit_code(failed)) == ("fail", False, GATE_FAILED)
    for broken in ({}, {"verdict": "maybe", "release": True}, {"verdict": "inconclusive"}):
        with pytest.raises(KeyError):
            gate.exit_code(broken)


# Tasks of lm-eval ---------------------------------------------------------------------------------------------------


def harness(values):
    """Rows with metrics of their own and nothing else."""
    empty = dict.fromkeys(("tokens", "bytes", "loglikelihood", "correct", "kl", "agreement"))
    return [{"item": i, "content": ""} | empty | {"metrics": metrics} for i, metrics in enumerate(values)]


def answers(rng, n, right):
    return [{"exact_match": float(rng.random() < right), "f1": rng.random()} for _ in range(n)]


def text_counts(rng, n, right=0.8):
    out = []
    for _ in range(n):
        length = rng.randint(8, 30)
        grams = [length - order for order in range(4)]
        out.append({"bleu": [length, length, *(max(1, int(g * right**i)) for i, g in enumerate(grams, 1)), *grams]})
    return out


LM_EVAL = {"kind": TaskKind.lm_eval}


def test_all_metrics_of_a_task_are_judged_by_their_kind():
    rng = random.Random(10)
    before = answers(rng, 3000, 0.5)
    for row in before:
        row["perplexity"] = rng.gauss(-2, 1)
    after = [row | {"f1": max(0.0, row["f1"] - 0.05)} for row in before]
    result = judge({"bf16": {"t": harness(before)}, "qat": {"t": harness(after)}}, **LM_EVAL)
    assert result["tasks"]["t"]["measures"] == {"exact_match": "pass", "f1": "fail", "perplexity": "pass"}
    assert numbers(result, "f1")["delta"] == pytest.approx(-5, abs=0.3)
    assert [numbers(result, m)["statistic"] for m in ("exact_match", "f1")] == ["proportion", "mean"]
    assert result["intervals"] == 3
    json.dumps(result, allow_nan=False)


def test_a_loss_of_bleu_fails_and_the_same_corpus_passes_when_it_is_large_enough():
    rng = random.Random(11)
    before = text_counts(rng, 400)
    worse = [{"bleu": [*row["bleu"][:2], *(v // 2 + 1 for v in row["bleu"][2:6]), *row["bleu"][6:]]} for row in before]
    rows = {"bf16": {"t": harness(before)}, "qat": {"t": harness(worse)}}
    assert judge(rows, **LM_EVAL)["verdict"] == "fail"
    rows["qat"] = rows["bf16"]
    assert judge(rows, **LM_EVAL)["verdict"] == "inconclusive"
    assert judge(rows, threshold_pp=2.0, **LM_EVAL)["verdict"] == "pass"


def test_exact_match_over_several_annotators_is_a_mean():
    values = [{"exact_match": (i % 3) / 2} for i in range(300)]
    result = judge({"bf16": {"t": harness(values)}, "qat": {"t": harness(values)}}, **LM_EVAL)
    assert numbers(result, "exact_match")["statistic"] == "mean"


def test_better_than_ptq_needs_something_that_can_be_better():
    rng = random.Random(12)
    rows = {name: {"t": harness(answers(rng, 100, 0.5))} for name in ("bf16", "ptq", "qat")}
    with pytest.raises(UserError, match="no task has a perplexity or KL that could be better"):
        judge(rows, **BETTER, **LM_EVAL)
    for name, kl in (("ptq", 0.5), ("qat", 0.2)):
        for row in rows[name]["t"]:
            row["kl"] = kl + rng.gauss(0, 0.05)
    result = judge(rows, **BETTER, **LM_EVAL)
    assert result["tasks"]["t"]["measures"] == {"exact_match": "pass", "f1": "pass", "kl": "pass"}
    for row in rows["qat"]["t"]:
        row["metrics"] = {"exact_match": 0.0, "f1": 0.0}
    assert judge(rows, **BETTER, **LM_EVAL)["verdict"] == "fail"


# Simulations --------------------------------------------------------------------------------------------------------


@pytest.fixture
def fewer_resamples(monkeypatch):
    monkeypatch.setattr(bootstrap, "LEAST_RESAMPLES", 1000)
    monkeypatch.setattr(bootstrap, "BEYOND", 5)


def equal_answers(rng, n):
    """Two continuation tasks' worth of scores: a difficulty that both models share, noise of each model's own."""
    base = rng.normal(size=n)
    plain = {"content": "", "tokens": 3, "bytes": 9, "kl": None, "agreement": None}
    for value in (base + rng.normal(size=(2, n))).tolist():
        yield [{"item": i, "loglikelihood": v, "correct": v > 0} | plain for i, v in enumerate(value)]


def equal_texts(rng, n):
    """F1 and BLEU of two models that are equally good on easy and on hard items."""
    easy = rng.random(n)
    length = (10 + 20 * easy).astype(int)
    for _ in range(2):
        f1 = np.where(rng.random(n) < 0.3, rng.choice([0, 0.4, 0.67, 1], size=n), np.round(2 * easy) / 2)
        quality = np.clip(0.4 + 0.5 * easy + 0.2 * rng.normal(size=n), 0.1, 0.95)
        matches = [rng.binomial(length - i, quality ** (i + 1)) for i in range(4)]
        counts = np.stack([length, length, *matches, *(length - i for i in range(4))], axis=1).astype(float).tolist()
        yield harness([{"f1": float(f), "bleu": c} for f, c in zip(f1, counts, strict=True)])


def two_equal_models(rng):
    columns = {task: tuple(equal_answers(rng, 100)) for task in "abc"} | {"text": tuple(equal_texts(rng, 60))}
    return {
        name: stage(name, {task: rows[side] for task, rows in columns.items()})
        for side, name in enumerate(("bf16", "qat"))
    }


def test_of_a_thousand_equal_models_few_fail_and_few_pass(fewer_resamples):
    """A/A at threshold zero: the candidate lies exactly on every threshold. Eight measures, 5 % for all together."""
    rng = np.random.default_rng(13)
    kinds = dict.fromkeys("abc", TaskKind.continuation) | {"text": TaskKind.lm_eval}
    at = Gate(threshold_pp=0.0, perplexity_ratio=1.0, judges=Judges.trained)
    alone = dataclasses.replace(at, correction=Correction.none)
    runs, uncorrected = [], []
    for i in range(1000):
        stages = two_equal_models(rng)
        runs.append(gate.judge(at, method=Method.qat, kinds=kinds, stages=stages))
        if i < 200:
            uncorrected.append(gate.judge(alone, method=Method.qat, kinds=kinds, stages=stages))
    assert runs[0]["intervals"] == 8
    assert 5 <= sum(run["verdict"] == "fail" for run in runs) <= 50
    assert sum(run["verdict"] == "fail" for run in uncorrected) > 10  # what the correction is for
    assert sum(run["verdict"] == "pass" for run in runs) == 0  # all eight would have to be wrong at once
    measures = [v for run in runs for task in run["tasks"].values() for v in task["measures"].values()]
    assert 5 <= measures.count("pass") <= 50


@pytest.mark.parametrize(("gained", "lost"), [(0.0, 0.002), (0.004, 0.006), (0.03, 0.032)])
def test_a_candidate_exactly_at_the_threshold_rarely_passes(gained, lost):
    """0.2 pp lost in truth, LAMBADA's size, one measure, no correction to lean on."""
    drawn = np.random.default_rng(14).multinomial(5153, [gained, lost, 1 - gained - lost], size=4000)
    intervals = [statistics.paired_proportions(int(up), int(down), 5153, 0.95) for up, down, _ in drawn]
    assert np.mean([interval.low >= -0.002 for interval in intervals]) <= 0.035


def flipped(n, gained, lost):
    """Scores of two models of which the second gains and loses so many items."""
    plain = {"content": "", "tokens": 3, "bytes": 9, "loglikelihood": -3.0, "kl": None, "agreement": None}
    before = [{"item": i, "correct": i >= gained} | plain for i in range(n)]
    after = [{"item": i, "correct": i < n - lost} | plain for i in range(n)]
    return before, after


POWER = [(0.005, 0.015, 0.94), (0.01, 0.02, 0.82), (0.03, 0.04, 0.4), (0.09, 0.10, 0.14)]
"""Items gained and lost in truth, and how often the gate must say fail: docs/decisions.md has the whole table."""


@pytest.mark.parametrize(("gained", "lost", "found"), POWER)
def test_a_loss_of_one_point_on_five_thousand_items_is_found(gained, lost, found):
    """It fails as often as the discordant items allow, and never passes the default threshold."""
    drawn = np.random.default_rng(15).multinomial(5000, [gained, lost, 1 - gained - lost], size=2000)
    intervals = [statistics.paired_proportions(int(up), int(down), 5000, 0.975) for up, down, _ in drawn]
    assert np.mean([interval.high < -0.002 for interval in intervals]) >= found
    assert np.mean([interval.low >= -0.002 for interval in intervals]) <= 0.001
    before, after = flipped(5000, int(5000 * gained), int(5000 * lost))
    result = judge({"bf16": {"t": before}, "qat": {"t": after}})
    expected = statistics.paired_proportions(int(5000 * gained), int(5000 * lost), 5000, 0.975)
    assert numbers(result, "accuracy")["interval"] == pytest.approx([100 * expected.low, 100 * expected.high])
    assert result["tasks"]["t"]["measures"]["accuracy"] == ("fail" if expected.high < -0.002 else "inconclusive")


# Never a pass for want of data ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [TaskKind.continuation, TaskKind.text])
@pytest.mark.parametrize("items", [1, 2, 5])
def test_few_equal_items_are_inconclusive_and_write_valid_json(kind, items):
    rows = {"t": make(random.Random(4), items, kl=0.0)}
    result = judge({"bf16": rows, "qat": rows}, kind=kind, kl=0.01)
    assert set(result["tasks"]["t"]["measures"].values()) == {"inconclusive"}
    assert result["verdict"] == "inconclusive"
    json.dumps(result, allow_nan=False)


@pytest.mark.parametrize("metrics", [{"f1": 0.7}, {"em": 1.0}, {"bleu": [9.0, 9.0, 9, 8, 7, 6, 9, 8, 7, 6]}])
def test_ties_of_any_metric_are_inconclusive(metrics):
    for items in (1, 2, 50, 500):
        rows = {"t": harness([dict(metrics)] * items)}
        result = judge({"bf16": rows, "qat": rows}, **LM_EVAL)
        assert result["verdict"] == "inconclusive"
        assert numbers(result, next(iter(metrics)))["items_to_decide"] > items


def test_full_agreement_of_few_items_does_not_pass_a_high_bound():
    rows = make(random.Random(4), 50, kl=0.0)
    for row in rows:
        row["agreement"] = 1.0
    result = judge({"bf16": {"t": rows}, "qat": {"t": rows}}, agreement=0.99)
    assert result["tasks"]["t"]["measures"]["agreement_bound"] == "inconclusive"


def broken(change):
    stages = three(random.Random(6), n=50)
    change(stages)
    return stages


def drop_first(stages):
    stages["qat"]["t"] = stages["qat"]["t"][1:]


def rename_item(stages):
    stages["qat"]["t"][3]["item"] = 999


def twice(stages):
    stages["qat"]["t"][3] = stages["qat"]["t"][4]


def put(**fields):
    return lambda stages: stages["qat"]["t"][3].update(**fields)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda s: s.pop("qat"), "stage qat has no scores"),
        (lambda s: s.pop("bf16"), "stage bf16 has no scores"),
        (lambda s: s.pop("ptq"), "stage ptq has no scores"),
        (lambda s: s.update(ptq={}), "stage ptq has no scores"),
        (lambda s: s["bf16"].update(t=[]), "task t of stage bf16 has no items"),
        (lambda s: s["ptq"].update(u=s["ptq"]["t"]), r"qat was scored on \['t'\], evaluate.tasks are \['t', 'u'\]"),
        (lambda s: s["qat"].update(u=s["qat"]["t"]), r"qat was scored on \['t', 'u'\], bf16 on \['t'\]"),
        (drop_first, r"scored on different items \(49 and 50, first item 0\)"),
        (rename_item, "scored on different items"),
        (twice, "an item of qat.t was scored twice"),
        (put(tokens=7), "scored on different items"),
        (put(bytes=7), "scored on different items"),
        (put(content="of another text"), r"scored on different items \(50 and 50, first item 3\)"),
        (put(content=None), "item 3 of qat.t: its content is no text"),
        (put(loglikelihood=math.nan), "item 3 of qat.t: loglikelihood = nan is not a finite score"),
        (put(loglikelihood=-math.inf), "item 3 of qat.t: loglikelihood = -inf is not a finite score"),
        (put(loglikelihood="-3"), "item 3 of qat.t: loglikelihood = '-3' is not a finite score"),
        (put(loglikelihood=None), "item 3 of qat.t: loglikelihood = None is not a finite score"),
        (put(tokens=0), "item 3 of qat.t: tokens = 0 is not a number of tokens"),
        (put(correct=1), "item 3 of qat.t: correct = 1 is neither true nor false"),
        (put(correct=None), "item 3 of qat.t: correct = None is neither true nor false"),
        (put(kl=math.nan), "item 3 of qat.t: kl = nan is not a finite score"),
        (put(agreement=1.5), "item 3 of qat.t: agreement = 1.5 is not a score in 0 .. 1"),
        (put(kl=None), "only 49 of 50 items of qat.t have kl"),
        (put(item="3"), "item 3 of qat.t: its number is not a whole number"),
        (lambda s: [row.update(kl=None) for row in s["qat"]["t"]], "has no KL to BF16, which gate.rule"),
        (lambda s: s["qat"]["t"][3].pop("correct"), "a score of qat.t lacks correct"),
    ],
)
def test_incomplete_or_unequal_scores_are_an_error(change, said):
    with pytest.raises(UserError, match=said):
        judge(broken(change), **BETTER)


@pytest.mark.parametrize(
    ("metrics", "said"),
    [
        (None, "it has no metrics, which tasks of kind lm_eval are judged by"),
        ({}, "it has no metrics"),
        ({"f1": 0.5, "exact_match": math.nan}, "exact_match = nan is not a score in 0 .. 1"),
        ({"f1": 57.0, "exact_match": 1.0}, "f1 = 57.0 is not a score in 0 .. 1"),
        ({"f1": "0.5", "exact_match": 1.0}, "f1 = '0.5' is not a score"),
        ({"f1": 0.5, "rouge": 0.5}, "metric rouge is not known; use one of accuracy"),
        ({"f1": 0.5}, r"not every item of qat.t has the metrics \['exact_match', 'f1'\]"),
        ({"f1": 0.5, "bleu": [1, 2]}, r"bleu = \[1, 2\] is not 10 counts"),
        ({"f1": 0.5, "bleu": [-1] * 10}, "is not 10 counts"),
        ({"f1": 0.5, "bleu": [9, 9, 9, 8, 7, 6, 9, 8, 7, 5]}, "has more matches than n-grams"),
        ({"f1": 0.5, "perplexity": -math.inf}, "perplexity = -inf is not a finite score"),
    ],
)
def test_metrics_that_cannot_be_judged_are_an_error(metrics, said):
    rows = {name: {"t": harness(answers(random.Random(1), 50, 0.5))} for name in ("bf16", "qat")}
    rows["qat"]["t"][3]["metrics"] = metrics
    with pytest.raises(UserError, match=said):
        judge(rows, **LM_EVAL)


def test_a_metric_that_one_model_lacks_is_an_error():
    rows = {name: {"t": harness(answers(random.Random(1), 50, 0.5))} for name in ("bf16", "qat")}
    for row in rows["qat"]["t"]:
        del row["metrics"]["exact_match"]  # the one it would fail
    with pytest.raises(UserError, match=r"qat has the metrics \['f1'\], bf16 \['exact_match', 'f1'\]"):
        judge(rows, **LM_EVAL)


def test_a_summary_of_other_scores_is_an_error():
    rows = three(random.Random(7), n=50)
    for summary in ({}, {"t": {"n": 49}}):
        stages = {name: stage(name, by_task) for name, by_task in rows.items()}
        stages["exported"] = Stage("exported", rows["qat"], summary)
        with pytest.raises(UserError, match=r"evaluate\.json does not match the 50 scores of exported\.t"):
            gate.judge(Gate(), method=Method.qat, kinds={"t": TaskKind.continuation}, stages=stages)


def test_a_task_that_no_model_was_scored_on_is_an_error():
    stages = {name: stage(name, by_task) for name, by_task in three(random.Random(7), n=50).items()}
    at = Gate(judges=Judges.trained)
    for kinds in ({}, {"t": TaskKind.continuation, "the worst one": TaskKind.text}):
        with pytest.raises(UserError, match=r"qat was scored on \['t'\], evaluate.tasks are"):
            gate.judge(at, method=Method.qat, kinds=kinds, stages=stages)


def test_ptq_cannot_beat_itself():
    with pytest.raises(UserError, match="compares a model with itself") as caught:
        judge(three(random.Random(8), n=50), method="ptq", **BETTER)
    assert caught.value.code == USAGE


def test_the_gate_needs_no_torch():
    code = "import sys, halfbyte.training.gate; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
