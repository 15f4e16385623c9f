"""A hidden Markov model: a chain of states, each with its own distribution over tokens (Rabiner 1989).

Its hidden states are distributions: what is known of the state at the next position, after the tokens so far. Its logits are exact log probabilities,
log p(next token | tokens so far), so cross-entropy is its likelihood and any gradient optimizer trains it. The three tables of logits are free parameters;
a softmax over the last axis makes them distributions. Baum-Welch reads the same tables (``shoal.train.baum_welch``, objective "likelihood").

The first token of a window is given, not scored, as for every model here: the likelihood is that of the other tokens given it.

    model = HMM(HMMConfig(num_states=64), vocab_size=99, max_length=8)
    hidden, _ = model(tokens)                   # [B, T, N]
    model.logits(hidden).exp().sum(-1)          # 1

Not here: the recursion (``shoal.nn.forward_algorithm``), the most probable path.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from shoal.config.models import HMMConfig
from shoal.contracts import Context
from shoal.nn import Normal, select
from shoal.nn.forward_algorithm import forward_algorithm
from shoal.nn.init import Distribution
from shoal.nn.layers import linear, lookup

EVERYTHING = Context()


class HMM(nn.Module):
    def __init__(self, config: HMMConfig, vocab_size: int, max_length: int, lead: tuple[int, ...] = ()) -> None:
        super().__init__()
        self.config, self.vocab_size, self.max_length = config, vocab_size, max_length
        self.initial = nn.Parameter(torch.empty(*lead, config.num_states))  # logits, as all three
        self.transition = nn.Parameter(torch.empty(*lead, config.num_states, config.num_states))
        self.emission = nn.Parameter(torch.empty(*lead, config.num_states, vocab_size))

    def forward(self, tokens: Tensor, context: Context = EVERYTHING, cache: Tensor | None = None, free: bool = False) -> tuple[Tensor, Tensor | None]:
        """int64 [*L, B, T] -> the distribution [*L, B, S, N] of the state at each next position, and (with a cache, [*L, B, N]) the last of them.

        ``free``: gradients as if rows need not sum to 1, see ``log_probabilities``.
        """
        prior = self.prior(tokens.shape[-2], free) if cache is None else cache
        evidence = lookup(tokens, log_probabilities(self.emission, free).mT)  # [*L, B, T, N]
        hidden = forward_algorithm(prior, log_probabilities(self.transition, free).exp(), evidence, context.mask)
        return select(hidden, context.at), None if cache is None else hidden[..., -1, :]

    def logits(self, hidden: Tensor, free: bool = False) -> Tensor:
        """[*L, B, S, N] -> log probabilities [*L, B, S, V]."""
        emission = log_probabilities(self.emission, free)
        largest = emission.detach().amax(-2, keepdim=True)  # of a token over the states: one that is rare in all of them is not rounded to 0
        likely = linear(hidden, (emission - largest).exp()).clamp(min=torch.finfo(hidden.dtype).tiny)
        return likely.log() + largest.unsqueeze(-3)

    def prior(self, batch: int, free: bool = False) -> Tensor:
        """[*L, B, N]: the distribution of the first state."""
        first = log_probabilities(self.initial, free).exp().unsqueeze(-2)
        return first.expand(*first.shape[:-2], batch, -1)

    def init_cache(self, batch: int, length: int) -> Tensor:
        return self.prior(batch)

    def init_rules(self, configs: Sequence[Any]) -> list[tuple[str, Distribution]]:
        """All logits N(0, init_std^2)."""
        return [("*", Normal([c.init_std for c in configs]))]

    def undecayed(self) -> list[str]:
        return []

    def hidden_matrices(self) -> list[str]:
        return []  # tables of logits: nothing is multiplied by them as they are

    def linear_head(self) -> None:
        return None  # logits are logs of a product

    def flops(self, batch: int, time: int, scored: int) -> int:
        return 2 * batch * self.config.num_states * (time * self.config.num_states + scored * self.vocab_size)


def log_probabilities(table: Tensor, free: bool) -> Tensor:
    """Logits [..., K] -> log probabilities [..., K], in float32 at least; with ``free`` the same values, but as if each were a parameter by itself.

    So the gradient of a log likelihood is the expected number of times each was used, where that of a log-softmax has the row's total times the
    probabilities subtracted.
    """
    table = table.to(torch.promote_types(table.dtype, torch.float32))
    return table - table.detach().logsumexp(-1, keepdim=True) if free else table.log_softmax(-1)
