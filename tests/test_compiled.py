"""What a compiler is given computes the same, and blocks of a deep model that are alike are one program."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from laws import close
from laws_training import CORPUS, MODULAR, SMALL, finished
from torch._dynamo.utils import counters

from shoal.config import LanguageConfig, RunConfig, with_seed
from shoal.train.fleet import Fleet

pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute:UserWarning")  # from within the compiler, which hides it
TEXT = replace(
    MODULAR,
    task=LanguageConfig(corpus=str(CORPUS), tokenizer="characters", length=24, val_fraction=0.2),
    batch_size=4,
)
RUNS = {
    "attention": MODULAR,
    "rotary": replace(TEXT, model=replace(SMALL, positions="rotary", norm="rms", tied=True, softcap=8.0)),
    "hybrid": replace(MODULAR, model=replace(SMALL, mixers=("mamba", "attention"))),
    "post": replace(TEXT, model=replace(SMALL, norm_place="post", mixers=("aft_full",), positions="none")),
}


def programs(run: RunConfig, monkeypatch: pytest.MonkeyPatch, backend: str = "eager") -> tuple[Fleet, int]:
    """The trained fleet, and how many programs its steps and evaluations were."""
    with monkeypatch.context() as m:
        choices: dict[str, Any] = {"backend": backend, "dynamic": False, "fullgraph": True}
        m.setattr(torch, "compile", lambda function, compile=torch.compile, **_: compile(function, **choices))
        counters.clear()
        fleet, _ = finished(Fleet.build([with_seed(run, seed) for seed in range(3)], compile=True))
        return fleet, counters["stats"]["unique_graphs"]


def deep(run: RunConfig, num_layers: int) -> RunConfig:
    return replace(run, steps=4, evaluate_every=2, model=replace(run.model, num_layers=num_layers))


@pytest.mark.parametrize("name", RUNS)
def test_blocks_that_are_alike_are_one_program(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    run = RUNS[name]
    compiled, count = programs(deep(run, 4), monkeypatch, "aot_eager")
    plain, _ = finished(Fleet.build([with_seed(deep(run, 4), seed) for seed in range(3)]))
    close(compiled.flat, plain.flat, 1e-5)
    assert programs(deep(run, 6), monkeypatch)[1] == count


def test_whole_where_blocks_differ_or_are_few(monkeypatch: pytest.MonkeyPatch) -> None:
    for run in (deep(MODULAR, 2), deep(replace(MODULAR, model=replace(SMALL, dropout=0.1)), 3)):
        fleet, _ = programs(run, monkeypatch)
        assert all(block._compiled_call_impl is None for block in fleet.model.blocks)
        close(fleet.flat, finished(Fleet.build([with_seed(run, seed) for seed in range(3)]))[0].flat, 1e-5)
