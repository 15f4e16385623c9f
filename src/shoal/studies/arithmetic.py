"""How well does a small transformer learn addition and subtraction modulo a prime, by depth and modulus?"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from shoal.config import Adam, DecoderConfig, ModularConfig, RunConfig, Schedule, StudyConfig, flatten
from shoal.results.claims import Claim, Sample
from shoal.results.figures import curves, survival
from shoal.results.rows import Rows
from shoal.results.wording import plural
from shoal.studies.study import Study, about, cells

TOLD = ("task.p", "task.operation", "model.num_layers")
NAMES = {"add": "addition", "sub": "subtraction", "mul": "multiplication", "div": "division"}


def full() -> StudyConfig:
    """Both operations, both moduli, 1 and 2 layers, 3 seeds: 24 runs of up to 100,000 steps."""
    steps = 100_000
    run = RunConfig(
        task=ModularConfig(train_fraction=0.5, val_fraction=0.1),
        model=DecoderConfig(width=128, feed_forward=512, num_heads=4),
        optimizer=Adam(lr=1e-3, beta2=0.98),
        schedule=Schedule(warmup=10 / steps),
        steps=steps,
        stop_metric="val/accuracy",
        stop_at=0.999,
        evaluate_every=100,
        log_every=100,
    )
    return StudyConfig(run=run, grid={"task.operation": ["add", "sub"], "task.p": [97, 113], "model.num_layers": [1, 2]}, seeds=3)


def quick() -> StudyConfig:
    """Minutes on two cores: addition modulo 97 with one layer, 3 seeds, at most 3,000 steps."""
    config = full()
    run = replace(config.run, steps=3_000, schedule=Schedule(warmup=10 / 3_000), evaluate_every=100)
    return replace(config, run=run, grid={"task.operation": ["add"], "task.p": [97], "model.num_layers": [1]})


PRESETS = {"quick": quick, "full": full}
DEFAULT = ("quick", "full")


def test(run: Any) -> list[dict[str, Any]]:
    """The test split, read once, after training."""
    from shoal.inference import evaluate

    return [evaluate(run, "test")]


def _accuracy(rows: Rows, cell: dict[str, Any]) -> Sample:
    return Sample([row["measures"]["test"][0]["accuracy"] for row in rows.where(cell)], bounds=(0, 1))


def _claim(config: StudyConfig, cell: dict[str, Any]) -> Claim:
    p, operation, num_layers = ({**flatten(config.run), **cell}[path] for path in TOLD)
    text = f"With {plural(num_layers, 'layer')}, {NAMES[operation]} modulo {p} is learned: mean test accuracy above 99 %."
    return Claim(about(text, cell, TOLD), lambda rows: _accuracy(rows, cell), (0.99, 1.0))


def study(config: StudyConfig) -> Study:
    by = list(cells(config)[0])
    return Study(
        name="arithmetic",
        question=__doc__ or "",
        main_metric="val/accuracy",
        config=config,
        wanted=lambda rows: config.runs(),
        measures={"test": test},
        figures=[
            curves(["train/accuracy", "val/accuracy"], by=by, logx=True, threshold=config.run.stop_at),
            curves(["train/loss", "val/loss"], by=by, logx=True, logy=True),
            survival("val/accuracy", config.run.stop_at, by=by),
        ],
        claims=[_claim(config, cell) for cell in cells(config)],
    )
