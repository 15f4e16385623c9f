"""RunConfig and StudyConfig, and the few functions on configs everything uses."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import itertools
import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, get_args, get_type_hints

from shoal.config.fields import PER_RUN, ConfigError, PerRun, check
from shoal.config.models import DecoderConfig, ModelConfig
from shoal.config.optimizers import AdamW, Gradient, OptimizerConfig, Weights
from shoal.config.tasks import ModularConfig, TaskConfig


@dataclass(frozen=True, kw_only=True)
class Seeds:
    """Three separate seeds, so that what varies can be chosen."""

    split: PerRun[int] = 0  # which rows are trained on
    init: PerRun[int] = 0
    order: PerRun[int] = 0  # order of data, and dropout

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            check(0 <= value < 2**31, name, f"a seed is a whole number from 0 to 2**31 - 1, not {value}")


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """The learning rate as a multiple of its peak, over progress = step / steps in [0, 1]."""

    kind: Literal["constant", "cosine", "linear"] = "constant"
    warmup: PerRun[float] = 0.0  # share of the run that rises linearly from 0
    floor: PerRun[float] = 0.0  # what cosine and linear end at
    end: PerRun[float] = 1.0  # progress at which cosine and linear have reached the floor

    def __post_init__(self) -> None:
        check(0 <= self.warmup < 1, "warmup", f"is a share of the run in [0, 1), not {self.warmup}")
        check(self.warmup < self.end <= 1, "end", "must lie after the warm-up and at most at 1")
        check(0 <= self.floor <= 1, "floor", "is a share of the peak in [0, 1]")


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    task: TaskConfig = field(default_factory=ModularConfig)
    model: ModelConfig = field(default_factory=DecoderConfig)
    objective: Literal["cross_entropy", "cross_entropy_float64", "stablemax", "likelihood", "masked_diffusion"] = "cross_entropy"
    optimizer: OptimizerConfig = field(default_factory=AdamW)
    gradient: Gradient = field(default_factory=Gradient)
    weights: Weights = field(default_factory=Weights)
    schedule: Schedule = field(default_factory=Schedule)
    seeds: Seeds = field(default_factory=Seeds)
    steps: PerRun[int] = 1000
    budget: PerRun[float] = 0.0  # FLOPs a run may spend on training: its steps are as many as it pays for, whatever ``steps`` says; 0 = none
    budget_rule: Literal["assignment", "products", "hardware"] = "assignment"  # how they are counted, see shoal/train/flops.py
    batch_size: int = 512  # 0 = the whole training table
    accumulate: int = 1  # pieces a batch is worked through in; the result is that of the whole batch
    clip: PerRun[float] = 0.0  # largest gradient norm of a run; 0 = none
    precision: Literal["float32", "bfloat16"] = "float32"  # of the matrix products; parameters, loss and optimizer are always float32
    log_every: int = 50  # steps between rows of training metrics (loss, gradient norm)
    evaluate_every: int = 50  # steps between evaluations of whole splits
    evaluate: tuple[str, ...] = ("train", "val")
    stop_metric: str | None = None  # a run is finished once this evaluation metric ...
    stop_at: PerRun[float] = 0.99  # ... has reached this value ("loss" metrics: fallen to it) ...
    stop_evaluations: int = 5  # ... at so many evaluations in a row
    best_metric: str | None = None  # the weights at the best value of this evaluation metric are kept, beside those at the end
    patience: int = 0  # a run is finished, too, after so many evaluations in a row without a better value of best_metric; 0 = never
    snapshots: tuple[int, ...] = ()  # numbers of updates after which the weights are kept, beside those at the end
    fault: Literal["none", "shift", "leak", "padding", "labels", "repeat"] = "none"  # a deliberate mistake of the implementation, to see what it looks like:
    # targets are the present token; attention sees the next one (with model.causal false); padding is scored; targets of other rows; always the same batch
    variant: PerRun[str] = ""  # what its study calls this setting

    def __post_init__(self) -> None:
        for name in ("steps", "accumulate", "log_every", "evaluate_every", "stop_evaluations"):
            check(getattr(self, name) >= 1, name, f"must be 1 or more, not {getattr(self, name)}")
        check(self.batch_size >= 0, "batch_size", "must be 0 (the whole training table) or more")
        check(self.batch_size % self.accumulate == 0, "accumulate", f"{self.accumulate} pieces do not divide the batch of {self.batch_size}")
        check(0 <= self.budget < float("inf"), "budget", f"must be 0 (none) or a number of FLOPs such as 1e15, not {self.budget}")
        check(self.patience >= 0, "patience", f"must be 0 (never) or more evaluations, not {self.patience}")
        check(self.best_metric is not None or not self.patience, "patience", "waits for a better best_metric, and none is named; for example val/accuracy")
        check(self.clip >= 0, "clip", "must be 0 (none) or more")
        check(all(step >= 0 for step in self.snapshots), "snapshots", "are numbers of updates: 0 or more")
        check(self.variant.isprintable(), "variant", f"is a name on one line, not {self.variant!r}")


@dataclass(frozen=True, kw_only=True)
class StudyConfig:
    """The fields of a study: a run, what is varied, how many seeds."""

    run: RunConfig = field(default_factory=RunConfig)
    variants: dict[str, dict[str, Any]] = field(default_factory=dict)  # name -> changes of the run, where no grid can say what is compared
    grid: dict[str, list[Any]] = field(default_factory=dict)  # dotted path in the run -> values; all combinations, for every variant
    seeds: int = 3  # seeds 0 .. seeds-1, each sets split, init and order
    first_seed: int = 0

    def __post_init__(self) -> None:
        check(self.seeds >= 1, "seeds", f"at least 1 seed is needed, not {self.seeds}")
        check(0 <= self.first_seed <= 2**31 - self.seeds, "first_seed", f"seeds are whole numbers from 0 to 2**31 - 1; {self.first_seed} does not fit")
        for path, values in self.grid.items():
            check(len(values) > 0, f"grid.{path}", "the list of values is empty; give at least one or remove the line")
            check(len({json.dumps(v, sort_keys=True) for v in values}) == len(values), f"grid.{path}", "a value is listed twice")

    @property
    def num_runs(self) -> int:
        return self.seeds * max(1, len(self.variants)) * math.prod(map(len, self.grid.values()))

    def settings(self) -> list[tuple[dict[str, Any], RunConfig]]:
        """Every variant with every combination of the grid: what tells it apart (dotted path -> value) and its run, seeds aside."""
        from shoal.config.load import override  # which knows StudyConfig

        bases = [({"variant": name}, override(self.run, changes | {"variant": name})) for name, changes in self.variants.items()] or [({}, self.run)]
        combinations = [dict(zip(self.grid, values, strict=True)) for values in itertools.product(*self.grid.values())]
        return [(told | chosen, with_values(run, chosen)) for told, run in bases for chosen in combinations]

    def runs(self) -> list[RunConfig]:
        """Every setting, every seed; seeds vary fastest."""
        return [with_seed(run, self.first_seed + s) for _, run in self.settings() for s in range(self.seeds)]


def with_seed(run: RunConfig, seed: int) -> RunConfig:
    """The run with split, init and order seed all set to ``seed``."""
    return dataclasses.replace(run, seeds=Seeds(split=seed, init=seed, order=seed))


def with_values(config: Any, values: Mapping[str, Any]) -> Any:
    """A copy with dotted paths replaced at once: ``with_values(run, {"optimizer.lr": 1e-2})``. Lists become tuples where the field is one."""
    return _replace(config, {tuple(path.split(".")): value for path, value in values.items()}, "")


def _replace(config: Any, values: Mapping[tuple[str, ...], Any], prefix: str) -> Any:
    changes: dict[str, Any] = {}
    for head in dict.fromkeys(path[0] for path in values):
        known = getattr(config, "__dataclass_fields__", {})
        if head not in known:
            raise ConfigError(prefix + head, f"there is no such field; known here: {', '.join(known) or 'none'}")
        old, inner = getattr(config, head), {path[1:]: value for path, value in values.items() if path[0] == head}
        changes[head] = _replace(old, inner, f"{prefix}{head}.") if () not in inner else _like(old, inner[()])
    return dataclasses.replace(config, **changes)


def _like(old: Any, value: Any) -> Any:
    """What YAML and Python write differently: a list for a tuple, 1 for 1.0."""
    if isinstance(old, tuple) and isinstance(value, list):
        return tuple(value)
    return float(value) if isinstance(old, float) and isinstance(value, int) and not isinstance(value, bool) else value


def flatten(config: Any, prefix: str = "") -> dict[str, Any]:
    """Dotted path -> value, in order. A nested config's class is under ``<path>.type`` in lower case ("modular", "adamw")."""
    flat: dict[str, Any] = {}
    for f in dataclasses.fields(config):
        value, path = getattr(config, f.name), f"{prefix}{f.name}"
        if dataclasses.is_dataclass(value):
            if path in ("task", "model", "optimizer", "run.task", "run.model", "run.optimizer"):
                flat[f"{path}.type"] = type_name(type(value))
            flat |= flatten(value, f"{path}.")
        else:
            flat[path] = list(value) if isinstance(value, tuple) else value
    return flat


def type_name(cls: type) -> str:
    """The name a config class has in YAML: ModularConfig -> "modular", EmbeddingMLPConfig -> "embedding_mlp", AdamW -> "adamw"."""
    name = cls.__name__.removesuffix("Config")
    return {"EmbeddingMLP": "embedding_mlp"}.get(name, name.lower())


def fields_per_run(config: Any, prefix: str = "") -> Iterator[str]:
    """Dotted paths of the PerRun fields of a config."""
    hints = _hints(type(config))
    for f in dataclasses.fields(config):
        value = getattr(config, f.name)
        if dataclasses.is_dataclass(value):
            yield from fields_per_run(value, f"{prefix}{f.name}.")
        elif PER_RUN in getattr(hints[f.name], "__metadata__", ()) or any(PER_RUN in getattr(a, "__metadata__", ()) for a in get_args(hints[f.name])):
            yield f"{prefix}{f.name}"


_hints = functools.cache(functools.partial(get_type_hints, include_extras=True))  # asked for every run of a fleet


def run_id(run: RunConfig) -> str:
    """12 hexadecimal digits: the hash of the full resolved config."""
    return hashlib.sha256(json.dumps(flatten(run), sort_keys=True).encode()).hexdigest()[:12]
