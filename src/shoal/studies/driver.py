"""From a study to its report: plan the wanted runs, train them fleet by fleet, measure, store, judge the claims.

result = run(study, out="runs/mine")          # the same call resumes what was interrupted
result.frame(), result.claims, result.report
"""

from __future__ import annotations

import importlib
import importlib.metadata
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from shoal.config import RunConfig, StudyConfig, flatten, run_id
from shoal.config.fields import ConfigError
from shoal.config.load import structure, unstructure
from shoal.results import claims
from shoal.results.figures import curves
from shoal.results.report import write_report
from shoal.results.rows import Rows
from shoal.results.store import Store
from shoal.studies import STUDIES
from shoal.studies.progress import FleetProgress
from shoal.studies.study import Study
from shoal.train import checkpoint
from shoal.train.fleet import Fleet, Table, joined
from shoal.train.plan import fleet_id, plan, validate
from shoal.train.run import Run

CHECKPOINT_EVERY = 60.0  # seconds of training that a crash may cost
CHUNK_SECONDS = 0.5  # aimed at between two looks at the progress line
LARGEST_FLEET = 1024


@dataclass(frozen=True)
class Result:
    directory: Path
    rows: Rows
    claims: list[dict[str, Any]]
    report: Path

    def frame(self) -> Any:
        """One line per run, as a pandas DataFrame."""
        return self.rows.frame()

    def load(self, run: str | None = None) -> Run:
        """A trained run by its id; None = the best by the study's main metric."""
        return load(f"{self.directory}:{run}" if run else str(self.directory))


def run(
    study: Study, out: str | Path, *, device: str = "auto", preset: str | None = None, progress: bool = True,
    max_runs_per_fleet: int | None = None, compile: str = "auto", command: str | None = None,
) -> Result:  # fmt: skip
    """Everything the study wants that is not there yet, then its report. ``command``: how a reader repeats this, for the report."""
    device = find_device(device)
    wanted = _distinct(study.wanted(Rows([])))
    if not wanted:
        raise ConfigError("study", f"{study.name} wants no runs; give at least one seed and one value for every grid field")
    record = _record(study, wanted, device, preset, command)
    compiled = {"auto": None, "on": True, "off": False}[compile]
    store = Store.open(out, record)
    with store.lock(), FleetProgress(progress) as shown:
        for fleet in store.fleets():
            if not fleet["done"]:
                _train(store, study, [config_of(entry["config"]) for entry in fleet["runs"]], device, compiled, shown, f"fleet {fleet['order'] + 1}, resumed")
        known = {entry["id"] for fleet in store.fleets() for entry in fleet["runs"]}
        while new := [config for config in wanted if run_id(config) not in known]:
            groups = plan(new, max_runs_per_fleet or LARGEST_FLEET)
            for number, runs in enumerate(groups):
                _train(store, study, runs, device, compiled, shown, f"fleet {number + 1} of {len(groups)}, {len(runs)} run{'s' if len(runs) > 1 else ''}")
            known |= {run_id(config) for config in new}
            wanted = _distinct(study.wanted(store.rows()))
        return _report(store, study)


def train(config: RunConfig, out: str | Path, *, device: str = "auto", command: str | None = None) -> Result:
    """One run, with a report and no claims."""
    metric = config.stop_metric or (f"{config.evaluate[-1]}/loss" if config.evaluate else "batch/loss")
    return run(_single(Path(out).name, metric, [config]), out, device=device, command=command)


def report(directory: str | Path, study: Study | None = None) -> Path:
    """Write a study's report again from what is stored. A study defined in Python must be given for its claims and figures."""
    store = Store.read(directory)
    record = store.record
    if study is None and record.get("settings") and record["study"] in STUDIES:
        study = importlib.import_module(STUDIES[record["study"]]).study(structure(StudyConfig, record["settings"]))
    if study is None and record.get("claims"):
        raise ConfigError(str(directory), "this study was defined in Python, and its claims with it; call shoal.report(directory, study)")
    with store.lock():
        return _report(store, study or _single(record["study"], record["main_metric"], [])).report


def _single(name: str, metric: str, runs: list[RunConfig]) -> Study:
    """What has no questions of its own: the curves of whatever was measured."""
    kind = metric.rpartition("/")[2]
    shown = list(dict.fromkeys(f"{split}/{kind}" for config in runs for split in config.evaluate)) or [metric]
    return Study(name=name, question="How does this run train?", main_metric=metric, wanted=lambda rows: runs, figures=[curves(shown)])


def load(path: str | Path) -> Run:
    """``DIR`` or ``DIR:ID``; with several runs and no ID the best by the study's main metric, named on standard error."""
    directory, wanted = str(path), None
    if not Path(directory).exists() and ":" in directory:
        directory, _, wanted = directory.rpartition(":")
    store = Store.read(Path(directory))
    rows = store.rows()
    metric = store.record["main_metric"]
    trained = {row["id"] for row in rows if row["status"] != "running"} or {row["id"] for row in rows}
    if not trained:
        raise ConfigError(directory, "holds no trained run yet")
    if wanted is None:
        wanted = _best(rows, metric, trained)
        if len(rows) > 1:
            print(f"{len(rows)} runs; taking the best by {metric}: {directory}:{wanted}", file=sys.stderr)
    for fleet in store.fleets():
        for place, entry in enumerate(fleet["runs"]):
            if entry["id"] == wanted:
                return checkpoint.load_run(config_of(entry["config"]), place, store.fleet_directory(fleet["id"]) / "checkpoint")
    raise ConfigError(directory, f"has no run {wanted!r}; it has {', '.join(sorted(row['id'] for row in rows)[:8])}{' ...' if len(rows) > 8 else ''}")


def find_device(name: str) -> str:
    if name not in ("auto", "cpu", "cuda"):
        raise ConfigError("device", f"{name!r} is not one of auto, cpu, cuda")
    if name == "cuda" and not torch.cuda.is_available():
        raise ConfigError("device", "no CUDA device is available; use --device cpu (or auto)")
    return ("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name


def config_of(flat: Mapping[str, Any]) -> RunConfig:
    """The inverse of ``flatten``."""
    nested: dict[str, Any] = {}
    for path, value in flat.items():
        *parents, leaf = path.split(".")
        inner = nested
        for name in parents:
            inner = inner.setdefault(name, {})
        inner[leaf] = value
    return structure(RunConfig, nested)


def _train(store: Store, study: Study, runs: Sequence[RunConfig], device: str, compiled: bool | None, shown: FleetProgress, name: str) -> None:
    """One fleet to its end, resumed where it stopped; with too little GPU memory as two of half the size."""
    identity = fleet_id(runs)
    place = store.fleet_directory(identity) / "checkpoint"
    tables: list[Table] = []
    if checkpoint.exists(place):
        fleet, extra = checkpoint.load(runs, place, device)
        store.truncate(identity, extra["parts"])
    else:
        for config in runs:
            validate(config)
        try:
            fleet = Fleet.build(runs, device, compile=compiled)
            tables.append(fleet.advance(1))
        except torch.OutOfMemoryError:
            if len(runs) == 1:
                raise ConfigError("batch_size", "one run does not fit into the GPU's memory; make the batch smaller or raise accumulate") from None
            shown.note(f"{name}: does not fit into memory; training it as two fleets")
            torch.cuda.empty_cache()
            half = len(runs) // 2
            for part, piece in enumerate((runs[:half], runs[half:])):
                _train(store, study, piece, device, compiled, shown, f"{name}, part {part + 1}")
            return
        store.start_fleet(identity, {"runs": [{"id": run_id(r), "config": flatten(r)} for r in runs], **fleet.record()})
        store.truncate(identity, 0)
    chunk, saved = 1, time.perf_counter()
    try:
        while not fleet.done:
            began = time.perf_counter()
            tables.append(fleet.advance(chunk))
            took = time.perf_counter() - began
            chunk = max(1, min(chunk * 2, round(chunk * CHUNK_SECONDS / max(took, 1e-6))))  # results do not depend on it
            shown.update(name, fleet)
            if time.perf_counter() - saved > CHECKPOINT_EVERY:
                _save(store, fleet, identity, place, tables)
                tables, saved = [], time.perf_counter()
    except KeyboardInterrupt:
        _save(store, fleet, identity, place, tables)
        raise
    _save(store, fleet, identity, place, tables)
    for number, config in enumerate(runs):
        for measure, function in study.measures.items():
            store.add_measure(run_id(config), measure, function(fleet.one(number)))
    shown.update(name, fleet, last=True)
    store.finish_fleet(identity, {"runs": fleet.outcomes(), "seconds": fleet.seconds, "steps": fleet.step})


def _save(store: Store, fleet: Fleet, identity: str, place: Path, tables: list[Table]) -> None:
    """Metrics first, then the checkpoint that counts them: a part written after the last checkpoint is dropped on resume, none is doubled."""
    parts = store.append(identity, joined(tables)) if tables else next(fleet["parts"] for fleet in store.fleets() if fleet["id"] == identity)
    checkpoint.save(fleet, place, {"parts": parts})


def _report(store: Store, study: Study) -> Result:
    report = write_report(store, study.name, study.question, study.figures, study.claims, study.main_metric)
    rows = store.rows()
    return Result(store.directory, rows, [dict(claims.judge(claim, rows)) for claim in study.claims], report)


def _distinct(runs: Sequence[RunConfig]) -> list[RunConfig]:
    return list({run_id(config): config for config in runs}.values())


def _best(rows: Rows, metric: str, among: set[str]) -> str:
    sign = 1.0 if metric.endswith("loss") else -1.0
    scored = [(sign * value, row["id"]) for row in rows if row["id"] in among and (value := row.get(f"final.{metric}")) is not None]
    return min(scored)[1] if scored else min(among)


def _record(study: Study, wanted: Sequence[RunConfig], device: str, preset: str | None, command: str | None) -> dict[str, Any]:
    """study.yaml: what must stay the same for a resume ("config", "claims"), and what helps a reader."""
    flats = [flatten(config) for config in wanted]
    paths = dict.fromkeys(path for flat in flats for path in flat)
    config: dict[str, Any] = {}
    for path in paths:
        values = list({repr(flat.get(path)): flat.get(path) for flat in flats}.values())
        config[path] = values[0] if len(values) == 1 else values
    versions = {name: importlib.metadata.version(name) for name in ("shoal", "torch", "numpy")}
    hardware = torch.cuda.get_device_name() if device == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    return {
        "study": study.name,
        "question": study.question,
        "preset": preset,
        "command": command,
        "main_metric": study.main_metric,
        "num_runs": len(wanted),
        "config": config,
        "settings": unstructure(study.config) if study.config else None,
        "claims": claims.record(study.claims),
        "versions": versions | {"python": sys.version.split()[0]},
        "device": hardware,
        "git": _git_state(),
    }


def _git_state() -> str | None:
    """Commit and whether anything is changed, of the tree shoal runs from; None outside a checkout."""
    here = Path(__file__).parent
    try:
        state = subprocess.run(["git", "-C", here, "describe", "--always", "--dirty"], capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return state.stdout.strip() or None
