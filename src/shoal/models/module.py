"""Your own ``torch.nn.Module`` as a fleet: one copy of its code, every run's weights, ``torch.func.vmap`` over the runs.

The module is written for one run: tokens int64 [B, T] -> logits [B, T, V], or [B, V] for the last position alone. What it must not do (draw random
numbers, look at values, change its buffers, ...) is found by ``shoal.models.trial``, before anything is trained. It knows nothing of padding,
positions or caches, so generation reads the whole text again for every token.

    model = Lifted(ModuleConfig(module="model.py:Net", arguments='{"width": 64}'), vocab_size=99, max_length=4, lead=(8,))
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib
import importlib.util
import json
import sys
import traceback
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from shoal import rng
from shoal.config.fields import ConfigError, check
from shoal.config.models import ModuleConfig
from shoal.contracts import Context
from shoal.nn import Given, select
from shoal.nn.init import Distribution

EVERYTHING = Context()
NOT_THEIRS = (str(Path(torch.__file__).parent), str(Path(__file__).parents[1]), contextlib.__file__, "<frozen")  # code that is not the user's


class Lifted(nn.Module):
    """Parameters [*L, ...] under the user's own names after "module."; its buffers, shared by all runs, beside them."""

    def __init__(self, config: ModuleConfig, vocab_size: int, max_length: int, lead: tuple[int, ...] = ()) -> None:
        super().__init__()
        self.config, self.vocab_size, self.max_length, self.lead = config, vocab_size, max_length, lead
        own = construct(config, vocab_size, max_length, seed=0)
        self._own = (own,)  # in a tuple: as a submodule its parameters would be this model's
        self.module = nn.Module()
        for name, p in own.named_parameters():  # a parameter with two names is there once; functional_call puts it in both places
            place(self.module, name, nn.Parameter(torch.empty((*lead, *p.shape))))
        for name, buffer in own.named_buffers():
            place(self.module, name, nn.Buffer(buffer.clone(), persistent=False))

    def forward(self, tokens: Tensor, context: Context = EVERYTHING, cache: None = None) -> tuple[Tensor, None]:
        """int64 [*L, B, T] -> the logits [*L, B, S, V], and no cache."""
        check(context.mask is None and context.positions is None, "model", "a module of your own cannot be told about padding, and here is some")
        parameters: dict[str, Tensor] = dict(self.module.named_parameters())
        (own,) = self._own
        dtype = next(iter(parameters.values())).dtype
        buffers = {name: x.to(dtype) if x.is_floating_point() else x for name, x in self.module.named_buffers()}  # as module.bfloat16() would

        def one(parameters: dict[str, Tensor], tokens: Tensor) -> Tensor:
            return functional_call(own, (parameters, buffers), (tokens,))

        with sdpa_kernel(SDPBackend.MATH):  # fused kernels end at 65,535 rows and have no batching rule on a CPU
            if self.lead:
                logits = torch.vmap(one, randomness="error")(parameters, tokens)
            else:
                with explained(self.config):
                    logits = one(parameters, tokens)
        return select(logits, context.at) if logits.dim() > tokens.dim() else logits.unsqueeze(-2), None

    def logits(self, hidden: Tensor) -> Tensor:
        return hidden

    def linear_head(self) -> None:
        return None  # what makes the logits is the user's

    def init_cache(self, batch: int, length: int) -> Any:
        return None  # nothing is remembered: every call reads the whole input

    def init_rules(self, configs: Sequence[Any]) -> list[tuple[str, Distribution]]:
        """The module's own: it is made anew for every run, under torch's generator seeded from the run's."""

        @functools.cache
        def made(seed: int) -> dict[str, nn.Parameter]:
            return dict(construct(self.config, self.vocab_size, self.max_length, seed).named_parameters())

        return [("module.*", Given(lambda name, seed: made(seed)[name.removeprefix("module.")]))]

    def undecayed(self) -> list[str]:
        return []

    def hidden_matrices(self) -> list[str]:
        return []  # which of a module's matrices are hidden is for its author to say

    def flops(self, batch: int, time: int, scored: int) -> int:
        """What PyTorch counts in one forward pass: all positions, whatever is scored. Linear in the rows, so one and two of them are counted."""
        own, counts = construct(self.config, self.vocab_size, self.max_length, seed=0), []  # not _own, which may keep something on a GPU
        for num_rows in (1, 2):
            with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH), torch.no_grad():
                own(torch.zeros(num_rows, time, dtype=torch.int64))
            counts.append(counter.get_total_flops())
        return counts[0] + (batch - 1) * (counts[1] - counts[0])


def place(root: nn.Module, name: str, x: nn.Parameter | nn.Buffer) -> None:
    """``x`` under its dotted name, in bare modules made on the way."""
    *path, leaf = name.split(".")
    for part in path:
        inner = dict(root.named_children()).get(part, nn.Module())
        setattr(root, part, inner)
        root = inner
    setattr(root, leaf, x)


# --- the user's code: found, constructed, and where it failed


def construct(config: ModuleConfig, vocab_size: int, max_length: int, seed: int) -> nn.Module:
    """The module on the CPU, as ``torch.manual_seed(int(rng.key(torch.tensor(seed), "init module")))`` before it makes it."""
    own, arguments = locate(config.module), json.loads(config.arguments)
    with seeded(seed):
        try:
            module = own(vocab_size=vocab_size, max_length=max_length, **arguments)
        except Exception as error:
            given = ", ".join(["vocab_size", "max_length", *arguments])
            place = _where(error) if not isinstance(error, TypeError) else ""
            raise ConfigError("model", f"{config.module} cannot be made from {given}{place}: {_first_line(error)}; see model.arguments") from None
    check(isinstance(module, nn.Module), "model", f"{config.module} makes a {type(module).__name__}; it must be a torch.nn.Module")
    return module


@contextlib.contextmanager
def seeded(seed: int) -> Iterator[None]:
    """On the CPU, whatever the default device; torch's own generator there is put back afterwards."""
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        torch.default_generator.manual_seed(int(rng.key(torch.tensor(seed), "init module")))
        yield


def locate(module: str, again: bool = False) -> Any:
    """The class that "package.module:Class" or "file.py:Class" names, from the current directory. ``again``: look whether the file has changed."""
    place, _, name = module.rpartition(":")
    path = Path(place).expanduser().resolve()
    is_file = place.endswith(".py")
    if is_file and (again or path not in _files) and not path.is_file():
        fix = "put it back, or start shoal in the directory its path begins in"
        raise ConfigError("model", f"there is no file {path}, and a module's code is read whenever its runs are trained or loaded; {fix}")
    try:
        with _importable(path.parent if is_file else Path.cwd()):
            found = _executed(path, again) if is_file else importlib.import_module(place)
    except (Exception, SystemExit) as error:
        if isinstance(error, ModuleNotFoundError) and f"{place}.".startswith(f"{error.name}."):
            raise ConfigError("model", f"there is no module {error.name!r} to import from {Path.cwd()}; give the file, as in model.py:{name}") from None
        raise ConfigError("model", f"{place} cannot be imported{_where(error)}: {_first_line(error)}") from None
    own = getattr(found, name, None)
    if own is None and place == "__main__":
        raise ConfigError("model", f"{name} was defined in a notebook or script that is not running now; put it into a file and name it as model.py:{name}")
    check(callable(own), "model", f"{place} has no class {name}")
    return own


_files: dict[Path, tuple[int, ModuleType]] = {}  # those executed so far: when each had been changed, what it defined


def _executed(path: Path, again: bool) -> ModuleType:
    """A file run as a module: once, so that a fleet keeps its code to the end; ``again`` if it has changed since."""
    changed = path.stat().st_mtime_ns if again or path not in _files else _files[path][0]
    if path in _files and _files[path][0] == changed:
        return _files[path][1]
    name = f"shoal_own_{hashlib.sha256(str(path).encode()).hexdigest()[:10]}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses and compilers look a class's module up there
    spec.loader.exec_module(module)
    _files[path] = changed, module
    return module


@contextlib.contextmanager
def _importable(directory: Path) -> Iterator[None]:
    sys.path.insert(0, str(directory))
    try:
        yield
    finally:
        sys.path.remove(str(directory))


# What PyTorch says -> what the module does, what to do about it.
REASONS = {
    ("hit the vmap fallback", "Batching rule not implemented"): (
        "{operation} has no batching rule, so it cannot be run for many runs at once (torch.func.vmap)",
        "write it with other operations",
    ),
    ("dynamic shape", "boolean mask"): (
        "the shape of a tensor depends on values, which differ by run",
        "use torch.where or multiply by a mask in place of nonzero, unique and boolean indices",
    ),
    ("calling .item()", "data-dependent control flow", "Cannot access data pointer", "is not allowed to access the data"): (
        "the value of a tensor is asked for (.item(), .tolist(), .numpy(), if, while), and it differs by run",
        "use torch.where",
    ),
    ("random operation",): ("random numbers are drawn", "set dropout to 0, or remove it"),
    ("inplace", "is not possible because there exists a Tensor"): (
        "a tensor that all runs share is changed in place by values that differ by run",
        "write x = x + y for x += y, and torch.stack what is filled in piece by piece",
    ),
}


def refusal(config: ModuleConfig, error: BaseException, fix: str = "") -> ConfigError:
    """What a module did that cannot be done, where, and what to do."""
    said = str(error)
    for signs, (problem, remedy) in REASONS.items():
        if any(sign in said for sign in signs):
            operation = next((word.partition(".")[0] for word in said.split() if word.startswith("aten::")), "an operation")
            return ConfigError("model", f"{config.module}{_where(error)}: {problem.format(operation=operation)}; {remedy}")
    return ConfigError("model", f"{config.module} fails{_where(error)}: {_first_line(error)}{fix}")


def failed(config: ModuleConfig, error: BaseException) -> ConfigError:
    """Why a module whose trial went well does not train: what only a compiler or a GPU objects to."""
    if type(error).__module__.startswith(("torch._dynamo", "torch._inductor")):
        fix = 'use --compile off (shoal run), or compile="off" (shoal.run)'
        return ConfigError("model", f"{config.module} cannot be compiled: {_first_line(error)}; {fix}")
    return refusal(config, error, "; make what it creates on its input's device (device=tokens.device), without a tensor's value reaching Python")


@contextlib.contextmanager
def explained(config: ModuleConfig, fix: str = "") -> Iterator[None]:
    """An error of the user's code as a ConfigError."""
    try:
        yield
    except (ConfigError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        raise refusal(config, error, fix) from error


def _where(error: BaseException) -> str:
    """ " in model.py, line 12 (x = x * x.sum().item())": the user's innermost line."""
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if not frame.filename.startswith(NOT_THEIRS)]
    return f" in {Path(frames[-1].filename).name}, line {frames[-1].lineno} ({frames[-1].line})" if frames else ""


def _first_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}".rstrip(": ")
