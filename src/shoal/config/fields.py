"""The tag for per-run fields, and the one way a config says what is wrong with it."""

from __future__ import annotations

from typing import Annotated, TypeVar

T = TypeVar("T")
PER_RUN = "per run"
PerRun = Annotated[T, PER_RUN]  # PerRun[float]: may differ between the runs of one fleet


class ConfigError(ValueError):
    """A setting the user must change. ``path`` names it ("task.p"); the message says how."""

    def __init__(self, path: str, message: str) -> None:
        super().__init__(f"{path}: {message}" if path else message)
        self.path, self.message = path, message


def check(ok: bool, field: str, message: str) -> None:
    if not ok:
        raise ConfigError(field, message)
