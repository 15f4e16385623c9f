"""From wanted runs to fleets: runs of the same structure go together."""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Iterable, Iterator, Sequence

import torch

from shoal import models, rng, tasks
from shoal.config import (
    BaumWelch,
    BigramConfig,
    DecoderConfig,
    EmbeddingMLPConfig,
    EncoderConfig,
    Gradient,
    HMMConfig,
    LanguageConfig,
    ModularConfig,
    ModuleConfig,
    Muon,
    RunConfig,
    SentencesConfig,
    Weights,
    fields_per_run,
    flatten,
    run_id,
)
from shoal.config.fields import ConfigError, check
from shoal.contracts import Batch, Task
from shoal.data.tokenizers import shortened
from shoal.models.trial import try_out
from shoal.tasks.language import LanguageTask
from shoal.tasks.sentences import SentencesTask
from shoal.tasks.stream import check_size
from shoal.train.diffusion import ROWS
from shoal.train.flops import budgeted

LARGEST_TABLE = 2**15  # tokens of a table of pairs: 4 GB of numbers, which training holds four times
ZERO_OR_NOT = ("model.dropout", "clip", "gradient.noise", "weights.noise")  # per-run values, but whether there is any changes the program


def structure(run: RunConfig) -> str:
    """Equal for runs that can share a fleet."""
    flat, per_run = flatten(run), set(fields_per_run(run))
    fixed = {path: value for path, value in flat.items() if path not in per_run}
    fixed |= {path: flat[path] > 0 for path in ZERO_OR_NOT if path in flat}
    if isinstance(run.task, ModularConfig):  # its operations may differ by run, but not what they are about and how many stand in one table
        fixed |= {"permutations": run.task.permutations, "operations": len(run.task.operations)}
    return json.dumps(fixed, sort_keys=True)


def plan(runs: Iterable[RunConfig], largest: int | None = None) -> list[list[RunConfig]]:
    """Fleets of at most ``largest`` runs, in the order of their first run; a fleet too large is cut into nearly equal parts."""
    groups: dict[str, list[RunConfig]] = {}
    for run in runs:
        groups.setdefault(structure(run), []).append(run)
    fleets = []
    for group in groups.values():
        count = -(-len(group) // (largest or len(group)))
        size = -(-len(group) // count)
        fleets += [group[start : start + size] for start in range(0, len(group), size)]
    return fleets


def fleet_id(runs: Sequence[RunConfig]) -> str:
    """10 hexadecimal digits: the hash of its runs' ids, in order."""
    return hashlib.sha256(" ".join(map(run_id, runs)).encode()).hexdigest()[:10]


def validate(run: RunConfig, device: str | None = None) -> None:
    """What one part of a config asks of another, or of the device: splits there are, a task the model can do. ConfigError names the field."""
    if isinstance(run.model, DecoderConfig) and run.model.scan == "triton":
        check(device != "cpu", "model.scan", 'the triton scan runs on a GPU only; set it to "auto" or "sequential"')
    _check_objective(run)
    task = tasks.build(run.task)
    if isinstance(task, LanguageTask) and run.objective == "masked_diffusion":
        place = task.data.tokenizer.special["<mask>"]
        fix = "take another tokenizer, or one without a mask token of its own"
        check(place == task.vocab_size - 1, "task.tokenizer", f"has <mask> as token {place} of {task.vocab_size}, and masked_diffusion needs it last; {fix}")
    if isinstance(run.model, BigramConfig):
        size = f"a table of pairs has the square of the vocabulary, {task.vocab_size:,}; at most {LARGEST_TABLE:,} are possible"
        check(task.vocab_size <= LARGEST_TABLE, "model.type", f"{size}: set task.reindex to true, lower task.vocab_size, or set model.num_layers to 0 instead")
    if isinstance(run.model, EmbeddingMLPConfig):
        if not isinstance(run.task, ModularConfig) or run.task.tokens != "residue" or run.task.loss != "answer":
            raise ConfigError(
                "model", "embedding_mlp gives one answer to one short prompt; it can only learn modular tables with tokens residue and loss answer"
            )
        operands = task.max_length - 1  # all but "="
        check(operands <= run.model.num_inputs <= task.max_length, "model.num_inputs", f"must be {operands} to read both operands, not {run.model.num_inputs}")
    for split in run.evaluate:
        part, _, only = split.partition(":")
        alone = isinstance(run.task, ModularConfig) and part in task.splits and only == run.task.operation  # "val:div" of division alone, as of a mixture
        if split not in task.splits and not alone:
            lacks = isinstance(run.task, LanguageConfig) and part in ("val", "test") and part not in task.splits
            fix = f"; raise task.{part}_fraction to have one" if lacks else ""
            raise ConfigError("evaluate", f"this task has no split {split!r}; it has {shortened(task.splits)}{fix}")
    if "train" not in task.splits or isinstance(run.task, LanguageConfig):
        check_size(run.batch_size)
    for field, name in (("stop_metric", run.stop_metric), ("best_metric", run.best_metric)):
        split, _, metric = (name or "").partition("/")
        if name is not None and (split not in run.evaluate or metric not in ("loss", "accuracy", "exact")):
            known = ", ".join(f"{s}/{m}" for s in run.evaluate for m in ("loss", "accuracy", "exact"))
            raise ConfigError(field, f"{name!r} is not measured; possible: {known or 'nothing, because evaluate names no split'}")
    _check_encoder(run, task)
    budgeted(run)
    if isinstance(run.model, ModuleConfig):
        reason = "muon is for hidden matrices, and which of a module's are hidden is not known"
        check(not isinstance(run.optimizer, Muon), "model", f"{reason}; set optimizer.type to adamw for {run.model.module}")
        try_out(run.model, list(_each_kind(run, task)), task.vocab_size, task.max_length, getattr(torch, run.precision))


def _check_objective(run: RunConfig) -> None:
    """What goes only with one model, optimizer or task."""
    counts, em = run.objective == "likelihood", isinstance(run.optimizer, BaumWelch)
    check(counts or not em, "objective", f"baumwelch learns from expected counts, which {run.objective} does not give; set it to likelihood")
    check(
        em or not counts,
        "optimizer",
        "the gradient of likelihood is expected counts, for baumwelch alone; set optimizer.type to baumwelch, or objective to cross_entropy",
    )
    changed = (run.gradient, run.weights) != (Gradient(), Weights())
    check(not (em and changed), "optimizer", "baumwelch reads its gradient as counts, which nothing may change; leave gradient and weights as they are")
    check(not em or run.optimizer.lr <= 1, "optimizer.lr", f"of baumwelch is how far a step goes towards the counted shares, 1 at most, not {run.optimizer.lr}")
    check(not em or isinstance(run.model, HMMConfig), "model", "baumwelch and likelihood are for hidden Markov models; set model.type to hmm")
    fills, sees_all = run.objective == "masked_diffusion", isinstance(run.model, DecoderConfig) and not run.model.causal
    check(
        sees_all or not fills, "model.causal", "masked_diffusion fills in what is hidden from both sides; set model.type to decoder and model.causal to false"
    )
    leaks = run.fault == "leak"
    fix = "set it to masked_diffusion, or model.causal to true (or, to see what it does, fault to leak)"
    check(fills or leaks or not sees_all, "objective", f"a model that sees the whole sequence sees the next token; {fix}")
    check(sees_all or not leaks, "fault", "leak is attention that sees what it should foretell: set model.type to decoder and model.causal to false")
    language = isinstance(run.task, LanguageConfig) and run.objective == "cross_entropy"
    check(language or run.fault == "none", "fault", f"{run.fault} is a mistake with text and cross_entropy; take the task language, or set it to none")
    has_mask = isinstance(run.task, LanguageConfig) and run.task.mask_token
    check(
        has_mask or not fills, "task.mask_token", "masked_diffusion needs a token to hide others behind; take the task language and set task.mask_token to true"
    )
    check(not fills or run.batch_size <= ROWS, "batch_size", f"masked_diffusion tells {ROWS:,} rows apart, not {run.batch_size:,}; lower it")


def _check_encoder(run: RunConfig, task: Task) -> None:
    """An encoder reads sentences, in its own tokens, and sentences are read by an encoder."""
    if not isinstance(run.model, EncoderConfig) or not isinstance(task, SentencesTask) or not isinstance(run.task, SentencesConfig):
        neither = not isinstance(run.model, EncoderConfig) and not isinstance(task, SentencesTask)
        check(neither, "model.type", "encoder and the task sentences go together: set model.type to encoder and task.type to sentences")
        return
    fix = f"set both task.encoder and model.encoder to {run.model.encoder}"
    check(run.task.encoder == run.model.encoder, "task.encoder", f"is {run.task.encoder}, and the model is {run.model.encoder}; {fix}")
    counted = f"{task.num_classes} classes ({shortened(task.data.classes)})"
    check(run.model.num_classes == task.num_classes, "model.num_classes", f"{run.task.train} has {counted}; set it to {task.num_classes}")
    check(not isinstance(run.optimizer, Muon), "optimizer.type", "muon is for hidden matrices, and which of an encoder's are hidden is not known; take adamw")
    with torch.device("meta"):
        models.build(run.model, task.vocab_size, run.task.max_length)


def _each_kind(run: RunConfig, task: Task) -> Iterator[Batch]:
    """A batch of training and one of every evaluation."""
    per_run = {path: [getattr(run.task, path)] for path in fields_per_run(run.task)}
    tables = task.setup({**per_run, "split_seed": [run.seeds.split]}, "cpu")
    yield task.batch(tables, rng.key(torch.tensor([run.seeds.order]), "order"), torch.tensor(0), 2)
    for split in run.evaluate:
        yield from itertools.islice(task.evaluation(tables, split, 2), 1)
