"""Cross-entropy of a linear head on a GPU: two Triton kernels that keep every logit inside the multiprocessor that computes it.

Not here: what is computed, its other forms, and the operation autograd sees (``shoal.nn.linear_cross_entropy``, the only caller). Needs
Triton; import it on a CUDA device only.

Forward: a program owns some rows of one run and walks over the vocabulary. It carries each row's largest logit, the sum of exponentials and its
argmax, and, for the gradient by hidden, their sum weighted by columns of W, as attention does with values. Backward: a program owns some
tokens of one run, walks over the rows and sums its columns of W's gradient. No atomics: the same bits every time. The table is read as
[R, V, D], as a tied head has it; of any other a copy is made, a hundredth of the work, since rows of an odd length cannot be read in words.

    nll, best, log_sum, slope = forward(hidden, weight, None, targets, 0.0, True, plan(64, hidden.dtype))
"""

# Triton's language is not quite Python: "if" on a constant decides what is compiled.
# pyright: reportOperatorIssue=false, reportIndexIssue=false, reportPossiblyUnboundVariable=false

from __future__ import annotations

from typing import NamedTuple

import torch
import triton  # pyright: ignore[reportMissingImports]
import triton.language as tl  # pyright: ignore[reportMissingImports]
from torch import Tensor

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)
LOWEST = tl.constexpr(-1.0e38)  # below every logit, yet its difference to itself is 0


class Plan(NamedTuple):
    """Tiles of the two kernels. The tensor cores of a Hopper want 64 or more rows forward, tokens backward."""

    rows: int
    tokens: int
    warps: int
    stages: int  # tiles on their way at once
    back_rows: int
    back_tokens: int
    back_warps: int
    back_stages: int


# The best of some ten each on an H100 with 50,257 tokens, bfloat16; benchmarks/linear_cross_entropy.py prints what to set.
NARROW = Plan(rows=64, tokens=128, warps=4, stages=3, back_rows=128, back_tokens=64, back_warps=4, back_stages=3)
WIDE = Plan(rows=64, tokens=128, warps=4, stages=2, back_rows=128, back_tokens=64, back_warps=4, back_stages=2)
FLOAT = Plan(rows=64, tokens=32, warps=8, stages=2, back_rows=32, back_tokens=64, back_warps=8, back_stages=2)  # no tensor cores
NARROW_WIDTH = 64


def plan(width: int, dtype: torch.dtype) -> Plan:
    if dtype == torch.float32:
        return FLOAT
    return NARROW if width <= NARROW_WIDTH else WIDE


# --- pieces of the kernels


@triton.jit
def _table(pointer, row, real, D: tl.constexpr, DIM: tl.constexpr, MASKED: tl.constexpr):
    """Rows [len(row), DIM] of a table with rows of D; zeros where there are none."""
    d = tl.arange(0, DIM)
    place = pointer + row[:, None] * D + d[None, :]
    if MASKED or D != DIM:
        return tl.load(place, mask=real[:, None] & (d < D)[None, :], other=0.0)
    else:
        return tl.load(place)


@triton.jit
def _cap(x, softcap):
    """c tanh(x / c) and its slope."""
    y = 1 - 2 / (1 + tl.exp2(x * (2 * LOG2_E / softcap)))
    return y * softcap, 1 - y * y


@triton.jit
def _more(
    h, own, own_bias, start, V, softcap, top, total, choice, mean,
    D: tl.constexpr, DIM: tl.constexpr, TOKENS: tl.constexpr, HAS_BIAS: tl.constexpr, CAPPED: tl.constexpr, KEEP: tl.constexpr,
    EDGE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """What the forward pass carries, after TOKENS more of the vocabulary; ``EDGE``: not all of them exist."""
    v = start + tl.arange(0, TOKENS)
    w = _table(own, v, v < V, D, DIM, EDGE)
    x = tl.dot(h, tl.trans(w), input_precision=PRECISION)  # [ROWS, TOKENS]
    if HAS_BIAS:
        x += tl.load(own_bias + v, mask=v < V, other=0.0).to(tl.float32)[None, :]
    if CAPPED:
        x, slopes = _cap(x, softcap)
    if EDGE:
        x = tl.where((v < V)[None, :], x, LOWEST)
    highest = tl.max(x, 1)
    where = tl.min(tl.where(x == highest[:, None], v[None, :], V), 1)
    choice = tl.where(highest > top, where, choice)
    new = tl.maximum(top, highest)
    fade = tl.exp2(top * LOG2_E - new * LOG2_E)  # of the rounded products: they are what terms are relative to
    terms = tl.exp2(tl.fma(x, LOG2_E, -(new * LOG2_E)[:, None]))
    total = total * fade + tl.sum(terms, 1)
    if KEEP:
        if CAPPED:
            terms = terms * slopes
        mean = tl.dot(terms.to(w.dtype), w, mean * fade[:, None], input_precision=PRECISION)
    return new, total, choice, mean


@triton.jit
def _forward_kernel(
    hidden, weight, bias, targets, nll, best, log_sum, slope, N, V, softcap,
    D: tl.constexpr, DIM: tl.constexpr, ROWS: tl.constexpr, TOKENS: tl.constexpr, HAS_BIAS: tl.constexpr, CAPPED: tl.constexpr,
    KEEP: tl.constexpr, EVEN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    run = tl.program_id(1).to(tl.int64)
    n = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    real = n < N
    row = run * N + n
    own, own_bias = weight + run * V * D, bias
    if HAS_BIAS:
        own_bias = bias + run * V
    h = _table(hidden, row, real, D, DIM, True)
    top = tl.full([ROWS], LOWEST, tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    choice = tl.zeros([ROWS], tl.int32)
    mean = tl.zeros([ROWS, DIM], tl.float32)
    whole = V // TOKENS * TOKENS
    for start in range(0, whole, TOKENS):
        top, total, choice, mean = _more(
            h, own, own_bias, start, V, softcap, top, total, choice, mean, D, DIM, TOKENS, HAS_BIAS, CAPPED, KEEP, False, PRECISION
        )  # fmt: skip
    if not EVEN:
        top, total, choice, mean = _more(
            h, own, own_bias, whole, V, softcap, top, total, choice, mean, D, DIM, TOKENS, HAS_BIAS, CAPPED, KEEP, True, PRECISION
        )  # fmt: skip

    target = tl.load(targets + row, mask=real, other=0)
    of_target = _table(own, target, real, D, DIM, True).to(tl.float32)
    hit = tl.sum(h.to(tl.float32) * of_target, 1)
    target_slope = tl.full([ROWS], 1.0, tl.float32)
    if HAS_BIAS:
        hit += tl.load(own_bias + target, mask=real, other=0.0).to(tl.float32)
    if CAPPED:
        hit, target_slope = _cap(hit, softcap)
    shift, logarithm = top * LOG2_E, tl.log2(total)
    loss = top - hit + (logarithm + tl.fma(top, -LOG2_E, shift)) * LN_2  # with what rounding has added to the shift
    loss = tl.where(loss < 0, 0.0, loss)  # the target's logit was added up in another order than the tile's; a NaN stays one
    tl.store(nll + row, loss, mask=real)
    tl.store(log_sum + row, shift + logarithm, mask=real)
    tl.store(best + row, choice.to(tl.int64), mask=real)
    if KEEP:
        d = tl.arange(0, DIM)
        out = mean / total[:, None] - target_slope[:, None] * of_target
        tl.store(slope + row[:, None] * D + d[None, :], out, mask=real[:, None] & (d < D)[None, :])


@triton.jit
def _gradient_kernel(
    grad, hidden, weight, bias, targets, log_sum, grad_weight, grad_bias, N, V, softcap,
    D: tl.constexpr, DIM: tl.constexpr, ROWS: tl.constexpr, TOKENS: tl.constexpr, HAS_BIAS: tl.constexpr, CAPPED: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    run = tl.program_id(1).to(tl.int64)
    v = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    w = _table(weight + run * V * D, v, v < V, D, DIM, True)
    if HAS_BIAS:
        b = tl.load(bias + run * V + v, mask=v < V, other=0.0).to(tl.float32)
        sum_b = tl.zeros([TOKENS], tl.float32)
    sum_w = tl.zeros([TOKENS, DIM], tl.float32)
    for start in range(0, N, ROWS):
        n = start + tl.arange(0, ROWS)
        row = run * N + n
        real = n < N
        h = _table(hidden, row, real, D, DIM, True)
        x = tl.dot(w, tl.trans(h), input_precision=PRECISION)  # [TOKENS, ROWS]: tokens are rows of both products
        if HAS_BIAS:
            x += b[:, None]
        if CAPPED:
            x, slopes = _cap(x, softcap)
        sums = tl.load(log_sum + row, mask=real, other=float("inf"))
        target = tl.load(targets + row, mask=real, other=-1)
        incoming = tl.load(grad + row, mask=real, other=0.0)
        p = tl.exp2(tl.fma(x, LOG2_E, -sums[None, :]))
        p = tl.where(v[:, None] == target[None, :], p - 1, p) * incoming[None, :]
        if CAPPED:
            p = p * slopes
        sum_w = tl.dot(p.to(h.dtype), h, sum_w, input_precision=PRECISION)
        if HAS_BIAS:
            sum_b += tl.sum(p, 1)
    d = tl.arange(0, DIM)
    place = grad_weight + run * V * D + v[:, None] * D + d[None, :]
    tl.store(place, sum_w.to(grad_weight.dtype.element_ty), mask=(v < V)[:, None] & (d < D)[None, :])
    if HAS_BIAS:
        tl.store(grad_bias + run * V + v, sum_b.to(grad_bias.dtype.element_ty), mask=v < V)


# --- their launch


def _ready(hidden: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Rows of hidden [R, N, D] and of the table [R, V, D]."""
    assert weight.shape[-2] * weight.shape[-1] < 1 << 31, "within a run's table places are counted in 32 bits"
    return hidden.contiguous(), weight.mT.contiguous(), targets.contiguous()


def _constants(hidden: Tensor, bias: Tensor | None, softcap: float) -> dict[str, object]:
    width = hidden.shape[-1]
    return {"D": width, "DIM": max(16, triton.next_power_of_2(width)), "HAS_BIAS": bias is not None, "CAPPED": softcap > 0, "PRECISION": "ieee"}


def forward(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, softcap: float, keep: bool, plan: Plan
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """hidden [R, N, D], weight [R, D, V], bias [R, V], targets [R, N] -> nll, best, log2 of the sum [R, N], slope of nll by hidden [R, N, D] if ``keep``."""
    runs, rows, _ = hidden.shape
    num_tokens = weight.shape[-1]
    hidden, table, targets = _ready(hidden, weight, targets)
    nll, log_sum = (hidden.new_empty(targets.shape, dtype=torch.float32) for _ in range(2))
    best, slope = torch.empty_like(targets), nll.new_empty(hidden.shape if keep else (0,))
    if nll.numel():
        with torch.cuda.device_of(hidden):
            _forward_kernel[(triton.cdiv(rows, plan.rows), runs)](
                hidden, table, bias if bias is None else bias.contiguous(), targets, nll, best, log_sum, slope, rows, num_tokens, float(softcap),
                ROWS=plan.rows, TOKENS=plan.tokens, KEEP=keep, EVEN=num_tokens % plan.tokens == 0, **_constants(hidden, bias, softcap),
                num_warps=plan.warps, num_stages=plan.stages,
            )  # fmt: skip
    return nll, best, log_sum, slope


def gradient(
    grad: Tensor, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, log_sum: Tensor, softcap: float, plan: Plan
) -> tuple[Tensor, Tensor]:
    """Of weight, a transposed view of [R, V, D], and of bias (empty without one)."""
    runs, rows, _ = hidden.shape
    num_tokens = weight.shape[-1]
    hidden, table, targets = _ready(hidden, weight, targets)
    grad_table, grad_bias = torch.empty_like(table), table.new_empty((0,) if bias is None else bias.shape)
    with torch.cuda.device_of(hidden):
        _gradient_kernel[(triton.cdiv(num_tokens, plan.back_tokens), runs)](
            grad.contiguous(), hidden, table, bias if bias is None else bias.contiguous(), targets, log_sum, grad_table, grad_bias,
            rows, num_tokens, float(softcap), ROWS=plan.back_rows, TOKENS=plan.back_tokens, **_constants(hidden, bias, softcap),
            num_warps=plan.back_warps, num_stages=plan.back_stages,
        )  # fmt: skip
    return grad_table.mT, grad_bias
