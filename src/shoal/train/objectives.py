"""From a model and a batch to sums: loss, weight, metrics. Never means, so that pieces of a batch add up exactly.

Every objective measures "accuracy", the share of scored tokens that are the most probable one, and "exact", the share of rows in which all are.
Evaluations (nothing asks for gradients) also measure what a number format loses (Prieto et al. 2025, arXiv 2501.04697), in the format the
loss is computed in: "zero_loss", the share of scored tokens whose loss is exactly 0; "collapse", the share at which the sum over the
vocabulary is exactly its largest term, all others having been absorbed in rounding. Not for cross-entropy over a large vocabulary, whose logits
are never all there.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from shoal.contracts import Batch, Context, Objective, Sums
from shoal.nn.linear_cross_entropy import LARGE_VOCABULARY, linear_cross_entropy
from shoal.train.diffusion import masked_diffusion


def cross_entropy(model: Any, batch: Batch, key: Tensor | None = None) -> Sums:
    """Next-token cross-entropy in nats at the scored positions; softmax and loss in float32. A large vocabulary's logits are never all there."""
    head = model.linear_head()
    if head is None or head[0].shape[-1] < LARGE_VOCABULARY:
        return _sums(model, batch, key, torch.float32, _softmax_loss, _exponentials)
    hidden, _ = model(batch.tokens, Context(mask=batch.mask, at=batch.at, key=key))
    weight, bias, softcap = head
    nll, best = linear_cross_entropy(hidden, weight, bias, batch.targets, softcap)
    return _scored(batch, nll, best)


def cross_entropy_float64(model: Any, batch: Batch, key: Tensor | None = None) -> Sums:
    """The same with softmax and loss in float64; the model's logits, the sums and the gradients that go back are as before."""
    return _sums(model, batch, key, torch.float64, _softmax_loss, _exponentials)


def stablemax(model: Any, batch: Batch, key: Tensor | None = None) -> Sums:
    """-log(s(target) / sum of s) with s(x) = x + 1 from 0 on and 1 / (1 - x) below, where softmax has exp(x); in float32 (the same paper's StableMax)."""
    return _sums(model, batch, key, torch.float32, _stablemax_loss, _stable)


def likelihood(model: Any, batch: Batch, key: Tensor | None = None) -> Sums:
    """Cross-entropy of a hidden Markov model, whose gradient is minus the expected counts: for Baum-Welch alone (``shoal.train.baum_welch``).

    They are counts over each row's whole sequence, its first token included, though that is not in the loss.
    """
    sums = _sums(_Counting(model), batch, key, torch.float32, _chosen_loss, _exponentials)
    if not torch.is_grad_enabled():
        return sums
    start = batch.tokens[..., :1] if batch.mask is None else batch.tokens.gather(-1, batch.mask.long().argmax(-1, keepdim=True))  # [*L, B, 1]
    logits = model.logits(model.prior(start.shape[-2], free=True).unsqueeze(-2), free=True)  # [*L, B, 1, V]
    first = logits.squeeze(-2).gather(-1, start).squeeze(-1)
    first = torch.where((batch.weights > 0).any(-1), first, 0.0).sum(-1).float()
    return Sums(sums.loss - (first - first.detach()), sums.weight, sums.metrics)


class _Counting:
    """A hidden Markov model, differentiated so that gradients are counts."""

    def __init__(self, model: Any) -> None:
        self.model = model

    def __call__(self, tokens: Tensor, context: Context) -> tuple[Tensor, Any]:
        return self.model(tokens, context, free=True)

    def logits(self, hidden: Tensor) -> Tensor:
        return self.model.logits(hidden, free=True)


def _sums(
    model: Any, batch: Batch, key: Tensor | None, dtype: torch.dtype, loss: Callable[[Tensor, Tensor], Tensor], terms: Callable[[Tensor], Tensor]
) -> Sums:
    """``loss``: logits [N, V], targets [N] -> [N]; ``terms``: logits [..., V] -> what is summed over the vocabulary, [..., V]."""
    hidden, _ = model(batch.tokens, Context(mask=batch.mask, at=batch.at, key=key))
    logits = model.logits(hidden).to(dtype)  # [*L, B, S, V]
    nll = loss(logits.flatten(0, -2), batch.targets.flatten()).view(batch.weights.shape)
    sums = _scored(batch, nll, logits.detach().argmax(-1))
    if not torch.is_grad_enabled():
        summed, there, (_, count) = terms(logits), batch.weights > 0, sums.metrics["accuracy"]
        collapsed = summed.sum(-1) == summed.amax(-1)
        sums.metrics.update({name: ((what & there).sum((-2, -1)).float(), count) for name, what in (("zero_loss", nll == 0), ("collapse", collapsed))})
    return sums


def _scored(batch: Batch, nll: Tensor, best: Tensor) -> Sums:
    """Loss, accuracy and exact from nll and the most probable tokens, both [*L, B, S]."""
    weights, there = batch.weights, batch.weights > 0
    right = (best == batch.targets) & there
    scored = there.sum(-1)  # [*L, B] positions of each row
    rows = scored > 0
    exact = (right.sum(-1) == scored) & rows
    metrics = {"accuracy": (right.sum((-2, -1)).float(), scored.sum(-1).float()), "exact": (exact.sum(-1).float(), rows.sum(-1).float())}
    return Sums(loss=(nll * weights).sum((-2, -1)).float(), weight=weights.sum((-2, -1)), metrics=metrics)


def _softmax_loss(logits: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(logits, targets, reduction="none")


def _chosen_loss(logits: Tensor, targets: Tensor) -> Tensor:
    return -logits.gather(-1, targets.unsqueeze(-1)).squeeze(-1)


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


OBJECTIVES: dict[str, Objective] = {
    "cross_entropy": cross_entropy,
    "cross_entropy_float64": cross_entropy_float64,
    "stablemax": stablemax,
    "likelihood": likelihood,
    "masked_diffusion": masked_diffusion,
}
