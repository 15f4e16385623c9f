"""Heat maps, times in lines, times and values against a number: what is drawn is what brute force says, and files stay small and the same."""

from __future__ import annotations

import itertools
import math
import re
from dataclasses import replace
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
from invented import invented
from matplotlib.collections import QuadMesh

from shoal.config import ModularConfig, RunConfig, with_seed, with_values
from shoal.results import Figure, Rows, heatmap, times, times_against, values_against
from shoal.results.comparisons import SCALE, Shade, mean_of, median_steps, share_reached
from shoal.results.figures import DOTS

BASE = RunConfig(task=ModularConfig(train_fraction=0.5, val_fraction=0.2), steps=10_000)
WDS, LRS, OPERATIONS = [0.0, 0.3, 1.0], [1e-3, 3e-3, 1e-2, 3e-2], ["add", "div"]
METRIC = "val/accuracy"


@pytest.fixture(scope="module")
def grid(tmp_path_factory: pytest.TempPathFactory) -> Rows:
    """2 operations x 3 decays x 4 rates x 4 seeds at random times; one cell never, one left out, one run dead."""
    generator = np.random.default_rng(3)
    runs = []
    for operation, wd, lr in itertools.product(OPERATIONS, WDS, LRS):
        at = 2000 * np.exp(generator.normal(0, 1, 4))
        at[(generator.random(4) < 0.25) | (at > 9000)] = np.inf
        at = np.full(4, np.inf) if (operation, wd, lr) == ("add", 1.0, 3e-2) else at
        run = with_values(BASE, {"task.operation": operation, "optimizer.wd": wd, "optimizer.lr": lr})
        if (operation, wd, lr) != ("div", 0.0, 1e-3):
            runs += [(with_seed(run, seed), t) for seed, t in enumerate(at)]
    return invented(tmp_path_factory.mktemp("grid"), runs, dead=[5])[1]


def median(part: Rows) -> float:
    """Of one budget: the censored are later than all others, so the median is that of the sorted times (the lower of two middle ones)."""
    t, observed = part.reached(METRIC, 0.99)
    return float(np.sort(np.where(observed, t, np.inf))[(len(t) - 1) // 2])


def cells(axis: Any) -> Any:
    (mesh,) = [one for one in axis.collections if isinstance(one, QuadMesh)]
    return np.ma.asarray(mesh.get_array())


def checked(figure: Figure, rows: Rows) -> str:
    """Its text, after what holds for every figure."""
    text = figure.svg(rows)
    assert text == figure.svg(Rows(list(rows))) and len(text.encode()) < 200_000 and "<image" not in text and "<!--" not in text
    ElementTree.fromstring(text)
    ids = re.findall(r'\bid="([^"]+)"', text)
    assert len(ids) == len(set(ids))
    assert {name for pair in re.findall(r'href="#([^"]+)"|url\(#([^)]+)\)', text) for name in pair if name} <= set(ids)
    return text


def test_heat_map_shows_medians_and_what_was_never_reached(grid: Rows) -> None:
    figure = heatmap("optimizer.lr", "optimizer.wd", median_steps(METRIC, 0.99), by=["task.operation", "optimizer.wd"])
    checked(figure, grid)
    drawing = figure.draw(grid)
    panels: list[Any] = drawing.axes[:2]
    assert [axis.get_title() for axis in panels] == ["operation = add", "operation = div"]
    for axis, operation in zip(panels, OPERATIONS, strict=True):
        shown = cells(axis)
        words = {(text.get_position()[1] - 0.5, text.get_position()[0] - 0.5): text.get_text() for text in axis.texts}
        hatched = {tuple(int(x) for x in reversed(patch.get_xy())) for patch in axis.patches}
        for i, wd in enumerate(WDS):
            for j, lr in enumerate(LRS):
                part = grid.where({"task.operation": operation, "optimizer.wd": wd, "optimizer.lr": lr})
                if not part:
                    assert shown.mask[i, j] and words[i, j] == "" and (i, j) not in hatched
                elif math.isinf(median(part)):
                    assert shown.mask[i, j] and words[i, j] == "> 10k" and (i, j) in hatched
                else:
                    assert shown[i, j] == median(part) and (i, j) not in hatched
                    text = words[i, j]
                    assert float(text.removesuffix("k")) * (1000 if text.endswith("k") else 1) == pytest.approx(median(part), rel=0.051)
    assert drawing.get_supxlabel() == "n = 4 a cell"


def test_heat_map_of_shares_and_means(grid: Rows) -> None:
    drawing = heatmap("optimizer.lr", "task.operation", share_reached(METRIC, 0.99)).draw(grid)
    shown = cells(drawing.axes[0])
    for i, operation in enumerate(OPERATIONS):
        for j, lr in enumerate(LRS):
            assert shown[i, j] == pytest.approx(grid.where({"task.operation": operation, "optimizer.lr": lr}).reached(METRIC, 0.99)[1].mean())
    assert drawing.get_supxlabel() == "n = 8 to 12 a cell" and not drawing.axes[0].patches
    means = cells(heatmap("optimizer.lr", "optimizer.wd", mean_of(METRIC)).draw(grid).axes[0])
    assert means[2, 1] == pytest.approx(grid.where({"optimizer.wd": 1.0, "optimizer.lr": 3e-3}).column(f"final.{METRIC}").mean())
    assert mean_of("val/loss").low_is_good and not mean_of(METRIC).low_is_good and math.isnan(mean_of("nothing").of(grid))


@pytest.mark.parametrize("values", [[math.inf] * 4, [math.nan] * 4, [5.0] * 4, [0.0, 0.0, -1.0, -1.0], [math.nan, 1.0, math.inf, 3.0]])
def test_heat_map_of_odd_values(grid: Rows, values: list[float]) -> None:
    shade = Shade("odd", lambda part: values[LRS.index(part[0]["optimizer.lr"])], "odd", log=True)
    checked(heatmap("optimizer.lr", "optimizer.wd", shade), grid)


def test_heat_map_leaves_out_numbers_that_do_not_fit(tmp_path: Path) -> None:
    runs = [
        (with_values(BASE, {"optimizer.lr": lr, "optimizer.wd": wd, "task.operation": operation}), 500.0 + 1e5 * lr)
        for lr in np.linspace(1e-3, 0.05, 12).round(5).tolist()
        for wd in np.linspace(0, 2, 11).round(3).tolist()
        for operation in ("add", "sub", "mul", "div")
    ]
    rows = invented(tmp_path, runs, every=1000)[1]
    figure = heatmap("optimizer.lr", "optimizer.wd", median_steps(METRIC, 0.99, sustained=1), by=["task.operation"])
    checked(figure, rows)
    assert not any(axis.texts for axis in figure.draw(rows).axes)


def test_colours_are_even_in_lightness() -> None:
    red, green, blue = np.array([SCALE(i)[:3] for i in range(SCALE.N)]).T
    assert (np.diff(0.2126 * red + 0.7152 * green + 0.0722 * blue) > 0).all()


def test_times(tmp_path: Path) -> None:
    """30 variants, drawn in the order their study gave them; runs that never got there at the budget, dead ones apart."""
    generator = np.random.default_rng(5)
    names = ["baseline", *(f"variant {i}" for i in generator.permutation(29))]
    runs = []
    for i, name in enumerate(names):
        at = 3000 * np.exp(generator.normal(0, 0.4, 10))
        at[generator.random(10) < (0.7 if i == 3 else 0.1)] = np.inf
        runs += [(with_seed(replace(BASE, variant=name), seed), t) for seed, t in enumerate(at)]
    shuffled = [runs[i] for i in generator.permutation(len(runs))]
    dead = [next(i for i, (run, at) in enumerate(shuffled) if run.variant == names[3] and math.isinf(at))]
    rows = invented(tmp_path, shuffled, dead=dead, record={"config": {"variant": names}})[1]
    assert rows.values("variant") == names
    figure = times(METRIC, 0.99, by=["variant"], baseline={"variant": "baseline"})
    checked(figure, rows)
    drawing = figure.draw(rows)
    axis: Any = drawing.axes[0]
    reached = {name: rows.where({"variant": name}).reached(METRIC, 0.99) for name in names}
    labels = [f"{name}  ({int(observed.sum())} of 10)" for name, (_, observed) in reached.items()]
    assert [text.get_text() for text in axis.get_yticklabels()] == labels and axis.yaxis_inverted()
    lines = [(line, np.array(line.get_xdata()), np.array(line.get_ydata())) for line in axis.lines]
    assert [x[0] for line, x, _ in lines if line.get_linestyle() == "--" and x.size] == [median(rows.where({"variant": "baseline"}))]
    for place, name in enumerate(names):
        times_, observed = reached[name]
        here = [(line, x) for line, x, y in lines if x.size and np.round(y.mean()) == place and np.ptp(y) < 0.9 and line.get_linestyle() == "None"]
        assert np.array_equal(np.sort(np.concatenate([x for line, x in here if line.get_marker() == "o"])), np.sort(times_[observed]))
        assert np.concatenate([x for line, x in here if line.get_marker() in ">x"] or [[]]).tolist() == times_[~observed].tolist()
        bars = [x[0] for line, x, y in lines if x.size == 2 and x[0] == x[1] and np.mean(y) == place and line.get_linewidth() == 2.2]
        assert bars == ([median(rows.where({"variant": name}))] if math.isfinite(median(rows.where({"variant": name}))) else [])
    assert sum(x.size for line, x, _ in lines if line.get_marker() == "x") == 1
    assert {"died before", "median of baseline", "not there by its last step"} <= {text.get_text() for text in drawing.legends[0].get_texts()}


def test_times_of_very_many_runs(tmp_path: Path) -> None:
    runs = [(with_seed(replace(BASE, variant=f"a variant with a long name {i}"), s), 500.0 + 10 * i + s) for i in range(40) for s in range(26)]
    rows = invented(tmp_path, runs, every=500)[1]
    figure = times(METRIC, 0.99, by=["variant"], sustained=1)
    checked(figure, rows)
    axis = figure.draw(rows).axes[0]
    assert sum(len(line.get_xdata()) for line in axis.lines if line.get_marker() == "o") <= DOTS and "(one run in 2 shown)" in axis.get_xlabel()  # pyright: ignore


@pytest.fixture(scope="module")
def fractions(tmp_path_factory: pytest.TempPathFactory) -> Rows:
    generator = np.random.default_rng(4)
    runs = []
    for operation in OPERATIONS:
        for share in (0.2, 0.4, 0.5, 0.7):
            at = 300 * np.exp(1 / share + generator.normal(0, 0.3, 7))
            runs += [(with_seed(with_values(BASE, {"task.operation": operation, "task.train_fraction": share}), s), t) for s, t in enumerate(at)]
    return invented(tmp_path_factory.mktemp("fractions"), [(run, at if at < 9000 else math.inf) for run, at in runs])[1]


@pytest.mark.parametrize("logx", [False, True])
def test_times_against(fractions: Rows, logx: bool) -> None:
    figure = times_against("task.train_fraction", METRIC, 0.99, by=["task.operation", "task.train_fraction"], logx=logx)
    checked(figure, fractions)
    drawing = figure.draw(fractions)
    above, below = drawing.axes
    assert above.get_yscale() == "log" and (below.get_xscale() == "log") == logx
    assert [text.get_text() for text in drawing.legends[0].get_texts()] == ["operation = add (n = 7)", "operation = div (n = 7)"]
    lines = [line for line in above.lines if str(line.get_label()).startswith("operation")]
    for i, operation in enumerate(OPERATIONS):
        shares = [0.2, 0.4, 0.5, 0.7]
        parts = [fractions.where({"task.operation": operation, "task.train_fraction": share}) for share in shares]
        medians = np.array([median(part) for part in parts])
        assert np.array_equal(lines[i].get_ydata(), np.where(np.isinf(medians), np.nan, medians), equal_nan=True)  # pyright: ignore
        assert np.allclose(lines[i].get_xdata(), shares, rtol=0.12)  # pyright: ignore
        assert np.allclose(below.lines[i].get_ydata(), [1 - part.reached(METRIC, 0.99)[1].mean() for part in parts])  # pyright: ignore


def test_values_against(fractions: Rows) -> None:
    figure = values_against("task.train_fraction", METRIC, by=["task.operation"])
    checked(figure, fractions)
    (axis,) = figure.draw(fractions).axes
    lines = [line for line in axis.lines if str(line.get_label()).startswith("operation")]
    for line, operation in zip(lines, OPERATIONS, strict=True):
        best = [fractions.where({"task.operation": operation, "task.train_fraction": share}).column(f"best.{METRIC}") for share in (0.2, 0.4, 0.5, 0.7)]
        assert np.allclose(line.get_ydata(), [np.median(x) for x in best])  # pyright: ignore
    assert sum(len(line.get_xdata()) for line in axis.lines if line.get_marker() == ".") == len(fractions)  # pyright: ignore


def test_a_study_without_values_yet(tmp_path: Path) -> None:
    store, _ = invented(tmp_path, [(BASE, math.inf), (with_seed(BASE, 1), math.inf)], running=True)
    figures = [
        heatmap("optimizer.lr", "optimizer.wd", median_steps(METRIC, 0.99)),
        heatmap("optimizer.lr", "optimizer.wd", mean_of("val/nothing")),
        times(METRIC, 0.99, by=["optimizer.lr"], baseline={"optimizer.lr": 1.0}),
        times("val/nothing", 0.99, by=["optimizer.lr"]),
        times_against("optimizer.lr", METRIC, 0.99),
        times_against("optimizer.lr", "val/nothing", 0.99),
        times_against("task.operation", METRIC, 0.99),
        values_against("optimizer.lr", METRIC),
        values_against("optimizer.lr", "val/nothing"),
        values_against("task.operation", METRIC),
    ]
    for figure in figures:
        for rows in (store.rows(), Rows()):
            checked(figure, rows)
    with pytest.raises(KeyError, match="did you mean"):
        heatmap("optimizer.lr", "optimizer.wdd", median_steps(METRIC, 0.99)).draw(store.rows())
