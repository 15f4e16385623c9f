"""What is done to gradients and weights, three runs at once with their own values, against plain loops over runs in float64 and plain training."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from laws import close, generator, same
from laws_training import FLEETS, LOW, MLP, SHAPES, everything, facts, finished, of_run
from torch import Tensor, nn
from torch.nn import functional as F

from shoal import rng
from shoal.config import SGD, Adagrad, AdamW, Gradient, Muon, RunConfig, Weights, with_seed, with_values
from shoal.contracts import State
from shoal.nn.init import normal
from shoal.results.rows import lower_is_better
from shoal.train import interventions, optimizers
from shoal.train.fleet import Fleet
from shoal.train.interventions import changed, disturbed, draw, egalitarian, hold_length, idle, orthogonal
from shoal.train.layout import Layout
from shoal.train.plan import structure

R = 3
LAYOUT = Layout(SHAPES, {"flat": list(SHAPES)})
NEW = ("ema", "ma", "egalitarian", "fixed")
new_fleets = pytest.mark.parametrize("name", NEW)
ALIVE = torch.ones(R, dtype=torch.bool)
GRADIENTS = {
    "ema": Gradient(filter="ema"),
    "ma": Gradient(filter="ma", filter_window=4),
    "orthogonal": Gradient(direction="orthogonal"),
    "egalitarian": Gradient(direction="egalitarian"),
    "noise": Gradient(noise=0.1),
    "all": Gradient(filter="ma", filter_window=2, direction="orthogonal", noise=0.1),
}


def runs_of(gradient: Gradient, weights: Weights | None = None) -> list[RunConfig]:
    """Three runs that differ in every value that may."""
    base = RunConfig(gradient=gradient, weights=weights or Weights())
    values = {
        "gradient.filter_gain": (2.0, 0.5, 5.0),
        "gradient.filter_decay": (0.98, 0.0, 0.7),
        "gradient.noise": [gradient.noise * factor for factor in (1.0, 0.5, 3.0)],
        "weights.noise": [base.weights.noise * factor for factor in (1.0, 2.0, 0.3)],
    }
    return [with_values(with_seed(base, r), {path: of_runs[r] for path, of_runs in values.items()}) for r in range(R)]


def random(seed: int) -> Tensor:
    return LAYOUT.pack({name: torch.randn(R, *shape, generator=generator(seed)) for name, shape in SHAPES.items()}, 1)


def start(gradient: Gradient, updates: int = 0) -> tuple[interventions.Interventions, State]:
    runs = runs_of(gradient)
    asked, state = interventions.build(runs, range(R), "cpu"), interventions.init(runs[0], random(0))
    for step in range(updates):
        changed(asked, LAYOUT, random(0), random(1 + step), state, torch.tensor(step), ALIVE)
    return asked, state


# --- filters


def test_exponential_filter() -> None:
    """Grokfast-EMA written out for one run; its mean begins as the first gradient."""
    for r, run in enumerate(runs_of(GRADIENTS["ema"])):
        mean: Any = None
        asked, state = start(GRADIENTS["ema"])
        for step in range(6):
            g = random(1 + step)[r].double()
            mean = g if mean is None else run.gradient.filter_decay * mean + (1 - run.gradient.filter_decay) * g
            got = changed(asked, LAYOUT, random(0), random(1 + step), state, torch.tensor(step), ALIVE)
            close(got[r].double(), g + run.gradient.filter_gain * mean, 1e-5)


def test_moving_filter() -> None:
    """Grokfast-MA: nothing is added before the window is full, then the mean of the last gradients."""
    asked, state = start(GRADIENTS["ma"])
    assert state["window"]["flat"].shape == (R, 4, LAYOUT.size)
    seen: list[Tensor] = []
    for step in range(11):
        seen.append(random(1 + step))
        got = changed(asked, LAYOUT, random(0), seen[-1], state, torch.tensor(step), ALIVE)
        for r, run in enumerate(runs_of(GRADIENTS["ma"])):
            mean = np.mean([g[r].double().numpy() for g in seen[-4:]], axis=0)
            expected = seen[-1][r].double() + (run.gradient.filter_gain * torch.from_numpy(mean) if step >= 3 else 0)
            close(got[r].double(), expected, 1e-5)


def test_a_gradient_that_is_gone_leaves_the_window() -> None:
    """Once large early gradients are out of it, the mean of zeros is exactly 0."""
    asked, state = start(GRADIENTS["ma"])
    got = [changed(asked, LAYOUT, random(0), random(step) * (1e6 if step < 5 else 0), state, torch.tensor(step), ALIVE) for step in range(12)]
    assert (got[-1] == 0).all() and all((x != 0).any() for x in got[:8])


# --- directions


def test_orthogonal_direction() -> None:
    """Per parameter: nothing along the weights is left, the length is the old one, and the rest is where it was."""
    grad, weights = random(1), random(2)
    for name in SHAPES:
        got = orthogonal(LAYOUT.view(grad, name), LAYOUT.view(weights, name))
        for r in range(R):
            g, w = (LAYOUT.view(x, name)[r].flatten().double().numpy() for x in (grad, weights))
            rest = g - (g @ w) / (w @ w) * w
            close(got[r].flatten().double(), torch.from_numpy(rest / np.linalg.norm(rest) * np.linalg.norm(g)), 1e-5)


def test_orthogonal_direction_at_its_ends() -> None:
    """Weights of 0 leave the gradient alone, a gradient of 0 stays, one number has no other direction; squares that underflow in float32 do not matter."""
    weights, g = torch.zeros(R, 4, 6), torch.randn(R, 4, 6, generator=generator())
    assert orthogonal(g, weights).equal(g) and (orthogonal(weights, g) == 0).all()
    assert (orthogonal(torch.ones(R, 1), torch.full((R, 1), 3.0)) == 0).all()
    weights = torch.randn(R, 4, 6, generator=generator(1))
    close(orthogonal(g * 1e-28, weights) * 1e28, orthogonal(g, weights), 1e-4)


def test_egalitarian_direction() -> None:
    """U V^T of every run's every matrix, by an SVD in float64; vectors as they were."""
    grads = LAYOUT.views(random(1))
    got = egalitarian(grads)
    assert list(got) == list(SHAPES)
    for name, g in grads.items():
        for r in range(R):
            if g.ndim == 2:
                assert same(got[name][r], g[r])
                continue
            u, _, v = torch.linalg.svd(g[r].double(), full_matrices=False)
            close(got[name][r].double(), u @ v, 1e-5)


@pytest.mark.parametrize("shape", [(16, 40), (40, 16), (32, 32)])
@pytest.mark.parametrize("least", [1e-2, 1e-4, 1e-6])
def test_egalitarian_direction_of_unequal_gradients(shape: tuple[int, int], least: float) -> None:
    """Singular values from 1 down to ``least`` of the largest all become 1; the directions are as good as float32 can tell them."""
    short = min(shape)
    u, v = (torch.linalg.qr(torch.randn(R, n, short, generator=generator(n + 1), dtype=torch.float64))[0] for n in shape)
    values = torch.logspace(0, math.log10(least), short, dtype=torch.float64)
    for scale in (1e-35, 1.0, 1e15):
        g = ((u * values) @ v.mT * scale).float()
        got = egalitarian({"matrix": g})["matrix"].double()
        assert (torch.linalg.svdvals(got) - 1).abs().max() < 2e-3 if least == 1e-6 else 2e-6
        if scale == 1.0:
            left, _, right = torch.linalg.svd(g.double(), full_matrices=False)
            assert torch.linalg.matrix_norm(got - left @ right, 2).max() < max(1e-5, 1e-7 / least)


def test_egalitarian_direction_of_poor_gradients() -> None:
    """What is 0 stays 0: a matrix, a row of an embedding not in the batch, a direction; what is far below 1e-6 of the length is not made 1."""
    assert (egalitarian({"matrix": torch.zeros(R, 5, 4)})["matrix"] == 0).all()
    g = torch.randn(R, 12, 8, generator=generator())
    g[:, [3, 7]] = 0
    g[1, :, 5:] = 0
    got = egalitarian({"matrix": g})["matrix"]
    assert (got[:, [3, 7]] == 0).all() and (got[1, :, 5:] == 0).all()
    values = torch.linalg.svdvals(got.double())
    close(values, torch.tensor([[1.0] * 8, [1.0] * 5 + [0.0] * 3, [1.0] * 8], dtype=torch.float64), 1e-5)
    u, v = (torch.linalg.qr(torch.randn(n, 8, generator=generator(n), dtype=torch.float64))[0] for n in (12, 8))
    g = ((u * torch.tensor([1.0] * 7 + [1e-9], dtype=torch.float64)) @ v.mT)[None].float()  # the last is what rounding makes of it
    assert torch.linalg.svdvals(egalitarian({"matrix": g})["matrix"])[0, -1] < 0.3


# --- noise


def test_noise() -> None:
    """Normal, of each run's own size, independent over steps, runs and parameters, 0 in the gaps; the same for a run alone."""
    layout = Layout({"a": (100, 101), "b": (7,), "c": (50, 50)}, {"flat": ["a", "b", "c"]})
    std, key = torch.tensor([0.5, 2.0, 0.0]), rng.key(torch.tensor([4, 5, 6]), "gradient noise")
    steps = [draw(interventions.Noise(std, key), layout, torch.tensor(step)) for step in (0, 1, 1000)]
    real = layout.pack({name: torch.ones(1, *shape) for name, shape in layout.shapes.items()}, 1)[0] > 0
    assert all((x[:, ~real] == 0).all() and (x[2] == 0).all() for x in steps) and not real.all()
    values = torch.stack([x[:2, real] / std[:2, None] for x in steps]).flatten(0, 1).double()
    count = values.shape[1]
    for x in values:
        assert abs(x.mean()) < 4 / count**0.5 and abs(x.var() - 1) < 4 * (2 / count) ** 0.5 and abs((x**4).mean() - 3) < 4 * (96 / count) ** 0.5
    together = torch.corrcoef(torch.cat([values, values.roll(1, -1)]))
    assert (together - torch.eye(len(together))).abs().max() < 4.5 / count**0.5
    alone = draw(interventions.Noise(std[1:2], key[1:2]), layout, torch.tensor(1000))
    assert same(alone[0], steps[2][1])


def test_noise_of_gradients_is_not_noise_of_weights() -> None:
    asked = interventions.build(runs_of(Gradient(noise=1.0), Weights(noise=1.0)), range(R), "cpu")
    assert asked.gradient_noise is not None and asked.weight_noise is not None
    pair = [draw(noise, LAYOUT, torch.tensor(3))[0] for noise in (asked.gradient_noise, asked.weight_noise)]
    assert abs(float(torch.corrcoef(torch.stack(pair))[0, 1])) < 0.4 and not pair[0].equal(pair[1])


def test_no_noise_is_another_program() -> None:
    """Some noise and none never share a fleet, noise of two sizes does; without it nothing is drawn, and the model computes with the weights themselves."""
    plain = Fleet.build([MLP])
    assert plain.asked.gradient_noise is None and plain.asked.weight_noise is None and plain.weights is plain.flat and set(plain.state) == {"momentum"}
    for path in ("gradient.noise", "weights.noise"):
        noisy = [with_values(MLP, {path: std}) for std in (0.1, 0.2)]
        assert structure(MLP) != structure(noisy[0]) == structure(noisy[1])


# --- the whole step, against plain training of one run


def reference(fleet: Fleet, r: int, make: Callable[..., torch.optim.Optimizer]) -> tuple[nn.Module, list[dict[str, float]]]:
    """Run r of a fleet at its start, trained with torch.optim and interventions written out parameter by parameter; the model and its facts per step."""
    run, model = fleet.runs[r], fleet.one(r).model.requires_grad_()
    gradient, weights = run.gradient, run.weights
    parameters = dict(model.named_parameters())
    optimizer = make(parameters.values(), run)
    begin = {name: p.detach().clone() for name, p in parameters.items()}
    length = math.sqrt(sum(float(p.detach().double().square().sum()) for p in begin.values()))
    mean: dict[str, Tensor] = {}
    seen: dict[str, list[Tensor]] = {name: [] for name in parameters}
    rows = []

    def noise(purpose: str, step: int) -> dict[str, Tensor]:
        draws = normal(rng.fold(rng.key(torch.tensor([run.seeds.order]), purpose), step), fleet.layout.size)
        return {name: draws[0, fleet.layout.start[name] :][: p.numel()].view(p.shape) for name, p in parameters.items()}

    for step in range(run.steps):
        batch = fleet.task.batch(fleet.tables, fleet.order_key, torch.tensor(step), run.batch_size).each(lambda x: x[r])
        clean = {name: p.detach().clone() for name, p in parameters.items()}
        with torch.no_grad():
            for name, n in noise("weight noise", step).items():
                parameters[name].add_(n, alpha=weights.noise)
        loss = F.cross_entropy(model.logits(model(batch.tokens)[0])[:, -1], batch.targets[:, 0])  # type: ignore[operator]
        optimizer.zero_grad()
        loss.backward()
        norm = nn.utils.clip_grad_norm_(model.parameters(), run.clip if run.clip else math.inf)
        rows.append({"batch/loss": loss.item(), "batch/grad_norm": norm.item()})
        draws = noise("gradient noise", step)
        with torch.no_grad():
            for name, p in parameters.items():
                p.copy_(clean[name])
                assert p.grad is not None
                g = p.grad.double()
                if gradient.filter == "ema":
                    mean[name] = gradient.filter_decay * mean.get(name, g) + (1 - gradient.filter_decay) * g
                    g = g + gradient.filter_gain * mean[name]
                if gradient.filter == "ma":
                    seen[name] = [*seen[name], g][-gradient.filter_window :]
                    if len(seen[name]) == gradient.filter_window:
                        g = g + gradient.filter_gain * torch.stack(seen[name]).mean(0)
                if gradient.direction == "orthogonal" and p.abs().max() > 0:
                    w = p.double()
                    rest = g - (g * w).sum() / (w * w).sum() * w
                    g = rest * g.norm() / rest.norm()
                p.grad = (g + gradient.noise * draws[name]).float()
                if getattr(run.optimizer, "decay_to", "") == "start":
                    p.sub_(run.optimizer.lr * run.optimizer.wd * (p - begin[name]))
            optimizer.step()
            if weights.fixed_norm:
                now = math.sqrt(sum(float(p.double().square().sum()) for p in parameters.values()))
                for p in parameters.values():
                    p.mul_(length / now)
    return model, rows


NO_BIAS = replace(LOW, model=replace(LOW.model, bias=False, norm="rms"), steps=12)
SMOOTH = SGD(lr=0.05, momentum=0.5)
WHOLE = {
    "ema": replace(NO_BIAS, optimizer=SMOOTH, gradient=Gradient(filter="ema", filter_decay=0.7)),
    "ma, clipped": replace(NO_BIAS, optimizer=SMOOTH, clip=0.1, gradient=Gradient(filter="ma", filter_window=5)),
    "orthogonal": replace(NO_BIAS, optimizer=SMOOTH, gradient=Gradient(direction="orthogonal")),
    "ema, orthogonal, noise": replace(NO_BIAS, optimizer=SMOOTH, gradient=Gradient(filter="ema", direction="orthogonal", noise=1e-3)),
    "noise on the weights": replace(NO_BIAS, optimizer=SMOOTH, weights=Weights(noise=0.02)),
    "fixed norm": replace(NO_BIAS, optimizer=SMOOTH, weights=Weights(fixed_norm=True)),
    "decay to the start": replace(NO_BIAS, optimizer=AdamW(lr=3e-3, wd=50.0, eps=1e-4, decay_to="start")),
    "everything": replace(
        NO_BIAS,
        clip=0.5,
        optimizer=AdamW(lr=3e-3, wd=10.0, eps=1e-4, decay_to="start"),
        gradient=Gradient(filter="ma", filter_window=3, direction="orthogonal", noise=1e-3),
        weights=Weights(noise=0.02, fixed_norm=True),
    ),
}


@pytest.mark.parametrize("case", WHOLE)
def test_equals_plain_training(case: str) -> None:
    def make(parameters: Any, run: RunConfig) -> torch.optim.Optimizer:
        optimizer = run.optimizer
        if isinstance(optimizer, SGD):
            return torch.optim.SGD(parameters, lr=optimizer.lr, momentum=optimizer.momentum)
        assert isinstance(optimizer, AdamW)
        return torch.optim.AdamW(parameters, lr=optimizer.lr, betas=(optimizer.beta1, optimizer.beta2), eps=optimizer.eps, weight_decay=0.0)

    base = WHOLE[case]
    scaled = {path: (1.0, 2.0, 0.5) for path in ("gradient.filter_gain", "gradient.noise", "weights.noise", "clip", "optimizer.lr")}
    runs = [with_values(with_seed(base, 3 + r), {path: float(_at(base, path)) * factors[r] for path, factors in scaled.items()}) for r in range(R)]
    begun, (fleet, rows) = Fleet.build(runs), finished(Fleet.build(runs))
    for r in (0, 2):
        model, expected = reference(begun, r, make)
        for step, row in enumerate(expected):
            assert {name: rows[r, step, name] for name in row} == pytest.approx(row, rel=1e-3)
        trained = dict(fleet.one(r).model.named_parameters())
        for name, p in model.named_parameters():
            close(trained[name], p.detach(), 3e-4)
    plain = Fleet.build([replace(run, gradient=Gradient(), weights=Weights(), optimizer=SMOOTH) for run in runs])
    plain.advance(100)
    assert (plain.flat - fleet.flat).abs().max() > 1e-3


def _at(config: Any, path: str) -> Any:
    for name in path.split("."):
        config = getattr(config, name)
    return config


def test_egalitarian_step() -> None:
    """One step of SGD moves every matrix with a full gradient by lr in each of its directions, whatever its gradient's size, and vectors by lr times theirs."""
    base = replace(LOW, gradient=Gradient(direction="egalitarian"), optimizer=SGD(lr=0.25), steps=1)
    fleet = Fleet.build([with_seed(base, r) for r in range(R)])
    before, batch = fleet.flat.clone(), fleet.task.batch(fleet.tables, fleet.order_key, torch.tensor(0), 32)
    sums, grad = fleet._gradients(batch)
    grads = fleet.layout.views(grad / sums.weight.unsqueeze(-1))
    fleet.advance(1)
    for name, change in fleet.layout.views((before - fleet.flat) / 0.25).items():
        for r in range(R):
            if change.ndim == 2:
                close(change[r], grads[name][r], 1e-5)
                continue
            values = torch.linalg.svdvals(grads[name][r].double())
            rank = int((values > 1e-4 * values[0]).sum())
            got = torch.linalg.svdvals(change[r].double())
            assert rank > 0 and (got[:rank] - 1).abs().max() < 1e-4 and (got < 1 + 1e-4).all(), name


# --- what a fleet promises, with these


@new_fleets
def test_a_run_that_dies(name: str) -> None:
    """Some steps on its weights become far too large: it keeps every bit of parameters and state, and its mates do not notice."""
    fleet, whole = (Fleet.build([replace(run, steps=16) for run in FLEETS[name]]) for _ in range(2))
    for each in (fleet, whole):
        each.advance(11)
    fleet.flat[3].mul_(1e37)
    before = {key: x.clone() for key, x in everything(fleet).items() if x.dim()}
    fleet.advance(5)
    whole.advance(5)
    assert fleet.outcomes()[3] == {"status": "dead", "steps": 11}
    mates = [r for r in range(8) if r != 3]
    for key, old in before.items():
        new, expected = everything(fleet)[key], everything(whole)[key]
        assert same(new[mates], expected[mates]), key
        if key not in ("status", "ended", "hits"):
            assert same(new[3], old[3]), key


@new_fleets
def test_those_who_stay_keep_their_state(name: str) -> None:
    fleet, whole = (Fleet.build([replace(run, steps=20) for run in FLEETS[name]]) for _ in range(2))
    fleet.advance(10)
    fleet.keep([6, 2, 5])
    fleet.advance(10)
    whole.advance(20)
    for key, x in everything(fleet).items():
        assert not x.dim() or same(x, everything(whole)[key][[6, 2, 5]]), key


@new_fleets
def test_compiled_whole(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """One graph without a question to the host, and the same values."""
    choices: dict[str, Any] = {"backend": "eager", "dynamic": False, "fullgraph": True}
    monkeypatch.setattr(torch, "compile", lambda function, compile=torch.compile, **_: compile(function, **choices))
    runs = [replace(run, steps=12) for run in FLEETS[name][:3]]
    compiled, rows = finished(Fleet.build(runs, compile=True))
    monkeypatch.undo()
    eager, expected = finished(Fleet.build(runs))
    close(compiled.flat, eager.flat, 1e-5)
    assert rows.keys() == expected.keys()


@pytest.mark.parametrize("case", GRADIENTS)
@pytest.mark.parametrize("compiled", [False, True])
def test_dead_runs_keep_every_bit(case: str, compiled: bool) -> None:
    """Also of state near the largest and smallest numbers, and with values that are NaN; the gradient they are handed on with is 0."""
    asked, state = start(GRADIENTS[case], updates=3)
    alive = torch.tensor([False, True, False])
    asked = asked._replace(gain=torch.where(alive, asked.gain, torch.nan), decay=torch.where(alive, asked.decay, torch.nan))
    for moment in state.values():
        moment["flat"].view(R, -1)[:, :4] = torch.tensor([-0.0, 3e38, 1e-45, -3e38])
    before = {name: moment["flat"].clone() for name, moment in state.items()}
    torch.compiler.reset()
    function = torch.compile(changed, fullgraph=True, dynamic=False, backend="aot_eager") if compiled else changed
    got = function(asked, LAYOUT, random(0), torch.where(alive[:, None], random(9), 0.0), state, torch.tensor(3), alive)
    assert same(got[[0, 2]], torch.zeros(2, LAYOUT.size)) and got[1].abs().max() > 0
    for name, old in before.items():
        assert same(state[name]["flat"][[0, 2]], old[[0, 2]]) and not state[name]["flat"][1].equal(old[1])


def test_settings_that_do_nothing() -> None:
    """Told only if they do nothing in any run."""
    plain, gain = RunConfig(), RunConfig(gradient=Gradient(filter_gain=5.0, filter_window=7))
    assert idle([plain]) == idle([gain, RunConfig(gradient=Gradient(filter="ma"))]) == idle([RunConfig(optimizer=AdamW(decay_to="start"))]) == []
    assert [note.split()[0] for note in idle([plain, gain])] == ["gradient.filter_gain", "gradient.filter_window"]
    assert "wd is 0" in idle([RunConfig(optimizer=AdamW(decay_to="start", wd=0.0))])[0] and idle([]) == []


# --- the length of the weights


def test_fixed_length() -> None:
    """Also after a step so large that squares overflow; a dead run keeps every bit, though its length is another."""
    flat, state = random(3), interventions.init(RunConfig(weights=Weights(fixed_norm=True)), random(2))
    flat[0] *= 1e30
    flat[2, :3] = torch.tensor([-0.0, 3e38, 1e-45])
    before = flat.clone()
    hold_length(flat, state, torch.tensor([True, True, False]))
    assert same(flat[2], before[2])
    close(flat.double().norm(dim=-1)[:2], random(2).double().norm(dim=-1)[:2], 1e-6)
    close(F.normalize(flat.double(), dim=-1)[:2], F.normalize(before.double(), dim=-1)[:2], 1e-6)


def test_length_is_recorded() -> None:
    """At every evaluation, of every run, the root of the sum of all its weights' squares; figures take it for neither better nor worse."""
    fleet = Fleet.build([replace(run, steps=20, evaluate_every=10) for run in FLEETS["modular"]])
    lengths, tables = {}, []
    for step in (0, 10, 20):
        for r in range(8):
            lengths[r, step] = math.sqrt(sum(float(p.double().square().sum()) for p in fleet.one(r).model.parameters()))
        tables.append(fleet.advance(10))
    found = {(r, step): value for (r, step, name), value in facts(*tables).items() if name == "weights/norm"}
    assert found == pytest.approx(lengths, rel=1e-6)
    _, rows = finished(Fleet.build([replace(run, steps=40, evaluate_every=10) for run in FLEETS["fixed"]]))
    for r in range(8):
        values = [value for (_, name), value in of_run(rows, r).items() if name == "weights/norm"]
        assert len(values) == 5 and values == pytest.approx([values[0]] * 5, rel=1e-6)
    assert lower_is_better("weights/norm") is None


# --- what the model computes with


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_noise_on_the_weights_is_there_in_the_step_only(precision: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The step computes with weights plus noise, rounded after; evaluations and the optimizer see the clean ones."""
    fleet = Fleet.build([replace(run, precision=precision, steps=3) for run in FLEETS["fixed"]])
    seen: list[Tensor] = []
    monkeypatch.setattr(fleet, "_gradients", lambda batch: seen.append(fleet.weights.clone()) or Fleet._gradients(fleet, batch))
    clean = []
    for _ in range(3):
        clean.append(fleet.flat.clone())
        fleet.advance(1)
        assert same(fleet.weights, fleet.flat.to(fleet.weights.dtype))
    assert fleet.asked.weight_noise is not None
    for step, (used, flat) in enumerate(zip(seen, clean, strict=True)):
        noise = used.float() - flat
        assert same(used, disturbed(fleet.asked.weight_noise, fleet.layout, flat, torch.tensor(step)).to(fleet.weights.dtype))
        for r, run in enumerate(FLEETS["fixed"]):
            spread = noise[r][flat[r] != 0].std()
            assert spread == pytest.approx(run.weights.noise, rel=0.1)


def test_decay_towards_the_start() -> None:
    """Without gradients the distance to the start shrinks by lr wd at each step; towards zero, the weights themselves; undecayed parameters stay."""
    begin, moved = ({name: torch.randn(R, n, generator=generator(seed)) for name, n in (("decayed", 9), ("undecayed", 4))} for seed in (1, 2))
    optimizer = optimizers.build(AdamW(decay="matrices", decay_to="start"))
    state = optimizer.init(begin)
    assert set(state["start"]) == {"decayed"}
    params, lr, wd = {name: p.clone() for name, p in moved.items()}, torch.tensor([0.1, 0.2, 0.3]), torch.tensor([0.0, 0.5, 2.0])
    hyper = {"lr": lr, "wd": wd, "beta1": torch.full((R,), 0.9), "beta2": torch.full((R,), 0.99), "eps": torch.full((R,), 1e-8)}
    for step in range(4):
        optimizer.update(params, {name: torch.zeros_like(p) for name, p in params.items()}, state, hyper, torch.tensor(step), ALIVE)
    left = ((1 - lr * wd) ** 4)[:, None]
    close(params["decayed"], begin["decayed"] + left * (moved["decayed"] - begin["decayed"]), 1e-6)
    assert same(params["undecayed"], moved["undecayed"])


def test_small_fleets_with_every_optimizer() -> None:
    """State of optimizer and interventions lies side by side under different names."""
    for optimizer in (SGD(), Adagrad(), AdamW(decay="matrices", decay_to="start"), Muon()):
        gradient = Gradient(filter="ma", filter_window=3, direction="egalitarian", noise=1e-4)
        run = replace(MLP, optimizer=optimizer, gradient=gradient, weights=Weights(noise=1e-3, fixed_norm=True), steps=5, evaluate_every=5)
        fleet, _ = finished(Fleet.build([with_seed(run, s) for s in range(2)]))
        assert fleet.outcomes() == [{"status": "completed", "steps": 5}] * 2 and {"window", "length"} < set(fleet.state)
        assert fleet.flat.isfinite().all()
