"""A trained run on the splits of its own task."""

from __future__ import annotations

from functools import reduce

import torch
from torch import Tensor

from shoal.config import RunConfig, fields_per_run
from shoal.contracts import Batch, Context, Tables, Task
from shoal.train.objectives import OBJECTIVES, add, means
from shoal.train.run import Run

ROWS = 4096  # of one piece


def tables_of(config: RunConfig, task: Task) -> Tables:
    """A run's own data, as in its fleet."""
    per_run = {path: [getattr(config.task, path)] for path in fields_per_run(config.task)}
    return task.setup({**per_run, "split_seed": [config.seeds.split]}, "cpu")


def batches(run: Run, split: str) -> list[Batch]:
    """The whole split without a run axis."""
    return [batch.each(lambda x: x[0]) for batch in run.task.evaluation(tables_of(run.config, run.task), split, ROWS)]


@torch.inference_mode()
def evaluate(run: Run, split: str) -> dict[str, float]:
    """Metric -> value over the whole split: loss (nats), accuracy, exact, zero_loss, collapse."""
    total = reduce(add, (OBJECTIVES[run.config.objective](run.model, batch, None) for batch in batches(run, split)))
    return {name: value.item() for name, value in means(total).items()}


@torch.inference_mode()
def next_token_probabilities(run: Run, batch: Batch) -> Tensor:
    """float32 [B, T, V]: the model's distribution of the token after each position."""
    hidden, _ = run.model(batch.tokens, Context(mask=batch.mask))
    return run.model.logits(hidden).float().softmax(-1)
