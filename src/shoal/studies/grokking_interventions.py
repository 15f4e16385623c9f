"""Which interventions let a network that has learned fewer rows of a table by heart know the others, too?"""

from __future__ import annotations

from dataclasses import replace
from math import inf
from typing import Any

import numpy as np

from shoal.config import Adam, RunConfig, StudyConfig, flatten
from shoal.results import statistics
from shoal.results.claims import Claim, Sample
from shoal.results.comparisons import heatmap, mean_of, values_against
from shoal.results.rows import Rows
from shoal.results.tables import Table
from shoal.results.wording import plural, setting
from shoal.studies.shared import GROKKED, matching, paper_run, percent, small_run
from shoal.studies.study import Study, about, cells

FRACTION, BEST = "task.train_fraction", "best.val/accuracy"
BASELINE, TO_ZERO, TO_START = "Adam", "decay to zero", "decay to start"


def variants(run: RunConfig) -> dict[str, dict[str, Any]]:
    """Name -> what is changed of ``run``, plain Adam; those of Power et al. 2022 (arXiv 2201.02177), figure 2, left, in their words or nearly."""
    lr = flatten(run)["optimizer.lr"]
    decay = {"optimizer.type": "adamw", "optimizer.wd": 1.0}
    return {
        BASELINE: {},
        "lr x 0.3": {"optimizer.lr": 0.3 * lr},
        "lr x 3": {"optimizer.lr": 3 * lr},
        TO_ZERO: decay,
        TO_START: decay | {"optimizer.decay_to": "start"},
        "dropout 0.1": {"model.dropout": 0.1},
        "gradient noise": {"gradient.noise": 5e-4},
        "weight noise": {"weights.noise": 0.01},
        "full batch": {"batch_size": 0},
    }


def full() -> StudyConfig:
    """Composition in S5, five shares of its rows, 3 seeds, 20,000 steps (theirs: 100,000); products in bfloat16."""
    run = paper_run(20_000, precision="bfloat16", optimizer=Adam(lr=1e-3, beta2=0.98), evaluate_every=100, log_every=100)
    run = replace(run, task=replace(run.task, operation="s5", val_fraction=0.2))
    return StudyConfig(run=run, variants=variants(run), grid={FRACTION: [0.3, 0.4, 0.5, 0.6, 0.7]}, seeds=3)


def quick() -> StudyConfig:
    """Minutes on two cores: division on a small table instead of S5, two shares of its rows, a small model, 3 seeds, 1,000 steps."""
    run = small_run(1_000, optimizer=Adam(lr=2e-3, beta2=0.98))
    run = replace(run, task=replace(run.task, p=59), model=replace(run.model, width=64, feed_forward=256))  # comes by step 700 with decay 1
    return StudyConfig(run=run, variants=variants(run), grid={FRACTION: [0.4, 0.6]}, seeds=3)


PRESETS = {"quick": quick, "full": full}
DEFAULT = ("quick", "full")

HELP = (TO_ZERO, TO_START, "dropout 0.1", "gradient noise", "weight noise")  # by their figure
PUBLISHED = {  # variant -> what they found with 100,000 steps and 3 seeds, in words: the figure prints no numbers; and what ours does otherwise
    BASELINE: ("the reference", ""),
    "lr x 0.3": ("generalises only within about one order of magnitude of the learning rate", ""),
    "lr x 3": ("the same", ""),
    TO_ZERO: ("by far the strongest: less than half of the rows needed", ""),
    TO_START: ("helps, less", ""),
    "dropout 0.1": ("helps", "Theirs drops after the feed-forward only, ours after embedding and attention, too."),
    "gradient noise": ("helps", "Theirs, of std 1, joins Adam's update; ours joins the gradient, before Adam scales it."),
    "weight noise": ("helps", ""),
    "full batch": ("among the worst", ""),
}


def averages(rows: Rows, variant: str) -> list[float]:
    """Per seed, in order: the best validation accuracy within the budget, averaged over the shares of rows."""
    return [float(np.mean(part.column(BEST))) for _, part in rows.where({"variant": variant}).groups(["seeds.split"])]


def needed(rows: Rows, variant: str) -> list[float]:
    """Per seed, in order: the smallest share of the rows from which 99 % of the others were known at some time; infinite = none of those tried."""
    parts = [part for _, part in rows.where({"variant": variant}).groups(["seeds.split"])]
    return [min((row[FRACTION] for row in part if row[BEST] >= np.float32(GROKKED)), default=inf) for part in parts]


def more(rows: Rows, first: str, *others: str) -> Sample:
    """By how much the average of ``first`` is above the highest of the others', seed by seed."""
    return Sample(averages(rows, first), pair=np.max([averages(rows, other) for other in others], axis=0))


def _claims(config: StudyConfig, cell: dict[str, Any]) -> list[Claim]:
    there = [name for name in config.variants if name != BASELINE]

    def differs(name: str, word: str, holds: tuple[float, float]) -> Claim:
        text = f"“{name}” {word} the best accuracy on unseen rows that plain Adam reaches, averaged over the shares of rows."
        return Claim(about(text, cell), lambda rows: more(rows.where(cell), name, BASELINE), holds)

    claims = [differs(name, "raises", (0.0, 1.0)) for name in HELP if name in there]
    if "full batch" in there:
        claims.append(differs("full batch", "lowers", (-1.0, 0.0)))
    if TO_ZERO in there and len(there) > 1:
        others = [name for name in there if name != TO_ZERO]
        text = f"“{TO_ZERO}” raises it more than every other intervention."
        claims.append(Claim(about(text, cell), lambda rows: more(rows.where(cell), TO_ZERO, *others), (0.0, 1.0)))
    shares = sorted(config.grid.get(FRACTION, []))
    halves = [(half, share) for half in shares for share in shares if abs(share - 2 * half) < 1e-9]
    if TO_ZERO in there and halves:
        half, share = halves[0]
        text = f"It more than halves the rows needed: from {percent(half)} of them “{TO_ZERO}” reaches more than plain Adam from {percent(share)}."
        a, b = ({**cell, "variant": name, FRACTION: at} for name, at in ((TO_ZERO, half), (BASELINE, share)))
        claims.append(Claim(about(text, cell), lambda rows: Sample(rows.where(a).column(BEST), pair=rows.where(b).column(BEST)), (0.0, 1.0)))
    return claims if BASELINE in config.variants else []


def beside_theirs(config: StudyConfig, others: list[dict[str, Any]]) -> Table:
    """A line per variant: the mean best accuracy at every share of rows, and what Power et al. found."""
    values = flatten(config.run)
    data = "S5" if values["task.operation"] == "s5" else f"{values['task.operation']} modulo {values['task.p']}, {plural(values['model.num_layers'], 'layer')}"
    here = f"Ours: {data}, {values['steps']:,} steps, {values['precision']}."
    fractions = config.grid.get(FRACTION, [values[FRACTION]])

    def line(rows: Rows, name: str, cell: dict[str, Any]) -> dict[str, Any]:
        mine = rows.where({"variant": name})
        parts = {percent(share): matching(mine, {FRACTION: share}) for share in fractions}
        theirs, differs = PUBLISHED.get(name, ("", ""))
        return {
            "intervention": name,
            **({"setting": setting(cell)} if cell else {}),
            "n": len(mine) // len(fractions),
            **{share: statistics.mean(part.column(BEST)).within(0, 1) for share, part in parts.items() if part},
            "rows needed": ", ".join(percent(share) if share < inf else "more" for share in needed(rows, name)),
            "Power et al.": theirs,
            "what differs": f"{here} {differs}".strip(),
        }

    def make(rows: Rows) -> list[dict[str, Any]]:
        return [line(part, name, cell) for cell in others for name in config.variants if (part := matching(rows, cell)) and matching(part, {"variant": name})]

    caption = (
        f"Best accuracy on unseen rows within the budget: mean over seeds, 95 % interval, for every share of rows trained on. Rows needed: per seed, the "
        f"smallest share tried from which {percent(GROKKED)} of the others were known. Power et al. (arXiv 2201.02177), figure 2, left, in words."
    )
    return Table("interventions", make, caption)


def study(config: StudyConfig) -> Study:
    others = cells(replace(config, variants={}, grid={path: values for path, values in config.grid.items() if path != FRACTION}))
    by = ["variant", *others[0]]
    return Study(
        name="grokking-interventions",
        question=__doc__ or "",
        main_metric=BEST,
        config=config,
        wanted=lambda rows: config.runs(),
        figures=[
            heatmap(FRACTION, "variant", mean_of("val/accuracy", "best"), by=list(others[0])),
            values_against(FRACTION, "val/accuracy", by=by),
        ],
        tables=[beside_theirs(config, others)],
        claims=[claim for cell in others for claim in _claims(config, cell)],
    )
