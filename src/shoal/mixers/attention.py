"""Multi-head attention (Vaswani et al. 2017, section 3.2), for training, prefill and decoding; causal, or (``causal`` false) over the whole sequence.

Two forms of the same function: for short sequences a broadcast multiply and sum, which fuses, needs no transposes and on one H100 is 3.5 times as fast
for sequences of 4; otherwise PyTorch's fused attention with runs folded into the batch.
Not here: what is *not* softmax attention; every such mixer is its own file.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from shoal.config.fields import ConfigError
from shoal.config.models import DecoderConfig
from shoal.contracts import Context
from shoal.nn import Linear, joint_linear, rotate, select
from shoal.nn.init import Distribution

SHORT = 8  # keys; measured on 2 CPU cores: at 4 keys the broadcast form takes 0.6 of the fused time, at 32 seven times as much
NORM_EPS = 1e-6
MAX_ROWS = 65_535  # fused attention fails above this many (runs x batch) rows on CUDA


class Cache(NamedTuple):
    """Keys and values of the tokens seen so far; ``used`` cells of ``length`` are filled."""

    keys: Tensor  # [*L, B, length, H, K]
    values: Tensor  # [*L, B, length, H, K]
    mask: Tensor  # bool [*L, B, length]; True = a real token's cell
    used: Tensor  # int64 scalar


class Attention(nn.Module):
    def __init__(self, config: DecoderConfig, lead: tuple[int, ...] = ()) -> None:
        super().__init__()
        width = config.width
        self.num_heads, self.head_width, self.lead = config.num_heads, width // config.num_heads, lead
        self.causal, self.qk_norm = config.causal, config.qk_norm
        self.rotary_base = config.rotary_base if config.positions == "rotary" else None
        self.query = Linear(width, width, bias=config.bias, lead=lead)
        self.key = Linear(width, width, bias=config.bias, lead=lead)
        self.value = Linear(width, width, bias=config.bias, lead=lead)
        self.out = Linear(width, width, bias=config.bias, lead=lead)

    def forward(self, x: Tensor, context: Context, cache: Cache | None = None) -> tuple[Tensor, Cache | None]:
        """x [*L, B, T, D] -> [*L, B, S, D]: queries only at the scored positions, keys and values everywhere."""
        if context.at is None:
            q, k, v = joint_linear(x, [self.query, self.key, self.value])
        else:
            q = self.query(select(x, context.at))
            k, v = joint_linear(x, [self.key, self.value])
        q, k, v = (y.unflatten(-1, (self.num_heads, self.head_width)) for y in (q, k, v))  # [*L, B, T, H, K]
        if self.qk_norm:  # without weights (Dehghani et al. 2023 have them): the scale of a logit is sqrt(K) at most
            q, k = (F.rms_norm(y, y.shape[-1:], eps=NORM_EPS) for y in (q, k))

        cell = torch.arange(x.shape[-2], device=x.device)  # place in the sequence, which orders cause and effect
        if cache is not None:
            cell = cell + cache.used
        query_cell = cell if context.at is None else cell[context.at]  # [S] or [*L, B, S]
        if self.rotary_base is not None:
            positions = cell if context.positions is None else context.positions
            k = rotate(k, positions, self.rotary_base)
            q = rotate(q, query_cell if context.positions is None else select(positions.unsqueeze(-1), context.at).squeeze(-1), self.rotary_base)

        if cache is not None:
            cache, k, v = _append(cache, k, v, context.mask, cell)
            cell = torch.arange(k.shape[-3], device=x.device)
        mask = context.mask if cache is None else cache.mask
        plain = mask is None and (context.at is None or not self.causal)
        y = attend(q, k, v, None if plain else _allowed(query_cell, cell, mask, self.causal), self.causal)
        return self.out(y.flatten(-2)), cache

    def init_cache(self, batch: int, length: int) -> Cache:
        """ConfigError unless causal: what the next token changes everywhere cannot be kept."""
        if not self.causal:
            raise ConfigError("model.causal", "a model that sees the whole sequence cannot write one token after another: it has no cache; set it to true")
        weight = self.query.weight
        shape = (*self.lead, batch, length, self.num_heads, self.head_width)
        return Cache(weight.new_zeros(shape), weight.new_zeros(shape), weight.new_zeros(shape[:-2], dtype=torch.bool), weight.new_zeros((), dtype=torch.int64))

    def init_rules(self) -> list[tuple[str, Distribution]]:
        return []

    def undecayed(self) -> list[str]:
        return []

    def flops(self, batch: int, time: int, scored: int) -> int:
        width = self.num_heads * self.head_width
        projections = 2 * batch * width * width * (2 * scored + 2 * time)  # query and out where scored, key and value everywhere
        return projections + 2 * 2 * batch * scored * time * width  # weights, then values; the mask saves nothing here

    def state_bytes(self, length: int) -> int:
        return 2 * 4 * length * self.num_heads * self.head_width


def _append(cache: Cache, k: Tensor, v: Tensor, mask: Tensor | None, cell: Tensor) -> tuple[Cache, Tensor, Tensor]:
    if mask is None:
        mask = torch.ones(k.shape[:-2], dtype=torch.bool, device=k.device)
    keys = cache.keys.index_copy(-3, cell, k.to(cache.keys.dtype))
    values = cache.values.index_copy(-3, cell, v.to(cache.values.dtype))
    cache = Cache(keys, values, cache.mask.index_copy(-1, cell, mask), cache.used + len(cell))
    return cache, keys.to(k.dtype), values.to(v.dtype)


def _allowed(query_cell: Tensor, cell: Tensor, mask: Tensor | None, causal: bool) -> Tensor:
    """bool [S, T] or [*L, B, S, T]: what each query may read. A padding query may read itself, so that its softmax is finite."""
    past = cell <= query_cell.unsqueeze(-1)
    if mask is None:
        return past
    readable = mask.unsqueeze(-2) | (cell == query_cell.unsqueeze(-1))
    return past & readable if causal else readable


def attend(q: Tensor, k: Tensor, v: Tensor, allowed: Tensor | None = None, causal: bool = True) -> Tensor:
    """softmax(q k / sqrt(K)) v: q [*L, B, S, H, K], k and v [*L, B, T, H, K] -> [*L, B, S, H, K].

    ``allowed`` bool [S, T] or [*L, B, S, T]; None = causal with S = T, which the fused kernels know by themselves, or (``causal`` false) everything.
    """
    if k.shape[-3] > SHORT:
        return _fused(q, k, v, allowed, causal)
    if allowed is None and causal:
        allowed = torch.ones(q.shape[-3], k.shape[-3], dtype=torch.bool, device=q.device).tril()
    scores = (q.unsqueeze(-3) * k.unsqueeze(-4)).sum(-1).to(torch.promote_types(q.dtype, torch.float32)) * q.shape[-1] ** -0.5  # [*L, B, S, T, H]
    if allowed is not None:
        scores = scores.masked_fill(~allowed.unsqueeze(-1), float("-inf"))
    weights = scores.softmax(-2).to(v.dtype)
    return (weights.unsqueeze(-1) * v.unsqueeze(-4)).sum(-3)


def _fused(q: Tensor, k: Tensor, v: Tensor, allowed: Tensor | None, causal: bool) -> Tensor:
    shape = q.shape
    q, k, v = (y.flatten(0, -4).transpose(-3, -2) for y in (q, k, v))  # [rows, H, T, K]
    if allowed is not None and allowed.dim() > 2:
        allowed = allowed.flatten(0, -3).unsqueeze(-3)  # [rows, 1, S, T]
    pieces = []
    for start in range(0, len(q), MAX_ROWS):
        rows = slice(start, start + MAX_ROWS)
        mask = allowed if allowed is None or allowed.dim() == 2 else allowed[rows]
        pieces.append(F.scaled_dot_product_attention(q[rows], k[rows], v[rows], attn_mask=mask, is_causal=causal and mask is None))
    y = pieces[0] if len(pieces) == 1 else torch.cat(pieces)
    return y.transpose(-3, -2).reshape(shape)
