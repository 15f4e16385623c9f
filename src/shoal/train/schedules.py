"""Learning rate schedules: a multiple of the peak as a pure function of progress, every run with its own.

    rate = multiplier("cosine", step / steps, warmup, floor, end)  # all float32 [*L]; update number ``step`` uses lr * rate

Progress is step / steps with ``step`` the updates already made, so the first update has progress 0. Not here: step numbers, state.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor


def multiplier(kind: str, progress: Tensor, warmup: Tensor, floor: Tensor, end: Tensor) -> Tensor:
    """progress, warmup < end, floor: float32 [*L] -> float32 [*L], in three intervals:

    [0, warmup)    progress / warmup: with a warm-up the very first update has learning rate 0, and the first at or after ``warmup`` has the peak
    [warmup, end)  "cosine": half a wave from 1 to floor; "linear": a line from 1 to floor; "constant": 1
    [end, ...)     floor ("constant": 1)
    """
    # Every interval's formula is computed everywhere and one is chosen, so the quotient by an empty interval's length (warmup = 0) is never used.
    if kind == "constant":
        after = torch.ones_like(progress)
    else:
        falling = DECAYS[kind]((progress - warmup) / (end - warmup))
        after = torch.where(progress < end, floor + (1 - floor) * falling, floor)
    return torch.where(progress < warmup, progress / warmup, after)


def _cosine(x: Tensor) -> Tensor:
    return torch.cos(x * (math.pi / 2)).square()  # (1 + cos(pi x)) / 2, without its cancellation near x = 1


def _linear(x: Tensor) -> Tensor:
    return 1 - x


DECAYS: dict[str, Callable[[Tensor], Tensor]] = {"cosine": _cosine, "linear": _linear}  # from 1 at 0 to 0 at 1
