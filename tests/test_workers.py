"""Fleets trained at once in processes of their own: the same results, errors told as if there were one process, nothing lost when interrupted."""

from __future__ import annotations

import os
import shutil
import signal
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import shoal
from shoal.config.fields import ConfigError
from shoal.results.store import Store
from shoal.studies import measuring, sanity
from shoal.studies.tuning import Tuning, without
from shoal.studies.workers import together

RUN = shoal.RunConfig(
    task=shoal.ModularConfig(p=7, operation="add"),
    model=shoal.DecoderConfig(width=8, num_heads=1, num_layers=1, feed_forward=16),
    steps=12,
    batch_size=8,
    evaluate_every=4,
    log_every=4,
    snapshots=(0, 5),
)


def study(run: shoal.RunConfig = RUN) -> shoal.Study:
    wanted = shoal.grid(run, {"model.num_layers": [1, 2], "model.norm": ["layer", "rms"], "optimizer.lr": [1e-3, 1e-2]}, seeds=1)
    return shoal.Study(name="apart", question="Is it the same?", main_metric="val/accuracy", wanted=wanted)


def test_workers_change_nothing(tmp_path: Path) -> None:
    alone = shoal.run(study(), tmp_path / "alone", progress=False, device="cpu")
    apart = shoal.run(study(), tmp_path / "apart", progress=False, device="cpu", workers=2)
    assert [row["id"] for row in apart.rows] == [row["id"] for row in alone.rows], "in the same order too"
    assert {row["status"] for row in apart.rows} == {"completed"}
    for a, b in zip(alone.rows, apart.rows, strict=True):
        for metric in ("val/loss", "train/accuracy", "batch/loss"):
            np.testing.assert_allclose(a.curve(metric)[1], b.curve(metric)[1], rtol=1e-4)
    run = apart.load(alone.rows[0]["id"])
    assert run.snapshots == (0, 5) and run.at(5).config == run.config


def test_a_study_that_can_tell_goes_on_before_all_have_finished(tmp_path: Path) -> None:
    """It is asked again after every fleet, and names the fresh seeds of what has chosen. Results and their order are those of stage after stage."""
    tuning = Tuning(seeds=(50,), reported=without("optimizer.lr"), order=lambda rows: (float(rows.column("final.val/loss").mean()),), suffix=" tried")
    variants = {"deep": {"model.num_layers": 2}, "flat": {"model.num_layers": 1}}
    config = shoal.StudyConfig(run=RUN, variants=variants, grid={"optimizer.lr": [1e-3, 1e-2]}, seeds=2)
    seen: list[tuple[int, int]] = []  # rows that it was asked with, runs that it named

    def wanted(rows: shoal.Rows) -> list[shoal.RunConfig]:
        runs = tuning.wanted(config, rows)
        seen.append((len(rows), len(runs)))
        return runs

    plain = replace(study(), wanted=wanted)
    staged = shoal.run(plain, tmp_path / "staged", progress=False, device="cpu")
    assert seen == [(0, 4), (4, 8), (8, 8)]
    for workers in (1, 2):
        place = tmp_path / str(workers)
        seen.clear()
        eager = shoal.run(replace(plain, eager=True), place, progress=False, device="cpu", workers=workers)
        assert [row["id"] for row in eager.rows] == [row["id"] for row in staged.rows] and len(eager.rows) == 2 * 2 + 2 * 2
        for a, b in zip(staged.rows, eager.rows, strict=True):
            np.testing.assert_allclose(a.curve("val/loss")[1], b.curve("val/loss")[1], rtol=1e-4)
        names = {fleet["runs"][0]["config"]["variant"]: place / "fleets" / fleet["id"] for fleet in Store.read(place).fleets()}
        assert names.keys() == {"deep tried", "flat tried", "deep", "flat"} and seen[-1] == (8, 8)
        assert workers == 2 or seen[:3] == [(0, 4), (2, 6), (4, 8)], "two workers may end together"
        shutil.rmtree(names["flat"])  # as if stopped before it
        again = shoal.run(replace(plain, eager=True), place, progress=False, device="cpu", workers=workers)
        assert [row["id"] for row in again.rows] == [row["id"] for row in staged.rows]


def test_workers_measure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What shoal's own study looks at is the same from workers; what is a timing is not left to them."""
    config = sanity.full()
    config = replace(config, run=replace(config.run, steps=20), grid={"task.unscored": [0, 3], "model.num_layers": [1, 2]}, seeds=2)
    alone = shoal.run(sanity.study(config), tmp_path / "alone", progress=False, device="cpu")
    jobs: list[tuple[Any, ...]] = []

    def noted(work: Any, given: list[tuple[Any, ...]], workers: int, device: str) -> None:
        jobs.extend(given)
        together(work, given, workers, device)

    monkeypatch.setattr(measuring, "together", noted)
    timed = replace(sanity.study(config), timed=["positions"])
    apart = shoal.run(timed, tmp_path / "apart", progress=False, device="cpu", workers=2)
    assert len(jobs) == 2 and all(names == {"samples"} for *_, names, _ in jobs)
    for a, b in zip(alone.rows, apart.rows, strict=True):
        assert a["measures"].keys() == b["measures"].keys() == {"samples", "positions"}
        assert a["measures"]["samples"] == b["measures"]["samples"]


def _job(directory: Path, number: int) -> None:
    if number == 1:
        raise ConfigError("task.p", "is bad luck")
    if number == 2:
        raise ZeroDivisionError("in the second job")
    if number == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    if number == 4:
        (directory / "begun").touch()
        try:
            for _ in range(600):
                time.sleep(0.1)
        except KeyboardInterrupt:
            (directory / "saved").touch()
            raise
    (directory / str(number)).touch()


@pytest.mark.parametrize(
    ("numbers", "error", "message"),
    [([10, 1], ConfigError, "task.p: is bad luck"), ([2], RuntimeError, "ZeroDivisionError: in the second job"), ([3], RuntimeError, "without a word")],
)
def test_errors_are_told(tmp_path: Path, numbers: list[int], error: Any, message: str) -> None:
    with pytest.raises(error, match=message):
        together(_job, [(tmp_path, number) for number in numbers], 1, "cpu")


def test_interrupting_lets_workers_save(tmp_path: Path) -> None:
    def interrupt() -> None:
        while not ((tmp_path / "begun").exists() and (tmp_path / "10").exists()):
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=interrupt, daemon=True).start()
    with pytest.raises(KeyboardInterrupt):
        together(_job, [(tmp_path, 10), (tmp_path, 4)], 2, "cpu")
    assert (tmp_path / "saved").exists()


def _short(directory: Path, number: int) -> None:
    (directory / f"{number} by {os.getpid()}").touch()


def test_jobs_that_follow(tmp_path: Path) -> None:
    """From each job two more up to number 14: all are done, once, by the workers that are there."""
    done: list[int] = []

    def follow(job: tuple[Any, ...]) -> list[tuple[Any, ...]]:
        done.append(job[1])
        return [(tmp_path, number) for number in (2 * job[1] + 1, 2 * job[1] + 2) if number < 15]

    together(_short, [(tmp_path, 1), (tmp_path, 2)], 2, "cpu", follow)
    names = [path.name.split(" by ") for path in tmp_path.iterdir()]
    assert sorted(done) == sorted(int(number) for number, _ in names) == list(range(1, 15)) and len({process for _, process in names}) <= 2


def test_one_worker_at_least(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="workers"):
        shoal.run(study(replace(RUN, steps=1)), tmp_path, workers=0)
