"""Tasks: each makes its data and says which positions are scored. One file per task; stream.py holds what they share.

task = build(ModularConfig(p=97, operation="div"))
"""

from __future__ import annotations

from shoal.config import MemorizeConfig, ModularConfig, TaskConfig
from shoal.contracts import Task
from shoal.tasks.memorize import MemorizeTask
from shoal.tasks.modular import ModularTask


def build(config: TaskConfig) -> Task:
    return TASKS[type(config)](config)


TASKS = {MemorizeConfig: MemorizeTask, ModularConfig: ModularTask}
