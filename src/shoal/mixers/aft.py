"""The Attention Free Transformer (Zhai et al. 2021, arXiv 2105.14103), causal: a weighted mean of the past for each channel by itself, gated by the query.

    y_t = sigmoid(q_t) * sum over s <= t of exp(k_s + w_ts) v_s / sum over s <= t of exp(k_s + w_ts)        then a matrix, as after attention

| kind | w_ts |
|---|---|
| full | <u_t, v_s>, with learned u and v of RANK numbers for each position up to the longest (the paper's factorised form and its 128) |
| local | the same where t - s < window; 0 elsewhere, where the past is still read |
| simple | 0 |
| conv | of the distance t - s < window alone, a number for each head; 0 elsewhere. k is one number a head. |

Of the paper's conv the shared weights by distance, the heads, the keys of one channel and the past beyond the window are here; the normalised weights with gain
and offset, and windows in two dimensions, are not. Positions "rotary" and "alibi" have no effect: what a pair weighs is no function of a product.

Everything is float32 at least, and no exponential overflows. simple costs T (``shoal.nn.running_mean``). The others cost T^2 in matrix products: as factors
exp(w_ts) and exp(k_s), a block of keys over its largest, read by queries that all come after the block, so that nothing of the future is in it; near the
diagonal, where no such block is left, pairs are worked out one by one, each row over its own largest. Where w differs by more than 80 over a block the largest
of such a product may be lost. The state is that of all positions for full, of a window and a mean for local and conv, a mean for simple.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from shoal.config.fields import check
from shoal.config.models import DecoderConfig
from shoal.contracts import Context
from shoal.nn import Constant, Linear, Normal, joint_linear, select
from shoal.nn.init import Distribution
from shoal.nn.layers import lookup
from shoal.nn.running_mean import FLOOR, Mean, block_mean, block_of, merged, running_mean, whole_mean

Kind = Literal["full", "local", "simple", "conv"]
RANK = 128
PAIR_STD = 0.01  # of w at first
TINY = 1e-30


class Cache(NamedTuple):
    """Keys and values whose weight may depend on where they are, and the mean of those before, float32 at least. Groups: G and C are D, or of conv 1 and K."""

    keys: Tensor  # [*L, B, H or 1, kept, G], the last ``kept`` positions; FLOOR where there was none
    values: Tensor  # [*L, B, H or 1, kept, C]
    positions: Tensor  # int64 [*L, B, kept]
    older: Mean  # [*L, B, H or 1, 1, G] and [*L, B, H or 1, 1, C]
    used: Tensor  # int64 scalar


class AFT(nn.Module):
    def __init__(self, kind: Kind, config: DecoderConfig, lead: tuple[int, ...] = (), max_length: int = 0) -> None:
        super().__init__()
        width = config.width
        self.kind: Kind = kind
        self.width, self.window, self.max_length, self.lead = width, config.window, max_length, lead
        self.groups = config.num_heads if kind == "conv" else 1
        self.query = Linear(width, width, bias=config.bias, lead=lead)
        self.key = Linear(width, self.groups if kind == "conv" else width, bias=config.bias, lead=lead)
        self.value = Linear(width, width, bias=config.bias, lead=lead)
        self.out = Linear(width, width, bias=config.bias, lead=lead)
        sized, relative = kind in ("full", "local"), kind == "conv"
        self.pair_query = nn.Parameter(torch.empty(*lead, max_length, RANK)) if sized else None  # u
        self.pair_key = nn.Parameter(torch.empty(*lead, max_length, RANK)) if sized else None  # v
        self.pair_distance = nn.Parameter(torch.empty(*lead, self.groups, config.window)) if relative else None

    def forward(self, x: Tensor, context: Context, cache: Cache | None = None) -> tuple[Tensor, Cache | None]:
        """x [*L, B, T, D] -> [*L, B, S, D]: means everywhere, gate and output only at the scored positions."""
        if context.at is None:
            q, k, v = joint_linear(x, [self.query, self.key, self.value])
        else:
            q = self.query(select(x, context.at))
            k, v = joint_linear(x, [self.key, self.value])
        k, v = (y.to(torch.promote_types(x.dtype, torch.float32)) for y in (k, v))
        if context.mask is not None:
            away = ~context.mask.unsqueeze(-1)
            k, v = k.masked_fill(away, FLOOR), v.masked_fill(away, 0)
        k, v = (y.unflatten(-1, (self.groups, -1)).transpose(-3, -2) for y in (k, v))  # [*L, B, groups, T, G]

        kept, positions = 0 if cache is None else cache.keys.shape[-2], context.positions
        if cache is not None:
            if positions is None:
                positions = cache.used + torch.arange(x.shape[-2], device=x.device)
            positions = torch.cat((cache.positions, positions.expand(x.shape[:-1])), dim=-1)
        pair = self._pair(kept, x.shape[-2], positions)
        found = running_mean(k, v) if pair is None else paired_mean(k, v, pair[..., kept:].to(v.dtype))
        if cache is not None:
            assert positions is not None
            before = cache.older
            if pair is not None and kept:
                before = merged(before, earlier_mean(cache.keys, cache.values, pair[..., :kept].to(v.dtype)))
            found, cache = merged(before, found), _append(cache, k, v, positions)
        mean = found[1].transpose(-3, -2).flatten(-2).to(x.dtype)
        return self.out(q.sigmoid() * select(mean, context.at)), cache

    def _pair(self, kept: int, time: int, positions: Tensor | None) -> Tensor | None:
        """w [*L, B or 1, groups or 1, T, kept + T] of the new positions to those kept and to each other. ``positions`` [*L, B, kept + T]; None = 0 .. T-1."""
        if self.pair_distance is not None:
            return by_distance(self.pair_distance, kept + time)[..., kept:, :].unsqueeze(-4)
        if self.pair_query is None or self.pair_key is None:
            return None
        fits = f"aft_{self.kind} has weights for {self.max_length} positions, the task's longest, not for {time}"
        check(time <= self.max_length, "model.mixers", f"{fits}; use aft_simple or aft_conv to go on beyond")
        if positions is None:
            pair = (self.pair_query[..., :time, :] @ self.pair_key[..., :time, :].mT).unsqueeze(-3)
        else:
            pair = lookup(positions[..., kept:], self.pair_query) @ lookup(positions, self.pair_key).mT
        if self.kind == "local":
            cell = torch.arange(kept + time, device=pair.device)
            pair = pair.masked_fill(cell[kept:].unsqueeze(-1) - cell >= self.window, 0)
        return pair.unsqueeze(-3)

    def init_cache(self, batch: int, length: int) -> Cache:
        weight = self.out.weight
        precise, kept = torch.promote_types(weight.dtype, torch.float32), self._kept(length)
        keys, values = self.key.weight.shape[-1] // self.groups, self.width // self.groups
        shape, positions = (*self.lead, batch, self.groups), weight.new_zeros(*self.lead, batch, kept, dtype=torch.int64)
        none = [(weight.new_full((*shape, n, keys), FLOOR, dtype=precise), weight.new_zeros(*shape, n, values, dtype=precise)) for n in (kept, 1)]
        return Cache(*none[0], positions, none[1], weight.new_zeros((), dtype=torch.int64))

    def _kept(self, length: int) -> int:
        """How many positions have a weight of their own when the next comes."""
        return {"full": length, "local": self.window - 1, "simple": 0, "conv": self.window - 1}[self.kind]

    def init_rules(self) -> list[tuple[str, Distribution]]:
        """Of full and local w begins at N(0, PAIR_STD^2), of conv at 0: all nearly as simple."""
        return [("pair_distance", Constant(0.0)), ("pair_*", Normal((PAIR_STD**2 / RANK) ** 0.25))]

    def undecayed(self) -> list[str]:
        return []

    def flops(self, batch: int, time: int, scored: int) -> int:
        keys = self.key.weight.shape[-1]
        total = 2 * batch * self.width * (2 * scored * self.width + time * (keys + self.width))
        if self.kind == "simple":
            return total
        if self.pair_query is not None:
            total += 2 * time * time * RANK
        count, size = _blocks(time, keys // self.groups)
        if self.groups == keys:
            total += 2 * batch * count * size * size * self.width  # in the blocks of the diagonal
        while count > 1:
            count //= 2
            total += 2 * batch * count * size * size * (self.width + keys)
            size *= 2
        return total

    def state_bytes(self, length: int) -> int:
        return 4 * (self._kept(length) + 1) * (self.key.weight.shape[-1] + self.width)


def paired_mean(k: Tensor, v: Tensor, pair: Tensor) -> Mean:
    """Log of the summed weights exp(k_s + w_ts), s <= t, and mean of the v_s by them: k [..., T, G], v [..., T, C], G = C or 1, pair w [..., T, T].

    Blocks of the diagonal first. Then of each two neighbours the second reads the first whole, and they are one; until one is left.
    """
    time = v.shape[-2]
    count, size = _blocks(time, k.shape[-1])
    missing = count * size - time
    k, v, pair = F.pad(k, (0, 0, 0, missing), value=FLOOR), F.pad(v, (0, 0, 0, missing)), F.pad(pair, (0, missing, 0, missing))
    found = block_mean(*(y.unflatten(-2, (count, size)) for y in (k, v)), pair=_diagonal(pair, count, 0))  # [..., count, size, C]
    while count > 1:
        count //= 2
        first = [y.unflatten(-2, (count, 2, size))[..., 0, :, :] for y in (k, v)]
        (total, before), (mean, past) = ([y.unflatten(-3, (count, 2))[..., i, :, :] for i in (1, 0)] for y in found)
        total, mean = merged(earlier_mean(*first, _diagonal(pair, count, 1)), (total, mean))
        found = torch.cat((before, total), dim=-2), torch.cat((past, mean), dim=-2)
        size *= 2
    total, mean = (y.flatten(-3, -2)[..., :time, :] for y in found)
    return total, mean


def earlier_mean(k: Tensor, v: Tensor, pair: Tensor) -> Mean:
    """As ``paired_mean``, of keys that all come before the queries, so that all are read: k [..., S, G], v [..., S, C], pair [..., T, S]."""
    top, peak = k.detach().amax(-2, keepdim=True), pair.detach().amax(-1, keepdim=True)
    weights = (k - top).exp()
    sums, total = ((pair - peak).exp() @ torch.cat((weights * v, weights), dim=-1)).split((v.shape[-1], k.shape[-1]), dim=-1)
    total = total.clamp(min=TINY)
    return top + peak + total.log(), sums / total


def by_distance(weights: Tensor, time: int) -> Tensor:
    """[..., W] numbers for the distances 0 .. W-1 -> [..., T, T]: that of t - s at row t, place s; 0 from W on, and where s > t."""
    weights = weights[..., :time]
    line = torch.cat((weights[..., :1], F.pad(weights[..., 1:].flip(-1), (2 * time - weights.shape[-1], 0))), dim=-1)  # place -d, from the end, of distance d
    rows = line.unsqueeze(-2).expand(*line.shape[:-1], time, 2 * time).flatten(-2)  # one number less a row: each begins a place later than the one above
    return rows[..., : time * (2 * time - 1)].unflatten(-1, (time, 2 * time - 1))[..., :time]


def _blocks(time: int, groups: int) -> tuple[int, int]:
    """How many, a power of two, and the least size with which they hold so many positions; twice ``running_mean``'s at most: as fast, and half as many."""
    count = 1
    while count * 2 * block_of(groups) < time:
        count *= 2
    return count, -(-time // count)


def _diagonal(pair: Tensor, count: int, half: int) -> Tensor:
    """[..., T, T] -> [..., count, size, size]: the blocks of the diagonal, or (``half`` 1) the lower left quarter of each."""
    size = pair.shape[-1] // count
    blocks = pair.unflatten(-2, (count, size)).unflatten(-1, (count, size)).diagonal(dim1=-4, dim2=-2).movedim(-1, -3)
    return blocks[..., size // 2 :, : size // 2] if half else blocks


def _append(cache: Cache, k: Tensor, v: Tensor, positions: Tensor) -> Cache:
    """The last ``kept`` of the old and the new; the others join the mean."""
    time = v.shape[-2]
    keys, values = torch.cat((cache.keys, k), dim=-2), torch.cat((cache.values, v), dim=-2)
    older = merged(cache.older, whole_mean(keys[..., :time, :], values[..., :time, :]))
    return Cache(keys[..., time:, :], values[..., time:, :], positions[..., time:], older, cache.used + time)
