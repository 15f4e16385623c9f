"""The selective scan (Gu, Dao 2023, section 3): a linear recurrence whose step, input and output depend on the token, with a decay of its own in every run.

    step_t = softplus(delta_t)    h_t = exp(step_t A) h_{t-1} + step_t u_t B_t    y_t = <h_t, C_t> + D u_t

| form | what it is |
|---|---|
| reference | the loop as one reads it, differentiated by PyTorch |
| sequential | the same loop in pieces that fit the cache, with the reverse recurrence written by hand; the form for a CPU |
| triton | one kernel, ``shoal.nn.scan_triton``; a GPU only |

None of them indexes time with ``a[:, t]``: the gradient of such a slice is a whole tensor of zeros, so that T of them cost T^2.

    y, state = selective_scan(u, delta, A, B, C, D)            # a sequence
    y, state = selective_scan(u, delta, A, B, C, D, state)     # what follows it, one token or many
"""

from __future__ import annotations

import math
from importlib.util import find_spec
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from shoal.config.fields import ConfigError

Form = Literal["auto", "reference", "sequential", "triton"]
PIECE = 1 << 19  # numbers of one buffer: two or four are in use, and fit the cache
SLICE = 1 << 16  # numbers of state that go through time together: in smaller slices a second thread costs more than it brings
LOG2_E = 1 / math.log(2)
HAS_TRITON = find_spec("triton") is not None


def selective_scan(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, state: Tensor | None = None, *, form: Form = "auto"
) -> tuple[Tensor, Tensor]:
    """u, delta [*L, B, T, D]; A [*L, D, N], negative; B, C [*L, B, T, N]; D [*L, D]; state [*L, B, D, N], None = zeros -> y like u, the last state.

    ``delta`` already has its bias. Inside and in the state numbers are float32, or float64 if u is (which triton cannot). ConfigError for triton away from
    a GPU. Without gradients no state is kept but the last.
    """
    if form == "triton" or (form == "auto" and u.is_cuda and u.dtype != torch.float64 and HAS_TRITON):
        return _triton(u, delta, A, B, C, D, state)
    dtype = torch.promote_types(u.dtype, torch.float32)
    if state is None:
        state = torch.zeros(*u.shape[:-2], *A.shape[-2:], dtype=dtype, device=u.device)
    x, step, A, B, C, D, state = (z.to(dtype) for z in (u, F.softplus(delta.to(dtype)), A, B, C, D, state))
    plain = form == "reference" or (form == "auto" and u.shape[-2] == 1)  # a single step is no loop
    y, state = (_reference if plain else _sequential)(x, step, A, B, C, state)
    return torch.addcmul(y, x, D.unsqueeze(-2).unsqueeze(-2)).to(u.dtype), state


def _triton(u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, state: Tensor | None) -> tuple[Tensor, Tensor]:
    if not u.is_cuda:
        raise ConfigError("model.scan", 'the triton scan runs on a GPU only; set it to "auto" or "sequential"')
    from shoal.nn.scan_triton import scan

    if A.dim() == 3:
        return scan(u, delta, A, B, C, D, state)
    y, last = scan(u[None], delta[None], A[None], B[None], C[None], D[None], None if state is None else state[None])
    return y[0], last[0]


def _reference(u: Tensor, step: Tensor, A: Tensor, B: Tensor, C: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    A, outputs = A.unsqueeze(-3), []
    for u_t, step_t, B_t, C_t in zip(*(z.unbind(-2) for z in (u, step, B, C)), strict=True):
        state = (step_t.unsqueeze(-1) * A).exp() * state + (step_t * u_t).unsqueeze(-1) * B_t.unsqueeze(-2)  # [*L, B, D, N]
        outputs.append((state * C_t.unsqueeze(-2)).sum(-1))
    return torch.stack(outputs, dim=-2), state


def _sequential(u: Tensor, step: Tensor, A: Tensor, B: Tensor, C: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    y_shape, shape = u.shape, state.shape
    u, step, B, C, A, state = (z.flatten(0, -3) for z in (u, step, B, C, A.unsqueeze(-3).expand(shape).mT, state.mT))  # rows: runs x batch
    saved = torch.is_grad_enabled() and any(z.requires_grad for z in (u, step, A, B, C, state))
    y, state, _ = _scan(u, step, A, B, C, state, saved)
    return y.view(y_shape), state.mT.reshape(shape)


class _Cut:
    """How the work is laid out, and cut into pieces: some rows and a stretch of time.

    States are [T, N, X, Y], and all broadcasts with them: time first, so that a step is one operation on memory that lies together; X and Y are channels and
    rows, the longer of them last.
    """

    def __init__(self, u: Tensor, A: Tensor) -> None:
        (rows, time, channels), size = u.shape, A.shape[-2]
        width = max(1, min(rows, SLICE // (channels * size)))
        self.length = max(1, min(time, PIECE // (width * channels * size)))
        self.rows = [slice(r, min(r + width, rows)) for r in range(0, rows, width)]
        self.times = [slice(t, min(t + self.length, time)) for t in range(0, time, self.length)]
        self.rows_last = width > channels
        self.channels = 2 if self.rows_last else 3  # their place in [T, N, X, Y]

    def lay(self, z: Tensor) -> Tensor:
        """[rows, T or N, D] -> [T or N, X, Y]."""
        return _turned(z) if self.rows_last else z.transpose(0, 1).clone(memory_format=torch.contiguous_format)

    def lift(self, z: Tensor, out: Tensor) -> None:
        """The inverse."""
        _turn_back(z, out) if self.rows_last else out.copy_(z.transpose(0, 1))


def _turned(z: Tensor) -> Tensor:
    """[rows, T, N] -> [T, N, rows]: as matrices, for which PyTorch has a faster copy than for permutations."""
    return z.flatten(1).t().clone(memory_format=torch.contiguous_format).view(*z.shape[1:], len(z))


def _turn_back(z: Tensor, out: Tensor) -> None:
    out.flatten(1).copy_(z.flatten(0, 1).t())


def _states(step: Tensor, inputs: Tensor, A: Tensor, B: Tensor, state: Tensor, decay: Tensor, states: Tensor) -> None:
    """Fills decay and states [T, N, X, Y] of a piece that begins after ``state``; ``inputs`` = step u."""
    torch.mul(step, A * LOG2_E, out=decay).exp2_()  # more than twice as fast as exp on x86
    torch.mul(inputs, B, out=states)
    for decay_t, state_t in zip(decay.unbind(), states.unbind(), strict=True):
        state = state_t.addcmul_(decay_t, state)


@torch.library.custom_op("shoal::scan", mutates_args=())
def _scan(u: Tensor, step: Tensor, A: Tensor, B: Tensor, C: Tensor, state: Tensor, saved: bool) -> tuple[Tensor, Tensor, Tensor]:
    """u, step [rows, T, D]; A, state [rows, N, D]; B, C [rows, T, N] -> y, the last state, and (if ``saved``) the states with which stretches of time begin:
    from them the gradient computes the others again, which is cheaper than to write and read them all."""
    cut = _Cut(u, A)
    y, last, starts = u.new_empty(u.shape), state.new_empty(state.shape), state.new_empty(len(cut.times) if saved else 0, *state.shape)
    for r in cut.rows:
        u_r, step_r, A_r, before = (cut.lay(z[r]) for z in (u, step, A, state))
        B_r, C_r = (_turned(z[r]).unsqueeze(cut.channels) for z in (B, C))
        inputs, y_r, buffers = step_r * u_r, torch.empty_like(u_r), before.new_empty(2, cut.length, *before.shape)
        for i, t in enumerate(cut.times):
            if saved:
                starts[i, r].view(before.shape).copy_(before)
            a, h = buffers[:, : t.stop - t.start]
            _states(step_r[t].unsqueeze(1), inputs[t].unsqueeze(1), A_r, B_r[t], before, a, h)
            before.copy_(h[-1])
            torch.sum(torch.mul(h, C_r[t], out=a), 1, out=y_r[t])
        cut.lift(y_r, y[r])
        cut.lift(before, last[r])
    return y, last, starts


@_scan.register_fake
def _(u: Tensor, step: Tensor, A: Tensor, B: Tensor, C: Tensor, state: Tensor, saved: bool) -> tuple[Tensor, Tensor, Tensor]:
    return u.new_empty(u.shape), state.new_empty(state.shape), state.new_empty(len(_Cut(u, A).times) if saved else 0, *state.shape)


Six = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]


@torch.library.custom_op("shoal::scan_gradient", mutates_args=())
def _scan_gradient(grad_y: Tensor, grad_last: Tensor, u: Tensor, step: Tensor, A: Tensor, B: Tensor, C: Tensor, starts: Tensor) -> Six:
    """Gradients of u, step, A, B, C and the first state. That of a state is g_t = y'_t C_t + exp(step_{t+1} A) g_{t+1}, from the last to the first."""
    cut, grads = _Cut(u, A), _empty(u, step, A, B, C, A)
    for r in cut.rows:
        slope, u_r, step_r, A_r, after = (cut.lay(z[r]) for z in (grad_y, u, step, A, grad_last))  # after: what comes to a state from the next
        B_r, C_r = (_turned(z[r]).unsqueeze(cut.channels) for z in (B, C))
        inputs, buffers, grad_A = step_r * u_r, A_r.new_empty(4, cut.length, *A_r.shape), torch.zeros_like(A_r)
        grad_u, grad_step, grad_B, grad_C = (torch.empty_like(z) for z in (u_r, u_r, B_r, B_r))
        for i, t in reversed(list(enumerate(cut.times))):
            a, h, g, product = buffers[:, : t.stop - t.start]
            step_t, inputs_t, slope_t, before = step_r[t].unsqueeze(1), inputs[t].unsqueeze(1), slope[t].unsqueeze(1), starts[i, r].view(A_r.shape)
            _states(step_t, inputs_t, A_r, B_r[t], before, a, h)
            torch.mul(C_r[t], slope_t, out=g)[-1] += after
            decays, slopes = a.unbind(), g.unbind()
            for now in range(len(slopes) - 2, -1, -1):
                slopes[now].addcmul_(decays[now + 1], slopes[now + 1])
            torch.sum(torch.mul(h, slope_t, out=product), cut.channels, keepdim=True, out=grad_C[t])
            torch.sum(torch.mul(g, inputs_t, out=product), cut.channels, keepdim=True, out=grad_B[t])
            grad_inputs = torch.mul(g, B_r[t], out=product).sum(1)
            torch.mul(grad_inputs, step_r[t], out=grad_u[t])
            a *= g
            after.copy_(a[0])
            a[0] *= before
            a[1:] *= h[:-1]  # a is now the gradient of step_t A
            grad_A += torch.mul(a, step_t, out=product).sum(0)
            torch.sum(torch.mul(a, A_r, out=product), 1, out=grad_step[t]).addcmul_(grad_inputs, u_r[t])
        for z, out in zip((grad_u, grad_step, grad_A, after), (*grads[:3], grads[5]), strict=True):
            cut.lift(z, out[r])
        for z, out in zip((grad_B, grad_C), grads[3:5], strict=True):
            _turn_back(z.squeeze(cut.channels), out[r])
    return grads


@_scan_gradient.register_fake
def _(grad_y: Tensor, grad_last: Tensor, u: Tensor, step: Tensor, A: Tensor, B: Tensor, C: Tensor, starts: Tensor) -> Six:
    return _empty(u, step, A, B, C, A)


def _empty(*likes: Tensor) -> Six:
    return tuple(z.new_empty(z.shape) for z in likes)  # pyright: ignore[reportReturnType]


def _keep(ctx, inputs, output) -> None:
    u, step, A, B, C, _, _ = inputs
    ctx.save_for_backward(u, step, A, B, C, output[2])
    ctx.set_materialize_grads(False)


def _backward(ctx, grad_y: Tensor | None, grad_last: Tensor | None, _) -> tuple[Tensor | None, ...]:
    u, _, A, *_ = ctx.saved_tensors
    grad_y = torch.zeros_like(u) if grad_y is None else grad_y
    grad_last = torch.zeros_like(A) if grad_last is None else grad_last
    return *_scan_gradient(grad_y, grad_last, *ctx.saved_tensors), None


_scan.register_autograd(_backward, setup_context=_keep)
