"""Performer (Choromanski et al. 2021, arXiv 2009.14794): softmax attention with exp(q.k) replaced by an unbiased estimate that is a product of features.

    exp(q.k) = E over w ~ N(0, I) of exp(w.q - |q|^2 / 2) exp(w.k - |k|^2 / 2)        q, k scaled by K^(-1/4) each, so that q.k is attention's logit

These features are positive (lemma 1). The w of a block of K are orthogonal, with the lengths of independent ones, which leaves each of them N(0, I) and lowers
the variance (section 3.3). Everything else, chunks and state included, is ``linear_attention.py``'s.

The error falls as 1 / sqrt(features), from about exp(|q + k|^2 / 2) of the weight: with logits that differ by a few, a thousand features are still few
(``benchmarks/linear_attention.py --features``).

The w are drawn once, from ``shoal.rng``, and never trained: the same for every head, layer and run, not stored with the weights. So what differs between
seeds is not the draw; ``directions`` takes a seed for whoever studies that.

Against overflow a query's features are divided by its largest: a factor of numerator and denominator alike, which cancels. Keys must all be divided by one
number, and the largest of all keys would bring in the future. But exp(w.k - |k|^2 / 2) is at most exp(|w|^2 / 2), so a number that depends on w alone will do.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from shoal import rng
from shoal.config.models import DecoderConfig
from shoal.mixers.linear_attention import LinearAttention
from shoal.nn.init import normal

LARGEST = 60.0  # log of a key's features: float32 ends at 88, and sums over the past must fit too


class RandomFeatures(nn.Module):
    weight: Tensor  # [K, N]
    rotary = True

    def __init__(self, head_width: int, size: int) -> None:
        super().__init__()
        self.size, self.scale = size, head_width**-0.25
        weight = directions(torch.zeros((), dtype=torch.int64, device="cpu"), head_width, size)
        self.excess = max(0.0, float(weight.square().sum(0).max()) / 2 - LARGEST)
        self.register_buffer("weight", weight, persistent=False)

    def queries(self, q: Tensor) -> Tensor:
        q = q.to(torch.promote_types(q.dtype, torch.float32)) * self.scale
        logs = q @ self.weight.to(q.dtype)  # without |q|^2 / 2, which would cancel as well
        return (logs - logs.detach().amax(-1, keepdim=True)).exp()

    def keys(self, k: Tensor) -> Tensor:
        k = k.to(torch.promote_types(k.dtype, torch.float32)) * self.scale
        return (log_features(k, self.weight.to(k.dtype)) - self.excess).exp()

    def flops(self, vectors: int) -> int:
        return 2 * vectors * len(self.weight) * self.size


def favor(config: DecoderConfig, lead: tuple[int, ...] = ()) -> LinearAttention:
    """The mixer: attention by random features, FAVOR+ in the paper."""
    return LinearAttention(config, lead, RandomFeatures(config.width // config.num_heads, config.features))


def log_features(x: Tensor, weight: Tensor) -> Tensor:
    """log exp(w.x - |x|^2 / 2): x [..., K], weight [K, N] -> [..., N]. The mean over N of exp(those of q + those of k) estimates exp(q.k)."""
    return x @ weight - x.square().sum(-1, keepdim=True) / 2


def directions(seed: Tensor, width: int, count: int) -> Tensor:
    """float32 [..., width, count] from int64 [...] seeds on the CPU: each column N(0, I), every ``width`` of them in turn orthogonal."""
    blocks = -(-count // width)
    key = rng.key(seed, "performer features")
    gaussian, lengths = (normal(rng.fold(key, i), blocks * width * width).double().unflatten(-1, (blocks, width, width)) for i in range(2))
    q, r = torch.linalg.qr(gaussian)
    q = q * r.diagonal(dim1=-2, dim2=-1).sign().unsqueeze(-2)  # without it the directions would not be uniform (Mezzadri 2007)
    columns = q * lengths.square().sum(-2, keepdim=True).sqrt()  # [..., blocks, width, width]
    return columns.movedim(-3, -2).flatten(-2)[..., :count].float()
