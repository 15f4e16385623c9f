"""Optimizers whose hyperparameters differ by run: SGD, Adam, AdamW, Adagrad as in ``torch.optim``, and Muon.

    optimizer = build(AdamW(wd=1.0))
    state = optimizer.init(params)                                     # {"flat": [R, P]}: R runs at once
    optimizer.update(params, grads, state, {"lr": lr, ...}, step, alive)  # in place; lr [R], step int64, alive bool [R]

Each update is its paper's equations with coefficients [*L] spread over tensors [*L, ...]. Handed a few large tensors, it is a handful of passes over
memory when eager and one kernel when compiled; nothing is reduced over runs and nothing asks the host.

A run that is not alive must keep every bit. Its gradient is 0, so coefficients can do that without another pass over the tensors, but not
coefficients of 0.0: x + 0.0 turns a -0.0 into 0.0, while x + -0.0 is x for every x. So `_gate` makes a dead run's coefficients -0.0, and every
line below is written such that what they multiply is then 0.0: the update adds -0.0. (Parameters and moments must be finite for this; a run
that is stopped at the first non-finite gradient norm has only such.)

No optimizer decays the group "undecayed". Not here: which parameter goes into which group, schedules, and what makes a run dead; the fleet decides those.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from shoal.config import optimizers as configs
from shoal.contracts import Optimizer, Params, State
from shoal.train.baum_welch import BaumWelch

NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)  # Keller Jordan: the steepest quintic at 0 that keeps singular values in about [0.7, 1.2]
CONVERGENT = (15 / 8, -10 / 8, 3 / 8)  # the quintic with slope and curvature 0 at 1: from there an error of 0.3 becomes 1e-9 in three steps


@dataclass(frozen=True)
class SGD:
    """Momentum as in torch: no dampening, so the first momentum is the first gradient. Weight decay is added to the gradient."""

    config: configs.SGD

    def init(self, params: Params) -> State:
        return {"momentum": _zeros(params)}

    def update(self, params: Params, grads: Params, state: State, hyper: Mapping[str, Tensor], step: Tensor, alive: Tensor) -> None:
        for name, p in params.items():
            descend, decay, momentum, assign = _gate(alive, p, -hyper["lr"], hyper["wd"], hyper["momentum"], torch.ones_like(hyper["lr"]))
            buffer = state["momentum"][name]
            g = torch.addcmul(grads[name], p, decay) if _decays(name) else grads[name]
            velocity = torch.addcmul(g, buffer, momentum)
            buffer.lerp_(velocity, assign)  # lerp by 1 is its end, exactly
            if self.config.nesterov:
                velocity = torch.addcmul(g, velocity, momentum)
            p.addcmul_(velocity, descend)


@dataclass(frozen=True)
class Adam:
    """Kingma and Ba 2015 (arXiv 1412.6980). Weight decay is added to the gradient."""

    config: configs.Adam

    def init(self, params: Params) -> State:
        return {"first": _zeros(params), "second": _zeros(params)}

    def update(self, params: Params, grads: Params, state: State, hyper: Mapping[str, Tensor], step: Tensor, alive: Tensor) -> None:
        for name, p in params.items():
            (decay,) = _gate(alive, p, hyper["wd"])
            g = torch.addcmul(grads[name], p, decay) if _decays(name) else grads[name]
            _adam_step(p, g, state["first"][name], state["second"][name], hyper, step, alive)


@dataclass(frozen=True)
class AdamW:
    """Loshchilov and Hutter 2019 (arXiv 1711.05101): p shrinks by lr * wd, apart from the gradient.

    With decay_to "start" it is the distance from where p began that shrinks so (Power et al. 2022, arXiv 2201.02177, figure 2); the start is kept in the state.
    """

    config: configs.AdamW

    def init(self, params: Params) -> State:
        state = {"first": _zeros(params), "second": _zeros(params)}
        if self.config.decay_to == "start":
            state["start"] = {name: p.clone(memory_format=torch.contiguous_format) for name, p in params.items() if _decays(name)}
        return state

    def update(self, params: Params, grads: Params, state: State, hyper: Mapping[str, Tensor], step: Tensor, alive: Tensor) -> None:
        for name, p in params.items():
            if _decays(name) and self.config.decay_to == "zero":
                (decay,) = _gate(alive, p, hyper["lr"] * hyper["wd"])
                p.mul_(1 - decay)
            elif _decays(name):
                change = (p - state["start"][name]) * _spread(hyper["lr"] * hyper["wd"], p)
                p.sub_(torch.where(_spread(alive, p), change, 0.0))  # x - 0.0 is x, too
            _adam_step(p, grads[name], state["first"][name], state["second"][name], hyper, step, alive)


@dataclass(frozen=True)
class Adagrad:
    """Duchi, Hazan, Singer 2011, diagonal form; torch's with lr_decay 0 and accumulators from 0. Weight decay is added to the gradient."""

    config: configs.Adagrad

    def init(self, params: Params) -> State:
        return {"sum": _zeros(params)}

    def update(self, params: Params, grads: Params, state: State, hyper: Mapping[str, Tensor], step: Tensor, alive: Tensor) -> None:
        for name, p in params.items():
            descend, decay = _gate(alive, p, -hyper["lr"], hyper["wd"])
            eps = _spread(torch.where(alive, hyper["eps"], 1.0), p)
            g = torch.addcmul(grads[name], p, decay) if _decays(name) else grads[name]
            total = state["sum"][name].addcmul_(g, g)
            p.addcmul_(g.div_(total.sqrt().add_(eps)), descend)


@dataclass(frozen=True)
class Muon:
    """Keller Jordan 2024 (kellerjordan.github.io/posts/muon) on every group of matrices [*L, ..., in, out]; AdamW, with the ``adam_`` values, on "rest" and
    "undecayed".

    A matrix moves by its momentum with all singular values made about 1, times sqrt(max(1, out / in)).
    ``dtype`` of the Newton-Schulz iteration: None = bfloat16 on CUDA (it only needs the direction), the parameters' own elsewhere.
    """

    config: configs.Muon
    dtype: torch.dtype | None = None
    adamw: AdamW = AdamW(configs.AdamW())

    def init(self, params: Params) -> State:
        rest, matrices = _split(params)
        return {"momentum": _zeros(matrices), **self.adamw.init(rest)}

    def update(self, params: Params, grads: Params, state: State, hyper: Mapping[str, Tensor], step: Tensor, alive: Tensor) -> None:
        rest, matrices = _split(params)
        self.adamw.update(rest, grads, state, {name.removeprefix("adam_"): c for name, c in hyper.items() if name.startswith("adam_")}, step, alive)

        for name, p in matrices.items():
            g, buffer = grads[name], state["momentum"][name]
            move, decay = _gate(alive, p, 1 - hyper["momentum"], hyper["lr"] * hyper["wd"])
            p.mul_(1 - decay)
            buffer.lerp_(g, move)
            change = self._orthogonalised(g.lerp(buffer, 1 - move) if self.config.nesterov else buffer)
            change = change * _spread(hyper["lr"] * math.sqrt(max(1, p.shape[-1] / p.shape[-2])), p)
            p.sub_(torch.where(_spread(alive, p), change, 0.0))  # x - 0.0 is x, too

    def _orthogonalised(self, direction: Tensor) -> Tensor:
        dtype = self.dtype or (torch.bfloat16 if direction.is_cuda else direction.dtype)
        result = newton_schulz(wide(direction), self.config.newton_schulz_steps, dtype)
        return result if result.shape == direction.shape else result.mT


def wide(matrix: Tensor) -> Tensor:
    """[..., short, long], transposed if need be: the iteration's products are then the small ones."""
    return matrix.mT if matrix.shape[-2] > matrix.shape[-1] else matrix


def newton_schulz(matrices: Tensor, steps: int, dtype: torch.dtype, finish: int = 0) -> Tensor:
    """[..., short, long] -> the same singular vectors, with singular values near 1 (about 0.7 to 1.2 after 5 steps, unless tiny beside the largest).

    Each matrix is first divided by its own Frobenius norm, so that none of its singular values is above 1. Iterates in ``dtype``; a matrix of zeros stays.
    ``finish``: further steps, which bring what is near 1 to 1.
    """
    norm = torch.linalg.matrix_norm(matrices, keepdim=True)
    x = (matrices / norm.clamp(min=1e-7)).to(dtype).reshape(-1, *matrices.shape[-2:])  # [N, short, long]
    for a, b, c in [NEWTON_SCHULZ] * steps + [CONVERGENT] * finish:
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.to(matrices.dtype).view_as(matrices)


def gradient_norm(grad: Tensor) -> Tensor:
    """[*L, P] -> [*L], each run's Euclidean norm."""
    return torch.linalg.vecdot(grad, grad).sqrt()  # summed in pairs: vector_norm is 1e-5 off on long rows, and differently with other threads


def clip_scale(norm: Tensor, limit: Tensor) -> Tensor:
    """[*L] -> [*L]: what to multiply a gradient of this norm by, as ``torch.nn.utils.clip_grad_norm_`` does. A limit of 0 is none."""
    return torch.where(limit > 0, (limit / (norm + 1e-6)).clamp(max=1), 1.0)


def _adam_step(p: Tensor, g: Tensor, first: Tensor, second: Tensor, hyper: Mapping[str, Tensor], step: Tensor, alive: Tensor) -> None:
    """p -= lr * (first / (1 - beta1**t)) / (sqrt(second / (1 - beta2**t)) + eps) after both moments have taken in g; t = step + 1.

    The same with both corrections moved to [*L]: p -= lr * root / (1 - beta1**t) * first / (sqrt(second) + eps * root), root = sqrt(1 - beta2**t).
    """
    betas = torch.stack([hyper["beta1"], hyper["beta2"]])
    correction1, correction2 = (1 - betas.double() ** (step + 1)).to(betas.dtype)  # beta**t is near 1 at first: float32 would leave 1 - beta**t few digits
    root = correction2.sqrt()
    move1, move2, descend, eps = _gate(alive, p, *(1 - betas), -hyper["lr"] * root / correction1, hyper["eps"] * root)
    eps = torch.where(_spread(alive, p), eps, torch.inf)
    zero = _spread(alive * 0.0, p)

    first.lerp_(g, move1)
    work = g * g
    second.lerp_(work, move2)
    denominator = torch.sqrt(second, out=work).add_(eps)
    direction = torch.addcdiv(zero, first, denominator, out=work)  # dead: 0.0 + first / inf, where 0.0 + -0.0 is 0.0
    p.addcmul_(direction, descend)


def _gate(alive: Tensor, like: Tensor, *coefficients: Tensor) -> tuple[Tensor, ...]:
    """Each [*L] where alive, else -0.0 (from a product: graph compilers take the constants -0.0 and 0.0 for the same one), spread to meet ``like``.

    Stacked, which saves small operations when eager, and when compiled has them computed once a run, not again for every parameter.
    """
    gated = torch.where(alive, torch.stack(coefficients), alive * -1.0)
    return _spread(gated, like[None]).unbind()


def _spread(coefficient: Tensor, like: Tensor) -> Tensor:
    """[*L] -> [*L, 1, ...], to meet ``like`` [*L, ...]."""
    return coefficient.reshape(coefficient.shape + (1,) * (like.ndim - coefficient.ndim))


def _zeros(params: Params) -> Params:
    return {name: torch.zeros_like(p, memory_format=torch.contiguous_format) for name, p in params.items()}


def _decays(group: str) -> bool:
    return group != "undecayed"


def _split(params: Params) -> tuple[Params, Params]:
    """Groups "rest" and "undecayed", and the matrices."""
    vectors = ("rest", "undecayed")
    return {name: p for name, p in params.items() if name in vectors}, {name: p for name, p in params.items() if name not in vectors}


OPTIMIZERS: dict[type, Any] = {
    configs.SGD: SGD,
    configs.Adam: Adam,
    configs.AdamW: AdamW,
    configs.Adagrad: Adagrad,
    configs.Muon: Muon,
    configs.BaumWelch: BaumWelch,
}


def build(config: configs.OptimizerConfig) -> Optimizer:
    return OPTIMIZERS[type(config)](config)
