"""How many more steps does it take to know the unseen rows when fewer rows are seen?"""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from math import inf
from typing import Any

import numpy as np

from shoal.config import StudyConfig, flatten
from shoal.results.claims import Claim, Sample
from shoal.results.comparisons import times_against, values_against
from shoal.results.rows import Rows
from shoal.results.tables import Table
from shoal.results.wording import number
from shoal.studies.shared import GROKKED, Published, paper_run, percent, published_table, ratio, reached_table, small_run
from shoal.studies.study import Study, about, cells

FRACTION, OPERATION = "task.train_fraction", "task.operation"
NAMES = {"div": "division", "s5": "composition in S5"}
NEAR = {"s5": (1.4, 1.5)}  # Power et al. 2022, figure 1, centre: between 25 and 30 % of S5 each percent less costs 40 to 50 % more steps
FAR = 1.05


def full() -> StudyConfig:
    """Power et al. 2022, figure 1, centre: composition in S5, and division beside it, 25 to 80 % of the rows, another 20 % for validation; bfloat16."""
    run = paper_run(30_000, precision="bfloat16", evaluate_every=100, log_every=100)
    run = replace(run, task=replace(run.task, val_fraction=0.2))
    return StudyConfig(run=run, grid={OPERATION: ["div", "s5"], FRACTION: [0.25, 0.3, 0.35, 0.4, 0.5, 0.6, 0.7, 0.8]}, seeds=6)


def quick() -> StudyConfig:
    """Minutes on two cores: a small division table, 55 to 80 % of it, and a small model; nothing of S5."""
    run = small_run()
    run = replace(run, task=replace(run.task, val_fraction=0.2))
    return StudyConfig(run=run, grid={OPERATION: ["div"], FRACTION: [0.55, 0.6, 0.7, 0.8]}, seeds=6)


PRESETS = {"quick": quick, "full": full}
DEFAULT = ("quick", "full")

PUBLISHED = [
    Published(
        setting="/ mod 97, 50 %, AdamW wd 0.5, batch 512",
        source="AI-Scientist, templates/grokking",
        steps="4,200 ± 76 (99 %)",
        seeds="3",
        conditions={OPERATION: "div", FRACTION: 0.5, "task.p": 97},
        differs="Ours: wd 1, ReLU, sinusoidal positions, bfloat16; validated on 20 % of the rows. Theirs does not seed the split.",
    ),
    Published(
        setting="/ mod 97, 50 %, AdamW wd 1, batch 512",
        source="stockeh/mlx-grokking",
        steps="about 1,230 (99 %, read off a plot)",
        seeds="1",
        conditions={OPERATION: "div", FRACTION: 0.5, "task.p": 97},
        differs="Theirs: rotary positions, RMSNorm before each part, SwiGLU, one head, dropout 0.2.",
    ),
]


def per_percent(rows: Rows, low: float, high: float) -> Sample:
    """By how much a seed's steps to 99 % are multiplied for each percent of the rows less, from ``high`` down to ``low``."""
    times = ratio(rows.where({FRACTION: high}), rows.where({FRACTION: low}))
    return Sample(np.asarray(times.values) ** (1 / (100 * (high - low))), observed=times.observed, kind="survival")


def steps_between(fractions: list[float], others: list[dict[str, Any]]) -> Table:
    """A line per setting and neighbouring pair of fractions."""

    def make(rows: Rows) -> list[dict[str, Any]]:
        return [
            {
                "operation": NAMES.get(name := cell.get(OPERATION, ""), name),
                "rows": f"{percent(high)} to {percent(low)}",
                "steps times, per percent less": per_percent(rows.where(cell), low, high).estimate(),
                "published": " to ".join(map(number, NEAR[name])) if name in NEAR and (low, high) == (0.25, 0.3) else None,
            }
            for cell in others
            for low, high in pairwise(fractions)
        ]

    return Table(
        "per-percent",
        make,
        "By how much the steps to 99 % are multiplied for each percent of the rows less: Kaplan-Meier median over the seeds, 95 % interval. Where a seed "
        "needed more steps than there were for the smaller share, its value is a lower bound; where for both, it says nothing.",
    )


def _claims(cell: dict[str, Any], fractions: list[float], operation: str) -> list[Claim]:
    name, near, claims = NAMES.get(operation, operation), NEAR.get(operation, (1.1, inf)), []

    def between(low: float, high: float, times: tuple[float, float], what: str) -> Claim:
        text = f"Of {name}, from {percent(high)} of the rows to {percent(low)}, each percent less takes {what} the steps, in the median."
        return Claim(about(text, cell, [OPERATION]), lambda rows: per_percent(rows.where(cell), low, high), times)

    if len(fractions) > 1:
        words = f"{number(near[0])} to {number(near[1])} times" if near[1] < inf else f"at least {number(near[0])} times"
        claims.append(between(fractions[0], fractions[1], near, words))
    if len(fractions) > 2:
        claims.append(between(fractions[-2], fractions[-1], (0.0, FAR), f"at most {number(FAR)} times"))
    return claims


def study(config: StudyConfig) -> Study:
    fractions = sorted(config.grid.get(FRACTION, []))
    others = cells(replace(config, grid={path: values for path, values in config.grid.items() if path != FRACTION}))
    by = list(others[0])
    return Study(
        name="grokking-fractions",
        question=__doc__ or "",
        main_metric="val/accuracy",
        config=config,
        wanted=lambda rows: config.runs(),
        figures=[
            times_against(FRACTION, "val/accuracy", GROKKED, by=by),
            values_against(FRACTION, "val/accuracy", which="best", by=by),
        ],
        tables=[steps_between(fractions, others), reached_table([*by, FRACTION]), published_table(PUBLISHED)],
        claims=[claim for cell in others for claim in _claims(cell, fractions, {**flatten(config.run), **cell}[OPERATION])],
    )
