"""Positive or negative, without training for it: behind a text stands an unfinished sentence, and the next token's probabilities say how it would end.

    found = classify(load("runs/flop-final"), "reviews.csv", templates=["{text} The movie is"], verbalisers=["bad,good"])
    found.lines[0]["accuracy"]; print(found.report())

p(positive) = P(good) / (P(good) + P(bad)); each side's probability is the mean over its words, "bad|awful,good|great". Of several templates or pairs of
verbalisers every combination is a member, and the ensemble is the mean of their log-odds. Labels are looked at only to count what is right.

Boundaries without labels are in ``calibrate``, data in ``shoal.data.sentiment``. Not here: training on labels.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.special import expit

from shoal.config.fields import ConfigError, check
from shoal.data.sentiment import Reviews, reviews
from shoal.inference import calibrate
from shoal.inference.evaluate import TOKENS
from shoal.inference.prompts import device_of, encoded, left_padded
from shoal.inference.score import check_foretells, pieces
from shoal.results.statistics import proportion
from shoal.results.store import write_atomic, write_json
from shoal.results.wording import interval, number
from shoal.train.run import Run

TEMPLATES, VERBALISERS = ("{text} The movie is",), ("bad,good",)
PLACE = "{text}"
Sides = tuple[list[int], list[int]]  # tokens of the negative and of the positive words


@dataclass(frozen=True)
class Member:
    """Scores by one template and one pair of verbalisers, or the mean of several such."""

    name: str
    log_odds: NDArray[np.float64]  # [n]
    neutral: float  # contextual calibration's boundary; NaN if none of its texts can be encoded


@dataclass(frozen=True)
class Classified:
    run: str  # id
    data: Reviews
    members: list[Member]  # the ensemble first, if there are several
    content_free: list[str]  # the texts of contextual calibration that could be encoded
    cut: int  # texts that were longer than the model's positions; their beginning was cut off

    @property
    def lines(self) -> list[dict[str, Any]]:
        """Per member and boundary: "scores", "boundary", its "log-odds" and "p", "right", "n", "accuracy", "low", "high" (Clopper-Pearson, 95 %), "note"."""
        return [line for member in self.members for line in evaluated(member, self.data.labels)]

    @property
    def notes(self) -> list[str]:
        labels = ", ".join(f"{name} -> {('negative', 'positive')[value]}" for name, value in self.data.mapping.items())
        notes = [*([f"labels: {labels}"] if labels else []), *self.data.notes]
        notes += [f"{self.cut:,} of {len(self.data.texts):,} texts are longer than the model's positions; their beginning was cut off"] if self.cut else []
        inputs = ", ".join(f'"{text}"' for text in self.content_free)
        return [*notes, f"content-free texts: {inputs or 'none could be encoded'}"]

    def record(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "run": self.run,
            "data": self.data.source,
            "texts": len(self.data.texts),
            "positive": int(self.data.labels.sum()),
            "majority": majority(self.data.labels),
            "cut": self.cut,
            "content_free": self.content_free,
            "notes": self.notes,
            "results": self.lines,
        }

    def report(self) -> str:
        """Markdown."""
        n, positive, most = len(self.data.texts), int(self.data.labels.sum()), majority(self.data.labels)
        told = f"{n:,} texts of {self.data.source or 'a list'}, {positive:,} positive, by run {self.run}. Chance 50 %, always the larger class {most:.1%}."
        head = ["| scores | boundary | p at it | right | accuracy | 95 % interval |", "|---|---|---|---|---|---|"]
        body = [
            f"| {line['scores'].replace('|', '/')} | {line['boundary']} | {number(line['p'])} | {line['right']:,} of {line['n']:,} "
            f"| {line['accuracy']:.1%} | {interval(line['low'], line['high'])} |"
            for line in self.lines
            if not line["note"]
        ]
        missing = [f"{line['scores']}, {line['boundary']}: {line['note']}" for line in self.lines if line["note"]]
        return "\n".join([told, "", *head, *body, "", *(f"- {note}" for note in [*self.notes, *missing])]) + "\n"

    def figure(self) -> str:
        """SVG: how the log-odds of both classes lie, and the boundaries between them; of the ensemble, or the only member."""
        from shoal.results.figures import INK, PALETTE, TRAIN, VAL, Figure, canvas, legend
        from shoal.results.rows import Rows

        member = self.members[0]
        low, high = np.quantile(member.log_odds, [0.002, 0.998])
        edges = np.linspace(low, high, 41).tolist() if high > low else [low - 1, low + 1]

        def draw(_: Rows) -> Any:
            drawing, (axis,) = canvas(3.6)
            for value, name, colour in ((0, "negative", TRAIN), (1, "positive", VAL)):
                part = member.log_odds[self.data.labels == value]
                axis.hist(np.clip(part, edges[0], edges[-1]), edges, color=colour, alpha=0.45, label=f"{name} (n = {len(part):,})")
            shades = (INK, PALETTE[3], PALETTE[2], PALETTE[4])
            styles = ((0, ()), (0, (5, 2)), (0, (1, 1)), (0, (6, 2, 1, 2)))
            for line, colour, dashes in zip(evaluated(member, self.data.labels), shades, styles, strict=True):
                if not line["note"]:
                    axis.axvline(line["log-odds"], color=colour, linestyle=dashes, linewidth=1.8, label=f"{line['boundary']}: {line['accuracy']:.1%} right")
            axis.set_xlabel("log-odds, log p(positive) / p(negative)")
            axis.set_ylabel("texts")
            legend(drawing, axis)
            return drawing

        return Figure("log-odds", draw).svg(Rows())

    def table(self) -> str:
        """A line per text: its label, the first member's log-odds and p(positive), the beginning of the text."""
        member = self.members[0]
        lines = ["label\tlog_odds\tp\ttext"]
        for text, label, x in zip(self.data.texts, self.data.labels.tolist(), member.log_odds.tolist(), strict=True):
            lines.append(f"{label}\t{x:.6f}\t{expit(x):.6f}\t{' '.join(text[:80].split())}")
        return "\n".join(lines) + "\n"


def save(found: Classified, directory: Path) -> None:
    """report.md, results.json, log-odds.svg and texts.tsv."""
    write_json(directory / "results.json", found.record())
    for name, text in (("report.md", found.report()), ("log-odds.svg", found.figure()), ("texts.tsv", found.table())):
        write_atomic(directory / name, text.encode())


def classify(
    run: Run, data: str | Path | Reviews, templates: Sequence[str] = TEMPLATES, verbalisers: Sequence[str] = VERBALISERS, limit: int = 0
) -> Classified:
    """``data``: what ``shoal.data.sentiment.reviews`` reads or gave. ConfigError ("--template", "--verbalisers", "data", ...) says what to change."""
    check_foretells(run)
    check(bool(templates), "--template", "give at least one")
    check(bool(verbalisers), "--verbalisers", "give at least one pair")
    sides = [(template, pair, sides_of(run, template, pair)) for template, pair in itertools.product(templates, verbalisers)]
    data = data if isinstance(data, Reviews) else reviews(data, limit=limit)
    check(len(data.texts) == len(data.labels) > 0, "data", f"has {len(data.texts)} texts and {len(data.labels)} labels; give as many of both, at least one")
    check(all(text.strip() for text in data.texts), "data", "holds an empty text; leave it out")
    check(set(np.unique(data.labels)) <= {0, 1}, "data", f"has labels {', '.join(map(str, np.unique(data.labels)))}; they are 0 or 1")
    content_free = [text for text in calibrate.CONTENT_FREE if _encodes(run, templates, text)]
    members, cut = [], 0
    for template, group in itertools.groupby(sides, key=lambda side: side[0]):
        pairs = [(pair, tokens) for _, pair, tokens in group]
        found, some = log_odds(run, [*data.texts, *content_free], template, [tokens for _, tokens in pairs])
        cut = max(cut, sum(some[: len(data.texts)]))
        for (pair, _), values in zip(pairs, found, strict=True):
            neutral = calibrate.contextual(values[len(data.texts) :]) if content_free else float("nan")
            members.append(Member(f"{template} [{pair}]", values[: len(data.texts)], neutral))
    if len(members) > 1:
        mean = np.mean([member.log_odds for member in members], axis=0)
        members.insert(0, Member(f"mean of {len(members)}", mean, float(np.mean([member.neutral for member in members]))))
    return Classified(run.id, data, members, content_free, cut)


def evaluated(member: Member, labels: NDArray[np.int8]) -> list[dict[str, Any]]:
    """A line per boundary, as ``Classified.lines``. What is on the boundary is negative."""
    x = member.log_odds
    few = "needs two different scores"
    fitted = calibrate.mixture(x) if len(x) > 1 else None
    boundaries = [
        ("p = 0.5", 0.0, ""),
        ("median", calibrate.median(x), few if x.min() == x.max() else ""),
        ("mixture", fitted.boundary if fitted else float("nan"), "" if fitted and fitted.high > fitted.low else few),
        ("content-free", member.neutral, "" if member.neutral == member.neutral else "no content-free text can be encoded"),
    ]
    lines = []
    for name, boundary, note in boundaries:
        right = int(((x > boundary) == (labels == 1)).sum())
        found = proportion(right, len(x))
        counted = {"right": right, "n": len(x), "accuracy": found.value, "low": found.low, "high": found.high}
        lines.append({"scores": member.name, "boundary": name, "log-odds": boundary, "p": float(expit(boundary)), **counted, "note": note})
    return lines


def majority(labels: NDArray[np.int8]) -> float:
    """Share of the larger class."""
    return max(Counter(labels.tolist()).values()) / len(labels)


@torch.inference_mode()
def log_odds(run: Run, texts: Sequence[str], template: str, sides: Sequence[Sides]) -> tuple[NDArray[np.float64], list[bool]]:
    """-> [len(sides), n], and whether a text's beginning was cut off. The softmax's sum over the vocabulary falls out of p(positive) / p(negative)."""
    prompts = [prompt(run, template, text) for text in texts]
    rows, device = [tokens for tokens, _ in prompts], device_of(run)
    found = np.zeros((len(sides), len(texts)))
    for piece in pieces([len(row) for row in rows], TOKENS[device.type]):
        tokens, context = left_padded([rows[i] for i in piece], device)
        hidden, _ = run.model(tokens, context._replace(at=slice(-1, None)))
        logits = run.model.logits(hidden)[:, -1].double()  # [B, V]
        for number_of, (bad, good) in enumerate(sides):
            found[number_of, piece] = (_mean(logits, good) - _mean(logits, bad)).cpu().numpy()
    return found, [cut for _, cut in prompts]


def _mean(logits: torch.Tensor, words: list[int]) -> torch.Tensor:
    """Logarithm of the mean of their probabilities, but for what all words share."""
    return logits[:, words].logsumexp(-1) - np.log(len(words))


def prompt(run: Run, template: str, text: str) -> tuple[list[int], bool]:
    """The template's tokens with the text in it, begin token first; and whether the text's beginning was cut off so that they fit the model's positions."""
    room, start, rest = run.task.max_length, 0, text
    tokens = encoded(run, template.replace(PLACE, rest))
    own = run.task.tokenizer.encode(text)
    while len(tokens) > room:
        check(start < len(own), "--template", f"{template!r} alone takes more than the model's {room} positions; shorten it")
        start = min(start + len(tokens) - room, len(own))
        rest = run.task.tokenizer.decode(own[start:]).lstrip("\ufffd").lstrip()
        tokens = encoded(run, template.replace(PLACE, rest))
    return tokens, start > 0


def sides_of(run: Run, template: str, verbalisers: str) -> Sides:
    """The tokens of "bad,good" or "bad|awful,good|great" behind this template: with a space before them, unless the template ends in one."""
    check(template.count(PLACE) == 1, "--template", f"{template!r} must hold {PLACE} once, where the text goes")
    words = [[word.strip() for word in side.split("|")] for side in verbalisers.split(",")]
    example = 'for example "bad,good", or "bad|awful,good|great"'
    check(len(words) == 2 and all(map(all, words)), "--verbalisers", f"{verbalisers!r} is no pair of words, negative first; {example}")
    space = "" if template[-1:].isspace() else " "
    bad, good = ([_token(run, space + word) for word in side] for side in words)
    check(not set(bad) & set(good), "--verbalisers", f"{verbalisers!r} has the same word on both sides")
    return bad, good


def _token(run: Run, word: str) -> int:
    try:
        tokens = run.task.tokenizer.encode(word)
    except ConfigError as error:
        raise ConfigError("--verbalisers", f"{word!r} cannot be encoded ({error.message})") from None
    parts = ", ".join(repr(run.task.tokenizer.decode([token])) for token in tokens)
    fix = "take words that are one, or end the template in a space if they should have none before them"
    check(len(tokens) == 1, "--verbalisers", f"{word!r} is {len(tokens)} tokens ({parts}), and must be one; {fix}")
    return tokens[0]


def _encodes(run: Run, templates: Sequence[str], text: str) -> bool:
    try:
        return all(bool(prompt(run, template, text)) for template in templates)
    except ConfigError:
        return False
