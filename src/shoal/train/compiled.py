"""Which programs a fleet's functions are compiled to, whole or a deep model block by block.

Compiling is most of the wait before a compiled fleet's first step, and for a model as a whole it takes as many times what one block takes as there are
blocks. Blocks that are alike share one program instead, which is given each one's parameters. What a compiler joins
across their borders, a sum and a norm, is then read once more: some 5 % of a step's memory traffic.
Not here: what is replayed without Python (``capture``).
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

from shoal.contracts import Batch, Context, Objective, Sums
from shoal.models.decoder import Decoder
from shoal.train.diffusion import masked_diffusion

OPTIONS = {"comprehensive_padding": False}  # torch 2.11 may give a tensor padded rows and then read it as if it had none: wrong numbers, and no error
CHOICES: Any = {"dynamic": False, "fullgraph": True, "options": OPTIONS}
CHAINS = {"realize_opcount_threshold": 8}  # on a CPU: a shuffle's rounds use each other thrice, and written into each other grow to 40 s of compiling
FEW = 20  # evaluations, for which a program for each split is not worth some 10 s of compiling
DEEP = 3  # blocks: of fewer, little is saved
LONG = 10_000  # steps after which twentieths of a step are more than what is saved
VERSIONS = 64  # of one function: a block with and without gradients, at all positions and at the scored ones, of each kind of mixer


def restart() -> None:
    """Each fleet is its own program, and PyTorch keeps only a few versions of one function."""
    torch.compiler.reset()
    torch._dynamo.config.recompile_limit = VERSIONS


def plainly() -> AbstractContextManager[None]:
    """In here what was compiled runs as it is written."""
    return torch.compiler.set_stance("force_eager")


def compiled(function: Callable[..., Any], options: dict[str, Any] | None = None) -> Callable[..., Any]:
    return torch.compile(function, **{**CHOICES, "options": OPTIONS | (options or {})})


def compiled_objective(objective: Objective, model: Any, steps: int) -> Objective:
    """The same sums. Whole, unless the model is deep, the training short, and blocks can share: with dropout each draws at a place of its own."""
    alike = isinstance(model, Decoder) and model.rate is None and objective is not masked_diffusion
    if not alike or len(model.blocks) < DEEP or steps > LONG:
        return compiled(objective)
    model.compile_blocks(**CHOICES)
    score = compiled(lambda model, hidden, batch: objective(Finished(model, hidden), batch, None))

    def by_block(model: Any, batch: Batch, key: Tensor | None) -> Sums:
        hidden, _ = model(batch.tokens, Context(mask=batch.mask, at=batch.at, key=key))
        return score(model, hidden, batch)

    return by_block


class Finished:
    """A model that has been called: its hidden states, and its head."""

    def __init__(self, model: Any, hidden: Tensor) -> None:
        self.model, self.hidden = model, hidden

    def __call__(self, tokens: Tensor, context: Context) -> tuple[Tensor, None]:
        return self.hidden, None

    def logits(self, hidden: Tensor) -> Tensor:
        return self.model.logits(hidden)

    def linear_head(self) -> tuple[Tensor, Tensor | None, float]:
        return self.model.linear_head()
