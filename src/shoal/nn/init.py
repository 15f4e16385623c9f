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
PIECE = 1 << 16  # numbers drawn at once: their integers stay in a core's cache, four times as fast as from memory


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


def _fill(parameter: Tensor, name: str, rule: Distribution, seeds: Tensor, piece: int = PIECE) -> None:
    if isinstance(rule, Constant):
        parameter.fill_(rule.value)
        return
    rows = parameter.view(len(seeds), -1)
    if isinstance(rule, Given):
        for row, seed in zip(rows, seeds.tolist(), strict=True):
            row.copy_(rule.values(name, seed).flatten())
        return
    draw, scale = (normal, rule.std) if isinstance(rule, Normal) else (_symmetric, rule.bound)
    keys, scales = rng.key(seeds, f"init {name}"), torch.tensor(scale).expand(len(seeds)).view(-1, 1)
    num_values = rows.shape[1]
    many = max(1, piece // num_values)  # runs at once
    for run in range(0, len(seeds), many):
        runs = slice(run, run + many)
        for first in range(0, num_values, piece):
            size = min(piece, num_values - first)
            rows[runs, first : first + size] = draw(keys[runs], size, first) * scales[runs]


def _symmetric(key: Tensor, n: int, first: int = 0) -> Tensor:
    return rng.uniform(key, n, first) * 2 - 1


def normal(key: Tensor, n: int, first: int = 0) -> Tensor:
    """float32 [..., n] standard normals from int64 [...] keys (Box, Muller 1958): numbers ``first`` to first + n - 1 of each key's."""
    radius = (-2 * torch.log1p(-rng.uniform(rng.fold(key, 0), n, first))).sqrt_()  # 1 - u lies in (0, 1]
    return radius.mul_((2 * math.pi * rng.uniform(rng.fold(key, 1), n, first)).cos_())
