"""Do networks that generalise on modular tables compute with a few waves over the group of the operation, and does that show before validation does?

What is measured is in ``shoal.inference.spectra``: spectra of the embedding and of the logits by answer, key frequencies, restricted and excluded loss
(Nanda et al., arXiv 2301.05217), in the additive basis for + and -, over discrete logarithms for x and /. Losses are of the residues' logits alone. Rows with
a zero operand have no logarithm: for x and / the losses and accuracies of the progress measures leave them out, as the spectra leave out the answer 0.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import numpy as np

from shoal.config import AdamW, DecoderConfig, EmbeddingMLPConfig, ModularConfig, RunConfig, StudyConfig
from shoal.config.fields import check
from shoal.results import statistics
from shoal.results.claims import Claim, Sample
from shoal.results.figures import PALETTE, PANELS, TRAIN, VAL, WIDTH, Drawing, Figure, canvas, curves, legend, nothing, scales
from shoal.results.rows import Row, Rows
from shoal.results.tables import Table
from shoal.results.wording import setting
from shoal.studies.shared import GROKKED, paper_run, percent
from shoal.studies.study import Study, about, cells

if TYPE_CHECKING:
    from torch import Tensor

    from shoal.contracts import Batch
    from shoal.train.run import Run

BASIS = {"add": "additive", "sub": "additive", "mul": "discrete log", "div": "discrete log"}
BASES = tuple(dict.fromkeys(BASIS.values()))
VARIANTS: dict[str, dict[str, Any]] = {
    "addition": {"task.operation": "add"},
    "subtraction": {"task.operation": "sub"},
    "multiplication": {"task.operation": "mul"},
    "division": {"task.operation": "div"},
    "random addition": {"task.operation": "add", "task.label_noise": 1.0},  # the same questions with random answers can only be learned by heart
    "random division": {"task.operation": "div", "task.label_noise": 1.0},
}
# Facts are split in pairs: with (y, x) among the training rows of x + y = z, half of the others are known long before anything is understood.
JUMP = 0.1  # validation accuracy at which it has begun to rise


def full() -> StudyConfig:
    """The paper's run with one layer and without operator tokens, to 15,000 steps: long enough after the jump for what is not needed to decay."""
    run = paper_run(15_000, stop_metric=None, evaluate_every=100, log_every=100)
    run = replace(run, task=replace(run.task, operator_token=False, split="paired"), model=replace(run.model, num_layers=1))  # pyright: ignore[reportArgumentType, reportCallIssue]
    snapshots = (0, 50, 100, 150, 200, 300, 400, 600, 800, 1000, 1300, 1700, 2200, 2800, 3600, 4600, 6000, 7800, 10_000, 12_500)
    return StudyConfig(run=replace(run, snapshots=snapshots), variants=VARIANTS, seeds=6)


def quick() -> StudyConfig:
    """Two minutes on two cores: the embedding MLP modulo 43, full batches and a strong decay, 400 steps."""
    run = RunConfig(
        task=ModularConfig(p=43, train_fraction=0.5, val_fraction=0.5, test_fraction=0.0, operator_token=False, split="paired"),
        model=EmbeddingMLPConfig(num_inputs=2, embedding=64, hidden=(128, 128)),
        optimizer=AdamW(lr=0.01, wd=4.0, beta2=0.99),
        steps=400,
        batch_size=0,
        log_every=10,
        evaluate_every=10,
        snapshots=(0, 5, 10, 20, 30, 40, 60, 80, 100, 120, 140, 160, 200, 250, 300),
    )
    return StudyConfig(run=run, variants=VARIANTS, seeds=6)  # with 6 of 6 the interval of a share begins above one half


PRESETS = {"quick": quick, "full": full}
DEFAULT = ("quick", "full")


# Measures: functions of a run.


class Whole(NamedTuple):
    """A run's whole table, row by row."""

    pieces: list[Batch]  # the N rows, to be read in so many pieces
    answer: Tensor  # int64 [N], the right one
    target: Tensor  # int64 [N], the one trained on: for training rows perhaps a random one
    trained: Tensor  # bool [N], True = training row


def whole_table(run: Run) -> Whole:
    """All rows of the run's own split."""
    import torch

    from shoal.inference.evaluate import batches
    from shoal.tasks.splits import SPLITS
    from shoal.train.device import measuring_device

    task: Any = run.config.task
    device = measuring_device()
    tokens = _residue_tokens(run)
    value = torch.full((run.task.vocab_size,), -1).scatter(0, tokens, torch.arange(task.p))
    pieces, columns = [], []
    for split in SPLITS:
        for batch in batches(run, split):
            there = batch.weights[:, 0] > 0
            if not there.any():
                continue
            piece = batch.each(lambda x, there=there: x[there])
            assert piece.targets.shape[-1] == 1
            x, y = value[piece.tokens[:, 0]], value[piece.tokens[:, 2 if task.operator_token else 1]]
            columns.append((_answers(task.operation, x, y, task.p), value[piece.targets[:, 0]], torch.full((len(x),), split == "train")))
            pieces.append(piece.each(lambda x: x.to(device)))
    return Whole(pieces, *(torch.cat(column).to(device) for column in zip(*columns, strict=True)))


def residue_logits(run: Run, whole: Whole) -> Tensor:
    """float64 [N, p]: one forward pass over the whole table. Without each row's mean over the residues, which changes no probability."""
    import torch

    from shoal.contracts import Context

    device = whole.answer.device
    model, tokens = deepcopy(run.model).to(device), _residue_tokens(run).to(device)
    with torch.inference_mode():
        logits = torch.cat([model.logits(model(piece.tokens, Context(at=piece.at))[0])[:, 0] for piece in whole.pieces])[:, tokens].double()
    return logits - logits.mean(-1, keepdim=True)


def _residue_tokens(run: Run) -> Tensor:
    """int64 [p]: the token of each residue."""
    import torch

    task: Any = run.config.task
    return torch.tensor([run.task.tokenizer.encode(str(x))[0] for x in range(task.p)])


def _answers(operation: str, x: Tensor, y: Tensor, p: int) -> Tensor:
    import torch

    if operation == "div":
        y = torch.tensor([0, *(pow(b, -1, p) for b in range(1, p))])[y]
    return {"add": x + y, "sub": x - y, "mul": x * y, "div": x * y}[operation] % p


def _basis(run: Run) -> str:
    task: Any = run.config.task
    return BASIS[task.operation]


def _powers(run: Run, basis: str, whole: Whole, logits: Tensor) -> tuple[Tensor, Tensor]:
    """Spectra [n // 2 + 1] of the embedding's rows and of the logits' mean by answer, in the order of a basis."""
    from shoal.inference import spectra

    model, p = cast("Any", run.model), logits.shape[1]
    order = spectra.elements(p, basis)
    means = spectra.mean_by(logits, whole.answer, p)
    return spectra.spectrum(model.embedding.weight.detach()[_residue_tokens(run)[order]]), spectra.spectrum(means[order.to(means.device)])


def spectrum(run: Run) -> list[dict[str, Any]]:
    """Shares of the power at the end, without the constant: a row per basis and frequency; "key" marks the key frequencies in the operation's own basis."""
    from shoal.inference.spectra import key_frequencies

    whole, rows = whole_table(run), []
    end = residue_logits(run, whole)
    for basis in BASES:
        embedding, logits = _powers(run, basis, whole, end)
        keys = key_frequencies(logits) if basis == _basis(run) else []
        shares = [(x[1:] / x[1:].sum()).tolist() for x in (embedding, logits)]
        rows += [{"basis": basis, "frequency": k, "embedding": e, "logits": u, "key": k in keys} for k, (e, u) in enumerate(zip(*shares, strict=True), 1)]
    return rows


def sparsity(run: Run) -> list[dict[str, Any]]:
    """At the end, per basis and thing: Gini coefficient over frequencies; how many of them have 90 % of the power, and which share; the constant's share."""
    from shoal.inference.spectra import gini, needed

    whole, rows = whole_table(run), []
    end = residue_logits(run, whole)
    for basis in BASES:
        for name, power in zip(("embedding", "logits"), _powers(run, basis, whole, end), strict=True):
            count = needed(power[1:])
            numbers = {"gini": gini(power[1:]), "needed": count, "share": count / (len(power) - 1), "constant": float(power[0] / power.sum())}
            rows.append({"basis": basis, "of": name, **numbers})
    return rows


def progress(run: Run) -> list[dict[str, Any]]:
    """At every snapshot and at the end, on the training rows (their own answers, also random ones) and on all others: loss, accuracy, and the losses of the
    restricted and of the excluded logits. Key frequencies are those of the end, in the operation's own basis.
    """
    from shoal.inference import spectra

    whole, basis = whole_table(run), _basis(run)
    end = residue_logits(run, whole)
    p, size = end.shape[1], len(spectra.elements(end.shape[1], basis))
    keys = spectra.key_frequencies(_powers(run, basis, whole, end)[1])
    place = spectra.places(p, basis).to(end.device)[whole.answer]
    there = place >= 0
    place, target, trained = place[there], whole.target[there, None], whole.trained[there]
    before = [step for step in run.snapshots if step < run.config.steps]
    rows = []
    for step in (*before, run.config.steps):
        logits = (residue_logits(run.at(step), whole) if step in before else end)[there]
        versions = {
            "loss": logits,
            "restricted": spectra.restricted(logits, place, size, keys),
            "excluded": spectra.excluded(logits, place, size, keys),
        }
        row: dict[str, Any] = {"step": step}
        for split, chosen in (("train", trained), ("val", ~trained)):
            row[f"{split}/accuracy"] = float((logits.argmax(-1, keepdim=True) == target)[chosen].double().mean())
            for name, version in versions.items():
                row[f"{split}/{name}"] = float(-version.log_softmax(-1).gather(1, target)[chosen].mean())
        rows.append(row)
    return rows


# Figures and tables: functions of rows.


def _measured(rows: Rows, name: str) -> list[list[dict[str, Any]]]:
    return [row["measures"][name] for row in rows if name in row["measures"]]


def _shown(rows: Rows, told: Sequence[Mapping[str, Any]], name: str) -> list[tuple[str, list[list[dict[str, Any]]]]]:
    """Settings with this measure, named, in the order of the study: the first few of a long list."""
    measured = [(setting(cell) or "all runs", _measured(rows.where(cell), name)) for cell in told]
    return [(label, part) for label, part in measured if part][: PANELS // 2]


def draw_spectra(rows: Rows, told: Sequence[Mapping[str, Any]], of: str) -> Drawing:
    """One line of panels per setting, the two bases side by side; every seed in its own colour, its frequencies as spikes."""
    groups = _shown(rows, told, "spectrum")
    if not groups:
        return nothing("no spectra yet")
    drawing, axes = canvas(0.6 + 1.15 * len(groups), 2, len(groups))
    for line, (label, part) in enumerate(groups):
        for axis, basis in zip(axes[2 * line : 2 * line + 2], BASES, strict=True):
            for seed, measured in enumerate(part):
                k, share = np.array([(r["frequency"], r[of]) for r in measured if r["basis"] == basis], dtype=np.float64).T
                k = k + 0.8 * ((seed + 0.5) / len(part) - 0.5)  # beside each other, so that none hides another
                gap = np.full_like(k, np.nan)
                spikes = np.stack([k, k, gap], axis=1).ravel(), np.stack([0 * k, share, gap], axis=1).ravel()
                axis.plot(*spikes, color=PALETTE[seed % len(PALETTE)], linewidth=1.1, solid_capstyle="butt")
            axis.set_title(f"{label}: {basis}", pad=3)
            axis.grid(axis="x", visible=False)
        axes[2 * line].set_ylabel("share of power")
    axes[0].set_ylim(bottom=0)
    for axis in axes[-2:]:
        axis.set_xlabel("frequency")
    return drawing


LINES = {  # column of the progress rows -> label, colour
    "train/loss": ("training", TRAIN),
    "val/loss": ("validation", VAL),
    "val/restricted": ("restricted, validation rows", PALETTE[2]),
    "train/excluded": ("excluded, training rows", PALETTE[3]),
}
ACCURACIES = {"train/accuracy": ("", TRAIN), "val/accuracy": ("", VAL)}


def draw_progress(rows: Rows, told: Sequence[Mapping[str, Any]]) -> Drawing:
    """Losses beside accuracies, a line of panels per setting: median over seeds and range, from the first snapshot after step 0."""
    groups = _shown(rows, told, "progress")
    if not groups:
        return nothing("no progress measured yet")
    drawing = Drawing(figsize=(WIDTH, 0.6 + 1.55 * len(groups)), layout="constrained")
    axes = drawing.subplots(len(groups), 2, squeeze=False, sharex=True, sharey="col")
    for line, (label, part) in enumerate(groups):
        tables = [{r["step"]: r for r in measured if r["step"] > 0} for measured in part]
        steps = sorted(set.intersection(*(set(table) for table in tables)))
        for axis, columns in zip(axes[line], (LINES, ACCURACIES), strict=True):
            for name, (text, colour) in columns.items():
                values = np.array([[table[step][name] for step in steps] for table in tables], dtype=np.float64)  # [n, snapshots]
                axis.plot(steps, np.median(values, axis=0), color=colour, label=text or None, zorder=3)
                axis.fill_between(steps, values.min(axis=0), values.max(axis=0), color=colour, alpha=0.14, linewidth=0)
            scales(axis, logx=True, logy=columns is LINES, shown=list(columns))
        axes[line][0].set_title(f"{label} (n = {len(tables)})", pad=3)
        axes[line][0].set_ylabel("loss (nats)")
        axes[line][1].set_ylabel("accuracy")
    for axis in axes[-1]:
        axis.set_xlabel("steps")
    legend(drawing, axes[0][0])
    return drawing


def sparsity_table(name: str, number: str, told: Sequence[Mapping[str, Any]], caption: str) -> Table:
    """Mean over seeds, with its interval, of one number of ``sparsity``: a line per setting, a column per thing and basis."""

    def make(rows: Rows) -> list[dict[str, Any]]:
        lines = []
        for cell in told:
            measured = [row for row in rows.where(cell) if "sparsity" in row["measures"]]
            line: dict[str, Any] = {"setting": setting(cell) or "all runs", "n": len(measured)}
            for of in ("embedding", "logits"):
                line |= {f"{of}, {basis}": statistics.mean([_number(row, of, basis, number) for row in measured]).within(0, 1) for basis in BASES}
            lines.append(line)
        return lines

    return Table(name, make, caption)


# Claims.


def _number(row: Row, of: str, basis: str, number: str) -> float:
    return next(r[number] for r in row["measures"]["sparsity"] if r["of"] == of and r["basis"] == basis)


def _before(row: Row) -> list[Mapping[str, Any]]:
    """The snapshots before validation accuracy first reaches JUMP: all where it never does, the first where it does at once."""
    measured = row["measures"]["progress"]
    return measured[: max(next((i for i, r in enumerate(measured) if r["val/accuracy"] >= JUMP), len(measured)), 1)]


def _claims(cell: dict[str, Any], run: RunConfig) -> list[Claim]:
    task: Any = run.task
    own = BASIS[task.operation]
    other = next(basis for basis in BASES if basis != own)

    def train(rows: Rows) -> Sample:
        return Sample(rows.where(cell).column("final.train/accuracy"), bounds=(0, 1))

    def val(rows: Rows) -> Sample:
        return Sample(rows.where(cell).column("final.val/accuracy"), bounds=(0, 1))

    def dense(of: str, rows: Rows) -> Sample:
        """The smaller share of frequencies of the two bases."""
        return Sample([min(_number(row, of, basis, "share") for basis in BASES) for row in rows.where(cell)], bounds=(0, 1))

    def dense_embedding(rows: Rows) -> Sample:
        return dense("embedding", rows)

    def dense_logits(rows: Rows) -> Sample:
        return dense("logits", rows)

    def sparser(rows: Rows) -> Sample:
        return Sample([_number(row, "embedding", own, "gini") > _number(row, "embedding", other, "gini") for row in rows.where(cell)], kind="proportion")

    def difference(rows: Rows) -> Sample:
        values = [[_number(row, "logits", basis, "gini") for row in rows.where(cell)] for basis in (own, other)]
        return Sample(values[0], pair=values[1], bounds=(-1, 1))

    def fallen(rows: Rows) -> Sample:
        """From the first snapshot at which the training rows are known: they are in the means, so to know them by heart lowers the restricted loss too."""
        values = []
        for before in map(_before, rows.where(cell)):
            learned = next((r for r in before if r["train/accuracy"] >= GROKKED), before[-1])
            values.append(learned["val/restricted"] - before[-1]["val/restricted"])
        return Sample(values)

    def risen(rows: Rows) -> Sample:
        excluded = [[r["train/excluded"] for r in _before(row)] for row in rows.where(cell)]
        return Sample([values[-1] - min(values) for values in excluded], bounds=(0, math.inf))

    if task.label_noise == 1:
        sentences: list[tuple[str, Any, tuple[float, float]]] = [
            ("Random answers are learned by heart: mean accuracy on the training rows above 99 %.", train, (GROKKED, 1.0)),
            ("In neither basis is the embedding sparse: 90 % of its power takes more than half of the frequencies, in the mean.", dense_embedding, (0.5, 1.0)),
            ("In neither basis are the logits sparse: 90 % of their power takes more than half of the frequencies, in the mean.", dense_logits, (0.5, 1.0)),
        ]
    else:
        sentences = [
            ("The unseen rows come to be known: mean accuracy above 99 % at the end.", val, (GROKKED, 1.0)),
            (f"By its Gini coefficient the embedding is sparser in the {own} than in the {other} basis, for more than half of all seeds.", sparser, (0.5, 1.0)),
            (f"The logits' Gini coefficient is higher by at least 0.3 in the {own} than in the {other} basis, in the mean.", difference, (0.3, 1.0)),
            (
                f"Between {percent(GROKKED)} accuracy on the training rows and {percent(JUMP)} on the others, the restricted loss on the others falls by at "
                "least 0.5 nats, in the mean.",
                fallen,
                (0.5, math.inf),
            ),
            (
                f"While accuracy on the unseen rows is below {percent(JUMP)}, the excluded loss on the training rows rises at least 0.1 nats from its lowest, "
                "in the mean.",
                risen,
                (0.1, math.inf),
            ),
        ]
    return [Claim(about(text, cell), sample, holds) for text, sample, holds in sentences]


def _check(run: RunConfig) -> None:
    """What these measures can look at, found before training."""
    check(isinstance(run.task, ModularConfig), "task", "spectra over residues need the task modular")
    task: Any = run.task
    check(task.operation in BASIS, "task.operation", f"a group's spectrum is known for one of {', '.join(BASIS)}, not for {task.operation!r}")
    check(task.tokens == "residue", "task.tokens", "spectra need a token per residue")
    check(task.p > 2 and all(task.p % q for q in range(2, math.isqrt(task.p) + 1)), "task.p", f"both bases need an odd prime modulus, not {task.p}")
    everything = task.test_fraction is None or task.train_fraction + task.val_fraction + task.test_fraction > 1 - 1e-9
    check(everything, "task.test_fraction", "the spectra are of the whole table; leave it empty so that every row is in a split")
    check(isinstance(run.model, (DecoderConfig, EmbeddingMLPConfig)), "model", "the spectra read a decoder's or an embedding MLP's embedding")
    check(run.stop_metric is None, "stop_metric", "the last measurement is taken to be at the last step; let the runs make all of them")


def study(config: StudyConfig) -> Study:
    for _, run in config.settings():
        _check(run)
    told = cells(config)
    spectra = {"embedding": "embedding's rows", "logits": "logits, averaged over all rows with the same answer,"}
    return Study(
        name="grokking-progress",
        question=(__doc__ or "").partition("\n")[0],
        main_metric="val/accuracy",
        config=config,
        wanted=lambda rows: config.runs(),
        measures={"sparsity": sparsity, "spectrum": spectrum, "progress": progress},
        figures=[
            curves(["train/accuracy", "val/accuracy"], by=list(told[0]), logx=True, threshold=GROKKED),
            *(
                Figure(
                    f"spectrum-{of}",
                    partial(draw_spectra, told=told, of=of),
                    f"Power of the {words} at each frequency at the end of training, the constant apart. Left over residues, right over their discrete "
                    "logarithms, where the last is one wave and no pair; a colour is a seed.",
                )
                for of, words in spectra.items()
            ),
            Figure(
                "progress",
                partial(draw_progress, told=told),
                "Restricted: only the key frequencies (those with 90 % of the logits' power at the end, at most 10) and each class's constant. Excluded: "
                "everything but them. Median over seeds and range. For multiplication and division without the rows that have a zero operand.",
            ),
        ],
        tables=[
            sparsity_table("sparsity", "gini", told, "Gini coefficient of the power over frequencies, mean over seeds: 0 all equal, near 1 a single one."),
            sparsity_table("frequencies", "share", told, "The fewest frequencies that have 90 % of the power, as a share of all of them, mean over seeds."),
        ],
        claims=[claim for cell, (_, run) in zip(told, config.settings(), strict=True) for claim in _claims(cell, run)],
    )
