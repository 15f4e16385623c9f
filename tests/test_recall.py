"""recall: every sequence is what the definition says, counts are those of its distributions, runs differ only in what they were given."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from functools import reduce
from pathlib import Path
from typing import Any

import pytest
import torch
from laws import same
from laws_training import SMALL, task_of
from scipy.stats import chisquare
from torch import Tensor

from shoal import cli, rng
from shoal.config import AdamW, ModuleConfig, RecallConfig, RunConfig, with_seed, with_values
from shoal.config.fields import ConfigError
from shoal.config.load import structure, unstructure
from shoal.contracts import Batch
from shoal.inference import evaluate, generate
from shoal.studies import driver
from shoal.tasks import build, export
from shoal.train.fleet import Fleet
from shoal.train.objectives import add, cross_entropy, means
from shoal.train.plan import plan, validate

PLAIN = RecallConfig(num_tokens=6, length=9)
KINDS = [PLAIN, replace(PLAIN, value_excludes_query=True), replace(PLAIN, train_lengths="uniform")]
FLEET = ((1, 1), (6, 1), (3, 4), (2, 7))  # queries and delay of each run; 7 is the longest delay of 9 tokens
RUN = RunConfig(task=PLAIN, model=replace(SMALL, positions="rotary"), batch_size=16, steps=4, log_every=1, evaluate_every=2, evaluate=("test", "test:distinct"))


def fleet(config: RecallConfig) -> list[RecallConfig]:
    return [replace(config, num_queries=m, delay=d) for m, d in FLEET]


def rows(batch: Batch, r: int) -> Iterator[tuple[list[int], int]]:
    """Run r's rows that are scored: the sequence up to the query, and the answer."""
    runs, count, time = batch.tokens.shape
    at = batch.at if isinstance(batch.at, Tensor) else torch.arange(time)[batch.at or slice(None)].expand(runs, count, -1)
    assert at.shape == batch.targets.shape == batch.weights.shape == (runs, count, 1) and batch.mask is None
    for tokens, place, target, weight in zip(
        batch.tokens[r].tolist(), at[r, :, 0].tolist(), batch.targets[r, :, 0].tolist(), batch.weights[r, :, 0], strict=True
    ):
        if weight > 0:
            yield tokens[: place + 1], target


def solve(sequence: list[int], delay: int) -> int:
    """What stands ``delay`` places after the first token that is the last one."""
    return sequence[sequence.index(sequence[-1]) + delay]


def training(configs: list[RecallConfig], size: int, step: int = 0) -> Batch:
    task, tables, keys = task_of(configs)
    return task.batch(tables, keys, torch.tensor(step), size)


def uniform(values: list[int], over: range) -> None:
    """They are all of ``over``, and as often as each other."""
    counts = Counter(values)
    assert counts.keys() == set(over)
    assert len(over) == 1 or chisquare([counts[x] for x in over]).pvalue > 1e-4


@pytest.mark.parametrize("config", KINDS, ids=["plain", "value_excludes_query", "train_lengths"])
def test_every_row_is_what_it_should_be(config: RecallConfig) -> None:
    """The last token is q; it stands at i before, and v at i + delay; else q is nowhere, unless v is q."""
    batch = training(fleet(config), 2000)
    for r, (num_queries, delay) in enumerate(FLEET):
        lengths = Counter()
        for sequence, value in rows(batch, r):
            query = sequence[-1]
            lengths[len(sequence)] += 1
            assert query < num_queries and solve(sequence, delay) == value
            assert sequence.index(query) + delay <= len(sequence) - 2, "the answer is not under the query"
            assert sequence.count(query) == 2 + (value == query)
            assert value != query or not config.value_excludes_query
        if config.train_lengths == "fixed":
            assert lengths == {9: 2000}
        else:
            assert set(lengths) == set(range(delay + 2, 10))
    assert (batch.weights == 1).all()


@pytest.mark.parametrize("config", KINDS, ids=["plain", "value_excludes_query", "train_lengths"])
def test_distributions(config: RecallConfig) -> None:
    batch = training(fleet(config), 20_000)
    for r, (num_queries, delay) in enumerate(FLEET):
        found = list(rows(batch, r))
        uniform([s[-1] for s, _ in found], range(num_queries))
        uniform([len(s) for s, _ in found], range(delay + 2 if config.train_lengths == "uniform" else 9, 10))
        for n in {len(s) for s, _ in found}:
            uniform([s.index(s[-1]) for s, _ in found if len(s) == n], range(n - 1 - delay))
        shifts = [(v - s[-1]) % 6 for s, v in found]  # the answer, as seen from the query
        uniform(shifts, range(config.value_excludes_query, 6))
        others = [(x - s[-1]) % 6 for s, _ in found for t, x in enumerate(s) if t not in (len(s) - 1, s.index(s[-1]), s.index(s[-1]) + delay)]
        if others:
            uniform(others, range(1, 6))
        if num_queries > 1:  # query and answer know nothing of each other, nor of the place
            pairs = Counter((s[-1], v) for s, v in found if v != s[-1])
            assert len(pairs) == num_queries * 5 and chisquare(list(pairs.values())).pvalue > 1e-4


def test_neighbours_are_independent() -> None:
    """Two tokens beside each other, in noise: all pairs alike."""
    tokens = training([replace(PLAIN, num_tokens=4, length=30)], 4000).tokens[0]
    pairs = [(a - 1) * 3 + b - 1 for row in tokens.tolist() for a, b in [row[4:6]] if row.index(0) > 6]
    uniform(pairs, range(9))


@pytest.mark.parametrize("config", KINDS, ids=["plain", "value_excludes_query", "train_lengths"])
def test_alone_as_in_a_fleet(config: RecallConfig) -> None:
    """Bit for bit, in training and in every split."""
    task, tables, keys = task_of(fleet(config))
    for r, one in enumerate(fleet(config)):
        alone_task = build(one)
        alone = alone_task.setup({"num_queries": [one.num_queries], "delay": [one.delay], "split_seed": [r]}, "cpu")
        pairs = [(task.batch(tables, keys, torch.tensor(s), 20), alone_task.batch(alone, keys[r : r + 1], torch.tensor(s), 20)) for s in (0, 1, 10**6)]
        for split in ("test", "length:3", "length:10:distinct", "length:27"):
            pairs += zip(task.evaluation(tables, split, 700), alone_task.evaluation(alone, split, 700), strict=True)
        for together, apart in pairs:
            for a, b in zip(together, apart, strict=True):
                assert same(a[r], b[0]) if isinstance(a, Tensor) and isinstance(b, Tensor) else a == b


def test_rows_never_repeat() -> None:
    """Steps, rows, runs and test rows have nothing in common."""
    config = replace(PLAIN, num_tokens=100, length=20)
    task, tables, keys = task_of([config] * 3)
    batches = [task.batch(tables, keys, torch.tensor(step), 200) for step in (0, 1, 2, 10**7)] + list(task.evaluation(tables, "test", 10**6))
    seen = Counter(tuple(row) for batch in batches for row in batch.tokens.flatten(0, 1).tolist())
    assert set(seen.values()) == {1} and len(seen) == 3 * (4 * 200 + 2000)
    # the first rows of a larger batch are those of a smaller one
    assert same(task.batch(tables, keys, torch.tensor(1), 7).tokens, batches[1].tokens[:, :7])


def test_every_length_can_be_solved() -> None:
    """From the shortest to three times the training length; a run has no rows where its delay does not fit, and all of them elsewhere."""
    config = replace(PLAIN, test_size=150)
    task, tables, _ = task_of(fleet(config))
    assert task.max_length == 27 and len(task.splits) == 2 * 26 and list(task.lengths.values()) == [9, *range(3, 28)]
    for split, n in task.lengths.items():
        for only in ("", ":distinct"):
            batches = list(task.evaluation(tables, split + only, 64))
            assert all(batch.tokens.shape == (4, 50, n) and batch.at == slice(-1, None) for batch in batches) and len(batches) == 3
            for r, (_, delay) in enumerate(FLEET):
                found = [row for batch in batches for row in rows(batch, r)]
                assert all(solve(sequence, delay) == value for sequence, value in found)
                assert not only or all(sequence[-1] != value for sequence, value in found)
                assert (0 < len(found) < 150 if only else len(found) == 150) if delay + 2 <= n else not found


def test_distinct_is_a_part_of_the_same_rows() -> None:
    task, tables, _ = task_of([PLAIN, replace(PLAIN, num_queries=6)])
    [whole], [part], [same_length] = (list(task.evaluation(tables, split, 10**6)) for split in ("test", "test:distinct", "length:9"))
    assert same(whole.tokens, part.tokens) and same(whole.tokens, same_length.tokens) and not same(*whole.tokens)
    assert (part.weights == (whole.targets != whole.tokens[..., -1:])).all() and 0.75 < part.weights.mean() < 0.9  # 5 of 6
    other = task.setup({"num_queries": [1, 6], "delay": [1, 1], "split_seed": [7, 1]}, "cpu")
    [again] = task.evaluation(other, "test", 10**6)
    assert same(again.tokens[1], whole.tokens[1]) and not same(again.tokens[0], whole.tokens[0]), "every seed has test rows of its own"


def test_compiles() -> None:
    """One graph, and one for all steps."""
    task, tables, keys = task_of(fleet(KINDS[-1]))
    torch.compiler.reset()
    draw = torch.compile(task.batch, fullgraph=True, dynamic=False, backend="aot_eager")
    for step in (3, 4):
        got, expected = draw(tables, keys, torch.tensor(step), 5), task.batch(tables, keys, torch.tensor(step), 5)
        assert all(same(a, b) if isinstance(a, Tensor) and isinstance(b, Tensor) else a is b is None for a, b in zip(got, expected, strict=True))


def test_description() -> None:
    """Counts, and what is right without looking: from the rows themselves."""
    config = replace(PLAIN, num_queries=2, test_size=3000)
    task, tables, _ = task_of([replace(config, num_queries=1), config])
    told = task.describe(tables, 1)
    [batch] = task.evaluation(tables, "test", 3000)
    found = list(rows(batch, 1))
    assert {name: told[name] for name in ("tokens", "queries", "delay", "training length", "test lengths", "test sequences of each")} == {
        "tokens": 6, "queries": 2, "delay": 1, "training length": 9, "test lengths": "3 to 27", "test sequences of each": 3000,
    }  # fmt: skip
    assert told["example"] == f"{' '.join(map(str, found[0][0]))} -> {found[0][1]}"
    assert told["right by chance"] == 1 / 6
    assert told["answers that are the query"] == pytest.approx(sum(v == s[-1] for s, v in found) / 3000)
    assert told["right by a random token of the sequence"] == pytest.approx(sum(s[:-1].count(v) / 8 for s, v in found) / 3000)
    commonest = [[t for t in set(s[:-1]) if s[:-1].count(t) == max(map(s[:-1].count, s[:-1]))] for s, _ in found]
    assert told["right by the commonest token"] == pytest.approx(sum((v in top) / len(top) for top, (_, v) in zip(commonest, found, strict=True)) / 3000)
    assert told["right by the token before the query"] == pytest.approx(sum(s[-2] == v for s, v in found) / 3000)
    assert task.describe(tables, 0)["test hash"] != told["test hash"] == build(config).describe(tables, 1)["test hash"]
    assert build(replace(PLAIN, train_lengths="uniform", delay=3)).describe(tables, 0)["training length"] == "3 to 9", "the tables', not the config's"


def test_a_fleet_learns_it() -> None:
    """One fleet of different delays and numbers of queries; what it measures is what the trained runs measure."""
    runs = [with_seed(with_values(RUN, {"task.delay": d, "task.num_queries": m}), s) for s, (m, d) in enumerate(FLEET)]
    assert plan(runs) == [runs]
    for run in runs:
        validate(run)
    together = Fleet.build(runs)
    table = together.advance(10)
    assert not together.summary["dead"] and table["test/accuracy"].shape == table["test:distinct/accuracy"].shape
    for r in range(len(runs)):
        one = together.one(r)
        for split in ("test", "length:12:distinct"):
            assert evaluate(one, split)["accuracy"] == pytest.approx(float(together.evaluate(split)["accuracy"][r]))
    solo = Fleet.build(runs[1:2])
    solo.advance(10)
    torch.testing.assert_close(solo.flat[0], together.flat[1], rtol=1e-4, atol=1e-6)
    assert together.evaluate("length:5")["accuracy"].isnan().tolist() == [False, False, True, True]
    assert len(generate(together.one(0), "3 1 4 0 5 2 0", max_tokens=1)) == 1


def test_it_can_be_learned() -> None:
    """The task can be learned: with three tokens the answer is the one in the middle."""
    run = with_values(RUN, {"task.length": 3, "task.num_queries": 6, "steps": 60, "optimizer": AdamW(lr=1e-2), "batch_size": 64, "evaluate_every": 60})
    trained = Fleet.build([run])
    trained.advance(60)
    assert float(trained.evaluate("test")["accuracy"]) > 0.99 and float(trained.evaluate("length:3:distinct")["accuracy"]) > 0.99


def test_yaml_and_splits() -> None:
    config = replace(RUN, task=replace(PLAIN, delay=3, train_lengths="uniform"))
    assert unstructure(config)["task"]["type"] == "recall" and structure(RunConfig, unstructure(config)) == config


def test_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "rows.tsv"
    assert cli.main(["data", "recall", "--num-tokens", "5", "--delay", "2", "--test-size", "40", "--seed", "3", "--out", str(path)]) == 0
    said = dict(line.split(": ", 1) for line in capsys.readouterr().out.splitlines())
    header, *lines = (line.split("\t") for line in path.read_text().splitlines())
    assert header == ["sequence", "positions", "answers"] and len(lines) == 40 and {line[1] for line in lines} == {"31"}
    assert all(solve(list(map(int, text.split())), 2) == int(answer) for text, _, answer in lines)
    assert said["example"] == f"{lines[0][0]} -> {lines[0][2]}" and said["queries"] == "1"
    with pytest.raises(ConfigError, match=r"out: .*rows.tsv exists already"):
        export(RecallConfig(), 0, path)


# --- refusals


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_tokens": 1}, "num_tokens: recall needs 2 tokens or more, not 1"),
        ({"num_queries": 0}, "num_queries: must lie between 1 and the 16 tokens, not 0"),
        ({"num_queries": 17}, "num_queries: must lie between 1 and the 16 tokens, not 17"),
        ({"delay": 0}, "delay: with 32 tokens, the query one of them, it may be 1 to 30, not 0; or raise length"),
        ({"delay": 31}, "delay: with 32 tokens, the query one of them, it may be 1 to 30, not 31; or raise length"),
        ({"length": 2}, "length: must be 3 (q, its answer, the query) to 1,048,576 (what fits into memory), not 2"),
        ({"length": 10**7}, "length: must be 3 (q, its answer, the query) to 1,048,576 (what fits into memory), not 10,000,000"),
        ({"length": 10**6}, "longest: must be 1 to 1 (what fits into memory at length 1,000,000), not 3"),
        ({"longest": 0}, "longest: must be 1 to 32,768 (what fits into memory at length 32), not 0"),
        ({"test_size": 0}, "test_size: must be 1 or more, not 0"),
    ],
)
def test_refusals(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        RecallConfig(**fields)
    assert str(caught.value) == message
    assert RecallConfig(delay=30, num_queries=16) and RecallConfig(length=3, num_tokens=2, longest=1)


def test_refusals_of_a_run(tmp_path: Path) -> None:
    refused = {
        "evaluate: this task has no split 'train'; it has test, test:distinct, length:3, length:3:distinct, length:4, ..., length:25:distinct": {
            "evaluate": ("train", "val")
        },
        "evaluate: this task has no split 'length:28'": {"evaluate": ("length:28",)},
        "evaluate: there are no length:4 rows; leave length:4 out of evaluate": {"evaluate": ("test", "length:4"), "task.delay": 3},
        "batch_size: 0 is the whole training table, and this task has none: its rows are drawn; give their number, for example 64": {"batch_size": 0},
        "model: embedding_mlp gives one answer": {"model": structure(RunConfig, {"model": {"type": "embedding_mlp"}}).model},
        "model: own_models:Bag gives [2, 6] for tokens [2, 9]; it must give": {
            "model": ModuleConfig(module="own_models:Bag"), "task.train_lengths": "uniform",
        },
    }  # fmt: skip
    for message, changes in refused.items():
        with pytest.raises(ConfigError) as caught:
            driver.train(with_values(RUN, changes), tmp_path / "never", device="cpu")
        assert str(caught.value).startswith(message)
    assert not (tmp_path / "never").exists()
    validate(replace(RUN, model=ModuleConfig(module="own_models:Bag")))  # scored at the last position alone
    task, tables, _ = task_of([PLAIN])
    for split in ("val", "length:28", "length:2", "length:", ":distinct", "test:distinct:distinct"):
        with pytest.raises(
            ConfigError, match=rf"evaluate: recall has no split '{split}'; known: test, length:3 to length:27, and each with :distinct after it"
        ):
            list(task.evaluation(tables, split, 5))


def test_means_over_pieces() -> None:
    """The share that is right is a mean over rows that are there, however they are cut."""
    trained = Fleet.build([RUN])
    task, tables, _ = task_of([PLAIN])
    values = [
        means(reduce(add, (cross_entropy(trained.model, batch) for batch in task.evaluation(tables, "test:distinct", rows))))["accuracy"] for rows in (13, 5000)
    ]
    torch.testing.assert_close(*values)


def test_keys_are_the_runs_own() -> None:
    """The order key alone decides the training rows, the split seed alone the test rows."""
    task = build(PLAIN)
    one, two = (task.setup({"num_queries": [2], "delay": [1], "split_seed": [seed]}, "cpu") for seed in (0, 1))
    keys = rng.key(torch.tensor([5]), "order")
    assert same(task.batch(one, keys, torch.tensor(0), 9).tokens, task.batch(two, keys, torch.tensor(0), 9).tokens)
