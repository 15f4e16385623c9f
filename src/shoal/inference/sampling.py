"""How the next token is chosen from its logits: repetition penalty, then temperature, then the k most probable, then the nucleus; then one draw.

    Sampling(temperature=0.8, top_p=0.95).pick(logits, key)

Each is a pure function of logits, in the order and with the meaning that transformers has.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from shoal.config.fields import check
from shoal.inference.pick import pick

COLDEST, HOTTEST = 1e-30, 1e30  # beyond them float32 has no quotients


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """With the defaults, the most probable token."""

    temperature: float = 0.0  # 0: the most probable token
    top_k: int = 0  # only so many of the most probable; 0 = all
    top_p: float = 1.0  # only the fewest that together have this probability, after temperature and top_k; 1 = all
    penalty: float = 1.0  # on tokens that occur already, in the prompt too; 1 = none

    def __post_init__(self) -> None:
        check(0 <= self.temperature < math.inf, "temperature", f"must be 0 (most probable token) or more, not {self.temperature}")
        check(self.top_k >= 0, "top_k", f"must be 0 (all tokens) or more, not {self.top_k}")
        check(0 < self.top_p <= 1, "top_p", f"must lie above 0 and not above 1 (all tokens), not {self.top_p}")
        check(0 < self.penalty < math.inf, "penalty", f"must be above 0 (1 = none; above 1 discourages what was said), not {self.penalty}")

    def pick(self, logits: Tensor, key: Tensor, said: Tensor | None = None) -> Tensor:
        """float32 [..., V], int64 [...] -> int64 [...]. ``said`` bool [..., V]: the tokens that occur already; None = no penalty."""
        if said is not None:
            logits = penalised(logits, said, self.penalty)
        if self.temperature == 0:
            return pick(logits, 0.0, key)
        logits = (logits - logits.amax(-1, keepdim=True)) / min(max(self.temperature, COLDEST), HOTTEST)
        if self.top_k or self.top_p < 1:
            logits = logits.masked_fill(~likeliest(logits, self.top_k, self.top_p), -torch.inf)
        return pick(logits, 1.0, key)

    def said(self, tokens: Tensor, mask: Tensor | None, vocab_size: int) -> Tensor | None:
        """int64 [B, T], where ``mask`` [B, T] is true -> bool [B, V]; None where there is no penalty to need it."""
        if self.penalty == 1:
            return None
        tokens = tokens if mask is None else tokens.masked_fill(~mask, vocab_size)
        return torch.zeros(len(tokens), vocab_size + 1, dtype=torch.bool, device=tokens.device).scatter(-1, tokens, True)[:, :-1].clone()


GREEDY = Sampling()


def penalised(logits: Tensor, said: Tensor, penalty: float) -> Tensor:
    """Logits [..., V] of tokens that were said, divided by the penalty (Keskar et al. 2019, arXiv 1909.05858, section 4.1); negative ones are multiplied,
    which the paper leaves open: divided, they would rise."""
    return torch.where(said, torch.where(logits > 0, logits / penalty, logits * penalty), logits)


def likeliest(logits: Tensor, top_k: int, top_p: float) -> Tensor:
    """bool [..., V]: the ``top_k`` largest (0 = all; of equals the first), and of these the fewest whose share of their probability reaches ``top_p``
    (Holtzman et al. 2019, arXiv 1904.09751)."""
    ordered, index = logits.sort(dim=-1, descending=True, stable=True)
    kept = torch.arange(logits.shape[-1], device=logits.device) < (top_k or logits.shape[-1])
    if top_p < 1:
        share = ordered.masked_fill(~kept, -torch.inf).softmax(-1)
        kept = kept & (share.cumsum(-1) - share < top_p)  # what stands before it has not reached it
    return torch.zeros_like(logits, dtype=torch.bool).scatter(-1, index, kept.expand(logits.shape))
