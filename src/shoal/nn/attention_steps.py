"""Multi-head attention step by step (Vaswani et al. 2017, section 3.2), each step a small function to be read, changed and tested alone.

From inputs x to outputs, without the projection behind the heads:

    from shoal.nn.attention_steps import init_qkv_proj, self_attention
    query, key, value = init_qkv_proj(n_embd=64)
    y = self_attention(query(x), key(x), value(x), n_heads=4, causal=True)      # x and y [B, T, 64]

and what that is, for queries, keys and values Q, K, V, each [B, T, 64]:

    q, k, v = split_heads_qkv(Q, K, V, 4)                                       # [B, 4, T, 16]
    A = attn_scaled(pairwise_similarities(q, k), n_embd=64, n_heads=4)          # [B, 4, T, T]
    y = merge_heads(compute_outputs(attn_softmax(apply_causal_mask(A)), v))     # [B, T, 64]

Written for the eye: leading axes are whatever there is, and nothing is fused. Models are made of ``shoal.mixers``, whose ``attention`` computes the same.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from shoal.config.fields import check


def init_qkv_proj(n_embd: int) -> tuple[nn.Linear, nn.Linear, nn.Linear]:
    """The projections to queries, keys and values, each [..., n_embd] -> [..., n_embd] with a bias, as torch begins them."""
    check(n_embd >= 1, "n_embd", f"must be 1 or more, not {n_embd}")
    return nn.Linear(n_embd, n_embd), nn.Linear(n_embd, n_embd), nn.Linear(n_embd, n_embd)


def pairwise_similarities(Q: Tensor, K: Tensor) -> Tensor:
    """Queries [..., S, K] and keys [..., T, K] -> A [..., S, T], the dot product of every query with every key."""
    return Q @ K.mT


def attn_scaled(A: Tensor, n_embd: int, n_heads: int) -> Tensor:
    """A / sqrt(n_embd / n_heads): the dot product of two random vectors grows with the root of a head's width, and the softmax should not."""
    return A / _head_width(n_embd, n_heads) ** 0.5


def attn_softmax(A: Tensor) -> Tensor:
    """Similarities [..., S, T] -> weights: every row positive, with sum 1."""
    return A.softmax(-1)


def compute_outputs(A: Tensor, V: Tensor) -> Tensor:
    """Weights [..., S, T] and values [..., T, K] -> [..., S, K]: for every query the weighted sum of the values."""
    return A @ V


def make_causal_mask(n_tok: int, device: torch.device | str | None = None) -> Tensor:
    """bool [T, T]: True where a token (row) may look, at itself and at those before it (columns)."""
    return torch.ones(n_tok, n_tok, dtype=torch.bool, device=device).tril()


def apply_causal_mask(A: Tensor) -> Tensor:
    """Similarities [..., T, T] -> the same, minus infinity where a token must not look: behind the softmax that is weight 0."""
    check(A.shape[-2] == A.shape[-1], "A", f"must have a row and a column for every token, not {A.shape[-2]} rows and {A.shape[-1]} columns")
    return A.masked_fill(~make_causal_mask(A.shape[-1], A.device), float("-inf"))


def split_heads(Q: Tensor, n_heads: int) -> Tensor:
    """[..., T, n_embd] -> [..., n_heads, T, n_embd / n_heads]: head 0 has the first numbers of every vector, head 1 the next, and so on."""
    return Q.unflatten(-1, (n_heads, _head_width(Q.shape[-1], n_heads))).transpose(-3, -2)


def split_heads_qkv(Q: Tensor, K: Tensor, V: Tensor, n_heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """``split_heads`` of queries, keys and values."""
    return split_heads(Q, n_heads), split_heads(K, n_heads), split_heads(V, n_heads)


def merge_heads(y: Tensor) -> Tensor:
    """[..., n_heads, T, K] -> [..., T, n_heads K]: ``split_heads`` undone."""
    return y.transpose(-3, -2).flatten(-2)


def self_attention(Q: Tensor, K: Tensor, V: Tensor, n_heads: int = 1, causal: bool = True) -> Tensor:
    """Queries, keys and values [..., T, n_embd] -> outputs [..., T, n_embd] of all heads, side by side."""
    q, k, v = split_heads_qkv(Q, K, V, n_heads)
    A = attn_scaled(pairwise_similarities(q, k), Q.shape[-1], n_heads)  # [..., H, T, T]
    A = apply_causal_mask(A) if causal else A
    return merge_heads(compute_outputs(attn_softmax(A), v))


def _head_width(n_embd: int, n_heads: int) -> int:
    check(n_heads >= 1 and n_embd % n_heads == 0, "n_heads", f"{n_heads} heads do not divide the width {n_embd}; take a divisor of it")
    return n_embd // n_heads
