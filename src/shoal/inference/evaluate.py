"""A trained run on the splits of its own task."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from functools import reduce

import torch
from torch import Tensor

from shoal.config import RunConfig, fields_per_run
from shoal.contracts import Batch, Context, Tables, Task
from shoal.nn import select
from shoal.train.device import measuring_device
from shoal.train.objectives import OBJECTIVES, add, means
from shoal.train.run import Run

ROWS = 4096  # of one piece, at most
TOKENS = {"cpu": 1 << 14, "cuda": 1 << 18}  # of one piece of sequences of some length: fits the cache, fills the GPU


def tables_of(config: RunConfig, task: Task, device: str = "cpu") -> Tables:
    """A run's own data, as in its fleet."""
    per_run = {path: [getattr(config.task, path)] for path in fields_per_run(config.task)}
    return task.setup({**per_run, "split_seed": [config.seeds.split]}, device)


def batches(run: Run, split: str) -> list[Batch]:
    """The whole split without a run axis."""
    rows = max(1, min(ROWS, TOKENS["cpu"] // run.task.max_length))
    return [batch.each(lambda x: x[0]) for batch in run.task.evaluation(tables_of(run.config, run.task), split, rows)]


@torch.inference_mode()
def evaluate(run: Run, split: str) -> dict[str, float]:
    """Metric -> value over the whole split: loss (nats), accuracy, exact, zero_loss, collapse."""
    total = reduce(add, (OBJECTIVES[run.config.objective](run.model, batch, None) for batch in batches(run, split)))
    return {name: value.item() for name, value in means(total).items()}


@torch.inference_mode()
def lengths(run: Run, lengths: Iterable[int]) -> list[dict[str, float]]:
    """Recall at other lengths, each on the ``test_size`` sequences of its split "length:n", which no training saw. On ``measuring_device``.

    A line per length: "length", "accuracy", and "distinct", the accuracy where the answer is not the token that asks for it (NaN where there is none such).
    """
    device = measuring_device()
    model, tables, sums = copy.deepcopy(run.model).to(device), tables_of(run.config, run.task, device), []
    asked = list(lengths)
    for length in asked:
        total = torch.zeros(4, dtype=torch.int64, device=device)
        for piece in run.task.evaluation(tables, f"length:{length}", max(1, TOKENS[device] // length)):
            batch = piece.each(lambda x: x[0])
            hidden, _ = model(batch.tokens, Context(mask=batch.mask, at=batch.at))
            right, there = model.logits(hidden).argmax(-1) == batch.targets, batch.weights > 0  # [B, S]
            distinct = there & (select(batch.tokens.unsqueeze(-1), batch.at).squeeze(-1) != batch.targets)
            total += torch.stack([x.sum() for x in (right & there, there, right & distinct, distinct)])
        sums.append(total)
    return [
        {"length": length, "accuracy": right / there, "distinct": apart / distinct if distinct else float("nan")}
        for length, (right, there, apart, distinct) in zip(asked, torch.stack(sums).tolist(), strict=True)  # the one transfer
    ]


@torch.inference_mode()
def next_token_probabilities(run: Run, batch: Batch) -> Tensor:
    """float32 [B, T, V]: the model's distribution of the token after each position."""
    hidden, _ = run.model(batch.tokens, Context(mask=batch.mask))
    return run.model.logits(hidden).float().softmax(-1)
