"""How long the steps of state-space mixers are at first, for ``Given`` initial values: log-uniform in [0.001, 0.1], as upstream (Gu, Dao 2023)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from shoal import rng

SHORTEST, LONGEST = 1e-3, 1e-1


def log_steps(count: int, name: str, seed: int) -> Tensor:
    """float32 [count] logarithms of steps."""
    spread = rng.uniform(rng.key(torch.tensor(seed), f"init {name}"), count)
    return math.log(SHORTEST) + math.log(LONGEST / SHORTEST) * spread


def step_bias(count: int, name: str, seed: int) -> Tensor:
    """float32 [count], of which softplus makes such steps."""
    step = log_steps(count, name, seed).exp()
    return step + (-torch.expm1(-step)).log()  # the inverse of softplus
