"""Mixers without a softmax over the past, each beside loops written from its paper's equations, in float64; and what keeps them stable, causal and cheap."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any, cast

import laws
import numpy as np
import pytest
import torch
from laws import close, filled, generator
from torch import Tensor
from torch.nn import functional as F
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from shoal import mixers
from shoal.config import DecoderConfig, RunConfig
from shoal.config.fields import ConfigError
from shoal.contracts import Context
from shoal.inference.generate import reach
from shoal.mixers import linear_attention as linear_module
from shoal.mixers import performer as performer_module
from shoal.mixers.aft import PAIR_STD, by_distance, earlier_mean, paired_mean
from shoal.mixers.attention import attend
from shoal.mixers.linear_attention import Elu, State, linear_attention
from shoal.mixers.performer import RandomFeatures, directions, log_features
from shoal.nn import Constant, Normal, initialise, rotary, rotate, select
from shoal.nn import running_mean as running_module
from shoal.nn.running_mean import FLOOR, merged, running_mean, whole_mean

R, B, H, K, N, LENGTH = 2, 3, 2, 4, 5, 40
CONFIG = DecoderConfig(width=8, num_heads=H, features=N, window=4)
NAMES = ["linear", "performer", "fastformer", "aft_full", "aft_local", "aft_simple", "aft_conv"]
PLACES = {"all": None, "slice": slice(3, None, 2), "last": slice(-1, None), "indices": "drawn"}


def randn(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, generator=generator(seed), dtype=torch.float64)


def made(name: str, config: DecoderConfig = CONFIG, lead: tuple[int, ...] = (), length: int = LENGTH) -> Any:
    return filled(mixers.build(name, config, lead, length))


@pytest.fixture(params=["whole", "cut"])
def pieces(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """As in ``test_laws``, and of sequences that are cut several times."""
    if request.param == "cut":
        monkeypatch.setattr(linear_module, "CHUNK", 5)
        monkeypatch.setattr(running_module, "BLOCKS", (3, 2))


# --- the mixers, by their equations


def loop(mixer: Any, x: Tensor, mean: Callable[[Any, Tensor, Tensor, Tensor, int], Tensor]) -> Tensor:
    """What ``mean`` makes of the q, k and v of a row [T, D] at each place."""
    q, k, v = (layer(x) for layer in (mixer.query, mixer.key, mixer.value))
    return torch.stack([mean(mixer, q, k, v, t) for t in range(len(x))])


def heads(x: Tensor) -> list[Tensor]:
    return list(x.unflatten(-1, (H, -1)).unbind(-2))


def linear(mixer: Any, q: Tensor, k: Tensor, v: Tensor, t: int) -> Tensor:
    out = []
    for a, b, c in zip(heads(q), heads(k), heads(v), strict=True):
        weights = torch.stack([(F.elu(a[t]) + 1) @ (F.elu(b[s]) + 1) for s in range(t + 1)])
        out.append(sum(weights[s] * c[s] for s in range(t + 1)) / weights.sum())
    return mixer.out(torch.cat(out))


def performer(mixer: Any, q: Tensor, k: Tensor, v: Tensor, t: int) -> Tensor:
    out, w = [], mixer.features.weight
    for a, b, c in zip(heads(q), heads(k), heads(v), strict=True):
        a, b = a * K**-0.25, b * K**-0.25
        features = [torch.stack([(w[:, i] @ x - x @ x / 2).exp() for i in range(N)]) for x in (a[t], *b[: t + 1])]
        weights = torch.stack([features[0] @ y for y in features[1:]])
        out.append(weights @ c[: t + 1] / weights.sum())
    return mixer.out(torch.cat(out))


def fastformer(mixer: Any, q: Tensor, k: Tensor, v: Tensor, t: int) -> Tensor:
    out = []
    for h, (a, b, c) in enumerate(zip(heads(q), heads(k), heads(v), strict=True)):
        query = [(a[: s + 1] @ mixer.query_weight[h] / K**0.5).softmax(0) @ a[: s + 1] for s in range(t + 1)]
        products = torch.stack([query[s] * b[s] for s in range(t + 1)])
        key = (products @ mixer.key_weight[h] / K**0.5).softmax(0) @ products
        out.append(key * c[t])
    return mixer.out(mixer.transform(torch.cat(out)) + q[t])


def pair_of(mixer: Any, t: int, s: int) -> Tensor | float:
    if mixer.kind == "simple" or (mixer.kind != "full" and t - s >= mixer.window):
        return 0.0
    return mixer.pair_distance[:, t - s].repeat_interleave(K) if mixer.kind == "conv" else mixer.pair_query[t] @ mixer.pair_key[s]


def aft(mixer: Any, q: Tensor, k: Tensor, v: Tensor, t: int) -> Tensor:
    k = k.repeat_interleave(K, dim=-1) if mixer.kind == "conv" else k
    weights = torch.stack([(k[s] + pair_of(mixer, t, s)).exp() for s in range(t + 1)])
    return mixer.out(q[t].sigmoid() * (weights * v[: t + 1]).sum(0) / weights.sum(0))


LOOPS = {"linear": linear, "performer": performer, "fastformer": fastformer} | {name: aft for name in NAMES if name.startswith("aft")}


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.usefixtures("pieces")
def test_equals_its_equations(name: str) -> None:
    mixer, x = made(name), randn(2, 21, 8).requires_grad_()
    y, _ = mixer(x, Context())
    expected = torch.stack([loop(mixer, row, LOOPS[name]) for row in x])
    close(y, expected, 1e-10)
    weights, inputs = randn(*y.shape, seed=3), [x, *mixer.parameters()]
    for got, slope in zip(*(torch.autograd.grad((z * weights).sum(), inputs) for z in (y, expected)), strict=True):
        close(got, slope, 1e-9)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("law", laws.SEQUENCE_LAWS)
def test_every_law_holds_in_pieces(law: Any, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear_module, "CHUNK", 5)
    monkeypatch.setattr(running_module, "BLOCKS", (3, 2))
    positions = "rotary" if name == "performer" else "learned"
    law(laws.Case(lambda config, lead: mixers.build(name, config, lead, 17), replace(CONFIG, positions=positions), 12, tokens=False))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("time", "at"), [(LENGTH, None), (300, None), (300, slice(1, None)), (300, slice(-2, None))])
def test_flops(name: str, time: int, at: slice | None) -> None:
    mixer, x = made(name, length=300), randn(B, time, 8)
    with FlopCounterMode(display=False) as counter:
        mixer(x, Context(at=at))
    assert counter.get_total_flops() == mixer.flops(B, time, len(range(time)[at or slice(None)]))


@pytest.mark.parametrize("name", NAMES)
def test_cost_grows_as_the_length_where_it_should(name: str) -> None:
    """Matrix products and state, at 64 times the length."""
    mixer = mixers.build(name, CONFIG, (), 64)
    assert (mixer.flops(1, 1 << 19, 1 << 19) < 65 * mixer.flops(1, 1 << 13, 1 << 13)) == (name not in ("aft_full", "aft_local", "aft_conv"))
    assert (mixer.state_bytes(64_000) == mixer.state_bytes(1000)) == (name != "aft_full")


@pytest.mark.parametrize("name", ["performer", "fastformer", "aft_full", "aft_simple", "aft_conv"])  # all code there is
def test_compiles_whole(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear_module, "CHUNK", 8)
    monkeypatch.setattr(running_module, "BLOCKS", (8, 8))
    mixer, x = made(name, lead=(R,)), randn(R, B, 12, 8).requires_grad_()
    context = Context(mask=torch.arange(12).expand(R, B, -1) >= 2)
    compiled: Any = torch.compile(mixer, backend="aot_eager", fullgraph=True)
    got, expected = (torch.autograd.grad(run(x, context)[0].square().sum(), [x, *mixer.parameters()]) for run in (compiled, mixer))
    for a, b in zip(got, expected, strict=True):
        close(a, b)


@pytest.mark.parametrize("name", NAMES)
def test_bfloat16(name: str) -> None:
    """Sums, means and states in float32: as near as the products are, also where so many are added that bfloat16 would stop."""
    config, time = replace(CONFIG, width=32, features=16), 700
    mixer, x = made(name, config, length=time).float(), randn(B, time, 32).float()
    initialise(mixer, [*mixer.init_rules(), ("*", Normal(0.15))], torch.tensor([0]))
    expected, _ = mixer(x, Context())
    mixer = mixer.bfloat16()
    y, cache = mixer(x.bfloat16(), Context(), mixer.init_cache(B, time))
    assert y.dtype == torch.bfloat16 and all(z.dtype == torch.float32 for z in tree_leaves(cache) if z.is_floating_point())
    assert (y - expected).abs().mean() < 0.03 * expected.abs().mean()


# --- linear attention


@pytest.mark.parametrize("time", [1, 7, 16, 17, 43])
@pytest.mark.parametrize("places", PLACES)
@pytest.mark.parametrize(("lead", "carried"), [((R,), False), ((), True), ((R,), True)])
def test_linear_attention_equals_the_sums(time: int, places: str, lead: tuple[int, ...], carried: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear_module, "CHUNK", 16)
    at: Any = PLACES[places]
    at = torch.randint(time, (*lead, B, 9), generator=generator(8)) if at == "drawn" else at
    q, k = (randn(*lead, B, time, H, N, seed=i).exp().requires_grad_() for i in (2, 3))
    v = randn(*lead, B, time, H, K, seed=4).requires_grad_()
    state = [randn(*lead, B, H, N, K, seed=5).requires_grad_(), randn(*lead, B, H, N, seed=6).exp().requires_grad_()] if carried else []
    asked = select(q.flatten(-2), at).unflatten(-1, (H, N))
    if asked.shape[-3] == 0:
        return
    few = min(time, asked.shape[-3]) <= 16
    y, last = linear_attention(asked if few else q, k, v, State(*state) if carried else None, at if few else None)
    y = y if few else select(y.flatten(-2), at).unflatten(-1, (H, K))

    values = torch.einsum("...thn,...thk->...thnk", k, v).cumsum(-4) + (state[0].unsqueeze(-4) if carried else 0)
    weights = k.cumsum(-3) + (state[1].unsqueeze(-3) if carried else 0)
    expected = torch.einsum("...thn,...thnk->...thk", q, values) / (q * weights).sum(-1, keepdim=True)
    expected = select(expected.flatten(-2), at).unflatten(-1, (H, K))
    close(y, expected, 1e-10)
    assert (last is not None) == carried
    if last is not None:
        close(last.values, values[..., -1, :, :, :], 1e-10)
        close(last.weights, weights[..., -1, :, :], 1e-10)
    pull = randn(*y.shape, seed=9)
    for got, slope in zip(*(torch.autograd.grad((z * pull).sum(), [q, k, v, *state]) for z in (y, expected)), strict=True):
        close(got, slope, 1e-9)


def test_elu_keeps_its_digits() -> None:
    """elu(x) + 1 in float32 is 0 from -17 on, and in bfloat16 from -6."""
    x = torch.linspace(-60, 5, 131, dtype=torch.float64)
    exact = torch.where(x > 0, x + 1, x.exp())
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.bfloat16, 0.3)):  # of the logarithm: x itself is rounded
        close(Elu(1).keys(x.to(dtype)).double().log(), exact.log(), tolerance)
    x = randn(50).requires_grad_()
    for z in (Elu(1).keys(x), F.elu(x) + 1):
        z.sum().backward()
    assert x.grad is not None
    close(x.grad, 2 * torch.where(x > 0, 1, x.exp()), 1e-12)


# --- performer


def test_the_estimate_is_unbiased() -> None:
    """The mean over many draws is exp(q.k), within its standard error; and orthogonal directions vary less than independent ones do."""
    width, count, draws = 6, 9, 20_000
    w = directions(torch.arange(draws), width, count).double()
    independent = randn(draws, width, count)
    errors = []
    for i, scale in enumerate((0.3, 0.45, 0.6)):
        q, k = (randn(width, seed=10 * i + j) * scale / 2 for j in range(2))
        estimates = [(log_features(q, weight) + log_features(k, weight)).exp().mean(-1) for weight in (w, independent)]
        truth = (q @ k).exp()
        for estimate in estimates:
            assert abs(estimate.mean() - truth) < 4 * estimate.std() / math.sqrt(draws)
        errors.append([(estimate - truth).square().mean() for estimate in estimates])
    assert all(a < b for a, b in errors)


def test_directions() -> None:
    """Orthogonal in blocks, of the lengths of normal vectors, uniform, and a function of the seed."""
    width, count = 5, 13
    w = directions(torch.arange(3000), width, count)
    assert w.shape == (3000, width, count) and w.dtype == torch.float32
    for block in (w[..., :5], w[..., 5:10], w[..., 10:]):
        products = block.mT @ block
        close(products - torch.diag_embed(products.diagonal(dim1=-2, dim2=-1)), torch.zeros_like(products), 1e-5)
    assert torch.equal(w[7], directions(torch.tensor(7), width, count)) and not torch.equal(w[7], w[8])
    draws = w.double().transpose(-2, -1).flatten(0, 1)
    assert abs(draws.square().sum(-1).mean() - width) < 0.1 and draws.mean(0).abs().max() < 0.03
    close(draws.T @ draws / len(draws), torch.eye(width, dtype=torch.float64), 0.05)
    assert abs((draws**4).mean() - 3) < 0.1  # of a normal


def test_the_error_falls_as_one_over_the_root_of_the_features() -> None:
    """Of attention by random features against exact attention, over draws side by side; queries and keys so small that few features are a good beginning."""
    time, width, draws, counts = 20, 32, 24, [16, 64, 256, 1024]
    q, k, v = (scale * randn(1, time, 1, width, seed=i) for i, scale in enumerate((0.3, 0.3, 1)))
    exact, errors = attend(q, k, v), []
    q, k, v = (y.expand(draws, -1, -1, -1, -1) for y in (q, k, v))
    for count in counts:
        features = RandomFeatures(width, count).double()
        features.weight = directions(torch.arange(draws), width, count).double()[:, None, None]
        y, _ = linear_attention(features.queries(q), features.keys(k), v)
        errors.append((y - exact).square().mean().sqrt().item())
    slope = np.polyfit(np.log(counts), np.log(errors), 1)[0]
    assert -0.55 < slope < -0.45, errors


def test_what_keeps_performer_finite_cancels(monkeypatch: pytest.MonkeyPatch) -> None:
    x, mixer = randn(B, 15, 8), made("performer")
    expected, _ = mixer(x, Context())
    monkeypatch.setattr(performer_module, "LARGEST", -30.0)
    other = made("performer")
    assert other.features.excess > 25
    close(other(x, Context())[0], expected, 1e-10)
    mixer = made("performer", replace(CONFIG, width=1024, num_heads=2, features=64)).float()  # |w|^2 / 2 is about 256
    assert mixer.features.excess > 150
    y, _ = mixer(randn(1, 15, 1024).float(), Context())
    assert y.isfinite().all()


def test_the_future_is_no_matter_how_large() -> None:
    """A key that comes later, far beyond the others, changes nothing before it by one bit: its like must not be in what they are divided by."""
    for name in NAMES:
        mixer, x = made(name).float(), randn(1, LENGTH, 8).float()
        far = x.clone()
        far[:, -1] *= 1e4
        assert torch.equal(mixer(x, Context())[0][:, :-1], mixer(far, Context())[0][:, :-1]), name


def test_random_features_are_no_parameters() -> None:
    """The same in every fleet and whenever they are made, and not saved."""
    one, fleet = mixers.build("performer", CONFIG), mixers.build("performer", CONFIG, (R,))
    assert not any("features" in name for name in (*one.state_dict(), *dict(fleet.named_parameters())))
    (a,), (b,) = one.buffers(), fleet.buffers()
    assert a.shape == (K, N) and torch.equal(a, b)
    with torch.device("meta"):
        assert mixers.build("performer", CONFIG).flops(1, 10, 10) == one.flops(1, 10, 10)


def test_rotary_positions_turn_what_performer_compares() -> None:
    mixer, plain, x = made("performer", replace(CONFIG, positions="rotary")), made("performer"), randn(B, 9, 8)
    q, k, v = (layer(x).unflatten(-1, (H, K)) for layer in (plain.query, plain.key, plain.value))
    q, k = (rotate(y, rotary(torch.arange(9), y.shape[-1], 10_000)) for y in (q, k))
    expected, _ = linear_attention(plain.features.queries(q), plain.features.keys(k), v)
    close(mixer(x, Context())[0], plain.out(expected.flatten(-2)))


# --- weighted means


@pytest.mark.parametrize("time", [1, 8, 9, 64, 65, 200])
@pytest.mark.parametrize("groups", [1, 3])
def test_running_mean(time: int, groups: int) -> None:
    logs, x = (6 * randn(R, time, groups)).requires_grad_(), randn(R, time, 3, seed=2).requires_grad_()
    total, mean = running_mean(logs, x)
    expected = (logs.exp() * x).cumsum(-2) / logs.exp().cumsum(-2)
    close(total, logs.logcumsumexp(-2), 1e-11)
    close(mean, expected, 1e-11)
    for got, slope in zip(*(torch.autograd.grad((z * x.detach().cos()).sum(), [logs, x]) for z in (mean, expected)), strict=True):
        close(got, slope, 1e-10)
    close(whole_mean(logs, x)[1], mean[:, -1:], 1e-11)
    cut = time // 2
    if cut:
        first, rest = running_mean(logs[:, :cut], x[:, :cut]), running_mean(logs[:, cut:], x[:, cut:])
        for got, whole in zip(merged((first[0][:, -1:], first[1][:, -1:]), rest), (total, mean), strict=True):
            close(got, whole[:, cut:], 1e-11)


@pytest.mark.parametrize("groups", [1, 2])
def test_running_mean_of_any_weights(groups: int) -> None:
    """In float32, over thousands of orders of magnitude, rising and falling; and where nothing counts yet, 0."""
    for order in (1, -1):
        logs = order * torch.linspace(-4000, 4000, 150).view(-1, 1).expand(-1, groups).clone()
        logs[:20] = FLOOR
        logs.requires_grad_()
        x = randn(150, 2).float() * (torch.arange(150) >= 20).unsqueeze(-1)
        _, mean = running_mean(logs, x)
        expected = running_mean(logs.detach().double(), x.double())[1]
        close(mean, expected.float(), 1e-4)
        assert (mean[:20] == 0).all()
        close(mean[20:], x[20:] if order > 0 else x[20].expand(130, -1), 1e-5)  # the heaviest so far: the newest, or the first
        (slope,) = torch.autograd.grad(mean.sum(), logs)
        assert slope.isfinite().all()


@pytest.mark.parametrize("groups", [1, 3])
def test_paired_mean_in_float32(groups: int) -> None:
    """Keys over hundreds of orders of magnitude, weights by place over ten: every row as in float64."""
    k, v, pair = 300 * randn(R, 75, groups), randn(R, 75, 3, seed=2), 8 * randn(75, 75, seed=3)
    scores = (k.unsqueeze(-3) + pair.unsqueeze(-1)).masked_fill(torch.ones(75, 75, dtype=torch.bool).triu(1).unsqueeze(-1), -torch.inf)
    expected = (scores.softmax(-2) * v.unsqueeze(-3)).sum(-2)
    total, mean = paired_mean(k.float(), v.float(), pair.float())
    close(mean.double(), expected, 2e-3)  # weights exp(1000 + small): the small part has so many digits
    close(total.double(), scores.logsumexp(-2), 1e-5)
    total, mean = paired_mean(k, v, pair)
    close(mean, expected, 1e-10)
    close(earlier_mean(k, v, pair[-1:])[1], expected[:, -1:], 1e-10)


def test_by_distance() -> None:
    weights = randn(R, 4).requires_grad_()
    for time in (1, 3, 4, 5, 11):
        expected = torch.stack([torch.stack([weights[:, t - s] if 0 <= t - s < 4 else torch.zeros(R) for s in range(time)], -1) for t in range(time)], -2)
        assert torch.equal(by_distance(weights, time), expected)


def test_aft_beyond_its_positions() -> None:
    for name in ("aft_full", "aft_local"):
        with pytest.raises(ConfigError, match=r"model\.mixers: .*40 positions.*not for 41; use aft_simple"):
            made(name)(randn(1, LENGTH + 1, 8), Context())
    runs = [RunConfig(model=DecoderConfig(mixers=(name,), positions="none")) for name in ("aft_full", "aft_simple", "linear")]
    reaches = [reach(cast(Any, SimpleNamespace(config=run, task=SimpleNamespace(max_length=9)))) for run in runs]
    assert reaches == [9, None, None]


def test_beginning() -> None:
    """w near 0, by seed."""
    mixer: Any = mixers.build("aft_full", CONFIG, (4,), 200)
    initialise(mixer, [*mixer.init_rules(), ("*", Constant(0.0))], torch.arange(4))
    pair = mixer.pair_query @ mixer.pair_key.mT
    assert abs(pair.std() / PAIR_STD - 1) < 0.1 and not torch.equal(pair[0], pair[1])


@pytest.mark.parametrize("field", ["window", "features"])
def test_sizes_of_nothing_are_refused(field: str) -> None:
    with pytest.raises(ConfigError, match=f"{field}: must be 1 or more, not 0"):
        DecoderConfig(**cast(Any, {field: 0}))
