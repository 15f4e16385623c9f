"""Losses of language models as a table: nats per token, perplexity, bits per byte, with what knows nothing and what counts pairs beside them.

A loss in nats depends on the tokens a text was cut into, bits per byte do not: only those compare models with different tokenizers. Not here: evaluation.

    Study(..., tables=[perplexities(["variant"])])
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from shoal.results import statistics
from shoal.results.rows import Rows
from shoal.results.statistics import Estimate
from shoal.results.tables import Table
from shoal.results.wording import setting

BYTES = "val bytes per token"  # of the tokens that are scored, in a row's data
BASELINES = {"uniform": "uniform nats", "unigram": "unigram nats"}  # column -> name in a row's data
PROTOCOL = (
    "Mean over seeds with the t interval. Loss: nats per token over the whole validation part, cut into windows that do not overlap: every token but the "
    "first is scored once, and sees what stands before it in its window, 1 to T tokens. Perplexity: exp of the loss and of its interval's ends. "
    "Bits per byte: loss / ln 2 / bytes of text per scored token, run by run. Beside them the loss on the same tokens of what only counts: tokens or pairs of "
    "them in the training part (add-one; Witten and Bell's mixture)."
)


def perplexities(by: Sequence[str], name: str = "perplexity") -> Table:
    """A line per combination of the values of ``by``. Runs without a validation loss are left out of a line's n. Pairs: from a measure "pairs", where made."""
    return Table(name, lambda rows: [_line(values, part) for values, part in rows.groups(by)] if "val/loss" in rows.metrics else [], PROTOCOL)


def _line(values: Mapping[str, Any], part: Rows) -> dict[str, Any]:
    loss = _numbers([row.get("final.val/loss") for row in part])
    mean = _mean(loss)
    line: dict[str, Any] = {"setting": setting(values) or "all runs", "validation loss": mean}
    trained = next((metric for metric in part.metrics if metric.startswith("train") and metric.endswith("/loss")), "batch/loss")
    line["training loss"] = _mean(_numbers([row.get(f"final.{trained}") for row in part]))
    line |= {"perplexity": exponential(mean), "bits per byte": _mean(loss / math.log(2) / _numbers([row["data"].get(BYTES) for row in part]))}
    counted = {column: [row["data"].get(name) for row in part] for column, name in BASELINES.items()}
    counted["bigram"] = [next((entry["nats"] for entry in row["measures"].get("pairs", ())), None) for row in part]
    return line | {f"{column} loss": _mean(_numbers(values)).value for column, values in counted.items()}


def exponential(loss: Estimate) -> Estimate:
    """A mean loss as a perplexity: the geometric mean of the runs', with the same coverage."""
    low, value, high = (math.exp(min(x, 700.0)) if x < math.inf else x for x in (loss.low, loss.value, loss.high))
    return replace(loss, low=low, value=value, high=high)


def _numbers(values: Sequence[float | None]) -> NDArray[np.float64]:
    """NaN for what is missing."""
    return np.array([math.nan if value is None else value for value in values], dtype=np.float64)


def _mean(x: NDArray[np.float64]) -> Estimate:
    return statistics.mean(x[~np.isnan(x)]).within(0.0, math.inf)
