"""Losses as a table: nats, perplexity and bits per byte against the same by hand, and what is missing is left out."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from invented_losses import DATA, losses
from scipy import stats

from shoal.config import LanguageConfig, RunConfig, with_seed
from shoal.results import Rows
from shoal.results.perplexity import exponential, perplexities
from shoal.results.statistics import Estimate
from shoal.results.tables import own

RUN = RunConfig(task=LanguageConfig(), evaluate=("train:64", "val"), steps=100)


def lines(rows: Rows, by: list[str]) -> list[Any]:
    return list(perplexities(by).make(rows))


def test_against_the_same_by_hand(tmp_path: Path) -> None:
    x = 3 + np.random.default_rng().uniform(-0.5, 0.5, size=(2, 4))
    runs = [with_seed(replace(RUN, variant=name), seed) for name in ("a", "b") for seed in range(4)]
    value = {(run.variant, run.seeds.init): float(x["ab".index(run.variant), run.seeds.init]) for run in runs}
    rows = losses(tmp_path, runs, lambda run: value[run.variant, run.seeds.init], measures=lambda run: {"pairs": [{"nats": 4.0 + run.seeds.init}]})
    for i, line in enumerate(lines(rows, ["variant"])):
        low, high = stats.t.interval(0.95, 3, x[i].mean(), stats.sem(x[i]))
        assert line["setting"] == "ab"[i]
        for name, of in (("validation loss", lambda y: y), ("perplexity", np.exp), ("bits per byte", lambda y: y / math.log(2) / DATA["val bytes per token"])):
            estimate = line[name]
            np.testing.assert_allclose([estimate.value, estimate.low, estimate.high], of(np.array([x[i].mean(), low, high])), rtol=1e-6)
            assert estimate.n == 4
        assert line["training loss"].value == pytest.approx(x[i].mean() - 0.1, rel=1e-6)
        assert (line["uniform loss"], line["unigram loss"], line["bigram loss"]) == (6.9, 6.0, 5.5)


def test_what_is_missing(tmp_path: Path) -> None:
    assert lines(Rows(), []) == []
    one = losses(tmp_path / "one", [replace(RUN, evaluate=("val",))], lambda run: 2.0, data={})
    (line,) = lines(one, [])
    assert line["setting"] == "all runs" and line["validation loss"].n == 1 and line["perplexity"].value == pytest.approx(math.e**2)
    assert math.isnan(line["bits per byte"].value) and math.isnan(line["bigram loss"]) and math.isnan(line["unigram loss"])
    assert line["training loss"].value == pytest.approx(1.9), "of the batches, where no training split is evaluated"
    told = own(perplexities([]), one)
    assert not told["error"] and "nats per token" in told["caption"] and "1 to T tokens" in told["caption"]


def test_a_perplexity_of_no_interval_is_of_none() -> None:
    assert exponential(Estimate("mean", 0.0, -math.inf, math.inf, 1)) == Estimate("mean", 1.0, 0.0, math.inf, 1)
    assert exponential(Estimate("mean", 1e4, 1e3, 1e5, 2)).value < math.inf, "a loss beyond what a float can be the exponential of"
