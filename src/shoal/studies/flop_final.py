"""What validation perplexity does a GPT reach with 1e17 FLOPs: of the shape that was best with 1e15 (strict), and of any shape (free)?"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

from shoal.config import StudyConfig
from shoal.results.claims import Claim, Sample
from shoal.results.figures import curves
from shoal.results.perplexity import perplexities
from shoal.results.rows import Rows
from shoal.results.tables import Table
from shoal.results.wording import setting
from shoal.studies.flop_search import base, muon
from shoal.studies.language import LOSS, pairs
from shoal.studies.study import Study, about, cells

STRICT, FREE = "strict", "free"
C4 = {"corpus": "hub:allenai/c4:en:train", "val_corpus": "hub:allenai/c4:en:validation"}
BELOW = {STRICT: (50.0, 45.0), FREE: (40.0,)}  # perplexities on C4


def full() -> StudyConfig:
    """1e17 FLOPs a run on C4, GPT-2's vocabulary: the shape of flop-search at T = 128, and width 384 with 8 layers at T = 256; 3 seeds.

    3 GB of C4 are read from the hub once, some 650 million tokens; the report says how often a run has seen them. Without a network:
    --run.task.corpus english --run.task.val-corpus "" gives the perplexities and leaves the claims undecided.
    """
    run = replace(base(1e17, evaluate_every=2_000, batch_size=256, length=128, tokenizer="gpt2", max_bytes=3_000_000_000, **C4), precision="bfloat16")
    free = {"task.length": 256, "model.num_heads": 6, "batch_size": 128}
    return StudyConfig(run=run, variants={STRICT: muon(128, 4, 0.02, 8e-3), FREE: muon(384, 8, 0.02, 4e-3) | free}, seeds=3)


def quick() -> StudyConfig:
    """Minutes on two cores: 1e12 FLOPs a run on 1 MB of prose, 1,024 tokens, 2 seeds; undecided by its data."""
    run = base(1e12, evaluate_every=200, batch_size=16, length=64, corpus="english", tokenizer="bpe", vocab_size=1024, max_bytes=1_000_000)
    return StudyConfig(run=run, variants={STRICT: muon(32, 2, 0.02, 8e-3), FREE: muon(64, 3, 0.02, 8e-3)}, seeds=2)


PRESETS = {"quick": quick, "full": full}
DEFAULT = ("quick", "full")


def spent(rows: Rows, by: list[str]) -> list[dict[str, Any]]:
    """What every track was given: FLOPs by each rule, tokens, and how often each of them was seen."""
    lines = []
    for values, part in rows.groups(by):
        row, unique = part[0], part[0]["data"].get("train tokens", math.nan)
        tokens = row["steps"] * row["batch_size"] * row["task.length"]
        flops = {f"FLOPs, {rule}": row.get(f"flops.{rule}", math.nan) * row["steps"] for rule in ("assignment", "products", "hardware")}
        lines.append({"track": setting(values), "parameters": row["parameters"], "tokens": tokens, "unique tokens": unique, "epochs": tokens / unique} | flops)
    return lines


def _claim(track: str, below: float, cell: dict[str, Any]) -> Claim:
    def sample(rows: Rows) -> Sample:
        part = rows.where({**cell, "variant": track})
        read = ", ".join(map(str, part.values("task.corpus")))
        if "c4" not in read.lower():
            raise LookupError(f"asked of C4, and this was trained on {read}")
        return Sample(part.column(f"final.{LOSS}"), bounds=(0, math.inf))

    text = f"On C4 the {track} track's validation perplexity is below {below:g}, in the mean of the loss."
    return Claim(about(text, cell), sample, (0.0, math.log(below)))


def study(config: StudyConfig) -> Study:
    others = cells(replace(config, variants={}))
    by = ["variant", *others[0]]
    tracks = [(track, below) for track, bounds in BELOW.items() if track in config.variants for below in bounds]
    return Study(
        name="flop-final",
        question=__doc__ or "",
        main_metric=LOSS,
        config=config,
        wanted=lambda rows: config.runs(),
        measures={"pairs": pairs},
        tables=[perplexities(by), Table("spent", lambda rows: spent(rows, by), "What each track was given, and how often it saw each token of its text.")],
        figures=[curves(LOSS, by=by, caption="Validation loss, nats per token.")],
        claims=[_claim(track, below, cell) for cell in others for track, below in tracks],
    )
