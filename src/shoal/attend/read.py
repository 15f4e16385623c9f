"""What is typed or lies in files, as arrays; and the goals of the command line.

Matrices: [[1, .5], [-.3, 2]], or a .json, .csv, .tsv or .npy file. Goals are words and numbers, with values numbered from 1; several numbers may
stand in brackets or between commas. Not here: whether keys and values fit together (``goals``).

    answers(ByHand(*EXAMPLE), ["replace", "3", "average", "1", "2", "3"], unit=True)
"""

from __future__ import annotations

import ast
import csv
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from shoal.attend.goals import MOST, Answer, ByHand
from shoal.attend.reach import Array
from shoal.config.fields import ConfigError, check

EXAMPLE = (
    [[0.47, 0.65, 0.60], [0.64, 0.50, -0.59], [-0.03, -0.48, -0.88], [0.43, -0.83, 0.35]],
    [[-0.07, -0.88, 0.47], [0.37, -0.93, -0.07], [-0.25, -0.75, 0.61], [0.94, 0.20, 0.28]],
)  # keys and values of a course's exercise
GOALS = "select I, identity, average [I ..], weights W .., output X .., replace I GOAL"


def matrix(given: str, name: str) -> Any:
    """Nested lists or an array; ByHand checks what is in it."""
    if given.lstrip().startswith(("[", "(")):
        return literal(given, name, "rows of numbers, [[1, .5], [-.3, 2]]")
    path = Path(given).expanduser()
    check(path.suffix.lower() in READERS, name, f"{given!r} is neither a list, [[1, .5], [-.3, 2]], nor a {', '.join(READERS)} file")
    check(path.is_file(), name, f"there is no file {given}")
    try:
        return READERS[path.suffix.lower()](path, name)
    except (ValueError, RecursionError) as error:
        raise error if isinstance(error, ConfigError) else ConfigError(name, f"{given} cannot be read: {' '.join(str(error).split()):.200}") from None


class _Named(ast.NodeTransformer):
    def visit_Name(self, node: ast.Name) -> ast.AST:
        return ast.Constant(float(node.id)) if node.id.lower() in ("nan", "inf", "infinity") else node


def literal(text: str, name: str, what: str) -> Any:
    """What is typed as in Python, and nan and inf, so that whoever checks the numbers can say so."""
    try:
        return ast.literal_eval(_Named().visit(ast.parse(text.strip(), mode="eval")))
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        raise ConfigError(name, f"{text:.60} is not a list of {what}") from None


def random(sizes: str, seed: int) -> tuple[Array, Array]:
    """ "N,D,V" -> keys [N, D] and values [N, V], uniform from -1 to 1."""
    found = re.fullmatch(r"(\d{1,4}),(\d{1,4}),(\d{1,4})", sizes.replace(" ", ""))
    check(found is not None, "--random", f"is N,D,V: how many keys, their width, the values' width, as in 6,3,3; not {sizes}")
    assert found is not None
    n, d, v = map(int, found.groups())
    check(1 <= n <= MOST and d >= 1 and v >= 1, "--random", f"{sizes}: each is at least 1, and N at most {MOST}")
    check(0 <= seed < 2**31, "--seed", f"is a whole number from 0 to 2**31 - 1, not {seed}")
    import torch

    from shoal import rng

    drawn = [2 * rng.uniform(rng.key(torch.tensor(seed), f"attention by hand, {name}"), n * size).double() - 1 for name, size in (("keys", d), ("values", v))]
    return drawn[0].numpy().reshape(n, d), drawn[1].numpy().reshape(n, v)


def answers(hand: ByHand, goal: Sequence[str], query: Any = None, unit: bool = False) -> list[Answer]:
    """The words of a goal -> an answer, or several."""
    check(not goal or goal[0] in ("select", "identity", "average", "weights", "output", "replace"), "goal", f"{' '.join(goal)!r} is none of: {GOALS}")
    word, rest = (goal[0], list(goal[1:])) if goal else ("", [])
    check(word == "replace" or not unit, "--unit", "is for a new key: replace I GOAL")
    check(word == "replace" or query is None, "--query", "is for a new key that must suit it: replace I GOAL")
    if word == "select":
        return [hand.select(_one(rest, "select I"))]
    if word == "identity":
        check(not rest, "goal", f"identity takes no numbers, and {' '.join(rest)} is there")
        return hand.identity()
    if word == "average":
        return [hand.average(*_whole(rest))]
    if word == "weights":
        return [hand.weigh(_numbers(rest))]
    if word == "output":
        return [hand.reach(_numbers(rest))]
    if word == "replace":
        index, inner = _one(rest[:1], "replace I GOAL"), rest[1:]
        named = " ".join(inner)
        if inner[:1] == ["select"]:
            target = hand.mean_of(_one(inner[1:], "select I"))
        elif inner[:1] == ["average"]:
            target = hand.mean_of(*_whole(inner[1:]))
        else:
            check(inner[:1] == ["weights"], "goal", "replace I takes one of: select I, average [I ..], weights W ..")
            target, named = hand.checked_weights(_numbers(inner[1:])), ""
        return [hand.replace(index, target, query, unit=unit, goal=named)]
    return hand.questions()


def _numbers(words: Sequence[str]) -> list[float]:
    text = re.sub(r"[\[\](),]", " ", " ".join(words)).split()
    try:
        return [float(word) for word in text]
    except ValueError:
        raise ConfigError("goal", f"{' '.join(words)} are not numbers") from None


def _whole(words: Sequence[str]) -> list[int]:
    numbers = _numbers(words)
    check(all(x.is_integer() for x in numbers), "goal", f"{' '.join(words)}: values have whole numbers, from 1")
    return [int(x) for x in numbers]


def _one(words: Sequence[str], form: str) -> int:
    numbers = _whole(words)
    check(len(numbers) == 1, "goal", f"{form} takes one number, not {len(numbers)}")
    return numbers[0]


def _json(path: Path, name: str) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def _csv(path: Path, name: str) -> list[list[float]]:
    """Rows of numbers without a header."""
    rows = []
    with path.open(encoding="utf-8-sig", newline="") as file:
        for place, cells in enumerate(csv.reader(file, delimiter="\t" if path.suffix.lower() == ".tsv" else ","), 1):
            if not any(cell.strip() for cell in cells):
                continue
            try:
                rows.append([float(cell) for cell in cells])
            except ValueError:
                raise ConfigError(name, f"{path}, line {place}: {','.join(cells):.40} are not numbers; a row is numbers only, without a header") from None
    return rows


def _npy(path: Path, name: str) -> Array:
    return np.load(path, allow_pickle=False)


READERS = {".json": _json, ".csv": _csv, ".tsv": _csv, ".npy": _npy}
