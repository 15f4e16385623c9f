"""Which operations does a small transformer come to know from part of their table, and how large a part does each need?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from shoal.config import StudyConfig, flatten
from shoal.config.tasks import OPERATIONS
from shoal.results import statistics
from shoal.results.claims import Claim, Sample
from shoal.results.comparisons import heatmap, mean_of, median_steps
from shoal.results.rows import Rows
from shoal.results.tables import Table
from shoal.studies.shared import GROKKED, matching, paper_run, percent, reached_table, small_run
from shoal.studies.study import Study, about, cells

OPERATION, FRACTION = "task.operation", "task.train_fraction"
SYMMETRIC, ASYMMETRIC = ("add", "squares", "quadratic"), ("sub", "div", "div_odd", "quadratic_x", "cubic")  # in x and y; over residues, cubic_y aside
NEVER = "cubic_y"
PAPER = {  # what Power et al. 2022 say of figure 2, right: best validation accuracy within 100,000 updates
    "cubic_y": "never",
    "div_odd": "learned",
    "add": "needs less than x - y",
    "quadratic": "needs less than with + x",
}


def full() -> StudyConfig:
    """Power et al. 2022, figure 2, right: their 12 operations and x y, 30 to 90 % of the rows, 3 seeds, at most 15,000 steps; bfloat16."""
    run = paper_run(15_000, precision="bfloat16", evaluate_every=100, log_every=100)
    run = replace(run, task=replace(run.task, val_fraction=0.1))
    operations = [
        "add", "sub", "mul", "div", "div_odd", "squares", "quadratic", "quadratic_x", "cubic", "cubic_y", "s5", "s5_conjugate", "s5_sandwich",
    ]  # fmt: skip
    return StudyConfig(run=run, grid={OPERATION: operations, FRACTION: [0.3, 0.5, 0.7, 0.9]}, seeds=3)


def quick() -> StudyConfig:
    """Minutes on two cores: four operations over a small modulus, a small model, 60 and 80 % of the rows."""
    run = small_run()
    run = replace(run, task=replace(run.task, val_fraction=0.1))
    return StudyConfig(run=run, grid={OPERATION: ["add", "sub", "div", "cubic_y"], FRACTION: [0.6, 0.8]}, seeds=3)


PRESETS = {"quick": quick, "full": full}
DEFAULT = ("quick", "full")


def best(rows: Rows, operations: Sequence[str], cell: dict[str, Any]) -> np.ndarray:
    """float [operations, seeds]: the best accuracy on unseen rows, mean over the fractions in ``rows``. Seeds in order; ValueError where some are missing."""
    found = []
    for operation in operations:
        part = rows.where({**cell, OPERATION: operation})
        found.append([np.mean(group.column("best.val/accuracy")) for _, group in part.groups(["seeds.split"])])
    if len({len(line) for line in found}) > 1:
        raise ValueError("not every operation has been run with every seed")
    return np.array(found)


def data_needed(fractions: Sequence[float], others: Sequence[dict[str, Any]], operations: Sequence[str]) -> Table:
    """A line per operation: best accuracies, and the smallest part of the table from which the median seed came to 99 %."""

    def make(rows: Rows) -> list[dict[str, Any]]:
        return [_line(matching(rows, {**cell, OPERATION: operation}), operation, fractions, cell) for cell in others for operation in operations]

    return Table(
        "data needed",
        make,
        f"Best accuracy on unseen rows: mean over seeds with its 95 % interval. Enough: the smallest share of the rows from which more than half of the seeds "
        f"came to {percent(GROKKED)} and stayed for five evaluations.",
    )


def _line(rows: Rows, operation: str, fractions: Sequence[float], cell: dict[str, Any]) -> dict[str, Any]:
    line: dict[str, Any] = {"operation": about(OPERATIONS.get(operation, operation), cell), "symmetric": "yes" if operation in (*SYMMETRIC, "mul") else "no"}
    enough = "none of these"
    for fraction in sorted(fractions, reverse=True):
        part = matching(rows, {FRACTION: fraction})
        if part and part.reached("val/accuracy", GROKKED)[1].mean() > 0.5:
            enough = percent(fraction)
    for fraction in fractions:
        part = matching(rows, {FRACTION: fraction})
        line[percent(fraction)] = statistics.mean(part.column("best.val/accuracy")).within(0, 1) if part else None
    return line | {"enough": enough, "published": PAPER.get(operation)}


def _claims(cell: dict[str, Any], operations: Sequence[str], fractions: Sequence[float]) -> list[Claim]:
    most, middle = max(fractions), sorted(fractions)[len(fractions) // 2]

    def never(rows: Rows) -> Sample:
        return Sample(best(rows.where({FRACTION: most}), [NEVER], cell)[0], bounds=(0, 1))

    def worst_of_the_others(rows: Rows) -> Sample:
        return Sample(best(rows.where({FRACTION: most}), [name for name in operations if name != NEVER], cell).min(axis=0), bounds=(0, 1))

    def symmetric(rows: Rows) -> Sample:
        one, other = ([name for name in operations if name in kind] for kind in (SYMMETRIC, ASYMMETRIC))
        return Sample(best(rows, one, cell).mean(axis=0), pair=best(rows, other, cell).mean(axis=0))

    def pair(first: str, second: str, rows: Rows) -> Sample:
        found = best(rows, [first, second], cell)
        return Sample(found[0], pair=found[1])

    shown, claims = percent(most), []
    if NEVER in operations:
        text = f"{OPERATIONS[NEVER]} is never known: even with {shown} of its rows the best accuracy on unseen ones stays below 50 %, in the mean."
        claims.append(Claim(about(text, cell), never, (0.0, 0.5)))
    if set(operations) - {NEVER}:
        text = f"With {shown} of the rows every other operation is known: the worst one's best accuracy on unseen rows is above 95 %, in the mean over seeds."
        claims.append(Claim(about(text, cell), worst_of_the_others, (0.95, 1.0)))
    if set(operations) & set(SYMMETRIC) and set(operations) & set(ASYMMETRIC):
        text = "Symmetric operations need fewer rows: their best accuracy, mean over operations and shares of rows, is above the others' by 2 points or more."
        claims.append(Claim(about(text, cell), symmetric, (0.02, 1.0)))
    for first, second in (("add", "sub"), ("quadratic", "quadratic_x")):
        if {first, second} <= set(operations):
            text = f"{OPERATIONS[first]} needs fewer rows than {OPERATIONS[second]}: its best accuracy, mean over shares of rows, is above by 1 point or more."
            claims.append(Claim(about(text, cell), lambda rows, first=first, second=second: pair(first, second, rows), (0.01, 1.0)))
    if "div_odd" in operations:
        text = f"{OPERATIONS['div_odd']}: from {percent(middle)} of the rows the best accuracy on the others is above 95 %, in the mean."
        claims.append(Claim(about(text, cell), lambda rows: Sample(best(rows.where({FRACTION: middle}), ["div_odd"], cell)[0], bounds=(0, 1)), (0.95, 1.0)))
    return claims


def study(config: StudyConfig) -> Study:
    own = (OPERATION, FRACTION)
    others = cells(replace(config, grid={path: values for path, values in config.grid.items() if path not in own}))
    by = list(others[0])
    operations, fractions = (config.grid.get(path, [flatten(config.run)[path]]) for path in own)
    return Study(
        name="grokking-operations",
        question=__doc__ or "",
        main_metric="best.val/accuracy",
        config=config,
        wanted=lambda rows: config.runs(),
        figures=[
            heatmap(FRACTION, OPERATION, mean_of("val/accuracy", "best"), by=by),
            heatmap(FRACTION, OPERATION, median_steps("val/accuracy", GROKKED), by=by),
        ],
        tables=[data_needed(fractions, others, operations), reached_table([*by, OPERATION, FRACTION])],
        claims=[claim for cell in others for claim in _claims(cell, operations, fractions)],
    )
