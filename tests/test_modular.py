"""modular beyond its plain case: mixtures, digits, what a training batch scores, what is said about the data."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from laws_training import MODULAR, SMALL, finished, task_of
from torch import Tensor

from shoal.config import AdamW, ModularConfig, fields_per_run, with_seed, with_values
from shoal.config.fields import ConfigError
from shoal.contracts import Batch, Tables
from shoal.inference import evaluate, generate
from shoal.inference.evaluate import batches
from shoal.studies import driver
from shoal.tasks import build
from shoal.tasks.modular import END, export, spelled
from shoal.tasks.operations import answers
from shoal.train.fleet import Fleet
from shoal.train.plan import plan, validate

ROUND = ModularConfig(p=7, train_fraction=0.4, val_fraction=0.3)


def texts(task: Any, batch: Batch, r: int) -> list[tuple[str, str, list[int]]]:
    """(read, answered, scored positions) of run r's rows that are there; the end token is written </s>."""

    def words(tokens: Tensor) -> str:
        pieces = [task.tokenizer.decode([token]) or END for token in tokens.tolist()]
        return ("" if task.config.tokens == "digits" else " ").join(pieces)

    places = list(range(batch.tokens.shape[-1]))[batch.at if isinstance(batch.at, slice) else slice(None)]
    rows = zip(batch.tokens[r], batch.targets[r], batch.weights[r], strict=True)
    return [(words(tokens), words(targets), places) for tokens, targets, weights in rows if weights.all()]


def whole(task: Any, tables: Tables, split: str, r: int) -> list[tuple[str, str, list[int]]]:
    return [row for batch in task.evaluation(tables, split, 50) for row in texts(task, batch, r)]


# --- mixtures


def test_tokens_of_operators_go_by_their_place() -> None:
    for tokens, first, size in (("residue", 7, 7 + 3 + 1), ("digits", 0, 3 + 10 + 1)):
        some, other = (build(replace(ROUND, operation=name, tokens=tokens)) for name in ("div+cubic+add", "s5+s5_sandwich+s5_conjugate"))
        assert some.vocab_size == size and other.vocab_size == (120 + 3 + 1 if tokens == "residue" else 3 + 5 + 1)
        texts = ["5 / 3 =", "5 cubic 3 =", "5 + 3 ="] if tokens == "residue" else ["5/3=", "5<cubic>3=", "5+3="]
        assert [some.tokenizer.encode(text)[1] for text in texts] == [first, first + 1, first + 2]
    turned = build(replace(ROUND, operation="add+div+mul"))
    assert turned.tokenizer.encode("5 + 3 =") == [5, 7, 3, 10] and turned.vocab_size == build(replace(ROUND, operation="div+cubic+add")).vocab_size
    assert build(replace(ROUND, operation="cubic_y")).vocab_size == build(ROUND).vocab_size == 7 + 1 + 1  # one token for all operations alone


@pytest.mark.parametrize("split", ["random", "paired", "stratified", "rows"])
def test_mixtures_hold_all_rows_of_all_operations(split: Any) -> None:
    """And "val:mul" the rows of mul in "val", whichever place it has; a run without it has none there."""
    mixtures = ("div+mul", "mul+sub", "add+div")
    configs = [replace(ROUND, operation=operation, split=split) for operation in mixtures]
    task, tables, _ = task_of(configs)
    assert task.splits == ("train", "val", "test", *(f"{part}:{name}" for part in ("train", "val", "test") for name in ("div", "mul")))
    for r, operation in enumerate(mixtures):
        names = operation.split("+")
        signs = dict(zip("/*", names, strict=True))  # the task writes its own signs, those of the first run
        rows = {part: whole(task, tables, part, r) for part in task.splits}
        every = [(*text.split(), answer) for part in ("train", "val", "test") for text, answer, _ in rows[part]]
        read = [(signs[sign], int(x), int(y), int(z)) for x, sign, y, _, z in every]
        expected = [(name, i // 7, i % 7, z) for name in names for i, z in enumerate(answers((name,), 7)[0].tolist()) if z >= 0]
        assert sorted(read) == sorted(expected)
        for part in ("train", "val", "test"):
            for name in ("div", "mul"):
                mine = [row for row in rows[part] if signs[row[0].split()[1]] == name]
                assert rows[f"{part}:{name}"] == mine and (mine == []) == (name not in names)
        assert task.describe(tables, r)["operation"] == operation and task.describe(tables, r)["rows"] == len(expected)
    with pytest.raises(ConfigError, match=r"evaluate: modular has no split 'val:add'; known: train, .*val:mul"):
        next(task.evaluation(tables, "val:add", 10))
    task, tables, _ = task_of([ROUND])
    assert whole(task, tables, "val:div", 0) == whole(task, tables, "val", 0) != []  # so that division alone is measured as in a mixture


def test_mixtures_in_training() -> None:
    """The splits of its operations make up the whole; each run is what it is alone."""
    evaluate = ("val", "val:mul", "val:div")
    runs = [
        with_seed(replace(MODULAR, steps=20, evaluate=evaluate, task=replace(ROUND, operation=name, split="paired", loss="answer+end")), seed)
        for seed, name in enumerate(("mul+div", "div+mul"))
    ]
    for run in runs:
        validate(run)
    assert plan(runs) == [runs]
    _, found = finished(Fleet.build(runs))
    for r, run in enumerate(runs):
        task, tables, _ = task_of([r0.task for r0 in runs])
        count = {split: len(whole(task, tables, split, r)) for split in evaluate}
        for step in (0, 20):
            parts = [found[r, step, f"{split}/accuracy"] * count[split] for split in evaluate]
            assert parts[0] == pytest.approx(parts[1] + parts[2]) and count["val"] == count["val:mul"] + count["val:div"]
        _, alone = finished(Fleet.build([run]))
        assert found[r, 20, "val:mul/loss"] == pytest.approx(alone[0, 20, "val:mul/loss"], rel=1e-5)
    with pytest.raises(ConfigError, match="this task has no split 'val:mul'; it has train, val, test, train:div, train:add, val:div"):
        validate(with_values(runs[0], {"task.operation": "div+add"}))


def test_who_shares_a_fleet() -> None:
    def run(operation: str) -> Any:
        return replace(MODULAR, task=ModularConfig(p=120, operation=operation))  # as many residues as S5 has elements

    groups = [[run("add"), run("cubic_y"), run("div_odd")], [run("add+mul"), run("mul+div_odd")], [run("s5"), run("s5_sandwich")], [run("s5+s5_conjugate")]]
    assert plan([run for group in groups for run in group]) == groups
    task = build(ROUND)
    fields = {name: [getattr(ROUND, name)] for name in fields_per_run(ROUND)} | {"split_seed": [0]}
    for other in ("add+mul", "s5"):
        with pytest.raises(ConfigError, match=r"task.operation: .* need different tokens, so they cannot share a fleet"):
            task.setup(fields | {"operation": [other]}, "cpu")


# --- what a training batch scores


@pytest.mark.parametrize("tokens", ["residue", "digits"])
@pytest.mark.parametrize("operator_token", [True, False])
def test_loss_positions(tokens: Any, operator_token: bool) -> None:
    base = replace(ROUND, operation="cube_add", tokens=tokens, base=2, operator_token=operator_token)
    space, width = (" ", 1) if tokens == "residue" else ("", 3)
    asked = 2 * width + operator_token + 1
    told: dict[str, Any] = {}
    for loss in ("answer", "answer+end", "all"):
        config = replace(base, loss=loss)
        task, tables, keys = task_of([config, replace(config, label_noise=0.5)])
        assert task.max_length == asked + width - 1 + (loss == "answer+end") and (task.end is None) == (loss != "answer+end")
        told[loss] = [whole(task, tables, split, r) for split in ("train", "val", "test") for r in range(2)]
        for size in (0, 9):
            batch = task.batch(tables, keys, torch.tensor(2), size)
            assert batch.at == {"answer": slice(asked - 1, asked + width - 1), "answer+end": slice(asked - 1, asked + width), "all": None}[loss]
            for r in range(2):
                evaluated = {read[: len(read) - (width - 1)]: answer for read, answer, _ in told[loss][r]}  # prompt -> answer
                for read, scored, _ in texts(task, batch, r):
                    prompt = next(p for p in evaluated if read.startswith(p))
                    text = prompt + space + evaluated[prompt] + (space + END if loss == "answer+end" else "")
                    last = END if loss == "answer+end" else text[-1]
                    assert read == text.removesuffix(last).rstrip() and scored == {
                        "answer": evaluated[prompt], "answer+end": evaluated[prompt] + space + END, "all": text[1:].lstrip(),
                    }[loss]  # fmt: skip
    assert told["answer"] == told["answer+end"] == told["all"], "evaluations score the answer, whatever training does"


# --- digits


@pytest.mark.parametrize(("base", "p"), [(2, 2), (2, 13), (3, 9), (7, 50), (10, 97), (16, 40), (36, 36), (36, 37)])
def test_digits_are_numbers(base: int, p: int) -> None:
    plain = ModularConfig(p=p, operation="mul", tokens="digits", base=base, train_fraction=0.9, val_fraction=0.05)
    turned = replace(plain, least_significant_first=True)
    width = len(spelled(plain)[0])
    assert base ** (width - 1) < p <= base**width
    assert [int(text, base) for text in spelled(plain)] == list(range(p)) and {len(text) for text in spelled(plain)} == {width}
    assert [text[::-1] for text in spelled(turned)] == spelled(plain)
    for config, read in ((plain, lambda text: int(text, base)), (turned, lambda text: int(text[::-1], base))):
        task, tables, _ = task_of([config])
        assert task.vocab_size == base + 2
        some = whole(task, tables, "train", 0)[:200]
        for text, answer, _ in some:
            x, y = text.partition("=")[0].split("*")
            assert read(x) * read(y) % p == read(answer)
        assert len(some) > 1


@pytest.mark.parametrize(
    "task",
    [
        replace(ROUND, operation="add", tokens="digits", base=2, least_significant_first=True, loss="answer+end"),
        replace(ROUND, operation="add", tokens="digits", base=3, loss="all"),
        replace(ROUND, operation="div+mul", p=11, tokens="digits"),
    ],
    ids=["base 2", "base 3", "mixture"],
)
def test_exact_is_what_greedy_decoding_writes(task: ModularConfig) -> None:
    """Teacher forcing does not flatter "exact": a row counts where every digit is the most probable one given the right ones before it, and
    then greedy decoding writes just them, one by one. Row by row, on rows trained on and on others.
    """
    config = replace(MODULAR, task=replace(task, train_fraction=0.6), model=replace(SMALL, init_scale=5.0), optimizer=AdamW(lr=1e-2, wd=0.0), steps=120)
    fleet, _ = finished(Fleet.build([with_values(config, {"log_every": 120, "evaluate_every": 120})]))
    run, shares = fleet.one(0), []
    for split in ("train", "val"):
        right = []
        for batch in batches(run, split):
            for tokens, target in zip(batch.tokens, batch.targets, strict=True):
                prompt = run.task.tokenizer.decode(tokens[: len(tokens) - len(target) + 1].tolist())
                right.append(generate(run, prompt, max_tokens=len(target)) == run.task.tokenizer.decode(target.tolist()))
        shares.append(sum(right) / len(right))
        assert shares[-1] == pytest.approx(evaluate(run, split)["exact"])
        assert shares[-1] <= evaluate(run, split)["accuracy"] + 1e-6
    assert 0 < shares[1] < 1 or 0 < shares[0] < 1, "a model that is always or never right would show nothing"


def test_generation_stops_at_the_end_token() -> None:
    """Trained with it, the model says when its answer is over; there is room for it."""
    task = replace(ROUND, operation="add", tokens="digits", base=2, loss="answer+end", train_fraction=0.9, val_fraction=0.1)
    config = replace(MODULAR, task=task, model=replace(SMALL, init_scale=5.0), optimizer=AdamW(lr=1e-2, wd=0.0), steps=60, log_every=60, evaluate_every=60)
    run = finished(Fleet.build([config]))[0].one(0)
    written = [generate(run, f"{x}+{y}=") for x in spelled(task)[:3] for y in spelled(task)]
    assert {len(text) for text in written} == {3}, "four tokens have room"


# --- what is said about the data


def described(**fields: Any) -> dict[str, Any]:
    task, tables, _ = task_of([ModularConfig(**fields)])
    return task.describe(tables, 0)


def test_notes() -> None:
    assert described()["notes"] == [] and described(p=97, operation="div+mul", split="paired")["notes"] == []
    assert described(operation="s5")["notes"] == ["p is not used: S5 has 120 elements"]
    assert "p" not in described(operation="s5") and described(operation="s5")["elements"] == 120 and described(operation="s5")["rows"] == 14400
    unused = "base and least_significant_first are not used: "
    assert described(base=2)["notes"] == [unused + "an element is one token"] and described(base=2, tokens="digits")["notes"] == []
    assert described(operation="s5", base=7, tokens="digits")["notes"][1] == unused + "a permutation is written as its five images"
    assert described(p=2, train_fraction=0.9, val_fraction=0.1)["notes"][0] == "modulo 2 only 1 has an inverse, so a / b is always a"


def test_rows_without_an_answer_are_counted() -> None:
    div, odd, both = (described(p=9, operation=name) for name in ("div", "div_odd", "div+div_odd"))
    assert (div["rows"], div["rows dropped"]) == (9 * 6, 9 * 2) and (odd["rows"], odd["rows dropped"]) == (9 * 8, 9)  # y = 3 is odd and no unit
    assert both["rows dropped"] == 27 and both["notes"][0] == "27 of 153 rows are left out: b shares a factor with 9, so it has no inverse"


def test_what_training_never_shows_is_said() -> None:
    """Counted from the rows themselves."""
    config = ModularConfig(p=31, operation="mul", train_fraction=0.03)
    task, tables, _ = task_of([config])
    seen = {int(answer) for _, answer, _ in whole(task, tables, "train", 0)}
    missing = [z for z in range(31) if z not in seen]
    [note] = task.describe(tables, 0)["notes"]
    assert note == f"answers without a training row: {len(missing)} of 31 (first: {', '.join(map(str, missing[:5]))}, ...)" and len(missing) > 5
    few = ModularConfig(p=5, operation="add+mul", train_fraction=0.02)  # one row
    task, tables, _ = task_of([few])
    [(text, _, _)] = whole(task, tables, "train", 0)
    assert f"operator {'mul' if '+' in text else 'add'} has no training row" in task.describe(tables, 0)["notes"]


def test_notes_are_printed_before_training(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Each once."""
    config = replace(MODULAR, task=ModularConfig(p=6, train_fraction=0.1, val_fraction=0.3), steps=1)
    driver.train(config, tmp_path / "a", device="cpu")
    said = capsys.readouterr().err
    assert said.count("note: 18 of 30 rows are left out: b shares a factor with 6, so it has no inverse\n") == 1
    assert said.count("note: answers without a training row: 5 of 6 (first: ") == 1
    with pytest.raises(ConfigError, match=r"evaluate: there are no val:mul rows; raise task.val_fraction, or leave val:mul out of evaluate"):
        driver.train(
            with_values(config, {"task.operation": "add+mul", "task.val_fraction": 0.01, "task.p": 5, "evaluate": ("train", "val:mul", "val:add")}),
            tmp_path / "b",
            device="cpu",
        )


# --- export


def test_export_of_mixtures_and_permutations(tmp_path: Path) -> None:
    config = ModularConfig(p=7, operation="cubic+div", split="paired", label_noise=0.2, tokens="digits", base=2, least_significant_first=True)
    facts = export(config, 4, tmp_path / "mixture.tsv")
    header, *lines = (line.split("\t") for line in (tmp_path / "mixture.tsv").read_text().splitlines())
    assert header == ["a", "op", "b", "result", "split"] and Counter(line[1] for line in lines) == {"cubic": 49, "/": 42}
    wrong = 0
    for a, op, b, result, split in lines:
        z = answers(("cubic" if op == "cubic" else "div",), 7)[0, int(a) * 7 + int(b)]
        wrong += int(result) != z
        assert int(result) == z or split == "train"
    assert wrong == facts["altered answers"] > 0 and Counter(line[4] for line in lines)["val"] == facts["val"]
    export(ModularConfig(operation="s5_conjugate"), 0, tmp_path / "s5.tsv")
    lines = [line.split("\t") for line in (tmp_path / "s5.tsv").read_text().splitlines()[1:]]
    assert len(lines) == 14400 and {line[1] for line in lines} == {"s5_conjugate"} and lines[1][:4] == ["01234", "s5_conjugate", "01243", "01243"]
    for a, _, b, result, _ in lines[::97]:
        inverse = [a.index(str(k)) for k in range(5)]
        assert result == "".join(a[int(b[inverse[k]])] for k in range(5))


# --- refusals


REFUSED = {
    "operation": [
        ({"operation": "dvi"}, "operation: unknown operation 'dvi'; did you mean 'div'?"),
        ({"operation": "plus"}, "operation: unknown operation 'plus'; known: add, sub, mul, div, div_odd"),
        ({"operation": "add+add"}, "operation: 'add+add' names an operation twice"),
        ({"operation": "add+"}, "operation: unknown operation ''"),
        ({"operation": "add+s5"}, "operation: 'add+s5' mixes residues with permutations"),
    ],
    "operator_token": [({"operation": "add+mul", "operator_token": False}, "operator_token: a mixture of operations needs operator tokens")],
    "base": [({"base": 1}, "base: digits need a base from 2 to 36, not 1"), ({"base": 37}, "base: digits need a base from 2 to 36, not 37")],
    "label_noise": [({"label_noise": 1.5}, "label_noise: is the share of training answers that are replaced, in [0, 1]; 1.5 asks for more noise")],
}


@pytest.mark.parametrize(("path", "fields", "message"), [(path, *case) for path, cases in REFUSED.items() for case in cases])
def test_refusals(path: str, fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        ModularConfig(**fields)
    assert str(caught.value).startswith(message) and caught.value.path == path


def test_refusals_of_size() -> None:
    with pytest.raises(ConfigError, match=r"task.p: .* at most 1024, not 1031"):
        build(ModularConfig(p=1031, operation="add+sub+mul+div"))
    build(ModularConfig(p=1021, operation="add+sub+mul+div"))
