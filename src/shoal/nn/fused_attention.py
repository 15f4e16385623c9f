"""PyTorch's fused attention, but never cuDNN's kernel with a mask: its backward pass gives NaN where the scores of a query are far below 0 and the keys are
64 more than a multiple of 128 (github.com/pytorch/pytorch/issues/196678; H100, torch 2.11 on). Without a mask it is right, and on long sequences the quickest.

    y = fused_attention(q, k, v, mask)      # [*, H, S, K], [*, H, T, K] twice, bool broadcast to [*, H, S, T], True = may be read
"""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

WITH_A_MASK = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


def fused_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool = False, scale: float | None = None) -> Tensor:
    """softmax(scale q k) v -> [*, H, S, K]. Without a mask, ``causal`` is the usual one of S = T; ``scale`` None = 1 / sqrt(K)."""
    if mask is None or not q.is_cuda:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal and mask is None, scale=scale)
    with sdpa_kernel(WITH_A_MASK):
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)
