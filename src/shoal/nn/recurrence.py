"""Recurrent cells over a whole sequence, every run with its own weights: what torch.nn's RNN, GRU and LSTM compute after their product with the input.

    rnn     h_t = tanh(a)                           a = x_t + h_{t-1} W
    gru     h_t = (1 - z) n + z h_{t-1}             r, z = sigmoid(a_r), sigmoid(a_z)    n = tanh(x_n + r (h_{t-1} W_n + b))
    lstm    h_t = o tanh(c_t)                       c_t = f c_{t-1} + i g    g = tanh(a_g)    i, f, o = sigmoid(a_i), sigmoid(a_f), sigmoid(a_o)

(Elman 1990; Cho et al. 2014; Hochreiter, Schmidhuber 1997.) Gates lie side by side in the last dimension: r z n, and g i f o (torch has i f g o).

The loop over time is one operation to the compiler, which would otherwise unroll it; on a GPU it is made to be captured in a graph. Forward, a step is
one batched product and 1 (rnn), 4 (gru) or 6 (lstm) elementwise operations. Backward, the gradient of a step is linear in that of the state after it: its
slopes are computed for all positions at once, and a step back is one product and 1, 2 or 4 operations. A mask costs one or two more either way.
Slow: on a CPU lstm takes about twice the time of torch.nn.LSTM once per run, which is oneDNN's; rnn and gru take less than torch's.
Not here: products with the input, and the mixers (``mixers/recurrent.py``).

    y, (state,) = recurrence("gru", x, weight, bias)
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

Kind = Literal["rnn", "gru", "lstm"]
sigmoid_backward, tanh_backward = torch.ops.aten.sigmoid_backward, torch.ops.aten.tanh_backward  # (x, y): x y (1 - y) and x (1 - y^2) in one pass
GATES: dict[Kind, int] = {"rnn": 1, "gru": 3, "lstm": 4}


def recurrence(
    kind: Kind, x: Tensor, weight: Tensor, bias: Tensor | None = None, state: tuple[Tensor, ...] | None = None, mask: Tensor | None = None
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """x [*L, T, B, G D], time before batch; weight [*L, D, G D]; bias [*L, D] of gru's inner product; mask bool [*L, T, B]; where False, the state stays
    as it is -> y [*L, T, B, D] and the state after it: (h,) or for lstm (h, c), each [*L, B, D]. ``state``: that before, None = zeros. c is float32 at least.
    """
    if weight.dim() == 2:
        bias, mask = (None if z is None else z[None] for z in (bias, mask))
        y, state = recurrence(kind, x[None], weight[None], bias, None if state is None else tuple(z[None] for z in state), mask)
        return y[0], tuple(z[0] for z in state)
    if state is None:
        h = x.new_zeros(len(x), x.shape[2], weight.shape[1])
        state = (h, h.to(torch.promote_types(h.dtype, torch.float32))) if kind == "lstm" else (h,)
    h, *c = state
    states, others, _ = _recurrence(kind, x, weight, bias, h, c[0] if c else None, mask)
    return states[:, 1:], (states[:, -1], others[:, -1]) if kind == "lstm" else (states[:, -1],)


Three = tuple[Tensor, Tensor, Tensor]


@torch.library.custom_op("shoal::recurrence", mutates_args=())
def _recurrence(kind: str, x: Tensor, weight: Tensor, bias: Tensor | None, h: Tensor, c: Tensor | None, mask: Tensor | None) -> Three:
    """States h_0 .. h_T [R, T+1, B, D]; lstm's cells c_0 .. c_T, gru's candidates n_1 .. n_T; gates [R, T, B, G D] (gru: r, z and the inner product)."""
    states, others, _ = _empty(kind, x, weight, c)
    states[:, 0] = h
    gates, width = x.clone(memory_format=torch.contiguous_format), weight.shape[1]
    if kind == "gru":
        gates[..., 2 * width :] = 0 if bias is None else bias[:, None, None]
    if c is not None:
        others[:, 0] = c
    real = None if mask is None else mask.unsqueeze(-1).unbind(1)
    inputs, state, other = x.unbind(1), states.unbind(1), others.unbind(1)
    for t, a in enumerate(gates.unbind(1)):
        before, now = state[t : t + 2]
        a.baddbmm_(before, weight)
        if kind == "rnn":
            torch.tanh(a, out=now)
        elif kind == "gru":
            r, z, inner = a.chunk(3, -1)
            a[..., : 2 * width].sigmoid_()
            n = torch.addcmul(inputs[t][..., 2 * width :], r, inner, out=other[t]).tanh_()
            torch.lerp(n, before, z, out=now)
        else:
            g, i, f, o = a.chunk(4, -1)
            g.tanh_()
            a[..., width:].sigmoid_()
            torch.mul(g, i, out=other[t + 1]).addcmul_(f, other[t])
            torch.tanh(other[t + 1], out=now).mul_(o)
            if real is not None:
                torch.where(real[t], other[t + 1], other[t], out=other[t + 1])
        if real is not None:
            torch.where(real[t], now, before, out=now)
    return states, others, gates


@_recurrence.register_fake
def _(kind: str, x: Tensor, weight: Tensor, bias: Tensor | None, h: Tensor, c: Tensor | None, mask: Tensor | None) -> Three:
    return _empty(kind, x, weight, c)


def _empty(kind: str, x: Tensor, weight: Tensor, c: Tensor | None) -> Three:
    runs, time, batch, _ = x.shape
    steps = {"rnn": 0, "gru": time, "lstm": time + 1}[kind]
    others = (x if c is None else c).new_empty(runs, steps, batch, weight.shape[1])
    return x.new_empty(runs, time + 1, batch, weight.shape[1]), others, x.new_empty(x.shape)


Five = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


@torch.library.custom_op("shoal::recurrence_gradient", mutates_args=())
def _gradient(
    kind: str, grad_states: Tensor, grad_others: Tensor | None, states: Tensor, others: Tensor, gates: Tensor, weight: Tensor, mask: Tensor | None
) -> Five:
    """Gradients of x, the weight, gru's bias, the first h and the first c (empty where there is none)."""
    width, before = weight.shape[1], states[:, :-1]
    away = None if mask is None else ~mask.unsqueeze(-1)
    keep = None if away is None else away.to(gates.dtype)  # the share of a state's gradient that passes straight to the state before
    to_input = to_cell = forget = None
    slopes = torch.empty_like(gates)
    slope = slopes.chunk(len(gates[0, 0, 0]) // width, -1)
    if kind == "rnn":
        torch.sub(1, states[:, 1:].square(), out=slopes)
    elif kind == "gru":
        r, z, inner = gates.chunk(3, -1)
        to_input = tanh_backward(1 - z, others)
        sigmoid_backward.grad_input(to_input * inner, r, grad_input=slope[0])
        sigmoid_backward.grad_input(before - others, z, grad_input=slope[1])
        torch.mul(to_input, r, out=slope[2])
        keep = z if away is None else z.masked_fill(away, 1)
    else:
        (g, i, f, o), tanh = gates.chunk(4, -1), others[:, 1:].tanh().to(gates.dtype)
        tanh_backward.grad_input(i, g, grad_input=slope[0])
        for of, gate, out in zip((g, others[:, :-1].to(g.dtype), tanh), (i, f, o), slope[1:], strict=True):
            sigmoid_backward.grad_input(of, gate, grad_input=out)
        to_cell, forget = tanh_backward(o, tanh), f if away is None else f.masked_fill(away, 1)
    if away is not None:
        for coefficients in (slopes, to_input, to_cell):
            if coefficients is not None:
                coefficients.masked_fill_(away, 0)

    grad_states = grad_states.clone(memory_format=torch.contiguous_format)
    if kind == "lstm":  # for candidates nothing comes, and nothing is done
        others = torch.zeros_like(others) if grad_others is None else grad_others.clone(memory_format=torch.contiguous_format)
    back, grad_h, grad_c = weight.mT, grad_states.unbind(1), others.unbind(1)
    gated, kept, celled, forgot = (None if z is None else z.unbind(1) for z in (slopes.unflatten(-1, (-1, width)), keep, to_cell, forget))
    assert gated is not None
    for t in reversed(range(len(gated))):
        after, a = grad_h[t + 1], gated[t]
        if celled is not None and forgot is not None:
            cell = grad_c[t + 1].addcmul_(after, celled[t])
            a[..., :3, :].mul_(cell.unsqueeze(-2))
            a[..., 3, :].mul_(after)
            grad_c[t].addcmul_(cell, forgot[t])
        else:
            a.mul_(after.unsqueeze(-2))
        if kept is not None:
            grad_h[t].addcmul_(after, kept[t])
        grad_h[t].baddbmm_(a.flatten(-2), back)

    grad_weight = before.flatten(1, 2).mT @ slopes.flatten(1, 2)
    grad_bias = slopes[..., 2 * width :].sum((1, 2)) if kind == "gru" else weight.new_empty(0)
    if to_input is not None:  # the gradient of x_n is not that of the inner product
        torch.mul(to_input, grad_states[:, 1:], out=slope[2])
    return slopes, grad_weight, grad_bias, grad_states[:, 0].clone(), others[:, 0].clone() if kind == "lstm" else others.new_empty(0)


@_gradient.register_fake
def _(kind: str, grad_states: Tensor, grad_others: Tensor | None, states: Tensor, others: Tensor, gates: Tensor, weight: Tensor, mask: Tensor | None) -> Five:
    runs, _, batch, width = states.shape
    grad_c = others.new_empty((runs, batch, width) if kind == "lstm" else 0)
    return (
        gates.new_empty(gates.shape), weight.new_empty(weight.shape), weight.new_empty((runs, width) if kind == "gru" else 0),
        states.new_empty(runs, batch, width), grad_c,
    )  # fmt: skip


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Three) -> None:
    kind, _, weight, bias, _, c, mask = inputs
    ctx.kind, ctx.has_bias, ctx.has_cell = kind, bias is not None, c is not None
    ctx.save_for_backward(*output, weight, mask)
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, grad_states: Tensor | None, grad_others: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, ...]:
    grad_states = torch.zeros_like(ctx.saved_tensors[0]) if grad_states is None else grad_states
    grad_x, grad_weight, grad_bias, grad_h, grad_c = _gradient(ctx.kind, grad_states, grad_others, *ctx.saved_tensors)
    return None, grad_x, grad_weight, grad_bias if ctx.has_bias else None, grad_h, grad_c if ctx.has_cell else None, None


_recurrence.register_autograd(_backward, setup_context=_keep)


@register_flop_formula(torch.ops.shoal.recurrence)
def _(kind: str, x: Any, weight: Any, *rest: Any, **options: Any) -> int:
    """Shapes come in."""
    return 2 * x[0] * x[1] * x[2] * weight[1] * weight[2]


@register_flop_formula(torch.ops.shoal.recurrence_gradient)
def _(kind: str, grad_states: Any, grad_others: Any, states: Any, others: Any, gates: Any, weight: Any, *rest: Any, **options: Any) -> int:
    """One product back through time and one for the weight."""
    return 4 * gates[0] * gates[1] * gates[2] * weight[1] * weight[2]
