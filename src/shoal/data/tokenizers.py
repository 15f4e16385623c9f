"""Text to token ids and back, for the closed vocabularies of the small tasks: characters, or words between spaces.

Special tokens (begin, end) have ids but no spelling: no text encodes to them and decoding leaves them out. Subword tokenizers are not here.

CharacterTokenizer("hello", special=("<s>", "</s>")).encode("hole")   # [1, 3, 2, 0]
"""

from __future__ import annotations

import functools
import hashlib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from shoal.config.fields import ConfigError, check


class CharacterTokenizer:
    """One token per character. Ids: the distinct characters in sorted order, then ``special``, whose ids are in ``self.special``."""

    def __init__(self, characters: Iterable[str], special: Sequence[str] = ()) -> None:
        self.characters = "".join(sorted(set(characters)))
        self.ids = {character: i for i, character in enumerate(self.characters)}
        self.special = {name: len(self.ids) + i for i, name in enumerate(special)}
        self.vocab_size = len(self.ids) + len(self.special)

    @functools.cached_property
    def fingerprint(self) -> str:
        return digest(self.definition())

    def definition(self) -> dict[str, Any]:
        return {"kind": "characters", "characters": self.characters, "special": [*self.special]}

    def lengths(self) -> np.ndarray:
        """int64 [V]: bytes of UTF-8 each token stands for."""
        return np.array([len(character.encode()) for character in self.characters] + [0] * len(self.special))

    def encode(self, text: str) -> list[int]:
        """ConfigError ("prompt") for a character that is not in the vocabulary."""
        return _look_up(text, self.ids, "character")

    def encode_all(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Each int64 [its characters]; of characters that are in the vocabulary."""
        known = _codes(self.characters)
        return [np.searchsorted(known, _codes(text)) for text in texts]

    def decode(self, tokens: Sequence[int]) -> str:
        return "".join(self.characters[token] for token in tokens if token < len(self.characters))


class WordTokenizer:
    """One token per word: of a text split at white space, or with ``spaced`` False of one written without gaps (the longest word that fits is taken).

    Ids: the distinct words in the order given, then ``special``, whose ids are in ``self.special``.
    """

    def __init__(self, words: Iterable[str], special: Sequence[str] = (), spaced: bool = True) -> None:
        self.words, self.spaced = tuple(dict.fromkeys(words)), spaced
        self.ids = {word: i for i, word in enumerate(self.words)}
        self.special = {name: len(self.ids) + i for i, name in enumerate(special)}
        self.vocab_size = len(self.ids) + len(self.special)
        longest_first = sorted(self.words, key=len, reverse=True)
        self.piece = re.compile(r"\S+" if spaced else "|".join([*map(re.escape, longest_first), "(?s:.)"]))

    def encode(self, text: str) -> list[int]:
        """ConfigError ("prompt") for a word that is not in the vocabulary."""
        return _look_up(self.piece.findall(text), self.ids, "word" if self.spaced else "character")

    def decode(self, tokens: Sequence[int]) -> str:
        return (" " if self.spaced else "").join(self.words[token] for token in tokens if token < len(self.words))


def _look_up(pieces: Sequence[str], ids: Mapping[str, int], kind: str) -> list[int]:
    unknown = [repr(piece) for piece in dict.fromkeys(pieces) if piece not in ids]
    check(not unknown, "prompt", f"unknown {kind} {shortened(unknown)}; known: {shortened(list(map(repr, ids) if kind == 'character' else ids))}")
    return [ids[piece] for piece in pieces]


def shortened(names: Sequence[str]) -> str:
    """All names, or the first and last few of more than forty."""
    return ", ".join(names if len(names) <= 40 else [*names[:5], "...", *names[-5:]])


def _codes(text: str) -> np.ndarray:
    return np.frombuffer(text.encode("utf-32-le"), np.uint32)


def whole(text: str) -> str:
    """The text itself. ConfigError ("prompt") for what has no UTF-8: half of a surrogate pair."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ConfigError("prompt", f"character {error.start} ({text[error.start]!r}) is half of a surrogate pair, no text; remove it") from None
    return text


def digest(definition: Any) -> str:
    """12 hexadecimal digits: the hash of JSON values."""
    return hashlib.sha256(json.dumps(definition, sort_keys=True).encode()).hexdigest()[:12]
