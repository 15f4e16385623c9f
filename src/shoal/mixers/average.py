"""The mean of the past: y_t = (x_0 + ... + x_t) / (t + 1) over what is not padding, the plainest mixer there is. It has no parameters.

The same as a product with the lower-triangular matrix whose row t is 1 / (t + 1) up to place t, which is attention that prefers nothing:

    y = average_matrix(T) @ x

A running sum costs T instead of T^2. Sums and quotients are float32 at least, whatever the type of x.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from shoal.config.models import DecoderConfig
from shoal.contracts import Context
from shoal.nn import select
from shoal.nn.init import Distribution


class Cache(NamedTuple):
    total: Tensor  # [*L, B, D], float32 at least
    seen: Tensor  # int64 [*L, B] how many are in it


class Average(nn.Module):
    zero: Tensor  # with no parameter, this knows the device and the type

    def __init__(self, config: DecoderConfig, lead: tuple[int, ...] = ()) -> None:
        super().__init__()
        self.width, self.lead = config.width, lead
        self.register_buffer("zero", torch.zeros((), device="cpu"), persistent=False)

    def forward(self, x: Tensor, context: Context, cache: Cache | None = None) -> tuple[Tensor, Cache | None]:
        """x [*L, B, T, D] -> [*L, B, S, D]."""
        total, real = x.to(torch.promote_types(x.dtype, torch.float32)), context.mask
        if real is None:
            count = torch.arange(1, x.shape[-2] + 1, device=x.device).expand(x.shape[:-1])
        else:
            total, count = total.masked_fill(~real.unsqueeze(-1), 0), real.cumsum(-1)
        total = total.cumsum(-2)
        if cache is not None:
            total, count = total + cache.total.unsqueeze(-2), count + cache.seen.unsqueeze(-1)
            cache = Cache(total[..., -1, :], count[..., -1])
        count = count.clamp(min=1).unsqueeze(-1)  # padding before everything: 0, not 0 / 0
        return (select(total, context.at) / select(count, context.at)).to(x.dtype), cache

    def init_cache(self, batch: int, length: int) -> Cache:
        """Of one size, whatever the length."""
        dtype = torch.promote_types(self.zero.dtype, torch.float32)
        return Cache(self.zero.new_zeros(*self.lead, batch, self.width, dtype=dtype), self.zero.new_zeros(*self.lead, batch, dtype=torch.int64))

    def init_rules(self) -> list[tuple[str, Distribution]]:
        return []

    def undecayed(self) -> list[str]:
        return []

    def flops(self, batch: int, time: int, scored: int) -> int:
        return 0  # sums, no products

    def state_bytes(self, length: int) -> int:
        return 4 * self.width


def average_matrix(time: int, dtype: torch.dtype = torch.float32, device: torch.device | str | None = None) -> Tensor:
    """[T, T]: lower-triangular, every row equal weights that sum to 1."""
    ones = torch.ones(time, time, dtype=dtype, device=device).tril()
    return ones / ones.sum(-1, keepdim=True)
