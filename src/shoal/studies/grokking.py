"""Does a small network that has memorised half of a division table come to know the other half, and how much later?"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from shoal.config import Adam, AdamW, EmbeddingMLPConfig, Muon, Schedule, StudyConfig
from shoal.results.claims import Claim, Sample
from shoal.results.figures import curves, survival
from shoal.results.rows import Rows
from shoal.studies.shared import GROKKED, delay, paper_run
from shoal.studies.study import Study, about, cells


def paper() -> StudyConfig:
    """Power et al. 2022 (arXiv 2201.02177), sections 3.2 and 3.3: AdamW with weight decay 1, their architecture and initialisation (openai/grok)."""
    return StudyConfig(run=paper_run(), seeds=16)


def fig1() -> StudyConfig:
    """Their figure 1, left: plain Adam, no weight decay, a budget of a million updates, chosen there to show how late generalisation can come."""
    steps = 1_000_000
    config = paper()
    run = replace(config.run, optimizer=Adam(lr=1e-3, beta2=0.98), schedule=Schedule(warmup=10 / steps), steps=steps, evaluate_every=200, log_every=200)
    return replace(config, run=run, seeds=8)


def fast() -> StudyConfig:
    """Under a minute on two cores: one layer, small initial embeddings, Muon on the matrices. It shows that the delay is a choice, and keeps a short one."""
    steps = 3_000
    config = paper()
    run = replace(
        config.run,
        task=replace(config.run.task, operator_token=False),
        model=replace(config.run.model, num_layers=1, embedding_std=0.1),
        optimizer=Muon(lr=0.02, wd=0.1, momentum=0.95, adam_lr=1e-3, adam_wd=1.0, adam_beta2=0.98),
        schedule=Schedule(warmup=10 / steps),
        steps=steps,
        evaluate_every=25,
        log_every=25,
    )
    return replace(config, run=run, seeds=6)


def fastest() -> StudyConfig:
    """Sixteen seconds on two cores, almost no delay: an embedding MLP, full batches, a strong decay (after github.com/EIFY's talon branch)."""
    config = fast()
    model, optimizer = EmbeddingMLPConfig(num_inputs=2), AdamW(lr=0.01, wd=4.0, beta2=0.99)
    run = replace(config.run, model=model, optimizer=optimizer, schedule=Schedule(), steps=400, batch_size=0, evaluate_every=5, log_every=5)
    return replace(config, run=run)


PRESETS = {"fast": fast, "fastest": fastest, "paper": paper, "fig1": fig1, "quick": fast, "full": paper}
DEFAULT = ("fast", "paper")


def _claims(config: StudyConfig, cell: dict[str, Any]) -> list[Claim]:
    def reached(rows: Rows) -> Sample:
        return Sample(rows.where(cell).reached("val/accuracy", GROKKED)[1], kind="proportion")

    def final(rows: Rows) -> Sample:
        return Sample(rows.where(cell).column("final.val/accuracy"), bounds=(0, 1))

    def delayed(rows: Rows) -> Sample:
        return delay(rows.where(cell))

    steps = cell.get("config.steps", config.run.steps)
    return [
        Claim(about(f"More than half of all seeds know 99 % of the unseen rows within {steps:,} steps.", cell, ["config.steps"]), reached, (0.5, 1.0)),
        Claim(about("At the end the mean accuracy on unseen rows is above 99 %.", cell), final, (GROKKED, 1.0)),
        Claim(
            about("From 99 % of the training rows to 99 % of the unseen ones it takes at least 100 steps, in the median.", cell), delayed, (100.0, float("inf"))
        ),
    ]


def study(config: StudyConfig) -> Study:
    by = list(cells(config)[0])
    return Study(
        name="grokking",
        question=__doc__ or "",
        main_metric="val/accuracy",
        config=config,
        wanted=lambda rows: config.runs(),
        figures=[
            curves(["train/accuracy", "val/accuracy"], by=by, logx=True, threshold=GROKKED),
            curves(["train/loss", "val/loss"], by=by, logx=True, logy=True),
            survival("val/accuracy", GROKKED, by=by),
        ],
        claims=[claim for cell in cells(config) for claim in _claims(config, cell)],
    )
