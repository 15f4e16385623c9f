"""Which single changes of the published recipe make the unseen half of a division table known sooner, and which later?"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from shoal.config import RunConfig, StudyConfig, flatten
from shoal.results import statistics
from shoal.results.comparisons import times
from shoal.results.figures import dots
from shoal.results.rows import Rows
from shoal.results.tables import Table
from shoal.results.wording import setting
from shoal.studies.shared import GROKKED, Published, matching, order_claims, paper_run, percent, published_table, reached_table, small_run, sooner
from shoal.studies.study import Study, cells

METRIC = "val/exact"  # all tokens of an answer: one number for residues, which have one, and for digits
BASELINE = "baseline"
QUICK = (
    BASELINE, "wd 0", "wd 0.3", "wd 3", "lr x 3", "init scale 2", "Muon", "Grokfast EMA on AdamW", "orthogonal gradient at wd 0", "StableMax at wd 0",
    "batch 128", "GELU",
)  # fmt: skip


def variants(run: RunConfig) -> dict[str, dict[str, Any]]:
    """Name -> what is changed of ``run``, which is the baseline. One factor each; another optimizer brings its own learning rate and decay.

    Fleets: those that change per-run values share the baseline's, those of Adam another; the other 22 settings of structure take one each.
    """
    lr = flatten(run)["optimizer.lr"]
    adam = {"optimizer.type": "adam", "optimizer.wd": 0.0}
    # of lr 0.03 to 1 and wd 0 to 0.01, on the small run: among those that come furthest with the training rows
    sgd = {"optimizer.type": "sgd", "optimizer.lr": 0.1, "optimizer.wd": 1e-4, "optimizer.momentum": 0.9}
    muon = {"optimizer.type": "muon", "optimizer.lr": 0.02, "optimizer.wd": 0.1, "optimizer.adam_lr": lr, "optimizer.adam_wd": 1.0}
    fractions = {f"{percent(share)} of the rows": {"task.train_fraction": share, "task.val_fraction": round(1 - share, 2)} for share in (0.4, 0.6, 0.7)}
    return {
        BASELINE: {},
        **{f"wd {wd:g}": {"optimizer.wd": wd} for wd in (0.0, 0.1, 0.3, 3.0)},
        **{f"lr x {times:g}": {"optimizer.lr": times * lr} for times in (0.3, 3.0)},
        **fractions,
        **{f"embedding std {std:g}": {"model.embedding_std": std} for std in (0.02, 0.1)},
        **{f"init scale {scale:g}": {"model.init_scale": scale} for scale in (0.5, 2.0, 8.0)},
        **{f"label noise {noise:g}": {"task.label_noise": noise} for noise in (0.05, 0.1)},
        "Adam": adam,
        "Adam L2 0.005": adam | {"optimizer.wd": 0.005},
        "Adam L2 0.005 lr x 3": adam | {"optimizer.wd": 0.005, "optimizer.lr": 3 * lr},  # 1 + gain: what the filter makes of a constant gradient
        "Adam L2 0.01 lr x 6": adam | {"optimizer.wd": 0.01, "optimizer.lr": 6 * lr},
        "Grokfast EMA": adam | {"optimizer.wd": 0.005, "gradient.filter": "ema", "gradient.filter_gain": 2.0, "gradient.filter_decay": 0.98},
        "Grokfast MA": adam | {"optimizer.wd": 0.01, "gradient.filter": "ma", "gradient.filter_gain": 5.0, "gradient.filter_window": 100},
        "Grokfast EMA on AdamW": {"gradient.filter": "ema", "gradient.filter_gain": 2.0, "gradient.filter_decay": 0.98},
        "decay to start": {"optimizer.decay_to": "start"},
        "Muon": muon,
        "SGD": sgd,
        "egalitarian gradient": {"optimizer.type": "sgd", "optimizer.lr": 0.02, "optimizer.wd": 0.1, "gradient.direction": "egalitarian"},
        "orthogonal gradient": {"gradient.direction": "orthogonal"},
        "orthogonal gradient at wd 0": {"gradient.direction": "orthogonal", "optimizer.wd": 0.0},
        "StableMax": {"objective": "stablemax"},
        "StableMax at wd 0": {"objective": "stablemax", "optimizer.wd": 0.0},
        "batch 128": {"batch_size": 128},
        "full batch": {"batch_size": 0},
        "dropout 0.1": {"model.dropout": 0.1},
        "pre-norm": {"model.norm_place": "pre"},
        "no norm": {"model.norm": "none"},
        "1 layer": {"model.num_layers": 1},
        "3 layers": {"model.num_layers": 3},
        "GELU": {"model.activation": "gelu"},
        "learned positions": {"model.positions": "learned"},
        "rotary positions": {"model.positions": "rotary"},
        "no positions": {"model.positions": "none"},
        "normal init": {"model.linear_init": "normal", "model.init_std": 0.07},  # Glorot's std is 0.088 for square matrices, 0.056 for the feed-forward
        "digits": {"task.tokens": "digits"},
    }


def full() -> StudyConfig:
    """All of them, 10 seeds, at most 15,000 steps each; products in bfloat16, as who is sooner is not a matter of the last digits."""
    run = paper_run(15_000, precision="bfloat16", stop_metric=METRIC, log_every=100)
    return StudyConfig(run=run, variants=variants(run), seeds=10)


def quick() -> StudyConfig:
    """Minutes on two cores: a dozen of them on a small model and table, 6 seeds, at most 1,200 steps."""
    run = small_run(1_200, stop_metric=METRIC)
    # decay 1, as the paper has it; with that it comes by step 700 modulo 59 (6 of 6 seeds), modulo 41 only after 900
    run = replace(run, task=replace(run.task, p=59), model=replace(run.model, width=64, feed_forward=256), optimizer=replace(run.optimizer, wd=1.0))
    return StudyConfig(run=run, variants={name: variants(run)[name] for name in QUICK}, seeds=6)


PRESETS = {"quick": quick, "full": full}
DEFAULT = ("quick", "full")

LAW = "the delay goes as 1 / (learning rate x decay) (arXiv 2603.13331, 2605.18845)"
LATE = "without decay it took some 1,000,000 steps (Power et al., figure 1)"
SCALE = "large weights memorise (Omnigrok, arXiv 2210.01117)"
MEASURED_HERE = "a small embedding made Muon sooner (one seed, measured here before)"
ORDER = [  # (sooner, later, because): what is claimed, from theory and published rows
    (BASELINE, "wd 0", LATE),
    (BASELINE, "wd 0.1", LAW),
    (BASELINE, "wd 0.3", LAW),
    ("wd 3", BASELINE, LAW),
    (BASELINE, "lr x 0.3", LAW),
    ("lr x 3", BASELINE, LAW),
    (BASELINE, "decay to start", "decay to the origin helps most (Power et al., figure 2)"),
    ("decay to start", "wd 0", "decay to the start helps, too (Power et al., figure 2)"),
    (BASELINE, "Adam", LATE),
    ("Grokfast EMA", "Adam L2 0.005", "its filter is said to make it some 40 times as fast (arXiv 2405.20233)"),
    ("Grokfast EMA", "Adam L2 0.005 lr x 3", "the filter is said to be more than a larger step"),
    ("Grokfast MA", "Adam L2 0.01 lr x 6", "the filter is said to be more than a larger step"),
    ("Grokfast EMA on AdamW", BASELINE, "the filter is said to combine with decay"),
    ("Grokfast EMA on AdamW", "lr x 3", "the filter is said to be more than a larger step"),
    ("Muon", BASELINE, "102.89 against 153.09 epochs (arXiv 2504.16041)"),
    (BASELINE, "SGD", "0 of 18 settings of SGD came there (clawrxiv 2603.00395)"),
    ("egalitarian gradient", "SGD", "equal singular values are said to remove the delay (arXiv 2510.04930)"),
    ("orthogonal gradient at wd 0", "wd 0", "it takes the place of decay (arXiv 2501.04697)"),
    (BASELINE, "orthogonal gradient at wd 0", "decay did better in most networks tried (EIFY, talon)"),
    ("StableMax at wd 0", "wd 0", "it keeps learning where softmax collapses (arXiv 2501.04697)"),
    (BASELINE, "40 % of the rows", "fewer rows take more steps (Power et al., figure 1)"),
    ("60 % of the rows", BASELINE, "more rows take fewer steps (Power et al., figure 1)"),
    ("70 % of the rows", "60 % of the rows", "more rows take fewer steps (Power et al., figure 1)"),
    ("embedding std 0.1", BASELINE, MEASURED_HERE),
    ("embedding std 0.02", BASELINE, MEASURED_HERE),
    ("init scale 0.5", BASELINE, SCALE),
    (BASELINE, "init scale 2", SCALE),
    (BASELINE, "init scale 8", SCALE),
    ("normal init", BASELINE, "2,537 against 4,200 steps with Xavier's (AI-Scientist)"),
    ("batch 128", BASELINE, "the noise of small batches helps (Power et al., figure 2)"),
    (BASELINE, "full batch", "full batches were among the worst (Power et al., figure 2)"),
    ("dropout 0.1", BASELINE, "it helps (Power et al., figure 2)"),
    (BASELINE, "label noise 0.05", "wrong answers have to be learned by heart"),
    ("label noise 0.05", "label noise 0.1", "wrong answers have to be learned by heart"),
    ("GELU", BASELINE, "up to 4.3 times as fast as ReLU (arXiv 2603.25009)"),
    ("1 layer", BASELINE, "depth delays (arXiv 2603.25009)"),
    (BASELINE, "3 layers", "depth delays (arXiv 2603.25009)"),
    ("rotary positions", BASELINE, "about 1,230 steps (mlx-grokking, which has them)"),
    (BASELINE, "no positions", "only the causal mask is left to tell x / y from y / x"),
    (BASELINE, "digits", "digits make it compute what residues are told"),
]

FULL = {"task.p": 97, "task.operator_token": True}  # the small table of the quick preset repeats nobody's row
PUBLISHED = [
    Published(
        setting="/ mod 97, 50 %, Adam, no decay", source="Power et al., figure 1 left", steps="near 1,000,000 (read off a plot)", seeds="1 shown",
        conditions={"variant": "Adam", **FULL}, differs="Ours has 15,000 steps; bfloat16 (all ours).",
    ),
    Published(
        setting="/ mod 97, 50 %, AdamW wd 0.5, post-norm GELU", source="AI-Scientist, baseline", steps="4,200 ± 76 (99 %)", seeds="3",
        conditions={"variant": "GELU", **FULL}, differs="Ours: wd 1, sinusoidal positions, no final norm, the split is seeded.",
    ),
    Published(
        setting="the same with Xavier initialisation", source="AI-Scientist, weight_initialization_grokking", steps="2,537 (99 %)", seeds="3",
        conditions={"variant": "normal init", **FULL}, differs="Ours: ReLU, wd 1, one std of 0.07 for all matrices but the embeddings, which stay N(0, 1).",
    ),
    Published(
        setting="/ mod 97, 50 %, wd 1, rotary, RMSNorm, SwiGLU, dropout 0.2", source="stockeh/mlx-grokking", steps="about 1,230 (99 %, read off a plot)",
        seeds="1", conditions={"variant": "rotary positions", **FULL}, differs="Ours: rotary positions are the only change.",
    ),
    Published(
        setting="7 tasks, AdamW", source="Tveit et al., arXiv 2504.16041", steps="153.09 epochs (95 %), some 1,530 steps", seeds="many",
        conditions={"variant": BASELINE, **FULL}, threshold=0.95, differs="Ours: division alone, the paper's architecture.",
    ),
    Published(
        setting="7 tasks, Muon", source="Tveit et al., arXiv 2504.16041", steps="102.89 epochs (95 %), some 1,030 steps", seeds="many",
        conditions={"variant": "Muon", **FULL}, threshold=0.95, differs="The same.",
    ),
    Published(
        setting="x mod 97, Adam, no decay", source="Grokfast (ironjr/grokfast)", steps="39,890 (95 %)", seeds="1",
        conditions={"variant": "Adam", **FULL}, threshold=0.95, differs="Theirs is multiplication (its division returns x y), pre-norm, with GELU.",
    ),
    Published(
        setting="x mod 97, Grokfast MA, L2 0.01", source="Grokfast (ironjr/grokfast)", steps="790 (95 %)", seeds="1",
        conditions={"variant": "Grokfast MA", **FULL}, threshold=0.95, differs="The same.",
    ),
    Published(
        setting="x mod 97, Grokfast EMA, L2 0.005", source="Grokfast (ironjr/grokfast)", steps="910 (95 %)", seeds="1",
        conditions={"variant": "Grokfast EMA", **FULL}, threshold=0.95, differs="The same.",
    ),
    *(
        Published(
            setting=f"+ mod 113, 30 %, 1 layer, no norm, {changed}", source="Na00s/muon-grokking", steps=f"{steps} (95 %, sustained)", seeds="1",
            conditions={"variant": ours, **FULL}, threshold=0.95, differs="Ours: division, 50 %, 2 layers with norms; a first hit.",
        )
        for changed, steps, ours in (
            ("wd 0.1", "none in 100,000", "wd 0.1"), ("wd 1", "52,500", BASELINE), ("wd 3", "8,200", "wd 3"), ("wd 1, lr x 3", "8,500", "lr x 3"),
        )
    ),
]  # fmt: skip


def against_baseline(config: StudyConfig) -> Table:
    """A line per variant: what it changes, and how it does against the baseline of the same seeds."""

    def make(rows: Rows) -> list[dict[str, Any]]:
        return [line for cell in cells(replace(config, variants={})) for line in _lines(matching(rows, cell), cell, config)]

    caption = (
        f"Every variant against the baseline with the same seed, to {percent(GROKKED)} of the unseen rows, sustained. Sooner: of the seeds of which it can be "
        "said. With digits an answer counts when both its digits are right; it is another problem than that of residues, not a slower way to the same."
    )
    return Table("against-the-baseline", make, caption)


def _lines(rows: Rows, cell: dict[str, Any], config: StudyConfig) -> list[dict[str, Any]]:
    lines = []
    for name, changes in config.variants.items():
        mine, other = matching(rows, {"variant": name}), matching(rows, {"variant": BASELINE})
        reached = mine.reached(METRIC, GROKKED)
        lines.append(
            {
                "variant": name,
                **({"setting": setting(cell)} if cell else {}),
                "changed": setting(changes) or "nothing",
                "there": statistics.proportion(int(reached[1].sum()), len(mine)),
                "steps": statistics.survival_median(*reached),
                "sooner than the baseline": sooner(mine, other, METRIC).estimate() if other and name != BASELINE else None,
            }
        )
    return lines


def study(config: StudyConfig) -> Study:
    by = list(cells(config)[0])
    return Study(
        name="grokking-ablations",
        question=__doc__ or "",
        main_metric=METRIC,
        config=config,
        wanted=lambda rows: config.runs(),
        figures=[
            times(METRIC, GROKKED, by=by, baseline={"variant": BASELINE} if BASELINE in config.variants else None),
            dots(METRIC, by=by, which="best"),
        ],
        tables=[against_baseline(config), reached_table(by, METRIC), published_table(PUBLISHED)],
        claims=order_claims(config, ORDER, METRIC),
    )
