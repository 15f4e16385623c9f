"""What the language studies share, and nothing else: samples of text, how many of them parse as Python, claims about losses.

Study(..., measures={"samples": partial(samples, seed=config.first_seed)}, claims=[lower("GRU is below RNN.", {"variant": "GRU"}, {"variant": "RNN"})])
"""

from __future__ import annotations

import ast
import contextlib
import copy
import dataclasses
import functools
import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from shoal.config import LanguageConfig
from shoal.config.fields import ConfigError
from shoal.results import statistics
from shoal.results.claims import Claim, Sample
from shoal.results.rows import Rows
from shoal.results.tables import Table
from shoal.results.wording import setting

if TYPE_CHECKING:
    from shoal.train.run import Run

LOSS = "val/loss"
TIE = 1e-3  # nats: a smaller difference of two losses is none
TEMPERATURE, SEED = 0.8, 0  # of all samples
SAMPLE_TOKENS, CONTINUED = 256, 96  # of one that begins with nothing, and of one that continues a prompt
PARSED, PARSED_TOKENS = 64, 128  # how many samples are parsed, and how long they are

NEWTON = '''def newton(f, df, x, tolerance=1e-10, max_steps=50):
    """Find a root of f near x by Newton's method.

    f -- the function
    df -- its derivative
    x -- where to begin
    """
    for step in range(max_steps):
        change = f(x) / df(x)
'''

DISTANCES = '''"""Distances between two points, given as sequences of numbers of the same length."""

import math


def euclidean_dist(a, b):
    """The length of the straight line between a and b."""
    return math.sqrt(sum((x - y) ** 2 for x, y in zip(a, b)))


def manhattan_dist(a, b):
    """The sum of the absolute differences."""
    return sum(abs(x - y) for x, y in zip(a, b))


def cosine_dist(a, b):
'''
CODE = {"nothing": "", "Newton's method": NEWTON, "distances": DISTANCES}  # name of a prompt -> prompt


def training(evaluate: Sequence[str]) -> str:
    """The name of the training loss: that of the training split, where it is evaluated, else that of the batches."""
    return next((f"{split}/loss" for split in evaluate if split.startswith("train")), "batch/loss")


def losses(rows: Rows, key: str = f"final.{LOSS}") -> NDArray[np.float64]:
    """[n] in the order of the seeds, so that two settings pair."""
    return np.asarray(Rows(sorted(rows, key=lambda row: row["seeds.split"])).column(key), dtype=np.float64)


def by_loss(rows: Rows) -> tuple[float, ...]:
    """For ``Tuning.order``, small is better: the mean of the last validation loss; infinite where a run has none."""
    x = losses(rows)
    return (float(np.where(np.isnan(x), math.inf, x).mean()),)


def lower(text: str, a: Mapping[str, Any], b: Mapping[str, Any], *, by: float = TIE, part: Callable[[Rows], Rows] = lambda rows: rows) -> Claim:
    """Held if the last validation loss in the cell ``a`` is below that in ``b`` by ``by`` nats or more, seed by seed, in the mean."""
    a, b = dict(a), dict(b)
    return Claim(text, lambda rows: Sample(losses(part(rows).where(b)), pair=losses(part(rows).where(a))), (by, math.inf))


def texts(run: Run, prompt: str, count: int, max_tokens: int) -> list[tuple[str, bool]]:
    """``count`` continuations of a prompt, and of each whether the model ended it. On ``measuring_device``.

    A prompt may take half of the model's positions; of a longer one the end is read.
    """
    import torch

    from shoal import rng
    from shoal.inference.generate import room_after, sample
    from shoal.inference.sampling import Sampling
    from shoal.train.device import measuring_device

    device = measuring_device()
    moved = dataclasses.replace(run, model=copy.deepcopy(run.model).to(device))
    begun = [*run.task.start, *run.task.tokenizer.encode(prompt)][-(run.task.max_length // 2) :]
    tokens, keys = torch.tensor([begun] * count), rng.fold(rng.key(torch.tensor(SEED), "sample"), torch.arange(count))
    produced = sample(moved, tokens.to(device), min(max_tokens, room_after(run, len(begun))), Sampling(temperature=TEMPERATURE), keys.to(device)).tolist()
    ends = [tokens.index(run.task.end) if run.task.end in tokens else None for tokens in produced]
    return [(run.task.tokenizer.decode(tokens[:end]), end is not None) for tokens, end in zip(produced, ends, strict=True)]


def samples(run: Run, seed: int = 0, prompts: Mapping[str, str] = CODE) -> list[dict[str, Any]]:
    """What a run of this seed, and of no other, writes after each prompt that its tokenizer can read (one of characters knows the corpus' alone)."""
    lines: list[dict[str, Any]] = []
    for name, prompt in prompts.items() if run.config.seeds.split == seed else ():
        with contextlib.suppress(ConfigError):
            lines.append({"prompt": name, "sample": texts(run, prompt, 1, CONTINUED if prompt else SAMPLE_TOKENS)[0][0]})
    return lines


def parses(text: str, ended: bool) -> bool:
    """Whether the whole lines of a text are Python with at least one statement in them.

    Whole lines: all up to the last line break, or the whole text if it was ended rather than cut. A cut inside a string, a bracket or an empty block
    does not parse, so real code does not always either (``parsed_code``).
    """
    lines = text if ended else text[: text.rfind("\n") + 1]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about escapes in strings
            return bool(ast.parse(lines).body)
    except (SyntaxError, ValueError, RecursionError, MemoryError):  # ValueError: NUL characters; the last two: brackets nested too deeply
        return False


def parsed(run: Run) -> list[dict[str, Any]]:
    """The share of samples, begun with nothing, that parse; and of the corpus' own documents, cut to the same number of tokens."""
    found = [parses(*one) for one in texts(run, "", PARSED, PARSED_TOKENS)]
    assert isinstance(run.config.task, LanguageConfig)
    code = parsed_code(run.config.task, min(PARSED_TOKENS, run.task.max_length))
    return [{"samples": len(found), "parse": sum(found), "share": sum(found) / len(found), "share of real code": code}]


@functools.cache
def parsed_code(task: LanguageConfig, tokens: int) -> float:
    """The share of the corpus' documents, the first 1,000, of which the first ``tokens`` tokens parse."""
    from shoal.data.encoded import encoded

    data = encoded(task)
    edges = [(begin + 1, end) for begin, end in zip(data.starts[:1000].tolist(), data.starts[1:1001].tolist(), strict=False)]  # without <s>
    cut = [(data.tokenizer.decode(data.tokens[begin : min(end, begin + tokens)].tolist()), end - begin <= tokens) for begin, end in edges]
    return sum(parses(*one) for one in cut) / len(cut)


def parsing(by: Sequence[str]) -> Table:
    """Loss and share of samples that parse, side by side: a line per combination of the values of ``by``."""

    def line(values: Mapping[str, Any], part: Rows) -> dict[str, Any]:
        entries = [entry for row in part for entry in row["measures"].get("parsed", ())]
        shares, code = ([entry[name] for entry in entries] for name in ("share", "share of real code"))
        loss = losses(part)
        told = {"setting": setting(values), "validation loss": statistics.mean(loss[~np.isnan(loss)]).within(0, math.inf)}
        return told | {"share that parses": statistics.mean(shares).within(0, 1), "share of real code": float(np.mean(code)) if code else None}

    text = (
        f"Of {PARSED} samples a run, begun with nothing, of at most {PARSED_TOKENS} tokens or a window's length, at temperature {TEMPERATURE}: the share whose "
        "whole lines (all up to the last line break, or the whole text if the model ended it) Python's parser takes, with at least one statement in them; mean "
        "over seeds. A cut may fall inside a string or a bracket, so beside it the same share of the corpus' own documents, cut at as many tokens."
    )
    return Table("parsing", lambda rows: [line(values, part) for values, part in rows.groups(by)] if LOSS in rows.metrics else [], text)


def pairs(run: Run) -> list[dict[str, Any]]:
    """What a model would lose that only counts pairs of tokens in the run's training part."""
    assert isinstance(run.config.task, LanguageConfig)
    return [{"nats": _pairs(run.config.task, run.config.seeds.split)}]


@functools.cache
def _pairs(config: LanguageConfig, seed: int) -> float:
    from shoal.tasks.language import LanguageTask

    task = LanguageTask(config)  # built again: a run's own may hold its tokenizer alone
    return task.bigram_nats(task.setup({"split_seed": [seed]}, "cpu"), 0)
