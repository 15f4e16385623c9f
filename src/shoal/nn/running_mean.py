"""Weighted means of the past, exp(l_s) being the weight of position s: what attention is when the weights of the past do not depend on who asks.

    total_t = log sum over s <= t of exp(l_s)        mean_t = sum over s <= t of exp(l_s - total_t) x_s

A mean and the log of its weights stand for any set of positions, and two sets make a third (``merged``): nothing is ever larger than the largest x, and no
exponential overflows, whatever the weights. A position of weight FLOOR is as good as not there. Sequences longer than a block are cut, and the ends of the
blocks are themselves such a sequence: cost and memory grow as T, and no step waits for T others.
Not here: weights that depend on both places (``mixers/aft.py``) or on what a query asks for (``mixers/attention.py``).

    total, mean = running_mean(log_weights, x)          # and, going on: merged((total[..., -1:, :], mean[..., -1:, :]), running_mean(more, y))
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

FLOOR = -1e30  # finite: a difference of two is 0, not NaN
BLOCKS = (32, 4)  # positions of a block: by matrix products where the channels share a weight, else by multiply and sum. On one CPU core, sequences of 100:
# 64 takes 1.2 to 1.6 times as long as 32; 8 takes 1.3 to 1.4 times as long as 4, and memory in proportion

Mean = tuple[Tensor, Tensor]  # log of the summed weights [..., T, G], mean [..., T, C]; G is C, or 1: one weight for all channels


def running_mean(log_weight: Tensor, x: Tensor) -> Mean:
    """log_weight [..., T, G], x [..., T, C] -> the two above, at every position."""
    time, block = x.shape[-2], block_of(log_weight.shape[-1])
    if time <= block:
        return block_mean(log_weight, x)
    count, size = -(-time // block), -(-time // -(-time // block))
    missing = (0, 0, 0, count * size - time)
    total, mean = block_mean(*(y.unflatten(-2, (count, size)) for y in (F.pad(log_weight, missing, value=FLOOR), F.pad(x, missing))))
    before, past = running_mean(total[..., -1, :], mean[..., -1, :])
    first = (0, 0, 1, -1)  # a block is told of those before it
    total, mean = merged((F.pad(before, first, value=FLOOR).unsqueeze(-2), F.pad(past, first).unsqueeze(-2)), (total, mean))
    return total.flatten(-3, -2)[..., :time, :], mean.flatten(-3, -2)[..., :time, :]


def block_of(groups: int) -> int:
    """Positions of a block where log-weights are [..., T, groups]."""
    return BLOCKS[0] if groups == 1 else BLOCKS[1]


def block_mean(log_weight: Tensor, x: Tensor, pair: Tensor | None = None) -> Mean:
    """As ``running_mean``, T^2 at once. ``pair`` [..., T, T] is added: row t to the log-weights as position t sees them."""
    place = torch.arange(x.shape[-2], device=x.device)
    later = place > place.unsqueeze(-1)
    if log_weight.shape[-1] == 1:
        scores = (log_weight.mT if pair is None else log_weight.mT + pair).masked_fill(later, -torch.inf)  # [..., T, T]
        return scores.logsumexp(-1, keepdim=True), scores.softmax(-1) @ x
    scores = log_weight.unsqueeze(-3) if pair is None else log_weight.unsqueeze(-3) + pair.unsqueeze(-1)
    scores = scores.masked_fill(later.unsqueeze(-1), -torch.inf)  # [..., T, T, G]
    return scores.logsumexp(-2), (scores.softmax(-2) * x.unsqueeze(-3)).sum(-2)


def whole_mean(log_weight: Tensor, x: Tensor) -> Mean:
    """Of all positions: [..., 1, G] and [..., 1, C]."""
    return log_weight.logsumexp(-2, keepdim=True), (log_weight.softmax(-2) * x).sum(-2, keepdim=True)


def merged(first: Mean, second: Mean) -> Mean:
    """The mean of both, each by its weight."""
    (a, x), (b, y) = first, second
    return torch.logaddexp(a, b), (a - b).sigmoid() * x + (b - a).sigmoid() * y


def running_mean_flops(time: int, width: int) -> int:
    """Matrix products of ``running_mean`` where ``width`` channels share a weight: a multiply-add is 2."""
    block, total = BLOCKS[0], 0
    while time > block:
        count = -(-time // block)
        size = -(-time // count)
        total, time = total + 2 * count * size * size * width, count
    return total + 2 * time * time * width
