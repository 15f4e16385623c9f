"""What the attention heads of recall models do with the task's own sequences: one figure for the studies of recall, and what it is drawn from.

A model of two layers can look its answer up in two steps. Some layer binds: from the answer's place it looks ``delay`` places back at q, and writes q down
there. A later one finds: from the query at the end it looks at the place where q is written, the answer's (an induction head, Olsson et al. 2022; with delay 1
binding is a previous-token head). Both are shares of a head's attention at that one place, where even attention would give 1 / (tokens it may see).

    measured(load("runs/recall-induction:ID"))      # [{"layer": 0, "head": 0, "binding": 0.99, "induction": 0.03}, ...]
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from shoal.config import DecoderConfig, RecallConfig
from shoal.results.figures import PANELS, TRAIN, VAL, Drawing, Figure, canvas, legend, nothing, pile
from shoal.results.rows import Rows
from shoal.results.wording import setting

if TYPE_CHECKING:
    from shoal.train.run import Run

KINDS = {"binding": ("binds: from the answer to the token that asks for it", TRAIN), "induction": ("finds: from the query to the answer", VAL)}


def measured(run: Run) -> list[dict[str, Any]]:
    """A line for every head, a mean over the test sequences in which q stands once before it is asked for; none for a model without attention."""
    import torch

    from shoal.contracts import Context
    from shoal.inference.evaluate import batches
    from shoal.inference.heads import looks
    from shoal.inference.inside import weights_of

    task, model = run.config.task, run.config.model
    assert isinstance(task, RecallConfig)
    if not isinstance(model, DecoderConfig) or "attention" not in model.mixers[: model.num_layers]:
        return []
    tokens = torch.cat([batch.tokens[batch.weights[:, 0] > 0] for batch in batches(run, "test:distinct")])
    asked = (tokens[:, :-1] == tokens[:, -1:]).float().argmax(-1, keepdim=True)  # [B, 1]: the place of q
    answer, last = asked + task.delay, asked * 0 + tokens.shape[1] - 1
    lines = []
    for layer, weights in weights_of(run, tokens, Context()).items():
        found = {"binding": looks(weights, answer, asked).tolist(), "induction": looks(weights, last, answer).tolist()}
        lines += [{"layer": layer, "head": head, **{kind: found[kind][head] for kind in KINDS}} for head in range(weights.shape[1])]
    return lines


def figure(line: str, by: Sequence[str]) -> Figure:
    """A line for every head of every value of the path ``line``, a dot for every run and kind; a panel for every combination of the values of ``by``."""
    paths = [path for path in by if path != line]

    def draw(rows: Rows) -> Drawing:
        rows = Rows([row for row in rows if row["measures"].get("heads")])
        if not rows:
            return nothing("no heads measured yet")
        panels = rows.groups(paths)[:PANELS]
        heads = [(value, entry["layer"], entry["head"]) for value in rows.values(line) for entry in rows.where({line: value})[0]["measures"]["heads"]]
        columns = min(len(panels), 2)
        drawing, axes = canvas((0.75 + 0.3 * len(heads)) * math.ceil(len(panels) / columns) + 0.3, columns, math.ceil(len(panels) / columns))
        for spare in axes[len(panels) :]:
            spare.set_axis_off()
        for axis, (values, part) in zip(axes, panels, strict=False):
            for place, (value, layer, head) in enumerate(heads):
                entries = [x for row in part.where({line: value}) for x in row["measures"]["heads"] if (x["layer"], x["head"]) == (layer, head)]
                for shift, (kind, (label, colour)) in zip((-0.17, 0.17), KINDS.items(), strict=True):
                    x = np.sort([entry[kind] for entry in entries])
                    axis.plot(x, place + shift + pile(x) / 2, "o", markersize=4.5, color=colour, alpha=0.6, markeredgewidth=0, label=None if place else label)
            axis.set_title(setting(values))
            axis.set_xlim(-0.03, 1.03)
            axis.set_yticks(range(len(heads)), [f"{setting({line: value})}, layer {layer}{f', head {head}' if head else ''}" for value, layer, head in heads])
            axis.set_ylim(len(heads) - 0.5, -0.5)
            axis.grid(axis="y", visible=False)
            axis.set_xlabel("share of the head's attention")
        legend(drawing, axes[0])
        return drawing

    caption = (
        "Attention of every head on the test sequences, a dot a run: how much it gives, at the answer's place, to the token that will ask for it (binds), and "
        "at the query to the answer's place (finds: an induction head). Layers are counted from 0."
    )
    return Figure("heads", draw, caption)
