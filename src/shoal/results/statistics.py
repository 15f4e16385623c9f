"""Intervals for few independent seeds, each with its rule and its exact limits.

t for means (a percentile bootstrap of 3 values covers 75 %, so the bootstrap starts at 16), Clopper-Pearson for proportions, order statistics for
medians, Kaplan-Meier for times that some runs never reach. Not here: tests, p-values, corrections; a claim names its interval and nothing else.

    mean([0.97, 0.99, 0.98])   # Estimate(kind="mean", value=0.98, low=0.955, high=1.005, n=3, note="")

Every function is pure. An end that the values cannot bound is infinite (0 for times, which start there), and ``note`` says why.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import stats

BOOTSTRAP_FROM = 16


@dataclass(frozen=True)
class Estimate:
    kind: str  # "mean", "paired mean", "proportion", "median", "survival median", "bootstrap ..."
    value: float
    low: float
    high: float
    n: int  # independent values
    note: str = ""

    def within(self, low: float, high: float) -> Estimate:
        """The interval cut to what is possible (an accuracy lies in [0, 1]): the coverage stays, since the true value lies there. No interval stays none."""
        if math.isinf(self.low) and math.isinf(self.high):
            return self
        return Estimate(self.kind, self.value, max(self.low, low), min(self.high, high), self.n, self.note)


def _vector(values: ArrayLike) -> NDArray[np.float64]:
    x = np.asarray(values, dtype=np.float64).ravel()
    if np.isnan(x).any():
        raise ValueError(
            f"{int(np.isnan(x).sum())} of {x.size} values are missing (NaN); leave those runs out by a rule stated beforehand, or count them as failures"
        )
    return x


def mean(values: ArrayLike, confidence: float = 0.95) -> Estimate:
    """Student's t interval of a mean. values [n]."""
    x = _vector(values)
    if x.size == 0:
        return Estimate("mean", math.nan, -math.inf, math.inf, 0, "no values")
    if not np.isfinite(x).all():
        return Estimate("mean", math.nan, -math.inf, math.inf, x.size, "an infinite value: a mean says nothing here")
    value = float(np.clip(x.mean(), x.min(), x.max()))  # equal values: rounding must not move their mean
    if x.size == 1:
        return Estimate("mean", value, -math.inf, math.inf, 1, "one value has no spread: no interval")
    half = float(stats.t.ppf(0.5 + confidence / 2, x.size - 1) * x.std(ddof=1) / math.sqrt(x.size)) if x.min() < x.max() else 0.0
    return Estimate("mean", value, value - half, value + half, x.size, "" if half else "all values are equal")


def paired_mean(first: ArrayLike, second: ArrayLike, confidence: float = 0.95) -> Estimate:
    """t interval of the mean of first - second, pair by pair (the same seed). first, second [n]."""
    a, b = _vector(first), _vector(second)
    if a.size != b.size:
        raise ValueError(f"pairs need as many first values as second ones, not {a.size} and {b.size}")
    estimate = mean(a - b, confidence)
    return Estimate("paired mean", estimate.value, estimate.low, estimate.high, estimate.n, estimate.note)


def proportion(successes: int, n: int, confidence: float = 0.95) -> Estimate:
    """Clopper and Pearson (1934): exact, so it covers at least ``confidence``, usually more. 4 of 4 gives [0.398, 1]."""
    if not 0 <= successes <= n:
        raise ValueError(f"{successes} successes of {n} are not a proportion")
    if n == 0:
        return Estimate("proportion", math.nan, 0.0, 1.0, 0, "no values")
    tail = (1 - confidence) / 2
    low = float(stats.beta.ppf(tail, successes, n - successes + 1)) if successes else 0.0
    high = float(stats.beta.ppf(1 - tail, successes + 1, n - successes)) if successes < n else 1.0
    return Estimate("proportion", successes / n, low, high, n, f"{successes} of {n}")


def median(values: ArrayLike, confidence: float = 0.95) -> Estimate:
    """Between the k-th smallest and the k-th largest value, for the largest k whose exact coverage 1 - 2 P(Bin(n, 1/2) < k) is enough. values [n]."""
    x = np.sort(_vector(values))
    if x.size == 0:
        return Estimate("median", math.nan, -math.inf, math.inf, 0, "no values")
    middle = x[(x.size - 1) // 2 : x.size // 2 + 1]
    value = float(middle.mean()) if np.isfinite(middle).all() else float(middle[-1])
    k = int(stats.binom.ppf((1 - confidence) / 2, x.size, 0.5))  # P(Bin < k) <= (1 - confidence) / 2, and k + 1 breaks it
    if k < 1:
        needed = math.ceil(1 - math.log2(1 - confidence))
        return Estimate("median", value, -math.inf, math.inf, x.size, f"{x.size} values cannot bound a median at {confidence:.0%}; {needed} can")
    coverage = 1 - 2 * float(stats.binom.cdf(k - 1, x.size, 0.5))
    return Estimate("median", value, float(x[k - 1]), float(x[x.size - k]), x.size, f"exact coverage {coverage:.1%}")


def kaplan_meier(times: ArrayLike, observed: ArrayLike, confidence: float = 0.95) -> tuple[NDArray[np.float64], ...]:
    """Share not yet reached after each time: (times, share, low, high), each [m], the first at time 0.

    times, observed [n]: where observed is False the run was last seen, not there yet, at that time. Kaplan and Meier (1958), pointwise log-log band of
    Greenwood's variance. Where that band is not defined it is the exact binomial bound: of m of m while the share is 1 (m runs still followed),
    of 0 of m once it is 0 (m runs observed).
    """
    t, seen = _vector(times), np.asarray(observed, dtype=bool).ravel()
    if t.size == 0 or t.size != seen.size:
        raise ValueError(f"Kaplan-Meier needs one time and one flag per run, and at least one run, not {t.size} and {seen.size}")
    survival = stats.ecdf(stats.CensoredData(uncensored=t[seen], right=t[~seen])).sf
    with warnings.catch_warnings(), np.errstate(all="ignore"):
        warnings.simplefilter("ignore")  # "undefined at some observations": exactly the ends filled in below
        band = survival.confidence_interval(confidence_level=confidence, method="log-log")
        share, low, high = np.array(survival.probabilities), np.array(band.low.probabilities), np.array(band.high.probabilities)
    tail = (1 - confidence) / 2
    followed = (t[:, None] > np.array(survival.quantiles)).sum(axis=0)
    low, high = np.where(share >= 1, tail ** (1 / np.maximum(followed, 1e-9)), low), np.where(share >= 1, 1.0, high)
    low[share <= 0], high[share <= 0] = 0.0, 1 - tail ** (1 / max(int(seen.sum()), 1))
    start = np.array([0.0, 1.0, tail ** (1 / t.size), 1.0])
    return tuple(np.concatenate([[first], rest]) for first, rest in zip(start, (np.array(survival.quantiles), share, low, high), strict=True))


def survival_median(times: ArrayLike, observed: ArrayLike, confidence: float = 0.95) -> Estimate:
    """Median of times that some runs never reached. times, observed [n].

    The first time at which the Kaplan-Meier share is at most one half, or infinity; the interval holds the times at which the log-log band
    includes one half (Brookmeyer and Crowley 1982); its lower end is never past the last time any run was seen.
    """
    t, share, low, high = (np.zeros(0),) * 4 if np.size(times) == 0 else kaplan_meier(times, observed, confidence)
    if t.size == 0:
        return Estimate("survival median", math.nan, 0.0, math.inf, 0, "no values")
    value, start, end = (float(t[below.argmax()]) if below.any() else math.inf for below in (share <= 0.5, low <= 0.5, high <= 0.5))
    start = min(start, float(t[-1]))
    n, reached = np.size(times), int(np.sum(np.asarray(observed, dtype=bool)))
    return Estimate("survival median", value, start, end, n, f"{reached} of {n} reached it; {n - reached} censored" if reached < n else f"all {n} reached it")


def bootstrap(values: ArrayLike, statistic: Callable[..., Any] = np.mean, confidence: float = 0.95, resamples: int = 2000, seed: int = 0) -> Estimate:
    """Bias-corrected and accelerated bootstrap (Efron 1987) of any statistic(values, axis=). values [n], n of 16 or more."""
    x = _vector(values)
    if x.size < BOOTSTRAP_FROM:
        raise ValueError(f"a bootstrap of {x.size} values covers far less than it says; use mean() or median(), or at least {BOOTSTRAP_FROM} values")
    name, value = f"bootstrap {getattr(statistic, '__name__', 'statistic')}", float(statistic(x, axis=-1))
    if x.min() == x.max():
        return Estimate(name, value, value, value, x.size, "all values are equal")
    result = stats.bootstrap((x,), statistic, confidence_level=confidence, n_resamples=resamples, rng=np.random.default_rng(seed))
    return Estimate(name, value, float(result.confidence_interval.low), float(result.confidence_interval.high), x.size)
