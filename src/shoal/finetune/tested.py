"""A fine-tuned run on the sentences it never saw, once: what is right, what is taken for what, which mistakes it is surest of, and the baselines beside it.

Each function is a measure: a run -> lines for its report. Forward passes are made on ``measuring_device``. Not here: training, and what is made of the lines.

    [line] = accuracy(run); line["right"], line["sentences"]
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from shoal.config import EncoderConfig, SentencesConfig
from shoal.contracts import Context
from shoal.finetune.baselines import Baseline, baselines
from shoal.models.encoder import Encoder
from shoal.tasks.sentences import CUT, SentencesTask, numbered
from shoal.train.device import measuring_device
from shoal.train.run import Run

TOKENS = {"cpu": 1 << 13, "cuda": 1 << 17}  # of one piece
SHOWN = 8  # mistakes to read
LONGEST = 300  # characters of a sentence that are shown


def accuracy(run: Run) -> list[dict[str, Any]]:
    labels, found = _of(run)
    right = int((found.argmax(-1) == labels).sum())
    return [{"sentences": len(labels), "right": right, "accuracy": right / len(labels)}]


def confusion(run: Run) -> list[dict[str, Any]]:
    """A line for every pair of classes, by their names."""
    labels, found = _of(run)
    counts, classes = Counter(zip(labels.tolist(), found.argmax(-1).tolist(), strict=True)), _task(run).data.classes
    return [{"class": name, "taken for": other, "sentences": counts[i, j]} for i, name in enumerate(classes) for j, other in enumerate(classes)]


def mistakes(run: Run) -> list[dict[str, Any]]:
    """The sentences it is surest about and wrong, the surest first."""
    labels, found = _of(run)
    task, taken = _task(run), found.argmax(-1)
    wrong = np.flatnonzero(taken != labels)
    texts, classes = task.texts("test"), task.data.classes
    lines = []
    for row in sorted(wrong, key=lambda row: (-found[row].max(), row))[:SHOWN]:
        p = float(found[row].max())
        lines.append({"sentence": texts[row][:LONGEST], "class": classes[labels[row]], "taken for": classes[taken[row]], "p of that": round(p, 4)})
    return lines


def beside(run: Run) -> list[dict[str, Any]]:
    """A line for every baseline, on the same sentences; and of those only one of the two has right, how many are the run's."""
    labels, found = _of(run)
    task, model = _task(run), run.config.model
    assert isinstance(model, EncoderConfig)
    mine = found.argmax(-1) == labels
    lines = []
    for one in _baselines(task.config, task.fingerprint, model.encoder, model.pooling):
        theirs = one.right["test"][task.encoded["test"].order]
        lines.append(
            {
                "baseline": one.name,
                "what it is": one.about,
                "validation": one.accuracy("val"),
                "test": one.accuracy("test"),
                "right": int(theirs.sum()),
                "sentences": len(theirs),
                "only the run right": int((mine & ~theirs).sum()),
                "only the baseline right": int((theirs & ~mine).sum()),
            }
        )
    return lines


def features(task: SentencesTask, encoder: str, pooling: Any) -> dict[str, NDArray[np.float32]]:
    """What the untrained encoder makes of every sentence: split -> [n, D], in the order of the data. Read once in this process, heads in training included."""
    device = measuring_device()
    model = Encoder(EncoderConfig(encoder=encoder, pooling=pooling, frozen=True, num_classes=task.num_classes), task.vocab_size, task.max_length).to(device)
    _, sentences = numbered(task.setup({"split_seed": [0]}, device))
    model.remember(sentences, max(1, TOKENS[device] // task.max_length), task.fingerprint)
    assert model.features is not None
    found, pieces = {}, model.features.float().cpu().split([len(tokens) for tokens, _ in sentences])
    for split, rows in zip(CUT, pieces, strict=True):
        found[split] = np.empty(rows.shape, np.float32)
        found[split][task.encoded[split].order] = rows.numpy()
    return found


@functools.lru_cache(maxsize=2)
def _baselines(config: SentencesConfig, fingerprint: str, encoder: str, pooling: str) -> list[Baseline]:
    """``fingerprint``: of the task, whose files may change."""
    task = SentencesTask(config)
    return baselines(task.data, features(task, encoder, pooling))


Found = tuple[NDArray[np.int64], NDArray[np.float64]]
_last: dict[tuple[str, str], Found] = {}  # of the run that was asked last: several measures look at the same


def _of(run: Run) -> Found:
    """Of the test, in the order of its evaluation: classes [n] and their probabilities [n, C]."""
    key = run.id, _task(run).fingerprint
    if key not in _last:
        pieces = [(labels, run.model.logits(hidden)) for labels, hidden in _passes(_task(run), run.model, "test")]
        _last.clear()
        _last[key] = (
            np.concatenate([labels.cpu().numpy() for labels, _ in pieces]),
            np.concatenate([logits[:, 0].double().softmax(-1).cpu().numpy() for _, logits in pieces]),
        )
    return _last[key]


@torch.inference_mode()
def _passes(task: SentencesTask, model: Any, split: str) -> Iterator[tuple[Tensor, Tensor]]:
    """Piece by piece int64 [n], [n, 1, D]: classes, and what the head reads. The model is on the device of measures for as long as this goes on."""
    device = measuring_device()
    model.to(device)
    for piece in task.evaluation(task.setup({"split_seed": [0]}, device), split, max(1, TOKENS[device] // task.max_length)):
        batch = piece.each(lambda x: x[0])
        there = batch.weights[:, 0] > 0
        yield batch.targets[there, 0], model(batch.tokens, Context(mask=batch.mask, at=batch.at))[0][there]
    model.to("cpu")


def _task(run: Run) -> SentencesTask:
    assert isinstance(run.task, SentencesTask)
    return run.task
