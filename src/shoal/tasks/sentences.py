"""Sentences: which class is a sentence of? An encoder's own tokens, padded on the right, one scored position whose target is the class.

Batches are of sentences of about one length, so that little is padding. The training sentences stand by length, the longest first, and are cut into steps;
steps that pad to the same length make a strip, and an epoch takes every step once, in an order that is the same for every run. Within a strip each run has
an order of its own in each epoch, by its order seed. So a batch's length at a step is known without looking at the data (``length_at``), the same for all
runs of a fleet and for a run alone; every sentence is there once an epoch; and all batches are full, but one of the shortest strip, filled up with weight 0.

Which sentences are held out does not depend on the split seed: they are files of their own, or carved off by a hash of their text. Not here: reading,
labels (``shoal.data.sentences``), the network (``shoal.models.encoder``).

SentencesTask(SentencesConfig(train="train.tsv", val="dev.tsv", encoder="minilm"))
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from shoal import rng
from shoal.config import SentencesConfig
from shoal.config.fields import ConfigError, check
from shoal.contracts import Batch, Tables, Tokenizer
from shoal.data import encoders, sentences
from shoal.tasks.stream import fingerprint, pieces

MULTIPLE = 8  # lengths are padded to one of it: tensor cores want so, and each is a program of its own
CUT = "train", "val", "test"


class SentencesTask:
    def __init__(self, config: SentencesConfig) -> None:
        self.config = config
        self.data = sentences.read(config)
        self.encoded = _encoded(config, self.data.fingerprint)
        tokenizer = Vocabulary(encoders.tokenizer(config.encoder, "task.encoder"))
        self.tokenizer: Tokenizer = tokenizer
        self.vocab_size = tokenizer.vocab_size
        self.max_length = max(split.tokens.shape[1] for split in self.encoded.values())
        self.splits: tuple[str, ...] = CUT
        tokens = hashlib.sha256(self.encoded["train"].tokens.tobytes()).hexdigest()
        self.fingerprint = hashlib.sha256(f"{fingerprint(config)} {self.data.fingerprint} {tokens}".encode()).hexdigest()[:12]
        self.start: tuple[int, ...] = ()
        self.end: int | None = None
        self._slots: dict[tuple[int, int], list[int]] = {}  # (steps of an epoch, epoch) -> which each is, of the last asked for

    @property
    def num_classes(self) -> int:
        return len(self.data.classes)

    def texts(self, split: str) -> list[str]:
        """The sentences in the order of its evaluation: the longest first."""
        return [self.data.texts[split][row] for row in self.encoded[split].order]

    def steps_per_epoch(self, size: int) -> int:
        return -(-len(self.encoded["train"].order) // size) if size else 1

    def length_at(self, step: int, size: int) -> int:
        """What the batches of this step are padded to, in every run."""
        num_steps = self.steps_per_epoch(size)
        epoch, place = divmod(step, num_steps)
        if (num_steps, epoch) not in self._slots:
            self._slots = {(num_steps, epoch): rng.shuffled(rng.fold(_order_key(), epoch), torch.arange(num_steps), num_steps).tolist()}
        return self.encoded["train"].padded(self._slots[num_steps, epoch][place] * size)

    def setup(self, per_run: Mapping[str, Sequence[Any]], device: torch.device | str) -> Tables:
        """Shared, for each split, the longest sentence first: "tokens" int32 [N, T], "lengths" int64 [N], "padded" int64 [N], "labels" int64 [N]; and
        "steps", the key of the order of an epoch's steps. Per run: nothing but "seed", the split seed, so that there is something."""
        shared = {"steps": _order_key().to(device)}
        for split, found in self.encoded.items():
            labels = np.array(self.data.labels[split])[found.order]
            columns = {"tokens": found.tokens, "lengths": found.lengths, "padded": found.padded_lengths, "labels": labels}
            shared |= {f"{split} {name}": torch.from_numpy(column).to(device) for name, column in columns.items()}
        return Tables({"seed": torch.tensor(per_run["split_seed"], dtype=torch.int64, device=device)}, shared)

    def batch(self, tables: Tables, key: Tensor, step: Tensor, size: int) -> Batch:
        """The batch of this step, padded to the longest sentence there is: ``cut(batch, length_at(step, size))`` loses nothing. 0 = all sentences, in order."""
        count = len(tables.shared["train lengths"])
        if size == 0:
            return self._rows(tables, "train", torch.arange(count, device=key.device).expand(len(key), -1))
        num_steps = self.steps_per_epoch(size)
        epoch, place = step // num_steps, step % num_steps
        padded = tables.shared["train padded"][::size]  # [steps of an epoch]
        slot = rng.shuffled(rng.fold(tables.shared["steps"], epoch), place, num_steps)
        strip = padded == padded.index_select(0, slot.view(1))  # the steps of its length, which stand together
        first = strip.long().argmax()
        many = torch.minimum(strip.sum() * size, count - first * size)  # sentences of the strip
        index = (slot - first) * size + torch.arange(size, device=key.device)  # [B]
        inside = rng.shuffled(rng.fold(rng.fold(key, epoch), first)[:, None], index.clamp(max=many - 1), many)  # [R, B]
        batch = self._rows(tables, "train", first * size + inside)
        return Batch(batch.tokens, batch.targets, batch.weights * (index < many).unsqueeze(-1), batch.mask, batch.at)

    def evaluation(self, tables: Tables, split: str, rows: int) -> Iterator[Batch]:
        """By length, each piece as long as its longest sentence needs."""
        check(split in self.splits, "evaluate", f"sentences have no split {split!r}; known: {', '.join(self.splits)}")
        lengths, seed = tables.shared[f"{split} lengths"], tables.per_run["seed"]
        start = 0
        for place in pieces(len(lengths), rows, seed.device):
            yield cut(self._rows(tables, split, place.expand(len(seed), -1)), self.encoded[split].padded(start))
            start += len(place)

    def _rows(self, tables: Tables, split: str, place: Tensor) -> Batch:
        """place int64 [R, B] of sentences; places past the last one have weight 0."""
        tokens, lengths, labels = (tables.shared[f"{split} {name}"] for name in ("tokens", "lengths", "labels"))
        row = place.clamp(max=len(lengths) - 1)
        mask = torch.arange(tokens.shape[1], device=place.device) < lengths[row].unsqueeze(-1)
        return Batch(tokens[row].long(), labels[row].unsqueeze(-1), (place < len(lengths)).float().unsqueeze(-1), mask, slice(0, 1))

    def describe(self, tables: Tables, run: int) -> dict[str, Any]:
        facts: dict[str, Any] = {"encoder": self.config.encoder, "vocabulary": self.vocab_size, "classes": self.data.classes, "hash": self.data.fingerprint}
        for split, found in self.encoded.items():
            whole = found.whole
            facts |= {
                f"{split} sentences": len(whole),
                f"{split} by class": self.data.counts(split),
                f"{split} tokens": {name: float(value) for name, value in zip(("least", "median", "mean", "most"), _summary(whole), strict=True)},
                f"{split} lengths": np.bincount(whole // MULTIPLE).tolist(),  # sentences of 0 to 7 tokens, 8 to 15, ... before truncation
                f"{split} share truncated": float((whole > self.config.max_length).mean()),
            }
        return facts | {"padded to": self.max_length, "notes": self.data.notes}


def cut(batch: Batch, length: int) -> Batch:
    """Its first ``length`` places, the others being padding."""
    assert batch.mask is not None
    return Batch(batch.tokens[..., :length], batch.targets, batch.weights, batch.mask[..., :length], batch.at)


def numbered(tables: Tables) -> tuple[Tables, list[tuple[Tensor, Tensor]]]:
    """The tables with each sentence's number in place of its tokens, and the sentences in the order of their numbers: of each split tokens [N, T] and mask."""
    shared, read, count = dict(tables.shared), [], 0
    for split in CUT:
        tokens, lengths = tables.shared[f"{split} tokens"], tables.shared[f"{split} lengths"]
        read.append((tokens.long(), torch.arange(tokens.shape[1], device=tokens.device) < lengths.unsqueeze(-1)))
        shared[f"{split} tokens"] = torch.arange(count, count + len(tokens), dtype=torch.int32, device=tokens.device).unsqueeze(-1)
        count += len(tokens)
    return Tables(tables.per_run, shared), read


def _order_key() -> Tensor:
    """Of the order of an epoch's steps, for every run alike."""
    return rng.key(torch.tensor(0), "steps by length")


def _summary(lengths: np.ndarray) -> list[float]:
    return [lengths.min(), np.median(lengths), lengths.mean(), lengths.max()]


class Encoded:
    """The sentences of a split as tokens, the longest first (of equally long ones the first first)."""

    def __init__(self, rows: list[list[int]], whole: np.ndarray, max_length: int, filler: int) -> None:
        """rows: tokens of each, truncated; whole int64 [N]: lengths before that."""
        lengths = np.array([len(row) for row in rows])
        self.order = np.argsort(-lengths, kind="stable")  # int64 [N], places in the data
        self.lengths, self.whole = lengths[self.order], whole[self.order]
        self.padded_lengths = np.minimum(-(-self.lengths // MULTIPLE) * MULTIPLE, max_length)
        self.tokens = np.full((len(rows), self.padded_lengths[0]), filler, np.int32)
        for place, row in enumerate(self.order):
            self.tokens[place, : lengths[row]] = rows[row]

    def padded(self, place: int) -> int:
        """What a batch is padded to whose longest sentence stands there."""
        return int(self.padded_lengths[place])


@functools.lru_cache(maxsize=8)
def _encoded(config: SentencesConfig, changed: str) -> dict[str, Encoded]:
    """Split -> tokens. ``changed``: the hash of the texts."""
    tokenizer, found = encoders.tokenizer(config.encoder, "task.encoder"), {}
    for split, texts in sentences.read(config).texts.items():
        whole = [len(ids) for ids in tokenizer(texts, verbose=False)["input_ids"]]
        rows = tokenizer(texts, truncation=True, max_length=config.max_length)["input_ids"]
        found[split] = Encoded(rows, np.array(whole), config.max_length, tokenizer.pad_token_id or 0)
    return found


class Vocabulary:
    """The encoder's tokenizer, as everywhere in shoal: without its marks, and text it does not know is an error."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer, self.vocab_size = tokenizer, len(tokenizer)

    def encode(self, text: str) -> list[int]:
        tokens = self._tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        if self._tokenizer.unk_token_id in tokens:
            raise ConfigError("text", f"holds something unknown to this encoder's tokenizer, {text!r}")
        return tokens

    def decode(self, tokens: Sequence[int]) -> str:
        return self._tokenizer.decode(tokens, skip_special_tokens=True)
