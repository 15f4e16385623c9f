"""Which runs share a fleet, how a large fleet is cut, and what is refused before anything is trained."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from laws import variants
from laws_training import FLEETS, MEMORIZE, MLP, MODULAR, MUON, OPTIMIZER_EXAMPLES

from shoal.config import AdamW, DecoderConfig, RunConfig, Schedule, fields_per_run, flatten, run_id, with_seed, with_values
from shoal.config.fields import ConfigError
from shoal.train.plan import fleet_id, plan, structure, validate

BASE = with_values(replace(MODULAR, schedule=Schedule(kind="cosine")), {"model.dropout": 0.1, "clip": 1.0})
CONFIGS = {"modular": BASE, "memorize": MEMORIZE, "mlp": MLP, "muon": MUON}


@pytest.mark.parametrize("name", CONFIGS)
def test_runs_that_differ_in_their_own_fields_share_a_fleet(name: str) -> None:
    base = CONFIGS[name]
    other: dict[str, Any] = {"task.operation": "sub", "task.test_fraction": 0.05, "task.split": "paired", "variant": "other"}
    changed = []
    for path in fields_per_run(base):
        value = flatten(base)[path]
        changed.append(with_values(base, {path: other[path] if path in other else value + 1 if isinstance(value, int) else 0.9 * value}))
    runs = list({run_id(run): run for run in [base, *changed, *(with_seed(base, s) for s in range(3))]}.values())
    assert len(runs) > 10 and plan(runs) == [runs]


def structural() -> dict[str, RunConfig]:
    """Every choice of every structural field, and a few sizes."""
    found = {f"run {name}": run for name, run in variants(BASE).items()}
    for part in ("task", "model", "gradient", "weights"):
        found |= {f"{part} {name}": replace(BASE, **{part: config}) for name, config in variants(getattr(BASE, part)).items()}
    for examples in OPTIMIZER_EXAMPLES.values():
        found |= {f"optimizer {name}": replace(BASE, optimizer=config) for name, config in variants(examples[0]).items()}
    values: dict[str, Any] = {
        "model.width": 24, "model.num_layers": 1, "model.feed_forward": 0, "task.p": 13, "batch_size": 64, "accumulate": 2, "precision": "bfloat16",
        "log_every": 5, "evaluate_every": 10, "evaluate": ["train"], "stop_metric": "val/loss", "stop_evaluations": 3, "optimizer.decay": "matrices",
        "schedule.kind": "linear", "model.dropout": 0.0, "clip": 0.0, "task.operation": "add+mul", "task.base": 3, "gradient.filter_window": 7,
        "gradient.noise": 0.1, "weights.noise": 0.1, "weights.fixed_norm": True, "snapshots": [3], "objective": "stablemax", "optimizer.decay_to": "start",
    }  # fmt: skip
    same_program = {"optimizer AdamW", *(f"task split={name}" for name in ("random", "paired", "stratified", "rows"))}
    found["task s5"] = with_values(BASE, {"task.operation": "s5"})
    return {name: run for name, run in found.items() if run != BASE and name not in same_program} | {
        path: with_values(BASE, {path: v}) for path, v in values.items()
    }


@pytest.mark.parametrize("name", structural())
def test_structure_splits(name: str) -> None:
    run = structural()[name]
    assert structure(run) != structure(BASE)
    assert plan([BASE, run, with_seed(BASE, 1), with_seed(run, 1)]) == [[BASE, with_seed(BASE, 1)], [run, with_seed(run, 1)]]


@pytest.mark.parametrize(("path", "values"), [(path, [0.0, 0.1, 0.0, 0.5]) for path in ("model.dropout", "clip", "gradient.noise", "weights.noise")])
def test_some_and_none_are_two_programs(path: str, values: list[float]) -> None:
    runs = [with_values(BASE, {path: value}) for value in values]
    assert plan(runs) == [[runs[0], runs[2]], [runs[1], runs[3]]]


def test_fleets_are_cut_into_nearly_equal_parts() -> None:
    small, large = [with_seed(BASE, s) for s in range(11)], [with_seed(with_values(BASE, {"model.width": 32}), s) for s in range(3)]
    mixed = [*small[:2], *large[:2], *small[2:], *large[2:]]
    for largest, sizes in ((None, [11, 3]), (100, [11, 3]), (11, [11, 3]), (10, [6, 5, 3]), (4, [4, 4, 3, 3]), (2, [2, 2, 2, 2, 2, 1, 2, 1]), (1, [1] * 14)):
        fleets = plan(mixed, largest)
        assert [len(fleet) for fleet in fleets] == sizes
        assert [run for fleet in fleets for run in fleet] == small + large, "each run once, in order"
    assert plan([]) == []


def test_fleet_ids() -> None:
    runs = FLEETS["modular"]
    ids = [fleet_id(runs), fleet_id(runs[::-1]), fleet_id(runs[:7]), fleet_id([replace(runs[0], steps=99), *runs[1:]])]
    assert len(set(ids)) == 4 and all(len(i) == 10 and int(i, 16) >= 0 for i in ids) and fleet_id(list(runs)) == ids[0]


REFUSED = {
    "evaluate": [
        ({"evaluate": ["train", "dev"]}, "evaluate: this task has no split 'dev'; it has train, val, test"),
        ({"task": MEMORIZE.task}, "evaluate: this task has no split 'val'; it has train"),
    ],
    "stop_metric": [
        ({"stop_metric": "test/loss"}, "stop_metric: 'test/loss' is not measured; possible: train/loss, train/accuracy, train/exact, val/loss"),
        ({"stop_metric": "val/error"}, "stop_metric: 'val/error' is not measured"),
        ({"stop_metric": "accuracy"}, "stop_metric: 'accuracy' is not measured"),
    ],
    "model": [
        ({"model": MLP.model, "task": MEMORIZE.task, "evaluate": ["train"]}, "model: embedding_mlp gives one answer to one short prompt"),
        ({"model": MLP.model, "task.tokens": "digits"}, "model: embedding_mlp gives one answer to one short prompt"),
    ],
    "model.num_inputs": [
        ({"model": replace(MLP.model, num_inputs=2)}, "model.num_inputs: must be 3 to read both operands, not 2"),
        ({"model": replace(MLP.model, num_inputs=5)}, "model.num_inputs: must be 3 to read both operands, not 5"),
        ({"model": replace(MLP.model, num_inputs=1), "task.operator_token": False}, "model.num_inputs: must be 2 to read both operands, not 1"),
    ],
}


@pytest.mark.parametrize(("path", "values", "message"), [(path, *case) for path, cases in REFUSED.items() for case in cases])
def test_refusals(path: str, values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        validate(with_values(MODULAR, values))
    assert str(caught.value).startswith(message) and caught.value.path == path


def test_good_configs_pass() -> None:
    for run in (*CONFIGS.values(), RunConfig(), replace(MODULAR, evaluate=("train", "test"), stop_metric="test/exact")):
        validate(run)
    validate(with_values(MLP, {"task.operator_token": False, "model.num_inputs": 2}))
    validate(RunConfig(model=DecoderConfig(width=8, num_heads=1), optimizer=AdamW(lr=1.0)))
