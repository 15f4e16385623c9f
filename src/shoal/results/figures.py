"""Figures as functions of rows, drawn as small SVG: the same rows give the same bytes, on any machine with the same matplotlib.

Makers for what most studies need: curves (median line, band, single runs), survival (share of runs not there yet), dots (one dot a run). A study's own
figure is a function Rows -> matplotlib Figure made with ``canvas``. No pyplot, and matplotlib's settings are changed only while drawing.

    curves(("train/accuracy", "val/accuracy"), by=("optimizer.wd",), logx=True, threshold=0.99).svg(rows)    # text of an SVG file
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from textwrap import fill
from typing import Any
from zlib import crc32

import matplotlib
import numpy as np
from matplotlib import style
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure as Drawing
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator
from numpy.typing import NDArray

from shoal.results.rows import Rows, lower_is_better
from shoal.results.statistics import kaplan_meier, survival_median
from shoal.results.wording import number, plural, setting

TRAIN, VAL, TEST = "#d9730d", "#1667b0", "#12836b"  # told apart with every common colour blindness, and in grey
PALETTE = (VAL, TRAIN, TEST, "#b8417f", "#7a5cc9", "#8c7a1f", "#3fa7d6", "#5b6470")
INK, MUTED, GRID = "#1d2530", "#66707d", "#e3e7ec"
SPLITS = {"train": ("training", TRAIN), "val": ("validation", VAL), "test": ("test", TEST), "batch": ("training batches", "#9aa3ad")}
SINGLE_RUNS, SINGLE_LINES = 8, 48  # up to so many runs of a group are drawn one by one too, while there are not more such lines in all
POINTS, BUDGET = 400, 5000  # points per line at most, and of all lines together: keeps a file below 200 kB
PANELS, DOTS = 12, 1000
WIDTH = 8.2  # inches
STYLE: dict[Any, Any] = {
    "svg.hashsalt": "shoal", "svg.fonttype": "path", "text.parse_math": False, "figure.facecolor": "white", "figure.dpi": 100,
    "font.family": "DejaVu Sans", "font.size": 9.5, "text.color": INK, "legend.frameon": False, "legend.fontsize": 8.8, "legend.handlelength": 1.6,
    "axes.titlesize": 9.5, "axes.titlelocation": "left", "axes.titlecolor": INK, "axes.labelcolor": MUTED, "axes.labelsize": 9, "axes.edgecolor": "#b6bec8",
    "axes.linewidth": 0.8, "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "axes.axisbelow": True,
    "grid.color": GRID, "grid.linewidth": 0.7, "lines.linewidth": 1.9, "lines.solid_capstyle": "round",
    "xtick.color": MUTED, "ytick.color": MUTED, "xtick.labelsize": 8.5, "ytick.labelsize": 8.5, "xtick.major.size": 3, "ytick.major.size": 0,
}  # fmt: skip


@dataclass(frozen=True)
class Figure:
    name: str  # the file's name, without .svg
    draw: Callable[[Rows], Drawing]
    caption: str = ""

    def svg(self, rows: Rows) -> str:
        """The text of an SVG file: no date, no metadata, no address outside itself; ids begin with a hash of the figure's name, so several fit in one page."""
        with style.context("default"), matplotlib.rc_context(STYLE):
            sink = io.StringIO()
            drawing = self.draw(rows)
            FigureCanvasSVG(drawing).print_svg(sink, metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
        text = sink.getvalue()
        text = text[text.index("<svg") :]
        text = re.sub(r' d="[^"]+"', _shorter, text)
        text = re.sub(r"<!--.*?-->|<g id=\"[^\"]+\"/>", "", text, flags=re.S)  # a text's letters again; what draws nothing
        text = re.sub(r' transform="translate\((\S+) 0\)"/>', lambda x: f' x="{float(x[1]):.0f}"/>', text)  # letters, in hundredths of their size
        text = re.sub(r' [xy]="\d+\.\d+"', lambda x: f'{x[0][:4]}{float(x[0][4:-1]):.2f}"', text)
        text = re.sub(r"\n\s+", "\n", text.replace("DejaVuSans-", "g"))
        text = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>f{crc32(self.name.encode()):08x}", text)
        return re.sub(r"<style[^>]*>.*?</style>", "", text, flags=re.S).replace("<svg ", '<svg stroke-linejoin="round" stroke-linecap="butt" ', 1)


def canvas(height: float = 3.6, columns: int = 1, lines: int = 1) -> tuple[Drawing, list[Axes]]:
    """An empty drawing in the house style and its axes, row by row."""
    drawing = Drawing(figsize=(WIDTH, height), layout="constrained")
    return drawing, list(drawing.subplots(lines, columns, squeeze=False, sharex=True, sharey=True).flat)


def nothing(message: str) -> Drawing:
    drawing, (axes,) = canvas(1.2)
    axes.set_axis_off()
    axes.text(0.5, 0.5, message, ha="center", va="center", color=MUTED)
    return drawing


def _shorter(path: re.Match[str]) -> str:
    """The same path in fewer bytes: to a tenth of a point when it is long (data), else to a hundredth (markers, letters)."""
    digits = r"(\.\d)\d+" if len(path[0]) > 500 else r"(\.\d\d)\d+"
    return re.sub(r"([MLQCz]) ?", r"\1", re.sub(digits, r"\1", path[0]).replace(" \n", "").replace("\n", ""))


def curves(
    metrics: str | Sequence[str],
    *,
    by: Sequence[str] = (),
    logx: bool = False,
    logy: bool = False,
    ylabel: str | None = None,
    threshold: float | None = None,
    name: str | None = None,
    caption: str | None = None,
) -> Figure:
    """Metrics over steps: median over runs (line), range (band), up to 8 runs of a group as thin lines; past 8 groups in a panel medians only.

    Several metrics: one panel for every combination of the values of ``by``, coloured by metric. One metric: one panel, coloured by combination.
    A run that ended keeps its last value (stopped runs have converged, dead ones are frozen), so the median is over all runs at every step; an
    unfinished run is drawn as far as it got. A log axis begins at the first evaluation after step 0.
    """
    wanted = (metrics,) if isinstance(metrics, str) else tuple(metrics)

    def draw(rows: Rows) -> Drawing:
        shown = [metric for metric in wanted if metric in rows.metrics]
        if not shown:
            return nothing(f"no values of {' or '.join(wanted)} yet")
        groups = rows.groups(by)
        panels = groups[:PANELS] if len(shown) > 1 else [({}, rows)]
        columns = 1 if len(panels) == 1 else 2 if len(panels) in (2, 4) else 3
        tall, bands = math.ceil(len(panels) / columns), len(shown) > 1 or len(groups) <= len(PALETTE)
        log = logx and any((steps > 0).any() for metric in shown for steps, _ in rows.curve(metric))
        drawing, axes = canvas(0.7 + 2.3 * tall if tall * columns > 1 else 3.7, columns, tall)
        for spare in axes[len(panels) :]:
            spare.set_axis_off()
        lines = len(shown) * len(panels) if len(shown) > 1 else len(groups)
        num_single = len(shown) * sum(len(part) for _, part in groups if len(part) <= SINGLE_RUNS)
        num_single = num_single if bands and num_single <= SINGLE_LINES else 0
        points = int(np.clip(BUDGET / (3 * lines + num_single), 25, POINTS))
        for axis, (values, part) in zip(axes, panels, strict=False):
            if len(shown) > 1:
                pieces = [(metric, part, *named) for metric, named in zip(shown, _distinct(shown), strict=True)]
                count = plural(len(part), "run")
                axis.set_title(fill(f"{setting(values)} (n = {len(part)})", 96 // columns) if values else count)
            else:
                pieces = [
                    (shown[0], some, f"{setting(v) or _named(shown[0])[0]} (n = {len(some)})", colour)
                    for (v, some), colour in zip(groups, colours(len(groups)), strict=True)
                ]
            for metric, some, label, colour in pieces:
                _lines(axis, some, metric, label, colour, log, points, bands, num_single > 0)
            scales(axis, log, logy, shown)
            if threshold is not None:
                axis.axhline(threshold, color=MUTED, linewidth=0.9, dashes=(4, 3), zorder=1.5)
                axis.text(1.01, threshold, number(threshold), transform=axis.get_yaxis_transform(), color=MUTED, fontsize=8, va="center")
        for i, axis in enumerate(axes[: len(panels)]):
            axis.set_xlabel("steps" if i >= len(panels) - columns else "")
            axis.set_ylabel((ylabel or _common(shown)) if i % columns == 0 else "")
            axis.tick_params(labelbottom=i >= len(panels) - columns)
        legend(drawing, axes[0])
        if len(shown) > 1 and len(groups) > len(panels):
            drawing.supxlabel(f"the first {len(panels)} of {len(groups)} settings", fontsize=8.5, color=MUTED)
        return drawing

    default = (
        f"Median over runs (line) and range (band: all runs up to {SINGLE_RUNS} a group, 10 to 90 % of them above); a run that ended keeps its last value."
    )
    return Figure(name or slug(*wanted, *by), draw, default if caption is None else caption)


def survival(
    metric: str, threshold: float, *, by: Sequence[str] = (), sustained: int = 5, logx: bool = True, name: str | None = None, caption: str | None = None
) -> Figure:
    """Share of runs that have not yet reached the threshold, over steps (Kaplan-Meier), with the 95 % band; a tick is a run last seen, not there yet."""

    def draw(rows: Rows) -> Drawing:
        groups = rows.groups(by)
        if metric not in rows.metrics:
            return nothing(f"no values of {metric} yet")
        drawing, (axis,) = canvas(3.4)
        timed = [(values, *part.reached(metric, threshold, sustained)) for values, part in groups]
        last = max(float(times.max()) for _, times, _ in timed)
        first = min([float(t) for _, times, observed in timed for t in times[observed & (times > 0)]], default=last / 10 or 1.0)
        log = logx and last > 0
        for (values, times, observed), colour in zip(timed, colours(len(groups)), strict=True):
            t, share, low, high = kaplan_meier(times, observed)
            estimate = survival_median(times, observed)
            median = number(estimate.value) if math.isfinite(estimate.value) else "not reached"
            t, share, low, high = (np.append(x, x[-1]) for x in (t, share, low, high))
            t[-1] = last
            t = np.maximum(t, first / 2) if log else t
            if len(groups) <= 3:
                axis.fill_between(t, low, high, step="post", color=colour, alpha=0.13, linewidth=0)
            axis.step(t, share, where="post", color=colour, label=f"{setting(values) or 'all runs'}: {int(observed.sum())} of {len(times)}, median {median}")
            seen = np.unique(np.maximum(times[~observed], first / 2 if log else 0))
            axis.plot(seen, share[np.searchsorted(t[:-1], seen, side="right") - 1], linestyle="", marker="|", markersize=8, color=colour)
        scales(axis, log, False, ["share"])
        axis.set_xlim(first * 0.8 if log else 0, max(last, 1.0) * (1.08 if log else 1.02))
        axis.set_xlabel("steps")
        axis.set_ylabel(f"share of runs not yet at {number(threshold)}")
        legend(drawing, axis)
        return drawing

    default = (
        f"Runs not yet at {metric} {'≤' if lower_is_better(metric) else '≥'} {number(threshold)} (Kaplan-Meier, 95 % band); | marks runs last seen without it."
    )
    return Figure(name or slug("survival", metric, *by), draw, default if caption is None else caption)


def dots(metric: str, *, by: Sequence[str] = (), which: str = "final", name: str | None = None, caption: str | None = None) -> Figure:
    """One dot a run, one line a combination of the values of ``by``, with the median. ``which``: "final" or "best" value."""

    def draw(rows: Rows) -> Drawing:
        groups = [(values, part, np.array([row.get(f"{which}.{metric}", np.nan) for row in part])) for values, part in rows.groups(by)]
        groups = [(values, part, x[np.isfinite(x)]) for values, part, x in groups if np.isfinite(x).any()]
        if not groups:
            return nothing(f"no values of {metric} yet")
        drawing, (axis,) = canvas(0.9 + (0.36 if len(groups) <= 12 else 0.22) * len(groups))
        every = np.concatenate([x for _, _, x in groups])
        one_in = math.ceil(every.size / DOTS)
        for place, (_, _, x) in enumerate(groups):
            shown = np.sort(x)[::one_in]
            axis.plot(
                shown, place + pile(shown / max(np.ptp(every), 1e-12)), linestyle="", marker="o", markersize=4.5, color=VAL, alpha=0.55, markeredgewidth=0
            )
            axis.plot([np.median(x)] * 2, [place - 0.34, place + 0.34], color=TRAIN, linewidth=2.2, label="median" if place == 0 else None)
        labels = [f"{setting(values) or 'all runs'}  (n = {len(x)}{f' of {len(part)}' if len(part) > len(x) else ''})" for values, part, x in groups]
        axis.set_yticks(range(len(groups)), labels)
        axis.set_ylim(len(groups) - 0.4, -0.6)
        axis.grid(axis="y", visible=False)
        axis.set_xlabel(f"{which} {metric}" + (f" (one dot in {one_in} shown)" if one_in > 1 else ""))
        legend(drawing, axis)
        return drawing

    return Figure(name or slug("dots", metric, *by), draw, f"Each dot is one run's {which} {metric}." if caption is None else caption)


def _lines(axis: Axes, rows: Rows, metric: str, label: str, colour: Any, logx: bool, points: int, band: bool, single: bool) -> None:
    lines = [(row, *row.curve(metric)) for row in rows]
    lines = [(row, steps, values) for row, steps, values in lines if steps.size]
    if not lines:
        return
    steps = np.unique(np.concatenate([steps for _, steps, _ in lines]))
    grid = _thin(steps[steps > 0] if logx and (steps > 0).any() else steps, points, logx)
    table = np.stack([_carried(grid, s, v, ends=row["status"] != "running") for row, s, v in lines])  # [n, points]
    known = ~np.isnan(table).all(axis=0)
    grid, table = grid[known], table[:, known]
    axis.plot(grid, np.nanmedian(table, axis=0), color=colour, label=label, zorder=3)
    if not band:
        return
    if len(lines) <= SINGLE_RUNS:
        for (row, s, _), line in zip(lines, table, strict=True):
            own = grid <= s[-1]
            if single and len(lines) > 1:
                axis.plot(grid[own], line[own], color=colour, linewidth=0.7, alpha=0.45)
            if row["status"] == "dead" and own.any():
                axis.plot(grid[own][-1:], line[own][-1:], marker="x", markersize=6, markeredgewidth=1.5, color=colour, linestyle="", zorder=4)
        low, high = np.nanmin(table, axis=0), np.nanmax(table, axis=0)
    else:
        low, high = np.nanquantile(table, [0.1, 0.9], axis=0)
    axis.fill_between(grid, low, high, color=colour, alpha=0.14, linewidth=0)


def _carried(grid: NDArray[np.int64], steps: NDArray[np.int64], values: NDArray[np.float64], ends: bool) -> NDArray[np.float64]:
    """The last value recorded at or before each step of the grid; NaN before the first, and after the last where the run has not ended."""
    place = np.searchsorted(steps, grid, side="right") - 1
    known = (place >= 0) & ((grid <= steps[-1]) | ends)
    return np.where(known & np.isfinite(values[place]), values[place], np.nan)


def _thin(steps: NDArray[np.int64], points: int, logx: bool) -> NDArray[np.int64]:
    """At most ``points`` of the steps, the first and last among them, evenly spread on the axis they are drawn on."""
    if steps.size <= points:
        return steps
    ideal = np.geomspace(max(steps[0], 1), steps[-1], points) if logx else np.linspace(steps[0], steps[-1], points)
    return np.unique(np.append(steps[np.searchsorted(steps, ideal).clip(max=steps.size - 1)], steps[[0, -1]]))


def pile(x: NDArray[np.float64]) -> NDArray[np.float64]:
    """Heights that keep dots of nearly the same value apart: 0, +1, -1, +2, ... steps, scaled to stay within the line."""
    heights, order = np.zeros(x.size), np.argsort(x, kind="stable")
    rank = 0
    for before, here in pairwise(order):
        rank = rank + 1 if x[here] - x[before] < 0.012 else 0
        heights[here] = (rank + 1) // 2 * (1 if rank % 2 else -1)
    return heights * min(0.09, 0.32 / max(np.abs(heights).max(initial=1), 1))


def scales(axis: Axes, logx: bool, logy: bool, shown: Sequence[str]) -> None:
    if logx:
        axis.set_xscale("log")
        low, high = axis.get_xlim()
        axis.xaxis.set_major_locator(LogLocator(subs=(1.0,) if high / low > 300 else (1.0, 2.0, 5.0)))
        axis.xaxis.set_minor_locator(NullLocator())
    else:
        axis.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    axis.xaxis.set_major_formatter(FuncFormatter(lambda x, _: short(x)))
    if logy:
        axis.set_yscale("log")
        low, high = axis.get_ylim()
        axis.yaxis.set_major_locator(LogLocator(subs=(1.0,) if high / low > 30 else (1.0, 2.0, 5.0)))
        axis.yaxis.set_major_formatter(FuncFormatter(lambda y, _: number(y)))
        axis.yaxis.set_minor_locator(NullLocator())
    elif all(name.endswith(("accuracy", "exact", "share", "zero_loss", "collapse")) for name in shown):
        axis.set_ylim(-0.02, 1.04)
        axis.set_yticks(np.linspace(0, 1, 6))


def legend(drawing: Drawing, axis: Axes) -> None:
    """Above the axes, where there are no data; past the first line the drawing grows by what it takes."""
    handles, labels = axis.get_legend_handles_labels()
    columns = max(1, min(len(labels), 105 // (max(map(len, labels), default=1) + 8)))
    drawing.legend(handles, labels, loc="outside upper left", ncols=columns, columnspacing=1.6)
    drawing.set_figheight(drawing.get_figheight() + 0.19 * (math.ceil(len(labels) / columns) - 1))


def colours(count: int) -> list[Any]:
    """The house colours; more than eight groups get an even, ordered scale instead."""
    return list(PALETTE[:count]) if count <= len(PALETTE) else list(matplotlib.colormaps["viridis"](np.linspace(0, 0.92, count)))


def _named(metric: str) -> tuple[str, str]:
    split, _, rest = metric.partition("/")
    return SPLITS.get(split, (split or metric, PALETTE[4])) if rest else (metric, VAL)


def _distinct(metrics: Sequence[str]) -> list[tuple[str, str]]:
    """As ``_named``; what would look like one before it takes the next free colour, and its whole name if need be."""
    found: list[tuple[str, str]] = []
    for metric in metrics:
        label, colour = _named(metric)
        labels, used = [name for name, _ in found], [shade for _, shade in found]
        free = next((shade for shade in PALETTE if shade not in used), colour)
        found.append((metric if label in labels else label, free if colour in used else colour))
    return found


def _common(metrics: Sequence[str]) -> str:
    names = {metric.rsplit("/", 1)[-1] for metric in metrics}
    return names.pop().replace("_", " ") if len(names) == 1 else "value"


def short(x: float) -> str:
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(x) >= size:
            return f"{x / size:g}{letter}"
    return f"{x:g}"


def slug(*parts: str) -> str:
    return "-".join(re.sub(r"\W+", "-", part) for part in parts)
