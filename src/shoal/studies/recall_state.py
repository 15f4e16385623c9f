"""Is it the state or the embedding that keeps a narrow Mamba from recalling any token there is?"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from shoal.config import StudyConfig
from shoal.results import statistics
from shoal.results.claims import Claim
from shoal.results.comparisons import heatmap, mean_of, share_reached
from shoal.results.rows import Rows
from shoal.results.tables import Table
from shoal.results.wording import setting
from shoal.studies.recall import KNOWN, LR, LRS, MAMBA, NOT_KNOWN, Recall, base, some
from shoal.studies.recall_tables import METRIC, SOLVED, accuracy, measured
from shoal.studies.study import Study

WIDTH, STATE = "model.width", "model.state_size"


def full() -> StudyConfig:
    """Widths 8 to 64 and states of 4, 16 and 64 for every channel, M = 16, delay 1: 4 learning rates on 4 seeds, the best on 6 fresh ones; 20,000 steps."""
    return StudyConfig(run=base(20_000, 100, num_queries=16), variants=some(MAMBA), grid={WIDTH: [8, 16, 32, 64], STATE: [4, 16, 64], LR: LRS}, seeds=6)


def quick() -> StudyConfig:
    """Minutes on two cores, all halved: any of 8 tokens, length 16, widths 4 and 16, states of 4 and 16; 2 learning rates on 2 seeds, the better on 3.

    28 runs of 3,000 steps of 32 sequences, some 500 seconds of a core.
    """
    run = replace(base(3_000, 20, num_tokens=8, num_queries=8, length=16), batch_size=32)
    return StudyConfig(run=run, variants=some(MAMBA), grid={WIDTH: [4, 16], STATE: [4, 16], LR: [5e-3, 1e-2]}, seeds=3)


PRESETS = {"quick": quick, "full": full}
DEFAULT = ("quick", "full")


def _at(width: int, state: int) -> dict[str, Any]:
    return {WIDTH: width, STATE: state}


def _pairs(widths: list[int], states: list[int]) -> list[tuple[str, dict[str, Any], dict[str, Any]]]:
    """(what is changed, after, before): the whole range of one at every value of the other, and all pairs with as many numbers of state."""
    found = []
    if len(widths) > 1:
        found += [(f"width {min(widths)} to {max(widths)}, state {n}", _at(max(widths), n), _at(min(widths), n)) for n in states]
    if len(states) > 1:
        found += [(f"state {min(states)} to {max(states)}, width {d}", _at(d, max(states)), _at(d, min(states))) for d in widths]
    equal = [((d, n), (e, m)) for d in widths for n in states for e in widths for m in states if d > e and d * n == e * m]
    return found + [(f"width {e} to {d}, state {m} to {n}, as many numbers in all", _at(d, n), _at(e, m)) for (d, n), (e, m) in equal]


def effects(pairs: list[tuple[str, dict[str, Any], dict[str, Any]]], others: list[dict[str, Any]]) -> Table:
    """What the fresh seeds gain."""

    def make(rows: Rows) -> list[dict[str, Any]]:
        return [about_one(rows, text, a, b, cell) for cell in others for text, a, b in pairs]

    def about_one(rows: Rows, text: str, a: dict[str, Any], b: dict[str, Any], cell: dict[str, Any]) -> dict[str, Any]:
        line: dict[str, Any] = {"change": ", ".join([text, *([setting(cell)] if cell else [])])}
        after, before = (measured(rows.where(cell | end)) for end in (a, b)) if rows else (Rows(), Rows())
        if after and len(after) == len(before):
            line |= {"gain": statistics.paired_mean(x := accuracy(after), y := accuracy(before)), "before": float(y.mean()), "after": float(x.mean())}
        return line

    return Table("effects", make, "What a change of width or state gains in accuracy at the training length: mean over seeds, paired, with its 95 % interval.")


def _claims(recall: Recall, widths: list[int], states: list[int], cell: dict[str, Any]) -> list[Claim]:
    narrow, wide, small, large = min(widths), max(widths), min(states), max(states)
    usual = 16 if 16 in states else large
    half = "in more than half of the seeds"
    claims = [
        recall.most(f"A larger state does not repair it: at width {narrow} with state {large} Mamba is below 99 % {half}.",
            {**cell, **_at(narrow, large)}, NOT_KNOWN, told=[WIDTH, STATE]),
        recall.most(f"Width does: at width {wide} with state {usual} it is at 99 % {half}.",
            {**cell, **_at(wide, usual)}, KNOWN, told=[WIDTH, STATE]),
    ]  # fmt: skip
    if narrow < wide:
        text = f"At state {usual}, width {wide} is better than {narrow} by 10 points or more, seed by seed, in the mean."
        claims.append(recall.gains(text, _at(wide, usual), _at(narrow, usual), cell, least=0.1))
    if small < usual:
        text = f"A state of {small} is too small for so many keys even at width {wide}: {usual} is better, seed by seed, in the mean."
        claims.append(recall.gains(text, _at(wide, usual), _at(wide, small), cell))
    for text, a, b in _pairs(widths, states):
        if text.endswith("in all"):
            same = f"With as many numbers of state, width {a[WIDTH]} with state {a[STATE]} is better than width {b[WIDTH]} with state {b[STATE]}, seed by seed."
            claims.append(recall.gains(same, a, b, cell))
    return claims


def study(config: StudyConfig) -> Study:
    recall = Recall(config=config, line=WIDTH)
    widths, states = (sorted(recall.values(path, getattr(config.run.model, path.partition(".")[2]))) for path in (WIDTH, STATE))
    others, apart = recall.cells(WIDTH, STATE), recall.cells("variant", WIDTH, STATE)
    maps = [heatmap(WIDTH, STATE, shade, by=list(others[0])) for shade in (share_reached(METRIC, SOLVED), mean_of(METRIC))]
    claims = [claim for cell in others for claim in _claims(recall, widths, states, cell)]
    return recall.study("recall-state", __doc__, claims, tables=[effects(_pairs(widths, states), apart)], figures=maps)
