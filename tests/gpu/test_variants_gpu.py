"""Every variant of attention on a GPU: as the CPU in float64, values and gradients, with and without padding.

python -m pytest tests/gpu/test_variants_gpu.py -m gpu
"""

from __future__ import annotations

from typing import Any, get_args

import pytest
import torch
from laws import filled, generator
from torch import Tensor

from shoal import mixers
from shoal.config import DecoderConfig
from shoal.config.models import MixerName
from shoal.contracts import Context
from shoal.mixers.attention import attend
from shoal.train import compiled as programs

R, B, T, D = 3, 4, 50, 32
VARIANTS = [name for name in get_args(MixerName) if name not in ("rnn", "gru", "lstm", "mamba", "ssd", "s4d")]
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.filterwarnings("default"),  # compilers warn of themselves
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def everything(name: Any, dtype: torch.dtype, device: str, masked: bool, positions: Any) -> list[Tensor]:
    """The output and the gradients of the input and of every parameter that has one."""
    config = DecoderConfig(width=D, num_heads=4, window=9, features=16, positions=positions)
    mixer = filled(mixers.build(name, config, (R,), max_length=T)).to(device, dtype)
    x = torch.randn(R, B, T, D, generator=generator(1), dtype=torch.float64).to(device, dtype).requires_grad_()
    mask = torch.arange(T, device=device) >= torch.arange(R * B, device=device).view(R, B, 1) if masked else None
    y, _ = mixer(x, Context(mask=mask))
    y = y if mask is None else torch.where(mask.unsqueeze(-1), y, 0.0)
    outgoing = torch.randn(y.shape, generator=generator(3), dtype=torch.float64).to(y)
    inputs = [x, *(p for p in mixer.parameters() if p.requires_grad)]
    gradients = torch.autograd.grad(y, inputs, outgoing, allow_unused=True)
    return [y.detach(), *(g for g in gradients if g is not None)]


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize(("masked", "positions"), [(False, "none"), (True, "none"), (True, "rotary"), (False, "alibi"), (True, "alibi")])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.bfloat16, 1e-1)])
def test_equals_the_cpu(name: str, masked: bool, positions: str, dtype: torch.dtype, tolerance: float) -> None:
    expected, got = everything(name, torch.float64, "cpu", masked, positions), everything(name, dtype, "cuda", masked, positions)
    largest = max(b.norm() for b in expected)  # a gradient that is 0, as a key's bias has, is noise of the others
    for a, b in zip(got, expected, strict=True):
        assert (a.double().cpu() - b).norm() < tolerance * (b.norm() + largest / 20)


@pytest.mark.parametrize("name", get_args(MixerName))
def test_compiled_without_gradients(name: Any) -> None:
    """As evaluations are, at an odd length: with torch 2.11's own choices aft_conv multiplies by a tensor whose rows are padded as if they were not."""
    mixer = filled(mixers.build(name, DecoderConfig(width=128, num_heads=4), (2,), max_length=100)).to("cuda", torch.float32)
    x = torch.randn(2, 3, 100, 128, generator=generator(1)).to("cuda")
    torch.compiler.reset()
    with torch.no_grad():
        expected, got = mixer(x, Context())[0], programs.compiled(lambda x: mixer(x, Context())[0])(x)
    assert (got - expected).norm() < 1e-4 * expected.norm()


@pytest.mark.parametrize("time", [64, 100, 192])
def test_scores_far_below_zero(time: int) -> None:
    """With a mask and 64 keys more than a multiple of 128, cuDNN's backward pass gives NaN here."""
    q, k, v = (torch.randn(2, time, 2, 32, generator=generator(seed), dtype=torch.float64) / 10 for seed in (4, 5, 6))
    q[..., 0], k[..., 0] = 1.0, -120 * 32**0.5
    allowed = torch.ones(time, time, dtype=torch.bool).tril() & torch.ones(time, time, dtype=torch.bool).triu(-30)

    def gradients(dtype: torch.dtype, device: str, compiled: bool) -> list[Tensor]:
        inputs = [x.to(device, dtype).requires_grad_() for x in (q, k, v)]
        call = torch.compile(attend, fullgraph=True, dynamic=False) if compiled else attend
        y = call(*inputs, allowed.to(device))
        return [y, *torch.autograd.grad(y.sum(), inputs)]

    expected = gradients(torch.float64, "cpu", False)
    for compiled in (False, True):
        got = gradients(torch.bfloat16, "cuda", compiled)
        assert all(torch.isfinite(x).all() for x in got)
        for place in (0, 3):  # the output and the gradient of v; those of q and k are small differences of large numbers
            assert (got[place].double().cpu() - expected[place]).norm() < 0.05 * expected[place].norm()
