"""SSD: the chunked matrix form against the recurrence step by step, the mixer against transformers' Mamba-2, and how it begins."""

from __future__ import annotations

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
from shoal.contracts import Context
from shoal.mixers import ssd as module
from shoal.mixers.ssd import CHUNK, SSD, ssd
from shoal.nn import Constant, initialise, select

CONFIG = DecoderConfig(width=6, num_heads=3, state_size=5, convolution=3, mixers=("ssd",))
R, B, H, K, N = 2, 3, 3, 4, 5
PLACES = {"all": None, "slice": slice(3, None, 2), "last": slice(-1, None), "indices": "drawn"}


def randn(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, generator=generator(seed), dtype=torch.float64)


def arguments(lead: tuple[int, ...], time: int, carried: bool) -> list[Tensor]:
    """x, step, A, B, C and, if carried, a state; decays from nearly none to nearly all."""
    step, A = randn(*lead, B, time, H, seed=2).exp(), -randn(*lead, H, seed=3).exp()
    given = [randn(*lead, B, time, H, K, seed=4), step, A, randn(*lead, B, time, N, seed=5), randn(*lead, B, time, N, seed=6)]
    return [y.requires_grad_() for y in (*given, *([randn(*lead, B, H, K, N, seed=7)] if carried else []))]


def one_by_one(x: Tensor, step: Tensor, A: Tensor, B: Tensor, C: Tensor, state: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The recurrence as it is written."""
    h, ys = x.new_zeros(*x[..., 0, :, :].shape, B.shape[-1]) if state is None else state, []
    for x_t, step_t, B_t, C_t in zip(x.unbind(-3), step.unbind(-2), B.unbind(-2), C.unbind(-2), strict=True):
        kept = (step_t * A.unsqueeze(-2)).exp()
        h = torch.einsum("...bh,...bhkn->...bhkn", kept, h) + torch.einsum("...bh,...bhk,...bn->...bhkn", step_t, x_t, B_t)
        ys.append(torch.einsum("...bhkn,...bn->...bhk", h, C_t))
    return torch.stack(ys, dim=-3), h


@pytest.mark.parametrize("time", [1, 7, CHUNK, CHUNK + 1, 3 * CHUNK - 5])
@pytest.mark.parametrize("places", PLACES)
@pytest.mark.parametrize(("lead", "carried"), [((R,), False), ((), True), ((R,), True)])
def test_equals_the_recurrence(time: int, places: str, lead: tuple[int, ...], carried: bool) -> None:
    given, at = arguments(lead, time, carried), PLACES[places]
    at = torch.randint(time, (*lead, B, 2 * CHUNK), generator=generator(8)) if at == "drawn" else at
    assert at is None or isinstance(at, slice | Tensor)
    y, last = ssd(*given[:5], *given[5:], at=at)
    expected, end = one_by_one(*given)
    expected = select(expected.flatten(-2), at).unflatten(-1, (H, K))
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
    assert torch.autograd.gradcheck(cast(Any, ssd), arguments((), 7, True))


def test_strong_decays_in_float32() -> None:
    """Steps at which running sums in float32 lose every digit, and exponentials of their negatives overflow."""
    x, _, A, write, read = (y.detach() for y in arguments((R,), 2 * CHUNK, False))
    step = torch.where(torch.arange(2 * CHUNK) % 7 == 0, 1e4, 1e-2)[:, None].expand(R, B, -1, H).clone().requires_grad_()
    y, _ = ssd(x.float(), step.float(), A.float(), write.float(), read.float())
    expected, _ = one_by_one(x, step.double(), A, write, read)
    close(y.double() / expected.abs().max(), expected / expected.abs().max(), 1e-6)
    (slope,) = torch.autograd.grad(y.sum(), step)
    assert slope.isfinite().all()


def test_a_step_of_zero_is_as_if_the_position_were_not_there() -> None:
    x, step, A, write, read = arguments((R,), 2 * CHUNK + 9, False)
    there = torch.arange(x.shape[-3]) % 3 != 1
    y, last = ssd(x, torch.where(there[:, None], step, 0), A, write, read, torch.zeros(R, B, H, K, N, dtype=torch.float64))
    cut, end = ssd(x[:, :, there], step[:, :, there], A, write[:, :, there], read[:, :, there], torch.zeros(R, B, H, K, N, dtype=torch.float64))
    assert last is not None and end is not None
    close(y[:, :, there], cut)
    close(last, end)


def test_bfloat16() -> None:
    """Products in bfloat16, decays and states in float32."""
    mixer, x = filled(SSD(CONFIG)).float(), randn(B, 2 * CHUNK, 6).float()
    expected, _ = mixer(x, Context())
    mixer = mixer.bfloat16()
    y, cache = mixer(x.bfloat16(), Context(), mixer.init_cache(B, 10))
    assert y.dtype == cache.past.dtype == torch.bfloat16 and cache.state.dtype == torch.float32
    assert (y - expected).abs().mean() < 0.05 * expected.abs().mean()


@pytest.mark.parametrize("law", laws.SEQUENCE_LAWS)
def test_every_law_holds_in_chunks(law: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """As in ``test_laws``, of sequences that are cut."""
    monkeypatch.setattr(module, "CHUNK", 5)
    law(laws.Case(SSD, replace(CONFIG, width=8, num_heads=2), 12, tokens=False))


@pytest.mark.parametrize("time", [10, CHUNK, 2 * CHUNK + 3])
@pytest.mark.parametrize("at", [None, slice(1, None), slice(-2, None)])
def test_flops(time: int, at: slice | None) -> None:
    mixer, x = filled(SSD(CONFIG)), randn(B, time, 6)
    with FlopCounterMode(display=False) as counter:
        mixer(x, Context(at=at))
    assert counter.get_total_flops() == mixer.flops(B, time, len(range(time)[at or slice(None)]))


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("padded", [False, True])
def test_equals_transformers(bias: bool, padded: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its path without kernels, in float64; padding on the left, without biases (with them its convolution reads the bias of the padding)."""
    pytest.importorskip("transformers")
    from transformers.models.mamba2.configuration_mamba2 import Mamba2Config
    from transformers.models.mamba2.modeling_mamba2 import Mamba2Mixer

    time, mixer = 150, filled(SSD(replace(CONFIG, bias=bias)))
    config = Mamba2Config(
        num_heads=3, head_dim=4, hidden_size=6, state_size=5, expand=2, conv_kernel=3, n_groups=1, chunk_size=16, use_bias=bias, num_hidden_layers=1
    )
    reference = Mamba2Mixer(config, 0).double().eval()
    names = {"A_log": "A_log", "D": "D", "step_bias": "dt_bias", "norm.weight": "norm.weight", "convolution_bias": "conv1d.bias"}
    with torch.no_grad():
        for ours, theirs in names.items():
            reference.get_parameter(theirs).copy_(mixer.get_parameter(ours))
        reference.conv1d.weight.copy_(mixer.convolution_weight.mT[:, None])
        reference.in_proj.weight.copy_(torch.cat((mixer.gate.weight, mixer.input.weight), dim=-1).mT)
        reference.out_proj.weight.copy_(mixer.out.weight.mT)
        if bias:
            reference.in_proj.bias.copy_(torch.cat((mixer.gate.bias, mixer.input.bias)))
            reference.out_proj.bias.copy_(mixer.out.bias)
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)  # else it computes in float32 whatever it is given

    x, mask = randn(B, time, 6).requires_grad_(), torch.arange(time) >= torch.tensor([[0], [70], [149]])
    mask = mask if padded and not bias else torch.ones_like(mask)
    y, _ = mixer(x, Context(mask=mask if padded else None))
    expected = reference(x, attention_mask=mask.double())
    close(y[mask], expected[mask], 1e-5)  # float32 is left in its norm

    weights = randn(*y.shape, seed=3) * mask[..., None]
    got, slope = (
        dict(zip(("x", *dict(m.named_parameters())), torch.autograd.grad((out * weights).sum(), [x, *m.parameters()]), strict=True))
        for m, out in ((mixer, y), (reference, expected))
    )
    for ours, theirs in {**names, "x": "x"}.items():
        close(got[ours], slope[theirs], 1e-4)
    close(got["convolution_weight"], slope["conv1d.weight"][:, 0].mT, 1e-4)
    close(torch.cat((got["gate.weight"], got["input.weight"]), dim=-1), slope["in_proj.weight"].mT, 1e-4)
    close(got["out.weight"], slope["out_proj.weight"].mT, 1e-4)


def test_beginning() -> None:
    """A = -U(1, 16), steps log-uniform in [0.001, 0.1], the convolution within 1 / sqrt(steps), D = 1; the first three by seed."""
    mixer = SSD(DecoderConfig(width=64, num_heads=64, convolution=4), (4,))
    initialise(mixer, [*mixer.init_rules(), ("*", Constant(0.0))], torch.arange(4))
    drawn = {
        "A": (mixer.A_log.exp() - 1) / 15,
        "step": 1 + F.softplus(mixer.step_bias).log10() / 2 + 0.5,
        "weight": mixer.convolution_weight + 0.5,
        "bias": mixer.convolution_bias + 0.5,
    }
    for name, values in drawn.items():
        assert scipy.stats.kstest(values.detach().flatten().numpy(), "uniform").pvalue > 1e-3, name
        assert len(values.unique()) > 0.99 * values.numel()
    assert (mixer.D == 1).all()
    assert set(mixer.undecayed()) == {"A_log", "D", "step_bias"} <= {name for name, _ in mixer.named_parameters()}


def test_compiles_whole() -> None:
    mixer, x = filled(SSD(CONFIG, (R,))), randn(R, B, CHUNK + 6, 6)
    compiled = torch.compile(mixer, backend="eager", fullgraph=True)
    close(compiled(x, Context())[0], mixer(x, Context())[0])
