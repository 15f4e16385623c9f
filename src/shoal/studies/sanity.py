"""Can a small transformer learn one sentence by heart, and what does it do where it was not trained?"""

from __future__ import annotations

import math
from itertools import cycle
from statistics import median
from typing import Any

from shoal.config import AdamW, DecoderConfig, MemorizeConfig, RunConfig, StudyConfig, flatten
from shoal.results.claims import Claim, Sample
from shoal.results.figures import PALETTE, Drawing, Figure, canvas, curves
from shoal.results.rows import Rows
from shoal.results.tables import settings
from shoal.studies.study import Study, about, cells

UNSCORED = "task.unscored"


def full() -> StudyConfig:
    """One layer on "I love machine learning", with the loss on all characters and with the first three left out."""
    run = RunConfig(
        task=MemorizeConfig(),
        model=DecoderConfig(num_layers=1, width=64, num_heads=4, feed_forward=256),
        optimizer=AdamW(lr=1e-2, wd=0.0),
        steps=300,
        batch_size=0,
        log_every=10,
        evaluate_every=10,
        evaluate=("train",),
    )
    return StudyConfig(run=run, grid={UNSCORED: [0, 3]}, seeds=6)  # with 6 of 6 the interval of a share begins above one half


PRESETS = {"quick": full, "full": full}
DEFAULT = ("quick", "full")


def samples(run: Any) -> list[dict[str, Any]]:
    """What greedy sampling writes after nothing, and after the characters the loss left out. With several strings any of them will do."""
    from shoal.inference import generate

    strings, unscored = run.config.task.strings, run.config.task.unscored
    prompts = ["", strings[0][:unscored]] if unscored else [""]
    written = {prompt: generate(run, prompt) for prompt in prompts}
    return [{"prompt": prompt, "sample": text, "exact": prompt + text in strings} for prompt, text in written.items()]


def positions(run: Any) -> list[dict[str, Any]]:
    """At each character of the first string: the probability of the right one, the most probable one, the entropy in nats."""
    from shoal.inference.evaluate import batches, next_token_probabilities

    batch = batches(run, "train")[0]
    probabilities = next_token_probabilities(run, batch)[0]
    rows = []
    for place in range(len(run.config.task.strings[0]) + 1):
        target, p = int(batch.targets[0, place]), probabilities[place]
        right, most = run.task.tokenizer.decode([target]), run.task.tokenizer.decode([int(p.argmax())])
        rows.append(
            {
                "position": place + 1,
                "character": right or "end",
                "scored": bool(batch.weights[0, place] > 0),
                "p(right)": p[target].item(),
                "most probable": most or "end",
                "entropy": -(p * p.clamp_min(1e-30).log()).sum().item(),
            }
        )
    return rows


def draw_positions(rows: Rows) -> Drawing:
    """Median and range over seeds of the probability of the right character, at each position, for each setting."""
    drawing, (axes,) = canvas(3.4)
    for color, (cell, group) in zip(cycle(PALETTE), rows.groups(settings(rows)), strict=False):
        measured = [row["measures"]["positions"] for row in group if "positions" in row["measures"]]
        if not measured:
            continue
        table = [sorted(values) for values in zip(*([r["p(right)"] for r in one] for one in measured), strict=True)]
        x = range(1, len(table) + 1)
        unscored = group[0][UNSCORED]
        label = about(f"first {unscored} left out of the loss" if unscored else "all characters in the loss", cell, [UNSCORED])
        axes.plot(x, [median(values) for values in table], "o-", color=color, markersize=3.5, label=f"{label.rstrip('.')}, n = {len(measured)}")
        axes.fill_between(x, [values[0] for values in table], [values[-1] for values in table], color=color, alpha=0.2, linewidth=0)
        axes.set_xticks(list(x), [r["character"].replace(" ", "␣") for r in measured[0]])
    axes.set(xlabel="character to predict, given those before it", ylabel="probability of the right one", ylim=(-0.04, 1.04))
    axes.grid(axis="x", visible=False)
    drawing.legend(loc="outside upper left", ncols=2)
    return drawing


def _claims(config: StudyConfig, cell: dict[str, Any]) -> list[Claim]:
    def loss(rows: Rows) -> Sample:
        return Sample(rows.where(cell).column("final.train/loss"), bounds=(0, math.inf))

    def exact(rows: Rows) -> Sample:
        return Sample([float(row["measures"]["samples"][-1]["exact"]) for row in rows.where(cell)], kind="proportion")

    def untrained(rows: Rows) -> Sample:
        return Sample([math.fsum(r["p(right)"] for r in row["measures"]["positions"][:left_out]) / left_out for row in rows.where(cell)], bounds=(0, 1))

    left_out = cell.get(UNSCORED, flatten(config.run)[UNSCORED])
    small, more_than_half = (0.0, 1e-3), (0.5, 1.0)
    if not left_out:
        sentences = [
            ("With all characters in the loss, the training loss falls below 0.001 nats per character.", loss, small),
            ("Greedy sampling from nothing then returns the string exactly, for more than half of all seeds.", exact, more_than_half),
        ]
    else:
        sentences = [
            (f"With the first {left_out} characters left out of the loss, the loss on the others falls below 0.001.", loss, small),
            (f"Given those {left_out} characters, sampling returns the rest exactly, for more than half of all seeds.", exact, more_than_half),
            (
                f"Without them it does not: at the {left_out} positions it was never trained on, the model gives the right character a probability "
                "below one half.",
                untrained,
                (0.0, 0.5),
            ),
        ]
    return [Claim(about(text, cell, [UNSCORED]), sample, holds) for text, sample, holds in sentences]


def study(config: StudyConfig) -> Study:
    return Study(
        name="sanity",
        question=__doc__ or "",
        main_metric="train/loss",
        config=config,
        wanted=lambda rows: config.runs(),
        measures={"samples": samples, "positions": positions},
        figures=[
            curves(["train/loss"], by=list(cells(config)[0]), ylabel="training loss (nats per character)", logy=True),
            Figure(
                "positions",
                draw_positions,
                "Probability of the right character at each position; line: median over seeds, band: range. Where the loss left characters out, nothing "
                "ever told the model what stands there: what it predicts at those places is whatever training elsewhere left behind.",
            ),
        ],
        claims=[claim for cell in cells(config) for claim in _claims(config, cell)],
    )
