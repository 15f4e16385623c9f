"""Fastformer (Wu, Wu, Qi, Huang, Xie 2021, arXiv 2108.09084), made causal: the past is summed up in one query and one key, each a weighted mean.

    G_t = mean over s <= t of q_s, weights exp(a.q_s / sqrt K)        p_t = G_t * k_t
    E_t = mean over s <= t of p_s, weights exp(b.p_s / sqrt K)        y_t = W (E_t * v_t) + q_t, then the output matrix, as in upstream's code

per head, * by element; a and b are vectors of a head's own. The paper's means are over the whole sequence. Here p_s is made with what was known at s: with G_t
in its place the second mean would be attention again, T^2 and a state that grows. The paper's sharing of parameters (W of queries and values, and between
layers) is left out. Positions "rotary" and "alibi" have no effect. Means are float32 at least (``shoal.nn.running_mean``).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from shoal.config.models import DecoderConfig
from shoal.contracts import Context
from shoal.nn import Linear, Uniform, joint_linear, select
from shoal.nn.init import Distribution
from shoal.nn.running_mean import FLOOR, Mean, merged, running_mean, running_mean_flops


class Cache(NamedTuple):
    """Log-weights [*L, B, H, 1, 1] and means [*L, B, H, 1, K] so far, float32 at least."""

    queries: Mean
    keys: Mean


class Fastformer(nn.Module):
    def __init__(self, config: DecoderConfig, lead: tuple[int, ...] = ()) -> None:
        super().__init__()
        width = config.width
        self.num_heads, self.head_width, self.lead = config.num_heads, width // config.num_heads, lead
        self.query = Linear(width, width, bias=config.bias, lead=lead)
        self.key = Linear(width, width, bias=config.bias, lead=lead)
        self.value = Linear(width, width, bias=config.bias, lead=lead)
        self.query_weight = nn.Parameter(torch.empty(*lead, self.num_heads, self.head_width))  # a
        self.key_weight = nn.Parameter(torch.empty(*lead, self.num_heads, self.head_width))  # b
        self.transform = Linear(width, width, bias=config.bias, lead=lead)  # W
        self.out = Linear(width, width, bias=config.bias, lead=lead)

    def forward(self, x: Tensor, context: Context, cache: Cache | None = None) -> tuple[Tensor, Cache | None]:
        """x [*L, B, T, D] -> [*L, B, S, D]: both means everywhere, since the second needs the first; the rest only at the scored positions."""
        if context.at is None:
            query, key, value = joint_linear(x, [self.query, self.key, self.value])
        else:
            query, key = joint_linear(x, [self.query, self.key])
            value = self.value(select(x, context.at))
        q, k = (y.to(torch.promote_types(x.dtype, torch.float32)).unflatten(-1, (self.num_heads, self.head_width)).transpose(-3, -2) for y in (query, key))
        past = self._pool(q, self.query_weight, context.mask, None if cache is None else cache.queries)
        products = past[1] * k  # [*L, B, H, T, K]
        whole = self._pool(products, self.key_weight, context.mask, None if cache is None else cache.keys)
        if cache is not None:
            cache = Cache(_last(past), _last(whole))
        summed = select(whole[1].transpose(-3, -2).flatten(-2).to(x.dtype), context.at)
        return self.out(self.transform(summed * value) + select(query, context.at)), cache

    def _pool(self, x: Tensor, weight: Tensor, mask: Tensor | None, before: Mean | None) -> Mean:
        """Of x [*L, B, H, T, K], with the mean of what was before."""
        logs = (x * weight[..., None, :, None, :]).sum(-1, keepdim=True) * self.head_width**-0.5
        if mask is not None:
            away = ~mask[..., None, :, None]
            logs, x = logs.masked_fill(away, FLOOR), x.masked_fill(away, 0)
        found = running_mean(logs, x)
        return found if before is None else merged(before, found)

    def init_cache(self, batch: int, length: int) -> Cache:
        """Of one size, whatever the length."""
        shape, weight = (*self.lead, batch, self.num_heads, 1), self.out.weight
        precise = torch.promote_types(weight.dtype, torch.float32)
        none = weight.new_full((*shape, 1), FLOOR, dtype=precise), weight.new_zeros(*shape, self.head_width, dtype=precise)
        return Cache(none, none)

    def init_rules(self) -> list[tuple[str, Distribution]]:
        """a and b as the rows of a torch.nn.Linear of K inputs."""
        return [(name, Uniform(self.head_width**-0.5)) for name in ("query_weight", "key_weight")]

    def undecayed(self) -> list[str]:
        return []

    def flops(self, batch: int, time: int, scored: int) -> int:
        width = self.num_heads * self.head_width
        return 2 * batch * width * width * (2 * time + 3 * scored) + 2 * batch * running_mean_flops(time, width)

    def state_bytes(self, length: int) -> int:
        return 2 * 4 * self.num_heads * (self.head_width + 1)


def _last(mean: Mean) -> Mean:
    return mean[0][..., -1:, :], mean[1][..., -1:, :]
