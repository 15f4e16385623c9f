"""Two stages: what competes, what is chosen, on which seeds what is chosen is reported."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from invented import invented

from shoal.config import RunConfig, StudyConfig, run_id, with_seed, with_values
from shoal.config.fields import ConfigError
from shoal.results import Rows
from shoal.results.figures import Figure, nothing
from shoal.results.tables import Table
from shoal.studies.tuning import Tuning, edges, of, without

LR, WD = "optimizer.lr", "optimizer.wd"
LRS = [1e-3, 3e-3, 1e-2]


def fewest(rows: Rows) -> tuple[float, ...]:
    times, observed = rows.reached("val/accuracy", 0.99)
    return (float(np.mean(np.where(observed, times, 10_000))),)


TUNING = Tuning(seeds=(50, 51), reported=without(LR), order=fewest, suffix=" tried")
CONFIG = StudyConfig(run=RunConfig(steps=500), variants={"a": {}, "b": {"optimizer.beta2": 0.9}}, grid={WD: [0.0, 1.0], LR: LRS}, seeds=3, first_seed=7)


def at(run: RunConfig) -> float:
    """With decay the highest rate is soonest, without it the lowest; variant b never learns but for one seed of the middle rate."""
    if run.variant.startswith("b"):
        return 100.0 if run.optimizer.lr == 3e-3 and run.seeds.init == 51 else math.inf
    best: Any = run.optimizer
    return 200.0 if best.lr == (1e-2 if best.wd else 1e-3) else 300.0


def test_every_setting_then_the_best_of_each_cell_on_fresh_seeds(tmp_path: Path) -> None:
    first = TUNING.wanted(CONFIG, Rows())
    assert len(first) == 2 * 2 * 3 * 2 and {run.variant for run in first} == {"a tried", "b tried"}
    assert {(run.seeds.split, run.seeds.init, run.seeds.order) for run in first} == {(50, 50, 50), (51, 51, 51)}
    _, rows = invented(tmp_path, [(run, at(run)) for run in first], every=10)
    both = TUNING.wanted(CONFIG, rows)
    assert both == TUNING.wanted(CONFIG, Rows(rows[::-1])) and both[: len(first)] == first, "pure, whatever the order of the rows"
    fresh = both[len(first) :]
    assert [run.seeds.init for run in fresh] == [7, 8, 9] * 4 and [run.variant for run in fresh] == ["a"] * 6 + ["b"] * 6
    picked = [(run.variant, run.optimizer.wd, run.optimizer.lr) for run in fresh[::3]]  # pyright: ignore[reportAttributeAccessIssue]
    assert picked == [("a", 0.0, 1e-3), ("a", 1.0, 1e-2), ("b", 0.0, 3e-3), ("b", 1.0, 3e-3)]
    settings = {run_id(with_seed(run, 8)) for _, run in CONFIG.settings()}
    assert all(run_id(run) in settings for run in fresh[1::3]), "as the config has them, but for the seed"

    _, rows = invented(tmp_path / "both", [(run, at(run)) for run in both], every=10)
    assert [run_id(run) for run in TUNING.wanted(CONFIG, rows)] == [run_id(run) for run in both], "nothing new is asked for"
    assert len(TUNING.fresh(rows)) == 12 and len(TUNING.tried(rows)) == 24 and set(TUNING.fresh(rows).column("seeds.split")) == {7, 8, 9}


def test_a_cell_goes_on_as_soon_as_all_that_compete_for_it_are_there(tmp_path: Path) -> None:
    """Of any part of the rows: no cell before its last one, and the same fresh runs as when all are there."""
    first = TUNING.wanted(CONFIG, Rows())
    _, rows = invented(tmp_path, [(run, at(run)) for run in first], every=10)
    fresh = TUNING.wanted(CONFIG, rows)[len(first) :]
    for lacking in range(len(rows)):
        few = TUNING.wanted(CONFIG, Rows([row for place, row in enumerate(rows) if place != lacking]))[len(first) :]
        cell = (rows[lacking]["variant"].removesuffix(" tried"), rows[lacking][WD])
        assert few == [run for run in fresh if (run.variant, run.optimizer.wd) != cell], "only the one that is not complete"  # pyright: ignore[reportAttributeAccessIssue]


def test_the_first_of_equals(tmp_path: Path) -> None:
    first = TUNING.wanted(CONFIG, Rows())
    _, rows = invented(tmp_path, [(run, math.inf) for run in first])
    assert {run.optimizer.lr for run in TUNING.wanted(CONFIG, rows)[len(first) :]} == {LRS[0]}


def test_reported_under_another_name(tmp_path: Path) -> None:
    """Variants that compete with each other, as settings of two optimizers do."""
    tuning = Tuning(seeds=(50,), reported=lambda told: {**told, "variant": told["variant"][0]}, order=fewest)
    config = StudyConfig(run=RunConfig(steps=500), variants={"a 1": {LR: 1e-3}, "a 2": {LR: 1e-2}, "b 1": {LR: 1e-4}}, seeds=2)
    first = tuning.wanted(config, Rows())
    assert [run.variant for run in first] == ["a 1", "a 2", "b 1"]
    _, rows = invented(tmp_path, [(run, 100.0 if run.variant == "a 2" else 200.0) for run in first], every=10)
    assert [(run.variant, run.optimizer.lr, run.seeds.split) for run in tuning.wanted(config, rows)[3:]] == [
        ("a", 1e-2, 0), ("a", 1e-2, 1), ("b", 1e-4, 0), ("b", 1e-4, 1),
    ]  # fmt: skip


def test_seeds_of_the_tuning_are_never_reported() -> None:
    for first in (48, 51):
        with pytest.raises(ConfigError, match="begin after 51"):
            TUNING.check(StudyConfig(seeds=3, first_seed=first))
    for first in (0, 47, 52):
        TUNING.check(StudyConfig(seeds=3, first_seed=first))


def test_at_the_edge_of_what_was_tried(tmp_path: Path) -> None:
    runs = [with_values(RunConfig(), {LR: lr, WD: 1.0}) for lr in LRS]
    rows = invented(tmp_path, [(run, math.inf) for run in runs])[1]
    assert [edges(rows, {LR: lr, WD: 1.0}) for lr in LRS] == [["lr"], [], ["lr"]]


def test_figures_and_tables_of_a_part(tmp_path: Path) -> None:
    runs = [with_seed(RunConfig(), seed) for seed in (0, 50, 51)]
    rows = invented(tmp_path, [(run, math.inf) for run in runs])[1]
    seen = []
    table = TUNING.of_fresh(Table("t", lambda rows: [{"n": len(rows)}], "c"))
    assert table.make(rows) == [{"n": 1}] and (table.name, table.caption) == ("t", "c")
    figure = of(TUNING.tried, Figure("f", lambda rows: [seen.append(len(rows)), nothing("x")][1]))
    figure.svg(rows)
    assert seen == [2] and figure.name == "f"
