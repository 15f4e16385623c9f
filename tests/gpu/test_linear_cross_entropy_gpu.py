"""The head's cross-entropy on a GPU against float64: values, every gradient, the same bits twice, compiled, captured, memory, very many numbers.

python -m pytest tests/gpu/test_linear_cross_entropy_gpu.py -m gpu
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from laws import generator, same
from torch import Tensor

from shoal.config.fields import ConfigError
from shoal.nn.linear_cross_entropy import Form, linear_cross_entropy

DEVICE = "cuda"
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.filterwarnings("default"),  # compilers warn of themselves
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
SHAPES = [  # R, B, S, D, V; is the table transposed, with a bias, softcap
    ((1, 1, 1, 5, 3), False, False, 0.0),
    ((3, 2, 33, 64, 1000), True, False, 0.0),
    ((3, 2, 33, 64, 1000), False, True, 5.0),
    ((2, 3, 100, 128, 50257), True, False, 0.0),
    ((2, 3, 100, 128, 4097), False, True, 0.0),
    ((2, 3, 100, 128, 4097), True, True, 15.0),
    ((1, 1, 300, 16, 128), True, True, 0.0),
    ((4, 1, 130, 40, 777), False, False, 3.0),
    ((1, 2, 128, 100, 2048), True, False, 0.0),
]
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 1e-2}  # nll of 50,257 tokens at width 128 is 1.06e-5 off


def inputs_of(shape: tuple[int, ...], tied: bool, bias: bool, dtype: torch.dtype = torch.float32, seed: int = 0) -> tuple[list[Tensor], Tensor]:
    R, B, S, D, V = shape
    g = generator(seed)
    weight = torch.randn(R, V, D, generator=g).mT if tied else torch.randn(R, D, V, generator=g)
    found = [torch.randn(R, B, S, D, generator=g), weight * 2 * D**-0.5, *([torch.randn(R, V, generator=g)] if bias else [])]
    return [x.to(DEVICE, dtype).requires_grad_() for x in found], torch.randint(V, (R, B, S), generator=g).to(DEVICE)


def fuse(inputs: Sequence[Tensor], targets: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
    """``inputs``: hidden, weight and perhaps bias."""
    return linear_cross_entropy(inputs[0], inputs[1], inputs[2] if len(inputs) > 2 else None, targets, **options)


def outgoing(like: Tensor) -> Tensor:
    """A factor for every row, half of them 0."""
    return torch.randn(like.shape, generator=generator(7)).relu().to(like)


def everything(inputs: Sequence[Tensor], targets: Tensor, softcap: float, form: Form = "triton", function: Any = fuse) -> list[Tensor]:
    nll, best = function(inputs, targets, softcap=softcap, form=form)
    return [nll.detach(), best, *torch.autograd.grad(nll, inputs, outgoing(nll))]


def agree(got: Sequence[Tensor], expected: Sequence[Tensor], tolerance: float) -> None:
    for name, a, b in zip(["nll", "best", "hidden", "weight", "bias"], got, expected, strict=False):
        assert a.shape == b.shape, name
        if name == "best":
            assert (a == b).double().mean() > 1 - 10 * tolerance
        else:
            error = ((a.double() - b).norm() / b.norm().clamp(min=1e-6)).item()
            assert error < tolerance, f"{name}: {error:.1e}"  # a NaN fails too


@pytest.mark.parametrize("form", ["triton", "chunked", "auto"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("shape", "tied", "bias", "softcap"), SHAPES, ids=str)
def test_equals_float64(shape: tuple[int, ...], tied: bool, bias: bool, softcap: float, dtype: torch.dtype, form: Form) -> None:
    inputs, targets = inputs_of(shape, tied, bias, dtype)
    expected = everything([x.detach().double().requires_grad_() for x in inputs], targets, softcap, "reference")
    got = everything(inputs, targets, softcap, form)
    rounded = dtype == torch.bfloat16 and form != "triton"  # logits are, too
    agree(got, expected, 3 * TOLERANCE[dtype] if rounded else TOLERANCE[dtype])
    assert [x.dtype for x in got] == [torch.float32, torch.int64, *[dtype] * len(inputs)]


def test_no_gradients() -> None:
    inputs, targets = inputs_of((2, 2, 65, 64, 999), True, False, torch.bfloat16)
    nll, best = fuse(inputs, targets, form="triton")
    with torch.no_grad():
        again, choice = fuse(inputs, targets, form="triton")
    assert same(again, nll.detach()) and same(choice, best)
    frozen, _ = linear_cross_entropy(inputs[0], inputs[1].detach(), None, targets, form="triton")
    assert same(*(torch.autograd.grad(x.sum(), inputs[0])[0] for x in (frozen, nll)))


def test_sure_and_extreme_logits() -> None:
    """A loss is never negative; large logits do not overflow; equal ones give the first."""
    hidden = torch.ones(1, 1, 1, 16, device=DEVICE) / 16
    for values in ([0.0, 0.0, 0.0], [3e4, -3e4, 3e4, 0.0], [40.0, 1.0, 0.0], [-3e4, -3e4]):
        row = torch.tensor(values, device=DEVICE)
        weight = row.expand(1, 16, -1)
        for target in range(len(values)):
            nll, best = linear_cross_entropy(hidden, weight, None, torch.full((1, 1, 1), target, device=DEVICE), form="triton")
            expected = -row.double().log_softmax(-1)[target].item()
            assert nll.item() >= 0 and nll.item() == pytest.approx(expected, rel=1e-5, abs=1e-5) and best.item() == row.argmax().item()


def test_the_same_bits_twice() -> None:
    inputs, targets = inputs_of((3, 2, 500, 64, 5003), True, True, torch.bfloat16)
    first, second = (everything(inputs, targets, 10.0) for _ in range(2))
    assert all(same(a, b) for a, b in zip(first, second, strict=True))


def test_a_run_alone_is_the_run_in_its_fleet() -> None:
    inputs, targets = inputs_of((3, 2, 200, 64, 5003), False, True, torch.bfloat16)
    nll, best = fuse(inputs, targets, form="triton")
    grads = torch.autograd.grad(nll.sum(), inputs)
    for r in range(3):
        for cut in (slice(r, r + 1), r):  # with a run axis and without
            own = [x.detach()[cut].requires_grad_() for x in inputs]
            alone, choice = fuse(own, targets[cut], form="triton")
            assert same(alone, nll[cut]) and same(choice, best[cut])
            assert all(same(a, b[cut]) for a, b in zip(torch.autograd.grad(alone.sum(), own), grads, strict=True))


def test_a_mate_that_is_not_finite() -> None:
    inputs, targets = inputs_of((2, 2, 65, 64, 999), True, False, torch.bfloat16)
    good = everything(inputs, targets, 0.0)
    with torch.no_grad():
        inputs[1][0, 3, 5] = torch.nan
    bad = everything(inputs, targets, 0.0)
    assert all(same(a[1], b[1]) for a, b in zip(bad, good, strict=True))
    assert bad[0][0].isnan().all()


def test_compiled_and_captured_equal_eager() -> None:
    for tied in (True, False):
        inputs, targets = inputs_of((3, 2, 100, 64, 5003), tied, False, torch.bfloat16)
        eager = everything(inputs, targets, 10.0)
        compiled = everything(inputs, targets, 10.0, function=torch.compile(fuse, fullgraph=True, dynamic=False))
        assert all(same(a, b) for a, b in zip(compiled, eager, strict=True))

        still = [torch.zeros_like(x).requires_grad_() for x in inputs]
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        factors = outgoing(targets.float())

        def step(still: list[Tensor] = still, targets: Tensor = targets, factors: Tensor = factors) -> list[Tensor]:
            nll, best = fuse(still, targets, softcap=10.0, form="triton")
            return [nll.detach(), best, *torch.autograd.grad(nll, still, factors)]

        with torch.cuda.stream(stream):
            step()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = step()
        with torch.no_grad():
            for place, x in zip(still, inputs, strict=True):
                place.copy_(x)
        graph.replay()
        assert all(same(a, b) for a, b in zip(captured, eager, strict=True))


def test_more_numbers_than_32_bits_count() -> None:
    """Rows x V past 2^32, tables and hidden states of all runs past 2^31; nothing of that size is made beside them."""
    R, N, D, V = 340, 256, 128, 50257
    hidden, table = torch.randn(R, 1, N, D, device=DEVICE, dtype=torch.bfloat16), torch.randn(R, V, D, device=DEVICE, dtype=torch.bfloat16).mul_(0.05)
    targets = torch.randint(V, (R, 1, N), device=DEVICE)
    assert table.numel() > 1 << 31 and R * N * V > 1 << 32
    for x in (hidden, table):
        x.requires_grad_()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    nll, best = linear_cross_entropy(hidden, table.mT, None, targets)
    grads = torch.autograd.grad(nll.sum(), [hidden, table])
    assert torch.cuda.max_memory_allocated() - before < 2 * 2 * table.numel()
    last = [x[-1:].detach().requires_grad_() for x in (hidden, table)]
    alone, choice = linear_cross_entropy(last[0], last[1].mT, None, targets[-1:], form="triton")
    assert same(alone, nll[-1:]) and same(choice, best[-1:])
    assert all(same(a, b[-1:]) for a, b in zip(torch.autograd.grad(alone.sum(), last), grads, strict=True))


def test_what_is_refused() -> None:
    for width, dtype in ((129, torch.bfloat16), (16, torch.float64)):
        inputs, targets = inputs_of((1, 1, 4, width, 50), True, False, dtype)
        with pytest.raises(ConfigError, match="chunked"):
            fuse(inputs, targets, form="triton")
