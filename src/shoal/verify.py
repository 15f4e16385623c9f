"""Is what is installed right? Every form of the selective scan beside a float64 loop, the mixers beside themselves, and Mamba beside other people's.

    shoal verify

Beside other libraries only where they are: ``pip install transformers mambapy``. The tests compare more, and more closely.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import logging
import math
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from shoal import mixers
from shoal.config import DecoderConfig
from shoal.contracts import Context
from shoal.mixers.mamba import Mamba
from shoal.nn import Normal, initialise, selective_scan
from shoal.nn.scan import Form

EVERYTHING = Context()
RUNS, BATCH = 3, 2
SHAPES = [(20, 7, 5), (33, 32, 16), (1, 8, 4)]  # length, channels, states


class Check(NamedTuple):
    name: str
    error: float  # the largest difference, as a share of the largest value of its tensor
    tolerance: float

    @property
    def ok(self) -> bool:
        return self.error <= self.tolerance  # NaN is not


def checks() -> Iterator[Check]:
    forms: list[tuple[Form, torch.dtype, str, float]] = [("sequential", torch.float64, "cpu", 1e-10), ("sequential", torch.float32, "cpu", 1e-5)]
    if torch.cuda.is_available():
        forms.extend([("triton", torch.float32, "cuda", 1e-5), ("triton", torch.bfloat16, "cuda", 2e-2)])
    for form, dtype, device, tolerance in forms:
        yield Check(f"scan, {form}, {str(dtype).removeprefix('torch.')}: values and gradients", _scan_error(form, dtype, device), tolerance)
    yield Check("scan, sequential: gradients against finite differences", _slope_error(), 1e-7)
    for name in mixers.MIXERS:
        alone, cached = _mixer_errors(name)
        yield Check(f"{name}: a run in a fleet = the run alone", alone, 1e-10)
        if cached is not None:
            yield Check(f"{name}: token by token = all at once", cached, 1e-10)
    for library, other in OTHERS.items():
        if find_spec(library):
            yield Check(f"mamba: values and gradients of {library}", _other_error(other), 1e-5)


def table(found: list[Check]) -> str:
    width = max(len(check.name) for check in found)
    lines = [f"{check.name:{width}}  {check.error:9.1e}  {check.tolerance:9.0e}  {'ok' if check.ok else 'FAILED'}" for check in found]
    return "\n".join([f"{'':{width}}  {'error':>9}  {'tolerance':>9}", *lines])


def _error(got: list[Tensor], expected: list[Tensor]) -> float:
    shares = [(a.detach().double().cpu() - b.detach()).abs().max() / b.detach().abs().max().clamp(min=1e-30) for a, b in zip(got, expected, strict=True)]
    return torch.stack(shares).max().item()


def _randn(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def _with_gradients(outputs: tuple[Tensor, ...], inputs: list[Tensor]) -> list[Tensor]:
    weights = [_randn(*y.shape, seed=100 + i).to(y) for i, y in enumerate(outputs)]
    return [*outputs, *torch.autograd.grad(outputs, inputs, weights)]


def _scan_inputs(time: int, channels: int, size: int) -> list[Tensor]:
    sequence, projection = (RUNS, BATCH, time, channels), (RUNS, BATCH, time, size)
    shapes = [sequence, sequence, (RUNS, channels, size), projection, projection, (RUNS, channels), (RUNS, BATCH, channels, size)]
    inputs = [_randn(*shape, seed=i) for i, shape in enumerate(shapes)]
    inputs[2] = -inputs[2].exp()
    return inputs


def _scan_error(form: Form, dtype: torch.dtype, device: str) -> float:
    errors = []
    for shape in SHAPES:
        given = [x.to(dtype) for x in _scan_inputs(*shape)]
        results = []
        places: list[tuple[Form, torch.dtype, str]] = [(form, dtype, device), ("reference", torch.float64, "cpu")]
        for kind, of, on in places:
            inputs = [x.to(on, of).requires_grad_() for x in given]
            results.append(_with_gradients(selective_scan(*inputs, form=kind), inputs))
        errors.append(_error(*results))
    return max(errors)


def _slope_error(step: float = 1e-5) -> float:
    inputs, errors = [x.requires_grad_() for x in _scan_inputs(*SHAPES[0])], []

    def value(moved: list[Tensor]) -> Tensor:
        y, state = selective_scan(*moved, form="sequential")
        return y.square().sum() + state.sin().sum()

    for i, gradient in enumerate(torch.autograd.grad(value(inputs), inputs)):
        direction = _randn(*inputs[i].shape, seed=50 + i)
        with torch.no_grad():
            ahead, behind = (value([*inputs[:i], inputs[i] + sign * step * direction, *inputs[i + 1 :]]) for sign in (1, -1))
        errors.append(_error([(gradient * direction).sum()], [(ahead - behind) / (2 * step)]))
    return max(errors)


def _filled(module: nn.Module, runs: int) -> Any:
    initialise(module, [("*", Normal(0.4))], torch.arange(runs))
    return module.double()


def _mixer_errors(name: str) -> tuple[float, float | None]:
    config = DecoderConfig(width=16, num_heads=2, state_size=4)
    fleet, x = _filled(mixers.build(name, config, (RUNS,), 12), RUNS), _randn(RUNS, BATCH, 12, 16, seed=0)
    whole, _ = fleet(x, EVERYTHING)
    alone = []
    for r in range(RUNS):
        one = mixers.build(name, config, (), 12).double()
        one.load_state_dict({key: value[r] for key, value in fleet.state_dict().items()})
        alone.append(one(x[r], EVERYTHING)[0])
    if name in mixers.LEAKY:
        return _error([torch.stack(alone)], [whole]), None
    cache, pieces = fleet.init_cache(BATCH, 12), []
    for t in range(12):
        y, cache = fleet(x[:, :, t : t + 1], EVERYTHING, cache)
        pieces.append(y)
    return _error([torch.stack(alone)], [whole]), _error([torch.cat(pieces, dim=2)], [whole])


# --- other people's Mamba, whose parameters all have upstream's names


def from_upstream(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Parameters (or their gradients) of one upstream Mamba, named and laid out as those of ``Mamba`` with L = ()."""
    found = {"A_log": tensors["A_log"], "D": tensors["D"], "convolution_weight": tensors["conv1d.weight"][:, 0].mT, "convolution_bias": tensors["conv1d.bias"]}
    found |= {"controls.weight": tensors["x_proj.weight"].mT, "step.weight": tensors["dt_proj.weight"].mT, "step.bias": tensors["dt_proj.bias"]}
    for kind in {"weight", "bias"} & {name.removeprefix("in_proj.") for name in tensors}:
        found[f"input.{kind}"], found[f"gate.{kind}"] = (half.mT if half.dim() == 2 else half for half in tensors[f"in_proj.{kind}"].chunk(2))
        out = tensors[f"out_proj.{kind}"]
        found[f"out.{kind}"] = out.mT if out.dim() == 2 else out
    return found


def transformers_mamba(config: DecoderConfig) -> nn.Module:
    """Of Hugging Face, its loop in PyTorch."""
    module = importlib.import_module("transformers.models.mamba.modeling_mamba")
    theirs = module.MambaConfig(
        hidden_size=config.width, state_size=config.state_size, expand=config.expand, conv_kernel=config.convolution, num_hidden_layers=1, use_bias=config.bias
    )
    return module.MambaMixer(theirs, layer_idx=0)


def mambapy_mamba(config: DecoderConfig) -> nn.Module:
    """mamba.py's, with its parallel scan."""
    module = importlib.import_module("mambapy.mamba")
    theirs = module.MambaConfig(
        d_model=config.width, n_layers=1, d_state=config.state_size, expand_factor=config.expand, d_conv=config.convolution, bias=config.bias
    )
    return module.MambaBlock(theirs)


OTHERS: dict[str, Callable[[DecoderConfig], nn.Module]] = {"transformers": transformers_mamba, "mambapy": mambapy_mamba}


def _other_error(other: Callable[[DecoderConfig], nn.Module]) -> float:
    """All in float32, which is what they compute in."""
    logging.disable(logging.WARNING)  # they regret on standard error that no kernels are installed
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            return compare(other(DecoderConfig(width=24, state_size=8)), DecoderConfig(width=24, state_size=8))
    finally:
        logging.disable(logging.NOTSET)


def compare(theirs: nn.Module, config: DecoderConfig, dtype: torch.dtype = torch.float32, time: int = 21) -> float:
    """The error of our Mamba beside ``theirs``, with the same parameters: output, gradients of the input and of every parameter."""
    theirs, ours = theirs.to(dtype), Mamba(config).to(dtype)
    with torch.no_grad():
        for i, parameter in enumerate(theirs.parameters()):
            parameter.copy_(_randn(*parameter.shape, seed=i) / math.sqrt(parameter.shape[-1] if parameter.dim() == 2 else 4))
    ours.load_state_dict(from_upstream(dict(theirs.named_parameters())))
    x = _randn(BATCH, time, config.width, seed=99).to(dtype).requires_grad_()
    names, parameters = zip(*theirs.named_parameters(), strict=True)
    y, slope, *gradients = _with_gradients((theirs(x),), [x, *parameters])
    expected = {"y": y, "x": slope} | from_upstream(dict(zip(names, gradients, strict=True)))
    names, parameters = zip(*ours.named_parameters(), strict=True)
    got = dict(zip(("y", "x", *names), _with_gradients((ours(x, EVERYTHING)[0],), [x, *parameters]), strict=True))
    assert got.keys() == expected.keys()
    return _error(list(got.values()), [expected[name].double() for name in got])
