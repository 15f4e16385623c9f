"""The selective scan: every form against arithmetic with plain numbers, a float64 loop and other people's scan; values, gradients, memory, compilation."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from laws import close, generator
from torch import Tensor
from torch.nn import functional as F

from shoal.config.fields import ConfigError
from shoal.nn import scan, selective_scan, short_convolution
from shoal.nn.scan import Form

SHAPES = [  # lead, batch, time, channels, states
    ((), 2, 7, 3, 4),
    ((1,), 3, 1, 8, 2),
    ((3,), 2, 21, 5, 1),
    ((2,), 9, 10, 4, 3),  # more rows than channels, which is the other layout
    ((), 1, 1, 1, 1),
]
CUTS = [(scan.PIECE, scan.SLICE), (60, 20), (1, 1)]  # all at once; pieces that do not divide time and rows; one row and one step


def inputs_of(lead: tuple[int, ...], batch: int, time: int, channels: int, size: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> list[Tensor]:
    """u, delta, A, B, C, D, state."""
    g = generator(seed)
    shapes = [
        (batch, time, channels),
        (batch, time, channels),
        (channels, size),
        (batch, time, size),
        (batch, time, size),
        (channels,),
        (batch, channels, size),
    ]
    found = [torch.randn(*lead, *shape, generator=g, dtype=torch.float64) for shape in shapes]
    found[2] = -found[2].exp()
    return [x.to(dtype).requires_grad_() for x in found]


def with_gradients(form: Form, inputs: list[Tensor]) -> list[Tensor]:
    outputs = selective_scan(*inputs, form=form)
    weights = [torch.randn(y.shape, generator=generator(9 + i), dtype=torch.float64).to(y.dtype) for i, y in enumerate(outputs)]
    return [*outputs, *torch.autograd.grad(outputs, inputs, weights)]


def by_hand(inputs: list[Tensor]) -> tuple[list[Any], list[Any]]:
    """One run, number by number."""
    u, delta, A, B, C, D, state = (x.tolist() for x in inputs)
    outputs: list[Any] = []
    for b in range(len(u)):
        outputs.append([])
        for t in range(len(u[b])):
            row = []
            for d in range(len(D)):
                step = math.log1p(math.exp(delta[b][t][d]))
                for n in range(len(A[d])):
                    state[b][d][n] = math.exp(step * A[d][n]) * state[b][d][n] + step * u[b][t][d] * B[b][t][n]
                row.append(sum(h * c for h, c in zip(state[b][d], C[b][t], strict=True)) + D[d] * u[b][t][d])
            outputs[b].append(row)
    return outputs, state


@pytest.mark.parametrize("form", ["reference", "sequential"])
def test_equals_arithmetic_by_hand(form: Form) -> None:
    inputs = inputs_of((3,), 2, 6, 4, 3)
    y, state = selective_scan(*inputs, form=form)
    for r in range(3):
        expected, last = by_hand([x[r] for x in inputs])
        close(y[r], torch.tensor(expected, dtype=torch.float64), 1e-12)
        close(state[r], torch.tensor(last, dtype=torch.float64), 1e-12)


@pytest.mark.parametrize("cut", CUTS)
@pytest.mark.parametrize("shape", SHAPES)
def test_sequential_equals_reference(shape: Any, cut: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = inputs_of(*shape)
    expected = with_gradients("reference", inputs)
    monkeypatch.setattr(scan, "PIECE", cut[0])
    monkeypatch.setattr(scan, "SLICE", cut[1])
    for got, reference in zip(with_gradients("sequential", inputs), expected, strict=True):
        assert got.shape == reference.shape
        close(got, reference, 1e-10)


@pytest.mark.parametrize("form", ["reference", "sequential"])
def test_gradcheck(form: Form, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scan, "PIECE", 30)
    assert torch.autograd.gradcheck(lambda *inputs: selective_scan(*inputs, form=form), inputs_of((2,), 2, 5, 3, 2))


@pytest.mark.parametrize("shape", [((2,), 3, 40, 6, 16), ((4,), 20, 33, 4, 8)])
def test_float32(shape: Any) -> None:
    """A hundred-thousandth of the largest value, beside the same numbers in float64."""
    inputs = inputs_of(*shape, dtype=torch.float32)
    expected = with_gradients("reference", [x.detach().double().requires_grad_() for x in inputs])
    for got, reference in zip(with_gradients("sequential", inputs), expected, strict=True):
        assert got.dtype == torch.float32
        assert (got - reference).abs().max() <= 1e-5 * reference.abs().max()


def test_bfloat16() -> None:
    """Inside and in the state float32: only the output is rounded."""
    inputs = [x.detach() for x in inputs_of((2,), 3, 12, 4, 3, dtype=torch.bfloat16)]
    expected, last = selective_scan(*(x.double() for x in inputs), form="reference")
    y, state = selective_scan(*inputs)
    assert y.dtype == torch.bfloat16 and state.dtype == torch.float32
    assert (state - last).abs().max() <= 1e-5 * last.abs().max()
    close(y.double(), expected, 2**-8)


def test_run_axis() -> None:
    """Run r of a fleet is the run alone, values and gradients."""
    inputs = inputs_of((3,), 4, 9, 5, 2)
    outputs = selective_scan(*inputs)
    whole = torch.autograd.grad(outputs, inputs, [y.detach() for y in outputs])
    for r in range(3):
        alone = selective_scan(*(x[r] for x in inputs))
        slopes = torch.autograd.grad(alone, inputs, [y.detach() for y in alone])
        for got, expected in zip((*alone, *(slope[r] for slope in slopes)), (*(y[r] for y in outputs), *(slope[r] for slope in whole)), strict=True):
            close(got, expected, 1e-12)


@pytest.mark.parametrize("form", ["auto", "reference", "sequential"])
@pytest.mark.parametrize("steps", [1, 4])
def test_state_carries_on(form: Form, steps: int) -> None:
    """Piece by piece through the state is the whole; without a state it begins at 0."""
    u, delta, A, B, C, D, state = inputs_of((2,), 3, 12, 4, 3)
    y, last = selective_scan(u, delta, A, B, C, D, state, form=form)
    pieces = []
    with torch.no_grad():
        for t in range(0, 12, steps):
            u_t, delta_t, B_t, C_t = (x[:, :, t : t + steps] for x in (u, delta, B, C))
            piece, state = selective_scan(u_t, delta_t, A, B_t, C_t, D, state, form=form)
            pieces.append(piece)
    close(torch.cat(pieces, dim=2), y, 1e-12)
    close(state, last, 1e-12)
    close(selective_scan(u, delta, A, B, C, D, form=form)[0], selective_scan(u, delta, A, B, C, D, torch.zeros_like(last), form=form)[0], 1e-12)


def test_no_step_changes_nothing() -> None:
    """What masked positions rely on: a very negative delta keeps every bit of the state, takes no gradient, and a very large one stays finite."""
    u, delta, A, B, C, D, state = inputs_of((2,), 3, 5, 4, 3)
    _, last = selective_scan(u, torch.full_like(delta, -1e4), A, B, C, D, state)
    assert last.equal(state)
    assert all((g == 0).all() for g in torch.autograd.grad(last.sum(), [u, A, B], retain_graph=True))
    y, last = selective_scan(u, torch.full_like(delta, 1e4), A, B, C, D, state)
    assert y.isfinite().all() and last.isfinite().all()


def test_any_strides() -> None:
    inputs = inputs_of((2,), 3, 6, 4, 3)
    strided = [x.detach().transpose(0, -1).contiguous().transpose(0, -1).requires_grad_() for x in inputs]
    for got, expected in zip(with_gradients("sequential", strided), with_gradients("sequential", inputs), strict=True):
        close(got, expected, 1e-12)


def test_keeps_less_than_the_states() -> None:
    """With gradients the inputs and a state now and then; without, nothing."""
    time, channels, size = 4096, 64, 16
    kept: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x.numel()) or x, lambda x: x):
        selective_scan(*inputs_of((), 2, time, channels, size, dtype=torch.float32))
    assert 0 < sum(kept) < 2 * time * channels * size
    flat = [x.detach().flatten(0, -3) if x.dim() > 2 else x.detach() for x in inputs_of((), 2, time, 4, 2)]
    u, step, A, B, C, _, state = flat
    *_, starts = scan._scan(u, step, A.mT.expand(2, 2, 4), B, C, state.mT, False)
    assert starts.numel() == 0


def test_operators() -> None:
    """PyTorch's own checks of the two operations: what they say of shapes and aliases is so, compiled and eager gradients are one."""
    u, step, A, B, C, _, state = inputs_of((), 3, 5, 4, 2)
    A, state = (x.detach().mT.contiguous().requires_grad_() for x in (A.expand(3, 4, 2), state))
    torch.library.opcheck(scan._scan, (u, step, A, B, C, state, True))
    torch.library.opcheck(scan._scan, (*(x.detach() for x in (u, step, A, B, C, state)), False))
    starts = scan._scan(u, step, A, B, C, state, True)[2]
    torch.library.opcheck(scan._scan_gradient, tuple(x.detach() for x in (u, state, u, step, A, B, C, starts)))


def test_compiles_whole() -> None:
    inputs = inputs_of((2,), 3, 9, 4, 3)

    def loss(*inputs: Tensor) -> Tensor:
        y, state = selective_scan(*inputs)
        return y.square().sum() + state.sin().sum()

    got = torch.autograd.grad(torch.compile(loss, fullgraph=True, backend="aot_eager")(*inputs), inputs)
    for compiled, eager in zip(got, torch.autograd.grad(loss(*inputs), inputs), strict=True):
        close(compiled, eager, 1e-12)


def test_triton_needs_a_gpu() -> None:
    with pytest.raises(ConfigError, match=r'model\.scan: the triton scan runs on a GPU only; set it to "auto"'):
        selective_scan(*inputs_of((), 1, 2, 2, 2), form="triton")


def test_equals_mambapys_parallel_scan() -> None:
    pscan = pytest.importorskip("mambapy.pscan").pscan
    u, delta, A, B, C, D, _ = inputs_of((), 3, 13, 4, 5)
    step = F.softplus(delta)
    states = pscan((step.unsqueeze(-1) * A).exp(), (step * u).unsqueeze(-1) * B.unsqueeze(-2))
    theirs = (states @ C.unsqueeze(-1)).squeeze(-1) + D * u
    ours, _ = selective_scan(u, delta, A, B, C, D)
    parameters = [u, delta, A, B, C, D]
    for got, expected in zip((ours, *gradients(ours, parameters)), (theirs, *gradients(theirs, parameters)), strict=True):
        close(got, expected, 1e-10)


def gradients(y: Tensor, at: list[Tensor]) -> tuple[Tensor, ...]:
    return torch.autograd.grad(y, at, torch.randn(y.shape, generator=generator(3), dtype=y.dtype))


# --- the convolution before it


@pytest.mark.parametrize("width", [1, 2, 4, 7])
@pytest.mark.parametrize("time", [1, 3, 9])
def test_convolution_equals_conv1d(width: int, time: int) -> None:
    x, weight, bias = (torch.randn(*shape, generator=generator(1), dtype=torch.float64).requires_grad_() for shape in ((2, 3, time, 5), (2, width, 5), (2, 5)))
    past = torch.randn(2, 3, width - 1, 5, generator=generator(2), dtype=torch.float64)
    for before in (None, past):
        y, last = short_convolution(x, weight, bias, before)
        whole = torch.cat((torch.zeros_like(past) if before is None else before, x), dim=2)
        runs = [F.conv1d(whole[r].mT, weight[r].mT.unsqueeze(1), bias[r], groups=5).mT for r in range(2)]
        close(last, whole[:, :, time:], 1e-12)
        for got, expected in zip((y, *gradients(y, [x, weight, bias])), (torch.stack(runs), *gradients(torch.stack(runs), [x, weight, bias])), strict=True):
            close(got, expected, 1e-12)
    close(short_convolution(x[0], weight[0], bias[0], past[0])[0], y[0], 1e-12)
