"""Tables and figures of the study ``finetune``: functions of its rows.

results(by), against(by), chosen(TUNING, by, group_of), data(), shapes(); by_epoch("accuracy", by), grids(...), confusion(by), lengths()
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from textwrap import fill
from typing import Any

import numpy as np
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure as Drawing
from matplotlib.patches import Rectangle
from numpy.typing import NDArray

from shoal.config import StudyConfig
from shoal.results import statistics
from shoal.results.comparisons import SCALE
from shoal.results.figures import INK, MUTED, PANELS, SPLITS, TRAIN, Figure, canvas, legend, nothing, scales, slug
from shoal.results.rows import Row, Rows, row_key
from shoal.results.tables import Table
from shoal.results.wording import number, setting
from shoal.studies.tuning import Tuning, edges

BIN = 8  # tokens of a bar of the histogram of lengths
FEW = 12  # classes whose confusions are drawn
TEXT = {"setting": "the text: RoBERTa on SST-2, batch 64, lr 2e-6, 10 epochs", "test accuracy": 0.933}
BATCH, LR, VALIDATION = "batch_size", "optimizer.lr", "val/accuracy"


def in_order(rows: Rows, key: str) -> NDArray[np.float64]:
    """[n] in the order of the seeds, so that two settings pair."""
    return np.asarray(Rows(sorted(rows, key=_seed)).column(key), dtype=np.float64)


def tests(rows: Rows) -> NDArray[np.float64]:
    """[n] test accuracies, in the order of the seeds. LookupError where that was not measured."""
    return np.array([row["measures"]["test"][0]["accuracy"] for row in sorted(rows, key=_seed)])


def baseline(rows: Rows, name: str) -> NDArray[np.float64]:
    """[n] a baseline's test accuracy beside each run: the same number wherever the data are the same."""
    found = [{line["baseline"]: line["test"] for line in row["measures"]["baselines"]} for row in sorted(rows, key=_seed)]
    return np.array([line[name] for line in found])


def course(rows: Rows) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Steps [m] a training could have had, and the validation accuracy after them [m], the mean over the runs: every evaluation but that before any training
    where the learning rate is constant, so that each is the end of a shorter run; else the last."""
    curves = [dict(zip(*(x.tolist() for x in row.curve(VALIDATION)), strict=True)) for row in rows] or [{}]
    steps = sorted(set.intersection(*map(set, curves)) - {0})
    if any(row["schedule.kind"] != "constant" or row["schedule.warmup"] > 0 for row in rows):
        steps = steps[-1:]
    return np.array(steps, np.int64), np.array([[curve[step] for step in steps] for curve in curves], np.float64).mean(axis=0)


def order(steps: NDArray[np.int64], values: NDArray[np.float64]) -> tuple[float, ...]:
    """Of a course, small is better: what the best validation accuracy along it lacks, then the steps to it."""
    return (1 - float(values.max()), int(steps[values.argmax()])) if steps.size else (math.inf,)


def _seed(row: Row) -> int:
    return row["seeds.split"]


def epochs(row: Row, steps: float) -> float:
    """How often a run has seen each of its training sentences after so many steps."""
    return steps / math.ceil(row["data"]["train sentences"] / row[BATCH])


# --- tables


def results(by: Sequence[str]) -> Table:
    def make(rows: Rows) -> list[dict[str, Any]]:
        lines = [line(values, part) for values, part in rows.groups(by)]
        measured = [row for row in rows if row["measures"].get("baselines")]
        for one in measured[0]["measures"]["baselines"] if measured else ():
            right = statistics.proportion(one["right"], one["sentences"])
            lines.append({"setting": one["baseline"], "validation accuracy": one["validation"], "test accuracy": one["test"], "test sentences right": right})
        return [*lines, TEXT]

    def line(values: Mapping[str, Any], part: Rows) -> dict[str, Any]:
        told: dict[str, Any] = {"setting": setting(values) or "all runs", "seeds": len(part), "batch": part[0][BATCH], "lr": part[0][LR]}
        told["epochs"] = round(epochs(part[0], part[0]["steps"]), 2)
        told["sentences seen"] = round(epochs(part[0], part[0]["steps"]) * part[0]["data"]["train sentences"])
        told["validation accuracy"] = _mean(in_order(part, f"final.{VALIDATION}")) if VALIDATION in part.metrics else None
        if all(row["measures"].get("test") for row in part):
            first = min(part, key=_seed)["measures"]["test"][0]
            told["test accuracy"] = _mean(tests(part))
            told["test sentences right"] = statistics.proportion(first["right"], first["sentences"])
        return told

    text = (
        "Fresh seeds after their last step: mean over seeds with the t interval, which is about training again; and how many test sentences are right with the "
        "first seed, with the interval of Clopper and Pearson, which is about other sentences. The test was looked at once, here. Settings and epochs were "
        "chosen on validation with another seed, so validation flatters a little. Below: the baselines, and the text's result, of another encoder."
    )
    return Table("results", make, text)


def _mean(x: NDArray[np.float64]) -> statistics.Estimate:
    return statistics.mean(x[~np.isnan(x)]).within(0, 1)


def against(by: Sequence[str]) -> Table:
    def make(rows: Rows) -> list[dict[str, Any]]:
        return [line(values, part, name) for values, part in rows.groups(by) for name in _names(part)]

    def line(values: Mapping[str, Any], part: Rows, name: str) -> dict[str, Any]:
        difference = statistics.paired_mean(tests(part), baseline(part, name))
        [first] = [one for one in min(part, key=_seed)["measures"]["baselines"] if one["baseline"] == name]
        mine, theirs = first["only the run right"], first["only the baseline right"]
        return {
            "setting": setting(values) or "all runs",
            "baseline": name,
            "what it is": first["what it is"],
            "test accuracy above it": difference,
            "where only one is right, the run": statistics.proportion(mine, mine + theirs),
        }

    text = (
        "Test accuracy above each baseline's, seed by seed; and of the test sentences that only one of the two has right, with the first seed, how many are "
        "the fine-tuned encoder's: an interval above one half means that it is better on sentences like these."
    )
    return Table("against baselines", make, text)


def _names(part: Rows) -> list[str]:
    return [line["baseline"] for line in part[0]["measures"]["baselines"]] if all(row["measures"].get("baselines") for row in part) else []


def chosen(tuning: Tuning, by: Sequence[str], group_of: Callable[[str], str]) -> Table:
    """Every setting that competed, and what became of it."""

    def make(rows: Rows) -> list[dict[str, Any]]:
        fresh, tried = tuning.fresh(rows), tuning.tried(rows)
        return [line(values, part, fresh, tried) for values, part in tried.groups(by)]

    def line(values: Mapping[str, Any], part: Rows, fresh: Rows, tried: Rows) -> dict[str, Any]:
        row = part[0]
        steps, accuracies = course(part)
        best = int(np.argmax(accuracies)) if accuracies.size else 0
        told: dict[str, Any] = {"setting": setting(values), "batch": row[BATCH], "lr": row[LR], "epochs made": round(epochs(row, row["steps"]), 2)}
        if accuracies.size:
            told |= {"best validation accuracy": float(accuracies[best]), "at epoch": round(epochs(row, steps[best]), 2), "at the end": float(accuracies[-1])}
        same = {**values, "variant": group_of(row["variant"])}
        same |= {path: row[path] for path in (BATCH, LR)}
        took = [one for one in fresh.where(same) if one["steps"] in {row["steps"], *steps.tolist()}]
        rivals = Rows([one for one in tried if group_of(one["variant"]) == group_of(row["variant"])])
        at_edge = ", ".join(edges(rivals, {BATCH: row[BATCH], LR: row[LR]}))
        return told | {"chosen": "yes" + (f" (at the edge of {at_edge})" if at_edge else "") if took else "no"}

    text = (
        "What competed, on one seed that is not reported. The best of those under one name (before the bracket) went to fresh seeds. Where the learning rate "
        "changes, accuracies are of the run's end. Under a constant one its evaluations are the ends of shorter runs: the best of them is taken, and the "
        "epoch it came at."
    )
    return Table("grid", make, text)


def data() -> Table:
    def make(rows: Rows) -> list[dict[str, Any]]:
        return [line(split, found) for found in _described(rows) for split in ("train", "val", "test")]

    def line(split: str, found: Mapping[str, Any]) -> dict[str, Any]:
        tokens, length = found[f"{split} tokens"], found["task.max_length"]
        return {
            "set": SPLITS[split][0],
            "sentences": found[f"{split} sentences"],
            "by class": ", ".join(f"{name}: {count:,}" for name, count in found[f"{split} by class"].items()),
            "tokens, median": tokens["median"],
            "mean": tokens["mean"],
            "longest": tokens["most"],
            "maximum length": length,
            "share truncated": found[f"{split} share truncated"],
            "padding, by length": _padding(found, split, length, grouped=True),
            "padding, all to the longest": _padding(found, split, length, grouped=False),
        }

    text = (
        "The sets, and what the maximum length and padding did to them, in tokens of the encoder with its marks. A sentence longer than the maximum is cut "
        "there. Padding: the share of a batch's places that hold no token, if sentences of about one length are put together and padded to a multiple of "
        f"{BIN} (as here; an estimate from the histogram), and if all were padded to the longest of the set."
    )
    return Table("sets", make, text)


def _padding(found: Mapping[str, Any], split: str, length: int, grouped: bool) -> float:
    counts = np.array(found[f"{split} lengths"], float)
    middles = np.arange(counts.size) * BIN + (BIN - 1) / 2
    cut = counts @ np.maximum(middles - length, 0)  # tokens that truncation took, to the middle of a bar
    real = found[f"{split} tokens"]["mean"] * counts.sum() - cut
    ends = np.minimum((np.arange(counts.size) + 1) * BIN, length)
    places = float(counts @ ends) if grouped else min(found[f"{split} tokens"]["most"], length) * counts.sum()
    return round(1 - real / max(places, real), 3)


def shapes() -> Table:
    """Of a batch, for each size of it."""

    def make(rows: Rows) -> list[dict[str, Any]]:
        lines = []
        for found in _described(rows):
            sizes = sorted({int(row[BATCH]) for row in rows if row["task.max_length"] == found["task.max_length"]})
            lengths = np.flatnonzero(found["train lengths"])
            most = found["padded to"]
            least = min(int(lengths.min() + 1) * BIN, most)
            lines += [
                {
                    "batch": size,
                    "tokens": f"{size} x {least} to {size} x {most}",
                    "mask": "the same",
                    "targets": f"{size} x 1",
                    "logits": f"{size} x 1 x {len(found['classes'])}",
                    "steps an epoch": math.ceil(found["train sentences"] / size),
                }
                for size in sizes
            ]
        return lines

    return Table(
        "shapes", make, "Of one run's batch; the fleet's tensors have the runs as a further axis in front. The length is that of the batch's longest sentence."
    )


def _described(rows: Rows) -> list[dict[str, Any]]:
    """What the data were, once for each maximum length and source there is."""
    found = {repr([row[path] for path in ("task.train", "task.val", "task.test", "task.max_length", "task.encoder")]): row for row in rows}
    return [{**row["data"], "task.max_length": row["task.max_length"]} for row in found.values() if row["data"]]


# --- figures


def by_epoch(metric: str, by: Sequence[str]) -> Figure:
    """Both sets against epochs, a panel for each setting; a ring at the best epoch of each set's median."""

    def draw(rows: Rows) -> Drawing:
        groups = rows.groups(by)[:PANELS]
        splits = [split for split in ("train", "batch", "val") if f"{split}/{metric}" in rows.metrics]
        splits = [split for split in splits if split != "batch" or "train" not in splits]
        if not splits:
            return nothing(f"no values of {metric} yet")
        columns = 1 if len(groups) == 1 else 2 if len(groups) in (2, 4) else 3
        tall = math.ceil(len(groups) / columns)
        drawing, axes = canvas(0.7 + 2.4 * tall if len(groups) > 1 else 3.7, columns, tall)
        for spare in axes[len(groups) :]:
            spare.set_axis_off()
        for i, (axis, (values, part)) in enumerate(zip(axes, groups, strict=False)):
            notes = []
            for split in splits:
                name, colour = SPLITS[split]
                at, table = _common([row.curve(f"{split}/{metric}") for row in part], part)
                if not at.size:
                    continue
                middle = np.median(table, axis=0)
                axis.plot(at, middle, color=colour, label=name, zorder=3)
                axis.fill_between(at, table.min(axis=0), table.max(axis=0), color=colour, alpha=0.14, linewidth=0)
                trained = np.where(at > 0, middle if metric == "loss" else -middle, np.inf)
                best = int(np.argmin(trained))
                axis.plot(at[best], middle[best], marker="o", markersize=7, markerfacecolor="none", markeredgecolor=colour, linestyle="", zorder=4)
                notes.append(f"{name} {number(float(middle[best]), 3)} at {number(round(float(at[best]), 1))}")
            title = f"{setting(values) or 'all runs'} (n = {len(part)})", *(f"best of {note}" for note in notes)
            axis.set_title("\n".join(fill(line, 120 // columns) for line in title), fontsize=8)
            scales(axis, False, False, [metric] if metric == "loss" else [])
            axis.set_xlabel("epochs" if i >= len(groups) - columns else "")
            axis.set_ylabel(metric if i % columns == 0 else "")
            axis.tick_params(labelbottom=True)
        legend(drawing, axes[0])
        return drawing

    sets = "Both sets" if metric == "accuracy" else "Loss of both sets, nats a sentence,"
    rest = "Where the training set was not evaluated, the batches stand for it."
    caption = f"{sets} against epochs, fresh seeds: median and range; a ring at the best evaluation of each. {rest}"
    return Figure(metric, draw, caption)


def _common(curves: Sequence[tuple[NDArray[np.int64], NDArray[np.float64]]], part: Rows) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Epochs [m] that all runs have, and their values there [n, m]."""
    known = [dict(zip(steps.tolist(), values.tolist(), strict=True)) for steps, values in curves]
    at = sorted(set.intersection(*map(set, known))) if known else []
    return np.array([epochs(part[0], step) for step in at]), np.array([[one[step] for step in at] for one in known])


def grids(tuning: Tuning, config: StudyConfig, group_of: Callable[[str], str]) -> list[Figure]:
    """For every group of settings that competed, learning rate by epochs, a panel for each batch size; a frame around what was chosen."""
    groups: dict[str, list[str]] = {}
    for name in config.variants:
        groups.setdefault(group_of(name), []).append(name)
    panels = [BATCH, *(row_key(path) for path in config.grid if path not in (BATCH, LR))]
    return [
        Figure(
            slug("grid", *group.split()),
            lambda rows, names=names: _grid(Rows([row for row in tuning.tried(rows) if row["variant"] in names]), panels),
            f"{group}: validation accuracy of the tuning by learning rate and epochs, of each batch size; the best is framed.",
        )
        for group, names in groups.items()
        if len(names) > 1
    ]


def _grid(rows: Rows, paths: Sequence[str]) -> Drawing:
    panels = [(values, [_column(part) for _, part in some.groups([LR])]) for values, some in rows.groups(paths)]
    panels = [(values, [cell for cell in cells if cell[1].size]) for values, cells in panels]
    panels = [(values, cells) for values, cells in panels if cells][:PANELS]
    found = np.concatenate([values for _, cells in panels for *_, values in cells]) if panels else np.zeros(0)
    if not found.size:
        return nothing("nothing competed yet")
    columns = min(3, len(panels))
    chosen_row = min((cell for _, cells in panels for cell in cells), key=lambda cell: order(*cell[1:]))[0]
    tall, lines = math.ceil(len(panels) / columns), min(20, max(steps.size for _, cells in panels for _, steps, _ in cells))
    drawing, axes = canvas(1.1 + tall * (0.5 + 0.17 * max(lines, 6)), columns, tall)
    labels: list[list[str]] = []
    norm = Normalize(found.min(), max(found.max(), found.min() + 1e-3))
    for spare in axes[len(panels) :]:
        spare.set_axis_off()
    for axis, (told, cells) in zip(axes, panels, strict=False):
        places = [np.linspace(0, steps.size - 1, lines).round().astype(int) for _, steps, _ in cells]
        table = np.stack([values[place] for (_, _, values), place in zip(cells, places, strict=True)], axis=1)  # [lines, rates]
        axis.pcolormesh(table, norm=norm, cmap=SCALE, edgecolors="white", linewidth=0.6)
        for (line, column), value in np.ndenumerate(table):
            colour = INK if norm(value) > 0.6 else "white"
            axis.text(column + 0.5, line + 0.5, f"{value:.3f}".lstrip("0"), ha="center", va="center", fontsize=6.5, color=colour)
            if cells[column][0] is chosen_row and line == table[:, column].argmax():
                axis.add_patch(Rectangle((column, line), 1, 1, fill=False, edgecolor=TRAIN, linewidth=2, zorder=5))
        labels.append([number(round(epochs(cells[0][0], step), 1)) for step in cells[0][1][places[0]]])
        axis.set_xticks(np.arange(len(cells)) + 0.5, [number(row[LR]) for row, _, _ in cells], rotation=0 if len(cells) < 4 else 90)
        axis.set_title(setting(told))
        axis.set_xlabel("learning rate")
        axis.grid(visible=False)
        axis.tick_params(length=0)
    same = all(one == labels[0] for one in labels)
    axes[0].set_yticks(np.arange(lines) + 0.5, labels[0] if same else [str(line + 1) for line in range(lines)])
    axes[0].set_ylabel("epochs" if same else "evaluations")
    bar = drawing.colorbar(ScalarMappable(norm, SCALE), ax=axes, aspect=30, pad=0.015, label="validation accuracy")
    bar.outline.set_visible(False)  # pyright: ignore[reportCallIssue]
    return drawing


def _column(part: Rows) -> tuple[Row, NDArray[np.int64], NDArray[np.float64]]:
    """Of all settings with one learning rate and batch size: one of their rows, the steps a training could have had, and the accuracies after them."""
    courses = [course(some) for _, some in part.groups(["steps"])]
    steps, values = (np.concatenate(x) for x in zip(*courses, strict=True))
    place = steps.argsort(kind="stable")
    return part[0], steps[place], values[place]


def confusion(by: Sequence[str]) -> Figure:
    """Of the test sentences of a class (a line), the share that is taken for each; the counts are means over seeds."""

    def draw(rows: Rows) -> Drawing:
        groups = [(values, part) for values, part in rows.groups(by) if all(row["measures"].get("confusion") for row in part)][:PANELS]
        if not groups:
            return nothing("no confusions measured yet")
        names = list(dict.fromkeys(line["class"] for line in groups[0][1][0]["measures"]["confusion"]))
        if len(names) > FEW:
            return nothing(f"{len(names)} classes are too many to draw; report.md lists what was taken for what")
        columns = min(4, len(groups))
        tall = math.ceil(len(groups) / columns)
        drawing, axes = canvas(0.6 + tall * max(1.9, 0.3 * len(names) + 0.9), columns, tall)
        for spare in axes[len(groups) :]:
            spare.set_axis_off()
        for i, (axis, (values, part)) in enumerate(zip(axes, groups, strict=False)):
            counts: Counter[tuple[str, str]] = Counter()
            for row in part:
                counts.update({(line["class"], line["taken for"]): line["sentences"] for line in row["measures"]["confusion"]})
            table = np.array([[counts[one, other] / len(part) for other in names] for one in names])
            shares = table / np.maximum(table.sum(axis=1, keepdims=True), 1)
            axis.imshow(shares, cmap=SCALE, vmin=0, vmax=1, aspect="auto")
            for (row, column), count in np.ndenumerate(table):
                colour = INK if shares[row, column] > 0.6 else "white"
                axis.text(column, row, f"{number(round(float(count), 1))}\n{shares[row, column]:.0%}", ha="center", va="center", fontsize=8, color=colour)
            axis.set_title(fill(setting(values) or "all runs", 30), fontsize=8.5)
            axis.grid(visible=False)
            axis.tick_params(length=0, labelbottom=i >= len(groups) - columns, labelleft=i % columns == 0)
            axis.set_xticks(range(len(names)), [fill(name, 12) for name in names])
            axis.set_yticks(range(len(names)), [fill(name, 12) for name in names])
            axis.set_xlabel("taken for" if i >= len(groups) - columns else "")
            axis.set_ylabel("class" if i % columns == 0 else "")
        return drawing

    return Figure(
        "confusion", draw, "Test sentences by their class (lines) and what they were taken for (columns): mean count over seeds, and share of the line."
    )


def lengths() -> Figure:
    """How long the training sentences are, before truncation."""

    def draw(rows: Rows) -> Drawing:
        found = _described(rows)
        if not found:
            return nothing("no data described yet")
        drawing, axes = canvas(0.6 + 2.4 * len(found), 1, len(found))
        for axis, one in zip(axes, found, strict=True):
            length = one["task.max_length"]
            for split in ("train", "val", "test"):
                counts = np.array(one[f"{split} lengths"], float)
                at = (np.arange(counts.size + 1)) * BIN
                name, colour = SPLITS[split]
                label = f"{name} (n = {int(counts.sum()):,}, {one[f'{split} share truncated']:.1%} truncated)"
                axis.stairs(100 * counts / counts.sum(), at, color=colour, fill=split == "train", alpha=0.35 if split == "train" else 1, label=label)
            axis.axvline(length, color=MUTED, linewidth=0.9, dashes=(4, 3), label=f"maximum length {length}")
            axis.set_xlim(0, max(len(one["train lengths"]), len(one["val lengths"]), len(one["test lengths"])) * BIN * 1.05)
            axis.set_xlabel("tokens of a sentence, the encoder's marks among them")
            axis.set_ylabel("% of the sentences")
        legend(drawing, axes[0])
        return drawing

    return Figure(
        "lengths", draw, f"Lengths of the sentences in tokens, before truncation, in steps of {BIN}; what lies right of the dashed line was cut there."
    )
