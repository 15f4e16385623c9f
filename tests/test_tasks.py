"""memorize and modular: the data is what its definition says, and the same for a run in every fleet."""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from scipy.stats import chisquare
from torch import Tensor

from shoal import rng
from shoal.config import MemorizeConfig, ModularConfig, TaskConfig, fields_per_run
from shoal.config.fields import ConfigError
from shoal.contracts import Batch, Tables
from shoal.data import CharacterTokenizer, WordTokenizer
from shoal.tasks import build
from shoal.tasks.modular import SIGNS, ModularTask, export
from shoal.tasks.splits import split_counts, split_hash
from shoal.tasks.stream import fingerprint, pieces, stream

OPERATIONS: dict[str, Callable[[int, int, int], int]] = {
    "add": lambda a, b, p: (a + b) % p,
    "sub": lambda a, b, p: (a - b) % p,
    "mul": lambda a, b, p: a * b % p,
    "div": lambda a, b, p: a * pow(b, -1, p) % p,
}


def per_run(configs: list[Any], seeds: list[int]) -> dict[str, list[Any]]:
    return {name: [getattr(config, name) for config in configs] for name in fields_per_run(configs[0])} | {"split_seed": seeds}


def setup(*configs: TaskConfig, seeds: list[int] | None = None) -> tuple[Any, Tables]:
    task = build(configs[0])
    return task, task.setup(per_run(list(configs), seeds or list(range(len(configs)))), "cpu")


def order(num: int) -> Tensor:
    return rng.key(torch.arange(num), "order")


def one(batch: Batch, r: int) -> Batch:
    return Batch(batch.tokens[r], batch.targets[r], batch.weights[r], None if batch.mask is None else batch.mask[r], batch.at)


def run_of(batch: Batch, r: int) -> Batch:
    """Run r's rows that are there, without padding rows."""
    run = one(batch, r)
    real = (run.weights > 0).any(-1)
    return Batch(run.tokens[real], run.targets[real], run.weights[real], None if run.mask is None else run.mask[real], run.at)


def assert_same(a: Batch, b: Batch) -> None:
    assert a.at == b.at and torch.equal(a.tokens, b.tokens) and torch.equal(a.targets, b.targets) and torch.equal(a.weights, b.weights)
    assert a.mask is b.mask if a.mask is None or b.mask is None else torch.equal(a.mask, b.mask)


def facts(task: ModularTask, batch: Batch, r: int) -> list[tuple[int, int, int]]:
    """(a, b, answer) of run r's scored rows, read back from the tokens."""
    width, tokenizer = task.digits, task.tokenizer
    rows = []
    for tokens, targets, weights in zip(batch.tokens[r].tolist(), batch.targets[r].tolist(), batch.weights[r].tolist(), strict=True):
        if any(weights):
            assert all(weights)
            prompt = tokens[: task.prompt_length]
            b_at = task.prompt_length - 1 - width
            assert tokenizer.decode(prompt[-1:]) == "=" and tokens[task.prompt_length :] == targets[:-1]
            rows.append(tuple(int(tokenizer.decode(part)) for part in (prompt[:width], prompt[b_at : b_at + width], targets)))
    return rows


def split_facts(task: ModularTask, tables: Tables, split: str, r: int, rows: int = 1000) -> list[tuple[int, int, int]]:
    return [fact for batch in task.evaluation(tables, split, rows) for fact in facts(task, batch, r)]


# --- tokenizers


def test_character_tokenizer() -> None:
    tokenizer = CharacterTokenizer("hello", special=("<s>", "</s>"))
    assert tokenizer.vocab_size == 6 and tokenizer.encode("hole") == [1, 3, 2, 0] and tokenizer.special == {"<s>": 4, "</s>": 5}
    assert tokenizer.decode([4, *tokenizer.encode("hello"), 5]) == "hello"
    with pytest.raises(ConfigError, match=r"prompt: unknown character 'x', '<'; known: 'e', 'h', 'l', 'o'$"):
        tokenizer.encode("hex<x")


def test_word_tokenizer() -> None:
    tokenizer = WordTokenizer([*map(str, range(97)), "/", "="])
    assert tokenizer.vocab_size == 99 and tokenizer.encode(" 96  / 3\n=") == [96, 97, 3, 98] and tokenizer.decode([96, 97, 3, 98]) == "96 / 3 ="
    with pytest.raises(ConfigError, match=r"unknown word '97', '\+'; known: 0, 1, 2, 3, 4, \.\.\., 94, 95, 96, /, =$") as raised:
        tokenizer.encode("97 + 97")
    assert raised.value.path == "prompt"


# --- the stream


def test_stream_each_row_once_per_epoch_whatever_the_batch() -> None:
    counts = torch.tensor([1, 7, 48, 50])
    for size in (1, 6, 50, 64):
        places = torch.cat([stream(order(4), torch.tensor(step), size, counts) for step in range(-(-200 // size))], 1)
        for r, n in enumerate(counts.tolist()):
            epochs = places[r, : 200 // n * n].view(-1, n)
            assert torch.equal(epochs.sort(1).values, torch.arange(n).expand_as(epochs))
            assert n < 48 or not torch.equal(epochs[0], epochs[1])
    # the cut into batches changes nothing, nor does having seen the steps before
    assert torch.equal(stream(order(4), torch.tensor(3), 10, counts)[:, :5], stream(order(4), torch.tensor(6), 5, counts))


def test_stream_late_steps() -> None:
    far = stream(order(2), torch.tensor(10**7), 512, torch.tensor([4656, 4656]))
    assert far.min() >= 0 and far.max() < 4656 and len(far[0].unique()) > 480 and not torch.equal(far[0], far[1])


def test_pieces() -> None:
    for length in (1, 5, 7, 100):
        for rows in (1, 3, 7, 1000):
            parts = list(pieces(length, rows, torch.device("cpu")))
            assert len({len(part) for part in parts}) == 1 and len(parts[0]) <= rows
            assert torch.equal(torch.cat(parts)[:length], torch.arange(length)) and len(parts) * len(parts[0]) - length < len(parts)


# --- modular: arithmetic, splits, counts, hashes


@pytest.mark.parametrize("tokens", ["residue", "digits"])
@pytest.mark.parametrize("operator_token", [True, False])
@pytest.mark.parametrize("p", [2, 12, 13, 101])
def test_splits_complete_disjoint_and_right(p: int, operator_token: bool, tokens: Any) -> None:
    base = ModularConfig(p=p, tokens=tokens, operator_token=operator_token, val_fraction=0.2)
    task, tables = setup(*(dataclasses.replace(base, operation=operation) for operation in OPERATIONS))
    if tokens == "residue":
        assert task.vocab_size == p + 1 + operator_token and task.max_length == 3 + operator_token
    else:
        assert task.vocab_size == 11 + operator_token and task.max_length == 3 * len(str(p - 1)) + operator_token
    for r, (operation, compute) in enumerate(OPERATIONS.items()):
        seen = [fact for split in task.splits for fact in split_facts(task, tables, split, r, rows=37)]
        whole = [(a, b) for a in range(p) for b in range(p) if operation != "div" or math.gcd(b, p) == 1]
        assert sorted(fact[:2] for fact in seen) == whole  # every row once, in exactly one split
        assert all(c == compute(a, b, p) for a, b, c in seen)


def test_shapes() -> None:
    task, tables = setup(ModularConfig(p=97))
    batch = task.batch(tables, order(1), torch.tensor(0), 512)
    assert task.vocab_size == 99 and task.max_length == 4 and task.start == () and task.end is None
    assert batch.tokens.shape == (1, 512, 4) and batch.targets.shape == batch.weights.shape == (1, 512, 1)
    assert batch.at == slice(3, 4) and batch.mask is None and batch.tokens.dtype == batch.targets.dtype == torch.int64
    assert batch.weights.dtype == torch.float32 and (batch.weights == 1).all()
    assert task.tokenizer.decode(batch.tokens[0, 0].tolist()).split()[1::2] == ["/", "="]
    task, tables = setup(ModularConfig(p=113, tokens="digits"))
    batch = task.batch(tables, order(1), torch.tensor(0), 5)
    assert batch.tokens.shape == (1, 5, 10) and batch.targets.shape == (1, 5, 3) and batch.at == slice(7, 10) and task.vocab_size == 12


def test_the_rows_of_the_paper() -> None:
    task, tables = setup(ModularConfig(p=97, operation="div", val_fraction=0.5, test_fraction=0.0))
    described = task.describe(tables, 0)
    assert (described["rows"], described["train"], described["val"], described["test"]) == (9312, 4656, 4656, 0)
    assert described["rows dropped"] == 0 and described["notes"] == [] and described["unused"] == 0 and described["altered answers"] == 0
    a, sign, b, equals, c = described["example"].split()
    assert (sign, equals) == ("/", "=") and int(c) * int(b) % 97 == int(a)


def test_split_counts() -> None:
    assert split_counts(9312, 0.5, 0.1, None) == [4656, 931, 3725]
    assert split_counts(9409, 0.5, 0.5, 0.0) == [4704, 4705, 0]  # fractions that sum to 1 leave no row out ...
    assert split_counts(9409, 0.25, 0.25, 0.5) == [2352, 2352, 4705]
    assert split_counts(1000, 0.3, 0.1, 0.2) == [300, 100, 200]  # ... and others do
    assert split_counts(10, 0.1 + 0.2, 0.7, 0.0) == [3, 7, 0]
    assert split_counts(3, 0.5, 0.5, None) == [2, 1, 0]


def test_train_is_the_head_of_one_permutation() -> None:
    """Larger fractions contain smaller ones at the same seed; the order of the permutation is kept."""
    task, tables = setup(*(ModularConfig(p=13, operation="mul", train_fraction=f) for f in (0.2, 0.6)), seeds=[4, 4])
    small, large = (split_facts(task, tables, "train", r) for r in range(2))
    expected = rng.permutation(rng.key(torch.tensor([4]), "split"), 169)[0].tolist()
    assert large[: len(small)] == small and [13 * a + b for a, b, _ in large] == expected[: round(169 * 0.6)]


def test_split_hash() -> None:
    task, tables = setup(*[ModularConfig(p=97)] * 3, seeds=[0, 1, 0])
    hashes = [task.describe(tables, r)["split hash"] for r in range(3)]
    assert hashes[0] == hashes[2] != hashes[1]
    assert hashes[0] == "b311434e91cb"  # pinned: seed 0's split is the same in every version
    assert split_hash([torch.tensor([3, 1]), torch.tensor([2]), torch.tensor([])]) == split_hash([torch.tensor([1, 3]), torch.tensor([2]), torch.tensor([])])
    assert split_hash([torch.tensor([1]), torch.tensor([2])]) != split_hash([torch.tensor([2]), torch.tensor([1])])


@pytest.mark.parametrize(("p", "units"), [(12, 4), (96, 32)])
def test_composite_modulus_says_what_it_drops(p: int, units: int) -> None:
    task, tables = setup(ModularConfig(p=p), ModularConfig(p=p, operation="add"))
    division, addition = task.describe(tables, 0), task.describe(tables, 1)
    assert division["rows"] == p * units and division["rows dropped"] == p * (p - 1 - units) and f"factor with {p}," in division["notes"][0]
    assert addition["rows"] == p * p and addition["rows dropped"] == 0 and addition["notes"] == []


def test_smallest_modulus_and_empty_splits() -> None:
    task, tables = setup(ModularConfig(p=2, operation="div"), ModularConfig(p=2, operation="add", val_fraction=0.5, test_fraction=0.0))
    assert [[task.describe(tables, r)[split] for split in task.splits] for r in range(2)] == [[1, 0, 1], [2, 2, 0]]
    for split in task.splits:
        parts = list(task.evaluation(tables, split, 100))
        assert len(parts) >= 1 and [sum(float(b.weights[r].sum()) for b in parts) for r in range(2)] == [task.describe(tables, r)[split] for r in range(2)]
    empty = setup(ModularConfig(p=5, val_fraction=0.5, test_fraction=0.0))
    [batch] = empty[0].evaluation(empty[1], "test", 64)  # no run has a row: still one batch, of weight 0
    assert batch.tokens.shape == (1, 1, 4) and batch.weights.sum() == 0
    assert len(task.batch(tables, order(2), torch.tensor(3), 9).tokens[0]) == 9  # more than the table has


# --- modular: label noise


def test_label_noise_only_in_train() -> None:
    noisy, clean = ModularConfig(p=97, operation="add", label_noise=0.25), ModularConfig(p=97, operation="add")
    task, tables = setup(noisy, clean, dataclasses.replace(noisy, label_noise=1.0), seeds=[5, 5, 5])
    for split in ("val", "test"):
        assert split_facts(task, tables, split, 0) == split_facts(task, tables, split, 1) == split_facts(task, tables, split, 2)
    half, none, full = (split_facts(task, tables, "train", r) for r in range(3))
    assert [f[:2] for f in half] == [f[:2] for f in none] == [f[:2] for f in full]
    wrong = [sum(x != y for x, y in zip(some, none, strict=True)) for some in (half, full)]
    assert [task.describe(tables, r)["altered answers"] for r in range(3)] == [wrong[0], 0, wrong[1]]
    chosen = round(0.25 * len(none))
    assert 0.95 * chosen < wrong[0] <= chosen and 0.97 < wrong[1] / len(none) < 1  # a uniform residue is right by chance once in 97
    assert max(Counter(c for _, _, c in full).values()) < 100  # 4704 answers over 97 residues
    replaced = [y for (_, _, x), (_, _, y) in zip(none, half, strict=True) if x != y]
    assert chisquare(torch.bincount(torch.tensor(replaced), minlength=97).numpy()).pvalue > 1e-4  # whichever rows were chosen
    drawn = {f for batch in [task.batch(tables, order(3), torch.tensor(s), 512) for s in range(30)] for f in facts(task, batch, 0)}
    assert drawn == set(half)  # training sees the same noise at every epoch
    assert [len({tuple(x) for x in facts(task, task.batch(tables, order(3), torch.tensor(0), 0), r)}) for r in range(3)] == [len(none)] * 3


# --- modular: the fleet does not matter


CASES: list[tuple[str, float, float, float | None, float]] = [
    ("div", 0.5, 0.1, None, 0.0), ("add", 0.3, 0.3, 0.2, 0.5), ("mul", 0.8, 0.2, 0.0, 0.0), ("sub", 0.1, 0.1, None, 0.1),
    ("div", 0.5, 0.1, None, 0.0), ("div", 0.9, 0.05, None, 1.0), ("add", 0.02, 0.9, None, 0.0), ("sub", 0.5, 0.5, 0.0, 0.0),
]  # fmt: skip
FLEET = [
    ModularConfig(p=13, operation=operation, train_fraction=train, val_fraction=val, test_fraction=test, label_noise=noise)
    for operation, train, val, test, noise in CASES
]
TEXTS = MemorizeConfig(strings=("abc", "a longer one", "xy", "hello there", "q"))
FLEETS: dict[str, list[Any]] = {
    "residue": FLEET,
    "digits": [dataclasses.replace(config, tokens="digits") for config in FLEET],
    "mixtures": [
        dataclasses.replace(config, operation=operation, split=split, tokens="digits", base=3, least_significant_first=True, loss="answer+end")
        for config, operation, split in zip(FLEET, ("div+cubic", "cubic+div") * 4, ("random", "paired", "stratified", "rows") * 2, strict=True)
    ],
    "memorize": [dataclasses.replace(TEXTS, unscored=u) for u in (0, 1, 0, 1, 1, 0, 0, 0)],
}


@pytest.mark.parametrize("name", FLEETS)
def test_run_in_a_fleet_equals_run_alone(name: str) -> None:
    configs, seeds = FLEETS[name], [0, 1, 2, 3, 4, 0, 6, 7]
    task, tables = setup(*configs, seeds=seeds)
    keys = rng.key(torch.tensor(seeds), "order")
    kept = tables.keep(torch.tensor([6, 2, 3]))
    for r, config in enumerate(configs):
        alone_task, alone = setup(config, seeds=[seeds[r]])
        assert task.describe(tables, r) == alone_task.describe(alone, 0) | ({} if name == "memorize" else {"example": task.describe(tables, r)["example"]})
        for step in (0, 1, 17):
            together, solo = task.batch(tables, keys, torch.tensor(step), 20), alone_task.batch(alone, keys[r : r + 1], torch.tensor(step), 20)
            assert_same(one(together, r), one(solo, 0))
        for split in task.splits:
            pair = ([b for b in t.evaluation(x, split, 16)] for t, x in ((task, tables), (alone_task, alone)))
            assert_same(*(joined([run_of(b, s) for b in parts]) for parts, s in zip(pair, (r, 0), strict=True)))
        assert_same(run_of(task.batch(tables, keys, torch.tensor(0), 0), r), run_of(alone_task.batch(alone, keys[r : r + 1], torch.tensor(5), 0), 0))
    for r, old in enumerate([6, 2, 3]):  # after compaction too
        assert task.describe(kept, r) == task.describe(tables, old)
        assert torch.equal(task.batch(kept, keys[[6, 2, 3]], torch.tensor(4), 20).tokens[r], task.batch(tables, keys, torch.tensor(4), 20).tokens[old])


def joined(parts: list[Batch]) -> Batch:
    tokens, targets, weights = (torch.cat(tensors) for tensors in zip(*((b.tokens, b.targets, b.weights) for b in parts), strict=True))
    mask = None if parts[0].mask is None else torch.cat([b.mask for b in parts if b.mask is not None])
    return Batch(tokens, targets, weights, mask, parts[0].at)


def test_each_row_once_per_epoch_with_different_tables() -> None:
    task, tables = setup(*FLEET)
    drawn = [task.batch(tables, order(8), torch.tensor(step), 32) for step in range(20)]
    for r in range(8):
        table = split_facts(task, tables, "train", r)
        stream_of_r = [fact for batch in drawn for fact in facts(task, batch, r)]
        epochs = [stream_of_r[i : i + len(table)] for i in range(0, len(stream_of_r) - len(table) + 1, len(table))]
        assert len(epochs) == len(stream_of_r) // len(table) and all(sorted(epoch) == sorted(table) for epoch in epochs)
        whole = facts(task, task.batch(tables, order(8), torch.tensor(9), 0), r)
        assert whole == table


def test_memory_of_a_large_fleet_is_modest() -> None:
    _, tables = setup(*[ModularConfig(p=97)] * 16)
    assert sum(x.nbytes for x in tables.per_run.values()) < 16 * 64_000  # bytes: 64 MB at R = 1,024
    assert sum(x.nbytes for x in tables.shared.values()) < 1_000_000


@pytest.mark.parametrize("name", FLEETS)
@pytest.mark.parametrize("size", [0, 20])
def test_batch_is_one_graph_without_the_host(name: str, size: int) -> None:
    task, tables = setup(*FLEETS[name])
    compiled = torch.compile(lambda tables, key, step: task.batch(tables, key, step, size), fullgraph=True, backend="eager")
    for step in (0, 5):
        assert_same(compiled(tables, order(8), torch.tensor(step)), task.batch(tables, order(8), torch.tensor(step), size))
    # on the meta device there are no values, so nothing can have depended on one
    away = Tables(*({k: v.to("meta") for k, v in part.items()} for part in (tables.per_run, tables.shared)))
    batch = task.batch(away, order(8).to("meta"), torch.tensor(5, device="meta"), size)
    assert batch.tokens.device.type == "meta" and batch.tokens.shape[0] == 8


@pytest.mark.parametrize("device", [pytest.param("cpu", marks=pytest.mark.slow), pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("name", FLEETS)
@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")  # from within the compiler
def test_batch_compiled_and_on_any_device_the_same(name: str, device: str) -> None:
    task, tables = setup(*FLEETS[name])
    moved = task.setup(per_run(FLEETS[name], list(range(8))), device)
    compiled = torch.compile(lambda tables, key, step: task.batch(tables, key, step, 20), fullgraph=True)
    for step in (0, 5, 10**6):
        here = task.batch(tables, order(8), torch.tensor(step), 20)
        for there in (f(moved, order(8).to(device), torch.tensor(step, device=device)) for f in (compiled, lambda *x: task.batch(*x, 20))):
            assert_same(Batch(*(x.cpu() if isinstance(x, Tensor) else x for x in there)), here)


# --- modular: export


def test_export_reads_back(tmp_path: Path) -> None:
    config = ModularConfig(p=13, operation="sub", train_fraction=0.4, val_fraction=0.1, test_fraction=0.2, label_noise=0.3)
    path = tmp_path / "table.tsv"
    described = export(config, 3, path)
    header, *lines = (line.split("\t") for line in path.read_text().splitlines())
    assert header == ["a", "op", "b", "result", "split"]
    assert [(int(a), int(b)) for a, _, b, _, _ in lines] == [(a, b) for a in range(13) for b in range(13)] and {op for _, op, _, _, _ in lines} == {"-"}
    counts = Counter(split for *_, split in lines)
    assert all(counts[split] == described[split] for split in ("train", "val", "test", "unused")) and counts["train"] == round(169 * 0.4)
    wrong = [split for a, _, b, c, split in lines if int(c) != (int(a) - int(b)) % 13]
    assert set(wrong) == {"train"} and len(wrong) == described["altered answers"]
    task, tables = setup(config, seeds=[3])
    assert sorted(split_facts(task, tables, "train", 0)) == sorted((int(a), int(b), int(c)) for a, _, b, c, split in lines if split == "train")
    parts = [torch.tensor([13 * int(a) + int(b) for a, _, b, _, s in lines if s == split]) for split in ("train", "val", "test")]
    assert described == task.describe(tables, 0) and described["split hash"] == split_hash(parts)  # the file alone gives the hash


def test_export_division_and_occupied_path(tmp_path: Path) -> None:
    path = tmp_path / "div.tsv"
    described = export(ModularConfig(p=12), 0, path)
    lines = [line.split("\t") for line in path.read_text().splitlines()[1:]]
    assert len(lines) == described["rows"] == 48 and all(int(c) * int(b) % 12 == int(a) for a, _, b, c, _ in lines)
    before = path.read_bytes()
    with pytest.raises(ConfigError, match="exists already; name another file"):
        export(ModularConfig(p=13), 0, path)
    assert path.read_bytes() == before
    with pytest.raises(ConfigError, match="cannot write"):
        export(ModularConfig(p=13), 0, tmp_path / "missing" / "x.tsv")


# --- modular: text, refusals


def test_prompts_and_examples() -> None:
    for operation, sign in SIGNS.items():
        task, tables = setup(ModularConfig(p=97, operation=operation), ModularConfig(p=97, operation="add"))
        assert task.tokenizer.encode(f"5 {sign} 3 =") == [5, 97, 3, 98]  # one operator token for all, shown as the run's own sign
        assert task.describe(tables, 1)["example"].split()[1] == "+"
        task = build(ModularConfig(p=97, operation=operation, tokens="digits"))
        assert task.tokenizer.encode(f"05{sign}13=") == [1, 6, 0, 2, 4, 11] and task.tokenizer.decode([1, 6, 0]) == f"05{sign}"
    task, tables = setup(ModularConfig(p=97, operator_token=False, tokens="digits"))
    assert len(task.describe(tables, 0)["example"]) == 7 and task.tokenizer.encode("0513=") == [0, 5, 1, 3, 10]
    with pytest.raises(ConfigError, match=r"unknown word '97'; known: 0, 1,.*96, /, ="):
        build(ModularConfig(p=97)).tokenizer.encode("97 / 3 =")


def test_fingerprint_is_of_the_structure() -> None:
    base = ModularConfig(p=97)
    for same in (dataclasses.replace(base, operation="add"), dataclasses.replace(base, train_fraction=0.3, label_noise=0.1, test_fraction=0.1)):
        assert build(same).fingerprint == build(base).fingerprint
    others = [
        dataclasses.replace(base, p=101),
        dataclasses.replace(base, tokens="digits"),
        dataclasses.replace(base, operator_token=False),
        MemorizeConfig(),
    ]
    assert len({fingerprint(config) for config in [base, *others]}) == 5
    assert build(MemorizeConfig(unscored=2)).fingerprint == build(MemorizeConfig()).fingerprint != build(MemorizeConfig(strings=("other",))).fingerprint


def test_modular_refusals() -> None:
    with pytest.raises(ConfigError, match=r"task.train_fraction: 0.1 of 2 rows is no row to train on; raise it to 0.5"):
        setup(ModularConfig(p=2, train_fraction=0.1))
    with pytest.raises(ConfigError, match=r"task.p: .* at most 2048, not 5003"):
        build(ModularConfig(p=5003))
    task, tables = setup(ModularConfig(p=5))
    with pytest.raises(ConfigError, match="no split 'dev'; known: train, val, test"):
        next(task.evaluation(tables, "dev", 10))
    with pytest.raises(ConfigError, match="unknown operation"):
        task.setup(per_run([ModularConfig(p=5)], [0]) | {"operation": ["pow"]}, "cpu")


# --- memorize


def test_memorize_rows_masks_and_padding() -> None:
    strings = ("abc", "abcdef", "b")
    task, tables = setup(*(MemorizeConfig(strings=strings, unscored=u) for u in (0, 1)))
    batch = task.batch(tables, order(2), torch.tensor(8), 0)
    begin, end = task.start[0], task.end
    assert task.max_length == 7 and task.vocab_size == 6 + 2 and batch.tokens.shape == batch.targets.shape == (2, 3, 7) and batch.at is None
    assert batch.mask is not None
    for r, unscored in enumerate((0, 1)):
        for row, string in enumerate(strings):
            codes, n = task.tokenizer.encode(string), len(string)
            assert batch.tokens[r, row, : n + 1].tolist() == [begin, *codes] and batch.targets[r, row, : n + 1].tolist() == [*codes, end]
            assert batch.mask[r, row].tolist() == [True] * (n + 1) + [False] * (6 - n)  # padded on the right
            assert batch.weights[r, row].tolist() == [0.0] * unscored + [1.0] * (n + 1 - unscored) + [0.0] * (6 - n)
        assert task.describe(tables, r)["scored positions"] == float(batch.weights[r].sum())


def test_memorize_one_string_the_sanity_study() -> None:
    task, tables = setup(MemorizeConfig(), MemorizeConfig(unscored=3))
    batch = task.batch(tables, order(2), torch.tensor(0), 0)
    assert task.max_length == 24 and batch.mask is None and batch.tokens.shape == (2, 1, 24) and task.splits == ("train",)
    assert batch.weights.sum((1, 2)).tolist() == [24, 21] and (batch.weights[1, 0, :3] == 0).all()
    [evaluated] = task.evaluation(tables, "train", 100)
    assert_same(evaluated, batch)
    assert task.describe(tables, 1)["example"] == "I love machine learning" and task.describe(tables, 1)["unscored"] == 3


def test_memorize_generation_round_trip() -> None:
    """Following the targets from ``start`` until ``end`` spells each string and needs no more room than max_length."""
    strings = ("no", "hello world", "a<s>b")
    task, tables = setup(MemorizeConfig(strings=strings))
    batch = task.batch(tables, order(1), torch.tensor(0), 0)
    for row, string in enumerate(strings):
        text = list(task.start)
        while (token := int(batch.targets[0, row, len(text) - 1])) != task.end:
            text.append(token)
            assert batch.tokens[0, row, : len(text)].tolist() == text
        assert task.tokenizer.decode(text) == task.tokenizer.decode([*text, task.end]) == string and len(text) <= task.max_length


def test_memorize_stream_and_evaluation_cover_every_string() -> None:
    task, tables = setup(TEXTS, TEXTS)
    drawn = torch.cat([task.batch(tables, order(2), torch.tensor(step), 2).tokens for step in range(10)], 1)  # 4 epochs of 5
    for r in range(2):
        lines = [task.tokenizer.decode(row.tolist()) for row in drawn[r]]
        assert all(sorted(lines[i : i + 5]) == sorted(TEXTS.strings) for i in range(0, 20, 5))
    for rows in (1, 2, 3, 5, 99):
        parts = list(task.evaluation(tables, "train", rows))
        assert len({b.tokens.shape for b in parts}) == 1 and parts[0].tokens.shape[1] <= rows
        together = joined([run_of(b, 1) for b in parts])
        assert [task.tokenizer.decode(row.tolist()) for row in together.tokens] == list(TEXTS.strings)


def test_memorize_refusals() -> None:
    with pytest.raises(ConfigError, match=r"task.unscored: 3 leaves no character scored; at most 2"):
        setup(MemorizeConfig(strings=("abc", "xyz")), MemorizeConfig(strings=("abc", "xyz"), unscored=3))
    task, tables = setup(MemorizeConfig(strings=("abc", "wxyz"), unscored=3))  # the longer one keeps a character
    assert task.describe(tables, 0)["scored positions"] == 3
    with pytest.raises(ConfigError, match="no split 'val'; known: train"):
        next(task.evaluation(tables, "val", 10))
    with pytest.raises(ConfigError, match="unknown character 'Z'"):
        task.tokenizer.encode("Z")
