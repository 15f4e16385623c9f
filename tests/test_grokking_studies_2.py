"""What is special in the grokking studies of fractions, operations, heat map, mixtures and optimizers: what is compared, what is chosen, on invented rows."""

from __future__ import annotations

import importlib
import math
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from invented import invented

import shoal
from shoal.cli import MAX_RUNS
from shoal.config import RunConfig, StudyConfig, run_id, with_seed
from shoal.config.fields import ConfigError
from shoal.config.load import override
from shoal.results import Rows
from shoal.results.claims import judge
from shoal.studies import STUDIES
from shoal.studies.shared import ratio
from shoal.train.plan import plan, validate

NAMES = ("grokking-fractions", "grokking-operations", "grokking-heatmap", "grokking-mixtures", "grokking-optimizers")
MODULES: dict[str, ModuleType] = {name: importlib.import_module(STUDIES[name]) for name in NAMES}
FRACTIONS, OPERATIONS, HEATMAP, MIXTURES, OPTIMIZERS = MODULES.values()
SMALL = {"run.model.width": 16, "run.model.num_heads": 2, "run.model.feed_forward": 16, "run.batch_size": 16, "run.task.p": 7,
         "run.steps": 8, "run.evaluate_every": 2, "run.log_every": 2, "seeds": 2}  # fmt: skip


def small(name: str, **changes: Any) -> StudyConfig:
    config = MODULES[name].PRESETS["quick"]()
    values = {path: value for path, value in SMALL.items() if path.removeprefix("run.") not in config.grid}
    return override(config, values | changes)


@pytest.mark.parametrize("name", NAMES)
def test_full_presets_run_by_one_command(name: str) -> None:
    """Within the number of runs that need no confirmation, in few programs, every kind of run valid."""
    config = MODULES[name].PRESETS["full"]()
    runs = MODULES[name].study(config).wanted(Rows())
    fleets = {"grokking-fractions": 2, "grokking-operations": 2, "grokking-heatmap": 1, "grokking-mixtures": 3, "grokking-optimizers": 18}
    groups = plan(runs)
    assert len(groups) == fleets[name] and config.num_runs <= MAX_RUNS
    assert all(run.precision == "bfloat16" for run in runs)
    for group in groups:
        for run in {run.task: run for run in group}.values():
            validate(run)
    if name == "grokking-heatmap":
        assert len(groups[0]) == 1024


def test_ratio(tmp_path: Path) -> None:
    """Seed by seed: known, at least, at most, unknown."""
    run = RunConfig(steps=1000)
    a, b = [200.0, 100.0, math.inf, math.inf, 400.0], [400.0, math.inf, 500.0, math.inf, 100.0]
    pairs = [(with_seed(replace(run, variant=name), seed), at) for name, times in (("a", a), ("b", b)) for seed, at in enumerate(times)]
    rows = invented(tmp_path, pairs[::-1], every=10)[1]
    sample = ratio(rows.where({"variant": "a"}), rows.where({"variant": "b"}))
    by_seed = dict(
        zip(rows.where({"variant": "a"}).column("seeds.split"), zip(np.asarray(sample.values), np.asarray(sample.observed), strict=True), strict=True)
    )
    assert {int(seed): (round(value, 6), bool(seen)) for seed, (value, seen) in by_seed.items()} == {
        0: (2.0, True),
        1: (10.0, False),  # at least
        2: (0.5, True),  # at most, taken as that
        3: (0.0, False),  # unknown
        4: (0.25, True),
    }
    assert sample.kind == "survival" and sample.estimate().n == 5
    alone = ratio(rows.where({"variant": "a", "seeds.split": 0}), rows.where({"variant": "b"}))
    assert np.size(alone.values) == 1, "only the seeds both have"


def test_fractions_power_law(tmp_path: Path) -> None:
    """Steps that grow by 1.45 a percent give 1.45; where they were not to be had they give a bound."""
    config = override(FRACTIONS.PRESETS["full"](), {"grid.task.operation": ["s5"], "grid.task.train_fraction": [0.25, 0.3], "run.steps": 4000})

    study = FRACTIONS.study(config := replace(config, seeds=8))
    runs = [(run, 500.0 * 1.45 ** (100 * (0.3 - run.task.train_fraction))) for run in config.runs()]  # pyright: ignore
    rows = invented(tmp_path / "a", runs, every=1)[1]
    verdict = judge(study.claims[0], rows)
    assert verdict["verdict"] == "held" and verdict["n"] == 8 and "1.4 to 1.5 times" in verdict["claim"] and verdict["value"] == pytest.approx(1.45, abs=0.01)
    line = study.tables[0].make(rows)[0]
    assert line["rows"] == "30 % to 25 %" and line["published"] == "1.4 to 1.5"
    runs = [(run, math.inf if run.task.train_fraction == 0.25 else at) for run, at in runs]  # pyright: ignore
    verdict = judge(study.claims[0], invented(tmp_path / "b", runs, every=1)[1])
    assert verdict["verdict"] == "not held" or math.isinf(verdict["interval"][1])
    assert verdict["interval"][0] >= (4000 / 510) ** 0.2 - 0.02, "it is at least what the budget shows"


def test_operations_data_needed(tmp_path: Path) -> None:
    config = override(OPERATIONS.PRESETS["quick"](), {"run.steps": 500})
    never = {("cubic_y", 0.6), ("cubic_y", 0.8), ("sub", 0.6), ("div", 0.6)}
    runs = [(run, math.inf if (run.task.operation, run.task.train_fraction) in never else 100.0) for run in config.runs()]  # pyright: ignore
    rows = invented(tmp_path, runs, every=20)[1]
    study = OPERATIONS.study(config)
    assert [judge(claim, rows)["verdict"] for claim in study.claims] == ["held"] * len(study.claims) and len(study.claims) == 4
    lines = {line["operation"]: line for line in study.tables[0].make(rows)}
    assert [lines[name]["enough"] for name in ("x + y", "x - y", "x / y", "x^3 + x y^2 + y")] == ["60 %", "80 %", "80 %", "none of these"]
    assert lines["x - y"]["60 %"].value == pytest.approx(0.02) and lines["x - y"]["80 %"].value == 1 and lines["x - y"]["60 %"].n == 3
    for figure in study.figures:
        assert "<svg" in figure.svg(rows)


def test_heatmap_law_and_collapse(tmp_path: Path) -> None:
    """Delays made as 1 / (lr wd), or as 1 / (lr^2 wd), are found to be that; runs that lose what they knew are counted by seed."""
    config = override(HEATMAP.PRESETS["full"](), {"grid.optimizer.wd": [0.0, 0.3, 1.0, 30.0], "grid.optimizer.lr": [3e-4, 1e-3, 3e-3], "seeds": 8})
    config = override(config, {"run.steps": 20_000})

    def at(run: RunConfig, power: float) -> float:
        lr, wd = run.optimizer.lr, run.optimizer.wd
        return 12_000.0 if wd == 0 else math.inf if wd == 30 else (1 + 0.02 * run.seeds.split) * 1.0 / (lr / 1e-3) ** power / wd * 800

    study = HEATMAP.study(config)
    rows = invented(tmp_path / "law", [(run, at(run, 1.0)) for run in config.runs()], every=10)[1]
    assert HEATMAP.slopes(rows)[:, 0] == pytest.approx(np.full(8, -1.0), abs=0.03)
    assert HEATMAP.slopes(rows, apart=True) == pytest.approx(np.full((8, 2), -1.0), abs=0.05)
    verdicts = [judge(claim, rows) for claim in study.claims]
    assert [verdict["verdict"] for verdict in verdicts] == ["held", "held", "not held", "held", "held", "held"]
    assert {verdict["n"] for verdict in verdicts} == {8}
    steep = invented(tmp_path / "steep", [(run, at(run, 2.0)) for run in config.runs()], every=10)[1]
    apart = HEATMAP.slopes(steep, apart=True)
    assert apart[:, 0] == pytest.approx(np.full(8, -2.0), abs=0.05) and apart[:, 1] == pytest.approx(np.full(8, -1.0), abs=0.05)
    assert all("<svg" in figure.svg(rows) for figure in study.figures)
    assert all(point["optimizer.wd"] not in (0.0, 30.0) for point in HEATMAP.points(rows)), "no law without decay, or where most never get there"
    assert HEATMAP.slopes(rows[:1]).shape == (0, 1) and math.isnan(HEATMAP.share_lost(rows.where({"optimizer.wd": 30.0})))


def test_heatmap_collapse(tmp_path: Path) -> None:
    """Runs that lose what they knew are counted by seed; those that never knew it lose nothing."""
    config = override(HEATMAP.PRESETS["full"](), {"grid.optimizer.wd": [1.0], "grid.optimizer.lr": [1e-3, 3e-3], "seeds": 8, "run.steps": 500})
    runs = config.runs()
    store, _ = invented(tmp_path, [(run, 100.0 if run.seeds.split < 7 else math.inf) for run in runs], running=True)
    last = np.array([0.5 if run.optimizer.lr == 3e-3 or run.seeds.split == 7 else 0.95 for run in runs])  # pyright: ignore
    store.append("f", {"step": np.full(len(runs), 550), "run": np.arange(len(runs)), "val/accuracy": last})
    rows = store.rows()
    assert HEATMAP.share_lost(rows.where({"optimizer.lr": 3e-3})) == 1 and HEATMAP.lost(rows.where({"optimizer.lr": 1e-3})).tolist() == [False] * 7
    gentle, harsh = (claim.sample(rows).estimate() for claim in HEATMAP.study(config).claims[1:3])
    assert (gentle.value, gentle.n) == (0.0, 8) and (harsh.value, harsh.n) == (7 / 8, 8)


def test_mixtures_by_operation(tmp_path: Path) -> None:
    """Every variant measures division's rows by themselves; alone they are all there are; with whole facts held out no fact is on two sides."""
    config = small("grokking-mixtures")
    study = MIXTURES.study(config)
    result = shoal.run(study, tmp_path, progress=False)
    for row in result.rows:
        names = row["task.operation"].split("+")
        assert {metric for metric, _, kind in (m.partition("/") for m in rows_metrics(row)) if kind == "accuracy"} == {
            "train", "val", "batch", *(f"val:{name}" for name in names)
        }  # fmt: skip
        if names == ["div"]:
            assert np.array_equal(row.curve("val:div/accuracy")[1], row.curve("val/accuracy")[1])
    assert {claim["n"] for claim in result.claims} <= {0, 2} and len(study.claims) == 3
    full = MIXTURES.study(MIXTURES.PRESETS["full"]())
    assert len(full.claims) == 12 and len(full.claims) == len({claim.text for claim in full.claims})


def rows_metrics(row: Any) -> list[str]:
    return [key.removeprefix("final.") for key in row if key.startswith("final.")]


def tuned(config: StudyConfig, times: dict[str, float], directory: Path) -> tuple[list[RunConfig], Rows]:
    first = OPTIMIZERS.wanted(config, Rows())
    return first, invented(directory, [(run, times[run.variant]) for run in first], every=10)[1]


def test_optimizers_are_chosen_on_seeds_of_their_own(tmp_path: Path) -> None:
    config = override(OPTIMIZERS.PRESETS["quick"](), {"run.steps": 500, "seeds": 4})
    names = list(config.variants)
    times = dict(zip(names, [300.0, 200.0, 250.0, math.inf, 150.0, 150.0], strict=True))
    first, rows = tuned(config, times, tmp_path)
    assert len(first) == 18 and {run.seeds.split for run in first} == {1000, 1001, 1002} and {run.variant for run in first} == set(names)
    again = OPTIMIZERS.wanted(config, rows)
    assert again == OPTIMIZERS.wanted(config, Rows(rows[::-1])) and again[:18] == first, "pure, whatever the order of the rows"
    fresh = again[18:]
    assert [run.variant for run in fresh] == ["AdamW"] * 4 + ["Muon"] * 4 and [run.seeds.init for run in fresh] == [0, 1, 2, 3] * 2
    assert (fresh[0].optimizer.lr, fresh[0].optimizer.wd) == (2e-3, 1.0), "the least median"
    assert (fresh[4].optimizer.lr, fresh[4].optimizer.wd) == (0.03, 0.1), "the first of equals"

    both = invented(tmp_path / "both", [(run, times.get(run.variant, 100.0 if run.variant == "Muon" else 205.0)) for run in again], every=10)[1]
    assert {run_id(run) for run in OPTIMIZERS.wanted(config, both)} == {run_id(run) for run in again}, "nothing new is asked for"
    study = OPTIMIZERS.study(config)
    verdicts = [judge(claim, both) for claim in study.claims]
    assert [verdict["n"] for verdict in verdicts] == [4, 4] and verdicts[0]["value"] == 1 and verdicts[1]["value"] == pytest.approx(2.05, abs=0.06)
    lines = study.tables[0].make(both)
    assert [line["at the edge of what was tried"] for line in lines] == ["lr, wd", "lr, wd"] and [line["settings tried"] for line in lines] == [3, 3]
    assert lines[0]["on tuning seeds"] == 200 and lines[0]["on fresh seeds"].n == 4 and lines[1]["sooner than AdamW"].value == 1
    assert all("<svg" in figure.svg(both) and "<svg" in figure.svg(rows) for figure in study.figures)


def test_optimizers_by_share_where_no_median_is_reached(tmp_path: Path) -> None:
    config = override(OPTIMIZERS.PRESETS["quick"](), {"run.steps": 500, "seeds": 2})
    names = list(config.variants)

    def at(run: RunConfig) -> float:
        return 400.0 if run.variant in names[2:4] and run.seeds.split == 1001 else math.inf

    first = OPTIMIZERS.wanted(config, Rows())
    rows = invented(tmp_path, [(run, at(run)) for run in first])[1]
    chosen = OPTIMIZERS.wanted(config, rows)[len(first) :]
    picked = [{k: v for k, v in config.variants[name].items() if k.endswith((".lr", ".wd"))} for name in names[2:4]]
    assert [(run.optimizer.lr, run.optimizer.wd) for run in chosen[::2]] == [(p["optimizer.lr"], p["optimizer.wd"]) for p in picked]


def test_optimizers_refuse_seeds_of_the_tuning() -> None:
    config = OPTIMIZERS.PRESETS["quick"]()
    for first in (995, 1002):
        with pytest.raises(ConfigError, match="first_seed"):
            OPTIMIZERS.study(replace(config, first_seed=first))
    for first in (0, 994, 1003):
        OPTIMIZERS.study(replace(config, first_seed=first))
    with pytest.raises(ConfigError, match="variants"):
        OPTIMIZERS.study(replace(config, variants={}))


def test_optimizers_in_two_stages(tmp_path: Path) -> None:
    config = small("grokking-optimizers", variants=["AdamW 0.001 2", "AdamW 0.002 1", "Muon 0.03 0.1 1"])
    result = shoal.run(OPTIMIZERS.study(config), tmp_path, progress=False)
    assert len(result.rows) == 3 * 3 + 2 * 2 and {row["status"] for row in result.rows} == {"completed"}
    assert sorted(row["variant"] for row in OPTIMIZERS.fresh(result.rows)) == ["AdamW", "AdamW", "Muon", "Muon"]
    steps = [row["seconds"] for row in result.rows]
    again = shoal.run(OPTIMIZERS.study(config), tmp_path, progress=False)
    assert [row["seconds"] for row in again.rows] == steps, "nothing is trained twice"


@pytest.mark.parametrize("name", NAMES)
def test_another_axis_is_not_pooled(name: str) -> None:
    """What the study does not vary by itself makes claims of its own."""
    config = override(MODULES[name].PRESETS["full"](), {"grid.task.p": [59, 97]})
    texts = [claim.text for claim in MODULES[name].study(config).claims]
    alone = len(MODULES[name].study(MODULES[name].PRESETS["full"]()).claims)
    assert len(set(texts)) == len(texts)
    assert len(texts) == 2 * alone and [sum(f"p = {p}" in text for text in texts) for p in (59, 97)] == [alone] * 2
