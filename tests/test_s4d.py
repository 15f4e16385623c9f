"""S4D: the convolution in pieces against the complex recurrence step by step, the block against its equations, and how it begins."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any, cast

import laws
import pytest
import scipy.stats
import torch
from laws import close, filled, generator
from torch import Tensor
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from shoal.config import DecoderConfig
from shoal.config.fields import ConfigError
from shoal.contracts import Context
from shoal.mixers import s4d as module
from shoal.mixers.s4d import CHUNK, S4D, s4d
from shoal.nn import Constant, initialise, select

CONFIG = DecoderConfig(width=6, num_heads=1, state_size=4, mixers=("s4d",))
R, B, D, N = 2, 3, 5, 6
PLACES = {"all": None, "slice": slice(3, None, 2), "last": slice(-1, None), "indices": "drawn"}


def randn(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, generator=generator(seed), dtype=torch.float64)


def arguments(lead: tuple[int, ...], time: int, carried: bool) -> list[Tensor]:
    """x, step, decay, frequency, C and, if carried, a state; decays from nearly none to nearly all."""
    positive = [randn(*lead, *shape, seed=seed).exp() for seed, shape in ((2, (D,)), (3, (D, N // 2)))]
    given = [randn(*lead, B, time, D, seed=4), *positive, 3 * randn(*lead, D, N // 2, seed=5), randn(*lead, D, N, seed=6)]
    return [y.requires_grad_() for y in (*given, *([randn(*lead, B, D, N, seed=7)] if carried else []))]


def as_complex(x: Tensor) -> Tensor:
    return torch.complex(*x.chunk(2, dim=-1))


def one_by_one(x: Tensor, step: Tensor, decay: Tensor, frequency: Tensor, C: Tensor, state: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The recurrence as it is written, in complex numbers."""
    A = torch.complex(-decay, frequency)
    kept, weights = (step[..., None] * A).exp().unsqueeze(-3), (step[..., None] * as_complex(C)).unsqueeze(-3)
    h, ys = torch.zeros_like(kept).expand(*x.shape[:-2], *A.shape[-2:]) if state is None else as_complex(state), []
    for x_t in x.unbind(-2):
        h = kept * h + x_t[..., None]
        ys.append(2 * (weights * h).sum(-1).real)
    return torch.stack(ys, dim=-2), torch.cat((h.real, h.imag), dim=-1)


@pytest.mark.parametrize("time", [1, 7, CHUNK, CHUNK + 1, 3 * CHUNK - 5])
@pytest.mark.parametrize("places", PLACES)
@pytest.mark.parametrize(("lead", "carried"), [((R,), False), ((), True), ((R,), True)])
def test_equals_the_recurrence(time: int, places: str, lead: tuple[int, ...], carried: bool) -> None:
    given, at = arguments(lead, time, carried), PLACES[places]
    at = torch.randint(time, (*lead, B, 2 * CHUNK), generator=generator(8)) if at == "drawn" else at
    assert at is None or isinstance(at, slice | Tensor)
    y, last = s4d(*given[:5], *given[5:], at=at)
    expected, end = one_by_one(*given)
    expected = select(expected, at)
    close(y, expected, 1e-10)
    weights, objective, reference = randn(*y.shape, seed=9), torch.zeros(()), torch.zeros(())
    if carried:
        assert last is not None
        close(last, end, 1e-10)
        objective, reference = (last * end.detach()).sum(), (end * end.detach()).sum()
    else:
        assert last is None
    if y.numel():
        for got, slope in zip(
            torch.autograd.grad(objective + (y * weights).sum(), given), torch.autograd.grad(reference + (expected * weights).sum(), given), strict=True
        ):
            close(got, slope, 1e-9)


@pytest.mark.parametrize("chunk", [3, CHUNK])
def test_gradients_are_slopes(monkeypatch: pytest.MonkeyPatch, chunk: int) -> None:
    monkeypatch.setattr(module, "CHUNK", chunk)
    assert torch.autograd.gradcheck(cast(Any, s4d), arguments((), 7, True))


def test_float32_over_many_chunks() -> None:
    given = [y.detach() for y in arguments((R,), 40 * CHUNK, False)]
    y, _ = s4d(*(y.float() for y in given))
    expected, _ = one_by_one(*given)
    close(y.double() / expected.std(), expected / expected.std(), 1e-4)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("padded", [False, True])
def test_equals_its_equations(bias: bool, padded: bool) -> None:
    """Run by run: projections, the complex recurrence of what is not padding, skip, gate. A hole inside is a silence: time passes, nothing comes in."""
    mixer, time = filled(S4D(replace(CONFIG, bias=bias), (R,))), CHUNK + 20
    x, mask = randn(R, B, time, 6).requires_grad_(), torch.rand(R, B, time, generator=generator(2)) < 0.7
    at = torch.randint(time, (R, B, 9), generator=generator(3))
    y, _ = mixer(x, Context(mask=mask if padded else None, at=at))

    def project(layer: Any, x: Tensor) -> Tensor:
        return torch.stack([F.linear(x[r], layer.weight[r].mT, layer.bias[r] if bias else None) for r in range(R)])

    u = project(mixer.input, x) * (mask[..., None] if padded else 1)
    mixed, _ = one_by_one(u, mixer.log_step.exp(), mixer.log_decay.exp(), mixer.frequency, mixer.C)
    expected = select(project(mixer.out, (mixed + mixer.D[:, None, None] * u) * F.silu(project(mixer.gate, x))), at)
    parameters, weights = [x, *mixer.parameters()], randn(*y.shape, seed=4)
    close(y, expected, 1e-10)
    for got, slope in zip(torch.autograd.grad((y * weights).sum(), parameters), torch.autograd.grad((expected * weights).sum(), parameters), strict=True):
        close(got, slope, 1e-9)


def test_bfloat16() -> None:
    """Products in bfloat16, states in float32."""
    mixer, x = filled(S4D(CONFIG)).float(), randn(B, 2 * CHUNK, 6).float()
    expected, _ = mixer(x, Context())
    mixer = mixer.bfloat16()
    y, cache = mixer(x.bfloat16(), Context(), mixer.init_cache(B, 10))
    assert y.dtype == torch.bfloat16 and cache.dtype == torch.float32
    assert (y - expected).abs().mean() < 0.05 * expected.abs().mean()


@pytest.mark.parametrize("law", laws.SEQUENCE_LAWS)
def test_every_law_holds_in_chunks(law: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """As in ``test_laws``, of sequences that are cut."""
    monkeypatch.setattr(module, "CHUNK", 5)
    law(laws.Case(S4D, CONFIG, 12, tokens=False))


@pytest.mark.parametrize("time", [10, CHUNK, 2 * CHUNK + 3])
@pytest.mark.parametrize("at", [None, slice(1, None), slice(-2, None)])
def test_flops(time: int, at: slice | None) -> None:
    mixer, x = filled(S4D(CONFIG)), randn(B, time, 6)
    with FlopCounterMode(display=False) as counter:
        mixer(x, Context(at=at))
    assert counter.get_total_flops() == mixer.flops(B, time, len(range(time)[at or slice(None)]))


def test_beginning() -> None:
    """A = -1/2 + i pi n, steps log-uniform in [0.001, 0.1], C a complex normal of variance 1, D = 1; the second and third by seed."""
    mixer = S4D(DecoderConfig(width=32, num_heads=1, state_size=6, mixers=("s4d",)), (4,))
    initialise(mixer, [*mixer.init_rules(), ("*", Constant(0.0))], torch.arange(4))
    close(mixer.log_decay.exp(), torch.full((4, 64, 3), 0.5), 1e-6)
    close(mixer.frequency, torch.tensor([0, math.pi, 2 * math.pi]).expand(4, 64, 3), 1e-6)
    step = 1 + (mixer.log_step / math.log(10) + 1) / 2
    C = mixer.C * 2**0.5
    for values, distribution in ((step, "uniform"), (C, "norm")):
        assert scipy.stats.kstest(values.detach().flatten().numpy(), distribution).pvalue > 1e-3
        assert len(values.unique()) > 0.99 * values.numel()
    assert (mixer.D == 1).all()
    assert set(mixer.undecayed()) == {"log_step", "log_decay", "frequency"} <= {name for name, _ in mixer.named_parameters()}


def test_compiles_whole() -> None:
    mixer, x = filled(S4D(CONFIG, (R,))), randn(R, B, CHUNK + 6, 6)
    compiled = torch.compile(mixer, backend="eager", fullgraph=True)
    close(compiled(x, Context())[0], mixer(x, Context())[0])


def test_an_odd_state_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"state_size.*even, not 5"):
        DecoderConfig(mixers=("mamba", "s4d"), state_size=5)
    DecoderConfig(mixers=("mamba", "ssd"), state_size=5)
