"""Linear attention (Katharopoulos, Vyas, Pappas, Fleuret 2020, arXiv 2006.16236): the weight of a pair is a product of features, so the past is one sum.

    y_t = S_t^T f(q_t) / z_t . f(q_t)        S_t = sum over s <= t of f(k_s) v_s^T    z_t = sum over s <= t of f(k_s)        f(x) = elu(x) + 1

The cost grows as T: sequences are cut into chunks; inside a chunk the weights are a masked matrix product, and what lies before it is read from S and z
(equations 18 to 20). Up to CHUNK positions (in the sequence, or scored) there are no chunks. S, z and quotients are float32 at least.
The features are a part of its own; ``performer.py`` has another. Where it has no softmax to be true to (this file's), rotary positions have no effect.
Not here: decays of the state (``ssd.py``).

    y, state = linear_attention(f(q), f(k), v)
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from shoal.config.models import DecoderConfig
from shoal.contracts import Context
from shoal.mixers.attention import turned
from shoal.nn import Linear, joint_linear, select
from shoal.nn.init import Distribution

CHUNK = 128  # on one CPU core with 4 heads of 32: at 100 positions one piece takes half to 0.8 of the time of two of 64, at 2,048 either takes as long


class State(NamedTuple):
    """The past, as far as a query can ask."""

    values: Tensor  # S [*L, B, H, N, K], float32 at least
    weights: Tensor  # z [*L, B, H, N], float32 at least


class Cache(NamedTuple):
    state: State
    used: Tensor  # int64 scalar: positions seen


class Features(Protocol):
    """What makes of queries and keys [*L, B, T, H, K] numbers of 0 or more, [*L, B, T, H, N], whose products are the weights."""

    size: int  # N
    rotary: bool  # weights stand for functions of <q, k>, so that rotary positions make them functions of the distance

    def queries(self, q: Tensor) -> Tensor: ...
    def keys(self, k: Tensor) -> Tensor: ...
    def flops(self, vectors: int) -> int: ...  # matrix products for so many vectors


class Elu(nn.Module):
    """elu(x) + 1, which is exp(x) below 0: written so, as the sum loses its digits there."""

    rotary = False

    def __init__(self, head_width: int) -> None:
        super().__init__()
        self.size = head_width

    def keys(self, k: Tensor) -> Tensor:
        return torch.where(k > 0, k + 1, k.clamp(max=0).exp())

    queries = keys

    def flops(self, vectors: int) -> int:
        return 0


class LinearAttention(nn.Module):
    def __init__(self, config: DecoderConfig, lead: tuple[int, ...] = (), features: Features | None = None) -> None:
        super().__init__()
        width = config.width
        self.num_heads, self.head_width, self.lead = config.num_heads, width // config.num_heads, lead
        self.features = Elu(self.head_width) if features is None else features
        self.rotary_base = config.rotary_base if config.positions == "rotary" and self.features.rotary else None
        self.query = Linear(width, width, bias=config.bias, lead=lead)
        self.key = Linear(width, width, bias=config.bias, lead=lead)
        self.value = Linear(width, width, bias=config.bias, lead=lead)
        self.out = Linear(width, width, bias=config.bias, lead=lead)

    def forward(self, x: Tensor, context: Context, cache: Cache | None = None) -> tuple[Tensor, Cache | None]:
        """x [*L, B, T, D] -> [*L, B, S, D]: keys, values and states everywhere; queries only at the scored positions where these are few."""
        few = min(x.shape[-2], _scored(context.at, x.shape[-2])) <= CHUNK
        at = context.at if few else None
        if at is None:
            q, k, v = joint_linear(x, [self.query, self.key, self.value])
        else:
            q = self.query(select(x, at))
            k, v = joint_linear(x, [self.key, self.value])
        q, k, v = (y.unflatten(-1, (self.num_heads, self.head_width)) for y in (q, k, v))  # [*L, B, T, H, K]
        if self.rotary_base is not None:
            positions = torch.arange(x.shape[-2], device=x.device) + (0 if cache is None else cache.used)
            q, k = turned(q, k, context, at, positions, self.rotary_base)
        q, k = self.features.queries(q), self.features.keys(k)
        if context.mask is not None:  # no weight in any sum
            k = k.masked_fill(~context.mask[..., None, None], 0)
        y, state = linear_attention(q, k, v, None if cache is None else cache.state, at)
        y = self.out(y.flatten(-2) if few else select(y.flatten(-2), context.at))
        return y, None if cache is None or state is None else Cache(state, cache.used + x.shape[-2])

    def init_cache(self, batch: int, length: int) -> Cache:
        """Of one size, whatever the length."""
        weight = self.out.weight
        precise, shape = torch.promote_types(weight.dtype, torch.float32), (*self.lead, batch, self.num_heads, self.features.size)
        state = State(weight.new_zeros(*shape, self.head_width, dtype=precise), weight.new_zeros(shape, dtype=precise))
        return Cache(state, weight.new_zeros((), dtype=torch.int64))

    def init_rules(self) -> list[tuple[str, Distribution]]:
        return []

    def undecayed(self) -> list[str]:
        return []

    def flops(self, batch: int, time: int, scored: int) -> int:
        few, width, sizes = min(time, scored) <= CHUNK, self.num_heads * self.head_width, self.features.size + self.head_width
        queries = scored if few else time
        count, size = (1, time) if few else _chunks(time)
        inside = 2 * batch * self.num_heads * (queries * time if few else count * size * size) * sizes
        between = 0 if few else 2 * 2 * batch * count * size * width * self.features.size
        projections = 2 * batch * width * width * (queries + 2 * time + scored)
        return projections + self.features.flops(batch * self.num_heads * (queries + time)) + inside + between

    def state_bytes(self, length: int) -> int:
        return 4 * self.num_heads * self.features.size * (self.head_width + 1)


def linear_attention(q: Tensor, k: Tensor, v: Tensor, state: State | None = None, at: Tensor | slice | None = None) -> tuple[Tensor, State | None]:
    """The equations above: features q of the queries at the positions ``at`` [*L, B, S, H, N] (all if None), k [*L, B, T, H, N], v [*L, B, T, H, K]
    -> y [*L, B, S, H, K], 0 where nothing of the past has weight; and the last state. Without a state to begin with (then it is 0), None.
    Products in the type of v, sums float32 at least."""
    q, k, v = (y.transpose(-3, -2) for y in (q.to(v.dtype), k.to(v.dtype), v))  # [*L, B, H, T, N]
    time = v.shape[-2]
    if min(time, q.shape[-2]) <= CHUNK:
        y = _read(q, k, v, state, at)
        return y.transpose(-3, -2), None if state is None else _sum(state, _write(k, v))

    count, size = _chunks(time)
    q, k, v = (F.pad(y, (0, 0, 0, count * size - time)).unflatten(-2, (count, size)) for y in (q, k, v))  # [*L, B, H, chunks, T in chunk, N]
    written = _write(k, v)
    values, weights = written.values.cumsum(-3), written.weights.cumsum(-2)
    before = State(F.pad(values[..., :-1, :, :], (0, 0, 0, 0, 1, 0)), F.pad(weights[..., :-1, :], (0, 0, 1, 0)))
    if state is not None:
        before = _sum(before, State(state.values.unsqueeze(-3), state.weights.unsqueeze(-2)))
    y = _read(q, k, v, before).flatten(-3, -2)[..., :time, :].transpose(-3, -2)
    return y, None if state is None else _sum(state, State(values[..., -1, :, :], weights[..., -1, :]))


def _scored(at: Tensor | slice | None, time: int) -> int:
    return at.shape[-1] if isinstance(at, Tensor) else len(range(time)[at or slice(None)])


def _chunks(time: int) -> tuple[int, int]:
    """How many, and of what size, so that little is added to the last."""
    count = -(-time // CHUNK)
    return count, -(-time // count)


def _read(q: Tensor, k: Tensor, v: Tensor, state: State | None, at: Tensor | slice | None = None) -> Tensor:
    """What queries [..., S, N] at the places ``at`` of a piece read of it, k [..., T, N] and v [..., T, K], and of the state before it: [..., S, K]."""
    precise, cell = torch.promote_types(v.dtype, torch.float32), torch.arange(k.shape[-2], device=k.device)
    query = (cell if at is None else cell[at]).unsqueeze(-1)  # [S, 1], or of an index [*L, B, S, 1]
    past = cell <= (query if query.dim() == 2 else query.unsqueeze(-3))
    pairs = (q @ k.mT).masked_fill(~past, 0)
    y, total = (pairs @ v).to(precise), pairs.sum(-1, keepdim=True, dtype=precise)
    if state is not None:
        y = y + q.to(precise) @ state.values
        total = total + (q * state.weights.unsqueeze(-2)).sum(-1, keepdim=True)
    return (y / torch.where(total > 0, total, 1)).to(v.dtype)


def _write(k: Tensor, v: Tensor) -> State:
    """What a piece [..., T, N] and [..., T, K] adds to the state."""
    precise = torch.promote_types(v.dtype, torch.float32)
    return State((k.mT @ v).to(precise), k.sum(-2, dtype=precise))


def _sum(first: State, second: State) -> State:
    return State(first.values + second.values, first.weights + second.weights)
