"""From a model and a batch to sums: loss, weight, metrics. Never means, so that pieces of a batch add up exactly.

Every objective measures "accuracy", the share of scored tokens that are the most probable one, and "exact", the share of rows in which all are.
Evaluations (nothing asks for gradients) also measure what a number format loses (Prieto et al. 2025, arXiv 2501.04697), in the format the
loss is computed in: "zero_loss", the share of scored tokens whose loss is exactly 0; "collapse", the share at which the sum over the
vocabulary is exactly its largest term, all others having been absorbed in rounding.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from shoal.contracts import Batch, Context, Objective, Sums


def cross_entropy(model: Any, batch: Batch, key: Tensor | None = None) -> Sums:
    """Next-token cross-entropy in nats at the scored positions; softmax and loss in float32."""
    return _sums(model, batch, key, torch.float32, _softmax_loss, _exponentials)


def cross_entropy_float64(model: Any, batch: Batch, key: Tensor | None = None) -> Sums:
    """The same with softmax and loss in float64; the model's logits, the sums and the gradients that go back are as before."""
    return _sums(model, batch, key, torch.float64, _softmax_loss, _exponentials)


def stablemax(model: Any, batch: Batch, key: Tensor | None = None) -> Sums:
    """-log(s(target) / sum of s) with s(x) = x + 1 from 0 on and 1 / (1 - x) below, where softmax has exp(x); in float32 (the same paper's StableMax)."""
    return _sums(model, batch, key, torch.float32, _stablemax_loss, _stable)


def _sums(
    model: Any, batch: Batch, key: Tensor | None, dtype: torch.dtype, loss: Callable[[Tensor, Tensor], Tensor], terms: Callable[[Tensor], Tensor]
) -> Sums:
    """``loss``: logits [N, V], targets [N] -> [N]; ``terms``: logits [..., V] -> what is summed over the vocabulary, [..., V]."""
    hidden, _ = model(batch.tokens, Context(mask=batch.mask, at=batch.at, key=key))
    logits = model.logits(hidden).to(dtype)  # [*L, B, S, V]
    weights = batch.weights
    nll = loss(logits.flatten(0, -2), batch.targets.flatten()).view(weights.shape)
    there = weights > 0
    right = (logits.detach().argmax(-1) == batch.targets) & there
    scored = there.sum(-1)  # [*L, B] positions of each row
    rows = scored > 0
    exact = (right.sum(-1) == scored) & rows
    count = scored.sum(-1).float()
    metrics = {"accuracy": (right.sum((-2, -1)).float(), count), "exact": (exact.sum(-1).float(), rows.sum(-1).float())}
    if not torch.is_grad_enabled():
        summed = terms(logits)
        collapsed = summed.sum(-1) == summed.amax(-1)
        metrics |= {name: ((what & there).sum((-2, -1)).float(), count) for name, what in (("zero_loss", nll == 0), ("collapse", collapsed))}
    return Sums(loss=(nll * weights).sum((-2, -1)).float(), weight=weights.sum((-2, -1)), metrics=metrics)


def _softmax_loss(logits: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(logits, targets, reduction="none")


def _exponentials(logits: Tensor) -> Tensor:
    return (logits - logits.amax(-1, keepdim=True)).exp()


def _stablemax_loss(logits: Tensor, targets: Tensor) -> Tensor:
    s = _stable(logits)
    return -(s.gather(-1, targets.unsqueeze(-1)).squeeze(-1) / s.sum(-1)).log()


def _stable(x: Tensor) -> Tensor:
    return torch.where(x >= 0, x + 1, 1 / (1 - x.clamp(max=0)))  # clamped, else the gradient of the branch not taken is infinite at 1, and 0 * inf is NaN


def add(a: Sums, b: Sums) -> Sums:
    metrics = {name: (total + b.metrics[name][0], count + b.metrics[name][1]) for name, (total, count) in a.metrics.items()}
    return Sums(a.loss + b.loss, a.weight + b.weight, metrics)


def means(sums: Sums) -> dict[str, Tensor]:
    """name -> float32 [*L]; NaN where nothing was scored."""
    return {"loss": sums.loss / sums.weight} | {name: total / count for name, (total, count) in sums.metrics.items()}


OBJECTIVES: dict[str, Objective] = {"cross_entropy": cross_entropy, "cross_entropy_float64": cross_entropy_float64, "stablemax": stablemax}
