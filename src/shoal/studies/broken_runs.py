"""Can what is wrong with a training run be told from its curves alone?"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from shoal.config import AdamW, DecoderConfig, LanguageConfig, RunConfig, Schedule, StudyConfig, flatten
from shoal.config.load import override
from shoal.inference.diagnose import Diagnosis, curves_of, diagnose
from shoal.results import statistics
from shoal.results.claims import Claim, Sample
from shoal.results.figures import MUTED, TRAIN, VAL, Drawing, Figure, canvas, nothing
from shoal.results.rows import Row, Rows
from shoal.results.tables import Table
from shoal.results.wording import setting
from shoal.studies.language import training
from shoal.studies.study import Study, about, cells

HEALTHY = "healthy"
ADAGRAD: dict[str, Any] = {"optimizer.type": "adagrad", "optimizer.lr": 0.3, "optimizer.wd": 0.0}  # whose first steps are its longest: it needs a warm-up
SETUP: dict[str, dict[str, Any]] = {  # what a diagnosis should call it -> wrong settings
    "learning rate too high": {},  # these two are changes of the healthy run's
    "learning rate too low": {},
    "no warm-up": ADAGRAD | {"schedule.warmup": 0.0},
    "unshuffled data": {"task.sampler": "sequential"},  # one document after the other
    "overfitting": {"task.val_fraction": 0.97, "task.split": "contiguous"},  # few pages to learn from; whole documents could not be shared out like that
    "dead initialisation": {"model.embedding_std": 0.0, "model.init_scale": 0.0},
    "initialisation too large": {"model.init_scale": 50.0},
    "dropout too strong": {"model.dropout": 0.8},
}
IMPLEMENTATION: dict[str, dict[str, Any]] = {  # -> mistakes of the program, see shoal/train/faults.py
    "leak from the future": {"fault": "leak", "model.causal": False},
    "wrong loss shift": {"fault": "shift"},
    "unmasked padding": {"fault": "padding"},
    "mismatched labels": {"fault": "labels"},
    "one batch repeated": {"fault": "repeat"},
}
NAMED, ACCUSED = 0.9, 0.05  # shares


def faults(run: RunConfig) -> dict[str, dict[str, Any]]:
    lr: float = flatten(run)["optimizer.lr"]
    rates = {"learning rate too high": {"optimizer.lr": 100 * lr}, "learning rate too low": {"optimizer.lr": lr / 100}}
    return SETUP | rates | IMPLEMENTATION


def healthy(run: RunConfig) -> dict[str, dict[str, Any]]:
    """Settings nobody would call wrong, and tasks that are learned late, or not yet."""
    now = flatten(run)
    lr = now["optimizer.lr"]
    short = {"steps": 240, "model.width": 48, "model.num_layers": 1, "model.feed_forward": 96, "model.positions": "learned"}
    table = {
        "task.type": "modular", "task.split": "random", "task.operator_token": False, "task.train_fraction": 0.6, "task.val_fraction": 0.4,
        "evaluate": ["train", "val"], "batch_size": 256,
    }  # fmt: skip
    recall = short | {
        "task.type": "recall", "task.length": 16, "task.num_tokens": 8, "task.test_size": 500, "evaluate": ["test"], "batch_size": 32, "model.num_layers": 2,
    }  # fmt: skip
    embedding_mlp = {"model.type": "embedding_mlp", "model.num_inputs": 2, "model.embedding": 64, "model.hidden": [128, 128]}
    return {
        HEALTHY: {},
        "learning rate x 3": {"optimizer.lr": 3 * lr},
        "learning rate / 3": {"optimizer.lr": lr / 3},
        "short warm-up": {"schedule.warmup": 0.03},
        "weight decay 0.3": {"optimizer.wd": 0.3},
        "cosine schedule": {"schedule.kind": "cosine"},
        "Adagrad with warm-up": ADAGRAD,
        "half the width": {"model.width": now["model.width"] // 2},
        "three layers, norms after": {"model.num_layers": 3, "model.norm_place": "post"},
        "GRU": {"model.mixers": ["gru"]},
        "some dropout": {"model.dropout": 0.1},
        "a quarter of the batch": {"batch_size": run.batch_size // 4},
        "windows from anywhere": {"task.sampler": "random"},
        "another corpus": {"task.corpus": "python" if now["task.corpus"] == "english" else "english"},
        "bytes": {"task.tokenizer": "bytes", "task.length": 2 * now["task.length"]},
        "addition": short | table | {"task.operation": "add", "task.p": 41, "optimizer.lr": 1e-2, "steps": 400},
        "division, not yet grokked": short | table | {"task.p": 47, "optimizer.wd": 1.0, "optimizer.lr": 2e-3, "batch_size": 512},
        "division, grokked": table | embedding_mlp | {"task.p": 31, "batch_size": 0, "optimizer.lr": 1e-2, "optimizer.wd": 4.0, "steps": 600},
        "recall": recall | {"optimizer.lr": 3e-3},
        "recall, stuck at its start": recall | {"optimizer.lr": 1e-2},
    }


def _config(run: RunConfig, seeds: int) -> StudyConfig:
    return StudyConfig(run=run, variants=healthy(run) | faults(run), seeds=seeds, first_seed=5)


def quick() -> StudyConfig:
    """Five minutes on two cores: one layer of width 48 on 0.6 MB of Python, 240 steps of 16 windows of 32 tokens, 5 seeds. The rules were made on this
    setting and other seeds: 0 to 4, and from 100 on."""
    return _config(
        RunConfig(
            task=LanguageConfig(corpus="python", tokenizer="bpe", vocab_size=400, max_bytes=600_000, length=32),
            model=DecoderConfig(width=48, num_layers=1, num_heads=4, feed_forward=96, positions="rotary"),
            optimizer=AdamW(lr=1e-2),
            schedule=Schedule(warmup=0.1),
            steps=240,
            batch_size=16,
            log_every=1,
            evaluate_every=20,
            evaluate=("train:64", "val:64"),
        ),
        seeds=5,
    )


def elsewhere() -> StudyConfig:
    """The same faults in a setting the rules were not made on: English, two layers of width 64 with other parts, more tokens, longer windows."""
    values = {
        "task.corpus": "english", "task.vocab_size": 800, "task.length": 48, "batch_size": 12, "model.width": 64, "model.num_layers": 2,
        "model.feed_forward": 192, "model.activation": "gelu", "model.norm": "rms", "optimizer.lr": 6e-3,
    }  # fmt: skip
    return _config(override(quick().run, values), seeds=3)


def full() -> StudyConfig:
    """A larger model, more text, three times the steps; 12 seeds."""
    values = {
        "task.vocab_size": 1024, "task.length": 64, "task.max_bytes": 2_000_000, "batch_size": 32, "model.width": 96, "model.num_layers": 2,
        "model.feed_forward": 384, "optimizer.lr": 5e-3, "steps": 720, "evaluate_every": 60,
    }  # fmt: skip
    return _config(override(quick().run, values), seeds=12)


PRESETS = {"quick": quick, "elsewhere": elsewhere, "full": full}
DEFAULT = ("quick", "full")


def kind(variant: str) -> str:
    return "set-up" if variant in SETUP else "implementation" if variant in IMPLEMENTATION else HEALTHY


def diagnoses(rows: Rows) -> list[Diagnosis]:
    return [diagnose(curves_of(row)) for row in rows]


def right(row: Row, found: Diagnosis) -> bool:
    """A fault is called by its name; a healthy run is called by none."""
    return not found.findings if kind(row["variant"]) == HEALTHY else found.name == row["variant"]


def called(rows: Rows, kinds: Sequence[str]) -> list[bool]:
    part = Rows([row for row in rows if kind(row["variant"]) in kinds])
    return [right(row, found) for row, found in zip(part, diagnoses(part), strict=True)]


def _scores(by: Sequence[str], rows: Rows) -> list[dict[str, Any]]:
    share, out = statistics.proportion, []
    for values, part in rows.groups([path for path in by if path != "variant"]):
        for name in ("set-up", "implementation", HEALTHY):
            told = called(part, [name])
            line = {"named correctly": share(sum(told), len(told))} if name != HEALTHY else {"accused of something": share(told.count(False), len(told))}
            out.append(({"setting": setting(values)} if values else {}) | {"runs": name if name == HEALTHY else f"faults of the {name}"} | line)
    return out


def _confusion(by: Sequence[str], rows: Rows) -> list[dict[str, Any]]:
    lines = []
    for values, part in rows.groups(by):
        found = diagnoses(part)
        good = sum(right(row, one) for row, one in zip(part, found, strict=True))
        names = Counter(one.name for one in found)
        line = {"what it is": setting(values), "kind": kind(part[0]["variant"]), "right": statistics.proportion(good, len(part))}
        lines.append(line | {"what it is called": "; ".join(f"{name} ({count})" for name, count in names.most_common())})
    return lines


def _answers(rows: Rows) -> list[dict[str, Any]]:
    """What is said of the first seed's runs with a fault."""
    lines = []
    for values, part in rows.groups(["variant"]):
        if kind(values["variant"]) != HEALTHY:
            found = diagnose(curves_of(part[0]))
            first = found.findings[0] if found.findings else None
            told = {"seen": first.evidence, "try": first.change} if first else {"seen": found.remark or None, "try": None}
            lines.append({"what it is": values["variant"], "what it is called": found.name, **told})
    return lines


def draw(rows: Rows) -> Drawing:
    """A panel for each fault of the first seed: losses of its batches and on unseen text, over those of the healthy run."""
    seed = rows[0]["seeds.split"] if rows else 0
    first = {row["variant"]: row for row in reversed(rows) if row["seeds.split"] == seed}
    broken = [name for name in [*SETUP, *IMPLEMENTATION] if name in first]
    if HEALTHY not in first or not broken:
        return nothing("no healthy run and one with a fault to compare yet")
    well = first[HEALTHY]
    start = well.curve("batch/loss")[1][0]
    columns = min(3, len(broken))
    drawing, axes = canvas(0.6 + 1.75 * -(-len(broken) // columns), columns, -(-len(broken) // columns))
    for spare in axes[len(broken) :]:
        spare.set_axis_off()
    for axis, name in zip(axes, broken, strict=False):
        axis.plot(*well.curve("batch/loss"), color=MUTED, alpha=0.5, linewidth=1, label="healthy: batches")
        axis.plot(*first[name].curve("batch/loss"), color=TRAIN, linewidth=1, label="batches")
        axis.plot(*first[name].curve(_unseen(first[name])), color=VAL, label="unseen text")
        axis.set(title=name, ylim=(0, 1.8 * start), xlim=(0, well["steps"]))
    for axis in axes[len(broken) - columns : len(broken)]:
        axis.tick_params(labelbottom=True)
    drawing.legend(*axes[0].get_legend_handles_labels(), loc="outside upper left", ncols=3)
    drawing.supxlabel("step", fontsize=9, color=MUTED)
    drawing.supylabel("loss (nats per token)", fontsize=9, color=MUTED)
    return drawing


def _unseen(row: Row) -> str:
    return f"{row['evaluate'][-1]}/loss"


def _claims(cell: Mapping[str, Any]) -> list[Claim]:
    def share(*kinds: str) -> Any:
        return lambda rows: Sample(called(rows.where(cell), kinds), kind="proportion")

    def accused(rows: Rows) -> Sample:
        return Sample([not ok for ok in called(rows.where(cell), [HEALTHY])], kind="proportion")

    sentences = [
        ("Of runs with a fault, at least 90 % are named correctly.", share("set-up", "implementation"), (NAMED, 1.0)),
        ("Of faults of the set-up, at least 90 % are named correctly.", share("set-up"), (NAMED, 1.0)),
        ("Of faults of the implementation, at least 90 % are named correctly.", share("implementation"), (NAMED, 1.0)),
        ("Of healthy runs, at most 5 % are accused.", accused, (0.0, ACCUSED)),
    ]
    return [Claim(about(text, cell), sample, holds) for text, sample, holds in sentences]


def study(config: StudyConfig) -> Study:
    by = list(cells(config)[0])
    caption = (
        "A run of each fault, first seed: what is drawn is all that a diagnosis sees, beside accuracies and gradient norms. In grey the batches of the healthy "
        "run of the same seed. Losses past the frame are cut off; a curve that ends early died."
    )
    return Study(
        name="broken-runs",
        question=__doc__ or "",
        main_metric=training(config.run.evaluate).replace("train", "val"),
        config=config,
        wanted=lambda rows: config.runs(),
        figures=[Figure("faults", draw, caption)],
        tables=[
            Table("scores", partial(_scores, by), "Diagnoses from the curves of a run alone, its config unseen; Clopper-Pearson intervals over all runs."),
            Table("confusion", partial(_confusion, by), "What runs are called, a line for each setting; the number of runs in brackets."),
            Table("answers", _answers, "What is said about the first seed's run of each fault: the evidence in its curves, and the change to try."),
        ],
        claims=[claim for cell in cells(replace(config, variants={})) for claim in _claims(cell)],
    )
