"""How many possible queries can attention, Mamba and their hybrid hold at width 8, when every token of a sequence may turn out to be the one asked for?"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from shoal.config import StudyConfig
from shoal.results.claims import Claim
from shoal.studies.recall import HYBRID, KNOWN, LR, LRS, MAMBA, NOT_KNOWN, QUERIES, ROTARY, S4D, Recall, base, some
from shoal.studies.recall_tables import Published
from shoal.studies.study import Study


def full() -> StudyConfig:
    """M = 4, 8 and 16 of 16 tokens, delay 1: four models, 4 learning rates on 4 seeds, the best on 6 fresh ones; 40,000 steps, as M = 16 is slow.

    S4D is there because it solves M = 1: with one token that asks, a fixed lag and a gate are enough.
    """
    return StudyConfig(run=base(40_000, 200), variants=some(ROTARY, MAMBA, HYBRID, S4D), grid={QUERIES: [4, 8, 16], LR: LRS}, seeds=6)


def quick() -> StudyConfig:
    """Minutes on two cores: M = 4 and 16, 2 learning rates on 2 seeds, the better on 3 fresh ones; 3,000 steps of 32 sequences are only a beginning.

    42 runs, some 600 seconds of a core.
    """
    run = replace(base(3_000, 20), batch_size=32)
    return StudyConfig(run=run, variants=some(ROTARY, MAMBA, HYBRID), grid={QUERIES: [4, 16], LR: [1e-2, 3e-2]}, seeds=3)


PRESETS = {"quick": quick, "full": full}
DEFAULT = ("quick", "full")

FULL = {"variant": HYBRID, "config.steps": 40_000}
FIRST = "our first script"
PUBLISHED = [
    Published(setting="hybrid, M = 4, lr 0.02, 1,100 steps of 32", source=FIRST, result="0.66, still rising", conditions={QUERIES: 4, **FULL},
        differs="Ours: 40,000 steps of 64."),
    Published(setting="the same, at 3 L", source=FIRST, result="0.59", conditions={QUERIES: 4, **FULL}, times=3, differs="The same."),
    Published(setting="hybrid, M = 16, lr 0.01, 900 steps of 32", source=FIRST, result="0.11", conditions={QUERIES: 16, **FULL}, differs="The same."),
    Published(
        setting="associative recall, Transformer", source="berlino/seq_icl, README", result="1.000", seeds="not stated",
        conditions={QUERIES: 16, **FULL, "variant": ROTARY}, differs="Theirs: keys and values of their own kinds, wider, a fixed training set.",
    ),
]  # fmt: skip


def _claims(recall: Recall, queries: list[int], cell: dict[str, Any]) -> list[Claim]:
    few, many = min(queries), max(queries)
    here, claims = recall.config.variants, []

    def at(name: str, count: int) -> dict[str, Any]:
        return {"variant": name, QUERIES: count}

    def most(name: str, count: int, text: str, inside: tuple[float, float]) -> Claim:
        return recall.most(f"With {count} queries, in more than half of the seeds, {text}.", {**cell, **at(name, count)}, inside, told=[QUERIES])

    for name in here if few < many else ():
        text = f"“{name}” is better with {few} queries than with {many}, seed by seed: more unit vectors than dimensions, and more to learn."
        claims.append(recall.gains(text, at(name, few), at(name, many), cell))
    if HYBRID in here:
        claims.append(most(HYBRID, few, "the hybrid is at 99 %", KNOWN))
    if MAMBA in here and many >= 16:
        claims.append(most(MAMBA, many, "Mamba is below 99 %, though its state has room for as many pairs", NOT_KNOWN))
    if S4D in here and few > 1:
        claims.append(most(S4D, few, "S4D is below 50 %: what it keeps cannot depend on which token asks", (0.0, 0.5)))
    if {HYBRID, MAMBA} <= here.keys():
        for count in queries:
            text = f"With {count} queries the hybrid is better than Mamba, seed by seed: what attention finds no state has to hold."
            claims.append(recall.gains(text, at(HYBRID, count), at(MAMBA, count), cell))
    if {HYBRID, ROTARY} <= here.keys():
        text = f"With {few} queries the hybrid is solved sooner than rotary attention in more than half of the seeds."
        claims.append(recall.sooner(text, at(HYBRID, few), at(ROTARY, few), cell))
    return claims


def study(config: StudyConfig) -> Study:
    recall = Recall(config=config)
    queries = recall.values(QUERIES, getattr(config.run.task, "num_queries", 1))
    claims = [claim for cell in recall.cells("variant", QUERIES) for claim in _claims(recall, queries, cell)]
    return recall.study("recall-capacity", __doc__, claims, published=PUBLISHED)
