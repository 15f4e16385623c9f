"""The recall studies: their runs are what they say, claims and tables say what invented rows say, lengths are measured on what was never trained on."""

from __future__ import annotations

import importlib
import math
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from invented import invented

import shoal
from shoal.config import DecoderConfig, RecallConfig, RunConfig, StudyConfig, flatten, run_id
from shoal.config.fields import ConfigError
from shoal.config.load import override
from shoal.inference.evaluate import evaluate, lengths
from shoal.results import Rows
from shoal.results.claims import judge
from shoal.results.rows import row_key
from shoal.results.statistics import Estimate
from shoal.studies import STUDIES
from shoal.studies.recall import DELAY, HYBRID, LR, MAMBA, MODELS, NONE, QUERIES, ROTARY, S4D, every_length, few_lengths, order
from shoal.studies.recall_mamba_paper import doubling
from shoal.studies.recall_tables import accuracy
from shoal.train.plan import plan, validate

evaluation = importlib.import_module("shoal.inference.evaluate")
NAMES = [name for name in STUDIES if name.startswith("recall-")]
MODULES: dict[str, ModuleType] = {name: importlib.import_module(STUDIES[name]) for name in NAMES}
METRIC = "test/accuracy"
Curve = Callable[[RunConfig, float], float]  # a run and a multiple of the training length -> accuracy there


def told(directory: Path, config: StudyConfig, study: Any, curve: Curve, best: float = 1e-2, spread: float = 0.002) -> Rows:
    """Rows of both stages: only runs at the learning rate ``best`` come to 99 %, at a step of their own; the fresh ones' lengths as ``curve`` says."""
    first = study.wanted(Rows())

    def at(run: RunConfig) -> float:
        rate: Any = run.optimizer
        known = rate.lr == best and curve(run, 1.0) >= 0.99
        return run.steps * (0.2 + 0.001 * (run.seeds.init % 1000) + 0.1 * (getattr(run.task, "delay", 1) > 1)) if known else math.inf

    def made(name: str, runs: list[RunConfig]) -> Any:
        return invented(directory / name, [(run, at(run)) for run in runs], metric=METRIC, every=max(run.steps // 50 for run in runs))

    runs = study.wanted(made("first", first)[1])
    store, _ = made("both", runs)
    for run in runs[len(first) :]:
        task: Any = run.task
        wanted = doubling(task) if study.name == "recall-mamba-paper" else every_length(task)
        level = [min(curve(run, n / task.length) + spread * run.seeds.init / config.seeds, 1.0) for n in wanted]
        store.add_measure(run_id(run), "lengths", [{"length": n, "accuracy": y, "distinct": y / 2} for n, y in zip(wanted, level, strict=True)])
    return store.rows()


@pytest.mark.parametrize("preset", ["quick", "full"])
@pytest.mark.parametrize("name", NAMES)
def test_every_run_is_valid_and_one_of_a_kind(name: str, preset: str) -> None:
    config: StudyConfig = MODULES[name].PRESETS[preset]()
    study = MODULES[name].study(config)
    first = study.wanted(Rows())
    seeds, rates = {run.seeds.split for run in first}, {getattr(run.optimizer, "lr", 0) for run in first}
    assert (len(seeds), len(rates), config.seeds) == ((4, 4, 6) if preset == "full" else (2, 2, 3))
    assert not seeds & set(range(config.seeds)) and len({run_id(run) for run in first}) == len(first) == len(config.settings()) * len(seeds)
    for run in {(run.task, run.model): run for run in first}.values():
        assert isinstance(run.model, DecoderConfig) and isinstance(run.task, RecallConfig)
        validate(run)
        assert run.evaluate == ("test",) and run.stop_metric is None and run.task.test_size >= 2000
        assert run.model.feed_forward == 0 and run.model.num_layers == 2 and run.model.bias
        assert run.steps % run.evaluate_every == 0 and run.steps // run.evaluate_every >= 20
    fleets = {"recall-induction": 7, "recall-capacity": 4, "recall-width": 1, "recall-state": 12, "recall-mamba-paper": 3}
    assert preset == "quick" or len(plan(first)) == fleets[name], "rates, seeds, delays and numbers of queries share a fleet"


def test_models_are_what_they_are_called() -> None:
    runs = {run.variant: run for run in MODULES["recall-induction"].full().runs()}
    assert list(runs) == list(MODELS)
    found = {name: (run.model.mixers, run.model.positions) for name, run in runs.items() if isinstance(run.model, DecoderConfig)}
    assert found == {
        "learned positions": (("attention",), "learned"), "rotary": (("attention",), "rotary"), "no positions": (("attention",), "none"),
        "Mamba": (("mamba",), "none"), "hybrid": (("mamba", "attention"), "none"), "Mamba-2": (("ssd",), "none"), "S4D": (("s4d",), "none"),
    }  # fmt: skip
    flat = flatten(runs[MAMBA])
    said = {"model.width": 8, "model.state_size": 16, "model.convolution": 4, "model.expand": 2, "model.num_heads": 1, "task.length": 32, "batch_size": 64,
            "model.token_embedding": "unit", "model.head_bias": True, "optimizer.type": "adam", "optimizer.wd": 0.0, "clip": 1.0}  # fmt: skip
    assert said.items() <= flat.items()
    wide = MODULES["recall-width"].full()
    assert {(run.variant, run.task.num_queries, run.task.delay, run.model.width) for run in wide.runs()} == {  # pyright: ignore[reportAttributeAccessIssue]
        ("4 queries", 4, 1, 64), ("8 queries", 8, 1, 64), ("16 queries", 16, 1, 64), ("16 queries delay 10", 16, 10, 64),
    }  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_published_rows_stand_beside_runs_of_the_full_preset_and_of_no_small_one(name: str) -> None:
    module = MODULES[name]
    for preset, there in (("full", True), ("quick", False)):
        flats = [{row_key(path): value for path, value in flatten(run).items()} for _, run in module.PRESETS[preset]().settings()]
        for one in getattr(module, "PUBLISHED", []):
            if one.conditions is not None:
                assert any(one.conditions.items() <= flat.items() for flat in flats) == there, (one.setting, preset)
            assert one.differs and one.source and one.result


def as_expected(run: RunConfig, times: float) -> float:
    """What research expects of every study."""
    model: Any = run.model
    task: Any = run.task
    name, far = run.variant.removesuffix(" (tuning)"), task.delay > 3
    if task.num_queries > 1 and model.width < 64:  # capacity, state
        if task.num_queries == 4 and name == HYBRID:
            return 0.995
        kept = {ROTARY: 0.9, MAMBA: 0.8, HYBRID: 0.97, S4D: 0.4}[name] - 0.01 * task.num_queries
        return kept - 0.05 * (model.state_size < 16)
    if "queries" in name:  # width
        return 0.999 if not far else 0.8
    if model.width == 64 and task.num_queries == 16:  # state
        return 0.999 if model.state_size >= 16 else 0.9
    if name == NONE:
        return 0.1 if far else 0.5
    if name == S4D:
        return 0.95
    if name in (MAMBA, "Mamba-2", HYBRID):
        return 0.999 if times <= 3 or name != HYBRID else 0.6
    return 0.999 if times <= 1 else 0.15 if name == ROTARY else 0.1


def never(run: RunConfig, times: float) -> float:
    return 0.08


SMALLER = {"recall-state": {"grid.model.width": [8, 64], "grid.model.state_size": [4, 16, 32]}}


@pytest.mark.parametrize("name", NAMES)
def test_claims_figures_and_tables_of_what_is_expected_and_of_nothing_learned(name: str, tmp_path: Path) -> None:
    module = MODULES[name]
    config = override(module.full(), {"run.steps": 1000, "run.evaluate_every": 20, "grid.optimizer.lr": [1e-3, 1e-2], **SMALLER.get(name, {})})
    study = module.study(config)
    rows = told(tmp_path / "expected", config, study, as_expected)
    verdicts = [judge(claim, rows) for claim in study.claims]
    others = {"recall-induction": {"the hybrid is solved sooner than Mamba": "not held"}}.get(name, {})  # both at once
    for verdict in verdicts:
        wanted = next((word for text, word in others.items() if text in verdict["claim"]), "held")
        assert verdict["verdict"] == wanted and verdict["n"] == 6, (verdict["claim"], verdict["value"], verdict["note"])
    for figure in study.figures:
        assert "<svg" in figure.svg(rows), figure.name
    tables = {table.name: list(table.make(rows)) for table in study.tables}
    assert len(tables["chosen"]) == len(tables["lengths"]) == len({repr(sorted(values.items())) for values in study_cells(config)})
    for line in tables["chosen"]:
        if line["solved"].value:
            assert line["learning rate"] == 1e-2 and line["at the edge of what was tried"] == "yes" and line["solved in tuning"] == "4 of 4"
            assert line["solved"].n == 6 and line["steps to 95 %"].value <= line["steps to 99 %"].value < 1000
        else:
            assert math.isinf(line["steps to 99 %"].value) and line["solved in tuning"] == "0 of 4"

    rows = told(tmp_path / "nothing", config, study, never)
    words = Counter(judge(claim, rows)["verdict"] for claim in study.claims)
    above = [claim for claim in study.claims if "is at 99 %" in claim.text or "it is at 99 %" in claim.text]
    assert above and all(judge(claim, rows)["verdict"] == "not held" for claim in above) and words["undecided"] < len(study.claims)
    for claim in study.claims:
        if "sooner" in claim.text:
            assert judge(claim, rows)["note"] == "no values", "neither was solved"


def study_cells(config: StudyConfig) -> list[dict[str, Any]]:
    return [{path: value for path, value in values.items() if path != LR} for values, _ in config.settings()]


@pytest.mark.parametrize("name", NAMES)
def test_a_study_that_has_only_begun(name: str, tmp_path: Path) -> None:
    study = MODULES[name].study(override(MODULES[name].quick(), {"run.steps": 100}))
    assert {judge(claim, Rows())["verdict"] for claim in study.claims} == {"undecided"}
    _, rows = invented(tmp_path, [(run, math.inf) for run in study.wanted(Rows())], running=True, metric=METRIC)
    assert {judge(claim, rows)["verdict"] for claim in study.claims} == {"undecided"}
    for part in (Rows(), rows):
        assert all(isinstance(figure.svg(part), str) for figure in study.figures)
        for table in study.tables:
            assert all(value is None or isinstance(value, (str, int, float, Estimate)) for line in table.make(part) for value in line.values()), table.name


def test_the_order_of_learning_rates(tmp_path: Path) -> None:
    """Share solved before steps, steps before accuracy."""
    changes = {"variants": MAMBA, "grid.task.delay": [1], "grid.optimizer.lr": [3e-3, 1e-2], "run.steps": 1000}
    study = MODULES["recall-induction"].study(override(MODULES["recall-induction"].quick(), changes))
    slow, fast = [[run for run in study.wanted(Rows()) if getattr(run.optimizer, "lr", 0) == lr] for lr in (3e-3, 1e-2)]

    def rows(name: str, times: list[float]) -> Rows:
        return invented(tmp_path / name, list(zip([*slow, *fast], times, strict=True)), metric=METRIC)[1]

    assert fast[0].optimizer == study.wanted(rows("share", [100.0, math.inf, 700.0, 700.0]))[-1].optimizer
    assert slow[0].optimizer == study.wanted(rows("steps", [600.0, 600.0, 700.0, 700.0]))[-1].optimizer
    assert fast[0].optimizer == study.wanted(rows("accuracy", [5000.0, math.inf, 1050.0, math.inf]))[-1].optimizer
    assert order(rows("solved", [200.0, 200.0, math.inf, math.inf]).where({LR: 3e-3})) == (0.0, 200.0, 0.0)


def test_lengths() -> None:
    task = RecallConfig(length=32, delay=5)
    assert every_length(task) == list(range(7, 97))
    assert few_lengths(task) == [7, 8, 16, 24, 32, 40, 48, 56, 64, 72, 80, 88, 96] and few_lengths(RecallConfig())[:3] == [3, 8, 16]
    assert doubling(RecallConfig(length=256, longest=64)) == [2**k for k in range(6, 15)] and doubling(RecallConfig(length=8, longest=3)) == [3, 4, 8, 16]


def small(**changes: Any) -> StudyConfig:
    values = {"variants": "rotary", "grid.optimizer.lr": [3e-3, 1e-2], "grid.task.delay": [1, 2], "run.steps": 6, "run.evaluate_every": 2, "run.log_every": 2,
              "seeds": 2, "run.task.length": 8, "run.task.test_size": 50, "run.batch_size": 8}  # fmt: skip
    return override(MODULES["recall-induction"].quick(), values | changes)


def test_from_runs_to_lengths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Through the driver, twice: fresh seeds alone are measured, and as evaluations of whole splits measure them, in pieces of any size."""
    config = small(variants=["rotary", "hybrid"])
    study = MODULES["recall-induction"].study(config)
    result = shoal.run(study, tmp_path, progress=False)
    tried, fresh = [[row for row in result.rows if (row["seeds.split"] >= 1000) == which] for which in (True, False)]
    assert len(tried) == 2 * 2 * 2 and len(fresh) == 2 * 2 * 2 and {row["variant"] for row in fresh} == {"rotary", "hybrid"}
    assert {row["variant"] for row in tried} == {"rotary (tuning)", "hybrid (tuning)"} and not any(row["measures"]["lengths"] for row in tried)
    for row in fresh:
        entries = row["measures"]["lengths"]
        assert [entry["length"] for entry in entries] == few_lengths(RecallConfig(length=8, delay=row[DELAY]))
    row = fresh[-1]
    run = result.load(row["id"])
    monkeypatch.setitem(evaluation.TOKENS, "cpu", 100)
    again = {entry["length"]: entry for entry in lengths(run, [4, 8, 24])}
    stored = {entry["length"]: entry for entry in row["measures"]["lengths"]}
    for n in (4, 8, 24):
        assert again[n] == stored[n]
        assert again[n]["accuracy"] == pytest.approx(evaluate(run, f"length:{n}")["accuracy"])
        assert again[n]["distinct"] == pytest.approx(evaluate(run, f"length:{n}:distinct")["accuracy"])
    assert stored[8]["accuracy"] == pytest.approx(row[f"final.{METRIC}"])
    assert accuracy(Rows([row]), 3).tolist() == [stored[24]["accuracy"]] and accuracy(Rows([row]), which="distinct").tolist() == [stored[8]["distinct"]]
    written = {path: path.stat().st_mtime_ns for kind in ("*.parquet", "measures/*/*.json") for path in tmp_path.rglob(kind)}
    shoal.run(study, tmp_path, progress=False)
    assert len(written) > 16 and all(path.stat().st_mtime_ns == made for path, made in written.items()), "nothing is done twice"


def test_seeds_of_the_tuning_are_refused() -> None:
    with pytest.raises(ConfigError, match="first_seed"):
        MODULES["recall-induction"].study(small(first_seed=999))


def test_more_seeds_more_lengths(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[list[int]] = []
    monkeypatch.setattr(evaluation, "lengths", lambda run, lengths: asked.append(list(lengths)) or [])
    for seeds in (3, 5):
        config = small(seeds=seeds)
        run: Any = type("Run", (), {"config": config.runs()[0]})
        MODULES["recall-induction"].study(config).measures["lengths"](run)
    assert asked == [few_lengths(RecallConfig(length=8)), every_length(RecallConfig(length=8))]


def test_what_a_change_gains(tmp_path: Path) -> None:
    config = override(
        MODULES["recall-state"].full(), {"run.steps": 500, "grid.optimizer.lr": [1e-2], "grid.model.width": [8, 16], "grid.model.state_size": [4, 8]}
    )
    study = MODULES["recall-state"].study(config)

    def curve(run: RunConfig, times: float) -> float:
        model: Any = run.model
        return 0.3 + 0.02 * model.width + 0.01 * model.state_size

    lines = {line["change"]: line for line in study.tables[0].make(told(tmp_path, config, study, curve, spread=0.0))}
    gains = {change: line["gain"].value for change, line in lines.items()}
    assert gains == pytest.approx({
        "width 8 to 16, state 4": 0.16, "width 8 to 16, state 8": 0.16, "state 4 to 8, width 8": 0.04, "state 4 to 8, width 16": 0.04,
        "width 8 to 16, state 8 to 4, as many numbers in all": 0.12,
    })  # fmt: skip
    assert lines["width 8 to 16, state 4"]["gain"].n == 6 and lines["width 8 to 16, state 4"]["after"] == pytest.approx(0.66)
    assert QUERIES in flatten(config.run) and config.run.task.num_queries == 16  # pyright: ignore[reportAttributeAccessIssue]


def test_spread_of_seeds_in_the_tables(tmp_path: Path) -> None:
    config = small(variants="Mamba", seeds=3, **{"grid.task.delay": [1], "run.steps": 200})
    study = MODULES["recall-induction"].study(config)
    rows = told(tmp_path, config, study, lambda run, times: 0.9 - 0.2 * times, spread=0.3)
    (line,) = next(table for table in study.tables if table.name == "lengths").make(rows)
    assert line["at the training length"] == "0.8 (0.7 to 0.9)" and line["at 3 times it"] == "0.4 (0.3 to 0.5)"
    assert line["where the answer is not the query"] == "0.4 (0.35 to 0.45)" and line["n"] == 3
    assert np.asarray(accuracy(study_fresh(rows))).tolist() == pytest.approx([0.7, 0.8, 0.9])


def study_fresh(rows: Rows) -> Rows:
    return Rows([row for row in rows if row["seeds.split"] < 1000][::-1])
