"""Decoder: embedding, blocks of a mixer and optionally a feed-forward, head (Vaswani et al. 2017; Radford et al. 2019 with norm_place "pre").

Mixers are named in the config and built from ``shoal.mixers``. The last block and the head run only at the positions a batch scores,
which is exact and often half of the work. Without blocks (num_layers 0) it is a bigram model of rank ``width``.

    model = Decoder(DecoderConfig(width=64), vocab_size=99, max_length=8, lead=(4,))
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from shoal import mixers
from shoal.config.models import DecoderConfig
from shoal.contracts import Context
from shoal.nn import Constant, Embedding, LayerNorm, Linear, Normal, RMSNorm, Uniform, UnitEmbedding, dropout, linear, rotary, select, sinusoidal
from shoal.nn.init import Distribution

ACTIVATIONS = {"relu": F.relu, "gelu": F.gelu, "silu": F.silu, "relu2": lambda x: F.relu(x).square()}


EVERYTHING = Context()  # all tokens real, all positions scored, no dropout


class Cache(NamedTuple):
    used: Tensor  # int64 scalar: tokens seen so far
    blocks: tuple[Any, ...]  # one cache per block, the mixer's own


class FeedForward(nn.Module):
    def __init__(self, config: DecoderConfig, lead: tuple[int, ...]) -> None:
        super().__init__()
        self.up = Linear(config.width, config.feed_forward, bias=config.bias, lead=lead)
        self.down = Linear(config.feed_forward, config.width, bias=config.bias, lead=lead)
        self.activation = ACTIVATIONS[config.activation]

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.activation(self.up(x)))


class Block(nn.Module):
    """x + f(norm(x)) ("pre"), or norm(x + f(x)) ("post"), for the mixer and then the feed-forward; without ``residual``, nothing is added to f."""

    def __init__(self, config: DecoderConfig, index: int, lead: tuple[int, ...], max_length: int) -> None:
        super().__init__()
        self.index, self.pre, self.residual = index, config.norm_place == "pre", config.residual
        self.mixer = mixers.build(config.mixers[index % len(config.mixers)], config, lead, max_length)
        self.mixer_norm = _norm(config, lead)
        self.feed_forward = FeedForward(config, lead) if config.feed_forward else None
        self.feed_forward_norm = _norm(config, lead) if config.feed_forward else None

    def forward(self, x: Tensor, context: Context, rate: Tensor | None, cache: Any) -> tuple[Tensor, Any]:
        """[*L, B, T, D] -> [*L, B, S, D]; ``rate`` float32 [*L] of dropout on both branches."""
        y, cache = self.mixer(self.mixer_norm(x) if self.pre else x, context, cache)
        if rate is not None:  # without, a block does not know its place, and one compiled program serves all
            y = dropout(y, context.key, rate, 2 * self.index + 1)
        x = select(x, context.at) + y if self.residual else y
        x = x if self.pre else self.mixer_norm(x)
        if self.feed_forward is not None and self.feed_forward_norm is not None:
            y = self.feed_forward(self.feed_forward_norm(x) if self.pre else x)
            if rate is not None:
                y = dropout(y, context.key, rate, 2 * self.index + 2)
            x = x + y if self.residual else y
            x = x if self.pre else self.feed_forward_norm(x)
        return x, cache


def _norm(config: DecoderConfig, lead: tuple[int, ...]) -> nn.Module:
    if config.norm == "none":
        return nn.Identity()
    return {"layer": LayerNorm, "rms": RMSNorm}[config.norm](config.width, lead=lead)


def _positions(tokens: Tensor, context: Context, cache: Cache | None) -> Tensor:
    """int64 [T] or [*L, B, T]: where these tokens stand."""
    if context.positions is not None:
        return context.positions
    return torch.arange(tokens.shape[-1], device=tokens.device) + (0 if cache is None else cache.used)


class Decoder(nn.Module):
    rate: Tensor | None  # float32 [*L] dropout; None when no run drops anything

    def __init__(self, config: DecoderConfig, vocab_size: int, max_length: int, lead: tuple[int, ...] = ()) -> None:
        super().__init__()
        self.config, self.vocab_size, self.max_length = config, vocab_size, max_length
        self.embedding = Embedding(vocab_size, config.width, lead=lead) if config.token_embedding == "trained" else UnitEmbedding(vocab_size, config.width)
        self.position = Embedding(max_length, config.width, lead=lead) if config.positions == "learned" else None
        self.blocks = nn.ModuleList(Block(config, index, lead, max_length) for index in range(config.num_layers))
        self.norm = _norm(config, lead) if config.norm_place == "pre" else nn.Identity()
        self.head = None if config.tied else Linear(config.width, vocab_size, bias=config.head_bias, lead=lead)
        self.register_buffer("rate", torch.full(lead, config.dropout, device="cpu") if config.dropout > 0 else None, persistent=False)

    def forward(self, tokens: Tensor, context: Context = EVERYTHING, cache: Cache | None = None) -> tuple[Tensor, Cache | None]:
        """int64 [*L, B, T] -> hidden [*L, B, S, D] and the cache after these tokens."""
        x, turns = self._embedded(tokens, context, cache)
        context = context._replace(turns=turns)
        caches, everywhere = [], context._replace(at=None)
        for index, block in enumerate(self.blocks):
            last = index == len(self.blocks) - 1
            x, block_cache = block(x, context if last else everywhere, self.rate, None if cache is None else cache.blocks[index])
            caches.append(block_cache)
        if not caches:
            x = select(x, context.at)
        return self.norm(x), None if cache is None else Cache(cache.used + tokens.shape[-1], tuple(caches))

    def compile_blocks(self, **choices: Any) -> None:
        """To one program for all blocks of a kind, and one each for what is before and after; ``choices`` are torch.compile's."""
        self._embedded = torch.compile(self._embedded, **choices)
        for part in (*self.blocks, self.norm):
            if not isinstance(part, nn.Identity):
                part.compile(**choices)

    def _embedded(self, tokens: Tensor, context: Context, cache: Cache | None) -> tuple[Tensor, Tensor | None]:
        """What the first block reads, [*L, B, T, D], and the context's ``turns``."""
        x = self.embedding(tokens) + self._position_vectors(tokens, context, cache)
        x = dropout(x, context.key, self.rate, 0)
        if self.config.positions != "rotary":
            return x, None
        return x, rotary(_positions(tokens, context, cache), self.config.width // self.config.num_heads, self.config.rotary_base)

    def logits(self, hidden: Tensor) -> Tensor:
        """[*L, B, S, D] -> [*L, B, S, V]."""
        weight, bias, softcap = self.linear_head()
        logits = linear(hidden, weight, bias)
        return softcap * (logits / softcap).tanh() if softcap else logits

    def linear_head(self) -> tuple[Tensor, Tensor | None, float]:
        """Weight [*L, D, V], bias [*L, V] and the softcap of ``logits``."""
        weight, bias = (self.embedding.weight.mT, None) if self.head is None else (self.head.weight, self.head.bias)
        return weight, bias, self.config.softcap

    def _position_vectors(self, tokens: Tensor, context: Context, cache: Cache | None) -> Tensor | float:
        time = tokens.shape[-1]
        if self.config.positions in ("rotary", "alibi", "none"):
            return 0.0
        if self.position is not None and context.positions is None and cache is None:
            return self.position.weight[..., :time, :].unsqueeze(-3)
        positions = _positions(tokens, context, cache)
        if self.position is not None:
            return self.position(positions.expand(tokens.shape))
        return sinusoidal(positions, self.config.width).to(self.embedding.weight.dtype)

    def init_cache(self, batch: int, length: int) -> Cache:
        return Cache(
            torch.zeros((), dtype=torch.int64, device=self.embedding.weight.device), tuple(block.mixer.init_cache(batch, length) for block in self._blocks)
        )

    @property
    def _blocks(self) -> list[Any]:
        return list(self.blocks)

    def init_rules(self, configs: Sequence[Any]) -> list[tuple[str, Distribution]]:
        """How each parameter of these runs begins.

        | parameter | distribution |
        |---|---|
        | embedding, position | N(0, embedding_std^2) |
        | matrices, linear_init "normal" | N(0, (init_std init_scale)^2); biases 0 |
        | matrices and biases, "uniform" | U(-1, 1) init_scale / sqrt(inputs): torch.nn.Linear's default (biases unscaled) |
        | output_init "zero": a mixer's ``out`` and a feed-forward's ``down`` | 0 |
        | norms | weight 1, bias 0 |
        | a mixer's own | as its file says |
        """
        config = configs[0]
        last = [("blocks.*.mixer.out.*", Constant(0.0)), ("blocks.*.feed_forward.down.*", Constant(0.0))]
        rules: list[tuple[str, Distribution]] = [
            *(last if config.output_init == "zero" else []),
            *((f"blocks.{i}.mixer.{name}", rule) for i, block in enumerate(self._blocks) for name, rule in block.mixer.init_rules()),
            ("*norm.weight", Constant(1.0)),
            ("*norm.bias", Constant(0.0)),
            ("embedding.weight", Normal([c.embedding_std for c in configs])),
            ("position.weight", Normal([c.embedding_std for c in configs])),
        ]
        if config.linear_init == "normal":
            return [*rules, ("*.bias", Constant(0.0)), ("*.weight", Normal([c.init_std * c.init_scale for c in configs]))]
        for name, module in self.named_modules():
            if isinstance(module, Linear):
                bound = module.weight.shape[-2] ** -0.5
                rules += [(f"{name}.weight", Uniform([bound * c.init_scale for c in configs])), (f"{name}.bias", Uniform(bound))]
        return rules

    def undecayed(self) -> list[str]:
        return [f"blocks.{i}.mixer.{name}" for i, block in enumerate(self._blocks) for name in block.mixer.undecayed()]

    def hidden_matrices(self) -> list[str]:
        return [f"blocks.{name}.weight" for name, module in self.blocks.named_modules() if isinstance(module, Linear)]

    def flops(self, batch: int, time: int, scored: int) -> int:
        """Matrix products of one forward pass of one run; a multiply-add is 2."""
        total = 2 * batch * scored * self.config.width * self.vocab_size
        for index, block in enumerate(self._blocks):
            places = scored if index == len(self.blocks) - 1 else time
            total += block.mixer.flops(batch, time, places) + 4 * batch * places * self.config.width * self.config.feed_forward
        return total
