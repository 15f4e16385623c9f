"""The files a study writes: ``runs/<study>/`` with study.yaml, fleets/<id>/ and measures/.

Every file appears whole or not at all (temporary name, fsync, rename), so a kill at any moment leaves a directory that can be read and resumed.
Nothing that was measured is overwritten. Checkpoints are the driver's, reports are report.py's.

    with (store := Store.open("runs/grokking", record)).lock():
        store.start_fleet("0a1b", {"runs": [{"id": ..., "config": ...}], ...}); store.append("0a1b", table); store.finish_fleet("0a1b", outcome)
    Store.read("runs/grokking").rows()
"""

from __future__ import annotations

import fcntl
import json
import math
import os
import socket
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import yaml

from shoal.config.fields import ConfigError
from shoal.results.rows import Metrics, Row, Rows

Table = dict[str, np.ndarray]  # "step" int64 [n], "run" int64 [n] (place in the fleet's list of runs at its birth), metrics float32 [n], NaN = not recorded


def plain(value: Any) -> Any:
    """JSON values only: numpy to Python, tuples to lists, keys to text, and what is not finite to null (JSON has no NaN and no infinity)."""
    match value:
        case Mapping():
            return {str(key): plain(v) for key, v in value.items()}
        case np.ndarray() | np.generic():
            return plain(value.tolist())
        case list() | tuple() | set() | frozenset():
            return [plain(v) for v in value]
        case float():
            return value if math.isfinite(value) else None
        case None | bool() | int() | str():
            return value
    return str(value)  # paths, dates, devices


def write_atomic(path: Path, data: bytes) -> None:
    """The file is the old one or the new one, whole, whatever happens in between."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")  # hidden: no reader's pattern matches it
    with open(temporary, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)  # the rename itself
    finally:
        os.close(folder)


def write_json(path: Path, value: Any) -> None:
    write_atomic(path, (json.dumps(plain(value), indent=1, allow_nan=False, ensure_ascii=False) + "\n").encode())


def read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(str(path), f"cannot be read ({error}); restore it from a copy, or start again with another --out") from error


def difference(old: Any, new: Any, path: str = "") -> list[str]:
    """One line "path: old -> new" for everything that is not the same."""
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        keys = list(dict.fromkeys([*old, *new]))
        return [line for key in keys for line in difference(old.get(key, _ABSENT), new.get(key, _ABSENT), f"{path}.{key}" if path else str(key))]
    show = [side if side is _ABSENT else json.dumps(side, ensure_ascii=False) for side in (old, new)]
    return [] if show[0] == show[1] else [f"{path}: {show[0]} -> {show[1]}"]


_ABSENT = "(absent)"


def _claims(record: Mapping[str, Any]) -> dict[str, str]:
    """Claims by their text, so that a difference names the claim and not its place; the hash shows that its source changed."""
    return {f'"{claim["claim"]}"': f"holds in {claim['holds']}, hash {claim['hash'][:10]}" for claim in record.get("claims") or ()}


class Store:
    """One study's directory. Open it to write, read it to report."""

    def __init__(self, directory: Path, record: dict[str, Any]) -> None:
        self.directory, self.record = directory, record

    @classmethod
    def open(cls, directory: str | Path, record: Mapping[str, Any]) -> Store:
        """Create the study, or resume it: then ``record["config"]`` and ``record["claims"]`` must be what they were.

        ``record`` is the resolved config, preset, claims with their hashes, versions, device, git state. What study.yaml already says stays.
        """
        path, new = Path(directory), plain(record)
        study = path / "study.yaml"
        try:
            path.mkdir(parents=True, exist_ok=True)
            if study.exists():
                return cls._resume(path, new)
            if any(not entry.name.startswith(".") for entry in path.iterdir()):
                raise ConfigError("out", f"{path} is occupied: it is not empty and holds no study.yaml; choose another --out, or an empty directory")
            write_atomic(study, yaml.safe_dump(new, sort_keys=False, allow_unicode=True, width=120).encode())
        except OSError as error:
            raise ConfigError("out", f"cannot write to {path} ({error.strerror or error}); choose another --out") from error
        return cls(path, new)

    @classmethod
    def _resume(cls, path: Path, new: dict[str, Any]) -> Store:
        store = cls.read(path)
        old = store.record
        if old.get("study") != new.get("study"):
            raise ConfigError("out", f"{path} holds the study {old.get('study')}, not {new.get('study')}; choose another --out")
        lines = difference(old.get("config") or {}, new.get("config") or {}) + [f"claim {line}" for line in difference(_claims(old), _claims(new))]
        if lines:
            raise ConfigError(
                "out",
                f"{path} holds this study with other settings:\n  "
                + "\n  ".join(lines)
                + "\nEither keep both: choose another --out. Or go on with the old one: set these back.",
            )
        return store

    @classmethod
    def read(cls, directory: str | Path) -> Store:
        path = Path(directory)
        if not (path / "study.yaml").is_file():
            raise ConfigError(
                "dir", f"{path} is not a study: there is no study.yaml in it; give the directory that `shoal run` wrote, for example runs/grokking"
            )
        try:
            record = yaml.safe_load((path / "study.yaml").read_text(encoding="utf-8"))
        except (OSError, ValueError, yaml.YAMLError) as error:
            raise ConfigError("dir", f"{path / 'study.yaml'} cannot be read ({error}); restore it from a copy, or choose another --out") from error
        if not isinstance(record, dict):
            raise ConfigError("dir", f"{path / 'study.yaml'} is not a study's record; restore it from a copy, or choose another --out")
        return cls(path, record)

    @contextmanager
    def lock(self) -> Iterator[Store]:
        """One writer per study directory. The system lets go of the lock when the process ends, however it ends, so no stale lock is left."""
        path = self.directory / ".lock"
        try:
            file = open(path, "a+", encoding="utf-8")  # noqa: SIM115 (closed below; "a+" keeps the other writer's name)
        except OSError as error:
            raise ConfigError("out", f"cannot write to {self.directory} ({error.strerror or error}); choose another --out") from error
        with file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                file.seek(0)
                who = file.read().strip() or "unknown"
                raise ConfigError(
                    "out", f"{self.directory} is being written by another process ({who}); wait for it, end it, or choose another --out"
                ) from error
            file.truncate(0)
            file.write(f"process {os.getpid()} on {socket.gethostname()}")
            file.flush()
            yield self

    # Fleets

    def fleet_directory(self, fleet: str) -> Path:
        return self.directory / "fleets" / fleet

    def start_fleet(self, fleet: str, record: Mapping[str, Any]) -> dict[str, Any]:
        """Write fleet.json, or return the one that is there: its measured choices (device, R, compiled) are to be used again."""
        path = self.fleet_directory(fleet) / "fleet.json"
        if path.exists():
            there = read_json(path)
            if [run["id"] for run in there["runs"]] != [run["id"] for run in record["runs"]]:
                raise ConfigError("out", f"{path} was written for other runs; choose another --out")
            return there
        written = {"id": fleet, "order": [len(list(self.directory.glob("fleets/*/fleet.json")))], **plain(record)}
        write_json(path, written)
        return written

    def _parts(self, fleet: str) -> list[Path]:
        return sorted((self.fleet_directory(fleet) / "metrics").glob("part-*.parquet"))

    def append(self, fleet: str, table: Table) -> int:
        """One more part of metric rows. Returns the number of parts there are now, which a checkpoint remembers for truncate()."""
        lengths = {name: len(column) for name, column in table.items()}
        assert len(set(lengths.values())) == 1 and {"step", "run"} <= set(lengths), f"columns of one length with step and run, not {lengths}"
        number = len(self._parts(fleet))
        columns = {name: np.asarray(column, np.int64 if name in ("step", "run") else np.float32) for name, column in table.items()}
        sink = pa.BufferOutputStream()
        pq.write_table(pa.table(columns), sink, compression="zstd", use_dictionary=["step", "run"])  # pyright: ignore[reportArgumentType] (its stub knows only bool)
        write_atomic(self.fleet_directory(fleet) / "metrics" / f"part-{number:06d}.parquet", sink.getvalue().to_pybytes())
        return number + 1

    def truncate(self, fleet: str, parts: int) -> None:
        """Drop the parts written after a checkpoint that knew ``parts`` of them: training goes on from there and writes them again."""
        there = self._parts(fleet)
        if len(there) < parts:
            raise ConfigError(
                "out",
                f"{self.fleet_directory(fleet)} has {len(there)} metric parts, its checkpoint knows {parts}; restore them from a copy, or choose another --out",
            )
        for path in reversed(there[parts:]):  # from the end, so that a kill leaves no gap
            path.unlink()

    def finish_fleet(self, fleet: str, outcome: Mapping[str, Any]) -> None:
        """``outcome``: {"runs": [{"status", "steps", "seconds"} per run], "seconds", "rate", ...}."""
        write_json(self.fleet_directory(fleet) / "done", outcome)

    def fleets(self) -> list[dict[str, Any]]:
        """Every fleet's record in the order of their plan, with "done" (its outcome, or None while unfinished) and "parts"."""
        records = []
        for path in self.directory.glob("fleets/*/fleet.json"):
            done = path.with_name("done")
            records.append(read_json(path) | {"done": read_json(done) if done.exists() else None, "parts": len(self._parts(path.parent.name))})
        return sorted(records, key=lambda record: (record["order"], record["id"]))

    # Measures: what is looked at after training

    def add_measure(self, run: str, name: str, rows: Sequence[Mapping[str, Any]]) -> None:
        write_json(self.directory / "measures" / quote(name, safe="") / f"{run}.json", list(rows))

    def measures(self, run: str) -> dict[str, list[dict[str, Any]]]:
        return {unquote(path.parent.name): read_json(path) for path in sorted(self.directory.glob(f"measures/*/{run}.json"))}

    def measured(self, name: str) -> set[str]:
        """The runs that have this measure."""
        return {path.stem for path in (self.directory / "measures" / quote(name, safe="")).glob("*.json")}

    def rows(self) -> Rows:
        """What is there now. Metrics and measures are read when first asked for."""
        rows = []
        for fleet in self.fleets():
            metrics = Metrics(self._parts(fleet["id"]), len(fleet["runs"]))
            outcomes = fleet["done"]["runs"] if fleet["done"] else [{"status": "running"}] * len(fleet["runs"])
            data, model = fleet.get("data") or [{}] * len(fleet["runs"]), fleet.get("model") or {}
            flops = model.get("flops") or {}
            for i, (run, outcome) in enumerate(zip(fleet["runs"], outcomes, strict=True)):
                own = {
                    "id": run["id"],
                    "fleet": fleet["id"],
                    "seconds": None,
                    "data": data[i],
                    **{k: outcome[k] for k in ("status", "steps", "seconds") if k in outcome},
                }
                own |= {"parameters": model["parameters"]} if "parameters" in model else {}
                own |= {f"flops.{part}": count for part, count in flops.items()} if isinstance(flops, dict) else {"flops": flops}
                rows.append(Row(own, run["config"], metrics, i, partial(self.measures, run["id"])))
        names = (self.record.get("config") or {}).get("variant")
        order = {name: place for place, name in enumerate(names)} if isinstance(names, list) else {}
        return Rows(sorted(rows, key=lambda row: order.get(row.get("variant"), len(order))))  # variants as the study gives them, whatever their fleets
