"""What a study looks at after training, for every run that lacks it: fleet by fleet, so many at once as there are workers.

    measure(store, study, asked, workers=4, device="cuda")

A worker makes the study again from its record, as ``shoal report`` does; one defined in Python cannot be, and is measured here. What is a timing
is measured here too, when the workers are done.
"""

from __future__ import annotations

import importlib
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch

from shoal.config import StudyConfig
from shoal.config.load import config_of, structure
from shoal.results.store import Store
from shoal.studies import STUDIES
from shoal.studies.study import Only, Study
from shoal.studies.workers import together
from shoal.train import checkpoint
from shoal.train.device import measured_on

PER_GPU = 4  # workers: a measure may fill a GPU with the logits of as many tokens as a single process has room for


def remade(record: Mapping[str, Any]) -> Study | None:
    """The study of this record, where it is one of shoal's own."""
    if not record.get("settings") or record["study"] not in STUDIES:
        return None
    return importlib.import_module(STUDIES[record["study"]]).study(structure(StudyConfig, record["settings"]))


def measure(store: Store, study: Study, asked: Collection[str], workers: int, device: str) -> None:
    """Every measure of every run asked for, by its id."""
    again = remade(store.record) if workers > 1 else None
    if again is not None and again.measures.keys() == study.measures.keys():
        names = study.measures.keys() - set(study.timed)
        jobs = [(store.directory, fleet, ids, names, device) for fleet, ids in _lacking(store, names, asked)]
        if len(jobs) > 1:
            together(_measure_apart, jobs, min(workers, PER_GPU * torch.cuda.device_count()) if device == "cuda" else workers, device)
    with measured_on(device):
        for fleet, ids in _lacking(store, study.measures.keys(), asked):
            _measure(store, study, fleet, ids, study.measures.keys())


def _lacking(store: Store, names: Collection[str], asked: Collection[str]) -> list[tuple[str, list[str]]]:
    """Fleets, and of each the runs that lack one of these measures."""
    complete = set(asked).intersection(*(store.measured(name) for name in names))
    runs = {fleet["id"]: [entry["id"] for entry in fleet["runs"]] for fleet in store.fleets()}
    lacking = {fleet: [run for run in ids if run in asked and run not in complete] for fleet, ids in runs.items()}
    return [(fleet, ids) for fleet, ids in lacking.items() if ids]


def _measure_apart(directory: Path, fleet: str, runs: Collection[str], names: Collection[str], device: str) -> None:
    """In a worker's process."""
    store = Store.read(directory)
    study = remade(store.record)
    assert study is not None
    with measured_on(device):
        _measure(store, study, fleet, runs, names)


def _measure(store: Store, study: Study, fleet: str, runs: Collection[str], names: Collection[str]) -> None:
    (record,) = (one for one in store.fleets() if one["id"] == fleet)
    for place, entry in enumerate(record["runs"]):
        missing = set(names) - store.measures(entry["id"]).keys() if entry["id"] in runs else ()
        config, trained = config_of(entry["config"]), None
        for name in sorted(missing):
            measure = study.measures[name]
            if isinstance(measure, Only) and not measure.asked(config):
                store.add_measure(entry["id"], name, [])
                continue
            if trained is None:
                trained = checkpoint.load_run(config, place, store.fleet_directory(fleet) / "checkpoint")
            store.add_measure(entry["id"], name, measure(trained))
