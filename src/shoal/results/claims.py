"""Claims: sentences a study can check, each with a sample, a rule and a hash taken before training.

held: the interval lies inside ``holds``; not held: wholly outside; else undecided, which is an answer too. 4 of 4 seeds leave "more than half of the seeds"
(holds=(0.5, 1)) undecided: Clopper and Pearson's 95 % interval is [0.398, 1]. Six of six decide it.

    Claim("A model of width 128 reaches 99 %, on average.", lambda rows: Sample(rows.column("best.val/accuracy"), bounds=(0, 1)), (0.99, 1))
"""

from __future__ import annotations

import hashlib
import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from types import CodeType
from typing import Any, Literal, TypedDict

import numpy as np
from numpy.typing import ArrayLike

from shoal.results import statistics
from shoal.results.rows import Rows
from shoal.results.wording import interval, number

CONFIDENCE = 0.95
RULES = {
    "mean": "Student's t interval of the mean",
    "paired mean": "Student's t interval of the mean difference of pairs",
    "proportion": "Clopper-Pearson interval of the share",
    "median": "order-statistics interval of the median",
    "survival median": "Kaplan-Meier median, interval from the log-log band",
}


@dataclass(frozen=True)
class Sample:
    """What a claim is judged on: one value per independent seed."""

    values: ArrayLike  # [n]; for a proportion True or False (1 or 0), for survival the times
    observed: ArrayLike | None = None  # [n], survival only: False = not reached by that time (see Rows.reached)
    pair: ArrayLike | None = None  # [n], mean or median only: the other half of each pair; values - pair is judged
    kind: Literal["mean", "proportion", "median", "survival"] = "mean"
    bounds: tuple[float, float] = (-math.inf, math.inf)  # what is possible at all, (0, 1) for an accuracy: the interval is cut to it

    def estimate(self, confidence: float = CONFIDENCE) -> statistics.Estimate:
        values = np.asarray(self.values, dtype=np.float64).ravel()
        if self.pair is not None and self.kind not in ("mean", "median"):
            raise ValueError(f"pairs go with a mean or a median, not with a {self.kind}")
        match self.kind:
            case "mean":
                result = statistics.mean(values, confidence) if self.pair is None else statistics.paired_mean(values, self.pair, confidence)
            case "median":
                result = statistics.median(values if self.pair is None else values - np.asarray(self.pair, dtype=np.float64), confidence)
            case "proportion":
                if not np.isin(values, (0, 1)).all():
                    raise ValueError("a proportion is made of True and False (1 and 0)")
                result = statistics.proportion(int(values.sum()), values.size, confidence)
            case "survival":
                if self.observed is None:
                    raise ValueError("a survival sample needs observed, one flag per time: Sample(*rows.reached(metric, threshold), kind='survival')")
                result = statistics.survival_median(values, self.observed, confidence)
        return result.within(*self.bounds)


@dataclass(frozen=True)
class Claim:
    text: str
    sample: Callable[[Rows], Sample]
    holds: tuple[float, float]  # closed; (0.99, math.inf) is possible

    def __post_init__(self) -> None:
        assert self.holds[0] <= self.holds[1], f"holds is (low, high), not {self.holds}"


class Verdict(TypedDict):
    claim: str
    verdict: Literal["held", "not held", "undecided"]
    value: float
    interval: list[float]
    n: int
    rule: str  # which interval, and inside of what
    note: str  # why undecided, exact coverage, number censored; may be empty
    holds: list[float]


def judge(claim: Claim, rows: Rows, confidence: float = CONFIDENCE) -> Verdict:
    """Undecided, with the reason, also while there are no runs, while runs are unfinished (survival samples censor those) and where data are missing."""
    low, high = claim.holds

    def verdict(word: Literal["held", "not held", "undecided"], estimate: statistics.Estimate, note: str) -> Verdict:
        kind = RULES.get(estimate.kind, estimate.kind)
        inside = f"at least {number(low)}" if high == math.inf else f"at most {number(high)}" if low == -math.inf else f"within {interval(low, high)}"
        rule = f"held if the {100 * confidence:g} % interval is {inside}, not held if outside" + (f"; {kind}" if kind else "")
        return Verdict(
            claim=claim.text, verdict=word, value=estimate.value, interval=[estimate.low, estimate.high], n=estimate.n, rule=rule, note=note, holds=[low, high]
        )

    nothing = statistics.Estimate("", math.nan, -math.inf, math.inf, 0)
    if not rows:
        return verdict("undecided", nothing, "no runs yet")
    try:
        sample = claim.sample(rows)
        estimate = sample.estimate(confidence)
    except (LookupError, ValueError) as error:  # what missing data raise; a TypeError or a misspelt name is a bug and must be seen
        return verdict("undecided", nothing, str(error.args[0] if error.args else error))
    if estimate.n == 0:
        return verdict("undecided", estimate, "no values")
    unfinished = sum(row["status"] == "running" for row in rows)
    if unfinished and sample.kind != "survival":
        return verdict("undecided", estimate, f"so far: {unfinished} of {len(rows)} runs are unfinished")
    if low <= estimate.low and estimate.high <= high:
        return verdict("held", estimate, estimate.note)
    if estimate.high < low or estimate.low > high:
        return verdict("not held", estimate, estimate.note)
    return verdict("undecided", estimate, estimate.note)


def fingerprint(claim: Claim) -> str:
    """sha256 of the text, the source of the sample function (with what it closes over) and ``holds``: written down before training."""
    return hashlib.sha256("\n".join([claim.text, _source(claim.sample), repr(tuple(map(float, claim.holds)))]).encode()).hexdigest()


def record(claims: Sequence[Claim]) -> list[dict[str, Any]]:
    """The claims as study.yaml keeps them."""
    return [{"claim": claim.text, "holds": list(claim.holds), "hash": fingerprint(claim)} for claim in claims]


def _source(value: Any) -> str:
    """A function's source text and the values it was made with; its code where there is no source (typed at a prompt); else the value itself."""
    if isinstance(value, partial):
        return _source([value.func, list(value.args), value.keywords])
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(map(_source, value)) + "]"
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{key!r}: {_source(v)}" for key, v in sorted(value.items())) + "}"
    if inspect.ismethod(value):
        return _source([value.__func__, value.__self__])
    if not inspect.isfunction(value):
        text = value.__name__ if inspect.ismodule(value) else repr(value)
        return type(value).__qualname__ if " at 0x" in text else text  # never an address
    try:
        text = inspect.getsource(value)
    except (OSError, TypeError):
        text = _code(value.__code__)
    made_with = [cell.cell_contents for cell in value.__closure__ or ()] + list(value.__defaults__ or ())
    return text + (_source(made_with) if made_with else "")


def _code(code: CodeType) -> str:
    constants = [_code(c) if isinstance(c, CodeType) else repr(c) for c in code.co_consts]
    return "|".join([code.co_code.hex(), *constants, *code.co_names, *code.co_varnames])
