"""A figure of what a study measured after training: a measured value against a measured number, such as accuracy against the length of a sequence.

Drawn as those of figures.py: the same rows give the same bytes. Runs without the measure are left out.

    profile("lengths", "length", "accuracy", line="variant", by=["task.delay"], marks={"trained at": lambda row: row["task.length"]})
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from textwrap import fill

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure as Drawing
from numpy.typing import NDArray

from shoal.results.figures import MUTED, PALETTE, PANELS, Figure, canvas, colours, legend, nothing, scales, slug
from shoal.results.rows import Row, Rows
from shoal.results.wording import number, setting

Line = tuple[NDArray[np.float64], NDArray[np.float64]]
Values = Mapping[str, Callable[[Row], float]]  # what a line stands for -> where it lies, of every run


def profile(
    measure: str, x: str, y: str, *, line: str = "variant", by: Sequence[str] = (), marks: Values | None = None, levels: Values | None = None,
    logx: bool = False, name: str | None = None, caption: str | None = None,
) -> Figure:  # fmt: skip
    """A line for every value of the path ``line``, the median over runs, with their range as a band; a panel for every combination of the values of ``by``.

    ``marks`` and ``levels``: upright and level lines, at what they give for a panel's runs. With more lines than the house has colours, medians only.
    """
    paths = [path for path in by if path != line]

    def draw(rows: Rows) -> Drawing:
        rows = Rows([row for row in rows if row["measures"].get(measure)])
        if not rows:
            return nothing(f"no {measure} measured yet")
        panels, names = rows.groups(paths), rows.values(line)
        columns = 1 if len(panels) == 1 else 2 if len(panels) in (2, 4) else 3
        shown = panels[:PANELS]
        tall = math.ceil(len(shown) / columns)
        drawing, axes = canvas(0.7 + 2.3 * tall if tall * columns > 1 else 3.9, columns, tall)
        for spare in axes[len(shown) :]:
            spare.set_axis_off()
        shades = dict(zip(map(repr, names), colours(len(names)), strict=True))
        for i, (axis, (values, part)) in enumerate(zip(axes, shown, strict=False)):
            for one, some in part.groups([line]):
                at, table = medians(some, measure, x, y)
                axis.plot(at, np.median(table, axis=0), color=shades[repr(one[line])], zorder=3)
                if len(names) <= len(PALETTE):
                    axis.fill_between(at, table.min(axis=0), table.max(axis=0), color=shades[repr(one[line])], alpha=0.14, linewidth=0)
            counts = sorted({len(some) for _, some in part.groups([line])})
            title = ", ".join(filter(None, [setting(values), f"n = {' to '.join(map(str, counts[:: max(len(counts) - 1, 1)]))} a line"]))
            axis.set_title(fill(title, 96 // columns))
            for values_of, draw_line, dashes in ((marks or {}, axis.axvline, (4, 3)), (levels or {}, axis.axhline, (1, 2))):
                for place in sorted({float(of(row)) for of in values_of.values() for row in part}):
                    draw_line(place, color=MUTED, linewidth=0.9, dashes=dashes, zorder=1.5)
            scales(axis, logx, False, [y])
            axis.set_xlabel(x.replace("_", " ") if i >= len(shown) - columns else "")
            axis.set_ylabel(y.replace("_", " ") if i % columns == 0 else "")
            axis.tick_params(labelbottom=i >= len(shown) - columns)
        _explain(axes[0], [(setting({line: value}), shades[repr(value)]) for value in names], marks or {}, levels or {}, rows)
        legend(drawing, axes[0])
        if len(panels) > len(shown):
            drawing.supxlabel(f"the first {len(shown)} of {len(panels)} settings", fontsize=8.5, color=MUTED)
        return drawing

    default = f"Measured {y} against {x}: median over runs (line), from the lowest to the highest run (band)."
    return Figure(name or slug(measure, y, *paths), draw, default if caption is None else caption)


def medians(rows: Rows, measure: str, x: str, y: str) -> Line:
    """(x [m], y [n, m]) of the runs that have the measure, at the x all of them have."""
    curves = [{float(entry[x]): float(entry[y]) for entry in row["measures"][measure]} for row in rows if row["measures"].get(measure)]
    at = sorted(set.intersection(*map(set, curves))) if curves else []
    return np.array(at), np.array([[curve[place] for place in at] for curve in curves]).reshape(len(curves), len(at))


def _explain(axis: Axes, lines: Sequence[tuple[str, object]], marks: Values, levels: Values, rows: Rows) -> None:
    """The legend's entries: every line of the figure, though a panel may lack some, and what the thin ones stand for."""
    for label, colour in lines:
        axis.plot([], [], color=colour, label=label)  # pyright: ignore[reportArgumentType]
    for values, dashes in ((marks, (4, 3)), (levels, (1, 2))):
        for label, of in values.items():
            places = sorted({float(of(row)) for row in rows})
            axis.plot([], [], color=MUTED, linewidth=0.9, dashes=dashes, label=f"{label} {number(places[0])}" if len(places) == 1 else label)
