"""rng: the right integers (against Python's), uniform alone and jointly, bijections, the same in every fleet."""

from __future__ import annotations

from collections.abc import Callable
from zlib import crc32

import pytest
import torch
from scipy.stats import chisquare
from torch import Tensor

from shoal import rng
from shoal.rng import draws

GOLDEN, SALT, WORD = 0x9E3779B97F4A7C15, 0x2545F491, 1 << 64


def many_keys(num: int, purpose: str = "test") -> Tensor:
    """Keys of consecutive seeds, as the runs of a fleet have: the hardest case for a counter."""
    return rng.key(torch.arange(num), purpose)


def assert_uniform(values: Tensor, cells: int) -> None:
    counts = torch.bincount(values.flatten(), minlength=cells)
    assert len(counts) == cells and chisquare(counts.numpy()).pvalue > 1e-4


# --- the integers themselves


def mix(x: int) -> int:
    """splitmix64's finaliser, in Python's integers."""
    x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 % WORD
    x = (x ^ x >> 27) * 0x94D049BB133111EB % WORD
    return x ^ x >> 31


def fold(key: int, data: int) -> int:
    return mix((key + (data ^ SALT) * GOLDEN) % WORD)


def key(seed: int, purpose: str, step: int) -> int:
    # the purpose enters as a multiple of the signed increment
    return fold(mix(mix(seed) ^ (crc32(purpose.encode()) * (GOLDEN - WORD)) % WORD), step)


def test_draws_equal_python_integers() -> None:
    seeds, high = [0, 1, 2, 12345, 2**31 - 1], 9312
    for step in (0, 7, 10**9):
        reference = [key(seed, "order", step) for seed in seeds]
        keys = rng.key(torch.tensor(seeds), "order", step)
        assert [x % WORD for x in keys.tolist()] == reference
        assert torch.equal(keys, rng.key(torch.tensor(seeds), "order", torch.tensor(step)))
        words = [[fold(k, i) for i in range(11)] for k in reference]
        assert [[x % WORD for x in row] for row in rng.bits(keys, 11).tolist()] == words
        assert rng.uniform(keys, 11).tolist() == [[(w >> 40) / 2**24 for w in row] for row in words]
        assert rng.randint(keys, 11, high).tolist() == [[(w >> 32) * high >> 32 for w in row] for row in words]


def test_pinned_values() -> None:
    """A change of any of these silently changes every experiment: bump the version and say so if it must be."""
    assert rng.key(torch.tensor([0, 1, 2**31 - 1]), "example", 7).tolist() == [67979942881890716, -8012796733563493583, -1067852601657703108]
    assert rng.bits(rng.key(torch.tensor([0]), "x"), 3).tolist() == [[-5842388212637184179, -5993381865405996407, 2304895080830634765]]
    assert (rng.uniform(rng.key(torch.tensor(5), "dropout", 3), 3) * 2**24).tolist() == [5706923, 12878632, 15853576]
    assert rng.randint(rng.key(torch.tensor(5), "dropout", 3), 3, 97).tolist() == [32, 74, 91]
    assert rng.permutation(rng.key(torch.tensor(1), "split"), 10).tolist() == [2, 9, 0, 6, 8, 4, 3, 5, 1, 7]
    assert rng.shuffled(rng.key(torch.tensor(1), "order"), torch.arange(10), 10).tolist() == [4, 5, 0, 6, 8, 9, 1, 2, 7, 3]


# --- uniform


def test_every_bit_is_balanced() -> None:
    words = rng.bits(many_keys(500), 40).flatten()
    share = torch.stack([words >> i & 1 for i in range(64)]).double().mean(1)
    assert ((share - 0.5).abs() < 5 * 0.5 / len(words) ** 0.5).all()


@pytest.mark.parametrize("high", [2, 3, 97, 1000])
def test_randint_uniform(high: int) -> None:
    draws = rng.randint(many_keys(400), 200, high)
    assert draws.min() >= 0 and draws.max() < high
    assert_uniform(draws, high)
    pairs = rng.randint(many_keys(40_000), 2, 11)  # neighbours within one key
    assert_uniform(pairs[:, 0] * 11 + pairs[:, 1], 121)


def test_randint_high_per_run() -> None:
    keys, high = many_keys(4), torch.tensor([[1], [2], [97], [2**31 - 1]])
    draws = rng.randint(keys, 1000, high)
    assert (draws >= 0).all() and (draws < high).all() and (draws[0] == 0).all() and draws[3].max() > 2**30
    for r in range(4):
        assert torch.equal(draws[r], rng.randint(keys[r], 1000, int(high[r])))


def test_uniform_floats() -> None:
    draws = rng.uniform(many_keys(400), 200)
    assert draws.dtype == torch.float32 and draws.min() >= 0 and draws.max() < 1
    assert_uniform((draws * 64).long(), 64)
    assert torch.equal(draws * 2**24, (draws * 2**24).round())  # exact in float32, so equal on every device


def test_quarters_are_the_words_cut_in_four_from_their_low_end() -> None:
    draws = rng.quarters(many_keys(400), 202)
    assert draws.dtype == torch.int16 and draws.shape == (400, 202)
    for lane in range(4):
        assert_uniform((draws[:, lane:200:4].long() + 2**15) >> 8, 256)
    words = [value % 2**64 for value in rng.bits(many_keys(400)[7], 51).tolist()]
    assert [value % 2**16 for value in draws[7].tolist()] == [word >> 16 * lane & 0xFFFF for word in words for lane in range(4)][:202]


def images(shuffle: str, keys: Tensor, index: list[int], n: int) -> Tensor:
    """[num keys, len(index)]: where each key's permutation sends the indices."""
    if shuffle == "permutation":
        return rng.permutation(keys, n)[:, index]
    return rng.shuffled(keys[:, None], torch.tensor(index), n)


@pytest.mark.parametrize("shuffle", ["permutation", "shuffled"])
def test_all_permutations_of_four_equally_likely(shuffle: str) -> None:
    for keys in (many_keys(24_000), rng.fold(rng.key(torch.tensor(3), "order"), torch.arange(24_000))):  # by seed, and by epoch
        code = (images(shuffle, keys, [0, 1, 2, 3], 4) * torch.tensor([1, 4, 16, 64])).sum(1)
        kinds, place = code.unique(return_inverse=True)
        assert len(kinds) == 24
        assert_uniform(place, 24)


@pytest.mark.parametrize("shuffle", ["permutation", "shuffled"])
@pytest.mark.parametrize("pair", [[0, 1], [3, 8], [0, 10], [9, 10]])
def test_images_of_two_positions_jointly_uniform(shuffle: str, pair: list[int]) -> None:
    n, both = 11, images(shuffle, many_keys(22_000, "pairs"), pair, 11)
    first, second = both.unbind(1)
    assert (first != second).all()
    assert_uniform(first * (n - 1) + second - (second > first).long(), n * (n - 1))


def test_shuffled_leaves_no_order_in_a_long_table() -> None:
    n = 4656
    image = rng.shuffled(many_keys(40)[:, None], torch.arange(n), n)
    steps = (image[:, 1:] - image[:, :-1]) % n - 1  # 0 .. n-2, uniform if neighbours are scattered
    assert_uniform(steps * 31 // (n - 1), 31)
    assert_uniform(image[:, :500] * 16 // n, 16)  # the first rows of an epoch come from everywhere
    overlap = torch.isin(image[0, :512], image[1, :512]).double().mean()  # two epochs' first batches share what chance gives
    assert abs(overlap - 512 / n) < 5 * (512 / n * (1 - 512 / n) / 512) ** 0.5


# --- bijections


def is_permutation(rows: Tensor) -> bool:
    return torch.equal(rows.sort(-1).values, torch.arange(rows.shape[-1]).expand_as(rows))


@pytest.mark.parametrize("n", [*range(1, 61), 4656])
def test_bijection(n: int) -> None:
    keys = many_keys(30)
    assert is_permutation(rng.permutation(keys, n))
    assert is_permutation(rng.shuffled(keys[:, None], torch.arange(n), n))


def test_shuffled_n_per_run_and_epoch_in_the_key() -> None:
    sizes = [1, 2, 5, 59, 4656]
    keys = many_keys(len(sizes))
    index = torch.arange(4656)[None] % torch.tensor(sizes)[:, None]
    together = rng.shuffled(keys[:, None], index, torch.tensor(sizes)[:, None])
    for r, n in enumerate(sizes):
        assert is_permutation(together[r, :n])
        assert torch.equal(together[r], rng.shuffled(keys[r], index[r], n))
    epochs = rng.fold(keys[:, None], torch.tensor([0, 0, 1, 2]))  # another key for every element
    index = torch.zeros(len(sizes), 4, dtype=torch.int64)
    mixed = rng.shuffled(epochs, index, torch.tensor(sizes)[:, None])
    for r, n in enumerate(sizes):
        assert mixed[r].tolist() == [int(rng.shuffled(rng.fold(keys[r], e), torch.tensor(0), n)) for e in (0, 0, 1, 2)]


# --- one run is the same in every fleet; different purposes are not


DRAWS: dict[str, Callable[[Tensor], Tensor]] = {
    "bits": lambda keys: rng.bits(keys, 50),
    "uniform": lambda keys: rng.uniform(keys, 50),
    "quarters": lambda keys: rng.quarters(keys, 50),  # not a multiple of four
    "randint": lambda keys: rng.randint(keys, 50, 97),
    "permutation": lambda keys: rng.permutation(keys, 50),
    "shuffled": lambda keys: rng.shuffled(keys[:, None], torch.arange(50, device=keys.device), 50),
    "shuffled, each key its own n": lambda keys: rng.shuffled(keys[:, None], torch.arange(50, device=keys.device), 50 + (keys[:, None] & 63)),
    "fold": lambda keys: rng.fold(keys, 3)[:, None],
}


@pytest.mark.parametrize("name", DRAWS)
def test_independent_of_fleet(name: str) -> None:
    seeds = torch.tensor([3, 0, 7, 1, 2**31 - 1, 3, 40, 2])
    fleet = DRAWS[name](rng.key(seeds, "order", 11))
    for r in range(8):
        assert torch.equal(fleet[r : r + 1], DRAWS[name](rng.key(seeds[r : r + 1], "order", 11)))
    assert torch.equal(fleet[0], fleet[5]) and not torch.equal(fleet[0], fleet[1])


@pytest.mark.parametrize("device", [pytest.param("cpu", marks=pytest.mark.slow), pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("name", DRAWS)
@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")  # from within the compiler
def test_compiled_and_on_any_device_the_same(name: str, device: str) -> None:
    """Compilers have been seen to shorten 64-bit arithmetic on a counter to 32 bits."""
    keys = many_keys(8)
    assert torch.equal(torch.compile(DRAWS[name], fullgraph=True)(keys.to(device)).cpu(), DRAWS[name](keys))
    assert torch.equal(DRAWS[name](keys.to(device)).cpu(), DRAWS[name](keys))


def test_prefix_is_stable() -> None:
    """Asking for more numbers never changes the first ones."""
    assert torch.equal(rng.bits(many_keys(3), 100)[:, :40], rng.bits(many_keys(3), 40))


def test_seeds_purposes_and_steps_decorrelated() -> None:
    seeds, steps, purposes = range(40), range(40), ["order", "split", "dropout", "init", "a", "b", "label noise", "redro"]
    keys = torch.stack([rng.key(torch.arange(len(seeds)), purpose, step) for purpose in purposes for step in steps])
    assert len(keys.unique()) == keys.numel()
    words = keys.view(len(purposes), len(steps), len(seeds))
    neighbours = [(words[1:], words[:-1]), (words[:, 1:], words[:, :-1]), (words[..., 1:], words[..., :-1])]
    for one, other in neighbours:
        differing = torch.stack([(one ^ other) >> i & 1 for i in range(64)]).double().flatten(1).mean(1)
        assert ((differing - 0.5).abs() < 5 * 0.5 / one.numel() ** 0.5).all()  # each of the 64 bits flips half of the time
        cells = [draws._shift(x, 60) for x in (one, other)]
        assert_uniform(cells[0] * 16 + cells[1], 256)


def test_no_global_generator() -> None:
    torch.manual_seed(1)
    state = torch.get_rng_state()
    before = {name: draw(many_keys(4)) for name, draw in DRAWS.items()}
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(2)
    assert all(torch.equal(draw(many_keys(4)), before[name]) for name, draw in DRAWS.items())
