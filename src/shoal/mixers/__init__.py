"""One file per way of moving information along time; all obey ``contracts.Mixer``."""

from __future__ import annotations

from shoal.config.models import DecoderConfig
from shoal.mixers.attention import Attention

AnyMixer = Attention


def build(name: str, config: DecoderConfig, lead: tuple[int, ...] = ()) -> AnyMixer:
    return MIXERS[name](config, lead)


MIXERS = {"attention": Attention}
