import json
import math
import random
import subprocess
import sys

import numpy as np
import pytest
import scipy.stats
from hypothesis import given
from hypothesis import strategies as st

from halfbyte.training import gate, statistics
from halfbyte.training.config import Gate, GateRule
from halfbyte.training.errors import USAGE, UserError

# Statistics


@pytest.mark.parametrize("freedom", [1, 2, 3, 4, 5, 8, 29, 30, 149, 299, 300, 301, 302, 999, 5152, 100_000])
@pytest.mark.parametrize("probability", [0.005, 0.025, 0.3, 0.5, 0.75, 0.95, 0.975, 0.995, 0.9995])
def test_t_quantiles_agree_with_scipy(freedom, probability):
    expected = scipy.stats.t.ppf(probability, freedom)
    assert statistics.t_quantile(probability, freedom) == pytest.approx(expected, rel=1e-9, abs=1e-9)


@pytest.mark.parametrize(("probability", "freedom"), [(0.0, 3), (1.0, 3), (0.5, 0)])
def test_t_quantiles_refuse_nonsense(probability, freedom):
    with pytest.raises(ValueError, match="t_quantile"):
        statistics.t_quantile(probability, freedom)


def test_equal_weights_give_the_paired_t_interval():
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(2, 40))
    expected = scipy.stats.ttest_rel(a, b).confidence_interval(0.9)
    interval = statistics.paired_ratio(list(a - b), [1.0] * 40, 0.9)
    assert interval.estimate == pytest.approx((a - b).mean())
    assert (interval.low, interval.high) == pytest.approx((expected.low, expected.high))


def test_a_ratio_of_sums_agrees_with_the_jackknife():
    rng = np.random.default_rng(1)
    weights = rng.integers(20, 60, size=400).astype(float)
    differences = 0.1 * weights + rng.normal(size=400) * np.sqrt(weights)
    interval = statistics.paired_ratio(list(differences), list(weights), 0.95)
    left_out = (differences.sum() - differences) / (weights.sum() - weights)
    error = math.sqrt(399 / 400 * ((left_out - left_out.mean()) ** 2).sum())
    assert interval.estimate == pytest.approx(differences.sum() / weights.sum())
    assert (interval.high - interval.low) / 2 == pytest.approx(scipy.stats.t.ppf(0.975, 399) * error, rel=5e-3)


@given(st.integers(0, 40), st.integers(0, 40), st.integers(0, 200), st.floats(0.5, 0.999))
def test_proportions_are_a_wald_interval_with_one_more_item_each_way(gained, lost, same, confidence):
    n = gained + lost + same
    if not n:
        return
    values = np.array([1] * (gained + 1) + [-1] * (lost + 1) + [0] * same)
    half = scipy.stats.norm.ppf((1 + confidence) / 2) * values.std() / math.sqrt(n + 2)
    interval = statistics.paired_proportions(gained, lost, n, confidence)
    assert interval.estimate == pytest.approx((gained - lost) / n)
    assert interval.low == pytest.approx(max(-1, values.mean() - half))
    assert interval.high == pytest.approx(min(1, values.mean() + half))
    swapped = statistics.paired_proportions(lost, gained, n, confidence)
    assert (swapped.low, swapped.high) == pytest.approx((-interval.high, -interval.low))


@pytest.mark.parametrize(("up", "down", "n"), [(0.0, 0.0, 100), (0.002, 0.002, 300), (0.02, 0.05, 150), (0.1, 0.1, 50)])
def test_proportions_cover_the_truth_with_few_or_no_discordant_items(up, down, n):
    rng = np.random.default_rng(2)
    counts = rng.multinomial(n, [up, down, 1 - up - down], size=2000)
    intervals = [statistics.paired_proportions(int(a), int(b), n, 0.95) for a, b, _ in counts]
    covered = np.mean([i.low <= up - down <= i.high for i in intervals])
    assert covered >= 0.94


def test_ratios_cover_the_truth():
    rng = np.random.default_rng(3)
    covered = 0
    for _ in range(600):
        weights = rng.integers(5, 40, size=30).astype(float)
        differences = 0.05 * weights + rng.normal(size=30) * np.sqrt(weights)
        interval = statistics.paired_ratio(list(differences), list(weights), 0.95)
        covered += interval.low <= 0.05 <= interval.high
    assert covered / 600 == pytest.approx(0.95, abs=0.03)


@pytest.mark.parametrize(("gained", "lost", "items"), [(10, 12, 300), (0, 0, 300), (3, 30, 5153), (40, 2, 1000)])
def test_the_number_of_items_that_would_decide_does(gained, lost, items):
    bound = -0.002
    needed = statistics.proportions_to_decide(gained, lost, items, bound, 0.95)
    assert needed >= items
    for n, decides in ((needed + 2, True), (needed - 2, False)):
        interval = statistics.paired_proportions(gained / items * n, lost / items * n, n, 0.95)
        assert (not interval.low < bound < interval.high) == (decides or n < items)
    assert statistics.proportions_to_decide(2, 4, 1000, bound, 0.95) is None  # exactly on the bound


def test_one_item_has_no_interval_and_none_is_an_error():
    assert statistics.paired_ratio([1.0], [2.0], 0.95) == statistics.Interval(0.5, -math.inf, math.inf)
    assert statistics.ratio_to_decide(statistics.Interval(0.5, -math.inf, math.inf), 1, 0.0) is None
    assert statistics.ratio_to_decide(statistics.Interval(0.5, 0.0, 1.0), 100, 0.375) == 1600
    for call in (lambda: statistics.paired_ratio([], [], 0.95), lambda: statistics.paired_proportions(0, 0, 0, 0.95)):
        with pytest.raises(ValueError, match="paired_"):
            call()


# The gate


def make(rng, n=300, *, shift=0.0, noise=0.2, kl=None, tokens=2, base=None):
    """Scores of a model whose log-likelihoods are those of a common base, shifted, with noise of its own."""
    base = base if base is not None else [-4 + 2 * random.Random(i).gauss(0, 1) for i in range(n)]
    values = [value + shift * tokens + rng.gauss(0, noise) for value in base[:n]]
    return [
        {
            "item": i,
            "loglikelihood": value,
            "tokens": tokens,
            "bytes": 9,
            "correct": value > -3,
            "kl": None if kl is None else abs(rng.gauss(kl, 0.02)),
            "agreement": None,
        }
        for i, value in enumerate(values)
    ]


def summaries(stages, text=False):
    metric = {} if text else {"accuracy": 0.5}
    return {s: {t: metric | {"n": len(rows)} for t, rows in by_task.items()} for s, by_task in stages.items()}


def judge(stages, *, method="qat", text=False, **changes):
    return gate.judge(Gate(**changes), method=method, stages=stages, summaries=summaries(stages, text))


def three(rng, *, ptq=-0.2, qat=-0.1, ptq_kl=0.2, qat_kl=0.1, n=300):
    return {
        "bf16": {"t": make(rng, n)},
        "ptq": {"t": make(rng, n, shift=ptq, kl=ptq_kl)},
        "qat": {"t": make(rng, n, shift=qat, kl=qat_kl)},
    }


BETTER = {"rule": GateRule.better_than_ptq}


def test_a_clear_improvement_passes_and_the_bf16_verdict_stands_beside_it():
    verdict = judge(three(random.Random(0)), **BETTER)
    assert (verdict["verdict"], verdict["candidate"], verdict["rule"]) == ("pass", "qat", "better_than_ptq")
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
    assert result["tasks"]["t"]["kl_items_to_decide"] is None


def test_a_significant_loss_of_accuracy_fails_whatever_the_perplexity():
    stages = three(random.Random(0))
    for row in stages["qat"]["t"]:
        row["correct"] = False
    result = judge(stages, **BETTER)
    assert result["tasks"]["t"]["measures"]["accuracy"] == "fail"
    assert result["verdict"] == "fail"


def test_rule_bf16_passes_fails_or_says_how_many_items_it_needs():
    rng = random.Random(1)
    same = make(rng, 1500)
    stages = {"bf16": {"t": same}, "ptq": {"t": same}}
    assert judge(stages, method="ptq")["verdict"] == "pass"
    few = {stage: {"t": rows["t"][:100]} for stage, rows in stages.items()}
    result = judge(few, method="ptq")
    assert result["verdict"] == "inconclusive"
    assert result["tasks"]["t"]["accuracy_items_to_decide"] == statistics.proportions_to_decide(0, 0, 100, -0.002, 0.95)
    assert "would decide" in result["reasons"][0]
    worse = {"bf16": stages["bf16"], "ptq": {"t": make(rng, 1500, shift=-1.0)}}
    result = judge(worse, method="ptq")
    assert result["tasks"]["t"]["measures"] == {"accuracy": "fail", "perplexity": "fail"}
    assert result["tasks"]["t"]["delta_pp"] < -5
    assert judge(worse, method="ptq", threshold_pp=100, perplexity_ratio=1000)["verdict"] == "pass"


def test_a_loss_that_may_be_tolerable_is_inconclusive():
    rows = make(random.Random(1), 3000)
    changed = [dict(row) for row in rows]
    for row in [row for row in changed if row["correct"]][:4]:
        row["correct"] = False
    result = judge({"bf16": {"t": rows}, "ptq": {"t": changed}}, method="ptq")["tasks"]["t"]
    low, high = result["interval_pp"]
    assert low < -0.2 < high < 0.2
    assert result["measures"]["accuracy"] == "inconclusive"


def test_a_failure_outweighs_what_is_undecided():
    rng = random.Random(2)
    few, many = make(rng, 100), make(rng, 1500)
    stages = {"bf16": {"a": few, "b": many}, "ptq": {"a": few, "b": make(rng, 1500, shift=-1.0)}}
    result = judge(stages, method="ptq")
    assert [result["tasks"][task]["verdict"] for task in "ab"] == ["inconclusive", "fail"]
    assert result["verdict"] == "fail"


def test_one_bad_task_fails_the_whole():
    rng = random.Random(2)
    same = make(rng, 1500)
    stages = {"bf16": {"a": same, "b": same}, "ptq": {"a": same, "b": make(rng, 1500, shift=-1.0)}}
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
    result = judge(stages, text=True)
    assert list(result["tasks"]["t"]["measures"]) == ["perplexity"]
    assert result["tasks"]["t"]["perplexity_ratio"] == pytest.approx(1.2, abs=0.02)
    low, high = result["tasks"]["t"]["perplexity_interval"]
    assert low < 1.2 < high
    assert "delta_pp" not in result["tasks"]["t"]


def test_one_item_is_inconclusive_and_writes_valid_json():
    rng = random.Random(4)
    stages = {"bf16": {"t": make(rng, 1)}, "ptq": {"t": make(rng, 1)}}
    result = judge(stages, method="ptq")
    assert result["verdict"] == "inconclusive"
    assert result["tasks"]["t"]["perplexity_interval"][0] in (None, 0.0)
    json.dumps(result, allow_nan=False)


def test_the_control_is_not_judged():
    result = gate.judge(Gate(), method="bf16", stages={}, summaries={})
    assert result["verdict"] == "not_applicable"
    assert result["reasons"]


def test_equal_models_are_rarely_called_different():
    """A/A: 200 pairs of equally good models; each side of a 95% interval may err in 2.5% of them."""
    rng = random.Random(5)
    failed = better = 0
    for _ in range(200):
        base = [rng.gauss(-4, 2) for _ in range(80)]
        stages = {
            "bf16": {"t": make(rng, 80, base=base)},
            "ptq": {"t": make(rng, 80, base=base, kl=0.2)},
            "qat": {"t": make(rng, 80, base=base, kl=0.2)},
        }
        failed += judge(stages, threshold_pp=0.0, perplexity_ratio=1.0)["tasks"]["t"]["verdict"] == "fail"
        better += judge(stages, **BETTER)["verdict"] == "pass"
    assert failed <= 20  # two measures
    assert better <= 5  # all measures must agree


# Never a pass for want of data


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


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda s: s.pop("qat"), "stage qat has no scores"),
        (lambda s: s.pop("bf16"), "stage bf16 has no scores"),
        (lambda s: s.pop("ptq"), "stage ptq has no scores"),
        (lambda s: s.update(ptq={}), "stage ptq has no scores"),
        (lambda s: s["bf16"].update(t=[]), "task t of stage bf16 has no items"),
        (lambda s: s["ptq"].update(u=s["ptq"]["t"]), r"scored on \['t'\], ptq on \['t', 'u'\]"),
        (drop_first, r"scored on different items \(49 and 50\)"),
        (rename_item, "scored on different items"),
        (twice, "an item of qat.t was scored twice"),
        (lambda s: s["qat"]["t"][3].update(loglikelihood=math.nan), "item 3 of qat.t is not a finite score"),
        (lambda s: s["qat"]["t"][3].update(loglikelihood=math.inf), "item 3 of qat.t is not a finite score"),
        (lambda s: s["qat"]["t"][3].update(kl=math.nan), "item 3 of qat.t is not a finite score"),
        (lambda s: s["qat"]["t"][3].update(kl=None), "has no KL to BF16"),
        (lambda s: s["qat"]["t"][3].pop("correct"), "a score of qat.t lacks correct"),
    ],
)
def test_incomplete_or_unequal_scores_are_an_error(change, said):
    with pytest.raises(UserError, match=said):
        judge(broken(change), **BETTER)


def test_a_summary_of_other_scores_is_an_error():
    stages = three(random.Random(7), n=50)
    for damage in ({"n": 49, "accuracy": 0.5}, None):
        wrong = summaries(stages)
        wrong["qat"] = {} if damage is None else {"t": damage}
        with pytest.raises(UserError, match=r"evaluate\.json does not match the 50 scores of qat\.t"):
            gate.judge(Gate(), method="qat", stages=stages, summaries=wrong)


def test_ptq_cannot_beat_itself():
    with pytest.raises(UserError, match="compares a model with itself") as caught:
        judge(three(random.Random(8), n=50), method="ptq", **BETTER)
    assert caught.value.code == USAGE


def test_the_gate_needs_no_torch():
    code = "import sys, halfbyte.training.gate; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
