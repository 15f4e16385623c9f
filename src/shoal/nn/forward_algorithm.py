"""The forward algorithm of hidden Markov models (Rabiner 1989, section III-A), with chains of its own in every run.

    belief_t = softmax(log prior_t + evidence_t)    prior_{t+1} = belief_t A

prior_t is what is known of the state at t before its token, belief_t after it, A the transition probabilities and evidence_t the log probability of the token
in every state. Every step is normalised by its largest term, so nothing underflows however long the sequence; what is lost is a state that is 1e38 times
less probable than another (in float64, 1e308).

A step needs the one before, so the loop is hidden from the compiler, which would write out all T steps; its gradient is written by hand.

    priors = forward_algorithm(prior, transition, evidence)     # [*L, B, T, N], the first of them that of time 1

Not here: where the probabilities come from (``shoal.models.hmm``), the most probable path.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

SMALLEST = 1e-30  # a prior below this passes no gradient on to speak of, and its inverse must be finite


def forward_algorithm(prior: Tensor, transition: Tensor, evidence: Tensor, mask: Tensor | None = None) -> Tensor:
    """prior [*L, B, N], of the first state; transition [*L, N, N], from row to column; evidence [*L, B, T, N] logs, finite; mask bool [*L, B, T].

    -> [*L, B, T, N], the prior of the state after each token. A token that is masked changes nothing, and no time passes with it.
    """
    time_first = evidence.movedim(-2, 0).contiguous()  # so that a step works on memory that lies together
    return _forward(prior.contiguous(), transition, time_first, None if mask is None else mask.movedim(-1, 0).contiguous()).movedim(0, -2)


@torch.library.custom_op("shoal::forward_algorithm", mutates_args=())
def _forward(prior: Tensor, transition: Tensor, evidence: Tensor, mask: Tensor | None) -> Tensor:
    """evidence [T, *L, B, N], mask [T, *L, B] -> [T, *L, B, N]."""
    priors = torch.empty_like(evidence)
    for t, (out, seen) in enumerate(zip(priors.unbind(), evidence.unbind(), strict=True)):
        torch.matmul(torch.softmax(prior.log() + seen, -1), transition, out=out)
        if mask is not None:
            torch.where(mask[t].unsqueeze(-1), out, prior, out=out)
        prior = out
    return priors


@_forward.register_fake
def _(prior: Tensor, transition: Tensor, evidence: Tensor, mask: Tensor | None) -> Tensor:
    return torch.empty_like(evidence)


@torch.library.custom_op("shoal::forward_algorithm_gradient", mutates_args=())
def _gradient(slope: Tensor, prior: Tensor, transition: Tensor, evidence: Tensor, mask: Tensor | None, priors: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of the first prior, the transitions and the evidence. With g_t that of prior_{t+1}: s_t = softmax'(g_t A^T) at belief_t is that of the
    evidence, and g_{t-1} = slope_{t-1} + s_t / prior_t."""
    before = torch.cat((prior.unsqueeze(0), priors[:-1]))
    belief = torch.softmax(before.log() + evidence, -1)
    inverse = before.clamp(min=SMALLEST).reciprocal()
    total, grad_evidence, after = torch.empty_like(evidence), torch.empty_like(evidence), torch.zeros_like(prior)
    for t in range(len(evidence) - 1, -1, -1):
        g = torch.add(slope[t], after, out=total[t])
        s = torch.ops.aten._softmax_backward_data(g @ transition.mT, belief[t], -1, belief.dtype)
        after = s * inverse[t]
        if mask is not None:
            there = mask[t].unsqueeze(-1)
            s, after = torch.where(there, s, 0.0), torch.where(there, after, g)
        grad_evidence[t].copy_(s)
    if mask is not None:
        total = torch.where(mask.unsqueeze(-1), total, 0.0)
    left, right = (x.movedim(0, -3).flatten(-3, -2) for x in (belief, total))  # [*L, T B, N]
    return after, left.mT @ right, grad_evidence


@_gradient.register_fake
def _(slope: Tensor, prior: Tensor, transition: Tensor, evidence: Tensor, mask: Tensor | None, priors: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(prior), torch.empty_like(transition, memory_format=torch.contiguous_format), torch.empty_like(evidence)


def _keep(ctx, inputs, output) -> None:
    ctx.has_mask = inputs[3] is not None
    ctx.save_for_backward(*(x for x in (*inputs, output) if x is not None))


def _backward(ctx, slope: Tensor) -> tuple[Tensor | None, ...]:
    prior, transition, evidence, *mask, priors = ctx.saved_tensors
    return *_gradient(slope, prior, transition, evidence, mask[0] if mask else None, priors), None


_forward.register_autograd(_backward, setup_context=_keep)


@register_flop_formula(torch.ops.shoal.forward_algorithm)
def _forward_flops(prior, transition, evidence, *rest, out_shape=None, **others) -> int:
    """Matrix products, from shapes; a multiply-add is 2."""
    return 2 * math.prod(evidence) * evidence[-1]


@register_flop_formula(torch.ops.shoal.forward_algorithm_gradient)
def _gradient_flops(slope, prior, transition, evidence, *rest, out_shape=None, **others) -> int:
    return 4 * math.prod(evidence) * evidence[-1]
