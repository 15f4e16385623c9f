"""A corpus as token ids: encoded once, piece by piece on all cores, kept on disk, mapped into memory. Windows and splits are a task's affair.

Kept under ``SHOAL_CACHE`` (default ~/.cache/shoal) by the hash of the text and the tokenizer, never by a name or a date: sources/ remembers the hash
of files that have not changed since (path, size, time), so that the text need not be read again, tokens/ has the ids. All of it may be deleted at any time.

encoded(LanguageConfig(corpus="python", tokenizer="gpt2")).tokens   # memmap uint16 [N]
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import json
import math
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from shoal.config import LanguageConfig
from shoal.config.fields import ConfigError, check
from shoal.data import subword
from shoal.data.corpora import cache_room, passages, sources
from shoal.data.subword import SPECIAL, SubwordTokenizer, TextTokenizer
from shoal.data.tokenizers import CharacterTokenizer, digest

BATCH = 64  # passages that are encoded at once: 2 M characters
TRAINED_ON = 2**26  # bytes of text a BPE is trained on at most: past that, every so many passages one is taken
FORMAT = 3  # of what is kept; another number makes all of it again


@dataclass(frozen=True)
class Encoded:
    """D documents, N tokens. Every document is ``<s>``, its tokens, ``</s>``; where one token is both, as GPT-2's, it stands once, before them."""

    tokens: np.ndarray  # memmap uint16 or uint32 [N]
    starts: np.ndarray  # int64 [D+1]: document d is tokens[starts[d] : starts[d + 1]]
    sizes: np.ndarray  # int64 [D]: bytes of UTF-8 of each document
    names: list[str]  # of the documents
    part: np.ndarray  # int8 [D]: 0 from ``corpus``, 1 from ``val_corpus``
    tokenizer: TextTokenizer
    fingerprint: str  # 12 hexadecimal digits: the hash of text and tokenizer


@dataclass(frozen=True)
class Part:
    """One of the corpora of a config."""

    field: str
    corpus: str
    column: str
    max_bytes: int

    def passages(self) -> Iterator[tuple[int, str, str]]:
        with _blaming(self.field):
            yield from passages(self.corpus, self.column, self.max_bytes)


def encoded(config: LanguageConfig) -> Encoded:
    """The tokens of ``config``'s corpora, from memory, disk, or made now. ConfigError for text that cannot be read or is shorter than a window."""
    given = [("task.corpus", config.corpus), ("task.val_corpus", config.val_corpus)]
    parts = [Part(field, corpus, config.column, config.max_bytes) for field, corpus in given if corpus]
    special = (*SPECIAL, "<mask>") if config.mask_token else SPECIAL
    texts = [_text(part) for part in parts]
    if config.tokenizer in ("characters", "bytes", "bpe"):
        definition = [config.tokenizer, config.vocab_size * (config.tokenizer == "bpe")]
    else:
        definition = [hashlib.sha256(path.read_bytes()).hexdigest() for path in subword.files(config.tokenizer)]
    key = digest([FORMAT, texts, definition, special, config.reindex])
    directory = cache_room("tokens") / key
    if not directory.exists():
        _publish(directory, parts, texts, config, special)
    found = _opened(directory)
    num_tokens = int(found.starts[np.count_nonzero(found.part == 0)])
    more = f"{config.corpus} has {num_tokens:,} tokens, and a window of {config.length:,} reads {config.length + 1:,}"
    check(num_tokens > config.length, "task.length", f"{more}; lower it or give more text")
    return found


@functools.cache
def _opened(directory: Path) -> Encoded:
    about = json.loads((directory / "about.json").read_text(encoding="utf-8"))
    return Encoded(
        tokens=np.memmap(directory / "tokens.bin", about["dtype"], "r"),
        starts=np.load(directory / "starts.npy"),
        sizes=np.load(directory / "sizes.npy"),
        part=np.load(directory / "part.npy"),
        names=about["names"],
        tokenizer=subword.restored((directory / "tokenizer.json").read_text(encoding="utf-8")),
        fingerprint=about["fingerprint"],
    )


class Digest:
    """Hashes of the documents' text and of their names, however they are cut into pieces."""

    def __init__(self) -> None:
        self.text, self.names, self.last, self.size = hashlib.sha256(), hashlib.sha256(), -1, 0

    def add(self, number: int, name: str, coded: bytes) -> None:
        if number != self.last:
            self.text.update(b"\xff")  # no UTF-8 has this byte
            self.names.update(name.encode(errors="surrogateescape") + b"\n")
        self.text.update(coded)
        self.last, self.size = number, self.size + len(coded)

    def values(self) -> dict[str, Any]:
        return {"text": self.text.hexdigest(), "names": self.names.hexdigest(), "bytes": self.size}


def _text(part: Part) -> dict[str, Any]:
    """The hashes and the size of a corpus; read only if its files are not those of the last time."""
    with _blaming(part.field):
        files = sources(part.corpus, part.column, part.max_bytes)
        stats = [(name, str(path.absolute()), (stat := path.stat()).st_size, stat.st_mtime_ns) for name, path in files]
    path = cache_room("sources") / f"{digest([FORMAT, stats, part.column, part.max_bytes])}.json"
    if path.exists():
        return json.loads(path.read_text(encoding="utf-8"))
    whole = Digest()
    for number, name, piece in part.passages():
        whole.add(number, name, piece.encode())
    check(whole.size > 0, part.field, f"{part.corpus} has no text; name another file, or english or python")
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=".")
    with os.fdopen(handle, "w", encoding="utf-8") as file:
        json.dump(whole.values(), file)
    os.replace(temporary, path)
    return whole.values()


def _publish(directory: Path, parts: list[Part], texts: list[dict[str, Any]], config: LanguageConfig, special: tuple[str, ...]) -> None:
    """Write all files of ``directory``: under another name first, so that of two processes that do the same the first wins and none reads half a file."""
    temporary = Path(tempfile.mkdtemp(dir=directory.parent, prefix="."))
    try:
        tokenizer = _tokenizer(parts, texts, config, special)
        starts, sizes, part, names, counts = _write(temporary / "tokens.bin", tokenizer, parts, texts)
        if config.reindex and isinstance(tokenizer, SubwordTokenizer):
            old, tokenizer = tokenizer, tokenizer.reindexed(np.flatnonzero(counts).tolist())
            _rewrite(temporary / "tokens.bin", old, tokenizer)
        for name, values in (("starts", np.array(starts)), ("sizes", np.array(sizes)), ("part", np.array(part, np.int8))):
            np.save(temporary / f"{name}.npy", values)
        (temporary / "tokenizer.json").write_text(subword.stored(tokenizer), encoding="utf-8")
        fingerprint = digest([[text["text"] for text in texts], tokenizer.fingerprint])
        about = {"dtype": _dtype(tokenizer).str, "fingerprint": fingerprint, "names": names}
        (temporary / "about.json").write_text(json.dumps(about), encoding="utf-8")
        try:
            temporary.rename(directory)
        except OSError:
            if not directory.exists():
                raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _tokenizer(parts: list[Part], texts: list[dict[str, Any]], config: LanguageConfig, special: tuple[str, ...]) -> TextTokenizer:
    if config.tokenizer == "characters":
        found: set[str] = set()
        for _, _, piece in itertools.chain.from_iterable(part.passages() for part in parts):
            found |= set(piece)
        return CharacterTokenizer(found, special)
    if config.tokenizer == "bpe":
        step = math.ceil(texts[0]["bytes"] / TRAINED_ON)
        return subword.trained((piece for _, _, piece in itertools.islice(parts[0].passages(), 0, None, step)), config.vocab_size, special)
    return subword.named(config.tokenizer, special)


def _write(
    path: Path, tokenizer: TextTokenizer, parts: list[Part], texts: list[dict[str, Any]]
) -> tuple[list[int], list[int], list[int], list[str], np.ndarray]:
    """Encode all text into a file. Returns starts [D+1], sizes [D], part [D], names [D], and how often each token occurs, int64 [V].

    Of documents of a corpus that are the same, word for word, the first is kept: else one could be trained on and the other validate.
    """
    starts, sizes, part, names = [0], [], [], []
    counts, dtype = np.zeros(tokenizer.vocab_size, np.int64), _dtype(tokenizer)
    begin, end = (np.array([tokenizer.special[name]], dtype).tobytes() for name in SPECIAL)
    end = b"" if end == begin else end  # twice in a row it would teach a model to end what it has only begun
    with path.open("wb") as file:
        for index, corpus in enumerate(parts):
            read, stream, seen = Digest(), corpus.passages(), set[bytes]()
            for _, pieces in itertools.groupby(_encodings(tokenizer, stream, counts), key=lambda piece: piece[0]):
                file.write(begin)
                content, size, name = hashlib.sha256(), 0, ""
                for number, name, coded, ids in pieces:
                    read.add(number, name, coded)
                    content.update(coded)
                    size += len(coded)
                    file.write(ids.astype(dtype).tobytes())
                file.write(end)
                if content.digest() in seen:
                    file.seek(starts[-1] * dtype.itemsize)
                    file.truncate()
                    continue
                seen.add(content.digest())
                starts.append(file.tell() // dtype.itemsize)
                sizes.append(size)
                part.append(index)
                names.append(name)
            check(read.values() == texts[index], corpus.field, f"{corpus.corpus} changed while it was read; start again")
    return starts, sizes, part, names, counts


def _encodings(tokenizer: TextTokenizer, stream: Iterator[tuple[int, str, str]], counts: np.ndarray) -> Iterator[tuple[int, str, bytes, np.ndarray]]:
    """Number and name of its document, text and ids of every passage, many encoded at once; ``counts`` are added to."""
    while batch := list(itertools.islice(stream, BATCH)):
        encodings = tokenizer.encode_all([piece for _, _, piece in batch])
        counts += np.bincount(np.concatenate(encodings), minlength=len(counts))
        for (number, name, piece), ids in zip(batch, encodings, strict=True):
            yield number, name, piece.encode(), ids


def _rewrite(path: Path, old: SubwordTokenizer, new: SubwordTokenizer) -> None:
    """Old ids to new ones, a piece at a time."""
    table = np.zeros(old.vocab_size, _dtype(new))
    table[new.old_ids()] = np.arange(new.vocab_size)
    changed = path.with_suffix(".new")
    with changed.open("wb") as file:
        tokens = np.memmap(path, _dtype(old), "r")
        for start in range(0, len(tokens), 2**20):
            table[tokens[start : start + 2**20]].tofile(file)
    changed.replace(path)


def _dtype(tokenizer: TextTokenizer) -> np.dtype:
    return np.dtype("<u2" if tokenizer.vocab_size <= 2**16 else "<u4")


@contextmanager
def _blaming(field: str) -> Iterator[None]:
    """What is wrong with a corpus is the fault of the field that names it."""
    try:
        yield
    except ConfigError as error:
        raise ConfigError(field if error.path == "task.corpus" else error.path, error.message) from None
