"""Which rows of a table are trained on, which are held out: the same for a seed wherever it is drawn. Nothing here knows what a row says.

train, val, test = divide("random", seed, torch.zeros(9312, dtype=torch.int64), split_counts(9312, 0.5, 0.1, None))
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Sequence

import torch
from torch import Tensor

from shoal import rng

SPLITS = ("train", "val", "test")


def split_counts(num_rows: int, train: float, val: float, test: float | None) -> list[int]:
    """Rows of train, val, test: round(num_rows * fraction) each. test None takes all that is left; fractions that sum to 1 leave nothing out."""
    left, counts = num_rows, []
    for fraction in (train, val, test or 0.0):
        counts.append(min(left, round(num_rows * fraction)))
        left -= counts[-1]
    if test is None or train + val + test > 1 - 1e-9:
        counts[1 if test == 0 else 2] += left
    return counts


def split_hash(parts: Sequence[Tensor]) -> str:
    """12 hexadecimal digits of the sha256 over the sorted row numbers of train, val, test (decimal, commas between rows, semicolons between splits)."""
    text = ";".join(",".join(map(str, sorted(part.tolist()))) for part in parts)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def divide(rule: str, seed: int, group: Tensor, counts: Sequence[int]) -> list[Tensor]:
    """Places 0 .. N-1, one tensor for each of ``counts``. group int64 [N]: which group each place belongs to, of 0 .. G-1, none of them empty.

    random: the head of one permutation, then what follows it; groups are not looked at. stratified: the counts are exact, and of every group the first part,
    or the first two together, have their share to within two rows. paired, rows: a group is never divided, so each part ends with the first whole
    group that completes its count and those before it.
    """
    key = rng.key(torch.tensor(seed), "split")
    if rule == "random":
        parts = list(rng.permutation(key, len(group))[: sum(counts)].split(list(counts)))
    elif rule == "stratified":
        parts = _shares(key, group, counts)
    else:
        parts = _whole_groups(key, group, counts)
    assert torch.cat(parts).bincount(minlength=1).max() <= 1, "a row stands in two parts"
    return parts


def _whole_groups(key: Tensor, group: Tensor, counts: Sequence[int]) -> list[Tensor]:
    """Groups in random order, cut at the first end of a group at or past each count."""
    sizes = group.bincount()
    place = rng.permutation(key, len(sizes))  # of each group
    ends = torch.zeros_like(sizes).index_copy(0, place, sizes).cumsum(0)
    order = place[group].argsort(stable=True)
    cuts = [0, *(int(ends[torch.searchsorted(ends, count)]) if count else 0 for count in itertools.accumulate(counts))]
    return [order[start:stop] for start, stop in itertools.pairwise(cuts)]


def _shares(key: Tensor, group: Tensor, counts: Sequence[int]) -> list[Tensor]:
    """Systematic sampling: each group's rows, in random order, lie evenly over [0, 1) from a random start, and all are cut in the order of their places."""
    sizes, order = group.bincount(), rng.permutation(key, len(group))
    order = order[group[order].argsort(stable=True)]  # group after group
    rank = torch.arange(len(order)) - (sizes.cumsum(0) - sizes)[group[order]]
    start = rng.uniform(rng.fold(key, 1), len(sizes)).double()
    place = (rank + start[group[order]]) / sizes[group[order]]
    return list(order[place.argsort(stable=True)][: sum(counts)].split(list(counts)))
