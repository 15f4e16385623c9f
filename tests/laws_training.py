"""The laws of what trains: tasks, objectives, optimizers (see ``laws``); and the small fleets that tests of training share."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from laws import ENCODER, VOCABULARY, B, Case, R, close, generator, model_cases, padding, same, variants
from torch import Tensor

from shoal import rng, tasks
from shoal.config import (
    SGD,
    Adagrad,
    Adam,
    AdamW,
    BaumWelch,
    DecoderConfig,
    EmbeddingMLPConfig,
    Gradient,
    LanguageConfig,
    MemorizeConfig,
    ModularConfig,
    ModuleConfig,
    MQARConfig,
    Muon,
    RecallConfig,
    RunConfig,
    Schedule,
    SentencesConfig,
    Weights,
    fields_per_run,
    with_seed,
    with_values,
)
from shoal.config.fields import ConfigError
from shoal.contracts import Batch, Context, Params, State, Sums, Tables
from shoal.nn import select
from shoal.train import optimizers
from shoal.train.fleet import Fleet, Table, layout_groups, parameter_groups
from shoal.train.layout import Layout
from shoal.train.objectives import OBJECTIVES, add

CORPUS = Path(__file__).parent / "corpus.jsonl"  # sixteen short documents
SENTENCES = Path(__file__).parent / "sentences.tsv"  # sixty, of two classes
TASK_EXAMPLES: dict[type, list[Any]] = {  # one config per run of a fleet
    ModularConfig: [
        ModularConfig(p=11, train_fraction=0.5),
        ModularConfig(p=11, operation="add", train_fraction=0.3, val_fraction=0.2, label_noise=0.4),
        ModularConfig(p=11, operation="mul", train_fraction=0.7, val_fraction=0.1, test_fraction=0.05, split="paired"),
    ],
    MemorizeConfig: [MemorizeConfig(strings=("abc", "a longer one", "xy", "hello", "yes, no"), unscored=u) for u in (0, 1, 2)],
    RecallConfig: [RecallConfig(num_tokens=7, length=6, num_queries=m, delay=d, longest=2, test_size=9) for m, d in ((1, 1), (7, 4), (3, 2))],
    MQARConfig: [MQARConfig(vocab_size=26, num_kv_pairs=3, input_seq_len=16, test_size=9)] * 3,
    LanguageConfig: [LanguageConfig(corpus=str(CORPUS), tokenizer="characters", length=24, val_fraction=0.2)] * 3,
    SentencesConfig: [SentencesConfig(train=str(SENTENCES), max_length=20, val_fraction=0.2, test_fraction=0.2, encoder=ENCODER)] * 3,
}
MIXED = ModularConfig(p=7, operation="div+add", train_fraction=0.4, val_fraction=0.3)
TASK_FLEETS: dict[str, list[Any]] = {  # and more fleets
    "mixtures": [MIXED, replace(MIXED, operation="mul+div_odd", split="stratified", label_noise=0.3), replace(MIXED, operation="add+div", split="rows")],
    "digits": [
        replace(MIXED, operation=operation, tokens="digits", base=3, least_significant_first=True, loss="answer+end")
        for operation in ("cubic_y+sub", "sub+squares", "div+mul")
    ],
    "permutations": [
        ModularConfig(operation="s5", tokens="digits", loss="all", train_fraction=0.02, val_fraction=0.01, test_fraction=0.01),
        ModularConfig(operation="s5_conjugate", tokens="digits", loss="all", train_fraction=0.02, val_fraction=0.01, test_fraction=0.01, split="paired"),
        ModularConfig(operation="s5_sandwich", tokens="digits", loss="all", train_fraction=0.01, val_fraction=0.02, test_fraction=0.01, split="stratified"),
    ],
}
OPTIMIZER_EXAMPLES: dict[type, list[Any]] = {
    SGD: [SGD(), SGD(momentum=0.9)],
    Adam: [Adam(lr=0.01)],
    AdamW: [AdamW(lr=0.01, wd=0.1), AdamW(lr=0.01, wd=0.1, decay="matrices", decay_to="start")],
    Adagrad: [Adagrad(lr=0.1)],
    Muon: [Muon(adam_lr=0.01)],
    BaumWelch: [BaumWelch(lr=0.5)],
}


# --- tasks: a case is the configs of a fleet's runs


def task_cases() -> dict[str, list[Any]]:
    found = {}
    for examples in TASK_EXAMPLES.values():
        for name in variants(examples[0]):
            field, _, _ = name.partition("=")
            choice = getattr(variants(examples[0])[name], field, None)
            found[name] = examples if choice is None else [replace(config, **{field: choice}) for config in examples]
    return found | TASK_FLEETS


def task_of(configs: Sequence[Any], device: str = "cpu") -> tuple[Any, Tables, Tensor]:
    """The task, the tables of its runs, their order keys."""
    task = tasks.build(configs[0])
    per_run = {name: [getattr(config, name) for config in configs] for name in fields_per_run(configs[0])}
    tables = task.setup({**per_run, "split_seed": list(range(len(configs)))}, device)
    return task, tables, rng.key(torch.arange(len(configs)), "order").to(device)


def run_of(batch: Batch, r: int) -> list[tuple[Any, ...]]:
    """Run r's rows that are there: (tokens, targets, weights, mask, at) each."""
    at = batch.at[r] if isinstance(batch.at, Tensor) else None
    columns = [batch.tokens[r], batch.targets[r], batch.weights[r], *(x for x in (None if batch.mask is None else batch.mask[r], at) if x is not None)]
    return [row for row in zip(*([tuple(line) for line in column.tolist()] for column in columns), strict=True) if any(row[2])]


def sizes_of(task: Any) -> tuple[int, ...]:
    """Batch sizes; 0 is the whole training table, where there is one."""
    return (6, 0) if "train" in task.splits and not isinstance(task.config, LanguageConfig) else (6,)


def places_of(batch: Batch) -> list[int]:
    """The positions every row scores."""
    assert not isinstance(batch.at, Tensor)
    return list(range(batch.tokens.shape[-1])[batch.at or slice(None)])


def evaluated(task: Any, tables: Tables, split: str, pieces: int, r: int) -> list[tuple[Any, ...]]:
    return [row for batch in task.evaluation(tables, split, pieces) for row in run_of(batch, r)]


def bare(row: tuple[Any, ...]) -> tuple[Any, ...]:
    """A sentence without its padding."""
    tokens, targets, weights, mask, *at = row
    return (tuple(token for token, real in zip(tokens, mask, strict=True) if real), targets, weights, *at)


def law_task_alone(configs: list[Any]) -> None:
    """Run r's data is the same alone and in a fleet, and after others have left, up to rows that are not there."""
    task, tables, keys = task_of(configs)
    index = torch.tensor([2, 0])
    for r, config in enumerate(configs):
        alone_task = tasks.build(config)
        per_run = {name: [getattr(config, name)] for name in fields_per_run(config)}
        alone = alone_task.setup({**per_run, "split_seed": [r]}, "cpu")
        for step, size in ((0, 6), (9, 6), *((3, size) for size in sizes_of(task))):
            expected = run_of(alone_task.batch(alone, keys[r : r + 1], torch.tensor(step), size), 0)
            assert run_of(task.batch(tables, keys, torch.tensor(step), size), r) == expected != []
            if r in index:
                assert run_of(task.batch(tables.keep(index), keys[index], torch.tensor(step), size), index.tolist().index(r)) == expected
        for split in task.splits:
            assert evaluated(task, tables, split, 7, r) == (evaluated(alone_task, alone, split, 7, 0) if split in alone_task.splits else [])
        assert task.fingerprint == alone_task.fingerprint and task.vocab_size == alone_task.vocab_size and task.max_length == alone_task.max_length


def law_task_pure(configs: list[Any]) -> None:
    """The same key and step give the same bits, other keys and steps others; the global generator is not touched."""
    before = torch.get_rng_state()
    task, tables, keys = task_of(configs)
    first, again, later = (task.batch(tables, keys, torch.tensor(step), 6) for step in (4, 4, 5))
    assert all(a is b is None or isinstance(a, slice) or same(a, b) for a, b in zip(first, again, strict=True))
    assert not first.tokens.equal(later.tokens)
    in_order = getattr(configs[0], "sampler", "") == "sequential"  # whatever the key
    assert first.tokens.equal(task.batch(tables, rng.fold(keys, 1), torch.tensor(4), 6).tokens) == in_order
    list(task.evaluation(tables, task.splits[0], 5))
    assert torch.get_rng_state().equal(before)


def law_task_shapes(configs: list[Any]) -> None:
    """Shapes, dtypes and ranges the contract names; what is masked is not scored."""
    task, tables, keys = task_of(configs)
    batches = [task.batch(tables, keys, torch.tensor(0), size) for size in sizes_of(task)]
    for batch in (*batches, *(b for split in task.splits for b in task.evaluation(tables, split, 7))):
        (runs, count, time), (_, _, scored) = batch.tokens.shape, batch.targets.shape
        assert runs == len(configs) and time <= task.max_length and batch.targets.shape == batch.weights.shape == (runs, count, scored)
        assert batch.tokens.dtype == batch.targets.dtype == torch.int64 and batch.weights.dtype == torch.float32
        assert all(int(x.min()) >= 0 and int(x.max()) < task.vocab_size for x in (batch.tokens, batch.targets)) and (batch.weights >= 0).all()
        places = torch.arange(time)[batch.at if batch.at is not None else slice(None)].expand(batch.targets.shape)
        assert places.shape[-1] == scored
        if batch.mask is not None:
            assert batch.mask.shape == batch.tokens.shape and batch.mask.dtype == torch.bool
            assert (batch.weights[~batch.mask.gather(-1, places)] == 0).all()
    assert all(b.tokens.shape[1] == 6 for b in batches[:1])


def law_task_evaluation(configs: list[Any]) -> None:
    """Every row once, whatever the pieces, in pieces of one shape (of sentences: as long as the longest in it); "val:mul" is a part of "val"."""
    task, tables, _ = task_of(configs)
    of_sentences = isinstance(task.config, SentencesConfig)

    def counted(split: str, pieces: int, r: int) -> Counter[tuple[Any, ...]]:
        rows = evaluated(task, tables, split, pieces, r)
        return Counter(map(bare, rows) if of_sentences else rows)

    for r in range(len(configs)):
        rows_of = {split: counted(split, 10**6, r) for split in task.splits}
        for split, expected in rows_of.items():
            assert all(counted(split, pieces, r) == expected for pieces in (1, 3, 16))
            assert of_sentences or len({batch.tokens.shape for batch in task.evaluation(tables, split, 3)}) == 1
            assert all(batch.tokens.shape[1] <= 3 for batch in task.evaluation(tables, split, 3))
            assert expected <= rows_of.get(split.rpartition(":")[0], expected)


def law_task_table(configs: list[Any]) -> None:
    """Of a finite table each row is in one split, once. The whole training table is the split "train", though it may read and score more of each row.
    Without one there is no whole to ask for.
    """
    task, tables, keys = task_of(configs)
    if 0 not in sizes_of(task):
        with pytest.raises(ConfigError, match=r"batch_size: 0 is the whole training table, and this task has none"):
            task.batch(tables, keys, torch.tensor(0), 0)
        return
    whole, [train] = task.batch(tables, keys, torch.tensor(3), 0), task.evaluation(tables, "train", 10**6)
    for r in range(len(configs)):
        length, wanted = train.tokens.shape[-1], places_of(train)
        scored = [[row[1][places_of(whole).index(place)] for place in wanted] for row in run_of(whole, r)]
        assert [(row[0][:length], list(row[1])) for row in run_of(train, r)] == list(zip((row[0][:length] for row in run_of(whole, r)), scored, strict=True))
        prompts = [row[0] for split in task.splits if ":" not in split for row in evaluated(task, tables, split, 10**6, r)]
        assert len(set(prompts)) == len(prompts)


def law_task_text(configs: list[Any]) -> None:
    """Tokens of every row written out and read back, but for those without a spelling; the tokens generation starts and ends with exist."""
    task, tables, keys = task_of(configs)
    spelled = [token for token in range(task.vocab_size) if task.tokenizer.decode([token])]
    assert task.tokenizer.vocab_size == task.vocab_size and len(spelled) > 1
    for tokens, *_ in run_of(task.batch(tables, keys, torch.tensor(0), sizes_of(task)[-1]), 0):
        kept = [token for token in tokens if token in spelled]
        assert task.tokenizer.encode(task.tokenizer.decode(tokens)) == kept
    with pytest.raises(ValueError, match="unknown"):
        task.tokenizer.encode("☃")
    assert all(0 <= token < task.vocab_size for token in (*task.start, *(() if task.end is None else (task.end,))))


def law_task_compiles(configs: list[Any]) -> None:
    """One graph, no value asked for by the host."""
    task, tables, keys = task_of(configs)
    for size in sizes_of(task):
        torch.compiler.reset()
        draw = torch.compile(lambda *x, n=size: task.batch(*x, n), fullgraph=True, backend="eager")
        for step in (0, 7):
            got, expected = draw(tables, keys, torch.tensor(step)), task.batch(tables, keys, torch.tensor(step), size)
            assert all(a is b is None or a == b if isinstance(b, slice | None) else same(a, b) for a, b in zip(got, expected, strict=True))


TASK_LAWS: list[Callable[[list[Any]], None]] = [
    law_task_alone, law_task_pure, law_task_shapes, law_task_evaluation, law_task_table, law_task_text, law_task_compiles,
]  # fmt: skip


# --- objectives: a case is a name


def exponentials(values: list[float]) -> list[float]:
    return [math.exp(v - max(values)) for v in values]


def stable(values: list[float]) -> list[float]:
    return [v + 1 if v >= 0 else 1 / (1 - v) for v in values]


def reference(
    terms: Callable[[list[float]], list[float]], number: Callable[[float], Any], logits: Tensor, targets: Tensor, weights: Tensor
) -> dict[str, tuple[float, float]]:
    """One run's (sum, count) of loss and metrics, position by position. float64 [B, S, V]; ``number``: the format in which a sum may absorb its small terms."""
    loss, weight, right, scored, exact, num_rows, zero, collapsed = 0.0, 0.0, 0, 0, 0, 0, 0, 0
    for b in range(targets.shape[0]):
        correct = []
        for s in range(targets.shape[1]):
            parts, target = terms(logits[b, s].tolist()), int(targets[b, s])
            if weights[b, s] > 0:
                loss += float(weights[b, s]) * (math.log(sum(parts)) - math.log(parts[target]))
                weight += float(weights[b, s])
                correct.append(parts.index(max(parts)) == target)
                total = sum((number(part) for part in sorted(parts, reverse=True)), start=number(0))
                zero, collapsed = zero + bool(total == number(parts[target])), collapsed + bool(total == number(max(parts)))
        right, scored, exact, num_rows = right + sum(correct), scored + len(correct), exact + (all(correct) and correct != []), num_rows + (correct != [])
    shares = {"accuracy": (right, scored), "exact": (exact, num_rows), "zero_loss": (zero, scored), "collapse": (collapsed, scored)}
    return {"loss": (loss, weight), **shares}


OBJECTIVE_REFERENCES: dict[str, Callable[[Tensor, Tensor, Tensor], dict[str, tuple[float, float]]] | None] = {
    "cross_entropy": partial(reference, exponentials, np.float32),
    "cross_entropy_float64": partial(reference, exponentials, float),
    "stablemax": partial(reference, stable, np.float32),
    "likelihood": partial(reference, exponentials, np.float32),
    "masked_diffusion": None,  # no function of the logits of one pass; test_diffusion has one
}
NEXT_TOKEN = ("cross_entropy", "cross_entropy_float64", "stablemax")  # of any model's logits
IN_EVALUATIONS = ("zero_loss", "collapse")  # metrics a training step does not pay for


def objective_batches(name: str) -> tuple[Case, Any, list[Batch]]:
    """A model and batches for it: with padding, weights between 0 and 1 and rows that are not there; scored everywhere, by a slice, by indices."""
    case, (_, _, context) = model_cases()["HMMConfig" if name == "likelihood" else "DecoderConfig"], padding(10)
    fleet, tokens = case.fleet(), case.inputs(R, B, 10).clamp(max=VOCABULARY - 2)  # the last may be the mask token
    assert context.mask is not None
    batches = []
    for at in (None, slice(4, 8), torch.randint(10, (R, B, 3), generator=generator(9)))[: 1 if name == "masked_diffusion" else 3]:
        mask = select(context.mask[..., None], at)[..., 0]
        weights = torch.rand(mask.shape, generator=generator(10)) * mask * (torch.arange(B) != 2)[:, None]
        targets = torch.randint(VOCABULARY, mask.shape, generator=generator(11))
        most = case.call(fleet, tokens, Context(mask=context.mask, at=at))[0].argmax(-1)
        targets = torch.where(torch.rand(mask.shape, generator=generator(12)) < 0.8, most, targets)  # else nothing is ever right
        batches.append(Batch(tokens, targets, weights, context.mask, at))
    return case, fleet, batches


def leaves_of(sums: Sums) -> list[Tensor]:
    return [sums.loss, sums.weight, *(x for pair in sums.metrics.values() for x in pair)]


def law_objective_reference(name: str) -> None:
    """Loss and metrics equal the reference's, run by run, in a training step and in an evaluation."""
    (case, fleet, batches), shares = objective_batches(name), set()
    expect = OBJECTIVE_REFERENCES[name]
    if expect is None:
        pytest.skip("is no function of the logits of one pass")
    for batch, training in itertools.product(batches, (True, False)):
        with torch.set_grad_enabled(training):
            sums = OBJECTIVES[name](fleet, batch, None)
        logits, _ = case.call(fleet, batch.tokens, Context(mask=batch.mask, at=batch.at))
        assert all(x.shape == (R,) and x.dtype == torch.float32 for x in leaves_of(sums))
        for r in range(R):
            expected = expect(logits[r].detach().double(), batch.targets[r], batch.weights[r].double())
            got = {"loss": (sums.loss[r], sums.weight[r])} | {metric: (total[r], count[r]) for metric, (total, count) in sums.metrics.items()}
            assert got.keys() == expected.keys() - set(IN_EVALUATIONS if training else ())
            for metric in got:
                pair = expected[metric]
                assert [x.item() for x in got[metric]] == pytest.approx(pair, rel=1e-5), metric
                shares.add((metric, pair[0] / pair[1]))
    assert len(shares) > 2 * len(got), "values that are all alike would show nothing"


def law_objective_run_axis(name: str) -> None:
    case, fleet, batches = objective_batches(name)
    for batch in batches:
        sums = OBJECTIVES[name](fleet, batch, None)
        for r in range(R):
            alone = OBJECTIVES[name](case.one(fleet, r), batch.each(lambda x, r=r: x[r]), None)
            for a, b in zip(leaves_of(alone), leaves_of(sums), strict=True):
                close(a, b[r], 1e-5)


def law_objective_sums(name: str) -> None:
    """Sums of pieces are the sums of the whole; so are their gradients."""
    _, fleet, batches = objective_batches(name)
    for batch in batches:
        whole = OBJECTIVES[name](fleet, batch, None)
        parts = [OBJECTIVES[name](fleet, batch.each(lambda x, cut=piece: x[:, cut]), None) for piece in (slice(0, 1), slice(1, 3), slice(3, 4))]
        total = add(add(parts[0], parts[1]), parts[2])
        for a, b in zip(leaves_of(total), leaves_of(whole), strict=True):
            close(a, b, 1e-5)
        for a, b in zip(*(torch.autograd.grad(sums.loss.sum(), list(fleet.parameters())) for sums in (total, whole)), strict=True):
            close(a, b, 1e-5)


def law_objective_weights(name: str) -> None:
    """What has weight 0 does not matter: neither its targets nor whole rows; nothing scored leaves every sum 0."""
    _, fleet, batches = objective_batches(name)
    for batch in batches:
        other = torch.where(batch.weights > 0, batch.targets, (batch.targets + 1) % VOCABULARY)
        before, after = (OBJECTIVES[name](fleet, b, None) for b in (batch, batch._replace(targets=other)))
        assert all(same(a, b) for a, b in zip(leaves_of(before), leaves_of(after), strict=True))
        nothing = OBJECTIVES[name](fleet, batch._replace(weights=torch.zeros_like(batch.weights)), None)
        assert all((x == 0).all() for x in leaves_of(nothing))


OBJECTIVE_LAWS: list[Callable[[str], None]] = [law_objective_reference, law_objective_run_axis, law_objective_sums, law_objective_weights]


# --- optimizers: a case is a config; parameters lie in one buffer, as in a fleet

SHAPES = {"embedding.weight": (5, 4), "up.weight": (4, 6), "up.bias": (6,), "down.weight": (6, 4), "norm.weight": (4,)}
HIDDEN = ["up.weight", "down.weight"]


def optimizer_cases() -> dict[str, Any]:
    found: dict[str, Any] = {}
    for examples in OPTIMIZER_EXAMPLES.values():
        found |= variants(examples[0]) | {f"{type(config).__name__} {i}": config for i, config in enumerate(examples[1:], 2)}
    return found


@dataclass
class Training:
    """Some updates of runs ``index`` with random gradients; their hyperparameters differ. ``lead``: (R,), or () for one run."""

    config: Any
    index: Sequence[int] = range(R)
    single: bool = False

    def __post_init__(self) -> None:
        self.layout = Layout(SHAPES, parameter_groups(self.config, SHAPES, HIDDEN))
        self.optimizer = optimizers.build(self.config)
        self.hyper = {name: self.of(torch.tensor([value, value * 0.5, value * 0.9] if value else [0.0, 0.1, 0.2])) for name, value in self.per_run()}
        self.flat = self.draw(0)
        self.alive = torch.ones(self.flat.shape[:-1], dtype=torch.bool)
        self.state: State = self.optimizer.init(self.groups(self.flat))

    def per_run(self) -> list[tuple[str, float]]:
        return [(name, getattr(self.config, name)) for name in fields_per_run(self.config)]

    def of(self, x: Tensor) -> Tensor:
        return x[self.index[0]] if self.single else x[list(self.index)]

    def draw(self, seed: int) -> Tensor:
        return self.of(torch.randn(R, self.layout.size, generator=generator(seed)))

    def groups(self, flat: Tensor) -> Params:
        return layout_groups(self.layout, flat)

    def updates(self, count: int, start: int = 0, gradients: Callable[[int], Tensor] | None = None) -> Training:
        for step in range(start, start + count):
            gradient = self.draw(100 + step) if gradients is None else gradients(step)
            gradient = torch.where(self.alive[..., None], gradient, 0.0)
            self.optimizer.update(self.groups(self.flat), self.groups(gradient), self.state, self.hyper, torch.tensor(step), self.alive)
        return self

    def everything(self) -> list[Tensor]:
        return [self.flat, *(x for tensors in self.state.values() for x in tensors.values())]


def law_optimizer_run_axis(config: Any) -> None:
    """Run r alone makes the same updates as in its fleet."""
    fleet = Training(config).updates(5)
    for r in range(R):
        for alone, pick in ((Training(config, [r]), slice(r, r + 1)), (Training(config, [r], single=True), r)):
            for a, b in zip(alone.updates(5).everything(), fleet.everything(), strict=True):
                close(a, b[pick], 1e-6)


def law_optimizer_order(config: Any) -> None:
    order = [2, 0, 1]
    for a, b in zip(Training(config, order).updates(5).everything(), Training(config).updates(5).everything(), strict=True):
        assert same(a, b[order])


def law_optimizer_dead(config: Any) -> None:
    """A run that is not alive keeps every bit of parameters and state, whatever its hyperparameters; the others move on (where they started stays)."""
    fleet = Training(config).updates(3)
    fixed = [id(x) for x in fleet.state.get("start", {}).values()]
    before = [x.clone() for x in fleet.everything()]
    fleet.alive = torch.tensor([True, False, True])
    fleet.hyper = {name: torch.where(fleet.alive, value, math.nan) for name, value in fleet.hyper.items()}
    fleet.updates(3, start=3)
    for old, new in zip(before, fleet.everything(), strict=True):
        assert same(new[1], old[1]) and all(new[r].equal(old[r]) == (id(new) in fixed) for r in (0, 2))


def law_optimizer_mates(config: Any) -> None:
    """A run full of NaN does not change its mates by one bit."""
    healthy, broken = Training(config).updates(5), Training(config)
    broken.flat[1] = math.nan
    broken.alive = torch.tensor([True, False, True])
    for a, b in zip(broken.updates(5).everything(), healthy.everything(), strict=True):
        assert same(a[[0, 2]], b[[0, 2]])


def law_optimizer_state(config: Any) -> None:
    """Every tensor of the state has the run axis first, is finite, and belongs to a group: so it is saved and compacted as it is."""
    fleet = Training(config).updates(2)
    names = set(fleet.groups(fleet.flat))
    for tensors in fleet.state.values():
        assert set(tensors) <= names and all(x.shape[0] == R and x.is_contiguous() and x.isfinite().all() for x in tensors.values())


def law_optimizer_descends(config: Any) -> None:
    """200 updates bring each run nearer to the minimum of |p|^2 / 2, and all of them get there on different ways."""
    if isinstance(config, BaumWelch):
        pytest.skip("takes gradients for counts")
    fleet = Training(config)
    start = fleet.flat.norm(dim=-1)
    fleet.updates(200, gradients=lambda _: fleet.flat.clone())
    end = fleet.flat.norm(dim=-1)
    assert (end < 0.9 * start).all() and len(set(end.tolist())) == R


OPTIMIZER_LAWS: list[Callable[[Any], None]] = [
    law_optimizer_run_axis, law_optimizer_order, law_optimizer_dead, law_optimizer_mates, law_optimizer_state, law_optimizer_descends,
]  # fmt: skip


# --- small fleets

SMALL = DecoderConfig(width=16, num_layers=2, num_heads=2, feed_forward=32)
MODULAR = RunConfig(
    task=ModularConfig(p=11, operation="add", train_fraction=0.6, val_fraction=0.3),
    model=SMALL,
    optimizer=AdamW(lr=1e-3, wd=0.1),
    batch_size=32,
    steps=100,
    log_every=1,
    evaluate_every=20,
)
MEMORIZE = replace(
    MODULAR,
    task=MemorizeConfig(strings=("abc", "a longer one", "xy", "hello", "yes, no")),
    model=replace(SMALL, num_layers=1, positions="rotary", dropout=0.2),
    clip=0.5,
    batch_size=8,
    evaluate=("train",),
)
MLP = replace(MODULAR, model=EmbeddingMLPConfig(num_inputs=3, embedding=8, hidden=(16, 12)), optimizer=SGD(lr=0.1, momentum=0.9), batch_size=0)
OWN = replace(MODULAR, model=ModuleConfig(module="own_models:Transformer"))
MUON = replace(MODULAR, model=replace(SMALL, norm="rms", bias=False), optimizer=Muon(), schedule=Schedule(kind="cosine", warmup=0.1))
LOW = replace(MODULAR, model=replace(SMALL, num_layers=1))
EMA = replace(MLP, gradient=Gradient(filter="ema", noise=1e-3), clip=0.5, optimizer=AdamW())
MA = replace(MLP, gradient=Gradient(filter="ma", filter_window=9, direction="orthogonal"), objective="stablemax", optimizer=Adam())
EGALITARIAN = replace(MLP, gradient=Gradient(direction="egalitarian"), optimizer=SGD(lr=1e-3, momentum=0.5))
FIXED = replace(LOW, weights=Weights(noise=1e-2, fixed_norm=True), optimizer=AdamW(decay_to="start"), objective="cross_entropy_float64")


def eight(config: RunConfig, **per_run: Sequence[Any]) -> list[RunConfig]:
    """Eight seeds; ``per_run``: dotted path with "__" for "." -> a value for each."""
    return [with_values(with_seed(config, s), {path.replace("__", "."): values[s] for path, values in per_run.items()}) for s in range(8)]


RATES = (1e-3, 8e-4, 5e-4, 1.2e-3, 2e-4, 6e-4, 4e-4, 7e-4)  # low: at three times as much a change of the last bit is one of the first digit 100 steps later
SHARES = (0.6, 0.5, 0.4, 0.3, 0.6, 0.2, 0.65, 0.55)
FLEETS = {  # the widest variety of settings that can share a fleet
    "modular": eight(
        MODULAR, optimizer__lr=RATES, optimizer__wd=[0.1 * s for s in range(8)], task__train_fraction=SHARES, schedule__warmup=[0.05 * s for s in range(8)]
    ),
    "memorize": eight(
        MEMORIZE, optimizer__lr=RATES, model__dropout=[0.05 * s + 0.05 for s in range(8)], clip=[0.1, 0.2, 0.5, 1, 5, 0.3, 0.4, 2], task__unscored=[0, 1] * 4
    ),
    "mlp": eight(
        MLP,
        optimizer__lr=[20 * rate for rate in RATES],
        task__train_fraction=SHARES,
        task__operation=["add", "sub"] * 4,
        model__embedding_std=[0.2 * s + 0.5 for s in range(8)],
    ),
    "own": eight(OWN, optimizer__lr=RATES, task__train_fraction=SHARES),
    "muon": eight(MUON, optimizer__lr=RATES, optimizer__adam_lr=RATES[::-1], optimizer__momentum=[0.9, 0.95] * 4, schedule__floor=[0.1 * s for s in range(8)]),
    "ema": eight(
        EMA,
        optimizer__lr=RATES,
        gradient__filter_gain=[0.5 * s for s in range(8)],
        gradient__filter_decay=[0.98, 0.5] * 4,
        gradient__noise=[1e-3 * (s + 1) for s in range(8)],
    ),
    "ma": eight(MA, optimizer__lr=RATES, gradient__filter_gain=[0.5 * s for s in range(8)], task__train_fraction=SHARES),
    "egalitarian": eight(EGALITARIAN, optimizer__lr=RATES, task__train_fraction=SHARES),
    "fixed": eight(FIXED, optimizer__lr=RATES, optimizer__wd=[0.5 * s for s in range(8)], weights__noise=[5e-3 * (s + 1) for s in range(8)]),
}


def everything(fleet: Fleet) -> dict[str, Tensor]:
    """All that training changes."""
    moments = {f"{moment} {name}": x for moment, tensors in fleet.state.items() for name, x in tensors.items()}
    return {"flat": fleet.flat, "status": fleet.status, "ended": fleet.ended, "hits": fleet.hits, "clock": fleet.clock, **moments}


def facts(*tables: Table) -> dict[tuple[int, int, str], float]:
    """(run, step, metric) -> value; none is there twice."""
    found: dict[tuple[int, int, str], float] = {}
    for table in tables:
        for name in table.keys() - {"run", "step"}:
            for run, step, value in zip(table["run"].tolist(), table["step"].tolist(), table[name].tolist(), strict=True):
                if not np.isnan(value):
                    assert (run, step, name) not in found
                    found[run, step, name] = value
    return found


def of_run(found: dict[tuple[int, int, str], float], run: int) -> dict[tuple[int, str], float]:
    return {(step, name): value for (r, step, name), value in found.items() if r == run}


def assert_alike(got: dict[Any, float], expected: dict[Any, float], tolerance: float = 1e-5) -> None:
    """Facts within ``tolerance`` of their value, gradient norms within a hundred times that; shares of tokens, which jump, are not looked at."""
    assert got.keys() == expected.keys()
    for key, value in got.items():
        if not key[-1].endswith(("accuracy", "exact", *IN_EVALUATIONS)):
            assert value == pytest.approx(expected[key], rel=tolerance * (100 if key[-1].endswith("norm") else 1), abs=1e-7), key


def finished(fleet: Fleet, chunk: int = 1000) -> tuple[Fleet, dict[tuple[int, int, str], float]]:
    """The fleet at its end, and all its facts."""
    tables = []
    while not fleet.done:
        tables.append(fleet.advance(chunk))
    return fleet, facts(*tables)
