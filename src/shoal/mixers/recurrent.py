"""Recurrent networks, one layer of torch.nn's RNN (with tanh), GRU or LSTM: the state, as wide as the model, is also the output.

The products with the input are one matrix product for all positions; the loop over time is ``shoal.nn.recurrence``. Two biases as in torch, one added to each
product: only gru tells them apart, but both are trained, so a bias moves twice as fast as it would alone.
Not here: a projection of the output, layers (blocks of the decoder) and two directions.

    y, cache = Recurrent("lstm", DecoderConfig(width=64))(x, Context())
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from shoal.config.models import DecoderConfig
from shoal.contracts import Context
from shoal.nn import Linear, Uniform, linear, select
from shoal.nn.init import Distribution
from shoal.nn.recurrence import GATES, Kind, recurrence

Cache = tuple[Tensor, ...]  # (h,) or of lstm (h, c), each [*L, B, D]


class Recurrent(nn.Module):
    def __init__(self, kind: Kind, config: DecoderConfig, lead: tuple[int, ...] = ()) -> None:
        super().__init__()
        self.kind: Kind = kind
        self.width, self.lead = config.width, lead
        self.input = Linear(config.width, GATES[kind] * config.width, bias=config.bias, lead=lead)
        self.state = Linear(config.width, GATES[kind] * config.width, bias=config.bias, lead=lead)

    def forward(self, x: Tensor, context: Context, cache: Cache | None = None) -> tuple[Tensor, Cache | None]:
        """x [*L, B, T, D] -> [*L, B, S, D]: states everywhere, since each needs the one before."""
        bias, inner = self.input.bias, None
        if bias is not None and self.state.bias is not None:
            outer = self.state.bias
            if self.kind == "gru":
                outer, inner = F.pad(outer[..., : 2 * self.width], (0, self.width)), outer[..., 2 * self.width :]
            bias = bias + outer
        products = linear(x.transpose(-3, -2), self.input.weight, bias)  # [*L, T, B, G D]: a step's numbers lie together
        mask = None if context.mask is None else context.mask.mT
        y, state = recurrence(self.kind, products, self.state.weight, inner, cache, mask)
        return select(y.transpose(-3, -2), context.at), None if cache is None else state

    def init_cache(self, batch: int, length: int) -> Cache:
        """Of one size, whatever the length."""
        h = self.state.weight.new_zeros(*self.lead, batch, self.width)
        return (h, h.to(torch.promote_types(h.dtype, torch.float32))) if self.kind == "lstm" else (h,)

    def init_rules(self) -> list[tuple[str, Distribution]]:
        """As torch: everything U(-1, 1) / sqrt(width), lstm's forget bias too."""
        return [("*", Uniform(self.width**-0.5))]

    def undecayed(self) -> list[str]:
        return []

    def flops(self, batch: int, time: int, scored: int) -> int:
        return 2 * 2 * batch * time * self.width * GATES[self.kind] * self.width  # of the input and of the state, which every position needs

    def state_bytes(self, length: int) -> int:
        return 4 * self.width * (2 if self.kind == "lstm" else 1)
