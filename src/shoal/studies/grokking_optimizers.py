"""Does a small transformer come to know the unseen rows in fewer steps with Muon than with AdamW, both tuned, whatever the batch and the width?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from shoal.config import DecoderConfig, StudyConfig
from shoal.config.fields import check
from shoal.results import statistics
from shoal.results.claims import Claim, Sample
from shoal.results.comparisons import times, times_against
from shoal.results.figures import Figure
from shoal.results.rows import Rows
from shoal.results.tables import Table
from shoal.results.wording import number, setting
from shoal.studies.shared import GROKKED, Published, paper_run, published_table, ratio, reached_table, small_run, sooner
from shoal.studies.study import Study, about, cells
from shoal.studies.tuning import Tuning, edges

BATCH, WIDTH = "batch_size", "model.width"
TUNING_SEEDS = (1000, 1001, 1002)  # never those that are reported
FIRST, SECOND = "Muon", "AdamW"


def _adamw(lr: float, wd: float) -> dict[str, Any]:
    return {"optimizer.type": "adamw", "optimizer.lr": lr, "optimizer.wd": wd}


def _muon(lr: float, wd: float, adam_wd: float) -> dict[str, Any]:
    return {"optimizer.type": "muon", "optimizer.lr": lr, "optimizer.wd": wd, "optimizer.adam_lr": 1e-3, "optimizer.adam_wd": adam_wd}


def _settings(adamw: Sequence[tuple[float, float]], muon: Sequence[tuple[float, float, float]]) -> dict[str, dict[str, Any]]:
    """Name -> changes; a name begins with its optimizer's. Muon's third number is the decay of what AdamW trains there, at lr 0.001."""
    named = {f"{SECOND} {number(lr)} {number(wd)}": _adamw(lr, wd) for lr, wd in adamw}
    return named | {f"{FIRST} {number(lr)} {number(wd)} {number(rest)}": _muon(lr, wd, rest) for lr, wd, rest in muon}


def full() -> StudyConfig:
    """9 settings of each optimizer on 3 seeds in each of 9 cells, the best of each on 12 fresh seeds: one layer, at most 2,000 steps, bfloat16."""
    run = paper_run(2_000, precision="bfloat16", evaluate_every=20, log_every=100)
    run = replace(run, task=replace(run.task, operator_token=False), model=DecoderConfig(num_layers=1))
    adamw = [(lr, wd) for lr, decays in ((3e-4, (1.0, 3.0, 10.0)), (1e-3, (0.3, 1.0, 3.0, 10.0)), (2e-3, (1.0, 3.0))) for wd in decays]
    muon = [(lr, wd, 1.0) for lr, decays in ((0.01, (0.1, 0.3, 1.0)), (0.03, (0.03, 0.1, 0.3))) for wd in decays]
    muon += [(0.01, 0.3, 3.0), (0.03, 0.1, 3.0), (0.03, 0.3, 3.0)]
    return StudyConfig(run=run, variants=_settings(adamw, muon), grid={BATCH: [128, 512, 0], WIDTH: [64, 128, 256]}, seeds=12)


def quick() -> StudyConfig:
    """Minutes on two cores: one cell, 3 settings of each optimizer, 6 fresh seeds, a small model on a small table."""
    run = small_run()
    variants = _settings([(1e-3, 2.0), (2e-3, 1.0), (2e-3, 2.0)], [(0.01, 0.3, 1.0), (0.03, 0.1, 1.0), (0.03, 0.3, 1.0)])
    return StudyConfig(run=run, variants=variants, grid={BATCH: [run.batch_size], WIDTH: [48]}, seeds=6)


PRESETS = {"quick": quick, "full": full}
DEFAULT = ("quick", "full")

CELL = {BATCH: 512, WIDTH: 128}
PUBLISHED = [
    Published(setting="7 tasks, AdamW", source="Tveit et al., arXiv 2504.16041", steps="153 epochs, some 1,530 updates (95 %)", seeds="many", threshold=0.95,
        conditions={"variant": SECOND, **CELL}, differs="Theirs: the mean over 7 tasks, 2 layers. Ours: division, 1 layer, tuned for this cell."),
    Published(setting="7 tasks, Muon", source="Tveit et al., arXiv 2504.16041", steps="103 epochs, some 1,030 updates (95 %)", seeds="many", threshold=0.95,
        conditions={"variant": FIRST, **CELL}, differs="The same."),
    Published(
        setting="/ mod 97, 50 %, more batch sizes and widths", source="Essential AI 2025", steps="no clear advantage of Muon", seeds="not stated",
        differs="The question of this study.",
    ),
    Published(
        setting="+ mod 113, 30 %, AdamW lr 0.001 wd 3", source="Na00s/muon-grokking", steps="8,200 (95 %, sustained)", seeds="1", threshold=0.95,
        conditions={"variant": SECOND, **CELL}, differs="Ours: division, 50 %, norms, tuned for this cell.",
    ),
    Published(
        setting="+ mod 113, 30 %, Muon lr 0.03 wd 0.1", source="Na00s/muon-grokking", steps="5,400 (95 %, sustained)", seeds="1", threshold=0.95,
        conditions={"variant": FIRST, **CELL}, differs="The same.",
    ),
]  # fmt: skip


def optimizer_of(variant: str) -> str:
    return variant.partition(" ")[0]


def order(rows: Rows) -> tuple[float, float, float]:
    """Small is better: median steps, then the share that never came to 99 %, then what the best accuracy lacks, in the mean. The first of equals is taken."""
    times, observed = rows.reached("val/accuracy", GROKKED)
    return statistics.survival_median(times, observed).value, 1 - float(observed.mean()), 1 - float(np.mean(rows.column("best.val/accuracy")))


TUNING = Tuning(seeds=TUNING_SEEDS, reported=lambda told: {**told, "variant": optimizer_of(told["variant"])}, order=order)
fresh, wanted = TUNING.fresh, TUNING.wanted


def of_fresh(figure: Figure, caption: str) -> Figure:
    return replace(TUNING.of_fresh(figure), caption=f"{caption} Fresh seeds only. A batch size of 0 is the whole training table.")


def chosen(others: Sequence[dict[str, Any]], names: Sequence[str]) -> Table:
    """A line per cell and optimizer."""

    def make(rows: Rows) -> list[dict[str, Any]]:
        return [_line(rows.where(cell), cell, name) for cell in others for name in names]

    return Table(
        "chosen",
        make,
        f"The best of each optimizer's settings by its median steps to 99 % on {len(TUNING_SEEDS)} tuning seeds, and its median on fresh ones (Kaplan-Meier). "
        f"Sooner: share of the fresh seeds, and how many times as many steps {SECOND} takes, seed by seed.",
    )


def _line(rows: Rows, cell: dict[str, Any], name: str) -> dict[str, Any]:
    mine, other = (fresh(rows).where({"variant": which}) for which in (name, SECOND))
    line: dict[str, Any] = {"cell": setting(cell) or "the one", "optimizer": name}
    if not mine:
        return line
    values = {path: mine[0][path] for path in ("optimizer.lr", "optimizer.wd", "optimizer.adam_wd") if path in mine[0]}
    tried = Rows([row for row in TUNING.tried(rows) if optimizer_of(row["variant"]) == name])
    best = tried.where(values)
    line |= {
        "setting": setting(values),
        "at the edge of what was tried": ", ".join(edges(tried, values)) or "no",
        "settings tried": len(tried) // max(len(best), 1),
    }
    line["on tuning seeds"] = statistics.survival_median(*best.reached("val/accuracy", GROKKED)).value
    line["on fresh seeds"] = statistics.survival_median(*mine.reached("val/accuracy", GROKKED))
    if name != SECOND and other:
        line |= {f"sooner than {SECOND}": sooner(mine, other).estimate(), f"{SECOND}'s steps, times": ratio(mine, other).estimate()}
    return line


def _pair(rows: Rows, cell: dict[str, Any]) -> tuple[Rows, Rows]:
    part = fresh(rows)
    return part.where({**cell, "variant": FIRST}), part.where({**cell, "variant": SECOND})


def _claims(cell: dict[str, Any]) -> list[Claim]:
    return [
        Claim(
            about(f"{FIRST} is sooner at 99 % of the unseen rows than {SECOND} in more than half of the seeds.", cell),
            lambda rows: sooner(*_pair(rows, cell)),
            (0.5, 1.0),
        ),
        Claim(
            about(f"By a lot: {SECOND} takes at least one and a half times the steps, in the median.", cell),
            lambda rows: ratio(*_pair(rows, cell)),
            (1.5, np.inf),
        ),
    ]


def _overall(rows: Rows, others: Sequence[dict[str, Any]]) -> Sample:
    """Per seed: is Muon sooner in more than half of the cells where it can be said?"""
    shares = []
    for _, part in rows.groups(["seeds.split"]):
        told = np.concatenate([np.asarray(sooner(*_pair(part, cell)).values, dtype=float) for cell in others])
        shares += [float(told.mean()) > 0.5] if told.size else []
    return Sample(shares, kind="proportion")


def study(config: StudyConfig) -> Study:
    TUNING.check(config)
    check(bool(config.variants), "variants", "name at least one setting of an optimizer")
    others = cells(replace(config, variants={}))
    names = list(dict.fromkeys(map(optimizer_of, config.variants)))
    by = [*others[0], "variant"]
    reached = reached_table(by)
    claims = [claim for cell in others for claim in _claims(cell)] if {FIRST, SECOND} <= set(names) else []
    inner, outer = (cells(replace(config, variants={}, grid={p: v for p, v in config.grid.items() if (p in (BATCH, WIDTH)) == own})) for own in (True, False))
    for cell in outer if claims and len(inner) > 1 else []:
        text = about(f"In all: {FIRST} is sooner in most of the {len(inner)} cells in more than half of the seeds.", cell)
        claims.append(Claim(text, lambda rows, cell=cell: _overall(rows, [cell | one for one in inner]), (0.5, 1.0)))
    return Study(
        name="grokking-optimizers",
        question=__doc__ or "",
        main_metric="val/accuracy",
        config=config,
        wanted=lambda rows: wanted(config, rows),
        figures=[
            of_fresh(times("val/accuracy", GROKKED, by=by), "Steps to 99 % of the unseen rows."),
            of_fresh(times_against(WIDTH, "val/accuracy", GROKKED, by=[path for path in by if path != WIDTH], logx=True), "Steps to 99 % by width."),
        ],
        tables=[chosen(others, names), TUNING.of_fresh(reached), published_table(PUBLISHED)],
        claims=claims,
    )
