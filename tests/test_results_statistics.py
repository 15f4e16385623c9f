"""Intervals: against scipy and published values, and by what they promise: coverage, by simulation."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest
from scipy import stats

from shoal.results.statistics import bootstrap, kaplan_meier, mean, median, paired_mean, proportion, survival_median


def share_covered(intervals: list[tuple[float, float]], truth: float) -> float:
    return float(np.mean([low <= truth <= high for low, high in intervals]))


def test_mean_is_scipys_t_interval() -> None:
    x = np.random.default_rng(0).normal(3, 2, 9)
    low, high = stats.ttest_1samp(x, 0).confidence_interval(0.9)
    estimate = mean(x, 0.9)
    assert (estimate.value, estimate.low, estimate.high, estimate.n) == pytest.approx((x.mean(), low, high, 9))


def test_paired_mean_is_scipys_paired_t_and_beats_the_unpaired_one() -> None:
    generator = np.random.default_rng(1)
    seed_effect = generator.normal(0, 10, 8)
    a, b = seed_effect + generator.normal(1, 0.3, 8), seed_effect + generator.normal(0, 0.3, 8)
    low, high = stats.ttest_rel(a, b).confidence_interval()
    estimate = paired_mean(a, b)
    assert (estimate.low, estimate.high) == pytest.approx((low, high))
    assert estimate.low > 0 > stats.ttest_ind(a, b).confidence_interval().low
    with pytest.raises(ValueError, match="8 and 7"):
        paired_mean(a, b[:7])


def test_mean_of_few_values() -> None:
    assert math.isnan(mean([]).value) and mean([]).n == 0
    one = mean([0.5])
    assert (one.low, one.value, one.high) == (-math.inf, 0.5, math.inf) and "no interval" in one.note
    equal = mean([0.1] * 3)
    assert (equal.low, equal.value, equal.high) == (0.1, 0.1, 0.1)  # exactly: rounding must not move them past a closed bound
    assert mean([1.0, math.inf]).low == -math.inf
    with pytest.raises(ValueError, match="1 of 3 values are missing"):
        mean([1.0, math.nan, 2.0])


def test_within_cuts_an_interval_but_invents_none() -> None:
    cut = mean([0.9, 0.95, 1.0]).within(0, 1)
    assert cut.high == 1.0 and cut.low == mean([0.9, 0.95, 1.0]).low
    assert mean([0.9]).within(0, 1).low == -math.inf


@pytest.mark.parametrize(("successes", "n"), [(0, 5), (4, 4), (3, 8), (15, 16), (0, 1)])
def test_proportion_is_clopper_pearson(successes: int, n: int) -> None:
    expected = stats.binomtest(successes, n).proportion_ci(0.95, method="exact")
    assert (proportion(successes, n).low, proportion(successes, n).high) == pytest.approx((expected.low, expected.high))


def test_four_of_four_do_not_show_more_than_half() -> None:
    assert proportion(4, 4).low == pytest.approx(0.3976, abs=1e-4)
    assert proportion(5, 5).low < 0.5 < proportion(6, 6).low
    assert (proportion(0, 0).low, proportion(0, 0).high) == (0, 1)
    with pytest.raises(ValueError, match="5 successes of 4"):
        proportion(5, 4)


def test_proportion_covers_at_least_what_it_says_exactly() -> None:
    for n in (4, 8, 20):
        intervals = [proportion(k, n) for k in range(n + 1)]
        for p in np.linspace(0.01, 0.99, 67):
            covered = sum(stats.binom.pmf(k, n, p) for k, e in enumerate(intervals) if e.low <= p <= e.high)
            assert covered >= 0.95 - 1e-9


def test_mean_covers_95_percent() -> None:
    x = np.random.default_rng(2).normal(1.0, 3.0, (4000, 4))
    assert share_covered([(e.low, e.high) for e in map(mean, x)], 1.0) == pytest.approx(0.95, abs=0.012)


@pytest.mark.parametrize("n", [6, 9, 20])
def test_median_covers_what_its_note_says(n: int) -> None:
    x = np.random.default_rng(n).exponential(1.0, (4000, n))  # skewed: no symmetry is assumed
    estimates = [median(row) for row in x]
    stated = float(estimates[0].note.split()[-1].rstrip("%")) / 100
    assert stated >= 0.95
    assert share_covered([(e.low, e.high) for e in estimates], math.log(2)) == pytest.approx(stated, abs=0.012)
    assert all(e.value == np.median(row) for e, row in zip(estimates, x, strict=True))


def test_median_interval_is_the_tightest_symmetric_one() -> None:
    for n in range(6, 40):
        estimate = median(np.arange(n))
        k = int(estimate.low) + 1
        assert estimate.high == n - k
        assert 1 - 2 * stats.binom.cdf(k - 1, n, 0.5) >= 0.95 > 1 - 2 * stats.binom.cdf(k, n, 0.5)


def test_median_of_few_is_unbounded() -> None:
    estimate = median([3.0, 1.0, 2.0, 5.0, 4.0])
    assert (estimate.value, estimate.low, estimate.high) == (3.0, -math.inf, math.inf)
    assert "5 values cannot bound a median" in estimate.note and "6 can" in estimate.note
    assert median([1.0, 2.0, math.inf, math.inf]).value == math.inf


# Freireich et al. 1963, weeks of remission; the shares are printed in Kalbfleisch and Prentice, the intervals are those of R's survfit(conf.type = "log-log").
REMISSION_6MP = (
    [6, 6, 6, 6, 7, 9, 10, 10, 11, 13, 16, 17, 19, 20, 22, 23, 25, 32, 32, 34, 35],
    [1, 1, 1, 0, 1, 0, 1, 0, 0, 1, 1, 0, 0, 0, 1, 1, 0, 0, 0, 0, 0],
)
REMISSION_CONTROL = [1, 1, 2, 2, 3, 4, 4, 5, 5, 8, 8, 8, 8, 11, 11, 12, 12, 15, 17, 22, 23]


def test_kaplan_meier_on_published_data() -> None:
    t, share, low, high = kaplan_meier(*REMISSION_6MP)
    at = {week: share[np.searchsorted(t, week)] for week in (6, 7, 10, 13, 16, 22, 23)}
    assert [round(float(s), 3) for s in at.values()] == [0.857, 0.807, 0.753, 0.690, 0.627, 0.538, 0.448]
    assert (t[0], share[0]) == (0, 1) and (low <= share).all() and (share <= high).all()
    estimate = survival_median(*REMISSION_6MP)
    assert (estimate.value, estimate.low, estimate.high, estimate.n) == (23, 13, math.inf, 21)
    assert "9 of 21" in estimate.note and "12 censored" in estimate.note
    control = survival_median(REMISSION_CONTROL, [True] * 21)
    assert (control.value, control.low, control.high) == (8, 4, 11)


def test_kaplan_meier_without_censoring_is_the_empirical_share() -> None:
    x = np.random.default_rng(3).permutation(50)[:20].astype(float) + 1
    t, share, _, _ = kaplan_meier(x, np.ones(20, bool))
    assert share == pytest.approx([(x > time).mean() for time in t])
    assert all(a >= b for a, b in pairwise(share))


@pytest.mark.parametrize(("n", "censoring"), [(12, math.inf), (20, 3.0), (40, 1.6)])
def test_survival_median_covers(n: int, censoring: float) -> None:
    generator = np.random.default_rng(n)
    event = generator.exponential(1.0, (1200, n))
    last_seen = generator.uniform(0, censoring, (1200, n)) if math.isfinite(censoring) else np.full((1200, n), 50.0)
    estimates = [survival_median(t, seen) for t, seen in zip(np.minimum(event, last_seen), event <= last_seen, strict=True)]
    assert 0.93 <= share_covered([(e.low, e.high) for e in estimates], math.log(2)) <= 0.985
    assert np.mean([math.isfinite(e.high) for e in estimates]) > 0.5  # and it does say something


def test_survival_median_at_the_edges() -> None:
    never = survival_median([100.0] * 8, [False] * 8)
    assert (never.value, never.low, never.high) == (math.inf, 100.0, math.inf)  # 8 of 8 past 100: the median is, too
    assert survival_median([1.0] * 7 + [100.0], [False] * 8).low == 1.0  # one long run bounds nothing
    tied = survival_median([250.0] * 8, [True] * 8)
    assert (tied.low, tied.value, tied.high) == (250.0, 250.0, 250.0)
    few = survival_median([1.0, 2.0, 3.0, 4.0], [True] * 4)
    assert (few.low, few.value, few.high) == (0.0, 2.0, math.inf)
    assert math.isnan(survival_median([], []).value)
    with pytest.raises(ValueError, match="one time and one flag per run"):
        kaplan_meier([1.0, 2.0], [True])


def test_bootstrap_begins_at_16() -> None:
    x = np.random.default_rng(5).normal(0, 1, 40)
    estimate = bootstrap(x)
    t = mean(x)
    assert (estimate.low, estimate.high) == pytest.approx((t.low, t.high), abs=0.08)
    assert bootstrap(x) == estimate  # its own seed, nothing global
    assert bootstrap(x, np.median).value == np.median(x)
    assert bootstrap(np.ones(16)).low == 1.0
    with pytest.raises(ValueError, match="at least 16"):
        bootstrap(x[:15])
