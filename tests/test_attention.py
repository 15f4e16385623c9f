"""Attention against PyTorch's own, with every mask and every position scheme: values and gradients, in float64."""

from __future__ import annotations

from typing import Any, get_args, get_type_hints

import pytest
import torch
from laws import close, filled, generator
from torch import Tensor
from torch.nn import functional as F

from shoal.config import DecoderConfig
from shoal.contracts import Context
from shoal.mixers import attention
from shoal.mixers.attention import SHORT, Attention, attend
from shoal.nn import rotary, rotate, select

R, B, WIDTH = 2, 3, 12
TIMES = (5, 12)  # one for each form
MASKS = ("none", "left", "right", "both")
PLACES = ("all", "slice", "last", "indices")
SCHEMES = get_args(get_type_hints(DecoderConfig)["positions"])


def randn(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, generator=generator(seed), dtype=torch.float64)


def mask_of(kind: str, time: int) -> Tensor | None:
    cell, some = torch.arange(time), torch.randint(0, time // 2, (2, R, B, 1), generator=generator(2))
    left, right = (cell >= some[0]) | (kind == "right"), (cell < time - some[1]) | (kind == "left")
    return None if kind == "none" else left & right


def places_of(kind: str, time: int) -> Tensor | slice | None:
    return {"all": None, "slice": slice(1, 4), "last": slice(-1, None), "indices": torch.randint(time, (R, B, 3), generator=generator(3))}[kind]


def readable(mask: Tensor | None, time: int) -> Tensor:
    """bool [R, B, T, T], cell by cell: what is not later and not padding; a padding place reads itself too, so that it has something to read."""
    allowed = torch.zeros(R, B, time, time, dtype=torch.bool)
    for r in range(R):
        for b in range(B):
            for query in range(time):
                for key in range(query + 1):
                    allowed[r, b, query, key] = mask is None or bool(mask[r, b, key]) or key == query
    return allowed


def with_gradients(y: Tensor, at: list[Tensor]) -> list[Tensor]:
    return [y, *torch.autograd.grad(y, at, randn(*y.shape, seed=4))]


@pytest.mark.parametrize("time", TIMES)
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("places", PLACES)
@pytest.mark.parametrize("positions", SCHEMES)
@pytest.mark.parametrize("given", [False, True])
def test_equals_scaled_dot_product_attention(time: int, mask: str, places: str, positions: Any, given: bool) -> None:
    """The whole mixer, run by run: projections, PyTorch's attention at all positions, the scored ones of its result."""
    mixer = filled(Attention(DecoderConfig(width=WIDTH, num_heads=3, positions=positions), (R,)))
    x, hidden, at = randn(R, B, time, WIDTH).requires_grad_(), mask_of(mask, time), places_of(places, time)
    cells = torch.randint(100, (R, B, time), generator=generator(5)) if given else torch.arange(time).expand(R, B, time)
    y, _ = mixer(x, Context(mask=hidden, positions=cells if given else None, at=at))

    def project(layer: Any) -> Tensor:
        return torch.stack([F.linear(x[r], layer.weight[r].mT, layer.bias[r]) for r in range(R)]).unflatten(-1, (3, 4))

    q, k, v = (project(layer) for layer in (mixer.query, mixer.key, mixer.value))
    if positions == "rotary":
        turns = rotary(cells, q.shape[-1], 10_000)
        q, k = rotate(q, turns), rotate(k, turns)
    q, k, v = (z.flatten(0, 1).transpose(1, 2) for z in (q, k, v))
    bias = torch.zeros(3, time, time, dtype=torch.float64)
    if positions == "alibi":  # by the places in the sequence, whatever positions are given
        bias = bias - (torch.arange(time)[:, None] - torch.arange(time)) * torch.tensor([2**-4, 2**-8, 2**-2], dtype=torch.float64)[:, None, None]
    bias = bias.masked_fill(~readable(hidden, time).flatten(0, 1)[:, None], float("-inf"))
    mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
    mixed = mixed.transpose(1, 2).reshape(R, B, time, WIDTH)
    expected = select(torch.stack([F.linear(mixed[r], mixer.out.weight[r].mT, mixer.out.bias[r]) for r in range(R)]), at)

    parameters = [x, *mixer.parameters()]
    for got, reference in zip(with_gradients(y, parameters), with_gradients(expected, parameters), strict=True):
        close(got, reference, 1e-10)


@pytest.mark.parametrize("time", TIMES)
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("num_heads", [1, 2, 6])
@pytest.mark.parametrize("bias", [True, False])
def test_equals_multi_head_attention_forward(time: int, mask: str, num_heads: int, bias: bool) -> None:
    """The code behind torch.nn.MultiheadAttention, which shares nothing with this one."""
    mixer = filled(Attention(DecoderConfig(width=WIDTH, num_heads=num_heads, bias=bias), (R,)))
    x, hidden = randn(R, B, time, WIDTH).requires_grad_(), mask_of(mask, time)
    y, _ = mixer(x, Context(mask=hidden))
    runs = []
    for r in range(R):
        joint = [mixer.query, mixer.key, mixer.value]
        biases = torch.cat([layer.bias[r] for layer in joint]) if bias else None
        forbidden = ~readable(hidden, time)[r].repeat_interleave(num_heads, 0)
        z, _ = F.multi_head_attention_forward(
            *[x[r].transpose(0, 1)] * 3, WIDTH, num_heads, torch.cat([layer.weight[r].mT for layer in joint]), biases, None, None, False, 0.0,
            mixer.out.weight[r].mT, mixer.out.bias[r] if bias else None, attn_mask=forbidden, need_weights=False,
        )  # fmt: skip
        runs.append(z.transpose(0, 1))
    parameters = [x, *mixer.parameters()]
    for got, reference in zip(with_gradients(y, parameters), with_gradients(torch.stack(runs), parameters), strict=True):
        close(got, reference, 1e-10)


@pytest.mark.parametrize("time", range(1, SHORT + 4))
@pytest.mark.parametrize("mask", MASKS[:2])
def test_both_forms_are_one(time: int, mask: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Around the length at which one takes over from the other."""
    q, k, v = (randn(R, B, time, 3, 4, seed=s).requires_grad_() for s in (1, 2, 3))
    allowed = None if mask == "none" else readable(mask_of(mask, max(time, 2)), max(time, 2))[..., :time, :time]
    results = []
    for short in (0, 100):
        monkeypatch.setattr(attention, "SHORT", short)
        results.append(with_gradients(attend(q, k, v, allowed), [q, k, v]))
    for broadcast, fused in zip(*results, strict=True):
        close(broadcast, fused, 1e-12)


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("places", PLACES)
def test_rows_in_pieces(mask: str, places: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The pieces in which the fused form takes very many rows change nothing."""
    mixer, x = filled(Attention(DecoderConfig(width=WIDTH, num_heads=3), (R,))), randn(R, B, 12, WIDTH).requires_grad_()
    context = Context(mask=mask_of(mask, 12), at=places_of(places, 12))
    whole = with_gradients(mixer(x, context)[0], [x, *mixer.parameters()])
    for rows in (1, 4):
        monkeypatch.setattr(attention, "MAX_ROWS", rows)
        for got, expected in zip(with_gradients(mixer(x, context)[0], [x, *mixer.parameters()]), whole, strict=True):
            close(got, expected, 1e-12)


@pytest.mark.parametrize("time", TIMES)
def test_bfloat16(time: int) -> None:
    """Weights and inputs in bfloat16, softmax in float32: a few thousandths of the largest value off."""
    mixer, x = filled(Attention(DecoderConfig(width=WIDTH, num_heads=3), (R,))), randn(R, B, time, WIDTH)
    expected, _ = mixer(x, Context(mask=mask_of("left", time)))
    got, _ = mixer.bfloat16()(x.bfloat16(), Context(mask=mask_of("left", time)))
    assert got.dtype == torch.bfloat16 and (got.double() - expected).abs().max() < 0.02 * expected.abs().max()
