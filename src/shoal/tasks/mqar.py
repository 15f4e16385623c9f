"""MQAR, multi-query associative recall: pairs of a key and a value, then every key once more, in places of its own; each must be answered by its value.

The generator of Arora et al. 2023 (arXiv 2312.04927; ``multiquery_ar`` in HazyResearch/zoology, same arguments), drawn afresh at every step on the device.
A row begins with its N pairs: keys are N of 1 .. V/2 - 1 and values N of V/2 .. V - 1, without repetition. Of the places 0, 2, 4, ... after them,
counted j = 1, 2, ..., each key in turn takes one that is free with a probability proportional to j^(power_a - 1). The rest is noise.

One thing differs. Noise there comes from the whole vocabulary, so now and then it is one of the row's own keys or values (zoology#29): a key that is
asked again and not scored, or a second pair that contradicts the first. Here it is uniform over all tokens but the row's own keys and values.

Splits: "pairs:n", the same length with n pairs, and "test", which is "pairs:num_kv_pairs": the same rows whenever asked for, other ones for every split seed.

MQARTask(MQARConfig(num_kv_pairs=8, input_seq_len=64))   or   shoal data mqar --num-kv-pairs 8 --out FILE.tsv
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from shoal import rng
from shoal.config import MQARConfig
from shoal.config.fields import check
from shoal.contracts import Batch, Tables, Tokenizer
from shoal.data.tokenizers import WordTokenizer
from shoal.tasks.stream import check_size, fingerprint, fresh, pieces, row_hash

PAIRS, PLACES, NOISE = range(3)  # what a row's key is folded with


class MQARTask:
    def __init__(self, config: MQARConfig) -> None:
        self.config = config
        self.tokenizer: Tokenizer = WordTokenizer(map(str, range(config.vocab_size)))
        self.vocab_size = config.vocab_size
        self.max_length = config.input_seq_len
        self.pairs = {"test": config.num_kv_pairs} | {f"pairs:{n}": n for n in range(1, config.input_seq_len // 4 + 1)}
        self.splits: tuple[str, ...] = tuple(self.pairs)
        self.fingerprint = fingerprint(config)
        self.start: tuple[int, ...] = ()
        self.end: int | None = None

    def setup(self, per_run: Mapping[str, Sequence[Any]], device: torch.device | str) -> Tables:
        """Per run: "test" int64 [R], the key of the test rows. Shared, int64 [2, 1]: the "first" of all keys and of all values, and their "number"."""
        half, seeds = self.config.vocab_size // 2, torch.tensor(per_run["split_seed"], dtype=torch.int64)
        kinds = {"first": [[1], [half]], "number": [[half - 1], [self.config.vocab_size - half]]}
        return Tables({"test": rng.key(seeds, "mqar test").to(device)}, {name: torch.tensor(x, device=device) for name, x in kinds.items()})

    def batch(self, tables: Tables, key: Tensor, step: Tensor, size: int) -> Batch:
        """``size`` rows that were never there before."""
        check_size(size)
        return self._rows(tables, fresh(key, step, torch.arange(size, device=key.device)), self.config.num_kv_pairs)

    def evaluation(self, tables: Tables, split: str, rows: int) -> Iterator[Batch]:
        check(split in self.pairs, "evaluate", f"mqar has no split {split!r}; known: test, pairs:1 to {self.splits[-1]}")
        key, n = tables.per_run["test"], self.pairs[split]
        for place in pieces(self.config.test_size, rows, key.device):
            batch = self._rows(tables, fresh(key, n, place), n)
            yield batch._replace(weights=batch.weights * (place < self.config.test_size)[:, None])

    def _rows(self, tables: Tables, rows: Tensor, num_pairs: int) -> Batch:
        """rows int64 [R, B] keys -> tokens [R, B, T], scored at the query of each pair, in the order of the pairs."""
        config, index = self.config, torch.arange(num_pairs, device=rows.device)
        kinds = rng.fold(rng.fold(rows, PAIRS)[..., None], torch.arange(2, device=rows.device))[..., None]  # [R, B, 2, 1]
        chosen = tables.shared["first"] + rng.shuffled(kinds, index, tables.shared["number"])  # [R, B, 2, N]
        pairs, (keys, values) = chosen.mT.flatten(-2), chosen.unbind(-2)  # [R, B, 2N], [R, B, N] each
        room = config.input_seq_len - 2 * num_pairs
        place = 2 * _places(rng.fold(rows, PLACES), room // 2, num_pairs, config.power_a)
        if config.random_non_queries:
            noise = _without(pairs, rng.randint(rng.fold(rows, NOISE), room, config.vocab_size - 2 * num_pairs))
        else:
            noise = torch.zeros((*rows.shape, room), dtype=torch.int64, device=rows.device)
        tokens = torch.cat((pairs, noise.scatter(-1, place, keys)), dim=-1)
        return Batch(tokens, targets=values, weights=torch.ones_like(values, dtype=torch.float32), at=2 * num_pairs + place)

    def describe(self, tables: Tables, run: int) -> dict[str, Any]:
        config = self.config
        alone = tables.keep(torch.tensor([run], device=tables.per_run["test"].device))
        (batch,) = self.evaluation(alone, "test", config.test_size)
        return {
            "vocabulary": config.vocab_size,
            "length": config.input_seq_len,
            "pairs": config.num_kv_pairs,
            "test sequences": config.test_size,
            "test hash": row_hash(batch),
            "example": self.tokenizer.decode(batch.tokens[0, 0, : 2 * config.num_kv_pairs].tolist()),
            "right by chance": 1 / (config.vocab_size - config.vocab_size // 2),
            "right by a random value of the row": 1 / config.num_kv_pairs,
        }


def _places(key: Tensor, room: int, count: int, power: float) -> Tensor:
    """int64 [...] -> [..., count]: that many of 0 .. room-1, one after the other, each with probability ~ (place + 1)^(power - 1) among those still free.

    As a race: place j arrives after an exponential time of mean (j + 1)^(1 - power), and the first ``count`` to arrive are taken in the order they
    arrive. In float64, where devices round a logarithm by some 1e-16 of itself, which two arrivals are all but never apart.
    """
    uniform = ((rng.bits(key, room) >> 11).double() + 0.5) * 2.0**-53 + 0.5  # 53 bits, in (0, 1)
    mean = torch.arange(1, room + 1, device=key.device, dtype=torch.float64) ** (1 - power)
    return (-uniform.log() * mean).topk(count, largest=False).indices


def _without(taken: Tensor, x: Tensor) -> Tensor:
    """taken int64 [..., N], all different; x [..., T] uniform over N tokens fewer -> uniform over all tokens but these."""
    free_below = taken.sort(dim=-1).values - torch.arange(taken.shape[-1], device=taken.device)
    return x + torch.searchsorted(free_below, x, right=True)
