"""The weights of every run at the best value of one of its evaluation metrics, kept beside those it trains on, and when to stop waiting for a better one.

RunConfig(best_metric="val/accuracy", patience=3)      # run.best() of the loaded run

It is a part of the fleet's state, so it is saved and resumed with it. Of equal values the first is kept. An evaluation of untrained weights counts, too.
"""

from __future__ import annotations

import torch
from torch import Tensor

from shoal.config import RunConfig
from shoal.contracts import Params


def init(config: RunConfig, flat: Tensor) -> dict[str, Params]:
    """flat [R, P] -> "best": weights [R, P], value float32 [R], step and waited int64 [R], evaluations since then."""
    if config.best_metric is None:
        return {}
    counts = torch.zeros(len(flat), dtype=torch.int64, device=flat.device)
    return {"best": {"weights": flat.clone(), "value": torch.full_like(counts, -torch.inf, dtype=torch.float32), "step": counts, "waited": counts.clone()}}


def keep(config: RunConfig, best: Params, flat: Tensor, value: Tensor, step: Tensor, due: Tensor) -> Tensor:
    """Look at an evaluation: value float32 [R] of the metric, step int64 scalar, due bool [R], who was evaluated -> bool [R], who has waited long enough."""
    assert config.best_metric is not None
    value = -value if config.best_metric.endswith("loss") else value
    better = due & (value > best["value"])
    for name, new in (("weights", flat), ("value", value), ("step", step)):
        old = best[name]
        old.copy_(torch.where(better.view(-1, *[1] * (old.dim() - 1)), new, old))
    best["waited"].copy_(torch.where(better, 0, best["waited"] + due))
    return due & (best["waited"] >= config.patience) if config.patience else torch.zeros_like(due)
