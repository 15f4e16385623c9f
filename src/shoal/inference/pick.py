"""One token from its logits."""

from __future__ import annotations

import torch
from torch import Tensor

from shoal import rng


def pick(logits: Tensor, temperature: float, key: Tensor) -> Tensor:
    """float32 [..., V], int64 [...] -> int64 [...]: a draw from softmax(logits / temperature), by adding Gumbel noise and taking the largest (Gumbel 1954)."""
    if temperature == 0:
        return logits.argmax(-1)
    uniform = rng.uniform(key, logits.shape[-1]) + 2.0**-25  # never 0
    return (logits / temperature - torch.log(-torch.log(uniform))).argmax(-1)
