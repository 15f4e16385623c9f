"""The short causal convolution of state-space mixers: each channel by itself, a few steps back.

As shifted multiply-adds: for four steps as fast as a kernel of its own, and the same code for any run axis.

    y, past = short_convolution(x, weight, bias)           # and, going on: short_convolution(more, weight, bias, past)
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def short_convolution(x: Tensor, weight: Tensor, bias: Tensor, past: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """y_t = bias + sum over j of weight_j x_{t-W+1+j}: x [*L, B, T, C], weight [*L, W, C], bias [*L, C] -> y [*L, B, T, C] and the last W-1 inputs.

    ``past`` [*L, B, W-1, C]: the inputs before these; None = zeros.
    """
    time, width = x.shape[-2], weight.shape[-2]
    whole = F.pad(x, (0, 0, width - 1, 0)) if past is None else torch.cat((past.to(x.dtype), x), dim=-2)
    y = bias[..., None, None, :]
    for j in range(width):
        y = y + weight[..., j, None, None, :] * whole[..., j : j + time, :]
    return y, whole[..., time:, :]
