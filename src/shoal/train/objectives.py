"""From a model and a batch to sums: loss, weight, metrics. Never means, so that pieces of a batch add up exactly."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.nn import functional as F

from shoal.contracts import Batch, Context, Objective, Sums


def cross_entropy(model: Any, batch: Batch, key: Tensor | None = None) -> Sums:
    """Next-token cross-entropy in nats at the scored positions; softmax and loss in float32.

    metrics: "accuracy", the share of scored tokens that are the most probable one; "exact", the share of rows in which all are.
    """
    hidden, _ = model(batch.tokens, Context(mask=batch.mask, at=batch.at, key=key))
    logits = model.logits(hidden).float()  # [*L, B, S, V]
    weights = batch.weights
    nll = F.cross_entropy(logits.flatten(0, -2), batch.targets.flatten(), reduction="none").view(weights.shape)
    right = (logits.detach().argmax(-1) == batch.targets) & (weights > 0)
    scored = (weights > 0).sum(-1)  # [*L, B] positions of each row
    rows = scored > 0
    exact = (right.sum(-1) == scored) & rows
    return Sums(
        loss=(nll * weights).sum((-2, -1)),
        weight=weights.sum((-2, -1)),
        metrics={"accuracy": (right.sum((-2, -1)).float(), scored.sum(-1).float()), "exact": (exact.sum(-1).float(), rows.sum(-1).float())},
    )


def add(a: Sums, b: Sums) -> Sums:
    metrics = {name: (total + b.metrics[name][0], count + b.metrics[name][1]) for name, (total, count) in a.metrics.items()}
    return Sums(a.loss + b.loss, a.weight + b.weight, metrics)


def means(sums: Sums) -> dict[str, Tensor]:
    """name -> float32 [*L]; NaN where nothing was scored."""
    return {"loss": sums.loss / sums.weight} | {name: total / count for name, (total, count) in sums.metrics.items()}


OBJECTIVES: dict[str, Objective] = {"cross_entropy": cross_entropy}
