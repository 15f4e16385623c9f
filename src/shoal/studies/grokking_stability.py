"""Is it the number format that keeps a network without weight decay from knowing the unseen rows?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from shoal.config import AdamW, EmbeddingMLPConfig, ModularConfig, RunConfig, StudyConfig
from shoal.results.claims import Claim, Sample
from shoal.results.comparisons import times
from shoal.results.figures import curves
from shoal.results.rows import Rows
from shoal.results.tables import Table
from shoal.results.wording import setting
from shoal.studies.shared import GROKKED, Published, order_claims, percent, published_table, ratio, reached_table
from shoal.studies.study import Study, about, cells

FLOAT32, BFLOAT16, FLOAT64 = "float32", "bfloat16", "float64 loss"
STABLE32, STABLE16 = "float32 StableMax", "bfloat16 StableMax"
DECAY32, DECAY16 = "float32 wd 1", "bfloat16 wd 1"
PARITY = (0.8, 1.25)
EPSILON = 1e-25  # of Adam: with the usual 1e-8 it is the optimizer that stops, once gradients are some 1e-12 a weight, and not the number format
BEST = "best.val/accuracy"


def variants() -> dict[str, dict[str, Any]]:
    """Name -> what is changed of float32 without decay. AdamW at decay 0 is Adam, so that runs with and without decay share a fleet."""
    bfloat16, stable, decay = {"precision": "bfloat16"}, {"objective": "stablemax"}, {"optimizer.wd": 1.0}
    return {
        FLOAT32: {},
        BFLOAT16: bfloat16,
        FLOAT64: {"objective": "cross_entropy_float64"},
        STABLE32: stable,
        STABLE16: stable | bfloat16,
        DECAY32: decay,
        DECAY16: decay | bfloat16,
    }


def full() -> StudyConfig:
    """After Prieto et al. 2025 (arXiv 2501.04697): addition modulo 113, full batches, a network of two ReLU layers of 200; 10,000 steps, 8 seeds."""
    run = RunConfig(
        task=ModularConfig(p=113, operation="add", operator_token=False, train_fraction=0.5, val_fraction=0.5, test_fraction=0.0),
        model=EmbeddingMLPConfig(num_inputs=2, embedding=100, hidden=(200, 200), embedding_std=0.05),  # small, as a one-hot input's first layer is
        optimizer=AdamW(lr=1e-3, wd=0.0, beta2=0.98, eps=EPSILON),
        steps=10_000,
        batch_size=0,
        stop_metric="val/accuracy",
        stop_at=GROKKED,
        log_every=100,
    )
    return StudyConfig(run=run, variants=variants(), seeds=8)


def quick() -> StudyConfig:
    """Minutes on two cores: modulo 31, a network half as wide, 6 seeds."""
    run = full().run
    run = replace(
        run,
        task=replace(run.task, p=31, train_fraction=0.8, val_fraction=0.2),
        model=EmbeddingMLPConfig(num_inputs=2, embedding=50, hidden=(100, 100), embedding_std=0.05),
        optimizer=AdamW(lr=3e-3, wd=0.0, beta2=0.98, eps=EPSILON),
        steps=1_500,
        evaluate_every=25,
        log_every=25,
    )
    return StudyConfig(run=run, variants=variants(), seeds=6)


PRESETS = {"quick": quick, "full": full}
DEFAULT = ("quick", "full")

COLLAPSE = "softmax collapses, and cannot learn on once the loss is exactly 0 (arXiv 2501.04697)"
ORDER = [
    (STABLE32, FLOAT32, COLLAPSE),
    (STABLE16, BFLOAT16, COLLAPSE),
    (STABLE32, FLOAT64, "more digits only put the collapse off (arXiv 2501.04697)"),
    (DECAY32, STABLE32, "decay did better in most networks tried (EIFY, talon)"),
]

HERE = {"task.p": 113}
THEIRS = "Prieto et al., arXiv 2501.04697"
OURS = "Ours: 50 % of the rows, 10,000 steps, a learned embedding of each operand, lr 0.001."
PUBLISHED = [
    Published(
        setting="+ mod 113, 40 %, full batches, two ReLU layers, Adam, float32", source=THEIRS, steps="never: it ends with the collapse", seeds="not stated",
        conditions={"variant": FLOAT32, **HERE}, differs=f"{OURS} Theirs reads two one-hots.",
    ),
    Published(
        setting="the same, StableMax, lr 0.01", source=THEIRS, steps="within the 80,000 to 100,000 of their command", seeds="not stated",
        conditions={"variant": STABLE32, **HERE}, differs=f"{OURS} StableMax in float32, theirs in float64.",
    ),
    Published(
        setting="the same, embeddings, AdamW tuned (lr 0.05, wd 2)", source="EIFY, talon", steps="111 (100 %)", seeds="1",
        conditions={"variant": DECAY32, **HERE}, differs=f"{OURS} wd 1; neither is tuned.",
    ),
]  # fmt: skip


def highest(rows: Rows, metric: str) -> Sample:
    """Per run, the highest value of a share over all of its evaluations: what has collapsed may come back when Adam jumps."""
    return Sample([float(np.max(values, initial=0.0)) for _, values in rows.curve(metric)], bounds=(0, 1))


def collapse_table(by: Sequence[str]) -> Table:
    """A line per setting: the highest shares of zero losses and of collapse there ever were, and the best accuracy."""

    def make(rows: Rows) -> list[dict[str, Any]]:
        return [
            {
                "setting": setting(values),
                "n": len(part),
                **{name: highest(part, metric).estimate() for name, metric in (("zero losses", "train/zero_loss"), ("collapse", "train/collapse"))},
                "best accuracy on unseen rows": Sample(part.column(BEST), bounds=(0, 1)).estimate(),
            }
            for values, part in rows.groups(by)
        ]

    caption = (
        "Highest share, over the evaluations of a run, of training rows whose loss is exactly 0, and of those where all terms of the softmax (or of "
        "StableMax) but the largest were lost in rounding; and the best accuracy on unseen rows. Means over seeds, 95 % intervals."
    )
    return Table("collapse", make, caption)


def _claims(config: StudyConfig, cell: dict[str, Any]) -> list[Claim]:
    def at(name: str) -> dict[str, Any]:
        return {**cell, "variant": name}

    def collapsed(name: str, text: str, holds: tuple[float, float]) -> tuple[tuple[str, ...], Claim]:
        return (name,), Claim(about(text, cell), lambda rows: highest(rows.where(at(name)), "train/collapse"), holds)

    def share(name: str, text: str, holds: tuple[float, float]) -> tuple[tuple[str, ...], Claim]:
        return (name,), Claim(about(text, cell), lambda rows: Sample(rows.where(at(name)).reached("val/accuracy", GROKKED)[1], kind="proportion"), holds)

    known = f"of the seeds know {percent(GROKKED)} of the unseen rows"
    claims = [
        collapsed(FLOAT32, "Without decay softmax in float32 collapses: at some time on more than 10 % of the training rows, in the mean.", (0.1, 1.0)),
        collapsed(FLOAT64, "With the loss in float64 it does not: never on more than 1 %.", (0.0, 0.01)),
        collapsed(STABLE32, "With StableMax in float32 it does not: never on more than 1 %.", (0.0, 0.01)),
        collapsed(DECAY32, "With decay it does not: never on more than 1 %.", (0.0, 0.01)),
        share(FLOAT32, f"Without decay, in float32, at most half {known} within the budget.", (0.0, 0.5)),
        share(STABLE32, f"With StableMax, without decay, more than half {known}.", (0.5, 1.0)),
        (
            (FLOAT64, FLOAT32),
            Claim(
                about("The best accuracy on unseen rows is higher with the loss in float64 than in float32: the more digits, the later the collapse.", cell),
                lambda rows: Sample(rows.where(at(FLOAT64)).column(BEST), pair=rows.where(at(FLOAT32)).column(BEST)),
                (0.0, 1.0),
            ),
        ),
        (
            (DECAY16, DECAY32),
            Claim(
                about(f"With decay bfloat16 takes the steps of float32: {PARITY[0]:g} to {PARITY[1]:g} times, in the median over seeds.", cell),
                lambda rows: ratio(rows.where(at(DECAY32)), rows.where(at(DECAY16))),
                PARITY,
            ),
        ),
    ]
    return [claim for names, claim in claims if set(names) <= config.variants.keys()]


def study(config: StudyConfig) -> Study:
    others = cells(replace(config, variants={}))
    by = list(cells(config)[0])
    return Study(
        name="grokking-stability",
        question=__doc__ or "",
        main_metric="val/accuracy",
        config=config,
        wanted=lambda rows: config.runs(),
        figures=[
            curves(["train/accuracy", "val/accuracy"], by=by, logx=True, threshold=GROKKED),
            curves("train/collapse", by=by, logx=True, ylabel="share of training rows collapsed"),
            curves("train/zero_loss", by=by, logx=True, ylabel="share of training rows with a loss of exactly 0"),
            times("val/accuracy", GROKKED, by=by),
        ],
        tables=[collapse_table(by), reached_table(by), published_table(PUBLISHED)],
        claims=[*order_claims(config, ORDER), *(claim for cell in others for claim in _claims(config, cell))],
    )
