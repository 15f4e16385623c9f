"""What one training step of one run costs, by three rules, and how many steps a budget pays for. Evaluations are not counted.

assignment   tokens x (6 parameters + 12 layers width length): the price list of a course's starter code. Parameters are all that are trained: a tied
             table once, positions, norms and biases, too. Its text counts a multiply-add as one operation, which is half of this.
products     matrix products, forward and backward, a multiply-add as two: three times ``Model.flops``, for each product has two others in its backward pass.
hardware     what a GPU executes: products, those that are made again in order to keep less, and the optimizer (see ``hardware``).

The second term of the assignment's rule is that of attention's scores: layers are those of attention, and a model without layers has the first term only. Its
length is that of the batch; the course's code has the model's positions there, which for language are as many.

    counts(run).products        # of one step
    budgeted(run).steps         # as many as run.budget pays for, by run.budget_rule
    print(explain(run))         # what `shoal flops` says
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch

from shoal import models, rng, tasks
from shoal.config import SGD, Adagrad, Adam, AdamW, BaumWelch, DecoderConfig, EncoderConfig, Gradient, Muon, RunConfig, Seeds, fields_per_run
from shoal.config.core import type_name
from shoal.config.fields import check
from shoal.contracts import Batch, Tables, Task
from shoal.mixers.attention import SHORT, Attention
from shoal.mixers.masks import Explicit
from shoal.models.decoder import Decoder
from shoal.nn.layers import SMALL_VOCABULARY
from shoal.nn.linear_cross_entropy import LARGE_VOCABULARY, MATERIALISED, MAX_WIDTH
from shoal.train.interventions import FINISH, RAISE

ELEMENTWISE = {SGD: 9, Adam: 15, AdamW: 14, Adagrad: 9, Muon: 11, BaumWelch: 20}  # operations an update makes on each parameter (Muon: of a matrix)
GRADIENT = 3  # on each parameter before that: mean over the batch, and the gradient's norm


class Counts(NamedTuple):
    """FLOPs of one step of one run."""

    assignment: int
    products: int
    hardware: int


class Shape(NamedTuple):
    """Of one run's batch."""

    rows: int  # B
    time: int  # T
    scored: int  # S

    @property
    def tokens(self) -> int:
        return self.rows * self.time


class Outline(NamedTuple):
    """What of a run there is to count, without its numbers."""

    task: Task
    tables: Tables
    model: models.AnyModel  # on the meta device, without a run axis
    shape: Shape


def outline(run: RunConfig) -> Outline:
    """ConfigError for a task or model that cannot be built. Of language this reads and encodes the corpus where that was not done before."""
    task = tasks.build(run.task)
    per_run = {path: [getattr(run.task, path)] for path in fields_per_run(run.task)}
    tables = task.setup({**per_run, "split_seed": [run.seeds.split]}, "cpu")
    batch = task.batch(tables, rng.key(torch.tensor([run.seeds.order]), "order"), torch.tensor(0), run.batch_size)
    with torch.device("meta"):
        model = models.build(run.model, task.vocab_size, task.max_length, ())
    shape = shape_of(batch)
    if isinstance(run.model, EncoderConfig) and run.model.frozen:
        shape = shape._replace(time=1)  # steps see what it made of a sentence, which it has read before
    return Outline(task, tables, model, shape)


def shape_of(batch: Batch) -> Shape:
    rows, time = batch.tokens.shape[-2:]
    return Shape(rows, time, batch.targets.shape[-1])


def counts(run: RunConfig) -> Counts:
    """Of one step."""
    _, _, model, shape = outline(run)
    return step(run, model, shape)


def step(run: RunConfig, model: models.AnyModel, shape: Shape) -> Counts:
    """The same of a model (without a run axis) and a batch that are there."""
    layers = sum(isinstance(block.mixer, Attention) for block in list[Any](model.blocks)) if isinstance(model, Decoder) else 0
    width = run.model.width if isinstance(run.model, DecoderConfig) else 0
    assignment = shape.tokens * (6 * sum(parameters(model).values()) + 12 * layers * width * shape.time)
    products = 3 * model.flops(*shape)
    return Counts(assignment, products, products + sum(hardware(run, model, shape).values()))


def parameters(model: models.AnyModel) -> dict[str, int]:
    """Group -> how many there are (a tied head: 0), those of all layers together. Models without blocks are grouped by their modules."""
    groups: Counter[str] = Counter({"embedding": 0} if isinstance(model, Decoder) else {})
    for name, parameter in model.named_parameters():
        groups[_group(name)] += parameter.numel()
    if isinstance(model, Decoder):
        groups["head"] += 0
    return dict(groups)


def _group(name: str) -> str:
    *path, last = name.split(".")
    if any(part.endswith("norm") for part in path):
        return "norms"
    parts = path or [last]
    return {"position": "positions", "feed_forward": "feed-forward"}.get(part := parts[2] if parts[0] == "blocks" else parts[0], part)


def products(model: models.AnyModel, shape: Shape) -> dict[str, int]:
    """Part of the model -> matrix products of one forward pass; together ``model.flops``."""
    if not isinstance(model, Decoder):
        return {"model": model.flops(*shape)}
    rows, time, scored = shape
    config, blocks = model.config, list[Any](model.blocks)
    parts = Counter({"embedding": 0})
    for index, mixer in enumerate(_mixers(config)):
        places = scored if index == config.num_layers - 1 else time
        module = blocks[index].mixer
        if isinstance(module, Attention):
            parts[f"{mixer}: scores and sums"] += module.mixing_flops(rows, time, places)
            parts[f"{mixer}: projections"] += module.projection_flops(rows, time, places)
        else:
            parts[mixer] += module.flops(rows, time, places)
        parts["feed-forward"] += 4 * rows * places * config.width * config.feed_forward
    return {**parts, "head": model.flops(*shape) - sum(parts.values())}


def hardware(run: RunConfig, model: models.AnyModel, shape: Shape) -> dict[str, int]:
    """What one step executes beside the matrix products of the rule "products", on a GPU.

    | part | why |
    |---|---|
    | head again | the fused cross-entropy computes logits once more in its backward pass (``shoal.nn.linear_cross_entropy``) |
    | scores again | so does fused attention with its scores: 2.5 forward passes in place of 2 (Dao 2023, arXiv 2307.08691, section 4) |
    | embedding | the gradient of a small vocabulary's table is a product with one-hot rows (``shoal.nn.layers``) |
    | Newton-Schulz | of Muon: two products of short x short x long and one of short^3 an iteration, for every matrix (Keller Jordan 2024) |
    | elementwise | the optimizer's operations on each parameter, counted in ``train/optimizers.py`` |

    Not here: norms, activations, softmax, scans and recurrences, drawing data; nor is taken off what fused attention skips above the diagonal.
    """
    matrices = {name: p for name, p in model.named_parameters() if p.dim() == 2}
    hidden = [matrices[name].shape for name in model.hidden_matrices()]
    total, kind = sum(parameters(model).values()), type(run.optimizer)
    parts = {"elementwise": total * (GRADIENT + ELEMENTWISE[kind])}
    if isinstance(run.optimizer, Muon):
        in_matrices = sum(map(math.prod, hidden))
        parts["elementwise"] += (total - in_matrices) * (ELEMENTWISE[AdamW] - ELEMENTWISE[Muon])
        parts["Newton-Schulz"] = run.optimizer.newton_schulz_steps * sum(map(_newton_schulz, hidden))
    if run.gradient.direction == "egalitarian":
        parts["Newton-Schulz"] = parts.get("Newton-Schulz", 0) + (RAISE + FINISH) * sum(_newton_schulz(p.shape) for p in matrices.values())
    if isinstance(model, Decoder):
        forward = products(model, shape)
        fused = {mixer for mixer, block in zip(_mixers(run.model), list[Any](model.blocks), strict=True) if not isinstance(block.mixer, Explicit)}
        parts["scores again"] = sum(forward.get(f"{mixer}: scores and sums", 0) for mixer in fused) // 2 if shape.time > SHORT else 0
        parts["head again"] = forward["head"] if _recomputes(run, model, shape) else 0
        if model.vocab_size <= SMALL_VOCABULARY and model.config.token_embedding == "trained":
            parts["embedding"] = 2 * shape.tokens * model.vocab_size * model.config.width
    return parts


def _recomputes(run: RunConfig, model: Decoder, shape: Shape) -> bool:
    """As the fused cross-entropy decides by itself, for a run alone."""
    small = run.precision == "bfloat16" and model.config.width <= MAX_WIDTH
    many = shape.rows * shape.scored * model.vocab_size > MATERIALISED
    return run.objective in ("cross_entropy", "masked_diffusion") and model.vocab_size >= LARGE_VOCABULARY and (small or many)


def _newton_schulz(shape: Sequence[int]) -> int:
    short, long = sorted(shape)
    return 4 * short * short * long + 2 * short**3


def _mixers(config: Any) -> list[str]:
    return [config.mixers[i % len(config.mixers)] for i in range(config.num_layers)] if isinstance(config, DecoderConfig) else []


def budgeted(run: RunConfig, known: dict[RunConfig, Counts] | None = None) -> RunConfig:
    """The run with as many steps as its budget pays for; as it is without one. ConfigError if that is not even one.

    ``known``: what steps cost that were looked at before, and now this one, for many runs that are alike.
    """
    if not run.budget:
        return run
    known, alike = {} if known is None else known, _priced(run)
    if alike not in known:
        known[alike] = counts(run)
    price = getattr(known[alike], run.budget_rule)
    check(price > 0, "budget_rule", f"by {run.budget_rule} a step of this model costs nothing; count by assignment or hardware")
    steps = int(run.budget) // price
    dear = f"{run.budget:g} FLOPs are less than one step, which costs {price:.4g} by the rule {run.budget_rule}"
    check(steps >= 1, "budget", f"{dear}; raise it, or make the model or the batch smaller")
    check(steps < 2**53, "budget", f"{run.budget:g} FLOPs pay for {steps:.4g} steps of {price:.4g} each, more than can be counted; lower it")
    return replace(run, steps=steps)


def _priced(run: RunConfig) -> RunConfig:
    """What of a run its price depends on; equal for those that differ in rates, scales and seeds."""
    return RunConfig(
        task=run.task,
        model=_usual(run.model),
        objective=run.objective,
        optimizer=_usual(run.optimizer),
        gradient=Gradient(direction=run.gradient.direction),
        seeds=Seeds() if run.batch_size else run.seeds,  # which may decide how many rows the whole table has
        batch_size=run.batch_size,
        precision=run.precision,
    )


def _usual(part: Any) -> Any:
    """The config with its per-run fields as they are by default."""
    return replace(part, **{name: getattr(type(part)(), name) for name in fields_per_run(part)})


# --- in words


def explain(run: RunConfig) -> str:
    """A config before it is trained: parameters, FLOPs by each rule, where the products go, what its steps or its budget come to."""
    task, tables, model, shape = outline(run)
    each, sizes = step(run, model, shape), parameters(model)
    total = sum(sizes.values())
    steps = budgeted(run).steps
    lines = [_says(run, task, shape), "", _line("parameters", f"{total:,}")]
    lines += [_line(f"  {name}", f"{size:,}", f"{size / total:.1%}", _remark(name, model)) for name, size in sizes.items()]

    lines += ["", _line("FLOPs", "a token", "a step", f"{steps:,} steps")]
    for rule, count in each._asdict().items():
        lines.append(_line(f"  {rule}", *(f"{x:.4g}" for x in (count / shape.tokens, count, count * steps))))
        if rule == "assignment":
            lines.append(_line("  (multiply-adds)", *(f"{x / 2:.4g}" for x in (count / shape.tokens, count, count * steps))))

    for title, parts, scale in (("products", products(model, shape), 3), ("hardware beside them", hardware(run, model, shape), 1)):
        lines += ["", _line(title, "a token", "of products")]
        lines += [
            _line(f"  {name}", f"{scale * x / shape.tokens:.4g}", f"{scale * x / max(each.products, 1):.1%}") for name, x in parts.items() if x or scale > 1
        ]

    seen = steps * shape.tokens
    paid = f"a budget of {run.budget:.4g} FLOPs by {run.budget_rule} pays for {steps:,} steps" if run.budget else f"no budget; {steps:,} steps"
    there = task.describe(tables, 0).get("train tokens")
    epochs = f"; {seen / there:.3g} epochs of {there:,} training tokens" if isinstance(there, int) else ""  # of sentences there is more to say
    return "\n".join([*lines, "", f"{paid}: {seen:,} tokens, {seen / total:.4g} a parameter{epochs}"])


def _says(run: RunConfig, task: Task, shape: Shape) -> str:
    model = run.model
    what = f"{type_name(type(run.task))}, vocabulary {task.vocab_size:,}; {type_name(type(model))}"
    if isinstance(model, DecoderConfig):
        kinds: Mapping[str, int] = Counter(_mixers(model))
        layers = " and ".join(f"{count} of {mixer}" for mixer, count in kinds.items()) or "none"
        what += f" of width {model.width}, layers: {layers}, {model.num_heads} heads, feed-forward {model.feed_forward}, {task.max_length:,} positions"
    scored = "" if shape.scored == shape.time else f", scored at {shape.scored} of {shape.time} positions"
    return f"{what}\na step reads {shape.rows:,} x {shape.time:,} = {shape.tokens:,} tokens{scored}"


def _remark(group: str, model: models.AnyModel) -> str:
    return "is the embedding" if group == "head" and isinstance(model, Decoder) and model.config.tied else ""


def _line(name: str, *cells: str) -> str:
    return f"{name:32}{''.join(f'{cell:>18}' for cell in cells)}".rstrip()
