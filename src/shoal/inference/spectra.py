"""What a table over residues is made of, in the basis of its operation's group: Fourier spectra, sparsity, and what is left with or without some frequencies.

A network that adds modulo p turns residues into angles on a few circles, 2 pi k x / p for a few frequencies k (Nanda et al., arXiv 2301.05217): the right
coordinate for + and - is the residue itself. Multiplication is addition of discrete logarithms, on the p - 1 residues that have one: for x and / the
coordinate is the logarithm, the circles turn by 2 pi k log(x) / (p - 1) (multiplicative characters; arXiv 2606.17399). In the other coordinate a sparse
spectrum looks dense, so the same table is always looked at in both.

Pure functions of tensors, on any device, in float64. Not here: models, training, runs (``shoal.studies.grokking_progress`` measures those).

    power = spectrum(embedding[elements(97, "discrete log")])     # [49]; [0] is the constant
    key_frequencies(power), gini(power[1:]), needed(power[1:])
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from shoal.config.fields import check

BASES = ("additive", "discrete log")
SHARE = 0.9  # of the power, wherever "the fewest frequencies that have it" are meant


def primitive_root(p: int) -> int:
    """The smallest g whose powers are all residues 1 .. p - 1. ConfigError where p is not a prime (every prime has one)."""
    check(p >= 2 and all(p % q for q in range(2, int(p**0.5) + 1)), "p", f"discrete logarithms need a prime modulus, not {p}")
    parts = [q for q in range(2, p) if (p - 1) % q == 0]
    return next(g for g in range(1, p) if all(pow(g, (p - 1) // q, p) != 1 for q in parts))


def elements(p: int, basis: str) -> Tensor:
    """int64 [n]: the residues in the order of the group. additive: 0, 1, .. p - 1 (n = p); discrete log: 1, g, g^2, .. (n = p - 1; 0 is not among them)."""
    check(basis in BASES, "basis", f"{basis!r} is not one of {', '.join(BASES)}")
    if basis == "additive":
        return torch.arange(p)
    g = primitive_root(p)
    return torch.tensor([pow(g, k, p) for k in range(p - 1)])


def places(p: int, basis: str) -> Tensor:
    """int64 [p]: the place of every residue in ``elements``: itself, or its discrete logarithm (that of 0, which has none, is -1)."""
    order = elements(p, basis)
    return torch.full((p,), -1).scatter(0, order, torch.arange(len(order)))


def mean_by(values: Tensor, place: Tensor, size: int) -> Tensor:
    """[N, ...], int64 [N] -> float64 [size, ...]: the mean of the rows of each place. Places without rows are NaN.

    Over a whole group table this is the orthogonal projection of f(x, y) on the functions of s = x op y alone: every s has as many rows as any other, so
    waves in s that are orthogonal over s are orthogonal over (x, y), and the coefficients of the means are those of the table.
    """
    member = F.one_hot(place, size).to(torch.float64).T  # as a product, so that a GPU adds in the same order every time
    return (member @ values.to(torch.float64).flatten(1)).unflatten(1, values.shape[1:]) / member.sum(1).view(-1, *[1] * (values.dim() - 1))


def spectrum(table: Tensor) -> Tensor:
    """[n, ...] -> float64 [n // 2 + 1]: the power of each frequency k along the first dimension, summed over the others.

    power[k] is the squared length of the projection on cos(2 pi k s / n) and sin(2 pi k s / n), that is 2 |c_k|^2 / n with c_k = sum_s table[s]
    exp(-2 pi i k s / n); for the constant k = 0 and, with even n, for k = n / 2, whose sine is zero, |c_k|^2 / n. They sum to the table's squared length.
    """
    n = len(table)
    coefficients = torch.fft.rfft(table.to(torch.float64).reshape(n, -1), dim=0)
    return coefficients.abs().square().sum(1) * _multiplicity(n).to(table.device) / n


def band(table: Tensor, frequencies: Sequence[int]) -> Tensor:
    """[n, ...] -> float64 [n, ...]: only these frequencies' components (0 is the constant); all of them together are the table."""
    n = len(table)
    coefficients = torch.fft.rfft(table.to(torch.float64).reshape(n, -1), dim=0)
    kept = torch.zeros(len(coefficients), 1, dtype=torch.float64)
    kept[list(frequencies)] = 1.0
    return torch.fft.irfft(coefficients * kept.to(table.device), n, dim=0).view(table.shape)


def gini(power: Tensor) -> float:
    """Gini coefficient of powers [m] (without the constant): 0 when all are equal, 1 - 1 / m when one has everything; NaN when all are zero.

    sum_ij |a_i - a_j| / (2 m sum_i a_i), computed from the sorted values (a measure of sparsity: Hurley, Rickard, arXiv 0811.4706).
    """
    a, m = power.detach().sort().values, len(power)
    rank = 2 * torch.arange(1, m + 1, device=a.device) - m - 1
    return float((rank * a).sum() / (m * a.sum()))


def needed(power: Tensor, share: float = SHARE) -> int:
    """The smallest number of frequencies that together have ``share`` of the power [m]."""
    sums = power.sort(descending=True).values.cumsum(0)
    return int((sums < share * sums[-1] * (1 - 1e-12)).sum()) + 1


def key_frequencies(power: Tensor, share: float = SHARE, at_most: int = 10) -> list[int]:
    """The fewest frequencies k >= 1 that together have ``share`` of the power of spectrum() [n // 2 + 1], its constant apart; at most so many, sorted."""
    waves = power[1:]
    return sorted((waves.argsort(descending=True, stable=True)[: min(needed(waves, share), at_most)] + 1).tolist())


def restricted(logits: Tensor, place: Tensor, size: int, frequencies: Sequence[int]) -> Tensor:
    """[N, C], int64 [N] -> float64 [N, C]: only what the logits of the whole table have of these frequencies in s, and each class's constant."""
    return band(mean_by(logits, place, size), [0, *frequencies])[place]


def excluded(logits: Tensor, place: Tensor, size: int, frequencies: Sequence[int]) -> Tensor:
    """[N, C], int64 [N] -> float64 [N, C]: the logits of the whole table without these frequencies in s, and with all the rest of them."""
    return logits.to(torch.float64) - band(mean_by(logits, place, size), frequencies)[place]


def _multiplicity(n: int) -> Tensor:
    """float64 [n // 2 + 1]: how many of the n coefficients of a real table a frequency stands for."""
    k = torch.arange(n // 2 + 1)
    return torch.where((k == 0) | (2 * k == n), 1.0, 2.0).to(torch.float64)
