"""Figures of one trained model from the inside: attention maps, scores of heads, the logit lens. Functions of arrays and words, in the style of figures.py.

png(lambda: grid(["I", " love"], weights, layers=[0, 1], heads=[0, 1]))     # bytes of a PNG file
"""

from __future__ import annotations

import io
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import Any

import matplotlib
import numpy as np
from matplotlib import style
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.cm import ScalarMappable
from matplotlib.colors import LinearSegmentedColormap, Normalize
from matplotlib.figure import Figure as Drawing
from matplotlib.font_manager import FontProperties, findfont, get_font
from numpy.typing import NDArray

from shoal.results.figures import INK, MUTED, PALETTE, STYLE, VAL, WIDTH, canvas

SHADES = LinearSegmentedColormap.from_list("attention", ["#ffffff", "#b9d3ea", VAL, "#0b2545"])  # white is nothing, so that the future is blank
DPI = 160
SIGNS = {" ": "␣", "\n": "↵", "\t": "⇥", "\r": "␍"}
NAMED = 64  # tokens: with more, a map has none at its sides
POSITIONS = 48  # of the lens: with more, the first so many are drawn
LETTERS = 14  # of a token: longer ones end in …
PANEL_SIDE, LARGEST = 2.4, 11.0  # inches of a small map and of the whole


def png(draw: Callable[[], Drawing]) -> bytes:
    with style.context("default"), matplotlib.rc_context(STYLE):
        drawing, sink = draw(), io.BytesIO()
        drawing.set_dpi(DPI)
        FigureCanvasAgg(drawing).print_png(sink, metadata={"Software": None})
    return sink.getvalue()


def grid(tokens: Sequence[str], weights: NDArray[np.floating[Any]], layers: Sequence[int], heads: Sequence[int]) -> Drawing:
    """A map for each of weights [layers, H, T, T]: lines are the tokens that look, columns those they look at. Every map has the same scale, 0 to 1."""
    names, count = words(tokens), len(tokens)
    lines, columns = weights.shape[:2]
    longest = max(map(len, names))
    legible = min(8.0, 8.0 * 16 / max(count, 1))  # points in which the names fit beside a small map
    one = lines * columns == 1
    size = min(8.0, 72 * 6.2 / max(count, 1) * 0.8) if one else legible
    named = count <= NAMED and size >= 4.0
    side = 6.2 if one else min(PANEL_SIDE, (LARGEST - 1.2) / columns)
    edge = longest * size * 0.62 / 72 if named else 0.25
    drawing = Drawing(figsize=(max(columns * (side + 0.08) + edge + 0.75, 4.5), lines * (side + 0.32) + edge + 0.3), layout="constrained")
    for i, axis in enumerate(drawing.subplots(lines, columns, squeeze=False).flat):
        line, column = divmod(i, columns)
        axis.imshow(weights[line, column], cmap=SHADES, vmin=0, vmax=1, interpolation="nearest", aspect="equal")
        axis.set_title(f"layer {layers[line]}, head {heads[column]}")
        axis.grid(visible=False)
        for spine in axis.spines.values():
            spine.set_visible(True)
        _name_places(axis, names if named else None, size, column == 0, line == lines - 1)
        if one and count <= 16:
            _write(axis, [[f"{x:.2f}".removeprefix("0") if x >= 0.005 else "" for x in row] for row in weights[0, 0]], weights[0, 0], min(8.0, size))
    tall = lines * side
    bar = drawing.colorbar(ScalarMappable(Normalize(0, 1), SHADES), ax=drawing.axes, shrink=min(0.8, 2 / tall), aspect=16, fraction=0.04, pad=0.02)
    bar.outline.set_visible(False)  # pyright: ignore[reportCallIssue]
    drawing.supxlabel("attention weights: from the token of a line to that of a column", fontsize=8.5, color=MUTED)
    return drawing


def _name_places(axis: Axes, names: Sequence[str] | None, size: float, left: bool, bottom: bool) -> None:
    """Tokens at the sides, or where nobody could read them, some places in numbers (from 0); beside the outer maps alone."""
    for side, outer in ((axis.yaxis, left), (axis.xaxis, bottom)):
        if not outer:
            side.set_ticks([])
        elif names is not None:
            side.set_ticks(range(len(names)), names, fontsize=size, rotation=90 if side is axis.xaxis else 0)
    if names is not None:
        axis.tick_params(length=0, pad=2)


def scores(rows: Sequence[Mapping[str, Any]], kinds: Sequence[str], even: float) -> Drawing:
    """A line for each head (``layer``, ``head``), a cell for each of its scores; each score's own bar in the cell, and the height of even attention."""
    tall = len(rows)
    drawing, axes = canvas(0.85 + 0.26 * tall, len(kinds))
    for axis, kind, colour in zip(axes, kinds, PALETTE, strict=False):
        values = [row[kind] for row in rows]
        axis.barh(range(tall), values, height=0.72, color=colour, alpha=0.8)
        axis.axvline(even, color=MUTED, linewidth=0.9, dashes=(4, 3))
        for place, value in enumerate(values):
            inside = value > 0.75
            x = value - 0.03 if inside else max(value, even) + 0.03
            axis.text(x, place, f"{value:.2f}", va="center", ha="right" if inside else "left", fontsize=7.5, color="white" if inside else INK)
        axis.set_title(kind)
        axis.set_xlim(0, 1)
        axis.set_ylim(tall - 0.4, -0.6)
        axis.set_xticks([0, 0.5, 1], ["0", "0.5", "1"])
        axis.set_yticks(range(tall), [f"layer {row['layer']}, head {row['head']}" for row in rows])
        axis.grid(axis="y", visible=False)
    drawing.supxlabel("share of the head's attention on random tokens that come twice; dashed: what even attention gives", fontsize=8.5, color=MUTED)
    return drawing


def lens(
    tokens: Sequence[str], after: Sequence[str], top: Sequence[Sequence[str]], probability: NDArray[np.floating[Any]], loss: Sequence[float],
) -> Drawing:  # fmt: skip
    """A line for each position, a column for each of ``after`` [n]: the likeliest next token, top[n][T], shaded by its probability [n, T].

    Bold where it is the token that comes.
    """
    count = min(len(tokens), POSITIONS)
    names, size = words(tokens), 7.5 if len(after) <= 8 else 5.5
    shown = [[_cut(word, max(3, int((WIDTH - 1.6) / len(after) * 72 / size / 0.62))) for word in words(line[:count])] for line in top]
    drawing, (axis,) = canvas(1.3 + 0.19 * count)
    axis.imshow(probability[:, :count].T, cmap=SHADES, vmin=0, vmax=1, interpolation="nearest", aspect="auto")
    right = [[place + 1 < len(tokens) and line[place] == tokens[place + 1] for line in top] for place in range(count)]
    _write(axis, [[line[place] for line in shown] for place in range(count)], probability[:, :count].T, size, right)
    axis.set_yticks(range(count), [f"{_cut(name, LETTERS)}  {place}" for place, name in enumerate(names[:count])], fontsize=7.5)
    axis.set_xticks(range(len(after)), [f"{name}\n{value:.2f} nats" for name, value in zip(after, loss, strict=True)])
    axis.xaxis.tick_top()
    axis.tick_params(length=0)
    axis.grid(visible=False)
    axis.spines[["left", "bottom"]].set_visible(False)
    bar = drawing.colorbar(
        ScalarMappable(Normalize(0, 1), SHADES), ax=axis, aspect=24, pad=0.015, shrink=min(1.0, 22 / count), label="probability of the likeliest next token"
    )
    bar.outline.set_visible(False)  # pyright: ignore[reportCallIssue]
    note = f"; the first {count} of {len(tokens)} positions" if count < len(tokens) else ""
    drawing.supxlabel(f"lines: the text's tokens; bold: the token that comes next is the likeliest{note}", fontsize=8.5, color=MUTED)
    return drawing


def _write(axis: Axes, texts: Sequence[Sequence[str]], shade: NDArray[np.floating[Any]], size: float, bold: Sequence[Sequence[bool]] | None = None) -> None:
    for line, row in enumerate(texts):
        for column, text in enumerate(row):
            weight = "bold" if bold is not None and bold[line][column] else "normal"
            red, green, blue, _ = SHADES(float(shade[line, column]))
            colour = INK if 0.299 * red + 0.587 * green + 0.114 * blue > 0.5 else "white"
            axis.text(column, line, text, ha="center", va="center", fontsize=size, color=colour, fontweight=weight)


def words(tokens: Sequence[str]) -> list[str]:
    """Tokens as one can see them: spaces and line ends as signs, what the font lacks as its number, long ones cut."""
    return [_cut("".join(map(_sign, token)), LETTERS) for token in tokens]


def _sign(character: str) -> str:
    if character in SIGNS:
        return SIGNS[character]
    drawn = unicodedata.category(character)[0] != "C" and get_font(_font()).get_char_index(ord(character))
    return character if drawn else f"<{ord(character):x}>"


@cache
def _font() -> str:
    return findfont(FontProperties(family="DejaVu Sans"))


def _cut(word: str, letters: int) -> str:
    return word if len(word) <= letters else f"{word[: letters - 1]}…"
