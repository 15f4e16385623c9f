"""The steps of attention, each by itself on numbers worked out cell by cell, and all of them against PyTorch's multi-head attention."""

from __future__ import annotations

import math

import pytest
import torch
from laws import close, generator
from torch import Tensor
from torch.nn import functional as F

from shoal.config import DecoderConfig
from shoal.config.fields import ConfigError
from shoal.contracts import Context
from shoal.mixers.attention import Attention
from shoal.nn.attention_steps import (
    apply_causal_mask,
    attn_scaled,
    attn_softmax,
    compute_outputs,
    init_qkv_proj,
    make_causal_mask,
    merge_heads,
    pairwise_similarities,
    self_attention,
    split_heads,
    split_heads_qkv,
)

B, T, D = 3, 7, 12


def randn(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, generator=generator(seed), dtype=torch.float64)


@pytest.mark.parametrize("num_heads", [1, 2, 3, 12])
@pytest.mark.parametrize("causal", [True, False])
def test_together_they_are_pytorchs(num_heads: int, causal: bool) -> None:
    """Values, and gradients of the inputs and of all six parameters; PyTorch's output projection is the identity."""
    x, layers = randn(B, T, D).requires_grad_(), init_qkv_proj(D)
    for layer in layers:
        layer.double()
    Q, K, V = (layer(x) for layer in layers)
    y = self_attention(Q, K, V, num_heads, causal)
    forbidden = torch.ones(T, T, dtype=torch.bool).triu(1) if causal else None
    weight, bias, steps = torch.cat([layer.weight for layer in layers]), torch.cat([layer.bias for layer in layers]), x.transpose(0, 1)
    expected, _ = F.multi_head_attention_forward(
        steps, steps, steps, D, num_heads, weight, bias, None, None, False, 0.0, torch.eye(D).double(), None, attn_mask=forbidden, need_weights=False,
    )  # fmt: skip
    at = [x, *(p for layer in layers for p in layer.parameters())]
    results = [[z, *torch.autograd.grad(z, at, randn(B, T, D, seed=2))] for z in (y, expected.transpose(0, 1))]
    for got, reference in zip(*results, strict=True):
        close(got, reference, 1e-12)
    close(self_attention(Q[0], K[0], V[0], num_heads, causal), y[0], 1e-12)


@pytest.mark.parametrize("causal", [True, False])
def test_the_mixer_is_the_same(causal: bool) -> None:
    mixer, x, layers = Attention(DecoderConfig(width=D, num_heads=3, causal=causal)).double(), randn(B, T, D), init_qkv_proj(D)
    with torch.no_grad():
        for theirs, layer in zip((mixer.query, mixer.key, mixer.value), layers, strict=True):
            theirs.weight.copy_(layer.double().weight.mT)
            assert theirs.bias is not None and theirs.bias.copy_(layer.bias) is not None
        assert mixer.out.bias is not None and mixer.out.bias.zero_() is not None
        mixer.out.weight.copy_(torch.eye(D))
    Q, K, V = (layer(x) for layer in layers)
    close(mixer(x, Context())[0], self_attention(Q, K, V, 3, causal), 1e-12)


def test_projections() -> None:
    layers = init_qkv_proj(5)
    assert len({id(p) for layer in layers for p in layer.parameters()}) == 6
    assert all(layer.weight.shape == (5, 5) and layer.bias.shape == (5,) for layer in layers)
    assert not torch.equal(layers[0].weight, layers[1].weight)


def test_similarities_and_scale() -> None:
    Q, K = randn(B, 4, D), randn(B, T, D, seed=2)
    A = pairwise_similarities(Q, K)
    assert A.shape == (B, 4, T)
    for b in range(B):
        for i in range(4):
            for j in range(T):
                assert A[b, i, j].item() == pytest.approx(sum(Q[b, i, d].item() * K[b, j, d].item() for d in range(D)), abs=1e-12)
    close(attn_scaled(A, 64, 4), A / 4.0, 1e-15)
    close(attn_scaled(A, 12, 4), A / math.sqrt(3), 1e-15)


def test_softmax_and_outputs() -> None:
    A, V = randn(B, 4, T), randn(B, T, 5, seed=2)
    weights = attn_softmax(A)
    for b in range(B):
        for i in range(4):
            exps = [math.exp(A[b, i, j].item()) for j in range(T)]
            close(weights[b, i], torch.tensor([e / sum(exps) for e in exps], dtype=torch.float64), 1e-12)
    y = compute_outputs(weights, V)
    assert y.shape == (B, 4, 5)
    for i in range(4):
        close(y[1, i], torch.stack([weights[1, i, j] * V[1, j] for j in range(T)]).sum(0), 1e-12)
    assert attn_softmax(torch.tensor([[1e4, 1e4, -1e4]])).tolist() == [[0.5, 0.5, 0.0]]


def test_mask() -> None:
    assert make_causal_mask(3).tolist() == [[True, False, False], [True, True, False], [True, True, True]]
    assert make_causal_mask(3).dtype == torch.bool and make_causal_mask(0).shape == (0, 0)
    A = randn(B, 2, T, T)
    masked = apply_causal_mask(A)
    for i in range(T):
        for j in range(T):
            assert torch.equal(masked[..., i, j], A[..., i, j]) if j <= i else (masked[..., i, j] == -math.inf).all()
    assert A.isfinite().all(), "the given one stays as it is"
    assert (attn_softmax(masked)[..., 0, :] == torch.eye(T, dtype=torch.float64)[0]).all()


def test_heads() -> None:
    x = torch.arange(2 * 3 * 4).view(2, 3, 4)
    heads = split_heads(x, 2)
    assert heads.shape == (2, 2, 3, 2)
    assert heads[0, 0].tolist() == [[0, 1], [4, 5], [8, 9]] and heads[0, 1].tolist() == [[2, 3], [6, 7], [10, 11]]
    assert torch.equal(merge_heads(heads), x)
    q, k, v = split_heads_qkv(x, x + 1, x + 2, 4)
    assert torch.equal(q, split_heads(x, 4)) and torch.equal(k, q + 1) and torch.equal(v, q + 2)


def test_bad_input() -> None:
    x = randn(B, T, D)
    for heads in (0, 5, 24, -1):
        for wrong in (lambda: split_heads(x, heads), lambda: self_attention(x, x, x, heads), lambda: attn_scaled(x, D, heads)):  # noqa: B023
            with pytest.raises(ConfigError, match=f"n_heads: {heads} heads do not divide the width 12"):
                wrong()
    with pytest.raises(ConfigError, match=r"A: .* 7 rows and 12 columns"):
        apply_causal_mask(x)
    with pytest.raises(ConfigError, match="n_embd"):
        init_qkv_proj(0)
