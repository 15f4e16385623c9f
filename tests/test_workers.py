"""Fleets trained at once in processes of their own: the same results, errors told as if there were one process, nothing lost when interrupted."""

from __future__ import annotations

import os
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
from shoal.studies import measuring, sanity
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


def test_one_worker_at_least(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="workers"):
        shoal.run(study(replace(RUN, steps=1)), tmp_path, workers=0)
