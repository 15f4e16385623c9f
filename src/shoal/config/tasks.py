"""The configs of the tasks; what each does is in ``shoal/tasks/<name>.py``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from shoal.config.fields import PerRun, check

Operation = Literal["add", "sub", "mul", "div"]


@dataclass(frozen=True, kw_only=True)
class MemorizeConfig:
    """Learn given strings by heart, character by character, between a begin and an end token."""

    strings: tuple[str, ...] = ("I love machine learning",)
    unscored: PerRun[int] = 0  # the loss leaves out the first so many characters of every string

    def __post_init__(self) -> None:
        check(len(self.strings) > 0, "strings", "give at least one string")
        check(all(self.strings), "strings", "an empty string cannot be memorised; remove it")
        check(self.unscored >= 0, "unscored", "must be 0 or more")
        check(
            all(self.unscored <= len(s) for s in self.strings),
            "unscored",
            f"{self.unscored} masks more than a whole string; at most {min(map(len, self.strings), default=0)}",
        )


@dataclass(frozen=True, kw_only=True)
class ModularConfig:
    """a op b = c modulo p, the whole table, split into train, validation and test."""

    p: int = 97
    operation: PerRun[Operation] = "div"
    train_fraction: PerRun[float] = 0.5
    val_fraction: PerRun[float] = 0.1
    test_fraction: PerRun[float | None] = None  # None = all that is left
    tokens: Literal["residue", "character"] = "residue"
    operator_token: bool = True  # False: "a b =" (with one operation the token says nothing)
    label_noise: PerRun[float] = 0.0  # share of training answers replaced by a uniform residue

    def __post_init__(self) -> None:
        check(self.p >= 2, "p", f"the modulus must be 2 or more, not {self.p}")
        for name in ("train_fraction", "val_fraction"):
            value = getattr(self, name)
            check(0 < value < 1, name, f"must lie strictly between 0 and 1, not {value}")
        test = self.test_fraction or 0.0
        check(0 <= test < 1, "test_fraction", f"must lie in [0, 1), not {test}")
        total = self.train_fraction + self.val_fraction + test
        check(total <= 1 + 1e-9, "train_fraction", f"train + val + test fractions sum to {total:g}, past 1; lower one of them")
        check(0 <= self.label_noise <= 1, "label_noise", "must lie in [0, 1]")


TaskConfig = MemorizeConfig | ModularConfig
