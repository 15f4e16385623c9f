"""Token ids to hidden states and logits; all obey ``contracts.Model``."""

from __future__ import annotations

from shoal.config.models import BigramConfig, DecoderConfig, EmbeddingMLPConfig, EncoderConfig, HMMConfig, ModelConfig, ModuleConfig
from shoal.models.bigram import Bigram
from shoal.models.decoder import Decoder
from shoal.models.embedding_mlp import EmbeddingMLP
from shoal.models.encoder import Encoder
from shoal.models.hmm import HMM
from shoal.models.module import Lifted

AnyModel = Decoder | EmbeddingMLP | Bigram | HMM | Lifted | Encoder


def build(config: ModelConfig, vocab_size: int, max_length: int, lead: tuple[int, ...] = ()) -> AnyModel:
    """A model with empty parameters; ``shoal.nn.initialise`` fills them."""
    return MODELS[type(config)](config, vocab_size, max_length, lead)


MODELS = {DecoderConfig: Decoder, EmbeddingMLPConfig: EmbeddingMLP, BigramConfig: Bigram, HMMConfig: HMM, ModuleConfig: Lifted, EncoderConfig: Encoder}
