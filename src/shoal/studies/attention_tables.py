"""The tables and figures of the study of attention's variants: ranking, cost, loss beyond the training length, what a zeroed model has from tokens to come.

ranking(by, "attention", counted), differences(by, "attention"), beyond(by), leaks(by)     # of the fresh runs; cost(tuning, by) of all
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from shoal.results import statistics
from shoal.results.figures import INK, MUTED, VAL, Drawing, Figure, canvas, colours, legend, nothing, scales
from shoal.results.perplexity import exponential
from shoal.results.rows import Row, Rows
from shoal.results.statistics import Estimate
from shoal.results.tables import Table
from shoal.results.wording import number, setting
from shoal.studies.attention_measures import OTHER, PREFIX, TRAINED
from shoal.studies.language import LOSS, by_loss, losses, training
from shoal.studies.shared import matching
from shoal.studies.tuning import Tuning, edges

LR, SEED = "optimizer.lr", "seeds.split"
FAR, NEAR = 1.0, 0.1  # nats
TICKS = [sign * x for sign in (-1, 1) for x in (0.05, 0.1, 0.3, 1.0, 3.0)] + [0.0]


def by_seed(rows: Rows) -> Rows:
    return Rows(sorted(rows, key=lambda row: row[SEED]))


def nats_beyond(rows: Rows, stretch: int) -> NDArray[np.float64]:
    """[n] in the order of the seeds: nats per token in the stretch-th of the training lengths that a window has room for. LookupError if not measured."""
    return np.array([stretches(row)[stretch] for row in by_seed(rows)])


def stretches(row: Row) -> list[float]:
    """Nats per token at positions 1 to ``length``, the next as many, and so on."""
    length, found = row["task.length"], []
    for begin in range(0, row["task.longest"] * length, length):
        inside = [entry for entry in row["measures"]["beyond"] if begin < entry["position"] <= begin + length]
        total = sum(entry["tokens"] for entry in inside)
        found += [sum(entry["nats"] * entry["tokens"] for entry in inside) / total] if total else []
    return found


def nats_given(rows: Rows, given: str) -> NDArray[np.float64]:
    """[n] in the order of the seeds: nats at the places looked at for a leak. LookupError if not measured."""
    return np.array([{entry["given"]: entry["nats"] for entry in row["measures"]["leak"]}[given] for row in by_seed(rows)])


def against(rows: Rows, values: Mapping[str, Any], part: Rows, base: str) -> Estimate | None:
    """A line's loss less the baseline's, seed by seed; None for the baseline itself, or where seeds are missing."""
    usual = losses(matching(rows, {**values, "variant": base}))
    ours = losses(part)
    same = values["variant"] != base and len(ours) == len(usual) and not np.isnan([*ours, *usual]).any()
    return statistics.paired_mean(ours, usual) if same else None


def _ranked(rows: Rows, by: Sequence[str]) -> list[tuple[dict[str, Any], Rows]]:
    return sorted(rows.groups(by), key=lambda one: by_loss(one[1])) if LOSS in rows.metrics else []


def ranking(by: Sequence[str], base: str, counted: Callable[[Row], float]) -> Table:
    """Sorted by validation loss. ``counted``: the nats that what only counts needs on a run's validation part."""

    def verdict(part: Rows) -> str:
        below = [nats - loss for nats, loss in zip(map(counted, by_seed(part)), losses(part), strict=True)]
        estimate = statistics.mean(below)
        return "yes" if estimate.low > 0 else "no" if estimate.high < 0 else "undecided"

    def line(rows: Rows, values: Mapping[str, Any], part: Rows) -> dict[str, Any]:
        loss, trained = (statistics.mean(x[~np.isnan(x)]) for x in (losses(part), losses(part, f"final.{training(part[0]['evaluate'])}")))
        return {
            "variant": setting(values),
            "validation perplexity": exponential(loss),
            "training perplexity": exponential(trained),
            "validation loss": loss,
            f"less that of {base}": against(rows, values, part, base),
            "learns": verdict(part) if all("pairs" in row["measures"] for row in part) else None,
            "n": len(part),
        }

    text = (
        "Sorted by validation loss. Mean over seeds with the t interval; perplexity is exp of the mean loss and of its interval's ends; differences are seed "
        "by seed, with the same documents in the same order. Learns: the loss is below that of counted tokens and of counted pairs, the interval of the "
        "difference with it. The loss of “zeroed” is taken as it was trained, with the tokens to come in its denominators."
    )
    return Table("variants", lambda rows: [line(rows, values, part) for values, part in _ranked(rows, by)], text)


def cost(tuning: Tuning, by: Sequence[str]) -> Table:
    """A line per variant: the learning rate chosen, size, FLOPs, tokens, speed."""

    def line(values: Mapping[str, Any], part: Rows, tried: Rows) -> dict[str, Any]:
        row, best = part[0], {LR: part[0][LR]}
        mine = matching(tried, tuning.in_tuning(values))
        tokens = row["steps"] * row["batch_size"] * row["task.length"]
        timed = [entry for one in part for entry in one["measures"].get("speed", ())]
        return {
            "variant": setting(values),
            "learning rate": row[LR],
            "at the edge of what was tried": ("yes" if edges(mine, best) else "no") if mine else "not tuned",
            "parameters": row["parameters"],
            "FLOPs by the assignment's rule": row["flops.assignment"] * row["steps"],
            "FLOPs in products": row["flops.products"] * row["steps"],
            "tokens": tokens,
            "epochs": tokens / row["data"]["train tokens"],
            "tokens per second": float(np.mean([entry["tokens per second"] for entry in timed])) if timed else None,
            "on": timed[0]["device"] if timed else None,
        }

    text = (
        "All variants read as many tokens. The assignment's rule counts 6 FLOPs a token and parameter, and the scores of softmax attention. Speed: forward "
        "and backward pass of one run by itself after training, uncompiled, median of five; what a fleet took, compiled and perhaps beside others, stands "
        "below with the fleets."
    )
    return Table("cost", lambda rows: [line(values, part, tuning.tried(rows)) for values, part in tuning.fresh(rows).groups(by)], text)


def beyond(by: Sequence[str]) -> Table:
    def line(values: Mapping[str, Any], part: Rows) -> dict[str, Any]:
        length, found = part[0]["task.length"], np.array([stretches(row) for row in by_seed(part)])  # [n, stretches]
        told = {f"{i * length + 1} to {(i + 1) * length}": statistics.mean(found[:, i]) for i in range(found.shape[1])}
        return {"variant": setting(values), **told, "last less first": statistics.paired_mean(found[:, -1], found[:, 0])}

    def make(rows: Rows) -> list[dict[str, Any]]:
        groups = [(values, Rows([row for row in part if row["measures"].get("beyond")])) for values, part in rows.groups(by)]
        return [line(values, part) for values, part in groups if part]

    text = (
        "Nats per token by position, in windows as long as the last column but one says, over the whole validation part; mean over fresh seeds with the t "
        "interval. Trained at the first column's positions alone: learned positions past them are as they began."
    )
    return Table("beyond", make, text)


def leaks(by: Sequence[str]) -> Table:
    def line(values: Mapping[str, Any], part: Rows) -> dict[str, Any]:
        trained, other, prefix = (nats_given(part, name) for name in (TRAINED, OTHER, PREFIX))
        away = [float(np.mean([entry["lost"] for entry in row["measures"]["lost"]])) for row in part if row["measures"].get("lost")]
        told = {name: statistics.mean(x) for name, x in ((TRAINED, trained), (OTHER, other), (PREFIX, prefix))}
        gained = {"had from the leak": statistics.paired_mean(other, trained), "lost in writing": statistics.paired_mean(prefix, trained)}
        return {"variant": setting(values), **told, **gained, "attention lost": statistics.mean(away).within(0, 1) if away else None}

    def make(rows: Rows) -> list[dict[str, Any]]:
        groups = [(values, Rows([row for row in part if row["measures"].get("leak")])) for values, part in rows.groups(by)]
        return [line(values, part) for values, part in groups if part]

    text = (
        f"Nats at the same places of validation windows. {TRAINED.capitalize()}: the window's own tokens follow, the one asked for first. "
        f"{OTHER.capitalize()}: those of another window do. {PREFIX.capitalize()}: the window ends at the place, as it does when a text is written, and no "
        "attention is lost there. A causal model has the same loss in all three, but for rounding. Attention lost: the share of the weights, mean over "
        "layers, heads and positions, that lies on tokens to come and is set to 0."
    )
    return Table("leak", make, text)


def text(told: Mapping[str, tuple[float, float]]) -> Table:
    """``told``: variant -> perplexity of training and of validation in the text."""

    def make(rows: Rows) -> list[dict[str, Any]]:
        lines = []
        for name, (trained, validated) in told.items():
            part = matching(rows, {"variant": name})
            ours = {"training": f"final.{training(part[0]['evaluate'])}", "validation": f"final.{LOSS}"} if part else {}
            known = {split: x[~np.isnan(x)] for split, x in ((split, losses(part, key)) for split, key in ours.items() if key[6:] in part.metrics)}
            lines.append({"variant": name, "training perplexity in the text": trained, "validation perplexity in the text": validated}
                         | {f"our {split} perplexity": exponential(statistics.mean(x)) for split, x in known.items()})  # fmt: skip
        return lines

    return Table("text", make, "Perplexities the text states, of one run each on its corpus and tokens, and ours: exp of the mean loss with its interval.")


def differences(by: Sequence[str], base: str) -> Figure:
    """Every line's validation loss less the baseline's."""

    def draw(rows: Rows) -> Drawing:
        found = [(setting(values), against(rows, values, part, base), part) for values, part in _ranked(rows, by)]
        shown = [(name, estimate, losses(part).size) for name, estimate, part in found if estimate is not None]
        if not shown:
            return nothing(f"no validation losses beside those of {base} yet")
        drawing, (axis,) = canvas(0.9 + 0.23 * len(shown))
        for place, (_, estimate, _) in enumerate(shown):
            if math.isfinite(estimate.low):
                axis.plot([estimate.low, estimate.high], [place] * 2, color=VAL, alpha=0.35, linewidth=5, solid_capstyle="butt")
            axis.plot(estimate.value, place, color=VAL, marker="o", markersize=4.5)
        axis.axvline(0, color=MUTED, linewidth=0.9, dashes=(4, 3), zorder=1)
        axis.set_yticks(range(len(shown)), [name for name, _, _ in shown])
        axis.set_ylim(len(shown) - 0.4, -0.6)
        axis.grid(axis="y", visible=False)
        if max(abs(estimate.value) for _, estimate, _ in shown) > FAR:
            axis.set_xscale("symlog", linthresh=NEAR, linscale=2)
            low, high = axis.get_xlim()
            ticks = [x for x in TICKS if low <= x <= high]
            axis.set_xticks(ticks, list(map(number, ticks)))
            axis.minorticks_off()
        axis.set_xlabel(f"validation loss less that of {base} (nats per token), n = {shown[0][2]}")
        return drawing

    told = f"Validation loss less that of “{base}”, seed by seed: mean and t interval; better ones to the left."
    return Figure("differences", draw, f"{told} Where one is more than {FAR:g} nats away, the axis is logarithmic beyond {NEAR:g}.")


def lost() -> Figure:
    """Where attention goes that zeroing takes away."""

    def draw(rows: Rows) -> Drawing:
        measured = [row["measures"]["lost"] for row in rows if row["measures"].get("lost")]
        if not measured:
            return nothing("no lost attention measured yet")
        drawing, (axis,) = canvas(3.6)
        layers, places = ({entry[name] for entries in measured for entry in entries} for name in ("layer", "position"))
        at = np.array(sorted(places))
        for layer, colour in zip(sorted(layers), colours(len(layers)), strict=True):
            y = np.array([[entry["lost"] for entry in entries if entry["layer"] == layer] for entries in measured])  # [n, T]
            axis.plot(at, np.median(y, axis=0), color=colour, label=f"layer {layer}")
            axis.fill_between(at, y.min(axis=0), y.max(axis=0), color=colour, alpha=0.14, linewidth=0)
        axis.plot(at, 1 - at / at.max(), color=INK, linewidth=0.9, dashes=(1, 2), label="if all tokens had the same")
        axis.set_ylim(0, 1)
        scales(axis, False, False, [])
        axis.set_xlabel("position")
        axis.set_ylabel("share of attention lost")
        legend(drawing, axis)
        return drawing

    return Figure(
        "lost", draw, "Of “zeroed”: the share of attention that lies on tokens to come and is lost, mean over windows and heads; median and range of runs."
    )
