"""The tables of the recall studies: which learning rate was chosen and what it gave, accuracy by length, published results beside ours.

chosen(tuning, by), lengths(by, (1, 2, 3)), published_table(PUBLISHED)     # the first of all rows, the others of the fresh ones
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from shoal.results import statistics
from shoal.results.rows import Rows
from shoal.results.tables import Table
from shoal.results.wording import number, plural, setting
from shoal.studies.shared import matching
from shoal.studies.tuning import Tuning, edges

METRIC, SOLVED = "test/accuracy", 0.99
LR, SEED = "optimizer.lr", "seeds.split"


def accuracy(rows: Rows, times: int = 1, which: str = "accuracy") -> NDArray[np.float64]:
    """[n]: at so many times the training length, in the order of the seeds. KeyError where that was not measured."""
    ordered = sorted(rows, key=lambda row: row[SEED])
    return np.array([{entry["length"]: entry[which] for entry in row["measures"]["lengths"]}[times * row["task.length"]] for row in ordered], dtype=np.float64)


def measured(rows: Rows) -> Rows:
    return Rows([row for row in rows if row["measures"].get("lengths")])


def chosen(tuning: Tuning, by: Sequence[str]) -> Table:
    def make(rows: Rows) -> list[dict[str, Any]]:
        tried = tuning.tried(rows)
        return [line(values, part, tried) for values, part in tuning.fresh(rows).groups(by)]

    def line(values: Mapping[str, Any], part: Rows, tried: Rows) -> dict[str, Any]:
        mine, best = tried.where(tuning.in_tuning(values)), {LR: part[0][LR]}
        times, observed = part.reached(METRIC, SOLVED)
        before = mine.where(best).reached(METRIC, SOLVED)[1]
        return {
            "setting": setting(values),
            "learning rate": part[0][LR],
            "at the edge of what was tried": "yes" if edges(mine, best) else "no",
            "solved in tuning": f"{int(before.sum())} of {len(before)}",
            "solved": statistics.proportion(int(observed.sum()), len(part)),
            "steps to 95 %": statistics.survival_median(*part.reached(METRIC, 0.95)),
            "steps to 99 %": statistics.survival_median(times, observed),
        }

    text = (
        f"The learning rate that solved most of {plural(len(tuning.seeds), 'tuning seed')}, then in the fewest steps, then with the highest last accuracy; "
        "and fresh seeds at it: the share solved (99 % at five evaluations in a row) and Kaplan-Meier medians of the steps, with 95 % intervals."
    )
    return Table("chosen", make, text)


def lengths(by: Sequence[str], multiples: Sequence[int]) -> Table:
    """``multiples``: of the training length."""

    def make(rows: Rows) -> list[dict[str, Any]]:
        return [line(values, measured(part)) for values, part in rows.groups(by) if measured(part)]

    def line(values: Mapping[str, Any], part: Rows) -> dict[str, Any]:
        far = [times for times in multiples if times <= part[0]["task.longest"]]
        at = {"at the training length" if times == 1 else f"at {times} times it": spread(accuracy(part, times)) for times in far}
        data = part[0].get("data") or {}
        looks = ("chance", "a random token of the sequence", "the commonest token", "the token before the query")
        guesses = {name: data.get(f"right by {name}") for name in looks}
        return {"setting": setting(values), "n": len(part), **at, "where the answer is not the query": spread(accuracy(part, which="distinct")), **guesses}

    text = (
        "Accuracy of fresh seeds: median (lowest to highest). Then, at the training length, what an answer gets right that looks at nothing, at any token "
        "of the sequence, at the one there is most of, at the token before the query."
    )
    return Table("lengths", make, text)


def spread(x: NDArray[np.float64]) -> str:
    return f"{number(float(np.median(x)), 3)} ({number(float(x.min()), 3)} to {number(float(x.max()), 3)})"


@dataclass(frozen=True, kw_only=True)
class Published:
    """A result of somebody else's, or an earlier one, and which of our rows repeat it."""

    setting: str
    source: str
    result: str  # as they state it
    seeds: str = "1"
    conditions: Mapping[str, Any] | None = None  # path of a row -> value; None = we have not run it
    times: int = 1  # ours, at so many times the training length
    differs: str


def published_table(published: Sequence[Published]) -> Table:
    def make(rows: Rows) -> list[dict[str, Any]]:
        return [line(one, Rows() if one.conditions is None else measured(matching(rows, one.conditions))) for one in published]

    def line(one: Published, part: Rows) -> dict[str, Any]:
        told = {"setting": one.setting, "source": one.source, "theirs": one.result, "their seeds": one.seeds}
        return told | {"ours": spread(accuracy(part, one.times)) if part else "not run", "our seeds": len(part), "what differs": one.differs}

    return Table("published", make, "Published and earlier results beside ours: median accuracy of the fresh seeds (lowest to highest).")
