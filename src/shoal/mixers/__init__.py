"""One file per way of moving information along time; all obey ``contracts.Mixer``."""

from __future__ import annotations

from functools import partial

from shoal.config.models import DecoderConfig
from shoal.mixers.aft import AFT
from shoal.mixers.attention import Attention
from shoal.mixers.average import Average
from shoal.mixers.fastformer import Fastformer
from shoal.mixers.linear_attention import LinearAttention
from shoal.mixers.mamba import Mamba
from shoal.mixers.masks import Renormalised, Zeroed
from shoal.mixers.performer import favor
from shoal.mixers.projections import ROLES, Network, Nonlinear, Shared
from shoal.mixers.recurrent import Recurrent
from shoal.mixers.s4d import S4D
from shoal.mixers.similarities import Additive, Bilinear, Cosine, Distance
from shoal.mixers.ssd import SSD
from shoal.mixers.windowed import Windowed

AnyMixer = Attention | Average | Recurrent | Mamba | SSD | S4D | LinearAttention | Fastformer | AFT

LEAKY = ("zeroed",)  # see what comes later, whatever the config says
SIZED = ("aft_full", "aft_local")  # have parameters for every position, up to the longest


def build(name: str, config: DecoderConfig, lead: tuple[int, ...] = (), max_length: int = 0) -> AnyMixer:
    """``max_length``: what SIZED mixers must know."""
    return MIXERS[name](config, lead, max_length) if name in SIZED else MIXERS[name](config, lead)


MIXERS = {
    "attention": Attention,
    "distance": Distance,
    "cosine": Cosine,
    "additive": Additive,
    "bilinear": Bilinear,
    **{name: partial(Shared, name) for name in ROLES},
    "network": Network,
    "nonlinear_q": partial(Nonlinear, "q"),
    "nonlinear_k": partial(Nonlinear, "k"),
    "nonlinear_v": partial(Nonlinear, "v"),
    "zeroed": Zeroed,
    "renormalised": Renormalised,
    "windowed": Windowed,
    "linear": LinearAttention,
    "performer": favor,
    "fastformer": Fastformer,
    "aft_full": partial(AFT, "full"),
    "aft_local": partial(AFT, "local"),
    "aft_simple": partial(AFT, "simple"),
    "aft_conv": partial(AFT, "conv"),
    "average": Average,
    "rnn": partial(Recurrent, "rnn"),
    "gru": partial(Recurrent, "gru"),
    "lstm": partial(Recurrent, "lstm"),
    "mamba": Mamba,
    "ssd": SSD,
    "s4d": S4D,
}
