"""Which changes of attention still learn a language, at what cost in loss and speed, and which go on beyond the length they were trained at?"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from shoal.config import AdamW, DecoderConfig, LanguageConfig, RunConfig, Schedule, StudyConfig, flatten, with_values
from shoal.results.claims import Claim, Sample
from shoal.results.comparisons import heatmap, mean_of
from shoal.results.perplexity import BASELINES, perplexities
from shoal.results.profiles import profile
from shoal.results.rows import Row, Rows
from shoal.studies import attention_measures as measures
from shoal.studies import attention_tables as tables
from shoal.studies.attention_measures import OTHER, PREFIX, TRAINED
from shoal.studies.attention_tables import by_seed, nats_beyond, nats_given
from shoal.studies.language import LOSS, TIE, by_loss, losses, lower, pairs, training
from shoal.studies.study import Study, about, cells
from shoal.studies.tuning import Tuning, of, without

LR = "optimizer.lr"
TUNING = 1000  # the seed of the tuning
SHARE = 0.25  # of its steps that a run of the tuning makes
BASE, ZEROED, RENORMALISED = "attention", "zeroed", "renormalised"
SINUSOIDAL, ROTARY, ALIBI, NONE = "sinusoidal positions", "rotary positions", "ALiBi", "no positions"
WINDOWED, LINEAR, MAMBA = "windowed, no positions", "linear, no positions", "Mamba, no positions"


def mixer(name: str) -> dict[str, Any]:
    return {"model.mixers": [name]}


PLAIN: dict[str, Any] = {"model.positions": "none"}
VARIANTS: dict[str, dict[str, Any]] = {  # name -> what is changed of the baseline: four layers of softmax attention with learned positions
    BASE: {},
    SINUSOIDAL: {"model.positions": "sinusoidal", "model.embedding_std": 1.0},  # as large as the sines, which in the paper they are, too
    ROTARY: {"model.positions": "rotary"},
    ALIBI: {"model.positions": "alibi"},
    NONE: PLAIN,
    "squared distance": mixer("distance"),
    "cosine": mixer("cosine"),
    "additive": mixer("additive"),
    "bilinear": mixer("bilinear"),
    "q = k": mixer("shared_qk"),
    "k = v": mixer("shared_kv"),
    "q = v": mixer("shared_qv"),
    "q = k = v": mixer("shared_qkv"),
    "networks": mixer("network"),
    "nonlinear q": mixer("nonlinear_q"),
    "nonlinear k": mixer("nonlinear_k"),
    "nonlinear v": mixer("nonlinear_v"),
    ZEROED: mixer("zeroed"),
    RENORMALISED: mixer("renormalised"),
    "windowed": mixer("windowed"),
    WINDOWED: mixer("windowed") | PLAIN,
    "linear": mixer("linear"),
    LINEAR: mixer("linear") | PLAIN,
    "Performer": mixer("performer"),
    "Fastformer": mixer("fastformer"),
    "AFT full": mixer("aft_full"),
    "AFT local": mixer("aft_local"),
    "AFT simple": mixer("aft_simple"),
    "AFT conv": mixer("aft_conv"),
    "averaging": mixer("average"),
    MAMBA: mixer("mamba") | PLAIN,
}
LEFT_OUT = ("bilinear", "q = v", "nonlinear k", "nonlinear v", "windowed", LINEAR, "AFT local", "AFT conv")  # of the preset quick
DRAWN = (BASE, SINUSOIDAL, ROTARY, ALIBI, NONE, WINDOWED, LINEAR, MAMBA)  # beyond the training length
LEAKS = (ZEROED, RENORMALISED, BASE)  # what is looked at for a leak
WRITES = (BASE, ROTARY, "q = k", "q = k = v", "linear", "AFT simple", "averaging", MAMBA)  # samples; a zeroed model cannot write: nothing of it can be kept


def full() -> StudyConfig:
    """31 variants of 4 layers of width 128 on windows of 100 tokens: the standard library's source in 4,096 tokens of its own; bfloat16.

    The same 1,600 steps for all (10.2 million tokens), so equal data, not equal FLOPs: by the assignment's rule 1.0e14 for the cheapest, 1.2e14 for the
    baseline. Of 5 learning rates the best of a quarter of the steps on a seed of its own, for each variant; then 5 fresh seeds.
    """
    run = RunConfig(
        task=LanguageConfig(corpus="python", tokenizer="bpe", vocab_size=4096, length=100, longest=4),
        model=DecoderConfig(width=128, num_layers=4, num_heads=4, feed_forward=512, activation="gelu"),
        optimizer=AdamW(lr=2e-3, beta2=0.95),
        schedule=Schedule(kind="cosine", warmup=0.05, floor=0.1),
        steps=1600,
        batch_size=64,
        clip=1.0,
        precision="bfloat16",
        evaluate_every=400,
        evaluate=("train:1024", "val"),
    )
    return StudyConfig(run=run, variants=VARIANTS, grid={LR: [5e-4, 1e-3, 2e-3, 4e-3, 8e-3]}, seeds=5)


def quick() -> StudyConfig:
    """Minutes on two cores: 23 of the variants in 2 layers of width 48 on windows of 32 tokens, 0.5 MB in 512 tokens; one learning rate for all, 3 seeds.

    Initial values are larger than in the other: heads of so narrow a model take long to look anywhere in particular.
    """
    whole = full().run
    run = replace(
        whole,
        task=LanguageConfig(corpus="python", tokenizer="bpe", vocab_size=512, max_bytes=500_000, length=32, longest=4),
        model=replace(whole.model, width=48, num_layers=2, feed_forward=192, window=8, features=16, init_std=0.06, embedding_std=0.05),
        optimizer=AdamW(lr=5e-3, beta2=0.95),
        schedule=replace(whole.schedule, warmup=0.1),
        steps=500,
        batch_size=16,
        precision="float32",
        evaluate_every=500,
        evaluate=("train:256", "val"),
    )
    kept = {name: changes for name, changes in VARIANTS.items() if name not in LEFT_OUT}
    return StudyConfig(run=run, variants=kept, grid={LR: [5e-3]}, seeds=3)


PRESETS = {"quick": quick, "full": full}
DEFAULT = ("quick", "full")


@dataclass(frozen=True, kw_only=True)
class Order:
    low: str
    high: str
    why: str


ORDERS = [
    Order(low=ROTARY, high=BASE, why="how far apart two tokens are need not be learned for every place anew"),
    Order(low=BASE, high=NONE, why="a causal mask alone tells places apart only by how much it leaves"),
    Order(low=BASE, high="q = k", why="a token is most similar to itself, and two tokens look at each other alike"),
    Order(low="k = v", high="q = k", why="what a token is found by may also be what it says, but not what it looks for"),
    Order(low="k = v", high="q = k = v", why="one projection cannot look for anything but itself"),
    Order(low="networks", high=BASE, why="more weights, and features that no linear map has"),
    Order(low=BASE, high="windowed", why="some of what helps stands further back than the window"),
    Order(low=BASE, high="linear", why="without exponentials no weight comes near 1"),
    Order(low="Performer", high="linear", why="its features estimate the softmax, those of the other are fixed"),
    Order(low=BASE, high="Performer", why="an estimate of few features is noisy"),
    Order(low=BASE, high="Fastformer", why="a global summary is no look at single tokens"),
    Order(low="AFT full", high="AFT simple", why="without a weight for every pair of places, nothing tells near from far"),
    Order(low=BASE, high="AFT full", why="what a token looks at does not depend on what it is"),
    Order(low=BASE, high="averaging", why="it looks at all tokens alike"),
]
TEXT = {BASE: (949.59, 228.15), ZEROED: (894.52, 228.15)}  # perplexities of training and validation in the text, one run each
GAIN = 0.1  # nats that are a failure beyond the training length


def _tuning() -> Tuning:
    return Tuning(seeds=(TUNING,), reported=without(LR), order=by_loss, suffix=" (tuning)", share=SHARE)


def wanted(config: StudyConfig, tuning: Tuning, rows: Rows) -> list[RunConfig]:
    """Both stages; one where only one learning rate is tried. What is renormalised is attention written otherwise, and takes its learning rates."""
    if len(config.grid.get(LR, [None])) == 1:
        return config.runs()
    runs = tuning.wanted(config, rows)

    def same(run: RunConfig) -> str:
        return repr(flatten(with_values(run, {LR: 0.0, "variant": "", **mixer(BASE)})))

    rates = {same(run): flatten(run)[LR] for run in runs if run.variant == BASE}
    if BASE in config.variants:
        runs = [run for run in runs if run.variant != RENORMALISED or same(run) in rates]
    return [with_values(run, {LR: rates.get(same(run), flatten(run)[LR])}) if run.variant == RENORMALISED else run for run in runs]


def counted(row: Row) -> float:
    """Nats of the better of what only counts: tokens, and pairs of them."""
    return min(row["data"][BASELINES["unigram"]], row["measures"]["pairs"][0]["nats"])


def _claims(config: StudyConfig, tuning: Tuning, cell: Mapping[str, Any]) -> list[Claim]:
    def here(*names: str) -> bool:
        return {*names} <= config.variants.keys()

    def part(rows: Rows, name: str) -> Rows:
        return by_seed(tuning.fresh(rows).where({**cell, "variant": name}))

    def learns(name: str) -> Claim:
        text = f"“{name}” learns: its validation loss is below those of counted tokens and of counted pairs, seed by seed."
        return Claim(about(text, cell), lambda rows: Sample([counted(row) for row in part(rows, name)], pair=losses(part(rows, name))), (TIE, math.inf))

    def difference(text: str, of_a: Any, of_b: Any, a: str, b: str, holds: tuple[float, float]) -> Claim:
        return Claim(about(text, cell), lambda rows: Sample(of_a(part(rows, a)), pair=of_b(part(rows, b))), holds)

    def further(name: str, text: str, holds: tuple[float, float]) -> Claim:
        return difference(text, lambda rows: nats_beyond(rows, -1), lambda rows: nats_beyond(rows, 0), name, name, holds)

    claims = [learns(name) for name in config.variants]
    claims += [
        lower(
            about(f"“{one.low}” has a lower validation loss than “{one.high}”, seed by seed: {one.why}.", cell),
            {**cell, "variant": one.low}, {**cell, "variant": one.high}, part=tuning.fresh,
        )
        for one in ORDERS
        if here(one.low, one.high)
    ]  # fmt: skip
    if here(BASE, RENORMALISED):
        text = "“renormalised” is attention written otherwise: with the same seeds and rates its validation loss differs by less than 0.01 nats, in the mean."
        claims.append(difference(text, losses, losses, RENORMALISED, BASE, (-0.01, 0.01)))
    if here(BASE, ZEROED):
        fell, trained = math.log(TEXT[BASE][0] / TEXT[ZEROED][0]), f"final.{training(config.run.evaluate)}"
        told = f"Zeroing after the softmax lowers the training loss, seed by seed, in the mean (by {fell:.3f} nats in the text's one run)."
        claims.append(difference(told, lambda rows: losses(rows, trained), lambda rows: losses(rows, trained), BASE, ZEROED, (TIE, math.inf)))
        told = "Zeroing after the softmax changes the validation loss, taken as in training, by less than 0.01 nats, in the mean (not at all in the text)."
        claims.append(difference(told, losses, losses, ZEROED, BASE, (-0.01, 0.01)))
        told = "With another text to come, a zeroed model's loss is higher than with its own: it has learned to read the leak."
        claims.append(difference(told, lambda x: nats_given(x, OTHER), lambda x: nats_given(x, TRAINED), ZEROED, ZEROED, (TIE, math.inf)))
        told = "With nothing to come, as when a text is written, a zeroed model's loss is higher than attention's at the same places."
        claims.append(difference(told, lambda x: nats_given(x, PREFIX), lambda x: nats_given(x, PREFIX), ZEROED, BASE, (TIE, math.inf)))
    for name in (BASE, SINUSOIDAL):
        if here(name):
            text = f"“{name}” fails beyond the training length: {GAIN} nats or more are lost from the first stretch of that length to the last."
            claims.append(further(name, text, (GAIN, math.inf)))
    for name in (ALIBI, WINDOWED, MAMBA):
        if here(name):
            text = f"“{name}” goes on beyond the training length: its loss in the last stretch of that length is not above the first's."
            claims.append(further(name, text, (-math.inf, 0.0)))
    return claims


def study(config: StudyConfig) -> Study:
    tuning = _tuning()
    tuning.check(config)
    kept = without(LR)(config.grid)
    others = cells(replace(config, variants={}, grid=kept))
    by: Sequence[str] = ["variant", *others[0]]

    def first(run: RunConfig) -> bool:
        return run.seeds.split == config.first_seed

    shown = of(lambda rows: Rows([row for row in tuning.fresh(rows) if row["variant"] in DRAWN]), profile(
        "beyond", "position", "nats", line="variant", by=by, marks={"trained at": lambda row: row["task.length"]},
        caption="Loss by position in windows longer than those of training, over the whole validation part; fresh seeds: median (line), range (band).",
    ))  # fmt: skip
    rates = heatmap(LR, "variant", mean_of(LOSS), name="rates", caption="Last validation loss of the tuning, by variant and learning rate.")
    return Study(
        name="attention-variants",
        question=__doc__ or "",
        main_metric=LOSS,
        config=config,
        wanted=lambda rows: wanted(config, tuning, rows),
        eager=True,
        measures={
            "pairs": tuning.measure(pairs),
            "beyond": tuning.measure(measures.beyond),
            "leak": tuning.measure(measures.leak, lambda run: run.variant in LEAKS),
            "lost": tuning.measure(measures.lost, lambda run: run.variant == ZEROED),
            "speed": tuning.measure(measures.speed, first),
            "samples": tuning.measure(measures.samples, lambda run: first(run) and run.variant in WRITES),
        },
        timed=["speed"],
        tables=[
            tuning.of_fresh(tables.ranking(by, BASE, counted)),
            tables.cost(tuning, by),
            tuning.of_fresh(tables.beyond(by)),
            tuning.of_fresh(tables.leaks(by)),
            tuning.of_fresh(tables.text(TEXT)),
            tuning.of_fresh(perplexities(by)),
        ],
        figures=[
            tuning.of_fresh(tables.differences(by, BASE)),
            shown,
            tuning.of_fresh(tables.lost()),
            *([of(tuning.tried, rates)] if len(config.grid.get(LR, [])) > 1 else []),
        ],
        claims=[claim for cell in others for claim in _claims(config, tuning, cell)],
    )
