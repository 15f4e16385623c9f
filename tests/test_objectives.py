"""What the losses do at the ends of their number formats; elsewhere the laws compare them with float64."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from laws_training import FLEETS, IN_EVALUATIONS, MODULAR, NEXT_TOKEN, finished
from torch import Tensor

from shoal.config.fields import ConfigError
from shoal.contracts import Batch, Sums
from shoal.results.rows import lower_is_better
from shoal.train.fleet import Fleet
from shoal.train.objectives import OBJECTIVES, means
from shoal.train.plan import validate


class Given:
    """A model that answers with these logits."""

    def __init__(self, logits: Tensor) -> None:
        self.answer = logits

    def __call__(self, tokens: Tensor, context: Any) -> tuple[Tensor, None]:
        return self.answer, None

    def logits(self, hidden: Tensor) -> Tensor:
        return hidden

    def linear_head(self) -> None:
        return None


def measured(name: str, logits: Tensor, targets: Tensor, weights: Tensor | None = None) -> Sums:
    """Of logits [R, B, S, V]."""
    return OBJECTIVES[name](Given(logits), Batch(targets, targets, torch.ones(targets.shape) if weights is None else weights), None)


CASES = [  # logits, target, and in which objectives the other terms are lost in the largest
    ([10.0, 0.0, 0.0], 0, ()),
    ([0.0, -20.0, -20.0], 0, ("cross_entropy",)),
    ([0.0, -20.0, -20.0], 1, ("cross_entropy",)),  # lost, and wrong
    ([-900.0, -940.0, -990.0], 0, ("cross_entropy", "cross_entropy_float64")),  # far below 0: s(x) = 1 / (1 - x) is nearly the same for all
    ([5e8, 5e8, 1.0], 0, ()),  # two largest
    ([1e9, 0.0, -5.0], 0, ("cross_entropy", "cross_entropy_float64", "stablemax")),
    ([1e9, 0.0, -5.0], 2, ("cross_entropy", "cross_entropy_float64", "stablemax")),
    ([1e5, 0.0, -5.0], 0, ("cross_entropy", "cross_entropy_float64")),
]


@pytest.mark.parametrize("name", NEXT_TOKEN)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_collapse(name: str, dtype: torch.dtype) -> None:
    """Zero loss: collapsed onto the target. What is not scored is not counted; without an evaluation nothing is."""
    for values, target, lost in CASES:
        logits = torch.tensor(values, dtype=dtype).expand(2, 1, 4, 3)
        weights = torch.tensor([[[1.0, 0.5, 0.0, 2.0]], [[0.0, 0.0, 0.0, 0.0]]])
        targets = torch.full((2, 1, 4), target)
        with torch.no_grad():
            sums = measured(name, logits, targets, weights)
        collapsed, right = name in lost, values[target] == max(values)
        assert [x.tolist() for x in sums.metrics["collapse"]] == [[3.0 * collapsed, 0.0], [3.0, 0.0]]
        assert [x.tolist() for x in sums.metrics["zero_loss"]] == [[3.0 * (collapsed and right), 0.0], [3.0, 0.0]]
        assert (sums.loss[0] == 0) == (collapsed and right) and sums.loss.dtype == torch.float32
        assert not measured(name, logits, targets, weights).metrics.keys() & set(IN_EVALUATIONS)


def gradient(name: str, values: list[float], target: int) -> np.ndarray:
    logits = torch.tensor(values).view(1, 1, 1, -1).requires_grad_()
    (slope,) = torch.autograd.grad(measured(name, logits, torch.full((1, 1, 1), target)).loss.sum(), logits)
    assert slope.dtype == torch.float32
    return slope.flatten().double().numpy()


@pytest.mark.parametrize("target", range(7))
def test_gradient_of_stablemax(target: int) -> None:
    """s'(x) (1 / sum of s - [target] / s), with s' = 1 at 0 from both sides; finite where the branch not taken has a pole."""
    for values in ([0.0, 1.0, -1.0, 2.5, -3.0, -0.0, 1e-3], [0.0, 1e6, -1e6, 1.0, 50.0, -50.0, 3.0]):
        x = np.array(values)
        s = np.where(x >= 0, x + 1, 1 / (1 - np.minimum(x, 0)))
        slope = np.where(x >= 0, 1.0, 1 / (1 - np.minimum(x, 0)) ** 2)
        expected = slope * (1 / s.sum() - (np.arange(7) == target) / s)
        assert gradient("stablemax", values, target) == pytest.approx(expected, rel=1e-4, abs=1e-6 * np.abs(expected).max())


def test_gradient_in_float64() -> None:
    """Where float32 has lost the target's gradient the float64 loss still gives it; elsewhere they agree."""
    values = [0.0, -20.0, -21.0]
    lost, kept = gradient("cross_entropy", values, 0), gradient("cross_entropy_float64", values, 0)
    others = np.exp(values[1:]) / np.exp(values).sum()
    assert lost[0] == 0 and kept == pytest.approx([-others.sum(), *others], rel=1e-6)
    assert gradient("cross_entropy", [1.0, 2.0, 0.5], 0) == pytest.approx(gradient("cross_entropy_float64", [1.0, 2.0, 0.5], 0), rel=1e-5)


def test_losses_of_a_model_too_sure_of_itself() -> None:
    """Each run's shares over a whole split; a head a million times too large leaves every loss 0 or huge."""
    fleet = Fleet.build([replace(run, steps=1) for run in FLEETS["mlp"]])
    before = fleet.evaluate("train")
    assert (before["collapse"] == 0).all() and (before["zero_loss"] == 0).all()
    fleet.layout.view(fleet.flat, "head.weight")[2:].mul_(1e9)
    after = fleet.evaluate("train")
    assert (after["collapse"] == (torch.arange(8) >= 2)).all() and after["zero_loss"][2:].equal(after["accuracy"][2:])


def test_where_they_are_measured() -> None:
    """In evaluations, not in steps; no run stops by them, and neither end is the better one."""
    run = replace(MODULAR, steps=4, evaluate_every=2)
    _, rows = finished(Fleet.build([run]))
    names = {name for _, _, name in rows}
    assert {f"{split}/{metric}" for split in ("train", "val") for metric in IN_EVALUATIONS} < names
    assert not {f"batch/{metric}" for metric in IN_EVALUATIONS} & names
    for metric in IN_EVALUATIONS:
        assert lower_is_better(f"val/{metric}") is None
        with pytest.raises(ConfigError, match="stop_metric"):
            validate(replace(run, stop_metric=f"train/{metric}"))


def test_nothing_scored() -> None:
    with torch.no_grad():
        sums = measured("stablemax", torch.randn(1, 2, 1, 5), torch.zeros(1, 2, 1, dtype=torch.int64), torch.zeros(1, 2, 1))
    assert all(value.isnan() for value in means(sums).values())
