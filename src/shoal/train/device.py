"""Where things are computed: the device a name stands for, and the one that measures use."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch

from shoal.config.fields import ConfigError

_measures: ContextVar[str] = ContextVar("measures", default="auto")


def find_device(name: str) -> str:
    """What the name stands for, "cpu" or "cuda": "auto" is a GPU where there is one."""
    if name not in ("auto", "cpu", "cuda"):
        raise ConfigError("device", f"{name!r} is not one of auto, cpu, cuda")
    if name == "cuda" and not torch.cuda.is_available():
        raise ConfigError("device", "no CUDA device is available; use --device cpu (or auto)")
    return ("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name


def measuring_device() -> str:
    """What looks at a trained run computes there: where its study runs; by itself on a GPU where there is one."""
    return find_device(_measures.get())


@contextmanager
def measured_on(device: str) -> Iterator[None]:
    before = _measures.set(device)
    try:
        yield
    finally:
        _measures.reset(before)
