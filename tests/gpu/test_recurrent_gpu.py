"""The recurrent mixers on a GPU: as the CPU in float64, captured in a graph, compiled, the same bits twice.

python -m pytest tests/gpu/test_recurrent_gpu.py -m gpu
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from laws import filled, generator, same
from torch import Tensor

from shoal.config import DecoderConfig
from shoal.contracts import Context
from shoal.mixers.recurrent import Recurrent

DEVICE = "cuda"
R, B, T, D = 3, 8, 50, 32
KINDS: Any = pytest.mark.parametrize("kind", ["rnn", "gru", "lstm"])
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.filterwarnings("default"),  # compilers warn of themselves
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def case(kind: Any, dtype: torch.dtype = torch.float32, device: str = DEVICE, masked: bool = False) -> tuple[Any, Tensor, Context]:
    mixer = filled(Recurrent(kind, DecoderConfig(width=D), (R,)))
    with torch.no_grad():
        for parameter in mixer.parameters():
            parameter *= 0.5
    x = torch.randn(R, B, T, D, generator=generator(1), dtype=torch.float64)
    mask = torch.rand(R, B, T, generator=generator(2)) < 0.8 if masked else None
    return mixer.to(device, dtype), x.to(device, dtype).requires_grad_(), Context(mask=None if mask is None else mask.to(device))


def everything(mixer: Any, x: Tensor, context: Context, call: Any = None) -> list[Tensor]:
    """The output and the gradients of the input and of every parameter."""
    y, _ = (mixer if call is None else call)(x, context)
    outgoing = torch.randn(y.shape, generator=generator(3), dtype=torch.float64).to(y)
    return [y.detach(), *torch.autograd.grad(y, [x, *mixer.parameters()], outgoing)]


@KINDS
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 2e-5), (torch.bfloat16, 4e-2)])
def test_equals_the_cpu(kind: Any, masked: bool, dtype: torch.dtype, tolerance: float) -> None:
    expected, got = everything(*case(kind, torch.float64, "cpu", masked)), everything(*case(kind, dtype, masked=masked))
    for a, b in zip(got, expected, strict=True):
        assert a.dtype == dtype and ((a.double().cpu() - b).norm() < tolerance * b.norm())


@KINDS
def test_the_same_bits_twice(kind: Any) -> None:
    assert all(same(a, b) for a, b in zip(everything(*case(kind)), everything(*case(kind)), strict=True))


@KINDS
def test_compiled_as_one_graph(kind: Any) -> None:
    mixer, x, context = case(kind, masked=True)
    compiled = torch.compile(mixer, fullgraph=True, dynamic=False)
    for a, b in zip(everything(mixer, x, context, compiled), everything(mixer, x, context), strict=True):
        assert (a - b).norm() < 1e-5 * b.norm()


@KINDS
def test_captured(kind: Any) -> None:
    mixer, x, context = case(kind, masked=True)

    def step(x: Tensor) -> list[Tensor]:
        y, _ = mixer(x, context)
        return [y.detach(), *torch.autograd.grad(y.square().sum(), [x, *mixer.parameters()])]

    eager, still = step(x), torch.zeros_like(x).requires_grad_()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step(still)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step(still)
    with torch.no_grad():
        still.copy_(x)
    graph.replay()
    assert all(same(a, b) for a, b in zip(captured, eager, strict=True))


@KINDS
def test_a_run_alone_is_the_run_in_its_fleet(kind: Any) -> None:
    mixer, x, context = case(kind)
    fleet = mixer(x, context)[0]
    for r in range(R):
        alone = Recurrent(kind, DecoderConfig(width=D)).to(DEVICE)
        alone.load_state_dict({name: p[r] for name, p in mixer.state_dict().items()})
        assert (alone(x[r], context)[0] - fleet[r]).norm() < 1e-5 * fleet[r].norm()
