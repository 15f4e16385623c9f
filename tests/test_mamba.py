"""Mamba beside two independent implementations, value by value and gradient by gradient; its initialisation, cache and training."""

from __future__ import annotations

import logging
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from laws import close, filled, generator
from laws_training import MEMORIZE, finished
from torch.nn import functional as F
from torch.utils._pytree import tree_leaves

from shoal import cli, verify
from shoal.config import DecoderConfig
from shoal.config.fields import ConfigError
from shoal.config.load import to_yaml
from shoal.contracts import Context
from shoal.mixers.mamba import Mamba
from shoal.nn import Constant, initialise
from shoal.train.fleet import Fleet
from shoal.train.plan import validate

EVERYTHING = Context()
CONFIGS = [
    DecoderConfig(width=24, state_size=8),
    DecoderConfig(width=16, num_heads=1, state_size=1, bias=False),
    DecoderConfig(width=40, num_heads=1, state_size=16, expand=1, convolution=2),
]


def theirs(library: str, config: DecoderConfig) -> Any:
    pytest.importorskip(library)
    logging.disable(logging.WARNING)  # of kernels that are not installed
    try:
        return verify.OTHERS[library](config)
    finally:
        logging.disable(logging.NOTSET)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("library", verify.OTHERS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_equals(library: str, config: DecoderConfig, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Output, gradient of the input, gradients of every parameter."""
    other = theirs(library, config)
    if dtype == torch.float64:  # they compute A in float32, whatever the rest is in
        monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
    assert verify.compare(other, config, dtype) < (1e-10 if dtype == torch.float64 else 1e-5)


@pytest.mark.filterwarnings("ignore")
def test_padding_equals_transformers() -> None:
    """Left padding: they zero what is there; what comes after is the same."""
    config, time = CONFIGS[0], 9
    other, ours = theirs("transformers", config), Mamba(config)
    for i, parameter in enumerate(other.parameters()):
        torch.nn.init.normal_(parameter, std=0.3, generator=generator(i))
    ours.load_state_dict(verify.from_upstream(dict(other.named_parameters())))
    x, mask = torch.randn(2, time, config.width, generator=generator(1)), torch.arange(time) >= torch.tensor([[0], [4]])
    with torch.no_grad():
        expected = other(x[1:, 4:])
        got, _ = ours(x, Context(mask=mask))
    close(got[1:, 4:], expected, 1e-5)


def test_begins_as_upstream() -> None:
    config = DecoderConfig(width=64, expand=2, state_size=16)
    mixer, seeds = Mamba(config, (2,)), torch.tensor([3, 4])
    initialise(mixer, [*mixer.init_rules(), ("*", Constant(0.0))], seeds)
    close(mixer.A_log.exp(), torch.arange(1.0, 17).expand(2, 128, 16), 1e-6)
    assert (mixer.D == 1).all()
    assert mixer.step.bias is not None
    step = F.softplus(mixer.step.bias)
    assert 1e-3 * 0.999 <= step.min() < 1.5e-3 and 0.07 < step.max() <= 0.1 * 1.001
    logs = (step.log() - math.log(1e-3)) / math.log(100)  # uniform: its mean is 1/2, with a standard error of 0.018 here
    assert abs(logs.mean() - 0.5) < 0.08 and not step[0].equal(step[1])
    for parameter, bound in ((mixer.step.weight, 4**-0.5), (mixer.convolution_weight, 4**-0.5), (mixer.convolution_bias, 4**-0.5)):
        assert 0.95 * bound < parameter.abs().max() <= bound
    assert set(mixer.undecayed()) == {"A_log", "D"}


@pytest.mark.parametrize("form", ["reference", "sequential", "auto"])
def test_forms_of_the_scan(form: Any) -> None:
    config = replace(CONFIGS[0], scan="sequential")
    x, context = torch.randn(2, 3, 12, 24, generator=generator(1), dtype=torch.float64), Context(at=slice(-2, None))
    close(filled(Mamba(replace(config, scan=form), (2,)))(x, context)[0], filled(Mamba(config, (2,)))(x, context)[0], 1e-12)


def test_cache_does_not_grow() -> None:
    mixer = filled(Mamba(CONFIGS[0])).float()
    cache = mixer.init_cache(3, 10)
    sizes = [x.nbytes for x in tree_leaves(cache)]
    with torch.no_grad():
        for t in (1, 50, 1):
            _, cache = mixer(torch.randn(3, t, 24, generator=generator(t)), EVERYTHING, cache)
            assert [x.nbytes for x in tree_leaves(cache)] == sizes == [x.nbytes for x in tree_leaves(mixer.init_cache(3, 100_000))]
    assert sum(sizes) == 3 * mixer.state_bytes(10)


def test_bfloat16() -> None:
    mixer, x = filled(Mamba(CONFIGS[0], (2,))), torch.randn(2, 3, 12, 24, generator=generator(1), dtype=torch.float64)
    expected, _ = mixer(x, EVERYTHING)
    got, cache = mixer.bfloat16()(x.bfloat16(), EVERYTHING, mixer.init_cache(3, 12))
    assert got.dtype == torch.bfloat16 and cache.state.dtype == torch.float32
    assert (got.double() - expected).abs().max() < 0.03 * expected.abs().max()


def test_learns_in_a_hybrid() -> None:
    """Mamba, then attention, without positions: strings by heart, in a fleet of two learning rates."""
    config = replace(MEMORIZE, model=replace(MEMORIZE.model, mixers=("mamba", "attention"), num_layers=2, positions="none", dropout=0.0), steps=60, clip=1.0)
    runs = [replace(config, optimizer=replace(config.optimizer, lr=lr)) for lr in (1e-2, 5e-3)]  # pyright: ignore[reportCallIssue, reportArgumentType]
    _, found = finished(Fleet.build(runs))
    for r in range(2):
        losses = [value for (run, _, name), value in sorted(found.items()) if (run, name) == (r, "batch/loss")]
        assert losses[-1] < 0.3 * losses[0]


def test_triton_is_asked_for_on_a_cpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Found before a file is made; on a GPU it is no error."""
    config = replace(MEMORIZE, model=replace(MEMORIZE.model, mixers=("mamba",), scan="triton"))
    monkeypatch.chdir(tmp_path)
    Path("run.yaml").write_text(to_yaml(config))
    assert cli.main(["train", "run.yaml", "--device", "cpu"]) == 2
    said = capsys.readouterr().err
    assert 'model.scan: the triton scan runs on a GPU only; set it to "auto"' in said and said.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["run.yaml"]
    validate(config, "cuda")
    with pytest.raises(ConfigError, match=r"model\.scan"):
        Fleet.build([config]).advance(1)
