"""One file per way of moving information along time; all obey ``contracts.Mixer``."""

from __future__ import annotations

from shoal.config.models import DecoderConfig
from shoal.mixers.attention import Attention
from shoal.mixers.mamba import Mamba
from shoal.mixers.s4d import S4D
from shoal.mixers.ssd import SSD

AnyMixer = Attention | Mamba | SSD | S4D


def build(name: str, config: DecoderConfig, lead: tuple[int, ...] = ()) -> AnyMixer:
    return MIXERS[name](config, lead)


MIXERS = {"attention": Attention, "mamba": Mamba, "ssd": SSD, "s4d": S4D}
