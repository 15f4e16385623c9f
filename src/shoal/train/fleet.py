"""A fleet: runs of the same structure trained together, one captured step at a time.

    fleet = Fleet.build([with_seed(config, s) for s in range(64)], device="cuda")
    while not fleet.done:
        table = fleet.advance(1000)

Nothing is reduced over runs; a run whose loss or gradient is not finite keeps its last good state and its mates do not
change by one bit. A step never waits for the host: data, schedules and stop decisions are tensors; metrics leave the device once per ``advance``.
Not here: files (``checkpoint``), which runs go together (``plan``), what to do with results (``shoal.studies.driver``).
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import reduce
from typing import Any

import numpy as np
import torch
from torch import Tensor

from shoal import models, rng, tasks
from shoal.config import BaumWelch, LanguageConfig, Muon, RunConfig, fields_per_run
from shoal.contracts import Batch, Optimizer, State, Sums
from shoal.models.encoder import Encoder
from shoal.nn import initialise
from shoal.tasks.sentences import SentencesTask, cut, numbered
from shoal.train import best, diffusion, faults, flops, interventions, optimizers
from shoal.train.capture import Captured
from shoal.train.compiled import CHAINS, FEW, compiled, compiled_objective, plainly, restart
from shoal.train.interventions import Interventions
from shoal.train.layout import Layout
from shoal.train.memory import keep_freed_memory
from shoal.train.objectives import OBJECTIVES, add, means
from shoal.train.run import Run
from shoal.train.schedules import multiplier

Table = dict[str, np.ndarray]  # "step" and "run" int64 [n], metrics float32 [n], NaN = not measured there
RUNNING, FINISHED, COMPLETED, DEAD = range(4)
STATUS = ("running", "finished", "completed", "dead")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
EVALUATION_TOKENS = {"cpu": 1 << 14, "cuda": 1 << 18}  # tokens of one piece of an evaluation: fits the cache, fills the GPU
PLAIN_TOKENS = 1 << 15  # where nothing is compiled: operations one by one hold more
MATRICES = "matrices "  # how the names of groups of matrices begin
COMPACT_EVERY = 10  # evaluations between looks at who has left
RECOMPILE_WORTH = 20_000  # steps a smaller compiled fleet must still make: compiling takes some 20 s, halving saves a millisecond or two of each


class Fleet:
    runs: list[RunConfig]  # as born; a run's number everywhere is its place here
    present: list[int]  # the runs still in the tensors, in their order along R
    flat: Tensor  # float32 [R, P], all parameters
    state: State  # the optimizer's, and the interventions'
    status: Tensor  # int64 [R], an index into STATUS
    ended: Tensor  # int64 [R], updates made when it stopped running
    hits: Tensor  # int64 [R], evaluations in a row that met the stop rule

    def __init__(self, runs: Sequence[RunConfig], device: str | torch.device = "cpu", *, compile: bool | None = None, accumulate: int | None = None) -> None:
        """``accumulate``: more pieces than the runs' own, where that is what fits into memory."""
        self.runs, self.device = list(runs), torch.device(device)
        self.config = self.runs[0]
        if self.device.type == "cpu":
            keep_freed_memory()
        self.compile = self.device.type == "cuda" if compile is None else compile
        self.accumulate = accumulate or self.config.accumulate
        self.task = tasks.build(self.config.task)
        self.optimizer: Optimizer = optimizers.build(self.config.optimizer)
        self.step, self.evaluated, self.kept, self.seconds = 0, -1, -1, 0.0
        self.last_step = max(run.steps for run in self.runs)
        self.stops = {run.steps for run in self.runs}
        self.present = list(range(len(self.runs)))
        self.departed: dict[int, tuple[Tensor, int, int]] = {}  # run -> parameters on the CPU, status, ended
        self.snapshots: dict[int, Tensor] = {}  # step -> parameters then, as everyone() gives them, until whoever writes them takes them away
        self.summary: dict[str, float] = {}  # for a progress line: "finished", "dead", and "median" and "best" of ...
        self.latest = np.full(len(self.runs), np.nan)
        splits = self.config.evaluate
        kind = "loss" if isinstance(self.config.task, LanguageConfig) else "accuracy"
        self.summary_metric = self.config.stop_metric or (f"{splits[-1]}/{kind}" if splits else "batch/loss")

    @classmethod
    def build(cls, runs: Sequence[RunConfig], device: str | torch.device = "cpu", *, compile: bool | None = None, accumulate: int | None = None) -> Fleet:
        """A new fleet at step 0, initialised from its runs' seeds."""
        fleet = cls(runs, device, compile=compile, accumulate=accumulate)
        count = len(fleet.runs)
        model = fleet._new_model((count,))
        layout = fleet.layout_of(model)
        flat = torch.zeros(count, layout.size)
        layout.bind(model, flat)
        initialise(model, model.init_rules([run.model for run in fleet.runs]), torch.tensor([run.seeds.init for run in fleet.runs]))
        fleet.flat = flat.to(fleet.device)
        fleet.state = fleet.optimizer.init(layout_groups(layout, fleet.flat))
        fleet.state |= interventions.init(fleet.config, fleet.flat) | best.init(fleet.config, fleet.flat)
        zeros = torch.zeros(count, dtype=torch.int64, device=fleet.device)
        fleet.status, fleet.ended, fleet.hits = zeros, zeros.clone(), zeros.clone()
        fleet.assemble()
        return fleet

    def assemble(self) -> None:
        """Everything that follows from ``present``, ``flat`` and ``state``: the model on the parameters, hyperparameters, data, captured functions."""
        runs = [self.runs[r] for r in self.present]
        self.model = self._new_model((len(runs),))
        self.layout = self.layout_of(self.model)
        self.asked = interventions.build(self.runs, self.present, self.device)
        itself = self.config.precision == "float32" and self.asked.weight_noise is None
        self.weights = self.flat if itself else self.flat.to(DTYPES[self.config.precision], copy=True)  # what the model computes with
        self.parameters = self.layout.bind(self.model, self.weights)
        for buffer in self.model.buffers():
            buffer.data = buffer.to(self.device, DTYPES[self.config.precision] if buffer.is_floating_point() else None)
        if getattr(self.model, "rate", None) is not None:
            self.model.rate = self._column("model.dropout")
        self.hyper = {path.rpartition(".")[2]: self._column(path) for path in fields_per_run(self.config) if path.startswith("optimizer.")}
        self.schedule = {name: self._column(f"schedule.{name}") for name in ("warmup", "end", "floor")}
        self.steps = torch.tensor([self.runs[r].steps for r in self.present], device=self.device)  # int64: a float32 counts to 2**24
        self.stop_at = self._column("stop_at")
        self.clip = self._column("clip") if any(run.clip > 0 for run in self.runs) else None
        order = torch.tensor([run.seeds.order for run in runs], device=self.device)
        self.order_key, self.noise_key = rng.key(order, "order"), rng.key(order, "dropout")
        names = [path for path in fields_per_run(self.config) if path.startswith("task.")]
        per_run = {path.removeprefix("task."): [_get(run, path) for run in runs] for path in names}
        self.tables = self.task.setup({**per_run, "split_seed": [run.seeds.split for run in runs]}, self.device)
        self._remembers = isinstance(self.model, Encoder) and self.model.config.frozen
        if isinstance(self.model, Encoder) and self._remembers:
            self.tables, sentences = numbered(self.tables)
            self.model.remember(sentences, EVALUATION_TOKENS[self.device.type] // self.task.max_length, self.task.fingerprint)
        self.clock = torch.tensor(self.step, device=self.device)  # int64 scalar: the step, for the device

        if self.compile:
            restart()
        objective, plain = OBJECTIVES[self.config.objective], not self.compile or isinstance(self.model, Encoder)  # a library's code is captured as it is
        self._objective = objective if plain else compiled_objective(objective, self.model, self.last_step)
        self._draw, self._update = self._compiled(faults.drawing(self.config.fault, self.task), CHAINS), self._compiled(_update)
        self._disturbed = self._compiled(interventions.disturbed)
        self.length: int | None = None  # what the next step's batch is padded to; None where all have one length
        self._captured_steps: dict[int | None, Captured] = {}  # by that length
        self._pool = torch.cuda.graph_pool_handle() if self.device.type == "cuda" else None
        self._few = not plain and self.last_step // self.config.evaluate_every < FEW
        self._evaluation = self._one_evaluation if self._few else Captured(self._one_evaluation, self.device, self._quiet)

    @property
    def done(self) -> bool:
        return bool((self.status != RUNNING).all())

    def advance(self, num_steps: int) -> Table:
        """Up to ``num_steps`` updates of every running run, and the evaluations that fall due; the rows, in one transfer."""
        began, entries, made = time.perf_counter(), [], 0
        while True:
            if self.kept < self.step in self.config.snapshots:
                self.snapshots[self.step], self.kept = self.everyone(), self.step
            if self.evaluated < self.step and (self.step % self.config.evaluate_every == 0 or self.step in self.stops):
                metrics = self._evaluation()
                entries.append((self.step, list(self.present), _copy(metrics)))
                self.evaluated = self.step
                if self.step >= self.config.evaluate_every and self.step // self.config.evaluate_every % COMPACT_EVERY == 0:
                    self._compact()
                if self.device.type == "cpu" and self.done:  # asking a GPU would mean to wait for it
                    break
            if made == num_steps or self.step == self.last_step:
                break
            metrics = self._step()()
            if self.step % self.config.log_every == 0:
                entries.append((self.step, list(self.present), _copy(metrics)))
            self.step += 1
            made += 1
        table = _table(entries)
        self._summarise(table)
        self.seconds += time.perf_counter() - began
        return table

    def evaluate(self, split: str) -> dict[str, Tensor]:
        """Metric -> float32 [R] over the whole split."""
        return means(self._split_sums(split))

    def keep(self, index: Sequence[int]) -> None:
        """Go on with the runs at these places along R; the others leave with their parameters as they are."""
        status, ended = self.status.tolist(), self._made().tolist()
        for place, run in enumerate(self.present):
            if place not in set(index):
                self.departed[run] = (self.flat[place].cpu(), status[place], ended[place])
        self.present = [self.present[place] for place in index]
        chosen = torch.tensor(index, device=self.device)
        self.flat, self.status, self.ended, self.hits = (x.index_select(0, chosen) for x in (self.flat, self.status, self.ended, self.hits))
        self.state = {moment: {name: x.index_select(0, chosen) for name, x in tensors.items()} for moment, tensors in self.state.items()}
        self.assemble()

    def one(self, run: int) -> Run:
        """Run number ``run`` (as born) by itself, with L = ()."""
        flat = self.departed[run][0] if run in self.departed else self.flat[self.present.index(run)].cpu()
        model = self._new_model((), run)
        self.layout.bind(model, flat.clone())
        config = self.runs[run]
        return Run(config=config, task=tasks.build(config.task), model=model.requires_grad_(False))

    def everyone(self) -> Tensor:
        """float32 [all runs as born, P] on the CPU: the parameters as they are, of those who left as they were then."""
        flat = torch.zeros(len(self.runs), self.layout.size)
        flat[self.present] = self.flat.cpu()
        for run, (parameters, _, _) in self.departed.items():
            flat[run] = parameters
        return flat

    def outcomes(self) -> list[dict[str, Any]]:
        """Per run as born: {"status", "steps"}."""
        now = dict(zip(self.present, zip(self.status.tolist(), self._made().tolist(), strict=True), strict=True))
        now |= {run: (status, ended) for run, (_, status, ended) in self.departed.items()}
        return [{"status": STATUS[status], "steps": made} for status, made in (now[r] for r in range(len(self.runs)))]

    def record(self) -> dict[str, Any]:
        """What a reader must know of this fleet beside its runs' configs (JSON values)."""
        batch = self._draw(self.tables, self.order_key, self.clock, self.config.batch_size)
        shape, one = flops.shape_of(batch), self._new_model(())
        num_parameters = sum(flops.parameters(one).values())
        choices = {"device": str(self.device), "runs": len(self.runs), "compiled": self.compile, "accumulate": self.accumulate}
        return {
            "choices": choices | {"threads": torch.get_num_threads()},
            "model": {"parameters": num_parameters, "flops": flops.step(self.config, one, shape)._asdict(), "batch": list(shape)},
            "data": [self.task.describe(self.tables, place) for place in range(len(self.present))],
        }

    # One step and one evaluation: what is captured.

    def _step(self) -> Captured:
        """The next step. Each length of batches is a program of its own; they share their memory."""
        if isinstance(self.task, SentencesTask) and not self._remembers:
            if self.device.type == "cuda" and not self._captured_steps:
                self.length = self.task.encoded["train"].padded(0)  # the longest first, which needs most memory
                self._captured_steps[self.length] = Captured(self._one_step, self.device, self._quiet, pool=self._pool)
                self._captured_steps[self.length].record()
            self.length = self.task.length_at(self.step, self.config.batch_size)
        if self.length not in self._captured_steps:
            self._captured_steps[self.length] = Captured(self._one_step, self.device, self._quiet, pool=self._pool)
        return self._captured_steps[self.length]

    def _one_step(self) -> dict[str, Tensor]:
        batch = self._draw(self.tables, self.order_key, self.clock, self.config.batch_size)
        if self.length is not None:
            batch = cut(batch, self.length)
        if self.asked.weight_noise is not None:  # only until the update, after which weights are flat's again
            self.weights.copy_(self._disturbed(self.asked.weight_noise, self.layout, self.flat, self.clock))
        sums, grad = self._gradients(batch)
        rate = multiplier(self.config.schedule.kind, self.clock / self.steps, **self.schedule)
        hyper = {name: value * rate if name.endswith("lr") else value for name, value in self.hyper.items()}
        running = self.status == RUNNING
        due = running & (self.clock < self.steps)
        norm, alive = self._update(self.optimizer, self.asked, self.layout, self.flat, self.weights, self.state, grad, sums, hyper, self.clip, self.clock, due)
        died = due & ~alive
        self.status.copy_(torch.where(died, DEAD, self.status))
        self.ended.copy_(torch.where(died, self.clock, self.ended))
        self.clock += 1
        metrics = {f"batch/{name}": value for name, value in means(sums).items()} | {"batch/grad_norm": norm, "learning_rate": hyper["lr"]}
        return {name: torch.where(running, value, torch.nan) for name, value in metrics.items()}

    def _gradients(self, batch: Batch) -> tuple[Sums, Tensor]:
        """Sums over the batch and the gradient [R, P] of each run's summed loss, in ``accumulate`` pieces."""
        keys, rows = None, batch.tokens.shape[-2]
        if self.config.objective == "masked_diffusion":
            keys = diffusion.row_keys(rng.fold(self.noise_key, self.clock), rows)
        elif getattr(self.model, "rate", None) is not None:
            keys = rng.fold(rng.fold(self.noise_key, self.clock)[:, None], torch.arange(rows, device=self.device))
        total, grad = None, None
        for piece, piece_keys in _pieces(batch, keys, self.accumulate):
            sums = self._objective(self.model, piece, piece_keys)
            grads = torch.autograd.grad(sums.loss.sum(), list(self.parameters.values()))
            new = self.layout.pack(dict(zip(self.parameters, grads, strict=True)), 1)
            total, grad = (sums, new) if total is None or grad is None else (add(total, sums), grad.float() + new)
        assert total is not None and grad is not None
        return Sums(total.loss.detach(), total.weight, total.metrics), grad

    @torch.no_grad()
    def _one_evaluation(self) -> dict[str, Tensor]:
        metrics = {"weights/norm": optimizers.gradient_norm(self.flat)}
        for split in self.config.evaluate:
            metrics |= {f"{split}/{name}": value for name, value in self.evaluate(split).items()}
        due = (self.status == RUNNING) & ((self.clock % self.config.evaluate_every == 0) | (self.clock == self.steps))  # not where only a mate ends
        finished = torch.zeros_like(due)
        if self.config.stop_metric is not None:
            value = metrics[self.config.stop_metric]
            met = value <= self.stop_at if self.config.stop_metric.endswith("loss") else value >= self.stop_at
            self.hits.copy_(torch.where(due, torch.where(met, self.hits + 1, 0), self.hits))
            finished = due & (self.hits >= self.config.stop_evaluations)
        if self.config.best_metric is not None:
            finished |= best.keep(self.config, self.state["best"], self.flat, metrics[self.config.best_metric], self.clock, due)
        completed = due & ~finished & (self.clock >= self.steps)
        self.status.copy_(torch.where(finished, FINISHED, torch.where(completed, COMPLETED, self.status)))
        self.ended.copy_(torch.where(finished | completed, self.clock, self.ended))
        return {name: torch.where(due, value, torch.nan) for name, value in metrics.items()}

    @torch.no_grad()
    def _split_sums(self, split: str) -> Sums:
        tokens = min(EVALUATION_TOKENS[self.device.type], PLAIN_TOKENS) if self._few else EVALUATION_TOKENS[self.device.type]
        rows = max(16, tokens // (len(self.present) * self.task.max_length))
        batches = (faults.evaluated(self.config.fault, self.task, batch) for batch in self.task.evaluation(self.tables, split, rows))
        with plainly() if self._few else contextlib.nullcontext():
            return reduce(add, (self._objective(self.model, batch, None) for batch in batches))

    # Smaller parts.

    def _compiled(self, function: Callable[..., Any], options: dict[str, Any] | None = None) -> Callable[..., Any]:
        return compiled(function, options) if self.compile else function

    def _new_model(self, lead: tuple[int, ...], run: int = 0) -> models.AnyModel:
        with torch.device("meta"):  # the parameters come from elsewhere
            model = models.build(self.runs[run].model, self.task.vocab_size, self.task.max_length, lead)
        return model

    def layout_of(self, model: models.AnyModel | None = None) -> Layout:
        """Where this fleet's parameters lie; the same for any number of runs."""
        model = self._new_model((1,)) if model is None else model
        shapes = {name: tuple(p.shape[1:]) for name, p in model.named_parameters()}
        return Layout(shapes, parameter_groups(self.config.optimizer, shapes, model.hidden_matrices(), model.undecayed()))

    def _made(self) -> Tensor:
        """int64 [R], updates made so far."""
        return torch.where(self.status == RUNNING, self.step, self.ended)

    def _column(self, path: str) -> Tensor:
        return torch.tensor([float(_get(self.runs[r], path)) for r in self.present], device=self.device)

    @contextlib.contextmanager
    def _quiet(self) -> Iterator[None]:
        """No run is running, so a step changes nothing but the clock, which is put back."""
        saved = {x: x.clone() for x in (self.status, self.ended, self.hits, self.clock)}
        self.status.fill_(COMPLETED)
        yield
        for x, old in saved.items():
            x.copy_(old)

    def _compact(self) -> None:
        expected = min(self.last_step - self.step, self.step)  # as a rule of thumb what has gone on for long goes on for as long again
        if self.config.best_metric is not None or (self.compile and expected < RECOMPILE_WORTH):
            return  # best weights stay where they are
        index = (self.status == RUNNING).nonzero().flatten().tolist()
        if 0 < len(index) <= len(self.present) // 2:
            self.keep(index)

    def _summarise(self, table: Table) -> None:
        """For a progress line: who has stopped, and every run's last value."""
        status = [outcome["status"] for outcome in self.outcomes()]
        self.summary |= {"finished": status.count("finished") + status.count("completed"), "dead": status.count("dead")}
        values = table.get(self.summary_metric, np.full(len(table["step"]), np.nan))
        measured = ~np.isnan(values)
        self.latest[table["run"][measured]] = values[measured]  # rows come in the order of their steps
        if not np.isnan(self.latest).all():
            extreme = np.nanmin if self.summary_metric.endswith("loss") else np.nanmax
            self.summary |= {"median": float(np.nanmedian(self.latest)), "best": float(extreme(self.latest))}


def joined(tables: Sequence[Table]) -> Table:
    """Tables under each other; a metric one of them lacks is NaN there."""
    names = dict.fromkeys(name for table in tables for name in table)
    return {name: np.concatenate([table.get(name, np.full(len(table["step"]), np.nan, np.float32)) for table in tables]) for name in names}


def parameter_groups(config: Any, shapes: Mapping[str, Sequence[int]], hidden_matrices: Sequence[str], undecayed: Sequence[str] = ()) -> dict[str, list[str]]:
    """What the optimizer is handed: group name -> parameters. Muon gets its matrices by shape, Baum-Welch every table; everything else comes as one or two
    vectors."""
    if isinstance(config, BaumWelch):
        return {name: [name] for name in shapes}
    muon = isinstance(config, Muon)
    matrices = list(hidden_matrices) if muon else []
    rest = [name for name in shapes if name not in set(matrices)]
    spared = {name for name in rest if name in set(undecayed) or (getattr(config, "decay", "all") == "matrices" and len(shapes[name]) <= 1)}
    groups = {"rest" if muon else "flat": [name for name in rest if name not in spared], "undecayed": [name for name in rest if name in spared]}
    shared: dict[str, list[str]] = {}
    for name in matrices:
        shared.setdefault(MATRICES + " x ".join(map(str, shapes[name])), []).append(name)
    return shared | {group: names for group, names in groups.items() if names}


def layout_groups(layout: Layout, flat: Tensor) -> dict[str, Tensor]:
    """The groups as tensors: N matrices of one shape [R, N, in, out]; a parameter's own view [R, ...], where the group has its name; else a slice [R, P']."""

    def tensor(group: str, first: int, last: int) -> Tensor:
        if group.startswith(MATRICES):
            return layout.stack(flat, group)
        return layout.view(flat, group) if group in layout.shapes else flat[..., first:last]

    return {group: tensor(group, *ends) for group, ends in layout.groups.items()}


def _update(
    optimizer: Optimizer, asked: Interventions, layout: Layout, flat: Tensor, weights: Tensor, state: State, grad: Tensor, sums: Sums,
    hyper: Mapping[str, Tensor], clip: Tensor | None, step: Tensor, running: Tensor,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Mean gradient, clipping, who is alive, interventions, the optimizer; ``weights`` follow ``flat``. Returns the gradient norms and alive, both [R]."""
    grad = grad.float() / sums.weight.unsqueeze(-1)
    norm = optimizers.gradient_norm(grad)
    alive = running & torch.isfinite(sums.loss / sums.weight) & torch.isfinite(norm)
    if clip is not None:
        grad = grad * optimizers.clip_scale(norm, clip).unsqueeze(-1)
    grad = torch.where(alive.unsqueeze(-1), grad, 0.0)
    grad = interventions.changed(asked, layout, flat, grad, state, step, alive)
    optimizer.update(layout_groups(layout, flat), layout_groups(layout, grad), state, hyper, step, alive)
    if asked.weights.fixed_norm:
        interventions.hold_length(flat, state, alive)
    if weights is not flat:
        weights.copy_(flat)
    return norm, alive


def _pieces(batch: Batch, keys: Tensor | None, count: int) -> Iterator[tuple[Batch, Tensor | None]]:
    """The batch cut along B into ``count`` pieces, with their dropout keys."""
    size = -(-batch.tokens.shape[-2] // count)
    for start in range(0, batch.tokens.shape[-2], size):
        cut = slice(start, start + size)
        yield batch.each(lambda x, cut=cut: x[..., cut, :]), None if keys is None else keys[..., cut]


def _get(run: RunConfig, path: str) -> Any:
    value: Any = run
    for name in path.split("."):
        value = getattr(value, name)
    return value


def _copy(metrics: Mapping[str, Tensor]) -> tuple[tuple[str, ...], Tensor]:
    return tuple(metrics), torch.stack([value.float() for value in metrics.values()])


def _table(entries: list[tuple[int, list[int], tuple[tuple[str, ...], Tensor]]]) -> Table:
    """(step, runs, (names, values [M, R])) -> one row per step and run."""
    if not entries:
        return {"step": np.zeros(0, np.int64), "run": np.zeros(0, np.int64)}
    values = iter(torch.cat([values.flatten() for _, _, (_, values) in entries]).cpu().numpy().tolist())  # the one transfer
    rows: dict[tuple[int, int], dict[str, float]] = {}
    for step, runs, (names, _) in entries:
        for name in names:
            for run in runs:
                value = next(values)
                if value == value:  # not NaN
                    rows.setdefault((step, run), {})[name] = value
    metrics = list(dict.fromkeys(name for _, _, (names, _) in entries for name in names))
    table: Table = {"step": np.array([step for step, _ in rows], np.int64), "run": np.array([run for _, run in rows], np.int64)}
    return table | {name: np.array([row.get(name, np.nan) for row in rows.values()], np.float32) for name in metrics}
