"""Rows: selection, grouping, curves, and times to a threshold with their censoring."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from shoal.config import SGD, RunConfig, flatten, run_id, with_seed, with_values
from shoal.results import Rows, Store
from shoal.results.rows import lower_is_better


def store_of(
    directory: Path, runs: Sequence[RunConfig], curves: Sequence[Mapping[str, Sequence[float]]], outcome: Sequence[tuple[str, int]] | None, every: int = 10
) -> Store:
    """One fleet; curves[r][metric] is evaluated at steps 0, every, 2 every, ..."""
    store = Store.open(directory, {"study": "demo", "config": {}})
    model = {"parameters": 7, "flops": {"assignment": 42, "products": 30, "hardware": 50}}
    store.start_fleet("aa", {"runs": [{"id": run_id(run), "config": flatten(run)} for run in runs], "model": model, "data": [{"rows": 9}] * len(runs)})
    names = sorted({name for curve in curves for name in curve})
    lines = [(s * every, r, name, value) for r, curve in enumerate(curves) for name, values in curve.items() for s, value in enumerate(values)]
    for chunk in (lines[::2], lines[1::2]):  # out of order, over two parts, one metric a line: nothing may depend on it
        columns = {name: np.array([value if metric == name else np.nan for _, _, metric, value in chunk]) for name in names}
        store.append("aa", {"step": np.array([line[0] for line in chunk]), "run": np.array([line[1] for line in chunk]), **columns})
    if outcome:
        store.finish_fleet("aa", {"runs": [{"status": status, "steps": steps, "seconds": 1.5} for status, steps in outcome], "seconds": 2.0})
    return store


def grid() -> list[RunConfig]:
    return [with_seed(with_values(RunConfig(), {"optimizer.wd": wd, "optimizer.lr": lr}), seed) for wd in (1.0, 0.0) for lr in (1e-2, 1e-3) for seed in (0, 1)]


@pytest.fixture
def rows(tmp_path: Path) -> Rows:
    curves = [{"val/accuracy": [0.1, 0.2, 0.9 - r / 100], "val/loss": [3.0, 1.0, 2.0 + r], "batch/grad_norm": [1.0]} for r in range(8)]
    return store_of(tmp_path, grid(), curves, [("completed", 20)] * 8).rows()


def test_keys_of_a_row(rows: Rows) -> None:
    row = rows[1]
    assert (row["id"], row["fleet"], row["status"], row["steps"], row["seconds"]) == (run_id(grid()[1]), "aa", "completed", 20, 1.5)
    assert (row["optimizer.lr"], row["seeds.init"], row["task.type"], row["parameters"], row["flops.products"]) == (1e-2, 1, "modular", 7, 30)
    assert row["config.steps"] == 1000 and row.config["steps"] == 1000  # the budget; "steps" is what was made
    assert row["final.val/accuracy"] == pytest.approx(0.89) and row["final.val/loss"] == 3.0
    assert row["best.val/accuracy"] == pytest.approx(0.89) and row["best.val/loss"] == 1.0
    assert row["data"] == {"rows": 9} and row["measures"] == {}
    assert row["final.batch/grad_norm"] == 1.0 and "best.batch/grad_norm" not in row and "final.test/accuracy" not in row
    assert {"steps", "final.val/loss", "optimizer.lr", "measures"} <= set(row) and len(row) == len(list(row))
    assert lower_is_better("val/loss") and not lower_is_better("val/exact") and lower_is_better("learning_rate") is None
    with pytest.raises(TypeError):
        row["id"] = "other"  # pyright: ignore[reportIndexIssue]


def test_where_column_values(rows: Rows) -> None:
    assert len(rows.where({"optimizer.wd": 1})) == 4 and len(rows.where({"optimizer.wd": 1.0, "seeds.init": 1})) == 2
    assert len(rows.where({"evaluate": ("train", "val")})) == 8 and len(rows.where({"optimizer.wd": 7})) == 0
    assert rows.column("final.val/accuracy") == pytest.approx([0.9 - r / 100 for r in range(8)])
    assert rows.column("seeds.init").dtype.kind == "i" and rows.column("task.operation").tolist() == ["div"] * 8
    assert np.isnan(rows.column("stop_metric")).all()
    assert rows.values("optimizer.lr") == [1e-3, 1e-2] and rows.values("stop_metric") == [None]
    for slip in (lambda: rows.where({"optimizer.lrr": 1}), lambda: rows.column("optimizer.lrr"), lambda: rows.groups(["optimizer.lrr"])):
        with pytest.raises(KeyError, match=r"did you mean 'optimizer\.lr'"):
            slip()
    assert len(rows[2:4]) == 2 and isinstance(rows[2:4], Rows)


def test_groups_are_ordered_and_complete(rows: Rows) -> None:
    groups = rows.groups(["optimizer.wd", "optimizer.lr"])
    assert [tuple(values.values()) for values, _ in groups] == [(0.0, 1e-3), (0.0, 1e-2), (1.0, 1e-3), (1.0, 1e-2)]
    assert all(row["optimizer.wd"] == values["optimizer.wd"] and row["optimizer.lr"] == values["optimizer.lr"] for values, part in groups for row in part)
    assert sum(len(part) for _, part in groups) == 8
    assert [(values, len(part)) for values, part in rows.groups([])] == [({}, 8)]
    assert Rows().groups(["anything"]) == [] and Rows().column("anything").size == 0


def test_differing_names_what_varies(tmp_path: Path, rows: Rows) -> None:
    assert rows.differing() == ["optimizer.lr", "optimizer.wd", "seeds.split", "seeds.init", "seeds.order"]
    mixed = store_of(tmp_path / "mixed", [RunConfig(), RunConfig(optimizer=SGD(), steps=500)], [{}, {}], None).rows()
    assert {"optimizer.type", "optimizer.momentum", "optimizer.beta1", "config.steps"} <= set(mixed.differing())
    assert np.isnan(mixed.column("optimizer.momentum")[0]) and mixed.column("optimizer.momentum")[1] == 0.0
    assert len(mixed.where({"optimizer.momentum": 0.0})) == 1


def test_curves_leave_out_what_was_not_recorded(rows: Rows) -> None:
    steps, values = rows.curve("val/accuracy")[3]
    assert steps.tolist() == [0, 10, 20] and values == pytest.approx([0.1, 0.2, 0.87])
    assert rows.curve("batch/grad_norm")[3][0].tolist() == [0]
    assert rows.curve("test/loss")[0][0].size == 0
    assert rows.metrics == ["batch/grad_norm", "val/accuracy", "val/loss"]


def test_running_rows_know_how_far_they_are(tmp_path: Path) -> None:
    running = store_of(tmp_path, grid()[:2], [{"val/loss": [3.0, 2.0]}, {}], None).rows()
    assert [(row["status"], row["steps"], row["seconds"]) for row in running] == [("running", 10, None), ("running", 0, None)]


def slow_reached(values: Sequence[float], threshold: float, sustained: int, lower: bool) -> int | None:
    for i in range(len(values) - sustained + 1):
        if all((v <= threshold if lower else v >= threshold) for v in values[i : i + sustained]):
            return i
    return None


@pytest.mark.parametrize("sustained", [1, 3, 5])
@pytest.mark.parametrize("metric", ["val/accuracy", "val/loss"])
def test_reached_equals_a_plain_loop(tmp_path: Path, sustained: int, metric: str) -> None:
    generator = np.random.default_rng(sustained)
    runs = [with_seed(RunConfig(), seed) for seed in range(40)]
    lengths = generator.integers(1, 30, 40)
    hit = {1: 0.1, 3: 0.4, 5: 0.7}[sustained]  # at the threshold or past it: 0.5 and one side
    odds = [1 - hit, hit / 2, hit / 2] if metric == "val/accuracy" else [hit / 2, hit / 2, 1 - hit]
    curves = [{metric: generator.choice([0.2, 0.5, 0.8], n, p=odds)} for n in lengths]
    times, observed = store_of(tmp_path, runs, curves, [("completed", 100)] * 40).rows().reached(metric, 0.5, sustained)
    expected = [slow_reached(curve[metric], 0.5, sustained, metric == "val/loss") for curve in curves]
    assert observed.tolist() == [found is not None for found in expected] and 0 < observed.sum() < 40
    assert times.tolist() == [10 * (found if found is not None else n - 1) for found, n in zip(expected, lengths, strict=True)]


def test_reached_censors_and_counts_stopped_runs(tmp_path: Path) -> None:
    stops = with_values(RunConfig(), {"stop_metric": "val/accuracy", "stop_at": 0.95, "stop_evaluations": 2})
    runs = [with_seed(stops, seed) for seed in range(6)]
    up = [0.1, 0.5, 0.95, 0.96]
    curves = [
        {"val/accuracy": up, "train/accuracy": [0, 0, 0, 1]},
        {"val/accuracy": up},
        {"val/accuracy": up},
        {"val/accuracy": [0.1, 0.99, 0.2, 0.3]},
        {"val/accuracy": [0.1, 0.2]},
        {},
    ]
    outcome = [("finished", 30), ("completed", 30), ("dead", 30), ("completed", 30), ("dead", 10), ("dead", 0)]
    rows = store_of(tmp_path, runs, curves, outcome).rows()
    times, observed = rows.reached("val/accuracy", 0.95)
    assert observed.tolist() == [True, False, False, False, False, False]  # stopped by its rule, it counts with two evaluations; the others do not
    assert times.tolist() == [20, 30, 1000, 30, 1000, 1000]  # seen until 30; a dead run would not have got there in its whole budget of 1000
    assert rows.reached("val/accuracy", 0.96)[1].tolist() == [False] * 6  # stricter than the stop rule: two evaluations are not five
    assert rows.reached("train/accuracy", 0.9)[1].tolist() == [False] * 6  # nor does the rule speak of another metric
    times, observed = rows.reached("val/accuracy", 0.95, sustained=1)
    assert times.tolist() == [20, 20, 20, 10, 1000, 1000] and observed.sum() == 4  # 0.95 is reached by 0.95, in float32 too


def test_frame(rows: Rows, monkeypatch: pytest.MonkeyPatch) -> None:
    frame = rows.frame()
    assert len(frame) == 8 and frame["optimizer.wd"].tolist() == [1.0] * 4 + [0.0] * 4
    assert frame["final.val/loss"].tolist() == [2.0 + r for r in range(8)] and "measures" not in frame
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(ImportError, match=r"shoal\[notebook\]"):
        rows.frame()


def test_a_thousand_runs_of_two_thousand_evaluations(tmp_path: Path) -> None:
    store = Store.open(tmp_path, {"study": "demo", "config": {}})
    config = flatten(RunConfig())
    store.start_fleet("aa", {"runs": [{"id": f"{r:012x}", "config": {**config, "seeds.init": r}} for r in range(1000)]})
    step, run = np.repeat(np.arange(2000), 1000), np.tile(np.arange(1000), 2000)
    accuracy = (step / 2000 + run / 4000).astype(np.float32)
    for part in np.array_split(np.arange(step.size), 4):
        store.append("aa", {"step": step[part], "run": run[part], "val/accuracy": accuracy[part], "val/loss": -accuracy[part]})
    begun: Any = time.perf_counter()
    rows = store.rows()
    times, observed = rows.reached("val/accuracy", 0.5)
    final = rows.column("final.val/loss")
    assert time.perf_counter() - begun < 8
    assert observed.all() and times == pytest.approx(np.maximum(1000 - np.arange(1000) / 2, 0), abs=1.01)
    assert final == pytest.approx(-(1999 / 2000 + np.arange(1000) / 4000)) and not math.isnan(final.sum())
