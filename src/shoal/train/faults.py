"""Deliberate mistakes of an implementation, for ``RunConfig.fault``: what a training program does to its batches when it is wrong. Pure functions.

A run without a fault draws and evaluates what its task gives, and nothing here is called for it. Not here: mistakes that are settings (a learning rate,
a sampler); how faults are recognised (``shoal.inference.diagnose``).

    draw = faults.drawing("padding", task)      # in place of task.batch
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from shoal.contracts import Batch, Tables, Task

Draw = Callable[[Tables, Tensor, Tensor, int], Batch]


def drawing(fault: str, task: Task) -> Draw:
    """The task's own ``batch``, with the fault in it."""
    if fault in ("none", "leak"):  # a leak is in the model: nothing hides what comes from what was
        return task.batch
    if fault == "repeat":
        return lambda tables, key, step, size: task.batch(tables, key, step * 0, size)
    if fault == "labels":
        return lambda tables, key, step, size: strangers(task.batch(tables, key, step, size))
    return lambda tables, key, step, size: evaluated(fault, task, task.batch(tables, key, step, size))


def evaluated(fault: str, task: Task, batch: Batch) -> Batch:
    """A batch of an evaluation. What is wrong in the loss or in how rows become a batch is wrong there, too; the order of the data is training's alone."""
    if fault == "shift":
        return Batch(batch.tokens, batch.tokens, batch.weights, batch.mask, batch.at)
    return padded(batch, task.end or 0) if fault == "padding" else batch


def strangers(batch: Batch) -> Batch:
    """Every row gets the targets of the one before it: inputs and targets were shuffled apart."""
    return Batch(batch.tokens, batch.targets.roll(1, -2), batch.weights, batch.mask, batch.at)


def padded(batch: Batch, pad: int) -> Batch:
    """Rows of many lengths, filled up with ``pad``, which is scored like everything else.

    A row keeps 1 to T tokens, how many a hash of them says: all alike, and the same wherever the row is drawn. Scored positions are all (at = None).
    """
    time = batch.tokens.shape[-1]
    place = torch.arange(time, device=batch.tokens.device)
    mixed = (batch.tokens * (2 * place + 1)).sum(-1, keepdim=True) * 0x9E3779B1  # [*L, B, 1]; the golden ratio in 32 bits: Knuth's multiplicative hash
    kept = (mixed >> 16) % time + 1
    there = place < kept
    tokens, targets = torch.where(there, batch.tokens, pad), torch.where(place < kept - 1, batch.targets, pad)
    return Batch(tokens, targets, batch.weights, batch.mask, batch.at)
