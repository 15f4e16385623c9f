"""What a report says, computed from rows: plain values (numbers, text, lists, dicts), no layout.

results(rows, "val/accuracy")     # one dict per setting (the seeds put together) with its estimates
summary(...)                      # the sentences at the top: only what the numbers say
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from shoal.results import statistics
from shoal.results.claims import Verdict
from shoal.results.rows import Row, Rows, lower_is_better, row_key
from shoal.results.statistics import Estimate
from shoal.results.wording import NOTHING, duration, interval, listing, magnitude, number, plural, setting


@dataclass(frozen=True)
class Table:
    """A study's own table: a function of rows, like a figure. A cell is text, a number, None (nothing) or an Estimate (its value above its interval)."""

    name: str
    make: Callable[[Rows], Sequence[Mapping[str, Any]]]  # one mapping a line, column -> cell
    caption: str = ""


SHOWN = 40  # lines of a measure or of varying data shown in a report; the files hold all


def settings(rows: Rows) -> list[str]:
    """The paths that make the settings of a study: what differs, without the seeds; with variants their name, and what differs within one."""
    if "variant" in (paths := rows.differing()):
        inside = {path for _, part in rows.groups(["variant"]) for path in part.differing()}
        paths = ["variant", *(path for path in paths if path in inside)]
    return [path for path in paths if not path.startswith("seeds.")]


def main_key(main_metric: str) -> tuple[str, str]:
    """("final.val/accuracy", "final val/accuracy"); "best.val/loss" is taken as it is."""
    key = main_metric if main_metric.startswith(("final.", "best.")) else f"final.{main_metric}"
    return key, key.replace(".", " ", 1)


def possible(metric: str) -> tuple[float, float]:
    """The values a metric can have at all; intervals are cut to them."""
    name = metric.rsplit("/", 1)[-1]
    return (0.0, 1.0) if name.endswith(("accuracy", "exact", "zero_loss", "collapse")) else (0.0, math.inf) if lower_is_better(name) else (-math.inf, math.inf)


def results(rows: Rows, main_metric: str) -> list[dict[str, Any]]:
    """Per setting: "setting" (dict), "label", "n", "status" (counts), "mean", "median" of the main metric over the runs that have it,
    and, where there is a stop rule, "share" that reached it, "time" to it (Estimates). Settings with most runs first: what others were tried for."""
    key, _ = main_key(main_metric)
    low, high = possible(key)
    table = []
    for values, part in rows.groups(settings(rows)):
        x = np.array([row.get(key, math.nan) for row in part], dtype=np.float64)
        x = x[~np.isnan(x)]
        line: dict[str, Any] = {"setting": values, "label": setting(values) or "all runs", "n": len(part), "num_values": x.size, "status": statuses(part)}
        line |= {"mean": statistics.mean(x).within(low, high), "median": statistics.median(x), "rule": stop_rule(part[0])}
        if part[0].get("stop_metric"):
            times, observed = part.reached(part[0]["stop_metric"], part[0]["stop_at"], part[0]["stop_evaluations"])
            line |= {"share": statistics.proportion(int(observed.sum()), len(part)), "time": statistics.survival_median(times, observed)}
        table.append(line)
    return sorted(table, key=lambda line: -line["n"])


def own(table: Table, rows: Rows) -> dict[str, Any]:
    """A study's own table: "names" of columns, "lines" of cells, each a (text, interval or ""); or the "error": like a figure it must cost nothing else."""
    content: dict[str, Any] = {"name": table.name, "caption": table.caption, "names": [], "lines": [], "error": None}
    try:
        lines = table.make(rows)
        names = list(dict.fromkeys(name for line in lines for name in line))
        return content | {"names": names, "lines": [[_pair(line.get(name)) for name in names] for line in lines]}
    except Exception as error:
        return content | {"error": f"{type(error).__name__}: {error}"}


def _pair(value: Any) -> tuple[str, str]:
    if not isinstance(value, Estimate):
        return _cell(value), ""
    text = number(value.value)
    if value.n and value.kind == "proportion":
        text = f"{round(value.value * value.n)} of {value.n}"
    elif value.kind == "survival median" and value.value == math.inf:
        text = "not reached"
    return text, bounds(value) if value.n and bounds(value) != NOTHING else ""


def bounds(estimate: Estimate | Verdict) -> str:
    """[low, high], or a dash where nothing bounds the value (times are above 0 anyway)."""
    low, high = (estimate.low, estimate.high) if isinstance(estimate, Estimate) else estimate["interval"]
    return NOTHING if low in (-math.inf, 0) and high == math.inf else interval(low, high)


def stop_rule(row: Row) -> str:
    """'val/accuracy ≥ 0.99', or ''."""
    metric = row.get("stop_metric")
    return f"{metric} {'≤' if lower_is_better(metric) else '≥'} {number(row['stop_at'])}" if metric else ""


def statuses(rows: Rows) -> dict[str, int]:
    """Counts of finished, censored (all steps made, a stop rule not met), completed (there was no stop rule), dead, running, where not zero."""
    counts = Counter("censored" if row["status"] == "completed" and row.get("stop_metric") else row["status"] for row in rows)
    return {name: counts[name] for name in ("finished", "completed", "censored", "dead", "running") if counts[name]} | {
        name: count for name, count in counts.items() if name not in ("finished", "completed", "censored", "dead", "running")
    }


STATUS_WORDS = {
    "finished": "met the stop rule",
    "completed": "made all their steps",
    "censored": "made all their steps without meeting the stop rule",
    "dead": "died (loss or gradient not finite)",
    "running": "unfinished",
}


def summary(rows: Rows, table: Sequence[Mapping[str, Any]], verdicts: Sequence[Verdict], main_metric: str) -> list[str]:
    if not rows:
        return ["No run has started yet."]
    parts = [f"{count:,} {STATUS_WORDS.get(name, name)}" for name, count in statuses(rows).items()]
    sentences = [f"{plural(len(rows), 'run')} in {plural(len(table), 'setting')}: {listing(parts)}."]
    label = main_key(main_metric)[1]
    known = [line for line in table if line["num_values"]]
    if not known:
        sentences.append(f"No run has a value of {main_metric} yet.")
    for line in known[:4] if len(known) <= 4 else []:
        name = f"With {line['label']}, " if len(table) > 1 else ""
        mean = line["mean"]
        text = f"{name}{label}: mean {number(mean.value)}" + (
            f", 95 % interval {interval(mean.low, mean.high)}" if math.isfinite(mean.low) or math.isfinite(mean.high) else ""
        )
        sentences.append(f"{text[0].upper() + text[1:]} (n = {mean.n}){_reaching(line)}.")
    if len(known) > 4:
        ordered = sorted(known, key=lambda line: line["mean"].value)
        ends = [f"{number(line['mean'].value)} ({line['label']})" for line in (ordered[0], ordered[-1])]
        sentences.append(
            f"The settings' means of {label} go from {ends[0]} to {ends[1]}; these two were picked by the same runs, so they look more extreme than they are."
        )
    if verdicts:
        counts = Counter(verdict["verdict"] for verdict in verdicts)
        sentences.append(
            f"Of {plural(len(verdicts), 'claim')}, {listing([f'{counts[word]} {word}' for word in ('held', 'not held', 'undecided') if counts[word]])}."
        )
    return sentences


def _reaching(line: Mapping[str, Any]) -> str:
    if "share" not in line:
        return ""
    share, time = line["share"], line["time"]
    median = f", median {number(time.value)} steps {interval(time.low, time.high)}" if math.isfinite(time.value) else ""
    return f"; {round(share.value * share.n)} of {share.n} reached {line['rule']}{median}"


def setup(rows: Rows) -> list[dict[str, Any]]:
    """Every hyperparameter, the defaulted ones too: sections of {"path", "name", "values" (text), "differs"}. With variants those of the first."""
    rows = _variants(rows)[0][1]
    differing = set(rows.differing())
    sections: dict[str, list[dict[str, Any]]] = {}
    for path in dict.fromkeys(path for row in rows for path in row.config):
        head, _, rest = path.partition(".")
        key = row_key(path)
        line = {"path": path, "name": rest or head, "values": _compact(rows.values(key)), "differs": key in differing}
        sections.setdefault(head if rest else "training", []).append(line)
    order = [name for name in ("task", "model", "optimizer", "gradient", "weights", "schedule", "training", "seeds") if name in sections]
    return [{"name": name, "lines": sections[name]} for name in [*order, *(name for name in sections if name not in order)]]


def changes(rows: Rows) -> list[tuple[str, str]]:
    """Per variant after the first: its name, and what it changes of the first (text)."""
    (_, first), *others = _variants(rows)
    usual = {path: first.values(path) for path in _paths(first)}
    out = []
    for name, part in others:
        told = [path for path in _paths(part) if path != "variant" and not path.startswith("seeds.")]
        own = {path: _compact(part.values(path)) for path in told if part.values(path) != usual.get(path)}
        out.append((name, setting(own) or "nothing"))
    return out


def _paths(rows: Rows) -> list[str]:
    return [row_key(path) for path in dict.fromkeys(path for row in rows for path in row.config)]


def _variants(rows: Rows) -> list[tuple[str, Rows]]:
    """The variants in the study's order; all rows as one where there are none."""
    return [(values["variant"], part) for values, part in rows.groups(["variant"])] if "variant" in rows.differing() else [("", rows)]


def _compact(values: Sequence[Any]) -> str:
    """0, 1, 2, 3 -> "0–3"; otherwise the values, the first twelve."""
    whole = [v for v in values if isinstance(v, int) and not isinstance(v, bool)]
    if len(whole) == len(values) > 2 and whole[-1] - whole[0] == len(whole) - 1:
        return f"{whole[0]}–{whole[-1]}"
    words = ["none" if v is None else "[]" if v == [] else repr(v) if v == "" else number(v) for v in values]
    return " | ".join(words[:12]) + (f" | … ({len(words)} values)" if len(words) > 12 else "")


def flat(value: Any, prefix: str = "") -> dict[str, str]:
    """Nested dicts as dotted name -> text."""
    if isinstance(value, Mapping):
        return {name: text for key, v in value.items() for name, text in flat(v, f"{prefix}.{key}" if prefix else str(key)).items()}
    return {prefix: number(value, 8)}


def data(rows: Rows) -> dict[str, Any]:
    """Counts and hashes: "same" (name, text) for what all runs share; "names" and "lines" for what differs, one line for each set, with its number of runs."""
    described = [flat(row["data"]) for row in rows]
    names = list(dict.fromkeys(name for one in described for name in one))
    varying = [name for name in names if len({one.get(name) for one in described}) > 1]
    seen: dict[tuple[str, ...], int] = Counter(tuple(one.get(name, NOTHING) for name in varying) for one in described)
    lines = [[*values, str(count)] for values, count in list(seen.items())[:SHOWN]] if varying else []
    return {"same": [(name, described[0][name]) for name in names if name not in varying], "names": [*varying, "runs"], "lines": lines, "total": len(seen)}


def measures(rows: Rows) -> list[dict[str, Any]]:
    """Per measure, those of few lines first: "names" of columns and "lines" of text; "long" when a text needs room (samples); "total" lines there are."""
    paths, found = settings(rows), {}
    for row in rows:
        for name, entries in row["measures"].items():
            found.setdefault(name, []).extend((run_label(row, paths), entry) for entry in entries)
    out = []
    for name, entries in sorted(found.items(), key=lambda item: len(item[1])):
        columns = list(dict.fromkeys(key for _, entry in entries for key in entry))
        shown = [[label, *(_cell(entry.get(key)) for key in columns)] for label, entry in entries[:SHOWN]]
        long = any("\n" in text or len(text) > 60 for line in shown for text in line[1:])
        out.append({"name": name, "names": ["run", *columns], "lines": shown, "long": long, "total": len(entries)})
    return out


def _cell(value: Any) -> str:
    """Text with nothing or blanks at its ends in quotes: a sample may be one space."""
    if isinstance(value, str) and (value == "" or value != value.strip()):
        return f"“{value}”"
    return setting(value) if isinstance(value, Mapping) else number(value)


def run_label(row: Row, paths: Sequence[str]) -> str:
    """'wd = 1, seed 3 (1a2b3c4d5e6f)'"""
    seeds = [row.get(f"seeds.{name}") for name in ("split", "init", "order")]
    seed = f"seed {seeds[0]}" if len(set(seeds)) == 1 else f"seeds {seeds[0]}/{seeds[1]}/{seeds[2]}"
    return ", ".join(part for part in (setting({path: row[path] for path in paths if path in row}), seed if seeds[0] is not None else "", row["id"]) if part)


def cost(rows: Rows, fleets: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Per fleet (text cells under "names") and in all: time, steps, FLOPs. A model's count flops["products"], that of one training step, gives totals."""
    lines, seconds, operations = [], 0.0, 0.0
    steps = {fleet["id"]: sum(row["steps"] for row in rows if row["fleet"] == fleet["id"]) for fleet in fleets}
    for fleet in fleets:
        model, done = fleet.get("model") or {}, fleet.get("done") or {}
        flops = model.get("flops") or {}
        flops = flops if isinstance(flops, Mapping) else {"": flops}
        seconds += done.get("seconds") or 0.0
        operations += steps[fleet["id"]] * (flops.get("products") or 0)
        counts = listing([f"{magnitude(count)} {name}" for name, count in flops.items()])
        sizes = [number(len(fleet["runs"])), number(model.get("parameters")), counts or NOTHING, number(steps[fleet["id"]])]
        time = duration(done.get("seconds")) if done else "unfinished"
        lines.append([str(fleet["id"]), *sizes, time, setting(fleet.get("choices") or {}) or NOTHING])
    total = {"seconds": seconds, "steps": sum(steps.values()), "flops": operations or None}
    return {"names": ["fleet", "runs", "parameters", "FLOPs per step", "steps made", "time", "measured choices"], "lines": lines, "total": total}


def bar(estimate: Estimate | Verdict, scale: tuple[float, float], holds: Sequence[float] | None = None) -> dict[str, Any] | None:
    """Where an interval, its value and the range that must hold lie on a scale, in per cent; None when there is nothing finite to show."""
    value, (low, high) = (estimate.value, (estimate.low, estimate.high)) if isinstance(estimate, Estimate) else (estimate["value"], estimate["interval"])
    start, end = scale
    if not end > start or math.isnan(value):
        return None

    def place(x: float) -> float:
        return round(100 * min(max((x - start) / (end - start), 0.0), 1.0), 2)

    shape: dict[str, Any] = {"left": place(low), "width": round(place(high) - place(low), 2), "point": place(value) if start <= value <= end else None}
    shape |= {"open_left": low < start, "open_right": high > end}
    return shape | ({"holds_left": place(holds[0]), "holds_width": round(place(holds[1]) - place(holds[0]), 2)} if holds else {})


def scale(numbers: Sequence[float]) -> tuple[float, float]:
    """A range that holds all finite numbers with a margin."""
    finite = [x for x in numbers if math.isfinite(x)]
    low, high = min(finite, default=0.0), max(finite, default=0.0)
    margin = 0.08 * (high - low) or 0.08 * abs(high) or 1.0
    return low - margin, high + margin
