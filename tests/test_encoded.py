"""Encoded corpora: what encoding document by document gives, made once, known again by content, never held in memory."""

from __future__ import annotations

import gzip
import json
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from shoal.config import LanguageConfig
from shoal.config.fields import ConfigError
from shoal.data import corpora, subword
from shoal.data import encoded as module
from shoal.data.corpora import documents
from shoal.data.encoded import Encoded, encoded
from shoal.data.subword import SubwordTokenizer

RUNS = [{"tokenizer": "characters"}, {"tokenizer": "bytes"}, {"tokenizer": "bpe", "vocab_size": 500}, {"tokenizer": "bpe", "vocab_size": 900, "reindex": True}]


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("SHOAL_CACHE", str(path))
    return path


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    """Ten documents of random words, one of them of many pieces."""
    draw = random.Random(7)
    words = ["".join(draw.choices("abcdeé五 \n_", k=draw.randint(1, 6))) for _ in range(300)]
    rows = [{"text": " ".join(draw.choices(words, k=40_000 if i == 3 else draw.randint(1, 200)))} for i in range(10)]
    path = tmp_path / "corpus.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def make(corpus: Path | str, **fields: Any) -> Encoded:
    return encoded(LanguageConfig(**({"corpus": str(corpus), "length": 8, "tokenizer": "bytes"} | fields)))


def assert_same(a: Encoded, b: Encoded) -> None:
    assert a.fingerprint == b.fingerprint and a.tokenizer.fingerprint == b.tokenizer.fingerprint
    for name in ("tokens", "starts", "sizes", "part"):
        assert np.array_equal(getattr(a, name), getattr(b, name)), name


def test_of_equal_documents_the_first_is_kept(tmp_path: Path, corpus: Path) -> None:
    lines = corpus.read_text(encoding="utf-8").splitlines()
    again = tmp_path / "again.jsonl"
    again.write_text("\n".join([lines[0], lines[0], *lines[1:4], lines[3], lines[1], *lines[4:], lines[0]]) + "\n", encoding="utf-8")
    once, twice = make(corpus), make(again)
    for name in ("tokens", "starts", "sizes", "part"):
        assert np.array_equal(getattr(once, name), getattr(twice, name)), name
    assert len(twice.names) == len(lines) and once.fingerprint != twice.fingerprint


@pytest.mark.parametrize("fields", RUNS, ids=lambda fields: "-".join(map(str, fields.values())))
def test_every_document_between_its_special_tokens(corpus: Path, fields: dict[str, Any]) -> None:
    found = make(corpus, mask_token=True, **fields)
    begin, end, mask = (found.tokenizer.special[name] for name in ("<s>", "</s>", "<mask>"))
    pairs = list(documents(str(corpus)))
    assert found.names == [name for name, _ in pairs] and found.tokens.dtype == np.uint16
    assert found.starts[0] == 0 and found.starts[-1] == len(found.tokens)
    for d, (_, text) in enumerate(pairs):
        tokens = found.tokens[found.starts[d] : found.starts[d + 1]].tolist()
        assert tokens == [begin, *found.tokenizer.encode(text), end]
        assert found.tokenizer.decode(tokens) == text
        assert found.sizes[d] == len(text.encode()) == found.tokenizer.lengths()[tokens].sum()
    assert mask not in found.tokens and found.tokens.max() < found.tokenizer.vocab_size
    assert (found.part == 0).all() and len(found.part) == 10


def test_reindexed_tokens_all_occur(corpus: Path) -> None:
    whole, small = (make(corpus, tokenizer="bpe", vocab_size=900, reindex=reindex) for reindex in (False, True))
    assert isinstance(small.tokenizer, SubwordTokenizer)
    assert np.array_equal(small.tokenizer.old_ids()[small.tokens], whole.tokens)
    unseen = set(range(small.tokenizer.vocab_size)) - set(np.unique(small.tokens).tolist())
    assert small.tokenizer.vocab_size < whole.tokenizer.vocab_size and (small.tokenizer.lengths()[list(unseen)] == 1).all()
    assert small.fingerprint != whole.fingerprint


def test_wide_ids(corpus: Path, tmp_path: Path) -> None:
    base = make(corpus, tokenizer="bpe", vocab_size=400).tokenizer
    assert isinstance(base, SubwordTokenizer)
    vocab = base.model["model"]["vocab"]
    moved = {token: 70_000 + i if i % 2 else i for token, i in vocab.items()}
    (tmp_path / "tokenizer.json").write_text(json.dumps({**base.model, "model": {**base.model["model"], "vocab": moved}}))
    wide = make(corpus, tokenizer=str(tmp_path / "tokenizer.json"))
    narrow = make(corpus, tokenizer=str(tmp_path / "tokenizer.json"), reindex=True)
    assert (wide.tokens.dtype, narrow.tokens.dtype) == (np.uint32, np.uint16) and wide.tokens.max() > 70_000
    assert isinstance(narrow.tokenizer, SubwordTokenizer) and np.array_equal(narrow.tokenizer.old_ids()[narrow.tokens], wide.tokens)


def test_made_once(corpus: Path, own_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = make(corpus, tokenizer="bpe", vocab_size=300)
    assert make(corpus, tokenizer="bpe", vocab_size=300, val_fraction=0.3, length=9) is first, "the fields of the task are not the data's"
    module._opened.cache_clear()
    with monkeypatch.context() as patch:
        patch.setattr(module, "passages", lambda *_: pytest.fail("the text is not read again"))
        patch.setattr(subword, "trained", lambda *_: pytest.fail("nor is the tokenizer trained"))
        again = make(corpus, tokenizer="bpe", vocab_size=300)
        assert again is not first and isinstance(again.tokens, np.memmap)
        assert_same(again, first)
        os.utime(corpus, ns=(1, 1))
        with pytest.raises(pytest.fail.Exception, match="not read again"):
            make(corpus, tokenizer="bpe", vocab_size=300)
    assert make(corpus, tokenizer="bpe", vocab_size=300) is again, "read again, and found to be what it was"
    corpus.write_text(corpus.read_text(encoding="utf-8") + '{"text": "more"}', encoding="utf-8")
    assert make(corpus, tokenizer="bpe", vocab_size=300).names[-1] == "corpus.jsonl:11"
    assert not [path for room in own_cache.iterdir() for path in room.iterdir() if path.name.startswith(".")], "nothing temporary stays"


def test_the_fingerprint_is_of_the_content(corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = make(corpus)
    packed = tmp_path / "other place" / "packed.jsonl.gz"
    packed.parent.mkdir()
    packed.write_bytes(gzip.compress(corpus.read_bytes()))
    monkeypatch.setenv("SHOAL_CACHE", str(tmp_path / "another cache"))
    again = make(packed, max_bytes=10**9)
    assert_same(again, first)
    assert again.names[0] == "packed.jsonl.gz:1" and first.names[0] == "corpus.jsonl:1"
    others = [make(packed, tokenizer="characters"), make(packed, mask_token=True), make(packed, max_bytes=1000), make(packed, val_corpus=str(corpus))]
    assert len({other.fingerprint for other in [first, *others]}) == 5
    one, two = tmp_path / "one", tmp_path / "two"
    for directory, parts in ((one, ("ab", "c")), (two, ("a", "bc"))):
        directory.mkdir()
        for i, text in enumerate(parts):
            (directory / f"{i}.txt").write_text(text * 20)
    assert make(one).fingerprint != make(two).fingerprint, "where documents end is content"


def test_known_fingerprint(tmp_path: Path) -> None:
    """The same on every machine and for good: runs are known by it."""
    (tmp_path / "a.txt").write_bytes("hello, wörld\n".encode())
    assert make(tmp_path / "a.txt").fingerprint == "38ff341811fb"
    assert make(tmp_path / "a.txt", tokenizer="bpe", vocab_size=260).fingerprint == "0d615187f609"


def test_validation_from_elsewhere(corpus: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.txt"
    other.write_text("Quite other text, with ω")
    for tokenizer in ("characters", "bpe"):
        found = make(corpus, val_corpus=str(other), tokenizer=tokenizer, vocab_size=300)
        assert found.part.tolist() == [0] * 10 + [1] and found.names[-1] == "other.txt"
        assert found.tokenizer.decode(found.tokens[found.starts[10] :].tolist()) == "Quite other text, with ω"
    alone = make(corpus, tokenizer="bpe", vocab_size=300)
    assert found.tokenizer.fingerprint == alone.tokenizer.fingerprint, "BPE is trained on the corpus alone"


def test_bad_text(corpus: Path, tmp_path: Path) -> None:
    empty, latin = tmp_path / "empty.txt", tmp_path / "latin.txt"
    empty.touch()
    latin.write_bytes(b"caf\xe9" * 100)
    for tokenizer in ("characters", "bytes", "bpe"):
        with pytest.raises(ConfigError, match=r"^task.corpus: .*empty.txt has no text"):
            make(empty, tokenizer=tokenizer)
    with pytest.raises(ConfigError, match=r"^task.val_corpus: .*empty.txt has no text"):
        make(corpus, val_corpus=str(empty))
    with pytest.raises(ConfigError, match=r"^task.corpus: .*latin.txt is not UTF-8 at byte 3"):
        make(latin)
    with pytest.raises(ConfigError, match=r"^task.val_corpus: .*latin.txt is not UTF-8 at byte 3"):
        make(corpus, val_corpus=str(latin))
    with pytest.raises(ConfigError, match=r"^task.val_corpus: .*missing.txt' is no file"):
        make(corpus, val_corpus=str(tmp_path / "missing.txt"))
    with pytest.raises(ConfigError, match=r"^task.column: .*no column 'body'; there are: text"):
        make(corpus, column="body")
    short = tmp_path / "short.txt"
    short.write_text("abc")
    with pytest.raises(ConfigError, match=r"^task.length: .*short.txt has 5 tokens, and a window of 8 reads 9"):
        make(short)
    assert len(make(short, length=4).tokens) == 5
    with pytest.raises(ConfigError, match=r"task.tokenizer: no tokenizer 'gtp2'"):
        make(corpus, tokenizer="gtp2")


def test_text_that_changes_while_it_is_read(corpus: Path, own_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def write(*args: Any) -> Any:
        corpus.write_text('{"text": "other text"}')
        return writing(*args)

    writing = module._write
    monkeypatch.setattr(module, "_write", write)
    with pytest.raises(ConfigError, match="changed while it was read"):
        make(corpus)
    assert not [*(own_cache / "tokens").iterdir()]


def test_two_processes_at_once(corpus: Path, own_cache: Path) -> None:
    program = f"""
from shoal.config import LanguageConfig
from shoal.data.encoded import encoded
found = encoded(LanguageConfig(corpus={str(corpus)!r}, tokenizer="bpe", vocab_size=800))
print(found.fingerprint, len(found.tokens), int(found.tokens.sum()))
"""
    processes = [subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True) for _ in range(2)]
    told = {process.communicate(timeout=120)[0] for process in processes}
    assert all(process.returncode == 0 for process in processes) and len(told) == 1
    assert len([*(own_cache / "tokens").iterdir()]) == 1


def test_another_process_was_first(corpus: Path, own_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = make(corpus)
    (made,) = (own_cache / "tokens").iterdir()
    shutil.move(made, own_cache / "aside")
    module._opened.cache_clear()
    writing = module._write

    def write(*args: Any) -> Any:
        done = writing(*args)
        shutil.move(own_cache / "aside", made)
        return done

    monkeypatch.setattr(module, "_write", write)
    assert_same(make(corpus), found)
    assert [*(own_cache / "tokens").iterdir()] == [made]


def test_trained_on_a_sample(corpus: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    training = subword.trained

    def trained(texts: Any, *rest: Any) -> Any:
        kept = list(texts)
        seen.append(sum(len(text.encode()) for text in kept))
        return training(kept, *rest)

    monkeypatch.setattr(subword, "trained", trained)
    monkeypatch.setattr(corpora, "PIECE", 500)
    whole = make(corpus, tokenizer="bpe", vocab_size=300).sizes.sum()
    monkeypatch.setattr(module, "TRAINED_ON", 50_000)
    monkeypatch.setattr(module, "FORMAT", 0)
    make(corpus, tokenizer="bpe", vocab_size=300)
    assert seen[0] == whole > 150_000 and 0.5 * 50_000 < seen[1] < 1.5 * 50_000


@pytest.mark.slow
@pytest.mark.parametrize("line", [80, 10**9], ids=["lines", "one line"])
def test_memory_stays_small(tmp_path: Path, line: int) -> None:
    """30 MB of text: nothing that grows with it is held (a process with shoal, numpy and a small text is the measure)."""
    draw = random.Random(0)
    words = [draw.randbytes(draw.randint(1, 3)).hex() for _ in range(5000)]
    peaks = []
    for size in (1_000_000, 30_000_000):
        path = tmp_path / f"{size}.txt"
        with path.open("w") as file:
            while file.tell() < size:
                text = " ".join(draw.choices(words, k=10_000)) + " "
                file.write("\n".join(text[i : i + line] for i in range(0, len(text), line)))
        program = f"""
import resource
from shoal.config import LanguageConfig
from shoal.data.encoded import encoded
found = encoded(LanguageConfig(corpus={str(path)!r}, tokenizer="bpe", vocab_size=1000, reindex=True))
assert found.sizes.sum() >= {size}
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""
        done = subprocess.run([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True, check=True)
        peaks.append(int(done.stdout) / 1000)
    assert peaks[1] - peaks[0] < 60, f"{peaks} MB"
