"""Language: the next token of text. A corpus is one array of tokens, shared by every run of a fleet; a run has its own order of its documents, cut into its
own splits, and reads windows of ``length`` tokens of the stream they make, one document after the other: ``<s> tokens </s> <s> tokens </s> ...``.

A window may run over from one document to the next, of the same split: ``<s>`` marks where. With split "documents" none stands in two splits (so shares of
tokens are only near what was asked); "contiguous" cuts the corpus itself, for every seed alike. A validation corpus of its own is read in its own order.
Training reads its stream as a ring, so that no token is rarer than another: a window over the joint of a "contiguous" part has no mark there.

How an evaluation scores: windows side by side, in order, the last one filled up with weight 0. So each token but the stream's first is scored once, and what
the model sees of what stands before it is what its window has: 1 to ``length`` tokens. The mean is nats per token, of which ``<s>`` and ``</s>`` are some;
divided by ln 2 and by ``describe``'s "val bytes per token" it is bits per byte, which tokenizers can be compared by.

Splits: "train", "val", "test", those there are, and "val:64": 64 windows of it, evenly spaced (a power of two from 16 to 4,096). Not here: where text
comes from, tokenizers, encoding (``shoal.data``).

LanguageTask(LanguageConfig(corpus="python", length=256))   or   shoal data language --corpus FILE --out FILE.tsv
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from shoal import rng
from shoal.config import LanguageConfig
from shoal.config.fields import check
from shoal.contracts import Batch, Tables, Tokenizer
from shoal.data.encoded import Encoded, encoded
from shoal.data.subword import restored, stored
from shoal.tasks.stream import check_size, fingerprint, fresh, pieces, stream, write_new

SOME = tuple(2**k for k in range(4, 13))  # numbers of windows a part of a split may have
NEVER = 1 << 62  # where documents end that are not there; exact as the float that padding takes
OFFSET = 2  # what an epoch's key is folded with for its offset; its shuffle folds with 0 and 1
PIECE = 1 << 24  # tokens counted at once
WORTH_A_NOTE = 0.01  # share of a split's tokens that training has, too: most collections of text have a few short documents twice


class Ranges(NamedTuple):
    """Stretches of the array of tokens, which follow one another in a split's stream."""

    begin: np.ndarray  # int64 [D]
    length: np.ndarray  # int64 [D]


class LanguageTask:
    def __init__(self, config: LanguageConfig, memory: Mapping[str, str] | None = None) -> None:
        """``memory``: what ``memory()`` gave when a run was trained. Its tokenizer then serves, and the corpus is not looked at before it is asked for."""
        self.config, self._memory = config, memory
        self._moved: dict[str, Tensor] = {}  # device -> all tokens
        self._facts: dict[int, dict[str, Any]] = {}  # split seed -> what describe says
        shares = {"val": config.val_fraction, "test": config.test_fraction}
        self.held_out = {"val": 0.0} if config.val_corpus else {split: share for split, share in shares.items() if share}
        self.parts = ("train", *self.held_out)
        self.splits: tuple[str, ...] = (*self.parts, *(f"{part}:{n}" for part in self.parts for n in SOME))
        tokenizer = restored(memory["tokenizer"]) if memory else self.data.tokenizer
        self.tokenizer: Tokenizer = tokenizer
        self.vocab_size = self.tokenizer.vocab_size
        self.max_length = config.longest * config.length
        content = memory["hash"] if memory else self.data.fingerprint
        self.fingerprint = hashlib.sha256(f"{fingerprint(config)} {content}".encode()).hexdigest()[:12]
        self.start: tuple[int, ...] = (tokenizer.special["<s>"],)
        self.end: int | None = tokenizer.special["</s>"]

    @cached_property
    def data(self) -> Encoded:
        """ConfigError ("task.corpus") where it is not what a run was trained on."""
        data = encoded(self.config)
        check(len(data.tokens) < 2**31, "task.max_bytes", f"{len(data.tokens):,} tokens are more than a run can address, 2,147,483,647; read fewer bytes")
        if self._memory:
            then, tokenizer = self._memory["hash"], restored(self._memory["tokenizer"]).fingerprint
            told = f"{self.config.corpus} is not the text this run was trained on: its hash was {then}, and is {data.fingerprint}"
            told += f", its tokenizer's was {tokenizer}, and is {data.tokenizer.fingerprint}" if tokenizer != data.tokenizer.fingerprint else ""
            check(data.fingerprint == then, "task.corpus", f"{told}; bring the old one back, or train again (generating text needs no corpus)")
        return data

    def memory(self) -> dict[str, str]:
        """What must be kept with a run: the hash of its data, and its tokenizer."""
        return {"hash": self.data.fingerprint, "tokenizer": stored(self.data.tokenizer)}

    def setup(self, per_run: Mapping[str, Sequence[Any]], device: torch.device | str) -> Tables:
        """Shared: "tokens" int16 (of uint16) or int32 [N], which stay on disk where ``device`` is the CPU.

        Per run: "seed" int64 [R], and for each split its "tokens" int64 [R], and of its documents "edges" int64 [R, D'], where each ends in the run's own
        stream, and "places", what to add to a position of that stream to find it in the array. Shared, and always on the CPU, where the host may read it
        without a wait: "windows" int64, the most that a run has of the split.
        """
        tables: dict[str, Tensor] = {"seed": torch.tensor(per_run["split_seed"], dtype=torch.int64, device=device)}
        shared = {"tokens": self._tokens_on(str(device))}
        ranges = {seed: self._ranges(seed) for seed in dict.fromkeys(per_run["split_seed"])}
        runs = [ranges[seed] for seed in per_run["split_seed"]]
        for split in self.parts:
            edges = [torch.from_numpy(np.cumsum(run[split].length)) for run in runs]
            places = [torch.from_numpy(run[split].begin) - edge.roll(1).index_fill(0, torch.tensor([0]), 0) for run, edge in zip(runs, edges, strict=True)]
            counts = torch.stack([edge[-1] for edge in edges])
            tables[f"{split} edges"] = torch.nn.utils.rnn.pad_sequence(edges, batch_first=True, padding_value=NEVER).to(device)
            tables[f"{split} places"] = torch.nn.utils.rnn.pad_sequence(places, batch_first=True).to(device)
            tables[f"{split} tokens"] = counts.to(device)
            shared[f"{split} windows"] = self._windows(counts).max()
        return Tables(tables, shared)

    def batch(self, tables: Tables, key: Tensor, step: Tensor, size: int) -> Batch:
        """``size`` windows of the training stream, which is read as a ring: behind its end it begins again.

        Samplers. shuffled: epochs of windows side by side, in random order, each from a fresh offset, so that windows fall differently and every token is
        read once an epoch, but for a remainder shorter than a window. random: from anywhere. sequential: one after the other, for every seed alike.
        """
        check_size(size)
        count, length = tables.per_run["train tokens"][:, None], self.config.length  # [R, 1]
        place = step * size + torch.arange(size, device=key.device)  # [B]
        num_windows = count // length
        if self.config.sampler == "random":
            start = rng.randint(fresh(key, step, torch.arange(size, device=key.device)), 1, count[..., None]).squeeze(-1)  # [R, B]
        elif self.config.sampler == "sequential":
            start = place % num_windows * length
        else:
            epoch = rng.fold(rng.fold(key[:, None], place // num_windows), OFFSET)  # [R, B]
            start = stream(key, step, size, num_windows.squeeze(-1)) * length + rng.randint(epoch, 1, count[..., None]).squeeze(-1)
        position = start[..., None] + torch.arange(length + 1, device=key.device)  # [R, B, T+1]
        window = _read(tables, "train", position % count[..., None])
        return Batch(window[..., :-1], window[..., 1:], torch.ones_like(window[..., 1:], dtype=torch.float32))

    def evaluation(self, tables: Tables, split: str, rows: int) -> Iterator[Batch]:
        check(split in self.splits, "evaluate", f"language has no split {split!r} here; known: {', '.join(self.parts)}, and {self.parts[-1]}:64 of them")
        part, _, some = split.partition(":")
        count, most = tables.per_run[f"{part} tokens"][:, None], int(tables.shared[f"{part} windows"])
        num_windows, wanted = self._windows(count), min(int(some or most), most)
        for place in pieces(wanted, rows, count.device):
            window = place * num_windows.clamp(min=wanted) // wanted  # [R, B], evenly spaced, each once
            window = torch.where(place < wanted, window, num_windows)
            position = window[..., None] * self.config.length + torch.arange(self.config.length + 1, device=count.device)
            found = _read(tables, part, position.clamp(max=count[..., None] - 1))
            yield Batch(found[..., :-1], found[..., 1:], (position[..., 1:] < count[..., None]).float())

    def _windows(self, count: Tensor) -> Tensor:
        """How many windows score a stream of so many tokens, all but the first."""
        return (count - 1 + self.config.length - 1) // self.config.length

    def _tokens_on(self, device: str) -> Tensor:
        """Moved once. On the CPU the file, mapped a second time (PyTorch wants what could be written to: pages would be copied), read where it is looked at."""
        tokens = self.data.tokens
        assert isinstance(tokens, np.memmap)
        if device not in self._moved:
            mapped = np.memmap(str(tokens.filename), np.int16 if tokens.itemsize == 2 else np.int32, "c")
            self._moved[device] = torch.from_numpy(mapped).to(device)
        return self._moved[device]

    def _ranges(self, seed: int) -> dict[str, Ranges]:
        """What a run of this split seed has in each split."""
        config, starts, total = self.config, self.data.starts, len(self.data.tokens)
        if config.split == "contiguous" and not config.val_corpus:
            shares = np.cumsum([1 - sum(self.held_out.values()), *self.held_out.values()])
            edges = np.rint(np.append(0.0, shares) * total).astype(np.int64)
            ranges = {split: Ranges(edges[i : i + 1], edges[i + 1 : i + 2] - edges[i : i + 1]) for i, split in enumerate(self.parts)}
        else:
            chosen = self._documents(seed)
            ranges = {split: Ranges(starts[:-1][chosen[split]], np.diff(starts)[chosen[split]]) for split in self.parts}
        counts = {split: int(part.length.sum()) for split, part in ranges.items()}
        fix = "take a longer corpus, or lower task.length"
        check(counts["train"] > config.length, "task.corpus", f"{counts['train']:,} tokens to train on are less than a window of {config.length:,} + 1; {fix}")
        for split in self.held_out:
            fix = f"raise task.{split}_fraction, or take a longer corpus"
            check(counts[split] >= 2, f"task.{split}_fraction", f"leaves {counts[split]} tokens for {split}, which needs 2; {fix}")
        return ranges

    def _documents(self, seed: int) -> dict[str, np.ndarray]:
        """Numbers of whole documents in each split, in the order of its stream."""
        length, own = np.diff(self.data.starts), self.data.part == 1
        in_order = self.config.split == "contiguous"
        order = np.arange(len(length)) if in_order else rng.permutation(rng.key(torch.tensor(seed), "split"), len(length)).numpy()
        if self.config.val_corpus:
            return {"train": order[~own[order]], "val": np.flatnonzero(own)}
        reached, begin, chosen = np.append(0, np.cumsum(length[order])), 0, {}
        for split, share in self.held_out.items():
            end = int(np.searchsorted(reached, reached[begin] + share * reached[-1]))
            chosen[split], begin = order[begin:end], end
        chosen["train"] = order[begin:]
        there = f"the documents of this corpus, {len(length):,} in number, cannot be shared out among {', '.join(self.parts)} without cutting one"
        check(all(map(len, chosen.values())), "task.split", f"{there}; set --task.split contiguous")
        return chosen

    def describe(self, tables: Tables, run: int) -> dict[str, Any]:
        """Of the baselines only those a look at each token once can give; ``bigram_nats`` is the other."""
        seed = int(tables.per_run["seed"][run])
        if seed not in self._facts:
            self._facts[seed] = self._facts_of(seed)
        return dict(self._facts[seed])

    def _facts_of(self, seed: int) -> dict[str, Any]:
        data, lengths, ranges = self.data, self.data.tokenizer.lengths(), self._ranges(seed)
        counts = {split: _count(_joined(data.tokens, ranges[split]), self.vocab_size) for split in self.held_out}
        counts["train"] = self._counts - sum(counts.values())
        facts: dict[str, Any] = {"corpus": self.config.corpus, "hash": data.fingerprint, "tokenizer": self.config.tokenizer}
        facts |= {"tokenizer hash": data.tokenizer.fingerprint, "vocabulary": self.vocab_size}
        for split in self.parts:
            begin, end = (np.searchsorted(data.starts, edge) for edge in (ranges[split].begin, ranges[split].begin + ranges[split].length))
            facts |= {
                f"{split} documents": int((end - begin).sum()),
                f"{split} tokens": int(counts[split].sum()),
                f"{split} bytes": int(counts[split] @ lengths),
            }
        notes = []
        if "val" in self.parts:
            scored = counts["val"].copy()
            scored[data.tokens[ranges["val"].begin[0]]] -= 1  # the stream's first token
            facts["val bytes per token"] = float(scored @ lengths / scored.sum())
            facts |= {"uniform nats": math.log(self.vocab_size), "unigram nats": float(-scored @ np.log(_unigram(counts["train"])) / scored.sum())}
            learned = {"bpe": "bpe was trained on", "characters": "the vocabulary is that of"}.get(self.config.tokenizer)
            notes += [f"{learned} all of the corpus, validation included"] if learned and not self.config.val_corpus else []
        for split in self.held_out if self.config.val_corpus else ():  # a corpus has every document once
            known = self._known(ranges, split)
            facts[f"{split} documents in train"] = int(known.sum())
            share = ranges[split].length[known].sum() / counts[split].sum()
            if share >= WORTH_A_NOTE:
                notes.append(
                    f"{known.sum():,} of {len(known):,} documents of {split} stand in train, too, word for word: {share:.1%} of its tokens are no test"
                )
        if len(data.names) == 1 and self.config.split == "contiguous":
            notes.append("the corpus is a single document, cut into its splits")
        return facts | ({"notes": notes} if notes else {})

    def _known(self, ranges: dict[str, Ranges], split: str) -> np.ndarray:
        """bool [D]: which documents of a split stand in training, too, word for word."""
        lengths = np.isin(ranges["train"].length, ranges[split].length)
        trained = set(_digests(self.data.tokens, Ranges(*(values[lengths] for values in ranges["train"]))))
        return np.array([digest in trained for digest in _digests(self.data.tokens, ranges[split])])

    def bigram_nats(self, tables: Tables, run: int) -> float:
        """Nats per scored token of validation, of pairs counted in training: takes seconds for five million tokens, and memory for all of them."""
        ranges = self._ranges(int(tables.per_run["seed"][run]))
        train, val = (_joined(self.data.tokens, ranges[split]) for split in ("train", "val"))
        return bigram_nats(train, val, self.vocab_size)

    @cached_property
    def _counts(self) -> np.ndarray:
        """int64 [V]: how often each token stands in the whole array."""
        return _count(self.data.tokens, self.vocab_size)


def bigram_nats(train: np.ndarray, val: np.ndarray, vocab_size: int) -> float:
    """Mean -log p(b | a) over neighbours a b of ``val``, with p counted in ``train`` and mixed with the unigram where a was followed by many (Witten and Bell
    1991): p(b | a) = (c(ab) + d(a) p(b)) / (c(a) + d(a)), d(a) the number of different tokens seen after a.
    """
    single = _unigram(np.bincount(train, minlength=vocab_size))
    pairs, counts = np.unique(_pairs(train, vocab_size), return_counts=True)
    followed = np.bincount(train[:-1], minlength=vocab_size)
    different = np.bincount(pairs // vocab_size, minlength=vocab_size)
    asked, times = np.unique(_pairs(val, vocab_size), return_counts=True)
    place = np.searchsorted(pairs, asked).clip(max=len(pairs) - 1)
    before, seen = asked // vocab_size, np.where(pairs[place] == asked, counts[place], 0)
    probability = (seen + different[before] * single[asked % vocab_size]) / np.maximum(followed[before] + different[before], 1)
    probability = np.where(followed[before] > 0, probability, single[asked % vocab_size])
    return float(-times @ np.log(probability) / times.sum())


def _count(tokens: np.ndarray, vocab_size: int) -> np.ndarray:
    """int64 [V], with little memory."""
    return sum((np.bincount(tokens[i : i + PIECE], minlength=vocab_size) for i in range(0, len(tokens), PIECE)), np.zeros(vocab_size, np.int64))


def _pairs(tokens: np.ndarray, vocab_size: int) -> np.ndarray:
    return tokens[:-1].astype(np.int64) * vocab_size + tokens[1:]


def _unigram(counts: np.ndarray) -> np.ndarray:
    """float64 [V], with one added to every count."""
    return (counts + 1) / (counts.sum() + len(counts))


def _joined(tokens: np.ndarray, ranges: Ranges) -> np.ndarray:
    """The stream that these ranges make, read into memory."""
    plain = np.asarray(tokens)  # a memmap takes ten times as long to cut
    return np.concatenate([plain[begin : begin + length] for begin, length in zip(*map(np.ndarray.tolist, ranges), strict=True)])


def _digests(tokens: np.ndarray, ranges: Ranges) -> list[bytes]:
    """A hash of each of these stretches."""
    plain = np.asarray(tokens)
    return [hashlib.blake2b(plain[begin : begin + length].data, digest_size=16).digest() for begin, length in zip(*map(np.ndarray.tolist, ranges), strict=True)]


def _read(tables: Tables, split: str, position: Tensor) -> Tensor:
    """position int64 [R, B, T] of the runs' own streams -> their tokens, int64."""
    flat, tokens = position.flatten(1), tables.shared["tokens"]
    document = torch.searchsorted(tables.per_run[f"{split} edges"], flat, right=True)
    found = tokens[flat + tables.per_run[f"{split} places"].gather(1, document)].long().view(position.shape)
    return found & 0xFFFF if tokens.dtype == torch.int16 else found


def export(config: LanguageConfig, seed: int, path: str | Path) -> dict[str, Any]:
    """Write the documents as tab-separated ``document bytes tokens split`` (one that a contiguous split cuts has several, with "+" between). Returns
    ``describe``, and "bigram nats". A file that exists is never overwritten: ConfigError ("out").
    """
    task = LanguageTask(config)
    tables, starts = task.setup({"split_seed": [seed]}, "cpu"), task.data.starts
    split_of: list[list[str]] = [[] for _ in task.data.names]
    for split, (begin, length) in task._ranges(seed).items():
        for first, last in zip(np.searchsorted(starts, begin, side="right") - 1, np.searchsorted(starts, begin + length), strict=True):
            for document in range(first, last):
                split_of[document].append(split)
    names = (" ".join(name.encode(errors="surrogateescape").decode(errors="replace").split()) for name in task.data.names)
    columns = zip(names, task.data.sizes, np.diff(starts), split_of, strict=True)
    lines = (f"{name}\t{size}\t{count}\t{'+'.join(of)}\n" for name, size, count, of in columns)
    write_new(path, ["document\tbytes\ttokens\tsplit\n", *lines])
    return task.describe(tables, 0) | ({"bigram nats": task.bigram_nats(tables, 0)} if "val" in task.parts else {})
