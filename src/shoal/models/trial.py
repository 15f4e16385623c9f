"""A user's module tried out before anything is trained: two runs, two rows, on the CPU. Whatever it cannot do in a fleet is refused by name.

    try_out(ModuleConfig(module="model.py:Net"), batches, vocab_size=99, max_length=4)

A trial sees what the module does for these shapes. It cannot see what the module does only on a GPU, or only for some tokens.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from shoal.config.fields import check
from shoal.config.models import ModuleConfig
from shoal.contracts import Batch, Context
from shoal.models.module import Lifted, construct, explained, locate, seeded
from shoal.nn import initialise, select

LOOKED_AT = 16  # positions at most from which the future is changed
BFLOAT16 = "; make what it creates of its input's type (dtype=x.dtype), or set precision to float32"


def try_out(config: ModuleConfig, batches: Sequence[Batch], vocab_size: int, max_length: int, dtype: torch.dtype = torch.float32) -> None:
    """ConfigError ("model") for what the module cannot do. ``batches``: one of every kind it will meet, [R, B, ...]; ``dtype``: of the weights in use."""
    check(all(batch.mask is None for batch in batches), "model", f"this task pads its sequences, and {config.module} cannot be told where; use one length")
    locate(config.module, again=True)
    own, again, other = (construct(config, vocab_size, max_length, seed) for seed in (0, 0, 1))
    _look(config, own, again, other)
    model = Lifted(config, vocab_size, max_length, (2,))
    kinds = {(batch.tokens.shape[-1], str(batch.at)): batch for batch in batches}.values()
    with seeded(0):
        initialise(model, model.init_rules([config, config]), torch.tensor([0, 1]))
        for batch in kinds:
            _run(config, model, own, batch)
        for p in own.parameters():
            p.data += 0.1 * torch.randn_like(p)  # nothing hidden by a zero
        for batch in kinds:
            _check_sight(config, own, batch, vocab_size)
        if dtype != torch.float32:
            model.to(dtype)
            for batch in kinds:
                _lifted(config, model, *_tokens(batch, vocab_size), fix=BFLOAT16)


def _look(config: ModuleConfig, own: nn.Module, again: nn.Module, other: nn.Module) -> None:
    """What can be seen without a call. ``again``: made from the same seed, ``other``: from another."""

    def refuse(kind: str, names: Sequence[str], fix: str) -> None:
        check(not names, "model", f"{config.module}: {kind} {', '.join(names)} {fix}")

    tensors = [*own.named_parameters(), *own.named_buffers()]
    lazy = [name for name, x in tensors if nn.parameter.is_lazy(x)]
    refuse("the size of", lazy, "is not known until the first call; use layers that are given their sizes")
    parameters, buffers = dict(own.named_parameters()), dict(own.named_buffers())
    check(bool(parameters), "model", f"{config.module} has no parameters to train")
    refuse("parameter", [name for name, p in parameters.items() if p.dtype != torch.float32], "is not float32; leave types to precision")
    refuse("parameter", [name for name, p in parameters.items() if not p.requires_grad], "is frozen (requires_grad False); make it a buffer")
    loose = [f"{name}.{key}".lstrip(".") for name, module in own.named_modules() for key, value in vars(module).items() if isinstance(value, Tensor)]
    refuse("tensor", loose, "would stay behind on the CPU; keep it with self.register_buffer")
    drawn = [name for name, p in again.named_parameters() if not p.equal(parameters[name])]
    refuse("parameter", drawn, "differs although the seed is the same; draw it with torch's own generator")
    shared = [name for name, buffer in other.named_buffers() if not _same(buffer, buffers[name])]
    refuse("buffer", shared, "is drawn at random, and runs share their buffers; make it a parameter, or the same for every seed")


def _run(config: ModuleConfig, model: Lifted, own: nn.Module, batch: Batch) -> None:
    """One kind of batch: alone, in a fleet of two, alone again."""
    tokens, at = _tokens(batch, model.vocab_size)
    before = {name: buffer.clone() for name, buffer in own.named_buffers()}
    alone = _alone(config, own, tokens[0])
    _check_shape(config, alone, tokens.shape[-1], model.vocab_size, at)
    changed = [name for name, buffer in own.named_buffers() if not _same(buffer, before[name])]
    fix = "runs share their buffers; use layers without (LayerNorm for BatchNorm)"
    check(not changed, "model", f"{config.module} changes its buffer {', '.join(changed)} as it computes, and {fix}")
    together = _lifted(config, model, tokens, at)[0]
    again = _alone(config, own, tokens[0])
    check(not _apart(again, alone), "model", f"{config.module} gives other logits when the same tokens come again; it must draw and remember nothing")
    there = alone.unsqueeze(1) if alone.dim() == 2 else select(alone, at[0] if isinstance(at, Tensor) else at)
    check(not _apart(together, there), "model", f"{config.module} gives other logits in a fleet than alone")


def _check_shape(config: ModuleConfig, logits: Any, time: int, vocab_size: int, at: Any) -> None:
    """[2, T, V], or [2, V] where the last position alone is scored."""
    every, last = [2, time, vocab_size], [2, vocab_size]
    one_place = isinstance(at, slice) and range(time)[at] == range(time - 1, time)
    allowed = [every, last] if one_place else [every]
    got = list(logits.shape) if isinstance(logits, Tensor) else f"a {type(logits).__name__}"
    wanted = f"a tensor of logits {' or '.join(map(str, allowed))}"
    why = "" if one_place or got != last else "; this task scores more than the last position"
    check(got in allowed, "model", f"{config.module} gives {got} for tokens {[2, time]}; it must give {wanted}{why}")
    check(logits.is_floating_point(), "model", f"{config.module} gives {logits.dtype}; it must give {wanted}, in float32")
    check(bool(logits.isfinite().all()), "model", f"{config.module} gives logits that are not finite as it begins")


def _lifted(config: ModuleConfig, model: Lifted, tokens: Tensor, at: Any, fix: str = "") -> Tensor:
    """Scored logits [2, B, S, V] of two runs, with the gradient, and no operation done run by run."""
    parameters = {name.removeprefix("module."): p for name, p in model.named_parameters()}
    with _no_fallback(), explained(config, fix):
        logits, _ = model(tokens, Context(at=at))
        loss = logits.float().logsumexp(-1).sum()
        check(loss.requires_grad, "model", f"{config.module} gives logits that do not depend on its parameters")
        grads = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
    unused = [name for name, grad in zip(parameters, grads, strict=True) if grad is None]
    check(not unused, "model", f"{config.module} does not use its parameter {', '.join(unused)}; remove it")
    return logits.detach()


def _check_sight(config: ModuleConfig, own: nn.Module, batch: Batch, vocab_size: int) -> None:
    """No row sees another row, no scored position what comes after it."""
    tokens, at = _tokens(batch, vocab_size)
    first, other, time = tokens[0, 0], (tokens[0, 0] + torch.randint(1, max(2, vocab_size), tokens.shape[-1:])) % vocab_size, tokens.shape[-1]
    scored = range(time)[at] if isinstance(at, slice) else range(time)
    early = [t for t in scored if t < time - 1]
    early = early[:: -(-len(early) // LOOKED_AT) or 1]
    futures = [torch.cat((first[: t + 1], other[t + 1 :])) for t in early]
    logits, by_itself = (_alone(config, own, torch.stack(rows)) for rows in ([first, *futures, other], [first] * (2 + len(futures))))
    fix = "use layers that treat each row alone"
    check(not _apart(logits[0], by_itself[0]), "model", f"{config.module}: the rows of a batch see each other, as in BatchNorm; {fix}")
    for t, row in zip(early, logits[1:], strict=False):
        past = [s for s in scored if s <= t]
        fix = "mask the future (is_causal=True, or a triangular mask)"
        check(not _apart(row[past], logits[0][past]), "model", f"{config.module}: the logits at position {t} change with the tokens after it; {fix}")


def _alone(config: ModuleConfig, own: nn.Module, tokens: Tensor) -> Any:
    with explained(config), sdpa_kernel(SDPBackend.MATH), torch.no_grad():
        return own(tokens)


def _tokens(batch: Batch, vocab_size: int) -> tuple[Tensor, Any]:
    """Random tokens [2, 2, T] of a batch's length, and its scored positions for them."""
    tokens = torch.randint(vocab_size, (2, 2, batch.tokens.shape[-1]))
    return tokens, batch.at[:1, :1].expand(2, 2, -1) if isinstance(batch.at, Tensor) else batch.at


def _apart(a: Tensor, b: Tensor) -> bool:
    """By more than rounding. NaN is never apart: a weight changed at random may lead there."""
    return bool((a - b).abs().max() > 1e-4 * b.abs().max())


def _same(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and torch.equal(a.nan_to_num(), b.nan_to_num())


@contextlib.contextmanager
def _no_fallback() -> Iterator[None]:
    """An operation without a batching rule is an error, not a loop over runs with a warning."""
    vmap: Any = torch._C._functorch  # pyright: ignore[reportAttributeAccessIssue]
    before = vmap._is_vmap_fallback_enabled()
    vmap._set_vmap_fallback_enabled(False)
    try:
        yield
    finally:
        vmap._set_vmap_fallback_enabled(before)
