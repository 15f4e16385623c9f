"""Weights as a picture: a row for each query, a column for each key, the numbers in the cells.

Not here: the attention of trained runs. No pyplot, and matplotlib's settings are changed only while drawing.

    save(hand.identity(), Path("weights.png"))      # .png, .svg or .pdf
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib import style
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure as Drawing

from shoal.attend.goals import Answer
from shoal.config.fields import check
from shoal.results.figures import INK, STYLE, VAL

SUFFIXES = (".png", ".svg", ".pdf")
NUMBERS = 20  # columns up to which a cell holds its number
MAP = LinearSegmentedColormap.from_list("weights", ["#f2f5f9", "#cfe0f2", VAL])


def save(answers: Sequence[Answer], path: Path) -> None:
    """ConfigError where the picture cannot go; what is there stays."""
    check(path.suffix.lower() in SUFFIXES, "--figure", f"{path}: its name must end in {', '.join(SUFFIXES)}")
    check(path.parent.is_dir(), "--figure", f"there is no directory {path.parent}")
    check(not path.exists(), "--figure", f"{path} exists already; name another file or remove this one")
    with style.context("default"), matplotlib.rc_context(STYLE):
        draw(answers).savefig(path, dpi=160)


def draw(answers: Sequence[Answer]) -> Drawing:
    """The weights of the answers [m, n], with the error of each output beside it."""
    weights = np.stack([answer.weights for answer in answers])
    m, n = weights.shape
    names = [answer.goal if len(answer.goal) <= 48 else answer.goal[:46] + " .." for answer in answers]
    margin = 0.085 * max(map(len, names)) + 1.6  # inches of text on both sides
    drawing = Drawing(figsize=(margin + float(np.clip(0.62 * n, 1.6, 9.0)), 0.9 + float(np.clip(0.42 * m, 0.42, 12.0))), layout="constrained")
    axes = drawing.subplots()
    axes.imshow(weights, cmap=MAP, vmin=0, vmax=1, aspect="auto")
    axes.set_yticks(range(m), names)
    step = max(1, n // 20)
    axes.set_xticks(range(0, n, step), [f"k{i + 1}" for i in range(0, n, step)])
    axes.tick_params(length=0, labelcolor=INK)
    axes.xaxis.tick_top()
    axes.grid(visible=False)
    for side in axes.spines.values():
        side.set_visible(False)
    axes.set_xticks(np.arange(n + 1) - 0.5, minor=True)
    axes.set_yticks(np.arange(m + 1) - 0.5, minor=True)
    axes.grid(which="minor", visible=True, color="white", linewidth=2 if n <= NUMBERS else 0.3)
    axes.tick_params(which="minor", length=0)
    for i, answer in enumerate(answers):
        for j in range(n if n <= NUMBERS else 0):
            axes.text(j, i, f"{weights[i, j]:.2f}", ha="center", va="center", fontsize=8.5, color="white" if weights[i, j] > 0.8 else INK)
        error = "0" if answer.error < 5e-5 else f"{answer.error:.2g}"
        axes.text(n - 0.35, i, f"error {error}", ha="left", va="center", fontsize=8.5, color=INK if answer.within else "#b3261e")
    return drawing
