"""The contract as one suite: what every mixer, model, task, objective and optimizer must obey. A law is a plain function of one case.

Cases come from the dicts at the bottom of the rooms (MIXERS, MODELS, TASKS, OBJECTIVES, OPTIMIZERS) and from the choices their configs offer, so what is
added there is tested without a line here. What cannot be derived is one small example of each: the EXAMPLES tables. ``test_laws`` fails and says so when
one is missing. Here: mixers and models; tasks, objectives and optimizers are in ``laws_training``.

Tensors are float64 where a law says that two computations are one, so that tolerances can be tight.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

import pytest
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from shoal import mixers, models, rng
from shoal.config import BigramConfig, DecoderConfig, EmbeddingMLPConfig, EncoderConfig, HMMConfig, ModuleConfig, fields_per_run
from shoal.config.fields import ConfigError
from shoal.contracts import Context
from shoal.nn import initialise, select

R, B, VOCABULARY, LONGEST = 3, 4, 11, 17
ENCODER = str(Path(__file__).parent / "encoder")  # a directory without weights: two layers, a tokenizer of 26 words
LOOKED_AT = {"attention": ("bias", "positions", "causal", "qk_norm"), "average": ()}  # by a mixer, of the fields with choices; others: bias
LOOKED_AT["performer"] = ("bias", "positions")
LOOKED_AT |= {name: ("positions=alibi",) for name in ("distance", "additive", "shared_kv", "renormalised", "windowed")}
LOOKED_AT |= {name: () for name in ("cosine", "bilinear", "shared_qk", "shared_qv", "nonlinear_q", "nonlinear_k", "nonlinear_v", "zeroed")}
TIMES = (6, 12)  # of a mixer's sequences: attention has one form for up to 8 keys and another for more

MIXER_EXAMPLES: dict[str, DecoderConfig] = {
    "attention": DecoderConfig(width=8, num_heads=2),
    **{name: DecoderConfig(width=8, num_heads=2) for name in ("distance", "cosine", "additive", "bilinear")},
    **{name: DecoderConfig(width=8, num_heads=2) for name in ("shared_qk", "shared_kv", "shared_qv", "shared_qkv")},
    **{name: DecoderConfig(width=8, num_heads=2) for name in ("network", "nonlinear_q", "nonlinear_k", "nonlinear_v")},
    **{name: DecoderConfig(width=8, num_heads=2) for name in ("zeroed", "renormalised")},
    "windowed": DecoderConfig(width=8, num_heads=2, window=5),
    "linear": DecoderConfig(width=8, num_heads=2),
    "performer": DecoderConfig(width=8, num_heads=2, features=6),
    "fastformer": DecoderConfig(width=8, num_heads=2),
    "aft_full": DecoderConfig(width=8, num_heads=2),
    "aft_local": DecoderConfig(width=8, num_heads=2, window=3),
    "aft_simple": DecoderConfig(width=8, num_heads=2),
    "aft_conv": DecoderConfig(width=8, num_heads=2, window=3),
    "average": DecoderConfig(width=8, num_heads=2),
    "rnn": DecoderConfig(width=8, num_heads=2),
    "gru": DecoderConfig(width=8, num_heads=2),
    "lstm": DecoderConfig(width=8, num_heads=2),
    "mamba": DecoderConfig(width=20, num_heads=2, state_size=3, convolution=3),
    "ssd": DecoderConfig(width=8, num_heads=2, state_size=3, convolution=3),
    "s4d": DecoderConfig(width=8, num_heads=1, state_size=4),
}
MODEL_EXAMPLES: dict[type, list[Any]] = {
    DecoderConfig: [
        DecoderConfig(width=8, num_layers=2, num_heads=2, feed_forward=12),
        DecoderConfig(width=8, num_layers=1, num_heads=4, feed_forward=0, positions="rotary", norm_place="post", tied=True),
        DecoderConfig(width=8, num_layers=2, num_heads=2, feed_forward=12, dropout=0.3),
        DecoderConfig(width=8, num_layers=0, num_heads=2, softcap=3.0),
        DecoderConfig(width=8, num_layers=2, num_heads=2, feed_forward=12, norm="none", residual=False, mixers=("average", "lstm")),
    ],
    BigramConfig: [BigramConfig()],
    EmbeddingMLPConfig: [EmbeddingMLPConfig(num_inputs=3, embedding=4, hidden=(6, 5)), EmbeddingMLPConfig(num_inputs=2, embedding=4, hidden=())],
    HMMConfig: [HMMConfig(num_states=5)],
    ModuleConfig: [
        ModuleConfig(module="own_models:Transformer", arguments='{"num_layers": 2}'),
        ModuleConfig(module="own_models:Transformer", arguments='{"tied": true, "num_heads": 4}'),
        ModuleConfig(module="own_models:Bag"),
    ],
    EncoderConfig: [EncoderConfig(encoder=ENCODER, num_classes=VOCABULARY), EncoderConfig(encoder=ENCODER, num_classes=VOCABULARY, dropout=0.0)],
}
ONE_PLACE = [*MODEL_EXAMPLES[EmbeddingMLPConfig], MODEL_EXAMPLES[ModuleConfig][-1]]  # answer once, whatever is asked: no scored positions or caches
UNTOLD = {ModuleConfig}  # know nothing of masks, positions and caches, and say so


# --- what the laws, and other tests, share


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def close(got: Tensor, expected: Tensor, tolerance: float = 1e-9) -> None:
    """Within this share of the value, or of 1 for values below 1."""
    torch.testing.assert_close(got, expected, rtol=tolerance, atol=tolerance)


def same(a: Tensor, b: Tensor) -> bool:
    """Every bit: 0.0 is not -0.0, and NaN is itself."""
    kind = {8: torch.int64, 4: torch.int32, 2: torch.int16, 1: torch.int8}[a.element_size()]
    return a.dtype == b.dtype and a.contiguous().view(kind).equal(b.contiguous().view(kind))


def filled(module: nn.Module, seed: int = 0) -> Any:
    """The module in float64, every parameter normal: nothing is 0 or 1 by accident."""
    module, g = module.double(), generator(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=g, dtype=torch.float64) * 0.4)
    return module


def variants(config: Any) -> dict[str, Any]:
    """The config, and the config with every choice of every field (Literal or bool), one at a time, that it does not refuse."""
    found = {type(config).__name__: config}
    for name, hint in get_type_hints(type(config)).items():
        choices = get_args(hint) if get_origin(hint) is Literal else (False, True) if hint is bool else ()
        for choice in choices:
            with suppress(ConfigError):
                if choice != getattr(config, name):
                    found[f"{name}={choice}"] = replace(config, **{name: choice})
    return found


# --- mixers and models: the same laws, with vectors or token ids going in


@dataclass(frozen=True)
class Case:
    make: Callable[[Any, tuple[int, ...]], Any]  # config, lead -> module
    config: Any
    time: int
    tokens: bool  # what goes in: token ids, or vectors
    one_place: bool = False
    untold: bool = False

    def build(self, lead: tuple[int, ...]) -> Any:
        return self.make(self.config, lead)

    def fleet(self) -> Any:
        return filled(self.build((R,)))

    def one(self, fleet: nn.Module, r: int, lead: tuple[int, ...] = ()) -> Any:
        module = self.build(lead).double()
        module.load_state_dict({name: x[r].view(*lead, *x.shape[1:]) for name, x in fleet.state_dict().items()})
        return module

    def inputs(self, *shape: int, seed: int = 1) -> Tensor:
        if self.tokens:
            return torch.randint(VOCABULARY, shape, generator=generator(seed))
        return torch.randn(*shape, self.config.width, generator=generator(seed), dtype=torch.float64)

    def call(self, module: Any, x: Tensor, context: Context = Context(), cache: Any = None) -> tuple[Tensor, Any]:  # noqa: B008
        y, cache = module(x, context, cache)
        return (module.logits(y) if self.tokens else y), cache

    def every_place(self) -> None:
        if self.one_place:
            pytest.skip("answers at one place only")

    def told(self) -> None:
        if self.untold:
            pytest.skip("knows nothing of masks, positions and caches")

    @property
    def causal(self) -> bool:
        return getattr(self.config, "causal", True) and not any(name in mixers.LEAKY for name in getattr(self.config, "mixers", ()))

    def only_past(self) -> None:
        if not self.causal:
            pytest.skip("sees the whole sequence")

    def context(self) -> Context:
        return Context() if self.untold else padding(self.time)[2]


def mixer_cases() -> dict[str, Case]:
    found = {}
    for name, example in MIXER_EXAMPLES.items():
        for variant, config in variants(replace(example, mixers=(name,))).items():
            if variant.startswith(("DecoderConfig", *LOOKED_AT.get(name, ("bias",)))):
                for time in TIMES:
                    found[f"{name} {variant} T={time}"] = Case(partial(mixers.build, name, max_length=LONGEST), config, time, tokens=False)
    return found


def model_cases() -> dict[str, Case]:
    found: dict[str, Any] = {}
    for examples in MODEL_EXAMPLES.values():
        found |= variants(examples[0]) | {f"{type(config).__name__} {i}": config for i, config in enumerate(examples[1:], 2)}
    first = MODEL_EXAMPLES[DecoderConfig][0]
    found |= {f"mixers={name}": replace(first, mixers=(name,)) for name in mixers.MIXERS if (name,) != first.mixers}
    return {name: Case(_model, config, 10, tokens=True, one_place=one_place(config), untold=type(config) in UNTOLD) for name, config in found.items()}


def one_place(config: Any) -> bool:
    return config in ONE_PLACE or isinstance(config, EncoderConfig)


def _model(config: Any, lead: tuple[int, ...]) -> Any:
    return models.build(config, VOCABULARY, LONGEST, lead)


def padding(time: int) -> tuple[Tensor, Tensor, Context]:
    """Where each row's sequence begins and how long it is, int64 [R, B], with padding on either side, both or none; the context that says so."""
    length = torch.randint(1, time + 1, (R, B), generator=generator(2))
    length[0, 0] = time
    first = (torch.rand(R, B, generator=generator(3)) * (time - length + 1)).long()
    cell = torch.arange(time)
    mask = (cell >= first[..., None]) & (cell < (first + length)[..., None])
    assert ((first > 0) & (first + length < time)).any(), "a row padded on both sides"
    return first, length, Context(mask=mask, positions=(cell - first[..., None]).clamp(min=0))


def rows(shape: Sequence[int]) -> Iterator[tuple[int, int]]:
    return ((r, b) for r in range(shape[0]) for b in range(shape[1]))


def law_run_axis(case: Case) -> None:
    """Run r of a fleet is a fleet of one, and a run taken out of its fleet."""
    fleet, x, context = case.fleet(), case.inputs(R, B, case.time), case.context()
    context = context._replace(at=torch.randint(case.time, (R, B, 2), generator=generator(4)), key=rng.key(torch.arange(R), "law")[:, None] + torch.arange(B))
    y, _ = case.call(fleet, x, context)
    for r in range(R):
        for lead, pick in (((), r), ((1,), slice(r, r + 1))):
            close(case.call(case.one(fleet, r, lead), x[pick], Context(*(c if c is None else c[pick] for c in context)))[0], y[pick])


def law_no_leak(case: Case) -> None:
    """What comes later changes nothing before it, and something after it; without causality, something at every place."""
    if case.one_place and not isinstance(case.config, EmbeddingMLPConfig):
        pytest.skip("answers after the last token")
    fleet, x = case.fleet(), case.inputs(R, B, case.time)
    y, _ = case.call(fleet, x)
    for t in (case.config.num_inputs - 1,) if case.one_place else (0, case.time // 2, case.time - 2):
        changed = torch.cat((x[:, :, : t + 1], case.inputs(R, B, case.time, seed=5)[:, :, t + 1 :]), dim=2)
        z, _ = case.call(fleet, changed)
        if case.causal:
            close(z[:, :, : t + 1], y[:, :, : t + 1])
        else:
            differ = (changed != x)[:, :, t + 1 :].flatten(2).any(-1)
            assert differ.any() and ((z - y)[:, :, : t + 1].abs() > 1e-9).any(-1)[differ].all()
        assert case.one_place or not torch.allclose(z[:, :, t + 1 :], y[:, :, t + 1 :])


def law_prefix(case: Case) -> None:
    """A sequence cut short gives the beginning of what the whole one gives, whichever form its length calls for."""
    case.every_place()
    case.only_past()
    fleet, x = case.fleet(), case.inputs(R, B, case.time)
    y, _ = case.call(fleet, x)
    for t in range(1, case.time):
        close(case.call(fleet, x[:, :, :t])[0], y[:, :, :t])


def law_padding(case: Case) -> None:
    """A sequence gives the same with padding around it, whatever stands there: a masked position writes no state and is never read."""
    case.every_place()
    case.told()
    fleet, x, (first, length, context) = case.fleet(), case.inputs(R, B, case.time), padding(case.time)
    assert context.mask is not None
    if not case.tokens:
        x = torch.where(context.mask[..., None], x, x * 1e3).requires_grad_()
    y, _ = case.call(fleet, x, context)
    assert y.isfinite().all()
    for r, b in rows((R, B)):
        real = slice(int(first[r, b]), int(first[r, b] + length[r, b]))
        close(y[r, b, real], case.call(case.one(fleet, r), x[r, b, real][None])[0][0])
    if not case.tokens:
        (slope,) = torch.autograd.grad((y * context.mask[..., None]).sum(), x)
        assert slope.isfinite().all() and (slope[~context.mask] == 0).all()


def law_scored_positions(case: Case) -> None:
    """Only the scored positions = the whole output at these positions."""
    case.every_place()
    fleet, x = case.fleet(), case.inputs(R, B, case.time)
    for context in (Context(), case.context()):
        y, _ = case.call(fleet, x, context)
        some = torch.randint(case.time, (R, B, 3), generator=generator(4))
        for at in (slice(1, 4), slice(-1, None), slice(0, case.time), some):
            close(case.call(fleet, x, context._replace(at=at))[0], select(y, at))


def law_cache(case: Case) -> None:
    """A prompt and then one token at a time, or the rest at once, through the cache = one pass."""
    case.every_place()
    case.only_past()
    case.told()
    fleet, time = case.fleet(), case.time
    for lead, module in (((R,), fleet), ((), case.one(fleet, 1))):
        x = case.inputs(*lead, B, time)
        y, _ = case.call(module, x)
        for prompt, step, room in ((1, 1, time), (time // 2, 1, time + 3), (time // 2, time, time), (time, 1, time)):
            out, cache = case.call(module, _cut(x, lead, 0, prompt), Context(at=slice(-1, None)), module.init_cache(B, room))
            close(out, y[..., prompt - 1 : prompt, :])
            for t in range(prompt, time, step):
                out, cache = case.call(module, _cut(x, lead, t, t + step), Context(), cache)
                close(out, y[..., t : t + step, :])


def _cut(x: Tensor, lead: tuple[int, ...], start: int, stop: int) -> Tensor:
    return x[:, :, start:stop] if lead else x[:, start:stop]


def law_cache_after_left_padding(case: Case) -> None:
    """Prompts of different lengths, padded on the left, decoded together = each by itself."""
    case.every_place()
    case.only_past()
    case.told()
    fleet, time, prompt = case.fleet(), case.time, case.time - 3
    x, cell = case.inputs(R, B, time), torch.arange(time)
    first = torch.randint(0, prompt, (R, B), generator=generator(6))
    mask, positions = cell >= first[..., None], (cell - first[..., None]).clamp(min=0)
    outs, cache = [], fleet.init_cache(B, time)
    for start, stop in ((0, prompt), *((t, t + 1) for t in range(prompt, time))):
        context = Context(mask=mask[..., start:stop] if start == 0 else None, positions=positions[..., start:stop])
        out, cache = case.call(fleet, x[:, :, start:stop], context, cache)
        outs.append(out)
    y = torch.cat(outs, dim=2)
    for r, b in rows((R, B)):
        begin = int(first[r, b])
        close(y[r, b, begin:], case.call(case.one(fleet, r), x[r, b, begin:][None])[0][0])


def law_batch_in_pieces(case: Case) -> None:
    """Rows do not see each other, and dropout goes with the row's key: pieces of a batch = the batch."""
    fleet, x, context = case.fleet(), case.inputs(R, B, case.time), case.context()
    context = context._replace(key=rng.fold(rng.key(torch.arange(R), "law")[:, None], torch.arange(B)))
    y, _ = case.call(fleet, x, context)
    for piece in (slice(0, 3), slice(3, 4)):
        close(case.call(fleet, x[:, piece], Context(*(c if c is None else c[:, piece] for c in context)))[0], y[:, piece])
    drops = getattr(case.config, "dropout", 0) > 0 and case.tokens
    assert torch.allclose(case.call(fleet, x, context._replace(key=None))[0], y) != drops


def law_gradients(case: Case) -> None:
    """Every parameter, and a mixer's input, has a gradient, and it is the slope: <gradient, v> = (f(p + e v) - f(p - e v)) / 2 e for a random direction v."""
    fleet, x, context = case.fleet(), case.inputs(R, B, case.time), case.context()
    parameters = dict(fleet.named_parameters()) | ({} if case.tokens else {"x": x.requires_grad_()})
    weights: dict[str, Tensor] = {}

    def loss() -> Tensor:
        y, _ = case.call(fleet, x, context)
        return (y * weights.setdefault("y", torch.randn(y.shape, generator=generator(7), dtype=y.dtype))).sum()

    gradients = dict(zip(parameters, torch.autograd.grad(loss(), list(parameters.values())), strict=True))
    directions = {name: torch.randn(p.shape, generator=generator(8), dtype=p.dtype) for name, p in parameters.items()}
    assert all((g != 0).flatten(1).any(1).all() for g in gradients.values() if g.dim() > 2), "a matrix without a gradient"
    with torch.no_grad():
        for name, p in parameters.items():
            values, step = [], 1e-6
            for sign in (1, -2, 1):
                p += sign * step * directions[name]
                values.append(loss())
            close((gradients[name] * directions[name]).sum(), (values[0] - values[1]) / (2 * step), 1e-5)


def law_flops(case: Case) -> None:
    """The formula is what PyTorch counts, for all positions and for scored ones only."""
    module, time = filled(case.build(())), LONGEST  # long enough for matrix products: the counter does not see a multiply and sum
    x = case.inputs(B, time)
    for at, scored in ((None, time), (slice(-2, None), 2)):
        with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
            case.call(module, x, Context(at=at))
        assert counter.get_total_flops() == module.flops(B, time, scored)


def law_many_rows(case: Case) -> None:
    """More rows (runs x batch) than 65,536, where some kernels end."""
    narrow, count = replace(case, config=replace(case.config, width=4)), 66_000 // R + 1
    fleet, x = narrow.fleet().float(), narrow.inputs(R, count, case.time).float()
    with torch.no_grad():
        y, _ = case.call(fleet, x)
        for piece in (slice(0, 50), slice(count - 50, count)):
            close(y[:, piece], case.call(fleet, x[:, piece])[0], 1e-5)


def law_state_bytes(case: Case) -> None:
    """The formula is the size of the cache (its numbers, not its marks) of one sequence."""
    case.only_past()
    fleet = case.build((R,))
    for length in (1, case.time):
        leaves = tree_leaves(fleet.init_cache(B, length))
        assert sum(leaf.nbytes for leaf in leaves if leaf.is_floating_point()) == R * B * fleet.state_bytes(length)


def law_logits(case: Case) -> None:
    """Hidden states and logits of the shapes the contract names; logits act on each position alone."""
    fleet, x = case.fleet(), case.inputs(R, B, case.time)
    scored = 1 if case.one_place else 3
    hidden, cache = fleet(x, Context(at=slice(1, 1 + scored)))
    assert hidden.shape[:3] == (R, B, scored) and cache is None
    logits = fleet.logits(hidden)
    assert logits.shape == (R, B, scored, VOCABULARY)
    close(fleet.logits(hidden[:, 1:2, -1:]), logits[:, 1:2, -1:])


def law_initialisation(case: Case) -> None:
    """The rules fill every parameter; a run's numbers depend on its seed and its own scales only, not on its fleet, and are finite."""
    seeds = torch.tensor([5, 0, 7])
    configs = [case.config] * R
    fleet = _initialised(case, configs, seeds)
    for r in range(R):
        for lead in ((), (1,)):
            alone = _initialised(case, [case.config], seeds[r : r + 1], lead)
            assert all(same(p.view(fleet[name][r].shape), fleet[name][r]) for name, p in alone.items())
    assert all(p.isfinite().all() for p in fleet.values())
    undecayed = case.build(()).undecayed()  # may begin as a table of decays, the same for every seed
    drawn = [p for name, p in fleet.items() if p[0].std(correction=0) > 0 and name not in undecayed]
    assert drawn and not any(same(p[0], p[1]) or same(p[0], p[2]) for p in drawn), "seeds make a difference"

    acted = set()
    for name in fields_per_run(case.config):
        doubled = replace(case.config, **{name: 2 * getattr(case.config, name)})
        for parameter, p in _initialised(case, [case.config, doubled, case.config], seeds).items():
            assert same(p[0], fleet[parameter][0]) and same(p[2], fleet[parameter][2]), f"{name} of one run acts on its mates"
            if not same(p[1], fleet[parameter][1]):
                close(p[1], 2 * fleet[parameter][1], 1e-6)
                acted.add(name)
    assert acted or not list(fields_per_run(case.config)), "no per-run scale acts"


def _initialised(case: Case, configs: Sequence[Any], seeds: Tensor, lead: tuple[int, ...] = (R,)) -> dict[str, Tensor]:
    module = case.build(lead)
    with torch.no_grad():
        for p in module.parameters():
            p.fill_(math.nan)
    initialise(module, module.init_rules(configs), seeds)
    return {name: p.detach() for name, p in module.named_parameters()}


def law_hidden_matrices(case: Case) -> None:
    """Parameters of rank 2, each named once; not the embeddings and not the head, by what they do: the one is looked up by token, the other ends in V."""
    module = case.build(())
    names, parameters = module.hidden_matrices(), dict(module.named_parameters())
    assert len(set(names)) == len(names) and all(parameters[name].dim() == 2 for name in names)
    assert not any(VOCABULARY in parameters[name].shape or LONGEST in parameters[name].shape for name in names)


SEQUENCE_LAWS = [
    law_run_axis, law_no_leak, law_prefix, law_padding, law_scored_positions, law_cache, law_cache_after_left_padding, law_batch_in_pieces, law_gradients,
    law_flops,
]  # fmt: skip
MIXER_LAWS: list[Callable[[Case], None]] = [*SEQUENCE_LAWS, law_many_rows, law_state_bytes]
MODEL_LAWS: list[Callable[[Case], None]] = [*SEQUENCE_LAWS, law_logits, law_initialisation, law_hidden_matrices]
