"""``rng.shuffled`` on a GPU: one Triton kernel, a number to a thread.

As tensor operations its rounds are some 300 kernels, and written into one by PyTorch's compiler they took 13 s of every fleet's first step.
Needs Triton; import it on a CUDA device only. Not here: what is computed, and why (``shoal.rng.draws``, whose constants these are).
"""

# pyright: reportOperatorIssue=false, reportIndexIssue=false, reportPossiblyUnboundVariable=false

from __future__ import annotations

import torch
import triton  # pyright: ignore[reportMissingImports]
import triton.language as tl  # pyright: ignore[reportMissingImports]
from torch import Tensor

from shoal.rng import draws

GOLDEN, SALT, MIX_1, MIX_2, BIT = (tl.constexpr(x) for x in (draws.GOLDEN, draws.SALT, draws.MIX_1, draws.MIX_2, draws.BIT))
THREADS = 128


@triton.jit
def _mix(x):
    x = (x ^ ((x >> 30) & ((1 << 34) - 1))) * MIX_1
    x = (x ^ ((x >> 27) & ((1 << 37) - 1))) * MIX_2
    return x ^ ((x >> 31) & ((1 << 33) - 1))


@triton.jit
def _fold(key, data):
    return _mix(key + (data ^ SALT) * GOLDEN)


@triton.jit
def _shuffled(key_pointer, index_pointer, n_pointer, out_pointer, count, ROUNDS: tl.constexpr, BLOCK: tl.constexpr):
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    real = place < count
    key = tl.load(key_pointer + place, mask=real, other=0)
    x = tl.load(index_pointer + place, mask=real, other=0)
    n = tl.load(n_pointer + place, mask=real, other=1)
    zero = place - place
    pivots, coins = _fold(key, zero), _fold(key, zero + 1)
    for i in range(ROUNDS):
        draw = _fold(pivots, zero + i)
        pivot = (((draw >> 32) & ((1 << 32) - 1)) * n >> 32) & ((1 << 32) - 1)
        partner = pivot - x
        partner = tl.where(partner < 0, partner + n, partner)
        hashed = (tl.maximum(x, partner) ^ _fold(coins, zero + i)) * MIX_1
        x = tl.where(((hashed ^ (hashed >> 29)) * MIX_2 & BIT) != 0, partner, x)
    tl.store(out_pointer + place, x, mask=real)


def shuffled(key: Tensor, index: Tensor, n: Tensor, rounds: int) -> Tensor:
    """int64, contiguous and of one shape -> int64 of that shape; ``index`` in [0, n)."""
    out = torch.empty_like(index)
    _shuffled[(triton.cdiv(index.numel(), THREADS),)](key, index, n, out, index.numel(), ROUNDS=rounds, BLOCK=THREADS)
    return out
