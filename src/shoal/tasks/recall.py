"""Recall: q stands somewhere in a sequence of random tokens, its answer v ``delay`` places after it; the last token is q again, and v must follow.

A sequence of n tokens, the query included: q uniform over tokens 0 .. M-1, v uniform over all K (so v = q in 1 of K, unless ``value_excludes_query``),
q at i and v at i + delay with i uniform over all places that leave v before the query, 0 <= i <= n - 2 - delay; every other token uniform over all but q.
So q occurs twice, and three times where v = q. Every training row is drawn, on the device, as a function of the run's order key, the step and the row's
place: there is no training table and no split "train".

With ``train_lengths`` "uniform" a training row is asked at a place of its own, uniform in delay + 1 .. L - 1, and what stands after it is noise that no
model here can see: every one looks back only. That is a sequence of that length in its ordinary positions 0, 1, ..., where padding on the left would move
them, and unlike padding it needs no mask.

Splits: "length:n" for n from 3 to the longest, the same rows whenever it is asked for, other ones for every split seed; a run whose delay does not fit into n
tokens has no row there. "test" is "length:L". With ":distinct" after it, the rows of a split whose answer is not the query.

RecallTask(RecallConfig(num_tokens=16, length=32, num_queries=4))   or   shoal data recall --num-queries 4 --out FILE.tsv
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from shoal import rng
from shoal.config import RecallConfig
from shoal.config.fields import check
from shoal.contracts import Batch, Tables, Tokenizer
from shoal.data.tokenizers import WordTokenizer
from shoal.tasks.stream import check_size, fingerprint, fresh, pieces, row_hash

QUERY, PLACE, VALUE, OTHERS, LENGTH = range(5)  # what a row's key is folded with
DISTINCT = ":distinct"


class RecallTask:
    def __init__(self, config: RecallConfig) -> None:
        self.config = config
        self.tokenizer: Tokenizer = WordTokenizer(map(str, range(config.num_tokens)))
        self.vocab_size = config.num_tokens
        self.max_length = config.longest * config.length
        self.lengths = {"test": config.length} | {f"length:{n}": n for n in range(3, self.max_length + 1)}
        self.splits: tuple[str, ...] = tuple(split + only for split in self.lengths for only in ("", DISTINCT))
        self.fingerprint = fingerprint(config)
        self.start: tuple[int, ...] = ()
        self.end: int | None = None

    def setup(self, per_run: Mapping[str, Sequence[Any]], device: torch.device | str) -> Tables:
        """Per run, int64 [R]: "num_queries", "delay", and "test", the key of the test rows."""
        tables = {name: torch.tensor(per_run[name], dtype=torch.int64) for name in ("num_queries", "delay")}
        tables["test"] = rng.key(torch.tensor(per_run["split_seed"], dtype=torch.int64), "recall test")
        return Tables(per_run={name: x.to(device) for name, x in tables.items()})

    def batch(self, tables: Tables, key: Tensor, step: Tensor, size: int) -> Batch:
        """``size`` rows that were never there before."""
        check_size(size)
        rows, longest = fresh(key, step, torch.arange(size, device=key.device)), self.config.length
        if self.config.train_lengths == "fixed":
            return self._rows(tables, rows, longest, longest)
        shortest = tables.per_run["delay"][:, None, None] + 2
        length = shortest + rng.randint(rng.fold(rows, LENGTH), 1, longest + 1 - shortest)  # [R, B, 1]
        return self._rows(tables, rows, longest, length)

    def evaluation(self, tables: Tables, split: str, rows: int) -> Iterator[Batch]:
        n = self.lengths.get(split.removesuffix(DISTINCT), 0)
        check(n > 0, "evaluate", f"recall has no split {split!r}; known: test, length:3 to length:{self.max_length}, and each with {DISTINCT} after it")
        fits = (tables.per_run["delay"] + 2 <= n)[:, None, None]
        for place in pieces(self.config.test_size, rows, fits.device):
            batch = self._rows(tables, fresh(tables.per_run["test"], n, place), n, n)
            there = fits & (place < self.config.test_size)[:, None]  # [R, B, 1]
            if split.endswith(DISTINCT):
                there = there & (batch.targets != batch.tokens[..., -1:])
            yield batch._replace(weights=there.float())

    def _rows(self, tables: Tables, rows: Tensor, time: int, length: Tensor | int) -> Batch:
        """rows int64 [R, B] keys -> ``time`` tokens each, asked at length - 1; length int64 [R, B, 1], or ``time`` for all."""
        num_queries, delay = (tables.per_run[name][:, None, None] for name in ("num_queries", "delay"))
        last = self.config.num_tokens - 1

        def draw(what: int, count: int, high: Tensor | int) -> Tensor:
            return rng.randint(rng.fold(rows, what), count, high)  # [R, B, count]

        query = draw(QUERY, 1, num_queries)
        place = draw(PLACE, 1, (length - 1 - delay).clamp(min=1))  # where the delay does not fit anything will do: its weight is 0
        value = _without(query, draw(VALUE, 1, last)) if self.config.value_excludes_query else draw(VALUE, 1, last + 1)
        t = torch.arange(time, device=rows.device)
        tokens = torch.where(t == place + delay, value, _without(query, draw(OTHERS, time, last)))
        tokens = torch.where((t == place) | (t == length - 1), query, tokens)
        at = slice(-1, None) if isinstance(length, int) else length - 1
        return Batch(tokens, targets=value, weights=torch.ones_like(value, dtype=torch.float32), at=at)

    def describe(self, tables: Tables, run: int) -> dict[str, Any]:
        """The last four shares are what is right by an answer that looks at nothing, counts, or looks at no more than a place: measured on the test rows."""
        config = self.config
        alone = tables.keep(torch.tensor([run], device=tables.per_run["test"].device))
        (batch,) = self.evaluation(alone, "test", config.test_size)
        tokens, value = batch.tokens[0], batch.targets[0]
        num_queries, delay = (int(alone.per_run[name]) for name in ("num_queries", "delay"))
        return {
            "tokens": config.num_tokens,
            "queries": num_queries,
            "delay": delay,
            "training length": config.length if config.train_lengths == "fixed" else f"{delay + 2} to {config.length}",
            "test lengths": f"{delay + 2} to {self.max_length}",
            "test sequences of each": config.test_size,
            "test hash": row_hash(batch),
            "example": f"{self.tokenizer.decode(tokens[0].tolist())} -> {self.tokenizer.decode(value[0].tolist())}",
            "answers that are the query": (value == tokens[:, -1:]).double().mean().item(),
            "right by chance": 1 / config.num_tokens,
            "right by a random token of the sequence": (value == tokens[:, :-1]).double().mean().item(),
            "right by the commonest token": _commonest(tokens[:, :-1], value, config.num_tokens),
            "right by the token before the query": (value == tokens[:, -2:-1]).double().mean().item(),
        }


def _without(query: Tensor, x: Tensor) -> Tensor:
    """x uniform over one token fewer -> uniform over all but the query."""
    return x + (x >= query)


def _commonest(tokens: Tensor, value: Tensor, num_tokens: int) -> float:
    """The share of rows (tokens [B, T], value [B, 1]) whose value is their commonest token; one of n that are equally common counts for 1 / n."""
    counts = tokens.new_zeros(len(tokens), num_tokens).scatter_add_(1, tokens, torch.ones_like(tokens))
    top = counts == counts.amax(1, keepdim=True)
    return (top.gather(1, value) / top.sum(1, keepdim=True)).double().mean().item()
