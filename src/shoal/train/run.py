"""One run taken out of its fleet: its config, its task, its model with L = ()."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from shoal.config import RunConfig, run_id
from shoal.config.fields import check
from shoal.contracts import Task
from shoal.models import AnyModel


@dataclass(frozen=True)
class Run:
    config: RunConfig
    task: Task
    model: AnyModel
    past: Mapping[int, Callable[[], Run]] = field(default_factory=dict)  # number of updates -> loads the run as it was then
    kept: Callable[[], Run] | None = None  # loads it as it was at the best value of RunConfig.best_metric

    @property
    def id(self) -> str:
        return run_id(self.config)

    @property
    def snapshots(self) -> tuple[int, ...]:
        """The numbers of updates after which its weights were kept (RunConfig.snapshots), up to its end."""
        return tuple(self.past)

    def best(self) -> Run:
        """This run as it was at the best value of its best_metric."""
        check(self.kept is not None, "best_metric", "this run kept no best weights; name a metric for it before training, for example val/accuracy")
        assert self.kept is not None
        return self.kept()

    def at(self, step: int) -> Run:
        """This run as it was after ``step`` updates."""
        check(step in self.past, "step", f"no weights were kept after {step} updates; there are {', '.join(map(str, self.past)) or 'none'}")
        return self.past[step]()
