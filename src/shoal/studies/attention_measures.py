"""What the study of attention's variants looks at after training: loss by position to beyond the windows of training, what a model has from tokens that are
still to come, how much weight goes there, speed, samples.

    Study(..., measures={"beyond": tuning.measure(beyond), "leak": leak})

Not here: which runs are asked (``attention_variants``), tables and figures of it (``attention_tables``).
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import statistics
import time
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from shoal.config import LanguageConfig

if TYPE_CHECKING:
    from torch import Tensor

    from shoal.contracts import Batch, Tables
    from shoal.models import AnyModel
    from shoal.tasks.language import LanguageTask
    from shoal.train.run import Run

BINS = 5  # stretches that a training window's positions are taken together in
WINDOWS, PLACES = 256, 8  # how many windows a leak is looked for in, and at how many places of each
REPEATS = 5  # of a timed step, after one that is not timed
TRAINED, OTHER, PREFIX = "as trained", "another text to come", "nothing to come"  # how a place is scored
PROMPTS = {"nothing": "", "a function": "def distance(a, b):\n    "}


def beyond(run: Run) -> list[dict[str, Any]]:
    """Nats per token at each stretch of positions ("position": its last, from 1), over the whole validation part in windows of all the room a model has."""
    import torch

    config = run.config.task
    assert isinstance(config, LanguageConfig)
    room, size = config.longest * config.length, -(-config.length // BINS)
    with torch.inference_mode():
        model, device = _moved(run)
        total = torch.zeros(2, room, dtype=torch.float64, device=device)
        for batch in _windows(dataclasses.replace(config, length=room, longest=1), run.config.seeds.split, "val", device):
            total += torch.stack([(_nats(model, batch.tokens, batch.targets) * batch.weights).sum(0), batch.weights.sum(0)])
    found = []
    for begin in range(0, room, config.length):  # so that no stretch lies on both sides of where training ends
        for first in range(begin, begin + config.length, size):
            last = min(first + size, begin + config.length)
            loss, count = total[:, first:last].sum(-1).tolist()
            found += [{"position": last, "nats": loss / count, "tokens": int(count)}] if count else []
    return found


def leak(run: Run) -> list[dict[str, Any]]:
    """Nats at the same places of validation windows, scored in three ways: the model is given what follows, as in training (the token asked for is part of
    it); what stands there in another window; nothing. A causal model cannot tell them apart.
    """
    import torch

    config = run.config.task
    assert isinstance(config, LanguageConfig)
    places = [(2 * i + 1) * config.length // (2 * PLACES) for i in range(PLACES)] if config.length >= PLACES else list(range(config.length))
    sums: dict[str, float] = dict.fromkeys((TRAINED, OTHER, PREFIX), 0.0)
    with torch.inference_mode():
        model, device = _moved(run)
        count = 0.0
        for batch in _windows(config, run.config.seeds.split, f"val:{WINDOWS}", device):
            tokens, targets, weights = batch.tokens, batch.targets, batch.weights
            count += float(weights[:, places].sum())
            sums[TRAINED] += float((_nats(model, tokens, targets) * weights)[:, places].sum())
            for place in places:
                others = torch.cat([tokens[:, : place + 1], tokens.roll(1, 0)[:, place + 1 :]], dim=-1)
                for name, given in ((OTHER, others), (PREFIX, tokens[:, : place + 1])):
                    sums[name] += float((_nats(model, given, targets[:, : given.shape[-1]])[:, place] * weights[:, place]).sum())
    return [{"given": name, "nats": loss / count, "places": int(count)} for name, loss in sums.items()]


def lost(run: Run) -> list[dict[str, Any]]:
    """The share of a token's attention that goes to tokens still to come and is then lost, by layer and position (from 1): the mean over windows and heads."""
    import torch

    from shoal.contracts import Context
    from shoal.inference.inside import weights_of

    config = run.config.task
    assert isinstance(config, LanguageConfig)
    with torch.inference_mode():
        batch = next(iter(_windows(config, run.config.seeds.split, "val:16", "cpu", 16)))
        kept = {layer: x.sum(-1).mean((0, 1)).tolist() for layer, x in weights_of(run, batch.tokens, Context()).items()}  # [T]
    return [{"layer": layer, "position": i + 1, "lost": 1 - share} for layer, shares in kept.items() for i, share in enumerate(shares)]


def speed(run: Run) -> list[dict[str, Any]]:
    """Tokens a second of forward and backward pass, uncompiled, of five of the run's batches at once."""
    import torch

    config = run.config.task
    assert isinstance(config, LanguageConfig)
    model, device = _moved(run, getattr(torch, run.config.precision))
    parameters = list(model.requires_grad_(True).parameters())
    rows = 5 * run.config.batch_size
    tokens = torch.arange(rows * config.length, device=device).view(rows, -1) % run.task.vocab_size

    def seconds() -> float:
        _wait(device)
        began = time.perf_counter()
        torch.autograd.grad(_nats(model, tokens, tokens).sum(), parameters, allow_unused=True)
        _wait(device)
        return time.perf_counter() - began

    taken = [seconds() for _ in range(REPEATS + 1)][1:]
    return [{"tokens per second": tokens.numel() / statistics.median(taken), "device": torch.cuda.get_device_name() if device == "cuda" else "CPU"}]


def samples(run: Run, prompts: Mapping[str, str] = PROMPTS) -> list[dict[str, Any]]:
    """What a run writes after each prompt, within the positions it was trained on."""
    from shoal.studies.language import texts

    assert isinstance(run.config.task, LanguageConfig)
    given = {name: len([*run.task.start, *run.task.tokenizer.encode(prompt)]) for name, prompt in prompts.items()}
    room = {name: run.config.task.length - count for name, count in given.items()}
    return [{"prompt": prompts[name], "sample": texts(run, prompts[name], 1, count)[0][0]} for name, count in room.items() if count > 0]


def _moved(run: Run, dtype: Any = None) -> tuple[AnyModel, str]:
    from shoal.train.device import measuring_device

    device = measuring_device()
    return copy.deepcopy(run.model).to(device, dtype), device


def _wait(device: str) -> None:
    import torch

    if device == "cuda":
        torch.cuda.synchronize()


def _nats(model: AnyModel, tokens: Tensor, targets: Tensor) -> Tensor:
    """int64 [B, T] -> float32 [B, T]."""
    from torch.nn import functional as F

    from shoal.contracts import Context

    hidden, _ = model(tokens, Context())
    logits = model.logits(hidden).float()
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none").view(targets.shape)


def _windows(config: LanguageConfig, seed: int, split: str, device: str, rows: int | None = None) -> Iterator[Batch]:
    """The windows of a split without a run axis, in pieces that fit."""
    from shoal.inference.evaluate import TOKENS

    task, tables = _data(config, seed, device)
    for batch in task.evaluation(tables, split, rows or max(1, TOKENS[device] // config.length)):
        yield batch.each(_first)


def _first(x: Tensor) -> Tensor:
    return x[0]


@functools.cache
def _data(config: LanguageConfig, seed: int, device: str) -> tuple[LanguageTask, Tables]:
    from shoal.tasks.language import LanguageTask

    task = LanguageTask(config)
    return task, task.setup({"split_seed": [seed]}, device)
