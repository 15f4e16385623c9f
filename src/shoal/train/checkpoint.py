"""A fleet's state on disk: safetensors and JSON, never pickle, replaced as a whole directory.

checkpoint/model.safetensors      every run as born: name -> [R, ...]
checkpoint/optimizer.safetensors  the runs still in the fleet: "<moment>/<group>" -> [R', ...]; nothing once all have ended
checkpoint/best.safetensors       as model.safetensors, at the best value of RunConfig.best_metric, where one is asked for
checkpoint/fleet.json             step, who is present, statuses, what the caller adds
checkpoint/corpus.json            of language: the hash of text and tokenizer, and the tokenizer, which a run needs to write text
snapshots/00001000.safetensors    every run as it was after so many updates, where RunConfig.snapshots asks for it
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from shoal import models, tasks
from shoal.config import LanguageConfig, RunConfig
from shoal.config.fields import ConfigError, check
from shoal.contracts import Task
from shoal.tasks.language import LanguageTask
from shoal.train.fleet import RUNNING, Fleet
from shoal.train.layout import Layout
from shoal.train.run import Run

MODEL, OPTIMIZER, STATE, CORPUS, SNAPSHOTS, BEST = (
    "model.safetensors", "optimizer.safetensors", "fleet.json", "corpus.json", "snapshots", "best.safetensors",
)  # fmt: skip


def save(fleet: Fleet, directory: Path, extra: dict[str, Any]) -> None:
    """Write ``directory`` anew; until that is complete, the old one stays. ``extra``: JSON values given back by ``load``."""
    new, old = directory.with_name(directory.name + ".new"), directory.with_name(directory.name + ".old")
    shutil.rmtree(new, ignore_errors=True)
    new.mkdir(parents=True)
    save_file({name: view.contiguous() for name, view in fleet.layout.views(fleet.everyone()).items()}, new / MODEL)
    kept_on = {"best"} if fleet.done else fleet.state.keys()  # moments are twice the weights, and nobody goes on from there
    state = {name: dict(fleet.state[name]) for name in fleet.state if name in kept_on}
    if "best" in state:
        kept = fleet.layout.views(state["best"].pop("weights").cpu())
        save_file({name: view.contiguous() for name, view in kept.items()}, new / BEST)
    save_file({f"{moment}/{group}": x.contiguous() for moment, tensors in state.items() for group, x in tensors.items()}, new / OPTIMIZER)
    state = {
        "step": fleet.step,
        "evaluated": fleet.evaluated,
        "seconds": fleet.seconds,
        "present": fleet.present,
        "status": fleet.status.tolist(),
        "ended": fleet.ended.tolist(),
        "hits": fleet.hits.tolist(),
        "departed": {run: [status, ended] for run, (_, status, ended) in fleet.departed.items()},
        "compiled": fleet.compile,
        "accumulate": fleet.accumulate,
        "extra": extra,
    }
    (new / STATE).write_text(json.dumps(state))
    if isinstance(fleet.task, LanguageTask):
        (new / CORPUS).write_text(json.dumps(fleet.task.memory()))
    for path in new.iterdir():
        _flush(path)
    if directory.exists():
        shutil.rmtree(old, ignore_errors=True)
        directory.rename(old)
    new.rename(directory)
    _flush(directory.parent)
    shutil.rmtree(old, ignore_errors=True)


def save_snapshots(fleet: Fleet, directory: Path) -> None:
    """Write what the fleet has kept since the last call, one file a step: snapshots/00001000.safetensors, as MODEL."""
    for step in list(fleet.snapshots):
        directory.mkdir(parents=True, exist_ok=True)
        path = directory / f"{step:08d}.safetensors"
        new = path.with_suffix(".new")
        save_file({name: view.contiguous() for name, view in fleet.layout.views(fleet.snapshots.pop(step)).items()}, new)
        new.rename(path)


def load(runs: Sequence[RunConfig], directory: Path, device: str | torch.device) -> tuple[Fleet, dict[str, Any]]:
    """The fleet as saved, and ``extra``. ConfigError if its corpus or its tokenizer is no longer what it was."""
    directory = _existing(directory)
    with _readable(directory / STATE):
        state = json.loads((directory / STATE).read_text())
    fleet = Fleet(runs, device, compile=state["compiled"], accumulate=state["accumulate"])
    fleet.task = _task(fleet.config, directory)
    fleet.step, fleet.evaluated, fleet.seconds = state["step"], state["evaluated"], state["seconds"]
    fleet.present = state["present"]
    layout = fleet.layout_of()
    parameters = _read(directory / MODEL)
    _check_fit(parameters, layout, 1, directory / MODEL)
    flat = layout.pack(parameters, 1)
    fleet.departed = {int(run): (flat[int(run)].clone(), status, ended) for run, (status, ended) in state["departed"].items()}
    fleet.flat = flat[fleet.present].to(fleet.device)
    fleet.state = {}
    for name, x in _read(directory / OPTIMIZER).items():
        moment, _, group = name.partition("/")
        fleet.state.setdefault(moment, {})[group] = x.to(fleet.device)
    if "best" in fleet.state:
        fleet.state["best"]["weights"] = layout.pack(_read(directory / BEST), 1).to(fleet.device)
    fleet.status, fleet.ended, fleet.hits = (torch.tensor(state[name], device=fleet.device) for name in ("status", "ended", "hits"))
    fleet.assemble()
    return fleet, state["extra"]


def load_run(config: RunConfig, place: int, directory: Path) -> Run:
    """Run number ``place`` (as born) of the fleet saved there, by itself, read without its mates; with its snapshots, from the directory beside it.

    A language run has the tokenizer it was trained with; its corpus is looked at, and must be the same, when it is first asked for.
    """
    directory = _existing(directory)
    with _readable(directory / STATE):
        state = json.loads((directory / STATE).read_text())
    here = dict(zip(state["present"], zip(state["status"], state["ended"], strict=True), strict=True))
    status, ended = here[place] if place in here else state["departed"][str(place)]
    made = state["step"] if status == RUNNING else ended
    files = {int(path.stem): path for path in sorted((directory.parent / SNAPSHOTS).glob("*.safetensors"))}
    task = _task(config, directory)
    past = {step: partial(_run, config, task, place, path) for step, path in files.items() if step <= made}
    kept = partial(_run, config, task, place, directory / BEST) if config.best_metric else None
    return replace(_run(config, task, place, directory / MODEL), past=past, kept=kept)


def _task(config: RunConfig, directory: Path) -> Task:
    path = directory / CORPUS
    if not isinstance(config.task, LanguageConfig):
        return tasks.build(config.task)
    with _readable(path):
        return LanguageTask(config.task, json.loads(path.read_text()))


def _run(config: RunConfig, task: Task, place: int, path: Path) -> Run:
    with torch.device("meta"):
        model = models.build(config.model, task.vocab_size, task.max_length)
    with _readable(path), safe_open(path, "pt") as file:
        tensors = {name: file.get_slice(name)[place] for name in file.keys()}  # noqa: SIM118
    layout = Layout({name: tuple(p.shape) for name, p in model.named_parameters()}, {"flat": [name for name, _ in model.named_parameters()]})
    _check_fit(tensors, layout, 0, path)
    layout.bind(model, layout.pack(tensors, 0))
    return Run(config=config, task=task, model=model.requires_grad_(False))


def _check_fit(tensors: Mapping[str, Tensor], layout: Layout, lead: int, path: Path) -> None:
    """A module of the user's own may have been changed since."""
    shapes = {name: tuple(x.shape[lead:]) for name, x in tensors.items()}
    others = sorted(name for name in shapes | layout.shapes if shapes.get(name) != layout.shapes.get(name))
    fix = "bring its code back as it was, or train it again in another directory"
    check(not others, str(path), f"does not fit the model as it is now ({', '.join(others[:4])}{', ...' if others[4:] else ''} differ); {fix}")


def exists(directory: Path) -> bool:
    return directory.exists() or directory.with_name(directory.name + ".old").exists()


def _existing(directory: Path) -> Path:
    """The checkpoint, or the one before it when the process died between two renames."""
    old = directory.with_name(directory.name + ".old")
    if not directory.exists() and old.exists():
        return old
    if not (directory / STATE).exists():
        raise ConfigError(str(directory), "there is no checkpoint here; the run has not been trained yet, or only its report was kept")
    return directory


def _read(path: Path) -> dict[str, Tensor]:
    with _readable(path):
        return load_file(path)


@contextlib.contextmanager
def _readable(path: Path) -> Iterator[None]:
    """What is wrong with the file, and what to do, in place of the reader's own errors."""
    fix = f"delete {path.parent.parent} to train this fleet again from the start"
    if not path.exists():
        raise ConfigError(str(path), f"is missing; {fix}")
    try:
        yield
    except (SafetensorError, json.JSONDecodeError, UnicodeDecodeError) as error:
        with path.open("rb") as file:
            pickled = file.read(2) in (b"PK", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")  # asked only now: a good file may begin so, too
        reason = "is a pickle, which could run code when loaded; shoal reads safetensors only" if pickled else f"is damaged or cut short ({error})"
        raise ConfigError(str(path), f"{reason}; {fix}") from None


def _flush(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
