"""Claims: the rule, the reasons for no verdict, and a hash that sees what matters."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest

from shoal.results import Claim, Row, Rows, Sample, fingerprint, judge
from shoal.results.claims import record
from shoal.results.rows import Metrics
from shoal.results.statistics import proportion


def runs(*statuses: str) -> Rows:
    return Rows([Row({"id": str(i), "status": status, "steps": 1}, {}, Metrics([], 1), 0) for i, status in enumerate(statuses)])


DONE = runs(*["completed"] * 8)


def says(sample: Sample, holds: tuple[float, float], rows: Rows = DONE) -> str:
    return judge(Claim("x", lambda _: sample, holds), rows)["verdict"]


def test_held_inside_not_held_outside_else_undecided() -> None:
    values = np.array([0.97, 0.98, 0.99, 0.98])  # t interval [0.967, 0.993]
    for holds, verdict in (
        ((0.9, 1), "held"),
        ((0.99, 1), "undecided"),
        ((0.0, 0.96), "not held"),
        ((0.994, 1), "not held"),
        ((-math.inf, math.inf), "held"),
        ((0.9, 0.98), "undecided"),
    ):
        assert says(Sample(values), holds) == verdict, holds


def test_holds_is_closed() -> None:
    assert says(Sample([0.5, 0.5, 0.5]), (0.5, 0.5)) == "held"
    assert says(Sample([True] * 8, kind="proportion"), (proportion(8, 8).low, 1.0)) == "held"
    assert says(Sample([1.0, 1.0, 0.998, 0.999, 1.0]), (0.99, 1)) == "undecided"  # the t interval goes past 1 ...
    assert says(Sample([1.0, 1.0, 0.998, 0.999, 1.0], bounds=(0, 1)), (0.99, 1)) == "held"  # ... where no accuracy is


def test_four_of_four_do_not_decide_and_six_do() -> None:
    verdict = judge(Claim("More than half of the seeds.", lambda _: Sample([1, 1, 1, 1], kind="proportion"), (0.5, 1)), DONE)
    assert verdict["verdict"] == "undecided" and verdict["n"] == 4 and verdict["value"] == 1.0
    assert verdict["interval"] == pytest.approx([0.3976, 1.0], abs=1e-4) and "Clopper-Pearson" in verdict["rule"] and "[0.5, 1]" in verdict["rule"]
    assert says(Sample([True] * 6, kind="proportion"), (0.5, 1)) == "held"
    assert says(Sample([False] * 6, kind="proportion"), (0.5, 1)) == "not held"


def test_kinds() -> None:
    times = np.array([10.0, 20, 30, 40, 50, 60, 70, 80])
    assert says(Sample(times, np.ones(8), kind="survival"), (0, 100)) == "held"
    assert says(Sample(times, np.zeros(8), kind="survival"), (0, 5)) == "not held"  # never there, and 5 is past for all
    assert says(Sample(times, kind="median"), (10, 80)) == "held" and says(Sample(times[:5], kind="median"), (0, 100)) == "undecided"
    seed = np.random.default_rng(0).normal(0, 5, 8)
    better = Sample(seed + 1 + np.arange(8) / 100, pair=seed)
    assert says(better, (0.5, 2)) == "held" and says(Sample(seed + 1), (0.5, 2)) == "undecided"
    assert judge(Claim("x", lambda _: better, (0.5, 2)), DONE)["rule"].endswith("of pairs")
    assert says(Sample(seed + 1, pair=seed, kind="median"), (0.9, 1.1)) == "held"


@pytest.mark.parametrize(
    ("sample", "reason"),
    [
        (lambda rows: Sample(rows.column("final.val/accuracy")), "no run has 'final.val/accuracy'"),
        (lambda _: Sample([0.5, math.nan, 0.7]), "1 of 3 values are missing"),
        (lambda _: Sample([]), "no values"),
        (lambda _: Sample([0.5, 0.6], kind="proportion"), "True and False"),
        (lambda _: Sample([1.0], kind="survival"), "needs observed"),
        (lambda _: Sample([1], pair=[0], kind="proportion"), "pairs go with a mean"),
        (lambda rows: Sample([rows[99]["steps"]]), "out of range"),
    ],
)
def test_missing_data_leave_it_undecided_with_a_reason(sample: Callable[[Rows], Sample], reason: str) -> None:
    verdict = judge(Claim("x", sample, (0, 1)), DONE)
    assert verdict["verdict"] == "undecided" and reason in verdict["note"] and verdict["n"] == 0


def test_no_runs_and_unfinished_runs_are_undecided() -> None:
    claim = Claim("x", lambda rows: Sample([True] * len(rows), kind="proportion"), (0.1, 1))
    assert judge(claim, Rows())["note"] == "no runs yet"
    verdict = judge(claim, runs("completed", "running", "finished", "running"))
    assert verdict["verdict"] == "undecided" and "2 of 4 runs are unfinished" in verdict["note"] and verdict["value"] == 1.0
    assert says(Sample([5.0] * 8, [True] * 8, kind="survival"), (0, 6), runs(*["running"] * 8)) == "held"  # censoring is part of that interval


def test_bugs_in_a_sample_are_not_hidden() -> None:
    def broken(rows: Any) -> Sample:
        return rows.no_such_method()

    with pytest.raises(AttributeError):
        judge(Claim("x", broken, (0, 1)), DONE)


def sample_a(rows: Rows) -> Sample:
    return Sample(rows.column("final.val/accuracy"))


def sample_b(rows: Rows) -> Sample:
    return Sample(rows.column("best.val/accuracy"))


def at_least(threshold: float, inner: Callable[[Any], Any] = sample_a) -> Callable[[Rows], Sample]:
    return lambda rows: Sample(np.asarray(inner(rows).values) >= threshold, kind="proportion")


def test_fingerprint_sees_text_source_range_and_what_is_closed_over() -> None:
    claims = [
        Claim("a", sample_a, (0, 1)),
        Claim("b", sample_a, (0, 1)),
        Claim("a", sample_b, (0, 1)),
        Claim("a", sample_a, (0, 2)),
        Claim("a", at_least(0.9), (0, 1)),
        Claim("a", at_least(0.99), (0, 1)),
        Claim("a", at_least(0.99, sample_b), (0, 1)),
        Claim("a", partial(sample_a), (0, 1)),
        Claim("a", np.mean, (0, 1)),  # pyright: ignore[reportArgumentType]
    ]
    hashes = [fingerprint(claim) for claim in claims]
    assert len(set(hashes)) == len(hashes) and all(len(h) == 64 for h in hashes)
    assert fingerprint(Claim("a", at_least(0.99), (0.0, 1.0))) == hashes[5]
    assert record(claims)[3] == {"claim": "a", "holds": [0, 2], "hash": hashes[3]}


def test_fingerprint_of_functions_without_source() -> None:
    def typed(text: str) -> Callable[[Rows], Sample]:
        space: dict[str, Any] = {"Sample": Sample}
        exec(compile(text, "<prompt>", "exec"), space)
        return space["f"]

    one, same, other = (typed(f"f = lambda rows: Sample([x > {t} for x in rows.column('steps')])") for t in (3, 3, 4))
    hashes = [fingerprint(Claim("a", f, (0, 1))) for f in (one, same, other)]
    assert hashes[0] == hashes[1] != hashes[2]


def test_holds_must_be_a_range() -> None:
    with pytest.raises(AssertionError, match="low, high"):
        Claim("x", sample_a, (1, 0))
