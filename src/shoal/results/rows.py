"""Rows: what a study has measured so far, one mapping per run. Everything a claim, a figure or a report knows, it knows from here.

A row's keys: "id", "fleet", "status" (finished = stop rule met, completed = all steps made, dead = loss or gradient not finite, running), "steps" (made),
"seconds", every path of the flat config ("optimizer.lr"; where a path has the name of another key, as the budget "steps" has, it is "config.steps"),
"parameters", "flops.<part>", "final.<metric>" (last value), "best.<metric>" (lowest loss, highest of all else), "data" (dict),
"measures" (name -> list of dict). Metric columns are read from the parquet parts
when first asked for, one column at a time, and kept. Not here: any statistics.

    rows.where({"task.p": 97}).column("final.val/accuracy")       # float [n]
    rows.reached("val/accuracy", 0.99)                            # (times [n], observed [n])
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple, overload

import numpy as np
import pyarrow.parquet as pq
from numpy.typing import NDArray

OWN_KEYS = ("id", "fleet", "status", "steps", "seconds", "parameters", "flops", "data", "measures")


def lower_is_better(metric: str) -> bool | None:
    """True for losses, False for accuracies; None where neither end is good (norms, learning rates, what a number format loses)."""
    name = metric.rsplit("/", 1)[-1]
    return None if name in ("grad_norm", "learning_rate", "norm", "zero_loss", "collapse") else name.endswith(("loss", "perplexity"))


class Series(NamedTuple):
    """One metric of a fleet's runs, laid end to end by run, then step; what was not recorded (NaN) is left out."""

    steps: NDArray[np.int64]  # [m]
    values: NDArray[np.float64]  # [m]
    bounds: NDArray[np.int64]  # [R + 1]; run r is bounds[r] : bounds[r + 1]

    def of(self, run: int) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
        part = slice(self.bounds[run], self.bounds[run + 1])
        return self.steps[part], self.values[part]


class Metrics:
    """The metric columns of one fleet of ``num_runs`` runs."""

    def __init__(self, parts: Sequence[Path], num_runs: int) -> None:
        self._parts, self._num_runs = list(parts), num_runs
        self._series: dict[str, Series] = {}

    @cached_property
    def _columns(self) -> list[set[str]]:
        return [set(pq.read_schema(part).names) for part in self._parts]

    @cached_property
    def names(self) -> list[str]:
        return sorted(set().union(*self._columns) - {"step", "run"})

    def _read(self, column: str) -> NDArray[Any]:
        pieces = []
        for part, known in zip(self._parts, self._columns, strict=True):
            if column in known:
                pieces.append(pq.ParquetFile(part).read([column])[column].to_numpy())
            else:
                pieces.append(np.full(pq.read_metadata(part).num_rows, np.nan))
        return np.concatenate(pieces) if pieces else np.zeros(0)

    @cached_property
    def _order(self) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
        step, run = self._read("step").astype(np.int64), self._read("run").astype(np.int64)
        order = np.lexsort((step, run))
        return order, step[order], run[order]

    def series(self, metric: str) -> Series:
        if metric not in self._series:
            order, step, run = self._order
            values = self._read(metric).astype(np.float64)[order] if metric in self.names else np.full(order.size, np.nan)
            kept = ~np.isnan(values)
            self._series[metric] = Series(step[kept], values[kept], np.searchsorted(run[kept], np.arange(self._num_runs + 1)))
        return self._series[metric]

    def last_step(self, run: int) -> int:
        _, step, runs = self._order
        first, end = np.searchsorted(runs, [run, run + 1])
        return int(step[first:end].max()) if end > first else 0


class Row(Mapping[str, Any]):
    """One run. ``own`` holds the keys known without reading metrics; "steps" of a running run, "measures", "final.*" and "best.*" are read when asked for."""

    def __init__(
        self,
        own: Mapping[str, Any],
        config: Mapping[str, Any],
        metrics: Metrics,
        run: int,
        measures: Callable[[], dict[str, list[dict[str, Any]]]] = dict,
    ) -> None:
        self.config = dict(config)  # dotted path -> value, under the config's own names
        self._fixed = {**own, **{row_key(path): value for path, value in config.items()}}
        self._metrics, self._run, self._measures = metrics, run, measures

    def __getitem__(self, key: str) -> Any:
        if key in self._fixed:
            return self._fixed[key]
        if key == "steps":
            return self._metrics.last_step(self._run)
        if key == "measures":
            self._fixed["measures"] = self._measures()
            return self._fixed["measures"]
        kind, _, metric = key.partition(".")
        if kind in ("final", "best") and metric in self._metrics.names:
            _, values = self.curve(metric)
            lower = lower_is_better(metric)
            if values.size and (kind == "final" or lower is not None):
                return float(values[-1] if kind == "final" else values.min() if lower else values.max())
        raise KeyError(key)

    def curve(self, metric: str) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
        """(steps, values), each [number of times it was recorded]."""
        return self._metrics.series(metric).of(self._run)

    def __iter__(self) -> Iterator[str]:
        yield from list(self._fixed)
        yield from [key for key in ("steps", "measures") if key not in self._fixed]
        yield from (key for metric in self._metrics.names for key in (f"final.{metric}", f"best.{metric}") if key in self)

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def __repr__(self) -> str:
        return f"Row({self.get('id')}, {self.get('status')}, steps={self['steps']})"


class Rows(Sequence[Row]):
    """An immutable sequence of rows."""

    def __init__(self, rows: Sequence[Row] = ()) -> None:
        self._rows = tuple(rows)

    def __len__(self) -> int:
        return len(self._rows)

    @overload
    def __getitem__(self, index: int) -> Row: ...
    @overload
    def __getitem__(self, index: slice) -> Rows: ...
    def __getitem__(self, index: int | slice) -> Row | Rows:
        return Rows(self._rows[index]) if isinstance(index, slice) else self._rows[index]

    def __repr__(self) -> str:
        return f"Rows({len(self)} runs; differing: {', '.join(self.differing()) or 'nothing'})"

    def _check(self, name: str) -> None:
        if self._rows and not any(name in row for row in self._rows):
            known = {key for row in self._rows for key in row}
            near = difflib.get_close_matches(name, known, n=1)
            raise KeyError(f"no run has {name!r}" + (f"; did you mean {near[0]!r}?" if near else ""))

    @property
    def metrics(self) -> list[str]:
        """Names of all metrics recorded in any of the fleets."""
        return sorted({name for metrics in {id(row._metrics): row._metrics for row in self._rows}.values() for name in metrics.names})

    def where(self, conditions: Mapping[str, Any]) -> Rows:
        """The rows in which every path has the value. A path no row has is a KeyError: it is a slip of the pen."""
        for path in conditions:
            self._check(path)
        wanted = {path: _comparable(value) for path, value in conditions.items()}
        return Rows([row for row in self._rows if all(path in row and _comparable(row[path]) == value for path, value in wanted.items())])

    def column(self, name: str) -> NDArray[Any]:
        """[n]: int or bool where all values are, float with NaN for what a run lacks, otherwise objects with None for that."""
        self._check(name)
        values = [row.get(name) for row in self._rows]
        if any(not isinstance(v, (int, float)) for v in values if v is not None):
            column = np.empty(len(values), dtype=object)
            column[:] = values
            return column
        return np.array([np.nan if v is None else v for v in values]) if values else np.zeros(0)

    def values(self, name: str) -> list[Any]:
        """Sorted distinct values (None first); names of variants as they come, since the study gave them in its order."""
        self._check(name)
        distinct = {repr(_comparable(value)): value for value in (row.get(name) for row in self._rows)}
        if name == "variant":
            return list(distinct.values())
        return sorted(distinct.values(), key=lambda v: (v is not None, isinstance(v, str), v if isinstance(v, (int, float)) else 0, str(v)))

    def groups(self, paths: Sequence[str]) -> list[tuple[dict[str, Any], Rows]]:
        """One (values of the paths, rows) per combination that occurs, in the order of the values."""
        members: dict[tuple[str, ...], list[Row]] = {}
        for row in self._rows:
            members.setdefault(tuple(repr(_comparable(row.get(path))) for path in paths), []).append(row)
        ranks = [{repr(_comparable(value)): rank for rank, value in enumerate(self.values(path))} for path in paths]
        keys = sorted(members, key=lambda key: [rank[value] for rank, value in zip(ranks, key, strict=True)])
        return [({path: members[key][0].get(path) for path in paths}, Rows(members[key])) for key in keys]

    def curve(self, metric: str) -> list[tuple[NDArray[np.int64], NDArray[np.float64]]]:
        """Per run (steps, values), where the metric was recorded."""
        return [row.curve(metric) for row in self._rows]

    def reached(self, metric: str, threshold: float, sustained: int = 5) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
        """Per run the first step at which the metric is at the threshold or better, and stays so for ``sustained`` evaluations, that one counted.

        Returns (times [n], observed [n]). sustained = 1 is the first hit. A run ended by a stop rule that is at least as strict counts even if fewer
        evaluations were left. Where never reached, observed is False and the time is the last evaluated step; a dead run cannot change any more, so its
        time is the step budget it would have had (to censor it at its death would be to leave it out).
        """
        times, observed = np.zeros(len(self)), np.zeros(len(self), dtype=bool)
        lower = lower_is_better(metric)
        at = float(np.float32(threshold))  # as the metrics are: 0.95 in float32 is below 0.95
        for i, row in enumerate(self._rows):
            steps, values = row.curve(metric)
            hits = values <= at if lower else values >= at
            stop_at = row.get("stop_at", np.inf)
            stopped = row["status"] == "finished" and row.get("stop_metric") == metric and (stop_at <= threshold if lower else stop_at >= threshold)
            streak = np.convolve(np.concatenate([hits, np.full(sustained - 1, stopped)]), np.ones(sustained), "valid") if steps.size else np.zeros(0)
            starts = np.flatnonzero(streak[: steps.size] > sustained - 0.5)
            observed[i] = starts.size > 0
            times[i] = steps[starts[0]] if starts.size else steps[-1] if steps.size else 0
            if row["status"] == "dead" and not observed[i]:
                times[i] = max(times[i], row.get("config.steps", 0))
        return times, observed

    def differing(self) -> list[str]:
        """Config paths whose value is not the same in all rows (a path that some rows lack differs too), as keys of a row."""
        paths = list(dict.fromkeys(path for row in self._rows for path in row.config))
        return [row_key(path) for path in paths if len({(path in row.config, repr(_comparable(row.config.get(path)))) for row in self._rows}) > 1]

    def frame(self) -> Any:
        """A pandas DataFrame: one line a run; all keys but "data" and "measures"."""
        try:
            import pandas
        except ImportError as error:
            raise ImportError("Rows.frame() needs pandas: pip install 'shoal[notebook]' (or pip install pandas)") from error
        return pandas.DataFrame([{key: row[key] for key in row if key not in ("data", "measures")} for row in self._rows])


def _comparable(value: Any) -> Any:
    """Lists and tuples are the same; so are 1 and 1.0 (Python's own rule)."""
    if isinstance(value, (list, tuple)):
        return tuple(_comparable(v) for v in value)
    return float(value) if isinstance(value, int) and not isinstance(value, bool) and abs(value) < 2**53 else value


def row_key(path: str) -> str:
    """The key under which a row has a config's path."""
    return f"config.{path}" if path in OWN_KEYS else path
