"""How parameters begin: every tensor's numbers depend only on its name and its run's seed, never on the fleet.

A model lists rules (pattern of names, distribution); the first that matches a name fills it; a parameter no rule matches is
an error. Normals come from Box and Muller's transform, computed on the CPU so that they are the same for every device.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn

from shoal import rng

Scale = float | Sequence[float]  # one for all runs, or one per run


@dataclass(frozen=True)
class Normal:
    """N(0, std^2)."""

    std: Scale


@dataclass(frozen=True)
class Uniform:
    """U(-bound, bound)."""

    bound: Scale


@dataclass(frozen=True)
class Constant:
    value: float


@dataclass(frozen=True)
class Given:
    """Whatever this makes of the parameter's name and a run's seed."""

    values: Callable[[str, int], Tensor]


Distribution = Normal | Uniform | Constant | Given


@torch.no_grad()
def initialise(module: nn.Module, rules: Sequence[tuple[str, Distribution]], seeds: Tensor) -> None:
    """Fill every parameter [*L, ...] of ``module`` in place. ``seeds``: int64 [R] on the CPU, one per run (one seed for L = ())."""
    for name, parameter in module.named_parameters():
        rule = next((rule for pattern, rule in rules if fnmatchcase(name, pattern)), None)
        assert rule is not None, f"no rule initialises {name}"
        _fill(parameter, name, rule, seeds)


def _fill(parameter: Tensor, name: str, rule: Distribution, seeds: Tensor, piece: int = 1 << 24) -> None:
    if isinstance(rule, Constant):
        parameter.fill_(rule.value)
        return
    rows = parameter.view(len(seeds), -1)
    if isinstance(rule, Given):
        for row, seed in zip(rows, seeds.tolist(), strict=True):
            row.copy_(rule.values(name, seed).flatten())
        return
    num_values = rows.shape[1]
    keys = rng.key(seeds, f"init {name}")
    scale = torch.tensor(rule.std if isinstance(rule, Normal) else rule.bound).expand(len(seeds)).view(-1, 1)
    at_once = max(1, piece // num_values)  # runs drawn together: bounds the memory of a fleet of a thousand
    for start in range(0, len(seeds), at_once):
        runs = slice(start, start + at_once)
        values = (normal if isinstance(rule, Normal) else _symmetric)(keys[runs], num_values) * scale[runs]
        rows[runs].copy_(values)


def _symmetric(key: Tensor, n: int) -> Tensor:
    return rng.uniform(key, n) * 2 - 1


def normal(key: Tensor, n: int) -> Tensor:
    """float32 [..., n] standard normals from int64 [...] keys (Box, Muller 1958)."""
    radius = (-2 * torch.log1p(-rng.uniform(rng.fold(key, 0), n))).sqrt_()  # 1 - u lies in (0, 1]
    return radius.mul_((2 * math.pi * rng.uniform(rng.fold(key, 1), n)).cos_())
