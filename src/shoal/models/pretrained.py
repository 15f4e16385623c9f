"""Encoders of the Hugging Face kind as modules for one run: tokens int64 [B, T] and what of them is real -> one vector, or the logits, of each row.

What they drop is a function of (key of the row, place in the network), as everywhere in shoal, and not of torch's generator; attention over a padded batch
never asks the host whether there is padding, so that a step can be captured. Where an encoder is found is in ``shoal.data.encoders``; transformers is
imported when an encoder is first asked for.

    network("minilm", num_classes=2, head=False).module(tokens, mask)     # float32 [B, 384]
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from shoal.data.encoders import explained, quiet, source
from shoal.models.module import seeded
from shoal.nn import dropout
from shoal.nn.fused_attention import fused_attention


@dataclass
class Draws:
    """What the dropout of a network draws from, set anew for every pass; keys None = evaluation."""

    keys: Tensor | None = None  # int64 [B]
    rate: Tensor | None = None  # float32 scalar


class Keyed(nn.Module):
    """In the place of an ``nn.Dropout``."""

    def __init__(self, draws: Draws, place: int) -> None:
        super().__init__()
        self.draws, self.place, self.p = draws, place, 0.0  # p: attention asks for it

    def forward(self, x: Tensor) -> Tensor:
        """x [B, ..., D]."""
        flat = x.view(len(x), -1, x.shape[-1])
        return dropout(flat, self.draws.keys, self.draws.rate, self.place).view(x.shape)


class Pooled(nn.Module):
    """An encoder, and one vector of what it makes of each row: its first token's, or the mean over the real ones."""

    def __init__(self, encoder: nn.Module, pooling: str) -> None:
        super().__init__()
        self.encoder, self.pooling = encoder, pooling

    def forward(self, tokens: Tensor, mask: Tensor) -> Tensor:
        """int64 [B, T], bool [B, T] -> [B, D]."""
        hidden = self.encoder(input_ids=tokens, attention_mask=mask[:, None, None]).last_hidden_state
        if self.pooling == "first":
            return hidden[:, 0]
        real = mask.unsqueeze(-1).to(hidden.dtype)
        return (hidden * real).sum(1) / real.sum(1)


class Classifier(nn.Module):
    """An encoder with the head that its library gives it for classification."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, tokens: Tensor, mask: Tensor) -> Tensor:
        """int64 [B, T], bool [B, T] -> [B, C]."""
        return self.network(input_ids=tokens, attention_mask=mask[:, None, None]).logits


@dataclass(frozen=True)
class Network:
    module: nn.Module  # Pooled or Classifier, on the CPU, float32
    draws: Draws
    fresh: frozenset[str]  # parameters of the module that no pretraining has seen
    pretrained: bool  # False: a config without weights
    width: int
    num_tokens: int
    positions: int | None  # tokens of a row it can read; None = any number


@functools.cache  # a fleet, its checkpoints and its runs share one copy of the weights
def network(encoder: str, num_classes: int, pooling: str, head: bool) -> Network:
    """``head``: with the library's head for ``num_classes``, which reads the first token, else without one.

    ConfigError ("model.encoder") where there is no such encoder, or transformers is missing.
    """
    found = source(encoder, "model.encoder")
    with explained(encoder, "model.encoder"), quiet(), torch.device("cpu"):
        inner, missing = _load(found.place, found.has_weights, num_classes, head)
    module = _module(inner, pooling, head)
    draws = Draws()
    _with_keys(module, draws)
    prefix = "network." if head else "encoder."
    names = {name for name, _ in module.named_parameters()}
    fresh = frozenset(names & {prefix + name for name in missing}) if found.has_weights else frozenset(n for n in names if head and _is_head(inner, n, prefix))
    config: Any = inner.config
    return Network(module.eval().requires_grad_(False), draws, fresh, found.has_weights, config.hidden_size, config.vocab_size, _positions(module))


def random_weights(encoder: str, num_classes: int, pooling: str, head: bool, seed: int) -> dict[str, Tensor]:
    """Of an encoder without weights: as the library draws them, under torch's generator seeded from the run's."""
    found = source(encoder, "model.encoder")
    with seeded(seed), quiet():
        inner, _ = _load(found.place, False, num_classes, head)
    return dict(_module(inner, pooling, head).named_parameters())


def _module(inner: Any, pooling: str, head: bool) -> nn.Module:
    if head:
        return Classifier(inner)
    if "pooler" in dict(inner.named_children()):
        inner.pooler = None  # it reads the first token, and nothing would read it
    return Pooled(inner, pooling)


def _load(place: str, has_weights: bool, num_classes: int, head: bool) -> tuple[Any, list[str]]:
    """The library's module, and the names of its parameters that the file of weights does not have."""
    import transformers

    transformers.AttentionInterface.register("shoal", attend)
    kind = transformers.AutoModelForSequenceClassification if head else transformers.AutoModel
    labels = {"num_labels": num_classes} if head else {}
    config = transformers.AutoConfig.from_pretrained(place, **labels)
    if not has_weights:
        return kind.from_config(config, attn_implementation="shoal", dtype=torch.float32), []
    found, report = kind.from_pretrained(place, config=config, attn_implementation="shoal", dtype=torch.float32, output_loading_info=True)
    return found, list(report["missing_keys"])


def _is_head(inner: Any, name: str, prefix: str) -> bool:
    return not name.removeprefix(prefix).startswith(f"{inner.base_model_prefix}.")


def _positions(module: nn.Module) -> int | None:
    """RoBERTa's begin behind the row of padding."""
    for name, table in module.named_modules():
        if name.endswith("position_embeddings") and isinstance(table, nn.Embedding):
            return table.num_embeddings - (0 if table.padding_idx is None else table.padding_idx + 1)
    return None


def _with_keys(module: nn.Module, draws: Draws) -> None:
    """Every ``nn.Dropout`` replaced; every module told the place that its attention draws at."""
    modules: list[tuple[str, Any]] = list(module.named_modules())
    for place, (name, part) in enumerate(modules):
        part.shoal_dropout = (Keyed(draws, place),)  # in a tuple: no part of it
        if isinstance(part, nn.Dropout):
            owner, _, leaf = name.rpartition(".")
            setattr(module.get_submodule(owner), leaf, part.shoal_dropout[0])


def attend(module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor, scaling: float | None = None, **_: Any) -> tuple[Tensor, None]:
    """Attention of the library's models. query, key, value [B, H, T, K]; attention_mask bool [B, 1, 1, T], True = real -> [B, T, H, K]."""
    (dropped,) = module.shoal_dropout
    if dropped.draws.keys is None:
        y = fused_attention(query, key, value, attention_mask, scale=scaling)
    else:
        scores = query @ key.mT * (scaling or query.shape[-1] ** -0.5)
        shares = scores.masked_fill(~attention_mask, float("-inf")).softmax(-1)
        y = dropped(shares) @ value
    return y.transpose(1, 2).contiguous(), None
