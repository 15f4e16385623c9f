"""The head's cross-entropy without logits: every form against PyTorch's on logits written out, in values, gradients, memory, compilation, a whole fleet."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from laws import R, close, generator, model_cases
from laws_training import FLEETS, law_objective_run_axis, law_objective_sums, law_objective_weights
from torch import Tensor
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from shoal.config.fields import ConfigError
from shoal.nn import linear_cross_entropy as fused
from shoal.nn.linear_cross_entropy import PLACES, Form, _packed_argmax, linear_cross_entropy
from shoal.train import objectives
from shoal.train.fleet import Fleet

LEADS: list[tuple[int, ...]] = [(3,), (1,), ()]
CUTS = [(512, 1 << 19, 32, 1), (4, 24, 2, 8), (3, 7, 4, 64)]  # everything at once; tiles that divide neither rows nor tokens; tokens filled up


@pytest.fixture(params=CUTS, ids=str)
def cut(request: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    rows, numbers, group, aligned = request.param
    monkeypatch.setitem(fused.ALIGNED, "cpu", aligned)
    monkeypatch.setitem(fused.TILES, "cpu", (rows, numbers))
    monkeypatch.setattr(fused, "GROUP", group)


def inputs_of(
    lead: tuple[int, ...], *, tied: bool = False, bias: bool = True, shared: bool = False, dtype: torch.dtype = torch.float64, tokens: int = 11
) -> tuple[list[Tensor], Tensor]:
    """hidden, weight and perhaps bias; targets."""
    g = generator(3)
    own = () if shared else lead

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64).to(dtype)

    weight = draw(*own, tokens, 5).mT if tied else draw(*own, 5, tokens)
    found = [draw(*lead, 2, 7, 5), weight, *([draw(*own, tokens)] if bias else [])]
    return [x.requires_grad_() for x in found], torch.randint(tokens, (*lead, 2, 7), generator=g)


def fuse(inputs: Sequence[Tensor], targets: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
    """``inputs``: hidden, weight and perhaps bias."""
    return linear_cross_entropy(inputs[0], inputs[1], inputs[2] if len(inputs) > 2 else None, targets, **options)


def everything(form: Form, inputs: list[Tensor], targets: Tensor, softcap: float = 0.0) -> list[Tensor]:
    """nll, best and the gradients of all inputs, every row with a factor of its own, some 0."""
    nll, best = fuse(inputs, targets, softcap=softcap, form=form)
    factors = torch.randn(nll.shape, generator=generator(4), dtype=torch.float64).relu().to(nll.dtype)
    return [nll, best, *torch.autograd.grad(nll, inputs, factors)]


def written_out(inputs: list[Tensor], targets: Tensor, softcap: float = 0.0) -> list[Tensor]:
    """The same, run by run, by PyTorch."""
    hidden, weight, *bias = inputs
    logits = torch.einsum("...bsd,...dv->...bsv", hidden, weight)
    logits = logits + (bias[0] if bias[0].dim() == 1 else bias[0][:, None, None]) if bias else logits
    logits = softcap * torch.tanh(logits / softcap) if softcap else logits
    nll = -logits.log_softmax(-1).gather(-1, targets.unsqueeze(-1)).squeeze(-1)
    factors = torch.randn(nll.shape, generator=generator(4), dtype=torch.float64).relu()
    return [nll, logits.argmax(-1), *torch.autograd.grad(nll, inputs, factors)]


@pytest.mark.usefixtures("cut")
@pytest.mark.parametrize("lead", LEADS, ids=str)
@pytest.mark.parametrize("form", ["auto", "reference", "chunked"])
def test_equals_logits_written_out(form: Form, lead: tuple[int, ...]) -> None:
    for tied, bias, shared, softcap in itertools.product((False, True), (False, True), (False, True), (0.0, 1.5)):
        inputs, targets = inputs_of(lead, tied=tied, bias=bias, shared=shared)
        for got, expected in zip(everything(form, inputs, targets, softcap), written_out(inputs, targets, softcap), strict=True):
            assert got.shape == expected.shape and got.dtype == expected.dtype
            close(got, expected, 1e-12)


@pytest.mark.parametrize("form", ["reference", "chunked"])
def test_gradcheck(form: Form, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(fused.TILES, "cpu", (4, 24))
    monkeypatch.setattr(fused, "GROUP", 2)
    for softcap in (0.0, 1.5):
        (hidden, *inputs), targets = inputs_of((2,))
        few = hidden.detach()[:, :1, :3].requires_grad_()
        assert torch.autograd.gradcheck(lambda *x, c=softcap, t=targets[:, :1, :3]: fuse(x, t, softcap=c, form=form)[0], (few, *inputs))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_narrow_types(dtype: torch.dtype) -> None:
    """Beside the same numbers in float64; nll is float32, gradients are of the inputs' own types."""
    inputs, targets = inputs_of((2,), dtype=dtype, tokens=5000)
    expected = written_out([x.detach().double().requires_grad_() for x in inputs], targets)
    got = everything("chunked", inputs, targets)
    assert [x.dtype for x in got] == [torch.float32, torch.int64, dtype, dtype, dtype]
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    for a, b in zip([got[0], *got[2:]], [expected[0], *expected[2:]], strict=True):
        assert (a.double() - b).norm() <= tolerance * b.norm()
    assert (got[1] == expected[1]).double().mean() >= (1 if dtype == torch.float32 else 0.5)


@pytest.mark.usefixtures("cut")
def test_run_axis() -> None:
    """Run r of a fleet is the run alone; one that is not finite stays so alone."""
    inputs, targets = inputs_of((3,))
    whole = everything("chunked", inputs, targets)
    with torch.no_grad():
        inputs[1][1, 0, 3] = torch.nan
    nll, _ = fuse(inputs, targets, form="chunked")
    for r in range(3):
        alone, best = fuse([x[r] for x in inputs], targets[r], form="chunked")
        if r != 1:
            close(alone, nll[r], 1e-12)
            close(alone, whole[0][r], 1e-12)
            assert best.equal(whole[1][r])
        else:
            assert nll[r].isnan().all()


@pytest.mark.usefixtures("cut")
@pytest.mark.parametrize("form", ["reference", "chunked"])
def test_equal_and_extreme_logits(form: Form) -> None:
    """The first of the most probable; nothing overflows."""
    hidden = torch.ones(1, 1, 1, 1)
    for values, best, losses in [
        ([2.0, 5.0, 1.0, 5.0, 5.0], 1, {0: 3 + 1.0986 + 0.0222}),
        ([-3e4, -3e4, -3e4], 0, {2: 1.0986}),
        ([3e4, 0.0, -3e4, 3e4], 0, {0: 0.6931, 1: 3e4 + 0.6931, 2: 6e4 + 0.6931}),
    ]:
        for target, loss in losses.items():
            nll, got = linear_cross_entropy(hidden, torch.tensor([[values]]), None, torch.full((1, 1, 1), target), form=form)
            assert nll.item() == pytest.approx(loss, rel=1e-4) and got.item() == best


def test_the_place_of_the_largest_packed_into_one_integer() -> None:
    for scale in (1e-30, 1.0, 5.0, 1e30):
        x = (torch.randn(50, 5000, generator=generator(3)) * scale).bfloat16().float()  # of so many, several are equal
        x[:, 4900:] = -torch.inf
        assert torch.equal(_packed_argmax(x), x.argmax(-1))
    x = torch.full((2, 9), -torch.inf)
    x[1] = torch.tensor([-2.0, -1.0, -1.0, -3.0, -1.0, -2.0, -4.0, -5.0, -1.0])
    assert _packed_argmax(x).tolist() == [0, 1]
    full = torch.zeros(1, PLACES)
    full[0, -1] = 1.0
    assert _packed_argmax(full).item() == PLACES - 1 and _packed_argmax(full.flip(-1)).item() == 0


def test_what_needs_no_gradient() -> None:
    """A frozen table gets none, and takes none away from the hidden states; without any the values are the same."""
    inputs, targets = inputs_of((2,), bias=False)
    expected = everything("chunked", inputs, targets)
    hidden, weight = inputs[0], inputs[1].detach()
    nll, best = linear_cross_entropy(hidden, weight, None, targets, form="chunked")
    factors = torch.randn(nll.shape, generator=generator(4), dtype=torch.float64).relu()
    with FlopCounterMode(display=False) as counter:
        assert torch.autograd.grad(nll, hidden, factors)[0].equal(expected[2])
    assert counter.get_total_flops() == 0 and nll.requires_grad and not best.requires_grad
    with torch.no_grad():
        assert fuse(inputs, targets, form="chunked")[0].equal(expected[0])


def test_memory() -> None:
    """No tensor has more numbers than a tile, or the inputs."""
    hidden, weight = torch.randn(2, 1, 300, 4, requires_grad=True), torch.randn(2, 4, 20_000, requires_grad=True)
    with torch.profiler.profile(record_shapes=True, acc_events=True) as profile:
        nll, _ = linear_cross_entropy(hidden, weight, None, torch.zeros(2, 1, 300, dtype=torch.int64))
        nll.sum().backward()
    sizes = [math.prod(shape) for event in profile.events() or () for shape in event.input_shapes if all(isinstance(n, int) for n in shape)]
    assert max(sizes) <= fused.TILES["cpu"][1] < 2 * 300 * 20_000 / 20


def test_compiles() -> None:
    torch.compiler.reset()
    for tied in (False, True):
        inputs, targets = inputs_of((2,), tied=tied, dtype=torch.float32)
        compiled: Any = torch.compile(lambda x, t=targets: fuse(x, t, softcap=2.0, form="chunked"), fullgraph=True, backend="aot_eager")
        nll, best = compiled(inputs)
        expected = everything("chunked", inputs, targets, 2.0)
        factors = torch.randn(nll.shape, generator=generator(4), dtype=torch.float64).relu().float()
        for a, b in zip([nll, best, *torch.autograd.grad(nll, inputs, factors)], expected, strict=True):
            assert a.equal(b)


def test_flops() -> None:
    """As of logits written out: what is computed twice is counted once."""
    inputs, targets = inputs_of((3,), bias=False)
    counts = []
    for form in ("reference", "chunked"):
        with FlopCounterMode(display=False) as counter:
            fuse(inputs, targets, form=form)[0].sum().backward()
        counts.append(counter.get_total_flops())
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        fuse(inputs, targets, form="chunked")
    logits = 2 * 3 * 14 * 5 * 11
    assert [*counts, counter.get_total_flops()] == [3 * logits, 3 * logits, logits]


def test_only_where_it_runs() -> None:
    inputs, targets = inputs_of((2,), dtype=torch.float32)
    with pytest.raises(ConfigError, match=r"form: .*chunked"):
        fuse(inputs, targets, form="triton")


@pytest.mark.parametrize("name", model_cases())
def test_heads_of_models(name: str) -> None:
    """Where a model names its head, that is how its logits come about."""
    case = model_cases()[name]
    cases = [case, replace(case, config=replace(case.config, softcap=0.7))] if name.startswith("DecoderConfig") else [case]
    for case in cases:
        fleet = case.fleet()
        for model in (fleet, case.one(fleet, 0)):
            if (head := model.linear_head()) is not None:
                weight, bias, softcap = head
                hidden = torch.randn(*((R,) if model is fleet else ()), 2, 3, weight.shape[-2], generator=generator(5), dtype=torch.float64)
                logits, targets = model.logits(hidden), torch.randint(weight.shape[-1], hidden.shape[:-1], generator=generator(6))
                nll, best = linear_cross_entropy(hidden, weight, bias, targets, softcap, "chunked")
                close(nll, F.cross_entropy(logits.flatten(0, -2), targets.flatten(), reduction="none").view(nll.shape), 1e-9)
                assert best.equal(logits.argmax(-1))


@pytest.fixture
def always(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(objectives, "LARGE_VOCABULARY", 1)
    monkeypatch.setattr(fused, "CROWDED", 0)


@pytest.mark.usefixtures("always")
@pytest.mark.parametrize("law", [law_objective_run_axis, law_objective_sums, law_objective_weights])
def test_laws_of_the_objective(law: Any) -> None:
    law("cross_entropy")


@pytest.mark.parametrize("name", ["modular", "mlp"])
def test_a_fleet_trains_as_with_logits(name: str, request: pytest.FixtureRequest) -> None:
    """Ten steps with all logits, ten without; an evaluation then leaves out what needs them."""
    runs = [replace(run, steps=10) for run in FLEETS[name][:2]]

    def trained() -> tuple[Tensor, dict[str, Tensor]]:
        fleet = Fleet.build(runs)
        fleet.advance(10)
        return fleet.flat, fleet.evaluate("train")

    (plain, expected), _ = trained(), request.getfixturevalue("always")
    parameters, got = trained()
    close(parameters, plain, 1e-5)
    assert expected.keys() - got.keys() == {"zero_loss", "collapse"}
    for metric, value in got.items():
        close(value, expected[metric], 1e-5)
