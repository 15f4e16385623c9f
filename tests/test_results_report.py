"""The report and the figures on an invented study: grokking-like curves, two settings, eight seeds, one dead run, some that never get there."""

from __future__ import annotations

import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from shoal.config import AdamW, DecoderConfig, ModularConfig, RunConfig, flatten, run_id, with_seed, with_values
from shoal.results import Claim, Figure, Sample, Store, curves, dots, survival, write_report
from shoal.results.claims import record as record_claims

BUDGET, EVERY = 10_000, 50


def base() -> RunConfig:
    return RunConfig(
        task=ModularConfig(), model=DecoderConfig(norm_place="post"), optimizer=AdamW(beta2=0.98), steps=BUDGET, stop_metric="val/accuracy", stop_at=0.99
    )


def wd_share(rows: Any) -> Sample:
    return Sample(rows.where({"optimizer.wd": 1.0}).reached("val/accuracy", 0.99)[1], kind="proportion")


def claims() -> list[Claim]:
    return [
        Claim("With weight decay 1, more than half of the seeds generalise within 10,000 steps.", wd_share, (0.5, 1)),
        Claim("Weight decay 1 takes fewer than 3,000 steps to 99 %, in the median.", lambda rows: Sample(*rows.where({"optimizer.wd": 1.0}).reached("val/accuracy", 0.99), kind="survival"), (0, 3000)),
        Claim(
            "Without weight decay, at least nine seeds in ten generalise.",
            lambda rows: Sample(rows.where({"optimizer.wd": 0.0}).reached("val/accuracy", 0.99)[1], kind="proportion"),
            (0.9, 1),
        ),
        Claim("Test accuracy is above 99 % on average.", lambda rows: Sample(rows.column("final.test/accuracy"), bounds=(0, 1)), (0.99, 1)),
        Claim("Every run learns its training table.", lambda rows: Sample(rows.column("best.train/accuracy"), bounds=(0, 1)), (0.8, 1)),
    ]


def invent(directory: Path, seeds: int = 8, unfinished: bool = False) -> Store:
    """Two fleets' worth of a study, from a fixed generator."""
    generator = np.random.default_rng(7)
    runs = [with_seed(with_values(base(), {"optimizer.wd": wd}), seed) for wd in (0.0, 1.0) for seed in range(seeds)]
    store = Store.open(
        directory,
        {
            "study": "grokking", "preset": "paper", "config": {"grid": {"optimizer.wd": [0.0, 1.0]}, "seeds": seeds}, "claims": record_claims(claims()),
            "command": ["shoal", "run", "grokking", "--preset", "paper", "--seeds", str(seeds)], "num_runs": len(runs),
            "versions": {"shoal": "0.1.0", "torch": "2.13.0", "python": "3.11.9"}, "device": "cpu (2 cores)", "git": {"commit": "0123abcd", "dirty": False},
        },
    )  # fmt: skip
    describe = [
        {"rows": 9312, "train": 4656, "val": 4656, "test": 0, "split": f"{generator.integers(2**48):012x}", "definition": "3c1f9a77b2e0"} for _ in range(seeds)
    ] * 2
    record = {
        "runs": [{"id": run_id(run), "config": flatten(run)} for run in runs],
        "choices": {"device": "cpu", "runs": len(runs), "compiled": False, "attention": "short"}, "data": describe,
        "model": {"parameters": 422_784, "flops": {"forward": 6.7e8, "step": 2.0e9}},
    }  # fmt: skip
    store.start_fleet("a1b2c3d4", record)
    steps = np.arange(0, BUDGET + 1, EVERY)
    columns: dict[str, list[np.ndarray]] = {name: [] for name in ("step", "run", "train/accuracy", "val/accuracy", "train/loss", "val/loss", "batch/loss")}
    outcome = []
    for r, run in enumerate(runs):
        wd = run.optimizer.wd
        memorised, groks = generator.normal(2.2, 0.06), generator.normal(3.12 if wd else 3.9, 0.09 if wd else 0.12)
        noise = generator.normal(0, 0.012, (4, steps.size)).cumsum(axis=1) * 0.12 + generator.normal(0, 0.004, (4, steps.size))
        x = np.log10(np.maximum(steps, 1))
        train, val = (1 / (1 + np.exp(-np.clip(slope * (x - middle), -50, 50))) for slope, middle in ((14, memorised), (16, groks)))
        val = np.clip(0.01 + 0.99 * val + noise[1] * val * (1 - val) * 4, 0, 1)
        last = BUDGET
        status = "completed"
        hits = np.convolve(val >= 0.99, np.ones(5), "valid") > 4.5
        if hits.any():
            last, status = int(steps[hits.argmax() + 4]), "finished"
        if r == 3:
            last, status = 1500, "dead"
        if unfinished and r % 5 == 0:
            last, status = 1200, "running"
        kept = steps <= last
        values = {
            "train/accuracy": np.clip(0.01 + 0.99 * train, 0, 1), "val/accuracy": val, "train/loss": 4.6 * (1 - train) + 0.002,
            "val/loss": 4.6 + 6 * train * (1 - val) - 4.58 * val, "batch/loss": 4.6 * (1 - train) + 0.004,
        }  # fmt: skip
        columns["step"].append(steps[kept])
        columns["run"].append(np.full(kept.sum(), r))
        for name, v in values.items():
            columns[name].append(v[kept])
        outcome.append({"status": status, "steps": last, "seconds": last / 90})
    table = {name: np.concatenate(parts) for name, parts in columns.items()}
    for low in range(0, BUDGET + 1, 2000):
        chunk = (table["step"] >= low) & (table["step"] < low + 2000)
        store.append("a1b2c3d4", {name: column[chunk] for name, column in table.items()})
    if not unfinished:
        store.finish_fleet("a1b2c3d4", {"runs": outcome, "seconds": 431.7, "rate": 612.4})
    for run in runs[:3]:
        store.add_measure(run_id(run), "samples", [{"prompt": "12 / 7 =", "text": "12 / 7 = 43", "right": True, "probability": 0.9987}])
    store.add_measure(run_id(runs[0]), "long samples", [{"temperature": 0.8, "text": "def distance(a, b):\n    <b>return</b> (a - b) % 97 & 1\n"}])
    return store


def figures() -> list[Figure]:
    return [
        curves(("train/accuracy", "val/accuracy"), by=("optimizer.wd",), logx=True, threshold=0.99, name="accuracy"),
        curves("val/loss", by=("optimizer.wd",), logx=True, name="loss"),
        survival("val/accuracy", 0.99, by=("optimizer.wd",)),
        dots("val/accuracy", by=("optimizer.wd",)),
    ]


QUESTION = "A small transformer learns half of a division table by heart. When, if ever, does it work out the other half, and what does weight decay change?"
