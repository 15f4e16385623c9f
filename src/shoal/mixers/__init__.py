"""One file per way of moving information along time; all obey ``contracts.Mixer``."""

from __future__ import annotations

from functools import partial

from shoal.config.models import DecoderConfig
from shoal.mixers.attention import Attention
from shoal.mixers.average import Average
from shoal.mixers.mamba import Mamba
from shoal.mixers.recurrent import Recurrent
from shoal.mixers.s4d import S4D
from shoal.mixers.ssd import SSD

AnyMixer = Attention | Average | Recurrent | Mamba | SSD | S4D


def build(name: str, config: DecoderConfig, lead: tuple[int, ...] = ()) -> AnyMixer:
    return MIXERS[name](config, lead)


MIXERS = {
    "attention": Attention,
    "average": Average,
    "rnn": partial(Recurrent, "rnn"),
    "gru": partial(Recurrent, "gru"),
    "lstm": partial(Recurrent, "lstm"),
    "mamba": Mamba,
    "ssd": SSD,
    "s4d": S4D,
}
