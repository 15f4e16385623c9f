"""A study: a question, the runs it wants, what is measured after training, figures, claims."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from shoal.config import RunConfig, StudyConfig
from shoal.config.load import override
from shoal.results.claims import Claim
from shoal.results.figures import Figure
from shoal.results.rows import Rows, row_key
from shoal.results.tables import Table
from shoal.results.wording import setting

if TYPE_CHECKING:
    from shoal.train.run import Run

Wanted = Callable[[Rows], Sequence[RunConfig]]
Measure = Callable[["Run"], list[dict[str, Any]]]


@dataclass(frozen=True, kw_only=True)
class Study:
    name: str
    question: str
    main_metric: str  # of an evaluation, e.g. "val/accuracy": what the report leads with and what "the best run" means
    wanted: Wanted  # pure; called with all rows so far until it asks for nothing new
    eager: bool = False  # ``wanted`` may also be called with a part of what it has named: it then names no run before all that the run follows from is there
    measures: Mapping[str, Measure] = field(default_factory=dict)  # after training: samples, lengths, maps
    timed: Collection[str] = ()  # the measures whose result is a time: taken one after another, with nothing beside them
    figures: Sequence[Figure] = ()
    tables: Sequence[Table] = ()
    claims: Sequence[Claim] = ()
    config: StudyConfig | None = None  # the fields it was made from, where it has any: `shoal report` makes it again from them


@dataclass(frozen=True)
class Only:
    """A measure of the runs that are asked for. The others have no rows of it, and are not loaded for it."""

    measure: Measure
    asked: Callable[[RunConfig], bool]

    def __call__(self, run: Run) -> list[dict[str, Any]]:
        return self.measure(run) if self.asked(run.config) else []


def grid(run: RunConfig, values: Mapping[str, Sequence[Any]] | None = None, *, seeds: int = 3, first_seed: int = 0) -> Wanted:
    """All combinations of ``values`` (dotted path -> values), every seed: ``grid(RunConfig(), {"optimizer.lr": [1e-3, 1e-2]}, seeds=8)``.

    ConfigError for a path that is not there, a value of the wrong type, an empty list.
    """
    config = override(StudyConfig(run=run, grid={path: list(v) for path, v in (values or {}).items()}, seeds=seeds, first_seed=first_seed), {})
    return lambda rows: config.runs()


def cells(config: StudyConfig) -> list[dict[str, Any]]:
    """Every variant with every combination of the grid's values, as conditions for ``Rows.where``; ``[{}]`` without either."""
    return [{row_key(path): value for path, value in told.items()} for told, _ in config.settings()]


def about(text: str, cell: Mapping[str, Any], told: Sequence[str] = ()) -> str:
    """A claim's sentence with the settings it is about, but for those it has told: "It learns (wd = 0)." """
    rest = {path: value for path, value in cell.items() if path not in told}
    return f"{text.rstrip('.')} ({setting(rest)})." if rest else text
