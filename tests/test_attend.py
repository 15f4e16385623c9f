"""Attention by hand: verdicts against linear programmes and qhull, certificates in exact arithmetic, nearest weights against optimisers, the command."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from fractions import Fraction
from itertools import combinations, product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy.optimize import linprog, minimize
from scipy.spatial import ConvexHull
from scipy.special import entr, log_softmax, softmax

from shoal import cli
from shoal.attend import Answer, ByHand
from shoal.attend.heat_map import draw
from shoal.attend.reach import best_output, distance_to_hull, nearest, shortest, smallest_face
from shoal.attend.read import EXAMPLE
from shoal.attend.words import relation, table
from shoal.config.fields import ConfigError

GENERATOR = np.random.default_rng()
Array = NDArray[np.float64]


def some_keys(whole: bool) -> Array:
    """Few keys of small width: whole numbers (duplicates, keys on lines and in planes), or normal."""
    n, d = GENERATOR.integers(1, 8), GENERATOR.integers(1, 4)
    return GENERATOR.integers(-2, 3, (n, d)).astype(float) if whole else GENERATOR.normal(size=(n, d))


def some_support(n: int) -> NDArray[np.bool_]:
    support = GENERATOR.random(n) < 0.4
    support[GENERATOR.integers(n)] = True
    return support


def spread_over(support: NDArray[np.bool_]) -> Array:
    t = np.where(support, GENERATOR.dirichlet(np.ones(len(support))) + 0.01, 0.0)
    return t / t.sum()


def kl(t: Array, keys: Array, query: Array) -> float:
    some = t > 0
    return float((t[some] * (np.log(t[some]) - log_softmax(keys @ query)[some])).sum())


def lines(keys: Array, t: Array, found: Any) -> None:
    """Whatever the verdict: the query goes where it says, and nothing that is cheap to look at contradicts it."""
    query = found.query(keys, 1e-9)
    np.testing.assert_allclose(softmax(keys @ query), found.weights, atol=1e-6)
    np.testing.assert_allclose(keys.T @ found.weights, keys.T @ t, atol=1e-6)  # the mean key of the nearest weights is the target's
    assert (found.weights[~found.face] == 0).all()
    if found.verdict != "no":
        np.testing.assert_allclose(found.weights, t, atol=1e-9)


# --- which weights ---


@pytest.mark.parametrize("whole", [True, False])
def test_smallest_face_is_that_of_a_linear_programme(whole: bool) -> None:
    """A key is on it exactly if some convex combination with the support's mean gives it weight."""
    for _ in range(40):
        keys = some_keys(whole)
        support = some_support(len(keys))
        face, direction, relation = smallest_face(keys, support)
        rules, mean = np.vstack([keys.T, np.ones(len(keys))]), np.append(keys[support].mean(0), 1.0)
        most = [-linprog(-np.eye(len(keys))[j], A_eq=rules, b_eq=mean).fun for j in range(len(keys))]
        assert (np.array(most) > 1e-6).tolist() == face.tolist()
        assert (relation is not None) == bool((face & ~support).any())
        scores = keys @ direction
        assert np.ptp(scores[face]) < 1e-6 * max(1, np.abs(scores).max())
        assert face.all() or scores[face].mean() - scores[~face].max() >= 1 - 1e-6


@pytest.mark.parametrize(("n", "d"), [(6, 2), (20, 2), (12, 3), (30, 4)])
def test_values_that_can_be_selected_are_the_corners_that_qhull_finds(n: int, d: int) -> None:
    keys = GENERATOR.normal(size=(n, d))
    assert ByHand(keys, keys).selectable() == sorted(int(i) + 1 for i in ConvexHull(keys).vertices)


def test_pairs_that_can_be_averaged_are_the_edges_that_qhull_finds() -> None:
    keys = GENERATOR.normal(size=(9, 2))
    edges = {tuple(sorted(map(int, pair))) for pair in ConvexHull(keys).simplices}
    hand = ByHand(keys, keys)
    assert {pair for pair in combinations(range(9), 2) if nearest(keys, hand.mean_of(pair[0] + 1, pair[1] + 1)).verdict != "no"} == edges


@pytest.mark.parametrize("whole", [True, False])
def test_weights_of_a_query_are_reached_exactly(whole: bool) -> None:
    for _ in range(40):
        keys = some_keys(whole)
        t = softmax(keys @ GENERATOR.normal(size=keys.shape[1], scale=2))
        found = nearest(keys, t)
        assert found.verdict == "exactly" and found.divergence == 0
        np.testing.assert_allclose(softmax(keys @ found.query(keys, 1e-3)), t, rtol=1e-7)  # small ones too
        lines(keys, t, found)


def test_limits_of_queries_are_reached_in_the_limit() -> None:
    """A random direction's best keys (whole numbers: often several), weighted by another query."""
    for _ in range(40):
        keys = some_keys(whole=True)
        along = GENERATOR.integers(-1, 2, keys.shape[1]).astype(float)
        face = keys @ along > (keys @ along).max() - 0.5
        t = np.zeros(len(keys))
        t[face] = softmax(keys[face] @ GENERATOR.normal(size=keys.shape[1]))
        found = nearest(keys, t)
        assert found.verdict == ("exactly" if face.all() else "in the limit")
        for outside in (1e-2, 1e-6):
            assert softmax(keys @ found.query(keys, outside))[~face].sum() <= outside * (1 + 1e-6)
        lines(keys, t, found)


def test_weights_nobody_chose_are_out_of_reach_of_few_dimensions() -> None:
    for _ in range(20):
        n, d = 6, int(GENERATOR.integers(1, 4))
        keys, t = GENERATOR.normal(size=(n, d)), GENERATOR.dirichlet(np.ones(n))
        assert nearest(keys, t).verdict == "no"
        wide = GENERATOR.normal(size=(n, 5 + d))
        assert nearest(wide, t).verdict == "exactly"
        assert all(nearest(wide, ByHand(wide, wide).mean_of(*pair)).verdict == "in the limit" for pair in combinations(range(1, n + 1), 2))


@pytest.mark.parametrize("whole", [True, False])
def test_certificates(whole: bool) -> None:
    """Both sides have the same mean key (of whole keys in exact arithmetic), every query keeps the relation, and the target breaks it."""
    seen = 0
    for _ in range(80):
        keys = some_keys(whole)
        n, d = keys.shape
        t = spread_over(some_support(n) if GENERATOR.random() < 0.6 else np.ones(n, bool))
        found = nearest(keys, t)
        c = found.relation
        lines(keys, t, found)
        if c is None:
            continue
        seen += 1
        assert abs(np.abs(c).sum() - 2) < 1e-9 and abs(c.sum()) < 1e-9
        if whole:
            exact = [Fraction(float(x)).limit_denominator(10**5) for x in c]
            assert sum(exact) == 0 and max(abs(float(a) - b) for a, b in zip(exact, c, strict=True)) < 1e-9
            assert all(sum(a * int(k) for a, k in zip(exact, column, strict=True)) == 0 for column in keys.T)
        assert (np.abs(c) > 1e-12).sum() <= (d + 2 if (t > 0).all() else n)
        for _ in range(5):
            assert abs(c @ log_softmax(keys @ GENERATOR.normal(size=d, scale=3))) < 1e-9
        if (c[t == 0] != 0).any():  # one side of the target's product is 0, the other is not
            assert (c[t == 0] >= 0).all() and c[t == 0].max() > 0
        else:
            assert abs(c[t > 0] @ np.log(t[t > 0])) > 1e-9
    assert seen > 10


def test_nearest_weights_have_the_least_divergence_that_a_general_optimiser_finds() -> None:
    for _ in range(12):
        keys = some_keys(whole=bool(GENERATOR.integers(2)))
        n, d = keys.shape
        t = spread_over(some_support(n) if GENERATOR.random() < 0.5 else np.ones(n, bool))
        found = nearest(keys, t)
        tried = [minimize(lambda q, t=t, keys=keys: kl(t, keys, q), GENERATOR.normal(size=d, scale=s), method="BFGS").fun for s in (0, 1, 3)]
        assert found.divergence <= min(tried) + 1e-7
        assert kl(t, keys, found.query(keys, 1e-9)) == pytest.approx(found.divergence, abs=1e-5)
        assert min(tried) == pytest.approx(found.divergence, abs=5e-3)  # a limit is approached slowly
        entropy = float(entr(found.weights).sum() - entr(t).sum())
        assert found.divergence == pytest.approx(entropy, abs=1e-7)


def test_far_targets_are_found_by_the_same_method() -> None:
    """Weights from 1 to 1e-12, keys of very different sizes: still matched."""
    keys = GENERATOR.normal(size=(7, 3)) * np.array([100.0, 1.0, 0.01]) + 5
    t = 10.0 ** -np.arange(0.0, 14.0, 2.0)
    found = nearest(keys, t / t.sum())
    size = np.ptp(keys, axis=0)
    np.testing.assert_allclose(keys.T @ found.weights / size, keys.T @ t / t.sum() / size, atol=1e-9)


@pytest.mark.parametrize("share", [0.5, 0.2, 0.01])
def test_the_most_weight_between_two_keys(share: float) -> None:
    """k2 = (1 - a) k1 + a k3: w2 = w1^(1-a) w3^a is largest, 1 / (1 + exp H(a)), where w1 : w3 = 1 - a : a."""
    keys = np.array([[0.0, 0.0], [share, 2 * share], [1.0, 2.0]])
    entropy = -share * math.log(share) - (1 - share) * math.log(1 - share)
    answer = ByHand(keys, np.eye(3)).select(2)
    assert answer.reachable == "no" and answer.nearest is not None and answer.certificate is not None
    assert answer.nearest[1] == pytest.approx(1 / (1 + math.exp(entropy)), abs=1e-9)
    np.testing.assert_allclose(answer.certificate, [1 - share, -1, share], atol=1e-9)
    assert answer.at_least == pytest.approx((1 - answer.nearest[1]) * math.sqrt(1.5), abs=1e-9)  # from e_2 to the hull of e_1 and e_3


def test_shortest_is_the_distance_to_the_hull() -> None:
    for _ in range(10):
        rows = GENERATOR.normal(size=(5, 3)) + 1
        found = minimize(
            lambda p, rows=rows: ((rows.T @ p) ** 2).sum(), np.full(5, 0.2), bounds=[(0, 1)] * 5, constraints={"type": "eq", "fun": lambda p: p.sum() - 1}
        )
        x, p = shortest(rows)
        if x is None:
            assert found.fun < 1e-5 and np.abs(rows.T @ p).max() < 1e-6
        else:
            assert (rows @ x).min() == pytest.approx(1) and 1 / np.linalg.norm(x) == pytest.approx(math.sqrt(found.fun), abs=1e-4)
        assert distance_to_hull(rows, np.zeros(3))[0] == pytest.approx(math.sqrt(max(found.fun, 0)), abs=2e-3)


# --- outputs ---


def test_no_query_of_a_fine_grid_is_nearer_than_the_best_found() -> None:
    angles, lengths = np.linspace(0, 2 * np.pi, 181), np.append(0, np.geomspace(0.05, 60, 60))
    grid = np.array([[r * math.cos(a), r * math.sin(a)] for a, r in product(angles, lengths)])
    for _ in range(2):
        keys, values = GENERATOR.normal(size=(6, 2)), GENERATOR.normal(size=(6, 3))
        wanted = values[:2].mean(0)
        errors = np.linalg.norm(softmax(grid @ keys.T, axis=1) @ values - wanted, axis=1)
        found = best_output(keys, values, wanted, [])
        assert np.linalg.norm(softmax(keys @ found) @ values - wanted) <= errors.min() + 1e-3
        hand = ByHand(keys, values)
        for answer in (hand.reach(wanted), hand.average(1, 2), hand.select(1), hand.reach(wanted + 9)):
            off = np.linalg.norm(softmax(grid @ keys.T, axis=1) @ values - answer.target, axis=1)
            assert answer.at_least <= off.min() + 1e-9, "what is proven holds"
            if answer.nearest is not None and answer.goal == "select 1":
                assert softmax(grid @ keys.T, axis=1)[:, 0].max() <= answer.nearest[0] + 1e-9


def test_an_output_on_an_edge_of_the_hull_is_found_without_a_hint() -> None:
    angles = np.arange(6) * np.pi / 3 + GENERATOR.uniform(-0.4, 0.4, size=6)
    keys, values = np.stack([np.cos(angles), np.sin(angles)], axis=1), GENERATOR.normal(size=(6, 5))
    for i in range(6):
        wanted = values[[i, (i + 1) % 6]].mean(0)
        assert np.linalg.norm(softmax(keys @ best_output(keys, values, wanted, [])) @ values - wanted) < 1e-4


def test_outputs() -> None:
    keys, values = np.eye(3), GENERATOR.normal(size=(3, 4))
    hand = ByHand(keys, values)
    inside = hand.reach(np.array([0.2, 0.3, 0.5]) @ values)
    assert inside.reachable == "exactly" and inside.error < 1e-8
    np.testing.assert_allclose(inside.weights, [0.2, 0.3, 0.5], atol=1e-6)
    border = hand.reach(values[:2].mean(0))
    assert border.reachable == "in the limit" and border.within
    beyond = hand.reach(values[0] + 10)
    distance = min(np.linalg.norm(p @ values - values[0] - 10) for p in GENERATOR.dirichlet(np.full(3, 0.3), 20000))
    assert beyond.reachable == "no" and beyond.at_least == pytest.approx(distance, rel=1e-2) and beyond.at_least <= beyond.error + 1e-9
    unsure = ByHand([[0.0], [1.0], [2.0]], [[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]]).reach([0.5, 0.5])
    assert unsure.reachable == "not found" and "proves nothing" in unsure.explanation


# --- goals ---


def test_every_question_of_the_example() -> None:
    hand = ByHand(*EXAMPLE)
    answers = hand.questions()
    assert [answer.goal for answer in answers] == [
        *(f"select {i}" for i in range(1, 5)), "average all", "average 1 2", "average 1 2 3",
        "replace 3: average 1 2 3", "replace 3 (length 1): average 1 2 3", "replace 3 (length 1): select 3",
    ]  # fmt: skip
    for answer in answers:
        assert answer.within and answer.reachable != "no", answer.goal
        keys = np.array(EXAMPLE[0]) if answer.key is None else answer.keys
        weights = np.exp(keys @ answer.query)
        np.testing.assert_allclose(answer.output, weights @ np.array(EXAMPLE[1]) / weights.sum(), atol=1e-12)
        assert np.linalg.norm(answer.output - answer.target) == pytest.approx(answer.error, abs=1e-12) and answer.error < 0.05
    query = np.stack([answer.query for answer in hand.identity()])
    assert np.linalg.norm(softmax(query @ np.array(EXAMPLE[0]).T, axis=1) @ np.array(EXAMPLE[1]) - np.array(EXAMPLE[1]), axis=1).max() < 0.05
    assert hand.dimension() == 3 and hand.selectable() == [1, 2, 3, 4]


def test_small_and_degenerate_keys() -> None:
    one = ByHand([[2.0]], [[3.0, 4.0]])
    assert one.select(1).reachable == "exactly" and one.average().error == 0 and one.dimension() == 0 and len(one.questions()) == 2
    same = ByHand(np.ones((3, 2)), np.eye(3))
    assert same.average().reachable == "exactly" and same.average(1, 2).reachable == "no" and same.selectable() == []
    np.testing.assert_allclose(same.select(1).weights, np.full(3, 1 / 3))
    twice = ByHand([[0.0], [1.0], [1.0]], [[1.0], [2.0], [3.0]])
    assert twice.average(2, 3).reachable == "in the limit" and twice.select(1).within
    assert twice.select(3).explanation.startswith("Keys 3 and 2 are equal, so every query gives both the same weight. No query gives v3 more than 50 %")
    assert twice.select(3).at_least == pytest.approx(0.5)
    alike = ByHand([[0.0], [1.0], [1.0]], [[1.0], [2.0], [2.0]]).select(3)
    assert alike.reachable == "no" and alike.within, "the certificate is about weights, the tolerance about outputs"
    flat = ByHand(GENERATOR.normal(size=(4, 9)), GENERATOR.normal(size=(4, 2)))
    assert flat.dimension() == 3 and all(answer.reachable != "no" for answer in flat.questions()[:8])
    line = ByHand([[0.0], [1.0], [2.0], [3.0]], np.eye(4))
    assert line.selectable() == [1, 4] and line.average(1, 4).reachable == "no"
    assert line.weigh(np.array([8, 4, 2, 1]) / 15).reachable == "exactly" and line.weigh([0.4, 0.3, 0.2, 0.1]).reachable == "no"


def test_scaled_scores() -> None:
    keys, values = GENERATOR.normal(size=(4, 9)) / 5, GENERATOR.normal(size=(4, 3))
    scaled, plain = ByHand(keys, values, scaled=True), ByHand(keys / 3, values)
    for one, other in zip(scaled.questions()[:7], plain.questions()[:7], strict=True):
        np.testing.assert_allclose(one.weights, other.weights)
        np.testing.assert_allclose(one.query, other.query, atol=1e-9)
    apart = [distance_to_hull(np.delete(keys, i, 0), keys[i])[0] for i in range(4)]
    assert [answer.margin for answer in scaled.identity()] == pytest.approx(np.array(apart) / 3)
    assert f"{apart[0]:.3g} from the hull of the others" in scaled.select(1).explanation
    new = scaled.replace(3, [0.25, 0.25, 0.5, 0], unit=True)
    np.testing.assert_allclose(softmax(new.keys @ new.query / 3), new.weights)
    assert new.key is not None and np.linalg.norm(new.key) == pytest.approx(1) and new.within


def test_new_keys() -> None:
    keys, values, query = GENERATOR.normal(size=(5, 3)), GENERATOR.normal(size=(5, 4)), GENERATOR.normal(size=3) * 9
    hand = ByHand(keys, values)
    others = softmax(np.delete(keys, 1, 0) @ query)
    for share in (0.01, 0.5, 0.9):
        t = np.insert((1 - share) * others, 1, share)
        answer = hand.replace(2, t, query)
        assert answer.reachable == "exactly" and answer.key is not None
        np.testing.assert_allclose(answer.weights, t, atol=1e-9)
        moved = answer.key - keys[1]
        assert abs(moved @ query) == pytest.approx(np.linalg.norm(moved) * np.linalg.norm(query)), "the nearest such key: it moves along the query"
        np.testing.assert_allclose(np.delete(answer.keys, 1, 0), np.delete(keys, 1, 0))
        unit = hand.replace(2, t, query, unit=True)
        assert unit.key is not None and np.linalg.norm(unit.key) == pytest.approx(1)
        longest = np.log(share / (1 - share)) + np.log(np.exp(np.delete(keys, 1, 0) @ query).sum())
        assert (unit.reachable == "exactly") == (abs(longest) <= np.linalg.norm(query))
    alone = hand.replace(2, np.eye(5)[1], query)
    assert alone.reachable == "in the limit" and alone.within
    short = hand.replace(2, np.eye(5)[1], query / 1000, unit=True)
    assert short.reachable == "no" and short.weights[1] == pytest.approx(0.2, abs=0.05)
    other = hand.replace(2, np.full(5, 0.2), query)
    assert other.reachable == "no" and "keep their ratios" in other.explanation
    still = hand.replace(2, np.eye(5)[1], np.zeros(3))
    assert still.reachable == "no" and still.explanation.startswith("A query of zeros")
    assert hand.replace(2, np.full(5, 0.2), np.zeros(3)).reachable == "exactly"


def test_new_keys_for_the_query_of_another_goal() -> None:
    square = ByHand([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0], [0.0, -1.0]], np.eye(4))
    answer = square.replace(3, square.mean_of(1, 2, 3))
    np.testing.assert_allclose(softmax(square.keys @ answer.query)[:2], 0.5, atol=1e-2)  # it averages the first two with the old key
    assert answer.reachable == "in the limit" and answer.within
    inside = ByHand([[1.0, 0.0], [-1.0, 0.0], [0.0, 0.5], [0.0, -1.0]], np.eye(4))  # the third key is in the way of the first two
    found = ByHand([[1.0, 0.0], [-1.0, 0.0], [0.0, 0.5], [0.0, -1.0]], np.eye(4)).replace(3, inside.mean_of(1, 2, 3))
    assert inside.average(1, 2).reachable == "no" and found.reachable == "in the limit" and found.within
    unit = square.replace(3, square.mean_of(3), unit=True)
    assert unit.reachable == "in the limit" and unit.within and unit.key is not None and np.linalg.norm(unit.key) == pytest.approx(1)
    assert (unit.key > 0).all(), "between the two that the query averages"
    line = ByHand([[0.0], [2.0], [1.0]], np.eye(3))
    far = ByHand(square.keys * 5, np.eye(4)).replace(3, square.mean_of(3), unit=True)
    assert far.reachable == "no" and "the others have up to" in far.explanation and np.linalg.norm(far.query) < 20, "longer does not help, and is not tried"
    short = line.replace(3, [0, 0.5, 0.5], unit=True).key
    assert short is not None and abs(float(short[0])) == 1 and line.replace(3, [0, 0.5, 0.5]).within


# --- words and pictures ---


def product_of(text: str, weights: Array) -> float:
    total = 1.0
    for factor in text.split():
        name, _, power = factor.partition("^")
        total *= weights[int(name[1:]) - 1] ** float(power or 1)
    return total


def test_explanations_say_what_is_true() -> None:
    keys = np.array([[1.0, 0.0], [0.0, 1.0], [0.5, 0.5]])
    answer = ByHand(keys, [[1.0, 0.0], [0.0, 1.0], [3.0, 3.0]]).select(3)
    assert "k3 = 0.5 k1 + 0.5 k2, so for every query w3 = w1^0.5 w2^0.5. The wanted weights would make that 1 = 0." in answer.explanation
    assert "more than 33.3 % of the weight" in answer.explanation and "is certain" in answer.explanation
    random = ByHand(GENERATOR.normal(size=(6, 2)), GENERATOR.normal(size=(6, 2))).weigh(GENERATOR.dirichlet(np.full(6, 3.0)))
    assert random.certificate is not None
    left, right = relation(random.certificate).split(" = ")
    w = softmax(random.keys @ GENERATOR.normal(size=2))
    assert product_of(left, w) == pytest.approx(product_of(right, w), rel=0.02)
    for answer in [*ByHand(*EXAMPLE).questions(), random, ByHand(keys, keys).average(1, 2), ByHand(keys, keys).reach([0, 0])]:
        assert answer.explanation.endswith(".") and "  " not in answer.explanation and "In a language model" in answer.explanation, answer.goal


def test_table_and_picture() -> None:
    answers = ByHand(*EXAMPLE).questions()
    rows = table(answers).splitlines()
    assert len(rows) == 11 and rows[6].startswith("average 1 2 ") and "[0.500, 0.500, 0.001, 0.000]" in rows[6]
    (axes,) = draw(answers).axes
    texts = [text.get_text() for text in axes.texts]
    assert texts.count("0.33") == 9 and sum(text.startswith("error ") for text in texts) == 10
    many = ByHand(GENERATOR.normal(size=(40, 3)), GENERATOR.normal(size=(40, 2)))
    assert len(draw([many.average(), many.average(*range(1, 40))]).axes[0].texts) == 2


# --- the command ---


def run(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str, str]:
    code = cli.main(["attend", *words])
    printed = capsys.readouterr()
    return code, printed.out, printed.err


def answers_of(capsys: pytest.CaptureFixture[str], *words: str) -> list[dict[str, Any]]:
    code, out, err = run(capsys, *words, "--json")
    assert (code, err) == (0, "")
    return json.loads(out)


def test_command(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    code, out, err = run(capsys)
    assert (code, err) == (0, "") and len(out.splitlines()) == 15 and "every value can be selected" in out
    picture = tmp_path / "weights.png"
    code, out, _ = run(capsys, "average", "1", "2", "--figure", str(picture))
    assert code == 0 and "in the limit" in out and picture.read_bytes().startswith(b"\x89PNG")
    before = picture.read_bytes()
    assert run(capsys, "--figure", str(picture))[0] == 2 and picture.read_bytes() == before
    [found] = answers_of(capsys, "output", "-.1", "-0.5", "0.2")
    assert found["reachable"] == "no" and found["target"] == [-0.1, -0.5, 0.2] and found["at_least"] > 0.1
    for words in (["weights", ".1", ".2", ".3", ".4"], ["weights", "[.1, .2, .3, .4]"], ["weights", ".1,.2,.3,.4"]):
        assert answers_of(capsys, *words)[0]["weights"] == pytest.approx([0.1, 0.2, 0.3, 0.4])
    [same] = answers_of(capsys, "replace", "3", "weights", ".3", ".3", ".4", "0", "--query", "[3.5318, 4.6576, -0.082546]", "--unit")
    assert same["query"] == [3.5318, 4.6576, -0.082546] and same["within"] and same["unit"] and same["replaced"] == 3
    assert [answer["goal"] for answer in answers_of(capsys, "identity")] == [f"select {i}" for i in range(1, 5)]


def test_command_reads_files(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    keys, values = GENERATOR.normal(size=(4, 2)).round(3), GENERATOR.normal(size=(4, 3)).round(3)
    typed = answers_of(capsys, "--keys", str(keys.tolist()), "--values", str(values.tolist()))
    for suffix in ("json", "csv", "tsv", "npy"):
        for name, rows in (("keys", keys), ("values", values)):
            path = tmp_path / f"{name}.{suffix}"
            if suffix == "npy":
                np.save(path, rows)
            elif suffix == "json":
                path.write_text(json.dumps(rows.tolist()))
            else:
                path.write_text("\n".join(("," if suffix == "csv" else "\t").join(map(str, row)) for row in rows) + "\n\n")
        assert answers_of(capsys, "--keys", str(tmp_path / f"keys.{suffix}"), "--values", str(tmp_path / f"values.{suffix}")) == typed


def test_command_draws_keys(capsys: pytest.CaptureFixture[str]) -> None:
    first, again, other = (answers_of(capsys, "--random", "5,2,3", "--seed", seed, "select", "1")[0] for seed in ("7", "7", "8"))
    assert first == again != other
    keys = np.array(first["keys"])
    assert keys.shape == (5, 2) and len(first["output"]) == 3 and -1 <= keys.min() < keys.max() < 1


BAD = {
    "fewer values than keys": (["--keys", "[[1],[2]]", "--values", "[[1]]"], "values: has 1 rows and keys has 2"),
    "keys alone": (["--keys", "[[1],[2]]"], "--values: keys and values come together"),
    "both": (["--keys", "[[1]]", "--values", "[[1]]", "--random", "2,2,2"], "--random: draws keys and values"),
    "ragged": (["--keys", "[[1,2],[3]]", "--values", "[[1],[2]]"], "keys: has rows of different lengths (2, 1)"),
    "flat": (["--keys", "[1,2]", "--values", "[1,2]"], "keys: must be a list of rows"),
    "empty": (["--keys", "[]", "--values", "[]"], "keys: must be a list of rows"),
    "hollow": (["--keys", "[[],[]]", "--values", "[[1],[2]]"], "keys: must be a list of rows"),
    "words": (["--keys", "[['a']]", "--values", "[[1]]"], "keys: must be numbers only"),
    "not a number": (["--keys", "nan.csv", "--values", "[[1],[2]]"], "keys: must be numbers only (no NaN"),
    "typed NaN": (["--keys", "[[NaN]]", "--values", "[[1]]"], "keys: must be numbers only (no NaN"),
    "too large": (["--keys", "[[1e200]]", "--values", "[[1]]"], "below 1e100"),
    "open bracket": (["--keys", "[[1", "--values", "[[1]]"], "--keys: [[1 is not a list of rows"),
    "no file": (["--keys", "there.json", "--values", "[[1]]"], "--keys: there is no file there.json"),
    "unknown form": (["--keys", "thesis.tex", "--values", "[[1]]"], "--keys: 'thesis.tex' is neither a list"),
    "broken json": (["--keys", "broken.json", "--values", "[[1]]"], "--keys: broken.json cannot be read"),
    "header": (["--keys", "header.csv", "--values", "[[1]]"], "--keys: header.csv, line 1: x,y are not numbers"),
    "pickle": (["--keys", "objects.npy", "--values", "[[1]]"], "--keys: objects.npy cannot be read"),
    "unknown goal": (["choose", "1"], "goal: 'choose 1' is none of: select I"),
    "zero": (["select", "0"], "index: there is no value 0: values are numbered from 1 to 4"),
    "out of range": (["average", "1", "5"], "index: there is no value 5"),
    "twice": (["average", "1", "1"], "average: names a value twice: 1 1"),
    "half a value": (["select", "1.5"], "values have whole numbers"),
    "which": (["select"], "select I takes one number, not 0"),
    "no numbers": (["weights", "a", "b"], "goal: a b are not numbers"),
    "negative": (["weights", "1.5", "-.5", "0", "0"], "weights: must not be negative: weight 2 is -0.5"),
    "sum": (["weights", ".5", ".4", "0", "0"], "weights: must add up to 1, not 0.9"),
    "too few": (["weights", ".5", ".5"], "weights: must be 4 numbers, not 2"),
    "infinite weight": (["weights", "inf", "0", "0", "0"], "weights: must be numbers only"),
    "output too short": (["output", "1"], "output: must be 3 numbers, not 1"),
    "identity of what": (["identity", "3"], "identity takes no numbers"),
    "replace what": (["replace", "3"], "replace I takes one of"),
    "replace which": (["replace"], "replace I GOAL takes one number"),
    "query of another width": (["replace", "3", "average", "1", "3", "--query", "[1,2]"], "query: must be 3 numbers, not 2"),
    "query for nothing": (["select", "1", "--query", "[1,2,3]"], "--query: is for a new key"),
    "unit for nothing": (["select", "1", "--unit"], "--unit: is for a new key"),
    "random": (["--random", "3,3"], "--random: is N,D,V"),
    "random of nothing": (["--random", "0,3,3"], "each is at least 1"),
    "too many": (["--random", "5000,3,3"], "at most 512"),
    "seed": (["--random", "3,3,3", "--seed", "-1"], "--seed: is a whole number"),
    "seed of nothing": (["--seed", "1"], "--seed: is for --random"),
    "tolerance": (["--tolerance", "0"], "tolerance: must be a number above 0"),
    "tolerance nan": (["--tolerance", "nan"], "tolerance: must be a number above 0"),
    "picture": (["--figure", "a.jpg"], "--figure: a.jpg: its name must end in .png"),
    "picture nowhere": (["--figure", "none/a.png"], "--figure: there is no directory none"),
    "option": (["--keyz", "[[1]]"], "--keyz: unknown option"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(case: str, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    files = {"nan.csv": "nan\n1\n", "broken.json": "[[1", "header.csv": "x,y\n1,2\n", "thesis.tex": "mine"}
    for name, text in files.items():
        Path(name).write_text(text)
    np.save("objects.npy", np.array([{}], dtype=object), allow_pickle=True)
    words, message = BAD[case]
    code, out, err = run(capsys, *words)
    assert code == 2 and out == "" and err.count("\n") == 1 and message in err, err
    assert {path.name for path in tmp_path.iterdir()} == {*files, "objects.npy"}


def test_bad_input_from_python() -> None:
    with pytest.raises(ConfigError, match="values: has 1 rows and keys has 2"):
        ByHand(np.ones((2, 2)), np.ones((1, 2)))
    with pytest.raises(ConfigError, match="keys: must be numbers only"):
        ByHand([[math.nan]], [[1.0]])
    with pytest.raises(ConfigError, match="needs at least two keys"):
        ByHand([[1.0]], [[1.0]]).replace(1, [1.0])
    assert isinstance(ByHand([[1.0]], [[1.0]]).select(1), Answer)


def test_the_first_picture_needs_no_torch() -> None:
    code = "import sys; from shoal import cli; assert cli.main(['attend']) == 0; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.endswith("False\n")
