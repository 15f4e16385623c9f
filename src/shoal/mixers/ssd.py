"""SSD, the mixer of Mamba-2 (Dao, Gu 2024, arXiv 2405.21060): a selective state space with one decay per head, computed by matrix products.

    h_t = exp(step_t A) h_{t-1} + step_t x_t B_t^T        y_t = h_t C_t + D x_t        (per head; h is [K, N])

Because the decay of a head is one number, y = M x with M[s, t] = <C_s, B_t> exp(A (step_{t+1} + ... + step_s)) step_t for t <= s: masked attention
without the softmax. Up to CHUNK positions (in the sequence, or scored) that is the whole computation; longer sequences are cut into
chunks of at most that many, and states go from one to the next (section 6). One group: all heads read and write with the same B and C.
Not here: Mamba-1, whose decay differs by channel and state, so that no matrix form exists (``mamba.py``).

    y, _ = ssd(x, step, A, B, C)
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from shoal import rng
from shoal.config.models import DecoderConfig
from shoal.contracts import Context
from shoal.mixers.steps import step_bias
from shoal.nn import Constant, Given, Linear, RMSNorm, Uniform, joint_linear, select, short_convolution
from shoal.nn.init import Distribution

CHUNK = 64


class Cache(NamedTuple):
    past: Tensor  # [*L, B, W-1, inner + 2N] the short convolution's last inputs
    state: Tensor  # [*L, B, H, K, N], float32 at least


class SSD(nn.Module):
    def __init__(self, config: DecoderConfig, lead: tuple[int, ...] = ()) -> None:
        super().__init__()
        inner, heads = config.expand * config.width, config.num_heads
        self.width, self.inner, self.num_heads, self.state_size, self.lead = config.width, inner, heads, config.state_size, lead
        self.steps = config.convolution
        self.mixed = inner + 2 * config.state_size  # channels of x, B and C, which the short convolution mixes
        self.gate = Linear(config.width, inner, bias=config.bias, lead=lead)
        self.input = Linear(config.width, self.mixed + heads, bias=config.bias, lead=lead)
        self.convolution_weight = nn.Parameter(torch.empty(*lead, config.convolution, self.mixed))
        self.convolution_bias = nn.Parameter(torch.empty(*lead, self.mixed))
        self.step_bias = nn.Parameter(torch.empty(*lead, heads))
        self.A_log = nn.Parameter(torch.empty(*lead, heads))
        self.D = nn.Parameter(torch.empty(*lead, heads))
        self.norm = RMSNorm(inner, eps=1e-5, lead=lead)
        self.out = Linear(inner, config.width, bias=config.bias, lead=lead)

    def forward(self, x: Tensor, context: Context, cache: Cache | None = None) -> tuple[Tensor, Cache | None]:
        """x [*L, B, T, D] -> [*L, B, S, D]: convolution and states everywhere, gate, output and what is read of the states only at the scored positions."""
        mask, at = context.mask, context.at
        if at is None:
            z, mixed = joint_linear(x, [self.gate, self.input])
        else:
            z, mixed = self.gate(select(x, at)), self.input(x)
        mixed, step = mixed.split((self.mixed, self.num_heads), dim=-1)
        precise = torch.promote_types(x.dtype, torch.float32)
        step = F.softplus(step.to(precise) + self.step_bias[..., None, None, :])  # [*L, B, T, H]
        if mask is not None:  # no step, so nothing decays and nothing is written
            mixed, step = mixed.masked_fill(~mask.unsqueeze(-1), 0), step.masked_fill(~mask.unsqueeze(-1), 0)
        mixed, past = short_convolution(mixed, self.convolution_weight, self.convolution_bias, None if cache is None else cache.past)
        u, B, C = F.silu(mixed).split((self.inner, self.state_size, self.state_size), dim=-1)
        A = -self.A_log.to(precise).exp()
        y, state = ssd(u.unflatten(-1, (self.num_heads, -1)), step, A, B, C, None if cache is None else cache.state, at)
        skip = select(u, at).unflatten(-1, (self.num_heads, -1)) * self.D[..., None, None, :, None]
        y = self.norm((y + skip).flatten(-2) * F.silu(z))
        return self.out(y), None if state is None else Cache(past, state)

    def init_cache(self, batch: int, length: int) -> Cache:
        """Of one size, whatever the length."""
        weight = self.out.weight
        shape = (*self.lead, batch, self.num_heads, self.inner // self.num_heads, self.state_size)
        state = weight.new_zeros(shape, dtype=torch.promote_types(weight.dtype, torch.float32))
        return Cache(weight.new_zeros(*self.lead, batch, self.steps - 1, self.mixed), state)

    def init_rules(self) -> list[tuple[str, Distribution]]:
        """As upstream: A = -U(1, 16), softplus(step bias) log-uniform in [0.001, 0.1], D = 1, the convolution as torch's default."""
        bound = self.steps**-0.5
        return [
            ("convolution_weight", Uniform(bound)),
            ("convolution_bias", Uniform(bound)),
            ("step_bias", Given(partial(step_bias, self.num_heads))),
            ("A_log", Given(partial(_log_decay, self.num_heads))),
            ("D", Constant(1.0)),
        ]

    def undecayed(self) -> list[str]:
        return ["step_bias", "A_log", "D"]

    def flops(self, batch: int, time: int, scored: int) -> int:
        projections = 2 * batch * self.width * (2 * scored * self.inner + time * (self.mixed + self.num_heads))
        if min(time, scored) <= CHUNK:
            return projections + 2 * batch * scored * time * (self.state_size + self.inner)
        count, size = _chunks(time)
        return projections + 2 * batch * count * size * (size * (self.state_size + self.inner) + 2 * self.state_size * self.inner)  # inside, between

    def state_bytes(self, length: int) -> int:
        return 4 * (self.inner * self.state_size + (self.steps - 1) * self.mixed)


def _uniform(num_values: int, name: str, seed: int) -> Tensor:
    return rng.uniform(rng.key(torch.tensor(seed), f"init {name}"), num_values)


def _log_decay(num_heads: int, name: str, seed: int) -> Tensor:
    return (1 + 15 * _uniform(num_heads, name, seed)).log()


def ssd(
    x: Tensor, step: Tensor, A: Tensor, B: Tensor, C: Tensor, state: Tensor | None = None, at: Tensor | slice | None = None
) -> tuple[Tensor, Tensor | None]:
    """The recurrence above without D, read at the positions ``at`` (all if None).

    x [*L, B, T, H, K], step [*L, B, T, H] (0 or more), A [*L, H] (negative), B and C [*L, B, T, N], state [*L, B, H, K, N]
    -> y [*L, B, S, H, K], the last state; without a state to begin with (then it is 0), None. Products in the type of x, decays and states in that of step.
    """
    x, heads, time = x * step.unsqueeze(-1).to(x.dtype), x.shape[-2:], x.shape[-3]
    log = step * A[..., None, None, :]  # of the decay at each position
    scored = at.shape[-1] if isinstance(at, Tensor) else len(range(time)[at or slice(None)])
    if min(time, scored) <= CHUNK:
        total = _running(log)
        y = _read(x, total, B, select(C, at), state, at)
        return y, None if state is None else _advance(state, *_write(x, total, B))

    count, size = _chunks(time)
    missing = count * size - time  # at the end: steps of 0, which change nothing
    x, log, B, C = (F.pad(y.flatten(step.dim() - 1), (0, 0, 0, missing)).unflatten(-2, (count, size)) for y in (x, log, B, C))
    x, total = x.unflatten(-1, heads), _running(log)  # [*L, B, chunks, T in chunk, H, K] and [*L, B, chunks, T in chunk, H]
    written, kept = _write(x, total, B)
    last, starts = torch.zeros_like(written[..., 0, :, :, :], dtype=step.dtype) if state is None else state, []
    for new, keep in zip(written.unbind(-4), kept.unbind(-4), strict=True):
        starts.append(last)
        last = _advance(last, new, keep)
    y = _read(x, total, B, C, torch.stack(starts, dim=-4)).flatten(-4, -3)[..., :time, :, :]
    return select(y.flatten(-2), at).unflatten(-1, heads), None if state is None else last


def _chunks(time: int) -> tuple[int, int]:
    """How many, and of what size, so that little is added to the last."""
    count = -(-time // CHUNK)
    return count, -(-time // count)


def _running(log: Tensor) -> Tensor:
    """Sums of [..., T, H] over the positions so far, in float64: a decay over several positions is the exp of a difference of two, which would lose the digits
    of float32 where earlier decays are strong. (A quotient of two exponentials would overflow.)"""
    return log.double().cumsum(-2)


def _read(x: Tensor, total: Tensor, B: Tensor, C: Tensor, state: Tensor | None, at: Tensor | slice | None = None) -> Tensor:
    """What the positions ``at`` of a piece [..., T] read of it and of the state before it: y [..., S, H, K]; C [..., S, N] is theirs."""
    precise, cell = torch.promote_types(x.dtype, torch.float32), torch.arange(total.shape[-2], device=x.device)
    query = (cell if at is None else cell[at]).unsqueeze(-1)  # [S, 1] or [*L, B, S, 1]
    query, so_far = query if query.dim() == 2 else query.unsqueeze(-3), select(total, at)
    spans = (so_far.mT.unsqueeze(-1) - total.mT.unsqueeze(-2)).to(precise)  # [..., H, S, T]
    decay = torch.where(cell <= query, spans, -torch.inf).exp()
    weights = (C @ B.mT).unsqueeze(-3) * decay
    y = (weights.to(x.dtype) @ x.transpose(-3, -2)).transpose(-3, -2)
    if state is None:
        return y
    before = (C.to(precise) @ state.flatten(-3, -2).mT).unflatten(-1, state.shape[-3:-1])  # [..., S, H, K]
    return y + (so_far.exp().to(precise).unsqueeze(-1) * before).to(x.dtype)


def _write(x: Tensor, total: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
    """What a piece [..., T] adds to the state, [..., H, K, N], and how much it leaves of the state before, [..., H, 1, 1]."""
    end = total[..., -1:, :]
    written = (x * (end - total).exp().to(x.dtype).unsqueeze(-1)).flatten(-2).mT @ B
    return written.unflatten(-2, x.shape[-2:]), end.exp().mT.unsqueeze(-1)


def _advance(state: Tensor, written: Tensor, kept: Tensor) -> Tensor:
    return state * kept.to(state.dtype) + written
