"""mqar: pairs, then each key once more; the right values, the law of its places, and noise that is neither key nor value."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from laws import same
from laws_training import SMALL, task_of
from scipy.stats import chisquare
from torch import Tensor

from shoal import cli
from shoal.config import AdamW, MQARConfig, RunConfig
from shoal.config.fields import ConfigError
from shoal.config.load import structure, unstructure
from shoal.contracts import Batch
from shoal.tasks import build
from shoal.train.fleet import Fleet
from shoal.train.plan import validate

PLAIN = MQARConfig(vocab_size=40, num_kv_pairs=4, input_seq_len=24, test_size=300)
KINDS = [PLAIN, replace(PLAIN, random_non_queries=False), replace(PLAIN, vocab_size=17, input_seq_len=16), replace(PLAIN, vocab_size=33, power_a=1.0)]


def training(config: MQARConfig, size: int, runs: int = 2, step: int = 0) -> Batch:
    task, tables, keys = task_of([config] * runs)
    return task.batch(tables, keys, torch.tensor(step), size)


def check_rows(config: MQARConfig, batch: Batch, num_pairs: int) -> None:
    """Row by row, from the definition."""
    half, length = config.vocab_size // 2, config.input_seq_len
    assert isinstance(batch.at, Tensor) and batch.mask is None
    for tokens, at, targets in zip(*(x.flatten(0, 1).tolist() for x in (batch.tokens, batch.at, batch.targets)), strict=True):
        keys, values, tail = tokens[: 2 * num_pairs : 2], tokens[1 : 2 * num_pairs : 2], tokens[2 * num_pairs :]
        assert len(tokens) == length and len(set(keys)) == len(set(values)) == num_pairs
        assert all(1 <= key < half for key in keys) and all(half <= value < config.vocab_size for value in values)
        table = dict(zip(keys, values, strict=True))
        asked = [place for place, token in enumerate(tokens) if place >= 2 * num_pairs and token in table]
        assert sorted(at) == asked and all(place % 2 == 0 for place in asked), "each key is asked once, in a place of its own"
        assert [table[tokens[place]] for place in at] == targets == values and [tokens[place] for place in at] == keys
        noise = [token for place, token in enumerate(tail, 2 * num_pairs) if place not in at]
        assert not set(noise) & {*keys, *values} if config.random_non_queries else set(noise) == {0}


@pytest.mark.parametrize("config", KINDS, ids=["plain", "blanks", "small", "odd"])
def test_every_row_is_what_it_should_be(config: MQARConfig) -> None:
    batch = training(config, 300)
    assert batch.tokens.shape == (2, 300, config.input_seq_len) and (batch.weights == 1).all()
    check_rows(config, batch, 4)


def likely(counts: Counter[Any], expected: Mapping[Any, float]) -> None:
    total = sum(counts.values())
    assert counts.keys() <= expected.keys() and sum(expected.values()) == pytest.approx(1)
    assert chisquare([counts[x] for x in expected], [p * total for p in expected.values()]).pvalue > 1e-4


@pytest.mark.parametrize("power", [0.01, 0.0, 0.5, 1.0, 2.0])
def test_places_follow_the_power_law(power: float) -> None:
    """The first key's place has the weights themselves, the second's those of the places still free."""
    config = replace(PLAIN, power_a=power, input_seq_len=20, num_kv_pairs=3)  # 14 tokens after the pairs: 7 places
    batch = training(config, 20_000, runs=1)
    assert isinstance(batch.at, Tensor)
    first, second, third = ((batch.at[0, :, k] - 6) // 2 for k in range(3))
    weight = [(j + 1) ** (power - 1) for j in range(7)]
    p = [w / sum(weight) for w in weight]
    likely(Counter(first.tolist()), dict(enumerate(p)))
    likely(Counter(zip(first.tolist(), second.tolist(), strict=True)), {(a, b): p[a] * p[b] / (1 - p[a]) for a in range(7) for b in range(7) if a != b})
    left = {c: sum(p[a] * p[b] / (1 - p[a]) * p[c] / (1 - p[a] - p[b]) for a in range(7) for b in range(7) if len({a, b, c}) == 3) for c in range(7)}
    likely(Counter(third.tolist()), left)


def test_distributions() -> None:
    """Keys, values and noise are uniform over what each may be; keys say nothing about values."""
    config = replace(PLAIN, vocab_size=18, num_kv_pairs=2, input_seq_len=16)
    batch = training(config, 20_000, runs=1)
    keys, values, tokens = batch.tokens[0, :, 0:4:2], batch.tokens[0, :, 1:4:2], batch.tokens[0]
    for k in range(2):
        likely(Counter(keys[:, k].tolist()), {x: 1 / 8 for x in range(1, 9)})
        likely(Counter(values[:, k].tolist()), {x: 1 / 9 for x in range(9, 18)})
    likely(Counter(zip(keys[:, 0].tolist(), values[:, 0].tolist(), strict=True)), {(a, b): 1 / 72 for a in range(1, 9) for b in range(9, 18)})
    likely(Counter(zip(*keys.T.tolist(), strict=True)), {(a, b): 1 / 56 for a in range(1, 9) for b in range(1, 9) if a != b})
    likely(Counter(zip(*values.T.tolist(), strict=True)), {(a, b): 1 / 72 for a in range(9, 18) for b in range(9, 18) if a != b})
    rank = [sum(x > other for other in {*row[:4]}) for row in tokens.tolist() for x in row[5::2]]  # odd places after the pairs are noise always
    noise = [x - below for x, below in zip((x for row in tokens.tolist() for x in row[5::2]), rank, strict=True)]
    likely(Counter(noise), {x: 1 / 14 for x in range(14)})  # its number among the 14 tokens that are free


@pytest.mark.parametrize("config", KINDS[:2], ids=["plain", "blanks"])
def test_evaluation(config: MQARConfig) -> None:
    task, tables, _ = task_of([config] * 3)
    assert task.splits == ("test", "pairs:1", "pairs:2", "pairs:3", "pairs:4", "pairs:5", "pairs:6") and task.max_length == 24
    for split, num_pairs in task.pairs.items():
        batches = list(task.evaluation(tables, split, 77))
        assert len(batches) == 4 and all(batch.targets.shape == (3, 75, num_pairs) for batch in batches)
        for batch in batches:
            check_rows(config, batch, num_pairs)
    [test], [pairs] = (list(task.evaluation(tables, split, 10**6)) for split in ("test", "pairs:4"))
    assert same(test.tokens, pairs.tokens) and not same(test.tokens[0], test.tokens[1])
    assert sum(float(batch.weights.sum()) for batch in task.evaluation(tables, "test", 7)) == 3 * 300 * 4


def test_alone_as_in_a_fleet() -> None:
    task, tables, keys = task_of([PLAIN] * 3)
    for r in range(3):
        alone = task.setup({"split_seed": [r]}, "cpu")
        pairs = [(task.batch(tables, keys, torch.tensor(s), 20), task.batch(alone, keys[r : r + 1], torch.tensor(s), 20)) for s in (0, 10**6)]
        pairs += zip(task.evaluation(tables, "pairs:2", 100), task.evaluation(alone, "pairs:2", 100), strict=True)
        for together, apart in pairs:
            assert all(same(a[r], b[0]) for a, b in zip(together, apart, strict=True) if isinstance(a, Tensor) and isinstance(b, Tensor))


def test_rows_never_repeat() -> None:
    task, tables, keys = task_of([PLAIN] * 3)
    batches = [task.batch(tables, keys, torch.tensor(step), 200) for step in (0, 1, 10**7)] + list(task.evaluation(tables, "test", 10**6))
    seen = Counter(tuple(row) for batch in batches for row in batch.tokens.flatten(0, 1).tolist())
    assert set(seen.values()) == {1} and len(seen) == 3 * (3 * 200 + 300)
    assert same(task.batch(tables, keys, torch.tensor(1), 7).tokens, batches[1].tokens[:, :7])


def test_the_size_of_the_paper() -> None:
    config = MQARConfig(num_kv_pairs=64, input_seq_len=512)
    batch = training(config, 4, runs=1)
    check_rows(config, batch, 64)
    assert build(config).vocab_size == 8192


def test_compiles() -> None:
    for config in KINDS[:2]:
        task, tables, keys = task_of([config] * 2)
        torch.compiler.reset()
        draw = torch.compile(task.batch, fullgraph=True, dynamic=False, backend="aot_eager")
        for step in (3, 4):
            got, expected = draw(tables, keys, torch.tensor(step), 5), task.batch(tables, keys, torch.tensor(step), 5)
            assert all(same(a, b) for a, b in zip(got, expected, strict=True) if isinstance(a, Tensor) and isinstance(b, Tensor))


def test_a_fleet_trains(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = RunConfig(task=PLAIN, model=replace(SMALL, positions="rotary"), optimizer=AdamW(lr=1e-2), batch_size=16, steps=30, evaluate=("test", "pairs:1"))
    validate(config)
    assert unstructure(config)["task"]["type"] == "mqar" and structure(RunConfig, unstructure(config)) == config
    fleet = Fleet.build([config])
    before = float(fleet.evaluate("test")["loss"])
    fleet.advance(30)
    assert float(fleet.evaluate("test")["loss"]) < before - 0.3, "from 40 tokens to the 20 values"
    told = fleet.record()["data"][0]
    assert told["right by chance"] == 1 / 20 and told["right by a random value of the row"] == 1 / 4
    path = tmp_path / "rows.tsv"
    assert cli.main(["data", "mqar", "--num-kv-pairs", "2", "--input-seq-len", "12", "--vocab-size", "20", "--test-size", "9", "--out", str(path)]) == 0
    header, *lines = (line.split("\t") for line in path.read_text().splitlines())
    assert header == ["sequence", "positions", "answers"] and len(lines) == 9
    for text, places, answers in lines:
        tokens = text.split()
        table = dict(zip(tokens[0:4:2], tokens[1:4:2], strict=True))
        assert [table[tokens[int(place)]] for place in places.split()] == answers.split()
    assert "pairs: 2\n" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_kv_pairs": 0}, "num_kv_pairs: must be 1 or more, not 0"),
        ({"input_seq_len": 63}, "input_seq_len: must be even, not 63"),
        ({"num_kv_pairs": 17}, "input_seq_len: 17 pairs and their queries, each with a place after it, need 68 tokens or more, not 64"),
        ({"vocab_size": 64}, "vocab_size: must be above input_seq_len, 64; 64 is too small"),
        ({"input_seq_len": 2**21}, "input_seq_len: may be at most 1,048,576 (what fits into memory), not 2,097,152"),
        ({"power_a": -0.1}, "power_a: must be a finite number of 0 or more, not -0.1"),
        ({"power_a": float("nan")}, "power_a: must be a finite number of 0 or more, not nan"),
        ({"test_size": 0}, "test_size: must be 1 or more, not 0"),
    ],
)
def test_refusals(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        MQARConfig(**fields)
    assert str(caught.value) == message
    assert MQARConfig(num_kv_pairs=16, vocab_size=65)


def test_refused_splits() -> None:
    task, tables, _ = task_of([PLAIN])
    for split in ("train", "pairs:7", "pairs:0"):
        with pytest.raises(ConfigError, match=rf"evaluate: mqar has no split '{split}'; known: test, pairs:1 to pairs:6"):
            list(task.evaluation(tables, split, 5))
