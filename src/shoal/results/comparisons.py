"""Figures that compare settings: a heat map over two config values, the times of many settings in lines, times and values against a number of the config.

Drawn as those of figures.py: the same rows give the same bytes. Runs that never get there are censored and drawn as such, never left out.

    heatmap("optimizer.lr", "optimizer.wd", median_steps("val/accuracy", 0.99), by=["task.operation"])
    times("val/accuracy", 0.99, by=["variant"], baseline={"variant": "baseline"})
    times_against("task.train_fraction", "val/accuracy", 0.99, by=["task.operation"])
    values_against("task.train_fraction", "val/accuracy", which="best", by=["task.operation"])
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import cycle
from textwrap import fill
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import LogNorm, Normalize
from matplotlib.figure import Figure as Drawing
from matplotlib.patches import Patch, Rectangle
from matplotlib.ticker import LogLocator
from numpy.typing import NDArray

from shoal.results import statistics
from shoal.results.figures import DOTS, INK, MUTED, PALETTE, PANELS, TRAIN, VAL, WIDTH, Figure, canvas, colours, legend, nothing, pile, scales, short, slug
from shoal.results.rows import Rows, lower_is_better
from shoal.results.wording import number, setting

SCALE = matplotlib.colormaps["viridis"].resampled(48)  # even in lightness: the same order in grey and with every colour blindness; few steps, small files
NEVER: dict[str, Any] = {"facecolor": "#f1f3f6", "edgecolor": "#c9d0d8", "hatch": "///", "linewidth": 0}
MARKERS = "osD^vP"
LINES, WORDS = 24, 320  # more are not drawn: nobody could read them, and a file stays below 200 kB


@dataclass(frozen=True)
class Shade:
    """What a cell of a heat map shows: a number of the cell's rows; infinite = never reached, NaN = nothing to show."""

    label: str
    of: Callable[[Rows], float]
    slug: str  # its part of the figure's name
    log: bool = False  # the scale of the colours
    limits: tuple[float, float] | None = None  # of the colours; None = what the cells have
    low_is_good: bool = False  # good is bright


def share_reached(metric: str, threshold: float, sustained: int = 5) -> Shade:
    label = f"share that reached {_target(metric, threshold)}"
    return Shade(label, lambda rows: float(rows.reached(metric, threshold, sustained)[1].mean()), f"share-{metric}", limits=(0.0, 1.0))


def median_steps(metric: str, threshold: float, sustained: int = 5) -> Shade:
    """Kaplan-Meier median: runs that never got there are censored; infinite where half of them did not."""

    def of(rows: Rows) -> float:
        return statistics.survival_median(*rows.reached(metric, threshold, sustained)).value

    return Shade(f"median steps to {_target(metric, threshold)}", of, f"steps-{metric}", log=True, low_is_good=True)


def mean_of(metric: str, which: str = "final") -> Shade:
    """``which``: "final" or "best" value. Runs without one are left out."""

    def of(rows: Rows) -> float:
        x = _finite(rows, f"{which}.{metric}")
        return float(x.mean()) if x.size else math.nan

    limits = (0.0, 1.0) if metric.endswith(("accuracy", "exact")) else None
    return Shade(f"mean {which} {metric}", of, f"{which}-{metric}", limits=limits, low_is_good=bool(lower_is_better(metric)))


def heatmap(x: str, y: str, shade: Shade, *, by: Sequence[str] = (), name: str | None = None, caption: str | None = None) -> Figure:
    """A cell for every pair of values of two paths, a panel for every combination of the values of ``by``; numbers in the cells where they fit."""
    paths = [path for path in by if path not in (x, y)]

    def draw(rows: Rows) -> Drawing:
        if not rows:
            return nothing("no runs yet")
        panels, xs, ys = rows.groups(paths), rows.values(x), rows.values(y)
        shown = np.full((min(len(panels), PANELS), len(ys), len(xs)), np.nan)
        words = np.full(shown.shape, "", dtype=object)
        sizes: list[int] = []
        for cells, texts, (_, part) in zip(shown, words, panels, strict=False):
            for values, cell in part.groups([y, x]):
                at = ys.index(values[y]), xs.index(values[x])
                cells[at] = shade.of(cell)
                texts[at] = f"> {short(_watched(cell))}" if math.isinf(cells[at]) else "" if math.isnan(cells[at]) else _brief(cells[at])
                sizes.append(len(cell))
        finite = shown[np.isfinite(shown)]
        low, high = shade.limits or (finite.min(), finite.max()) if finite.size else (1.0, 2.0)
        low, high = (low, high) if low < high else (0.9 * low, 1.1 * high) if low > 0 else (low - 1.0, high + 1.0)
        norm = LogNorm(low, high) if shade.log and low > 0 else Normalize(low, high)
        scale = SCALE.reversed() if shade.low_is_good else SCALE
        columns = 1 if len(shown) == 1 else 2 if len(shown) in (2, 4) or len(xs) > 7 else 3
        tall, wide = math.ceil(len(shown) / columns), (WIDTH - 1.7) / columns / len(xs)
        drawing, axes = canvas(0.9 + tall * (0.4 + float(np.clip(0.3 * len(ys), 1.1, 5))), columns, tall)
        few = shown.size <= 2 * WORDS  # cells: more are drawn without their borders, in fewer bytes
        for i, axis in enumerate(axes[: len(shown)]):
            axis.pcolormesh(np.ma.masked_invalid(shown[i]), norm=norm, cmap=scale, edgecolors="white" if few else "none", linewidth=0.8, clip_on=False)
            for row, column in np.argwhere(np.isinf(shown[i])):
                axis.add_patch(Rectangle((column, row), 1, 1, **NEVER))
            axis.set_title(setting(panels[i][0]))
            axis.grid(visible=False)
            lowest = i + columns >= len(shown)
            axis.tick_params(length=0, labelbottom=lowest)
            names = [number(value) for value in xs]
            axis.set_xticks(np.arange(len(xs)) + 0.5, names, rotation=0 if max(map(len, names)) * 0.075 < wide else 90)
            axis.set_yticks(np.arange(len(ys)) + 0.5, [number(value) for value in ys])
            axis.set_xlabel(_last(x) if lowest else "")
            axis.set_ylabel(_last(y) if i % columns == 0 else "")
            _write(axis, shown[i], words[i], lambda value: scale(norm(value)), wide, shown.size)
        for spare in axes[len(shown) :]:
            spare.set_axis_off()
        bar = drawing.colorbar(ScalarMappable(norm, scale), ax=axes, aspect=30, pad=0.015, label=fill(shade.label, int(11 * drawing.get_figheight())))
        bar.outline.set_visible(False)  # pyright: ignore[reportCallIssue]
        bar.ax.yaxis.set_major_formatter(lambda value, _: short(value))
        if isinstance(norm, LogNorm):
            bar.ax.yaxis.set_major_locator(LogLocator(subs=(1.0,) if high / low > 100 else (1.0, 2.0, 5.0)))
        bar.ax.minorticks_off()
        if np.isinf(shown).any():
            drawing.legend([Patch(**NEVER)], ["not reached in the median, within the steps made"], loc="outside upper left")
        runs = f"n = {_sizes(sizes)} a cell"
        drawing.supxlabel(runs + (f"; the first {len(shown)} of {len(panels)} settings" if len(panels) > len(shown) else ""), fontsize=8.5, color=MUTED)
        return drawing

    default = f"{shade.label[0].upper()}{shade.label[1:]}, by {_last(x)} and {_last(y)}."
    return Figure(name or slug("map", shade.slug, x, y, *paths), draw, default if caption is None else caption)


def times(
    metric: str, threshold: float, *, by: Sequence[str], baseline: Mapping[str, Any] | None = None, sustained: int = 5,
    name: str | None = None, caption: str | None = None,
) -> Figure:  # fmt: skip
    """A line for every combination of the values of ``by``: each run's steps to the threshold and their median; a line down at the baseline's median."""

    def draw(rows: Rows) -> Drawing:
        if metric not in rows.metrics:
            return nothing(f"no values of {metric} yet")
        groups = [(values, part, *part.reached(metric, threshold, sustained)) for values, part in rows.groups(by)]
        every = np.concatenate([t for _, _, t, _ in groups])
        last = max(float(every.max()), 1.0)
        first = float(min(every[every > 0], default=1.0))
        width = max(math.log10(last / first), 0.3)
        one_in = math.ceil(every.size / DOTS)
        drawing, (axis,) = canvas(0.9 + (0.36 if len(groups) <= 12 else 0.23) * len(groups))
        for place, (_, part, t, observed) in enumerate(groups):
            dead = np.array([row["status"] == "dead" for row in part])
            median = statistics.survival_median(t, observed)
            if (low := max(median.low, first * 0.7)) < (high := min(median.high, last * 1.3)) and _bounded(median):
                axis.plot([low, high], [place] * 2, color=TRAIN, alpha=0.2, linewidth=7, solid_capstyle="butt")
            for kind, looks in ((observed, _DOT), (~observed & ~dead, _ARROW), (~observed & dead, _CROSS)):
                spots = np.sort(np.maximum(t[kind], first / 1.4))[::one_in]
                axis.plot(spots, place + pile(np.log10(spots) / width), linestyle="", **looks)
            if math.isfinite(median.value):
                axis.plot([max(median.value, first / 1.4)] * 2, [place - 0.36, place + 0.36], color=TRAIN, linewidth=2.2)
        if baseline is not None and (part := rows.where(baseline)):
            usual = statistics.survival_median(*part.reached(metric, threshold, sustained)).value
            if math.isfinite(usual):
                axis.axvline(usual, color=MUTED, linewidth=0.9, dashes=(4, 3), zorder=1)
                axis.plot([], [], color=MUTED, linewidth=0.9, dashes=(4, 3), label=f"median of {setting(baseline)}")
        labels = [f"{setting(values) or 'all runs'}  ({int(observed.sum())} of {len(t)})" for values, _, t, observed in groups]
        axis.set_yticks(range(len(groups)), labels)
        axis.set_xlim(first / 1.5, last * 1.4)
        scales(axis, True, False, ["steps"])
        axis.set_ylim(len(groups) - 0.4, -0.6)
        axis.grid(axis="y", visible=False)
        axis.set_xlabel(f"steps to {_target(metric, threshold)}" + (f" (one run in {one_in} shown)" if one_in > 1 else ""))
        axis.plot([], [], linestyle="", label="one run", **_DOT)
        if not all(observed.all() for _, _, _, observed in groups):
            axis.plot([], [], linestyle="", label="not there by its last step", **_ARROW)
        if any(row["status"] == "dead" for row in rows):
            axis.plot([], [], linestyle="", label="died before", **_CROSS)
        axis.plot([], [], color=TRAIN, linewidth=2.2, label="median, 95 % interval")
        legend(drawing, axis)
        return drawing

    default = f"Steps to {_target(metric, threshold)}: every run, the Kaplan-Meier median and its 95 % interval; in brackets how many of the runs got there."
    return Figure(name or slug("times", metric, *by), draw, default if caption is None else caption)


_DOT: dict[str, Any] = {"marker": "o", "markersize": 4.2, "color": VAL, "alpha": 0.6, "markeredgewidth": 0}
_ARROW: dict[str, Any] = {"marker": ">", "markersize": 4.6, "color": VAL, "markerfacecolor": "none", "markeredgewidth": 0.9}
_CROSS: dict[str, Any] = {"marker": "x", "markersize": 4.2, "color": INK, "markeredgewidth": 1.1}


def times_against(
    x: str, metric: str, threshold: float, *, by: Sequence[str] = (), logx: bool = False, sustained: int = 5,
    name: str | None = None, caption: str | None = None,
) -> Figure:  # fmt: skip
    """Median steps to the threshold (above) and the share that never got there (below), against a number of the config; a line per combination of ``by``."""
    paths = [path for path in by if path != x]

    def draw(rows: Rows) -> Drawing:
        lines = _against(x, rows, paths)
        if metric not in rows.metrics or not lines:
            return nothing(f"no values of {metric} against {x} yet")
        drawing = Drawing(figsize=(WIDTH, 4.6), layout="constrained")
        above, below = drawing.subplots(2, 1, sharex=True, height_ratios=[3, 1])
        timed = [(values, [(at, *part.reached(metric, threshold, sustained)) for at, part in points]) for values, points in lines]
        last = max(float(t.max()) for _, points in timed for _, t, _ in points)
        ends = []
        for i, ((values, points), colour, marker) in enumerate(zip(timed, colours(len(timed)), cycle(MARKERS), strict=False)):
            at = _beside(np.array([at for at, _, _ in points]), i, len(timed), lines, logx)
            medians = [statistics.survival_median(t, observed) for _, t, observed in points]
            y = np.array([median.value if math.isfinite(median.value) else np.nan for median in medians])
            above.plot(
                at, y, color=colour, marker=marker, markersize=4.5, label=f"{setting(values) or 'all runs'} (n = {_sizes([len(t) for _, t, _ in points])})"
            )
            above.plot(at[np.isnan(y)], np.full(np.isnan(y).sum(), last), linestyle="", marker="^", markerfacecolor="none", markersize=6, color=colour)
            if len(timed) <= len(PALETTE):
                for place, median in zip(at, medians, strict=True):
                    if math.isfinite(median.value) and _bounded(median):
                        above.plot([place] * 2, [max(median.low, 1.0), min(median.high, last)], color=colour, linewidth=1, alpha=0.7)
            below.plot(at, [1 - observed.mean() for _, _, observed in points], color=colour, marker=marker, markersize=3.5, linewidth=1.2)
            ends += [y[~np.isnan(y)], *([median.low] for median in medians if median.low >= 1 and math.isfinite(median.value))]
        low = min((float(np.min(end)) for end in ends if np.size(end)), default=last / 10)
        above.set_ylim(max(low, 1.0) / 1.3, last * 1.3)
        scales(above, logx, True, [])
        scales(below, logx, False, ["share"])
        _numbers(below, lines, logx)
        above.set_ylabel(f"median steps to {_target(metric, threshold)}")
        below.set_ylabel("share not there")
        below.set_yticks([0, 0.5, 1])
        below.set_xlabel(_last(x))
        legend(drawing, above)
        return drawing

    default = (
        f"Kaplan-Meier median of the steps to {_target(metric, threshold)} with its 95 % interval; an open triangle where half of the runs "
        "did not get there within the steps made. Below: the share of runs that did not."
    )
    return Figure(name or slug("times", metric, x, *paths), draw, default if caption is None else caption)


def values_against(
    x: str, metric: str, *, by: Sequence[str] = (), which: str = "best", logx: bool = False, name: str | None = None, caption: str | None = None
) -> Figure:
    """Best or final value of a metric against a number of the config: a dot a run, the median as a line for every combination of the values of ``by``."""
    paths = [path for path in by if path != x]

    def draw(rows: Rows) -> Drawing:
        lines = [(values, [(at, y) for at, part in points if (y := _finite(part, f"{which}.{metric}")).size]) for values, points in _against(x, rows, paths)]
        lines = [(values, points) for values, points in lines if points]
        if not lines:
            return nothing(f"no values of {metric} against {x} yet")
        drawing, (axis,) = canvas(3.8)
        one_in = math.ceil(sum(y.size for _, points in lines for _, y in points) / DOTS)
        for i, ((values, points), colour, marker) in enumerate(zip(lines, colours(len(lines)), cycle(MARKERS), strict=False)):
            at = _beside(np.array([at for at, _ in points]), i, len(lines), lines, logx)
            label = f"{setting(values) or 'all runs'} (n = {_sizes([y.size for _, y in points])})"
            axis.plot(at, [np.median(y) for _, y in points], color=colour, marker=marker, markersize=4.5, label=label)
            if len(lines) <= len(PALETTE):
                dots = [(place, value) for place, (_, y) in zip(at, points, strict=True) for value in np.sort(y)[::one_in]]
                axis.plot(*zip(*dots, strict=True), linestyle="", marker=".", markersize=4, markeredgewidth=0, alpha=0.45, color=colour)
        scales(axis, logx, False, [metric])
        _numbers(axis, lines, logx)
        axis.set_xlabel(_last(x))
        axis.set_ylabel(f"{which} {metric}")
        legend(drawing, axis)
        return drawing

    default = f"The {which} {metric} of every run (dots) and the median (line)."
    return Figure(name or slug(which, metric, x, *paths), draw, default if caption is None else caption)


def _against(x: str, rows: Rows, paths: Sequence[str]) -> list[tuple[dict[str, Any], list[tuple[float, Rows]]]]:
    """Per combination of the paths' values its rows by the number they have at ``x``; without rows whose value is no number."""
    lines = []
    for values, part in rows.groups(paths)[:LINES]:
        points = [(float(one[x]), some) for one, some in part.groups([x]) if isinstance(one[x], (int, float)) and not isinstance(one[x], bool)]
        lines += [(values, points)] if points else []
    return lines


def _beside(at: NDArray[np.float64], i: int, count: int, lines: Sequence[tuple[Any, Sequence[tuple[Any, ...]]]], logx: bool) -> NDArray[np.float64]:
    """Line i of ``count`` a little to the side, so that what stands at the same number is not drawn over each other."""
    spots = np.array(sorted({point[0] for _, points in lines for point in points}))
    spots = np.log(spots) if logx else spots
    step = (0.3 * float(np.diff(spots).min()) if spots.size > 1 else 0.0) / max(count, 6) * (i - (count - 1) / 2)
    return at * np.exp(step) if logx else at + step


def _numbers(axis: Axes, lines: Sequence[tuple[Any, Sequence[tuple[Any, ...]]]], logx: bool) -> None:
    """Ticks at the numbers there are, while they are few."""
    spots = sorted({point[0] for _, points in lines for point in points})
    if len(spots) <= 12 and (logx or len(spots) < 3 or min(np.diff(spots)) > 0.04 * (spots[-1] - spots[0])):
        axis.set_xticks(spots, [number(spot) for spot in spots])


def _write(axis: Axes, values: NDArray[np.float64], words: NDArray[Any], colour: Callable[[float], Any], wide: float, total: int) -> None:
    """The cells' words in the largest of a few sizes in which all fit, or none; dark on bright cells, white on dark ones. ``wide``: of a cell, inches."""
    longest = max(map(len, words.flat))
    size = next((size for size in (8.5, 7.5, 6.5, 5.5) if longest * size * 0.6 / 72 < 0.92 * wide), None)
    if size is None or total > WORDS:
        return
    for (row, column), text in np.ndenumerate(words):
        red, green, blue = colour(float(values[row, column]))[:3] if np.isfinite(values[row, column]) else (1, 1, 1)
        bright = 0.299 * red + 0.587 * green + 0.114 * blue > 0.5
        axis.text(column + 0.5, row + 0.5, text, ha="center", va="center", fontsize=size, color=INK if bright else "white")


def _watched(rows: Rows) -> float:
    """The steps within which a threshold was not reached."""
    return max(float(row["steps"] if row["status"] == "running" else row.get("config.steps", row["steps"])) for row in rows)


def _brief(value: float) -> str:
    """Three digits at most: 0.75  1  850  4.4k  120k"""
    return short(float(f"{value:.2g}" if 1e3 <= abs(value) < 1e5 else f"{value:.3g}"))


def _bounded(median: statistics.Estimate) -> bool:
    """An interval that says something: few runs leave both ends open."""
    return median.low > 0 or math.isfinite(median.high)


def _finite(rows: Rows, key: str) -> NDArray[np.float64]:
    x = np.array([row.get(key, np.nan) for row in rows], dtype=np.float64)
    return x[np.isfinite(x)]


def _target(metric: str, threshold: float) -> str:
    return f"{metric} {'≤' if lower_is_better(metric) else '≥'} {number(threshold)}"


def _last(path: str) -> str:
    return "seed" if path.startswith("seeds.") else path.rsplit(".", 1)[-1].replace("_", " ")


def _sizes(sizes: Sequence[int]) -> str:
    return f"{min(sizes)}" if min(sizes) == max(sizes) else f"{min(sizes)} to {max(sizes)}"
