"""The store: create, resume, refuse, lock; no row doubled or lost, whatever the moment of a kill."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import yaml

from shoal.config import RunConfig, flatten
from shoal.config.fields import ConfigError
from shoal.results import Store
from shoal.results.store import difference, plain, write_atomic

CLAIM = {"claim": "Everything generalises.", "holds": [0.5, 1.0], "hash": "ab" * 32}
RECORD: dict[str, Any] = {
    "study": "demo",
    "preset": "quick",
    "config": {"run": {"optimizer": {"lr": 1e-5, "type": "adamw"}, "evaluate": ("train", "val"), "stop_metric": None}, "seeds": 3},
    "claims": [CLAIM],
    "versions": {"torch": "2.13.0"},
}
FLEET = {"runs": [{"id": f"run{i}", "config": flatten(RunConfig())} for i in range(3)], "choices": {"device": "cpu", "R": 3}}


def table(first: int, steps: int = 4, runs: int = 3) -> dict[str, np.ndarray]:
    step = np.repeat(np.arange(first, first + steps), runs)
    run = np.tile(np.arange(runs), steps)
    return {"step": step, "run": run, "val/loss": (step + run / 10).astype(np.float32)}


def changed(**config: Any) -> dict[str, Any]:
    return {**RECORD, "config": {**RECORD["config"], **config}}


def files(directory: Path) -> dict[str, bytes]:
    return {str(path.relative_to(directory)): path.read_bytes() for path in sorted(directory.rglob("*")) if path.is_file()}


def test_creates_and_resumes_without_writing_anything_again(tmp_path: Path) -> None:
    out = tmp_path / "runs" / "demo"
    store = Store.open(out, RECORD)
    assert yaml.safe_load((out / "study.yaml").read_text()) == plain(RECORD)
    before = files(out)
    again = Store.open(out, {**RECORD, "versions": {"torch": "3.0"}})  # a new version is no changed config
    assert again.record == store.record == Store.read(out).record
    assert again.record["versions"] == {"torch": "2.13.0"} and files(out) == before


def test_refuses_a_changed_config_with_a_readable_difference(tmp_path: Path) -> None:
    Store.open(tmp_path, RECORD)
    before = files(tmp_path)
    new = changed(seeds=8, run={"optimizer": {"lr": 1e-3, "type": "adamw"}, "evaluate": ["train"], "clip": 1.0, "stop_metric": None})
    with pytest.raises(ConfigError) as refused:
        Store.open(tmp_path, new)
    lines = str(refused.value).splitlines()
    assert [line.strip() for line in lines[1:-1]] == [
        "run.optimizer.lr: 1e-05 -> 0.001",
        'run.evaluate: ["train", "val"] -> ["train"]',
        "run.clip: (absent) -> 1.0",
        "seeds: 3 -> 8",
    ]
    assert "another --out" in lines[-1] and "set these back" in lines[-1]
    assert files(tmp_path) == before


def test_refuses_changed_claims_and_another_study(tmp_path: Path) -> None:
    Store.open(tmp_path, RECORD)
    with pytest.raises(ConfigError, match=r'claim "Everything generalises.": "holds in \[0\.5, 1\.0\], hash \w+" -> "holds in \[0\.1, 1\.0\], hash \w+"'):
        Store.open(tmp_path, {**RECORD, "claims": [{**CLAIM, "holds": [0.1, 1.0]}]})
    with pytest.raises(ConfigError, match="Nothing does"):
        Store.open(tmp_path, {**RECORD, "claims": [CLAIM, {**CLAIM, "claim": "Nothing does."}]})
    with pytest.raises(ConfigError, match="holds the study demo, not other"):
        Store.open(tmp_path, {**RECORD, "study": "other"})


def test_difference_sees_types() -> None:
    assert difference({"a": None, "b": [1]}, {"a": 0, "b": [1, 2]}) == ["a: null -> 0", "b: [1] -> [1, 2]"]
    assert difference({"a": {"b": 1}}, {"a": 3}) == ['a: {"b": 1} -> 3']
    assert difference({"a": {"b": 1.0}}, {"a": {"b": 1.0}}) == []


def test_refuses_an_occupied_place(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(ConfigError, match="occupied"):
        Store.open(tmp_path, RECORD)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]
    for place in (tmp_path / "thesis.txt", tmp_path / "thesis.txt" / "demo"):
        with pytest.raises(ConfigError, match=r"cannot write to .*choose another --out"):
            Store.open(place, RECORD)
    assert (tmp_path / "thesis.txt").read_text() == "mine"


def test_refuses_an_unwritable_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def denied(*_: Any, **__: Any) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "mkdir", denied)
    with pytest.raises(ConfigError, match=r"Permission denied.*another --out"):
        Store.open(tmp_path / "demo", RECORD)


def test_read_names_what_is_missing(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no study\.yaml in it.*shoal run"):
        Store.read(tmp_path)
    (tmp_path / "study.yaml").write_text("config: [1, 2")
    with pytest.raises(ConfigError, match=r"study\.yaml cannot be read"):
        Store.read(tmp_path)
    (tmp_path / "study.yaml").write_text("")
    with pytest.raises(ConfigError, match="not a study's record"):
        Store.read(tmp_path)


def test_one_writer(tmp_path: Path) -> None:
    first, second = Store.open(tmp_path, RECORD), Store.open(tmp_path, RECORD)
    with first.lock():
        with pytest.raises(ConfigError, match=f"being written by another process .process {os.getpid()}"), second.lock():
            pytest.fail("two writers")
        Store.read(tmp_path).rows()  # readers are not kept out
    with second.lock():
        pass


def test_fleet_is_started_once(tmp_path: Path) -> None:
    store = Store.open(tmp_path, RECORD)
    first = store.start_fleet("aa", FLEET)
    again = store.start_fleet("aa", {**FLEET, "choices": {"device": "cuda", "R": 1}})
    assert again == first and again["choices"] == {"device": "cpu", "R": 3}  # what was measured then is used again
    with pytest.raises(ConfigError, match="other runs"):
        store.start_fleet("aa", {"runs": FLEET["runs"][:2]})
    store.start_fleet("05", {"runs": [{"id": "late", "config": {}}]})
    assert [fleet["id"] for fleet in store.fleets()] == ["aa", "05"]  # in the order of their start


def test_parts_keep_every_value(tmp_path: Path) -> None:
    store = Store.open(tmp_path, RECORD)
    store.start_fleet("aa", FLEET)
    assert [store.append("aa", table(first)) for first in (0, 4, 8)] == [1, 2, 3]
    names = [path.name for path in sorted((tmp_path / "fleets/aa/metrics").iterdir())]
    assert names == ["part-000000.parquet", "part-000001.parquet", "part-000002.parquet"]
    part = tmp_path / "fleets/aa/metrics/part-000001.parquet"
    assert pq.ParquetFile(part).metadata.row_group(0).column(2).compression == "ZSTD"
    read = pq.read_table(part)
    assert [str(field.type) for field in read.schema] == ["int64", "int64", "float"]
    for name, column in table(4).items():
        assert np.array_equal(read[name].to_numpy(), column)
    with pytest.raises(AssertionError, match="one length"):
        store.append("aa", {"step": np.arange(3), "run": np.arange(2)})


def test_truncate_then_going_on_doubles_and_loses_nothing(tmp_path: Path) -> None:
    store = Store.open(tmp_path, RECORD)
    store.start_fleet("aa", FLEET)
    for first in (0, 4, 8, 12):
        store.append("aa", table(first))
    store.truncate("aa", 2)  # the checkpoint knew two parts
    assert store.fleets()[0]["parts"] == 2
    assert [store.append("aa", table(first, steps=8)) for first in (8,)] == [3]
    for steps, values in store.rows().curve("val/loss"):
        assert steps.tolist() == list(range(16)) and values.size == 16
    store.truncate("aa", 3)
    assert store.fleets()[0]["parts"] == 3
    with pytest.raises(ConfigError, match="has 3 metric parts, its checkpoint knows 5"):
        store.truncate("aa", 5)


def test_a_failed_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "claims.json"
    write_atomic(path, b"old")
    monkeypatch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        write_atomic(path, b"new, half wri")
    assert path.read_bytes() == b"old"


def test_kill_between_temporary_name_and_rename(tmp_path: Path) -> None:
    """A real SIGKILL just before the rename of a metrics part: the rows are those of before, the lock is free, and going on works."""
    script = """
import os, signal, sys
sys.path.insert(0, sys.argv[2])
from test_results_store import FLEET, RECORD, table
from shoal.results import Store
store = Store.open(sys.argv[1], RECORD)
with store.lock():
    store.start_fleet("aa", FLEET)
    store.append("aa", table(0))
    os.replace = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
    store.append("aa", table(4))
"""
    done = subprocess.run([sys.executable, "-c", script, str(tmp_path / "demo"), str(Path(__file__).parent)], capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    store = Store.open(tmp_path / "demo", RECORD)
    leftovers = [path for path in (tmp_path / "demo/fleets/aa/metrics").iterdir() if path.name.startswith(".")]
    assert len(leftovers) == 1  # it was killed where it should be
    with store.lock():
        assert [steps.tolist() for steps, _ in store.rows().curve("val/loss")] == [[0, 1, 2, 3]] * 3
        store.truncate("aa", 1)
        assert store.append("aa", table(4)) == 2
        assert [steps.tolist() for steps, _ in store.rows().curve("val/loss")] == [list(range(8))] * 3


def test_killed_while_being_created_is_not_occupied(tmp_path: Path) -> None:
    (tmp_path / ".study.yaml.4242").write_text("study: de")
    (tmp_path / ".lock").write_text("")
    assert Store.open(tmp_path, RECORD).record["study"] == "demo"


def test_done_measures_and_nan_as_null(tmp_path: Path) -> None:
    store = Store.open(tmp_path, RECORD)
    store.start_fleet("aa", FLEET)
    assert store.fleets()[0]["done"] is None
    outcome = {"runs": [{"status": "dead", "steps": 4, "seconds": np.float32("nan")}] * 3, "seconds": np.float64(1.5), "rate": np.int64(7)}
    store.finish_fleet("aa", outcome)
    assert json.loads((tmp_path / "fleets/aa/done").read_text()) == {"runs": [{"status": "dead", "steps": 4, "seconds": None}] * 3, "seconds": 1.5, "rate": 7}
    store.add_measure("run1", "length/accuracy", [{"length": np.int64(64), "accuracy": float("inf"), "at": (1, 2), "map": np.eye(2)}])
    assert store.rows()[1]["measures"] == {"length/accuracy": [{"length": 64, "accuracy": None, "at": [1, 2], "map": [[1.0, 0.0], [0.0, 1.0]]}]}
    assert store.rows()[0]["measures"] == {}
    assert b"NaN" not in b"".join(files(tmp_path).values())


def test_a_broken_file_is_named(tmp_path: Path) -> None:
    store = Store.open(tmp_path, RECORD)
    store.start_fleet("aa", FLEET)
    (tmp_path / "fleets/aa/done").write_text('{"runs": [')
    with pytest.raises(ConfigError, match=r"fleets/aa/done: cannot be read"):
        store.rows()
