"""Causality put in at another place: weights above the diagonal set to 0 after the softmax over everything, not their scores to minus infinity before it.

| mixer | weights a of one query over the keys j, with scores s |
|---|---|
| zeroed | a_j = exp(s_j) / (sum over all i of exp(s_i)) for the past j, and 0 for the future |
| renormalised | the same, divided by their sum: the future's share of the softmax cancels, and it is the usual attention |

Of zeroed the denominator has seen what comes later. It is no causal mixer: a model trained with it is told about the next tokens by how much weight
is missing, which a prompt that ends cannot do, and there is no cache that could be right.
All weights are written out, [*L, B, H, S, T], as they are for similarities that are no product (``Explicit``).

    y, _ = Zeroed(DecoderConfig(width=64))(x, Context())
"""

from __future__ import annotations

import torch
from torch import Tensor

from shoal.config.fields import ConfigError
from shoal.mixers.attention import Attention, Cache, Places


class Explicit(Attention):
    """Attention by its weights, all written out."""

    def mix(self, q: Tensor, k: Tensor, v: Tensor, places: Places) -> Tensor:
        return (self.weigh(q, k, places).to(v.dtype) @ v.transpose(-3, -2)).transpose(-3, -2)

    def mixing_flops(self, batch: int, time: int, scored: int) -> int:
        return 2 * 2 * batch * scored * time * self.num_heads * self.head_width


class Zeroed(Explicit):
    def weigh(self, q: Tensor, k: Tensor, places: Places) -> Tensor:
        logs, past = self.over_everything(q, k, places)
        return logs.exp().masked_fill(~past, 0.0)

    def over_everything(self, q: Tensor, k: Tensor, places: Places) -> tuple[Tensor, Tensor]:
        """The softmax over past and future, in logarithms [*L, B, H, S, T], and what of it to keep."""
        past = self.allowed(places).unsqueeze(-3)
        real = torch.ones_like(past) if places.mask is None else past | places.mask[..., None, None, :]
        return self.scores(q, k, places).masked_fill(~real, float("-inf")).log_softmax(-1), past

    def init_cache(self, batch: int, length: int) -> Cache:
        """ConfigError, always."""
        raise ConfigError(
            "model.mixers",
            "zeroed attention weighs what it reads by all that comes later, so the next token changes every place before it: it has no cache and cannot write "
            "one token after another; take renormalised, or attention",
        )


class Renormalised(Zeroed):
    def weigh(self, q: Tensor, k: Tensor, places: Places) -> Tensor:
        """exp(log a) / sum of exp(log a): in logarithms, because the past's share alone may be too small for a number."""
        logs, past = self.over_everything(q, k, places)
        return logs.masked_fill(~past, float("-inf")).softmax(-1)

    def init_cache(self, batch: int, length: int) -> Cache:
        return Attention.init_cache(self, batch, length)
