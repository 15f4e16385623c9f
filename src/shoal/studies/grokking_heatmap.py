"""At which learning rates and weight decays does a small transformer come to know the unseen rows, after how many steps, and does it keep them?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from math import inf, nan
from typing import Any

import numpy as np
from matplotlib.figure import Figure as Drawing

from shoal.config import DecoderConfig, StudyConfig
from shoal.results import statistics
from shoal.results.claims import Claim, Sample
from shoal.results.comparisons import Shade, heatmap, mean_of, median_steps, share_reached
from shoal.results.figures import MUTED, Figure, canvas, colours, legend, nothing, scales
from shoal.results.rows import Rows
from shoal.results.tables import Table
from shoal.results.wording import number
from shoal.studies.shared import GROKKED, Published, delay, matching, paper_run, percent, published_table, reached_table, small_run, sooner
from shoal.studies.study import Study, about, cells

LR, WD = "optimizer.lr", "optimizer.wd"
LOST = 0.9  # collapsed: below this at the end, after five evaluations in a row at 99 %
COLLAPSE = "Of the runs that came to 99 % for five evaluations in a row, the share that ends below 90 %; empty where none came."


def full() -> StudyConfig:
    """8 weight decays, 8 learning rates, 16 seeds: 1,024 runs of 5,000 steps in one fleet. No stop rule, since what is known may be lost again; bfloat16."""
    run = paper_run(5_000, precision="bfloat16", stop_metric=None, evaluate_every=100, log_every=100)
    run = replace(run, model=DecoderConfig())  # norms before each part and small initial values: known after some 700 steps at weight decay 1
    grid = {WD: [0.0, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0], LR: [1e-4, 3e-4, 5e-4, 1e-3, 2e-3, 3e-3, 1e-2, 3e-2]}
    return StudyConfig(run=run, grid=grid, seeds=16)


def quick() -> StudyConfig:
    """Minutes on two cores: 3 weight decays, 3 learning rates, 3 seeds, a small model on a small table."""
    return StudyConfig(run=small_run(stop_metric=None), grid={WD: [0.0, 1.0, 3.0], LR: [1e-3, 2e-3, 8e-3]}, seeds=3)


PRESETS = {"quick": quick, "full": full}
DEFAULT = ("quick", "full")

ELSEWHERE = "Theirs: + mod 113, 30 % of the rows, 1 layer without norms. Ours: / mod 97, 50 %, 2 layers."
PUBLISHED = [
    Published(
        setting=f"AdamW lr {number(lr)} wd {number(wd)}", source="Na00s/muon-grokking, adamw_sweep_summary.csv", steps=f"{steps} (95 %, sustained)", seeds="1",
        conditions={LR: lr, WD: wd}, differs=ELSEWHERE, threshold=0.95,
    )
    for lr, wd, steps in (
        (1e-3, 0.1, "none in 100,000"), (1e-3, 1.0, "52,500"), (1e-3, 3.0, "8,200"), (3e-3, 1.0, "8,500"), (1e-2, 1.0, "6,300; lost again later"),
    )
]  # fmt: skip


def lost(rows: Rows) -> np.ndarray:
    """bool [runs that came to 99 %]: below 90 % at the end."""
    known = rows.reached("val/accuracy", GROKKED)[1]
    return np.array([row["final.val/accuracy"] < LOST for row, there in zip(rows, known, strict=True) if there], dtype=bool)


def share_lost(rows: Rows) -> float:
    found = lost(rows)
    return float(found.mean()) if found.size else nan


def points(rows: Rows) -> list[dict[str, Any]]:
    """What the law is judged on: a point for each run that came to 99 % after its training rows, in cells with decay where most of the runs did.

    The law (arXiv 2603.13331, 2605.18845): the delay is proportional to 1 / (lr wd). A run whose delay is less than one evaluation is left out: it has none.
    """
    found = []
    for values, part in rows.groups([LR, WD]):
        waited = delay(part)
        if values[WD] > 0 and np.mean(np.asarray(waited.observed)) > 0.5:
            columns = zip(part.column("seeds.split"), np.asarray(waited.values), np.asarray(waited.observed), strict=True)
            found += [values | {"seed": seed, "delay": steps} for seed, steps, observed in columns if observed and steps > 0]
    return found


def slopes(rows: Rows, apart: bool = False) -> np.ndarray:
    """float [seeds, 1 or 2]: least squares of the log of the delay on log(lr wd), or on log lr and log wd; seeds with too few different points are left out."""
    found, every = [], points(rows)
    for seed in sorted({point["seed"] for point in every}):
        mine = [point for point in every if point["seed"] == seed]
        lr, wd, waited = (np.log([point[key] for point in mine]) for key in (LR, WD, "delay"))
        x = np.stack([lr, wd] if apart else [lr + wd])
        x = x - x.mean(axis=1, keepdims=True)
        if np.linalg.matrix_rank(x) == len(x) < len(mine):
            found.append(np.linalg.lstsq(x.T, waited - waited.mean(), rcond=None)[0])
    return np.array(found).reshape(len(found), 2 if apart else 1)


def law(others: Sequence[dict[str, Any]]) -> Table:
    def make(rows: Rows) -> list[dict[str, Any]]:
        lines = []
        for cell in others:
            part = rows.where(cell)
            together, apart = slopes(part)[:, 0], slopes(part, apart=True)
            named = {"lr wd": together, "lr, wd held": apart[:, 0], "wd, lr held": apart[:, 1]}
            lines += [
                {"delay against": about(name, cell), "slope": statistics.mean(x), "the law": -1, "seeds": x.size, "points": len(points(part))}
                for name, x in named.items()
            ]
        return lines

    text = (
        "Slopes of the log of the delay (from 99 % of the training rows to 99 % of the others) by least squares, one for each seed: mean and 95 % interval. "
        "Points: runs with a delay, in cells with decay where most runs came to 99 %."
    )
    return Table("law", make, text)


def delays(others: Sequence[dict[str, Any]]) -> Figure:
    """Median delay of every cell against lr wd, and the law's slope."""

    def draw(rows: Rows) -> Drawing:
        rows = matching(rows, others[0])
        groups = [(values, part) for values, part in rows.groups([LR, WD]) if values[WD] > 0] if rows and "val/accuracy" in rows.metrics else []
        medians = [(values, delay(part).estimate()) for values, part in groups]
        shown = [(values[LR], values[LR] * values[WD], m) for values, m in medians if 0 < m.value < inf]
        if not shown:
            return nothing("no delays yet")
        drawing, (axis,) = canvas(3.8)
        rates = sorted({lr for lr, _, _ in shown})
        for rate, colour in zip(rates, colours(len(rates)), strict=True):
            mine = [(x, m) for lr, x, m in shown if lr == rate]
            axis.plot([x for x, _ in mine], [m.value for _, m in mine], "o", markersize=5, color=colour, label=f"lr = {number(rate)}")
            for x, m in mine:
                axis.plot([x, x], [max(m.low, m.value / 10), min(m.high, m.value * 10)], linewidth=1, color=colour)
        x, y = np.array([(x, m.value) for _, x, m in shown]).T
        line = np.array([x.min(), x.max()])
        through = np.exp(np.mean(np.log(y) + np.log(x)))
        axis.plot(line, through / line, color=MUTED, linewidth=1, dashes=(4, 3), label="delay = constant / (lr wd)")
        scales(axis, True, True, ["delay"])
        axis.set_xlabel("lr wd")
        axis.set_ylabel("delay, steps")
        legend(drawing, axis)
        return drawing

    caption = "A cell's median delay from 99 % of training to 99 % of validation (Kaplan-Meier), 95 % interval. None without decay, delay or median."
    return Figure("delay-lr-wd", draw, caption if len(others) == 1 else f"{caption} The first of {len(others)} settings.")


def _claims(cell: dict[str, Any], lr: float, decays: Sequence[float]) -> list[Claim]:
    """``lr``: the learning rate that is taken for granted, of the run the grid varies."""

    def at(wd: float) -> dict[str, Any]:
        return {**cell, LR: lr, WD: wd}

    def reached(wd: float, rows: Rows) -> Sample:
        return Sample(rows.where(at(wd)).reached("val/accuracy", GROKKED)[1], kind="proportion")

    def seeds_that_lose(rows: Rows, gentle: bool) -> Sample:
        chosen = [row for row in rows.where(cell) if (row[LR] <= lr and row[WD] <= 1 if gentle else row[LR] >= 3 * lr)]
        return Sample([bool(lost(part).any()) for _, part in Rows(chosen).groups(["seeds.split"])], kind="proportion")

    where = f"at learning rate {number(lr)}"
    claims = [
        Claim(
            about("The law: the delay goes as 1 / (lr wd). The slope of its log on log(lr wd) is within a quarter of -1, in the mean over seeds.", cell),
            lambda rows: Sample(slopes(rows.where(cell))[:, 0]),
            (-1.25, -0.75),
        ),
        Claim(
            about(f"Gently trained (lr at most {number(lr)}, wd at most 1) nothing is lost: fewer than half of the seeds have a run that "
            f"came to 99 % and ends below 90 %.", cell),
            lambda rows: seeds_that_lose(rows, gentle=True),
            (0.0, 0.5),
        ),
        Claim(
            about(f"At learning rates of {number(3 * lr)} and more it is: more than half of the seeds have such a run.", cell),
            lambda rows: seeds_that_lose(rows, gentle=False),
            (0.5, 1.0),
        ),
    ]  # fmt: skip
    if 0 in decays:
        text = f"No decay is needed: {where} more than half of the seeds come to 99 % without it, within these steps."
        claims.append(Claim(about(text, cell), lambda rows: reached(0.0, rows), (0.5, 1.0)))
        if 1.0 in decays:
            text = f"But it helps: {where} decay 1 is sooner than none in more than half of the seeds."
            claims.append(Claim(about(text, cell), lambda rows: sooner(rows.where(at(1.0)), rows.where(at(0.0))), (0.5, 1.0)))
    if (most := max(decays)) >= 10:
        text = f"Too much prevents it: {where} fewer than half of the seeds come to 99 % with decay {number(most)}."
        claims.append(Claim(about(text, cell), lambda rows: reached(most, rows), (0.0, 0.5)))
    return claims


def study(config: StudyConfig) -> Study:
    others = cells(replace(config, grid={path: values for path, values in config.grid.items() if path not in (LR, WD)}))
    by, decays = list(others[0]), config.grid.get(WD, [getattr(config.run.optimizer, "wd", 0.0)])
    collapse = Shade(f"share lost: below {percent(LOST)} at the end", share_lost, "lost", limits=(0.0, 1.0), low_is_good=True)
    return Study(
        name="grokking-heatmap",
        question=__doc__ or "",
        main_metric="val/accuracy",
        config=config,
        wanted=lambda rows: config.runs(),
        figures=[
            heatmap(LR, WD, share_reached("val/accuracy", GROKKED), by=by),
            heatmap(LR, WD, median_steps("val/accuracy", GROKKED), by=by),
            heatmap(LR, WD, collapse, by=by, caption=COLLAPSE),
            heatmap(LR, WD, mean_of("val/accuracy"), by=by),
            delays(others),
        ],
        tables=[law(others), reached_table([*by, WD, LR]), published_table(PUBLISHED)],
        claims=[claim for cell in others for claim in _claims(cell, config.run.optimizer.lr, decays)],
    )
