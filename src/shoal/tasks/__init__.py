"""Tasks: each makes its data and says which positions are scored. One file per task; stream.py holds what they share.

task = build(ModularConfig(p=97, operation="div"))
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from shoal.config import LanguageConfig, MemorizeConfig, ModularConfig, MQARConfig, RecallConfig, SentencesConfig, TaskConfig, fields_per_run
from shoal.contracts import Task
from shoal.tasks import language, modular
from shoal.tasks.language import LanguageTask
from shoal.tasks.memorize import MemorizeTask
from shoal.tasks.modular import ModularTask
from shoal.tasks.mqar import MQARTask
from shoal.tasks.recall import RecallTask
from shoal.tasks.sentences import SentencesTask
from shoal.tasks.stream import export_test


def build(config: TaskConfig) -> Task:
    return TASKS[type(config)](config)


def export(config: TaskConfig, seed: int, path: str | Path) -> dict[str, Any]:
    """Write the data as a table, all of it where that is finite and the test rows where it is not, of text a line for each document.

    Returns what ``describe`` says of it.
    """
    if isinstance(config, ModularConfig):
        return modular.export(config, seed, path)
    if isinstance(config, LanguageConfig):
        return language.export(config, seed, path)
    return export_test(build(config), seed, path, **{name: getattr(config, name) for name in fields_per_run(config)})


TASKS = {
    MemorizeConfig: MemorizeTask,
    ModularConfig: ModularTask,
    RecallConfig: RecallTask,
    MQARConfig: MQARTask,
    LanguageConfig: LanguageTask,
    SentencesConfig: SentencesTask,
}
