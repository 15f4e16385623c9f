"""Attention to the last ``window`` positions, the present one included (Beltagy, Peters, Cohan 2020, arXiv 2004.05150, section 3.1, causal).

Long sequences are cut into blocks as long as the window: each attends to itself and to the block before, so that the cost is T x 2 window instead of
T x T. Where few positions are scored, queries at these read all keys, most of them behind the mask. The cache is the last window - 1 keys and values.

    y, _ = Windowed(DecoderConfig(width=64, window=16))(x, Context())
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from shoal.config.models import DecoderConfig
from shoal.contracts import Context
from shoal.mixers.attention import Attention, Cache, Places, real
from shoal.nn import select


class Windowed(Attention):
    def __init__(self, config: DecoderConfig, lead: tuple[int, ...] = ()) -> None:
        super().__init__(config, lead)
        self.window = self.reach = config.window

    def forward(self, x: Tensor, context: Context, cache: Cache | None = None) -> tuple[Tensor, Cache | None]:
        """x [*L, B, T, D] -> [*L, B, S, D]."""
        if not self._in_blocks(_scored(x.shape[-2], context.at)):
            return super().forward(x, context, cache)
        q, k, v, places, cache = self.read(x, context._replace(at=None), cache)
        return self.out(select(self._blocks(q, k, v, places.mask).flatten(-2), context.at)), cache

    def _in_blocks(self, scored: int) -> bool:
        return scored > 2 * self.window  # where a query of a block has fewer keys than one that reads them all

    def _blocks(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        """Queries [*L, B, T, H, K]; keys and values [*L, B, P + T, H, K], P of them from before; mask bool [*L, B, P + T] -> [*L, B, T, H, K]."""
        window, before, total = self.window, k.shape[-3] - q.shape[-3], k.shape[-3]
        behind = -total % window
        q = F.pad(q, (0, 0, 0, 0, before, behind)).unflatten(-3, (-1, window))  # [*L, B, C, window, H, K]
        k, v = (F.pad(y, (0, 0, 0, 0, window, behind)).unflatten(-3, (-1, window)) for y in (k, v))
        k, v = (torch.cat((y[..., :-1, :, :, :], y[..., 1:, :, :, :]), dim=-3) for y in (k, v))  # [*L, B, C, 2 window, H, K]
        start = torch.arange(0, total, window, device=q.device).unsqueeze(-1)
        query, key = start + torch.arange(window, device=q.device), start + torch.arange(-window, window, device=q.device)
        if mask is None:
            mask = key >= 0
        else:
            mask = F.pad(mask, (window, behind)).unflatten(-1, (-1, window))
            mask = torch.cat((mask[..., :-1, :], mask[..., 1:, :]), dim=-1)
        y = self.mix(q, k, v, Places(query, key, mask.expand(*k.shape[:-2]), False))
        return y.flatten(-4, -3)[..., before:total, :, :]

    def remember(self, cache: Cache, k: Tensor, v: Tensor, mask: Tensor | None) -> tuple[Cache, Tensor, Tensor, Tensor, Tensor]:
        kept, time = cache.keys.shape[-3], k.shape[-3]
        k, v = torch.cat((cache.keys.to(k.dtype), k), dim=-3), torch.cat((cache.values.to(v.dtype), v), dim=-3)
        known = torch.cat((cache.mask, real(k[..., kept:, :, :], mask)), dim=-1)
        keys, values = (y[..., time:, :, :].to(old.dtype) for y, old in ((k, cache.keys), (v, cache.values)))
        return Cache(keys, values, known[..., time:], cache.used + time), k, v, known, torch.arange(kept, kept + time, device=k.device)

    def init_cache(self, batch: int, length: int) -> Cache:
        return super().init_cache(batch, self._kept(length))

    def state_bytes(self, length: int) -> int:
        return super().state_bytes(self._kept(length))

    def _kept(self, length: int) -> int:
        return min(length, self.window - 1)

    def projection_flops(self, batch: int, time: int, scored: int) -> int:
        return super().projection_flops(batch, time, scored) + (2 * batch * (self.num_heads * self.head_width) ** 2 * (time - scored)) * self._in_blocks(scored)

    def mixing_flops(self, batch: int, time: int, scored: int) -> int:
        if not self._in_blocks(scored):
            return super().mixing_flops(batch, time, scored)
        return super().mixing_flops(batch, 2 * self.window, time + -time % self.window)


def _scored(time: int, at: Tensor | slice | None) -> int:
    if at is None:
        return time
    return len(range(*at.indices(time))) if isinstance(at, slice) else at.shape[-1]
