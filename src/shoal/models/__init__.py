"""Token ids to hidden states and logits; all obey ``contracts.Model``."""

from __future__ import annotations

from shoal.config.models import DecoderConfig, EmbeddingMLPConfig, ModelConfig, ModuleConfig
from shoal.models.decoder import Decoder
from shoal.models.embedding_mlp import EmbeddingMLP
from shoal.models.module import Lifted

AnyModel = Decoder | EmbeddingMLP | Lifted


def build(config: ModelConfig, vocab_size: int, max_length: int, lead: tuple[int, ...] = ()) -> AnyModel:
    """A model with empty parameters; ``shoal.nn.initialise`` fills them."""
    return MODELS[type(config)](config, vocab_size, max_length, lead)


MODELS = {DecoderConfig: Decoder, EmbeddingMLPConfig: EmbeddingMLP, ModuleConfig: Lifted}
