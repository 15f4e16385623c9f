"""The configs of the models; what each does is in ``shoal/models/<name>.py``."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Literal

from shoal.config.fields import ConfigError, PerRun, check

# fmt: off
MixerName = Literal[
    "attention", "distance", "cosine", "additive", "bilinear",  # softmax attention, and what is changed about it
    "shared_qk", "shared_kv", "shared_qv", "shared_qkv", "network", "nonlinear_q", "nonlinear_k", "nonlinear_v",
    "zeroed", "renormalised", "windowed",
    "linear", "performer", "fastformer", "aft_full", "aft_local", "aft_simple", "aft_conv",  # without a softmax over the past
    "average", "rnn", "gru", "lstm", "mamba", "ssd", "s4d",  # a state that moves along
]
# fmt: on


@dataclass(frozen=True, kw_only=True)
class DecoderConfig:
    """Embedding, blocks of a mixer and (optionally) a feed-forward, head."""

    width: int = 128
    num_layers: int = 2  # 0: embedding and head alone, a bigram model of rank ``width``
    mixers: tuple[MixerName, ...] = ("attention",)  # repeated in turn up to num_layers
    num_heads: int = 4  # of attention in all its forms, linear, performer, fastformer, aft_conv and ssd
    state_size: int = 16  # N: numbers of state per channel, of mamba, ssd and s4d
    expand: int = 2  # inner width of mamba, ssd and s4d, as a multiple of the width
    convolution: int = 4  # steps the short convolution of mamba and ssd spans
    scan: Literal["auto", "reference", "sequential", "triton"] = "auto"  # mamba's form of the recurrence; auto: triton on a GPU, else sequential
    feed_forward: int = 512  # its width; 0 = none
    activation: Literal["relu", "gelu", "silu", "relu2"] = "relu"
    norm: Literal["layer", "rms", "none"] = "layer"
    norm_place: Literal["pre", "post"] = "pre"
    residual: bool = True  # False: every part's output replaces its input
    causal: bool = True  # False: attention sees the whole sequence (for masked diffusion)
    window: int = 32  # positions windowed attention, aft_local and aft_conv look at, the present one included
    features: int = 64  # random features of performer, each head
    qk_norm: bool = False  # queries and keys of attention at root mean square 1, each head by itself
    positions: Literal["learned", "sinusoidal", "rotary", "alibi", "none"] = "learned"  # rotary (also performer's) and alibi: attention's; others ignore them
    rotary_base: float = 10_000.0
    bias: bool = True  # in the linear layers
    token_embedding: Literal["trained", "unit"] = "trained"  # unit: fixed rows of length 1 (numpy's RandomState(0)), the same for every run
    tied: bool = False  # the head is the embedding, transposed
    head_bias: bool = False
    softcap: float = 0.0  # c: logits become c tanh(logits / c); 0 = as they are
    dropout: PerRun[float] = 0.0
    embedding_std: PerRun[float] = 0.02
    linear_init: Literal["normal", "uniform"] = "normal"  # normal: N(0, init_std); uniform: U(-1, 1) / sqrt(inputs), torch's default
    init_std: PerRun[float] = 0.02
    init_scale: PerRun[float] = 1.0  # multiplies every matrix but the embeddings at initialisation
    output_init: Literal["same", "zero"] = "same"  # zero: the last matrix of every mixer and feed-forward begins at 0, so that every block begins as nothing

    def __post_init__(self) -> None:
        for name in ("width", "num_heads", "state_size", "expand", "convolution", "window", "features"):
            check(getattr(self, name) >= 1, name, f"must be 1 or more, not {getattr(self, name)}")
        check(self.num_layers >= 0, "num_layers", f"must be 0 (embedding and head alone) or more, not {self.num_layers}")
        check(self.feed_forward >= 0, "feed_forward", "must be 0 (none) or more")
        check(len(self.mixers) > 0, "mixers", 'name at least one, for example ["attention"]')
        check(self.rotary_base > 1, "rotary_base", f"must be above 1, not {self.rotary_base}")
        check(not (self.tied and self.head_bias), "head_bias", "a tied head has no bias; leave one of the two out")
        check(0 <= self.softcap < float("inf"), "softcap", f"must be 0 (none) or more, not {self.softcap}")
        check(self.causal or set(self.mixers) == {"attention"}, "causal", "only attention can see the whole sequence; leave causal true for other mixers")
        check(self.causal or self.positions != "alibi", "positions", "alibi adds slope x place of the key, which is a distance to the past only; take another")
        heads = [h for h in range(1, self.width + 1) if self.width % h == 0]
        check(
            self.width % self.num_heads == 0,
            "num_heads",
            f"{self.num_heads} heads do not divide the width {self.width}; possible: {', '.join(map(str, heads))}",
        )
        check(
            self.positions != "rotary" or self.width // self.num_heads % 2 == 0,
            "positions",
            f"rotary positions need an even head width, not {self.width // self.num_heads}",
        )
        check(
            "s4d" not in self.mixers or self.state_size % 2 == 0,
            "state_size",
            f"the states of s4d come in pairs, real and imaginary part: make it even, not {self.state_size}",
        )
        check(0 <= self.dropout < 1, "dropout", f"must lie in [0, 1), not {self.dropout}")
        _check_scales(self, "embedding_std", "init_std", "init_scale")


@dataclass(frozen=True, kw_only=True)
class EmbeddingMLPConfig:
    """Embeddings of all tokens side by side, then ReLU layers: the fastest network known to generalise on modular tables."""

    num_inputs: int = 2  # how many of the first tokens it reads: 2 for "a b =", 3 for "a op b ="
    embedding: int = 100
    hidden: tuple[int, ...] = (200, 200)
    embedding_std: PerRun[float] = 1.0
    init_scale: PerRun[float] = 1.0

    def __post_init__(self) -> None:
        check(self.embedding >= 1, "embedding", "must be 1 or more")
        check(self.num_inputs >= 1, "num_inputs", "must be 1 or more")
        check(all(h >= 1 for h in self.hidden), "hidden", "widths must be 1 or more")
        _check_scales(self, "embedding_std", "init_scale")


@dataclass(frozen=True, kw_only=True)
class BigramConfig:
    """A table of logits, one row for each token that was read last."""

    embedding_std: PerRun[float] = 1.0  # of its entries, N(0, embedding_std^2); at 1 the loss begins near ln V + 1/2

    def __post_init__(self) -> None:
        _check_scales(self, "embedding_std")


@dataclass(frozen=True, kw_only=True)
class HMMConfig:
    """A hidden Markov model: a chain of states, each with its own distribution over tokens."""

    num_states: int = 64
    init_std: PerRun[float] = 1.0  # of the logits of all its distributions at initialisation

    def __post_init__(self) -> None:
        check(self.num_states >= 1, "num_states", f"must be 1 or more, not {self.num_states}")
        _check_scales(self, "init_std")


@dataclass(frozen=True, kw_only=True)
class ModuleConfig:
    """Your own ``torch.nn.Module``, run as a fleet by ``torch.func.vmap``: tokens int64 [B, T] -> logits [B, T, V], or [B, V] of the last position alone."""

    module: str = "model.py:Model"  # where it is: "package.module:Class" or "path/to/file.py:Class"; made by Class(vocab_size=..., max_length=..., **arguments)
    arguments: str = "{}"  # its other arguments, as a JSON object

    def __post_init__(self) -> None:
        place, colon, name = self.module.rpartition(":")
        check(bool(colon and place and name.isidentifier()), "module", f'name it as "package.module:Class" or "file.py:Class", not {self.module!r}')
        try:
            arguments = json.loads(self.arguments)
        except ValueError as error:
            raise ConfigError("arguments", f"is not JSON ({error}); write {{}} for none") from None
        check(isinstance(arguments, dict), "arguments", f'must be a JSON object such as {{"width": 64}}, not {self.arguments}')


@dataclass(frozen=True, kw_only=True)
class EncoderConfig:
    """A pretrained encoder of the Hugging Face kind, and a head that says which class a sentence is of."""

    encoder: str = "minilm"  # the packaged MiniLM; a directory with config.json (without weights there it begins at random); or a name on the hub
    num_classes: int = 2
    pooling: Literal["first", "mean"] = "mean"  # what the head reads: the first token (BERT, RoBERTa), or the mean over all (MiniLM)
    frozen: bool = False  # only the head is trained, on what the encoder makes of each sentence, which is computed once
    dropout: PerRun[float] = 0.1  # wherever the encoder has any, attention's weights included, and before the head; of a frozen one before the head only
    head_std: PerRun[float] = 0.02  # of the head's weights at initialisation

    def __post_init__(self) -> None:
        check(bool(self.encoder), "encoder", "name one: minilm, a directory, or a name on the hub such as roberta-base")
        check(self.num_classes >= 2, "num_classes", f"must be 2 or more, not {self.num_classes}")
        check(0 <= self.dropout < 1, "dropout", f"must lie in [0, 1), not {self.dropout}")
        _check_scales(self, "head_std")


def _check_scales(config: ModelConfig, *names: str) -> None:
    for name in names:
        check(0 <= getattr(config, name) < float("inf"), name, f"must be a finite number of 0 or more, not {getattr(config, name)}")


ModelConfig = DecoderConfig | EmbeddingMLPConfig | BigramConfig | HMMConfig | ModuleConfig | EncoderConfig
