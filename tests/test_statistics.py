"""Intervals and p-values against scipy, sacrebleu and closed forms, and their coverage by simulation (seeds fixed)."""

import math
import random

import numpy as np
import pytest
import sacrebleu
import scipy.stats
from hypothesis import given
from hypothesis import strategies as st

from halfbyte.training import bootstrap, metrics, statistics
from halfbyte.training.bootstrap import paired_bleu_bootstrap, paired_mean_bootstrap
from halfbyte.training.statistics import Interval

# Student's t, paired ratios


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


@given(st.lists(st.floats(-5, 5), min_size=2, max_size=30), st.floats(0.5, 0.999))
def test_the_skewed_interval_is_the_outer_one_of_t_and_hall(values, confidence):
    n, values = len(values), np.array(values)
    mean, deviation, centred = values.mean(), values.std(ddof=1), values - values.mean()
    interval = statistics.skewed_ratio(list(values), [1.0] * n, confidence)
    q = scipy.stats.t.ppf((1 + confidence) / 2, n - 1)
    least = q * statistics.LEAST_SPREAD / n
    if deviation / math.sqrt(n) < statistics.LEAST_SPREAD / n:
        assert min(interval.high - mean, mean - interval.low) >= least * (1 - 1e-9)
        return
    # Hall 1992: T = W + g W^2 / 3 + g^2 W^3 / 27 + g / (6 n) with W in standard deviations, here solved numerically.
    g = (centred**3).mean() / (centred**2).mean() ** 1.5

    def transformed(w):
        return w + g * w**2 / 3 + g**2 * w**3 / 27 + g / (6 * n)

    for end, sign in ((interval.low, 1), (interval.high, -1)):
        w = (mean - end) / deviation
        assert sign * w * math.sqrt(n) >= q * (1 - 1e-6)  # never inside the t interval
        # With as much skewness the polynomial is flat at the end: compare the values, not the arguments.
        outside_t = sign * w * math.sqrt(n) > q * (1 + 1e-6)
        assert not outside_t or transformed(w) * math.sqrt(n) == pytest.approx(sign * q, rel=1e-4, abs=1e-6)


def test_a_symmetric_sample_gets_the_t_interval():
    values = [-3.0, -1.0, 0.0, 1.0, 3.0]
    plain = statistics.paired_ratio(values, [1.0] * 5, 0.95)
    skewed = statistics.skewed_ratio(values, [1.0] * 5, 0.95)
    assert (skewed.low, skewed.high) == pytest.approx((plain.low, plain.high))


def test_one_item_has_no_interval_and_none_is_an_error():
    assert statistics.paired_ratio([1.0], [2.0], 0.95) == Interval(0.5, -math.inf, math.inf)
    assert statistics.skewed_ratio([1.0], [2.0], 0.95) == Interval(0.5, -math.inf, math.inf)
    assert statistics.interval_to_decide(Interval(0.5, -math.inf, math.inf), 1, 0.0) is None
    for call in (
        lambda: statistics.paired_ratio([], [], 0.95),
        lambda: statistics.paired_proportions(0, 0, 0, 0.95),
        lambda: statistics.shares_mean([], 0.95),
        lambda: paired_mean_bootstrap([], [], 0.95),
        lambda: paired_mean_bootstrap([1.0], [1.0, 0.0], 0.95),
        lambda: paired_bleu_bootstrap([], [], 0.95),
    ):
        with pytest.raises(ValueError, match=r"paired|shares"):
            call()


@pytest.mark.parametrize("items", [2, 3, 10])
def test_equal_differences_of_few_items_have_a_width(items):
    for value in (0.0, 0.3):
        interval = statistics.skewed_ratio([value] * items, [1.0] * items, 0.95)
        assert interval.low < value - 0.02 < value + 0.02 < interval.high


# Proportions and other bounded means


@given(st.integers(0, 40), st.integers(0, 40), st.integers(0, 200), st.floats(0.5, 0.999))
def test_proportions_are_a_wald_interval_with_more_items_each_way(gained, lost, same, confidence):
    n = gained + lost + same
    if not n:
        return
    extra = scipy.stats.norm.ppf((1 + confidence) / 2) ** 2 / 2
    values, counts = np.array([1, -1, 0]), np.array([gained + extra, lost + extra, same])
    mean = np.average(values, weights=counts)
    deviation = math.sqrt(np.average((values - mean) ** 2, weights=counts))
    half = scipy.stats.norm.ppf((1 + confidence) / 2) * deviation / math.sqrt(counts.sum())
    interval = statistics.paired_proportions(gained, lost, n, confidence)
    assert interval.estimate == pytest.approx((gained - lost) / n)
    assert interval.low == pytest.approx(max(-1, mean - half))
    assert interval.high == pytest.approx(min(1, mean + half))
    swapped = statistics.paired_proportions(lost, gained, n, confidence)
    assert (swapped.low, swapped.high) == pytest.approx((-interval.high, -interval.low))


@given(st.integers(0, 60), st.integers(1, 60), st.floats(0.5, 0.9999))
def test_shares_of_0_and_1_get_agresti_and_coulls_interval(ones, zeros, confidence):
    # Agresti and Coull 1998: p~ = (x + z^2/2) / (n + z^2), p~ -+ z sqrt(p~ (1 - p~) / (n + z^2))
    z = scipy.stats.norm.ppf((1 + confidence) / 2)
    n = ones + zeros + z * z
    p = (ones + z * z / 2) / n
    half = z * math.sqrt(p * (1 - p) / n)
    interval = statistics.shares_mean([1.0] * ones + [0.0] * zeros, confidence)
    assert (interval.low, interval.high) == pytest.approx((max(0, p - half), min(1, p + half)), abs=1e-12)
    assert interval.estimate == pytest.approx(ones / (ones + zeros))


@given(st.integers(0, 300), st.integers(0, 300))
def test_mcnemars_exact_p_is_the_sign_tests(gained, lost):
    if gained + lost:
        expected = scipy.stats.binomtest(gained, gained + lost).pvalue
        assert statistics.mcnemar(gained, lost) == pytest.approx(expected, rel=1e-9)
    assert statistics.mcnemar(0, 0) == 1.0


def test_mcnemar_of_many_items_neither_overflows_nor_underflows():
    assert statistics.mcnemar(50_000, 50_000) == 1.0
    assert statistics.mcnemar(49_500, 50_500) == pytest.approx(scipy.stats.binomtest(49_500, 100_000).pvalue, rel=1e-6)
    assert 0 <= statistics.mcnemar(0, 20_000) < 1e-300


@pytest.mark.parametrize(("gained", "lost", "items"), [(10, 12, 300), (0, 0, 300), (3, 30, 5153), (40, 2, 1000)])
def test_the_number_of_items_that_would_decide_does(gained, lost, items):
    bound = -0.002
    needed = statistics.mean_to_decide(gained - lost, gained + lost, items, bound, 0.95)
    assert needed >= items
    for n, decides in ((needed + 2, True), (needed - 2, False)):
        interval = statistics.paired_proportions(gained / items * n, lost / items * n, n, 0.95)
        assert (not interval.low < bound < interval.high) == (decides or n < items)
    assert statistics.mean_to_decide(-2, 6, 1000, bound, 0.95) is None  # exactly on the bound


@pytest.mark.parametrize(
    ("interval", "bound", "needed"),
    [
        (Interval(0.5, 0.0, 1.0), 0.375, 1600),
        (Interval(0.5, 0.25, 1.0), 0.375, 400),  # the end on the bound's side counts
        (Interval(0.5, 0.25, 1.0), 0.75, 400),
        (Interval(0.5, 0.4, 0.6), 0.0, 100),  # decided already
        (Interval(0.5, 0.4, 0.6), 0.5, None),
        (Interval(0.5, 0.0, 1.0), 0.5 + 1e-6, None),
    ],
)
def test_an_interval_that_shrinks_with_the_root_of_the_items_decides_at(interval, bound, needed):
    assert statistics.interval_to_decide(interval, 100, bound) == needed


# Bootstrap


def test_the_bootstrap_of_proportions_is_close_to_their_closed_form():
    rng = np.random.default_rng(1)
    a = (rng.random(400) < 0.7).astype(float)
    b = np.where(rng.random(400) < 0.2, 1 - a, a)
    closed = statistics.paired_proportions(int((a > b).sum()), int((a < b).sum()), 400, 0.95)
    drawn = paired_mean_bootstrap(list(a), list(b), 0.95)
    assert drawn.estimate == pytest.approx(closed.estimate)
    assert (drawn.low, drawn.high) == pytest.approx((closed.low, closed.high), abs=0.004)


def test_the_bootstrap_of_many_means_agrees_with_scipys():
    rng = np.random.default_rng(2)
    a, b = rng.beta(2, 2, size=(2, 2000))
    expected = scipy.stats.bootstrap((a - b,), np.mean, method="percentile", n_resamples=5000, rng=3, batch=500)
    ends = expected.confidence_interval
    interval = paired_mean_bootstrap(list(a), list(b), 0.95)
    assert (interval.low, interval.high) == pytest.approx((ends.low, ends.high), abs=0.1 * (ends.high - ends.low))


def test_resampled_sums_are_sums_of_as_many_items(monkeypatch):
    rows = np.array([[1.0, 0.0], [1.0, 5.0], [1.0, 50.0]])
    sums = bootstrap.resampled_sums(rows, 4000)
    assert (sums[:, 0] == 3).all()
    assert set(sums[:, 1]) == {5.0 * i + 50.0 * j for i in range(4) for j in range(4 - i)}
    assert sums[:, 1].mean() == pytest.approx(55, abs=1.5)
    assert (bootstrap.resampled_sums(rows, 4000) == sums).all()  # the same verdict every time
    monkeypatch.setattr(bootstrap, "CHUNK", 100)
    assert bootstrap.resampled_sums(rows, 4000).shape == (4000, 2)


def test_a_corrected_level_gets_more_resamples(monkeypatch):
    asked = []
    monkeypatch.setattr(bootstrap, "resampled_sums", lambda rows, n: asked.append(n) or np.zeros((n, 2)))
    for confidence in (0.95, 0.9975):
        paired_mean_bootstrap([1.0, 0.0], [0.0, 0.5], confidence)
    assert asked[0] == 10_000
    assert asked[1] == pytest.approx(40_000, abs=1)


@pytest.mark.parametrize("items", [1, 2, 30, 300])
def test_a_sample_without_a_difference_is_not_certain(items):
    mean = paired_mean_bootstrap([0.5] * items, [0.5] * items, 0.95)
    text = [20, 20, 18, 15, 12, 9, 20, 19, 18, 17]
    bleu = paired_bleu_bootstrap([text] * items, [text] * items, 0.95)
    for interval in (mean, bleu):
        assert interval.estimate == 0
        assert interval.low < -min(0.5, 1.5 / items) < min(0.5, 1.5 / items) < interval.high
    assert mean.low >= -1
    assert mean.high <= 1


SENTENCES = ["the cat sat on the mat today", "a quick brown fox jumps over it", "we will see what this brings us all"]


def corpus(rng, n, noise):
    references, outputs = [], []
    for _ in range(n):
        words = rng.choice(SENTENCES).split() + rng.choice(SENTENCES).split()
        references.append(" ".join(words))
        changed = [("oops" if rng.random() < noise else word) for word in words if rng.random() > noise / 2]
        outputs.append(" ".join(changed))
    return outputs, references


def counts(output, reference):
    score = sacrebleu.sentence_bleu(output, [reference], smooth_method="none", use_effective_order=False)
    return [score.sys_len, score.ref_len, *score.counts, *score.totals]


@pytest.mark.parametrize(("n", "noise"), [(60, 0.05), (60, 0.3), (3, 0.1), (1, 0.0), (2, 1.0)])
def test_bleu_is_sacrebleus(n, noise):
    outputs, references = corpus(random.Random(4), n, noise)
    values = [counts(*pair) for pair in zip(outputs, references, strict=True)]
    expected = sacrebleu.corpus_bleu(outputs, [references], smooth_method="none", force=True).score / 100
    assert metrics.aggregate("bleu", values) == pytest.approx(expected, abs=1e-9)
    worse, _ = corpus(random.Random(5), n, noise)
    other = [counts(*pair) for pair in zip(worse, references, strict=True)]
    against = sacrebleu.corpus_bleu(worse, [references], smooth_method="none", force=True).score / 100
    interval = paired_bleu_bootstrap(values, other, 0.95)
    assert interval.estimate == pytest.approx(expected - against, abs=1e-9)
    assert interval.low <= interval.estimate <= interval.high


def test_bleu_of_many_sums_at_once_is_bleu_of_each():
    rng = np.random.default_rng(6)
    sums = np.sort(rng.integers(1, 50, size=(5, 10)).astype(float))[:, ::-1]
    sums[3, 5] = 0  # no 4-gram matches
    sums[4] = 0
    each = [float(metrics.bleu(row)) for row in sums]
    assert list(metrics.bleu(sums)) == each
    assert each[3:] == [0.0, 0.0]
    assert min(each[:3]) > 0


# Coverage: how often the truth lies below and above the interval. Nominal is 0.025 each at 95 %. ---------------------


def misses(intervals, truth):
    low = np.mean([truth < interval.low for interval in intervals])
    return low, np.mean([truth > interval.high for interval in intervals])


@pytest.mark.parametrize("confidence", [0.95, 0.995])
@pytest.mark.parametrize(
    ("up", "down", "n"),
    [(0.0, 0.0, 100), (0.0, 0.002, 3000), (0.002, 0.002, 300), (0.02, 0.05, 150), (0.1, 0.1, 50), (0.0, 0.01, 300)],
)
def test_proportions_cover_the_truth_with_few_or_no_discordant_items(up, down, n, confidence):
    rng = np.random.default_rng(2)
    drawn = rng.multinomial(n, [up, down, 1 - up - down], size=4000)
    intervals = [statistics.paired_proportions(int(a), int(b), n, confidence) for a, b, _ in drawn]
    assert max(misses(intervals, up - down)) <= {0.95: 0.035, 0.995: 0.006}[confidence]


def test_one_item_each_way_would_not_be_enough():
    """Why z^2 / 2: the same samples with Bonett and Price's one item at each end pass far too often."""
    n, down = 3000, 0.002
    lost = np.random.default_rng(2).binomial(n, down, size=4000)
    shares = (lost + 1) / (n + 2)
    middle = 1 / (n + 2) - shares
    z = scipy.stats.norm.ppf(0.9975)
    half = z * np.sqrt((1 / (n + 2) + shares - middle**2) / (n + 2))
    assert np.mean(middle - half > -down) > 0.01  # nominal 0.0025


def rare_losses(rng, n):
    return np.where(rng.random(n) < 0.01, rng.choice([-1.0, -0.5, 0.5], size=n), 0.0)


def common_changes(rng, n):
    steps, chances = [-1, -0.67, -0.5, -0.33, 0.33, 0.5, 1], [0.2, 0.1, 0.15, 0.1, 0.15, 0.15, 0.15]
    return np.where(rng.random(n) < 0.15, rng.choice(steps, size=n, p=chances), 0.0)


@pytest.fixture
def fewer_resamples(monkeypatch):
    """Enough for a simulation: its own noise is larger."""
    monkeypatch.setattr(bootstrap, "LEAST_RESAMPLES", 1000)
    monkeypatch.setattr(bootstrap, "BEYOND", 25)


@pytest.mark.parametrize(
    ("draw", "truth", "n"), [(rare_losses, -0.01 / 3, 100), (common_changes, -0.00855, 150)], ids=["rare", "common"]
)
def test_f1_covers_the_truth(fewer_resamples, draw, truth, n):
    rng = np.random.default_rng(3)
    intervals = []
    for _ in range(400):
        changes = draw(rng, n)
        intervals.append(paired_mean_bootstrap(list(np.maximum(changes, 0)), list(np.maximum(-changes, 0)), 0.95))
    assert max(misses(intervals, truth)) <= 0.04


def test_bleu_covers_the_truth(fewer_resamples):
    rng = np.random.default_rng(4)

    def draw(n):
        length = rng.integers(8, 30, size=n)
        quality = rng.beta(8, 4, size=n)  # an item is easy or hard for both
        parts = []
        for factor in (0.97, 1.0):
            output = length - rng.integers(0, 2, size=n)
            grams = [output - order for order in range(4)]
            matches = [rng.binomial(g, (quality * factor) ** (order + 1)) for order, g in enumerate(grams)]
            parts.append(np.stack([output, length, *matches, *grams], axis=1).astype(float))
        return parts

    population = draw(400_000)
    truth = float(metrics.bleu(population[0].sum(axis=0)) - metrics.bleu(population[1].sum(axis=0)))
    intervals = []
    for _ in range(300):
        a, b = draw(100)
        intervals.append(paired_bleu_bootstrap(a, b, 0.95))
    assert truth == pytest.approx(-0.03, abs=0.01)
    assert max(misses(intervals, truth)) <= 0.045


SKEWED = {
    "normal": (lambda rng, n: rng.normal(size=n), 0.0),
    "few items carry the damage": (
        lambda rng, n: rng.normal(0, 0.3, n) + rng.exponential(1, n) * (rng.random(n) < 0.2),
        0.2,
    ),
    "KL": (lambda rng, n: np.exp(rng.normal(-1.3, 0.8, n)), math.exp(-1.3 + 0.32)),
}


@pytest.mark.parametrize("kind", SKEWED)
def test_skewed_damage_is_covered(kind):
    """Of these samples the t interval alone misses 4.9 and 3.8 % on the side that would be a false pass."""
    draw, truth = SKEWED[kind]
    rng = np.random.default_rng(5)
    samples = [draw(rng, 200) for _ in range(1000)]
    intervals = [statistics.skewed_ratio(list(sample), [1.0] * 200, 0.95) for sample in samples]
    assert max(misses(intervals, truth)) <= 0.04


def test_ratios_with_weights_cover_the_truth():
    rng = np.random.default_rng(3)
    for function in (statistics.paired_ratio, statistics.skewed_ratio):
        intervals = []
        for _ in range(600):
            weights = rng.integers(5, 40, size=30).astype(float)
            differences = 0.05 * weights + rng.normal(size=30) * np.sqrt(weights)
            intervals.append(function(list(differences), list(weights), 0.95))
        low, high = misses(intervals, 0.05)
        assert low + high == pytest.approx(0.05, abs=0.03)
