"""Which of attention, Mamba and their hybrid learns to answer with the token that followed the same query before, and at which other lengths can it?"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from shoal.config import StudyConfig
from shoal.results.claims import Claim
from shoal.studies import recall_heads
from shoal.studies.recall import DELAY, HYBRID, KNOWN, LEARNED, LR, LRS, MAMBA, MAMBA2, MODELS, NONE, ROTARY, S4D, Recall, base, some
from shoal.studies.recall_tables import Published
from shoal.studies.study import Study


def full() -> StudyConfig:
    """M = 1, width 8, delays 1 and 5: seven models, 4 learning rates on 4 seeds, the best on 6 fresh ones; 20,000 steps, which attention needs."""
    return StudyConfig(run=base(20_000, 200), variants=MODELS, grid={DELAY: [1, 5], LR: LRS}, seeds=6)


def quick() -> StudyConfig:
    """Minutes on two cores: five models, 2 learning rates on 2 seeds, the better on 3 fresh ones; 2,500 steps of 32 sequences, too few for attention.

    70 runs, some 600 seconds of a core: a core makes 780 steps of learned or no positions a second, 560 of rotary, 260 of the hybrid, 140 of Mamba.
    """
    run = replace(base(2_500, 20), batch_size=32)
    return StudyConfig(run=run, variants=some(LEARNED, ROTARY, NONE, MAMBA, HYBRID), grid={DELAY: [1, 5], LR: [1e-2, 3e-2]}, seeds=3)


PRESETS = {"quick": quick, "full": full}
DEFAULT = ("quick", "full")

FULL = {DELAY: 1, "config.steps": 20_000}
FIRST = "our first script"
PUBLISHED = [
    Published(setting="rotary, 2,000 steps, best of 6", source=FIRST, result="0.89", conditions={"variant": ROTARY, **FULL},
        differs="Theirs: base 10,000. Ours: 100, 20,000 steps."),
    Published(setting="the same, at 3 L", source=FIRST, result="0.18", conditions={"variant": ROTARY, **FULL}, times=3, differs="The same."),
    Published(setting="learned positions, 1,131 steps", source=FIRST, result="0.50", conditions={"variant": LEARNED, **FULL}, differs="Ours: 20,000 steps."),
    Published(setting="no positions, 945 steps", source=FIRST, result="0.45", conditions={"variant": NONE, **FULL}, differs="Ours: 20,000 steps."),
    Published(setting="Mamba, 900 steps of 32", source=FIRST, result="0.95", conditions={"variant": MAMBA, **FULL}, differs="Ours: 20,000 steps of 64."),
    Published(setting="the same, at 3 L", source=FIRST, result="0.86", conditions={"variant": MAMBA, **FULL}, times=3, differs="The same."),
    Published(setting="hybrid, 900 steps of 32", source=FIRST, result="1.00", conditions={"variant": HYBRID, **FULL}, differs="Ours: 20,000 steps of 64."),
    Published(setting="the same, at 3 L", source=FIRST, result="0.94", conditions={"variant": HYBRID, **FULL}, times=3, differs="The same."),
    Published(
        setting="induction heads, S4D", source="berlino/seq_icl, README", result="0.088 (chance 0.05)", seeds="not stated",
        conditions={"variant": S4D, **FULL}, differs="Theirs: a special token, 20 tokens, other sizes, a fixed training set.",
    ),
    Published(
        setting="induction heads, Transformer", source="berlino/seq_icl, README", result="0.972", seeds="not stated",
        conditions={"variant": LEARNED, **FULL}, differs="The same.",
    ),
]  # fmt: skip


def _near(recall: Recall, delay: int, cell: dict[str, Any]) -> list[Claim]:
    """What the convolution of one layer can bind."""
    said = (
        (MAMBA, 1, KNOWN, "Mamba is at 99 %: its convolution binds an answer to the token before, its state keeps what was bound"),
        (MAMBA2, 1, KNOWN, "Mamba-2 is at 99 %, in the same way"),
        (HYBRID, 1, KNOWN, "the hybrid is at 99 %: Mamba binds, attention finds"),
        (HYBRID, 3, (0.9, 1.0), "the hybrid is above 90 % at three times the training length"),
        (ROTARY, 1, KNOWN, "rotary attention is at 99 %: two layers with positions suffice"),
        (ROTARY, 3, (0.0, 0.5), "rotary attention is below 50 % at three times the training length"),
        (LEARNED, 3, (0.0, 0.2), "learned positions, which end at the training length, are below 20 % at three times it"),
        (NONE, 1, (0.2, 1.0), "attention without positions is above 20 %: it can mark what follows the only query there is"),
        (NONE, 1, (0.0, 0.9), "attention without positions is below 90 %: its first layer cannot tell the token before from others"),
        (S4D, 1, (0.9, 1.0), "S4D is above 90 %: while a single token asks, a fixed lag times a gate marks the answer, and nothing has to be chosen"),
    )
    claims = []
    for name, times, inside, text in said:
        if name in recall.config.variants:
            whole = f"With delay {delay}, in more than half of the seeds, {text}."
            claims.append(recall.most(whole, {**cell, "variant": name, DELAY: delay}, inside, times=times, told=[DELAY]))
    at = {name: {"variant": name, DELAY: delay} for name in recall.config.variants}
    if {HYBRID, MAMBA} <= at.keys():
        claims.append(recall.sooner(f"With delay {delay} the hybrid is solved sooner than Mamba in more than half of the seeds.", at[HYBRID], at[MAMBA], cell))
    if {ROTARY, MAMBA} <= at.keys():
        text = f"With delay {delay}, at three times the training length, Mamba is better than rotary attention, seed by seed."
        claims.append(recall.gains(text, at[MAMBA], at[ROTARY], cell, times=3))
    return claims


def _far(recall: Recall, delay: int, near: list[int], cell: dict[str, Any]) -> list[Claim]:
    """What takes both convolutions, or the state, to bind."""
    said = (
        (ROTARY, KNOWN, "rotary attention is at 99 %: to it one delay is like another"),
        (NONE, (0.0, 0.25), "attention without positions is below 25 %: nothing marks a place so far behind the query, and counting is right in 21 %"),
        (S4D, (0.9, 1.0), "S4D is above 90 %"),
    )
    claims = []
    for name, inside, text in said:
        if name in recall.config.variants:
            whole = f"With delay {delay}, in more than half of the seeds, {text}."
            claims.append(recall.most(whole, {**cell, "variant": name, DELAY: delay}, inside, told=[DELAY]))
    for name in (MAMBA, HYBRID):
        for other in near if name in recall.config.variants else ():
            text = f"“{name}” is solved sooner with delay {other} than with {delay}, past its convolution, in more than half of the seeds."
            claims.append(recall.sooner(text, {"variant": name, DELAY: other}, {"variant": name, DELAY: delay}, cell))
    return claims


def study(config: StudyConfig) -> Study:
    recall = Recall(config=config)
    delays = recall.values(DELAY, getattr(config.run.task, "delay", 1))
    near = [delay for delay in delays if delay < getattr(config.run.model, "convolution", 4)]
    claims = []
    for cell in recall.cells("variant", DELAY):
        for delay in delays:
            claims += _near(recall, delay, cell) if delay in near else _far(recall, delay, near, cell)
    figure = recall_heads.figure(recall.line, list(recall.cells()[0]))
    return recall.study("recall-induction", __doc__, claims, published=PUBLISHED, measures={"heads": recall_heads.measured}, figures=[figure])
