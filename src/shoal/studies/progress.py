"""One line a fleet on standard error: a live bar in a terminal, a plain line now and then without one."""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

if TYPE_CHECKING:
    from shoal.train.fleet import Fleet

PLAIN_EVERY = 10.0  # seconds


class FleetProgress:
    """``with FleetProgress(True) as progress: progress.update("fleet 1/2, 4 runs", fleet)``"""

    def __init__(self, shown: bool) -> None:
        console = Console(stderr=True)
        self.shown, self.live = shown, shown and console.is_terminal
        self.bars: dict[str, TaskID] = {}
        self.began: dict[str, tuple[float, int]] = {}
        self.said = 0.0
        columns = (TextColumn("{task.description}"), BarColumn(bar_width=20), TextColumn("{task.fields[text]}"), TimeRemainingColumn(compact=True))
        self.rich = Progress(*columns, console=console, disable=not self.live)

    def __enter__(self) -> FleetProgress:
        self.rich.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.rich.stop()

    def note(self, text: str) -> None:
        if self.live:
            self.rich.console.print(text, highlight=False)
        elif self.shown:
            print(text, file=sys.stderr, flush=True)

    def update(self, name: str, fleet: Fleet, *, last: bool = False) -> None:
        now = time.perf_counter()
        began, first = self.began.setdefault(name, (now, fleet.step))
        text = line(fleet, (fleet.step - first) / max(now - began, 1e-9))
        if self.live:
            if name not in self.bars:
                self.bars[name] = self.rich.add_task(name, total=fleet.last_step, text="")
            self.rich.update(self.bars[name], completed=fleet.last_step if last else fleet.step, text=text)
        elif self.shown and (last or now - self.said > PLAIN_EVERY):
            self.said = now
            rate = (fleet.step - first) / max(now - began, 1e-9)
            remaining = "" if last or not rate else f", at most {_duration((fleet.last_step - fleet.step) / rate)} left"
            print(f"{name}: {text}{remaining}", file=sys.stderr, flush=True)


def line(fleet: Fleet, rate: float) -> str:
    """step 1,200 of 3,000, 41.3 steps/s, val/accuracy median 0.99 best 1, 3 finished, 0 dead"""
    parts = [f"step {fleet.step:,} of {fleet.last_step:,}", f"{rate:.3g} steps/s"]
    if "median" in fleet.summary:
        parts.append(f"{fleet.summary_metric} median {fleet.summary['median']:.4g} best {fleet.summary['best']:.4g}")
    parts.append(f"{fleet.summary.get('finished', 0):.0f} finished")
    if fleet.summary.get("dead"):
        parts.append(f"{fleet.summary['dead']:.0f} dead")
    return ", ".join(parts)


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
