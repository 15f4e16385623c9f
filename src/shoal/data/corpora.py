"""Where text comes from: what every installation has, local files, sets of the Hugging Face hub. Always the same documents in the same order.

Text is streamed: no file is ever held whole (a row of JSON, CSV or Parquet is). Tokens are in ``encoded``; what is split how is a task's affair.
Extracted and fetched text (english, hub) is kept under ``SHOAL_CACHE`` (default ~/.cache/shoal), which may be deleted at any time.

for name, text in documents("english", max_bytes=10**6): ...
"""

from __future__ import annotations

import codecs
import csv
import glob
import gzip
import hashlib
import itertools
import json
import os
import sys
import tempfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import BinaryIO

from shoal.config.fields import ConfigError, check
from shoal.data import hub, installed

PIECE = 2**15  # characters of a passage: enough of them at once keep many cores busy, few enough that a batch stays small
LOOK_BACK = 2**12  # characters in which a place to cut is looked for
BLOCK = 2**20  # bytes read at once
FORMS = ".txt .py .md .jsonl .json .csv .tsv .parquet, all but the last also as .gz"
LOCAL = "without a network, --task.corpus english or --task.corpus python always work"


def documents(corpus: str, column: str = "text", max_bytes: int = 0) -> Iterator[tuple[str, str]]:
    """(name, text) of every document that has any text, in a fixed order; after ``max_bytes`` of UTF-8 (0 = never) the text is cut off.

    ``corpus``: "python" (this interpreter's standard library, one file a document), "english" (docstrings of torch, numpy and the standard library,
    one module a document, and Python's help topics), "hub:NAME[:CONFIG[:SPLIT]]" (package datasets; ``max_bytes`` of it are fetched once and kept),
    or a file, a directory or a glob of: .txt .py .md (one document a file), .jsonl .json .csv .tsv .parquet (one document a row, its text in ``column``;
    .tsv knows no quotes), .gz of them. ConfigError ("task.corpus", "task.column") names file and place of what cannot be read.
    """
    for (_, name), pieces in itertools.groupby(passages(corpus, column, max_bytes), key=lambda passage: passage[:2]):
        yield name, "".join(piece for _, _, piece in pieces)


def passages(corpus: str, column: str = "text", max_bytes: int = 0) -> Iterator[tuple[int, str, str]]:
    """(number of the document, its name, a piece of it of at most PIECE characters): ``documents`` that may be larger than memory."""
    left, number = max_bytes or sys.maxsize, 0
    for source, path in sources(corpus, column, max_bytes):
        for name, blocks in _reader(path)(source, path, column):
            for piece in cut(blocks):
                coded = piece.encode()
                if len(coded) >= left:
                    if piece := coded[:left].decode(errors="ignore"):
                        yield number, name, piece
                    return
                left -= len(coded)
                yield number, name, piece
            number += 1


def sources(corpus: str, column: str = "text", max_bytes: int = 0) -> list[tuple[str, Path]]:
    """(name, path) of the files a corpus is read from, in order. What is not in a file yet (english, hub) is first written to one."""
    if corpus == "python":
        return installed.sources()
    if corpus == "english":
        definition = [sys.version, *(version(package) for package in installed.PACKAGES)]
        return [("english", _kept(f"english {definition}", installed.docstrings))]
    if corpus.startswith("hub:"):
        check(max_bytes > 0, "task.max_bytes", "say how much of a hub data set to fetch, for example 100000000 (of a smaller one, all is taken)")
        return [(corpus, _kept(f"{corpus} {column} {max_bytes}", lambda: _fetched(corpus, column, max_bytes)))]
    path = Path(corpus).expanduser()
    if path.is_file():
        _reader(path)
        return [(path.name, path)]
    if path.is_dir():
        inside = installed.inside(path, lambda name: not name.startswith("."))
        found = [(name, file) for name, file in inside if _suffix(file) in READERS and file.is_file()]  # neither pipes nor broken links
        check(bool(found), "task.corpus", f"the directory {path} has no file of a known form ({FORMS})")
    else:
        found = [(Path(name).as_posix(), Path(name)) for name in glob.glob(str(path), recursive=True) if Path(name).is_file()]
        fix = "give a path, a glob, hub:NAME, or what every installation has: english, python"
        check(bool(found), "task.corpus", f"{corpus!r} is no file, directory or glob that matches any; {fix}")
        found.sort()
    return found


def cut(blocks: Iterable[str]) -> Iterator[str]:
    """The same text in pieces of at most PIECE characters, however it came in blocks.

    A cut falls after a letter or digit and before a space or line end, where no byte-level BPE joins characters, so that pieces encode to
    what the whole would; only a text with no such place in LOOK_BACK characters is cut anywhere.
    """
    rest = ""
    for block in blocks:
        rest, start = rest + block, 0
        while len(rest) - start > PIECE:
            end = start + PIECE
            places = (place for place in range(end, end - LOOK_BACK, -1) if rest[place] in " \n" and rest[place - 1].isalnum())
            end = next(places, end)
            yield rest[start:end]
            start = end
        rest = rest[start:]
    if rest:
        yield rest


def cache() -> Path:
    """The directory for what can be made again."""
    return Path(os.environ.get("SHOAL_CACHE") or "~/.cache/shoal").expanduser()


def cache_room(name: str) -> Path:
    """A directory in the cache, made if need be."""
    room = cache() / name
    try:
        room.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError("SHOAL_CACHE", f"cannot write to {room} ({error.strerror}); set this environment variable to a directory that is writable") from None
    return room


def _kept(definition: str, rows: Callable[[], Iterable[tuple[str, str]]]) -> Path:
    """The file that holds these (name, text); written if it is not there. Under another name first, so that it is never seen half written."""
    path = cache_room("texts") / f"{hashlib.sha256(definition.encode()).hexdigest()[:16]}.shoal-rows"
    if not path.exists():
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=".")
        try:
            with os.fdopen(handle, "w", encoding="utf-8", newline="\n") as file:
                file.writelines(json.dumps(row) + "\n" for row in rows())
            os.replace(temporary, path)
        finally:
            Path(temporary).unlink(missing_ok=True)
    return path


def _fetched(corpus: str, column: str, max_bytes: int) -> Iterator[tuple[str, str]]:
    name, left = hub.named(corpus, "task.corpus")[0], max_bytes
    for number, row in enumerate(hub.rows(corpus, "task.corpus", "train", LOCAL, streaming=True)):
        text = _field(row, column, f"{corpus} row {number}")
        yield f"{name}:{number}", text
        left -= len(text.encode())
        if left <= 0:
            return


def _suffix(path: Path) -> str:
    return Path(path.name.lower().removesuffix(".gz")).suffix


def _reader(path: Path) -> Callable[[str, Path, str], Iterator[tuple[str, Iterable[str]]]]:
    check(_suffix(path) in READERS, "task.corpus", f"{path} is of no known form ({FORMS}); rename or convert it")
    return READERS[_suffix(path)]


def _text(source: str, path: Path, column: str) -> Iterator[tuple[str, Iterable[str]]]:
    yield source, _decoded(path)


def _json(source: str, path: Path, column: str) -> Iterator[tuple[str, Iterable[str]]]:
    for number, line in enumerate(_lines(path), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:  # that of a number with thousands of digits is no JSONDecodeError
            raise ConfigError("task.corpus", f"{path} line {number} is no JSON ({error}); one object a line is expected") from None
        check(isinstance(row, dict), "task.corpus", f"{path} line {number} is not an object; one a line is expected (jq -c '.[]' makes them of a list)")
        yield f"{source}:{number}", [_field(row, column, f"{path} line {number}")]


def _table(source: str, path: Path, column: str) -> Iterator[tuple[str, Iterable[str]]]:
    csv.field_size_limit(2**31 - 1)  # a document may well pass the module's 128 kB
    lines = _lines(path)
    reader = csv.reader(lines, strict=True) if _suffix(path) == ".csv" else csv.reader(lines, delimiter="\t", quoting=csv.QUOTE_NONE)
    try:
        header = next(reader, [])
        _named_once(header, column, path)
        for row in reader:
            count = f"{path} line {reader.line_num}: a row of {len(row)} fields under a header of {len(header)} ({_some(header)})"
            check(len(row) in (0, len(header)), "task.corpus", f"{count}; put quotes around fields with commas or line ends")
            if row:
                yield f"{source}:{reader.line_num}", [_field(dict(zip(header, row, strict=True)), column, str(path))]
    except csv.Error as error:
        fix = "close every quote that opens a field, and double those within it"
        raise ConfigError("task.corpus", f"{path} line {reader.line_num}: {error}; {fix}") from None


def _parquet(source: str, path: Path, column: str) -> Iterator[tuple[str, Iterable[str]]]:
    import pyarrow
    from pyarrow import parquet

    try:
        with parquet.ParquetFile(path) as file:
            names = file.schema_arrow.names
            check(column in names, "task.column", f"{path} has no column {column!r}; there are: {_some(names)}")
            _named_once(names, column, path)
            number = itertools.count(1)
            for batch in file.iter_batches(batch_size=64, columns=[column]):
                for row in batch.to_pylist():
                    yield f"{source}:{next(number)}", [_field(row, column, str(path))]
    except pyarrow.ArrowException as error:
        raise ConfigError("task.corpus", f"{path} cannot be read as Parquet ({error})") from None


def _rows(source: str, path: Path, column: str) -> Iterator[tuple[str, Iterable[str]]]:
    """What ``_kept`` wrote."""
    for line in _lines(path):
        name, text = json.loads(line)
        yield name, [text]


def _field(row: dict[str, object], column: str, where: str) -> str:
    check(column in row, "task.column", f"{where} has no column {column!r}; there are: {_some(list(row))}")
    text = row[column]
    if text is None:
        return ""
    check(isinstance(text, str), "task.column", f"{where}: {column!r} holds {text!r:.40}, not text; name another column")
    assert isinstance(text, str)
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ConfigError("task.corpus", f"{where}: character {error.start} is half of a surrogate pair, no text; remove it") from None
    return text


def _named_once(names: list[str], column: str, path: Path) -> None:
    check(names.count(column) <= 1, "task.column", f"{path} has several columns {column!r}; rename all but one")


def _some(names: list[str]) -> str:
    return ", ".join(names[:12]) + (", ..." if len(names) > 12 else "")


def _blocks(path: Path, read: Callable[[BinaryIO], Iterable[bytes]]) -> Iterator[bytes]:
    """The bytes of a file, unpacked where it is .gz. It may hold no NUL."""
    offset = 0
    try:
        with gzip.open(path) if path.suffix.lower() == ".gz" else path.open("rb") as file:
            for block in read(file):  # pyright: ignore[reportArgumentType]
                if (nul := block.find(0)) >= 0:
                    fix = "it is no text, or UTF-16 (iconv -f UTF-16 -t UTF-8), or damaged (tr -d '\\000')"
                    raise ConfigError("task.corpus", f"{path} holds a NUL byte at byte {offset + nul}: {fix}")
                yield block
                offset += len(block)
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise ConfigError("task.corpus", f"{path} is not a whole gzip file ({error}); fetch it again") from None
    except OSError as error:
        raise ConfigError("task.corpus", f"cannot read {path} ({error.strerror})") from None


def _lines(path: Path) -> Iterator[str]:
    return _decoded(path, iter)  # no line ends within a character


def _decoded(path: Path, read: Callable[[BinaryIO], Iterable[bytes]] = lambda file: iter(lambda: file.read(BLOCK), b"")) -> Iterator[str]:
    decoder, offset = codecs.getincrementaldecoder("utf-8")(), 0
    for block in itertools.chain(_blocks(path, read), [b""]):
        try:
            text = decoder.decode(block, final=not block)
        except UnicodeDecodeError as error:  # its object: what was left of the block before, and this block
            raise _not_utf8(path, offset + len(block) - len(error.object) + error.start, error) from None
        if text := text if offset else text.removeprefix("\ufeff"):
            yield text
        offset += len(block)


def _not_utf8(path: Path, place: int, error: UnicodeDecodeError) -> ConfigError:
    byte = error.object[error.start]
    return ConfigError("task.corpus", f"{path} is not UTF-8 at byte {place} (0x{byte:02x}); convert it, for example: iconv -f LATIN1 -t UTF-8 {path}")


READERS = {
    ".txt": _text,
    ".py": _text,
    ".md": _text,
    ".jsonl": _json,
    ".json": _json,
    ".csv": _table,
    ".tsv": _table,
    ".parquet": _parquet,
    ".shoal-rows": _rows,
}
