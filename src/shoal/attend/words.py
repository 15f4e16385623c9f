"""Answers in words: why a target is reached, approached or impossible, what that means for a language model, and answers as a table.

Functions of answers, without arithmetic of their own but for what a sentence quotes. Not here: what is decided (``reach``), the goals (``goals``).

    print(table(hand.questions()), overview(hand), describe(hand.select(2)), sep="\\n\\n")
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from textwrap import fill
from typing import TYPE_CHECKING

import numpy as np

from shoal.attend.reach import Array
from shoal.results.wording import listing, number, plural

if TYPE_CHECKING:
    from shoal.attend.goals import Answer, ByHand

WIDTH = 120
SHOWN, FULL = 8, 64  # numbers of a vector in a table, and by itself, at most


def explain(answer: Answer) -> str:
    """A few sentences: why, how near, and what it means."""
    if answer.replaced is not None:
        return " ".join([*_new_key(answer), MEANING["replace"]])
    if answer.target_weights is None:
        return " ".join([*_output(answer), MEANING["output"]])
    kind = "select" if answer.target_weights.max() == 1 else answer.goal.partition(" ")[0] if answer.goal != "average all" else "all"
    parts = {"exactly": _exactly, "in the limit": _limit, "no": _impossible}[answer.reachable](answer)
    return " ".join([*parts, MEANING.get(f"{kind} {answer.reachable}", MEANING.get(kind, ""))]).strip()  # one value alone: nothing to say


def describe(answer: Answer) -> str:
    """One answer in full."""

    def long(x: Array) -> str:
        return f"{vector(x, most=FULL)}   length {number(float(np.linalg.norm(x)))}"

    lines = [("goal", answer.goal), ("reachable", answer.reachable), ("query", long(answer.query))]
    if answer.key is not None:
        lines.append(("new key", long(answer.key)))
    lines.append(("weights", vector(answer.weights, 4, FULL)))
    if answer.nearest is not None and answer.reachable == "no":
        lines.append(("nearest weights", f"{vector(answer.nearest, 4, FULL)}   KL {number(answer.divergence)} nats"))
    judged = f"{'within' if answer.within else 'more than'} {number(answer.tolerance)}"
    lines += [
        ("output", vector(answer.output, 4, FULL)),
        ("wanted", vector(answer.target, 4, FULL)),
        ("error", f"{_size(answer.error)} ({judged}); largest coordinate {_size(answer.largest_error)}"),
    ]
    width = max(len(name) for name, _ in lines)
    return "\n".join([*(f"{name:{width}}  {text}" for name, text in lines), "", fill(answer.explanation, WIDTH)])


def table(answers: Sequence[Answer]) -> str:
    """A line for each answer."""
    head = ("goal", "weights", "error of the output", "query, or new key", "weights of the values")
    rows = [
        (a.goal, a.reachable, f"{_size(a.error)} {'' if a.within else '(too far)'}".rstrip(), ("k = " if a.key is not None else "q = ")
         + vector(a.query if a.key is None else a.key), _largest(a.weights))
        for a in answers
    ]  # fmt: skip
    widths = [max(len(row[i]) for row in [head, *rows]) for i in range(len(head))]
    return "\n".join("  ".join(f"{cell:{width}}" for cell, width in zip(row, widths, strict=True)).rstrip() for row in [head, *rows])


def overview(hand: ByHand) -> str:
    """What these keys allow: how many weightings, and which values can be had alone."""
    n, d = hand.keys.shape
    size, corners = hand.dimension(), hand.selectable()
    whole = "no key lies in the plane of the others, so every weighting is reached, or approached where weights are 0"
    part = f"the weights that queries reach are a surface of dimension {size} among the {n - 1} dimensions of all weightings: most are out of reach"
    named = f"{len(corners)} of the {n}" if len(corners) > 2 * SHOWN else listing([f"v{i}" for i in corners])
    every = "every value can be selected" if len(corners) == n else f"the corners of their hull, {named}, can be selected"
    none = "no value can be selected alone"
    text = f"{plural(n, 'key')} of width {d} whose hull has dimension {size}: {whole if size == n - 1 else part}; {every if corners else none}."
    return fill(text, WIDTH)


def relation(certificate: Array) -> str:
    """w2 = w1^0.5 w3^0.5"""
    return f"{_product(-certificate)} = {_product(certificate)}"


def vector(numbers: Array, digits: int = 5, most: int = SHOWN) -> str:
    """[0.5, -1.25, 3]: five significant digits, to be typed again; or fewer, behind the point."""
    form, least = (f".{digits}g", 1e-12) if digits >= 5 else (f".{digits}f", 0.5 * 10**-digits)
    shown = [f"{0.0 if abs(x) < least else x:{form}}" for x in numbers]
    return f"[{', '.join(shown[:most])}{', ..' if len(numbers) > most else ''}]"


def _exactly(answer: Answer) -> list[str]:
    if not np.abs(answer.keys @ answer.query).max() > 1e-9:
        return ["A query that scores every key 0, as zeros do, gives all the same weight."]
    return [
        "Log-weights are the scores K q plus a constant, so a query reaches positive weights exactly if their logarithms solve a linear system.",
        "These do.",
    ]


def _limit(answer: Answer) -> list[str]:
    assert answer.margin is not None
    kept, n = [f"key {i}" for i in answer.face], len(answer.weights)
    outside = 1 - float(answer.weights[[i - 1 for i in answer.face]].sum())
    longer, length = math.log(10) / answer.margin, float(np.linalg.norm(answer.query))
    alone, others = len(kept) == 1, "the other falls" if n - len(kept) == 1 else f"the {n - len(kept)} others fall"
    why = (
        f"{kept[0]} is a corner of the keys' convex hull, {number(answer.margin / answer.scale, 3)} from the hull of the others"
        if alone
        else f"{listing(kept)} are all the keys on one face of the keys' hull: a direction scores them alike and every other key lower"
    )
    parts = [
        f"No softmax is exactly 0, so no query gives these weights, but some come as near as one likes: {why}.",
        f"With every unit of length along it {others} behind by at least {number(answer.margin, 3)} in score; at length {number(length, 3)} "
        f"{number(100 * outside, 2)} % of the weight is left outside, and {number(longer, 3)} more divide that by ten.",
    ]
    if not alone:
        tipped = math.exp(min(0.02 * answer.scale * length, 700.0))
        parts.append(f"The price is precision: with keys off by 0.01 the ratio of two of these weights may be off by a factor of {number(tipped, 3)}.")
    return parts


def _impossible(answer: Answer) -> list[str]:
    assert answer.certificate is not None and answer.nearest is not None and answer.target_weights is not None
    c, t = answer.certificate, answer.target_weights
    over, under = np.flatnonzero(c > 0), np.flatnonzero(c < 0)
    if len(over) == len(under) == 1:
        parts = [f"Keys {under[0] + 1} and {over[0] + 1} are equal, so every query gives both the same weight."]
    else:
        parts = [
            f"Impossible, and here is why: {_mean(-c)} = {_mean(c)}, so for every query {relation(c)}.",
            f"The wanted weights would make that {number(_worth(t, -c), 3)} = {number(_worth(t, c), 3)}.",
        ]
    if t.max() == 1:
        i = int(t.argmax())
        parts.append(f"No query gives v{i + 1} more than {number(100 * float(answer.nearest[i]), 3)} % of the weight.")
    if answer.within:
        parts.append(f"The output is another matter: other weights give nearly the same, {_size(answer.error)} off.")
    else:
        proven = f"; that none is nearer than {_size(answer.at_least)} is certain" if answer.at_least > 0 else ""
        parts.append(f"The nearest output found is {_size(answer.error)} off{proven}.")
    return parts


def _output(answer: Answer) -> list[str]:
    if answer.reachable == "no":
        return [
            f"An output is an average of the values, and this one lies {_size(answer.at_least)} outside their hull: no weights whatever come nearer.",
            f"The best that was found is {_size(answer.error)} off.",
        ]
    if answer.reachable == "not found":
        return [
            f"Some weights give this output, but whether a query does is a question without a convex form: the nearest found is {_size(answer.error)} off, "
            "which proves nothing about others."
        ]
    how = "gives" if answer.reachable == "exactly" else "approaches, as it grows,"
    return [f"The target is an average of the values, and this query {how} weights that make it."]


def _new_key(answer: Answer) -> list[str]:
    assert answer.replaced is not None and answer.target_weights is not None and answer.key is not None
    j = answer.replaced
    score, length = answer.scale * float(answer.key @ answer.query), float(np.linalg.norm(answer.query))
    others = answer.scale * np.delete(answer.keys, j - 1, 0) @ answer.query
    if length == 0:
        return ["A query of zeros scores every key 0: a new key changes nothing."]
    parts = [
        f"Only one number of the new key counts, its score with the query: w{j} = 1 / (1 + sum of exp(other scores) / exp(its own)), "
        f"and {number(score)} gives v{j} {number(100 * float(answer.weights[j - 1]), 3)} % of the weight."
    ]
    if answer.unit:
        most = f"A key of length 1 can have any score up to {number(answer.scale * length, 3)}, which it has if it points the way of the query"
        parts.append(most + (f"; the others have up to {number(float(others.max()), 3)}." if answer.reachable == "no" else "."))
        if answer.reachable == "in the limit" and answer.target_weights[j - 1] == 1:
            parts.append("The other keys point elsewhere, so a longer query widens the lead.")
    else:
        parts.append("Of all keys with this score the one nearest the old key is taken, which moves along the query.")
    if answer.reachable == "no":
        parts.append(
            f"The other weights keep their ratios, which only the query sets, and so the wanted weights are missed by {number(answer.divergence, 3)} nats (KL)"
            f"{', the output by ' + _size(answer.error)}."
        )
    return parts


GATHERED = "In a language model a head gathers several tokens at fixed shares when their keys agree in one direction that no other key shares so well."
MEANING = {
    "select in the limit": "In a language model this is copying: a head reads one token alone when its key sticks out, and the sharper the longer the query.",
    "select no": "In a language model no head with such keys can read this token alone: its key has to stick out, for which wider keys have more room.",
    "all": "In a language model such a head is an average of the context, a bag of words: it asks nothing.",
    "average in the limit": GATHERED,
    "average no": "In a language model one head cannot gather these tokens evenly; several heads, each reading one of them, can, if each can be selected.",
    "weights in the limit": GATHERED,
    "weights": "In a language model a head whose keys have width d sets the weights of up to d + 1 tokens at will; of more, only d numbers of them are free.",
    "replace": "In a language model a key is what a token says of itself: training can change who is read without changing what is asked.",
    "output": "In a language model a head only averages what its values hold: the rest is for other values, more heads, or the layers after.",
}  # fmt: skip


def _largest(weights: Array) -> str:
    """All weights, or of many the largest ones with their numbers."""
    if len(weights) <= SHOWN:
        return vector(weights, 3)
    order = [i for i in np.argsort(-weights, kind="stable")[:4] if weights[i] >= 5e-4]
    return ", ".join(f"v{i + 1} {weights[i]:.3f}" for i in order) + (", .." if weights[order].sum() < 0.99 else "")


def _size(x: float) -> str:
    return "0" if x < 1e-12 else number(x, 2)


def _worth(t: Array, c: Array) -> float:
    return float(np.prod(t[c > 0] ** c[c > 0]))


def _product(c: Array) -> str:
    return " ".join(f"w{i + 1}" + ("" if abs(c[i] - 1) < 1e-9 else f"^{c[i]:.3g}") for i in np.flatnonzero(c > 0))


def _mean(c: Array) -> str:
    return " + ".join(("" if abs(c[i] - 1) < 1e-9 else f"{c[i]:.3g} ") + f"k{i + 1}" for i in np.flatnonzero(c > 0))
