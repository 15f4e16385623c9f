"""Every optimizer, three runs at once with their own hyperparameters, against torch.optim run by run; and what a fleet asks of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor

from shoal.config import optimizers as configs
from shoal.contracts import Optimizer, Params, State
from shoal.train.fleet import layout_groups, parameter_groups
from shoal.train.layout import Layout
from shoal.train.optimizers import Muon, build, clip_scale, gradient_norm, newton_schulz

R = 3
STEPS = 30
ADAM = {"beta1": (0.9, 0.0, 0.8), "beta2": (0.999, 0.98, 0.5), "eps": (1e-8, 1e-3, 1e-6)}
CASES: dict[str, tuple[configs.OptimizerConfig, dict[str, tuple[float, ...]]]] = {
    "sgd": (configs.SGD(), {"lr": (0.1, 0.03, 0.3), "wd": (0.0, 0.1, 0.01), "momentum": (0.0, 0.9, 0.5)}),
    "nesterov": (configs.SGD(nesterov=True), {"lr": (0.1, 0.03, 0.3), "wd": (0.0, 0.1, 0.01), "momentum": (0.7, 0.9, 0.5)}),
    "adam": (configs.Adam(), {"lr": (1e-2, 3e-2, 1e-3), "wd": (0.0, 0.1, 1.0), **ADAM}),
    "adamw": (configs.AdamW(), {"lr": (1e-2, 3e-2, 1e-3), "wd": (0.0, 0.1, 1.0), **ADAM}),
    "adagrad": (configs.Adagrad(), {"lr": (1e-2, 3e-2, 1e-1), "wd": (0.0, 0.1, 1.0), "eps": (1e-10, 1e-3, 1e-6)}),
    "muon": (
        configs.Muon(),
        {"lr": (0.02, 0.1, 0.05), "wd": (0.0, 0.1, 1.0), "momentum": (0.95, 0.5, 0.0), "adam_lr": (1e-2, 3e-2, 1e-3), "adam_wd": (0.0, 0.1, 1.0)}
        | {f"adam_{name}": values for name, values in ADAM.items()},
    ),
    "muon_plain": (configs.Muon(nesterov=False), {}),
}
CASES["muon_plain"] = (CASES["muon_plain"][0], CASES["muon"][1])
CASES["adamw_start"] = (configs.AdamW(decay_to="start"), CASES["adamw"][1])
every_case = pytest.mark.parametrize("case", CASES)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def shapes(case: str) -> dict[str, tuple[int, ...]]:
    """What the fleet hands over: few large vectors, or for Muon the matrices one by one (tall, wide, alike, square) and the rest."""
    return {"up": (6, 20), "down": (20, 6), "other": (6, 20), "square": (8, 8), "rest": (37,)} if case.startswith("muon") else {"flat": (101,)}


def draw(case: str, seed: int, dtype: torch.dtype = torch.float32) -> Params:
    g = generator(seed)
    return {name: torch.randn(R, *shape, generator=g, dtype=dtype) for name, shape in shapes(case).items()}


def hyper_of(case: str, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    return {name: torch.tensor(values, dtype=dtype) for name, values in CASES[case][1].items()}


def clone(tensors: Params) -> Params:
    return {name: x.clone() for name, x in tensors.items()}


def moments(state: State) -> Iterator[tuple[str, Tensor]]:
    return ((f"{moment}.{name}", x) for moment, tensors in state.items() for name, x in tensors.items())


def bits(x: Tensor) -> Tensor:
    """So that 0.0 and -0.0 differ, and NaN equals itself."""
    return x.contiguous().view(torch.int32)


def compile(optimizer: Optimizer) -> Callable[..., None]:
    torch.compiler.reset()  # PyTorch keeps only a few versions of one function
    return torch.compile(optimizer.update, fullgraph=True, dynamic=False, backend="aot_eager")


def start(case: str, updates: int = 5, dtype: torch.dtype = torch.float32) -> tuple[Optimizer, Params, State, dict[str, Tensor]]:
    """An optimizer some updates into a run."""
    optimizer, params, hyper = build(CASES[case][0]), draw(case, 1, dtype), hyper_of(case, dtype)
    state = optimizer.init(params)
    for s in range(updates):
        optimizer.update(params, draw(case, 100 + s, dtype), state, hyper, torch.tensor(s), torch.ones(R, dtype=torch.bool))
    return optimizer, params, state, hyper


class TowardsStart(torch.optim.AdamW):
    """AdamW that decays towards its first parameters."""

    def __init__(self, params: list[Tensor], *, lr: float, weight_decay: float, **others: Any) -> None:
        super().__init__(params, lr=lr, weight_decay=0.0, **others)
        self.pull, self.begin = lr * weight_decay, [p.detach().clone() for p in params]

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        for p, begin in zip(self.param_groups[0]["params"], self.begin, strict=True):
            p.copy_((1 - self.pull) * p + self.pull * begin)
        super().step()


def torch_optimizers(case: str, params: Mapping[str, Tensor], r: int) -> list[torch.optim.Optimizer]:
    h = {name: values[r] for name, values in CASES[case][1].items()}
    config, betas = CASES[case][0], (h.get("beta1", 0.0), h.get("beta2", 0.0))
    everything = list(params.values())
    if isinstance(config, configs.SGD):
        return [torch.optim.SGD(everything, lr=h["lr"], momentum=h["momentum"], weight_decay=h["wd"], nesterov=config.nesterov)]
    if isinstance(config, configs.Adam):
        return [torch.optim.Adam(everything, lr=h["lr"], betas=betas, eps=h["eps"], weight_decay=h["wd"])]
    if isinstance(config, configs.AdamW):
        kind = TowardsStart if config.decay_to == "start" else torch.optim.AdamW
        return [kind(everything, lr=h["lr"], betas=betas, eps=h["eps"], weight_decay=h["wd"])]
    if isinstance(config, configs.Adagrad):
        return [torch.optim.Adagrad(everything, lr=h["lr"], eps=h["eps"], weight_decay=h["wd"])]
    matrices = [p for name, p in params.items() if name != "rest"]
    betas = (h["adam_beta1"], h["adam_beta2"])
    return [
        torch.optim.Muon(matrices, lr=h["lr"], weight_decay=h["wd"], momentum=h["momentum"], nesterov=config.nesterov, adjust_lr_fn="original"),
        torch.optim.AdamW([params["rest"]], lr=h["adam_lr"], betas=betas, eps=h["adam_eps"], weight_decay=h["adam_wd"]),
    ]


@every_case
def test_equals_torch_per_run(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In float64. torch's Muon iterates in bfloat16, whose rounding would hide errors of 1e-2: here its cast is made to keep float64."""
    monkeypatch.setattr(torch.Tensor, "bfloat16", torch.Tensor.clone)
    _, params, _, _ = start(case, STEPS, torch.float64)
    for r in range(R):
        own = {name: torch.nn.Parameter(p[r].mT.clone() if p[r].ndim == 2 else p[r].clone()) for name, p in draw(case, 1, torch.float64).items()}
        optimizers = torch_optimizers(case, own, r)  # torch's matrices are [out, in]
        for s in range(STEPS):
            for name, g in draw(case, 100 + s, torch.float64).items():
                own[name].grad = g[r].mT.contiguous() if g[r].ndim == 2 else g[r]
            for optimizer in optimizers:
                optimizer.step()
        for name, p in params.items():
            expected = own[name].detach()
            torch.testing.assert_close(p[r], expected.mT if expected.ndim == 2 else expected, rtol=1e-9, atol=1e-11)


@every_case
def test_float32_follows_float64(case: str) -> None:
    _, single, _, _ = start(case, STEPS)
    optimizer, hyper = build(CASES[case][0]), hyper_of(case, torch.float64)
    double = {name: p.double() for name, p in draw(case, 1).items()}
    state = optimizer.init(double)
    for s in range(STEPS):
        grads = {name: g.double() for name, g in draw(case, 100 + s).items()}
        optimizer.update(double, grads, state, hyper, torch.tensor(s), torch.ones(R, dtype=torch.bool))
    for name, p in single.items():
        torch.testing.assert_close(p.double(), double[name], rtol=1e-4, atol=1e-4)


@every_case
def test_run_axis(case: str) -> None:
    """L = (), (1,) and (R,) are the same arithmetic; the step may be per run."""
    _, fleet, _, hyper = start(case)
    for r in range(R):
        for pick in (slice(r, r + 1), r):  # L = (1,) and ()
            optimizer, params = build(CASES[case][0]), {name: p[pick].clone() for name, p in draw(case, 1).items()}
            state, own = optimizer.init(params), {name: h[pick] for name, h in hyper.items()}
            for s in range(5):
                grads = {name: g[pick] for name, g in draw(case, 100 + s).items()}
                optimizer.update(params, grads, state, own, torch.full((R,), s)[pick], torch.ones(R, dtype=torch.bool)[pick])
            for name, p in params.items():
                torch.testing.assert_close(p, fleet[name][pick], rtol=1e-6, atol=1e-6)


@every_case
@pytest.mark.parametrize("compiled", [False, True])
def test_dead_runs_keep_every_bit(case: str, compiled: bool) -> None:
    """Also -0.0, numbers near the largest, moments near the smallest, and with hyperparameters that are NaN."""
    optimizer, params, state, hyper = start(case)
    alive = torch.tensor([False, True, False])
    for tensors in (params, *(state[moment] for moment in state if moment in ("momentum", "first"))):
        for x in tensors.values():
            x.flatten(1)[:, :6] = torch.tensor([-0.0, 0.0, 3e38, -3e38, 1e-45, -1e-45])
            x.flatten(1)[:, 6:8] = torch.tensor([[-0.0, -0.0]])
    for x in state.get("first", {}).values():
        x.flatten(1)[:, 6:8] = torch.tensor([[-1.0, 1.0]])  # beside parameters of -0.0
    for moment in ("second", "sum"):
        for x in state.get(moment, {}).values():
            x.flatten(1)[:, :4] = torch.tensor([0.0, 3e38, 1e-45, 0.0])
    before, moments_before = clone(params), {name: x.clone() for name, x in moments(state)}
    grads = {name: torch.where(alive.reshape(R, *(1,) * (g.ndim - 1)), g, 0.0) for name, g in draw(case, 7).items()}
    hyper = {name: torch.where(alive, h, torch.nan) for name, h in hyper.items()}
    (compile(optimizer) if compiled else optimizer.update)(params, grads, state, hyper, torch.tensor(5), alive)
    for name, x in (*params.items(), *moments(state)):
        old = before[name] if name in before else moments_before[name]
        assert bits(x[0]).equal(bits(old[0])) and bits(x[2]).equal(bits(old[2])), name
        assert x[1].equal(old[1]) == name.startswith("start"), name


@every_case
def test_mates_do_not_notice_a_broken_run(case: str) -> None:
    _, healthy, state, _ = start(case)

    optimizer, params, hyper = build(CASES[case][0]), draw(case, 1), hyper_of(case)
    broken_state = optimizer.init(params)
    for p in params.values():
        p[1] = torch.nan
    alive = torch.tensor([True, False, True])
    for s in range(5):
        grads = draw(case, 100 + s)
        for g in grads.values():
            g[1] = 0.0
        optimizer.update(params, grads, broken_state, hyper, torch.tensor(s), alive)
    for (name, x), (_, y) in zip((*params.items(), *moments(broken_state)), (*healthy.items(), *moments(state)), strict=True):
        assert bits(x[0]).equal(bits(y[0])) and bits(x[2]).equal(bits(y[2])), name


@every_case
@pytest.mark.parametrize("compiled", [False, True])
def test_works_on_slices_of_one_buffer(case: str, compiled: bool) -> None:
    """The fleet's parameters are strided views; what lies between them is not touched, and the result is the same, compiled or not."""
    _, expected, _, hyper = start(case)
    optimizer, gap = build(CASES[case][0]), 5
    sizes = {name: p[0].numel() for name, p in expected.items()}
    buffer, grad_buffer = (torch.full((R, sum(sizes.values()) + gap * len(sizes)), 7.0) for _ in range(2))

    def views(flat: Tensor) -> Params:
        place, result = 0, {}
        for name, size in sizes.items():
            result[name] = flat[:, place : place + size].view(expected[name].shape)
            place += size + gap
        return result

    params, grads = views(buffer), views(grad_buffer)
    for name, p in draw(case, 1).items():
        params[name].copy_(p)
    state = optimizer.init(params)
    update = compile(optimizer) if compiled else optimizer.update
    for s in range(5):
        for name, g in draw(case, 100 + s).items():
            grads[name].copy_(g)
        update(params, grads, state, hyper, torch.tensor(s), torch.ones(R, dtype=torch.bool))
    for name, p in params.items():
        torch.testing.assert_close(p, expected[name], rtol=1e-6, atol=1e-6)
        p.fill_(7.0)
    assert (buffer == 7.0).all()


@pytest.mark.parametrize("config", [configs.SGD(), configs.Adam(), configs.AdamW(), configs.Adagrad(), configs.Muon()], ids=lambda c: type(c).__name__)
def test_the_undecayed_group_is_spared(config: Any) -> None:
    """It moves as without decay; the other vector as with it."""
    other = "rest" if isinstance(config, configs.Muon) else "flat"
    params, grads = ({other: torch.randn(R, 9, generator=g), "undecayed": torch.randn(R, 4, generator=g)} for g in (generator(1), generator(2)))
    hyper = {name: torch.full((R,), value) for name, value in vars(config).items() if isinstance(value, float)}
    decay = "adam_wd" if other == "rest" else "wd"
    ends = []
    for wd in (0.0, 0.5):
        own = {name: p.clone() for name, p in params.items()}
        optimizer = build(config)
        state = optimizer.init(own)
        for step in range(3):  # Adam's first is a matter of signs
            scaled = {name: g * (step + 1) for name, g in grads.items()}
            optimizer.update(own, scaled, state, hyper | {decay: torch.full((R,), wd)}, torch.tensor(step), torch.ones(R, dtype=torch.bool))
        ends.append(own)
    assert ends[0]["undecayed"].equal(ends[1]["undecayed"]) and not ends[0]["undecayed"].equal(params["undecayed"])
    assert (ends[0][other] != ends[1][other]).all()


def test_groups() -> None:
    """By rank where only matrices decay, and as the model says; Muon's matrices by shape; empty groups are not there."""
    shapes = {"up": (4, 6), "bias": (6,), "A_log": (6, 2), "down": (6, 4)}
    assert parameter_groups(configs.AdamW(), shapes, ["up"]) == {"flat": ["up", "bias", "A_log", "down"]}
    assert parameter_groups(configs.AdamW(decay="matrices"), shapes, [], ["A_log"]) == {"flat": ["up", "down"], "undecayed": ["bias", "A_log"]}
    assert parameter_groups(configs.SGD(), shapes, [], ["A_log"]) == {"flat": ["up", "bias", "down"], "undecayed": ["A_log"]}
    shapes["gate"] = (4, 6)
    muon = parameter_groups(configs.Muon(), shapes, ["up", "down", "gate"], ["A_log"])
    assert muon == {"matrices 4 x 6": ["up", "gate"], "matrices 6 x 4": ["down"], "rest": ["bias"], "undecayed": ["A_log"]}
    layout = Layout(shapes, muon)
    flat = torch.randn(R, layout.size)
    groups = layout_groups(layout, flat)
    assert groups["matrices 4 x 6"].equal(torch.stack([layout.view(flat, name) for name in ("up", "gate")], dim=1)) and groups["rest"].shape == (R, 16)
    groups["matrices 6 x 4"].zero_()
    assert not layout.view(flat, "down").any(), "views, with the gaps between parameters left out"


@pytest.mark.parametrize("step", [0, 1, 1000, 1_000_000, 30_000_000])
def test_bias_correction_late_and_early(step: int) -> None:
    """Near 1e6 updates, with betas whose powers have not died out by then, one update equals torch's in float64."""
    beta1, beta2 = torch.tensor([0.9, 0.999, 0.99999]), torch.tensor([0.999, 0.999999, 0.9999999])
    hyper = {"lr": torch.full((R,), 0.1), "wd": torch.zeros(R), "beta1": beta1, "beta2": beta2, "eps": torch.full((R,), 1e-8)}
    params, grads = draw("adam", 1), draw("adam", 2)
    optimizer = build(configs.Adam())
    state = {"first": draw("adam", 3), "second": {name: x.square() for name, x in draw("adam", 4).items()}}
    start, first, second = params["flat"].clone(), state["first"]["flat"].clone(), state["second"]["flat"].clone()
    optimizer.update(params, grads, state, hyper, torch.tensor(step), torch.ones(R, dtype=torch.bool))
    for r in range(R):
        p = torch.nn.Parameter(start[r].double())
        p.grad = grads["flat"][r].double()
        reference = torch.optim.Adam([p], lr=0.1, betas=(beta1[r].item(), beta2[r].item()), eps=1e-8)
        reference.state[p] = {"step": torch.tensor(float(step), dtype=torch.float64), "exp_avg": first[r].double(), "exp_avg_sq": second[r].double()}
        before = p.detach().clone()
        reference.step()
        change = p.detach() - before
        torch.testing.assert_close(params["flat"][r].double() - before, change, rtol=3e-6, atol=3e-6 * float(change.abs().max()) + 3e-7)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(8, 8), (8, 40), (32, 33)])
def test_newton_schulz_against_svd(shape: tuple[int, int], dtype: torch.dtype) -> None:
    """Singular vectors stay, singular values come near 1; each matrix by its own norm, whatever the others'."""
    matrices = torch.randn(2, R, *shape, generator=generator()) * torch.tensor([1e-4, 1.0, 1e6])[:, None, None]
    got = newton_schulz(matrices, 5, dtype).double()
    left, values, right = torch.linalg.svd(matrices.double(), full_matrices=False)
    inside = left.mT @ got @ right.mT  # diagonal, if the singular vectors are right
    diagonal = inside.diagonal(dim1=-2, dim2=-1)
    assert (inside - torch.diag_embed(diagonal)).abs().max() < (1e-4 if dtype == torch.float32 else 0.1)
    kept = values > 0.02 * torch.linalg.matrix_norm(matrices.double())[..., None]  # five steps raise what is smaller only part of the way
    assert kept.float().mean() > 0.9
    assert diagonal[kept].min() > 0.6 and diagonal[kept].max() < 1.3
    assert newton_schulz(torch.zeros(2, *shape), 5, dtype).equal(torch.zeros(2, *shape))


def test_muon_scale_and_dtype() -> None:
    """A matrix that widens moves by sqrt(out / in) more; bfloat16 changes the direction little."""
    changes = {}
    for dtype in (None, torch.bfloat16):
        params = {"wide": torch.zeros(4, 64), "tall": torch.zeros(64, 4)}
        wide = torch.randn(4, 64, generator=generator())
        optimizer = Muon(configs.Muon(), dtype)
        hyper = {name: torch.tensor(values[0]) for name, values in CASES["muon"][1].items()}
        optimizer.update(params, {"wide": wide, "tall": wide.mT}, optimizer.init(params), hyper, torch.tensor(0), torch.tensor(True))
        torch.testing.assert_close(params["wide"], 4 * params["tall"].mT)
        changes[dtype] = params["wide"]
    assert changes[None].norm() / 0.02 == pytest.approx(4 * 2, rel=0.2)  # four singular values of about 4
    torch.testing.assert_close(changes[None], changes[torch.bfloat16], rtol=0, atol=0.02 * float(changes[None].abs().max()))


def test_clipping_per_run() -> None:
    grad = torch.randn(4, 50, generator=generator())
    limit = torch.tensor([1.0, 0.0, 100.0, 2.0])
    grad[3, 0] = torch.nan
    clipped = grad * clip_scale(gradient_norm(grad), limit)[:, None]
    for r in range(3):
        p = torch.nn.Parameter(torch.zeros(50))
        p.grad = grad[r].clone()
        norm = torch.nn.utils.clip_grad_norm_(p, float(limit[r]) or float("inf"))
        torch.testing.assert_close(gradient_norm(grad)[r], norm)
        torch.testing.assert_close(clipped[r], p.grad)
    assert clipped[1].equal(grad[1]) and clipped[2].equal(grad[2])
    assert gradient_norm(grad)[3].isnan() and clipped[:3].isfinite().all()
    assert gradient_norm(grad[0]) == gradient_norm(grad)[0]  # L = ()
    assert clip_scale(torch.tensor(torch.inf), torch.tensor(1.0)) == 0


def test_clip_norm_of_long_rows() -> None:
    grad = torch.rand(2, 3_000_000, generator=generator())
    torch.testing.assert_close(gradient_norm(grad).double(), grad.double().norm(dim=-1), rtol=1e-6, atol=0)
