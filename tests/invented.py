"""Rows of runs that were never trained: each generalises at a step that is given, or not at all."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from shoal.config import RunConfig, flatten, run_id
from shoal.results import Rows, Store


def invented(directory: Path, runs: Sequence[tuple[RunConfig, float]], *, every: int = 50, record: Mapping[str, Any] | None = None, dead: Sequence[int] = (),
             running: bool = False, metric: str = "val/accuracy", extra: Mapping[str, Sequence[float]] | None = None) -> tuple[Store, Rows]:  # fmt: skip
    """A stored study of one fleet. runs: (config, step at which the metric passes from 0 to 1 over a tenth of itself; inf = never).

    The training rows are known after a fifth of that. Evaluated every ``every`` steps up to the budget, no stop rule. ``dead``: places that end at a
    quarter of their budget. ``extra``: further metrics at the last step, a value per run.
    """
    store = Store.open(directory, {"study": "invented", "config": {}, "num_runs": len(runs), **(record or {})})
    store.start_fleet("f", {"runs": [{"id": run_id(run), "config": flatten(run)} for run, _ in runs]})
    parts: list[dict[str, np.ndarray]] = []
    outcomes = []
    for place, (run, at) in enumerate(runs):
        last = run.steps // 4 if place in dead else run.steps
        steps = np.unique(np.append(np.arange(0, last + 1, every), last))
        known = np.zeros(steps.size) if math.isinf(at) else np.clip((steps - at) / (0.1 * at) + 1, 0, 1)
        trained = np.clip(steps / (0.2 * at if math.isfinite(at) else 200), 0, 1)
        part = {"step": steps, "run": np.full(steps.size, place), metric: 0.02 + 0.98 * known, f"train/{metric[4:]}": 0.02 + 0.98 * trained}
        for name, values in (extra or {}).items():
            part[name] = np.append(np.full(steps.size - 1, np.nan), values[place])
        parts.append(part)
        outcomes.append({"status": "dead" if place in dead else "completed", "steps": last, "seconds": 1.0})
    store.append("f", {name: np.concatenate([part[name] for part in parts]) for name in parts[0]})
    if not running:
        store.finish_fleet("f", {"runs": outcomes, "seconds": 1.0})
    return store, store.rows()
