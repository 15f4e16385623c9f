"""Layers with an optional leading run axis, short convolution, selective scan, positions, dropout, initialisation."""

from shoal.nn.convolution import short_convolution
from shoal.nn.dropout import dropout
from shoal.nn.init import Constant, Given, Normal, Uniform, initialise
from shoal.nn.layers import Embedding, LayerNorm, Linear, RMSNorm, UnitEmbedding, joint_linear, linear, select
from shoal.nn.positions import alibi_slopes, rotary, rotate, sinusoidal
from shoal.nn.scan import selective_scan

__all__ = [
    "Constant",
    "Embedding",
    "Given",
    "LayerNorm",
    "Linear",
    "Normal",
    "RMSNorm",
    "Uniform",
    "UnitEmbedding",
    "alibi_slopes",
    "dropout",
    "initialise",
    "joint_linear",
    "linear",
    "rotary",
    "rotate",
    "select",
    "selective_scan",
    "short_convolution",
    "sinusoidal",
]
