"""How much does each rung of the ladder from a table of pairs to a transformer lower the loss of a model of Python code?"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np

from shoal.config import AdamW, DecoderConfig, LanguageConfig, RunConfig, StudyConfig
from shoal.results import statistics
from shoal.results.claims import Claim, Sample
from shoal.results.figures import curves
from shoal.results.perplexity import perplexities
from shoal.results.rows import Rows
from shoal.results.tables import Table
from shoal.studies.language import LOSS, losses, lower, pairs, samples, training
from shoal.studies.shared import matching
from shoal.studies.study import Study, about, cells

TRANSFORMER, MANY, ONE, AVERAGE, LOW_RANK, TABLE = (
    "transformer", "many heads", "one head", "averaging", "bigram through an embedding", "bigram table",
)  # fmt: skip
NARROW = 32  # width of the rungs without attention


def rungs(run: RunConfig, *, heads: float, narrow: float, table: float) -> dict[str, dict[str, Any]]:
    """From the top down, each with what it lacks of ``run``, the transformer, which trains twice as long; and the learning rates of the others.

    Heads begin with torch's own initial values, as the text states others for the transformer alone. Without a residual small ones leave all scores near 0,
    a head an average of the past, and next to no gradient to change that.
    """
    bare = {"model.num_layers": 1, "model.feed_forward": 0, "model.norm": "none", "model.residual": False}  # a mixer between embedding and head
    torchs = {"model.embedding_std": 1.0, "model.linear_init": "uniform", "optimizer.lr": heads}
    small = {"model.width": NARROW, "model.num_heads": 1, "model.positions": "none", "optimizer.lr": narrow}
    return {
        TRANSFORMER: {"steps": 2 * run.steps},
        MANY: bare | torchs,
        ONE: bare | torchs | {"model.num_heads": 1},
        AVERAGE: bare | small | {"model.mixers": ["average"]},
        LOW_RANK: bare | small | {"model.num_layers": 0},
        TABLE: {"model.type": "bigram", "model.embedding_std": 1.0, "optimizer.lr": table},
    }


def full() -> StudyConfig:
    """The assignment's setting: batches of 32 windows of 256 tokens, 1,000 steps, 2,000 of the transformer (6 layers of width 384); 3 seeds, bfloat16.

    The standard library's source in GPT-2's tokens, those that occur in it (some 18,000). The text's tokenizer, CodeBERT's, is RoBERTa's: the same byte
    pairs under other numbers. Its corpus is another. Learning rates are the text's: 0.0001 for the transformer, 0.0006 for the heads, 0.01 for the table;
    what has no attention takes the table's. Losses every 200 steps: of 1,024 training windows and of the whole validation part (the text: of 200 batches).
    """
    run = RunConfig(
        task=LanguageConfig(corpus="python", tokenizer="gpt2", reindex=True, length=256, sampler="random"),
        model=DecoderConfig(width=384, num_layers=6, num_heads=6, feed_forward=1536, head_bias=True),
        optimizer=AdamW(lr=1e-4),
        steps=1000,
        batch_size=32,
        precision="bfloat16",
        log_every=20,
        evaluate_every=200,
        evaluate=("train:1024", "val"),
    )
    return StudyConfig(run=run, variants=rungs(run, heads=6e-4, narrow=1e-2, table=1e-2), seeds=3)


def quick() -> StudyConfig:
    """Minutes on two cores: all rungs, smaller, on 1 MB of the same source in 1,024 tokens of its own; with higher learning rates, as steps are few.

    Too few for heads without a residual to find the last token: many heads are at 5.24 nats after 300 steps and at 5.09 after 1,000 (one seed), where the
    bigrams are at 5.05. What a run can learn of some 60 modules for the others is soon learned.
    """
    whole = full().run
    run = replace(
        whole,
        task=LanguageConfig(corpus="python", tokenizer="bpe", vocab_size=1024, max_bytes=1_000_000, length=64, sampler="random"),
        model=replace(whole.model, width=64, num_layers=2, num_heads=4, feed_forward=256),
        optimizer=AdamW(lr=1e-3),
        steps=300,
        batch_size=16,
        precision="float32",
        log_every=10,
        evaluate_every=100,
        evaluate=("train:64", "val"),
    )
    return StudyConfig(run=run, variants=rungs(run, heads=1e-2, narrow=1e-2, table=3e-2), seeds=3)


PRESETS = {"quick": quick, "full": full}
DEFAULT = ("quick", "full")

ORDER = [  # (lower loss, higher loss, because)
    (LOW_RANK, TABLE, "a table learns every row by itself and keeps its first noise where a token is rare; 32 numbers a token share what they learn"),
    (LOW_RANK, AVERAGE, "the mean of all that stands before does not tell which token came last, and that one says most about the next"),
    (ONE, LOW_RANK, "a head can look at the last token and at others"),
    (MANY, ONE, "several heads look at several places at once"),
    (TRANSFORMER, MANY, "layers, residuals, feed-forward parts, and twice the steps"),
]


@dataclass(frozen=True, kw_only=True)
class Told:
    """A training loss of the text, after its last step, on its own corpus of Python code."""

    rung: str
    loss: str


TEXT = [Told(rung=TABLE, loss="about 4"), Told(rung=ONE, loss="3.4"), Told(rung=MANY, loss="2.75"), Told(rung=TRANSFORMER, loss="2.4")]
BELOW = 2.4  # the transformer's


def _text(rows: Rows) -> list[dict[str, Any]]:
    lines = []
    for one in TEXT:
        part = matching(rows, {"variant": one.rung})
        ours = statistics.mean(losses(part, f"final.{training(part[0]['evaluate'])}")) if part else "not run"
        lines.append({"rung": one.rung, "training loss in the text": one.loss, "ours": ours, "our tokens": part[0]["task.tokenizer"] if part else None})
    return lines


def start(rows: Rows, excess: float) -> Sample:
    """The first validation loss as a multiple of ln V + ``excess``."""
    expected = [math.log(row["data"]["vocabulary"]) + excess for row in rows]
    return Sample(np.array([row.curve(LOSS)[1][0] for row in rows]) / np.array(expected), bounds=(0, math.inf))


def _start(name: str, cell: Mapping[str, Any]) -> Claim:
    """Small initial outputs give every token nearly the same probability: ln V. A row of N(0, 1) logits z loses E log sum exp z - E z of the right token.

    The sum of V terms of mean exp(1/2) is near V exp(1/2), its logarithm ln V + 1/2 (less (e - 1) / 2V, which its own spread takes off), and a right token's
    logit is 0 in the mean.
    """
    excess, of = (0.5, "ln V + 1/2, as its logits begin as N(0, 1)") if name == TABLE else (0.0, "ln V, as its outputs begin small")
    here = {**cell, "variant": name}
    return Claim(about(f"The first validation loss of “{name}” is within 2 % of {of}.", cell), lambda rows: start(rows.where(here), excess), (0.98, 1.02))


def _claims(config: StudyConfig, cell: Mapping[str, Any]) -> list[Claim]:
    here = config.variants
    claims = [
        lower(about(f"“{a}” has a lower validation loss than “{b}”, seed by seed: {why}.", cell), {**cell, "variant": a}, {**cell, "variant": b})
        for a, b, why in ORDER
        if {a, b} <= here.keys()
    ]
    claims += [_start(name, cell) for name in reversed(here)]
    if TRANSFORMER in here and getattr(config.run.task, "tokenizer", "") == "gpt2":  # a loss per token says nothing about tokens of another length
        text = f"The transformer's training loss is at most {BELOW}, the text's figure on a corpus and with tokens of its own."
        top = {**cell, "variant": TRANSFORMER}
        claims.append(
            Claim(about(text, cell), lambda rows: Sample(losses(rows.where(top), f"final.{training(rows[0]['evaluate'])}"), bounds=(0, math.inf)), (0.0, BELOW))
        )
    return claims


def study(config: StudyConfig) -> Study:
    by = list(cells(config)[0])
    others = cells(replace(config, variants={}))
    return Study(
        name="ladder",
        question=__doc__ or "",
        main_metric=LOSS,
        config=config,
        wanted=lambda rows: config.runs(),
        measures={"pairs": pairs, "samples": partial(samples, seed=config.first_seed)},
        figures=[
            curves(LOSS, by=by, ylabel="validation loss (nats per token)"),
            curves([training(config.run.evaluate), LOSS], by=by, ylabel="nats per token"),
        ],
        tables=[
            perplexities(by),
            Table("text", _text, "Training losses the text states, on its corpus and with its tokenizer, and ours: mean over seeds with the t interval."),
        ],
        claims=[claim for cell in others for claim in _claims(config, cell)],
    )
