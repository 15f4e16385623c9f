"""The tables of x op y = z, by exact integer arithmetic: residues modulo p, and permutations of five things. Which rows state the same fact.

Division is by the inverse ``pow(y, -1, p)``; where y has none the row has no answer. Permutations are numbered in lexicographic order of their images
(0 is 01234, 119 is 43210) and compose from the right: (x y)(k) = x(y(k)), y first. Not here: splits, tokens.

answers(["div"], 97)[0, 5 * 97 + 3]   # 34: 3 * 34 = 5 (mod 97)
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from shoal.config.tasks import OPERATIONS

NAMES = tuple(OPERATIONS)
POLYNOMIALS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "add": lambda x, y: x + y,
    "sub": lambda x, y: x - y,
    "mul": lambda x, y: x * y,
    "square_add": lambda x, y: x**2 + y,
    "cube_add": lambda x, y: x**3 + y,
    "squares": lambda x, y: x**2 + y**2,
    "quadratic": lambda x, y: x**2 + x * y + y**2,
    "quadratic_x": lambda x, y: x**2 + x * y + y**2 + x,
    "cubic": lambda x, y: x**3 + x * y,
    "cubic_y": lambda x, y: x**3 + x * y**2 + y,
}


def answers(names: Sequence[str], p: int) -> Tensor:
    """int32 [M, n n]: the answer of row x n + y under each operation, -1 where it has none. n = p; S5 has n = 120 and no use for p."""
    return torch.stack([(_composed(name) if name.startswith("s5") else _reckoned(name, p)).flatten() for name in names]).int()


def _reckoned(name: str, p: int) -> Tensor:
    """int64 [p, p]"""
    x, y = torch.arange(p)[:, None], torch.arange(p)
    if name in POLYNOMIALS:
        return POLYNOMIALS[name](x, y) % p
    inverse = torch.tensor([pow(residue, -1, p) if math.gcd(residue, p) == 1 else -1 for residue in range(p)])
    divided = torch.where(inverse < 0, -1, x * inverse % p)
    return divided if name == "div" else torch.where(y % 2 == 1, divided, (x - y) % p)  # div_odd


def permutations() -> Tensor:
    """int64 [120, 5]: the images of 0 .. 4 under each element of S5."""
    return torch.tensor(list(itertools.permutations(range(5))))


def _composed(name: str) -> Tensor:
    """int64 [120, 120]"""
    images = permutations()
    weights = 5 ** torch.arange(5)
    number = torch.zeros(5**5, dtype=torch.int64)
    number[images @ weights] = torch.arange(120)
    product = number[images[:, images] @ weights]  # images[x][images[y]]
    if name == "s5":
        return product
    x = torch.arange(120)[:, None]
    return product[product, number[images.argsort(1) @ weights][:, None] if name == "s5_conjugate" else x]


def facts(names: Sequence[str], table: Tensor) -> Tensor:
    """int64 [M, n n], equal where two rows of the mixture state the same fact; table as ``answers(names, p)``.

    y + z = x is said by y + z, z + y, x - y and x - z; y z = x by y z, z y, x / y and x / z; in all other operations (x, y) goes with (y, x).
    """
    n = math.isqrt(table.shape[1])
    x, y = torch.arange(n).repeat_interleave(n), torch.arange(n).repeat(n)
    keys = []
    for place, (name, z) in enumerate(zip(names, table.long(), strict=True)):
        total, product, own = (torch.full_like(x, kind) for kind in (0, 1, 2 + place))
        kind = {"add": total, "sub": total, "mul": product, "div": product, "div_odd": torch.where(y % 2 == 1, product, total)}.get(name, own)
        a, b = (y, z) if name in ("sub", "div", "div_odd") else (x, y)
        keys.append((kind * n + torch.minimum(a, b)) * n + torch.maximum(a, b))
    return torch.stack(keys)
