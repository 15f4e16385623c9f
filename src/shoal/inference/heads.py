"""What kind of head each attention head is: how much of its attention goes to four places, on random tokens that come twice (Olsson et al. 2022).

    scores = head_scores(load("runs/gpt"))     # scores.rows: layer, head, previous, duplicate, induction, first; scores.table(), scores.png()

A sequence: the task's begin tokens, n different random tokens r_1 .. r_n, the same n again. Every query is a token of the second copy but its first, r_i with
i = 2 .. n; a score is the mean over these queries, and over ``SEQUENCES`` sequences, of the attention weight on

| score | the place it is on |
|---|---|
| previous | the token before the query |
| duplicate | r_i in the first copy |
| induction | what stands ``offset`` places after it: r_{i+1} with offset 1 |
| first | the first token of all |

For each query these are four different places, so a head's scores are shares of one whole: together at most 1. Even attention over all it may see would give
each of them the same, ``even``. Random tokens have no meaning: a head that does something else in text may do none of this here, and a model that has
never seen a sequence repeat itself need not have any such head.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from shoal import rng
from shoal.config import DecoderConfig, LanguageConfig, RecallConfig
from shoal.config.fields import check
from shoal.contracts import Context
from shoal.inference.inside import attending, weights_of
from shoal.inference.prompts import device_of
from shoal.results import inside as figures
from shoal.train.run import Run

SEQUENCES = 64
LONGEST = 64  # n, where it is not given
SCORES = ("previous", "duplicate", "induction", "first")


@dataclass(frozen=True)
class Heads:
    rows: list[dict[str, Any]]  # a line per head: layer, head (both from 0) and its SCORES
    even: float  # each score of a head that looks everywhere alike
    length: int  # n
    offset: int

    def table(self) -> str:
        """A line per head, and that of even attention."""
        lines = ["layer  head  " + "  ".join(f"{name:>9}" for name in SCORES)]
        lines += [f"{row['layer']:5}  {row['head']:4}  " + "  ".join(f"{row[name]:9.3f}" for name in SCORES) for row in self.rows]
        return "\n".join([*lines, f"{'even':>11}  " + "  ".join([f"{self.even:9.3f}"] * len(SCORES))]) + "\n"

    def png(self) -> bytes:
        return figures.png(lambda: figures.scores(self.rows, SCORES, self.even))


def head_scores(run: Run, *, length: int | None = None, offset: int = 1, seed: int = 0) -> Heads:
    """All heads of all layers with attention weights. ``offset``: how far behind its query an answer stands, as a recall task's delay.

    ``length``: n, how far apart the copies are; None = a quarter of the length that was trained on, at most 64. Heads may find at one distance what they do
    not at another. ConfigError where there is no room for 3 tokens twice, or no attention.
    """
    attending(run)
    task = run.config.task
    trained = task.length if isinstance(task, LanguageConfig | RecallConfig) else run.task.max_length
    spelled = [token for token in range(run.task.vocab_size) if run.task.tokenizer.decode([token])]
    begin = len(run.task.start)
    most = min(len(spelled), (trained - begin) // 2)
    short = f"at least 3 different tokens are needed, twice; there are {len(spelled)} tokens, and {trained} positions ({begin} of them to begin a text)"
    check(most >= 3, "run", f"no scores of heads for {run.id}: {short}")
    n = min(most, max(3, min(LONGEST, trained // 4))) if length is None else length
    check(3 <= n <= most, "length", f"must be 3 to {most}: so many different tokens there are, and room for them to come twice, not {n}")
    check(1 <= offset <= n - 2, "offset", f"must be 1 to {n - 2} for {n} tokens that come twice, not {offset}")
    keys = rng.fold(rng.key(torch.tensor(seed), "head scores"), torch.arange(SEQUENCES))
    drawn = torch.tensor(spelled)[rng.permutation(keys, len(spelled))[:, :n]]
    tokens = torch.cat((torch.tensor(run.task.start, dtype=torch.int64).expand(SEQUENCES, -1), drawn, drawn), dim=1).to(device_of(run))
    first = begin + torch.arange(1, n)  # r_2 .. r_n in the first copy
    query = first + n
    places = {"previous": query - 1, "duplicate": first, "induction": first + offset, "first": torch.zeros_like(first)}
    rows = []
    for layer, weights in weights_of(run, tokens, Context()).items():
        found = {name: looks(weights, query, place).tolist() for name, place in places.items()}
        rows += [{"layer": layer, "head": head, **{name: found[name][head] for name in SCORES}} for head in range(weights.shape[1])]
    assert isinstance(run.config.model, DecoderConfig)
    seen = query + 1.0 if run.config.model.causal else torch.full((n - 1,), float(tokens.shape[1]))
    return Heads(rows, float((1 / seen).mean()), n, offset)


def looks(weights: Tensor, query: Tensor, place: Tensor) -> Tensor:
    """[B, H, T, T], and int64 [n] or [B, n] twice -> float64 [H]: the mean weight from ``query`` on ``place``."""
    batch = torch.arange(len(weights)).unsqueeze(-1)
    return weights.transpose(1, 2)[batch, query, :, place].double().mean((0, 1)).cpu()
