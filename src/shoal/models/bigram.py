"""A table of logits, one row for each token that was read last: the bigram model, the best one can do without a past.

Its logits are its hidden states: there is no head and no matrix product (so 0 FLOPs), only rows that are looked up.

    model = Bigram(BigramConfig(), vocab_size=99, max_length=8, lead=(4,))
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from shoal.config.models import BigramConfig
from shoal.contracts import Context
from shoal.nn import Embedding, Normal, select
from shoal.nn.init import Distribution


class Bigram(nn.Module):
    def __init__(self, config: BigramConfig, vocab_size: int, max_length: int, lead: tuple[int, ...] = ()) -> None:
        super().__init__()
        self.config, self.vocab_size, self.max_length = config, vocab_size, max_length
        self.table = Embedding(vocab_size, vocab_size, lead=lead)

    def forward(self, tokens: Tensor, context: Context | None = None, cache: Any = None) -> tuple[Tensor, Any]:
        """int64 [*L, B, T] -> logits [*L, B, S, V], which are the hidden states."""
        at = None if context is None else context.at
        return self.table(select(tokens.unsqueeze(-1), at).squeeze(-1)), cache

    def logits(self, hidden: Tensor) -> Tensor:
        return hidden

    def linear_head(self) -> None:
        """Logits are not a product of hidden states."""

    def init_cache(self, batch: int, length: int) -> tuple[()]:
        return ()  # the last token is all it needs

    def init_rules(self, configs: Sequence[Any]) -> list[tuple[str, Distribution]]:
        """The table N(0, embedding_std^2): at 1 the loss begins near ln V + 1/2, the mean of log sum exp of V normals less that of one."""
        return [("table.weight", Normal([c.embedding_std for c in configs]))]

    def undecayed(self) -> list[str]:
        return []

    def hidden_matrices(self) -> list[str]:
        return []

    def flops(self, batch: int, time: int, scored: int) -> int:
        return 0
