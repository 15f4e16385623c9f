"""Mamba (Gu, Dao 2023, arXiv 2312.00752): a short convolution, a recurrence that chooses by what it reads what it keeps, and a gate.

    u = silu(convolution(x W_input))    step, B, C = u W_controls    y = selective_scan(u, step, A, B, C) + D u    out = (y * silu(x W_gate)) W_out

The step of each channel comes through a narrow layer (its rank is width / 16) and a softplus. A = -exp(A_log) is diagonal, [inner, N].
Not here: the recurrence itself (``shoal.nn.scan``).
"""

from __future__ import annotations

import math
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from shoal.config.models import DecoderConfig
from shoal.contracts import Context
from shoal.mixers.steps import step_bias
from shoal.nn import Constant, Given, Linear, Uniform, joint_linear, select, selective_scan, short_convolution
from shoal.nn.init import Distribution
from shoal.nn.scan import Form

NO_STEP = -1e4  # softplus of it is 0: nothing decays and nothing is written


class Cache(NamedTuple):
    past: Tensor  # [*L, B, W-1, inner] the last inputs of the short convolution
    state: Tensor  # [*L, B, inner, N], float32 at least


class Mamba(nn.Module):
    def __init__(self, config: DecoderConfig, lead: tuple[int, ...] = ()) -> None:
        super().__init__()
        self.width, self.inner, self.state_size, self.lead = config.width, config.expand * config.width, config.state_size, lead
        self.rank, self.steps = math.ceil(config.width / 16), config.convolution
        self.scan: Form = config.scan
        self.gate = Linear(config.width, self.inner, bias=config.bias, lead=lead)
        self.input = Linear(config.width, self.inner, bias=config.bias, lead=lead)
        self.convolution_weight = nn.Parameter(torch.empty(*lead, config.convolution, self.inner))
        self.convolution_bias = nn.Parameter(torch.empty(*lead, self.inner))
        self.controls = Linear(self.inner, self.rank + 2 * self.state_size, bias=False, lead=lead)  # the step's narrow part, B and C
        self.step = Linear(self.rank, self.inner, lead=lead)
        self.A_log = nn.Parameter(torch.empty(*lead, self.inner, self.state_size))
        self.D = nn.Parameter(torch.empty(*lead, self.inner))
        self.out = Linear(self.inner, config.width, bias=config.bias, lead=lead)

    def forward(self, x: Tensor, context: Context, cache: Cache | None = None) -> tuple[Tensor, Cache | None]:
        """x [*L, B, T, D] -> [*L, B, S, D]: convolution and states everywhere, gate and output only at the scored positions."""
        if context.at is None:
            z, u = joint_linear(x, [self.gate, self.input])
        else:
            z, u = self.gate(select(x, context.at)), self.input(x)
        if context.mask is not None:
            u = u.masked_fill(~context.mask.unsqueeze(-1), 0)
        u, past = short_convolution(u, self.convolution_weight, self.convolution_bias, None if cache is None else cache.past)
        u = F.silu(u)
        delta, B, C = self.controls(u).split((self.rank, self.state_size, self.state_size), dim=-1)
        delta = self.step(delta)
        if context.mask is not None:
            delta = delta.masked_fill(~context.mask.unsqueeze(-1), NO_STEP)
        A = -self.A_log.to(torch.promote_types(x.dtype, torch.float32)).exp()
        y, state = selective_scan(u, delta, A, B, C, self.D, None if cache is None else cache.state, form=self.scan)
        return self.out(select(y, context.at) * F.silu(z)), None if cache is None else Cache(past, state)

    def init_cache(self, batch: int, length: int) -> Cache:
        """Of one size, whatever the length."""
        weight = self.out.weight
        state = weight.new_zeros(*self.lead, batch, self.inner, self.state_size, dtype=torch.promote_types(weight.dtype, torch.float32))
        return Cache(weight.new_zeros(*self.lead, batch, self.steps - 1, self.inner), state)

    def init_rules(self) -> list[tuple[str, Distribution]]:
        """As upstream: A = -1 .. -N in every channel, D = 1, softplus(step bias) log-uniform in [0.001, 0.1], the convolution as torch's default."""
        bound = self.steps**-0.5
        return [
            ("convolution_weight", Uniform(bound)),
            ("convolution_bias", Uniform(bound)),
            ("step.weight", Uniform(self.rank**-0.5)),
            ("step.bias", Given(partial(step_bias, self.inner))),
            ("A_log", Given(lambda name, seed: torch.arange(1, self.state_size + 1).log().expand(self.inner, -1))),
            ("D", Constant(1.0)),
        ]

    def undecayed(self) -> list[str]:
        return ["A_log", "D"]

    def flops(self, batch: int, time: int, scored: int) -> int:
        controls = self.inner * (self.rank + 2 * self.state_size) + self.rank * self.inner
        return 2 * batch * (time * (self.width * self.inner + controls) + scored * 2 * self.width * self.inner)

    def state_bytes(self, length: int) -> int:
        return 4 * self.inner * (self.state_size + self.steps - 1)
