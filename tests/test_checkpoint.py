"""What is saved comes back bit for bit; a save that fails leaves the one before it; a file that is not what it should be is refused, and never run."""

from __future__ import annotations

import json
import pickle
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from laws import same
from laws_training import FLEETS, everything, facts, finished
from safetensors.torch import save_file

from shoal.config import RunConfig
from shoal.config.fields import ConfigError
from shoal.train import checkpoint
from shoal.train.checkpoint import MODEL, OPTIMIZER, STATE
from shoal.train.fleet import Fleet

RUNS = [replace(run, steps=40 if r else 9, evaluate_every=5) for r, run in enumerate(FLEETS["memorize"])]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Fleet, Path]:
    """A fleet that three runs have left, and where it is saved. Neither may be changed."""
    fleet, place = Fleet.build(RUNS), tmp_path_factory.mktemp("fleet") / "checkpoint"
    fleet.advance(7)
    fleet.keep([0, 1, 3, 4, 7])
    fleet.advance(6)
    checkpoint.save(fleet, place, {"parts": 2})
    return fleet, place


@pytest.fixture
def saved(trained: tuple[Fleet, Path], tmp_path: Path) -> Path:
    """A copy of it."""
    return Path(shutil.copytree(trained[1], tmp_path / "checkpoint"))


def assert_same(a: Fleet, b: Fleet) -> None:
    assert everything(a).keys() == everything(b).keys() and all(same(x, everything(b)[name]) for name, x in everything(a).items())
    assert a.present == b.present and a.outcomes() == b.outcomes() and (a.step, a.evaluated, a.seconds) == (b.step, b.evaluated, b.seconds)
    assert all(same(x[0], b.departed[run][0]) and x[1:] == b.departed[run][1:] for run, x in a.departed.items())


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", FLEETS)
def test_round_trip(name: str, precision: Any, tmp_path: Path) -> None:
    """Then both go on to the same bits and rows."""
    runs = [replace(run, steps=25, precision=precision) for run in FLEETS[name]]
    fleet, place = Fleet.build(runs), tmp_path / "deep" / "checkpoint"
    fleet.advance(3)
    fleet.keep([5, 6, 0])
    checkpoint.save(fleet, place, {"parts": 7, "note": "ü"})
    again, extra = checkpoint.load(runs, place, "cpu")
    assert extra == {"parts": 7, "note": "ü"} and again.departed.keys() == {1, 2, 3, 4, 7}
    assert_same(again, fleet)
    (fleet, rows), (again, same_rows) = finished(fleet), finished(again)
    assert rows == same_rows
    again.seconds = fleet.seconds
    assert_same(again, fleet)
    assert {path.name for path in place.iterdir()} == {MODEL, OPTIMIZER, STATE} and {path.name for path in place.parent.iterdir()} == {"checkpoint"}


def test_status_is_saved(trained: tuple[Fleet, Path]) -> None:
    fleet, _ = checkpoint.load(RUNS, trained[1], "cpu")
    assert_same(fleet, trained[0])
    assert fleet.outcomes()[0] == {"status": "completed", "steps": 9} and fleet.outcomes()[2] == {"status": "running", "steps": 7}


def test_load_run_is_the_run_of_the_fleet(trained: tuple[Fleet, Path]) -> None:
    """Those that have left, too, with the config and the dropout of their own."""
    fleet, place = trained
    for r, config in enumerate(RUNS):
        run, expected = checkpoint.load_run(config, r, place), fleet.one(r)
        assert run.config is config and run.id == expected.id and run.task.vocab_size == expected.task.vocab_size
        for (name, p), (other, q) in zip(sorted(run.model.named_parameters()), sorted(expected.model.named_parameters()), strict=True):
            assert name == other and same(p, q) and not p.requires_grad
        assert run.model.rate is not None and run.model.rate.item() == expected.model.rate.item() == pytest.approx(config.model.dropout)  # type: ignore[union-attr]


# --- a save that does not come to its end


def fails(after: int, function: Callable[..., Any]) -> Callable[..., Any]:
    """The function, which fails at its call number ``after``, as when the disk is full."""
    calls = iter(range(after + 1))

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        if next(calls, -1) == after:
            raise OSError("No space left on device")
        return function(*args, **kwargs)

    return wrapped


STEPS = [
    (checkpoint, "save_file", 0),
    (checkpoint, "save_file", 1),
    (Path, "write_text", 0),
    (checkpoint, "_flush", 2),
    (Path, "rename", 0),
    (Path, "rename", 1),
]


@pytest.mark.parametrize(("place", "name", "after"), STEPS)
def test_an_interrupted_save_keeps_the_old_one(
    saved: Path, trained: tuple[Fleet, Path], monkeypatch: pytest.MonkeyPatch, place: Any, name: str, after: int
) -> None:
    """Wherever it is interrupted, between the two renames too; and the next save succeeds and leaves nothing behind."""
    later, _ = checkpoint.load(RUNS, saved, "cpu")
    later.advance(3)
    with monkeypatch.context() as patch, pytest.raises(OSError, match="No space"):
        patch.setattr(place, name, fails(after, getattr(place, name)))
        checkpoint.save(later, saved, {"parts": 3})
    assert checkpoint.exists(saved)
    old, extra = checkpoint.load(RUNS, saved, "cpu")
    assert extra == {"parts": 2}
    assert_same(old, trained[0])
    assert same(checkpoint.load_run(RUNS[1], 1, saved).model.embedding.weight, old.one(1).model.embedding.weight)

    checkpoint.save(later, saved, {"parts": 3})
    new, extra = checkpoint.load(RUNS, saved, "cpu")
    assert extra == {"parts": 3} and [path.name for path in saved.parent.iterdir()] == ["checkpoint"]
    assert_same(new, later)


def test_resumed_after_a_crash_gives_the_rows_of_an_uninterrupted_run(saved: Path, trained: tuple[Fleet, Path]) -> None:
    fleet, _ = checkpoint.load(RUNS, saved, "cpu")
    first = facts(fleet.advance(9))
    again, _ = checkpoint.load(RUNS, saved, "cpu")
    assert facts(again.advance(4), again.advance(5)) == first


# --- files that are not what they should be


class Canary:
    """Unpickling it leaves a trace."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


def refusal(function: Callable[..., Any], *args: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        function(*args)
    assert caught.value.path and "\n" not in str(caught.value)
    return str(caught.value)


def readers(file: str) -> list[tuple[Callable[..., Any], Any]]:
    """What reads this file of a checkpoint."""
    return [(checkpoint.load, RUNS), *([(lambda run, place, _: checkpoint.load_run(run, 0, place), RUNS[0])] if file == MODEL else [])]


@pytest.mark.parametrize("file", [MODEL, OPTIMIZER, STATE])
@pytest.mark.parametrize("kept", [0.0, 0.002, 0.5, 0.99])
def test_cut_short(saved: Path, file: str, kept: float) -> None:
    content = (saved / file).read_bytes()
    (saved / file).write_bytes(content[: int(kept * len(content))])
    for reader, runs in readers(file):
        message = refusal(reader, runs, saved, "cpu")
        assert str(saved / file) in message and "damaged or cut short" in message and f"delete {saved.parent} " in message


@pytest.mark.parametrize("file", [MODEL, OPTIMIZER, STATE])
@pytest.mark.parametrize("protocol", [2, 3, 4, 5, "torch"])
def test_a_pickle_is_refused_and_does_not_run(saved: Path, file: str, protocol: Any) -> None:
    canary = saved.parent / "canary"
    if protocol == "torch":
        torch.save({"weight": Canary(canary)}, saved / file)
    else:
        (saved / file).write_bytes(pickle.dumps(Canary(canary), protocol))
    for reader, runs in readers(file):
        message = refusal(reader, runs, saved, "cpu")
        assert "is a pickle, which could run code when loaded; shoal reads safetensors only" in message and not canary.exists()
    pickle.loads(pickle.dumps(Canary(canary)))
    assert canary.exists(), "the trap works"


@pytest.mark.parametrize("length", [int.from_bytes(start, "little") for start in (b"\x80\x02", b"\x80\x04", b"PK")])
def test_a_good_file_may_begin_like_a_pickle(tmp_path: Path, length: int) -> None:
    """A safetensors file begins with the length of its header: of 640 bytes, say, which are the first bytes of a pickle."""
    tensors, path = {"weight": torch.arange(6.0)}, tmp_path / MODEL
    save_file(tensors, path, {"filler": ""})
    empty = int.from_bytes(path.read_bytes()[:8], "little")
    save_file(tensors, path, {"filler": "x" * (length - empty)})
    assert int.from_bytes(path.read_bytes()[:8], "little") == length
    assert checkpoint._read(path)["weight"].equal(tensors["weight"])


@pytest.mark.parametrize("file", [MODEL, OPTIMIZER])
def test_a_missing_file(saved: Path, file: str) -> None:
    (saved / file).unlink()
    for reader, runs in readers(file):
        assert str(saved / file) in (message := refusal(reader, runs, saved, "cpu")) and f"is missing; delete {saved.parent} " in message


def test_no_checkpoint(tmp_path: Path, saved: Path) -> None:
    assert not checkpoint.exists(tmp_path / "nothing") and checkpoint.exists(saved)
    (saved / STATE).unlink()
    for place in (tmp_path / "nothing", saved):
        for reader, runs in readers(MODEL):
            assert "there is no checkpoint here; the run has not been trained yet" in refusal(reader, runs, place, "cpu")


def test_nothing_but_numbers_and_json(saved: Path) -> None:
    """What another program needs to read it: names and shapes of the model, every run; the state as JSON."""
    tensors, state = checkpoint._read(saved / MODEL), json.loads((saved / STATE).read_text())
    assert tensors["blocks.0.mixer.query.weight"].shape == (8, 16, 16) and tensors["embedding.weight"].dtype == torch.float32
    assert state["step"] == 13 and state["present"] == [0, 1, 3, 4, 7] and state["extra"] == {"parts": 2}
    config: RunConfig = RUNS[0]
    assert len(checkpoint._read(saved / OPTIMIZER)["first/flat"]) == 5 and config.steps == 9
