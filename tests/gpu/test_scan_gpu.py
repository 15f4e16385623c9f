"""The Triton scan against the plain loop in float64: values, every gradient, the same bits twice, compiled, captured, very many rows.

python -m pytest tests/gpu/test_scan_gpu.py -m gpu        # most of it compiling
"""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from laws import generator, same
from torch import Tensor

from shoal.nn.scan import selective_scan

DEVICE = "cuda"
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.filterwarnings("default"),  # compilers warn of themselves
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
SHAPES = [  # R, B, T, D, N
    (1, 1, 1, 5, 4),
    (3, 2, 3, 16, 16),
    (1, 3, 32, 128, 32),
    (3, 5, 32, 16, 16),
    (3, 2, 33, 5, 16),
    (1, 2, 33, 128, 16),
    (3, 2, 257, 128, 16),
    (1, 2, 257, 16, 16),
    (3, 1, 257, 5, 32),
    (2, 2, 100, 40, 7),
]
GRADIENTS = ["u", "delta", "A", "B", "C", "D", "state"]


def inputs(shape: tuple[int, ...], dtype: torch.dtype = torch.float32, seed: int = 0) -> list[Tensor]:
    """u, delta, A, B, C, D, state; steps mostly small, as in a model, some large."""
    R, B, T, D, N = shape
    g = generator(seed)
    u, delta, grid_B, grid_C = (torch.randn(R, B, T, n, generator=g).to(dtype) for n in (D, D, N, N))
    A, skip, state = torch.rand(R, D, N, generator=g).mul(-N).sub(0.1), torch.randn(R, D, generator=g), torch.randn(R, B, D, N, generator=g)
    return [x.to(DEVICE) for x in (u, 2 * delta - 3, A, grid_B, grid_C, skip, state)]


def outgoing(shape: tuple[int, ...], seed: int = 1) -> list[Tensor]:
    """Gradients of y and the last state."""
    R, B, T, D, N = shape
    g = generator(seed)
    return [torch.randn(*size, generator=g).to(DEVICE) for size in ((R, B, T, D), (R, B, D, N))]


def everything(tensors: Sequence[Tensor | None], outgoing: Sequence[Tensor], form: str = "triton", scan=selective_scan) -> list[Tensor]:
    """y, the last state, and the gradients of all inputs."""
    leaves = [None if x is None else x.detach().requires_grad_() for x in tensors]
    y, last = scan(*leaves, form=form)
    grads = torch.autograd.grad([y, last], [x for x in leaves if x is not None], [g.to(o.dtype) for g, o in zip(outgoing, (y, last), strict=True)])
    return [y.detach(), last.detach(), *grads]


def agree(got: Sequence[Tensor], expected: Sequence[Tensor], tolerance: float) -> None:
    for name, a, b in zip(["y", "last", *GRADIENTS], got, expected, strict=False):
        assert a.shape == b.shape, name
        error = ((a.double() - b).norm() / b.norm().clamp(min=1e-6)).item()
        assert error < tolerance, f"{name}: {error:.1e}"  # a NaN fails too


def check(shape: tuple[int, ...], dtype: torch.dtype, tolerance: float, with_state: bool = True) -> None:
    tensors: list[Tensor | None] = [*inputs(shape, dtype)]
    if not with_state:
        tensors[-1] = None
    expected = everything([None if x is None else x.double() for x in tensors], outgoing(shape), "reference")
    got = everything(tensors, outgoing(shape))
    agree(got, expected, tolerance)
    assert got[0].dtype == dtype and got[1].dtype == torch.float32 and all(g.dtype == x.dtype for g, x in zip(got[2:], tensors, strict=False) if x is not None)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_equals_the_loop(shape: tuple[int, ...]) -> None:
    check(shape, torch.float32, 1e-5)


@pytest.mark.parametrize(
    ("shape", "dtype"),
    [((3, 2, 33, 16, 16), torch.bfloat16), ((1, 2, 257, 128, 16), torch.bfloat16), ((2, 1, 33, 16, 32), torch.bfloat16), ((1, 2, 33, 5, 4), torch.float16)],
)
def test_narrow_types(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """Only what is read and written is rounded."""
    check(shape, dtype, 1e-2)


def test_without_a_state() -> None:
    check((3, 2, 33, 16, 16), torch.float32, 1e-5, with_state=False)


def test_only_y_and_no_gradients() -> None:
    tensors = inputs((3, 2, 33, 16, 16))
    u = tensors[0].requires_grad_()
    y, _ = selective_scan(*tensors[:6], form="triton")
    expected, _ = selective_scan(*(x.detach().double() for x in tensors[:6]), form="reference")
    y.sum().backward()
    with torch.no_grad():
        assert same(selective_scan(*tensors[:6], form="triton")[0], y)
    assert u.grad is not None and u.grad.isfinite().all()
    agree([y], [expected], 1e-5)


def test_views_and_odd_addresses() -> None:
    """Slices of a wider projection, a transposed input, rows that begin between two words."""
    tensors = inputs((2, 2, 33, 40, 16))
    expected = everything(tensors, outgoing((2, 2, 33, 40, 16)))
    both = torch.cat((torch.zeros_like(tensors[3][..., :3]), tensors[3], tensors[4]), -1)
    tensors[3], tensors[4] = both[..., 3:19], both[..., 19:]
    tensors[0] = tensors[0].mT.contiguous().mT
    shifted = torch.empty(tensors[1].numel() + 1, device=DEVICE)[1:].view_as(tensors[1])
    tensors[1] = shifted.copy_(tensors[1])
    assert all(same(a, b) for a, b in zip(everything(tensors, outgoing((2, 2, 33, 40, 16))), expected, strict=True))


def test_the_same_bits_twice() -> None:
    shape = (3, 4, 257, 128, 16)
    first, second = (everything(inputs(shape), outgoing(shape)) for _ in range(2))
    assert all(same(a, b) for a, b in zip(first, second, strict=True))


def test_compiled_and_captured_equal_eager() -> None:
    shape = (3, 2, 33, 16, 16)
    tensors, grads = inputs(shape), outgoing(shape)
    eager = everything(tensors, grads)
    compiled = everything(tensors, grads, scan=torch.compile(selective_scan, fullgraph=True, dynamic=False))
    assert all(same(a, b) for a, b in zip(compiled, eager, strict=True))

    still = [torch.zeros_like(x) for x in tensors]
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        everything(still, grads)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = everything(still, grads)
    for place, x in zip(still, tensors, strict=True):
        place.copy_(x)
    graph.replay()
    assert all(same(a, b) for a, b in zip(captured, eager, strict=True))


def test_a_run_alone_is_the_run_in_its_fleet() -> None:
    shape = (3, 4, 100, 40, 16)
    tensors, grads = inputs(shape), outgoing(shape)
    fleet = everything(tensors, grads)
    for r in range(3):
        alone = everything([x[r : r + 1] for x in tensors], [g[r : r + 1] for g in grads])
        agree(alone, [x[r : r + 1].double() for x in fleet], 1e-6)
        one = everything([x[r] for x in tensors], [g[r] for g in grads])  # and without the run axis
        assert all(same(a, b[0]) for a, b in zip(one, alone, strict=True))


def test_a_mate_that_is_not_finite() -> None:
    shape = (2, 2, 33, 16, 16)
    tensors, grads = inputs(shape), outgoing(shape)
    good = everything(tensors, grads)
    tensors[0][0, 0, 5, 3] = torch.nan
    bad = everything(tensors, grads)
    assert all(same(a[1], b[1]) for a, b in zip(bad, good, strict=True))
    assert bad[0][0, 0, 5:, 3].isnan().all()


def test_more_rows_than_a_grid_axis_holds() -> None:
    check((3, 25_000, 3, 5, 4), torch.float32, 1e-5)
    check((1, 70_000, 2, 33, 4), torch.float32, 1e-5)


def test_float64_is_refused() -> None:
    with pytest.raises(ValueError, match="sequential"):
        selective_scan(*(x.double() for x in inputs((1, 1, 3, 5, 4))), form="triton")
