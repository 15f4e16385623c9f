"""Does a Mamba that was trained on sequences of 256 tokens find what followed a query in sequences 64 times as long, where attention does not?"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from shoal.config import DecoderConfig, RecallConfig, RunConfig, Schedule, StudyConfig
from shoal.results.claims import Claim
from shoal.studies.recall import HYBRID, KNOWN, LR, MAMBA, ROTARY, Recall, base, some
from shoal.studies.recall_tables import Published
from shoal.studies.study import Study

STEPS = 5 * 8_192  # five of the paper's epochs
MODELS = some(ROTARY, MAMBA, HYBRID)  # learned positions would need a row for each of 16,384 places
MODELS[ROTARY] = MODELS[ROTARY] | {"model.rotary_base": 10_000.0}  # for 256 places; the others' 100 is for 32


def _run(steps: int, evaluations: int, *, width: int, heads: int, **task: Any) -> RunConfig:
    """Gu and Dao 2023 (arXiv 2312.00752), table 2 and appendix E.1: 16 tokens, one of them asked for, batches of 8, Adam at a constant rate, no decay."""
    run = base(steps, evaluations, width=width, **task)
    model = DecoderConfig(width=width, num_layers=2, num_heads=heads, feed_forward=0, norm="rms", positions="none", linear_init="uniform")
    return replace(run, model=model, schedule=Schedule(), batch_size=8)


def full() -> StudyConfig:
    """Length 256, tests to 16,384: three models, 4 learning rates on 4 seeds, the best on 6 fresh ones; 5 epochs of 8,192 steps (the paper: 25 or 50)."""
    run = _run(STEPS, 64, width=64, heads=8, length=256, longest=64)
    return StudyConfig(run=run, variants=MODELS, grid={LR: [2e-4, 5e-4, 1e-3, 3e-3]}, seeds=6)


def quick() -> StudyConfig:
    """Minutes on two cores: length 32, tests to 512, width 16; 2 learning rates on 2 seeds, the better on 3 fresh ones; 6,000 steps of 8 sequences.

    21 runs, some 500 seconds of a core.
    """
    run = _run(6_000, 20, width=16, heads=2, length=32, longest=16)
    return StudyConfig(run=run, variants=MODELS, grid={LR: [1e-3, 3e-3]}, seeds=3)


PRESETS = {"quick": quick, "full": full}
DEFAULT = ("quick", "full")

FULL = {"task.length": 256, "config.steps": STEPS}
THEIRS = "Gu, Dao 2023, table 2"
LONGER = "Theirs: 25 epochs and more, the better of two learning rates, attention of width 128."
PUBLISHED = [
    Published(setting="Mamba, 2 x 256", source=THEIRS, result="1.00", conditions={"variant": MAMBA, **FULL}, times=2, differs="Theirs: 25 epochs."),
    Published(setting="Mamba, 64 x 256", source=THEIRS, result="1.00", conditions={"variant": MAMBA, **FULL}, times=64, differs="The same."),
    Published(setting="Mamba, to 2^20", source="hrbigelow/mamba-recall", result="1.00", differs="Theirs: the query always stands near the beginning."),
    Published(setting="rotary attention, 2 x 256", source=THEIRS, result="0.836", conditions={"variant": ROTARY, **FULL}, times=2, differs=LONGER),
    Published(setting="rotary attention, 16 x 256", source=THEIRS, result="below 0.1", conditions={"variant": ROTARY, **FULL}, times=16, differs=LONGER),
    Published(setting="learned positions, 2 x 256", source=THEIRS, result="0.586", differs=LONGER),
    Published(setting="H3, 2 x 256", source=THEIRS, result="0.809", differs="Theirs: 10 epochs."),
]


def doubling(task: RecallConfig) -> list[int]:
    """A quarter and a half of the training length, and its doubles up to the longest."""
    found = [max(task.length // 4, task.delay + 2), max(task.length // 2, task.delay + 2), task.length]
    while found[-1] * 2 <= task.longest * task.length:
        found.append(found[-1] * 2)
    return sorted(set(found))


def _claims(recall: Recall, longest: int, cell: dict[str, Any]) -> list[Claim]:
    half = "in more than half of the seeds"
    said = (
        (MAMBA, 1, KNOWN, f"Mamba is at 99 % at the training length {half}"),
        (MAMBA, longest, KNOWN, f"Mamba is at 99 % at {longest} times the training length {half}"),
        (ROTARY, 1, KNOWN, f"Rotary attention is at 99 % at the training length {half}"),
        (ROTARY, 2, (0.0, 0.9), f"Rotary attention is below 90 % at twice the training length {half}"),
        (ROTARY, longest, (0.0, 0.2), f"Rotary attention is below 20 % at {longest} times the training length {half}"),
        (HYBRID, 1, KNOWN, f"The hybrid is at 99 % at the training length {half}"),
        (HYBRID, longest, (0.0, 0.9), f"The hybrid is below 90 % at {longest} times the training length {half}: its attention is spread over too many"),
    )
    here = [line for line in said if line[0] in recall.config.variants and line[1] <= longest]
    claims = [recall.most(f"{text}.", {**cell, "variant": name}, inside, times=times) for name, times, inside, text in here]
    if {MAMBA, ROTARY} <= recall.config.variants.keys():
        text = f"At {longest} times the training length Mamba is better than rotary attention by 50 points or more, seed by seed, in the mean."
        claims.append(recall.gains(text, {"variant": MAMBA}, {"variant": ROTARY}, cell, least=0.5, times=longest))
    return claims


def study(config: StudyConfig) -> Study:
    longest = 2 ** (getattr(config.run.task, "longest", 1).bit_length() - 1)  # a power of two is measured
    recall = Recall(config=config, every=doubling, few=doubling, multiples=(1, 2, 4, 16, 64), logx=True)
    claims = [claim for cell in recall.cells("variant") for claim in _claims(recall, longest, cell)]
    return recall.study("recall-mamba-paper", __doc__, claims, published=PUBLISHED)
