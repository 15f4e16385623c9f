"""The selective scan on a GPU: two Triton kernels behind one operation that autograd, ``torch.compile`` and CUDA graphs accept.

Not here: what the scan means and its other forms (``shoal.nn.scan``, the only caller). Needs Triton; import it on a CUDA device only.

A thread owns one channel of one sequence and keeps its N states in registers; time is a loop. Forward keeps the state at the start
of every chunk; backward walks the chunks in reverse, recomputes what it needs, and sums over channels inside a warp by exchanging
halves. No atomics: the same bits every time. A warp covers 32 channels, or several sequences of a narrow model.

    y, state = scan(u, delta, A, B, C, D, None)
"""

# Triton's language is not quite Python: no starred tuples, and "if" on a constant decides what is compiled.
# ruff: noqa: RUF005, SIM102, SIM108
# pyright: reportOperatorIssue=false, reportIndexIssue=false

from __future__ import annotations

from typing import NamedTuple

import torch
import triton  # pyright: ignore[reportMissingImports]
import triton.language as tl  # pyright: ignore[reportMissingImports]
from torch import Tensor
from torch.nn import functional as F

LANES = tl.constexpr(32)
LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)
MAX_STATES = 16  # per pass over the inputs: backward keeps about eight registers a state


class Plan(NamedTuple):
    """How the kernels cut their work. ``chunk`` is a multiple of both numbers of steps."""

    chunk: int  # steps between kept states
    steps: int  # forward: steps whose inputs are read together
    warps: int
    registers: int | None  # of a thread at most; None: the compiler's choice
    back_steps: int  # backward: steps recomputed at once, all their states in registers
    back_warps: int
    back_registers: int | None


# From benchmarks/scan_h100.py. A long chunk keeps little. Four steps at once in the backward are faster and take most of a minute to compile; two, ten seconds.
LONG = Plan(chunk=32, steps=4, warps=4, registers=80, back_steps=4, back_warps=4, back_registers=None)
SHORT = Plan(chunk=32, steps=4, warps=2, registers=None, back_steps=2, back_warps=4, back_registers=168)
SHORT_LENGTH = 64


def plan(length: int) -> Plan:
    return SHORT if length <= SHORT_LENGTH else LONG


# --- pieces of the kernels: a tile is 1-D, one element a thread, so no operation moves data between threads but _exchange


@triton.jit
def _place(per_sequence, num_sequences, width, WARPS: tl.constexpr, GROUP: tl.constexpr):
    """Where this thread works: lane, sequence and channel (clamped: always safe to read), is the sequence real, is the channel."""
    thread = tl.arange(0, WARPS * LANES)
    lane = thread % LANES
    warp = tl.program_id(0) * WARPS + thread // LANES
    if GROUP == LANES:
        sequence = warp // per_sequence
        channel = warp % per_sequence * LANES + lane
    else:
        sequence = warp * (LANES // GROUP) + lane // GROUP
        channel = lane % GROUP
    real = sequence < num_sequences
    live = real & (channel < width)
    return lane, tl.minimum(sequence, num_sequences - 1).to(tl.int64), tl.minimum(channel, width - 1), real, live


@triton.jit
def _numbers(pointer, N: tl.constexpr):
    """N consecutive numbers of one row, the same for all channels, read eight bytes at a time."""
    kind: tl.constexpr = pointer.dtype.element_ty
    each: tl.constexpr = kind.primitive_bitwidth
    words = pointer.to(tl.pointer_type(tl.int64))
    out = ()
    for i in tl.static_range(N * each // 64):
        word = tl.load(words + i)
        for j in tl.static_range(64 // each):
            piece = word >> (each * j)
            if each == 32:
                number = piece.to(tl.int32).to(kind, bitcast=True)
            else:
                number = piece.to(tl.int16).to(kind, bitcast=True).to(tl.float32)
            out = out + (number,)
    return out


@triton.jit
def _strided(pointer, stride, N: tl.constexpr):
    """N numbers ``stride`` apart."""
    out = ()
    for n in tl.static_range(N):
        out = out + (tl.load(pointer + n * stride).to(tl.float32),)
    return out


@triton.jit
def _put(pointer, stride, values, live, N: tl.constexpr):
    for n in tl.static_range(N):
        tl.store(pointer + n * stride, values[n], mask=live)


@triton.jit
def _zeros(THREADS: tl.constexpr, N: tl.constexpr):
    out = ()
    for _ in tl.static_range(N):
        out = out + (tl.zeros([THREADS], tl.float32),)
    return out


@triton.jit
def _row(t, length):
    """A time that is safe to read."""
    return tl.minimum(t, length - 1).to(tl.int64)


@triton.jit
def _rows(pointer, t, length, stride, STEPS: tl.constexpr):
    """STEPS consecutive times."""
    out = ()
    for i in tl.static_range(STEPS):
        out = out + (tl.load(pointer + _row(t + i, length) * stride).to(tl.float32),)
    return out


@triton.jit
def _softplus(x):
    """log(1 + exp x) and its derivative, to float32 precision for very negative x too: log(1 + z) = 2 atanh(z / (2 + z))."""
    z = tl.exp2(-tl.abs(x) * LOG2_E)
    s = z / (z + 2.0)
    q = s * s  # at most 1/9
    series = 1.0 + q * (1 / 3 + q * (1 / 5 + q * (1 / 7 + q * (1 / 9 + q * (1 / 11 + q * (1 / 13))))))
    return tl.maximum(x, 0.0) + 2.0 * s * series, tl.where(x >= 0, 1.0, z) / (1.0 + z)


@triton.jit
def _advance(h, A, b, step, x, N: tl.constexpr):
    """The next state; A carries a factor log2 e."""
    out = ()
    for n in tl.static_range(N):
        out = out + (tl.exp2(step * A[n]) * h[n] + x * b[n],)
    return out


@triton.jit
def _exchange(x, lane, DISTANCE: tl.constexpr):
    """x of the thread whose lane differs in one bit: one shuffle."""
    warps: tl.constexpr = x.shape[0] // LANES
    source = tl.reshape(lane ^ DISTANCE, [warps, LANES])
    return tl.reshape(tl.gather(tl.reshape(x, [warps, LANES]), source, 1), [warps * LANES])


@triton.jit
def _sum_channels(values, lane, COUNT: tl.constexpr, GROUP: tl.constexpr):
    """Sums of COUNT values over the GROUP threads of a sequence. While their number is even a thread hands half of them to its partner
    and adds what it gets to the other half, so that a sum ends in one thread, not in all: _owned says which."""
    for level in tl.static_range(5):
        if (GROUP >> (level + 1)) > 0:
            out = ()
            if COUNT % (2 << level) == 0:
                upper = (lane & (GROUP >> (level + 1))) != 0
                for n in tl.static_range(COUNT >> (level + 1)):
                    mine = tl.where(upper, values[n + (COUNT >> (level + 1))], values[n])
                    theirs = tl.where(upper, values[n], values[n + (COUNT >> (level + 1))])
                    out = out + (mine + _exchange(theirs, lane, GROUP >> (level + 1)),)
            else:
                for n in tl.static_range(len(values)):
                    out = out + (values[n] + _exchange(values[n], lane, GROUP >> (level + 1)),)
            values = out
    return values


@triton.jit
def _owned(lane, COUNT: tl.constexpr, GROUP: tl.constexpr):
    """The first value whose sum this thread ends with, and whether it is the one to write it."""
    first = lane * 0
    writes = lane >= 0
    for level in tl.static_range(5):
        if (GROUP >> (level + 1)) > 0:
            upper = (lane & (GROUP >> (level + 1))) != 0
            if COUNT % (2 << level) == 0:
                first = tl.where(upper, first + (COUNT >> (level + 1)), first)
            else:
                writes = writes & (upper == 0)
    return first, writes


# --- the kernels


@triton.jit(do_not_specialize=["length", "width", "batch", "num_sequences", "per_sequence", "num_chunks"])
def _forward_kernel(
    u, delta, A, B, C, D, state, y, last, kept, length, width, batch, num_sequences, per_sequence, num_chunks,
    N: tl.constexpr, CHUNK: tl.constexpr, STEPS: tl.constexpr, WARPS: tl.constexpr, GROUP: tl.constexpr, HAS_STATE: tl.constexpr, KEEP: tl.constexpr,
):  # fmt: skip
    _lane, sequence, channel, _real, live = _place(per_sequence, num_sequences, width, WARPS, GROUP)
    own = sequence // batch * width + channel  # this channel of this run's parameters
    A_log2 = ()
    for n in tl.static_range(N):
        A_log2 = A_log2 + (tl.load(A + own * N + n) * LOG2_E,)
    skip = tl.load(D + own)
    start = sequence * length * width + channel
    h = _strided(state + (sequence * width + channel) * N, 1, N) if HAS_STATE else _zeros(WARPS * LANES, N)
    us = _rows(u + start, 0, length, width, STEPS)
    deltas = _rows(delta + start, 0, length, width, STEPS)
    for t in range(0, length, STEPS):
        if KEEP:
            if t % CHUNK == 0:
                _put(kept + (sequence * num_chunks + t // CHUNK) * N * width + channel, width, h, live, N)
        next_us = _rows(u + start, t + STEPS, length, width, STEPS)  # read now, used a turn later
        next_deltas = _rows(delta + start, t + STEPS, length, width, STEPS)
        for i in tl.static_range(STEPS):
            row = _row(t + i, length)
            softplus, _slope = _softplus(deltas[i])
            step = tl.where(t + i < length, softplus, 0.0)
            b = _numbers(B + (sequence * length + row) * N, N)
            c = _numbers(C + (sequence * length + row) * N, N)
            h = _advance(h, A_log2, b, step, step * us[i], N)
            out = us[i] * skip
            for n in tl.static_range(N):
                out += h[n] * c[n]
            tl.store(y + start + row * width, out, mask=live & (t + i < length))
        us = next_us
        deltas = next_deltas
    _put(last + (sequence * width + channel) * N, 1, h, live, N)


@triton.jit(do_not_specialize=["length", "width", "batch", "num_sequences", "per_sequence", "num_chunks"])
def _backward_kernel(
    dy, dlast, u, delta, A, B, C, D, kept, scratch, du, ddelta, dA, dB, dC, dD, dstate, length, width, batch, num_sequences, per_sequence, num_chunks,
    N: tl.constexpr, CHUNK: tl.constexpr, STEPS: tl.constexpr, WARPS: tl.constexpr, GROUP: tl.constexpr, HAS_LAST: tl.constexpr,
):  # fmt: skip
    """kept [S, chunks, N, D]; scratch [programs, CHUNK / STEPS, N, threads]; dA [S, N, D]; dD [S, D]; dB, dC [S, T, warps of a sequence, N]."""
    threads: tl.constexpr = WARPS * LANES
    turns: tl.constexpr = CHUNK // STEPS
    lane, sequence, channel, real, live = _place(per_sequence, num_sequences, width, WARPS, GROUP)
    own = sequence // batch * width + channel
    A_log2 = ()
    for n in tl.static_range(N):
        A_log2 = A_log2 + (tl.load(A + own * N + n) * LOG2_E,)
    skip = tl.load(D + own)
    start = sequence * length * width + channel
    own_scratch = scratch + tl.program_id(0).to(tl.int64) * turns * N * threads + tl.arange(0, threads)

    first, writes = _owned(lane, 2 * N, GROUP)
    writes = writes & real
    thread = tl.program_id(0) * threads + tl.arange(0, threads)
    sums = (sequence * length * per_sequence + thread // LANES % per_sequence) * N

    dh = _zeros(threads, N)
    if HAS_LAST:
        dh = ()
        for n in tl.static_range(N):  # a thread without a channel works on zeros
            dh = dh + (tl.load(dlast + (sequence * width + channel) * N + n, mask=live, other=0.0),)
    gA = _zeros(threads, N)
    gD = tl.zeros([threads], tl.float32)
    for k in range(num_chunks):
        chunk = num_chunks - 1 - k
        begin = chunk * CHUNK
        num_turns = (tl.minimum(length - begin, CHUNK) + STEPS - 1) // STEPS
        beginning = kept + (sequence * num_chunks + chunk) * N * width + channel
        if turns > 1:  # once through the chunk, leaving a state at every turn
            h = _strided(beginning, width, N)
            _put(own_scratch, threads, h, lane >= 0, N)  # by every thread: each reads its own
            us = _rows(u + start, begin, length, width, STEPS)
            deltas = _rows(delta + start, begin, length, width, STEPS)
            for turn in range(1, num_turns):
                t = begin + turn * STEPS
                next_us = _rows(u + start, t, length, width, STEPS)
                next_deltas = _rows(delta + start, t, length, width, STEPS)
                for i in tl.static_range(STEPS):  # never the last turn, so within the sequence
                    step, _slope = _softplus(deltas[i])
                    b = _numbers(B + (sequence * length + t - STEPS + i) * N, N)
                    h = _advance(h, A_log2, b, step, step * us[i], N)
                _put(own_scratch + turn * N * threads, threads, h, lane >= 0, N)
                us = next_us
                deltas = next_deltas
        for back in range(num_turns):
            turn = num_turns - 1 - back
            t = begin + turn * STEPS
            us = _rows(u + start, t, length, width, STEPS)
            deltas = _rows(delta + start, t, length, width, STEPS)
            dys = _rows(dy + start, t, length, width, STEPS)
            if turns > 1:
                h = _strided(own_scratch + turn * N * threads, threads, N)
            else:
                h = _strided(beginning, width, N)
            states = h  # state n before step i is states[i * N + n]
            steps = ()
            slopes = ()
            for i in tl.static_range(STEPS):
                softplus, slope = _softplus(deltas[i])
                step = tl.where(t + i < length, softplus, 0.0)
                b = _numbers(B + (sequence * length + _row(t + i, length)) * N, N)
                h = _advance(h, A_log2, b, step, step * us[i], N)
                states = states + h
                steps = steps + (step,)
                slopes = slopes + (slope,)
            for i in tl.static_range(STEPS - 1, -1, -1):
                row = _row(t + i, length)
                inside = live & (t + i < length)
                grad = tl.where(inside, dys[i], 0.0)
                x = steps[i] * us[i]
                b = _numbers(B + (sequence * length + row) * N, N)
                c = _numbers(C + (sequence * length + row) * N, N)
                dx = tl.zeros([threads], tl.float32)
                dstep = tl.zeros([threads], tl.float32)
                dBs = ()
                dCs = ()
                new_dh = ()
                new_gA = ()
                for n in tl.static_range(N):
                    g = dh[n] + grad * c[n]
                    dBs = dBs + (g * x,)
                    dCs = dCs + (grad * states[(i + 1) * N + n],)
                    dx += g * b[n]
                    g = g * tl.exp2(steps[i] * A_log2[n])  # the compiler still has this decay
                    new_dh = new_dh + (g,)
                    w = g * states[i * N + n]
                    dstep += w * A_log2[n]
                    new_gA = new_gA + (w * steps[i] + gA[n],)
                dh = new_dh
                gA = new_gA
                gD += grad * us[i]
                tl.store(du + start + row * width, dx * steps[i] + grad * skip, mask=inside)
                tl.store(ddelta + start + row * width, (dx * us[i] + dstep * LN_2) * slopes[i], mask=inside)
                totals = _sum_channels(dBs + dCs, lane, 2 * N, GROUP)
                for j in tl.static_range(len(totals)):
                    value = first + j
                    place = tl.where(value < N, dB, dC) + (sums + row * per_sequence * N + value % N)
                    tl.store(place, totals[j], mask=writes & (t + i < length))
    _put(dA + sequence * N * width + channel, width, gA, live, N)
    tl.store(dD + sequence * width + channel, gD, mask=live)
    _put(dstate + (sequence * width + channel) * N, 1, dh, live, N)


# --- their launch


class _Grid(NamedTuple):
    group: int  # threads of a warp that share a sequence
    warps: int  # in all
    per_sequence: int  # warps of a sequence: 1 where a warp holds several


def _grid(num_sequences: int, width: int) -> _Grid:
    if width < LANES.value:
        group = triton.next_power_of_2(width)
        return _Grid(group, triton.cdiv(num_sequences, LANES.value // group), 1)
    per_sequence = triton.cdiv(width, LANES.value)
    return _Grid(LANES.value, num_sequences * per_sequence, per_sequence)


def _ready(x: Tensor) -> Tensor:
    """Contiguous and, as rows are read in words, at an address of eight bytes."""
    x = x.contiguous()
    return x.clone() if x.data_ptr() % 8 else x


def forward(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, state: Tensor | None, keep: bool, plan: Plan
) -> tuple[Tensor, Tensor, Tensor]:
    """y [R, B, T, D], last state [R, B, D, N], states kept [R, B, chunks, N, D]; shapes as in ``scan``, N a multiple of 4."""
    R, batch, T, width = u.shape
    N, num_chunks = A.shape[-1], triton.cdiv(T, plan.chunk)
    u, delta, A, B, C, D = (_ready(x) for x in (u, delta, A, B, C, D))
    y, last = torch.empty_like(u), A.new_empty(R, batch, width, N)
    kept = A.new_empty(R, batch, num_chunks, N, width) if keep else A.new_empty(0)
    group, warps, per_sequence = _grid(R * batch, width)
    if last.numel():
        with torch.cuda.device_of(u):
            _forward_kernel[(triton.cdiv(warps, plan.warps),)](
                u, delta, A, B, C, D, None if state is None else _ready(state), y, last, kept, T, width, batch, R * batch, per_sequence, num_chunks,
                N=N, CHUNK=plan.chunk, STEPS=plan.steps, WARPS=plan.warps, GROUP=group, HAS_STATE=state is not None, KEEP=keep,
                num_warps=plan.warps, maxnreg=plan.registers,
            )  # fmt: skip
    return y, last, kept


def backward(
    dy: Tensor, dlast: Tensor | None, u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, kept: Tensor, plan: Plan
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of u, delta, A, B, C, D and the initial state."""
    R, batch, T, width = u.shape
    N, num_chunks = A.shape[-1], triton.cdiv(T, plan.chunk)
    dy, u, delta, A, B, C, D = (_ready(x) for x in (dy, u, delta, A, B, C, D))
    group, warps, per_sequence = _grid(R * batch, width)
    programs, turns = triton.cdiv(warps, plan.back_warps), plan.chunk // plan.back_steps
    scratch = A.new_empty(programs * turns * N * plan.back_warps * LANES.value if turns > 1 else 0)
    du, ddelta, dstate = torch.empty_like(u), torch.empty_like(delta), A.new_empty(R, batch, width, N)
    dA, dD = A.new_empty(R, batch, N, width), A.new_empty(R, batch, width)
    dB, dC = (A.new_empty(R, batch, T, per_sequence, N) for _ in range(2))
    if dstate.numel():
        with torch.cuda.device_of(u):
            _backward_kernel[(programs,)](
                dy, None if dlast is None else _ready(dlast), u, delta, A, B, C, D, kept, scratch, du, ddelta, dA, dB, dC, dD, dstate,
                T, width, batch, R * batch, per_sequence, num_chunks,
                N=N, CHUNK=plan.chunk, STEPS=plan.back_steps, WARPS=plan.back_warps, GROUP=group, HAS_LAST=dlast is not None,
                num_warps=plan.back_warps, maxnreg=plan.back_registers,
            )  # fmt: skip
    dB, dC = (x.squeeze(-2) if per_sequence == 1 else x.sum(-2) for x in (dB, dC))
    return du, ddelta, dA.sum(1).mT.contiguous(), dB.to(B.dtype), dC.to(C.dtype), dD.sum(1), dstate


@torch.library.custom_op("shoal::selective_scan", mutates_args=())
def _scan(u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, state: Tensor | None, keep: bool) -> tuple[Tensor, Tensor, Tensor]:
    return forward(u, delta, A, B, C, D, state, keep, plan(u.shape[2]))


@_scan.register_fake
def _(u, delta, A, B, C, D, state, keep):
    R, batch, T, width = u.shape
    chunk = plan(T).chunk
    y = torch.empty_like(u, memory_format=torch.contiguous_format)
    kept = A.new_empty(R, batch, (T + chunk - 1) // chunk, A.shape[-1], width) if keep else A.new_empty(0)
    return y, A.new_empty(R, batch, width, A.shape[-1]), kept


@torch.library.custom_op("shoal::selective_scan_backward", mutates_args=())
def _scan_backward(
    dy: Tensor, dlast: Tensor | None, u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, kept: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    return backward(dy, dlast, u, delta, A, B, C, D, kept, plan(u.shape[2]))


@_scan_backward.register_fake
def _(dy, dlast, u, delta, A, B, C, D, kept):
    R, batch, _, width = u.shape
    likes = [torch.empty_like(x, memory_format=torch.contiguous_format) for x in (u, delta, A, B, C, D)]
    return *likes, A.new_empty(R, batch, width, A.shape[-1])


def _setup_context(ctx, inputs, output) -> None:
    *tensors, state, _ = inputs
    ctx.save_for_backward(*tensors, output[2])
    ctx.has_state = state is not None
    ctx.set_materialize_grads(False)


def _gradient(ctx, dy: Tensor | None, dlast: Tensor | None, _) -> tuple[Tensor | None, ...]:
    *tensors, kept = ctx.saved_tensors
    dy = torch.zeros_like(tensors[0]) if dy is None else dy
    *grads, dstate = _scan_backward(dy, dlast, *tensors, kept)
    return *grads, dstate if ctx.has_state else None, None


_scan.register_autograd(_gradient, setup_context=_setup_context)


def scan(u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, state: Tensor | None) -> tuple[Tensor, Tensor]:
    """u, delta [R, B, T, D]; A [R, D, N]; B, C [R, B, T, N]; D [R, D]; state [R, B, D, N] or None -> y like u, last state float32.

    Inputs of float32, bfloat16 or float16; inside float32.
    """
    if torch.float64 in (u.dtype, delta.dtype, A.dtype, B.dtype, C.dtype):
        raise ValueError("the triton form of the scan computes in float32: for float64 use the sequential form")
    A, D, N = A.float(), D.float(), A.shape[-1]
    state = None if state is None else state.float()
    if N > MAX_STATES:  # states do not meet but in y
        y, lasts = None, []
        for n in range(0, N, MAX_STATES):
            some = slice(n, n + MAX_STATES)
            skip = D if n == 0 else torch.zeros_like(D)
            part, last = scan(u.float(), delta.float(), A[..., some], B[..., some], C[..., some], skip, None if state is None else state[..., some])
            y = part if y is None else y + part
            lasts.append(last)
        assert y is not None
        return y.to(u.dtype), torch.cat(lasts, -1)
    if N % 4:
        A, B, C = (F.pad(x, (0, -N % 4)) for x in (A, B, C))
        state = None if state is None else F.pad(state, (0, -N % 4))
    inputs = (u, delta, A, B, C, D, state)
    keep = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in inputs)
    y, last, _ = _scan(*inputs, keep)
    return y, last[..., :N]
