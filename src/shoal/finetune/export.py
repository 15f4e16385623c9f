"""A fine-tuned encoder as files that transformers loads, without shoal.

    save(load("runs/mine").best(), "mine-best")
    transformers.AutoModelForSequenceClassification.from_pretrained("mine-best")      # pooling "first"

Where the head is linear (pooling "mean", or a frozen encoder) transformers has no class for the whole. The directory then holds the encoder, which AutoModel
loads, and beside it head.safetensors ("weight" [C, D], "bias" [C], as torch.nn.Linear has them) and head.json (what the head reads, and the classes).
"""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn

from shoal.config.fields import check
from shoal.data import encoders
from shoal.models.encoder import Encoder
from shoal.models.pretrained import network
from shoal.tasks.sentences import SentencesTask
from shoal.train.run import Run


@torch.no_grad()
def save(run: Run, out: str | Path) -> str:
    """What was written, in a sentence. ConfigError ("out") if there is something already, ("run") for another kind of run."""
    model, task, directory = run.model, run.task, Path(out)
    check(isinstance(model, Encoder) and isinstance(task, SentencesTask), "run", "only a fine-tuned encoder has a Hugging Face form; this is none")
    assert isinstance(model, Encoder) and isinstance(task, SentencesTask)
    check(not directory.exists() or (directory.is_dir() and not any(directory.iterdir())), "out", f"{out} exists already; name a new directory")
    library = copy.deepcopy(network(*model.asked).module)
    tensors = {**dict(model.module.named_parameters()), **dict(model.module.named_buffers())}
    for name, p in library.named_parameters():
        p.copy_(tensors[name])
    inner: Any = next(library.children())
    inner.config.id2label = dict(enumerate(task.data.classes))
    inner.config.label2id = {name: place for place, name in enumerate(task.data.classes)}
    with encoders.quiet():
        inner.save_pretrained(directory)
        encoders.tokenizer(model.config.encoder, "task.encoder").save_pretrained(directory)
    if model.head is None:
        return f"{out} holds encoder, head and tokenizer; transformers.AutoModelForSequenceClassification loads it"
    _save_head(model.head, directory, {"reads": model.config.pooling, "classes": task.data.classes})
    reads = "mean" if model.config.pooling == "mean" else "first token"
    return f"{out} holds the encoder (transformers.AutoModel), its tokenizer, and in head.safetensors the linear head on the {reads} of its output"


def _save_head(head: nn.Module, directory: Path, said: dict[str, Any]) -> None:
    tensors = dict(head.named_parameters())
    save_file({"weight": tensors["weight"].mT.contiguous(), "bias": tensors["bias"].contiguous()}, directory / "head.safetensors")
    (directory / "head.json").write_text(json.dumps(said, indent=1), encoding="utf-8")
