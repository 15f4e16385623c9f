"""Where a token stands: sinusoidal and rotary tables, computed from positions when they are needed (learned ones are an Embedding)."""

from __future__ import annotations

import torch
from torch import Tensor


def _angles(positions: Tensor, half: int, base: float) -> Tensor:
    """int64 [...] -> float32 [..., half]: positions / base^(i / half), i = 0 .. half-1."""
    frequency = base ** (-torch.arange(half, device=positions.device, dtype=torch.float32) / half)
    return positions.unsqueeze(-1) * frequency


def sinusoidal(positions: Tensor, width: int, base: float = 10_000.0) -> Tensor:
    """int64 [...] -> float32 [..., D]: sines in the even places, cosines in the odd (Vaswani et al. 2017, section 3.5)."""
    angles = _angles(positions, (width + 1) // 2, base)
    return torch.stack((angles.sin(), angles.cos()), dim=-1).flatten(-2)[..., :width]


def rotate(x: Tensor, positions: Tensor, base: float = 10_000.0) -> Tensor:
    """Rotary embedding (Su et al. 2021) of x [..., T, H, K] at positions [..., T]: the pair (i, i + K/2) turns by positions / base^(2i/K)."""
    angles = _angles(positions, x.shape[-1] // 2, base).unsqueeze(-2)  # [..., T, 1, K/2]
    cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
