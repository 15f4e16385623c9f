"""Which small GPT reaches the lowest validation perplexity with 1e15 FLOPs: how much is the shape, how much the block, how much the optimizer?"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

from shoal.config import AdamW, DecoderConfig, LanguageConfig, RunConfig, Schedule, StudyConfig
from shoal.config.load import to_yaml
from shoal.results.claims import Claim
from shoal.results.figures import Drawing, Figure, canvas, colours, curves, legend, nothing, scales
from shoal.results.perplexity import perplexities
from shoal.results.rows import Row, Rows
from shoal.results.tables import Table
from shoal.results.wording import number
from shoal.studies.language import LOSS, by_loss, lower, pairs
from shoal.studies.study import Study, about, cells
from shoal.studies.tuning import Tuning, of

if TYPE_CHECKING:
    from shoal.train.run import Run

PLAIN, FOUND = "plain GPT", "best found"
TUNING_SEEDS = (1000, 1001)  # never those that are reported
LESS = 0.15  # of the plain block's perplexity
MODERN = {  # what helped others, taken together; but no cap on logits: it gained them 0.004 nats at most, and costs the fused loss more exponentials
    "model.norm": "rms", "model.activation": "relu2", "model.positions": "rotary", "model.qk_norm": True, "model.bias": False,
    "model.output_init": "zero", "schedule.kind": "linear", "schedule.floor": 0.0, "schedule.warmup": 0.0,
}  # fmt: skip


def plain(width: int, num_layers: int, lr: float) -> dict[str, Any]:
    """The assignment's block: GPT-2's, with AdamW and a cosine to a tenth."""
    return {"model.width": width, "model.num_layers": num_layers, "model.feed_forward": 4 * width, "model.num_heads": width // 32, "optimizer.lr": lr}


def modern(width: int, num_layers: int, lr: float) -> dict[str, Any]:
    """The modern block with AdamW and a linear decay to 0."""
    return plain(width, num_layers, lr) | MODERN


def muon(width: int, num_layers: int, lr: float, adam_lr: float) -> dict[str, Any]:
    """The modern block with Muon on its matrices, AdamW on the tied table."""
    rest = {"optimizer.type": "muon", "optimizer.lr": lr, "optimizer.adam_lr": adam_lr, "optimizer.adam_beta2": 0.95}
    return modern(width, num_layers, lr) | rest


def _name(kind: str, width: int, num_layers: int, *rates: float) -> str:
    return f"{kind} {width} x {num_layers}, lr {' and '.join(map(number, rates))}"


def settings(kinds: Sequence[tuple[str, Any, Sequence[tuple[int, int]], Sequence[tuple[float, ...]]]]) -> dict[str, dict[str, Any]]:
    """(name, changes, shapes (width, layers), learning rates) of each kind -> name of every candidate and its changes."""
    return {_name(kind, *shape, *rates): make(*shape, *rates) for kind, make, shapes, tried in kinds for shape in shapes for rates in tried}


def base(budget: float, *, evaluate_every: int, batch_size: int = 64, length: int = 128, **task: Any) -> RunConfig:
    return RunConfig(
        task=LanguageConfig(length=length, **task),
        model=DecoderConfig(width=64, num_layers=4, num_heads=2, feed_forward=256, activation="gelu", tied=True),
        optimizer=AdamW(lr=1e-3, wd=0.1, beta2=0.95, decay="matrices"),
        schedule=Schedule(kind="cosine", warmup=0.02, floor=0.1),
        budget=budget,
        batch_size=batch_size,
        clip=1.0,
        log_every=evaluate_every // 5,
        evaluate_every=evaluate_every,
        evaluate=("val",),
    )


def full() -> StudyConfig:
    """1e15 FLOPs a run, GPT-2's vocabulary: 32 candidates of 3 kinds and 5 shapes on 2 seeds, the best plain one and the best of all others on 8 fresh ones.

    An earlier search, cut short, on the docstrings of one machine (2.7 million tokens, 2 seeds each): width 128 was better than 64 for every kind, and of
    AdamW's rates with the modern block the smallest tried, 0.002, was the best there.
    """
    run = replace(base(1e15, evaluate_every=1_000, corpus="english", tokenizer="gpt2"), precision="bfloat16")
    rates = [(1e-3,), (2e-3,), (4e-3,), (8e-3,)]
    variants = settings([
        ("plain", plain, [(64, 4), (128, 4), (128, 8)], rates),
        ("modern", modern, [(128, 4)], rates),
        ("Muon", muon, [(64, 4), (128, 4), (128, 6), (128, 8)], [(0.01, 4e-3), (0.02, 4e-3), (0.01, 8e-3), (0.02, 8e-3)]),
    ])  # fmt: skip
    return StudyConfig(run=run, variants=variants, seeds=8)


def quick() -> StudyConfig:
    """Minutes on two cores: 5e11 FLOPs a run, 1,024 tokens, 1 MB of prose: 8 candidates of 2 kinds and 2 shapes on 2 seeds, two on 3 fresh ones."""
    run = base(5e11, evaluate_every=100, batch_size=16, length=64, corpus="english", tokenizer="bpe", vocab_size=1024, max_bytes=1_000_000)
    variants = settings([
        ("plain", plain, [(32, 2), (64, 2)], [(4e-3,), (8e-3,)]),
        ("Muon", muon, [(32, 2), (64, 2)], [(0.02, 8e-3), (0.04, 8e-3)]),
    ])  # fmt: skip
    return StudyConfig(run=run, variants=variants, seeds=3)


PRESETS = {"quick": quick, "full": full}
DEFAULT = ("quick", "full")


def kind(variant: str) -> str:
    """What a candidate competes for."""
    return PLAIN if variant.startswith("plain") else FOUND


TUNING = Tuning(seeds=TUNING_SEEDS, reported=lambda told: told | {"variant": kind(told["variant"])}, order=by_loss)


def candidates(rows: Rows) -> list[dict[str, Any]]:
    """The five that tell the story: the best of each kind at its best shape, then the next best shapes; each at its best learning rate."""
    tried = [(by_loss(part)[0], part[0]) for _, part in TUNING.tried(rows).groups(["variant"])]
    best: dict[str, tuple[float, Row]] = {}  # of each kind and shape
    for loss, row in sorted(tried, key=lambda one: one[0]):
        best.setdefault(row["variant"].partition(",")[0], (loss, row))
    kinds = {shape.split()[0]: one for shape, one in reversed(best.items())}
    story = [*kinds.values(), *(one for one in best.values() if one not in kinds.values())][:5]
    return [_line(loss, row) for loss, row in sorted(story, key=lambda one: one[0])]


def _line(loss: float, row: Row) -> dict[str, Any]:
    tokens = row["steps"] * row["batch_size"] * row["task.length"]
    return {
        "candidate": row["variant"],
        "validation perplexity": math.exp(min(loss, 700.0)),
        "n_embd": row["model.width"],
        "n_head": row["model.num_heads"],
        "n_layer": row["model.num_layers"],
        "n_positions = sequence length": row["task.length"],
        "batch size": row["batch_size"],
        "accumulation": row["accumulate"],
        "steps": row["steps"],
        "parameters": row["parameters"],
        "tokens per parameter": tokens / row["parameters"],
    }


def _isoflop(rows: Rows) -> Drawing:
    """Every candidate a dot at its number of parameters, the best rate of each shape on its kind's line."""
    if not rows or LOSS not in rows.metrics:
        return nothing("no validation losses yet")
    tried: dict[str, dict[int, list[float]]] = {}
    for _, part in rows.groups(["variant"]):
        tried.setdefault(part[0]["variant"].split()[0], {}).setdefault(part[0]["parameters"], []).append(by_loss(part)[0])
    drawing, (axis,) = canvas(3.6)
    for (name, shapes), colour in zip(tried.items(), colours(len(tried)), strict=True):
        axis.plot(sorted(shapes), [min(shapes[x]) for x in sorted(shapes)], color=colour, marker="o", label=name)
        dots = [(x, loss) for x, losses in shapes.items() for loss in losses if math.isfinite(loss)]
        axis.plot([x for x, _ in dots], [loss for _, loss in dots], color=colour, marker="o", markersize=3, linestyle="none", alpha=0.5)
    scales(axis, True, False, [LOSS])
    axis.set_xlabel("parameters")
    axis.set_ylabel("validation loss (nats per token)")
    legend(drawing, axis)
    return drawing


def final(run: Run, seed: int) -> list[dict[str, Any]]:
    """The configuration that was found, as `shoal train` reads it."""
    return [{"CONFIG.yaml": to_yaml(run.config)}] if run.config.variant == FOUND and run.config.seeds.split == seed else []


def _claim(cell: dict[str, Any]) -> Claim:
    text = f"The best found has a validation perplexity {LESS:.0%} or more below that of the plain GPT with its best learning rate, seed by seed, in the mean."
    return lower(about(text, cell), {**cell, "variant": FOUND}, {**cell, "variant": PLAIN}, by=-math.log(1 - LESS), part=TUNING.fresh)


def study(config: StudyConfig) -> Study:
    TUNING.check(config)
    others = cells(replace(config, variants={}))
    by = ["variant", *others[0]]
    dots = "Last validation loss of every candidate, mean of the tuning seeds, by its size; a line goes through the best learning rate of each shape."
    return Study(
        name="flop-search",
        question=__doc__ or "",
        main_metric=LOSS,
        config=config,
        wanted=lambda rows: TUNING.wanted(config, rows),
        eager=True,
        measures={"pairs": TUNING.measure(pairs), "final configuration": TUNING.measure(partial(final, seed=config.first_seed))},
        tables=[
            TUNING.of_fresh(perplexities(by)),
            Table("candidates", candidates, "The best of each kind, and what came next to them, each at its best learning rate on the tuning seeds."),
        ],
        figures=[
            TUNING.of_fresh(curves(LOSS, by=by, name="fresh", caption="Validation loss, nats per token, of fresh seeds.")),
            of(TUNING.tried, Figure("isoflop", _isoflop, dots)),
        ],
        claims=[_claim(cell) for cell in others],
    )
