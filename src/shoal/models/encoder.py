"""A pretrained encoder and a head that says which class a sentence is of: the library's own module, every run's weights, one run after the other.

    model = Encoder(EncoderConfig(encoder="minilm"), vocab_size=30522, max_length=128, lead=(3,))
    hidden, _ = model(tokens, Context(mask=mask))       # [3, B, T] -> [3, B, 1, 384]
    model.logits(hidden)                                # [3, B, 1, 2]

With pooling "mean", and of a frozen encoder, the head is linear, all runs' in one product, and ``hidden`` is what it reads. With "first" the head is what
the library has for this architecture (``transformers.AutoModelForSequenceClassification``), so that what was trained can be given back in its form;
``hidden`` is then the logits. A frozen encoder is one for all runs, and no parameter; ``remember`` lets it read each sentence once.

Runs go one after the other, not through ``vmap``: each is then the same operations on the same numbers as alone, and attention stays one kernel.
Not here: where weights come from (``pretrained``), tokens (``shoal.tasks.sentences``), files (``shoal.finetune.export``).
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from shoal.config.fields import check
from shoal.config.models import EncoderConfig
from shoal.contracts import Context
from shoal.models.module import place
from shoal.models.pretrained import network, random_weights
from shoal.nn import Constant, Given, Linear, Normal, dropout
from shoal.nn.init import Distribution

EVERYTHING = Context()
_remembered: dict[Any, Tensor] = {}
HEAD = 1 << 20  # the place its dropout draws at: the encoder's come before


class Encoder(nn.Module):
    """Parameters [*L, ...] under the library's names after "module."; and "head.weight" [*L, D, C], "head.bias" where the head is linear."""

    rate: Tensor | None  # float32 [*L] dropout; None when no run drops anything

    def __init__(self, config: EncoderConfig, vocab_size: int, max_length: int, lead: tuple[int, ...] = ()) -> None:
        super().__init__()
        self.config, self.vocab_size, self.lead = config, vocab_size, lead
        self.asked = (config.encoder, config.num_classes, config.pooling, config.pooling == "first" and not config.frozen)
        found = network(*self.asked)
        room, known = found.positions, found.num_tokens
        check(room is None or max_length <= room, "task.max_length", f"{max_length} tokens are more than {config.encoder} has positions for, {room}")
        fix = "give the encoder its own tokenizer (task.encoder)"
        check(vocab_size <= known, "task.encoder", f"a tokenizer of {vocab_size:,} tokens, and {config.encoder} knows {known:,}; {fix}")
        self._network = (found,)  # in a tuple: as a submodule its parameters would be this model's
        self.module = nn.Module()
        for name, p in found.module.named_parameters():
            place(self.module, name, nn.Buffer(p.detach(), persistent=False) if config.frozen else nn.Parameter(torch.empty((*lead, *p.shape))))
        for name, buffer in found.module.named_buffers():
            place(self.module, name, nn.Buffer(buffer.clone(), persistent=False))
        self.head = None if self.asked[-1] else Linear(found.width, config.num_classes, lead=lead)
        self.register_buffer("rate", torch.full(lead, config.dropout, device="cpu") if config.dropout > 0 else None, persistent=False)
        self.features: Tensor | None = None  # [N, D] of every sentence, see ``remember``

    def forward(self, tokens: Tensor, context: Context = EVERYTHING, cache: None = None) -> tuple[Tensor, None]:
        """int64 [*L, B, T], of what is remembered [*L, B, 1] -> [*L, B, 1, D] (or C), and no cache."""
        if self.features is not None:
            hidden = self.features[tokens]
        else:
            mask = torch.ones_like(tokens, dtype=torch.bool) if context.mask is None else context.mask
            hidden = self._encoded(tokens, mask, None if self.config.frozen else context.key).unsqueeze(-2)
        return (hidden if self.head is None else dropout(hidden, context.key, self.rate, HEAD)), None

    def _encoded(self, tokens: Tensor, mask: Tensor, key: Tensor | None) -> Tensor:
        """int64, bool [*L, B, T], int64 [*L, B] -> [*L, B, D]."""
        (found,) = self._network
        parameters, buffers = dict(self.module.named_parameters()), dict(self.module.named_buffers())
        columns = {name: p.unbind() if self.lead else (p,) for name, p in parameters.items()}  # unbound once: its gradient is then one stack
        outs = []
        for r in range(self.lead[0] if self.lead else 1):
            pick = r if self.lead else ...
            found.draws.keys, found.draws.rate = (None, None) if key is None or self.rate is None else (key[pick], self.rate[pick])
            outs.append(functional_call(found.module, ({name: column[r] for name, column in columns.items()}, buffers), (tokens[pick], mask[pick])))
        return torch.stack(outs).view(*self.lead, *outs[0].shape)

    @torch.no_grad()
    def remember(self, sentences: Sequence[tuple[Tensor, Tensor]], rows: int, name: str) -> None:
        """Of a frozen encoder: read sentences (tokens int64 [N, T], mask bool [N, T]), padded on the right, ``rows`` at a time, and from then on take their
        numbers for tokens. ``name``: of these sentences; what one model has read of them another of this process need not read again.
        """
        (found,), buffers, pieces = self._network, dict(self.module.named_buffers()), []
        assert self.head is not None
        known = (*self.asked, name, self.head.weight.dtype, sentences[0][0].device)
        if known in _remembered:
            self.features = _remembered[known]
            return
        found.draws.keys = None
        for tokens, mask in sentences:
            for start in range(0, len(tokens), rows):
                piece = slice(start, start + rows), slice(0, int(mask[start : start + rows].sum(1).max()))
                pieces.append(functional_call(found.module, buffers, (tokens[piece], mask[piece])))
        self.features = _remembered[known] = torch.cat(pieces)

    def logits(self, hidden: Tensor) -> Tensor:
        return hidden if self.head is None else self.head(hidden)

    def linear_head(self) -> tuple[Tensor, Tensor | None, float] | None:
        return None if self.head is None else (self.head.weight, self.head.bias, 0.0)

    def init_cache(self, batch: int, length: int) -> Any:
        return None  # nothing is generated

    def init_rules(self, configs: Sequence[Any]) -> list[tuple[str, Distribution]]:
        """
        | what | how it begins |
        |---|---|
        | a matrix of the head | N(0, head_std^2) |
        | its bias | 0 |
        | all of the encoder | pretrained, the same for every seed; without weights as the library draws it, from the run's seed |
        """
        (found,) = self._network
        std = Normal([config.head_std for config in configs])
        fresh = [f"module.{name}" for name in found.fresh] + ([] if self.head is None else ["head.weight", "head.bias"])
        head: list[tuple[str, Distribution]] = [(name, Constant(0.0) if name.endswith("bias") else std) for name in fresh]
        pretrained = dict(found.module.named_parameters())
        made = functools.cache(functools.partial(random_weights, *self.asked))

        def given(name: str, seed: int) -> Tensor:
            return (pretrained if found.pretrained else made(seed))[name.removeprefix("module.")]

        return [*head, ("module.*", Given(given))]

    def undecayed(self) -> list[str]:
        return []

    def hidden_matrices(self) -> list[str]:
        return []  # which of a library's matrices are hidden is not known

    def flops(self, batch: int, time: int, scored: int) -> int:
        """What PyTorch counts in one forward pass; linear in the rows, so one and two of them are counted. Of what is remembered (T = 1), the head alone."""
        head = 0 if self.head is None else 2 * batch * self.head.weight.shape[-2] * self.config.num_classes
        if self.config.frozen and time == 1:
            return head
        (found,), counts = self._network, []
        found.draws.keys = None
        for num_rows in (1, 2):
            tokens = torch.zeros(num_rows, time, dtype=torch.int64)
            with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH), torch.no_grad():
                found.module(tokens, torch.ones_like(tokens, dtype=torch.bool))
            counts.append(counter.get_total_flops())
        return counts[0] + (batch - 1) * (counts[1] - counts[0]) + head
