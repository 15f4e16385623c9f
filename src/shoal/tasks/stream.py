"""What tasks over finite tables share: an endless stream of shuffled epochs, pieces of a split, the hash of a definition.

place = stream(key, step, 512, count)   # [R, 512]: which rows of its table each run sees at this step
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from shoal import rng
from shoal.config import fields_per_run, flatten
from shoal.config.core import type_name


def stream(key: Tensor, step: Tensor, size: int, count: Tensor) -> Tensor:
    """Places in a table of ``count`` rows: key int64 [R], step int64 scalar, count int64 [R] -> int64 [R, size].

    The epochs, each a fresh shuffle of all rows, follow one another without a gap, and every step takes the next ``size`` places:
    each row once per epoch, no short batch (one may span epochs). A pure function of the step: nothing is stored and the host waits for nothing.
    """
    position = step * size + torch.arange(size, device=key.device)  # [B]
    num_rows = count[:, None]  # [R, 1]
    epoch = position // num_rows  # [R, B]
    return rng.shuffled(rng.fold(key[:, None], epoch), position - epoch * num_rows, num_rows)


def pieces(length: int, rows: int, device: torch.device) -> Iterator[Tensor]:
    """Places 0 .. length-1 in int64 pieces of one size, at most ``rows``; the last may run past the end by less than the number of pieces."""
    size = -(-length // -(-length // rows))
    for start in range(0, length, size):
        yield torch.arange(start, start + size, device=device)


def fingerprint(config: Any) -> str:
    """12 hexadecimal digits: the hash of a task's config without its per-run fields."""
    per_run = set(fields_per_run(config))
    definition = {name: value for name, value in flatten(config).items() if name not in per_run}
    return hashlib.sha256(json.dumps([type_name(type(config)), definition], sort_keys=True).encode()).hexdigest()[:12]
