"""What the grokking studies share: each statistic against its definition, run by run, and by simulation; the runs against the paper's."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from invented import invented

from shoal.config import Muon, RunConfig, with_seed, with_values
from shoal.config.load import override, structure, unstructure
from shoal.results import Rows, Sample
from shoal.results.statistics import Estimate
from shoal.studies import grokking
from shoal.studies.shared import THRESHOLDS, Published, delay, matching, paper_run, percent, published_table, reached_table, small_run, sooner
from shoal.train.plan import validate

METRIC = "val/accuracy"


def made(directory: Path, times: dict[str, list[float]], budget: int = 5000, **more: Any) -> Rows:
    """One setting per name, its seeds 0, 1, ... at these steps."""
    run = RunConfig(steps=budget)
    runs = [(with_seed(with_values(run, {"variant": name}), seed), at) for name, row in times.items() for seed, at in enumerate(row)]
    return invented(directory, runs, every=10, record={"config": {"variant": list(times)}}, **more)[1]


def kaplan_meier_median(times: np.ndarray, observed: np.ndarray) -> float:
    """By its definition: the share still to come is multiplied by 1 - d / m at every time at which d of the m still followed arrive."""
    share = 1.0
    for t in np.unique(times[observed]):
        share *= 1 - np.sum((times == t) & observed) / np.sum(times >= t)
        if share <= 0.5:
            return float(t)
    return math.inf


def test_delay_counts_from_the_first_training_hit_to_the_sustained_one(tmp_path: Path) -> None:
    rows = made(tmp_path, {"a": [1000.0, 2000.0, math.inf, 3000.0, math.inf]}, dead=[4])
    sample = delay(rows)
    times, observed = np.asarray(sample.values), np.asarray(sample.observed)
    for i, row in enumerate(rows):
        (steps, trained), (_, known) = row.curve("train/accuracy"), row.curve(METRIC)
        learned = steps[trained >= np.float32(0.99)][0]
        hits = [k for k in range(len(steps) - 4) if (known[k : k + 5] >= np.float32(0.99)).all()]
        assert observed[i] == bool(hits)
        end = 5000 if row["status"] == "dead" else steps[-1]
        assert times[i] == (steps[hits[0]] if hits else end) - learned
    assert sample.kind == "survival" and observed.tolist() == [True, True, False, True, False]
    assert np.asarray(delay(rows, threshold=1.5).observed).tolist() == [False] * 5


def test_delay_is_zero_where_the_unseen_rows_came_first(tmp_path: Path) -> None:
    """With noisy labels the training rows may never be known."""
    sample = delay(made(tmp_path, {"a": [500.0, 700.0, math.inf]}, extra={"train/accuracy": [0.9, 0.9, 0.9]}))
    assert np.asarray(sample.values).tolist() == [0.0] * 3 and np.asarray(sample.observed).tolist() == [True, True, False]


def test_sooner_by_its_definition(tmp_path: Path) -> None:
    generator = np.random.default_rng(2)
    for trial in range(6):
        budgets = {"a": 3000, "b": 3000 if trial % 2 else 1500}
        times = {name: np.round(generator.uniform(300, 4000, 12) / 100) * 100 for name in budgets}
        times["b"][:3] = times["a"][:3]
        runs = [(with_seed(RunConfig(steps=budgets[name], variant=name), seed), at) for name in budgets for seed, at in enumerate(times[name])]
        late = [(run, at if at + 100 < run.steps else math.inf) for run, at in runs]
        rows = invented(tmp_path / str(trial), late, every=10, dead=[5, 20])[1]
        parts = {name: rows.where({"variant": name}) for name in budgets}
        told = []
        for seed in range(12):
            (ta, oa), (tb, ob) = ([float(x[0]) for x in parts[name].where({"seeds.init": seed}).reached(METRIC, 0.99)] for name in budgets)
            if oa and ob:
                told.append(ta < tb)
            elif oa and ta <= tb:  # b was watched until tb and was not there
                told.append(True)
            elif ob and tb <= ta:
                told.append(False)
        sample = sooner(parts["a"], parts["b"])
        assert sample.kind == "proportion" and np.asarray(sample.values).tolist() == told and 0 < len(told) <= 12
        assert sample.estimate().n == len(told)
        reverse = np.asarray(sooner(parts["b"], parts["a"]).values)
        assert len(reverse) == len(told) and not (reverse & np.array(told)).any()


def test_sooner_pairs_by_seed(tmp_path: Path) -> None:
    rows = made(tmp_path, {"a": [1000.0, 2000.0, 3000.0], "b": [1500.0, 1500.0]})
    a, b = rows.where({"variant": "a"}), rows.where({"variant": "b"})
    assert np.asarray(sooner(a, b).values).tolist() == [True, False]
    assert np.asarray(sooner(Rows(list(a)[::-1]), b).values).tolist() == [False, True]
    assert sooner(a.where({"seeds.init": 2}), b).estimate().n == 0 == sooner(Rows(), b).estimate().n
    assert np.asarray(sooner(a, a).values).tolist() == [False, False, False], "a tie is not sooner"
    with pytest.raises(ValueError, match="5 runs have only 3 different seeds"):
        sooner(rows, b)


def test_the_share_of_sooner_covers(tmp_path: Path) -> None:
    """Two settings of the same distribution, some never: ties and losses together are the other half or more, and the interval of [0, 1/2] is rarely left."""
    generator = np.random.default_rng(9)
    draws = generator.exponential(2000, (2, 900)).round(-1) + 300
    rows = made(tmp_path, {"a": list(np.where(draws[0] > 4500, math.inf, draws[0])), "b": list(np.where(draws[1] > 4500, math.inf, draws[1]))})
    share = np.asarray(sooner(rows.where({"variant": "a"}), rows.where({"variant": "b"})).values, dtype=float)
    oa, ob = (rows.where({"variant": name}).reached(METRIC, 0.99)[1] for name in "ab")
    assert share.size == (oa | ob).sum() < 900 and abs(share.mean() - 0.5) < 0.06
    lows = np.array([Sample(part, kind="proportion").estimate().low for part in np.array_split(share, 85)])
    assert (lows > 0.5).mean() <= 0.05


def test_reached_table(tmp_path: Path) -> None:
    generator = np.random.default_rng(6)
    times = {name: list(generator.uniform(400, 6000, 9)) for name in ("plain", "no decay")}
    times = {name: [t if t < 4000 else math.inf for t in row] for name, row in times.items()} | {"never": [math.inf] * 9}
    rows = made(tmp_path, times, extra={"weights/norm": list(generator.uniform(20, 40, 27)), "train/collapse": [0.25] * 26 + [math.nan]}, dead=[3])
    table = reached_table(["variant"])
    lines = table.make(rows)
    assert [line["setting"] for line in lines] == list(times) and "99 %" in table.caption
    names = ["setting", "n", "grokked", *(f"first {percent(t)}" for t in THRESHOLDS), "grokked at", "training 99 %", "delay", "weight norm at the end"]
    assert list(lines[0]) == [*names, "softmax collapse at the end"]
    for line, name in zip(lines, times, strict=True):
        part = rows.where({"variant": name})
        t, observed = part.reached(METRIC, 0.99)
        assert (line["n"], line["grokked"].n, line["grokked"].value) == (9, 9, observed.mean())
        for threshold in THRESHOLDS:
            first = kaplan_meier_median(*part.reached(METRIC, threshold, sustained=1))
            assert line[f"first {percent(threshold)}"] == (first if math.isfinite(first) else None)
        assert line["grokked at"].value == kaplan_meier_median(t, observed)
        since = delay(part)
        assert line["delay"].value == kaplan_meier_median(np.asarray(since.values), np.asarray(since.observed))
        assert line["training 99 %"] == kaplan_meier_median(*part.reached("train/accuracy", 0.99, sustained=1))
        assert line["weight norm at the end"] == np.median(part.column("final.weights/norm"))
        assert line["softmax collapse at the end"] == 0.25
    assert reached_table(["variant"], "val/exact").make(rows) == [], "not recorded: nothing, and not zero"


def test_published_table(tmp_path: Path) -> None:
    rows = made(tmp_path, {"plain": [1000.0, 1200.0, 1400.0, 900.0, math.inf], "other": [math.inf] * 2})
    shown: dict[str, Any] = dict(source="they", steps="4,200 ± 76 (95 %)", seeds="3")
    published = [
        Published(setting="first", conditions={"variant": "plain"}, threshold=0.95, differs="The prime.", **shown),
        Published(setting="late", conditions={"variant": "other"}, **shown),
        Published(setting="no such rows", conditions={"variant": "missing"}, **shown),
        Published(setting="no such path", conditions={"optimizer.momentum": 0.9}, **shown),
        Published(setting="not run", **shown),
    ]
    lines = [dict(line) for line in published_table(published).make(rows)]
    assert [line["setting"] for line in lines] == [one.setting for one in published] and {line["source"] for line in lines} == {"they"}
    ours = lines[0]["ours"]
    part = rows.where({"variant": "plain"})
    assert isinstance(ours, Estimate) and ours.value == kaplan_meier_median(*part.reached(METRIC, 0.95, sustained=1)) and ours.n == 5
    assert lines[0] | {"ours": 0} == {
        "setting": "first", "source": "they", "their steps": "4,200 ± 76 (95 %)", "their seeds": "3", "ours": 0, "our seeds": 5, "what differs": "The prime.",
    }  # fmt: skip
    assert lines[1]["ours"].value == math.inf and lines[1]["our seeds"] == 2
    assert [(line["ours"], line["our seeds"]) for line in lines[2:]] == [("not run", 0)] * 3
    assert len(matching(rows, {"variant": "plain"})) == 5 and not matching(rows, {"nothing": 1})


def test_runs() -> None:
    assert paper_run() == grokking.paper().run
    for make in (paper_run, small_run):
        run = make()
        validate(run)
        assert structure(RunConfig, unstructure(run)) == run
        assert run.stop_metric == METRIC and run.stop_at == 0.99
        changed = make(500, optimizer=Muon(), stop_metric=None)
        assert (changed.steps, changed.optimizer, changed.stop_metric, changed.model) == (500, Muon(), None, run.model)
        assert round(changed.schedule.warmup * changed.steps) == 10 == round(run.schedule.warmup * run.steps)
        assert override(run, {"optimizer.type": "muon"}).model == run.model
