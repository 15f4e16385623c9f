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
from shoal.train import compiled
from shoal.train import fleet as fleets
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
    """The trained fleet, as without a compiler, and how many programs its steps and evaluations were."""
    runs = [with_seed(run, seed) for seed in range(3)]
    with monkeypatch.context() as m:
        choices: dict[str, Any] = {"backend": backend, "dynamic": False, "fullgraph": True}
        m.setattr(torch, "compile", lambda function, compile=torch.compile, **_: compile(function, **choices))
        counters.clear()
        fleet, facts = finished(Fleet.build(runs, compile=True))
        count = counters["stats"]["unique_graphs"]
    plain, expected = finished(Fleet.build(runs))
    close(fleet.flat, plain.flat, 1e-5)
    assert facts.keys() == expected.keys()
    assert all(fact == pytest.approx(expected[name], rel=1e-4, abs=1e-5, nan_ok=True) for name, fact in facts.items())
    return fleet, count


def deep(run: RunConfig, num_layers: int) -> RunConfig:
    return replace(run, steps=4, evaluate_every=2, model=replace(run.model, num_layers=num_layers))


@pytest.mark.parametrize("name", RUNS)
def test_blocks_that_are_alike_are_one_program(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    _, count = programs(deep(RUNS[name], 4), monkeypatch, "aot_eager")
    assert programs(deep(RUNS[name], 6), monkeypatch)[1] == count


def test_many_evaluations_are_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    few, many = (deep(replace(MODULAR, evaluate=("val",)), 2), deep(MODULAR, 3))
    (_, fewer), (_, less) = programs(few, monkeypatch), programs(many, monkeypatch)
    assert fewer == 3  # drawing, the objective, the update
    monkeypatch.setattr(fleets, "FEW", 0)
    assert programs(few, monkeypatch)[1] == fewer + 1 and programs(many, monkeypatch)[1] > less


def test_whole_where_blocks_differ_or_are_few_or_training_is_long(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiled, "LONG", 10)
    for run in (deep(MODULAR, 2), deep(replace(MODULAR, model=replace(SMALL, dropout=0.1)), 3), replace(deep(MODULAR, 3), steps=11)):
        fleet, count = programs(run, monkeypatch)
        assert all(part._compiled_call_impl is None for part in fleet.model.modules()) and count == 3
