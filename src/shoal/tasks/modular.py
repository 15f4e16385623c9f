"""Modular: the whole table of a op b = c, split into train, validation and test. The task that shows grokking (Power et al., arXiv 2201.02177).

Operands are 0 <= a, b < p (a range up to p itself would repeat residue 0), and for division b is a unit modulo p: p(p - 1) rows for a prime p; for a
composite one the rows whose b has no inverse are dropped and counted. Over S5 operands are its 120 elements and p is not used. With n elements a row's
number is (o n + a) n + b, where o is the operation's place in its mixture ("div+mul": 0 for div, 1 for mul).

Tokens per residue: ``a op b =`` is read, one token answered. As digits: operands and answer have one width (leading zeros), so the answer stands at the
same places in every row and is read but for its last digit; a permutation is its five images in either case. Evaluations score the answer and nothing
else. Their "exact", the share of rows of which every digit is the most probable one given the right digits before it, is the share that greedy decoding
writes exactly: while what it has written is right, it sees what the evaluation saw.

The operator's token says which place of the mixture its operation has, and nothing about which it is, so runs that differ in the operation share a fleet;
in text it is the operation's sign, or its name. A mixture's splits are "train", "val", "test" and those of one operation: "val:mul".

ModularTask(ModularConfig(p=97, operation="div"))   or   shoal data modular --p 97 --operation div --out FILE.tsv
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from shoal import rng
from shoal.config import ModularConfig, fields_per_run
from shoal.config.fields import check
from shoal.contracts import Batch, Tables, Tokenizer
from shoal.data.tokenizers import WordTokenizer
from shoal.tasks.operations import NAMES, answers, facts, permutations
from shoal.tasks.splits import SPLITS, divide, split_counts, split_hash
from shoal.tasks.stream import fingerprint, pieces, stream, write_new

SIGNS = {"add": "+", "sub": "-", "mul": "*", "div": "/"}  # of other operations the name
DIGITS = "0123456789abcdefghijklmnopqrstuvwxyz"
END = "</s>"
MAX_ROWS = 2048**2  # past this the tables take more than 100 MB


class ModularTask:
    def __init__(self, config: ModularConfig) -> None:
        count, n = len(config.operations), config.num_elements
        largest = math.isqrt(MAX_ROWS // count)
        check(n <= largest, "task.p", f"the whole table is held in memory, so p may be at most {largest}, not {n}")
        self.config = config
        self.elements = spelled(config)
        alphabet = self.elements if config.tokens == "residue" else DIGITS[: 5 if config.permutations else config.base]
        signs = list(filter(None, map(self._sign, config.operations)))
        words = [*alphabet, *signs, "="] if config.tokens == "residue" else [*signs, *alphabet, "="]
        tokenizer = WordTokenizer(words, special=(END,) if config.loss == "answer+end" else (), spaced=config.tokens == "residue")
        self.tokenizer: Tokenizer = tokenizer
        self.vocab_size = tokenizer.vocab_size
        self.digits = len(tokenizer.encode(self.elements[0]))
        self.prompt_length = 2 * self.digits + (1 if signs else 0) + 1  # a op b =
        self.start: tuple[int, ...] = ()
        self.end: int | None = tokenizer.special.get(END)
        self.max_length = self.prompt_length + self.digits - (self.end is None)
        self.splits: tuple[str, ...] = SPLITS + tuple(f"{split}:{name}" for split in SPLITS for name in config.operations if count > 1)
        self.fingerprint = fingerprint(config)

    def setup(self, per_run: Mapping[str, Sequence[Any]], device: torch.device | str) -> Tables:
        """Per run, k rows padded to the longest run's: row numbers "train", "val", "test" and the (perhaps noisy) answers "answer" of train, int32 [R, k];
        "num_train", "num_val", "num_test" int64 [R]; "operation" int64 [R, M], places in the shared tables.
        Shared: "prompts" int64 [M n n, P], tokens of ``a op b =``; "written" int64 [n, S], tokens of an answer (and the end);
        of all operations there are: "operations" int64 [O], places in NAMES, and "answers" int32 [O, n n].
        """
        mixtures = {text: self._mixture(text) for text in per_run["operation"]}
        names = [name for name in NAMES if any(name in mixture for mixture in mixtures.values())]
        places = {text: torch.tensor([names.index(name) for name in mixture]) for text, mixture in mixtures.items()}
        table = answers(names, self.config.p)

        @functools.cache
        def whole(operation: str, rule: str) -> tuple[Tensor, Tensor, Tensor]:
            """Answers of all row numbers, the row numbers that have one, and the group of each under the rule."""
            answer = table[places[operation]]
            rows = (answer.flatten() >= 0).nonzero()[:, 0]
            return answer.flatten(), rows, groups(rule, mixtures[operation], answer)[rows].unique(return_inverse=True)[1]

        @functools.cache  # runs that differ in something else share it
        def one(operation: str, train: float, val: float, test: float | None, rule: str, noise: float, seed: int) -> dict[str, Tensor]:
            answer, rows, group = whole(operation, rule)
            counts = split_counts(len(rows), train, val, test)
            check(counts[0] > 0, "task.train_fraction", f"{train:g} of {len(rows)} rows is no row to train on; raise it to {1 / len(rows):.3g} or more")
            parts = [rows[part] for part in divide(rule, seed, group, counts)]
            return dict(zip(SPLITS, parts, strict=True)) | {"answer": with_noise(answer[parts[0]], noise, seed, self.config.num_elements)}

        fields = ("operation", "train_fraction", "val_fraction", "test_fraction", "split", "label_noise", "split_seed")
        runs = [one(*values) for values in zip(*(per_run[name] for name in fields), strict=True)]
        per_run_tables = {name: _padded([run[name] for run in runs]) for name in runs[0]}
        per_run_tables |= {f"num_{split}": torch.tensor([len(run[split]) for run in runs]) for split in SPLITS}
        per_run_tables["operation"] = torch.stack([places[text] for text in per_run["operation"]])
        shared = {"operations": torch.tensor([NAMES.index(name) for name in names]), "answers": table} | self._texts()
        return Tables(*({name: x.to(device) for name, x in tables.items()} for tables in (per_run_tables, shared)))

    def _texts(self) -> dict[str, Tensor]:
        n, encode = self.config.num_elements, self.tokenizer.encode
        written = torch.tensor([encode(element) for element in self.elements])
        a, b = torch.arange(n).repeat_interleave(n), torch.arange(n).repeat(n)
        signs = [torch.tensor(encode(self._sign(name)), dtype=torch.int64).expand(n * n, -1) for name in self.config.operations]
        equals = torch.tensor(encode("=")).expand(n * n, -1)
        prompts = torch.cat([torch.cat([written[a], sign, written[b], equals], dim=1) for sign in signs])
        ends = torch.tensor([] if self.end is None else [self.end], dtype=torch.int64).expand(n, -1)
        return {"prompts": prompts, "written": torch.cat([written, ends], dim=1)}

    def _mixture(self, operation: str) -> tuple[str, ...]:
        """The operations of a run of this fleet."""
        config = replace(self.config, operation=operation)
        same = len(config.operations) == len(self.config.operations) and config.permutations == self.config.permutations
        check(same, "task.operation", f"{operation!r} and {self.config.operation!r} need different tokens, so they cannot share a fleet")
        return config.operations

    def batch(self, tables: Tables, key: Tensor, step: Tensor, size: int) -> Batch:
        """``size`` training rows of the stream of shuffled epochs; 0 = the whole training table, in its own order."""
        train = tables.per_run["train"]
        if size == 0:
            return self._rows(tables, "train", torch.arange(train.shape[1], device=train.device).expand(len(train), -1), self.config.loss)
        return self._rows(tables, "train", stream(key, step, size, tables.per_run["num_train"]), self.config.loss)

    def evaluation(self, tables: Tables, split: str, rows: int) -> Iterator[Batch]:
        """On "train" against the answers trained on, noise included. A run that lacks the operation of "val:mul" has no row there."""
        part, _, only = split.partition(":")
        known = split in self.splits or (part in SPLITS and (only,) == self.config.operations)  # "val:div" of division alone is "val"
        check(known, "evaluate", f"modular has no split {split!r}; known: {', '.join(self.splits)}")
        table = tables.per_run[part]
        for place in pieces(table.shape[1], rows, table.device):
            yield self._rows(tables, part, place.expand(len(table), -1), "answer", only)

    def _rows(self, tables: Tables, split: str, place: Tensor, loss: str, only: str = "") -> Batch:
        """place int64 [R, B] in the runs' tables of a split; places past a run's last row, and rows of other operations than ``only``, have weight 0."""
        per_run, shared, n = tables.per_run, tables.shared, self.config.num_elements
        index = place.clamp(max=per_run[split].shape[1] - 1)
        row = per_run[split].gather(1, index).long()

        def operation() -> Tensor:
            return per_run["operation"].gather(1, row // n**2)  # [R, B]

        there = place < per_run[f"num_{split}"][:, None]
        if only:
            there &= shared["operations"][operation()] == NAMES.index(only)
        answer = per_run["answer"].gather(1, index) if split == "train" else shared["answers"][operation(), row % n**2]
        # a place that is not there may have the answer -1: that reads some token, under weight 0
        tokens, targets = shared["prompts"][row], shared["written"][answer.long()]  # [R, B, P], [R, B, S]
        if loss == "answer":
            targets = targets[..., : self.digits]  # without the end
        if targets.shape[-1] > 1:
            tokens = torch.cat([tokens, targets[..., :-1]], dim=-1)
        at = slice(self.prompt_length - 1, tokens.shape[-1])
        if loss == "all":
            targets, at = torch.cat([tokens[..., 1:], targets[..., -1:]], dim=-1), None
        return Batch(tokens, targets, there.float()[..., None].expand(targets.shape), at=at)

    def describe(self, tables: Tables, run: int) -> dict[str, Any]:
        names, answer, parts = self._names(tables, run), self._answers(tables, run), self._parts(tables, run)
        n, num_rows = self.config.num_elements, int((answer >= 0).sum())
        dropped = len(answer) - num_rows - n * ("div" in names)  # nobody expects a row with b = 0 there
        row = int(parts[0][0])
        sign, a, b, c = self._sign(names[row // n**2]), *(self.elements[i] for i in (row // n % n, row % n, int(answer[row])))
        return {
            "operation": "+".join(names),
            **({"elements": n} if self.config.permutations else {"p": n}),
            "rows": num_rows,
            "rows dropped": dropped,
            **{split: len(part) for split, part in zip(SPLITS, parts, strict=True)},
            "unused": num_rows - sum(map(len, parts)),
            "altered answers": int((tables.per_run["answer"][run, : len(parts[0])].cpu() != answer[parts[0]]).sum()),
            "split hash": split_hash(parts),
            "example": (" " if self.config.tokens == "residue" else "").join(filter(None, [a, sign, b, "=", c])),
            "notes": self._notes(names, answer, parts[0], dropped),
        }

    def _notes(self, names: Sequence[str], answer: Tensor, train: Tensor, dropped: int) -> list[str]:
        """What a reader may not expect of a run's data. answer [M n n], train: its rows."""
        config, n, notes = self.config, self.config.num_elements, []
        if config.permutations:
            notes.append(f"p is not used: S5 has {n} elements")
        if (config.tokens == "residue" or config.permutations) and (config.base != 10 or config.least_significant_first):
            how = "an element is one token" if config.tokens == "residue" else "a permutation is written as its five images"
            notes.append(f"base and least_significant_first are not used: {how}")
        if dropped:
            candidates = dropped + int((answer >= 0).sum())
            notes.append(f"{dropped:,} of {candidates:,} rows are left out: b shares a factor with {n}, so it has no inverse")
        if n == 2 and {"div", "div_odd"} & set(names):
            notes.append("modulo 2 only 1 has an inverse, so a / b is always a")
        seen = (train // n**2).bincount(minlength=len(names)).tolist()
        notes += [f"operator {name} has no training row" for name, count in zip(names, seen, strict=True) if count == 0]
        known, trained = answer[answer >= 0].bincount(minlength=n) > 0, answer[train].bincount(minlength=n) > 0
        if missing := [self.elements[i] for i in (known & ~trained).nonzero()[:, 0].tolist()]:
            first = ", ".join(missing[:5]) + (", ..." if len(missing) > 5 else "")
            notes.append(f"answers without a training row: {len(missing)} of {int(known.sum())} (first: {first})")
        return notes

    def _names(self, tables: Tables, run: int) -> list[str]:
        """The operations of run ``run``."""
        return [NAMES[code] for code in tables.shared["operations"][tables.per_run["operation"][run]].tolist()]

    def _answers(self, tables: Tables, run: int) -> Tensor:
        """int32 [M n n] by row number, -1 where there is none, on the CPU."""
        return tables.shared["answers"][tables.per_run["operation"][run]].flatten().cpu()

    def _parts(self, tables: Tables, run: int) -> list[Tensor]:
        """Run ``run``'s row numbers in train, val and test, on the CPU."""
        return [tables.per_run[split][run, : int(tables.per_run[f"num_{split}"][run])].cpu().long() for split in SPLITS]

    def _sign(self, name: str) -> str:
        """An operation in text, "" without operator tokens. Among digits a name stands in brackets."""
        if not self.config.operator_token:
            return ""
        return SIGNS.get(name, name if self.config.tokens == "residue" else f"<{name}>")


def spelled(config: ModularConfig) -> list[str]:
    """Every element as text: a permutation as its images, a residue in decimal or (tokens "digits") at fixed width in ``base``."""
    if config.permutations:
        return ["".join(map(str, images)) for images in permutations().tolist()]
    if config.tokens == "residue":
        return list(map(str, range(config.p)))
    width = next(k for k in range(1, 64) if config.base**k >= config.p)
    powers = [config.base**k for k in range(width)]  # least significant first
    return ["".join(DIGITS[x // power % config.base] for power in (powers if config.least_significant_first else powers[::-1])) for x in range(config.p)]


def groups(rule: str, names: Sequence[str], table: Tensor) -> Tensor:
    """int64 [M n n]: what ``divide`` keeps together, or shares out, under a rule. table int32 [M, n n]."""
    if rule == "paired":
        return facts(names, table).flatten()
    n = math.isqrt(table.shape[1])
    if rule == "rows":
        return (torch.arange(table.numel()) // n) % n
    return (table.long() + torch.arange(len(names))[:, None] * n).flatten()  # stratified: by operation and answer; random does not ask


def with_noise(answer: Tensor, share: float, seed: int, n: int) -> Tensor:
    """int32 [k] answers with a share of them replaced by a uniform element."""
    if share == 0:
        return answer
    noisy = rng.permutation(rng.key(torch.tensor(seed), "label noise", 0), len(answer))[: round(share * len(answer))]
    drawn = rng.randint(rng.key(torch.tensor(seed), "label noise", 1), len(answer), n).int()
    return answer.index_copy(0, noisy, drawn[noisy])


def export(config: ModularConfig, seed: int, path: str | Path) -> dict[str, Any]:
    """Write the table with its split as tab-separated ``a op b result split`` (rows in order; results of train as trained on, noise included).

    Residues are decimal and permutations their five images, whatever the tokens. Returns ``ModularTask.describe``.
    A file that exists is never overwritten: ConfigError ("out").
    """
    task = ModularTask(config)
    tables = task.setup({name: [getattr(config, name)] for name in fields_per_run(config)} | {"split_seed": [seed]}, "cpu")
    table, parts, n = task._answers(tables, 0), task._parts(tables, 0), config.num_elements
    result = table.index_copy(0, parts[0], tables.per_run["answer"][0, : len(parts[0])])
    split_of = dict.fromkeys((table >= 0).nonzero()[:, 0].tolist(), "unused")
    for split, part in zip(SPLITS, parts, strict=True):
        split_of |= dict.fromkeys(part.tolist(), split)
    signs, text = [SIGNS.get(name, name) for name in config.operations], spelled(replace(config, tokens="residue"))
    lines = [f"{text[row // n % n]}\t{signs[row // n**2]}\t{text[row % n]}\t{text[int(result[row])]}\t{split}\n" for row, split in split_of.items()]
    write_new(path, ["a\top\tb\tresult\tsplit\n", *lines])
    return task.describe(tables, 0)


def _padded(rows: Sequence[Tensor]) -> Tensor:
    """Tensors [n_r] -> int32 [R, n], zeros after each run's own, n at least 1 (so an empty split is a table of one row that is not there)."""
    table = torch.zeros(len(rows), max(1, *map(len, rows)), dtype=torch.int32)
    for r, row in enumerate(rows):
        table[r, : len(row)] = row
    return table
