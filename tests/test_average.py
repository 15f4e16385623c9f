"""The mean of the past, by its definition and by its matrix."""

from __future__ import annotations

import torch
from laws import close, generator
from torch import Tensor

from shoal.config import DecoderConfig
from shoal.contracts import Context
from shoal.mixers.average import Average, average_matrix

R, B, T, D = 2, 3, 13, 5
MIXER = Average(DecoderConfig(width=D, num_heads=1), (R,))


def randn(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=generator(1), dtype=torch.float64)


def test_equals_the_matrix() -> None:
    x, matrix = randn(R, B, T, D).requires_grad_(), average_matrix(T, torch.float64)
    assert matrix.shape == (T, T) and (matrix.triu(1) == 0).all()
    close(matrix.sum(-1), torch.ones(T, dtype=torch.float64), 1e-14)
    y, _ = MIXER(x, Context())
    close(y, matrix @ x, 1e-12)
    slopes = [torch.autograd.grad(z, x, randn(R, B, T, D))[0] for z in (y, matrix @ x)]
    close(slopes[0], slopes[1], 1e-12)


def test_counts_what_is_there() -> None:
    x, mask = randn(R, B, T, D), torch.rand(R, B, T, generator=generator(2)) < 0.6
    y, _ = MIXER(x, Context(mask=mask))
    for r, b, t in torch.cartesian_prod(torch.arange(R), torch.arange(B), torch.arange(T)):
        past = x[r, b, : t + 1][mask[r, b, : t + 1]]
        close(y[r, b, t], past.mean(0) if len(past) else torch.zeros(D, dtype=torch.float64), 1e-12)


def test_sums_are_precise_where_numbers_are_not() -> None:
    """In bfloat16 a sum of more than 256 ones would stay at 256."""
    x = (randn(R, B, 3000, D) + 1).bfloat16()
    y, cache = MIXER(x, Context(), MIXER.init_cache(B, 3000))
    assert y.dtype == torch.bfloat16 and cache is not None and cache.total.dtype == torch.float32
    close(y[..., -1, :].double(), x.double().mean(-2), 0.01)
