"""Schedules against their definition in plain Python, and torch's schedulers where they have the same one."""

from __future__ import annotations

import math

import pytest
import torch

from shoal.train.schedules import multiplier

KINDS = ("constant", "cosine", "linear")


def reference(kind: str, progress: float, warmup: float, floor: float, end: float) -> float:
    if progress < warmup:
        return progress / warmup
    if kind == "constant":
        return 1.0
    if progress >= end:
        return floor
    x = (progress - warmup) / (end - warmup)
    return floor + (1 - floor) * (0.5 * (1 + math.cos(math.pi * x)) if kind == "cosine" else 1 - x)


def rows(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float32)


@pytest.mark.parametrize("kind", KINDS)
def test_equals_the_definition_per_run(kind: str) -> None:
    warmup, floor, end = (0.0, 0.1, 0.25, 0.1), (0.0, 0.1, 0.5, 0.0), (1.0, 0.9, 0.5, 1.0)
    for step in range(241):  # past the end too
        progress = torch.tensor(step) / torch.tensor([200, 200, 200, 150])
        got = multiplier(kind, progress, rows(*warmup), rows(*floor), rows(*end))
        assert got.dtype == torch.float32 and got.shape == (4,)
        for r in range(4):
            assert got[r].item() == pytest.approx(reference(kind, progress[r].item(), *(rows(v[r]).item() for v in (warmup, floor, end))), abs=3e-7)


@pytest.mark.parametrize("kind", KINDS)
def test_ends_of_the_intervals(kind: str) -> None:
    def at(progress: float, warmup: float, floor: float, end: float) -> float:
        return multiplier(kind, *(torch.tensor(x) for x in (progress, warmup, floor, end))).item()

    last = 1.0 if kind == "constant" else 0.25
    assert at(0.0, 0.0, 0.25, 1.0) == 1.0  # no warm-up: the first update has the peak
    assert at(0.0, 0.5, 0.25, 1.0) == 0.0  # with one it has 0
    assert at(0.5, 0.5, 0.25, 1.0) == 1.0
    assert at(0.75, 0.5, 0.25, 0.75) == last and at(1.0, 0.5, 0.25, 0.75) == last
    assert at(0.5, 0.5, 0.25, 0.5) == last  # nothing between warm-up and end


def test_equals_torch_schedulers() -> None:
    def torchs(make) -> list[float]:
        optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
        scheduler = make(optimizer)
        rates = []
        for _ in range(100):
            rates.append(scheduler.get_last_lr()[0])
            optimizer.step()
            scheduler.step()
        return rates

    cosine = torchs(lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, T_max=100, eta_min=0.1))
    linear = torchs(lambda o: torch.optim.lr_scheduler.LinearLR(o, start_factor=1.0, end_factor=0.1, total_iters=60))
    progress = torch.arange(100) / 100
    for kind, end, expected in (("cosine", 1.0, cosine), ("linear", 0.6, linear)):
        got = multiplier(kind, progress, torch.tensor(0.0), torch.tensor(0.1), torch.tensor(end))
        torch.testing.assert_close(got, rows(*expected), rtol=0, atol=5e-7)


def test_small_rates_keep_their_digits() -> None:
    """Just before the end (1 + cos) / 2 in float32 is 0 or a multiple of 6e-8; the true value here is 2.5e-10."""
    progress = rows(1 - 1e-5)
    got = multiplier("cosine", progress, rows(0.0), rows(0.0), rows(1.0))
    assert got.item() == pytest.approx(math.sin(math.pi / 2 * (1 - progress.item())) ** 2, rel=1e-2)


def test_run_axis_and_compile() -> None:
    generator = torch.Generator().manual_seed(0)
    progress, warmup, floor = (torch.rand(3, generator=generator) * 0.9 for _ in range(3))
    end = warmup + 0.05
    for kind in KINDS:
        fleet = multiplier(kind, progress, warmup, floor, end)
        for r in range(3):
            assert multiplier(kind, progress[r], warmup[r], floor[r], end[r]) == fleet[r]
            assert multiplier(kind, progress[r : r + 1], warmup[r : r + 1], floor[r : r + 1], end[r : r + 1]) == fleet[r]
        compiled = torch.compile(multiplier, fullgraph=True, backend="aot_eager")
        assert compiled(kind, progress, warmup, floor, end).equal(fleet)
