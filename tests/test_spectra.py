"""Spectra in the basis of a group: against explicit cosines and sines over the whole (x, y) table, on logits of known waves, and as measures of a run."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import product
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from shoal import tasks
from shoal.config import ModularConfig, ModuleConfig, RunConfig, StudyConfig
from shoal.config.fields import ConfigError
from shoal.config.load import override
from shoal.inference import evaluate
from shoal.inference.evaluate import batches
from shoal.inference.spectra import BASES, band, elements, excluded, gini, key_frequencies, mean_by, needed, places, primitive_root, restricted, spectrum
from shoal.studies import grokking_progress as study
from shoal.train.run import Run

GENERATOR = np.random.default_rng()
OPERATIONS = ("add", "sub", "mul", "div")


def parameter(operation: str, x: int, y: int, p: int) -> int | None:
    """The group's coordinate of x op y from the operands alone: their sum or difference, or that of their logarithms; None for a zero operand of x and /."""
    sign = 1 if operation in ("add", "mul") else -1
    if operation in ("add", "sub"):
        return (x + sign * y) % p
    g = primitive_root(p)
    log = {pow(g, k, p): k for k in range(p - 1)}
    return (log[x] + sign * log[y]) % (p - 1) if x and y else None


def waves(s: NDArray[Any], n: int, frequencies: list[int], constant: bool = True) -> NDArray[np.float64]:
    """[N, m]: cosines and sines of these frequencies, one column each."""
    angles = [2 * math.pi * k * s / n for k in frequencies]
    return np.stack([*([np.ones(len(s))] if constant else []), *(f(angle) for angle in angles for f in (np.cos, np.sin))], axis=1)


def projected(table: NDArray[Any], columns: NDArray[Any]) -> NDArray[np.float64]:
    return columns @ np.linalg.lstsq(columns, table, rcond=None)[0]


def clock(p: int, basis: str, amplitudes: dict[int, float]) -> Tensor:
    """float64 [p, p]: logits of class c where the answer is r, sum_k a_k cos(2 pi k (place(r) - place(c)) / n); 0 for residues without a place."""
    place = places(p, basis)
    n = len(elements(p, basis))
    logits = torch.stack([a * torch.cos(2 * math.pi * k * (place[:, None] - place) / n) for k, a in amplitudes.items()]).sum(0).double()
    known = place >= 0
    return logits * known[:, None] * known


@pytest.mark.parametrize(("p", "root"), [(2, 1), (3, 2), (7, 3), (23, 5), (41, 6), (43, 3), (97, 5), (113, 3), (191, 19), (409, 21)])
def test_primitive_root_and_logarithms(p: int, root: int) -> None:
    assert primitive_root(p) == root  # OEIS A001918
    order, log = elements(p, "discrete log"), places(p, "discrete log")
    assert sorted(order.tolist()) == list(range(1, p)) and log[0] == -1
    assert all(pow(root, int(log[x]), p) == x for x in range(1, p))
    assert all(int(log[x * y % p]) == (int(log[x]) + int(log[y])) % (p - 1) for x, y in product(range(1, min(p, 30)), repeat=2))
    assert elements(p, "additive").tolist() == places(p, "additive").tolist() == list(range(p))


def test_bad_input() -> None:
    for p in (0, 1, 9, 91):
        with pytest.raises(ConfigError, match=f"prime modulus, not {p}"):
            primitive_root(p)
    with pytest.raises(ConfigError, match="not one of additive, discrete log"):
        elements(7, "multiplicative")


@pytest.mark.parametrize("n", [1, 2, 12, 13])
def test_spectrum_is_the_squared_length_of_projections(n: int) -> None:
    table = GENERATOR.normal(size=(n, 3, 2))
    flat, power = table.reshape(n, -1), spectrum(torch.tensor(table)).numpy()
    expected = [np.square(projected(flat, waves(np.arange(n), n, [k], constant=False))).sum() for k in range(n // 2 + 1)]
    np.testing.assert_allclose(power, expected, atol=1e-12)
    np.testing.assert_allclose(power.sum(), np.square(table).sum())
    chosen = sorted(GENERATOR.choice(n // 2 + 1, size=n // 4 + 1, replace=False).tolist())
    np.testing.assert_allclose(band(torch.tensor(table), chosen).numpy().reshape(n, -1), projected(flat, waves(np.arange(n), n, chosen, False)), atol=1e-12)
    np.testing.assert_allclose(band(torch.tensor(table), range(n // 2 + 1)).numpy(), table, atol=1e-12)


def test_mean_by() -> None:
    values, place = torch.randn(50, 3), torch.randint(0, 4, (50,))
    expected = torch.stack([values[place == s].double().mean(0) for s in range(5)])
    torch.testing.assert_close(mean_by(values, place, 5), expected, equal_nan=True)


@pytest.mark.parametrize("operation", OPERATIONS)
def test_restricted_and_excluded_are_projections_of_the_whole_table(operation: str) -> None:
    """Of random logits over all (x, y), without any mean: least squares on the waves in s(x, y), which come from the operands."""
    p = 13
    rows = [(x, y, s) for x, y in product(range(p), repeat=2) if (s := parameter(operation, x, y, p)) is not None]
    n = p if operation in ("add", "sub") else p - 1
    s, logits, keys = np.array([row[2] for row in rows]), GENERATOR.normal(size=(len(rows), 5)), [2, 3, n // 2]
    answer = torch.tensor([study._answers(operation, torch.tensor([x]), torch.tensor([y]), p).item() for x, y, _ in rows])
    place = places(p, study.BASIS[operation])[answer]
    assert place.tolist() == s.tolist(), "the answer's place is what the operands say"
    np.testing.assert_allclose(restricted(torch.tensor(logits), place, n, keys).numpy(), projected(logits, waves(s, n, keys)), atol=1e-12)
    np.testing.assert_allclose(excluded(torch.tensor(logits), place, n, keys).numpy(), logits - projected(logits, waves(s, n, keys, False)), atol=1e-12)


@pytest.mark.parametrize("p", [31, 43])
@pytest.mark.parametrize(("own", "other"), [BASES, BASES[::-1]])
def test_waves_are_found_in_their_basis_and_only_there(p: int, own: str, other: str) -> None:
    amplitudes = {1: 3.0, 6: 2.0, 11: 1.5}
    table = clock(p, own, amplitudes)
    power = spectrum(table[elements(p, own)])
    assert key_frequencies(power, 0.999) == [1, 6, 11]
    shares = torch.tensor([power[k] for k in amplitudes]) / power[1:].sum()
    squares = torch.tensor([a * a for a in amplitudes.values()])
    torch.testing.assert_close(shares, squares / squares.sum(), check_dtype=False)
    assert gini(power[1:]) > 0.85 and needed(power[1:]) == 3

    wrong = spectrum(table[elements(p, other)])[1:]
    assert needed(wrong) > 0.6 * len(wrong) and gini(wrong) < 0.5
    noise = torch.tensor(GENERATOR.normal(size=(p, p)))
    for basis in BASES:
        dense = spectrum(noise[elements(p, basis)])[1:]
        assert needed(dense) > 0.6 * len(dense) and gini(dense) < 0.3


def test_sparsity_numbers() -> None:
    power = torch.tensor(GENERATOR.exponential(size=17))
    a = power.numpy()
    assert gini(power) == pytest.approx(np.abs(a[:, None] - a).sum() / (2 * len(a) * a.sum()))
    assert gini(torch.ones(5)) == pytest.approx(0) and gini(torch.eye(5)[2]) == pytest.approx(0.8) and math.isnan(gini(torch.zeros(3)))
    for share in (0.1, 0.5, 0.9, 1.0):
        expected = next(m for m in range(1, 18) if np.sort(a)[::-1][:m].sum() >= share * a.sum() * (1 - 1e-9))
        assert needed(power, share) == expected
    assert needed(torch.ones(10)) == 9 and needed(torch.eye(5)[2]) == 1
    assert key_frequencies(torch.tensor([99.0, 1, 5, 0, 4])) == [2, 4], "the constant is none"
    assert key_frequencies(torch.tensor([0.0, 1, 5, 0, 4]), 1.0) == [1, 2, 4]
    assert key_frequencies(torch.ones(41)) == list(range(1, 11)), "at most ten, the lowest of equals"


class Clock(nn.Module):
    """A network that is given: logits by answer from a table [p, p], its embedding the same waves; "=" is never answered."""

    def __init__(self, operation: str, p: int, table: Tensor, embedding: Tensor) -> None:
        super().__init__()
        self.operation, self.p = operation, p
        self.table, self.embedding = nn.Parameter(table.float()), nn.Embedding(p + 1, embedding.shape[1])
        self.embedding.weight.data[:p] = embedding

    def forward(self, tokens: Tensor, context: Any) -> tuple[Tensor, None]:
        return self.table[study._answers(self.operation, tokens[:, 0], tokens[:, 1], self.p)][:, None], None  # [B, 1, p]

    def logits(self, hidden: Tensor) -> Tensor:
        return torch.cat([hidden, torch.full_like(hidden[..., :1], -1e9)], dim=-1)

    def linear_head(self) -> None:
        return None


def given(operation: str, p: int, **changes: Any) -> Run:
    """A run that answers with two waves at the end, and whose earlier weights are smaller, with noise."""
    config = RunConfig(
        task=ModularConfig(p=p, operation=operation, train_fraction=0.4, val_fraction=0.6, test_fraction=0.0, operator_token=False, **changes),
        steps=30,
        snapshots=(0, 20),
    )
    basis = study.BASIS[operation]
    k = torch.tensor([2, 5])
    angle = 2 * math.pi * places(p, basis)[:, None] * k / len(elements(p, basis))
    embedding = torch.cat([angle.cos(), angle.sin()], dim=1) + 0.01 * torch.randn(p, 4)
    table, noise = clock(p, basis, {2: 3.0, 5: 3.0}), torch.randn(p, p)

    def run(gain: float, past: dict[int, Any]) -> Run:
        model: Any = Clock(operation, p, gain * table + 0.1 * noise, embedding)
        return Run(config=config, task=tasks.build(config.task), model=model, past=past)

    return run(1.0, {step: (lambda gain=gain: run(gain, {})) for step, gain in ((0, 0.0), (20, 0.3))})


@pytest.mark.parametrize("operation", OPERATIONS)
def test_measures_of_a_given_run(operation: str) -> None:
    p, run = 13, given(operation, 13)
    own, found = study.BASIS[operation], study.spectrum(run)
    assert [r["frequency"] for r in found if r["key"]] == [2, 5] and len(found) == 2 * (p // 2)
    for column, basis in product(("embedding", "logits"), BASES):
        assert math.fsum(r[column] for r in found if r["basis"] == basis) == pytest.approx(1)
    by = {(r["of"], r["basis"]): r for r in study.sparsity(run)}
    for of in ("embedding", "logits"):
        right, wrong = by[of, own], by[of, next(b for b in BASES if b != own)]
        assert right["needed"] == 2 and right["share"] == 2 / 6 and right["gini"] > 0.6 > 0.5 > wrong["gini"] and wrong["needed"] > 3

    measured = study.progress(run)
    assert [r["step"] for r in measured] == [0, 20, 30]
    first, end = measured[0], measured[-1]
    assert end["val/accuracy"] == end["train/accuracy"] == 1 and first["val/accuracy"] < 0.5
    assert end["val/restricted"] < end["val/loss"] + 0.1 and end["train/excluded"] > 2 and first["val/restricted"] == pytest.approx(math.log(p), abs=0.3)
    for row, then in zip(measured, (run.at(0), run.at(20), run), strict=True):
        for split in ("train", "val"):
            if operation in ("add", "sub"):  # every row counts: as the run's own evaluation
                expected = evaluate(then, split)
            else:
                (batch,) = batches(then, split)
                nonzero = (batch.tokens[:, :2] > 0).all(1)
                hidden, _ = then.model(batch.tokens, None)
                logits = then.model.logits(hidden)[nonzero, 0]
                right = logits.argmax(-1) == batch.targets[nonzero, 0]
                expected = {"loss": nn.functional.cross_entropy(logits, batch.targets[nonzero, 0]).item(), "accuracy": right.float().mean().item()}
            assert row[f"{split}/loss"] == pytest.approx(expected["loss"], abs=1e-5)
            assert row[f"{split}/accuracy"] == pytest.approx(expected["accuracy"], abs=1e-6)


def test_random_answers_are_judged_on_what_was_trained() -> None:
    row = study.progress(given("div", 13, label_noise=1.0))[-1]
    assert row["val/accuracy"] == 1 and row["train/accuracy"] < 0.5, "the network knows the right answers, training had others"


def test_with_an_operator_token_and_a_test_split() -> None:
    run = given("sub", 13)
    config = replace(run.config, task=replace(run.config.task, operator_token=True, val_fraction=0.3, test_fraction=None))  # pyright: ignore[reportArgumentType, reportCallIssue]
    whole = study.whole_table(replace(run, config=config, task=tasks.build(config.task)))
    assert len(whole.answer) == 169 and int(whole.trained.sum()) == round(0.4 * 169)
    assert (whole.answer == whole.target).all() and torch.bincount(whole.answer).tolist() == [13] * 13


def test_the_snapshots_before_the_jump() -> None:
    def steps(*accuracies: float) -> list[int]:
        row: Any = {"measures": {"progress": [{"step": i, "val/accuracy": a} for i, a in enumerate(accuracies)]}}
        return [r["step"] for r in study._before(row)]

    assert steps(0.01, 0.09, 0.1, 0.02, 1.0) == [0, 1]
    assert steps(0.01, 0.02) == [0, 1], "never there: all of them"
    assert steps(0.5, 1.0) == [0], "there at once: the first"


@pytest.mark.parametrize(
    ("values", "field"),
    [
        ({"variants": {"both": {"task.operation": "squares"}}}, "task.operation"),
        ({"run.task.p": 45}, "task.p"),
        ({"run.task.tokens": "digits"}, "task.tokens"),
        ({"run.task.val_fraction": 0.2}, "task.test_fraction"),
        ({"run.stop_metric": "val/accuracy"}, "stop_metric"),
    ],
)
def test_what_cannot_be_measured_is_refused_before_training(values: dict[str, Any], field: str) -> None:
    with pytest.raises(ConfigError, match=field):
        study.study(override(study.quick(), values))


def test_a_model_without_an_embedding_is_refused() -> None:
    with pytest.raises(ConfigError, match="model"):
        study.study(StudyConfig(run=replace(study.quick().run, model=ModuleConfig())))
