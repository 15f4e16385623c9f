"""What the studies of associative recall share: the models, the run, two stages (learning rate, then fresh seeds), lengths, figures, what claims compare.

Recall succeeds only in narrow windows of the learning rate (arXiv 2508.19029), so every setting is trained at each of several on seeds of its own
(two of them for every three that are reported), and the best of those rates on fresh seeds: figures of lengths, tables and claims are of these alone.
Solved: 99 % of the test sequences at five evaluations in a row. No run is stopped when it is, so lengths are compared after equal training.

    recall = Recall(config)
    recall.study("recall-induction", __doc__, [recall.most("Mamba is at 99 %.", {"variant": "Mamba"}, KNOWN)])
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from shoal.config import Adam, DecoderConfig, RecallConfig, RunConfig, Schedule, StudyConfig
from shoal.results import statistics
from shoal.results.claims import Claim, Sample
from shoal.results.comparisons import heatmap, mean_of
from shoal.results.figures import Figure, curves, slug
from shoal.results.profiles import profile
from shoal.results.rows import Rows
from shoal.results.tables import Table
from shoal.results.wording import setting
from shoal.studies import recall_tables
from shoal.studies.recall_tables import LR, METRIC, SEED, SOLVED, Published, accuracy, published_table
from shoal.studies.shared import matching, sooner
from shoal.studies.study import Measure, Study, about, cells
from shoal.studies.tuning import Tuning, of, without

if TYPE_CHECKING:
    from shoal.train.run import Run

DELAY, QUERIES = "task.delay", "task.num_queries"
LRS = [1e-3, 3e-3, 1e-2, 3e-2]
TUNING = 1000  # the first seed of the tuning
KNOWN, NOT_KNOWN = (SOLVED, 1.0), (0.0, SOLVED)  # accuracies
ENOUGH = 5  # fresh seeds from which on every length is measured, not a few of them
LEARNED, ROTARY, NONE, MAMBA, HYBRID, MAMBA2, S4D = "learned positions", "rotary", "no positions", "Mamba", "hybrid", "Mamba-2", "S4D"


def _model(*mixers: str, positions: str = "none") -> dict[str, Any]:
    return {"model.mixers": list(mixers), "model.positions": positions}


MODELS = {  # a layer is a mixer and nothing else
    LEARNED: _model("attention", positions="learned"),  # also a row for each place past the training length, which stays as it began
    # At head width 8 base 10,000 has one frequency that tells neighbours apart. After 2,500 steps of 32, lr 0.01, two seeds, without
    # biases: 0.72 and 0.76 at L; with base 100 0.90 and 0.85, with base 10 0.45 and 0.85.
    ROTARY: _model("attention", positions="rotary") | {"model.rotary_base": 100.0},
    NONE: _model("attention"),
    MAMBA: _model("mamba"),
    HYBRID: _model("mamba", "attention"),
    MAMBA2: _model("ssd"),
    S4D: _model("s4d"),  # a recurrence that does not depend on what it reads
}


def some(*names: str) -> dict[str, dict[str, Any]]:
    return {name: MODELS[name] for name in names}


def base(steps: int, evaluations: int, *, width: int = 8, **task: Any) -> RunConfig:
    """K = 16, L = 32, one head, fresh batches of 64; and what was open: norms before each mixer, biases, Adam, cosine to a tenth.

    Biases decide about attention: no direction is common to the 16 fixed vectors, so without them it cannot look a fixed way back whatever it reads. In 2,500
    steps of 32 at lr 0.01, 0 of 15 rotary runs came to 99 % without and 14 of 15 with them. Vectors of positions begin about as long as those of tokens, 1.
    """
    return RunConfig(
        task=RecallConfig(**task),
        model=DecoderConfig(
            width=width, num_layers=2, num_heads=1, feed_forward=0, norm="rms", head_bias=True, positions="none",
            token_embedding="unit", embedding_std=width**-0.5, linear_init="uniform",
        ),
        optimizer=Adam(beta2=0.98),
        schedule=Schedule(kind="cosine", warmup=0.02, floor=0.1),
        steps=steps,
        batch_size=64,
        clip=1.0,
        log_every=steps // evaluations,
        evaluate_every=steps // evaluations,
        evaluate=("test",),
    )  # fmt: skip


def order(rows: Rows) -> tuple[float, float, float]:
    """Small is better: the share not solved at the end, then the median steps to that, then what the last accuracy lacks, in the mean.

    At the end: a rate may solve it soonest and lose it again, as 0.03 does with the hybrid and 4 queries.
    """
    times, observed = rows.reached(METRIC, SOLVED)
    last = rows.column(f"final.{METRIC}")
    return float(np.mean(last < SOLVED)), statistics.survival_median(times, observed).value, 1 - float(np.mean(last))


def every_length(task: RecallConfig) -> list[int]:
    """All there are, from the shortest that has room for the delay."""
    return list(range(task.delay + 2, task.longest * task.length + 1))


def few_lengths(task: RecallConfig) -> list[int]:
    """The shortest, and every quarter of the training length up to the longest."""
    quarters = [quarter * task.length // 4 for quarter in range(1, 4 * task.longest + 1)]
    return sorted({task.delay + 2, *(length for length in quarters if length >= task.delay + 2)})


@dataclass(frozen=True, kw_only=True)
class Recall:
    """A study's config and what follows from it."""

    config: StudyConfig
    line: str = "variant"  # the path whose values are the lines of a figure
    every: Callable[[RecallConfig], list[int]] = every_length  # lengths measured with enough seeds ...
    few: Callable[[RecallConfig], list[int]] = few_lengths  # ... and with fewer
    multiples: tuple[int, ...] = (1, 2, 3)  # of the training length, in the table
    logx: bool = False
    tuning: Tuning = field(init=False)

    def __post_init__(self) -> None:
        seeds = tuple(range(TUNING, TUNING + max(1, 2 * self.config.seeds // 3)))
        object.__setattr__(self, "tuning", Tuning(seeds=seeds, reported=without(LR), order=order, suffix=" (tuning)"))
        self.tuning.check(self.config)

    def cells(self, *told: str) -> list[dict[str, Any]]:
        """The combinations of all that is varied, but for the learning rate and these paths ("variant" among them)."""
        kept = without(LR, *told)
        return cells(replace(self.config, variants={} if "variant" in told else self.config.variants, grid=kept(self.config.grid)))

    def values(self, path: str, alone: Any) -> list[Any]:
        """What the grid gives a path; ``alone``: the run's own, where it does not vary it."""
        return self.config.grid.get(path, [alone])

    def most(self, text: str, cell: Mapping[str, Any], inside: tuple[float, float], *, times: int = 1, told: Sequence[str] = ()) -> Claim:
        """Held if in more than half of the seeds the accuracy at ``times`` the training length lies inside (both ends belong to it)."""

        def sample(rows: Rows) -> Sample:
            x = accuracy(self.tuning.fresh(rows).where(cell), times)
            return Sample((x >= inside[0]) & (x <= inside[1]), kind="proportion")

        return Claim(about(text, cell, ("variant", *told)), sample, (0.5, 1.0))

    def gains(self, text: str, a: dict[str, Any], b: dict[str, Any], shared: dict[str, Any], *, least: float = 0.01, times: int = 1) -> Claim:
        """Held if a's accuracy is b's and ``least`` or more beside, seed by seed, in the mean; both in the cell ``shared``."""

        def sample(rows: Rows) -> Sample:
            fresh = self.tuning.fresh(rows)
            return Sample(accuracy(fresh.where(shared | a), times), pair=accuracy(fresh.where(shared | b), times), bounds=(-1, 1))

        return Claim(about(text, shared, ("variant",)), sample, (least, 1.0))

    def sooner(self, text: str, a: dict[str, Any], b: dict[str, Any], shared: dict[str, Any]) -> Claim:
        """Held if a is solved in fewer steps than b in more than half of the seeds of which it can be said."""

        def sample(rows: Rows) -> Sample:
            fresh = self.tuning.fresh(rows)
            return sooner(fresh.where(shared | a), fresh.where(shared | b), METRIC, SOLVED)

        return Claim(about(text, shared, ("variant",)), sample, (0.5, 1.0))

    def study(
        self, name: str, question: str | None, claims: Sequence[Claim], *, published: Sequence[Published] = (), tables: Sequence[Table] = (),
        figures: Sequence[Figure] = (), measures: Mapping[str, Measure] | None = None,
    ) -> Study:  # fmt: skip
        """``tables``, ``figures`` and ``measures``: the study's own, of the fresh runs."""
        by, of_fresh = list(self.cells()[0]), self.tuning.of_fresh
        last = [recall_tables.lengths(by, self.multiples), *([published_table(published)] if published else [])]
        return Study(
            name=name,
            question=question or "",
            main_metric=METRIC,
            config=self.config,
            wanted=lambda rows: self.tuning.wanted(self.config, rows),
            eager=True,
            measures={name: self.tuning.measure(of) for name, of in {"lengths": self._lengths, **(measures or {})}.items()},
            figures=[of_fresh(self._profile(by)), *map(of_fresh, figures), *self._training()],
            tables=[*map(of_fresh, tables), recall_tables.chosen(self.tuning, by), *map(of_fresh, last)],
            claims=claims,
        )

    def _lengths(self, run: Run) -> list[dict[str, Any]]:
        """Accuracy at other lengths."""
        from shoal.inference.evaluate import lengths

        assert isinstance(run.config.task, RecallConfig)
        return [*lengths(run, (self.every if self.config.seeds >= ENOUGH else self.few)(run.config.task))]

    def _profile(self, by: Sequence[str]) -> Figure:
        return profile(
            "lengths", "length", "accuracy", line=self.line, by=by, logx=self.logx,
            marks={"training length": lambda row: row["task.length"]}, levels={"chance": lambda row: 1 / row["task.num_tokens"]},
            caption="Accuracy on fresh sequences of each measured length, the query included; fresh seeds at the chosen learning rate: median (line), lowest "
            "to highest (band).",
        )  # fmt: skip

    def _training(self) -> list[Figure]:
        """Accuracy against steps, and over learning rates and seeds of the tuning: a figure for every combination of what is not a line."""
        found = []
        for cell in self.cells(self.line):
            where, names = (f" With {setting(cell)}.", [setting(cell)]) if cell else ("", [])
            steps = curves(
                METRIC, by=[self.line], threshold=SOLVED, name=slug("steps", *names),
                caption=f"Accuracy at the training length against steps, fresh seeds at the chosen learning rate: median and range.{where}",
            )  # fmt: skip
            rates = heatmap(
                LR, SEED, mean_of(METRIC, "best"), by=[self.line], name=slug("rates", *names),
                caption=f"The best accuracy of every run of the tuning, by learning rate and seed.{where}",
            )  # fmt: skip
            found.append(of(lambda rows, cell=cell: matching(self.tuning.fresh(rows), cell), steps))
            found.append(of(lambda rows, cell=cell: matching(self.tuning.tried(rows), self.tuning.in_tuning(cell)), rates))
        return found
