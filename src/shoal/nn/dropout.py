"""Dropout whose mask is a function of (key of the row, place), not of a global generator.

So a run drops the same elements alone, in any fleet, and however its batch is cut into pieces.
"""

from __future__ import annotations

import torch
from torch import Tensor

from shoal import rng

STEPS = 1 << 16  # a rate is taken to the nearest of them, 8e-6 off at most


def dropout(x: Tensor, key: Tensor | None, rate: Tensor | None, layer: int) -> Tensor:
    """x [*L, B, T, D]; key int64 [*L, B], one per row, None = evaluation; rate float32 [*L]; ``layer`` tells the places of use apart."""
    if key is None or rate is None:
        return x
    time, width = x.shape[-2:]
    draws = rng.quarters(rng.fold(key, layer), time * width).view(x.shape)
    rate = rate.view(*rate.shape, *[1] * (x.dim() - rate.dim()))
    least = ((rate * STEPS).round().clamp(max=STEPS - 1) - STEPS // 2).to(draws.dtype)
    return x * torch.where(draws >= least, 1 / (1 - rate), 0.0).to(x.dtype)
