"""A measured value against a measured number: medians, bands and marks are what brute force says; the same rows give the same bytes."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
from invented import invented

from shoal.config import RunConfig, run_id, with_seed, with_values
from shoal.results import Rows
from shoal.results.figures import PALETTE
from shoal.results.profiles import medians, profile

WDS, NAMES, LENGTHS = [0.0, 1.0], ["a", "b", "c"], [3, 8, 16, 32]
MARKS = {"trained at": lambda row: row["batch_size"]}
LEVELS = {"chance": lambda row: 1 / row["task.p"]}


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Rows:
    """3 variants x 2 decays x 4 seeds, random accuracies; one run was not measured, one at two lengths only."""
    generator = np.random.default_rng(1)
    runs = [with_seed(with_values(RunConfig(), {"variant": name, "optimizer.wd": wd}), seed) for name in NAMES for wd in WDS for seed in range(4)]
    store, _ = invented(tmp_path_factory.mktemp("profile"), [(run, math.inf) for run in runs])
    for place, run in enumerate(runs):
        lengths = {0: [], 5: LENGTHS[:2]}.get(place, LENGTHS)
        store.add_measure(run_id(run), "lengths", [{"length": n, "accuracy": generator.random()} for n in lengths])
    return store.rows()


def brute(rows: Rows, name: str, wd: float) -> dict[int, list[float]]:
    part = [row for row in rows if row["variant"] == name and row["optimizer.wd"] == wd and row["measures"]["lengths"]]
    found = {n: [e["accuracy"] for row in part for e in row["measures"]["lengths"] if e["length"] == n] for n in LENGTHS}
    return {n: values for n, values in found.items() if len(values) == len(part)}


def test_a_line_a_value_and_a_panel_a_cell(rows: Rows) -> None:
    figure = profile("lengths", "length", "accuracy", by=["variant", "optimizer.wd"], marks=MARKS, levels=LEVELS)
    drawing = figure.draw(rows)
    panels: list[Any] = drawing.axes
    assert [axis.get_title() for axis in panels] == ["wd = 0, n = 3 to 4 a line", "wd = 1, n = 4 a line"]
    for axis, wd in zip(panels, WDS, strict=True):
        lines = [line for line in axis.lines if line.get_color() in PALETTE and len(line.get_xdata())]
        for line, name in zip(lines, NAMES, strict=True):
            wanted = brute(rows, name, wd)
            assert line.get_xdata().tolist() == list(wanted) and line.get_ydata() == pytest.approx([np.median(x) for x in wanted.values()])
            assert line.get_color() == PALETTE[NAMES.index(name)]
        for band, name in zip(axis.collections, NAMES, strict=True):
            wanted = brute(rows, name, wd)
            corners = {(round(float(x), 6), round(float(y), 6)) for x, y in band.get_paths()[0].vertices}
            assert {(n, round(end, 6)) for n, x in wanted.items() for end in (min(x), max(x))} <= corners
        others = [line for line in axis.lines if line.get_color() not in PALETTE and len(line.get_xdata())]
        assert [line.get_xdata()[0] for line in others if line.get_xdata()[0] == line.get_xdata()[1]] == [512]
        assert [line.get_ydata()[0] for line in others if line.get_ydata()[0] == line.get_ydata()[1]] == pytest.approx([1 / 97])
    assert [text.get_text() for text in drawing.legends[0].get_texts()] == [*NAMES, "trained at 512", "chance 0.01031"]
    assert panels[0].get_ylabel() == "accuracy" and {axis.get_xlabel() for axis in panels} == {"length"}


@pytest.mark.parametrize("logx", [False, True])
def test_the_same_bytes_and_no_loose_ends(rows: Rows, logx: bool) -> None:
    figure = profile("lengths", "length", "accuracy", line="optimizer.wd", by=["variant", "optimizer.wd"], marks=MARKS, logx=logx)
    text = figure.svg(rows)
    assert text == figure.svg(Rows(list(rows))) and len(text.encode()) < 200_000 and figure.name == "lengths-accuracy-variant"
    ElementTree.fromstring(text)
    ids = re.findall(r'\bid="([^"]+)"', text)
    assert len(ids) == len(set(ids))
    assert all(axis.get_xscale() == ("log" if logx else "linear") for axis in figure.draw(rows).axes[:3])


def test_nothing_measured_yet(rows: Rows) -> None:
    for part in (Rows(), rows[:1]):
        assert "no lengths measured yet" in "".join(text.get_text() for text in profile("lengths", "length", "accuracy").draw(part).axes[0].texts)
    at, table = medians(rows[:1], "lengths", "length", "accuracy")
    assert at.size == 0 and table.shape == (0, 0)


def test_many_lines_have_no_bands(tmp_path: Path) -> None:
    runs = [with_values(RunConfig(), {"variant": str(i), "steps": 10}) for i in range(len(PALETTE) + 1)]
    store, _ = invented(tmp_path, [(run, math.inf) for run in runs])
    for run in runs:
        store.add_measure(run_id(run), "lengths", [{"length": n, "accuracy": 0.5} for n in LENGTHS])
    (axis,) = profile("lengths", "length", "accuracy").draw(store.rows()).axes
    assert not axis.collections and axis.get_title() == "n = 1 a line"
