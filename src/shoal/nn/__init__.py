"""Layers with an optional leading run axis, positions, dropout, initialisation."""

from shoal.nn.dropout import dropout
from shoal.nn.init import Constant, Given, Normal, Uniform, initialise
from shoal.nn.layers import Embedding, LayerNorm, Linear, RMSNorm, UnitEmbedding, joint_linear, linear, select
from shoal.nn.positions import rotate, sinusoidal

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
    "dropout",
    "initialise",
    "joint_linear",
    "linear",
    "rotate",
    "select",
    "sinusoidal",
]
