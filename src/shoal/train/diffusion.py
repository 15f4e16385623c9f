"""Masked diffusion: text is filled in, not continued (Sahoo et al. 2024, arXiv 2406.07524; Nie et al. 2025, arXiv 2502.09992).

Of a row's L tokens n are hidden behind the mask token, any n of them alike, and a model that sees the whole row names them. With n uniform in 1 .. L,

    L / n * (sum over the hidden of -log p(token | what is not hidden))

is in expectation an upper bound on -log p(row). It is what the papers have with a rate t uniform in (0, 1], each token hidden with probability t and weight
1 / t, averaged over t for given n: the same expectation, but the variance of those weights is infinite. Here n = ceil(t L).

The first token of a row is given, so the bound is on the other T - 1 given it, and the loss is in nats per token, as cross-entropy's (which also scores the
token after the row's last).

The mask token is the last id of the vocabulary, which no text has; it is never predicted: the softmax is over the others. What is not hidden is copied,
so it costs nothing (both: "SUBS" in the first paper).

    sums = masked_diffusion(model, batch, keys)     # training: one rate a row;  keys None: evaluation, LEVELS rates a row, always the same

Not here: sampling (``shoal.inference.diffusion``).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from shoal import rng
from shoal.contracts import Batch, Context, Sums
from shoal.nn.linear_cross_entropy import LARGE_VOCABULARY, linear_cross_entropy

LEVELS = 4  # of an evaluation; even, for they come in pairs
ROWS = 1 << 20  # of a batch, at most: the lowest bits of a row's key are its place
RATE, PLACES = -1, -2  # what keys are folded with; dropout folds with 0 and up
GOLDEN = 10_368_889  # 2**24 times the golden ratio's fraction, made odd


def row_keys(key: Tensor, num_rows: int) -> Tensor:
    """int64 [R] keys of a step -> [R, B], whose lowest bits are the row's number, so that a piece of a batch knows which of its rows it has."""
    return (key[:, None] & -ROWS) | torch.arange(num_rows, device=key.device)


def rates(key: Tensor) -> Tensor:
    """Keys of rows, int64 [*L, B] -> float32 in (0, 1]: the run's own draw, turned by the golden ratio from row to row.

    So rows next to each other are spread evenly, which stratifies any batch and any piece of it. Integers until the last, so equal on every device.
    """
    row = key & (ROWS - 1)
    draw = (rng.bits(rng.fold(key - row, RATE), 1).squeeze(-1) >> 40) + row * GOLDEN
    return ((draw & (2**24 - 1)) + 1).to(torch.float32) * 2.0**-24


def masked_diffusion(model: Any, batch: Batch, key: Tensor | None = None) -> Sums:
    """The bound's sum over the batch; weights are those of the scored targets, so batches must score all positions (``at`` None) or hide none in between.

    An evaluation hides by keys that depend on the row's own tokens, so it is the same in every fleet and every cut, at LEVELS rates in pairs t and 1 - t whose
    hidden tokens are disjoint, but for one. Of a row of 63 tokens (2 layers, characters) one draw has a standard deviation of 0.34 nats per token (with
    independent choices and weight 1 / t: 0.94), an evaluation 0.16: over 1,000 rows 0.005.

    Metrics: "accuracy", the share of the hidden tokens that are named; "exact", that of rows with all of them named.
    """
    assert batch.at is None, "masked diffusion scores whole rows"
    before = F.pad(batch.weights[..., :-1], (1, 0))  # [*L, B, T] the weight of each token as a target; the first is none
    weights = before if batch.mask is None else before * batch.mask
    mask = batch.mask
    if key is not None:
        return _bound(model, batch.tokens, weights, mask, rates(key), _ranks(rng.fold(key, PLACES), weights > 0), key)
    if mask is None:  # a window that is not full is filled up at its end
        mask = (weights > 0).flip(-1).cumsum(-1).flip(-1) > 0
        mask = mask | F.pad(torch.zeros_like(mask[..., 1:]), (1, 0), value=True)
    own = _content_keys(batch.tokens, weights > 0)
    total: Sums | None = None
    for pair in range(LEVELS // 2):
        ranks = _ranks(rng.fold(own, pair), weights > 0)
        low = (rng.uniform(rng.fold(own, RATE), 1).squeeze(-1) + pair) / LEVELS
        count = (weights > 0).sum(-1, keepdim=True)
        for rate, rank in ((low, ranks), (1 - low, count - 1 - ranks)):
            sums = _bound(model, batch.tokens, weights / LEVELS, mask, rate, rank, None)
            total = sums if total is None else _added(total, sums)
    assert total is not None
    return total


def _bound(model: Any, tokens: Tensor, weights: Tensor, mask: Tensor | None, rate: Tensor, ranks: Tensor, key: Tensor | None) -> Sums:
    """One rate [*L, B] of each row: what ranks below ceil(rate * L) is hidden."""
    scored = weights > 0
    count = scored.sum(-1)  # [*L, B]
    number = (rate * count).ceil().clamp(min=1)
    hidden_here = scored & (ranks < number.unsqueeze(-1))
    canvas = torch.where(hidden_here, model.vocab_size - 1, tokens)
    hidden, _ = model(canvas, Context(mask=mask, key=key))
    targets = torch.where(hidden_here, tokens, 0)
    nll, best = _named(model, hidden, targets)
    factor = (count / number).unsqueeze(-1) * weights
    right = (best == targets) & hidden_here
    named, asked = right.sum(-1), hidden_here.sum(-1)
    rows = asked > 0
    metrics = {
        "accuracy": (named.sum(-1).float(), asked.sum(-1).float()),
        "exact": (((named == asked) & rows).sum(-1).float(), rows.sum(-1).float()),
    }
    return Sums(loss=(torch.where(hidden_here, nll, 0.0) * factor).sum((-2, -1)).float(), weight=weights.sum((-2, -1)), metrics=metrics)


def _named(model: Any, hidden: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """nll and the most probable token, both [*L, B, T], without the last of the vocabulary."""
    head = model.linear_head()
    if head is not None and head[0].shape[-1] >= LARGE_VOCABULARY:
        weight, bias, softcap = head
        return linear_cross_entropy(hidden, weight[..., :-1], None if bias is None else bias[..., :-1], targets, softcap)
    logits = model.logits(hidden)[..., :-1].float()  # [*L, B, T, V - 1]
    return F.cross_entropy(logits.flatten(0, -2), targets.flatten(), reduction="none").view(targets.shape), logits.detach().argmax(-1)


def _ranks(key: Tensor, scored: Tensor) -> Tensor:
    """Keys of rows, int64 [*L, B]; bool [*L, B, T] -> int64 [*L, B, T]: scored positions of a row numbered from 0 in random order, the others after them.

    Counted, not sorted: a compiler takes minutes for a sort, and T^2 comparisons are few beside a model's products.
    """
    draw = torch.where(scored, rng.bits(key, scored.shape[-1]) >> 1, torch.iinfo(torch.int64).max)
    place = torch.arange(draw.shape[-1], device=draw.device)
    mine, other = draw.unsqueeze(-1), draw.unsqueeze(-2)
    return ((other < mine) | ((other == mine) & (place < place.unsqueeze(-1)))).sum(-1)


def _content_keys(tokens: Tensor, scored: Tensor) -> Tensor:
    """int64 [*L, B]: a hash of the scored tokens and where they stand."""
    place = torch.arange(tokens.shape[-1], device=tokens.device)
    return rng.fold(torch.where(scored, rng.fold(tokens, place), 0).sum(-1), 0)


def _added(a: Sums, b: Sums) -> Sums:
    metrics = {name: (x + b.metrics[name][0], n + b.metrics[name][1]) for name, (x, n) in a.metrics.items()}
    return Sums(a.loss + b.loss, a.weight + b.weight, metrics)
