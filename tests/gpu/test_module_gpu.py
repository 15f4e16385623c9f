"""A user's module on a GPU: its buffers are there, the captured and the compiled step train as the CPU does, and what fails is explained.

python -m pytest tests/gpu/test_module_gpu.py -m gpu        # a minute and a half on one H100, most of it compiling
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import own_models
import pytest
import torch
from laws_training import MODULAR, OWN, assert_alike, finished

from shoal.config import ModuleConfig, RunConfig, with_seed
from shoal.config.fields import ConfigError
from shoal.studies import driver
from shoal.train.fleet import Fleet

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.filterwarnings("default"),  # compilers warn of themselves
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def eight(name: str, arguments: str = "{}", **changes: object) -> list[RunConfig]:
    config = replace(OWN, model=ModuleConfig(module=f"own_models:{name}", arguments=arguments), steps=40, **changes)
    return [with_seed(config, s) for s in range(8)]


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize(("name", "arguments"), [("Transformer", '{"tied": true}'), ("ByAttention", "{}")])
def test_equals_the_cpu(name: str, arguments: str, compiled: bool) -> None:
    """Captured as a CUDA graph, which a wait for the host would break."""
    runs = eight(name, arguments)
    fleet, got = finished(Fleet.build(runs, "cuda", compile=compiled))
    assert all(x.is_cuda for x in (*fleet.model.buffers(), *fleet.model.parameters()))
    assert all(fleet.layout.view(fleet.flat, n).data_ptr() == p.data_ptr() for n, p in fleet.parameters.items())
    _, expected = finished(Fleet.build(runs))
    assert_alike(got, expected, 1e-3)


def test_bfloat16_compiled() -> None:
    runs = eight("Transformer", precision="bfloat16")
    (_, got), (_, expected) = finished(Fleet.build(runs, "cuda")), finished(Fleet.build(runs, "cuda", compile=False))
    assert_alike(got, expected, 0.03)


@pytest.mark.parametrize(
    ("name", "compiled", "message"),
    [("Broken", "on", "cannot be compiled: .*use --compile off"), ("Upcast", "off", "make what it creates on its input's device")],
)
def test_what_fails_is_explained(name: str, compiled: str, message: str, tmp_path: Path) -> None:
    run = replace(MODULAR, model=ModuleConfig(module=f"own_models:{name}"), steps=4)
    assert name in vars(own_models)
    study = driver._single("mine", "val/loss", run.evaluate, [run], text=False)
    with pytest.raises(ConfigError, match=message):
        driver.run(study, tmp_path / "out", device="cuda", compile=compiled, progress=False)
