"""What the laws do not say of the decoder's options: beside plain PyTorch, in float64."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from laws import MIXER_EXAMPLES, close, filled, generator
from torch import Tensor
from torch.nn import functional as F

from shoal import models
from shoal.config import DecoderConfig
from shoal.config.fields import ConfigError
from shoal.contracts import Context
from shoal.mixers.attention import Attention
from shoal.nn import initialise, rotary, rotate, select

R, B, WIDTH, V = 2, 3, 12, 11


def randn(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, generator=generator(seed), dtype=torch.float64)


@pytest.mark.parametrize("time", [5, 12])  # one for each form of attention
@pytest.mark.parametrize("at", [None, slice(1, 4), "indices"], ids=str)
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize(("causal", "qk_norm", "positions"), [(False, False, "none"), (False, True, "rotary"), (True, True, "rotary"), (True, True, "none")])
def test_attention_to_everything_and_of_normal_size(time: int, at: Any, padded: bool, causal: bool, qk_norm: bool, positions: Any) -> None:
    mixer = filled(Attention(DecoderConfig(width=WIDTH, num_heads=3, positions=positions, causal=causal, qk_norm=qk_norm), (R,)))
    x = randn(R, B, time, WIDTH).requires_grad_()
    at = torch.randint(time, (R, B, 3), generator=generator(3)) if at == "indices" else at
    mask = torch.arange(time) >= torch.randint(0, time // 2, (R, B, 1), generator=generator(2)) if padded else None
    y, _ = mixer(x, Context(mask=mask, at=at))

    q, k, v = (torch.einsum("rbtd,rde->rbte", x, z.weight) + z.bias[:, None, None] for z in (mixer.query, mixer.key, mixer.value))
    q, k, v = (z.unflatten(-1, (3, 4)) for z in (q, k, v))
    if qk_norm:
        q, k = (z / (z.square().mean(-1, keepdim=True) + 1e-6).sqrt() for z in (q, k))
    if positions == "rotary":
        q, k = (rotate(z, rotary(torch.arange(time), z.shape[-1], 10_000)) for z in (q, k))
    readable = torch.eye(time, dtype=torch.bool) | (torch.ones(R, B, 1, time, dtype=torch.bool) if mask is None else mask.unsqueeze(-2))
    readable = readable & torch.ones(time, time, dtype=torch.bool).tril() if causal else readable
    mixed = F.scaled_dot_product_attention(*(z.transpose(2, 3) for z in (q, k, v)), attn_mask=readable.unsqueeze(2)).transpose(2, 3).flatten(-2)
    expected = select(torch.einsum("rbtd,rde->rbte", mixed, mixer.out.weight) + mixer.out.bias[:, None, None], at)

    found = [[z, *torch.autograd.grad(z, [x, *mixer.parameters()], randn(*y.shape, seed=4))] for z in (y, expected)]
    for got, reference in zip(*found, strict=True):
        close(got, reference, 1e-10)


def test_what_sees_everything_keeps_no_cache() -> None:
    with pytest.raises(ConfigError, match=r"model.causal: .* set it to true"):
        models.build(DecoderConfig(width=8, num_heads=2, causal=False), V, 5).init_cache(1, 5)


def decoder(**options: Any) -> Any:
    config = replace(DecoderConfig(width=8, num_layers=1, num_heads=2, feed_forward=0), **options)
    return filled(models.build(config, V, 9, (R,)))


def test_one_attention_head_and_nothing_else() -> None:
    """Embedding and position, attention, head: what a block adds to is gone, and so is its norm."""
    model, tokens = decoder(residual=False, norm="none", num_heads=1), torch.randint(V, (R, B, 9), generator=generator(1))
    x = torch.stack([model.embedding.weight[r][tokens[r]] + model.position.weight[r] for r in range(R)])
    y, _ = model.blocks[0].mixer(x, Context())
    close(model.logits(model(tokens, Context())[0]), torch.einsum("rbtd,rdv->rbtv", y, dict(model.named_parameters())["head.weight"]), 1e-12)


@pytest.mark.parametrize("norm_place", ["pre", "post"])
def test_parts_replace_their_input(norm_place: Any) -> None:
    model, tokens = decoder(residual=False, norm_place=norm_place, feed_forward=12), torch.randint(V, (R, B, 9), generator=generator(1))
    (block,), x = model.blocks, model.embedding(tokens) + model.position.weight.unsqueeze(-3)
    pre = norm_place == "pre"
    for part, norm in ((lambda z: block.mixer(z, Context())[0], block.mixer_norm), (block.feed_forward, block.feed_forward_norm)):
        x = part(norm(x)) if pre else norm(part(x))
    close(model(tokens, Context())[0], model.norm(x) if pre else x, 1e-12)


def test_without_layers_a_bigram_model_of_low_rank() -> None:
    model, tokens = decoder(num_layers=0, width=4, positions="none", norm="none"), torch.randint(V, (R, B, 9), generator=generator(1))
    logits = model.logits(model(tokens, Context(at=slice(2, 5)))[0])
    table = model.embedding.weight @ dict(model.named_parameters())["head.weight"]
    for r in range(R):
        close(logits[r], table[r][tokens[r, :, 2:5]], 1e-12)
        assert torch.linalg.matrix_rank(table[r]) == 4
    assert model.flops(B, 9, 3) == 2 * B * 3 * 4 * V


@pytest.mark.parametrize("tied", [False, True])
def test_soft_cap(tied: bool) -> None:
    model, plain = (decoder(softcap=c, tied=tied) for c in (2.0, 0.0))
    hidden = 5 * randn(R, B, 4, 8)
    close(model.logits(hidden), 2 * (plain.logits(hidden) / 2).tanh(), 1e-12)
    assert model.logits(hidden).abs().max() <= 2 < plain.logits(hidden).abs().max()


@pytest.mark.parametrize("name", MIXER_EXAMPLES)
@pytest.mark.parametrize("linear_init", ["normal", "uniform"])
def test_blocks_that_begin_as_nothing(name: str, linear_init: Any) -> None:
    """But for those without a last matrix, which are no matrix at all (average), or whose state is what they give (recurrent)."""
    config = replace(MIXER_EXAMPLES[name], mixers=(name,), num_layers=2, feed_forward=12, output_init="zero", linear_init=linear_init)
    model = models.Decoder(config, V, 9, (R,))
    initialise(model, model.init_rules([config] * R), torch.arange(R))
    last = {n for n, p in model.named_parameters() if (p == 0).all() and n.startswith("blocks") and n.endswith("weight")}
    mixer = [] if name in ("average", "rnn", "gru", "lstm") else ["mixer.out"]
    assert last == {f"blocks.{i}.{part}.weight" for i in range(2) for part in [*mixer, "feed_forward.down"]}
    if mixer:
        tokens = torch.randint(V, (R, B, 9), generator=generator(1))
        assert model.position is not None
        close(model(tokens, Context())[0], model.norm(model.embedding(tokens) + model.position.weight.unsqueeze(-3)), 1e-6)
