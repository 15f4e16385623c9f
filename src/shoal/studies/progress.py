"""One line a fleet on standard error: a live bar in a terminal, a plain line now and then without one."""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn

from shoal.results.wording import duration, number

if TYPE_CHECKING:
    from shoal.train.fleet import Fleet

PLAIN_AFTER, PLAIN_EVERY = 3.0, 10.0  # seconds of a fleet before its first plain line, and between two


class FleetProgress:
    """``with FleetProgress(True) as progress: progress.update("fleet 1/2, 4 runs", fleet)``"""

    def __init__(self, shown: bool, live: bool = True) -> None:
        """``live`` False: plain lines even in a terminal, where several processes write."""
        console = Console(stderr=True)
        self.shown, self.live = shown, shown and live and console.is_terminal
        self.bars: dict[str, TaskID] = {}
        self.began: dict[str, tuple[float, int]] = {}  # name -> when it was first seen, and at which step
        self.next = 0.0
        columns = (BarColumn(bar_width=10), TextColumn("{task.description}: {task.fields[text]}"))  # one text, which a narrow terminal cuts at its end
        self.rich = Progress(*columns, console=console, disable=not self.live)

    def __enter__(self) -> FleetProgress:
        self.rich.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.rich.stop()

    def note(self, text: str) -> None:
        if self.live:
            self.rich.console.print(text, highlight=False, markup=False, soft_wrap=True)
        elif self.shown:
            print(text, file=sys.stderr, flush=True)

    def update(self, name: str, fleet: Fleet, *, last: bool = False) -> None:
        now = time.perf_counter()
        if name not in self.began:
            self.began[name], self.next = (now, fleet.step), now + PLAIN_AFTER
        began, first = self.began[name]
        text = line(fleet, (fleet.step - first) / max(now - began, 1e-9), last)
        if self.live:
            if name not in self.bars:
                self.bars[name] = self.rich.add_task(name, total=fleet.last_step, text="")
            self.rich.update(self.bars[name], completed=fleet.last_step if last else fleet.step, text=text)
        elif self.shown and (last or now > self.next):
            self.next = now + PLAIN_EVERY
            print(f"{name}: {text}", file=sys.stderr, flush=True)


def line(fleet: Fleet, rate: float, last: bool = False) -> str:
    """step 1,200/3,000, val/accuracy median 0.99 best 1, 41.3 steps/s, at most 44 s left, 3/8 finished, 1 dead"""
    parts = [f"step {fleet.step:,}/{fleet.last_step:,}"]
    if "median" in fleet.summary:
        middle, best = fleet.summary["median"], fleet.summary["best"]
        parts.append(f"{fleet.summary_metric} {best:.4g}" if len(fleet.runs) == 1 else f"{fleet.summary_metric} median {middle:.4g} best {best:.4g}")
    if rate:
        parts.append(f"{number(float(f'{rate:.3g}'))} steps/s")
        parts += [] if last else [f"at most {duration((fleet.last_step - fleet.step) / rate)} left"]
    parts.append(f"{fleet.summary.get('finished', 0):.0f}/{len(fleet.runs)} finished")
    if fleet.summary.get("dead"):
        parts.append(f"{fleet.summary['dead']:.0f} dead")
    return ", ".join(parts)
