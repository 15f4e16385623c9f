"""Which weights softmax(K q) a query can give: decided, with a certificate where it cannot; and the nearest that it can. Pure functions of arrays.

The weights of all queries are an exponential family whose statistic is the key, and everything here follows from that:

- log w is K q plus a constant, so a positive target is reached exactly when its logarithm is such a vector: a linear system.
- A target with zeros is only approached, as the query grows along a direction: exactly when its non-zero entries are those of all the keys on a face of
  the keys' convex hull (one key: a vertex), and within the face the first rule holds.
- Two weightings a, b with the same mean key (K^T a = K^T b) have prod_i w_i^a_i = prod_i w_i^b_i for every query: the certificate of what is impossible.
- The nearest weights, min KL(target || w), are those with the target's mean key. There is one such weighting, it is the one of largest entropy, and it lies
  on the smallest face that holds the target's keys; min KL = H(nearest) - H(target) (Csiszar 1975; Csiszar and Matus 2005 for the limits).

Everything is relative to the spread of the keys: what is nearer than a millionth of it (NEAR) counts as equal.
Not here: goals and their wording (``goals``, ``words``), the values (but for ``best_output``).

    nearest(keys, np.array([0.5, 0.5, 0, 0])).verdict       # "in the limit"
"""

from __future__ import annotations

import math
from contextlib import suppress
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import least_squares, linprog, nnls
from scipy.spatial import ConvexHull, QhullError
from scipy.special import log_softmax, softmax

Array = NDArray[np.float64]
NEAR = 1e-6  # of the keys' spread: a key less far outside the hull of the others needs a query too long for single precision
CLOSE = 1e-9  # of log-weights: rounding
FLAT, FACETS = 4, 512  # dimensions of the keys up to which the hull's facets are few, and how many of them are looked at
MANY, CLIMBS = 32, 48  # keys whose sums are starts of the search for an output, and how many of these are followed
NUMBERS = 1_000_000  # weights that are compared to find starts that are not alike


class Reach(NamedTuple):
    """What queries can do for a target [n]. A query of it: ``base + length * direction``."""

    weights: Array  # [n] the nearest that are reached or approached; 0 off the face
    face: NDArray[np.bool_]  # [n] the keys that keep weight in the limit
    base: Array  # [d] gives the weights within the face
    direction: Array  # [d] scores the whole face alike and every other key at least 1 lower; the shortest such; 0 if the face holds all keys
    relation: Array | None  # [n] c with K^T c = 0, sum c = 0, sum |c| = 2 that the target breaks: sum_i c_i log w_i = 0 for every query
    divergence: float  # KL(target || weights), nats

    @property
    def verdict(self) -> str:
        return "no" if self.relation is not None else "exactly" if self.face.all() else "in the limit"

    def query(self, keys: Array, outside: float) -> Array:
        """[d]: the shortest of its direction that leaves at most this weight outside the face."""
        if self.face.all():
            return self.base
        scores = keys @ self.base
        length = log_sum(scores[~self.face]) - log_sum(scores[self.face]) + math.log((1 - outside) / outside)
        return self.base + max(length, 0.0) * self.direction


def log_sum(scores: Array) -> float:
    """log of the sum of their exponentials"""
    return float(np.logaddexp.reduce(scores))


def nearest(keys: Array, target: Array) -> Reach:
    """keys [n, d] (times the scale of the scores), target [n]: not negative, of sum 1."""
    spread = float(np.abs(keys - keys.mean(0)).max()) or 1.0
    points = (keys - keys.mean(0)) / spread
    face, direction, relation = smallest_face(points, target > 0)
    base = _matching(points[face], target[face])
    logs = np.full(len(keys), -np.inf)
    logs[face] = log_softmax(points[face] @ base)
    if relation is None:
        relation = _broken(points, target, face)
    some = target > 0
    divergence = 0.0 if relation is None else max(float((target[some] * (np.log(target[some]) - logs[some])).sum()), 0.0)
    return Reach(np.exp(logs) if relation is not None else target, face, base / spread, direction / spread, relation, divergence)


def shortest(rows: Array) -> tuple[Array | None, Array]:
    """rows [m, k] -> the shortest x with rows @ x >= 1, and the weights p [m] of the rows' convex combination that is nearest to 0.

    None where that combination is 0 (nearer than NEAR): then p shows that there is no x. Otherwise x is the combination over its squared length, 1 / |x| the
    distance of 0 from the hull. By non-negative least squares (Lawson and Hanson 1974, chapter 23).
    """
    p, _ = nnls(np.vstack([rows.T, np.ones(len(rows))]), np.append(np.zeros(rows.shape[1]), 1.0), maxiter=30 * len(rows) + 100)
    p /= p.sum()
    point = rows.T @ p
    distance = float(np.linalg.norm(point))
    if distance < NEAR:
        return None, p
    lowest = float((rows @ point).min())
    return (point / lowest, p) if lowest > distance**2 / 2 else (None, p)


def smallest_face(points: Array, support: NDArray[np.bool_]) -> tuple[NDArray[np.bool_], Array, Array | None]:
    """points [n, d], support [n] -> the points on the smallest face of their hull that holds the support's, the direction that exposes it, and, where
    the face holds more than the support, a relation (as in Reach) between points beyond the support and those in it.

    A combination of outer points that lies in the plane of the face puts all of them on every face that holds it: they are added, until a direction exists.
    """
    face, relation = support.copy(), None
    while not face.all():
        origin, outer = points[face].mean(0), np.flatnonzero(~face)
        across = _null_space(points[face] - origin)
        direction, p = shortest((origin - points[outer]) @ across)
        if direction is not None:
            return face, across @ direction, relation
        if relation is None:
            mixed = points[outer].T @ p
            relation = np.zeros(len(points))
            relation[outer], relation[support] = p, -_combination(points[support], mixed)
            relation = _scaled(relation)
        flat = np.linalg.norm((points[outer] - origin) @ across, axis=1) < NEAR  # all in the face's plane at once
        face[outer[(p > CLOSE) | flat]] = True
    return face, np.zeros(points.shape[1]), relation


def distance_to_hull(points: Array, point: Array) -> tuple[float, Array]:
    """points [n, v], point [v] -> its distance from their convex hull, and the weights [n] of the nearest point of the hull."""
    scale = float(np.abs(points - point).max()) or 1.0
    p = shortest((points - point) / scale)[1]
    p = np.where(p < CLOSE, 0.0, p)
    p /= p.sum()
    return float(np.linalg.norm(points.T @ p - point)), p


def dimension(keys: Array) -> int:
    """Of the keys' hull: as many as the n - 1 free weights if every weighting can be reached or approached."""
    return keys.shape[1] - _null_space((keys - keys.mean(0)) / (float(np.abs(keys - keys.mean(0)).max()) or 1.0)).shape[1]


def best_output(keys: Array, values: Array, wanted: Array, starts: list[Array]) -> Array:
    """The query [d] whose output softmax(K q) V is nearest to ``wanted`` [v], the best found by least squares: from the starts, and from the most promising of
    0 and the sums and differences of any two keys at several lengths. The error is not convex in q, so this proves nothing."""
    centred = keys - keys.mean(0)
    spread = float(np.abs(centred).max()) or 1.0
    _, sizes, rows = np.linalg.svd(centred / spread, full_matrices=False)
    basis = rows[sizes > NEAR].T / spread  # [d, r]: other directions change no weight
    z = centred @ basis
    if not z.shape[1]:
        return np.zeros(keys.shape[1])
    some = z[np.unique(np.linspace(0, len(z) - 1, MANY).round().astype(int))]
    sums = np.vstack([(some[:, None] + some)[np.triu_indices(len(some))], (some[:, None] - some)[~np.eye(len(some), dtype=bool)]])
    sums /= np.maximum(np.linalg.norm(sums, axis=1, keepdims=True), 1e-12)
    if 2 <= z.shape[1] <= FLAT:  # where the best weights lie on a face of the hull, only a narrow cone of queries comes near them
        with suppress(QhullError):  # keys too nearly flat for it
            normals = np.unique(ConvexHull(z).equations[:, :-1], axis=0)
            sums = np.vstack([sums, normals[:: len(normals) // FACETS + 1]])
    places = np.vstack([np.zeros(z.shape[1]), *(length * sums for length in (1.0, 4.0, 16.0, 64.0, 256.0))])

    def error(y: Array) -> Array:
        return softmax(z @ y) @ values - wanted

    def slope(y: Array) -> Array:
        w = softmax(z @ y)
        return (values - w @ values).T @ (w[:, None] * z)  # [v, r]

    def size(y: Array) -> float:
        return float(np.linalg.norm(error(y)))

    at = softmax(places @ z.T, axis=1)  # [starts, n]
    left, chosen = np.argsort(np.linalg.norm(at @ values - wanted, axis=1), kind="stable")[: NUMBERS // len(keys)], []
    while left.size and len(chosen) < CLIMBS:  # the best that are not alike
        chosen.append(left[0])
        left = left[np.abs(at[left] - at[left[0]]).sum(1) > 0.2]
    given = [np.linalg.lstsq(basis, start)[0] for start in starts]
    tried = [*given, *places[chosen]]
    found = [least_squares(error, place, jac=slope, max_nfev=100).x for place in tried]  # pyright: ignore[reportArgumentType]
    return basis @ min([*tried, *(y for y in found if np.linalg.norm(y) < 0.1 / NEAR)], key=size)  # longer ones live on differences that count as none


def _matching(points: Array, target: Array) -> Array:
    """points [f, d], target [f] -> the query [d] with points^T softmax(points q) = points^T target, by Newton's method with halved steps on the convex
    log sum exp(points q) - target . points q. The target's mean must lie inside the hull of the points, not on its border: then there is one."""
    centred = points - points.mean(0)
    _, sizes, rows = np.linalg.svd(centred, full_matrices=False)
    basis = rows[sizes > NEAR].T
    z = centred @ basis  # [f, r], of full rank
    y = np.zeros(z.shape[1])
    if np.ptp(target) < CLOSE:
        return basis @ y
    if (target > 0).all():
        columns, logs = np.c_[z, np.ones(len(z))], np.log(target)
        solved = np.linalg.lstsq(columns, logs)[0]
        first = solved[:-1]
        if _rounding(columns @ solved - logs, logs):  # the target is reached; Newton's steps would only lose digits of its small weights
            return basis @ first
        y = first if _gap(z, target, first) < _gap(z, target, y) else y
    for _ in range(500):
        w = softmax(z @ y)
        slope = z.T @ (w - target)
        step = np.linalg.lstsq((z.T * w) @ z - np.outer(w @ z, w @ z), slope)[0]
        before, descent = _gap(z, target, y), float(slope @ step)
        size = 1 / max(1.0, float(np.abs(z @ step).max()) / 20)  # where the curvature is lost to rounding a step knows no measure
        while size > 1e-10 and _gap(z, target, y - size * step) > before - 0.25 * size * descent:
            size /= 2
        if descent < 1e-24 or size <= 1e-10:
            break
        y = y - size * step
    return basis @ y


def _gap(z: Array, target: Array, y: Array) -> float:
    return log_sum(z @ y) - float(target @ z @ y)


def _broken(points: Array, target: Array, face: NDArray[np.bool_]) -> Array | None:
    """A relation between few points of the face that a target with just this support breaks; None if it keeps all of them.

    The fewest: a linear programme, least sum |c| with sum_i c_i log target_i = 1, has at most d + 2 non-zero coefficients in a corner.
    """
    logs = np.log(target[face])
    columns = np.c_[points[face], np.ones(face.sum())]  # [f, d + 1]
    left_over = logs - columns @ np.linalg.lstsq(columns, logs)[0]
    if _rounding(left_over, logs):
        return None
    rules = np.c_[columns, logs].T
    solved = linprog(np.ones(2 * len(logs)), A_eq=np.c_[rules, -rules], b_eq=np.append(np.zeros(len(rules) - 1), 1.0), method="highs-ds")
    relation, c = np.zeros(len(points)), left_over
    if solved.status == 0:
        few = np.flatnonzero(np.abs(solved.x[: len(logs)] - solved.x[len(logs) :]) > 1e-7 * np.abs(solved.x).max())
        least = np.linalg.svd(columns[few].T)[2][-1]  # the same to full precision
        if np.abs(columns[few].T @ least).max() < CLOSE and abs(least @ logs[few]) > CLOSE:
            c = np.zeros(len(logs))
            c[few] = least * np.sign(least @ logs[few])
    relation[face] = c
    return _scaled(relation)


def _rounding(left_over: Array, logs: Array) -> bool:
    return bool(np.abs(left_over).max() <= CLOSE * (1 + np.abs(logs).max()))


def _scaled(relation: Array) -> Array:
    """Each side of sum 1, without the traces of rounding."""
    relation = np.where(np.abs(relation) < CLOSE * np.abs(relation).max(), 0.0, relation)
    return relation / relation[relation > 0].sum()


def _combination(points: Array, point: Array) -> Array:
    """Coefficients of sum 1, none negative where that is possible, with which the points [m, d] give this one of their plane."""
    columns, goal = np.vstack([points.T, np.ones(len(points))]), np.append(point, 1.0)
    convex, left_over = nnls(columns, goal, maxiter=30 * len(points) + 100)
    return np.asarray(convex if left_over < NEAR else np.linalg.lstsq(columns, goal)[0], np.float64)


def _null_space(rows: Array) -> Array:
    """[m, d] -> [d, k]: orthonormal directions along which the rows differ from 0 by less than NEAR."""
    _, sizes, basis = np.linalg.svd(rows)
    return basis[int((sizes > NEAR).sum()) :].T
