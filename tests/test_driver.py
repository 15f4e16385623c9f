"""From a study to its report, and back to it after whatever may happen on the way. Tiny runs: a test of the path, not of learning."""

from __future__ import annotations

import hashlib
import io
import json
import re
import signal
import weakref
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file

import shoal
from shoal.config import AdamW, EmbeddingMLPConfig, MemorizeConfig, ModularConfig, RunConfig, with_seed, with_values
from shoal.config.fields import ConfigError
from shoal.results import Store
from shoal.studies import driver, progress
from shoal.studies.study import Only, Study
from shoal.train import checkpoint
from shoal.train.device import measuring_device
from shoal.train.fleet import Fleet

RUN = RunConfig(
    task=ModularConfig(p=7, operation="add", train_fraction=0.5, val_fraction=0.3),
    model=EmbeddingMLPConfig(num_inputs=3, embedding=4, hidden=(8,)),
    optimizer=AdamW(lr=0.01),
    batch_size=8,
    steps=12,
    log_every=1,
    evaluate_every=4,
)
RATES = {"optimizer.lr": [1e-3, 1e-2]}


def measured(run: Any) -> list[dict[str, Any]]:
    return [{"accuracy": shoal.evaluate(run, "test")["accuracy"], "first": run.model.head.weight[0, 0].item()}]


def accuracy(rows: shoal.Rows) -> shoal.Sample:
    return shoal.Sample(rows.column("final.val/accuracy"), bounds=(0, 1))


FIGURES = [shoal.curves(["train/accuracy", "val/accuracy"], by=["optimizer.lr"])]


def study_of(wanted: Any = None, **changes: Any) -> Study:
    fields: dict[str, Any] = {
        "name": "tiny",
        "question": "Does it run?",
        "main_metric": "val/accuracy",
        "wanted": wanted or shoal.grid(RUN, RATES, seeds=5),
        "measures": {"measured": measured},
        "claims": [shoal.Claim("It learns.", accuracy, (0.9, 1.0))],
    }
    return Study(**fields | changes)


def hashes(directory: Path) -> dict[str, str]:
    return {str(path.relative_to(directory)): hashlib.sha256(path.read_bytes()).hexdigest() for path in directory.rglob("*") if path.is_file()}


def _timeless(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _timeless(v) for key, v in value.items() if key not in ("seconds", "extra")}
    return [_timeless(v) for v in value] if isinstance(value, list) else value


def facts(directory: Path) -> dict[str, Any]:
    """All that a study leaves behind but times and how often it was saved: bytes of tensors, rows, JSON."""
    found: dict[str, Any] = {}
    rows = Store.read(directory).rows()
    for row in rows:
        for metric in rows.metrics:
            steps, values = row.curve(metric)
            assert len(set(steps.tolist())) == len(steps), "no value twice"
            found[f"{row['id']} {metric}"] = (steps.tobytes(), values.tobytes())
    for fleet in sorted(directory.glob("fleets/*")):
        tensors = {f"{file}/{name}": x.numpy().tobytes() for file in ("model", "optimizer") for name, x in _load(fleet, file).items()}
        records = {file: _timeless(json.loads((fleet / file).read_text())) for file in ("fleet.json", "done", "checkpoint/fleet.json")}
        found[fleet.name] = tensors | records
    return found | {path.name: _timeless(json.loads(path.read_text())) for path in (*directory.glob("*.json"), *directory.glob("measures/*/*"))}


def _load(fleet: Path, file: str) -> dict[str, torch.Tensor]:
    return load_file(fleet / "checkpoint" / f"{file}.safetensors")


def fails_at(count: int, function: Callable[..., Any], error: type[BaseException], *, after: bool = False) -> Callable[..., Any]:
    """The function, which raises at its call number ``count``, before (or after) it has done its work."""
    calls = 0

    def wrapped(*args: Any, **options: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == count and not after:
            raise error
        result = function(*args, **options)
        if calls == count:
            raise error
        return result

    return wrapped


@pytest.fixture
def often(monkeypatch: pytest.MonkeyPatch) -> None:
    """A checkpoint after every step."""
    monkeypatch.setattr(driver, "CHECKPOINT_EVERY", 0.0)
    monkeypatch.setattr(driver, "CHUNK_SECONDS", 0.0)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What ten runs in fleets of 4, 4 and 2 leave behind when nothing happens."""
    directory = tmp_path_factory.mktemp("whole")
    shoal.run(study_of(), directory, progress=False, max_runs_per_fleet=4)
    return facts(directory)


# --- a study in Python


def test_a_study_in_ten_lines(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = shoal.RunConfig(
        task=shoal.ModularConfig(p=7, operation="add", tokens="digits"),
        model=shoal.DecoderConfig(width=16, num_layers=1, num_heads=2, feed_forward=16),
        steps=20,
    )
    claim = shoal.Claim(
        "More steps, lower loss.", lambda rows: shoal.Sample(rows.where({"config.steps": 30}).column("final.train/loss"), bounds=(0, np.inf)), (0, 1)
    )
    study = shoal.Study(
        name="mine", question="Is it easy?", main_metric="val/loss", wanted=shoal.grid(run, {"steps": [10, 30]}, seeds=2), claims=[claim],
        figures=[shoal.curves("val/loss", by=["config.steps"])],
    )  # fmt: skip
    result = shoal.run(study, tmp_path / "mine")
    frame = result.frame()
    assert len(frame) == 4 and set(frame["status"]) == {"completed"} and sorted(frame["steps"]) == [10, 10, 30, 30]
    assert frame.groupby("config.steps")["final.train/loss"].mean().is_monotonic_decreasing
    assert [(claim["claim"], claim["n"]) for claim in result.claims] == [("More steps, lower loss.", 2)]
    best = result.load()
    assert best.id == frame.loc[frame["final.val/loss"].idxmin(), "id"]
    assert len(shoal.generate(best, "3+4=")) == 1
    assert result.report == tmp_path / "mine" / "report.html" and "More steps, lower loss." in result.report.read_text()
    printed = capsys.readouterr()
    assert printed.out == "" and "mine: 4 runs in 1 fleet on cpu; results go to" in printed.err and "4 runs; taking the best by val/loss" in printed.err


def test_quiet(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shoal.run(study_of(), tmp_path, progress=False)
    assert capsys.readouterr() == ("", "")


def test_the_public_names_are_there() -> None:
    for name in dir(shoal):
        assert getattr(shoal, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'grit'"):
        shoal.grit  # noqa: B018


def test_a_run_has_one_id_however_its_numbers_are_written(tmp_path: Path) -> None:
    """1 for 1.0 and lists for tuples, as people write them in Python; resumed by what was read from files."""
    loose = with_values(RUN, {"optimizer": AdamW(lr=1, wd=0), "evaluate": ["train", "val"]})
    shoal.run(study_of(lambda rows: [loose]), tmp_path, progress=False)
    (tmp_path / "fleets" / driver.fleet_id([replace(RUN, optimizer=AdamW(lr=1.0, wd=0.0))]) / "done").unlink()
    shoal.run(study_of(lambda rows: [loose]), tmp_path, progress=False)
    assert len(list(tmp_path.glob("fleets/*"))) == 1 and len(Store.read(tmp_path).rows()) == 1


# --- interrupted and resumed


def interruptions(monkeypatch: pytest.MonkeyPatch) -> dict[str, Callable[[], None]]:
    advance, save, start, measure = Fleet.advance, checkpoint.save, Store.start_fleet, Store.add_measure
    return {
        "in a step": lambda: monkeypatch.setattr(Fleet, "advance", fails_at(9, advance, KeyboardInterrupt)),
        "after a step whose rows are lost": lambda: monkeypatch.setattr(Fleet, "advance", fails_at(9, advance, KeyboardInterrupt, after=True)),
        "before the first checkpoint": lambda: monkeypatch.setattr(Fleet, "advance", fails_at(2, advance, KeyboardInterrupt)),
        "between rows and the first checkpoint": lambda: monkeypatch.setattr(checkpoint, "save", fails_at(1, save, RuntimeError)),
        "between rows and checkpoint": lambda: monkeypatch.setattr(checkpoint, "save", fails_at(5, save, RuntimeError)),
        "after a checkpoint": lambda: monkeypatch.setattr(checkpoint, "save", fails_at(5, save, RuntimeError, after=True)),
        "between fleets": lambda: monkeypatch.setattr(Store, "start_fleet", fails_at(2, start, KeyboardInterrupt)),
        "in the last fleet": lambda: monkeypatch.setattr(Fleet, "advance", fails_at(30, advance, MemoryError)),
        "while measuring": lambda: monkeypatch.setattr(Store, "add_measure", fails_at(6, measure, KeyboardInterrupt)),
    }


@pytest.mark.parametrize("when", interruptions(pytest.MonkeyPatch()))
def test_resumed_is_uninterrupted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, often: None, whole: dict[str, Any], when: str) -> None:
    """The same fleets, and bitwise the same rows, parameters, moments, measures, results and claims."""
    with monkeypatch.context() as patch:
        interruptions(patch)[when]()
        with pytest.raises((KeyboardInterrupt, RuntimeError, MemoryError)):
            shoal.run(study_of(), tmp_path, progress=False, max_runs_per_fleet=4)
    assert not (tmp_path / "report.html").exists()
    shoal.run(study_of(), tmp_path, progress=False, max_runs_per_fleet=4)
    assert facts(tmp_path) == whole


def test_resumed_with_smaller_fleets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was begun stays one fleet; only what was not is cut anew, and no run is trained twice."""
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(driver, "CHECKPOINT_EVERY", 0.0)
        patch.setattr(Fleet, "advance", fails_at(9, Fleet.advance, KeyboardInterrupt))
        shoal.run(study_of(), tmp_path, progress=False, max_runs_per_fleet=4)
    result = shoal.run(study_of(), tmp_path, progress=False, max_runs_per_fleet=3)
    assert [len(fleet["runs"]) for fleet in Store.read(tmp_path).fleets()] == [4, 4, 1, 1]
    assert len({row["id"] for row in result.rows}) == len(result.rows) == 10


def test_ctrl_c_waits_for_the_chunk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, whole: dict[str, Any]) -> None:
    """A signal in the middle of a step: the chunk is finished and saved, so nothing is lost. Afterwards the handler is Python's own again."""
    monkeypatch.setattr(driver, "CHUNK_SECONDS", 0.0)
    step, calls = Fleet._one_step, 0

    def interrupted(fleet: Fleet) -> Any:
        nonlocal calls
        calls += 1
        if calls == 6:
            signal.raise_signal(signal.SIGINT)
        return step(fleet)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Fleet, "_one_step", interrupted)
        shoal.run(study_of(), tmp_path, progress=False, max_runs_per_fleet=4)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    [state] = tmp_path.glob("fleets/*/checkpoint/fleet.json")
    assert json.loads(state.read_text())["step"] == 6
    shoal.run(study_of(), tmp_path, progress=False, max_runs_per_fleet=4)
    assert facts(tmp_path) == whole


def test_ctrl_c_twice_stops_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, whole: dict[str, Any]) -> None:
    step = Fleet._one_step

    def interrupted(fleet: Fleet) -> Any:
        if fleet.step == 5:
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGINT)
        return step(fleet)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Fleet, "_one_step", interrupted)
        shoal.run(study_of(), tmp_path, progress=False, max_runs_per_fleet=4)
    assert not list(tmp_path.glob("fleets/*/checkpoint")), "a torn step is not saved"
    shoal.run(study_of(), tmp_path, progress=False, max_runs_per_fleet=4)
    assert facts(tmp_path) == whole


def test_a_finished_study_trains_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    first = shoal.run(study_of(), tmp_path, progress=False)
    before = hashes(tmp_path)
    (tmp_path / "report.html").write_text("old")
    for function in ("build", "advance"):
        monkeypatch.setattr(Fleet, function, fails_at(1, getattr(Fleet, function), AssertionError))
    again = shoal.run(study_of(), tmp_path)
    assert "tiny: 10 runs in 1 fleet on cpu, all trained already" in capsys.readouterr().err
    assert hashes(tmp_path) == before, "the report is written again, and is the same"
    assert again.claims == first.claims


def test_a_fleet_removed_is_trained_again(tmp_path: Path, whole: dict[str, Any]) -> None:
    """What the messages about damaged checkpoints ask for."""
    shoal.run(study_of(), tmp_path, progress=False, max_runs_per_fleet=4)
    fleet = sorted(tmp_path.glob("fleets/*"))[1]
    for path in sorted(fleet.rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() else path.unlink()
    fleet.rmdir()
    shoal.run(study_of(), tmp_path, progress=False, max_runs_per_fleet=4)
    assert facts(tmp_path) == whole


# --- refused


def test_a_changed_config_is_refused(tmp_path: Path) -> None:
    shoal.run(study_of(), tmp_path, progress=False)
    before = hashes(tmp_path)
    with pytest.raises(ConfigError) as refused:
        shoal.run(study_of(shoal.grid(replace(RUN, steps=13), RATES, seeds=6)), tmp_path, progress=False)
    message = str(refused.value)
    assert "  steps: 12 -> 13\n" in message and "  seeds.init: [0, 1, 2, 3, 4] -> [0, 1, 2, 3, 4, 5]\n" in message and '  runs: "10, hash ' in message
    assert message.startswith(f"out: {tmp_path} holds this study with other settings:") and message.endswith("Or go on with the old one: set these back.")
    assert hashes(tmp_path) == before


def test_other_combinations_of_the_same_values_are_refused(tmp_path: Path) -> None:
    def pairs(*values: tuple[float, float]) -> Any:
        return lambda rows: [replace(RUN, optimizer=AdamW(lr=lr, wd=wd)) for lr, wd in values]

    shoal.run(study_of(pairs((0.1, 0.0), (0.1, 1.0), (0.01, 0.0))), tmp_path, progress=False)
    with pytest.raises(ConfigError, match=r'other settings:\n  runs: "3, hash \w+" -> "3, hash \w+"\n'):
        shoal.run(study_of(pairs((0.1, 0.0), (0.01, 1.0), (0.1, 1.0))), tmp_path, progress=False)


def test_changed_claims_are_refused_and_told(tmp_path: Path) -> None:
    shoal.run(study_of(), tmp_path, progress=False)
    before = hashes(tmp_path)
    easier = study_of(claims=[shoal.Claim("It learns.", accuracy, (0.0, 1.0))])
    with pytest.raises(ConfigError, match=r'claim "It learns.": "holds in \[0.9, 1.0\], hash \w+" -> "holds in \[0.0, 1.0\], hash \w+"'):
        shoal.run(easier, tmp_path, progress=False)
    assert hashes(tmp_path) == before
    assert "Not as it was hashed before training: It learns." in shoal.report(tmp_path, easier).read_text()
    assert "Not as it was hashed" not in shoal.report(tmp_path, study_of()).read_text()


def test_another_study_is_refused(tmp_path: Path) -> None:
    shoal.run(study_of(), tmp_path, progress=False)
    before = hashes(tmp_path)
    with pytest.raises(ConfigError, match="holds the study tiny, not other; choose another --out"):
        shoal.run(study_of(name="other"), tmp_path, progress=False)
    with pytest.raises(ConfigError, match="holds the study 'tiny', not 'other'; give its own"):
        shoal.report(tmp_path, study_of(name="other"))
    assert hashes(tmp_path) == before


@pytest.mark.parametrize(
    ("study", "options", "message"),
    [
        (lambda: study_of(lambda rows: []), {}, "tiny wants no runs; give at least one seed"),
        (lambda: study_of(main_metric="val/acuracy"), {}, "main_metric: tiny is judged by val/acuracy, which is not measured; add it to evaluate, or lead"),
        (lambda: study_of(lambda rows: [replace(RUN, evaluate=("train", "vla"))]), {}, "no split 'vla'; it has train, val, test"),
        (lambda: study_of(lambda rows: [replace(RUN, steps=12.5)]), {}, "steps: expected a whole number, not 12.5"),
        (lambda: study_of(shoal.grid(RUN, {"optimizer.learning_rate": [1.0]})), {}, "grid.optimizer.learning_rate: unknown key; did you mean lr?"),
        (lambda: study_of(shoal.grid(RUN, {"optimizer.lr": ["high"]})), {}, 'grid.optimizer.lr: expected a number, not "high"'),
        (lambda: study_of(shoal.grid(RUN, seeds=0)), {}, "seeds: at least 1 seed is needed, not 0"),
        (study_of, {"device": "gpu"}, "device: 'gpu' is not one of auto, cpu, cuda"),
        (study_of, {"compile": "yes"}, "compile: 'yes' is not one of auto, on, off"),
        (study_of, {"max_runs_per_fleet": 0}, "max_runs_per_fleet: must be 1 or more, not 0"),
    ],
)
def test_refused_before_anything_is_written(tmp_path: Path, study: Callable[[], Study], options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as refused:
        shoal.run(study(), tmp_path / "new", progress=False, **options)
    assert message in str(refused.value)
    assert list(tmp_path.iterdir()) == []


def test_one_writer(tmp_path: Path) -> None:
    def again(run: Any) -> list[dict[str, Any]]:
        with pytest.raises(ConfigError, match="is being written by another process"):
            shoal.run(study_of(measures={"again": again}), tmp_path, progress=False)
        with pytest.raises(ConfigError, match="is being written by another process"):
            shoal.report(tmp_path, study_of())
        return [{"refused": True}]

    result = shoal.run(study_of(measures={"again": again}), tmp_path, progress=False)
    assert result.rows[0]["measures"]["again"] == [{"refused": True}]


# --- stages


def staged(seen: list[list[str]]) -> Study:
    """A grid of learning rates first; then the best of them on fresh seeds."""

    def wanted(rows: shoal.Rows) -> list[RunConfig]:
        seen.append([row["id"] for row in rows])
        first = shoal.grid(RUN, {"optimizer.lr": [1e-4, 0.1]}, seeds=3)(rows)
        if not rows:
            return list(first)
        assert {row["status"] for row in rows} == {"completed"} and all("measured" in row["measures"] for row in rows)
        losses = {cell["optimizer.lr"]: part.column("final.train/loss").mean() for cell, part in rows.groups(["optimizer.lr"])}
        best = min(losses, key=losses.__getitem__)
        assert best == 0.1
        return [*first, *(with_seed(replace(RUN, optimizer=AdamW(lr=best)), seed) for seed in range(100, 103))]

    return study_of(wanted)


@pytest.fixture(scope="module")
def stages(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[list[str]], dict[str, Any]]:
    """The rows each call of ``wanted`` saw, and what the study left behind, when nothing happened."""
    directory = tmp_path_factory.mktemp("stages")
    shoal.run(staged(seen := []), directory, progress=False, max_runs_per_fleet=2)
    assert [len(ids) for ids in seen] == [0, 6, 9]
    return seen, facts(directory)


@pytest.mark.parametrize("fleet", [1, 3, 4, 5])
@pytest.mark.parametrize("within", [False, True], ids=["before", "within"])
def test_stages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stages: tuple[list[list[str]], dict[str, Any]], fleet: int, within: bool) -> None:
    """Stage two (fleets 4 and 5) reads the results of stage one (1 to 3), all of them and only them, also when resumed."""
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        place = (checkpoint, "save") if within else (Store, "start_fleet")
        patch.setattr(*place, fails_at(fleet, getattr(*place), KeyboardInterrupt, after=within))
        shoal.run(staged([]), tmp_path, progress=False, max_runs_per_fleet=2)
    shoal.run(staged(seen := []), tmp_path, progress=False, max_runs_per_fleet=2)
    assert (seen, facts(tmp_path)) == stages


def test_runs_that_a_measure_does_not_ask_for_are_not_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded: list[int] = []
    load = checkpoint.load_run
    monkeypatch.setattr(checkpoint, "load_run", lambda config, *where: loaded.append(config.seeds.split) or load(config, *where))
    measures = {"of one": Only(lambda run: [{"split": run.config.seeds.split}], lambda config: config.seeds.split == 1)}
    result = shoal.run(study_of(shoal.grid(RUN, seeds=3), measures=measures), tmp_path, progress=False)
    assert loaded == [1]
    assert [row["measures"]["of one"] for row in result.rows] == [[], [{"split": 1}], []]


# --- fleets


@pytest.mark.parametrize("masked", [False, True], ids=["plain", "masked"])
def test_too_little_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], masked: bool) -> None:
    """Halved until it fits; what did not fit is gone by then; every run is there, and is what it is in one fleet."""
    advance, build, alive = Fleet.advance, Fleet.build, weakref.WeakSet()

    def small(fleet: Fleet, steps: int) -> Any:
        try:
            if len(fleet.runs) > 2:
                raise torch.OutOfMemoryError("CUDA out of memory")
        finally:
            if len(fleet.runs) > 2 and masked:
                raise RuntimeError("CUDA error: operation failed due to a previous error during capture")
        return advance(fleet, steps)

    def watched(*args: Any, **options: Any) -> Fleet:
        assert len([fleet for fleet in alive if len(fleet.runs) > 2]) == 0, "the fleet that did not fit still holds its memory"
        alive.add(fleet := build(*args, **options))
        return fleet

    monkeypatch.setattr(Fleet, "advance", small)
    monkeypatch.setattr(Fleet, "build", watched)
    result = shoal.run(study_of(shoal.grid(RUN, seeds=5)), tmp_path / "small")
    assert [len(fleet["runs"]) for fleet in Store.read(tmp_path / "small").fleets()] == [2, 1, 2]
    assert "fleet 1/1, 5 runs: does not fit into memory; training it as two fleets" in capsys.readouterr().err
    monkeypatch.undo()
    expected = shoal.run(study_of(shoal.grid(RUN, seeds=5)), tmp_path / "whole", progress=False)
    assert {row["id"] for row in result.rows} == {row["id"] for row in expected.rows}
    for row in result.rows:
        [other] = expected.rows.where({"id": row["id"]})
        assert row["status"] == other["status"] and row["final.val/loss"] == pytest.approx(other["final.val/loss"], rel=1e-5)


def test_memory_that_others_hold(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Beside other workers a fleet waits for a quarter of the GPU and is not halved; where none of it becomes free, it is."""
    advance = Fleet.advance
    monkeypatch.setattr(driver.multiprocessing, "parent_process", lambda: "the study's")
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(driver.time, "sleep", lambda seconds: None)
    for name, free, sizes in (("waits", [10, 10, 30, 40], [3]), ("alone", [90], [1, 2]), ("in vain", [10, 10], [1, 2])):
        left = list(free)

        def memory(left: list[int] = left) -> tuple[int, int]:
            return (left.pop(0) if len(left) > 1 else left[0]), 100

        def small(fleet: Fleet, steps: int, left: list[int] = left) -> Any:
            if len(fleet.runs) > 2 and left[0] != 40:
                raise RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`")
            return advance(fleet, steps)

        monkeypatch.setattr(torch.cuda, "mem_get_info", memory)
        monkeypatch.setattr(driver, "PATIENCE", 0.01 if name == "in vain" else 600)
        monkeypatch.setattr(Fleet, "advance", small)
        shoal.run(study_of(shoal.grid(RUN, seeds=3)), tmp_path / name)
        assert [len(fleet["runs"]) for fleet in Store.read(tmp_path / name).fleets()] == sizes
        assert ("waiting for memory that other fleets on this GPU hold" in capsys.readouterr().err) == (name != "alone")


def test_another_error_is_not_taken_for_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Fleet, "advance", fails_at(1, Fleet.advance, RuntimeError))
    with pytest.raises(RuntimeError):
        shoal.run(study_of(), tmp_path, progress=False)


def test_too_little_memory_for_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Its batches are worked through in more pieces, to the same result, also when resumed; until there are no more."""
    advance, run = Fleet.advance, replace(RUN, batch_size=32)

    def small(fleet: Fleet, steps: int, pieces: int = 4) -> Any:
        if fleet.accumulate < pieces:
            raise torch.OutOfMemoryError
        return advance(fleet, steps)

    expected = shoal.run(study_of(lambda rows: [run]), tmp_path / "whole", progress=False)
    monkeypatch.setattr(Fleet, "advance", fails_at(5, small, KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        shoal.run(study_of(lambda rows: [run]), tmp_path / "pieces")
    assert "a batch of 32 does not fit into memory; working through it in 4 pieces, whose gradients are added up" in capsys.readouterr().err
    monkeypatch.setattr(Fleet, "advance", small)
    result = shoal.run(study_of(lambda rows: [run]), tmp_path / "pieces", progress=False)
    assert result.rows[0]["final.val/loss"] == pytest.approx(expected.rows[0]["final.val/loss"], rel=1e-4)
    monkeypatch.setattr(Fleet, "advance", lambda fleet, steps: small(fleet, steps, pieces=64))
    with pytest.raises(ConfigError, match="one run does not fit into the GPU's memory; make the model or its sequences smaller"):
        shoal.run(study_of(lambda rows: [run]), tmp_path / "none", progress=False)


def test_halves_are_resumed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, often: None) -> None:
    advance = Fleet.advance

    def small(fleet: Fleet, steps: int) -> Any:
        if len(fleet.runs) > 2:
            raise torch.OutOfMemoryError
        return advance(fleet, steps)

    study = study_of(shoal.grid(RUN, seeds=4))
    monkeypatch.setattr(Fleet, "advance", small)
    shoal.run(study, tmp_path / "whole", progress=False)
    for calls in (8, 20):
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(Fleet, "advance", fails_at(calls, small, KeyboardInterrupt))
            shoal.run(study, tmp_path / str(calls), progress=False)
        shoal.run(study, tmp_path / str(calls), progress=False)
        assert facts(tmp_path / str(calls)) == facts(tmp_path / "whole")


def test_max_runs_per_fleet(tmp_path: Path) -> None:
    shoal.run(study_of(), tmp_path, progress=False, max_runs_per_fleet=3)
    assert [len(fleet["runs"]) for fleet in Store.read(tmp_path).fleets()] == [3, 3, 3, 1]


def test_measures_compute_where_the_study_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also beside a GPU that is someone else's."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    result = shoal.run(study_of(measures={"where": lambda run: [{"device": measuring_device()}]}, claims=[]), tmp_path, progress=False, device="cpu")
    assert {where["device"] for row in result.rows for where in row["measures"]["where"]} == {"cpu"} and measuring_device() == "cuda"


@pytest.mark.parametrize(("argument", "passed"), [("auto", None), ("on", True), ("off", False)])
def test_compile_reaches_the_fleet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, argument: str, passed: bool | None) -> None:
    asked, build = [], Fleet.build

    def watched(runs: Any, device: Any, *, compile: bool | None, accumulate: int | None) -> Fleet:
        asked.append(compile)
        return build(runs, device, compile=False, accumulate=accumulate)

    monkeypatch.setattr(Fleet, "build", watched)
    shoal.run(study_of(lambda rows: [RUN]), tmp_path, progress=False, compile=argument)
    assert asked == [passed]


def test_runs_of_one_step(tmp_path: Path) -> None:
    """They have ended before their fleet is written down."""
    result = shoal.run(study_of(shoal.grid(RUN, {"steps": [1, 4]}, seeds=2)), tmp_path, progress=False)
    assert [row["steps"] for row in result.rows] == [1, 1, 4, 4] and all(row["data"] for row in result.rows)


def test_a_dead_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    result = shoal.run(study_of(shoal.grid(RUN, {"optimizer.lr": [0.01, 1e38]}, seeds=2)), tmp_path)
    assert [(row["optimizer.lr"], row["status"]) for row in result.rows] == [(0.01, "completed")] * 2 + [(1e38, "dead")] * 2
    assert "2/4 finished, 2 dead" in capsys.readouterr().err
    assert all(row["measures"]["measured"] for row in result.rows)
    assert "2 died (loss or gradient not finite)" in result.report.read_text()
    assert result.load().config.optimizer.lr == 0.01 and result.load(result.rows[3]["id"]).config.optimizer.lr == 1e38


# --- reports, measures, runs taken out


def test_reports_again_are_the_same(tmp_path: Path) -> None:
    shoal.run(study_of(figures=FIGURES), tmp_path, progress=False)
    before = hashes(tmp_path)
    assert {"report.html", "report.md", "results.json", "claims.json", "study.yaml"} < before.keys() and any(name.endswith(".svg") for name in before)
    for name in [name for name in before if name.endswith((".svg", "report.html", "report.md", "claims.json", "results.json"))]:
        (tmp_path / name).unlink()
    assert shoal.report(tmp_path, study_of(figures=FIGURES)) == tmp_path / "report.html"
    assert hashes(tmp_path) == before
    with pytest.raises(ConfigError, match=r"defined in Python, its claims and figures with it; call shoal.report\(directory, study\)"):
        shoal.report(tmp_path)


def test_a_report_of_an_unfinished_study(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, often: None) -> None:
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Fleet, "advance", fails_at(9, Fleet.advance, KeyboardInterrupt))
        shoal.run(study_of(), tmp_path, progress=False, max_runs_per_fleet=4)
    text = shoal.report(tmp_path, study_of()).read_text()
    assert "4 of 10 runs are in fleets still training, 6 have not started" in text
    assert json.loads((tmp_path / "claims.json").read_text())[0]["verdict"] == "undecided"
    assert shoal.load(tmp_path).config.task == RUN.task, "as far as its checkpoint goes"


def test_measures_are_kept_and_new_ones_made_up_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    result = shoal.run(study_of(), tmp_path, progress=False)
    for row in result.rows:
        run = result.load(row["id"])
        assert row["measures"] == {"measured": measured(run)} and run.id == row["id"]
        assert shoal.evaluate(run, "val")["loss"] == pytest.approx(row["final.val/loss"], rel=1e-5)
    seen: list[str] = []

    def width(run: Any) -> list[dict[str, Any]]:
        seen.append(run.id)
        return [{"width": run.config.model.hidden[0]}]

    monkeypatch.setattr(Fleet, "build", fails_at(1, Fleet.build, AssertionError))
    more = shoal.run(study_of(measures={"measured": fails_at(1, measured, AssertionError), "width": width}), tmp_path, progress=False)
    assert all(row["measures"].keys() == {"measured", "width"} for row in more.rows)
    assert sorted(seen) == sorted(row["id"] for row in more.rows), "each once, and what was measured not again"


def test_load(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    result = shoal.run(study_of(), tmp_path / "study", progress=False)
    accuracies = result.rows.column("final.val/accuracy")
    best = shoal.load(tmp_path / "study")
    assert best.id == result.rows[int(np.argmax(accuracies))]["id"], "the first of equals"
    assert capsys.readouterr() == ("", f"10 runs; taking the best by val/accuracy: {tmp_path / 'study'}:{best.id}\n")
    other = result.rows[3]["id"]
    assert shoal.load(f"{tmp_path / 'study'}:{other}").id == other and capsys.readouterr() == ("", "")
    with pytest.raises(ConfigError, match=r"has no run 'abc'; it has [0-9a-f, ]+ \.\.\."):
        shoal.load(f"{tmp_path / 'study'}:abc")
    with pytest.raises(ConfigError, match="is not a study"):
        shoal.load(tmp_path)


def test_the_best_by_a_loss_and_by_a_best_value(tmp_path: Path) -> None:
    for name, metric, choose in (("loss", "val/loss", np.argmin), ("best", "best.val/loss", np.argmin), ("accuracy", "final.train/accuracy", np.argmax)):
        result = shoal.run(study_of(main_metric=metric, measures={}), tmp_path / name, progress=False)
        key = metric if metric.startswith(("best.", "final.")) else f"final.{metric}"
        assert result.load().id == result.rows[int(choose(result.rows.column(key)))]["id"]


def test_train(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = replace(RUN, stop_metric="train/accuracy", stop_at=0.0, stop_evaluations=2)
    result = driver.train(config, tmp_path / "one", command="shoal train one.yaml")
    assert [(row["status"], row["steps"]) for row in result.rows] == [("finished", 4)] and result.claims == []
    before = hashes(tmp_path / "one")
    assert "shoal train one.yaml" in result.report.read_text() and "figures/train-accuracy-val-accuracy.svg" in before
    assert shoal.report(tmp_path / "one") == result.report and hashes(tmp_path / "one") == before
    monkeypatch.setattr(Fleet, "build", fails_at(1, Fleet.build, AssertionError))
    driver.train(config, tmp_path / "one", command="shoal train one.yaml")
    monkeypatch.chdir(tmp_path / "one")
    driver.train(config, ".", command="shoal train one.yaml")
    assert hashes(tmp_path / "one") == before


def test_train_without_evaluation(tmp_path: Path) -> None:
    result = driver.train(replace(RUN, task=MemorizeConfig(strings=("ab", "cde")), model=shoal.DecoderConfig(width=16, num_heads=2), evaluate=()), tmp_path)
    assert 0 < result.rows[0]["final.batch/loss"] < 3 and "batch-loss" in result.report.read_text()


def test_dropped_rows_are_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = replace(RUN, task=ModularConfig(p=9, operation="div", val_fraction=0.3))
    shoal.run(study_of(shoal.grid(run, {"task.train_fraction": [0.4, 0.5]}, seeds=2)), tmp_path)
    assert capsys.readouterr().err.count("note: 18 of 72 rows are left out: b shares a factor with 9, so it has no inverse\n") == 1


# --- progress


def a_fleet(step: int, runs: int = 8, **summary: float) -> Any:
    return SimpleNamespace(step=step, last_step=3000, runs=[None] * runs, summary_metric="val/accuracy", summary={"finished": 3, "dead": 0, **summary})


def test_a_line_of_progress() -> None:
    assert progress.line(a_fleet(0), 0.0) == "step 0/3,000, 3/8 finished"
    known = {"median": 0.98765, "best": 1.0}
    assert progress.line(a_fleet(1200, **known), 41.27) == "step 1,200/3,000, val/accuracy median 0.9877 best 1, 41.3 steps/s, at most 44 s left, 3/8 finished"
    assert progress.line(a_fleet(3000, **known, dead=1), 20123.0, last=True).endswith("best 1, 20,100 steps/s, 3/8 finished, 1 dead")
    assert "val/accuracy 1, 2 steps/s, at most 15.0 min left" in progress.line(a_fleet(1200, runs=1, **known), 2.0)


def test_plain_lines_come_now_and_then(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """The first after 3 seconds of a fleet, then every 10, and one at its end."""
    clock = 100.0
    monkeypatch.setattr(progress.time, "perf_counter", lambda: clock)
    with progress.FleetProgress(True) as shown:
        for second in range(30):
            clock = 100.0 + second
            shown.update("fleet 1/1", a_fleet(10 * second))
        shown.update("fleet 1/1", a_fleet(300), last=True)
    lines = capsys.readouterr().err.splitlines()
    assert [line.split(",")[0] for line in lines] == ["fleet 1/1: step 40/3", "fleet 1/1: step 150/3", "fleet 1/1: step 260/3", "fleet 1/1: step 300/3"]
    assert "10 steps/s" in lines[1] and "at most 4.8 min left" in lines[1]


def test_a_bar_in_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = io.StringIO()
    monkeypatch.setattr(progress, "Console", lambda stderr: Console(file=screen, force_terminal=True, width=100))
    with progress.FleetProgress(True) as shown:
        shown.note("study [1]: begins")
        shown.update("fleet 1/2", a_fleet(300, median=0.5, best=0.6))
        shown.update("fleet 2/2", a_fleet(3000, median=0.5, best=0.6), last=True)
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", screen.getvalue())
    assert "study [1]: begins" in text
    assert "fleet 1/2: step 300/3,000, val/accuracy median 0.5 best 0.6" in text and "fleet 2/2: step 3,000/3,000" in text
