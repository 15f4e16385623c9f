"""The tables of answers against brute force; S5 is a group; who goes with whom in a split, and how much of each."""

from __future__ import annotations

import itertools
import math
from collections import Counter, defaultdict
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from shoal.config import ModularConfig, fields_per_run
from shoal.config.tasks import OPERATIONS, S5_SIZE
from shoal.tasks.modular import ModularTask, groups
from shoal.tasks.operations import NAMES, answers, permutations
from shoal.tasks.splits import SPLITS, divide, split_counts

settings.register_profile("shoal", deadline=None, derandomize=True, max_examples=60)
settings.load_profile("shoal")


def quotient(x: int, y: int, p: int) -> int | None:
    """By search: the one z with z y = x (mod p) where y is a unit."""
    return next(z for z in range(p) if z * y % p == x) if math.gcd(y, p) == 1 else None


FORMULAS: dict[str, Callable[[int, int, int], int | None]] = {
    "add": lambda x, y, p: (x + y) % p,
    "sub": lambda x, y, p: (x - y) % p,
    "mul": lambda x, y, p: x * y % p,
    "div": quotient,
    "div_odd": lambda x, y, p: quotient(x, y, p) if y % 2 else (x - y) % p,
    "square_add": lambda x, y, p: (x * x + y) % p,
    "cube_add": lambda x, y, p: (x * x * x + y) % p,
    "squares": lambda x, y, p: (x * x + y * y) % p,
    "quadratic": lambda x, y, p: (x * x + x * y + y * y) % p,
    "quadratic_x": lambda x, y, p: (x * x + x * y + y * y + x) % p,
    "cubic": lambda x, y, p: (x * x * x + x * y) % p,
    "cubic_y": lambda x, y, p: (x * x * x + x * y * y + y) % p,
}
RESIDUES = tuple(FORMULAS)
S5 = tuple(name for name in OPERATIONS if name not in FORMULAS)


# --- answers


@pytest.mark.parametrize("p", [2, 3, 9, 12, 31])
def test_residues_equal_brute_force(p: int) -> None:
    for name, row in zip(RESIDUES, answers(RESIDUES, p).tolist(), strict=True):
        expected = [FORMULAS[name](x, y, p) for x in range(p) for y in range(p)]
        assert row == [-1 if z is None else z for z in expected], name


def test_the_largest_modulus_is_exact() -> None:
    p = 2039
    table = answers(("cube_add", "cubic", "cubic_y"), p).view(3, p, p)
    for x, y in [*torch.randint(p, (2000, 2), generator=torch.Generator().manual_seed(0)).tolist(), [p - 1, p - 1]]:
        assert table[:, x, y].tolist() == [FORMULAS[name](x, y, p) for name in ("cube_add", "cubic", "cubic_y")]


def test_permutations_equal_brute_force() -> None:
    elements = list(itertools.permutations(range(5)))
    number = {images: i for i, images in enumerate(elements)}
    assert len(elements) == S5_SIZE and [tuple(images) for images in permutations().tolist()] == elements
    assert elements[0] == (0, 1, 2, 3, 4) and elements[-1] == (4, 3, 2, 1, 0)

    def times(a: tuple[int, ...], b: tuple[int, ...]) -> tuple[int, ...]:
        return tuple(a[b[k]] for k in range(5))

    inverse = {a: tuple(a.index(k) for k in range(5)) for a in elements}
    product, conjugate, sandwich = answers(("s5", "s5_conjugate", "s5_sandwich"), 7).view(3, 120, 120).tolist()
    for (i, a), (j, b) in itertools.product(enumerate(elements), repeat=2):
        ab = times(a, b)
        assert product[i][j] == number[ab]
        assert conjugate[i][j] == number[times(ab, inverse[a])] and sandwich[i][j] == number[times(ab, a)]


def test_s5_is_a_group() -> None:
    product, conjugate, _ = answers(S5, 97).view(3, 120, 120).long()
    every = torch.arange(120)
    assert product[0].equal(every) and product[:, 0].equal(every)  # identity
    for table in (product, product.T):  # closure, and each equation has one solution
        assert table.sort(dim=1).values.equal(every.expand(120, 120))
    inverse = (product == 0).int().argmax(1)
    assert (product[every, inverse] == 0).all() and (product[inverse, every] == 0).all()
    a, b, c = torch.randint(120, (3, 5000), generator=torch.Generator().manual_seed(1))
    assert product[product[a, b], c].equal(product[a, product[b, c]])
    assert not product.equal(product.T) and conjugate[a, product[b, c]].equal(product[conjugate[a, b], conjugate[a, c]])


def test_every_operation_is_there() -> None:
    assert tuple(OPERATIONS) == NAMES and set(NAMES) == {*RESIDUES, *S5} and all(name.startswith("s5") for name in S5)
    assert answers(NAMES[:12], 5).shape == (12, 25) and answers(S5, 5).dtype == torch.int32


# --- what a split keeps together


def statement(name: str, x: int, y: int, z: int) -> Any:
    """What the row says, whichever way round: a sum, a product, or the operation of an unordered pair."""
    said = {"add": ("sum", x, y), "mul": ("product", x, y), "sub": ("sum", y, z), "div": ("product", y, z)}
    kind, a, b = said.get("div" if y % 2 else "sub", said["add"]) if name == "div_odd" else said.get(name, (name, x, y))
    return kind, frozenset((a, b))


def rows_of(names: tuple[str, ...], p: int) -> list[tuple[int, int, int, int]]:
    """(place of the operation, x, y, z) of every row that has an answer, in order of their numbers."""
    table, n = answers(names, p), 120 if names[0] in S5 else p
    return [(o, i // n, i % n, z) for o, line in enumerate(table.tolist()) for i, z in enumerate(line) if z >= 0]


MIXTURES = st.lists(st.sampled_from(RESIDUES), min_size=1, max_size=4, unique=True).map(tuple)
FRACTIONS = st.tuples(st.floats(0.1, 0.7), st.floats(0.05, 0.29), st.one_of(st.none(), st.just(0.0), st.floats(0.01, 0.01)))


def parts_of(rule: str, names: tuple[str, ...], p: int, fractions: tuple[float, float, float | None], seed: int) -> tuple[list[list[Any]], list[int]]:
    """The rows of train, val, test and of none; the counts asked for."""
    config = ModularConfig(
        p=p, operation="+".join(names), train_fraction=fractions[0], val_fraction=fractions[1], test_fraction=fractions[2], split=rule,  # pyright: ignore[reportArgumentType]
    )  # fmt: skip
    rows = rows_of(names, p)
    counts = split_counts(len(rows), *fractions)
    task = ModularTask(config)
    tables = task.setup({name: [getattr(config, name)] for name in fields_per_run(config)} | {"split_seed": [seed]}, "cpu")
    n = config.num_elements
    there = {(o * n + x) * n + y: (o, x, y, z) for o, x, y, z in rows}
    parts = [part.tolist() for part in task._parts(tables, 0)]
    taken = [row for part in parts for row in part]
    assert len(set(taken)) == len(taken) and set(taken) <= set(there), "each row once"
    described = task.describe(tables, 0)
    assert described["rows"] == len(rows) and [described[split] for split in SPLITS] == list(map(len, parts)) and len(described["split hash"]) == 12
    return [*([there[row] for row in part] for part in parts), [there[row] for row in there.keys() - set(taken)]], counts


@given(names=MIXTURES, p=st.integers(3, 14), fractions=FRACTIONS, seed=st.integers(0, 2**31 - 1))
def test_paired_never_tells_a_fact_on_two_sides(names: tuple[str, ...], p: int, fractions: Any, seed: int) -> None:
    parts, counts = parts_of("paired", names, p, fractions, seed)
    told = [{statement(names[o], x, y, z) for o, x, y, z in part} for part in parts]
    assert all(a.isdisjoint(b) for a, b in itertools.combinations(told, 2))
    largest = max(Counter(statement(names[o], x, y, z) for part in parts for o, x, y, z in part).values())
    assert all(abs(len(part) - count) < largest for part, count in zip(parts, counts, strict=False))
    # said without the statements: no mirror of a commutative operation, no x / z beside x / y, no z y = x beside x / y = z
    side = {(names[o], x, y): k for k, part in enumerate(parts) for o, x, y, _ in part}
    for (name, x, y), k in side.items():
        z = FORMULAS[name](x, y, p)
        assert z is not None
        mirror = {"sub": z, "div": z}.get(name, y)
        assert side.get((name, x, mirror) if name in ("sub", "div") else (name, y, x) if name != "div_odd" else (name, x, y), k) == k
        if name in ("sub", "div"):
            inverse = "add" if name == "sub" else "mul"
            assert side.get((inverse, y, z), k) == side.get((inverse, z, y), k) == k


@given(names=MIXTURES, p=st.integers(3, 14), fractions=FRACTIONS, seed=st.integers(0, 2**31 - 1))
def test_stratified_gives_every_answer_its_share(names: tuple[str, ...], p: int, fractions: Any, seed: int) -> None:
    parts, counts = parts_of("stratified", names, p, fractions, seed)
    assert [len(part) for part in parts[:3]] == counts
    total = sum(map(len, parts))
    sizes = Counter((o, z) for part in parts for o, _, _, z in part)
    for last, count in enumerate(itertools.accumulate(counts), 1):
        given_out = Counter((o, z) for part in parts[:last] for o, _, _, z in part)
        assert all(abs(given_out[answer] - size * count / total) < 2 for answer, size in sizes.items())


@given(names=MIXTURES, p=st.integers(3, 14), fractions=FRACTIONS, seed=st.integers(0, 2**31 - 1))
def test_rows_keeps_a_left_operand_in_one_part(names: tuple[str, ...], p: int, fractions: Any, seed: int) -> None:
    parts, counts = parts_of("rows", names, p, fractions, seed)
    operands = [{x for _, x, _, _ in part} for part in parts]
    assert all(a.isdisjoint(b) for a, b in itertools.combinations(operands, 2))
    largest = max(Counter(x for part in parts for _, x, _, _ in part).values())
    assert all(abs(len(part) - count) < largest for part, count in zip(parts, counts, strict=False))


@pytest.mark.parametrize("rule", ["paired", "stratified", "rows"])
@pytest.mark.parametrize("operation", ["s5", "s5_conjugate", "s5+s5_sandwich"])
def test_splits_of_permutations(rule: str, operation: str) -> None:
    names = tuple(operation.split("+"))
    parts, counts = parts_of(rule, names, 97, (0.4, 0.3, None), 3)
    if rule == "paired":
        pairs = [{(o, frozenset((x, y))) for o, x, y, _ in part} for part in parts]
        assert all(a.isdisjoint(b) for a, b in itertools.combinations(pairs, 2))
    elif rule == "stratified":
        sizes, shares = (Counter((o, z) for part in some for o, _, _, z in part) for some in (parts, parts[:1]))
        assert all(abs(shares[answer] - 0.4 * size) < 2 for answer, size in sizes.items())
    assert all(abs(len(part) - count) < (120 * len(names) if rule == "rows" else 2) for part, count in zip(parts, counts, strict=False))


@pytest.mark.parametrize("rule", ["random", "paired", "stratified", "rows"])
def test_splits_follow_the_seed(rule: str) -> None:
    """The same for a seed, another for others, and nobody is favoured: over seeds every row is as often in train."""
    names = ("div", "mul")
    table = answers(names, 7)
    rows = (table.flatten() >= 0).nonzero()[:, 0]
    group = groups(rule, names, table)[rows].unique(return_inverse=True)[1]
    counts = split_counts(len(rows), 0.45, 0.2, None)
    often: dict[int, int] = defaultdict(int)
    for seed in range(300):
        parts, again = (divide(rule, seed, group, counts) for _ in range(2))
        assert all(a.equal(b) for a, b in zip(parts, again, strict=True)) and int(torch.cat(parts).sort().values.diff().min()) == 1
        for row in parts[0].tolist():
            often[row] += 1
    expected = sum(often.values()) / len(rows)  # some 140 of 300, standard deviation below 9
    assert len(often) == len(rows) and all(abs(count - expected) < 40 for count in often.values())
