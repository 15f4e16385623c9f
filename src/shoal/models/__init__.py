"""Token ids to hidden states and logits; all obey ``contracts.Model``."""

from __future__ import annotations

import torch

from shoal.config.models import DecoderConfig, EmbeddingMLPConfig, ModelConfig
from shoal.models.decoder import Decoder
from shoal.models.embedding_mlp import EmbeddingMLP

AnyModel = Decoder | EmbeddingMLP


def build(config: ModelConfig, vocab_size: int, max_length: int, lead: tuple[int, ...] = (), dtype: torch.dtype = torch.float32) -> AnyModel:
    """A model with empty parameters; ``shoal.nn.initialise`` fills them."""
    return MODELS[type(config)](config, vocab_size, max_length, lead, dtype)


MODELS = {DecoderConfig: Decoder, EmbeddingMLPConfig: EmbeddingMLP}
