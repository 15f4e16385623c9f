"""Attention whose queries, keys and values come about in another way than by one matrix each; everything else is attention's.

| mixer | projections |
|---|---|
| shared_qk, shared_kv, shared_qv | those two are one matrix (q = k: Kitaev, Kaiser, Levskaya 2020, arXiv 2001.04451, who also scale the keys) |
| shared_qkv | all three are one matrix |
| network | each a network: W_2 relu(W_1 x + b_1) + b_2, as wide inside as the model |
| nonlinear_q, nonlinear_k, nonlinear_v | that one is relu(W x + b) |

    y, _ = Shared("shared_kv", DecoderConfig(width=64))(x, Context())
"""

from __future__ import annotations

from typing import Literal

from torch import Tensor
from torch.nn import functional as F

from shoal.config.models import DecoderConfig
from shoal.mixers.attention import Attention
from shoal.nn import Linear, joint_linear, select

Role = Literal["query", "key", "value"]
ROLES: dict[str, tuple[Role, Role, Role]] = {  # whose matrix makes queries, keys, values
    "shared_qk": ("query", "query", "value"),
    "shared_kv": ("query", "key", "key"),
    "shared_qv": ("query", "key", "query"),
    "shared_qkv": ("query", "query", "query"),
}


class Shared(Attention):
    def __init__(self, name: str, config: DecoderConfig, lead: tuple[int, ...] = ()) -> None:
        super().__init__(config, lead)
        self.roles = ROLES[name]
        for unused in {"query", "key", "value"}.difference(self.roles):
            delattr(self, unused)
        # keys that are turned by their place or scaled are no values any more
        self.one_cache = self.roles[1] == self.roles[2] and self.rotary_base is None and not self.qk_norm

    def project(self, x: Tensor, at: Tensor | slice | None) -> tuple[Tensor, Tensor, Tensor]:
        everywhere = self._everywhere(at is None)
        found = dict(zip(everywhere, joint_linear(x, [getattr(self, name) for name in everywhere]), strict=True))
        q = select(found["query"], at) if "query" in found else self.query(select(x, at))
        return q, found[self.roles[1]], found[self.roles[2]]

    def _everywhere(self, all_scored: bool) -> list[Role]:
        """Those needed at all positions, queries among them if they are keys or values too."""
        return list(dict.fromkeys(self.roles if all_scored else self.roles[1:]))

    def projection_flops(self, batch: int, time: int, scored: int) -> int:
        everywhere = len(self._everywhere(False))
        apart = len(set(self.roles)) - everywhere
        return 2 * batch * (self.num_heads * self.head_width) ** 2 * ((1 + apart) * scored + everywhere * time)


class Network(Attention):
    def __init__(self, config: DecoderConfig, lead: tuple[int, ...] = ()) -> None:
        super().__init__(config, lead)
        self.query_inner = Linear(config.width, config.width, bias=config.bias, lead=lead)
        self.key_inner = Linear(config.width, config.width, bias=config.bias, lead=lead)
        self.value_inner = Linear(config.width, config.width, bias=config.bias, lead=lead)

    def project(self, x: Tensor, at: Tensor | slice | None) -> tuple[Tensor, Tensor, Tensor]:
        if at is None:
            q, k, v = joint_linear(x, [self.query_inner, self.key_inner, self.value_inner])
        else:
            q = self.query_inner(select(x, at))
            k, v = joint_linear(x, [self.key_inner, self.value_inner])
        return self.query(F.relu(q)), self.key(F.relu(k)), self.value(F.relu(v))

    def projection_flops(self, batch: int, time: int, scored: int) -> int:
        return super().projection_flops(batch, time, scored) + 2 * batch * (self.num_heads * self.head_width) ** 2 * (scored + 2 * time)


class Nonlinear(Attention):
    def __init__(self, which: Literal["q", "k", "v"], config: DecoderConfig, lead: tuple[int, ...] = ()) -> None:
        super().__init__(config, lead)
        self.which = "qkv".index(which)

    def project(self, x: Tensor, at: Tensor | slice | None) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = (F.relu(y) if i == self.which else y for i, y in enumerate(super().project(x, at)))
        return q, k, v
