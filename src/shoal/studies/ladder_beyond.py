"""At equal FLOPs, what lowers the loss of a transformer of Python code, and how do recurrent, state-space, Markov and diffusion models compare with it?"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np

from shoal.config import AdamW, DecoderConfig, LanguageConfig, RunConfig, StudyConfig
from shoal.config.fields import check
from shoal.results import statistics
from shoal.results.claims import Claim, Sample
from shoal.results.figures import Drawing, Figure, canvas, colours, curves, legend, nothing, scales
from shoal.results.perplexity import perplexities
from shoal.results.rows import Rows
from shoal.results.tables import Table
from shoal.results.wording import number, plural, setting
from shoal.studies.language import LOSS, by_loss, losses, lower, pairs, parsed, parsing, samples
from shoal.studies.study import Study, about, cells
from shoal.studies.tuning import Tuning, edges, of

LR = "optimizer.lr"
BASE, MODERN, MUON, DECAY, HYBRID, ALL = "transformer", "modern block", "Muon", "linear decay", "Mamba and attention", "modern block, Muon, decay"
RNN, GRU, LSTM, MAMBA, HMM, EM, DIFFUSION = "RNN", "GRU", "LSTM", "Mamba", "HMM", "HMM by Baum-Welch", "masked diffusion (a bound)"
TUNING = 1000  # the first seed of the tuning

BLOCK = {
    "model.norm": "rms", "model.positions": "rotary", "model.qk_norm": True, "model.activation": "relu2", "model.bias": False, "model.head_bias": False,
    "model.output_init": "zero", "model.softcap": 15.0,
}  # fmt: skip
LINEAR = {"schedule.kind": "linear", "schedule.floor": 0.0}
STATES = {"model.type": "hmm", "model.init_std": 1.0}


def models(run: RunConfig, states: int) -> dict[str, dict[str, Any]]:
    """Name -> what is changed of ``run``, the transformer; without learning rates."""
    assert isinstance(run.model, DecoderConfig)
    muon = {"optimizer.type": "muon", "optimizer.wd": 0.0, "optimizer.adam_lr": 3e-3, "optimizer.adam_beta2": 0.95}
    mamba = {"model.mixers": ["mamba"], "model.feed_forward": 0, "model.num_layers": 2 * run.model.num_layers}  # twice the layers: each has half the weights
    plain = {"model.positions": "none"}
    return {
        BASE: {},
        MODERN: BLOCK,
        MUON: muon,
        DECAY: LINEAR,
        HYBRID: {"model.mixers": ["mamba", "attention"]},
        ALL: BLOCK | muon | LINEAR,
        RNN: plain | {"model.mixers": ["rnn"]},
        GRU: plain | {"model.mixers": ["gru"]},
        LSTM: plain | {"model.mixers": ["lstm"]},
        MAMBA: plain | mamba,
        HMM: STATES | {"model.num_states": states},
        EM: STATES | {"model.num_states": states, "objective": "likelihood", "optimizer.type": "baumwelch", "optimizer.smoothing": 0.01},
        DIFFUSION: {"objective": "masked_diffusion", "model.causal": False, "task.mask_token": True},
    }


def rated(variants: Mapping[str, Mapping[str, Any]], rates: Mapping[str, Sequence[float]]) -> dict[str, dict[str, Any]]:
    """Every model at every learning rate it is tried with; those that ``rates`` does not name are left out."""
    return {f"{name}, lr {number(rate)}": {**changes, LR: rate} for name, changes in variants.items() for rate in rates.get(name, ())}


def model_of(variant: str) -> str:
    return variant.rpartition(", lr ")[0] or variant


def full() -> StudyConfig:
    """3e14 FLOPs in matrix products a run (some 11 million tokens of the transformer, 4 layers of width 256): 13 models at 3 learning rates on 2 seeds, the
    best of each on 5 fresh ones. The standard library's source in 4,096 tokens of its own, windows of 256, bfloat16.
    """
    run = RunConfig(
        task=LanguageConfig(corpus="python", tokenizer="bpe", vocab_size=4096, length=256),
        model=DecoderConfig(width=256, num_layers=4, num_heads=4, feed_forward=1024, head_bias=True),
        optimizer=AdamW(lr=1e-3, beta2=0.95),
        budget=3e14,
        budget_rule="products",
        batch_size=32,
        clip=1.0,
        precision="bfloat16",
        log_every=50,
        evaluate_every=200,
        evaluate=("val",),
    )
    usual, wide = (3e-4, 1e-3, 3e-3), (1e-3, 3e-3, 1e-2)
    rates = dict.fromkeys((BASE, MODERN, DECAY, HYBRID, RNN, DIFFUSION), usual) | dict.fromkeys((GRU, LSTM, MAMBA), wide)
    rates |= dict.fromkeys((MUON, ALL), (0.01, 0.02, 0.04)) | {HMM: (0.01, 0.03, 0.1), EM: (0.03, 0.1, 0.3)}
    return StudyConfig(run=run, variants=rated(models(run, states=512), rates), seeds=5)


def quick() -> StudyConfig:
    """Minutes on two cores: 1e11 FLOPs a run, 2 layers of width 48, 1,024 tokens, 1 MB; 10 models at 2 learning rates on 1 seed, then 3 fresh ones."""
    whole = full().run
    run = replace(
        whole,
        task=LanguageConfig(corpus="python", tokenizer="bpe", vocab_size=1024, max_bytes=1_000_000, length=64),
        model=replace(whole.model, width=48, num_layers=2, num_heads=3, feed_forward=192),
        budget=1e11,
        batch_size=16,
        precision="float32",
        log_every=10,
        evaluate_every=100,
    )
    rates = dict.fromkeys((BASE, MODERN, DECAY, DIFFUSION, GRU, MAMBA), (3e-3, 1e-2)) | dict.fromkeys((MUON, ALL), (0.01, 0.02))
    rates |= {HMM: (0.03, 0.1), EM: (0.1, 0.3)}
    return StudyConfig(run=run, variants=rated(models(run, states=48), rates), seeds=3)


PRESETS = {"quick": quick, "full": full}
DEFAULT = ("quick", "full")

HYPOTHESES = [  # (lower loss, higher loss, because); the first four are about the transformer's improvements, and what the report is judged by
    (
        MODERN,
        BASE,
        "rotary positions, RMS norms, normalised queries and keys, squared ReLU, outputs that begin at 0 and a cap on the logits each helped others",
    ),
    (MUON, BASE, "an update with equal singular values moves every direction of a matrix, AdamW's few"),
    (HYBRID, BASE, "a short convolution and a state carry what is near, and attention is left with what is far"),
    (DECAY, BASE, "the noise of a constant rate is never averaged out"),
    (ALL, MODERN, "the optimizer and its decay add to what the block brings"),
    (GRU, RNN, "gates carry a state over more steps than repeated tanh layers do"),
    (LSTM, RNN, "a cell that is added to carries its state over more steps"),
    (MAMBA, GRU, "its states are many, and what goes in and out of them depends on the token"),
    (GRU, HMM, "a vector holds more than which of some states a chain is in"),
    (EM, HMM, "expected counts take the long way that a gradient takes in many steps at once"),
    (BASE, DIFFUSION, "a bound over all orders of writing is looser than the likelihood of one, and its steps teach fewer tokens each"),
]


def _tuning(config: StudyConfig) -> Tuning:
    seeds = tuple(range(TUNING, TUNING + max(1, config.seeds // 2)))
    return Tuning(seeds=seeds, reported=lambda told: told | {"variant": model_of(told["variant"])}, order=by_loss)


def _claims(config: StudyConfig, tuning: Tuning, cell: Mapping[str, Any]) -> list[Claim]:
    here = {model_of(name) for name in config.variants}

    def shares(rows: Rows) -> Sample:
        a, b = (sorted(tuning.fresh(rows).where({**cell, "variant": name}), key=lambda row: row["seeds.split"]) for name in (BASE, HMM))
        x, y = ([row["measures"]["parsed"][0]["share"] for row in part] for part in (a, b))
        return Sample(x, pair=y, bounds=(-1, 1))

    claims = [
        lower(
            about(f"At equal FLOPs “{a}” has a lower validation loss than “{b}”, seed by seed: {why}.", cell),
            {**cell, "variant": a}, {**cell, "variant": b}, part=tuning.fresh,
        )
        for a, b, why in HYPOTHESES
        if {a, b} <= here
    ]  # fmt: skip
    if {BASE, HMM} <= here:
        text = "A point more of the transformer's samples, or more, parse as Python than of the hidden Markov model's, seed by seed: brackets must be closed."
        claims.append(Claim(about(text, cell), shares, (0.01, 1.0)))
    return claims


def chosen(tuning: Tuning, by: Sequence[str]) -> Table:
    """A line per model: the learning rate chosen, and what its equal share of FLOPs bought."""

    def line(values: Mapping[str, Any], part: Rows, tried: Rows) -> dict[str, Any]:
        best, row = {LR: part[0][LR]}, part[0]
        mine = Rows([one for one in tried if model_of(one["variant"]) == values["variant"] and all(one[path] == values[path] for path in by[1:])])
        tokens = row["steps"] * row["batch_size"] * row["task.length"]
        return {
            "setting": setting(values),
            "learning rate": row[LR],
            "at the edge of what was tried": "yes" if edges(mine, best) else "no",
            "loss in tuning": by_loss(mine.where(best))[0],
            "loss on fresh seeds": statistics.mean(losses(part)),
            "parameters": row["parameters"],
            "steps": row["steps"],
            "FLOPs in products": row["flops.products"] * row["steps"],
            "FLOPs executed": row["flops.hardware"] * row["steps"],
            "tokens": tokens,
            "epochs": tokens / row["data"]["train tokens"],
        }

    text = (
        f"Of each model the learning rate with the lowest mean validation loss on {plural(len(tuning.seeds), 'tuning seed')}, and its loss on fresh ones. "
        "Every run may spend the same FLOPs in its model's matrix products, so a cheap model makes more steps; what else is executed (Muon's own products, "
        "other optimizers' arithmetic) is beside them, and not part of the budget. Diffusion's loss is a bound, of all tokens of a window given the first."
    )
    return Table("chosen", lambda rows: [line(values, part, tuning.tried(rows)) for values, part in tuning.fresh(rows).groups(by)], text)


def spent(by: Sequence[str]) -> Figure:
    """Validation loss against the FLOPs of training, the median of each line's runs."""

    def draw(rows: Rows) -> Drawing:
        groups = [(values, part) for values, part in rows.groups(by) if all(row.curve(LOSS)[0].size for row in part)]
        if not groups:
            return nothing("no validation losses yet")
        drawing, (axis,) = canvas(4.2)
        for (values, part), colour in zip(groups, colours(len(groups)), strict=True):
            steps, _ = min((row.curve(LOSS) for row in part), key=lambda curve: len(curve[0]))
            y = np.median([row.curve(LOSS)[1][: len(steps)] for row in part], axis=0)
            axis.plot(steps * part[0]["flops.products"], y, color=colour, label=setting(values))
        scales(axis, False, False, [LOSS])
        axis.set_xlabel("FLOPs in matrix products, training alone")
        axis.set_ylabel("validation loss (nats per token)")
        legend(drawing, axis)
        return drawing

    return Figure("spent", draw, "Validation loss against the FLOPs spent on training: median of the fresh seeds at the chosen learning rate.")


def study(config: StudyConfig) -> Study:
    check(bool(config.variants), "variants", "name at least one model")
    tuning = _tuning(config)
    tuning.check(config)
    others = cells(replace(config, variants={}))
    by = ["variant", *others[0]]
    return Study(
        name="ladder-beyond",
        question=__doc__ or "",
        main_metric=LOSS,
        config=config,
        wanted=lambda rows: tuning.wanted(config, rows),
        eager=True,
        measures={"pairs": tuning.measure(pairs), "parsed": tuning.measure(parsed), "samples": tuning.measure(partial(samples, seed=config.first_seed))},
        figures=[
            tuning.of_fresh(spent(by)),
            tuning.of_fresh(curves(LOSS, by=by, name="fresh", caption="Validation loss of fresh seeds at the chosen learning rate: median and range.")),
            of(tuning.tried, curves(LOSS, by=by, name="tried", caption="Validation loss of every model and learning rate on the tuning seeds.")),
        ],
        tables=[tuning.of_fresh(perplexities(by)), tuning.of_fresh(parsing(by)), chosen(tuning, by)],
        claims=[claim for cell in others for claim in _claims(config, tuning, cell)],
    )
