"""Where a token stands: sinusoidal and rotary tables and the slopes of ALiBi, computed when they are needed (learned positions are an Embedding)."""

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


@torch.library.custom_op("shoal::rotary", mutates_args=())
def rotary(positions: Tensor, width: int, base: float) -> Tensor:
    """int64 [...] -> float32 [..., K]: cosines, then sines, of positions / base^(2i/K) (Su et al. 2021), for ``rotate``.

    An operation of its own: compilers compute them again for every number that is turned; such kernels were a fifth of a small model's step on one H100.
    """
    angles = _angles(positions, width // 2, base)
    return torch.cat((angles.cos(), angles.sin()), dim=-1)


@rotary.register_fake
def _(positions: Tensor, width: int, base: float) -> Tensor:
    return positions.new_empty((*positions.shape, width // 2 * 2), dtype=torch.float32)


def rotate(x: Tensor, turns: Tensor) -> Tensor:
    """Rotary embedding of x [..., T, H, K] by ``turns`` [..., T, K]: the pair (i, i + K/2) turns by the angle i."""
    cos, sin = turns.unsqueeze(-2).to(x.dtype).chunk(2, dim=-1)
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


def alibi_slopes(num_heads: int, dtype: torch.dtype = torch.float32, device: torch.device | str | None = None) -> Tensor:
    """[H] of ALiBi (Press et al. 2022, section 3): 2^(-8/n), 2^(-16/n), ... of n heads, a power of two; of others as the authors' code, which puts behind those
    of the largest power of two below every second one of the power above."""
    power = 1 << (num_heads.bit_length() - 1)
    head = torch.arange(num_heads, device=device)
    exponent = torch.where(head < power, 2 * (head + 1), 2 * (head - power) + 1)  # in steps of 4 / power
    return torch.exp2(-exponent.to(torch.promote_types(dtype, torch.float32)) * (4 / power)).to(dtype)
