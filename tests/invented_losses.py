"""Rows of language models that were never trained: each loss falls in a straight line from where it is said to begin to where it is said to end."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from shoal.config import RunConfig, flatten, run_id
from shoal.results import Rows, Store
from shoal.studies.language import training

DATA = {"vocabulary": 1000, "train tokens": 90_000, "val bytes per token": 3.0, "uniform nats": 6.9, "unigram nats": 6.0}


def losses(
    directory: Path, runs: Sequence[RunConfig], loss: Callable[[RunConfig], float], begin: Callable[[RunConfig], float] = lambda run: 6.9,
    measures: Callable[[RunConfig], Mapping[str, Any]] = lambda run: {}, data: Mapping[str, Any] = DATA, gap: float = 0.1,
) -> Rows:  # fmt: skip
    """Ten evaluations of the validation loss and of the training loss, which is lower by ``gap``; measures by name."""
    store = Store.open(directory, {"study": "invented", "config": {}, "num_runs": len(runs)})
    known = {"data": [dict(data) for _ in runs], "model": {"parameters": 1234, "flops": {"assignment": 3 * 10**6, "products": 10**6, "hardware": 2 * 10**6}}}
    store.start_fleet("f", {"runs": [{"id": run_id(run), "config": flatten(run)} for run in runs], **known})
    parts: list[dict[str, np.ndarray]] = []
    for place, run in enumerate(runs):
        values = np.linspace(begin(run), loss(run), 11)
        steps = np.linspace(0, run.steps, 11).astype(np.int64)
        parts.append({"step": steps, "run": np.full(11, place), "val/loss": values, training(run.evaluate): values - gap})
        for name, entries in measures(run).items():
            store.add_measure(run_id(run), name, entries)
    store.append("f", {name: np.concatenate([part.get(name, np.full(11, np.nan)) for part in parts]) for name in {name for part in parts for name in part}})
    store.finish_fleet("f", {"runs": [{"status": "completed", "steps": run.steps, "seconds": 1.0} for run in runs], "seconds": 1.0})
    return store.rows()
