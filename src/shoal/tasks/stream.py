"""What tasks share: an endless stream of shuffled epochs over a finite table, or of fresh rows; pieces of a split; the hash of a definition; rows as a file.

place = stream(key, step, 512, count)   # [R, 512]: which rows of its table each run sees at this step
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from shoal import rng
from shoal.config import fields_per_run, flatten
from shoal.config.core import type_name
from shoal.config.fields import ConfigError, check
from shoal.contracts import Batch, Task


def stream(key: Tensor, step: Tensor, size: int, count: Tensor) -> Tensor:
    """Places in a table of ``count`` rows: key int64 [R], step int64 scalar, count int64 [R] -> int64 [R, size].

    The epochs, each a fresh shuffle of all rows, follow one another without a gap, and every step takes the next ``size`` places:
    each row once per epoch, no short batch (one may span epochs). A pure function of the step: nothing is stored and the host waits for nothing.
    """
    position = step * size + torch.arange(size, device=key.device)  # [B]
    num_rows = count[:, None]  # [R, 1]
    epoch = position // num_rows  # [R, B]
    return rng.shuffled(rng.fold(key[:, None], epoch), position - epoch * num_rows, num_rows)


def fresh(key: Tensor, step: Tensor | int, place: Tensor) -> Tensor:
    """A key for each row of data that is drawn, not looked up: key int64 [R], step (or number of the set), place int64 [B] in it -> int64 [R, B]."""
    return rng.fold(rng.fold(key, step)[:, None], place)


def check_size(size: int) -> None:
    check(size > 0, "batch_size", "0 is the whole training table, and this task has none: its rows are drawn; give their number, for example 64")


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


def row_hash(batch: Batch) -> str:
    """12 hexadecimal digits of the sha256 over all tokens (little-endian int64)."""
    return hashlib.sha256(batch.tokens.cpu().numpy().astype("<i8").tobytes()).hexdigest()[:12]


def export_test(task: Task, seed: int, path: str | Path, **per_run: Any) -> dict[str, Any]:
    """Write the split "test" as tab-separated ``sequence positions answers``: the positions that are asked, from 0, and their answers in that order.

    ``per_run``: the values of the config's per-run fields. Returns ``task.describe``. A file that exists is never overwritten: ConfigError ("out").
    """
    tables = task.setup({name: [value] for name, value in per_run.items()} | {"split_seed": [seed]}, "cpu")
    lines = ["sequence\tpositions\tanswers\n"]
    for batch in task.evaluation(tables, "test", 1000):
        (_, count, time), at = batch.tokens.shape, batch.at
        places = at[0] if isinstance(at, Tensor) else torch.arange(time)[at or slice(None)].expand(count, -1)
        for tokens, asked, answers, weights in zip(*(x.tolist() for x in (batch.tokens[0], places, batch.targets[0], batch.weights[0])), strict=True):
            if any(weights):
                lines.append(f"{task.tokenizer.decode(tokens)}\t{' '.join(map(str, asked))}\t{task.tokenizer.decode(answers)}\n")
    write_new(path, lines)
    return task.describe(tables, 0)


def write_new(path: str | Path, lines: Iterable[str]) -> None:
    """A file that exists is never overwritten: ConfigError ("out")."""
    try:
        with Path(path).open("x", encoding="utf-8", newline="\n") as file:
            file.writelines(lines)
    except FileExistsError:
        raise ConfigError("out", f"{path} exists already; name another file or remove this one") from None
    except OSError as error:
        raise ConfigError("out", f"cannot write {path} ({error.strerror}); name a file in a directory that exists and is writable") from None
