"""Generation on a GPU: steps replayed as a CUDA graph give the tokens that a CPU gives.

python -m pytest tests/gpu/test_generation_gpu.py -m gpu
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from laws import filled
from laws_training import CORPUS, MODULAR, SMALL

from shoal.config import BigramConfig, HMMConfig, LanguageConfig
from shoal.inference import generate
from shoal.mixers import LEAKY, MIXERS
from shoal.train.fleet import Fleet

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.filterwarnings("default"),  # compilers warn of themselves
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
MODELS: dict[str, Any] = {mixer: replace(SMALL, num_layers=2, width=16, num_heads=2, mixers=(mixer,)) for mixer in MIXERS if mixer not in LEAKY}
MODELS |= {"rotary": replace(MODELS["attention"], positions="rotary"), "bigram": BigramConfig(), "hmm": HMMConfig(num_states=5)}


@pytest.mark.parametrize("kind", MODELS)
def test_the_same_text_as_on_a_cpu(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In float64, or the nearest the model has; greedy with a penalty, and at random; after prompts of different lengths."""
    monkeypatch.setenv("SHOAL_CACHE", str(tmp_path))
    task = LanguageConfig(corpus=str(CORPUS), tokenizer="bytes", length=48, val_fraction=0.2)
    run = Fleet.build([replace(MODULAR, task=task, model=MODELS[kind], evaluate=("val",))]).one(0)
    filled(run.model)
    prompts = ["", "a", "The boats", "in the end"]
    options: list[dict[str, Any]] = [{"penalty": 1.3}, {"temperature": 1.0, "top_k": 40, "top_p": 0.95, "seed": 2}]
    expected = [generate(run, prompts, **how) for how in options]
    run.model.to("cuda")
    assert [generate(run, prompts, **how) for how in options] == expected
