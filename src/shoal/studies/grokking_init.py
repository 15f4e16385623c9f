"""How much of the delay comes from how large the weights begin, and is there any when their length is held?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from math import inf
from typing import Any

import numpy as np

from shoal.config import StudyConfig, flatten
from shoal.results.claims import Claim, Sample
from shoal.results.comparisons import heatmap, median_steps, share_reached, times
from shoal.results.figures import Figure, curves
from shoal.results.rows import Rows
from shoal.results.wording import setting
from shoal.studies.shared import GROKKED, Published, delay, matching, paper_run, percent, published_table, reached_table, small_run, sooner
from shoal.studies.study import Study, about, cells

EMBEDDING, SCALE = "model.embedding_std", "model.init_scale"
FREE, FIXED = "free", "fixed norm"
VARIANTS: dict[str, dict[str, Any]] = {FREE: {}, FIXED: {"weights.fixed_norm": True, "optimizer.wd": 0.0}}  # decay would only be undone


def full() -> StudyConfig:
    """The paper's run with 4 scales of the embeddings and 4 of the matrices, free or with the length of all weights held; 6 seeds, 10,000 steps, bfloat16."""
    run = paper_run(10_000, precision="bfloat16", log_every=100)
    return StudyConfig(run=run, variants=VARIANTS, grid={EMBEDDING: [0.02, 0.1, 0.3, 1.0], SCALE: [0.5, 1.0, 2.0, 8.0]}, seeds=6)


def quick() -> StudyConfig:
    """Minutes on two cores: 2 by 3 scales, a small model and table, 6 seeds, at most 1,200 steps."""
    run = small_run(1_200)
    run = replace(run, model=replace(run.model, linear_init="uniform"))
    return StudyConfig(run=run, variants=VARIANTS, grid={EMBEDDING: [0.1, 1.0], SCALE: [0.5, 1.0, 4.0]}, seeds=6)


PRESETS = {"quick": quick, "full": full}
DEFAULT = ("quick", "full")

HERE = {"task.p": 97}
PUBLISHED = [
    Published(
        setting="/ mod 97, 50 %, wd 0.5, PyTorch's initialisation (embeddings std 1)", source="AI-Scientist, baseline", steps="4,200 ± 76 (99 %)", seeds="3",
        conditions={"variant": FREE, EMBEDDING: 1.0, SCALE: 1.0, **HERE}, differs="Ours: wd 1, ReLU, the split is seeded, bfloat16 (all ours).",
    ),
    Published(
        setting="the same, Xavier's", source="AI-Scientist, weight_initialization_grokking", steps="2,537 (99 %)", seeds="3",
        conditions={"variant": FREE, EMBEDDING: 0.1, SCALE: 1.0, **HERE},
        differs="Ours: only the embeddings are smaller; Xavier's std for a table of 99 by 128 would be 0.094.",
    ),
    Published(
        setting="+ mod 113, 30 %, 1 layer, full batches, all weights x 0.8, their length held, no decay", source="Omnigrok, arXiv 2210.01117",
        steps="training and test curves nearly coincide", seeds="1", conditions={"variant": FIXED, EMBEDDING: 0.1, SCALE: 0.5, **HERE},
        differs="Ours: division, 2 layers with norms, batches of 512; embeddings std 0.1, matrices x 0.5.",
    ),
]  # fmt: skip


def shorter(rows_a: Rows, rows_b: Rows, least: float) -> Sample:
    """How many times as long b's delay is as a's, seed by seed; below ``least`` steps evaluations tell nothing, so a shorter delay counts as that.

    Where b never came to know the unseen rows it is at least that (censored); where a did not it is 0; where neither did, nothing is known.
    """
    samples = [delay(Rows(sorted(rows, key=lambda row: row["seeds.split"]))) for rows in (rows_a, rows_b)]
    (a, there), (b, other) = ((np.maximum(np.asarray(sample.values), least), np.asarray(sample.observed, dtype=bool)) for sample in samples)
    return Sample(np.where(there, b / a, 0.0), observed=other, kind="survival")


def usual(config: StudyConfig) -> dict[str, Any]:
    """The grid's place of the paper: the largest embeddings, the matrices nearest to PyTorch's."""
    values = flatten(config.run)
    stds, scales = (config.grid.get(path, [values[path]]) for path in (EMBEDDING, SCALE))
    return {EMBEDDING: max(stds), SCALE: min(scales, key=lambda scale: abs(scale - 1))}


def lengths(along: str, config: StudyConfig, by: Sequence[str]) -> Figure:
    """Length of all weights of the free networks over steps, for every value of one scale, the other as usual."""
    figure = curves("weights/norm", by=[*by, along], logx=True, logy=True, ylabel="length of all weights")
    there = {path: value for path, value in usual(config).items() if path != along}
    caption = f"Length of all weights of the networks that are free, with {setting(there)}. {figure.caption}"
    return replace(figure, draw=lambda rows: figure.draw(matching(rows, {"variant": FREE, **there})), caption=caption)


def _claims(config: StudyConfig, rest: dict[str, Any]) -> list[Claim]:
    stds, scales = sorted(config.grid.get(EMBEDDING, [])), sorted(config.grid.get(SCALE, []))
    if not {FREE, FIXED} <= config.variants.keys() or len(stds) < 2 or len(scales) < 2:
        return []
    paper, small, large = usual(config), {EMBEDDING: stds[0], SCALE: scales[0]}, {EMBEDDING: stds[-1], SCALE: scales[-1]}

    def at(variant: str, place: dict[str, Any]) -> dict[str, Any]:
        return {**rest, "variant": variant, **place}

    def order(first: dict[str, Any], second: dict[str, Any], what: str) -> Claim:
        text = f"Free, {what}: {setting(first)} sooner at {percent(GROKKED)} of the unseen rows than {setting(second)} in more than half of the seeds."
        return Claim(about(text, rest), lambda rows: sooner(rows.where(at(FREE, first)), rows.where(at(FREE, second))), (0.5, 1.0))

    def share(variant: str, place: dict[str, Any], text: str, holds: tuple[float, float]) -> Claim:
        text = f"{text} ({setting(place)}) {'at most' if holds[0] == 0 else 'more than'} half of the seeds come to know the unseen rows."
        return Claim(about(text, rest), lambda rows: Sample(rows.where(at(variant, place)).reached("val/accuracy", GROKKED)[1], kind="proportion"), holds)

    claims = [order({**paper, EMBEDDING: std}, paper, "smaller embeddings are better") for std in stds[:-1]]
    claims += [order({**paper, SCALE: a}, {**paper, SCALE: b}, "smaller matrices are better") for a, b in pairwise(scales)]
    claims.append(share(FREE, large, "Free, and large", (0.0, 0.5)))
    claims.append(share(FIXED, large, "With the length held, and large, so that it can never shrink,", (0.0, 0.5)))
    claims.append(share(FIXED, small, "With the length held, and small,", (0.5, 1.0)))
    text = f"Held small ({setting(small)}), the delay is at most half of that of the free network that began as usual ({setting(paper)}), in the median."
    least = float(config.run.evaluate_every)
    claims.append(Claim(about(text, rest), lambda rows: shorter(rows.where(at(FIXED, small)), rows.where(at(FREE, paper)), least), (2.0, inf)))
    return claims


def study(config: StudyConfig) -> Study:
    others = cells(replace(config, variants={}, grid={path: values for path, values in config.grid.items() if path not in (EMBEDDING, SCALE)}))
    by = ["variant", *others[0]]
    every = [*by, EMBEDDING, SCALE]
    return Study(
        name="grokking-init",
        question=__doc__ or "",
        main_metric="val/accuracy",
        config=config,
        wanted=lambda rows: config.runs(),
        figures=[
            heatmap(EMBEDDING, SCALE, median_steps("val/accuracy", GROKKED), by=by),
            heatmap(EMBEDDING, SCALE, share_reached("val/accuracy", GROKKED), by=by),
            times("val/accuracy", GROKKED, by=every),
            *(lengths(along, config, list(others[0])) for along in (EMBEDDING, SCALE)),
        ],
        tables=[reached_table(every), published_table(PUBLISHED)],
        claims=[claim for cell in others for claim in _claims(config, cell)],
    )
