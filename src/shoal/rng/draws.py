"""Random numbers as a pure function of (seed, purpose, step).

Every draw is the same integer on every device and in every fleet: 64-bit counters through splitmix64's
finaliser (Steele, Lea, Flood 2014), names through crc32 (never ``hash()``, which differs by process). No state, no
global generator. Only integer operations and exact conversions are used here; normals, which need a logarithm, are in ``shoal.nn.init``,
and initial values are drawn on the CPU for that.

    rng.uniform(rng.key(torch.tensor([0, 1]), "example", 7), 4)   # [2, 4], the same on any machine
"""

from __future__ import annotations

from importlib.util import find_spec
from zlib import crc32

import torch
from torch import Tensor

GOLDEN = 0x9E3779B97F4A7C15 - (1 << 64)  # splitmix64's odd increment, as a signed 64-bit integer
SALT = 0x2545F491
MIX_1 = 0xBF58476D1CE4E5B9 - (1 << 64)
MIX_2 = 0x94D049BB133111EB - (1 << 64)
BIT = 1 << 62
HAS_TRITON = find_spec("triton") is not None


def _shift(x: Tensor, by: int) -> Tensor:
    """Logical right shift of int64 (torch's is arithmetic)."""
    return (x >> by) & ((1 << (64 - by)) - 1)


def _mix(x: Tensor) -> Tensor:
    """splitmix64's finaliser: a bijection of 64-bit integers in which every input bit reaches every output bit."""
    x = (x ^ _shift(x, 30)) * MIX_1
    x = (x ^ _shift(x, 27)) * MIX_2
    return x ^ _shift(x, 31)


def _signed(x: int) -> int:
    """A Python integer wrapped to 64 bits, as tensors wrap by themselves."""
    return (x + (1 << 63)) % (1 << 64) - (1 << 63)


def fold(key: Tensor, data: Tensor | int) -> Tensor:
    """A new key from a key and an integer (or integer tensor that broadcasts with it)."""
    jump = (data ^ SALT) * GOLDEN  # without the xor torch 2.11's compiler takes an arange times a large constant for 32-bit index arithmetic
    return _mix(key + (_signed(jump) if isinstance(jump, int) else jump))


def key(seed: Tensor, purpose: str, step: Tensor | int = 0) -> Tensor:
    """int64 [R] seeds (or a scalar), what the numbers are for, and a step -> int64 [R] keys."""
    return fold(_mix(_mix(seed) ^ _signed(crc32(purpose.encode()) * GOLDEN)), step)


def bits(key: Tensor, n: int, first: int = 0) -> Tensor:
    """[...] keys -> int64 [..., n], all 64 bits random: numbers ``first`` to first + n - 1 of each key's."""
    return fold(key[..., None], torch.arange(first, first + n, device=key.device))


def uniform(key: Tensor, n: int, first: int = 0) -> Tensor:
    """float32 [..., n] in [0, 1), multiples of 2**-24: exact in float32, so equal on every device."""
    return _shift(bits(key, n, first), 40).to(torch.float32) * 2.0**-24


def quarters(key: Tensor, n: int) -> Tensor:
    """int16 [..., n] in [-2**15, 2**15), four from each 64 bits: where many coarse numbers are wanted, a quarter of the work."""
    return _compiled_quarters(key, n) if torch.compiler.is_compiling() else _quarters(key, n)


def _quarters(key: Tensor, n: int) -> Tensor:
    return bits(key, -(-n // 4)).view(torch.int16)[..., :n]  # every machine that PyTorch runs on has the low end first


@torch.library.custom_op("shoal::quarters", mutates_args=())
def _compiled_quarters(key: Tensor, n: int) -> Tensor:
    """Out of the compilers' sight: where only 16 bits of a product are asked for, C++ compilers infer them as if it never overflowed."""
    return _quarters(key, n).contiguous()


@_compiled_quarters.register_fake
def _(key: Tensor, n: int) -> Tensor:
    return key.new_empty((*key.shape, n), dtype=torch.int16)


def randint(key: Tensor, n: int, high: Tensor | int) -> Tensor:
    """int64 [..., n] in [0, high). ``high`` < 2**31, an int or a tensor that broadcasts with [..., n]; bias below high / 2**32."""
    return _scale(bits(key, n), high)


def _scale(random_bits: Tensor, high: Tensor | int) -> Tensor:
    return _shift(_shift(random_bits, 32) * high, 32)


def permutation(key: Tensor, n: int) -> Tensor:
    """int64 [..., n]: one permutation of 0 .. n-1 per key."""
    return bits(key, n).argsort(dim=-1, stable=True)


def shuffled(key: Tensor, index: Tensor, n: Tensor | int, rounds: int = 24) -> Tensor:
    """Where a random permutation of 0 .. n-1 sends ``index``, without building the permutation.

    key, index, n broadcast to one shape; n may differ by run. Swap-or-not shuffle (Hoang, Morris, Rogaway 2012): in each round
    x is paired with (k - x) mod n and the pair is swapped or not by one bit, so every round, and the whole, is a bijection for any n.
    A batch needs only its own few indices, so this is a pure function of the step where an argsort would need an epoch's state.
    """
    if index.is_cuda and HAS_TRITON:
        sizes = n if isinstance(n, Tensor) else torch.full_like(index, n)  # filled there: no host waits, nothing is copied
        return _one_kernel(*(x.contiguous() for x in torch.broadcast_tensors(key, index, sizes)), rounds)
    pivots = _scale(bits(fold(key, 0), rounds), n[..., None] if isinstance(n, Tensor) else n)
    coins = bits(fold(key, 1), rounds)
    x = index
    for pivot, coin in zip(pivots.unbind(-1), coins.unbind(-1), strict=True):
        partner = torch.remainder(pivot - x, n)
        hashed = (torch.maximum(x, partner) ^ coin) * MIX_1  # the same for both of a pair
        # one bit, for which half of the finaliser is enough; not the sign, which C++ compilers infer as if products never overflowed
        swap = ((hashed ^ (hashed >> 29)) * MIX_2 & BIT) != 0
        x = torch.where(swap, partner, x)
    return x


@torch.library.custom_op("shoal::shuffled", mutates_args=())
def _one_kernel(key: Tensor, index: Tensor, n: Tensor, rounds: int) -> Tensor:
    from shoal.rng.shuffle_triton import shuffled

    return shuffled(key, index, n, rounds)


@_one_kernel.register_fake
def _(key: Tensor, index: Tensor, n: Tensor, rounds: int) -> Tensor:
    return torch.empty_like(index)
