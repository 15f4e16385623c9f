"""From a study to its report: plan the wanted runs, train them fleet by fleet, measure, store, judge the claims.

result = run(study, out="runs/mine")          # the same call resumes what was interrupted
result.frame(), result.claims, result.report
"""

from __future__ import annotations

import gc
import hashlib
import importlib.metadata
import multiprocessing
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from shoal import tasks
from shoal.config import LanguageConfig, ModularConfig, ModuleConfig, RunConfig, SentencesConfig, flatten, run_id
from shoal.config.fields import ConfigError, check
from shoal.config.load import config_of, structure, unstructure
from shoal.data.encoded import encoded
from shoal.inference.evaluate import tables_of
from shoal.inference.trained import Trained
from shoal.models.module import failed
from shoal.results import claims
from shoal.results.figures import curves
from shoal.results.perplexity import perplexities
from shoal.results.report import write_report
from shoal.results.rows import Row, Rows, lower_is_better
from shoal.results.store import Store
from shoal.results.tables import main_key
from shoal.results.wording import plural
from shoal.studies.measuring import measure, remade
from shoal.studies.progress import FleetProgress
from shoal.studies.study import Study
from shoal.studies.workers import Job, together
from shoal.train import checkpoint
from shoal.train.device import find_device
from shoal.train.fleet import Fleet, Table, joined
from shoal.train.flops import Counts, budgeted
from shoal.train.interventions import idle
from shoal.train.plan import fleet_id, plan, validate
from shoal.train.run import Run

CHECKPOINT_EVERY = 60.0  # seconds of training that a crash may cost ...
CHECKPOINT_SHARE = 0.05  # ... or more, where writing checkpoints would take a larger share of the time: three tables of all pairs of 17,000 tokens are 11 GB
NO_WORKSPACE = "CUBLAS_STATUS_ALLOC_FAILED"  # how a GPU that is all but full may be told, too
CROWDED = 0.7  # of a GPU's memory: where less is free when a fleet fails for want of it, its neighbours have the rest
PATIENCE = 600.0  # seconds that a fleet waits for them
CHUNK_SECONDS = 0.5  # aimed at between two looks at the progress line
LARGEST_FLEET = 1024
COMPILE = {"auto": None, "on": True, "off": False}
METRICS = ("loss", "accuracy", "exact")


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
    max_runs_per_fleet: int | None = None, compile: str = "auto", workers: int = 1, command: str | None = None,
) -> Result:  # fmt: skip
    """Everything the study wants that is not there yet, then its report. ``command``: how a reader repeats this, for the report.

    ``workers``: so many fleets at once, each in a process of its own (a script must then call this under ``if __name__ == "__main__":``).
    """
    device = find_device(device)
    check(compile in COMPILE, "compile", f"{compile!r} is not one of {', '.join(COMPILE)}")
    largest = LARGEST_FLEET if max_runs_per_fleet is None else max_runs_per_fleet
    check(largest >= 1, "max_runs_per_fleet", f"must be 1 or more, not {largest}")
    check(workers >= 1, "workers", f"must be 1 or more, not {workers}")
    new = _wanted(study, Rows())
    check(bool(new), "study", f"{study.name} wants no runs; give at least one seed and one value for every grid field")
    notes = _check(study, new.values(), device, told := set())
    command = command or f"shoal.run(study, {str(out)!r})  # Python, with the study's definition"
    store = Store.open(out, _record(study, list(new.values()), device, preset, command))
    with store.lock(), FleetProgress(progress) as shown:
        asked: dict[str, RunConfig] = {}
        num_fleets = 0

        def planned(new: dict[str, RunConfig], notes: Sequence[str], after: tuple[int, ...]) -> list[Job]:
            """Jobs for what is new; ``after``: of the place in reports, what stands before the fleet's number."""
            nonlocal num_fleets
            groups = plan(new.values(), largest)
            there = len(new.keys() & _trained(store))
            begun = f", {'all' if there == len(new) else there} trained already" if there else ""
            for note in (*notes, f"{study.name}: {plural(len(new), 'run')} in {plural(len(groups), 'fleet')} on {device}{begun}; results go to {out}"):
                shown.note(note)
            names = [f"fleet {num_fleets + number + 1}/{num_fleets + len(groups)}" for number in range(len(groups))]
            asked.update(new)
            num_fleets += len(groups)
            return [(store.directory, group, device, COMPILE[compile], progress, names[i], (*after, i)) for i, group in enumerate(groups)]

        def unasked(rows: Rows) -> dict[str, RunConfig]:
            return {identity: config for identity, config in _wanted(study, rows).items() if identity not in asked}

        def follow(job: Job) -> list[Job]:
            """What follows from a fleet that has finished, where a study can tell before the others have."""
            if not study.eager:
                return []
            new = unasked(Rows([row for row in store.rows() if row["id"] in asked and row["status"] != "running"]))
            first, *rest = job[-1]
            return planned(new, _check(study, new.values(), device, told), (first + 1, *rest)) if new else []

        while new:
            jobs = planned(new, notes, (len(asked) + len(new),))
            if workers > 1 and len(jobs) > 1:
                together(_complete_apart, jobs, workers, device, follow)
            else:
                waiting = deque(jobs)
                while waiting:
                    job = waiting.popleft()
                    _, group, _, compiled, _, name, order = job
                    _complete(store, group, device, compiled, shown, name, order)
                    waiting += follow(job)
            measure(store, study, asked, workers, device)
            # A stage sees the rows of the stages before it and no others, so a resumed study asks for what an uninterrupted one asks for.
            new = unasked(Rows([row for row in store.rows() if row["id"] in asked]))
            notes = _check(study, new.values(), device, told)
        return _report(store, study)


def train(config: RunConfig, out: str | Path, *, device: str = "auto", command: str | None = None) -> Result:
    """One run, with a report and no claims."""
    metric = config.stop_metric or (f"{config.evaluate[-1]}/loss" if config.evaluate else "batch/loss")
    text = isinstance(config.task, LanguageConfig)
    return run(_single(Path(out).resolve().name, metric, config.evaluate, [config], text), out, device=device, command=command)


def report(directory: str | Path, study: Study | None = None) -> Path:
    """Write a study's report again from what is stored. A study defined in Python must be given for its claims and figures."""
    store = Store.read(directory)
    record = store.record
    study = study or remade(record)
    if study is None:
        study = _single(record["study"], record["main_metric"], record["config"]["evaluate"], [], record["config"]["task.type"] == "language")
        if record.get("claims") or record.get("figures") != [figure.name for figure in study.figures]:
            raise ConfigError(str(directory), "this study was defined in Python, its claims and figures with it; call shoal.report(directory, study)")
    check(study.name == record["study"], str(directory), f"holds the study {record['study']!r}, not {study.name!r}; give its own")
    with store.lock():
        return _report(store, study).report


def _single(name: str, metric: str, splits: Sequence[str], runs: list[RunConfig], text: bool) -> Study:
    """What has no questions of its own: the curves of whatever was measured, and of a language model what its loss comes to."""
    shown = [f"{split}/{metric.rpartition('/')[2]}" for split in splits] or [metric]
    tables = [perplexities([])] if text else []
    return Study(name=name, question="How does this run train?", main_metric=metric, wanted=lambda rows: runs, figures=[curves(shown)], tables=tables)


def load(path: str | Path) -> Trained:
    """The run that ``find`` finds, with its weights; one that has not finished is named on standard error."""
    store, row = find(path)
    fleet = next(fleet for fleet in store.fleets() if fleet["id"] == row["fleet"])
    place, entry = next((place, entry) for place, entry in enumerate(fleet["runs"]) if entry["id"] == row["id"])
    run = checkpoint.load_run(config_of(entry["config"]), place, store.fleet_directory(fleet["id"]) / "checkpoint")
    if row["status"] == "running":
        print(f"{store.directory}:{row['id']} has not finished its training; it is used as it was at the last checkpoint", file=sys.stderr)
    return Trained(**vars(run))


def find(path: str | Path) -> tuple[Store, Row]:
    """``DIR`` or ``DIR:ID``; with several runs and no ID the best by the study's main metric, named on standard error."""
    directory, wanted = str(path), None
    if not Path(directory).exists() and ":" in directory:
        directory, _, wanted = directory.rpartition(":")
    store = Store.read(Path(directory))
    rows = {row["id"]: row for row in store.rows()}
    metric = store.record["main_metric"]
    trained = [row for row in rows.values() if row["status"] != "running"] or list(rows.values())
    if not trained:
        raise ConfigError(directory, "holds no trained run yet")
    if wanted is None:
        wanted = _best(Rows(trained), metric)
        if len(rows) > 1:
            print(f"{len(rows)} runs; taking the best by {metric}: {directory}:{wanted}", file=sys.stderr)
    check(wanted in rows, directory, f"has no run {wanted!r}; it has {', '.join(sorted(rows)[:8])}{' ...' if len(rows) > 8 else ''}")
    return store, rows[wanted]


def _wanted(study: Study, rows: Rows) -> dict[str, RunConfig]:
    """Id -> run, each once, with values as a file has them (1 for a rate is 1.0), so that a run read back has the same id, and the steps its budget pays for.

    ConfigError for a wrong type, or a budget below one step.
    """
    prices: dict[RunConfig, Counts] = {}
    runs = [budgeted(structure(RunConfig, unstructure(config)), prices) for config in study.wanted(rows)]
    return {run_id(config): config for config in runs}


def _check(study: Study, runs: Collection[RunConfig], device: str, told: set[str]) -> list[str]:
    """Whatever these runs have wrong, found before a file is written; and what a reader should be told about their data and has not been ``told``."""
    kinds = {(c.task, c.model, type(c.optimizer), c.objective, c.gradient, c.weights, c.batch_size, c.precision, c.evaluate, c.stop_metric): c for c in runs}
    for config in kinds.values():
        validate(config, device)
    metrics = list(dict.fromkeys(f"{split}/{metric}" for config in runs for split in config.evaluate for metric in METRICS))
    lead = study.main_metric.removeprefix("final.").removeprefix("best.")
    check(
        not runs or lead in (*metrics, *(f"batch/{metric}" for metric in METRICS)),
        "main_metric",
        f"{study.name} is judged by {lead}, which is not measured; add it to evaluate, or lead with {', '.join(metrics) or 'batch/loss'}",
    )
    notes = [f"note: {note}" for note in idle(runs)]
    for config in {(config.task, config.evaluate): config for config in runs}.values():
        task = tasks.build(config.task)
        tables = tables_of(config, task)
        for split in config.evaluate:
            some = any(bool((batch.weights > 0).any()) for batch in task.evaluation(tables, split, 4096))
            fix = f"raise task.{split.partition(':')[0]}_fraction, or " if isinstance(config.task, ModularConfig) else ""
            check(some, "evaluate", f"there are no {split} rows; {fix}leave {split} out of evaluate")
        notes += [f"note: {note}" for note in task.describe(tables, 0).get("notes", ())]
    new = [note for note in dict.fromkeys(notes) if note not in told]
    told.update(new)
    return new


def _trained(store: Store) -> set[str]:
    return {entry["id"] for fleet in store.fleets() if fleet["done"] for entry in fleet["runs"]}


def _complete_apart(directory: Path, group: Sequence[RunConfig], device: str, compiled: bool | None, progress: bool, name: str, order: tuple[int, ...]) -> None:
    """In a worker's process."""
    with FleetProgress(progress, live=False) as shown:
        _complete(Store.read(directory), group, device, compiled, shown, name, order)


def _complete(store: Store, group: Sequence[RunConfig], device: str, compiled: bool | None, shown: FleetProgress, name: str, order: tuple[int, ...]) -> None:
    """What is missing of a planned fleet: first what was begun of it, perhaps as one of two halves, then what was not."""
    missing = {run_id(config): config for config in group}
    there = [fleet for fleet in store.fleets() if any(entry["id"] in missing for entry in fleet["runs"])]
    for fleet in there:
        if not fleet["done"] and fleet["runs"][0]["id"] in missing:
            begun = [config_of(entry["config"]) for entry in fleet["runs"]]
            _train(store, begun, device, compiled, shown, f"{name}, {plural(len(begun), 'run')} (resumed)", tuple(fleet["order"]))
        for entry in fleet["runs"]:
            missing.pop(entry["id"], None)
    if missing:
        order = (*order, len(there)) if there else order
        _train(store, list(missing.values()), device, compiled, shown, f"{name}, {plural(len(missing), 'run')}", order)


def _train(
    store: Store, runs: Sequence[RunConfig], device: str, compiled: bool | None, shown: FleetProgress, name: str, order: tuple[int, ...],
    pieces: int | None = None,
) -> None:  # fmt: skip
    """One fleet to its end, resumed where it stopped; with too little GPU memory as two of half the size, and one run's batches in ``pieces``.

    ``order``: its place in reports.
    """
    identity = fleet_id(runs)
    place = store.fleet_directory(identity) / "checkpoint"
    tables: list[Table] = []
    if compiled or (compiled is None and device == "cuda"):
        shown.note(f"{name}: compiling, some 20 seconds before the first step")
    if checkpoint.exists(place):
        fleet, extra = checkpoint.load(runs, place, device)
        store.truncate(identity, extra["parts"])
    else:
        begun = _begin(runs, device, compiled, pieces)
        if begun is None and _others_leave(lambda: shown.note(f"{name}: waiting for memory that other fleets on this GPU hold")):
            begun = _begin(runs, device, compiled, pieces)
        if begun is None and len(runs) == 1:
            return _accumulate(store, runs, device, compiled, shown, name, order, pieces)
        if begun is None:
            return _halve(store, runs, device, compiled, shown, name, order)
        fleet, table = begun
        tables.append(table)
        shutil.rmtree(store.fleet_directory(identity), ignore_errors=True)  # begun before, but without a checkpoint nothing of it can be used
        store.start_fleet(identity, {"order": order, "runs": [{"id": run_id(r), "config": flatten(r)} for r in runs], **fleet.record()})
    chunk, saved, pause = 1, time.perf_counter(), CHECKPOINT_EVERY
    with _interruptions() as interrupted:
        while not (fleet.done or interrupted):
            began = time.perf_counter()
            tables.append(fleet.advance(chunk))
            took = time.perf_counter() - began
            chunk = max(1, min(chunk * 2, round(chunk * CHUNK_SECONDS / max(took, 1e-6))))  # results do not depend on it
            shown.update(name, fleet)
            checkpoint.save_snapshots(fleet, place.parent / checkpoint.SNAPSHOTS)
            if (began := time.perf_counter()) - saved > pause:
                _save(store, fleet, identity, place, tables)
                tables, saved = [], time.perf_counter()
                pause = max(CHECKPOINT_EVERY, (saved - began) / CHECKPOINT_SHARE)
        _save(store, fleet, identity, place, tables)
    if fleet.done:
        store.finish_fleet(identity, {"runs": fleet.outcomes(), "seconds": fleet.seconds, "steps": fleet.step})
        shown.update(name, fleet, last=True)
    if interrupted:
        raise KeyboardInterrupt


def _begin(runs: Sequence[RunConfig], device: str, compiled: bool | None, pieces: int | None = None) -> tuple[Fleet, Table] | None:
    """A new fleet after its first evaluation and step, when it holds all the memory it will need; None where that is not to be had."""
    try:
        fleet = Fleet.build(runs, device, compile=compiled, accumulate=pieces)
        return fleet, fleet.advance(1)
    except RuntimeError as error:
        cause: BaseException | None = error  # what ends a capture may fail in its turn and stand before the reason
        while not (isinstance(cause, torch.OutOfMemoryError) or NO_WORKSPACE in str(cause)):
            if cause is None:
                if isinstance(runs[0].model, ModuleConfig):
                    raise failed(runs[0].model, error) from error
                raise
            cause = cause.__context__
        return None  # nothing is done about it here: until this returns, the error holds on to the fleet


def _accumulate(
    store: Store, runs: Sequence[RunConfig], device: str, compiled: bool | None, shown: FleetProgress, name: str, order: tuple[int, ...], pieces: int | None
) -> None:
    """One run with its batches in twice as many pieces, which changes no result beyond rounding."""
    more = 2 * (pieces or runs[0].accumulate)
    fits = more <= runs[0].batch_size
    check(fits, "batch_size", "one run does not fit into the GPU's memory; make the model or its sequences smaller, with another --out")
    shown.note(f"{name}: a batch of {runs[0].batch_size} does not fit into memory; working through it in {more} pieces, whose gradients are added up")
    _free()
    _train(store, runs, device, compiled, shown, name, order, more)


def _free() -> None:
    gc.collect()
    torch.cuda.empty_cache()


def _others_leave(tell: Callable[[], None]) -> bool:
    """In a worker whose GPU others fill: wait until a quarter more of it is free than now, which is too little. False where none becomes free."""
    if multiprocessing.parent_process() is None:
        return False
    _free()
    (free, total), began = torch.cuda.mem_get_info(), time.perf_counter()
    if free > CROWDED * total:
        return False
    tell()
    while (now := torch.cuda.mem_get_info()[0]) < free + total / 4 and time.perf_counter() - began < PATIENCE:
        time.sleep(1)
    return now > free


def _halve(store: Store, runs: Sequence[RunConfig], device: str, compiled: bool | None, shown: FleetProgress, name: str, order: tuple[int, ...]) -> None:
    shown.note(f"{name}: does not fit into memory; training it as two fleets")
    _free()
    half = len(runs) // 2
    for part, piece in enumerate((runs[:half], runs[half:])):
        _train(store, piece, device, compiled, shown, f"{name}, part {part + 1}", (*order, part))


@contextmanager
def _interruptions() -> Iterator[list[int]]:
    """Ctrl-C fills the list instead of tearing a step apart: it is looked at between chunks, where state and rows agree. A second one stops at once.

    Then, as after a crash, training goes on from the last checkpoint. Handlers other than Python's own are left alone.
    """
    heard: list[int] = []

    def hear(number: int, _: Any) -> None:
        if heard:
            raise KeyboardInterrupt
        heard.append(number)

    main = threading.current_thread() is threading.main_thread()
    ours = [number for number in (signal.SIGINT, signal.SIGTERM) if main and signal.getsignal(number) is signal.default_int_handler]  # SIGTERM in workers
    for number in ours:
        signal.signal(number, hear)
    try:
        yield heard
    finally:
        for number in ours:
            signal.signal(number, signal.default_int_handler)


def _save(store: Store, fleet: Fleet, identity: str, place: Path, tables: list[Table]) -> None:
    """Metrics first, then the checkpoint that counts them: a part written after the last checkpoint is dropped on resume, none is doubled."""
    checkpoint.save_snapshots(fleet, place.parent / checkpoint.SNAPSHOTS)
    parts = store.append(identity, joined(tables)) if tables else next(fleet["parts"] for fleet in store.fleets() if fleet["id"] == identity)
    checkpoint.save(fleet, place, {"parts": parts})


def _report(store: Store, study: Study) -> Result:
    hashed = {claim["hash"] for claim in store.record.get("claims") or ()}
    changed = [claim.text for claim in study.claims if claims.fingerprint(claim) not in hashed]
    notes = [f"Not as it was hashed before training: {text}" for text in changed]
    report = write_report(store, study.name, study.question, study.figures, study.claims, study.main_metric, notes, study.tables)
    rows = store.rows()
    return Result(store.directory, rows, [dict(claims.judge(claim, rows)) for claim in study.claims], report)


def _best(rows: Rows, metric: str) -> str:
    """The id of the run that is best by its last value; the first of equals."""
    key, _ = main_key(metric)
    sign = 1.0 if lower_is_better(metric) else -1.0
    return min(rows, key=lambda row: sign * row[key] if key in row else float("inf"))["id"]


def _record(study: Study, wanted: Sequence[RunConfig], device: str, preset: str | None, command: str) -> dict[str, Any]:
    """study.yaml: what must stay the same for a resume ("config", "claims"), and what helps a reader."""
    flats = [flatten(config) for config in wanted]
    paths = dict.fromkeys(path for flat in flats for path in flat)
    config: dict[str, Any] = {}
    for path in paths:
        values = list({repr(flat.get(path)): flat.get(path) for flat in flats}.values())
        config[path] = values[0] if len(values) == 1 else values
    digest = hashlib.sha256(" ".join(map(run_id, wanted)).encode()).hexdigest()[:10]  # which values go together
    config["runs"] = f"{len(wanted)}, hash {digest}"
    different = dict.fromkeys(run.task for run in wanted)
    texts = [encoded(task).fingerprint for task in different if isinstance(task, LanguageConfig)]
    texts += [tasks.build(task).fingerprint for task in different if isinstance(task, SentencesConfig)]
    config |= {"hash of text and tokenizer": ", ".join(dict.fromkeys(texts))} if texts else {}  # a file, or Python, may be another one tomorrow
    versions = {name: importlib.metadata.version(name) for name in ("shoal", "torch", "numpy")}
    hardware = torch.cuda.get_device_name() if device == "cuda" else f"CPU, {plural(torch.get_num_threads(), 'thread')}"
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
        "figures": [figure.name for figure in study.figures],
        "tables": [table.name for table in study.tables],
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
