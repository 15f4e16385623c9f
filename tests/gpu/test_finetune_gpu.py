"""Fine-tuning on a GPU: a captured step for each length of batches, the same as on a CPU; frozen encoders; resumed and uninterrupted.

python -m pytest tests/gpu/test_finetune_gpu.py -m gpu
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from laws import ENCODER, same
from laws_training import SENTENCES, assert_alike, everything, finished

from shoal.config import AdamW, EncoderConfig, RunConfig, SentencesConfig, with_seed
from shoal.train import checkpoint
from shoal.train.fleet import Fleet

pytest.importorskip("transformers")
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.filterwarnings("default"),
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
RUN = RunConfig(
    task=SentencesConfig(train=str(SENTENCES), encoder=ENCODER, max_length=20, val_fraction=0.2, test_fraction=0.2),
    model=EncoderConfig(encoder=ENCODER, dropout=0.2),
    optimizer=AdamW(lr=1e-3),
    batch_size=8,
    steps=20,
    log_every=1,
    evaluate_every=5,
    best_metric="val/loss",
)
KINDS: dict[str, Any] = {"mean": {}, "first": {"pooling": "first"}, "frozen": {"frozen": True}, "nothing dropped": {"dropout": 0.0}}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("compiled", [False, True])
def test_the_same_as_on_a_cpu(kind: str, compiled: bool) -> None:
    runs = [with_seed(replace(RUN, model=replace(RUN.model, **KINDS[kind])), s) for s in range(3)]
    there, got = finished(Fleet.build(runs, "cuda", compile=compiled))
    _, expected = finished(Fleet.build(runs, "cpu"))
    assert_alike(got, expected, 1e-3)
    assert len(there._captured_steps) == (1 if kind == "frozen" else 3)


def test_resumed_is_uninterrupted(tmp_path: Path) -> None:
    runs = [with_seed(RUN, s) for s in range(2)]
    whole, _ = finished(Fleet.build(runs, "cuda", compile=False))
    fleet = Fleet.build(runs, "cuda", compile=False)
    fleet.advance(7)
    checkpoint.save(fleet, tmp_path / "a", {})
    fleet, _ = checkpoint.load(runs, tmp_path / "a", "cuda")
    finished(fleet)
    got, expected = everything(fleet), everything(whole)
    assert all(same(got[name], expected[name]) for name in got)


def test_bfloat16() -> None:
    fleet, facts = finished(Fleet.build([with_seed(replace(RUN, precision="bfloat16"), 0)], "cuda", compile=False))
    assert fleet.flat.isfinite().all() and all(value == value for value in facts.values())
