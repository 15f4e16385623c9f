"""Dropout whose mask is a function of (key of the row, place), not of a global generator.

So a run drops the same elements alone, in any fleet, and however its batch is cut into pieces.
"""

from __future__ import annotations

from torch import Tensor

from shoal import rng


def dropout(x: Tensor, key: Tensor | None, rate: Tensor | None, layer: int) -> Tensor:
    """x [*L, B, T, D]; key int64 [*L, B], one per row, None = evaluation; rate float32 [*L]; ``layer`` tells the places of use apart."""
    if key is None or rate is None:
        return x
    time, width = x.shape[-2:]
    draws = rng.uniform(rng.fold(key, layer), time * width).view(x.shape)
    rate = rate.view(*rate.shape, *[1] * (x.dim() - rate.dim()))
    return x * ((draws >= rate) / (1 - rate)).to(x.dtype)
