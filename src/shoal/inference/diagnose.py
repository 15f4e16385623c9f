"""What is wrong with a run, told from its curves alone: rules of thumb, each with its physical reason, the numbers it saw and the change to try.

A rule sees losses, accuracies and gradient norms of training batches, and the losses of evaluations: never a config, a learning rate, weights or data. Places
are shares of the run and sizes shares of its first loss, so that no rule knows a vocabulary or a number of steps. Thresholds were set on runs that the study
``broken-runs`` does not train (seeds 0 to 4, 100 on). Not here: the faults themselves (``shoal.train.faults``, settings), how often it is right.

    print(diagnose(curves_of(rows[0])).text())     # or: shoal diagnose runs/gpt
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import isotonic_regression

from shoal.config.fields import check

if TYPE_CHECKING:
    from shoal.results.rows import Row

Values = NDArray[np.float64]
ENOUGH = 20  # rows of batches: fewer have no shape
NONE: Values = np.zeros(0)
HEALTHY, SHORT = "nothing wrong that the curves show", "too short to say"


@dataclass(frozen=True)
class Curves:
    """All that a diagnosis sees. Batches: [n] each; evaluations: steps [m] and values [m], empty where there were none."""

    steps: Values  # of the batches
    loss: Values
    accuracy: Values
    grad_norm: Values
    train: tuple[Values, Values]  # steps, loss of the training split, weights held still
    val: tuple[Values, Values]  # steps, loss of what was not trained on
    died: bool = False  # its last loss or gradient was not finite

    @cached_property
    def first(self) -> float:
        return float(max(self.loss[0], 1e-9))

    @cached_property
    def smooth(self) -> Values:
        return _smooth(self.loss)  # [n - 4]

    def level(self, values: Values, share: float) -> float:
        """The median around a place of the run, over a twentieth of it, 5 rows or more."""
        half = max(len(values) // 40, 2)
        centre = min(max(round(share * (len(values) - 1)), half), len(values) - 1 - half)
        return float(np.median(values[centre - half : centre + half + 1]))

    def end(self, values: Values) -> float:
        """The median of the last tenth, 5 rows or more."""
        return float(np.median(values[-max(len(values) // 10, 5) :]))

    def noise(self, values: Values) -> Values:
        """What a cubic leaves of the last two thirds: their scatter from batch to batch."""
        late = values[len(values) // 3 :]
        place = np.linspace(-1, 1, len(late))
        return late - np.polyval(np.polyfit(place, late, 3), place)

    def beside(self, evaluated: tuple[Values, Values], since: float, near: float) -> tuple[Values, Values]:
        """Evaluations after a share of the run, and the median of the batches not further from each than another share, 2 rows at least."""
        steps, values = evaluated
        late, reach = steps > since * self.steps[-1], max(near * self.steps[-1], 2 * self.steps[1])
        around = [np.median(self.loss[np.abs(self.steps - step) <= reach]) for step in steps[late]]
        return np.array(around), values[late]

    @cached_property
    def fall(self) -> float:
        """From the first loss to the last ones, as a share of the first."""
        return 1 - self.end(self.loss) / self.first


@dataclass(frozen=True)
class Finding:
    name: str
    evidence: str

    @property
    def reason(self) -> str:
        return MEANING[self.name][0]

    @property
    def change(self) -> str:
        return MEANING[self.name][1]


@dataclass(frozen=True)
class Diagnosis:
    findings: tuple[Finding, ...] = ()  # the likeliest first
    remark: str = ""  # what is no fault, and worth saying
    short: bool = False

    @property
    def name(self) -> str:
        return SHORT if self.short else self.findings[0].name if self.findings else HEALTHY

    def text(self) -> str:
        """Sentence, evidence, change to try; then what else it could be."""
        lines = [f"{self.name[0].upper()}{self.name[1:]}."]
        for place, found in enumerate(self.findings):
            lines += [f"It could also be: {found.name}."] if place else []
            lines += [f"  why: {found.reason}", f"  seen: {found.evidence}", f"  try: {found.change}"]
        return "\n".join([*lines, *([f"  {self.remark}"] if self.remark else [])])


def curves_of(row: Row) -> Curves:
    """The curves of a stored run. ConfigError where its batches were not recorded."""

    def evaluated(*starts: str) -> tuple[Values, Values]:
        names = [name.removeprefix("final.") for name in row if name.startswith("final.") and name.endswith("/loss")]
        for start in starts:
            for name in names:
                if name.startswith(start):
                    steps, values = row.curve(name)
                    return steps.astype(np.float64), values
        return NONE, NONE

    steps, loss = row.curve("batch/loss")
    _, accuracy = row.curve("batch/accuracy")
    _, grad_norm = row.curve("batch/grad_norm")
    n = min(map(len, (loss, accuracy, grad_norm)))  # a run that died has a last loss and no last norm
    check(n > 0, "run", f"{row['id']} has no losses of its batches to look at; let it train for some steps")
    dead = row["status"] == "dead"
    return Curves(steps[:n].astype(np.float64), loss[:n], accuracy[:n], grad_norm[:n], evaluated("train"), evaluated("val", "test"), dead)


def _smooth(values: Values) -> Values:
    """[n] -> [n - 4]: running medians of 5."""
    return np.median(np.lib.stride_tricks.sliding_window_view(values, 5), axis=-1)


# Rules: what they see, or None. In order: what stands first explains what stands behind it.


def _dead(x: Curves) -> str | None:
    """All weights 0 give every weight the gradient 0, at every step."""
    largest = float(x.grad_norm.max())
    return f"the gradient norm is at most {largest:.1g}, and the loss stays at {x.first:.3g}" if largest < 1e-6 else None


def _init_large(x: Curves) -> str | None:
    """Large random logits are confident and wrong: a loss far above that of knowing nothing. It falls to that level while hardly any answer becomes right."""
    ignorant = np.minimum.accumulate(np.where(_smooth(x.accuracy) < 0.15, x.smooth, np.inf))
    low = float(ignorant[-1])
    calm = x.smooth.max() < 1.5 * x.first
    return f"the loss falls from {x.first:.3g} to {low:.3g} while accuracy is still below 0.15" if calm and low < 0.55 * x.first else None


def _lr_high(x: Curves) -> str | None:
    """Steps longer than the valley is wide climb its walls: the loss ends no lower than it began, or leaves what it had reached for good."""
    end = x.end(x.loss)
    if x.died:
        return f"the loss or the gradient was infinite after {len(x.loss)} recorded batches (the last losses: {end:.3g})"
    peak, low = float(x.smooth.max()), float(x.smooth.min())
    if end > x.first and peak > 1.1 * x.first:
        return f"the loss begins at {x.first:.3g}, rises to {peak:.3g} and ends at {end:.3g}"
    lasting = x.level(x.loss, 0.8) > 1.3 * low and end > 1.3 * low and low > 0.1 * x.first
    _, train = x.train
    rises = len(train) > 2 and train[-1] > 1.3 * train.min() and train[-2] > 1.3 * train.min()
    return f"the loss had come down to {low:.3g} and ends at {end:.3g}, of the training split too" if lasting and rises else None


def _no_warmup(x: Curves) -> str | None:
    """Before it has seen a few gradients an optimizer does not know how long a step may be: the first ones throw the weights far away, then it recovers."""
    early = x.loss[: max(len(x.loss) // 20, 3)]
    place = int(early.argmax())
    recovered = x.end(x.loss) < 0.95 * x.first
    return f"the loss jumps from {x.first:.3g} to {early[place]:.3g} at batch {place}, then falls" if recovered and early[place] > 1.4 * x.first else None


def _repeat(x: Curves) -> str | None:
    """What is trained on is known by heart and the rest of the training split is not: it was never shown."""
    _, train = x.train
    end = x.end(x.loss)
    if len(train) < 2 or not (end < 0.2 * x.first and train[-1] > 0.5 * train[0]):
        return None
    return f"batches end at a loss of {end:.2g}, the training split itself at {train[-1]:.3g} (at first {train[0]:.3g})"


def _solved(x: Curves) -> bool:
    """Batches and what was not trained on end near 0, and neither was ever behind the other: there was nothing to generalise."""
    (steps, val), after = x.val, x.steps
    if len(val) < 3 or x.end(x.loss) > 0.15 * x.first or val[-1] > 0.15 * val[0]:
        return False
    near = np.interp(steps[1:], after, np.convolve(np.pad(x.loss, 2, "edge"), np.ones(5) / 5, "valid"))
    return bool((val[1:] - near).max() < 0.17 * x.first)


def _shift(x: Curves) -> str | None:
    """The present token is in the hidden state already: it becomes the likeliest at once, long before the model is sure of anything."""
    right = _smooth(x.accuracy) >= 0.5
    then = float(x.smooth[right.argmax()]) if right.any() else 0.0
    if not (_solved(x) and then > 0.8 * x.first):
        return None
    return f"half of the answers are right when the loss has only come from {x.first:.3g} to {then:.3g}; it ends at {x.end(x.loss):.2g}"


def _leak(x: Curves) -> str | None:
    """No text can be foretold this well. That it is text shows in how it began: common tokens come first, so the loss falls while few answers are right."""
    some = _smooth(x.accuracy) >= 0.3
    if not (_solved(x) and some.any() and x.smooth[some.argmax()] < 0.65 * x.first):
        return None
    return f"the loss on unseen text ends at {x.val[1][-1]:.2g}, from {x.val[1][0]:.3g}, no slower than that of the batches; accuracy {x.end(x.accuracy):.3g}"


def _padding(x: Curves) -> str | None:
    """Padding is foretold at once and perfectly; how much of a batch is padding changes, and moves loss and accuracy together as nothing else does."""
    loss, accuracy = x.noise(x.loss), x.noise(x.accuracy)
    early, late = x.level(x.accuracy, 0.1), x.end(x.accuracy)
    if not (late > 0.1 and early > 0.8 * late and late < 0.95 and x.level(x.loss, 0.1) < 0.8 * x.first and loss.std() > 0.01 * x.first and accuracy.std() > 0):
        return None
    together = float(np.corrcoef(loss, accuracy)[0, 1])
    return f"accuracy is {early:.2g} after a tenth of the run and {late:.2g} at its end; it goes with the loss by {together:.3f}" if together < -0.95 else None


def _overfit(x: Curves) -> str | None:
    """What is learned by heart is said with more confidence and is wrong elsewhere: the validation loss turns and rises while the training loss falls on."""
    (_, train), (steps, val) = x.train, x.val
    seen = train[-1] if len(train) else x.end(x.loss)
    if len(val) < 4 or not (val.min() < 0.95 * val[0] and val[-1] - val.min() > 0.05 * val[0] and seen < 0.75 * val[-1]):
        return None
    low = int(val.argmin())
    return f"validation loss {val[low]:.3g} at step {steps[low]:.0f} and {val[-1]:.3g} at the end, where that of training is {seen:.3g}"


def _labels(x: Curves) -> str | None:
    """Without a link from input to target only the targets' frequencies can be learned: one quick fall, then a level that nothing lowers, few answers right."""
    begin, end = x.level(x.loss, 0.3), x.end(x.loss)
    flat = abs(begin - end) < 0.02 * x.first and abs(x.level(x.loss, 0.6) - end) < 0.02 * x.first
    ok = flat and 0.04 < x.fall < 0.5 and x.end(x.accuracy) < 0.2
    return f"loss {x.first:.3g} at first, {begin:.3g} after 30 % of the run and {end:.3g} at its end; accuracy {x.end(x.accuracy):.2g}" if ok else None


def _lr_low(x: Curves) -> str | None:
    """A curve bends when the easy part is learned, and gradients change when weights do. This one falls on in a straight line, not far, its gradient kept."""
    half, end, kept = x.level(x.loss, 0.5), x.end(x.loss), x.end(x.grad_norm) / max(x.level(x.grad_norm, 0), 1e-12)
    straight = 0.4 < (x.first - half) / max(x.first - end, 1e-9) < 0.7 and 0.01 < x.fall < 0.35 and kept > 0.4
    still = abs(x.fall) < 0.01 and 0.8 < kept < 1.25
    told = f"loss {x.first:.3g}, half-way {half:.3g}, at the end {end:.3g}; the gradient norm ends at {kept:.2g} of what it was"
    return told if straight or still else None


def _unshuffled(x: Curves) -> str | None:
    """Batches next to each other are of one source, so their losses are alike and wander up and down; shuffled ones scatter independently about a fall.

    Where the weights themselves come and go, evaluations do so with the batches; and of independent losses a few together scatter much less than one.
    """
    late = x.loss[len(x.loss) // 3 :]
    loss = late - isotonic_regression(late, increasing=False).x  # a fall of any shape is no wandering
    alike = float(np.corrcoef(loss[1:], loss[:-1])[0, 1]) if loss.std() > 0.03 * x.first else 0.0
    chance = 2.5 / np.sqrt(len(late))  # the correlation of independent values has a standard deviation of 1 / sqrt(n)
    around, held = x.beside(x.val, 1 / 3, 0.02)
    alone = len(held) < 3 or (around - held).std() > 0.75 * loss.std()
    return f"the losses of neighbouring batches are alike (correlation {alike:.2f}) and scatter by {loss.std():.2g}" if alike > chance and alone else None


def _dropout(x: Curves) -> str | None:
    """Something acts in training and not in evaluation: with it the same data are worse foretold."""
    around, train = x.beside(x.train, 1 / 2, 0.05)
    if len(train) < 2:
        return None
    gap, share = float((around - train).mean()), float((around > train).mean())
    return f"batches are foretold worse than the training split without what acts in training, by {gap:.2g}" if gap > 0.04 * x.first and share >= 0.8 else None


RULES: dict[str, Callable[[Curves], str | None]] = {
    "dead initialisation": _dead,
    "initialisation too large": _init_large,
    "one batch repeated": _repeat,
    "learning rate too high": _lr_high,
    "no warm-up": _no_warmup,
    "wrong loss shift": _shift,
    "leak from the future": _leak,
    "unmasked padding": _padding,
    "overfitting": _overfit,
    "mismatched labels": _labels,
    "learning rate too low": _lr_low,
    "unshuffled data": _unshuffled,
    "dropout too strong": _dropout,
}


MEANING = {  # name -> why, the change to try
    "dead initialisation": (
        "no gradient reaches the weights, as when all of them begin at 0 or units are saturated: nothing can ever be learned",
        "initial values about 1 / sqrt(inputs) of a layer; look for a detached part",
    ),
    "initialisation too large": (
        "the model begins confident and wrong: the loss of one that knows nothing is ln(vocabulary), and this begins far above",
        "smaller initial values (0.02, or 1 / sqrt(inputs)), of the head above all",
    ),
    "one batch repeated": (
        "the batches are known by heart, and their own training split is not: training sees the same few rows again and again",
        "check that the loader moves on: its step or its seed does not change from batch to batch",
    ),
    "learning rate too high": (
        "steps are longer than the valley is wide and climb its walls",
        "a tenth of the learning rate, or gradient clipping and a warm-up",
    ),
    "no warm-up": (
        "the very first steps were far too long, before the optimizer knew the size of gradients; what they threw away had to be learned again",
        "a linear warm-up over 5 to 10 % of the run, or a lower learning rate",
    ),
    "wrong loss shift": (
        "the right answer stands in the input: targets are the present tokens, not the next ones, so that the model has only to repeat",
        "targets one place behind the inputs: inputs tokens[:-1], targets tokens[1:], and shift once only",
    ),
    "leak from the future": (
        "no text can be foretold this well, seen or unseen: the model looks at what it should foretell",
        "check the causal mask, and everything else that mixes positions (normalisation over time, convolutions, padding)",
    ),
    "unmasked padding": (
        "a part of the scored tokens is foretold at once and always, and the loss goes up and down with their share: padding is scored",
        "give padding the weight 0 in loss and accuracy, and mask it in attention",
    ),
    "overfitting": (
        "the training set is learned by heart, and what was learned for all data is lost again",
        "more data, a stop at the lowest validation loss, more weight decay or dropout, a smaller model",
    ),
    "mismatched labels": (
        "only how common each target is was learned, and nothing about which belongs to which input",
        "look at a few pairs of input and target after all shuffling; shuffle both with the same permutation",
    ),
    "learning rate too low": (
        "the weights hardly move: the curve is the straight beginning of one that should bend",
        "ten times the learning rate, and check what the schedule makes of it",
    ),
    "unshuffled data": (
        "neighbouring batches come from the same source: the model follows each for a while and forgets the last",
        "shuffle rows, or windows of text, over the whole training set",
    ),
    "dropout too strong": (
        "what is active in training only, such as dropout or noise, costs more than it can give back",
        "dropout 0.1 or none, less noise",
    ),
    "behind the reference": (
        "nothing is odd in the shape of these curves, yet the reference learns more: so look targets more than one place ahead, a learning rate off by less "
        "than ten times, regularisation, a smaller model or harder data",
        "compare the two settings one by one",
    ),
}
LATE = "It knows its training set and nothing of the rest yet. Arithmetic and other rules may come much later: train on, or add weight decay and data."
SOLVED = "All is right on unseen data, too: as it should be if every question has one answer. If this is text, the model sees what it should foretell."
NOTHING_YET = "It has not learned anything that shows, which is no fault by itself: some tasks begin with a long level. Train on, or try other learning rates."
AHEAD, BEHIND = 0.4, 1.1  # final loss as a multiple of the reference's


def diagnose(curves: Curves, reference: Curves | None = None) -> Diagnosis:
    """What these curves show, the likeliest first; ``reference``: those of a run that is known to be right, of the same task and number of steps.

    Beside a reference a leak needs not look like text to be one, and a run may be found worse than it in a way no rule knows.
    """
    x = curves
    if len(x.loss) < ENOUGH and x.died:
        return Diagnosis((Finding("learning rate too high", _lr_high(x) or ""),))
    if len(x.loss) < ENOUGH:
        return Diagnosis(short=True, remark=f"There are {len(x.loss)} recorded batches; {ENOUGH} are needed (record more often, or train on).")
    seen = {name: evidence for name, rule in RULES.items() if (evidence := rule(x))}
    if reference is not None and len(reference.loss) >= ENOUGH:
        end, theirs = ((c.val[1][-1] if len(c.val[1]) else c.end(c.loss)) for c in (x, reference))
        told = f"it ends at a loss of {end:.3g}, the reference at {theirs:.3g}"
        if not seen and _solved(x) and not _solved(reference) and end < AHEAD * theirs:
            seen = {"leak from the future": told}
        elif not seen and end > BEHIND * theirs and end - theirs > 0.02 * reference.first:
            seen = {"behind the reference": told}
    remark = "" if seen else _remark(x)
    return Diagnosis(tuple(Finding(name, evidence) for name, evidence in seen.items()), remark)


def _remark(x: Curves) -> str:
    (_, train), (_, val) = x.train, x.val
    seen = train[-1] / train[0] if len(train) else 1 - x.fall
    if len(val) and seen < 0.3 and val.min() > 0.9 * val[0]:
        return LATE
    return SOLVED if _solved(x) else NOTHING_YET if x.fall < 0.02 else ""
