"""Is division known sooner when other operations are learned beside it, or do they only give its unseen rows away?"""

from __future__ import annotations

from dataclasses import replace
from math import inf
from typing import Any

from shoal.config import DecoderConfig, StudyConfig
from shoal.results.claims import Claim, Sample
from shoal.results.comparisons import times
from shoal.results.figures import curves
from shoal.results.rows import Rows
from shoal.results.tables import Table
from shoal.results.wording import number
from shoal.studies.shared import Published, paper_run, percent, published_table, ratio, reached_table, small_run, sooner
from shoal.studies.study import Study, about, cells

SPLIT, DIVISION = "task.split", "val:div/accuracy"
KNOWN = 0.95  # as the published results have it
ALONE, TWO, FOUR = "div", "div+mul", "div+mul+add+sub"
FOLD = {TWO: 3.0, FOUR: 2.0}  # published: 60 and 4.4 times; 30,000 steps show no more than 5 of the 60


VARIANTS: dict[str, dict[str, Any]] = {
    name: {"task.operation": name, "evaluate": ["train", "val", *(f"val:{operation}" for operation in name.split("+"))]} for name in (ALONE, TWO, FOUR)
}


def full() -> StudyConfig:
    """Division alone, with multiplication, with all three; rows or whole facts held out; the published decay 1e-3 and the paper's 1; bfloat16."""
    run = paper_run(30_000, precision="bfloat16", evaluate_every=200, log_every=200)
    return StudyConfig(run=run, variants=VARIANTS, grid={"optimizer.wd": [1e-3, 1.0], SPLIT: ["random", "paired"]}, seeds=6)


def quick() -> StudyConfig:
    """Minutes on two cores: division alone and with multiplication over a small modulus, 40 % of the rows, a small model with a decay of its own."""
    run = small_run(evaluate_every=25, model=DecoderConfig(width=64, num_layers=1, feed_forward=256))
    run = replace(run, task=replace(run.task, p=59, operator_token=True, train_fraction=0.4))
    return StudyConfig(run=run, variants={name: VARIANTS[name] for name in (ALONE, TWO)}, grid={SPLIT: ["random", "paired"]}, seeds=6)


PRESETS = {"quick": quick, "full": full}
DEFAULT = ("quick", "full")

PUBLISHED = [
    Published(
        setting=f"{words}, mod 97, 50 %, AdamW wd 0.001", source="jetyue04/loss-plateau", steps=f"{steps} (95 %)", seeds="1", threshold=0.95, metric=DIVISION,
        conditions={"variant": name, SPLIT: "random", "optimizer.wd": 1e-3}, differs="Ours: steps of division's own rows, bfloat16.",
    )
    for name, words, steps in ((ALONE, "/", "334,000"), (TWO, "/ and *", "5,600"), (FOUR, "+, -, * and /", "75,750"))
]  # fmt: skip


def speedups(others: list[dict[str, Any]], names: list[str]) -> Table:
    """A line per mixture, split and other setting: how many times sooner division is known than alone."""

    def make(rows: Rows) -> list[dict[str, Any]]:
        return [
            {
                "mixture": about(name, cell),
                "split": split,
                "times sooner than alone": faster(rows, cell, name, split).estimate(),
                "random sooner than paired": leak(rows, cell, name).estimate(),
            }
            for cell in others
            for name in names
            if name != ALONE
            for split in ("random", "paired")
        ]

    return Table(
        "speed-ups",
        make,
        f"Steps to {percent(KNOWN)} of division's unseen rows, alone over mixed, seed by seed: Kaplan-Meier median, 95 % interval; a lower bound where "
        "division alone never got there. A batch has as many rows in either case, so in a mixture fewer of division's. Random: every row falls on a side by "
        "itself. Paired: the rows that state one fact (x / y = z, z y = x) on one side.",
    )


def _part(rows: Rows, cell: dict[str, Any], name: str, split: str) -> Rows:
    return rows.where({**cell, "variant": name, SPLIT: split})


def faster(rows: Rows, cell: dict[str, Any], name: str, split: str) -> Sample:
    return ratio(_part(rows, cell, name, split), _part(rows, cell, ALONE, split), DIVISION, KNOWN)


def leak(rows: Rows, cell: dict[str, Any], name: str) -> Sample:
    return sooner(_part(rows, cell, name, "random"), _part(rows, cell, name, "paired"), DIVISION, KNOWN)


def _claims(cell: dict[str, Any], name: str) -> list[Claim]:
    fold = FOLD[name]
    mixed = {TWO: "Beside multiplication", FOUR: "Beside the other three"}[name]
    return [
        Claim(
            about(f"{mixed}, rows split at random, 95 % of division is known at least {number(fold)} times as soon as alone, in the median.", cell),
            lambda rows: faster(rows, cell, name, "random"),
            (fold, inf),
        ),
        Claim(
            about(f"{mixed} it is known sooner with rows split at random than with whole facts held out, in more than half of the seeds.", cell),
            lambda rows: leak(rows, cell, name),
            (0.5, 1.0),
        ),
        Claim(
            about(f"{mixed}, whole facts held out, little of that is left: division is known at most {number(fold / 2)} times as soon as alone.", cell),
            lambda rows: faster(rows, cell, name, "paired"),
            (0.0, fold / 2),
        ),
    ]  # fmt: skip


def study(config: StudyConfig) -> Study:
    others = cells(replace(config, variants={}, grid={path: values for path, values in config.grid.items() if path != SPLIT}))
    names, by = list(config.variants), ["variant", SPLIT, *others[0]]
    operations = list(dict.fromkeys(split for changes in config.variants.values() for split in changes.get("evaluate", []) if ":" in split))
    return Study(
        name="grokking-mixtures",
        question=__doc__ or "",
        main_metric=DIVISION,
        config=config,
        wanted=lambda rows: config.runs(),
        figures=[
            times(DIVISION, KNOWN, by=by),
            curves([f"{split}/accuracy" for split in operations], by=by, logx=True, threshold=KNOWN),
            curves(["train/accuracy", DIVISION], by=by, logx=True, threshold=KNOWN, name="training-division"),
        ],
        tables=[speedups(others, names), reached_table(by, DIVISION), published_table(PUBLISHED)],
        claims=[claim for cell in others for name in names if name in FOLD for claim in _claims(cell, name)],
    )
