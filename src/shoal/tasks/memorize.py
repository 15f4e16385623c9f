"""Memorize: given strings by heart, character by character. What any sequence model must manage before anything else is asked of it.

A row reads ``<s> c1 .. cn`` and must answer ``c1 .. cn </s>``. The only split is "train": there is nothing to generalise to.

MemorizeTask(MemorizeConfig(strings=("I love machine learning",), unscored=3))
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from shoal.config import MemorizeConfig
from shoal.config.fields import check
from shoal.contracts import Batch, Tables, Tokenizer
from shoal.data.tokenizers import CharacterTokenizer
from shoal.tasks.stream import fingerprint, pieces, stream


class MemorizeTask:
    def __init__(self, config: MemorizeConfig) -> None:
        self.config = config
        tokenizer = CharacterTokenizer("".join(config.strings), special=("<s>", "</s>"))
        self.tokenizer: Tokenizer = tokenizer
        self.vocab_size = tokenizer.vocab_size
        self.max_length = max(map(len, config.strings)) + 1  # <s> and the longest string; </s> is never read
        self.splits: tuple[str, ...] = ("train",)
        self.fingerprint = fingerprint(config)
        begin, end = tokenizer.special.values()
        self.start: tuple[int, ...] = (begin,)
        self.end: int | None = end

    def setup(self, per_run: Mapping[str, Sequence[Any]], device: torch.device | str) -> Tables:
        """Shared: the strings, "texts" int64 [N, T+1] (padded on the right with ``</s>``) and "lengths" int64 [N]. Per run: "unscored" int64 [R]."""
        longest = max(map(len, self.config.strings))
        for unscored in per_run["unscored"]:
            check(unscored < longest, "task.unscored", f"{unscored} leaves no character scored; at most {longest - 1}")
        begin, end = *self.start, self.end
        texts = [[begin, *self.tokenizer.encode(string), *[end] * (longest + 1 - len(string))] for string in self.config.strings]
        lengths = [len(string) for string in self.config.strings]
        return Tables(
            per_run={"unscored": torch.tensor(per_run["unscored"], dtype=torch.int64, device=device)},
            shared={"texts": torch.tensor(texts, device=device), "lengths": torch.tensor(lengths, device=device)},
        )

    def batch(self, tables: Tables, key: Tensor, step: Tensor, size: int) -> Batch:
        """``size`` strings of the stream of shuffled epochs; 0 = all strings, in order."""
        num_strings = len(self.config.strings)
        if size == 0:
            return self._rows(tables, torch.arange(num_strings, device=key.device).expand(len(key), -1))
        return self._rows(tables, stream(key, step, size, torch.full_like(key, num_strings)))

    def evaluation(self, tables: Tables, split: str, rows: int) -> Iterator[Batch]:
        check(split in self.splits, "evaluate", f"memorize has no split {split!r}; known: train")
        unscored = tables.per_run["unscored"]
        for place in pieces(len(self.config.strings), rows, unscored.device):
            yield self._rows(tables, place.expand(len(unscored), -1))

    def _rows(self, tables: Tables, place: Tensor) -> Batch:
        """place int64 [R, B] of strings; places past the last one have weight 0."""
        num_strings = len(self.config.strings)
        index = place.clamp(max=num_strings - 1)
        text = tables.shared["texts"][index]  # [R, B, T+1]
        time = torch.arange(self.max_length, device=place.device)
        real = time <= tables.shared["lengths"][index][..., None]  # [R, B, T]: <s> and the characters as inputs, the characters and </s> as targets
        scored = real & (time >= tables.per_run["unscored"][:, None, None]) & (place < num_strings)[..., None]
        one_length = len(set(map(len, self.config.strings))) == 1
        return Batch(tokens=text[..., :-1], targets=text[..., 1:], weights=scored.float(), mask=None if one_length else real)

    def describe(self, tables: Tables, run: int) -> dict[str, Any]:
        strings, unscored = self.config.strings, int(tables.per_run["unscored"][run])
        return {
            "strings": len(strings),
            "characters": sum(map(len, strings)),
            "vocabulary": self.vocab_size,
            "unscored": unscored,
            "scored positions": sum(len(string) + 1 - unscored for string in strings),  # </s> is one of them
            "hash": hashlib.sha256("\0".join(strings).encode()).hexdigest()[:12],
            "example": strings[0],
        }
