"""Changed attention against loops written from the papers' equations, cell by cell, in float64: values, weights, what leaks, what is kept."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from laws import MIXER_EXAMPLES, Case, close, filled, generator, law_no_leak, mixer_cases
from laws_training import MODULAR, SMALL, finished
from torch import Tensor
from torch.nn import functional as F

from shoal import mixers, models
from shoal.config import AdamW, DecoderConfig, MemorizeConfig, with_seed
from shoal.config.fields import ConfigError
from shoal.contracts import Context
from shoal.inference import evaluate, generate
from shoal.inference.score import score
from shoal.mixers import attention, similarities, windowed
from shoal.mixers.attention import Attention, attend
from shoal.nn import alibi_slopes, initialise
from shoal.train.fleet import Fleet
from shoal.train.run import Run

H, K, WINDOW = 3, 4, 3
WIDTH = H * K
TIMES = (5, 11)  # one for each form
SHARED = ("shared_qk", "shared_kv", "shared_qv", "shared_qkv")
CHANGED = (
    "distance", "cosine", "additive", "bilinear", *SHARED, "network", "nonlinear_q", "nonlinear_k", "nonlinear_v", "zeroed", "renormalised", "windowed",
)  # fmt: skip
MASKS = (None, "left", "right")


def randn(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, generator=generator(seed), dtype=torch.float64)


def made(name: str, lead: tuple[int, ...] = (), **changes: Any) -> Any:
    return filled(mixers.build(name, DecoderConfig(**{"width": WIDTH, "num_heads": H, "mixers": (name,), "window": WINDOW} | changes), lead))


def mask_of(kind: str | None, time: int) -> Tensor | None:
    cell = torch.arange(time)
    return None if kind is None else (cell >= 2 if kind == "left" else cell < time - 2).expand(1, time)


# --- loops


def vector(layer: Any, x: Tensor) -> Tensor:
    """x W + b of one position."""
    y = layer.bias.clone()
    for i in range(len(x)):
        y += x[i] * layer.weight[i]
    return y


def projected(name: str, mixer: Any, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Query, key and value [D] of one position."""
    owner = {"shared_qk": "query query value", "shared_kv": "query key key", "shared_qv": "query key query", "shared_qkv": "query query query"}
    found = []
    for role, letter in zip(owner.get(name, "query key value").split(), "qkv", strict=True):
        inner = vector(getattr(mixer, f"{role}_inner"), x).clamp(min=0) if name == "network" else x
        y = vector(getattr(mixer, role), inner)
        found.append(y.clamp(min=0) if name == f"nonlinear_{letter}" else y)
    return found[0], found[1], found[2]


def score_of(name: str, mixer: Any, q: Tensor, k: Tensor, head: int) -> Tensor:
    """Of one query and one key [K] of one head."""
    if name == "distance":
        return -sum(((q[i] - k[i]) ** 2 for i in range(K)), torch.zeros(())) / math.sqrt(K)
    if name == "cosine":
        scale = min(math.exp(mixer.log_scale[head].item()), 100.0)
        return scale * (q @ k) / (q.norm() * k.norm())
    if name == "additive":
        return sum((mixer.vector[head, i] * math.tanh(q[i] + k[i]) for i in range(K)), torch.zeros(()))
    if name == "bilinear":
        return sum((q[i] * mixer.form[head, i, j] * k[j] for i in range(K) for j in range(K)), torch.zeros(())) / math.sqrt(K)
    return (q @ k) / math.sqrt(K)


SLOPES = (2**-4, 2**-8, 2**-2)  # of three heads: those of two, and the first of those of four


def by_hand(name: str, mixer: Any, x: Tensor, mask: Tensor | None, alibi: bool) -> tuple[Tensor, Tensor]:
    """x [T, D] -> y [T, D] and the weights [H, T, T], one query, key and head at a time."""
    time = len(x)
    q, k, v = (torch.stack(rows).view(time, H, K) for rows in zip(*(projected(name, mixer, row) for row in x), strict=True))
    weights, mixed = torch.zeros(H, time, time, dtype=torch.float64), torch.zeros(time, H, K, dtype=torch.float64)
    for h in range(H):
        for t in range(time):
            shares = {}
            for j in range(time):
                near = t - WINDOW < j <= t if name == "windowed" else j <= t or name in ("zeroed", "renormalised")
                if near and (mask is None or mask[0, j] or j == t):
                    shares[j] = math.exp(score_of(name, mixer, q[t, h], k[j, h], h) - (SLOPES[h] * abs(t - j) if alibi else 0.0))
            total = sum(shares.values())
            past = {j: share / total for j, share in shares.items() if j <= t}
            if name == "renormalised":
                past = {j: share / sum(past.values()) for j, share in past.items()}
            for j, share in past.items():
                weights[h, t, j] = share
                mixed[t, h] += share * v[j, h]
    return torch.stack([vector(mixer.out, row) for row in mixed.flatten(1)]), weights


@pytest.mark.parametrize("time", TIMES)
@pytest.mark.parametrize("kind", MASKS)
@pytest.mark.parametrize("positions", ["none", "alibi"])
@pytest.mark.parametrize("name", ["attention", *CHANGED])
@torch.no_grad()
def test_equals_its_equations(name: str, positions: str, kind: str | None, time: int) -> None:
    mixer, mask, x = made(name, positions=positions), mask_of(kind, time), randn(1, time, WIDTH)
    context = Context(mask=mask)
    y, weights = by_hand(name, mixer, x[0], mask, positions == "alibi")
    close(mixer(x, context)[0][0], y, 1e-10)
    close(mixer.weights(x, context)[0], weights, 1e-10)


@pytest.mark.parametrize("positions", ["rotary", "alibi", "learned"])
@pytest.mark.parametrize("qk_norm", [False, True])
@pytest.mark.parametrize("name", ["attention", *CHANGED])
@torch.no_grad()
def test_weights_are_those_of_the_outputs(name: str, positions: str, qk_norm: bool) -> None:
    """The sums of every head's values with them, through ``out``, are the outputs; at scored positions they are its rows."""
    fleet = made(name, (2,), positions=positions, qk_norm=qk_norm)
    mask = torch.arange(11) >= torch.tensor([[0, 3, 1], [2, 0, 0]])[..., None]
    x, context = randn(2, 3, 11, WIDTH), Context(mask=mask)
    weights = fleet.weights(x, context)
    assert weights.shape == (2, 3, H, 11, 11)
    assert name == "zeroed" or (weights.sum(-1) - 1).abs().max() < 1e-12
    assert (weights.triu(1) == 0).all() and (weights >= 0).all()
    _, _, v, _, _ = fleet.read(x, context, None)
    close(fleet.out((weights @ v.transpose(-3, -2)).transpose(-3, -2).flatten(-2)), fleet(x, context)[0], 1e-10)
    close(fleet.weights(x, context._replace(at=slice(2, 5))), weights[..., 2:5, :], 1e-12)
    some = torch.randint(11, (2, 3, 4), generator=generator(3))
    close(fleet.weights(x, context._replace(at=some)), torch.take_along_dim(weights, some[:, :, None, :, None], dim=-2), 1e-12)


@pytest.mark.parametrize("masked", [False, True])
def test_tangents_in_pieces(masked: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Few queries at once change nothing: values and gradients."""
    fleet, x, results = made("additive", (2,)), randn(2, 3, 11, WIDTH).requires_grad_(), []
    context = Context(mask=torch.arange(11) >= torch.tensor([[0, 3, 1], [2, 0, 0]])[..., None] if masked else None)
    for at_once in (100, 4, 1):
        monkeypatch.setattr(similarities, "AT_ONCE", at_once)
        y, _ = fleet(x, context)
        results.append([y, *torch.autograd.grad(y, [x, *fleet.parameters()], randn(*y.shape, seed=2))])
    for pieces in results[1:]:
        for got, expected in zip(pieces, results[0], strict=True):
            close(got, expected, 1e-12)


# --- what comes later


def leaks(name: str) -> bool:
    example = MIXER_EXAMPLES[name]
    case = next(case for key, case in mixer_cases().items() if key.startswith(f"{name} ") and case.config == replace(example, mixers=(name,)))
    honest = Case(case.make, replace(case.config, mixers=("attention",)), case.time, tokens=False)  # by whose name the law expects no leak
    try:
        law_no_leak(honest)
    except AssertionError:
        return True
    return False


def test_the_leak_is_found() -> None:
    """Of all mixers there are, in zeroed alone, and that is what is said of it."""
    assert tuple(name for name in mixers.MIXERS if leaks(name)) == mixers.LEAKY == ("zeroed",)


@torch.no_grad()
def test_the_leak_is_in_the_missing_weight() -> None:
    """What zeroed knows of the future is one number a head: how much weight went there. Divided by what is left, it is attention."""
    mixer, x = made("zeroed"), randn(2, 11, WIDTH)
    left = mixer.weights(x, Context()).sum(-1, keepdim=True)
    assert (left[:, :, -1] - 1).abs().max() < 1e-12 and (left[:, :, :-1] < 1).all()
    usual = filled(Attention(DecoderConfig(width=WIDTH, num_heads=H)))
    usual.load_state_dict(mixer.state_dict())
    close(mixer.weights(x, Context()) / left, usual.weights(x, Context()), 1e-12)


@pytest.mark.parametrize("positions", ["learned", "rotary", "alibi"])
@pytest.mark.parametrize("time", TIMES)
def test_renormalised_is_attention(time: int, positions: str) -> None:
    """Values and gradients, padding and scored positions too; also where nearly all weight lies in the future, and the past's share would be 0 / 0."""
    changed, usual = (made(name, (2,), positions=positions) for name in ("renormalised", "attention"))
    usual.load_state_dict(changed.state_dict())
    for scale in (1.0, 100.0):
        x = (randn(2, 3, time, WIDTH) * scale).requires_grad_()
        context = Context(mask=torch.arange(time) >= torch.tensor([[0, 3, 1], [2, 0, 0]])[..., None], at=slice(1, None))
        results = []
        for mixer in (changed, usual):
            y, _ = mixer(x, context)
            results.append([y, *torch.autograd.grad(y, [x, *mixer.parameters()], randn(*y.shape, seed=2))])
        for got, expected in zip(*results, strict=True):
            close(got, expected, 1e-9 * scale**2)


def test_zeroed_cannot_be_kept() -> None:
    for model in (made("zeroed"), models.build(DecoderConfig(width=8, num_heads=2, mixers=("attention", "zeroed")), 11, 17, ())):
        with pytest.raises(ConfigError, match=r"model.mixers: zeroed .* has no cache .* take renormalised"):
            model.init_cache(1, 4)


# --- projections


def test_shared_projections_are_shared() -> None:
    for name, has in zip(SHARED, ({"query", "value"}, {"query", "key"}, {"query", "key"}, {"query"}), strict=True):
        assert {parameter.split(".")[0] for parameter in made(name).state_dict()} == has | {"out"}


@pytest.mark.parametrize("name", SHARED)
def test_one_of_two_that_are_equal_is_kept(name: str) -> None:
    """Keys that are values halve the cache, unless the keys are turned or scaled first."""
    halves = name in ("shared_kv", "shared_qkv")
    given: list[tuple[dict[str, Any], bool]] = [({}, halves), ({"positions": "alibi"}, halves), ({"positions": "rotary"}, False), ({"qk_norm": True}, False)]
    for changes, half in given:
        mixer = made(name, **changes)
        assert mixer.state_bytes(10) == (1 if half else 2) * 4 * 10 * WIDTH
        x, cache = randn(2, 9, WIDTH), mixer.init_cache(2, 10)
        y, outs = mixer(x, Context())[0], []
        for t in range(9):
            out, cache = mixer(x[:, t : t + 1], Context(), cache)
            outs.append(out)
        close(torch.cat(outs, dim=1), y, 1e-10)


# --- windows


@pytest.mark.parametrize("window", [1, 2, 5, 16])
@pytest.mark.parametrize("positions", ["none", "rotary", "alibi"])
@pytest.mark.parametrize("masked", [False, True])
def test_blocks_are_the_band(window: int, positions: str, masked: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """In blocks or all behind one mask, whatever is scored, at lengths that fill the last block and that do not: values and gradients."""
    for time in (2 * window + 1, 4 * window, 37):
        fleet, x = made("windowed", (2,), window=window, positions=positions), randn(2, 3, time, WIDTH).requires_grad_()
        mask = torch.arange(time) >= torch.randint(time, (2, 3, 1), generator=generator(2)) if masked else None
        for at in (None, slice(time // 3, None), slice(-1, None), torch.randint(time, (2, 3, 2 * window + 3), generator=generator(3))):
            results = []
            for blocks in (True, False):
                monkeypatch.setattr(windowed.Windowed, "_in_blocks", lambda self, scored, blocks=blocks: blocks)
                y, _ = fleet(x, Context(mask=mask, at=at))
                results.append([y, *torch.autograd.grad(y, [x, *fleet.parameters()], randn(*y.shape, seed=4))])
            for got, expected in zip(*results, strict=True):
                close(got, expected, 1e-10)


@pytest.mark.parametrize("masked", [False, True])
def test_a_wide_window_is_attention(masked: bool) -> None:
    wide, usual = made("windowed", window=30), made("attention")
    usual.load_state_dict(wide.state_dict())
    x, mask = randn(3, 11, WIDTH), (torch.arange(11) >= torch.tensor([[0], [3], [1]])) if masked else None
    close(wide(x, Context(mask=mask))[0], usual(x, Context(mask=mask))[0], 1e-12)


def test_windows_cost() -> None:
    """Products grow with the length, not with its square, and the cache does not grow beyond the window."""
    mixer = made("windowed", window=8)
    short, long = (mixer.mixing_flops(1, time, time) for time in (800, 1600))
    assert long == 2 * short == 2 * 2 * 2 * 800 * 16 * WIDTH
    assert mixer.state_bytes(4) == 2 * 4 * 4 * WIDTH and mixer.state_bytes(100) == mixer.state_bytes(7) == 2 * 4 * 7 * WIDTH
    assert made("windowed", window=1).state_bytes(100) == 0


@pytest.mark.parametrize("window", [1, 4])
@pytest.mark.parametrize("positions", ["rotary", "alibi"])
def test_a_prompt_through_the_rolling_cache(window: int, positions: str) -> None:
    """Long prompts in pieces long enough for blocks, and single tokens between."""
    fleet, x, outs = made("windowed", (2,), window=window, positions=positions), randn(2, 3, 60, WIDTH), []
    cache = fleet.init_cache(3, 60)
    for start, stop in ((0, 1), (1, 2), (2, 30), (30, 31), (31, 33), (33, 60)):
        out, cache = fleet(x[:, :, start:stop], Context(), cache)
        outs.append(out)
    close(torch.cat(outs, dim=2), fleet(x, Context())[0], 1e-10)


# --- ALiBi


def test_slopes() -> None:
    """The paper's of 8 and 16 heads, and what its authors' code gives for others (there written with lists)."""
    assert alibi_slopes(8).tolist() == [2.0**-i for i in range(1, 9)]
    close(alibi_slopes(16, torch.float64), torch.tensor([2 ** (-i / 2) for i in range(1, 17)], dtype=torch.float64), 1e-15)

    def powers(n: int) -> list[float]:
        return [2.0 ** (-8 * (i + 1) / n) for i in range(n)]

    for n in (1, 2, 3, 5, 6, 7, 12, 13, 20, 33):
        below = 2 ** math.floor(math.log2(n))
        close(alibi_slopes(n, torch.float64), torch.tensor(powers(below) + powers(2 * below)[::2][: n - below], dtype=torch.float64), 1e-15)


def test_alibi_far_away() -> None:
    """In bfloat16, ten thousand places on: distances stay whole, so what is near still counts as the float64 form has it."""
    time, far = 40, 10_000
    q, k, v = (randn(1, time, H, 8, seed=s) for s in (1, 2, 3))
    cell = torch.arange(far, far + time)
    bias = (torch.arange(time) - torch.arange(time)[:, None]) * torch.tensor(SLOPES)[:, None, None].bfloat16().double()
    scores = torch.einsum("bshk,bthk->bhst", q, k) * 8**-0.5 + bias
    expected = torch.einsum("bhst,bthk->bshk", scores.masked_fill(torch.ones(time, time).triu(1) > 0, -math.inf).softmax(-1), v)
    near, away = attention._with_alibi(q.bfloat16(), k.bfloat16(), cell, 8**-0.5)
    got = attend(near, away, v.bfloat16(), scale=8**-0.5)
    assert (got.double() - expected).abs().max() < 0.03


def test_alibi_and_the_whole_sequence() -> None:
    with pytest.raises(ConfigError, match="positions: alibi"):
        DecoderConfig(causal=False, positions="alibi")


# --- trained


def trained(**model: Any) -> Run:
    """Two strings learned by heart, as far as 60 steps go."""
    config = replace(MODULAR, task=MemorizeConfig(strings=("I love machines", "no, we do not")), optimizer=AdamW(lr=1e-2), batch_size=0, evaluate=("train",))
    config = replace(config, model=replace(SMALL, init_scale=5.0, num_heads=2, **model), steps=60, evaluate_every=60, log_every=60)
    fleet, _ = finished(Fleet.build([with_seed(config, 0)]))
    return fleet.one(0)


@pytest.mark.parametrize("positions", ["learned", "alibi"])
@pytest.mark.parametrize("name", ["distance", "cosine", "additive", "bilinear", "shared_qkv", "renormalised", "windowed"])
def test_a_trained_run_writes(name: str, positions: str) -> None:
    run = trained(mixers=(name,), positions=positions, window=4)
    assert evaluate(run, "train")["loss"] < 1.0
    for text in ("I love machines", "no, we do not"):
        assert generate(run, text[:8]) == text[8:]
    assert generate(run, ["I love m", "no"]) == [generate(run, "I love m"), generate(run, "no")], "prompts of two lengths, padded on the left"


def test_zeroed_is_trained_and_refused_where_the_future_is_missing() -> None:
    run = trained(mixers=("attention", "zeroed"))
    assert evaluate(run, "train")["loss"] < 1.0
    with pytest.raises(ConfigError, match=r"model\.mixers: zeroed"):
        generate(run, "I love")
    with pytest.raises(ConfigError, match=r"gives no probability of the next token; .* sees what comes later"):
        score(run, "I love")


# --- the rest


@pytest.mark.parametrize("name", [*CHANGED, "attention"])
@pytest.mark.parametrize("positions", ["learned", "alibi"])
def test_bfloat16(name: str, positions: str) -> None:
    """A few hundredths of the largest value off, whichever form."""
    for time in TIMES:
        mixer, x = made(name, positions=positions), randn(3, time, WIDTH)
        expected = mixer(x, Context())[0]
        got = mixer.bfloat16()(x.bfloat16(), Context())[0]
        assert got.dtype == torch.bfloat16 and (got.double() - expected).abs().max() < 0.04 * expected.abs().max()


@torch.no_grad()
def test_scores_in_bfloat16_are_float32() -> None:
    """Long queries and keys: written out, the scores are as exact as in fused kernels, so that renormalised is attention in bfloat16 too."""
    q, k, v = ((4 * randn(1, 40, 2, 32, seed=s)).bfloat16() for s in (1, 2, 3))
    mixer, places = made("renormalised", width=64, num_heads=2).bfloat16(), attention.Places(torch.arange(40), torch.arange(40), None, True)
    exact = attend(q.double(), k.double(), v.double())
    error = (mixer.mix(q, k, v, places).double() - exact).abs().max()
    assert error < 0.01 * exact.abs().max() and error < 2 * (attend(q, k, v).double() - exact).abs().max()


def test_lengths_in_bfloat16() -> None:
    """Keys ten times as long as usual: abs(k)^2 by its digits is off by less than a hundredth of a nat, where one number would be by half of one."""
    mixer, q, k = made("distance", width=32, num_heads=1).bfloat16(), randn(1, 9, 1, 32), 5 * randn(1, 9, 1, 32, seed=2)
    a, b, scale = mixer.compare(q.bfloat16(), k.bfloat16())
    exact = 2 * torch.einsum("bshk,bthk->bst", q.bfloat16().double(), k.bfloat16().double()) - k.bfloat16().double().square().sum(-1)[:, None, :, 0]
    got = torch.einsum("bshk,bthk->bst", a.double(), b.double())
    assert (got - exact).abs().max() * scale < 0.01 < (exact.bfloat16().double() - exact).abs().max() * scale


@pytest.mark.parametrize("name", ["distance", "additive", "renormalised", "windowed"])
def test_compiles_whole(name: str) -> None:
    """Without a break in the graph, forward and backward, with ALiBi, padding and a cache."""
    torch.compiler.reset()
    fleet, x = made(name, (2,), positions="alibi"), randn(2, 3, 12, WIDTH).requires_grad_()
    compiled = torch.compile(fleet.forward, fullgraph=True, backend="aot_eager")
    context = Context(mask=torch.arange(12) >= torch.tensor([[0, 3, 1], [2, 0, 0]])[..., None])
    results = []
    for forward in (fleet.forward, compiled):
        y, _ = forward(x, context)
        results.append([y, *torch.autograd.grad(y.sum(), [x, *fleet.parameters()])])
    for got, expected in zip(*results, strict=True):
        close(got, expected, 1e-12)
    if name not in mixers.LEAKY:
        with torch.no_grad():
            for got, expected in zip(*(forward(x, context, fleet.init_cache(3, 14)) for forward in (compiled, fleet.forward)), strict=True):
                close(got if isinstance(got, Tensor) else got.keys, expected if isinstance(expected, Tensor) else expected.keys, 1e-12)


@pytest.mark.parametrize("name", ["cosine", "additive", "bilinear"])
def test_what_is_learned_beside_matrices_begins(name: Any) -> None:
    """As said: cosine at 10, the others such that scores begin about as large as attention's."""
    config = DecoderConfig(width=64, num_heads=2, mixers=(name,), num_layers=1)
    model: Any = models.build(config, 11, 17, (3,))
    initialise(model, model.init_rules([config] * 3), torch.arange(3))
    mixer = model.blocks[0].mixer
    if name == "cosine":
        close(mixer.log_scale.exp(), torch.full((3, 2), 10.0), 1e-6)
        assert model.undecayed() == ["blocks.0.mixer.log_scale"]
    else:
        p = mixer.form if name == "bilinear" else mixer.vector
        assert 0.8 < p.std().item() * 32**0.5 < 1.2 and model.undecayed() == []
    q, k = F.normalize(torch.randn(2, 3, 4, 9, 2, 32, generator=generator()), dim=-1) * 32**0.5  # as if root mean squares were 1
    scores = mixer.scores(q, k, attention.Places(torch.arange(9), torch.arange(9), None, True))
    assert 0.2 < scores.std() < 3
