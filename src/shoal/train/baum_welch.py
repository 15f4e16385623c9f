"""Baum-Welch: expectation maximisation of hidden Markov models (Baum, Petrie, Soules, Weiss 1970), from gradients alone.

The expected number of times a parameter was used is the slope of the log likelihood by its logarithm, so that the gradient is the E-step, and no backward
recursion need be written (Eisner 2016, "Inside-outside and forward-backward algorithms are just backprop"): with p(x) the sum over paths s of the product of
what each uses, d log p(x) / d log a = sum over s of p(s | x) (times s uses a) = E[times a is used | x] = n_a. That holds for parameters that are free to have
any sum, so the objective "likelihood" differentiates the model that way, and -gradient is n (per scored token, as fleets divide by the weights: a scale, which
cancels). The M-step is n over its row's sum: the softmax's own gradient, n_a - a * (sum of the row's n), would lack just those sums.

With lr below 1 it is stepwise (Cappe, Moulines 2009, arXiv 0712.4273): statistics S <- (1 - lr) S + lr n and parameters S over its row's sum; a row's first
S is its present probabilities times the first sum of n there, so that lr is how far the first step goes, too. lr 1 forgets: with all data as one batch, EM.

    optimizer.update(params, grads, state, {"lr": lr, "smoothing": smoothing}, step, alive)     # params: name -> log probabilities [*L, ..., K]
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from shoal.config import optimizers as configs
from shoal.contracts import Params, State

SMALLEST = 1e-35  # probability: its logarithm is finite in float32, and evidence can still lift it
SMOOTHED = "emission"  # the table whose counts are smoothed: tokens a batch happens to lack are not impossible


@dataclass(frozen=True)
class BaumWelch:
    """Rows that were not used in any batch so far stay as they are. Parameters come as whole tables, their distributions over the last axis."""

    config: configs.BaumWelch

    def init(self, params: Params) -> State:
        return {"counts": {name: torch.zeros_like(p, memory_format=torch.contiguous_format) for name, p in params.items()}}

    def update(self, params: Params, grads: Params, state: State, hyper: Mapping[str, Tensor], step: Tensor, alive: Tensor) -> None:
        for name, p in params.items():
            lr, smoothing, here = (x.reshape(x.shape + (1,) * (p.dim() - x.dim())) for x in (hyper["lr"], hyper["smoothing"], alive))
            counts = -grads[name].clamp(max=0)
            if name == SMOOTHED:
                counts = counts + smoothing * counts.mean((-2, -1), keepdim=True)
            past = state["counts"][name]
            begun = past.sum(-1, keepdim=True) > 0
            past = torch.where(begun, past, p.softmax(-1) * counts.sum(-1, keepdim=True))
            counts = past.lerp(counts, lr.expand_as(past))
            total = counts.sum(-1, keepdim=True)
            shares = counts / torch.where(total > 0, total, 1.0)
            new = torch.where(total > 0, shares.clamp(min=SMALLEST).log(), p)
            p.copy_(torch.where(here, new, p))
            state["counts"][name].copy_(torch.where(here, counts, state["counts"][name]))
