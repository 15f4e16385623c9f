"""Two stages: every setting on seeds that are never reported, then the best of each cell on fresh ones. What is chosen as best is not judged by what chose it.

tuning = Tuning(seeds=(1000, 1001), reported=without("optimizer.lr"), order=order, suffix=" (tuning)")
Study(..., wanted=lambda rows: tuning.wanted(config, rows), eager=True, figures=[tuning.of_fresh(curves("test/accuracy", by=by))])
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from shoal.config import RunConfig, StudyConfig, with_seed, with_values
from shoal.config.fields import check
from shoal.results.figures import Figure
from shoal.results.rows import Rows, row_key
from shoal.results.tables import Table
from shoal.studies.study import Measure, Only

Drawn = TypeVar("Drawn", Figure, Table)
Told = dict[str, Any]  # what tells a setting apart, as StudyConfig.settings gives it: dotted path -> value


@dataclass(frozen=True, kw_only=True)
class Tuning:
    seeds: tuple[int, ...]  # one after the other, never those that are reported
    reported: Callable[[Told], Told]  # of a setting: what its best is reported as; settings with the same compete
    order: Callable[[Rows], tuple[float, ...]]  # of a setting's runs on the tuning seeds: small is better, the first of equals is taken
    suffix: str = ""  # of the variant's name of a run on the tuning seeds, where it has the name its best is reported by
    share: float = 1.0  # of its steps that a run on the tuning seeds makes, its schedule drawn together with it

    def wanted(self, config: StudyConfig, rows: Rows) -> list[RunConfig]:
        """Every setting on the tuning seeds; and the best of each cell on the config's own, named as it is reported, once all that competed are in ``rows``."""
        settings = config.settings()
        runs = [with_seed(with_values(run, self.in_tuning({"variant": run.variant, "steps": run.steps})), seed) for _, run in settings for seed in self.seeds]
        for group in self.rivals(config):
            if tried := self.results(group, rows):
                told, run = group[min(range(len(group)), key=lambda place: self.order(tried[place]))]
                best = with_values(run, self.reported(told))
                runs += [with_seed(best, config.first_seed + s) for s in range(config.seeds)]
        return runs

    def rivals(self, config: StudyConfig) -> list[list[tuple[Told, RunConfig]]]:
        """The settings, those that compete together."""
        groups: dict[str, list[tuple[Told, RunConfig]]] = {}
        for told, run in config.settings():
            groups.setdefault(repr(self.reported(told)), []).append((told, run))
        return list(groups.values())

    def results(self, group: Sequence[tuple[Told, RunConfig]], rows: Rows) -> list[Rows]:
        """Of each that competes its runs on the tuning seeds; nothing before all of them are there."""
        tried = self.tried(rows)
        parts = [tried.where({row_key(path): value for path, value in self.in_tuning(told).items()}) for told, _ in group]
        return parts if all(len(part) >= len(self.seeds) for part in parts) else []

    def check(self, config: StudyConfig) -> None:
        """ConfigError where a reported seed is one of the tuning."""
        first, last = self.seeds[0], self.seeds[-1]
        apart = config.first_seed > last or config.first_seed + config.seeds <= first
        check(apart, "first_seed", f"seeds {first} to {last} are for tuning, and what is chosen on them is reported on others; begin after {last}")

    def fresh(self, rows: Rows) -> Rows:
        """Without the runs of the tuning."""
        return Rows([row for row in rows if row["seeds.split"] not in self.seeds])

    def tried(self, rows: Rows) -> Rows:
        """The runs of the tuning."""
        return Rows([row for row in rows if row["seeds.split"] in self.seeds])

    def in_tuning(self, told: Mapping[str, Any]) -> Told:
        """What a setting is called by its runs on the tuning seeds."""
        there = {path: min(told[path], max(2, round(self.share * told[path]))) for path in ("steps", row_key("steps")) if path in told}
        return {**told, **there, **({"variant": told["variant"] + self.suffix} if "variant" in told else {})}

    def measure(self, measure: Measure, asked: Callable[[RunConfig], bool] = lambda config: True) -> Only:
        """The same measure of the fresh runs alone; of those of them that are asked for."""
        return Only(measure, lambda config: config.seeds.split not in self.seeds and asked(config))

    def of_fresh(self, drawn: Drawn) -> Drawn:
        """The same figure or table of the fresh runs alone."""
        return of(self.fresh, drawn)


def of(part: Callable[[Rows], Rows], drawn: Drawn) -> Drawn:
    """The same figure or table of some of the rows."""
    if isinstance(drawn, Table):
        return replace(drawn, make=lambda rows: drawn.make(part(rows)))
    return replace(drawn, draw=lambda rows: drawn.draw(part(rows)))


def without(*paths: str) -> Callable[[Told], Told]:
    """For ``reported``: settings that differ in these alone compete."""
    return lambda told: {path: value for path, value in told.items() if path not in paths}


def edges(tried: Rows, chosen: Mapping[str, Any]) -> list[str]:
    """Names of what was chosen at an end of the values tried, where more than one was: the best may lie beyond."""
    ends = {path: tried.values(path) for path in chosen}
    return [path.rpartition(".")[2] for path, value in chosen.items() if len(ends[path]) > 1 and value in (ends[path][0], ends[path][-1])]
