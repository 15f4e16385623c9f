"""Does a width of 64 repair what Mamba cannot hold at width 8, and what does it do about a delay that its convolutions do not span?"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from shoal.config import StudyConfig
from shoal.results.claims import Claim
from shoal.studies.recall import DELAY, KNOWN, LR, MAMBA, MODELS, QUERIES, Recall, base
from shoal.studies.recall_tables import Published
from shoal.studies.study import Study

FAR = 10  # past the 6 places that two convolutions of 4 steps span


def _pairs(*pairs: tuple[int, int]) -> dict[str, dict[str, Any]]:
    return {name(*pair): {QUERIES: pair[0], DELAY: pair[1]} for pair in pairs}


def name(queries: int, delay: int) -> str:
    return f"{queries} queries" + (f" delay {delay}" if delay > 1 else "")


def full() -> StudyConfig:
    """Mamba at width 64: M = 4, 8 and 16 with delay 1, M = 16 with delay 10; 4 learning rates on 4 seeds, the best on 6 fresh ones; 20,000 steps."""
    pairs = _pairs((4, 1), (8, 1), (16, 1), (16, FAR))
    return StudyConfig(run=_run(20_000, 200), variants=pairs, grid={LR: [3e-4, 1e-3, 3e-3, 1e-2]}, seeds=6)  # at 3e-2 so wide a Mamba ends at chance


def quick() -> StudyConfig:
    """Minutes on two cores: length 16, M = 4 and 16 with delay 1, M = 16 with delay 10; 2 learning rates on 2 seeds, the better on 3 fresh ones.

    21 runs of 800 steps of 32 sequences, some 700 seconds of a core: enough for M = 4.
    """
    run = replace(_run(800, 20, length=16), batch_size=32)
    return StudyConfig(run=run, variants=_pairs((4, 1), (16, 1), (16, FAR)), grid={LR: [3e-3, 1e-2]}, seeds=3)


def _run(steps: int, evaluations: int, **task: Any) -> Any:
    run = base(steps, evaluations, width=64, **task)
    return replace(run, model=replace(run.model, mixers=tuple(MODELS[MAMBA]["model.mixers"])))


PRESETS = {"quick": quick, "full": full}
DEFAULT = ("quick", "full")

FULL = {"variant": name(16, 1), "config.steps": 20_000}
PUBLISHED = [
    Published(
        setting="multi-query recall, Mamba and its kin", source="arXiv 2506.11891", result="exact solutions at small widths", seeds="–",
        conditions=FULL, differs="Theirs: weights constructed, many queries in a sequence. Ours: trained, one query.",
    ),
    Published(
        setting="associative recall, Mamba", source="arXiv 2508.19029", result="solved in a narrow window of learning rates", seeds="several",
        conditions=FULL, differs="Theirs: many queries in a sequence, other sizes.",
    ),
]  # fmt: skip


def _claims(recall: Recall, cell: dict[str, Any]) -> list[Claim]:
    claims, here = [], recall.config.variants
    for variant, changes in here.items():
        if changes.get(DELAY, 1) == 1:
            text = f"At width 64 Mamba is at 99 % with “{variant}” in more than half of the seeds: so many unit vectors fit into 64 dimensions."
            claims.append(recall.most(text, {**cell, "variant": variant}, KNOWN))
    near, far = name(16, 1), name(16, FAR)
    if {near, far} <= here.keys():
        a, b = {"variant": near}, {"variant": far}
        claims.append(recall.gains(f"With 16 queries, delay {FAR} costs Mamba 5 points or more, seed by seed, in the mean.", a, b, cell, least=0.05))
        claims.append(recall.sooner(f"With 16 queries, delay 1 is solved sooner than delay {FAR} in more than half of the seeds.", a, b, cell))
    return claims


def study(config: StudyConfig) -> Study:
    recall = Recall(config=config)
    claims = [claim for cell in recall.cells("variant") for claim in _claims(recall, cell)]
    return recall.study("recall-width", __doc__, claims, published=PUBLISHED)
