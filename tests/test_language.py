"""language: windows of a run's own documents and of no other split's, each token scored once; what its facts say; a corpus that changes afterwards."""

from __future__ import annotations

import json
import math
import os
import random
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from laws_training import SMALL, finished, task_of
from scipy.stats import chisquare

from shoal import cli
from shoal.config import AdamW, BigramConfig, LanguageConfig, RunConfig, with_seed
from shoal.config.fields import ConfigError
from shoal.data.encoded import Encoded
from shoal.data.subword import ByteTokenizer
from shoal.inference import evaluate, generate
from shoal.studies import driver
from shoal.tasks import language
from shoal.tasks.language import LanguageTask, bigram_nats
from shoal.train import checkpoint, plan
from shoal.train.fleet import Fleet
from shoal.train.plan import validate

LETTERS = "abcdefghijklmnopqrstuvwxyz é漢\n"


def texts(seed: int, count: int = 40) -> list[str]:
    """Of very different lengths; any seven characters stand in them once or twice at most."""
    draw = random.Random(seed)
    return ["".join(draw.choices(LETTERS, k=draw.randint(1, 150))) for _ in range(count)]


def write(path: Path, documents: Iterable[str]) -> str:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in documents))
    return path.name


@pytest.fixture(autouse=True)
def room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SHOAL_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def corpus(room: Path) -> LanguageConfig:
    return LanguageConfig(corpus=write(room / "texts.jsonl", texts(1)), tokenizer="characters", length=16, val_fraction=0.2, test_fraction=0.15)


def stream_of(task: Any, tables: Any, split: str, r: int, rows: int = 7) -> list[int]:
    """A whole split of run r, put together again from its windows."""
    found: list[int] = []
    for batch in task.evaluation(tables, split, rows):
        for tokens, targets, weights in zip(*(x[r].tolist() for x in (batch.tokens, batch.targets, batch.weights)), strict=True):
            scored = [target for target, weight in zip(targets, weights, strict=True) if weight]
            assert weights == [1.0] * len(scored) + [0.0] * (len(weights) - len(scored))
            if scored:
                found = found or tokens[:1]
                assert tokens[: len(scored)] == [found[-1], *scored[:-1]], "a window goes on where the one before it ended"
                found += scored
    return found


def documents_of(task: Any, stream: list[int]) -> list[str]:
    (begin,), end, found = task.start, task.end, []
    while stream:
        assert stream[0] == begin
        stop = stream.index(end)
        found.append(task.tokenizer.decode(stream[1:stop]))
        stream = stream[stop + 1 :]
    return found


def test_every_run_has_whole_documents_of_its_own(corpus: LanguageConfig) -> None:
    task, tables, _ = task_of([corpus] * 4)
    total, orders = sum(len(text) + 2 for text in texts(1)), []
    assert task.splits[:3] == ("train", "val", "test") and task.max_length == 16
    for r in range(4):
        parts = {split: documents_of(task, stream_of(task, tables, split, r)) for split in ("train", "val", "test")}
        assert Counter(text for part in parts.values() for text in part) == Counter(texts(1)), "each in one split, once"
        for split, share in (("val", 0.2), ("test", 0.15)):
            sizes = [len(text) + 2 for text in parts[split]]
            assert sum(sizes) - sizes[-1] < share * total <= sum(sizes), "no document more than it takes"
        orders.append(parts["val"] + parts["test"] + parts["train"])
        assert orders[-1] != sorted(orders[-1], key=texts(1).index)
    assert len({tuple(order) for order in orders}) == 4


def test_contiguous_cuts_the_corpus_for_every_seed_alike(corpus: LanguageConfig) -> None:
    config = replace(corpus, split="contiguous", val_fraction=0.13, test_fraction=0.3)
    task, tables, _ = task_of([config] * 2)
    whole = task.data.tokens.tolist()
    a, b = round(0.57 * len(whole)), round(0.7 * len(whole))
    for r in range(2):
        assert [stream_of(task, tables, split, r) for split in ("train", "val", "test")] == [whole[:a], whole[a:b], whole[b:]]


def test_a_corpus_to_validate_on(corpus: LanguageConfig, room: Path) -> None:
    config = replace(corpus, val_corpus=write(room / "other.jsonl", texts(2, 9)), test_fraction=0)
    task, tables, _ = task_of([config] * 2)
    assert task.parts == ("train", "val")
    trained = [documents_of(task, stream_of(task, tables, "train", r)) for r in range(2)]
    assert trained[0] != trained[1] and Counter(trained[0]) == Counter(trained[1]) == Counter(texts(1))
    assert all(documents_of(task, stream_of(task, tables, "val", r)) == texts(2, 9) for r in range(2))
    in_order, tables, _ = task_of([replace(config, split="contiguous")])
    assert documents_of(in_order, stream_of(in_order, tables, "train", 0)) == texts(1)


def test_nothing_held_out(corpus: LanguageConfig) -> None:
    task, tables, _ = task_of([replace(corpus, val_fraction=0, test_fraction=0)])
    assert task.splits == ("train", *(f"train:{n}" for n in (16, 32, 64, 128, 256, 512, 1024, 2048, 4096)))
    assert Counter(documents_of(task, stream_of(task, tables, "train", 0))) == Counter(texts(1))
    assert not [name for name in task.describe(tables, 0) if "val" in name or "nats" in name]


def starts_of(task: Any, tables: Any, keys: Any, size: int, steps: Iterable[int], r: int) -> list[list[int]]:
    """Where in run r's ring of training tokens each row of each step begins. A window that stood anywhere else would not be found."""
    ring = stream_of(task, tables, "train", r)
    length = task.max_length
    places: dict[tuple[int, ...], int] = {}
    for place in range(len(ring)):
        assert places.setdefault(tuple((ring + ring[: length + 1])[place : place + length + 1]), place) == place
    found = []
    for step in steps:
        batch = task.batch(tables, keys, torch.tensor(step), size)
        assert batch.mask is None and batch.at is None and (batch.weights == 1).all() and batch.tokens.shape == (3, size, length)
        found.append([places[(tokens[0], *targets)] for tokens, targets in zip(batch.tokens[r].tolist(), batch.targets[r].tolist(), strict=True)])
        assert batch.tokens[r, :, 1:].equal(batch.targets[r, :, :-1])
    return found


def test_shuffled_reads_every_token_once_an_epoch(corpus: LanguageConfig) -> None:
    task, tables, keys = task_of([corpus] * 3)
    for r in range(3):
        count = len(stream_of(task, tables, "train", r))
        num_windows, offsets = count // 16, []
        starts = [place for step in starts_of(task, tables, keys, 5, range(num_windows), r) for place in step]
        for epoch in range(5):
            here = starts[epoch * num_windows : (epoch + 1) * num_windows]
            read = Counter((start + t) % count for start in here for t in range(16))
            assert set(read.values()) == {1} and len(read) == count - count % 16
            assert here != sorted(here)
            offsets.append(min(start for start in here if (start - 16) % count not in here))  # the first after the remainder
        assert len(set(offsets)) > 1 and len(set(starts[:num_windows]) & set(starts[num_windows : 2 * num_windows])) < num_windows / 2


def test_random_and_sequential(corpus: LanguageConfig) -> None:
    task, tables, keys = task_of([replace(corpus, sampler="random")] * 3)
    count = len(stream_of(task, tables, "train", 1))
    steps = starts_of(task, tables, keys, 500, range(0, 200, 5), 1)
    assert len({tuple(step) for step in steps}) == 40
    places = Counter(place for step in steps for place in step)
    assert chisquare([places[place] for place in range(count)]).pvalue > 1e-4
    task, tables, keys = task_of([replace(corpus, sampler="sequential")] * 3)
    for step, starts in zip((0, 1, 90), starts_of(task, tables, keys, 7, (0, 1, 90), 1), strict=True):
        assert starts == [(step * 7 + row) % (count // 16) * 16 for row in range(7)]


@pytest.mark.parametrize("number", [16, 32, 64, 4096])
def test_some_windows_evenly_spaced(corpus: LanguageConfig, number: int) -> None:
    """In a fleet whose runs have different numbers of them, some fewer than asked for."""
    task, tables, _ = task_of([replace(corpus, length=11)] * 6)
    for r in range(6):
        (whole,), some = task.evaluation(tables, "val", 10**6), list(task.evaluation(tables, f"val:{number}", 5))
        there = [row for row in range(whole.tokens.shape[1]) if whole.weights[r, row].any()]
        chosen = there if len(there) <= number else [i * len(there) // number for i in range(number)]
        got = [(t, y, w) for batch in some for t, y, w in zip(*(x[r].tolist() for x in batch[:3]), strict=True) if any(w)]
        assert got == [tuple(x[r, row].tolist() for x in whole[:3]) for row in chosen]


def test_ids_of_every_width(corpus: LanguageConfig, room: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Above 32,767, where int16 would be negative, and above 65,535."""
    for dtype, high in ((np.uint16, 2**16), (np.uint32, 2**17)):
        ids = np.random.default_rng(0).integers(0, high, 300).astype(dtype)
        ids.tofile(room / "ids.bin")
        tokens = np.memmap(room / "ids.bin", dtype, "r")
        made = Encoded(tokens, np.array([0, 100, 300]), np.array([9, 9]), ["a", "b"], np.zeros(2, np.int8), ByteTokenizer(), "0" * 12)
        monkeypatch.setattr(language, "encoded", lambda _, made=made: made)
        task, tables, keys = task_of([replace(corpus, split="contiguous", test_fraction=0)])
        assert stream_of(task, tables, "train", 0) + stream_of(task, tables, "val", 0) == ids.tolist()
        assert set(task.batch(tables, keys, torch.tensor(0), 9).tokens.flatten().tolist()) <= set(ids.tolist())


def test_facts(corpus: LanguageConfig) -> None:
    """Counts, bytes and baselines from the texts themselves."""
    task, tables, _ = task_of([corpus] * 3)
    for r in range(3):
        told = task.describe(tables, r)
        streams = {split: stream_of(task, tables, split, r) for split in ("train", "val", "test")}
        for split, stream in streams.items():
            documents = documents_of(task, stream)
            assert told[f"{split} documents"] == len(documents) and told[f"{split} tokens"] == len(stream)
            assert told[f"{split} bytes"] == sum(len(text.encode()) for text in documents)
        scored = streams["val"][1:]
        assert told["val bytes per token"] == pytest.approx(told["val bytes"] / len(scored))
        counts = Counter(streams["train"])
        singles = [(counts[x] + 1) / (len(streams["train"]) + task.vocab_size) for x in range(task.vocab_size)]
        assert told["unigram nats"] == pytest.approx(sum(-math.log(singles[x]) for x in scored) / len(scored))
        assert told["uniform nats"] == math.log(len(LETTERS) + 2) and told["vocabulary"] == len(LETTERS) + 2
        assert told["hash"] == task.data.fingerprint and len(told["tokenizer hash"]) == 12
        pairs = Counter(zip(streams["train"], streams["train"][1:], strict=False))
        before, kinds = Counter(streams["train"][:-1]), Counter(a for a, _ in pairs)
        nats = [
            -math.log((pairs[a, b] + kinds[a] * singles[b]) / (before[a] + kinds[a]) if before[a] else singles[b])
            for a, b in zip(streams["val"], scored, strict=False)
        ]
        assert task.bigram_nats(tables, r) == pytest.approx(sum(nats) / len(nats))
    assert task.describe(tables, 0)["notes"] == ["the vocabulary is that of all of the corpus, validation included"]


def test_the_bigram_baseline_is_a_distribution() -> None:
    """Over what may follow, also what was never followed, and never seen."""
    train = np.array([0, 1, 0, 2, 0, 1, 3], np.uint16)
    for a in range(5):
        assert sum(math.exp(-bigram_nats(train, np.array([a, b], np.uint16), 5)) for b in range(5)) == pytest.approx(1)


def test_bits_per_byte_do_not_depend_on_the_tokenizer_where_nothing_is_learned(room: Path) -> None:
    """Bytes that cut contiguous parts within a document count as well."""
    config = LanguageConfig(corpus=write(room / "a.jsonl", ["abcé" * 100]), tokenizer="bytes", length=16, split="contiguous", val_fraction=0.25)
    task, tables, _ = task_of([config])
    told = task.describe(tables, 0)
    assert told["val tokens"] == round(0.25 * 502) and told["val bytes"] == told["val tokens"] - 1 == told["val bytes per token"] * (told["val tokens"] - 1) + 1
    assert told["notes"] == ["the corpus is a single document, cut into its splits"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"length": 4000}, "task.length: texts.jsonl has 3,[0-9]{3} tokens, and a window of 4,000 reads 4,001"),
        ({"length": 2400}, "task.corpus: [12],[0-9]{3} tokens to train on are less than a window of 2,400 [+] 1; take a longer corpus, or lower task.length"),
        ({"split": "contiguous", "val_fraction": 1e-9}, "task.val_fraction: leaves 0 tokens for val, which needs 2; raise task.val_fraction"),
        ({"corpus": "one.jsonl"}, "task.split: the documents of this corpus, 1 in number, cannot be shared out among train, val, test .*; set --task.split"),
        ({"corpus": "two.jsonl"}, "task.split: the documents of this corpus, 2 in number, cannot"),
        ({"corpus": "two.jsonl", "test_fraction": 0.0, "val_fraction": 0.9}, "task.split: .*, 2 in number, cannot be shared out among train, val w"),
    ],
)
def test_refusals(corpus: LanguageConfig, room: Path, changes: dict[str, Any], message: str) -> None:
    write(room / "one.jsonl", ["a" * 300])
    write(room / "two.jsonl", ["a" * 300, "b" * 300])
    with pytest.raises(ConfigError, match=message):
        task_of([replace(corpus, **changes)])


def test_refused_settings(corpus: LanguageConfig) -> None:
    config = RunConfig(task=replace(corpus, test_fraction=0), model=SMALL, evaluate=("train:64", "val"))
    validate(replace(config, batch_size=8))
    for changes, message in (
        ({"batch_size": 0}, "batch_size: 0 is the whole training table, and this task has none"),
        ({"evaluate": ("test",)}, "evaluate: this task has no split 'test'; it has train, val, .*; raise task.test_fraction to have one"),
        ({"evaluate": ("val:100",)}, "evaluate: this task has no split 'val:100'"),
    ):
        with pytest.raises(ConfigError, match=message):
            validate(replace(config, **changes))
    task, tables, _ = task_of([config.task])
    with pytest.raises(ConfigError, match="evaluate: language has no split 'test' here; known: train, val, and val:64"):
        list(task.evaluation(tables, "test", 5))


def test_a_table_of_pairs_too_large(corpus: LanguageConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    run = RunConfig(task=corpus, model=BigramConfig(), batch_size=8, evaluate=("val",))
    monkeypatch.setattr(plan, "LARGEST_TABLE", len(LETTERS) + 2)
    validate(run)
    monkeypatch.setattr(plan, "LARGEST_TABLE", len(LETTERS) + 1)
    with pytest.raises(ConfigError, match=r"model.type: a table of pairs has the square of the vocabulary, 32; .*set task.reindex to true"):
        validate(run)


def test_the_table_of_documents(corpus: LanguageConfig, room: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = ["data", "language", "--corpus", corpus.corpus, "--tokenizer", "characters", "--length", "16", "--val-fraction", "0.2", "--seed", "1"]
    assert cli.main([*line, "--out", "table.tsv"]) == 0
    header, *rows = (row.split("\t") for row in (room / "table.tsv").read_text().splitlines())
    assert header == ["document", "bytes", "tokens", "split"] and len(rows) == 40
    assert [(int(size), int(count)) for _, size, count, _ in rows] == [(len(text.encode()), len(text) + 2) for text in texts(1)]
    task, tables, _ = task_of([replace(corpus, test_fraction=0)] * 2)
    val = documents_of(task, stream_of(task, tables, "val", 1))
    assert sorted(texts(1)[i] for i, row in enumerate(rows) if row[3] == "val") == sorted(val) and {row[3] for row in rows} == {"train", "val"}
    out = capsys.readouterr().out
    assert f"val documents: {len(val)}\n" in out and f"bigram nats: {task.bigram_nats(tables, 1)}\n" in out and "\nnote: the vocabulary is" in out
    assert cli.main([*line, "--out", "table.tsv"]) == 2 and "table.tsv exists already" in capsys.readouterr().err
    assert cli.main([*line, "--split", "contiguous", "--out", "cut.tsv"]) == 0
    splits = [row.split("\t")[3] for row in (room / "cut.tsv").read_text().splitlines()[1:]]
    assert splits == sorted(splits) and splits.count("train+val") <= 1 and Counter(splits).keys() >= {"train", "val"}


def test_names_that_are_no_text(room: Path) -> None:
    for name in (b"a\xff.txt", b"b.txt"):
        Path(os.fsdecode(os.fsencode(room / "notes") + b"/" + name)).parent.mkdir(exist_ok=True)
        Path(os.fsdecode(os.fsencode(room / "notes") + b"/" + name)).write_text(name.decode(errors="replace") * 30)
    assert cli.main(["data", "language", "--corpus", "notes", "--tokenizer", "bytes", "--length", "16", "--val-fraction", "0.4", "--out", "table.tsv"]) == 0
    names = [line.split("\t")[0] for line in (room / "table.tsv").read_text(encoding="utf-8").splitlines()]
    assert names == ["document", "a\ufffd.txt", "b.txt"]


def test_documents_on_both_sides(corpus: LanguageConfig, room: Path) -> None:
    """Validation that was trained on is counted, and not silent where it is more than a little."""

    def told(**changes: Any) -> tuple[int | None, list[str]]:
        task, tables, _ = task_of([replace(corpus, tokenizer="bytes", test_fraction=0.0, **changes)])
        facts = task.describe(tables, 0)
        return facts.get("val documents in train"), facts.get("notes", [])

    some = texts(1)[3:8] + texts(2)[:20]
    sizes = [len(text.encode()) + 2 for text in some]
    assert told() == (None, []) and told(val_corpus=write(room / "new.jsonl", texts(2))) == (0, [])
    all_of_it = "40 of 40 documents of val stand in train, too, word for word: 100.0% of its tokens are no test"
    assert told(val_corpus=corpus.corpus) == (40, [all_of_it])
    count, notes = told(val_corpus=write(room / "some.jsonl", some))
    assert count == 5 and notes[0].startswith("5 of 25") and f": {sum(sizes[:5]) / sum(sizes):.1%} of its tokens" in notes[0]
    assert told(val_corpus=write(room / "few.jsonl", [*texts(2), *texts(3), min(texts(1), key=len)])) == (1, [])
    twice = write(room / "twice.jsonl", [text for text in texts(1) for _ in range(3)])
    task, tables, _ = task_of([replace(corpus, tokenizer="bytes", test_fraction=0.0, corpus=twice)])
    facts = task.describe(tables, 0)
    assert facts["train documents"] + facts["val documents"] == len(texts(1)), "a document that stands there three times is split once"


LINES = ("{} went out.", "{} came in.", "{} went out and came in.")
SONG = [line.format(who) for who in ("We", "They", "All", "Some", "The boats", "The men") for line in LINES]


@pytest.fixture
def trained(room: Path) -> RunConfig:
    """A run in ``out``, of a small model that knows its song a little."""
    task = LanguageConfig(corpus=write(room / "song.jsonl", SONG), tokenizer="bpe", vocab_size=300, length=32, val_fraction=0.2)
    model = replace(SMALL, num_layers=1, positions="rotary")
    config = RunConfig(
        task=task, model=model, optimizer=AdamW(lr=1e-2), batch_size=8, steps=60, evaluate_every=30, evaluate=("train:16", "val"), snapshots=(30,)
    )
    driver.train(config, "out", device="cpu")
    return config


def test_training_and_writing(trained: RunConfig, capsys: pytest.CaptureFixture[str]) -> None:
    run = driver.load("out")
    told = json.loads(next(Path("out/fleets").glob("*/fleet.json")).read_text())["data"][0]
    assert evaluate(run, "val")["loss"] < told["unigram nats"] < told["uniform nats"] == math.log(run.task.vocab_size)
    assert cli.main(["generate", "out", "--prompt", "We went"]) == 0
    text = capsys.readouterr().out
    assert text == generate(run, "We went") + "\n" and set(text) <= set("\n".join(SONG)) and len(text) > 5
    (run.task.end,) = run.task.start  # as in GPT-2's vocabulary: what begins a text does not end it
    assert generate(run, "We went").startswith(text[:-1])
    assert len({generate(run, "We", max_tokens=9, temperature=1.0, seed=seed) for seed in range(9)}) > 1


def changed() -> None:
    write(Path("song.jsonl"), [*SONG[1:], "Another line, with other words altogether: quite long, so that its pairs are many pairs. " * 9])


def gone() -> None:
    Path("song.jsonl").unlink()


@pytest.mark.parametrize("happen", [changed, gone])
def test_a_corpus_that_changed(trained: RunConfig, happen: Callable[[], None]) -> None:
    """A run writes what it wrote before, from its own tokenizer; what needs the text says that it is another."""
    before = driver.load("out")
    old, text, early = before.task.data.fingerprint, generate(before, "We went"), generate(before.at(30), "We went")  # pyright: ignore[reportAttributeAccessIssue]
    happen()
    after = driver.load("out")
    assert generate(after, "We went") == text and generate(after.at(30), "We went") == early and after.task.fingerprint == before.task.fingerprint
    fleet = next(Path("out/fleets").glob("*/checkpoint"))
    if happen is gone:
        with pytest.raises(ConfigError, match=r"task.corpus"):
            evaluate(after, "val")
        return
    new = LanguageTask(trained.task).data  # pyright: ignore[reportArgumentType]
    message = f"task.corpus: song.jsonl is not the text this run was trained on: its hash was {old}, and is {new.fingerprint}, its tokenizer's was "
    for use in (lambda: evaluate(after, "val"), lambda: checkpoint.load([trained], fleet, "cpu")):
        with pytest.raises(ConfigError, match=message):
            use()
    with pytest.raises(ConfigError, match=f'hash of text and tokenizer: "{old}" -> "{new.fingerprint}"'):
        driver.train(trained, "out", device="cpu")


def test_a_fleet_of_seeds_resumes(corpus: LanguageConfig, room: Path) -> None:
    config = RunConfig(task=corpus, model=SMALL, batch_size=4, steps=20, evaluate_every=5, log_every=1, evaluate=("val", "test:16"))
    runs = [with_seed(config, s) for s in range(3)]
    whole, _ = finished(Fleet.build(runs))
    part = Fleet.build(runs)
    part.advance(11)
    checkpoint.save(part, room / "saved", {})
    resumed, _ = finished(checkpoint.load(runs, room / "saved", "cpu")[0])
    assert resumed.flat.equal(whole.flat) and float(whole.flat.std(0).max()) > 0
    alone, _ = finished(Fleet.build(runs[2:]))
    torch.testing.assert_close(alone.flat[0], whole.flat[2], rtol=1e-3, atol=1e-5)
