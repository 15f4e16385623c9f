"""The recurrent mixers beside torch.nn's RNN, GRU and LSTM with the same weights: values, states and every gradient, in float64; what the loop promises."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from laws import close, filled, generator, same
from laws_training import MEMORIZE, finished
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from shoal.config import DecoderConfig
from shoal.contracts import Context
from shoal.mixers.recurrent import Recurrent
from shoal.nn import initialise
from shoal.nn.recurrence import GATES, recurrence
from shoal.train.fleet import Fleet

R, B, D = 3, 4, 6
CONFIG = DecoderConfig(width=D, num_heads=1)
THEIRS = {"rnn": nn.RNN, "gru": nn.GRU, "lstm": nn.LSTM}
ORDER = {"rnn": [0], "gru": [0, 1, 2], "lstm": [1, 2, 0, 3]}  # of our gates, where torch's lie
KINDS: Any = pytest.mark.parametrize("kind", THEIRS)


def randn(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, generator=generator(seed), dtype=torch.float64)


def as_torch(kind: str, name: str, x: Tensor) -> tuple[str, Tensor]:
    """Our parameter of one run, or its gradient, named and laid out as torch's: gates by rows, [G D, D], in its own order."""
    layer, what = name.split(".")
    rows = torch.cat([x.mT.unflatten(0, (-1, D))[i] if x.dim() == 2 else x.unflatten(0, (-1, D))[i] for i in ORDER[kind]])
    return f"{what}_{ {'input': 'ih', 'state': 'hh'}[layer] }_l0", rows


def twin(kind: str, mixer: nn.Module, r: int | None) -> Any:
    """torch's module with the weights of run r."""
    named = dict(as_torch(kind, name, p.detach() if r is None else p.detach()[r]) for name, p in mixer.named_parameters())
    other = THEIRS[kind](D, D, batch_first=True, bias="bias_ih_l0" in named).double()
    other.load_state_dict(named)
    return other


@KINDS
@pytest.mark.parametrize("time", [1, 7, 40])
@pytest.mark.parametrize(("lead", "bias", "begun"), [((R,), True, False), ((R,), False, True), ((1,), True, True), ((), True, False), ((), False, True)])
def test_equals_torch(kind: Any, time: int, lead: tuple[int, ...], bias: bool, begun: bool) -> None:
    """From nothing, and from a state; the gradient also of the last state."""
    mixer = filled(Recurrent(kind, DecoderConfig(width=D, num_heads=1, bias=bias), lead))
    x, first = randn(*lead, B, time, D).requires_grad_(), [randn(*lead, B, D, seed=s).requires_grad_() for s in range(2, 4 if kind == "lstm" else 3)]
    y, last = mixer(x, Context(), tuple(first) if begun else mixer.init_cache(B, time))
    outgoing = [randn(*z.shape, seed=10 + i) for i, z in enumerate((y, *last))]
    given = [x, *(first if begun else [])]
    names, parameters = zip(*mixer.named_parameters(), strict=True)
    found = torch.autograd.grad([y, *last], [*given, *parameters], outgoing)
    for r in range(lead[0]) if lead else [None]:
        other, pick = twin(kind, mixer, r), slice(None) if r is None else r
        theirs = [z.detach()[pick].requires_grad_() for z in given]
        state = tuple(z.unsqueeze(0) for z in theirs[1:]) if begun else tuple(torch.zeros(1, B, D, dtype=x.dtype) for _ in first)
        expected, after = other(theirs[0], state if kind == "lstm" else state[0])
        after = [z[0] for z in (after if kind == "lstm" else (after,))]
        for got, of in zip((y, *last), (expected, *after), strict=True):
            close(got[pick], of, 1e-10)
        other_names, others = zip(*other.named_parameters(), strict=True)
        slopes = torch.autograd.grad([expected, *after], [*theirs, *others], [z[pick] for z in outgoing])
        for got, of in zip(found[: len(given)], slopes, strict=False):
            close(got[pick], of, 1e-10)
        named = dict(zip(other_names, slopes[len(given) :], strict=True))
        for name, got in zip(names, found[len(given) :], strict=True):
            key, laid = as_torch(kind, name, got[pick])
            close(laid, named[key], 1e-10)


@KINDS
def test_a_hole_is_no_time(kind: Any) -> None:
    """Padding inside a sequence, not only around it: state, output and gradients as if it were cut out."""
    mixer, x = filled(Recurrent(kind, CONFIG, (R,))), randn(R, B, 9, D)
    mask = torch.ones(R, B, 9, dtype=torch.bool)
    mask[..., 3:6] = False
    real, wide = [0, 1, 2, 6, 7, 8], (x * 1e6).where(~mask[..., None], x).requires_grad_()
    y, last = mixer(wide, Context(mask=mask), mixer.init_cache(B, 9))
    z, end = mixer(x[:, :, real], Context(), mixer.init_cache(B, 9))
    close(y[:, :, real], z, 1e-12)
    assert all(torch.allclose(a, b, rtol=1e-12) for a, b in zip(last, end, strict=True))
    parameters, outgoing = list(mixer.parameters()), randn(*z.shape, seed=3)
    got = torch.autograd.grad(y[:, :, real], [wide, *parameters], outgoing)
    for a, b in zip(got[1:], torch.autograd.grad(z, parameters, outgoing), strict=True):
        close(a, b, 1e-10)
    assert (got[0][~mask] == 0).all()


def tensors(kind: Any, time: int = 3, dtype: torch.dtype = torch.float64) -> tuple[list[Tensor], tuple[Tensor, ...], Tensor]:
    """x, weight (and bias), a state, a mask."""
    gates = GATES[kind] * 2
    given = [randn(2, time, 2, gates), randn(2, 2, gates, seed=2), *([randn(2, 2, seed=3)] if kind == "gru" else [])]
    state = tuple(randn(2, 2, 2, seed=s) for s in ((4, 5) if kind == "lstm" else (4,)))
    return [z.to(dtype).requires_grad_() for z in given], tuple(z.requires_grad_() for z in state), torch.rand(2, time, 2, generator=generator(6)) < 0.6


@KINDS
def test_gradients_with_everything(kind: Any) -> None:
    given, state, mask = tensors(kind)

    def flat(*z: Tensor) -> tuple[Tensor, ...]:
        y, last = recurrence(kind, *z[: len(given)], state=z[len(given) :], mask=mask)  # pyright: ignore[reportArgumentType]
        return y, *last

    assert torch.autograd.gradcheck(flat, (*given, *state))


@KINDS
@pytest.mark.filterwarnings("ignore")
def test_compiles_as_one_graph(kind: Any) -> None:
    """Loops that are one operation: its shapes, strides and gradients are what the compiler is told."""
    mixer, x = filled(Recurrent(kind, CONFIG, (R,))), randn(R, B, 5, D).requires_grad_()
    context = Context(mask=torch.rand(R, B, 5, generator=generator(2)) < 0.8, at=slice(-2, None))
    compiled = torch.compile(mixer, fullgraph=True, backend="aot_eager", dynamic=False)
    for told in (context, Context()):
        results = []
        for form in (mixer, compiled):
            y, _ = form(x, told)
            results.append([y, *torch.autograd.grad(y.square().sum(), [x, *mixer.parameters()])])
        assert all(same(a, b) for a, b in zip(*results, strict=True))


@KINDS
@pytest.mark.filterwarnings("ignore")
def test_operations_are_what_they_say(kind: Any) -> None:
    (x, weight, *bias), state, mask = tensors(kind)
    arguments = (kind, x, weight, bias[0] if bias else None, state[0], state[1] if kind == "lstm" else None, mask)
    torch.library.opcheck(torch.ops.shoal.recurrence.default, arguments)


@KINDS
def test_mates_do_not_touch(kind: Any) -> None:
    mixer, x = filled(Recurrent(kind, CONFIG, (R,))), randn(R, B, 5, D)
    outputs = []
    for bad in (False, True):
        x[1] = math.nan if bad else 0.5
        y, _ = mixer(x, Context())
        outputs.append([y, *torch.autograd.grad(y.sum(), list(mixer.parameters()))])
    for a, b in zip(*outputs, strict=True):
        assert same(a[0], b[0]) and same(a[2], b[2]) and b[1].isnan().any()


@KINDS
def test_cache_does_not_grow(kind: Any) -> None:
    mixer = filled(Recurrent(kind, CONFIG)).float()
    cache = mixer.init_cache(3, 10)
    sizes = [z.nbytes for z in tree_leaves(cache)]
    with torch.no_grad():
        for t in (1, 50, 1):
            _, cache = mixer(torch.randn(3, t, D, generator=generator(t)), Context(), cache)
            assert [z.nbytes for z in tree_leaves(cache)] == sizes == [z.nbytes for z in tree_leaves(mixer.init_cache(3, 100_000))]


@KINDS
def test_begins_as_torch(kind: Any) -> None:
    config, seeds = DecoderConfig(width=40, num_heads=1), torch.tensor([3, 4])
    mixer = Recurrent(kind, config, (2,))
    initialise(mixer, mixer.init_rules(), seeds)
    for parameter in mixer.parameters():  # the mean of |U(-1, 1)| is 1/2; of 40 values its standard error is 0.05
        assert parameter.abs().max() <= 40**-0.5 and abs(parameter.abs().mean() * 40**0.5 - 0.5) < 0.15
        assert not parameter[0].equal(parameter[1])


@KINDS
def test_bfloat16(kind: Any) -> None:
    mixer, x = filled(Recurrent(kind, CONFIG, (2,))), randn(2, B, 12, D).requires_grad_()
    expected, _ = mixer(x, Context())
    (slope,) = torch.autograd.grad(expected.sum(), x)
    mixer, x = mixer.bfloat16(), x.detach().bfloat16().requires_grad_()
    y, cache = mixer(x, Context(), mixer.init_cache(B, 12))
    (got,) = torch.autograd.grad(y.sum(), x)
    assert y.dtype == got.dtype == torch.bfloat16 and [z.dtype for z in cache] == [torch.bfloat16, torch.float32][: len(cache)]
    for a, b in ((y, expected), (got, slope)):
        assert (a.double() - b).norm() < 0.03 * b.norm()


@KINDS
def test_flops_of_a_step_are_three_times_those_forward(kind: Any) -> None:
    mixer, x = filled(Recurrent(kind, CONFIG)), randn(B, 7, D).requires_grad_()
    with FlopCounterMode(display=False) as counter:
        mixer(x, Context())[0].sum().backward()
    assert counter.get_total_flops() == 3 * mixer.flops(B, 7, 7)


def test_learns_without_positions() -> None:
    """Strings by heart, lstm and then gru, in a fleet of two learning rates."""
    model = replace(MEMORIZE.model, mixers=("lstm", "gru"), num_layers=2, positions="none", dropout=0.0)  # pyright: ignore[reportCallIssue]
    config = replace(MEMORIZE, model=model, steps=40, clip=1.0)
    runs = [replace(config, optimizer=replace(config.optimizer, lr=lr)) for lr in (1e-2, 5e-3)]  # pyright: ignore[reportCallIssue, reportArgumentType]
    _, found = finished(Fleet.build(runs))
    for r in range(2):
        losses = [value for (run, _, name), value in sorted(found.items()) if (run, name) == (r, "batch/loss")]
        assert losses[-1] < 0.4 * losses[0]
