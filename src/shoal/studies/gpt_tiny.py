"""How low does the validation loss of a very small GPT come on English prose, and how many steps does that need?"""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import partial
from typing import Any

import numpy as np

from shoal.config import StudyConfig
from shoal.config.load import load_run, override
from shoal.results import statistics
from shoal.results.claims import Claim, Sample
from shoal.results.figures import curves
from shoal.results.perplexity import BASELINES, perplexities
from shoal.results.rows import Row, Rows
from shoal.results.tables import Table
from shoal.results.wording import setting
from shoal.studies.language import LOSS, TIE, losses, pairs, samples, training
from shoal.studies.study import Study, about, cells

PROSE = {"nothing": "", "a sentence": "This function returns the"}
NEAR = 0.01  # above the lowest validation loss, as a share of it


def full() -> StudyConfig:
    """gpt-tiny.yaml, which comes with shoal (width 32, 2 heads, 2 layers, 128 positions, GPT-2's tokens), on 3 seeds."""
    return StudyConfig(run=load_run("gpt-tiny.yaml"), seeds=3)


def quick() -> StudyConfig:
    """Two minutes on two cores: the same model on 0.7 MB of the text, with those of GPT-2's tokens that occur in it; 500 steps of 8 windows."""
    small = {"task.max_bytes": 700_000, "task.reindex": True, "steps": 500, "batch_size": 8, "optimizer.lr": 5e-3, "evaluate_every": 50}
    return StudyConfig(run=override(load_run("gpt-tiny.yaml"), small), seeds=3)


PRESETS = {"quick": quick, "full": full}
DEFAULT = ("quick", "full")


def needed(row: Row) -> float:
    """The first evaluated step whose validation loss is within 1 % of the run's lowest."""
    steps, values = row.curve(LOSS)
    return float(steps[np.argmax(values <= (1 + NEAR) * values.min())])


def _needed(by: list[str]) -> Table:
    def line(values: Mapping[str, Any], part: Rows) -> dict[str, Any]:
        lowest = statistics.mean(losses(part, f"best.{LOSS}")).within(0, math.inf)
        steps = statistics.median([needed(row) for row in part])
        return {"setting": setting(values) or "all runs", "lowest validation loss": lowest, "steps needed": steps, "steps made": part[0]["steps"]}

    text = (
        f"The lowest validation loss of a run, mean over seeds with the t interval; and the steps needed, the first evaluation within {NEAR:.0%} of it: "
        "median over seeds. Evaluations stand some steps apart, and a step needed is one of theirs."
    )
    return Table("steps needed", lambda rows: [line(values, part) for values, part in rows.groups(by)] if LOSS in rows.metrics else [], text)


def _claims(cell: Mapping[str, Any]) -> list[Claim]:
    def counted(rows: Rows) -> Sample:
        here = Rows(sorted(rows.where(cell), key=lambda row: row["seeds.split"]))
        return Sample([row["data"][BASELINES["unigram"]] for row in here], pair=losses(here))

    def paired(rows: Rows) -> Sample:
        here = Rows(sorted(rows.where(cell), key=lambda row: row["seeds.split"]))
        return Sample([row["measures"]["pairs"][0]["nats"] for row in here], pair=losses(here))

    def last(rows: Rows) -> Sample:
        return Sample(losses(rows.where(cell)) / losses(rows.where(cell), f"best.{LOSS}"), bounds=(1, math.inf))

    return [
        Claim(
            about("It knows more than how common tokens are: its validation loss is below that of counted tokens.", cell),
            counted,
            (TIE, math.inf),
        ),
        Claim(about("It knows more than which token follows which: its validation loss is below that of counted pairs.", cell), paired, (TIE, math.inf)),
        Claim(
            about("It is still learning, or has stopped, but does not get worse: its last validation loss is within 1 % of its lowest.", cell), last, (1, 1.01)
        ),
    ]


def study(config: StudyConfig) -> Study:
    by = list(cells(config)[0])
    return Study(
        name="gpt-tiny",
        question=__doc__ or "",
        main_metric=LOSS,
        config=config,
        wanted=lambda rows: config.runs(),
        measures={"pairs": pairs, "samples": partial(samples, seed=config.first_seed, prompts=PROSE)},
        figures=[curves([training(config.run.evaluate), LOSS], by=by, ylabel="nats per token")],
        tables=[perplexities(by), _needed(by)],
        claims=[claim for cell in cells(config) for claim in _claims(cell)],
    )
