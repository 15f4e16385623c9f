"""Where to draw the line between positive and negative when a model's scores are shifted, without any labels.

Scores are log-odds, log p(positive) / p(negative); positive is what lies above a boundary. A model that says "good" more readily than "bad" shifts all of
them, and at p = 0.5 nearly every text is then positive, however well the scores order the texts.

| boundary | from | supposes |
|---|---|---|
| p = 0.5 | nothing | no shift |
| median | the scores | half of the texts are positive |
| mixture | the scores | two normal distributions of equal width, one for each class |
| content-free | the scores of texts that say nothing (Zhao et al. 2021, arXiv 2102.09690) | the shift is the same for all texts |

Pure functions of arrays. Not here: models (``classify``), and intervals (``shoal.results.statistics``).

    mixture(log_odds).boundary
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.special import expit

CONTENT_FREE = ("N/A", "", "[MASK]")  # the paper's
STARTS = ((0.25, 0.75), (0.1, 0.9), (0.4, 0.6))  # quantiles at which the two means begin; the likeliest end counts
ROUNDS, CLOSE = 5000, 1e-10  # of log-likelihood per text: below that the rounds end


class Mixture(NamedTuple):
    """share N(high, sd^2) + (1 - share) N(low, sd^2)"""

    share: float  # of the upper one
    low: float
    high: float
    sd: float
    log_likelihood: float  # mean per score, nats; NaN if the scores do not differ

    @property
    def boundary(self) -> float:
        """Where both are as likely: at equal widths a single point, halfway between the means if the shares are equal."""
        middle, apart = (self.low + self.high) / 2, self.high - self.low
        if not apart > 0:
            return middle
        return middle - self.sd**2 / apart * (math.log(max(self.share, 1e-300)) - math.log(max(1 - self.share, 1e-300)))


def median(log_odds: ArrayLike) -> float:
    """That of p(positive) is at the same place, the one being a rising function of the other (but for the mean of the middle two)."""
    return float(np.median(np.asarray(log_odds, np.float64)))


def mixture(log_odds: ArrayLike) -> Mixture:
    """log_odds [n], n of 2 or more -> the likeliest mixture, by expectation maximisation (Dempster, Laird and Rubin 1977).

    One width for both: with two a likelihood has no maximum (a component on a single score), and there may be two boundaries or none.
    """
    x = np.asarray(log_odds, np.float64)
    assert x.ndim == 1 and len(x) >= 2 and np.isfinite(x).all()
    spread = float(x.std())
    if spread <= 1e-12 * max(1.0, float(np.abs(x).max())):
        return Mixture(0.5, float(x.mean()), float(x.mean()), 0.0, math.nan)
    z = (x - x.mean()) / spread
    best = max((_climb(z, *np.quantile(z, start)) for start in STARTS), key=lambda found: found.log_likelihood)
    share, low, high = (best.share, best.low, best.high) if best.low <= best.high else (1 - best.share, best.high, best.low)
    centre = float(x.mean())
    return Mixture(share, centre + spread * low, centre + spread * high, spread * best.sd, best.log_likelihood - math.log(spread))


def _climb(z: NDArray[np.float64], low: float, high: float) -> Mixture:
    share, sd, before = 0.5, 0.7, -math.inf
    for _ in range(ROUNDS):
        lower, upper = math.log(1 - share) + _log_normal(z, low, sd), math.log(share) + _log_normal(z, high, sd)
        total = np.logaddexp(lower, upper)
        now = float(total.mean())
        if now - before < CLOSE:
            break
        before, upper = now, np.exp(upper - total)
        share = float(np.clip(upper.mean(), 1e-9, 1 - 1e-9))
        low, high = float(((1 - upper) * z).sum() / max((1 - upper).sum(), 1e-9)), float((upper * z).sum() / max(upper.sum(), 1e-9))
        sd = math.sqrt(max(float(((1 - upper) * (z - low) ** 2 + upper * (z - high) ** 2).mean()), 1e-6))
    return Mixture(share, low, high, sd, before)


def _log_normal(z: NDArray[np.float64], mean: float, sd: float) -> NDArray[np.float64]:
    return -0.5 * ((z - mean) / sd) ** 2 - math.log(sd) - 0.5 * math.log(2 * math.pi)


def contextual(content_free: ArrayLike) -> float:
    """Log-odds of texts that say nothing [m] -> the log-odds of their mean p(positive).

    The paper divides both probabilities by those means and takes the larger: that is the side of this boundary.
    """
    p = float(np.mean(expit(np.asarray(content_free, np.float64))))
    return math.log(max(p, 1e-300)) - math.log(max(1 - p, 1e-300))
