"""A fleet trains each of its runs as that run would be trained alone, and as plain PyTorch would train it.

Equal to the last bit, because the arithmetic is the same: draws, chunks, resumption, order, mates. Within 1e-5 over 100 steps, because kernels may differ with
the number of runs: losses of a fleet and of a run alone. (On an AMD EPYC with one thread those are equal to the last bit, too.)
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from laws import close, same
from laws_training import FLEETS, MEMORIZE, MLP, MODULAR, MUON, SMALL, assert_alike, everything, facts, finished, of_run, run_of
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from shoal.config import (
    SGD,
    Adagrad,
    Adam,
    AdamW,
    BaumWelch,
    Gradient,
    MemorizeConfig,
    RunConfig,
    Schedule,
    Weights,
    fields_per_run,
    flatten,
    with_seed,
    with_values,
)
from shoal.contracts import Context
from shoal.inference import evaluate
from shoal.train import checkpoint, optimizers
from shoal.train import fleet as fleets
from shoal.train.fleet import Fleet
from shoal.train.objectives import cross_entropy

every_fleet = pytest.mark.parametrize("name", FLEETS)


def assert_same(a: Fleet, b: Fleet) -> None:
    for name, x in everything(a).items():
        assert same(x, everything(b)[name]), name


def short(name: str, steps: int) -> list[RunConfig]:
    return [replace(run, steps=steps, evaluate_every=7) for run in FLEETS[name]]


def test_steps_are_whole_numbers() -> None:
    """Also where float32 has no odd ones any more: else a run never ends, or ends early."""
    many = [2**24 + 1, 2**24 + 3]
    assert Fleet.build([replace(with_seed(MODULAR, seed), steps=steps) for seed, steps in enumerate(many)], "cpu").steps.tolist() == many


# --- a run and its fleet


@every_fleet
def test_a_run_in_its_fleet_is_the_run_alone(name: str) -> None:
    """Initial values, batches and dropout bit for bit; every loss, gradient norm and evaluation over 100 steps within 1e-5."""
    runs = FLEETS[name]
    fleet = Fleet.build(runs)
    start, clock = fleet.flat.clone(), torch.tensor(0)
    draws = [fleet.task.batch(fleet.tables, fleet.order_key, clock + step, fleet.config.batch_size) for step in (0, 1, 50)]
    rows = facts(fleet.advance(100))
    for r in (0, 3, 7):
        alone = Fleet.build([runs[r]])
        assert same(alone.flat[0], start[r]) and same(alone.noise_key, fleet.noise_key[r : r + 1])
        for step, batch in zip((0, 1, 50), draws, strict=True):
            assert run_of(alone.task.batch(alone.tables, alone.order_key, clock + step, fleet.config.batch_size), 0) == run_of(batch, r)
        assert_alike(of_run(rows, r), of_run(facts(alone.advance(100)), 0))


@every_fleet
def test_order_of_runs(name: str) -> None:
    order = [5, 2, 7, 0, 1, 6, 4, 3]
    runs = short(name, 30)
    (fleet, rows), (moved, moved_rows) = finished(Fleet.build(runs)), finished(Fleet.build([runs[r] for r in order]))
    assert same(moved.flat, fleet.flat[order])
    assert {(order[r], step, metric): value for (r, step, metric), value in moved_rows.items()} == rows


@every_fleet
def test_chunks_do_not_matter(name: str) -> None:
    whole, rows = finished(Fleet.build(short(name, 30)))
    for chunk in (1, 13):
        fleet, same_rows = finished(Fleet.build(short(name, 30)), chunk)
        assert_same(fleet, whole)
        assert same_rows == rows


@every_fleet
@pytest.mark.parametrize("steps", [11, 14])
def test_resumed_is_uninterrupted(name: str, steps: int, tmp_path: Path) -> None:
    """Saved after an odd number of steps, or just after an evaluation, and loaded in a new fleet: every bit of parameters, moments, status and rows."""
    whole, rows = finished(Fleet.build(short(name, 30)))
    fleet = Fleet.build(short(name, 30))
    tables = [fleet.advance(steps)]
    checkpoint.save(fleet, tmp_path / "checkpoint", {"parts": 3})
    fleet.advance(5)  # lost
    fleet, extra = checkpoint.load(short(name, 30), tmp_path / "checkpoint", "cpu")
    tables.append(fleet.advance(100))
    assert extra == {"parts": 3} and fleet.done
    assert_same(fleet, whole)
    assert facts(*tables) == rows


@pytest.mark.parametrize("batch_size", [8, 0])
def test_accumulated_is_the_whole_batch(batch_size: int) -> None:
    """Four pieces, with dropout, with strings of different lengths, and with five rows that four does not divide."""
    runs = [replace(run, steps=20, batch_size=batch_size, optimizer=SGD(lr=0.03)) for run in FLEETS["memorize"]]
    (whole, rows), (pieces, same_rows) = finished(Fleet.build(runs)), finished(Fleet.build([replace(run, accumulate=4) for run in runs]))
    assert_alike(same_rows, rows)
    close(pieces.flat, whole.flat, 1e-5)


def test_a_nan_mate() -> None:
    """It dies alone, keeps its last finite parameters, and its mates do not change by one bit, whatever its learning rate did to it."""
    good = short("modular", 60)
    bad = [replace(run, optimizer=AdamW(lr=1e30)) if r == 3 else run for r, run in enumerate(good)]
    (fleet, rows), (other, expected) = finished(Fleet.build(good)), finished(Fleet.build(bad))
    mates = [r for r in range(8) if r != 3]
    for name, x in everything(other).items():
        assert not x.dim() or same(x[mates], everything(fleet)[name][mates])
        assert x.isfinite().all()
    assert {key: value for key, value in expected.items() if key[0] != 3} == {key: value for key, value in rows.items() if key[0] != 3}
    death = other.outcomes()[3]
    assert death["status"] == "dead" and 1 <= death["steps"] <= 3 and [o["status"] for r, o in enumerate(other.outcomes()) if r in mates] == ["completed"] * 7
    assert max(step for r, step, _ in expected if r == 3) == death["steps"], "no rows from the dead"
    alone = Fleet.build([bad[3]])
    alone.advance(death["steps"])
    assert same(alone.flat[0], other.flat[3]), "what it had before the step that killed it"
    assert other.summary["dead"] == 1 and other.summary["finished"] == 7


class Whole(nn.Module):
    """A model from tokens to logits, as ``functional_call`` wants it."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, tokens: Tensor, context: Context) -> Tensor:
        return self.model.logits(self.model(tokens, context)[0])


@every_fleet
def test_equals_vmap_over_the_model(name: str) -> None:
    """Losses and gradients of the run axis = torch.func.vmap of the model without one, over stacked parameters."""
    fleet = Fleet.build(FLEETS[name])
    batch = fleet.task.batch(fleet.tables, fleet.order_key, torch.tensor(0), 12)
    sums = cross_entropy(fleet.model, batch)
    gradients = torch.autograd.grad(sums.loss.sum(), list(fleet.parameters.values()))
    one = Whole(fleet.one(0).model)

    def loss(parameters: dict[str, Tensor], tokens: Tensor, targets: Tensor, weights: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        logits = functional_call(one, parameters, (tokens, Context(mask=mask, at=batch.at)))
        total = (F.cross_entropy(logits.flatten(0, -2), targets.flatten(), reduction="none") * weights.flatten()).sum()
        return total, total

    stacked = {f"model.{name}": p.detach() for name, p in fleet.parameters.items()}
    with sdpa_kernel(SDPBackend.MATH):  # the fused kernels have no rule for vmap
        over = (0, 0, 0, 0, None if batch.mask is None else 0)
        expected, losses = vmap(grad(loss, has_aux=True), in_dims=over)(stacked, batch.tokens, batch.targets, batch.weights, batch.mask)
    close(sums.loss, losses, 1e-5)
    for name, gradient in zip(fleet.parameters, gradients, strict=True):
        close(gradient, expected[f"model.{name}"], 1e-4)


PLAIN: dict[str, tuple[Any, Callable[..., torch.optim.Optimizer]]] = {
    "sgd": (SGD(lr=0.1, momentum=0.9, wd=0.01), lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.01)),
    "adam": (Adam(lr=3e-3), lambda p: torch.optim.Adam(p, lr=3e-3)),
    "adamw": (AdamW(lr=3e-3, wd=0.5), lambda p: torch.optim.AdamW(p, lr=3e-3, weight_decay=0.5)),
    "adagrad": (Adagrad(lr=0.05), lambda p: torch.optim.Adagrad(p, lr=0.05)),
}


@pytest.mark.parametrize("optimizer", PLAIN)
@pytest.mark.parametrize("clip", [0.0, 0.3])
def test_equals_a_plain_pytorch_loop(optimizer: str, clip: float) -> None:
    """Run 1 of a fleet of three, written out: mean loss, clip_grad_norm_, torch.optim, LambdaLR with warm-up and cosine."""
    config, make = PLAIN[optimizer]
    bias = optimizer != "adagrad"  # which makes whole steps of the rounding errors that are the gradient of a key's bias
    base = replace(MODULAR, model=replace(SMALL, bias=bias), optimizer=config, clip=clip, steps=20, schedule=Schedule(kind="cosine", warmup=0.25, floor=0.1))
    fleet = Fleet.build([with_values(with_seed(base, s), {"clip": clip * (s + 1)}) for s in (4, 0, 5)])
    model = fleet.one(1).model.requires_grad_()
    steps = make(list(model.parameters()))
    schedule = torch.optim.lr_scheduler.LambdaLR(steps, lambda n: n / 5 if n < 5 else 0.1 + 0.9 * (1 + math.cos(math.pi * (n - 5) / 15)) / 2)
    rows = facts(fleet.advance(20))
    for step in range(20):
        batch = fleet.task.batch(fleet.tables, fleet.order_key, torch.tensor(step), 32).each(lambda x: x[1])
        hidden, _ = model(batch.tokens)
        loss = F.cross_entropy(model.logits(hidden)[:, -1], batch.targets[:, 0])
        steps.zero_grad()
        loss.backward()
        norm = nn.utils.clip_grad_norm_(model.parameters(), clip if clip else math.inf)
        steps.step()
        expected = {"batch/loss": loss.item(), "batch/grad_norm": norm.item(), "learning_rate": schedule.get_last_lr()[0]}
        assert {name: rows[1, step, name] for name in expected} == pytest.approx(expected, rel=1e-4)
        schedule.step()
    trained = dict(fleet.one(1).model.named_parameters())
    for name, p in model.named_parameters():
        close(trained[name], p.detach(), 1e-4)


# --- what a run may have of its own

ALL = replace(
    MODULAR, model=replace(SMALL, dropout=0.1), steps=20, evaluate_every=5, evaluate=("train", "val", "test"), clip=0.5, stop_metric="val/loss", stop_at=0.0,
    stop_evaluations=2, task=replace(MODULAR.task, label_noise=0.1), schedule=Schedule(kind="cosine", warmup=0.1, floor=0.1, end=0.9),
    gradient=Gradient(filter="ema", noise=1e-6), weights=Weights(noise=0.01),  # little, else no eps matters
)  # fmt: skip
OTHER = {
    "task.operation": "sub",
    "task.split": "rows",
    "task.test_fraction": 0.05,
    "task.label_noise": 0.3,
    "stop_at": 100.0,
    "steps": 15,
}  # where 0.9 times the value, or 0.5 for 0, will not do


@pytest.mark.parametrize("optimizer", [cls for cls in optimizers.OPTIMIZERS if cls is not BaumWelch], ids=lambda cls: cls.__name__)  # of other models
def test_every_field_of_a_run_acts_on_it_alone(optimizer: type) -> None:
    """One fleet: a run for every per-run field, changed in that field only, between two runs with none changed, which stay equal."""
    base = replace(ALL, optimizer=optimizer())
    paths = [path for path in fields_per_run(base) if path not in ("variant", "budget")]  # a name, and what gives the steps before there is a fleet

    def changed(path: str) -> RunConfig:
        value = flatten(base)[path]
        return with_values(base, {path: OTHER[path] if path in OTHER else value + 1 if isinstance(value, int) else 0.9 * value if value else 0.5})

    fleet, rows = finished(Fleet.build([base, *map(changed, paths), base]))
    first, *others, last = (of_run(rows, r) for r in range(len(paths) + 2))
    assert same(fleet.flat[0], fleet.flat[-1]) and first == last
    assert [path for path, run in zip(paths, others, strict=True) if run == first] == [], "fields that change nothing"


def test_steps_of_a_run() -> None:
    """A run with fewer steps ends there, evaluated, whether or not an evaluation was due; from then on it does not change and has no rows."""
    runs = [with_values(with_seed(MODULAR, s), {"steps": steps}) for s, steps in enumerate((40, 13, 7, 40))]
    fleet = Fleet.build(runs)
    tables = [fleet.advance(13)]
    ended = dict(fleet.one(1).model.named_parameters())
    rows = facts(*tables, fleet.advance(100))
    assert fleet.outcomes() == [{"status": "completed", "steps": run.steps} for run in runs] and fleet.done
    assert all(same(p, ended[name]) for name, p in fleet.one(1).model.named_parameters())
    for r, run in enumerate(runs):
        _, alone = finished(Fleet.build([run]))
        assert_alike(of_run(rows, r), of_run(alone, 0))
        assert max(step for step, name in of_run(rows, r) if name == "val/loss") == run.steps
        assert max(step for step, name in of_run(rows, r) if name == "batch/loss") == run.steps - 1


def test_dropout_is_drawn_anew_at_every_step() -> None:
    """With nothing learned, the same rows have the same loss at every step only without dropout."""
    for dropout, different in ((0.0, 1), (0.2, 5)):
        run = replace(MEMORIZE, model=replace(MEMORIZE.model, dropout=dropout, init_scale=20.0), optimizer=SGD(lr=0.0), batch_size=0, steps=5)
        _, rows = finished(Fleet.build([run]))
        assert len({value for key, value in rows.items() if key[2] == "batch/loss"}) == different


# --- stopping


def test_stop_rule() -> None:
    """Finished at the first evaluation that is the third in a row at the threshold; a loss must fall to it, anything else reach it."""
    yes, no = 0.5, 0.4
    seen = [
        [no, yes, yes, yes, yes, yes],
        [yes, yes, no, yes, yes, yes],
        [yes, yes, yes, yes, no, no],
        [no, no, yes, yes, no, yes],
        [yes, yes, math.nan, yes, yes, no],
    ]
    for metric, sign in (("val/exact", 1.0), ("val/loss", -1.0)):
        run = replace(MODULAR, steps=10, evaluate_every=2, stop_metric=metric, stop_at=sign * 0.5, stop_evaluations=3)
        fleet = Fleet.build([with_seed(run, s) for s in range(5)])
        columns, name = iter(torch.tensor(seen).T * sign), metric.removeprefix("val/")
        fleet.evaluate = lambda split, columns=columns, name=name: {name: next(columns) if split == "val" else torch.zeros(5)}
        fleet.advance(100)
        expected = [("finished", 6), ("finished", 10), ("finished", 4), ("completed", 10), ("completed", 10)]
        assert [(outcome["status"], outcome["steps"]) for outcome in fleet.outcomes()] == expected
        assert fleet.step == 10 and fleet.done


def test_stop_rule_of_a_trained_fleet() -> None:
    """On what was measured: runs finish at different times, each as if alone, although a mate is evaluated at steps of its own."""
    base = replace(MODULAR, model=replace(SMALL, init_scale=5.0), stop_metric="train/loss", stop_evaluations=3, evaluate_every=5)
    rules = [(2.25, 80), (2.0, 80), (2.45, 80), (0.0, 61), (0.0, 52)]  # the first is below its loss from step 45 on
    runs = [with_values(with_seed(base, s), {"stop_at": at, "steps": steps}) for s, (at, steps) in enumerate(rules)]
    fleet, rows = finished(Fleet.build(runs), 17)
    for r, (run, outcome) in enumerate(zip(runs, fleet.outcomes(), strict=True)):
        met = [(step, value <= run.stop_at) for (step, name), value in of_run(rows, r).items() if name == "train/loss"]
        ends = [step for i, (step, _) in enumerate(met) if i >= 2 and all(ok for _, ok in met[i - 2 : i + 1])]
        assert outcome == ({"status": "finished", "steps": ends[0]} if ends else {"status": "completed", "steps": run.steps})
        assert met[-1][0] == outcome["steps"]
        alone, alone_rows = finished(Fleet.build([run]))
        assert alone.outcomes() == [outcome]
        assert_alike(of_run(rows, r), of_run(alone_rows, 0))
    assert [outcome["steps"] for outcome in fleet.outcomes()] == [55, 60, 20, 61, 52]
    assert fleet.step == 61 and fleet.done, "nothing is left to do"


def test_compaction_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs leave once half have ended; everyone's parameters, rows and outcomes are as without, and as alone."""
    rules = {"evaluate_every": 5, "stop_metric": "val/loss", "stop_evaluations": 2, "stop_at": 0.0}
    runs = [with_values(run, {**rules, "steps": steps}) for run, steps in zip(FLEETS["modular"], (60, 10, 15, 22, 8, 35, 60, 40), strict=True)]
    runs[2], runs[6] = with_values(runs[2], {"stop_at": 9.0}), with_values(runs[6], {"optimizer.lr": 1e30})
    monkeypatch.setattr(fleets, "COMPACT_EVERY", 1)
    small, small_rows = finished(Fleet.build(runs), 7)
    assert small.present == [0] and set(small.departed) == set(range(1, 8))
    monkeypatch.setattr(Fleet, "_compact", lambda self: None)
    fleet, rows = finished(Fleet.build(runs), 7)
    assert fleet.present == list(range(8)) and not fleet.departed
    ends = ["completed", "completed", "finished", "completed", "completed", "completed", "dead", "completed"]
    assert small.outcomes() == fleet.outcomes() and [outcome["status"] for outcome in small.outcomes()] == ends
    assert_alike(small_rows, rows)
    for r, run in enumerate(runs):
        assert evaluate(small.one(r), "val") == pytest.approx(evaluate(fleet.one(r), "val"), rel=1e-5, nan_ok=True)
        _, alone = finished(Fleet.build([run]))
        assert_alike(of_run(small_rows, r), of_run(alone, 0))


def test_keep() -> None:
    """The runs named go on, in the order named; those that leave stay as they were, and are reported as they were."""
    runs = short("modular", 40)
    fleet, whole = Fleet.build(runs), Fleet.build(runs)
    fleet.advance(10)
    whole.advance(10)
    left = whole.flat.clone()
    fleet.keep([6, 2, 5])
    fleet.advance(15)
    whole.advance(15)
    assert fleet.present == [6, 2, 5] and same(fleet.flat, whole.flat[[6, 2, 5]])
    assert [outcome["steps"] for outcome in fleet.outcomes()] == [10, 10, 25, 10, 10, 25, 25, 10]
    for r in (2, 3):
        expected = whole.layout.views(whole.flat[2] if r == 2 else left[3])
        assert all(same(p, expected[name]) for name, p in fleet.one(r).model.named_parameters())


# --- evaluation and accounts


@every_fleet
def test_evaluation_is_that_of_the_run(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """fleet.evaluate = inference.evaluate of the run taken out, on every split; in pieces, too; and an evaluation draws no dropout."""
    fleet = Fleet.build(FLEETS[name])
    fleet.advance(20)
    for split in fleet.task.splits:
        got = fleet.evaluate(split)
        assert same(torch.stack(list(got.values())), torch.stack(list(fleet.evaluate(split).values())))
        monkeypatch.setitem(fleets.EVALUATION_TOKENS, "cpu", 1)
        for metric, value in fleet.evaluate(split).items():
            close(value, got[metric], 1e-5)
        monkeypatch.undo()
        for r in (0, 5):
            expected = evaluate(fleet.one(r), split)
            assert {metric: value[r].item() for metric, value in got.items()} == pytest.approx(expected, rel=1e-5, nan_ok=True)


def test_metrics_are_what_they_are_called() -> None:
    """Loss and accuracy of a batch as before its update, gradient norm before clipping, evaluations after so many updates."""
    fleet = Fleet.build(short("modular", 14))
    batch = fleet.task.batch(fleet.tables, fleet.order_key, torch.tensor(0), 32)
    sums, at_start = cross_entropy(fleet.model, batch), fleet.evaluate("val")
    rows = facts(fleet.advance(7))
    at_seven = fleet.evaluate("val")
    for r in range(8):
        assert rows[r, 0, "batch/loss"] == pytest.approx((sums.loss / 32)[r].item(), rel=1e-6)
        assert rows[r, 0, "batch/accuracy"] == pytest.approx((sums.metrics["accuracy"][0] / 32)[r].item())
        assert rows[r, 0, "val/loss"] == at_start["loss"][r].item() and rows[r, 7, "val/loss"] == at_seven["loss"][r].item()
    assert not any(step == 7 and metric == "batch/loss" for _, step, metric in rows)


def test_joined_tables() -> None:
    fleet = Fleet.build(short("modular", 14))
    tables = [fleet.advance(3), fleet.advance(5), fleet.advance(6)]
    table = fleets.joined(tables)
    assert facts(table) == facts(*tables) and len({len(column) for column in table.values()}) == 1
    assert facts(fleets.joined([fleets._table([]), *tables])) == facts(*tables)


def test_record() -> None:
    fleet = Fleet.build(FLEETS["memorize"])
    record = fleet.record()
    assert record["model"]["parameters"] == sum(p.numel() for p in fleet.one(0).model.parameters())
    assert record["model"]["batch"] == [8, 13, 13] and record["model"]["flops"]["products"] == 3 * fleet.model.flops(8, 13, 13)
    assert [data["unscored"] for data in record["data"]] == [run.task.unscored for run in FLEETS["memorize"]]  # type: ignore[union-attr]
    assert record["choices"] == {"device": "cpu", "runs": 8, "compiled": False, "accumulate": 1, "threads": 1}


# --- it learns


LEARNERS = {
    "decoder": replace(MODULAR, optimizer=Adam(lr=3e-3)),
    "adagrad": replace(MODULAR, optimizer=Adagrad(lr=0.05)),
    "mlp": MLP,
    "muon": replace(MUON, schedule=Schedule()),
}


@pytest.mark.parametrize("name", LEARNERS)
def test_overfits_one_batch(name: str) -> None:
    """The whole table of p = 5, again and again: every seed knows it by heart."""
    config = with_values(LEARNERS[name], {"task.p": 5, "task.train_fraction": 0.9, "task.val_fraction": 0.1, "model.init_scale": 1.0 if name == "mlp" else 5.0})
    runs = [with_seed(replace(config, batch_size=0, steps=150, log_every=50, evaluate=("train",)), s) for s in range(3)]
    _, rows = finished(Fleet.build(runs))
    assert all(rows[r, 150, "train/accuracy"] == 1 and rows[r, 150, "train/loss"] < 0.1 * rows[r, 0, "train/loss"] for r in range(3))


def test_memorises_strings_of_different_lengths() -> None:
    run = replace(MEMORIZE, task=MemorizeConfig(strings=("abc", "one longer", "xy")), model=SMALL, optimizer=AdamW(lr=1e-2), batch_size=0, steps=150, clip=0)
    run = with_values(run, {"model.positions": "sinusoidal", "model.init_scale": 5.0})
    _, rows = finished(Fleet.build([with_seed(run, s) for s in range(3)]))
    for r in range(3):  # the first character cannot be known: one of three is
        assert rows[r, 150, "train/accuracy"] >= 16 / 18 and rows[r, 150, "train/loss"] < math.log(3) * 3 / 18 + 0.05


def test_bfloat16_stays_close() -> None:
    """Matrix products in bfloat16, parameters and moments in float32: losses at first within 1 %, but not the same."""
    runs = [replace(run, steps=15, optimizer=AdamW(lr=1e-3)) for run in FLEETS["modular"]]
    (fleet, rows), (low, low_rows) = finished(Fleet.build(runs)), finished(Fleet.build([replace(run, precision="bfloat16") for run in runs]))
    assert low.flat.dtype == torch.float32 and all(x.dtype == torch.float32 for x in low.state["first"].values())
    assert same(low.weights, low.flat.bfloat16()) and not same(low.weights.float(), low.flat)
    losses = {key: value for key, value in rows.items() if key[2] == "batch/loss"}
    assert_alike({key: low_rows[key] for key in losses}, losses, 0.01)
    assert any(low_rows[key] != value for key, value in losses.items()) and fleet.weights is fleet.flat
