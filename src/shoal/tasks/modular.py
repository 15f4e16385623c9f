"""Modular: the whole table of a op b = c (mod p), split into train, validation and test. The task that shows grokking (Power et al., arXiv 2201.02177).

Operands are 0 <= a, b < p (a range up to p itself would repeat residue 0), and for division b is a unit modulo p, inverted by ``pow(b, -1, p)``:
p(p - 1) rows for a prime p; for a composite one the rows whose b has no inverse are dropped and counted. A row's number is a p + b.

Only the answer is scored. Tokens per residue: ``a op b =`` read, one token answered. Tokens per character: operands and answer are decimal digits,
with leading zeros to one width, so the answer stands at the same positions in every row (and is read but for its last digit).
All operations share one operator token, so runs that differ in the operation share a fleet; in text it is the operation's own sign.

ModularTask(ModularConfig(p=97, operation="div"))   or   shoal data modular --p 97 --operation div --out FILE.tsv
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from shoal import rng
from shoal.config import ModularConfig, fields_per_run
from shoal.config.fields import ConfigError, check
from shoal.config.tasks import Operation
from shoal.contracts import Batch, Tables, Tokenizer
from shoal.data.tokenizers import CharacterTokenizer, WordTokenizer
from shoal.tasks.stream import fingerprint, pieces, stream

SIGNS: dict[Operation, str] = {"add": "+", "sub": "-", "mul": "*", "div": "/"}
OPERATIONS = tuple(SIGNS)
SPLITS = ("train", "val", "test")
MAX_P = 2048  # p * p rows: past this the shared tables alone take more than 200 MB


def answers(p: int) -> Tensor:
    """int32 [4, p * p]: the answer of row a p + b for each of OPERATIONS; -1 where division has none."""
    a, b = torch.arange(p)[:, None], torch.arange(p)
    inverse = torch.tensor([pow(x, -1, p) if math.gcd(x, p) == 1 else -1 for x in range(p)])
    divided = torch.where(inverse < 0, -1, a * inverse % p)
    return torch.stack([(a + b) % p, (a - b) % p, a * b % p, divided]).flatten(1).int()


def split_counts(num_rows: int, train: float, val: float, test: float | None) -> list[int]:
    """Rows of train, val, test: round(num_rows * fraction) each. test None takes all that is left; fractions that sum to 1 leave nothing out."""
    left, counts = num_rows, []
    for fraction in (train, val, test or 0.0):
        counts.append(min(left, round(num_rows * fraction)))
        left -= counts[-1]
    if test is None or train + val + test > 1 - 1e-9:
        counts[1 if test == 0 else 2] += left
    return counts


def split_hash(parts: Sequence[Tensor]) -> str:
    """12 hexadecimal digits of the sha256 over the sorted row numbers of train, val, test (decimal, commas between rows, semicolons between splits)."""
    text = ";".join(",".join(map(str, sorted(part.tolist()))) for part in parts)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


class ModularTask:
    def __init__(self, config: ModularConfig) -> None:
        check(config.p <= MAX_P, "task.p", f"the whole table is held in memory, so p may be at most {MAX_P}, not {config.p}")
        _known(config.operation)
        self.config = config
        sign = [SIGNS[config.operation]] if config.operator_token else []
        if config.tokens == "residue":
            self.digits, self.space = 1, " "  # no leading zeros
            self.tokenizer: Tokenizer = WordTokenizer([*map(str, range(config.p)), *sign, "="])
        else:
            self.digits, self.space = len(str(config.p - 1)), ""
            self.tokenizer = CharacterTokenizer(["=", *"0123456789", *sign])  # every sign sorts first, so the ids do not depend on the operation
        self.vocab_size = self.tokenizer.vocab_size
        self.prompt_length = 2 * self.digits + len(sign) + 1  # a op b =
        self.max_length = self.prompt_length + self.digits - 1
        self.splits: tuple[str, ...] = SPLITS
        self.fingerprint = fingerprint(config)
        self.start: tuple[int, ...] = ()
        self.end: int | None = None

    def setup(self, per_run: Mapping[str, Sequence[Any]], device: torch.device | str) -> Tables:
        """Per run, n rows padded to the longest run's: row numbers "train", "val", "test" and the (perhaps noisy) answers "answer" of train, int32 [R, n];
        "num_train", "num_val", "num_test" and "operation" (place in OPERATIONS), int64 [R].
        Shared: "prompts" int64 [p p, P], tokens of ``a op b =``; "answers" as answers(); "written" int64 [p, S], tokens of an answer.
        """
        p, table = self.config.p, answers(self.config.p)
        names = ("operation", "train_fraction", "val_fraction", "test_fraction", "label_noise", "split_seed")
        runs = [self._split(table, *values) for values in zip(*(per_run[name] for name in names), strict=True)]
        columns = {name: [run[name] for run in runs] for name in runs[0]}
        counts = {f"num_{split}": torch.tensor([len(part) for part in columns[split]]) for split in SPLITS}
        counts["operation"] = torch.tensor([OPERATIONS.index(name) for name in per_run["operation"]])

        written = torch.tensor([self.tokenizer.encode(self._write(x)) for x in range(p)])
        a, b = torch.arange(p).repeat_interleave(p), torch.arange(p).repeat(p)
        signs = self.tokenizer.encode(self._sign()), self.tokenizer.encode("=")
        operator, equals = (torch.tensor(sign, dtype=torch.int64).expand(p * p, -1) for sign in signs)
        prompts = torch.cat([written[a], operator, written[b], equals], dim=1)

        per_run_tables = {name: _padded(rows) for name, rows in columns.items()} | counts
        shared = {"prompts": prompts, "answers": table, "written": written}
        return Tables(*({name: x.to(device) for name, x in tables.items()} for tables in (per_run_tables, shared)))

    def _split(self, table: Tensor, operation: str, train: float, val: float, test: float | None, noise: float, seed: int) -> dict[str, Tensor]:
        """One run's row numbers by split, and its training answers."""
        _known(operation)
        answer = table[OPERATIONS.index(operation)]
        rows = (answer >= 0).nonzero()[:, 0]  # in order of a, then b
        counts = split_counts(len(rows), train, val, test)
        check(counts[0] > 0, "task.train_fraction", f"{train:g} of {len(rows)} rows is no row to train on; raise it to {1 / len(rows):.3g} or more")
        order = rng.permutation(rng.key(torch.tensor(seed), "split"), len(rows))
        parts = rows[order[: sum(counts)]].split(counts)

        right = answer[parts[0]]
        noisy = rng.permutation(rng.key(torch.tensor(seed), "label noise", 0), counts[0])[: round(noise * counts[0])]
        drawn = rng.randint(rng.key(torch.tensor(seed), "label noise", 1), counts[0], self.config.p).int()
        return dict(zip(SPLITS, parts, strict=True)) | {"answer": right.index_copy(0, noisy, drawn[noisy])}

    def batch(self, tables: Tables, key: Tensor, step: Tensor, size: int) -> Batch:
        """``size`` training rows of the stream of shuffled epochs; 0 = the whole training table, in its own order."""
        train = tables.per_run["train"]
        if size == 0:
            return self._rows(tables, "train", torch.arange(train.shape[1], device=train.device).expand(len(train), -1))
        return self._rows(tables, "train", stream(key, step, size, tables.per_run["num_train"]))

    def evaluation(self, tables: Tables, split: str, rows: int) -> Iterator[Batch]:
        """On "train" against the answers trained on, noise included."""
        check(split in SPLITS, "evaluate", f"modular has no split {split!r}; known: {', '.join(SPLITS)}")
        table = tables.per_run[split]
        for place in pieces(table.shape[1], rows, table.device):
            yield self._rows(tables, split, place.expand(len(table), -1))

    def _rows(self, tables: Tables, split: str, place: Tensor) -> Batch:
        """place int64 [R, B] in the runs' tables of a split; places past a run's last row have weight 0."""
        per_run, shared = tables.per_run, tables.shared
        index = place.clamp(max=per_run[split].shape[1] - 1)
        row = per_run[split].gather(1, index).long()
        answer = per_run["answer"].gather(1, index) if split == "train" else shared["answers"][per_run["operation"][:, None], row]
        # a place that is not there may have the answer -1: that reads some token, under weight 0
        tokens, targets = shared["prompts"][row], shared["written"][answer.long()]  # [R, B, P], [R, B, S]
        if self.digits > 1:
            tokens = torch.cat([tokens, targets[..., :-1]], dim=-1)
        scored = (place < per_run[f"num_{split}"][:, None]).float()[..., None]
        return Batch(tokens=tokens, targets=targets, weights=scored.expand(targets.shape), at=slice(self.prompt_length - 1, self.max_length))

    def describe(self, tables: Tables, run: int) -> dict[str, Any]:
        p = self.config.p
        code = int(tables.per_run["operation"][run])
        parts = self._parts(tables, run)
        answer = tables.shared["answers"][code].cpu()
        num_rows = int((answer >= 0).sum())
        dropped = p * (p - 1) - num_rows if OPERATIONS[code] == "div" else 0
        row = int(parts[0][0])
        return {
            "operation": OPERATIONS[code],
            "p": p,
            "rows": num_rows,
            "rows dropped": dropped,
            "dropped because": f"b shares a factor with {p}, so it has no inverse" if dropped else None,
            **{split: len(part) for split, part in zip(SPLITS, parts, strict=True)},
            "unused": num_rows - sum(map(len, parts)),
            "altered answers": int((tables.per_run["answer"][run, : len(parts[0])].cpu() != answer[parts[0]]).sum()),
            "split hash": split_hash(parts),
            "example": self.space.join(filter(None, [self._write(row // p), self._sign(code), self._write(row % p), "=", self._write(int(answer[row]))])),
        }

    def _parts(self, tables: Tables, run: int) -> list[Tensor]:
        """Run ``run``'s row numbers in train, val and test, on the CPU."""
        return [tables.per_run[split][run, : int(tables.per_run[f"num_{split}"][run])].cpu().long() for split in SPLITS]

    def _write(self, residue: int) -> str:
        return f"{residue:0{self.digits}d}"

    def _sign(self, code: int | None = None) -> str:
        """The sign of an operation (default: this config's), "" without operator tokens."""
        name = self.config.operation if code is None else OPERATIONS[code]
        return SIGNS[name] if self.config.operator_token else ""


def export(config: ModularConfig, seed: int, path: str | Path) -> dict[str, Any]:
    """Write the table with its split as tab-separated ``a op b result split`` (rows in order; results of train as trained on, noise included).

    Returns ``ModularTask.describe``. A file that exists is never overwritten: ConfigError ("out").
    """
    task = ModularTask(config)
    tables = task.setup({name: [getattr(config, name)] for name in fields_per_run(config)} | {"split_seed": [seed]}, "cpu")
    table = tables.shared["answers"][OPERATIONS.index(config.operation)]
    parts = task._parts(tables, 0)
    result = table.index_copy(0, parts[0], tables.per_run["answer"][0, : len(parts[0])])
    split_of = dict.fromkeys((table >= 0).nonzero()[:, 0].tolist(), "unused")
    for split, part in zip(SPLITS, parts, strict=True):
        split_of |= dict.fromkeys(part.tolist(), split)
    lines = [f"{row // config.p}\t{SIGNS[config.operation]}\t{row % config.p}\t{int(result[row])}\t{split}\n" for row, split in split_of.items()]
    try:
        with Path(path).open("x", encoding="utf-8", newline="\n") as file:
            file.writelines(["a\top\tb\tresult\tsplit\n", *lines])
    except FileExistsError:
        raise ConfigError("out", f"{path} exists already; name another file or remove this one") from None
    except OSError as error:
        raise ConfigError("out", f"cannot write {path} ({error.strerror}); name a file in a directory that exists and is writable") from None
    return task.describe(tables, 0)


def _known(operation: str) -> None:
    check(operation in SIGNS, "task.operation", f"unknown operation {operation!r}; known: {', '.join(SIGNS)}")


def _padded(rows: Sequence[Tensor]) -> Tensor:
    """Tensors [n_r] -> int32 [R, n], zeros after each run's own, n at least 1 (so an empty split is a table of one row that is not there)."""
    table = torch.zeros(len(rows), max(1, *map(len, rows)), dtype=torch.int32)
    for r, row in enumerate(rows):
        table[r, : len(row)] = row
    return table
