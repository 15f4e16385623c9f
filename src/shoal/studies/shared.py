"""What the grokking studies share, and nothing else: thresholds, their tables, what a claim compares, the paper's run and a small one.

Times are steps, read at the evaluations. First hit: the first evaluation at the threshold. Sustained: the first of five at it in a row (``Rows.reached``),
which is what "grokked" means here. Runs that never get there are censored, dead ones at the budget they would have had.

    Study(..., tables=[reached_table(["variant"]), published_table(PUBLISHED)])
    Claim("Muon is sooner in most seeds.", lambda rows: sooner(rows.where({"variant": "muon"}), rows.where({"variant": "baseline"})), (0.5, 1))
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from shoal.config import AdamW, DecoderConfig, ModularConfig, RunConfig, Schedule, StudyConfig
from shoal.results import statistics
from shoal.results.claims import Claim, Sample
from shoal.results.rows import Rows
from shoal.results.tables import Table
from shoal.results.wording import number, setting
from shoal.studies.study import about, cells

THRESHOLDS = (0.5, 0.95, 0.99, 0.999)
GROKKED = 0.99
RECORDED = {"weights/norm": "weight norm at the end", "train/zero_loss": "zero losses at the end", "train/collapse": "softmax collapse at the end"}


def paper_run(steps: int = 100_000, **changes: Any) -> RunConfig:
    """Power et al. 2022 (arXiv 2201.02177), sections 3.2 and 3.3: AdamW with weight decay 1, their architecture and initialisation (openai/grok)."""
    run = RunConfig(
        task=ModularConfig(p=97, operation="div", train_fraction=0.5, val_fraction=0.5, test_fraction=0.0),
        model=DecoderConfig(
            width=128, num_layers=2, num_heads=4, feed_forward=512, activation="relu", norm="layer", norm_place="post",
            positions="sinusoidal", bias=False, embedding_std=1.0, linear_init="uniform",
        ),
        optimizer=AdamW(lr=1e-3, wd=1.0, beta2=0.98),
        schedule=Schedule(warmup=10 / steps),
        steps=steps,
        batch_size=512,
        stop_metric="val/accuracy",
        stop_at=GROKKED,
    )  # fmt: skip
    return replace(run, **changes)


def small_run(steps: int = 1_500, **changes: Any) -> RunConfig:
    """A small version of it, which keeps a delay: one layer, norms before each part, small initial values, division modulo 47 from 60 % of the rows.

    Of 12 seeds it was not chosen on, 11 knew 99 % by step 1,200, the median at 700, 410 after the training rows; a run takes some 5 seconds of a core.
    What it needs: batches of 512 and an evaluation every 10 steps, as spikes come between the five in a row (with 256, or every 25: 1 seed of 3, modulo
    41), and as many rows (modulo 31: none of 3). Norms after each part learn nothing in 1,000 steps with such values.
    """
    paper = paper_run(steps)
    run = replace(
        paper,
        task=replace(paper.task, p=47, operator_token=False, train_fraction=0.6, val_fraction=0.4),
        model=DecoderConfig(width=48, num_layers=1, feed_forward=192),
        optimizer=AdamW(lr=2e-3, wd=2.0, beta2=0.98),
        evaluate_every=10,
        log_every=50,
    )
    return replace(run, **changes)


def delay(rows: Rows, metric: str = "val/accuracy", threshold: float = GROKKED) -> Sample:
    """Steps from the threshold on the training rows (first hit) to the same on the others (sustained); 0 where the others came first.

    Censored where the second never came: survival, one value per run. A run that never learned its training rows is censored at 0: it counts in n and says
    nothing more, so a median is of those that learned them.
    """
    learned, _ = rows.reached(training(metric), threshold, sustained=1)
    known, observed = rows.reached(metric, threshold)
    return Sample(np.maximum(known - learned, 0.0), observed=observed, kind="survival")


def sooner(rows_a: Rows, rows_b: Rows, metric: str = "val/accuracy", threshold: float = GROKKED, sustained: int = 5) -> Sample:
    """Over the seeds both settings have: the share in which a reaches the threshold strictly before b. A tie is not sooner.

    A run that never gets there is later than one that does. A seed is left out, and n is smaller by one, where it cannot be said: neither got there,
    or the one that did needed more steps than the other was watched for. ValueError where a setting has a seed twice: then it is not one setting.
    """
    a, b = _by_seed(rows_a), _by_seed(rows_b)
    both = [seed for seed in a if seed in b]
    (time_a, reached_a), (time_b, reached_b) = (Rows([rows[seed] for seed in both]).reached(metric, threshold, sustained) for rows in (a, b))
    first = reached_a & (time_a <= time_b) & ((time_a < time_b) | ~reached_b)
    told = first | (reached_b & (time_b <= time_a))
    return Sample(first[told], kind="proportion")


def order_claims(config: StudyConfig, order: Sequence[tuple[str, str, str]], metric: str = "val/accuracy") -> list[Claim]:
    """A claim for each (sooner, later, because) of variants that are both there, and for every combination of the grid."""

    def claim(first: str, second: str, because: str, cell: Mapping[str, Any]) -> Claim:
        text = f"“{first}” is at {percent(GROKKED)} of the unseen rows sooner than “{second}” in more than half of the seeds: {because}."
        a, b = ({**cell, "variant": name} for name in (first, second))
        return Claim(about(text, cell), lambda rows: sooner(rows.where(a), rows.where(b), metric), (0.5, 1.0))

    here = [names for names in order if {*names[:2]} <= config.variants.keys()]
    return [claim(*names, cell) for cell in cells(replace(config, variants={})) for names in here]


def ratio(rows_a: Rows, rows_b: Rows, metric: str = "val/accuracy", threshold: float = GROKKED, sustained: int = 5) -> Sample:
    """How many times the steps of a that b takes to the threshold, one value for each seed both settings have: survival.

    Where b never got there it is at least that (censored); where a did not, at most, and is taken as that; where neither did, nothing is known.
    """
    a, b = _by_seed(rows_a), _by_seed(rows_b)
    both = [seed for seed in a if seed in b]
    (time_a, reached_a), (time_b, reached_b) = (Rows([rows[seed] for seed in both]).reached(metric, threshold, sustained) for rows in (a, b))
    return Sample(np.where(reached_a | reached_b, time_b / np.maximum(time_a, 1), 0.0), observed=reached_b, kind="survival")


def _by_seed(rows: Rows) -> dict[tuple[Any, ...], Any]:
    found = {tuple(row[f"seeds.{name}"] for name in ("split", "init", "order")): row for row in rows}
    if len(found) < len(rows):
        raise ValueError(f"{len(rows)} runs have only {len(found)} different seeds; compare rows of one setting each")
    return found


def training(metric: str) -> str:
    """The same metric on the training rows."""
    return f"train/{metric.rsplit('/', 1)[-1]}"


def reached_table(by: Sequence[str], metric: str = "val/accuracy", name: str = "reached") -> Table:
    """A line per setting: the share that grokked, steps to every threshold, to the sustained one and to that of the training rows, the delay; and RECORDED."""

    def make(rows: Rows) -> list[dict[str, Any]]:
        if metric not in rows.metrics:
            return []
        trained = training(metric) in rows.metrics
        return [_line(values, part, metric, trained, [m for m in RECORDED if m in rows.metrics]) for values, part in rows.groups(by)]

    return Table(
        name,
        make,
        f"Steps to shares of {metric}: Kaplan-Meier medians with 95 % intervals. First: at the first evaluation there. Grokked: {percent(GROKKED)} at five "
        f"evaluations in a row. Delay: from the first {percent(GROKKED)} of the training rows to that; 0 if the others came first. A dash: fewer than half of "
        "the runs got there. What is recorded at the end is its median.",
    )


def _line(values: Mapping[str, Any], part: Rows, metric: str, trained: bool, recorded: Sequence[str]) -> dict[str, Any]:
    times, observed = part.reached(metric, GROKKED)
    line: dict[str, Any] = {"setting": setting(values) or "all runs", "n": len(part), "grokked": statistics.proportion(int(observed.sum()), len(part))}
    for threshold in THRESHOLDS:
        line[f"first {percent(threshold)}"] = _steps(statistics.survival_median(*part.reached(metric, threshold, sustained=1)))
    line["grokked at"] = statistics.survival_median(times, observed)
    if trained:
        line[f"training {percent(GROKKED)}"] = _steps(statistics.survival_median(*part.reached(training(metric), GROKKED, sustained=1)))
        line["delay"] = delay(part, metric).estimate()
    for found in recorded:
        values_at_end = np.array([row.get(f"final.{found}", np.nan) for row in part], dtype=np.float64)
        line[RECORDED[found]] = float(np.median(values_at_end[np.isfinite(values_at_end)])) if np.isfinite(values_at_end).any() else None
    return line


def _steps(median: statistics.Estimate) -> float | None:
    return median.value if np.isfinite(median.value) else None


def percent(share: float) -> str:
    """0.999 -> "99.9 %"."""
    return f"{number(100 * share)} %"


@dataclass(frozen=True, kw_only=True)
class Published:
    """A result of somebody else's, and which of our rows repeat it."""

    setting: str  # operation, modulus, fraction, batch, optimizer
    source: str
    steps: str  # as they state it, with the criterion: "4,200 ± 76 (99 %)"
    seeds: str  # "3", "1", "not stated"
    conditions: Mapping[str, Any] | None = None  # path of a row -> value; None = we have not run it
    differs: str = ""  # what ours does otherwise
    metric: str = "val/accuracy"
    threshold: float = GROKKED  # theirs, as a first hit


def published_table(published: Sequence[Published], name: str = "published") -> Table:
    """Their results beside ours: the same criterion on the matching rows."""

    def make(rows: Rows) -> list[dict[str, Any]]:
        return [
            {
                "setting": one.setting,
                "source": one.source,
                "their steps": one.steps,
                "their seeds": one.seeds,
                **_ours(one, rows),
                "what differs": one.differs,
            }
            for one in published
        ]

    return Table(name, make, "Published results and ours: Kaplan-Meier median of the steps to the first evaluation at their threshold, 95 % interval.")


def _ours(one: Published, rows: Rows) -> dict[str, Any]:
    part = Rows() if one.conditions is None else matching(rows, one.conditions)
    return {"ours": statistics.survival_median(*part.reached(one.metric, one.threshold, sustained=1)) if part else "not run", "our seeds": len(part)}


def matching(rows: Rows, conditions: Mapping[str, Any]) -> Rows:
    """``rows.where``, and no rows where none has such a path: another preset varies other things."""
    try:
        return rows.where(conditions)
    except KeyError:
        return Rows()
