"""Ablations, interventions, number formats, initial values, tokens: the settings are what their names say, the claims and tables what the rows say."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from invented import invented
from test_results_rows import store_of

from shoal.config import RunConfig, StudyConfig, flatten, with_seed
from shoal.config.load import override
from shoal.results import Rows
from shoal.results.claims import judge
from shoal.results.rows import Metrics, Row, row_key
from shoal.results.statistics import Estimate
from shoal.results.tables import Table
from shoal.studies import grokking_ablations, grokking_init, grokking_interventions, grokking_stability, grokking_tokens
from shoal.studies.shared import order_claims
from shoal.train.plan import plan, validate

MODULES = [grokking_ablations, grokking_interventions, grokking_stability, grokking_init, grokking_tokens]
CONFIGS = [pytest.param(module, preset, id=f"{module.__name__.rpartition('.')[2]}-{preset}") for module in MODULES for preset in ("quick", "full")]


@pytest.mark.parametrize(("module", "preset"), CONFIGS)
def test_every_setting_can_be_trained_and_is_one_of_a_kind(module: Any, preset: str) -> None:
    config: StudyConfig = module.PRESETS[preset]()
    settings = [run for _, run in config.settings()]
    for run in settings:
        validate(run)
        assert run.stop_metric == module.study(config).main_metric.removeprefix("best.")
    trained = [{path: value for path, value in flatten(run).items() if path != "variant"} for run in settings]
    assert len({repr(flat) for flat in trained}) == len(trained), "two names for one setting"
    for name in config.variants:
        assert list(override(config, {"variants": name}).variants) == [name], "as --variants gives it: no commas"
    assert len(plan(config.runs())) <= 24


def test_ablations_change_what_they_say() -> None:
    config = grokking_ablations.full()
    runs = {run.variant: run for run in config.runs()}
    assert len(plan(config.runs())) == 24 and len(plan(config.runs())[0]) == 17 * config.seeds, "what can share the fleet of the baseline does"
    base = runs["baseline"]
    assert runs["lr x 3"] == replace(base, variant="lr x 3", seeds=runs["lr x 3"].seeds, optimizer=replace(base.optimizer, lr=0.003))
    for share in (40, 60, 70):
        task: Any = runs[f"{share} % of the rows"].task
        assert task.train_fraction == share / 100 and task.train_fraction + task.val_fraction == pytest.approx(1)
    filtered, plain, matched = (flatten(runs[name]) for name in ("Grokfast EMA", "Adam L2 0.005", "Adam L2 0.005 lr x 3"))
    assert {path for path in filtered if filtered[path] != plain[path]} == {"gradient.filter", "variant"}
    assert {path for path in matched if matched[path] != plain[path]} == {"optimizer.lr", "variant"}
    assert matched["optimizer.lr"] == pytest.approx((1 + filtered["gradient.filter_gain"]) * plain["optimizer.lr"])
    named = {name for first, second, _ in grokking_ablations.ORDER for name in (first, second)}
    assert named <= runs.keys() and len(grokking_ablations.study(config).claims) == len(grokking_ablations.ORDER)


@pytest.mark.parametrize("module", [grokking_ablations, grokking_stability, grokking_init, grokking_tokens])
def test_published_rows_stand_beside_runs_of_the_full_preset_and_of_no_small_one(module: Any) -> None:
    for preset, there in (("full", True), ("quick", False)):
        flats = [{row_key(path): value for path, value in flatten(run).items()} for _, run in module.PRESETS[preset]().settings()]
        for one in module.PUBLISHED:
            if one.conditions is not None:
                assert any(one.conditions.items() <= flat.items() for flat in flats) == there, (one.setting, preset)
            assert one.differs


def runs_of(config: StudyConfig, times: Any) -> list[tuple[RunConfig, float]]:
    """Every run with the step ``times(its run)`` at which it knows the unseen rows."""
    return [(run, times(run)) for run in config.runs()]


def test_ablations_against_the_baseline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grokking_ablations, "METRIC", "val/accuracy")  # what invented runs have
    config = override(grokking_ablations.full(), {"variants": ["baseline", "wd 0", "wd 3", "GELU", "SGD"], "seeds": 6})
    at = {"baseline": 4000.0, "wd 0": math.inf, "wd 3": 2000.0, "GELU": 4000.0, "SGD": 9000.0}
    _, rows = invented(tmp_path, runs_of(config, lambda run: at[run.variant] + 100 * run.seeds.split * (run.variant == "wd 3")))
    study = grokking_ablations.study(config)
    assert [judge(claim, rows)["verdict"] for claim in study.claims] == ["held", "held", "held", "not held"]
    lines = {line["variant"]: line for line in study.tables[0].make(rows)}
    assert list(lines) == list(config.variants) and lines["wd 3"]["changed"] == "wd = 3" and lines["baseline"]["sooner than the baseline"] is None
    assert {name: line["sooner than the baseline"].value for name, line in lines.items() if name != "baseline"} == {"wd 0": 0, "wd 3": 1, "GELU": 0, "SGD": 0}
    assert lines["wd 0"]["there"].value == 0 and lines["wd 3"]["there"].n == 6


def test_order_claims_are_of_variants_that_are_there_and_of_one_cell_each() -> None:
    config = replace(grokking_ablations.quick(), variants={"a": {}, "b": {"optimizer.wd": 0.0}}, grid={"clip": [0.0, 1.0]})
    claims = order_claims(config, [("a", "b", "x"), ("b", "c", "y")])
    assert [claim.text.partition("(")[2] for claim in claims] == ["clip = 0).", "clip = 1)."]
    assert order_claims(replace(config, variants={}), [("a", "b", "x")]) == []


FRACTION = grokking_interventions.FRACTION


def test_interventions_in_numbers(tmp_path: Path) -> None:
    known = {"Adam": 0.7, "decay to zero": 0.3, "decay to start": 0.6, "full batch": math.inf}  # the smallest share from which a run comes to know the rest
    config = override(grokking_interventions.full(), {"variants": list(known), "run.steps": 1000})
    config = override(config, {f"grid.{FRACTION}": [0.3, 0.6, 0.7]})
    at = runs_of(config, lambda run: 500.0 if run.task.train_fraction >= known[run.variant] else math.inf)
    _, rows = invented(tmp_path, at)
    averages = {name: np.mean([1.0 if share >= known[name] else 0.02 for share in (0.3, 0.6, 0.7)]) for name in known}
    for name in known:
        assert grokking_interventions.averages(rows, name) == pytest.approx([averages[name]] * 3)
        assert grokking_interventions.needed(rows, name) == [known[name]] * 3
    gain = grokking_interventions.more(rows, "decay to zero", "decay to start", "full batch").estimate()
    assert gain.value == pytest.approx(averages["decay to zero"] - averages["decay to start"]) and gain.n == 3
    study = grokking_interventions.study(config)
    assert {judge(claim, rows)["verdict"] for claim in study.claims} == {"held"} and len(study.claims) == 5
    lines = {line["intervention"]: line for line in study.tables[0].make(rows)}
    assert lines["Adam"]["rows needed"] == "70 %, 70 %, 70 %" and lines["full batch"]["rows needed"] == "more, more, more"
    assert lines["Adam"]["60 %"].value == pytest.approx(0.02) and lines["Adam"]["n"] == 3 and lines["Adam"]["Power et al."]


def test_highest_share_of_collapse(tmp_path: Path) -> None:
    runs = [with_seed(RunConfig(), seed) for seed in range(2)]
    rows = store_of(tmp_path, runs, [{"train/collapse": [0.0, 0.7, 0.2]}, {"train/collapse": [0.1, 0.0, 0.0]}], [("completed", 20)] * 2).rows()
    assert np.asarray(grokking_stability.highest(rows, "train/collapse").values) == pytest.approx([0.7, 0.1])


def test_stability_changes_one_thing_at_a_time() -> None:
    flats = {run.variant: flatten(run) for run in override(grokking_stability.full(), {"seeds": 1}).runs()}
    differs = {name: {path for path in flat if flat[path] != flats["float32"][path]} - {"variant"} for name, flat in flats.items()}
    assert differs == {
        "float32": set(), "bfloat16": {"precision"}, "float64 loss": {"objective"}, "float32 StableMax": {"objective"}, "float32 wd 1": {"optimizer.wd"},
        "bfloat16 StableMax": {"objective", "precision"}, "bfloat16 wd 1": {"optimizer.wd", "precision"},
    }  # fmt: skip
    assert flats["float32"]["optimizer.wd"] == 0 and flats["float32"]["batch_size"] == 0


def test_shorter_delays_seed_by_seed(tmp_path: Path) -> None:
    """Delays read off the curves here; what is not there is censored, or 0, or nothing."""
    run = replace(grokking_init.full().run, steps=4000)
    mine, other = [1000.0, 2000.0, math.inf, math.inf, 100.0, 1000.0], [2000.0, math.inf, 2000.0, math.inf, 3000.0, 500.0]
    _, rows = invented(
        tmp_path, [(with_seed(replace(run, variant=name), seed), at) for name, times in (("a", mine), ("b", other)) for seed, at in enumerate(times)]
    )

    def apart(row: Any) -> float:
        steps, train = row.curve("train/accuracy")
        _, val = row.curve("val/accuracy")
        return max(float(steps[np.argmax(val >= 0.99)] - steps[np.argmax(train >= 0.99)]), 200.0)

    sample = grokking_init.shorter(rows.where({"variant": "a"}), Rows(rows.where({"variant": "b"})[::-1]), least=200.0)  # in whatever order
    a, b = ([apart(row) for row in rows.where({"variant": name})] for name in "ab")
    values = np.asarray(sample.values)
    assert values[[0, 4, 5]] == pytest.approx([b[0] / a[0], b[4] / 200.0, b[5] / a[5]]) and a[4] == 200.0
    assert np.asarray(sample.observed).tolist() == [True, False, True, False, True, True]
    assert values[1] == pytest.approx((4000 - 200) / a[1], rel=0.1) and values[2] == 0 and values[3] == 0


def test_residues_and_digits_never_stand_in_one_column() -> None:
    config = grokking_tokens.full()
    study = grokking_tokens.study(config)
    seen: list[set[str]] = []
    for one in [*study.figures, *study.tables[:-1]]:
        kind = one.name.rpartition("-")[2]
        assert kind in grokking_tokens.KINDS and one.caption.startswith(("Residues", "Digits"))
    for tokens in grokking_tokens.KINDS:
        table = grokking_tokens.apart(Table("x", lambda rows: [seen.append({row["task.tokens"] for row in rows}) or {}]), tokens)
        table.make(Rows([row_of(run) for run in config.runs()]))
    assert seen == [{"residue"}, {"digits"}]
    assert [claim.text.partition(" ")[0] for claim in study.claims].count("Addition") == 1, "of addition alone"


def row_of(run: RunConfig) -> Row:
    return Row({"id": "x", "fleet": "f", "status": "running"}, flatten(run), Metrics([], 1), 0)


@pytest.mark.parametrize("module", MODULES)
def test_tables_and_claims_of_a_study_that_has_only_begun(module: Any, tmp_path: Path) -> None:
    """Some settings are there, nothing is learned, no metric but accuracy: every table can be made, every claim is undecided."""
    config: StudyConfig = override(module.quick(), {"seeds": 2, "run.steps": 100})
    study = module.study(config)
    assert all(isinstance(judge(claim, Rows())["verdict"], str) for claim in study.claims)
    assert all(list(table.make(Rows())) is not None for table in study.tables)
    first = plan(config.runs())[0]
    _, rows = invented(tmp_path, [(run, math.inf) for run in first], running=True)
    for table in study.tables:
        for line in table.make(rows):
            assert all(value is None or isinstance(value, (str, int, float, Estimate)) for value in line.values()), table.name
    assert all(isinstance(figure.svg(rows), str) for figure in study.figures)
    assert {judge(claim, rows)["verdict"] for claim in study.claims} == {"undecided"}
