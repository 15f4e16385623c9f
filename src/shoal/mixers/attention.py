"""Multi-head attention (Vaswani et al. 2017, section 3.2), for training, prefill and decoding; causal, or (``causal`` false) over the whole sequence.

Two forms of the same function: for short sequences a broadcast multiply and sum, which fuses, needs no transposes and on one H100 is 3.5 times as fast
for sequences of 4; otherwise PyTorch's fused attention with runs folded into the batch. A third, ``weights``, is for looking inside.
The parts are methods, so that what changes one of them (``similarities``, ``projections``, ``masks``, ``windowed``) is a few lines that say what it changes:

    project   x to queries, keys, values         compare   queries and keys to some whose scaled products are the scores
    mix       all of them to outputs             weigh     queries and keys to weights, written out

ALiBi (Press et al. 2022) is here too: a product with two more coordinates, so that it needs no table of T x T biases.
Not here: what is *not* softmax attention; every such mixer is its own file.

    y, _ = Attention(DecoderConfig(width=64))(x, Context())
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from shoal.config.fields import ConfigError
from shoal.config.models import DecoderConfig
from shoal.contracts import Context
from shoal.nn import Linear, alibi_slopes, joint_linear, rotary, rotate, select
from shoal.nn.fused_attention import fused_attention
from shoal.nn.init import Distribution

SHORT = 8  # keys; measured on 2 CPU cores: at 4 keys the broadcast form takes 0.6 of the fused time, at 32 seven times as much
NORM_EPS = 1e-6
MAX_ROWS = 65_535  # fused attention fails above this many (runs x batch) rows on CUDA
ALIGNED = 8  # fused kernels take head widths that are multiples of this, the same for queries, keys and values
DIGIT = 256  # places are written in two digits of this base: whole numbers up to it are exact in bfloat16


class Cache(NamedTuple):
    """Keys and values of the tokens seen so far; ``used`` cells of ``length`` are filled."""

    keys: Tensor  # [*L, B, length, H, K]
    values: Tensor  # [*L, B, length, H, K]; K = 0 where they are the keys
    mask: Tensor  # bool [*L, B, length]; True = a real token's cell
    used: Tensor  # int64 scalar


class Places(NamedTuple):
    """Where queries and keys stand in the sequence, which orders cause and effect, and which keys are real."""

    query: Tensor  # int64 [S] or [*L, B, S]
    key: Tensor  # int64 [T]
    mask: Tensor | None  # bool [*L, B, T]; None = all real
    plain: bool  # queries may read what the fused kernels let them read by themselves


class Attention(nn.Module):
    def __init__(self, config: DecoderConfig, lead: tuple[int, ...] = ()) -> None:
        super().__init__()
        width = config.width
        self.num_heads, self.head_width, self.lead = config.num_heads, width // config.num_heads, lead
        self.causal, self.qk_norm = config.causal, config.qk_norm
        self.rotary_base = config.rotary_base if config.positions == "rotary" else None
        self.alibi = config.positions == "alibi"
        self.reach: int | None = None  # places a query may look at, its own included; None = all before it
        self.one_cache = False  # values are the keys
        self.query = Linear(width, width, bias=config.bias, lead=lead)
        self.key = Linear(width, width, bias=config.bias, lead=lead)
        self.value = Linear(width, width, bias=config.bias, lead=lead)
        self.out = Linear(width, width, bias=config.bias, lead=lead)

    def forward(self, x: Tensor, context: Context, cache: Cache | None = None) -> tuple[Tensor, Cache | None]:
        """x [*L, B, T, D] -> [*L, B, S, D]: queries only at the scored positions, keys and values everywhere."""
        q, k, v, places, cache = self.read(x, context, cache)
        return self.out(self.mix(q, k, v, places).flatten(-2)), cache

    def weights(self, x: Tensor, context: Context) -> Tensor:
        """x [*L, B, T, D] -> [*L, B, H, S, T], float32 at least: what ``forward`` sums each head's values with (a padding query reads itself)."""
        q, k, _, places, _ = self.read(x, context, None)
        return self.weigh(q, k, places)

    def read(self, x: Tensor, context: Context, cache: Cache | None) -> tuple[Tensor, Tensor, Tensor, Places, Cache | None]:
        """Queries [*L, B, S, H, K], keys and values [*L, B, T, H, K] with those of the cache, their places, the cache after them."""
        q, k, v = (y.unflatten(-1, (self.num_heads, self.head_width)) for y in self.project(x, context.at))
        if self.qk_norm:  # without weights (Dehghani et al. 2023 have them): the scale of a logit is sqrt(K) at most
            q, k = (F.rms_norm(y, y.shape[-1:], eps=NORM_EPS) for y in (q, k))

        new = torch.arange(x.shape[-2], device=x.device)
        if self.rotary_base is not None:
            q, k = turned(q, k, context, context.at, new if cache is None else new + cache.used, self.rotary_base)

        mask, plain = context.mask, context.mask is None and cache is None and (context.at is None or not self.causal)
        if cache is not None:
            cache, k, v, mask, new = self.remember(cache, k, v, mask)
        v = k if self.one_cache else v
        places = Places(_there(new, context.at), torch.arange(k.shape[-3], device=x.device), mask, plain)
        return q, k, v, places, cache

    def project(self, x: Tensor, at: Tensor | slice | None) -> tuple[Tensor, Tensor, Tensor]:
        """x [*L, B, T, D] -> queries [*L, B, S, D], keys and values [*L, B, T, D]."""
        if at is None:
            q, k, v = joint_linear(x, [self.query, self.key, self.value])
        else:
            q = self.query(select(x, at))
            k, v = joint_linear(x, [self.key, self.value])
        return q, k, v

    def remember(self, cache: Cache, k: Tensor, v: Tensor, mask: Tensor | None) -> tuple[Cache, Tensor, Tensor, Tensor, Tensor]:
        """The cache with these tokens; keys, values and mask of all it knows; the cells of these tokens among them, int64 [T]."""
        cell = torch.arange(k.shape[-3], device=k.device) + cache.used
        keys = cache.keys.index_copy(-3, cell, k.to(cache.keys.dtype))
        values = cache.values.index_copy(-3, cell, v[..., : cache.values.shape[-1]].to(cache.values.dtype))
        cache = Cache(keys, values, cache.mask.index_copy(-1, cell, real(k, mask)), cache.used + len(cell))
        return cache, keys.to(k.dtype), values.to(v.dtype), cache.mask, cell

    def compare(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor, float]:
        """Queries [*L, B, S, H, K'], keys [*L, B, T, H, K'] and a scale: scale q k are the scores of [*L, B, S, H, K] and [*L, B, T, H, K]."""
        return q, k, self.head_width**-0.5

    def mix(self, q: Tensor, k: Tensor, v: Tensor, places: Places) -> Tensor:
        """Queries [*L, B, S, H, K], keys and values [*L, B, T, H, K] -> outputs [*L, B, S, H, K] of all heads."""
        q, k, scale = self.compare(q, k)
        if self.alibi:
            q, k = _with_alibi(q, k, places.key, scale)
        whole = places.plain and (self.reach is None or k.shape[-3] <= self.reach)
        return attend(q, k, v, None if whole else self.allowed(places), self.causal, scale)

    def weigh(self, q: Tensor, k: Tensor, places: Places) -> Tensor:
        """[*L, B, S, H, K], [*L, B, T, H, K] -> [*L, B, H, S, T] weights."""
        return self.scores(q, k, places).masked_fill(~self.allowed(places).unsqueeze(-3), float("-inf")).softmax(-1)

    def scores(self, q: Tensor, k: Tensor, places: Places) -> Tensor:
        """[*L, B, S, H, K], [*L, B, T, H, K] -> [*L, B, H, S, T], float32 at least, as inside the fused kernels."""
        q, k, scale = self.compare(q, k)
        q, k = (y.to(torch.promote_types(y.dtype, torch.float32)).transpose(-3, -2) for y in (q, k))
        return self.biased(q @ k.mT * scale, places)

    def biased(self, scores: Tensor, places: Places) -> Tensor:
        """[*L, B, H, S, T], with ALiBi less the distance times the head's slope."""
        if not self.alibi:
            return scores
        distance = (places.query.unsqueeze(-1) - places.key.unsqueeze(-2)).abs().unsqueeze(-3)  # [1, S, T] or [*L, B, 1, S, T]
        return scores - alibi_slopes(self.num_heads, scores.dtype, scores.device).view(-1, 1, 1) * distance

    def allowed(self, places: Places) -> Tensor:
        """bool [S, T] or [*L, B, S, T]: what each query may read. A padding query may read itself, so that its softmax is finite."""
        query, key = places.query.unsqueeze(-1), places.key.unsqueeze(-2)
        allowed = key <= query if self.causal else torch.ones_like(key <= query)
        if self.reach is not None:
            allowed = allowed & (key > query - self.reach)
        return allowed if places.mask is None else allowed & (places.mask.unsqueeze(-2) | (key == query))

    def init_cache(self, batch: int, length: int) -> Cache:
        """ConfigError unless causal: what the next token changes everywhere cannot be kept."""
        if not self.causal:
            raise ConfigError("model.causal", "a model that sees the whole sequence cannot write one token after another: it has no cache; set it to true")
        weight = self.out.weight
        shape = (*self.lead, batch, length, self.num_heads, self.head_width)
        values = weight.new_zeros((*shape[:-1], 0 if self.one_cache else self.head_width))
        return Cache(weight.new_zeros(shape), values, weight.new_zeros(shape[:-2], dtype=torch.bool), weight.new_zeros((), dtype=torch.int64))

    def init_rules(self) -> list[tuple[str, Distribution]]:
        return []

    def undecayed(self) -> list[str]:
        return []

    def flops(self, batch: int, time: int, scored: int) -> int:
        return self.projection_flops(batch, time, scored) + self.mixing_flops(batch, time, scored)

    def projection_flops(self, batch: int, time: int, scored: int) -> int:
        """Query and out where scored, key and value everywhere."""
        return 2 * batch * (self.num_heads * self.head_width) ** 2 * (2 * scored + 2 * time)

    def mixing_flops(self, batch: int, time: int, scored: int) -> int:
        """Weights, then sums of values; the mask saves nothing here."""
        return 2 * 2 * batch * scored * time * self.num_heads * aligned(self.head_width, self.coordinates())

    def coordinates(self) -> int:
        """Of the queries and keys whose products are the scores, those that are added to the head's width."""
        return 2 * self.alibi

    def state_bytes(self, length: int) -> int:
        return (1 if self.one_cache else 2) * 4 * length * self.num_heads * self.head_width


def aligned(width: int, added: int) -> int:
    """The width at which fused kernels see a head with coordinates added: as it is, or the next they take."""
    return width if added == 0 else width + added + -(width + added) % ALIGNED


def real(k: Tensor, mask: Tensor | None) -> Tensor:
    """The mask, bool [*L, B, T]; without one, that of keys [*L, B, T, H, K] which are all real."""
    return torch.ones(k.shape[:-2], dtype=torch.bool, device=k.device) if mask is None else mask


def turned(q: Tensor, k: Tensor, context: Context, at: Tensor | slice | None, positions: Tensor, base: float) -> tuple[Tensor, Tensor]:
    """Queries [*L, B, S, H, K] at the positions ``at``, and keys [*L, B, T, H, K], turned; ``positions`` int64 [T], unless the context has others."""
    turns = context.turns
    if turns is None:
        turns = rotary(positions if context.positions is None else context.positions, k.shape[-1], base)
    there = turns if at is None else select(turns.expand(*k.shape[:-2], -1), at)
    return rotate(q, there), rotate(k, turns)


def _there(cell: Tensor, at: Tensor | slice | None) -> Tensor:
    """int64 [T] at the scored positions: [S] or [*L, B, S]."""
    return cell if at is None else cell[at]


def _with_alibi(q: Tensor, k: Tensor, cell: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Two coordinates more, whose scaled products add slope x place of the key: slope x distance, but for what is one number for all keys of a query."""
    slopes = alibi_slopes(q.shape[-2], q.dtype, q.device) / scale  # [H]
    digits = torch.stack((cell // DIGIT, cell % DIGIT), dim=-1).to(k.dtype)  # [T, 2]
    turns = torch.stack((slopes * DIGIT, slopes), dim=-1)  # [H, 2]
    return torch.cat((q, turns.expand(*q.shape[:-1], 2)), dim=-1), torch.cat((k, digits.unsqueeze(-2).expand(*k.shape[:-1], 2)), dim=-1)


def attend(q: Tensor, k: Tensor, v: Tensor, allowed: Tensor | None = None, causal: bool = True, scale: float | None = None) -> Tensor:
    """softmax(scale q k) v: q [*L, B, S, H, K'], k [*L, B, T, H, K'] and v [*L, B, T, H, K] -> [*L, B, S, H, K]; scale is 1 / sqrt(K') unless given.

    ``allowed`` bool [S, T] or [*L, B, S, T]; None = causal with S = T, which the fused kernels know by themselves, or (``causal`` false) everything.
    """
    factor = q.shape[-1] ** -0.5 if scale is None else scale
    if k.shape[-3] > SHORT:
        return _fused(q, k, v, allowed, causal, factor)
    if allowed is None and causal:
        allowed = torch.ones(q.shape[-3], k.shape[-3], dtype=torch.bool, device=q.device).tril()
    scores = (q.unsqueeze(-3) * k.unsqueeze(-4)).sum(-1).to(torch.promote_types(q.dtype, torch.float32)) * factor  # [*L, B, S, T, H]
    if allowed is not None:
        scores = scores.masked_fill(~allowed.unsqueeze(-1), float("-inf"))
    weights = scores.softmax(-2).to(v.dtype)
    return (weights.unsqueeze(-1) * v.unsqueeze(-4)).sum(-3)


def _fused(q: Tensor, k: Tensor, v: Tensor, allowed: Tensor | None, causal: bool, scale: float) -> Tensor:
    shape, width = q.shape[:-1], v.shape[-1]
    if q.shape[-1] != width:
        common = aligned(width, q.shape[-1] - width)
        q, k, v = (F.pad(y, (0, common - y.shape[-1])) for y in (q, k, v))
    q, k, v = (y.flatten(0, -4).transpose(-3, -2) for y in (q, k, v))  # [rows, H, T, K]
    if allowed is not None and allowed.dim() > 2:
        allowed = allowed.flatten(0, -3).unsqueeze(-3)  # [rows, 1, S, T]
    pieces = []
    for start in range(0, len(q), MAX_ROWS):
        rows = slice(start, start + MAX_ROWS)
        mask = allowed if allowed is None or allowed.dim() == 2 else allowed[rows]
        pieces.append(fused_attention(q[rows], k[rows], v[rows], mask, causal, scale))
    y = pieces[0] if len(pieces) == 1 else torch.cat(pieces)
    return y[..., :width].transpose(-3, -2).reshape(*shape, width)
