"""Text to token ids and back, for the closed vocabularies of the small tasks: characters, or words between spaces.

Special tokens (begin, end) have ids but no spelling: no text encodes to them and decoding leaves them out. Subword tokenizers are not here.

CharacterTokenizer("hello", special=("<s>", "</s>")).encode("hole")   # [1, 3, 2, 0]
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence

from shoal.config.fields import check


class CharacterTokenizer:
    """One token per character. Ids: the distinct characters in sorted order, then ``special``, whose ids are in ``self.special``."""

    def __init__(self, characters: Iterable[str], special: Sequence[str] = ()) -> None:
        self.characters = "".join(sorted(set(characters)))
        self.ids = {character: i for i, character in enumerate(self.characters)}
        self.special = {name: len(self.ids) + i for i, name in enumerate(special)}
        self.vocab_size = len(self.ids) + len(self.special)

    def encode(self, text: str) -> list[int]:
        """ConfigError ("prompt") for a character that is not in the vocabulary."""
        return _look_up(text, self.ids, "character")

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
