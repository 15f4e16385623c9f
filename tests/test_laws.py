"""Every law of every room, over every case; the laws are in ``laws.py`` and ``laws_training.py``."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import laws
import laws_training
import pytest

from shoal import mixers, models, tasks
from shoal.train import objectives, optimizers

ROOMS = {  # what there is, what there is an example of
    "mixer": (mixers.MIXERS, laws.MIXER_EXAMPLES),
    "model": (models.MODELS, laws.MODEL_EXAMPLES),
    "task": (tasks.TASKS, laws_training.TASK_EXAMPLES),
    "objective": (objectives.OBJECTIVES, laws_training.OBJECTIVE_REFERENCES),
    "optimizer": (optimizers.OPTIMIZERS, laws_training.OPTIMIZER_EXAMPLES),
}


def over(every_law: Sequence[Callable[[Any], None]], cases: Mapping[str, Any]) -> Any:
    return pytest.mark.parametrize(
        ("law", "case"), [pytest.param(law, case, id=f"{law.__name__.removeprefix('law_')}-{name}") for law in every_law for name, case in cases.items()]
    )


@over(laws.MIXER_LAWS, laws.mixer_cases())
def test_mixer(law: Callable[[Any], None], case: Any) -> None:
    law(case)


@over(laws.MODEL_LAWS, laws.model_cases())
def test_model(law: Callable[[Any], None], case: Any) -> None:
    law(case)


@over(laws_training.TASK_LAWS, laws_training.task_cases())
def test_task(law: Callable[[Any], None], case: Any) -> None:
    law(case)


@over(laws_training.OBJECTIVE_LAWS, {name: name for name in laws_training.OBJECTIVE_REFERENCES})
def test_objective(law: Callable[[Any], None], case: Any) -> None:
    law(case)


@over(laws_training.OPTIMIZER_LAWS, laws_training.optimizer_cases())
def test_optimizer(law: Callable[[Any], None], case: Any) -> None:
    law(case)


@pytest.mark.parametrize("room", ROOMS)
def test_everything_has_an_example(room: str) -> None:
    known, examples = ROOMS[room]
    missing = [getattr(entry, "__name__", entry) for entry in known if entry not in examples]
    assert not missing, f"no law looks at the {room} {', '.join(missing)}: add a small example to the tables of tests/laws.py or tests/laws_training.py"
