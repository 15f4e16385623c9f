"""Cross-entropy of a linear head without the logits: with 50,257 tokens they are most of a small model's memory and of its time.

    logits = c tanh((h W + b) / c)   (c = 0: h W + b)        nll = log(sum of exp(logits)) - logits[target]

| form | what it is |
|---|---|
| reference | logits of everything at once, differentiated by PyTorch |
| chunked | a tile of rows and tokens at a time, the sum of exponentials carried along (Milakov, Gimelshein 2018); any device and dtype |
| triton | the same in kernels whose tiles never leave a multiprocessor, ``shoal.nn.linear_cross_entropy_triton``; a GPU, widths up to 128 |

The last two share one operation. The gradient of a row's nll by its hidden state is a mean of columns of W, so it is summed in the same pass as the
exponentials (as attention sums values), and waits for its factor. That by W needs what comes back to every row, and computes the logits again: four
products of rows x D x V where materialised logits need three, in place of some ten passes over them through memory.

    weight, bias, softcap = model.linear_head()
    nll, best = linear_cross_entropy(hidden, weight, bias, targets, softcap)
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from importlib.util import find_spec
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.flop_counter import register_flop_formula

from shoal.config.fields import check

Form = Literal["auto", "reference", "chunked", "triton"]
MAX_WIDTH = 128  # of the triton form: a row's whole width stays in registers
LARGE_VOCABULARY = 4096  # from here on an objective leaves the choice to "auto"
CROWDED = 1 << 23  # logits of a step: with more (32 MB) one CPU thread is 1.5 to 1.8 times as fast in tiles at width 64, and needs no memory for them
NARROW = 128  # width up to which that holds (1.2 times as fast); at 256 and 384 a second product of logits costs more: 0.9
MATERIALISED = 1 << 31  # logits of a step that a GPU has room for: 4.3 GB in bfloat16, uncompiled seven times that
MATERIALISED_CPU = 1 << 27  # half a gigabyte, three times that with gradients
TILES = {"cpu": (512, 1 << 19), "cuda": (1 << 20, 1 << 28)}  # rows at most, numbers: the cache of a CPU; half a gigabyte of bfloat16
ALIGNED = {"cpu": 1, "cuda": 64}  # tokens are filled up to a multiple of it where logits are written out: at 50,257 rows of odd length halve the products' rate
PLACES = 1 << 16  # what the half of a float32 that a bfloat16 leaves free can count
GROUP = 32
LOG2_E = 1 / math.log(2)
HAS_TRITON = find_spec("triton") is not None


def linear_cross_entropy(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, softcap: float = 0.0, form: Form = "auto"
) -> tuple[Tensor, Tensor]:
    """hidden [*L, B, S, D], weight [*L, D, V] (or [D, V] for all runs; may be a transposed view), bias [*L, V], targets int64 [*L, B, S].

    -> nll in nats, [*L, B, S], differentiable in hidden, weight and bias; best int64 [*L, B, S], the most probable token (of equal ones the first).
    nll is float32, or float64 if hidden is. ConfigError for triton away from a GPU, in float64, or wider than 128.
    """
    num_in, num_tokens = weight.shape[-2:]
    if form == "auto":
        form = _fastest(hidden, num_in, num_tokens)
    if form == "reference":
        return _reference(hidden, weight, bias, targets, softcap)
    if form == "triton":
        fits = hidden.is_cuda and hidden.dtype != torch.float64 and num_in <= MAX_WIDTH
        check(fits, "form", f'the triton cross-entropy needs a GPU, float32 or bfloat16 and a width up to {MAX_WIDTH}; set it to "auto" or "chunked"')
    runs = weight.shape[0] if weight.dim() == 3 else 1
    bias = None if bias is None else bias.reshape(runs, num_tokens)
    inputs = (hidden.reshape(runs, -1, num_in), weight.reshape(runs, num_in, num_tokens), bias)
    keep = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in inputs)
    nll, best, _, _ = _fused(*inputs, targets.reshape(runs, -1), softcap, keep, form == "triton")
    return nll.view(targets.shape), best.view(targets.shape)


def _fastest(hidden: Tensor, width: int, num_tokens: int) -> Form:
    if hidden.is_cuda and hidden.dtype == torch.bfloat16 and width <= MAX_WIDTH and HAS_TRITON:
        return "triton"
    most = MATERIALISED if hidden.is_cuda else CROWDED if width <= NARROW else MATERIALISED_CPU
    return "chunked" if hidden.numel() // width * num_tokens > most else "reference"


def _reference(hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, softcap: float) -> tuple[Tensor, Tensor]:
    runs, num_tokens = weight.shape[:-2], weight.shape[-1]
    more = -num_tokens % ALIGNED[hidden.device.type]
    if more:
        weight = F.pad(weight.mT, (0, 0, 0, more)).mT if weight.stride(-2) == 1 else F.pad(weight, (0, more))  # a tied table stays one
        bias = None if bias is None else F.pad(bias, (0, more))
    logits, _ = _logits(hidden.reshape(*runs, -1, weight.shape[-2]), weight, bias, softcap)
    if more:
        logits = logits.masked_fill(torch.arange(num_tokens + more, device=logits.device) >= num_tokens, -torch.inf)
    nll = F.cross_entropy(logits.flatten(0, -2), targets.flatten(), reduction="none")
    rounded = hidden.dtype == torch.bfloat16 and bias is None and not softcap  # as a product writes them: what a compiler adds to it stays in float32
    packed = hidden.is_cuda and rounded and logits.shape[-1] <= PLACES
    best = _packed_argmax(logits.detach()) if packed else logits.detach().argmax(-1)
    return nll.view(targets.shape), best.view(targets.shape)


def _packed_argmax(x: Tensor) -> Tensor:
    """x.argmax(-1), of equal ones the first (0.0 is above -0.0), for float32 x that are bfloat16 numbers, at most PLACES in a row.

    The largest integer of those that have the value above and the place below. A reduction that carries a place beside its value is compiled to
    several times the instructions: with it the kernel of a head's forward pass took 1.9 ms on one H100, and so 1.5.
    """
    bits = x.view(torch.int32)
    ordered = bits ^ ((bits >> 31) & 0x7FFFFFFF)  # as integers in the order of the numbers
    from_end = PLACES - 1 - torch.arange(x.shape[-1], device=x.device, dtype=torch.int32)
    return PLACES - 1 - (((ordered & -PLACES) | from_end).amax(-1).long() & (PLACES - 1))


def _logits(hidden: Tensor, weight: Tensor, bias: Tensor | None, softcap: float) -> tuple[Tensor, Tensor | None]:
    """Logits [*L, N, V] in float32 (or 64), and their slope where they are capped."""
    x = hidden @ weight
    x = (x if bias is None else x + bias.unsqueeze(-2)).to(torch.promote_types(x.dtype, torch.float32))
    if not softcap:
        return x, None
    y = torch.tanh(x / softcap)
    return softcap * y, 1 - y.square()


# --- tile by tile


def _pieces(size: int, piece: int) -> Iterator[slice]:
    for start in range(0, size, piece):
        yield slice(start, min(start + piece, size))


def _cut(hidden: Tensor, num_tokens: int) -> tuple[int, int, int]:
    """Runs, rows and tokens of a tile."""
    runs, rows, _ = hidden.shape
    most_rows, numbers = TILES[hidden.device.type]
    rows = max(1, min(rows, most_rows, numbers))
    tokens = min(num_tokens, max(GROUP, numbers // rows // GROUP * GROUP))
    return max(1, min(runs, numbers // (rows * tokens))), rows, tokens


def _exponentials(x: Tensor, shift: Tensor) -> Tensor:
    """exp(x - shift) [..., N, V] in place of x, through exp2, which on x86 is three times as fast."""
    return x.sub_(shift.unsqueeze(-1)).mul_(LOG2_E).exp2_()


def _largest(x: Tensor) -> tuple[Tensor, Tensor]:
    """x.max(-1). Where the places are asked for it is five times as slow on a CPU as without: only the largest of GROUP neighbours, and then they, are."""
    if x.shape[-1] % GROUP:
        return x.max(-1)
    groups = x.unflatten(-1, (-1, GROUP))
    largest, group = groups.amax(-1).max(-1)
    inside = torch.take_along_dim(groups, group[..., None, None], -2).squeeze(-2).argmax(-1)
    return largest, group * GROUP + inside


def _place(targets: Tensor, tokens: slice) -> tuple[Tensor, Tensor]:
    """Where the targets are among these tokens, [..., 1], and whether they are."""
    place = targets.unsqueeze(-1) - tokens.start
    inside = (place >= 0) & (place < tokens.stop - tokens.start)
    return torch.where(inside, place, 0), inside


Four = tuple[Tensor, Tensor, Tensor, Tensor]


def _chunked(hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, softcap: float, keep: bool) -> Four:
    nll, best, log_sum, slope = _outputs(hidden, targets, keep)
    runs, rows, tokens = _cut(hidden, weight.shape[-1])
    lowest = torch.finfo(nll.dtype).min
    for r in _pieces(len(hidden), runs):
        for n in _pieces(hidden.shape[1], rows):
            h, t = hidden[r, n], targets[r, n]
            top, total, hit, choice = nll.new_full(t.shape, lowest), nll.new_zeros(t.shape), nll.new_zeros(t.shape), torch.zeros_like(t)
            mean, target_slope = nll.new_zeros(h.shape), nll.new_ones(t.shape)  # mean: of columns of W, before its division by ``total``
            for v in _pieces(weight.shape[-1], tokens):
                w = weight[r, :, v]
                x, slopes = _logits(h, w, None if bias is None else bias[r, v], softcap)
                highest, where = _largest(x)
                choice = torch.where(highest > top, where + v.start, choice)
                place, inside = _place(t, v)
                hit += torch.where(inside, x.gather(-1, place), 0).squeeze(-1)
                new = torch.maximum(top, highest)
                fade = (top - new).exp()
                terms = _exponentials(x, new)
                total, top = total * fade + terms.sum(-1), new
                if keep:
                    if slopes is not None:
                        target_slope = torch.where(inside, slopes.gather(-1, place), target_slope.unsqueeze(-1)).squeeze(-1)
                        terms *= slopes
                    mean = mean * fade.unsqueeze(-1) + terms.to(h.dtype) @ w.mT
            log_sum[r, n] = top + total.log()
            nll[r, n] = top - hit + total.log()  # in this order exact for large logits, too
            best[r, n] = choice
            if keep:
                of_target = torch.take_along_dim(weight[r].mT, t.unsqueeze(-1), -2)  # [R, N, D]
                slope[r, n] = mean / total.unsqueeze(-1) - target_slope.unsqueeze(-1) * of_target
    return nll, best, log_sum, slope


def _chunked_gradient(
    grad: Tensor, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, log_sum: Tensor, softcap: float
) -> tuple[Tensor, Tensor]:
    grad_weight, grad_bias = _weight_like(weight, bias, False)
    runs, rows, tokens = _cut(hidden, weight.shape[-1])
    for r in _pieces(len(hidden), runs):
        for v in _pieces(weight.shape[-1], tokens):
            w, b = weight[r, :, v], None if bias is None else bias[r, v]
            sum_w, sum_b = grad.new_zeros(w.shape), grad.new_zeros(len(w), w.shape[-1])
            for n in _pieces(hidden.shape[1], rows):
                h = hidden[r, n]
                x, slopes = _logits(h, w, b, softcap)
                place, inside = _place(targets[r, n], v)
                _exponentials(x, log_sum[r, n]).scatter_add_(-1, place, -inside.to(x.dtype))
                x *= grad[r, n].unsqueeze(-1)
                x = x if slopes is None else x.mul_(slopes)
                sum_w += h.mT @ x.to(h.dtype)
                if b is not None:
                    sum_b += x.sum(-2)
            grad_weight[r, :, v] = sum_w
            if b is not None:
                grad_bias[r, v] = sum_b
    return grad_weight, grad_bias


# --- the operation


def _outputs(hidden: Tensor, targets: Tensor, keep: bool) -> Four:
    """nll, best, the log of the sum of exponentials, and the slope of nll by hidden (empty unless kept), none filled."""
    like = hidden.new_empty(targets.shape, dtype=torch.promote_types(hidden.dtype, torch.float32))
    slope = like.new_empty(hidden.shape if keep else (0,))
    return like, targets.new_empty(targets.shape), like.new_empty(targets.shape), slope


def _weight_like(weight: Tensor, bias: Tensor | None, triton: bool) -> tuple[Tensor, Tensor]:
    """Of a transposed view the gradient is one, too: its table's. Of the kernels it always is."""
    transposed = triton or (weight.stride(-2) == 1 and weight.shape[-1] > 1)
    grad = weight.mT.new_empty(weight.mT.shape).mT if transposed else weight.new_empty(weight.shape)
    return grad, weight.new_empty((0,) if bias is None else bias.shape)


@torch.library.custom_op("shoal::linear_cross_entropy", mutates_args=())
def _fused(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, softcap: float, keep: bool, triton: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """hidden [R, N, D], weight [R, D, V], bias [R, V], targets [R, N] -> as ``_outputs``."""
    if triton:
        from shoal.nn.linear_cross_entropy_triton import forward, plan

        return forward(hidden, weight, bias, targets, softcap, keep, plan(hidden.shape[-1], hidden.dtype))
    return _chunked(hidden, weight, bias, targets, softcap, keep)


@_fused.register_fake
def _(hidden, weight, bias, targets, softcap, keep, triton):
    return _outputs(hidden, targets, keep)


@torch.library.custom_op("shoal::linear_cross_entropy_gradient", mutates_args=())
def _gradient(
    grad: Tensor, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, log_sum: Tensor, softcap: float, triton: bool
) -> tuple[Tensor, Tensor]:
    """Of weight and bias (empty without one); ``grad`` [R, N] is that of nll."""
    if triton:
        from shoal.nn.linear_cross_entropy_triton import gradient, plan

        return gradient(grad, hidden, weight, bias, targets, log_sum, softcap, plan(hidden.shape[-1], hidden.dtype))
    return _chunked_gradient(grad, hidden, weight, bias, targets, log_sum, softcap)


@_gradient.register_fake
def _(grad, hidden, weight, bias, targets, log_sum, softcap, triton):
    return _weight_like(weight, bias, triton)


def _keep(ctx: Any, inputs: Any, output: Any) -> None:
    hidden, weight, bias, targets, ctx.softcap, _, ctx.triton = inputs
    _, best, log_sum, slope = output
    ctx.mark_non_differentiable(best, log_sum, slope)
    ctx.save_for_backward(hidden, weight, bias, targets, log_sum, slope)


def _backward(ctx: Any, grad: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
    hidden, weight, bias, targets, log_sum, slope = ctx.saved_tensors
    grad_hidden, grad_weight, grad_bias = (grad.unsqueeze(-1) * slope).to(hidden.dtype), None, None
    if any(ctx.needs_input_grad[1:3]):
        grad_weight, grad_bias = _gradient(grad, hidden, weight, bias, targets, log_sum, ctx.softcap, ctx.triton)
    return grad_hidden, grad_weight, grad_bias if bias is not None else None, None, None, None, None


_fused.register_autograd(_backward, setup_context=_keep)


@register_flop_formula(torch.ops.shoal.linear_cross_entropy)
def _forward_flops(hidden: Any, weight: Any, bias: Any, targets: Any, softcap: float, keep: bool, *_: Any, **__: Any) -> int:
    """Matrix products: logits and, if kept, the gradient by hidden."""
    return (2 + 2 * keep) * math.prod(hidden) * weight[-1]


@register_flop_formula(torch.ops.shoal.linear_cross_entropy_gradient)
def _gradient_flops(grad: Any, hidden: Any, weight: Any, *_: Any, **__: Any) -> int:
    """The gradient by W; the logits it computes again are not counted, so the sum is that of logits written out."""
    return 2 * math.prod(hidden) * weight[-1]
