"""Attention by hand: keys K [n, d] and values V [n, v] are given; which query (or which new key) makes softmax(K q) V what one wants?

``ByHand`` holds the pairs, its methods are the goals, and an ``Answer`` is what they return. Values are numbered from 1, as v_1 .. v_n in texts. A target that
no query reaches is an answer too: with the nearest weights, the best output found, and a certificate. ConfigError only for what cannot be asked.
Not here: why it is so (``reach``), sentences and tables (``words``), pictures (``heat_map``), files (``read``).

    found = ByHand([[1, 0], [0, 1], [1, 1]], [[1, 0], [0, 1], [2, 2]]).select(3)
    found.query, found.weights, found.error, found.reachable, print(found.explanation)
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from itertools import chain, combinations, islice
from typing import Any

import numpy as np
from numpy.typing import ArrayLike
from scipy.special import logit, softmax

from shoal.attend.reach import Array, Reach, best_output, dimension, distance_to_hull, log_sum, nearest
from shoal.config.fields import check

MOST = 512  # keys: what is asked by hand is answered in seconds
OUTSIDE = 1e-3  # weight that a limit leaves to other values, if the tolerance allows as much
SUM = 1e-6  # how far from 1 target weights may add up (they are divided by their sum)


@dataclass(frozen=True, kw_only=True)
class Answer:
    """One query for one goal. Lists are numbered as the keys; what is unknown or does not apply is None."""

    goal: str  # "select 2"
    reachable: str  # of the weights: "exactly", "in the limit", "no"; of a goal that names an output and no weights also "not found"
    query: Array  # [d]; where the weights are not reachable, that of the nearest output found
    weights: Array  # [n] of this query (and of the new key)
    output: Array  # [v]
    target: Array  # [v] the wanted output
    target_weights: Array | None  # [n]
    error: float  # |output - target|, Euclidean
    largest_error: float  # of a coordinate
    tolerance: float
    within: bool  # error <= tolerance
    at_least: float = 0.0  # proven: no query's error is smaller; 0 = nothing is proven
    nearest: Array | None = None  # [n] the reachable weights of least KL(target || weights)
    divergence: float | None = None  # that KL, nats
    certificate: Array | None = None  # [n] c with sum_i c_i log w_i = 0 for every query, which the target weights break
    face: tuple[int, ...] = ()  # the values that keep weight as the query grows
    margin: float | None = None  # by how much the others' scores fall behind, at least, for each unit that the query grows along its direction
    key: Array | None = None  # [d] the new key
    replaced: int | None = None  # its number
    unit: bool = False  # the new key has length 1
    keys: Array = field(repr=False)  # [n, d] with the new key
    scale: float = field(default=1.0, repr=False)  # of the scores

    @property
    def explanation(self) -> str:
        from shoal.attend.words import explain

        return explain(self)

    def as_dict(self) -> dict[str, Any]:
        """For JSON: lists and numbers."""
        plain = {name: value.tolist() if isinstance(value, np.ndarray) else value for name, value in asdict(self).items()}
        return {**plain, "explanation": self.explanation}


class ByHand:
    """keys [n, d], values [n, v]. Scores are K q, or K q / sqrt(d) if ``scaled``. An output within ``tolerance`` (Euclidean) of the target is good enough."""

    def __init__(self, keys: ArrayLike, values: ArrayLike, *, scaled: bool = False, tolerance: float = 0.05) -> None:
        self.keys, self.values = _matrix(keys, "keys"), _matrix(values, "values")
        n, d = self.keys.shape
        check(len(self.values) == n, "values", f"has {len(self.values)} rows and keys has {n}: give one value for each key")
        check(n <= MOST, "keys", f"has {n:,} rows; by hand at most {MOST} are taken")
        check(math.isfinite(tolerance) and tolerance > 0, "tolerance", f"must be a number above 0, not {tolerance}")
        self.tolerance, self.scale = tolerance, d**-0.5 if scaled else 1.0
        self._scored = self.keys * self.scale
        self._size = float(np.linalg.norm(np.ptp(self.values, axis=0)))  # no two outputs are farther apart
        self._outside = min(OUTSIDE, tolerance / (10 * self._size)) if self._size else OUTSIDE

    def weights(self, query: ArrayLike) -> Array:
        """[d] -> [n]"""
        return softmax(self._scored @ self._vector(query, self.keys.shape[1], "query"))

    def select(self, index: int) -> Answer:
        """Weight 1 on one value."""
        i = self._index(index)
        return self._weights_goal(f"select {index}", np.eye(len(self.keys))[i])

    def identity(self) -> list[Answer]:
        """A query for every value: with them as the rows of Q, softmax(Q K^T) V = V."""
        return [self.select(i + 1) for i in range(len(self.keys))]

    def average(self, *indices: int) -> Answer:
        """The mean of these values (none named: of all)."""
        return self._weights_goal(" ".join(["average", *map(str, indices or ["all"])]), self.mean_of(*indices))

    def weigh(self, target: ArrayLike) -> Answer:
        """Any weights [n]: none negative, of sum 1."""
        t = self.checked_weights(target)
        return self._weights_goal(f"weights {' '.join(f'{x:.4g}' for x in t)}", t)

    def reach(self, output: ArrayLike) -> Answer:
        """An output [v], whatever the weights."""
        wanted = self._vector(output, self.values.shape[1], "output")
        distance, t = distance_to_hull(self.values, wanted)
        found = nearest(self._scored, t)
        query = found.query(self._scored, self._outside)
        if found.verdict == "no":
            query = best_output(self._scored, self.values, wanted, [query])
        off = float(np.linalg.norm(softmax(self._scored @ query) @ self.values - wanted))
        distance, rounding = self._certain(distance), 1e-9 * (1 + self._size)
        reached = "no" if distance else "exactly" if off <= rounding else found.verdict if found.verdict != "no" else "not found"
        shown = " ".join(f"{x:.4g}" for x in wanted)
        return self._answer(f"output {shown}", reached, query, wanted, None, at_least=distance)

    def replace(self, index: int, target: ArrayLike, query: ArrayLike | None = None, *, unit: bool = False, goal: str = "") -> Answer:
        """A new key number ``index``, free or of length 1, with which the same query gives the target weights [n].

        The query: if none is given, the one that gives the other values' shares of the target with the old key; if the target is this value alone, one that
        averages two others (the first two for which there is such a query). Where no query does that, one that would if the old key were not there. It is made
        longer if a key of length 1 needs that.
        """
        j, t = self._index(index), self.checked_weights(target)
        n, d = self.keys.shape
        check(n > 1, "replace", "needs at least two keys: a single one has all the weight whatever it is")
        rest = np.where(np.arange(n) == j, 0.0, t)
        found, scored = nearest(self._scored, rest / rest.sum()) if rest.any() else self._two_others(j), self._scored
        if found.verdict == "no" and rest.any():
            without = np.delete(scored, j, 0)
            free = nearest(without, np.delete(rest, j) / rest.sum())
            if free.verdict != "no" and free.query(without, self._outside).any():
                found, scored = free, without
        q = found.query(scored, self._outside) if query is None else self._vector(query, d, "query")
        score, fits = self._needed(j, t, q, unit)
        if query is None and not fits and not found.face.all():
            for doublings in range(1, 13):  # a lead that takes a query 4,096 times as long is of no use
                longer = found.base + 2.0**doublings * (q - found.base)
                if (tried := self._needed(j, t, longer, unit))[1]:
                    q, (score, fits) = longer, tried
                    break
        longest = self.scale * float(np.linalg.norm(q))
        key = _unit_key(self.keys[j], q, score / (longest or 1.0)) if unit else _free_key(self.keys[j], q, score / self.scale)
        if unit and d == 1 and fits:  # the only keys are 1 and -1
            key = min((key, -key), key=lambda k: self._divergence(t, self._with(j, k), q))
            fits = False
        keys = self._with(j, key)
        w = softmax(keys @ q * self.scale)
        ours = query is None and found.verdict != "no" and fits
        limit = ours or (t[j] == 1 and not unit and longest > 0)
        reached = "exactly" if np.abs(w - t).max() <= 1e-9 else "in the limit" if limit else "no"
        name = f"replace {index}{' (length 1)' if unit else ''}: {goal or 'weights ' + ' '.join(f'{x:.4g}' for x in t)}"
        return self._answer(name, reached, q, t @ self.values, t, keys=keys, key=key, replaced=index, unit=unit, divergence=self._divergence(t, keys, q))

    def questions(self) -> list[Answer]:
        """What one asks first: each value (8 at most), all, the first two, the first three, and a new third key for the query that averages the first two."""
        n = len(self.keys)
        found = [*(self.select(i + 1) for i in range(min(n, 8))), self.average()]
        found += [self.average(*range(1, m + 1)) for m in (2, 3) if m < n]
        if n >= 3:
            three, third = self.mean_of(1, 2, 3), self.mean_of(3)
            found += [self.replace(3, three, goal="average 1 2 3"), self.replace(3, three, unit=True, goal="average 1 2 3")]
            found += [self.replace(3, third, unit=True, goal="select 3")]
        return found

    def selectable(self) -> list[int]:
        """The numbers of the keys at the corners of the hull."""
        n = len(self.keys)
        return [i + 1 for i in range(n) if nearest(self._scored, np.eye(n)[i]).verdict != "no"]

    def dimension(self) -> int:
        """Of the keys' hull, and so of the weights that queries reach."""
        return dimension(self.keys)

    def mean_of(self, *indices: int) -> Array:
        """[n]: equal weights on these values (none named: on all)."""
        check(len(set(indices)) == len(indices), "average", f"names a value twice: {' '.join(map(str, indices))}")
        t = np.zeros(len(self.keys))
        t[[self._index(i) for i in indices] or slice(None)] = 1.0
        return t / t.sum()

    def checked_weights(self, target: ArrayLike) -> Array:
        t = self._vector(target, len(self.keys), "weights")
        check(bool((t >= 0).all()), "weights", f"must not be negative: weight {int(t.argmin()) + 1} is {t.min():g}")
        check(abs(t.sum() - 1) <= SUM, "weights", f"must add up to 1, not {t.sum():.6g}")
        return t / t.sum()

    def _weights_goal(self, goal: str, t: Array) -> Answer:
        found = nearest(self._scored, t)
        wanted = t @ self.values
        query = found.query(self._scored, self._outside)
        at_least, face, margin = 0.0, tuple(int(i) + 1 for i in np.flatnonzero(found.face)), None
        if not found.face.all():
            margin = 1 / float(np.linalg.norm(found.direction))
        if found.verdict == "no":
            query = best_output(self._scored, self.values, wanted, [query])
            if t.max() == 1:  # the output is w_i v_i and the rest of the weight on other values
                i = int(t.argmax())
                at_least = (1 - float(found.weights[i])) * self._certain(distance_to_hull(np.delete(self.values, i, 0), wanted)[0])
        return self._answer(
            goal, found.verdict, query, wanted, t, at_least=at_least, nearest=found.weights, divergence=found.divergence,
            certificate=found.relation, face=face, margin=margin,
        )  # fmt: skip

    def _answer(self, goal: str, reached: str, query: Array, wanted: Array, t: Array | None, keys: Array | None = None, **more: Any) -> Answer:
        keys = self.keys if keys is None else keys
        w = softmax(keys @ query * self.scale)
        off = w @ self.values - wanted
        error = float(np.linalg.norm(off))
        return Answer(
            goal=goal, reachable=reached, query=query, weights=w, output=w @ self.values, target=wanted, target_weights=t, error=error,
            largest_error=float(np.abs(off).max()), tolerance=self.tolerance, within=error <= self.tolerance, keys=keys, scale=self.scale, **more,
        )  # fmt: skip

    def _certain(self, distance: float) -> float:
        """0 where it may be rounding."""
        return distance if distance > 1e-8 * self._size else 0.0

    def _needed(self, j: int, t: Array, query: Array, unit: bool) -> tuple[float, bool]:
        """The score that key j needs for its weight of the target (a little off 0 and 1), and whether a key can have it."""
        score = float(logit(np.clip(t[j], self._outside, 1 - self._outside))) + log_sum(np.delete(self._scored @ query, j))
        return score, abs(score) <= self.scale * float(np.linalg.norm(query)) if unit else bool(query.any())

    def _two_others(self, j: int) -> Reach:
        others = [i for i in range(len(self.keys)) if i != j]
        pairs = islice(combinations(others, 2), 28) if len(others) > 1 else [others]
        tried = (nearest(self._scored, self.mean_of(*(i + 1 for i in pair))) for pair in pairs)
        first = next(tried)
        return next((found for found in chain([first], tried) if found.verdict != "no"), first)

    def _with(self, j: int, key: Array) -> Array:
        keys = self.keys.copy()
        keys[j] = key
        return keys

    def _divergence(self, t: Array, keys: Array, query: Array) -> float:
        scores, some = keys @ query * self.scale, t > 0
        return float((t[some] * (np.log(t[some]) - (scores - log_sum(scores))[some])).sum())

    def _index(self, index: int) -> int:
        n = len(self.keys)
        check(isinstance(index, (int, np.integer)) and 1 <= index <= n, "index", f"there is no value {index}: values are numbered from 1 to {n}")
        return int(index) - 1

    def _vector(self, numbers: ArrayLike, size: int, name: str) -> Array:
        vector = _numbers(numbers, name)
        check(vector.shape == (size,), name, f"must be {size} numbers, not {vector.size if vector.ndim == 1 else f'an array of shape {vector.shape}'}")
        return vector


def _free_key(old: Array, query: Array, score: float) -> Array:
    """The key nearest the old one with key . query = score."""
    return old + (score - old @ query) / (query @ query) * query if query.any() else old


def _unit_key(old: Array, query: Array, cosine: float) -> Array:
    """The key of length 1 nearest the old one with this cosine to the query (beyond 1: along it)."""
    if not query.any():
        return old / (np.linalg.norm(old) or 1.0) if old.any() else np.eye(len(old))[0]
    along, cosine = query / np.linalg.norm(query), float(np.clip(cosine, -1, 1))
    if len(old) == 1:
        return along if cosine > 0 else -along
    across = old - old @ along * along
    if np.linalg.norm(across) < 1e-9 * max(float(np.linalg.norm(old)), 1.0):
        axis = np.eye(len(old))[np.abs(along).argmin()]
        across = axis - axis @ along * along
    return cosine * along + math.sqrt(1 - cosine**2) * across / np.linalg.norm(across)


def _matrix(rows: ArrayLike, name: str) -> Array:
    matrix = _numbers(rows, name)
    check(matrix.ndim == 2 and matrix.size > 0, name, f"must be a list of rows, [[..], [..]], with at least one number, not of shape {matrix.shape}")
    return matrix


def _numbers(given: ArrayLike, name: str) -> Array:
    if isinstance(given, Sequence) and len({len(row) if isinstance(row, Sequence) else -1 for row in given}) > 1:
        lengths = [str(len(row)) if isinstance(row, Sequence) else "no list" for row in given]
        check(False, name, f"has rows of different lengths ({', '.join(lengths[:8])}{', ..' if len(lengths) > 8 else ''}); give every row as many numbers")
    try:
        array = np.asarray(given, np.float64)
    except (TypeError, ValueError):
        array = np.full(1, np.nan)
    check(bool((np.abs(array) < 1e100).all()), name, "must be numbers only (no NaN, no infinity, no words), below 1e100")
    return array
