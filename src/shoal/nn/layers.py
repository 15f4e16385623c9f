"""Layers with an optional leading run axis: parameters ``[*L, in, out]``, activations ``[*L, B, T, D]``.

L is ``(R,)`` in a fleet, ``(1,)`` for a fleet of one, ``()`` for a run taken out of its fleet. This is the only room that looks at
L. Activations have the dtype of the parameters. Those are made empty: ``shoal.nn.init`` fills them.

    Linear(128, 512, lead=(64,))(torch.randn(64, 32, 10, 128))     # [64, 32, 10, 512], every run with its own weights
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

SMALL_VOCABULARY = 512  # up to here a one-hot product beats sorting the tokens


class Linear(nn.Module):
    """y = x W + b. Weight [*L, in, out]: the other order gives slow, transposed weight gradients in a batched product."""

    def __init__(self, num_in: int, num_out: int, *, bias: bool = True, lead: tuple[int, ...] = ()) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(*lead, num_in, num_out))
        self.bias = nn.Parameter(torch.empty(*lead, num_out)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """[*L, ..., in], [*L, in, out], [*L, out] -> [*L, ..., out]: one product over all leading dimensions."""
    num_in, num_out = weight.shape[-2:]
    y = x.reshape(*weight.shape[:-2], -1, num_in) @ weight
    if bias is not None:
        y.add_(bias.unsqueeze(-2))  # not baddbmm, which first writes the bias out over all rows (on one H100 an eighth of a step); this one fuses
    return y.view(*x.shape[:-1], num_out)


def joint_linear(x: Tensor, layers: list[Linear]) -> tuple[Tensor, ...]:
    """Several Linear layers of the same input as one product, each with its own output."""
    weight = torch.cat(tuple(layer.weight for layer in layers), dim=-1)
    biases = tuple(layer.bias for layer in layers if layer.bias is not None)
    y = linear(x, weight, torch.cat(biases, dim=-1) if biases else None)
    return y.split([layer.weight.shape[-1] for layer in layers], dim=-1)


class Embedding(nn.Module):
    """Rows of a table [*L, V, D] by token ids [*L, B, T]; its gradient is the same bits every time."""

    def __init__(self, num_rows: int, width: int, *, lead: tuple[int, ...] = ()) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(*lead, num_rows, width))

    def forward(self, tokens: Tensor) -> Tensor:
        """int64 [*L, B, T] -> [*L, B, T, D]."""
        return lookup(tokens, self.weight)


class UnitEmbedding(nn.Module):
    """A table [V, D] that is never trained and the same for every run: numpy's ``RandomState(0)`` normals, each row scaled to length 1. Not a parameter."""

    weight: Tensor

    def __init__(self, num_rows: int, width: int) -> None:
        super().__init__()
        rows = np.random.RandomState(0).randn(num_rows, width)
        table = torch.tensor(rows / np.linalg.norm(rows, axis=1, keepdims=True), dtype=torch.float32, device="cpu")
        self.register_buffer("weight", table, persistent=False)

    def forward(self, tokens: Tensor) -> Tensor:
        """int64 [*L, B, T] -> [*L, B, T, D]."""
        return F.embedding(tokens, self.weight)


def lookup(tokens: Tensor, weight: Tensor) -> Tensor:
    """Rows of a table [*L, V, D] by token ids [*L, B, T] -> [*L, B, T, D]; its gradient is the same bits every time."""
    if tokens.is_cuda:
        return _Lookup.apply(tokens, weight)  # pyright: ignore[reportReturnType]
    return _lookup(tokens, weight)


def _lookup(tokens: Tensor, weight: Tensor) -> Tensor:
    num_rows, width = weight.shape[-2:]
    return F.embedding(_offset(tokens, num_rows, weight.dim() == 3), weight.reshape(-1, width))


def _offset(tokens: Tensor, num_rows: int, has_runs: bool) -> Tensor:
    """Token ids as rows of all runs' tables laid under each other."""
    if not has_runs:
        return tokens
    run = torch.arange(tokens.shape[0], device=tokens.device)
    return tokens + (run * num_rows).view(-1, *[1] * (tokens.dim() - 1))


class _Lookup(torch.autograd.Function):
    """On a GPU the compiled gradient of a gather adds with atomics, in any order; this one does not."""

    @staticmethod
    def forward(ctx, tokens: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(tokens)
        ctx.shape = weight.shape
        return _lookup(tokens, weight)

    @staticmethod
    def backward(ctx, *grads: Tensor) -> tuple[None, Tensor]:
        (tokens,), (grad,) = ctx.saved_tensors, grads
        *lead, num_rows, width = ctx.shape
        if num_rows <= SMALL_VOCABULARY:
            ids = tokens.reshape(*lead, 1, -1)
            one_hot = (ids == torch.arange(num_rows, device=ids.device).unsqueeze(-1)).to(grad.dtype)  # [*L, V, B T]
            return None, one_hot @ grad.reshape(*lead, -1, width)
        rows = _offset(tokens, num_rows, bool(lead)).reshape(-1)
        return None, _sorted_gradient(grad.reshape(-1, width), rows, num_rows * (lead[0] if lead else 1)).view(ctx.shape)


@torch.library.custom_op("shoal::embedding_gradient", mutates_args=())
def _sorted_gradient(grad: Tensor, rows: Tensor, num_rows: int) -> Tensor:
    """PyTorch's own sort-based kernel, hidden from the compiler, which would replace it by atomics."""
    return torch.ops.aten.embedding_dense_backward(grad, rows, num_rows, -1, False)


@_sorted_gradient.register_fake
def _(grad: Tensor, rows: Tensor, num_rows: int) -> Tensor:
    return grad.new_empty(num_rows, grad.shape[-1])


class LayerNorm(nn.Module):
    """(x - mean) / sqrt(variance + eps) * weight + bias over the last dimension (Ba, Kiros, Hinton 2016)."""

    def __init__(self, width: int, *, eps: float = 1e-5, lead: tuple[int, ...] = ()) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(*lead, width))
        self.bias = nn.Parameter(torch.empty(*lead, width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        if self.weight.dim() == 1:
            return F.layer_norm(x, self.weight.shape, self.weight, self.bias, self.eps)
        y = F.layer_norm(x, self.weight.shape[-1:], eps=self.eps)
        return torch.addcmul(_beside(self.bias, y), y, _beside(self.weight, y))


class RMSNorm(nn.Module):
    """x / sqrt(mean of x^2 + eps) * weight (Zhang, Sennrich 2019)."""

    def __init__(self, width: int, *, eps: float = 1e-6, lead: tuple[int, ...] = ()) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(*lead, width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.weight.shape[-1:], eps=self.eps) * _beside(self.weight, x)


def _beside(vector: Tensor, x: Tensor) -> Tensor:
    """[*L, D], shaped to broadcast with x [*L, ..., D]."""
    lead = vector.dim() - 1
    return vector.view(*vector.shape[:lead], *[1] * (x.dim() - lead - 1), vector.shape[-1])


def select(x: Tensor, at: Tensor | slice | None) -> Tensor:
    """Positions ``at`` (int64 [*L, B, S], a slice, or None for all) of x [*L, B, T, D] -> [*L, B, S, D]."""
    if at is None:
        return x
    if isinstance(at, slice):
        return x[..., at, :]
    return torch.take_along_dim(x, at.unsqueeze(-1), dim=-2)
