"""Corpora: the same documents from every form, in a fixed order, whatever cannot be read named with its place."""

from __future__ import annotations

import csv
import gzip
import itertools
import json
import os
import random
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pyarrow import parquet

from shoal.config.fields import ConfigError
from shoal.data import corpora, installed
from shoal.data.corpora import cut, documents, passages

TEXTS = ["one\n\ntwo  ", 'drei, "vier"\r\n', "五 – ½ \U0001f600", "x" * 200_000 + " y"]


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("SHOAL_CACHE", str(path))
    return path


def texts(corpus: Path | str, **how: Any) -> list[str]:
    return [text for _, text in documents(str(corpus), **how)]


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    if path.suffix == ".gz":
        path.write_bytes(gzip.compress(lines.encode()))
    elif path.suffix == ".parquet":
        parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    elif path.suffix == ".csv":
        with path.open("w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, rows[0])
            writer.writeheader()
            writer.writerows(rows)
    elif path.suffix == ".tsv":
        path.write_text("".join("\t".join(map(str, row)) + "\n" for row in [list(rows[0]), *(list(row.values()) for row in rows)]), encoding="utf-8")
    else:
        path.write_text(lines, encoding="utf-8")
    return path


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.json.gz", "a.jsonl.gz", "a.csv", "a.parquet"])
def test_rows_of_every_form(tmp_path: Path, name: str) -> None:
    path = write(tmp_path / name, [{"id": i, "body": text} for i, text in enumerate(TEXTS)])
    assert texts(path, column="body") == TEXTS
    assert all(document.startswith(name + ":") for document, _ in documents(str(path), "body"))
    with pytest.raises(ConfigError, match=r"task.column: .*a\..* no column 'text'; there are: id, body"):
        texts(path)


def test_tsv_has_no_quotes(tmp_path: Path) -> None:
    path = write(tmp_path / "a.tsv", [{"text": '"one', "label": 0}, {"text": 'two" three', "label": 1}])
    assert texts(path) == ['"one', 'two" three']


def test_files_directories_and_globs(tmp_path: Path) -> None:
    """One document a file, by path; empty ones, hidden ones and unknown forms are no documents."""
    files = {
        "b.txt": TEXTS[0],
        "a/z.md": TEXTS[1],
        "a/b/c.py": TEXTS[2],
        "B.TXT": TEXTS[3],
        "empty.txt": "",
        ".git/x.txt": "hidden",
        "d.bin": "binary",
        ".e.txt": "no",
    }
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(text.encode())
    order = ["B.TXT", "a/b/c.py", "a/z.md", "b.txt"]
    assert list(documents(str(tmp_path))) == [(name, files[name]) for name in order]
    assert texts(tmp_path / "**" / "*.[mp]*") == [TEXTS[2], TEXTS[1]]
    (tmp_path / "packed.txt.gz").write_bytes(gzip.compress(TEXTS[1].encode()))
    assert texts(tmp_path / "packed.txt.gz") == [TEXTS[1]]
    (tmp_path / "mark.txt").write_bytes(b"\xef\xbb\xbfhello")
    assert texts(tmp_path / "mark.txt") == ["hello"]


def test_max_bytes_cuts_the_text(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", [{"text": text} for text in TEXTS])
    coded = "".join(TEXTS).encode()
    for most in (1, 7, len(TEXTS[0]) + 30, 100_000, len(coded) - 1, len(coded), len(coded) + 1):
        assert "".join(texts(path, max_bytes=most)) == coded[:most].decode(errors="ignore")
    assert texts(path, max_bytes=len((TEXTS[0] + TEXTS[1]).encode()) + 1) == TEXTS[:2], "a third of a character is no document"


@settings(max_examples=50, deadline=None)
@given(st.text(st.sampled_from("ab1 \n\t.é五"), max_size=400), st.lists(st.integers(0, 400)))
def test_pieces_do_not_depend_on_blocks(text: str, places: list[int]) -> None:
    edges = [0, *sorted(place for place in places if place <= len(text)), len(text)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(corpora, "PIECE", 20)
        patch.setattr(corpora, "LOOK_BACK", 10)
        pieces = list(cut([text]))
        assert list(cut(text[a:b] for a, b in itertools.pairwise(edges))) == pieces
    assert "".join(pieces) == text and all(0 < len(piece) <= 20 for piece in pieces)
    for left, right in itertools.pairwise(pieces):
        good = left[-1].isalnum() and right[0] in " \n"
        assert good or not any(a.isalnum() and b in " \n" for a, b in itertools.pairwise(left[10:] + right[0]))


def test_python_is_the_standard_library() -> None:
    names, found = zip(*documents("python"), strict=True)
    assert list(names) == sorted(names) and len(set(names)) == len(names) > 200
    assert dict(zip(names, found, strict=True))["json/decoder.py"] == Path(json.decoder.__file__).read_text(encoding="utf-8")
    left_out = ("test", "tests", "idlelib", "lib2to3", "turtledemo", "encodings", "pydoc_data", "site-packages")
    assert not any(part in left_out for name in names for part in name.split("/"))
    assert not any(name.startswith("_sysconfigdata") for name in names), "what differs by machine is left out"


def test_english_is_docstrings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(installed, "PACKAGES", ("tokenizers",))  # torch takes long
    monkeypatch.setattr(installed, "sources", lambda: [("a.py", tmp_path / "a.py"), ("none.py", tmp_path / "none.py"), ("later.py", tmp_path / "later.py")])
    (tmp_path / "a.py").write_text('"""Mod."""\ndef f():\n    """F\n      g\n    """\nadd_newdoc("a", ("b", """\nOf b.\nEnd\n"""), "no")\nx = """not\nthis"""')
    (tmp_path / "none.py").write_text("x = 1")
    (tmp_path / "later.py").write_text("def (: no Python yet")
    found = dict(documents("english"))
    assert found["a.py"] == "Mod.\n\nF\ng\n\nOf b.\nEnd"
    assert not {"none.py", "later.py"} & set(found)
    assert "tokenizers/__init__.py" in found and len(found["topics/lambda"]) > 100
    monkeypatch.setattr(installed, "docstrings", lambda: pytest.fail("extracted once, then kept"))
    assert dict(documents("english")) == found


@pytest.mark.slow
def test_english_in_full() -> None:
    names, found = zip(*documents("english"), strict=True)
    assert {"torch/_torch_docs.py", "numpy/_core/_add_newdocs.py", "argparse.py", "topics/lambda"} <= set(names)
    assert sum(map(len, found)) > 6_000_000


BAD = {  # file, its bytes -> what the message says
    "latin.txt": (b"abc\n" + b"x" * 2_000_000 + b"caf\xe9 au lait", r"latin.txt is not UTF-8 at byte 2000007 \(0xe9\).*iconv"),
    "ends.txt": ("x\u20ac".encode()[:-1], r"ends.txt is not UTF-8 at byte 1 \(0xe2\)"),
    "latin.jsonl": (b'{"text": "a"}\n{"text": "\xff"}', r"latin.jsonl is not UTF-8 at byte 24 \(0xff\)"),
    "latin.csv": (b"text\nok\n\xff\n", r"latin.csv is not UTF-8 at byte 8"),
    "nul.txt": (b"ab\0c", r"NUL byte at byte 2.*UTF-16"),
    "nul.csv": (b"text\na\0\n", r"NUL byte at byte 6"),
    "half.json.gz": (gzip.compress(b'{"text": "' + random.Random(0).randbytes(999).hex().encode() + b'"}')[:-300], r"not a whole gzip file"),
    "none.txt.gz": (b"plain", r"not a whole gzip file"),
    "list.json": (b'["a", "b"]', r"line 1 is not an object; .*jq"),
    "broken.jsonl": (b'{"text": "a"}\n\n{"text": ', r"broken.jsonl line 3 is no JSON"),
    "number.jsonl": (b'{"text": 3}', r"task.column: .*number.jsonl line 1: 'text' holds 3, not text"),
    "half.jsonl": (b'{"text": "a\\ud800"}', r"half.jsonl line 1: character 1 is half of a surrogate pair"),
    "wide.csv": (b"text,label\nok,1\none, two,1\n", r"wide.csv line 3: a row of 3 fields under a header of 2 \(text, label\).*quotes"),
    "short.csv": (b"text,label\nok\n", r"line 2: a row of 1 fields under a header of 2"),
    "deep.jsonl": (b"[" * 200_000, r"deep.jsonl line 1 is no JSON"),
    "digits.jsonl": (b'{"text": "a", "n": ' + b"1" * 5000 + b"}", r"digits.jsonl line 1 is no JSON .*5000 digits"),
    "open.csv": (b'text\nok\n"never closed\nmore\n', r"task.corpus: .*open.csv line 4: unexpected end of data; close every quote"),
    "twice.csv": (b"text,text\na,b\n", r"task.column: .*twice.csv has several columns 'text'; rename all but one"),
    "twice.tsv": (b"text\ttext\na\tb\n", r"task.column: .*twice.tsv has several columns 'text'"),
    "bad.parquet": (b"PAR1 no", r"cannot be read as Parquet"),
    "what.doc": (b"text", r"what.doc is of no known form \(.txt .py"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_cannot_be_read(tmp_path: Path, name: str) -> None:
    content, message = BAD[name]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ConfigError, match=message):
        texts(tmp_path / name)


def test_a_column_twice_in_parquet(tmp_path: Path) -> None:
    parquet.write_table(pyarrow.table([["a"], ["b"], ["c"]], names=["text", "text", "id"]), tmp_path / "a.parquet")
    with pytest.raises(ConfigError, match=r"task.column: .*a.parquet has several columns 'text'; rename all but one"):
        texts(tmp_path / "a.parquet")


def test_a_directory_with_what_is_no_file(tmp_path: Path) -> None:
    """A pipe would be waited for."""
    (tmp_path / "a.txt").write_text("one")
    (tmp_path / "b.txt").symlink_to(tmp_path / "missing.txt")
    (tmp_path / "c.txt").mkdir()
    os.mkfifo(tmp_path / "d.txt")
    assert texts(tmp_path) == ["one"]


def test_nothing_there(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"task.corpus: .*no file, directory or glob.*english, python"):
        texts(tmp_path / "missing.txt")
    with pytest.raises(ConfigError, match=r"no file of a known form"):
        texts(tmp_path)


def test_a_cache_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("SHOAL_CACHE", str(tmp_path / "file"))
    with pytest.raises(ConfigError, match=r"SHOAL_CACHE: cannot write"):
        texts("english")


class TestHub:
    def test_fetched_once_and_kept(self, monkeypatch: pytest.MonkeyPatch) -> None:
        asked: list[Any] = []

        def load_dataset(*what: Any, **how: Any) -> Iterator[dict[str, Any]]:
            asked.append((what, how))
            return iter({"text": f"row {i}", "url": ""} for i in range(10**9))

        monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
        assert list(documents("hub:someone/c4:en:validation", max_bytes=13)) == [("someone/c4:0", "row 0"), ("someone/c4:1", "row 1"), ("someone/c4:2", "row")]
        assert asked == [(("someone/c4", "en"), {"split": "validation", "streaming": True})]
        monkeypatch.setitem(sys.modules, "datasets", None)
        assert texts("hub:someone/c4:en:validation", max_bytes=13) == ["row 0", "row 1", "row"], "no network and no package are needed the second time"

    def test_what_can_go_wrong(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "datasets", None)
        with pytest.raises(ConfigError, match=r"pip install 'shoal\[hf\]'; .*--task.corpus english or --task.corpus python"):
            texts("hub:a/b", max_bytes=10)

        def load_dataset(name: str, *what: Any, **how: Any) -> Iterator[dict[str, Any]]:
            if name == "columns":
                return iter([{"content": "x"}])
            raise ConnectionError("Couldn't reach it")

        monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
        with pytest.raises(ConfigError, match=r"cannot read hub:a/b .*Couldn't reach it.*--task.corpus english or --task.corpus python"):
            texts("hub:a/b", max_bytes=10)
        with pytest.raises(ConfigError, match=r"task.column: hub:columns row 0 has no column 'text'; there are: content"):
            texts("hub:columns", max_bytes=10)
        with pytest.raises(ConfigError, match=r"task.max_bytes: say how much"):
            texts("hub:a/b")
        with pytest.raises(ConfigError, match=r"should read hub:NAME"):
            texts("hub:a:b:c:d", max_bytes=10)
        assert not [*(corpora.cache() / "texts").iterdir()], "nothing half written stays"

    def test_the_real_package_reads_a_local_set(self, tmp_path: Path) -> None:
        pytest.importorskip("datasets")
        write(tmp_path / "train.jsonl", [{"text": text} for text in TEXTS])
        assert texts(f"hub:{tmp_path}", max_bytes=10**9) == TEXTS


@pytest.mark.shared_data
def test_web_documents_and_poems(shared_data: Path) -> None:
    rows = [json.loads(line)["text"] for line in (shared_data / "ewt-web" / "train.jsonl").read_bytes().split(b"\n") if line]
    assert texts(shared_data / "ewt-web" / "train.jsonl") == rows
    whole = (shared_data / "tinyshakespeare" / "input.txt").read_bytes().decode()
    assert "".join(piece for _, _, piece in passages(str(shared_data / "tinyshakespeare" / "input.txt"))) == whole
    assert texts(shared_data / "sst2" / "dev.tsv", column="sentence")[0] == "one long string of cliches"
    assert len(texts(shared_data / "inaugural" / "*.txt")) == len(list((shared_data / "inaugural").glob("*.txt")))
