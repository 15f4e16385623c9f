"""One run taken out of its fleet: its config, its task, its model with L = ()."""

from __future__ import annotations

from dataclasses import dataclass

from shoal.config import RunConfig, run_id
from shoal.contracts import Task
from shoal.models import AnyModel


@dataclass(frozen=True)
class Run:
    config: RunConfig
    task: Task
    model: AnyModel

    @property
    def id(self) -> str:
        return run_id(self.config)
