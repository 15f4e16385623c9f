"""Numbers, intervals and settings as words, the same in figures, tables and text."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

NOTHING = "–"


def number(value: Any, digits: int = 4) -> str:
    """12,345  0.9876  3e-5  ∞  –  true ; text as it is, lists as their parts."""
    value = value.item() if isinstance(value, np.generic) else value
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return NOTHING
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return (
            ", ".join(number(v, digits) for v in value) if isinstance(value, (list, tuple)) else str(value).lower() if isinstance(value, bool) else str(value)
        )
    if math.isinf(value):
        return "∞" if value > 0 else "−∞"
    if isinstance(value, int) or (value.is_integer() and abs(value) < 1e15):
        return f"{int(value):,}".replace("-", "−") if abs(value) < 1e15 else f"{value:.3g}"
    text = f"{abs(value):,.0f}" if abs(value) >= 10**digits else f"{abs(value):.{digits}g}".replace("e-0", "e-").replace("e+0", "e")
    return f"−{text}" if value < 0 else text


def magnitude(value: float) -> str:
    """Large counts: 2.0e9; below a million as they are."""
    return f"{value:.2g}".replace("e+0", "e").replace("e+", "e") if abs(value) >= 1e6 else number(value)


def interval(low: float, high: float, digits: int = 4) -> str:
    return f"[{number(low, digits)}, {number(high, digits)}]"


def duration(seconds: float | None) -> str:
    if seconds is None or not math.isfinite(seconds):
        return NOTHING
    if seconds < 90:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    return f"{seconds / 60:.1f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def setting(values: Mapping[str, Any]) -> str:
    """{"optimizer.wd": 1.0, "task.p": 97} -> "wd = 1, p = 97"; a name two paths end in is written in full; a variant's name stands for itself."""
    last = [path.rsplit(".", 1)[-1] for path in values]
    names = [path if short == "type" or last.count(short) > 1 else short for path, short in zip(values, last, strict=True)]
    return ", ".join(
        number(value) if name == "variant" else f"{name.removesuffix('.type')} = {number(value)}" for name, value in zip(names, values.values(), strict=True)
    )


def plural(count: int, noun: str) -> str:
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def listing(parts: Sequence[str]) -> str:
    return ", ".join(parts[:-1]) + (" and " if len(parts) > 1 else "") + parts[-1] if parts else ""
