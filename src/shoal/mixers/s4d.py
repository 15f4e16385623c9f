"""S4D-Lin (Gu, Goel, Gupta, Re 2022, arXiv 2206.11893): a diagonal state space that is the same at every position, the baseline of the selective ones.

    h_t = exp(step A) h_{t-1} + x_t        y_t = 2 step Re <C, h_t> + D x_t        (per channel; h, A, C complex [N/2]; step and B = 1 moved to C)

The block is Mamba's without what makes that selective: a gate, but one step, B and C per channel for all inputs, and no short
convolution (with its SiLU). As there, exp(step A) is exact and step B of first order. Of the paper's choices of A it is -1/2 + i pi n, whose
N/2 frequencies let a channel hold a lag. (S4D-Real has Mamba's own A: states only decay, its kernels are too smooth for a lag, and the
baseline would be weaker than it need be.) A complex state counts as two numbers, so N means here what it means in Mamba.

A convolution in time whose kernel is as long as the sequence. Up to CHUNK positions it is one matrix per channel; longer sequences go
in chunks with the state between them, which is also how a cache goes on. Not by Fourier transforms: these know neither bfloat16 nor the compiler.

Time passes at a masked position, with nothing coming in. Padding before a sequence thus finds the state at 0 and leaves it there, and
padding after it is never read; but a hole inside is a silence, not a cut.

    y, _ = s4d(x, step, decay, frequency, C)
"""

from __future__ import annotations

import math
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from shoal.config.models import DecoderConfig
from shoal.contracts import Context
from shoal.mixers.steps import log_steps
from shoal.nn import Constant, Given, Linear, Normal, joint_linear, select
from shoal.nn.init import Distribution

CHUNK = 64


class S4D(nn.Module):
    """Its cache is the state, [*L, B, inner, N]: the real parts, then the imaginary."""

    def __init__(self, config: DecoderConfig, lead: tuple[int, ...] = ()) -> None:
        super().__init__()
        self.width, self.inner, self.state_size, self.lead = config.width, config.expand * config.width, config.state_size, lead
        self.gate = Linear(config.width, self.inner, bias=config.bias, lead=lead)
        self.input = Linear(config.width, self.inner, bias=config.bias, lead=lead)
        self.log_step = nn.Parameter(torch.empty(*lead, self.inner))
        self.log_decay = nn.Parameter(torch.empty(*lead, self.inner, self.state_size // 2))  # A = -exp(log_decay) + i frequency
        self.frequency = nn.Parameter(torch.empty(*lead, self.inner, self.state_size // 2))
        self.C = nn.Parameter(torch.empty(*lead, self.inner, self.state_size))  # real parts, then imaginary
        self.D = nn.Parameter(torch.empty(*lead, self.inner))
        self.out = Linear(self.inner, config.width, bias=config.bias, lead=lead)

    def forward(self, x: Tensor, context: Context, cache: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """x [*L, B, T, D] -> [*L, B, S, D]: states everywhere, gate and output only at the scored positions."""
        if context.at is None:
            z, u = joint_linear(x, [self.gate, self.input])
        else:
            z, u = self.gate(select(x, context.at)), self.input(x)
        if context.mask is not None:
            u = u.masked_fill(~context.mask.unsqueeze(-1), 0)
        precise = torch.promote_types(x.dtype, torch.float32)
        step, decay, frequency, C = self.log_step.to(precise).exp(), self.log_decay.to(precise).exp(), self.frequency.to(precise), self.C.to(precise)
        y, cache = s4d(u, step, decay, frequency, C, cache, context.at)
        y = y + select(u, context.at) * self.D[..., None, None, :]
        return self.out(y * F.silu(z)), cache

    def init_cache(self, batch: int, length: int) -> Tensor:
        """Of one size, whatever the length."""
        weight = self.out.weight
        return weight.new_zeros(*self.lead, batch, self.inner, self.state_size, dtype=torch.promote_types(weight.dtype, torch.float32))

    def init_rules(self) -> list[tuple[str, Distribution]]:
        """Step log-uniform in [0.001, 0.1], A = -1/2 + i pi n, C a complex normal of variance 1, D = 1."""
        frequencies = math.pi * torch.arange(self.state_size // 2, device="cpu").expand(self.inner, -1)
        return [
            ("log_step", Given(partial(log_steps, self.inner))),
            ("log_decay", Constant(math.log(0.5))),
            ("frequency", Given(lambda name, seed: frequencies)),
            ("C", Normal(0.5**0.5)),
            ("D", Constant(1.0)),
        ]

    def undecayed(self) -> list[str]:
        return ["log_step", "log_decay", "frequency"]

    def flops(self, batch: int, time: int, scored: int) -> int:
        """Up to CHUNK positions, scored ones given as indices are counted as if they were a slice, which saves more."""
        projections = 2 * batch * self.width * self.inner * (2 * scored + time)
        if time <= CHUNK:
            return projections + 2 * batch * self.inner * scored * time
        count, size = _chunks(time)
        return projections + 2 * batch * self.inner * size * (count * size + self.state_size * (2 * count - 1))  # inside chunks; written and read between

    def state_bytes(self, length: int) -> int:
        return 4 * self.inner * self.state_size


def s4d(
    x: Tensor, step: Tensor, decay: Tensor, frequency: Tensor, C: Tensor, state: Tensor | None = None, at: Tensor | slice | None = None
) -> tuple[Tensor, Tensor | None]:
    """The recurrence above without D, read at the positions ``at`` (all if None). In real numbers: the real parts of a complex vector, then the imaginary.

    x [*L, B, T, D], step [*L, D], decay and frequency [*L, D, N/2] (A = -decay + i frequency), C [*L, D, N], state [*L, B, D, N]
    -> y [*L, B, S, D], the last state; without a state to begin with (then it is 0), None. Products in the type of x, states in that of step.
    """
    time, batch = x.shape[-2], x.shape[-3]
    count, size = _chunks(time)
    missing = count * size - time
    t = torch.arange(size + 1, device=x.device)
    scale, phase = (-(step.unsqueeze(-1) * decay).unsqueeze(-1) * t).exp(), (step.unsqueeze(-1) * frequency).unsqueeze(-1) * t
    real, imag = scale * phase.cos(), scale * phase.sin()  # [*L, D, N/2, t]: of exp(step A)^t
    powers = torch.cat((real, imag), dim=-2)
    c_real, c_imag = (2 * step.unsqueeze(-1) * C).unsqueeze(-1).chunk(2, dim=-2)
    response = c_real * real - c_imag * imag
    matrix = _toeplitz(response.sum(-2)[..., :size]).to(x.dtype)
    readout = torch.cat((response, -(c_real * imag + c_imag * real)), dim=-2)[..., 1:].mT  # [*L, D, t, N]: what is read after t of the state before

    if count == 1 and isinstance(at, slice):
        matrix, readout, at = matrix[..., at, :], readout[..., at, :], None
    pieces = F.pad(x, (0, 0, 0, missing)).unflatten(-2, (count, size)).movedim((-4, -3, -2, -1), (-1, -2, -3, -4)).flatten(-2)  # [*L, D, t, chunks B]
    y, last = matrix @ pieces, None
    if count > 1 or state is not None:
        carried = x.new_zeros(*powers.shape[:-1], batch, dtype=step.dtype) if state is None else state.movedim(-3, -1)  # [*L, D, N, B]
        starts, before_last = [carried], (count - 1) * batch
        written = powers[..., :size].flip(-1).to(x.dtype) @ pieces[..., :before_last]
        for new in written.unflatten(-1, (count - 1, batch)).unbind(-2):
            carried = _rotate(carried, powers[..., size]) + new
            starts.append(carried)
        y = y + (readout @ torch.stack(starts, dim=-2).flatten(-2)).to(x.dtype)
        if state is not None:
            rest = size - missing
            written = powers[..., :rest].flip(-1).to(x.dtype) @ pieces[..., :rest, before_last:]
            last = (_rotate(carried, powers[..., rest]) + written).movedim(-1, -3)
    y = y.unflatten(-1, (count, batch)).movedim((-4, -3, -2, -1), (-1, -2, -3, -4)).flatten(-3, -2)[..., :time, :]
    return select(y, at), last


def _chunks(time: int) -> tuple[int, int]:
    """How many, and of what size, so that little is added to the last."""
    count = -(-time // CHUNK)
    return count, -(-time // count)


def _rotate(state: Tensor, by: Tensor) -> Tensor:
    """The complex product of [..., N, B] with [..., N]."""
    (a, b), (real, imag) = by.unsqueeze(-1).chunk(2, dim=-2), state.chunk(2, dim=-2)
    return torch.cat((a * real - b * imag, a * imag + b * real), dim=-2)


def _toeplitz(kernel: Tensor) -> Tensor:
    """[..., T] -> [..., T, T]: kernel[t - s] in row t, column s, 0 above the diagonal.

    The kernel and as many zeros over and over, cut into rows one shorter, so that each begins one place later. Not a gather, whose gradient adds in any order.
    """
    time = kernel.shape[-1]
    row = F.pad(kernel, (0, time)).unsqueeze(-2).expand(*kernel.shape[:-1], time, 2 * time)
    return row.flatten(-2)[..., : time * (2 * time - 1)].unflatten(-1, (time, 2 * time - 1))[..., :time].mT
