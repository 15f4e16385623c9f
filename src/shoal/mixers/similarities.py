"""Attention whose scores are another similarity of queries and keys than their scaled product q k / sqrt(K); everything else is attention's.

| mixer | score of query q and key k, each of one head |
|---|---|
| distance | -abs(q - k)^2 / sqrt(K) (Kim, Papamakarios, Mnih 2021, arXiv 2006.04710, section 3.2; theirs also ties the projections) |
| cosine | q k / (abs(q) abs(k)) times a learned number per head, 10 at first and 100 at most (Liu et al. 2022, arXiv 2111.09883, section 3.3) |
| bilinear | q W k / sqrt(K), W learned per head (Luong, Pham, Manning 2015, arXiv 1508.04025, equation 8, "general") |
| additive | v tanh(q + k), v learned per head (Bahdanau, Cho, Bengio 2015, arXiv 1409.0473, appendix A.1.2); queries and keys are already projected |

Rotary positions turn queries and keys first. Scores of distance and cosine then know how far apart the two are, as the product does; the others' know more.

    y, _ = Cosine(DecoderConfig(width=64))(x, Context())
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from shoal.config.models import DecoderConfig
from shoal.mixers.attention import Attention, Places
from shoal.mixers.masks import Explicit
from shoal.nn import Constant, Normal
from shoal.nn.init import Distribution

DIGIT = 16  # of a squared length, whose multiples up to 4,096 are then exact in bfloat16
AT_ONCE = 25  # queries of additive attention: at T = 100 on one CPU core four pieces are 3.5 times as fast as the whole, half of it by leaving out the future


class Distance(Attention):
    def compare(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor, float]:
        """-abs(q - k)^2 = 2 q k - abs(k)^2 - abs(q)^2, and the softmax does not see the last: a product with two more coordinates, so fused kernels do it."""
        squared = k.to(torch.promote_types(k.dtype, torch.float32)).square().sum(-1, keepdim=True)
        high = (squared / DIGIT).floor()
        lengths = torch.cat((high, squared - DIGIT * high), dim=-1).to(k.dtype)
        units = q.new_full((1,), -1.0).expand(*q.shape[:-1], 1)
        return torch.cat((2 * q, DIGIT * units, units), dim=-1), torch.cat((k, lengths), dim=-1), self.head_width**-0.5

    def coordinates(self) -> int:
        return 2 + super().coordinates()


class Cosine(Attention):
    def __init__(self, config: DecoderConfig, lead: tuple[int, ...] = ()) -> None:
        super().__init__(config, lead)
        self.log_scale = nn.Parameter(torch.empty(*lead, config.num_heads))

    def compare(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor, float]:
        scale = self.log_scale.clamp(max=math.log(100)).exp()[..., None, None, :, None]
        return F.normalize(q, dim=-1) * scale, F.normalize(k, dim=-1), 1.0

    def init_rules(self) -> list[tuple[str, Distribution]]:
        return [("log_scale", Constant(math.log(10)))]

    def undecayed(self) -> list[str]:
        return ["log_scale"]


class Bilinear(Attention):
    def __init__(self, config: DecoderConfig, lead: tuple[int, ...] = ()) -> None:
        super().__init__(config, lead)
        self.form = nn.Parameter(torch.empty(*lead, config.num_heads, self.head_width, self.head_width))  # W

    def compare(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor, float]:
        heads = q.movedim(-2, -4)  # [*L, H, B, S, K]
        turned = (heads.flatten(-3, -2) @ self.form).unflatten(-2, heads.shape[-3:-1])
        return turned.movedim(-4, -2), k, self.head_width**-0.5

    def init_rules(self) -> list[tuple[str, Distribution]]:
        """Such that scores begin about as large as attention's."""
        return [("form", Normal(self.head_width**-0.5))]

    def projection_flops(self, batch: int, time: int, scored: int) -> int:
        return super().projection_flops(batch, time, scored) + 2 * batch * scored * self.num_heads * self.head_width**2


class Additive(Explicit):
    """No product of two matrices gives these scores: every pair has its own K hyperbolic tangents, and their sum is, like a scan, not among the FLOPs."""

    def __init__(self, config: DecoderConfig, lead: tuple[int, ...] = ()) -> None:
        super().__init__(config, lead)
        self.vector = nn.Parameter(torch.empty(*lead, config.num_heads, self.head_width))  # v

    def scores(self, q: Tensor, k: Tensor, places: Places) -> Tensor:
        q, k, v = q.transpose(-3, -2).unsqueeze(-2), k.transpose(-3, -2).unsqueeze(-3), self.vector[..., None, :, None, None, :]
        pieces, (num_queries, num_keys) = [], (q.shape[-3], k.shape[-2])  # q [*L, B, H, S, 1, K], k [*L, B, H, 1, T, K]
        for start in range(0, num_queries, AT_ONCE):
            stop = min(start + AT_ONCE, num_queries)
            end = stop if places.plain else num_keys  # what only later queries may read needs no score
            scores = ((q[..., start:stop, :, :] + k[..., :end, :]).tanh() * v).sum(-1, dtype=torch.promote_types(q.dtype, torch.float32))
            pieces.append(F.pad(scores, (0, num_keys - end)))
        return self.biased(torch.cat(pieces, dim=-2), places)

    def init_rules(self) -> list[tuple[str, Distribution]]:
        """Such that scores are at most about 1 at first."""
        return [("vector", Normal(self.head_width**-0.5))]

    def mixing_flops(self, batch: int, time: int, scored: int) -> int:
        return super().mixing_flops(batch, time, scored) // 2  # the sums of values
