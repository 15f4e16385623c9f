"""What is done to gradients and weights beside the optimizer's update, per run: filters, directions, noise, a fixed length of the weights.

    asked = build(runs, present, device)                            # what the runs of a fleet ask for; their values along R
    state = init(runs[0], flat)                                     # lies beside the optimizer's state and is saved and compacted with it
    grad = changed(asked, layout, flat, grad, state, step, alive)   # [R, P] -> [R, P], between clipping and the optimizer

Everything works on the buffers [R, P] of ``layout``; nothing is reduced over runs and nothing asks the host. What no run asks for costs
nothing. A run that is not alive keeps every bit of its state, and its gradient stays 0.

Not here: clipping and decay, towards 0 or towards the start, which are the optimizers'.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from shoal import rng
from shoal.config import RunConfig
from shoal.config.optimizers import Gradient, Weights
from shoal.contracts import Params, State
from shoal.nn.init import normal
from shoal.train.layout import Layout
from shoal.train.optimizers import gradient_norm, newton_schulz, wide

RAISE, FINISH = 11, 3  # Newton-Schulz steps: in float32 they bring singular values from 1e-6 of the matrix's length on to 1, within 1e-6


class Noise(NamedTuple):
    std: Tensor  # float32 [R]
    key: Tensor  # int64 [R]


class Interventions(NamedTuple):
    gradient: Gradient  # of which the fields that are the same for all runs count
    weights: Weights
    gain: Tensor  # float32 [R]
    decay: Tensor  # float32 [R]
    gradient_noise: Noise | None  # None: of no run
    weight_noise: Noise | None


def build(runs: Sequence[RunConfig], present: Sequence[int], device: torch.device | str) -> Interventions:
    """Of ``runs`` as born those ``present``, in this order."""
    here = [runs[r] for r in present]
    order = torch.tensor([run.seeds.order for run in here], device=device)

    def column(value: Callable[[RunConfig], float]) -> Tensor:
        return torch.tensor([value(run) for run in here], dtype=torch.float32, device=device)

    def noise(purpose: str, std: Callable[[RunConfig], float]) -> Noise | None:
        return Noise(column(std), rng.key(order, purpose)) if any(std(run) > 0 for run in runs) else None

    return Interventions(
        gradient=runs[0].gradient,
        weights=runs[0].weights,
        gain=column(lambda run: run.gradient.filter_gain),
        decay=column(lambda run: run.gradient.filter_decay),
        gradient_noise=noise("gradient noise", lambda run: run.gradient.noise),
        weight_noise=noise("weight noise", lambda run: run.weights.noise),
    )


def idle(runs: Collection[RunConfig]) -> list[str]:
    """What a reader should be told of settings that do nothing in any of these runs."""
    found, default = [], Gradient()
    if all(run.gradient.filter == "none" for run in runs):
        names = [n for n in ("filter_gain", "filter_decay", "filter_window") if any(getattr(run.gradient, n) != getattr(default, n) for run in runs)]
        found += [f"gradient.{name} has no effect, for gradient.filter is none; set it to ema or ma" for name in names]
    if any(getattr(run.optimizer, "decay_to", "zero") == "start" for run in runs) and all(getattr(run.optimizer, "wd", 0) == 0 for run in runs):
        found.append("optimizer.decay_to has no effect, for optimizer.wd is 0")
    return found


def init(run: RunConfig, flat: Tensor) -> State:
    """What is remembered of each run, from its parameters [R, P] at the start: moment -> {"flat": [R, ...]}.

    The window of a moving average holds ``filter_window`` gradients: that many times the memory of the parameters, and as much in every checkpoint.
    """
    state: State = {}
    if run.gradient.filter == "ema":
        state["ema"] = {"flat": torch.zeros_like(flat)}
    if run.gradient.filter == "ma":
        state["window"] = {"flat": flat.new_zeros(flat.shape[0], run.gradient.filter_window, flat.shape[1])}
    if run.weights.fixed_norm:
        state["length"] = {"flat": gradient_norm(flat.double()).to(flat.dtype)}
    return state


def changed(asked: Interventions, layout: Layout, flat: Tensor, grad: Tensor, state: State, step: Tensor, alive: Tensor) -> Tensor:
    """The clipped mean gradient [R, P] -> what the optimizer is handed. ``step``: int64 scalar, updates made; ``alive`` bool [R], gradients elsewhere are 0."""
    config = asked.gradient
    if config.filter == "none" and config.direction == "plain" and asked.gradient_noise is None:
        return grad
    if config.filter != "none":
        slow = (exponential_mean if config.filter == "ema" else moving_mean)(asked, grad, state, step, alive)
        grad = grad + asked.gain.unsqueeze(-1) * slow
    if config.direction == "orthogonal":
        grad = layout.pack({name: orthogonal(g, layout.view(flat, name)) for name, g in layout.views(grad).items()}, 1)
    if config.direction == "egalitarian":
        grad = layout.pack(egalitarian(layout.views(grad)), 1)
    if asked.gradient_noise is not None:
        grad = grad + draw(asked.gradient_noise, layout, step)
    return torch.where(alive.unsqueeze(-1), grad, 0.0)


def exponential_mean(asked: Interventions, grad: Tensor, state: State, step: Tensor, alive: Tensor) -> Tensor:
    """m = decay m + (1 - decay) g, which at the first step is g itself. [R, P]; Lee et al. 2024, Grokfast-EMA (arXiv 2405.20233)."""
    mean = state["ema"]["flat"]
    new = torch.where(step == 0, grad, torch.lerp(grad, mean, asked.decay.unsqueeze(-1)))
    return mean.copy_(torch.where(alive.unsqueeze(-1), new, mean))


def moving_mean(asked: Interventions, grad: Tensor, state: State, step: Tensor, alive: Tensor) -> Tensor:
    """The mean of the last ``filter_window`` gradients, this one counted; 0 while there were fewer. [R, P]; Grokfast-MA, same paper.

    Summed anew at every step: a running sum would keep the rounding errors of large early gradients, beside which late ones are nothing.
    """
    window = state["window"]["flat"]
    place = (step % window.shape[1]).view(1)
    old = window.index_select(1, place)
    window.index_copy_(1, place, torch.where(alive.view(-1, 1, 1), grad.unsqueeze(1), old))
    return torch.where(step + 1 >= window.shape[1], window.mean(1), 0.0)


def orthogonal(grad: Tensor, weights: Tensor) -> Tensor:
    """One parameter's gradient [R, ...] without its part along the weights, at its old length (Prieto et al. 2025, arXiv 2501.04697: ⊥Grad).

    In float64, for squares of late gradients underflow in float32. Where the weights are all 0 the gradient is unchanged; where nothing is left it is 0.
    """
    g, w = (x.reshape(len(x), -1).double() for x in (grad, weights))
    share = _ratio(torch.linalg.vecdot(w, g), torch.linalg.vecdot(w, w))
    rest = g - share.unsqueeze(-1) * w
    scale = _ratio(gradient_norm(g), gradient_norm(rest))
    return (scale.unsqueeze(-1) * rest).to(grad.dtype).view_as(grad)


def egalitarian(grads: Params) -> Params:
    """Every matrix [R, in, out] with all its singular values made 1: (G G^T)^(-1/2) G (Pasand and Dohmatob 2025, arXiv 2510.04930).

    What is no matrix (biases, norms) stays as it is. A singular value of 0 stays 0, as with a pseudo-inverse; those below 1e-6 of the matrix's length (the
    root of the sum of squares), where gradients are rounding errors, come out between 0 and 1, in proportion when far below.
    Its authors' scripts do so to some hidden matrices only, until test accuracy is at 95 %, and with an absolute limit of 1e-6 or 1e-9 in place of ours;
    here it is every matrix, embeddings and head among them, to the end.
    """

    alike: dict[tuple[int, ...], list[str]] = {}  # those of one shape when they are wide, at once
    for name, grad in grads.items():
        if grad.ndim == 3:
            alike.setdefault(wide(grad).shape, []).append(name)
    results: Params = {}
    for names in alike.values():
        matrices = torch.stack([wide(grads[name]) for name in names])  # [N, R, short, long]
        largest = matrices.abs().amax((-2, -1), keepdim=True)  # so that the norm of a tiny matrix does not underflow
        polar = newton_schulz(matrices / torch.where(largest > 0, largest, 1.0), RAISE, matrices.dtype, FINISH)
        for name, result in zip(names, polar.unbind(), strict=True):
            results[name] = result if result.shape == grads[name].shape else result.mT
    return grads | results


def draw(noise: Noise, layout: Layout, step: Tensor) -> Tensor:
    """Gaussian noise [R, P] of this step, 0 in the layout's gaps.

    The same bits whatever the fleet; on another device the last may differ, as logarithms do. (On gradients it comes before the optimizer; the code of
    Power et al. 2022 adds it to Adam's quotient, where it is not divided by the second moment.)
    """
    draws = normal(rng.fold(noise.key, step), layout.size) * noise.std.unsqueeze(-1)
    return layout.pack(layout.views(draws), 1)


def disturbed(noise: Noise, layout: Layout, flat: Tensor, step: Tensor) -> Tensor:
    """The weights [R, P] this training step computes with (Power et al. 2022, arXiv 2201.02177, figure 2: noise on the weights)."""
    return flat + draw(noise, layout, step)


def hold_length(flat: Tensor, state: State, alive: Tensor) -> None:
    """All weights of a run together scaled back to their length at initialisation, [R, P] in place (Liu et al. 2022, arXiv 2210.01117: Omnigrok)."""
    scale = _ratio(state["length"]["flat"].double(), gradient_norm(flat.double())).to(flat.dtype)
    flat.copy_(torch.where(alive.unsqueeze(-1), flat * scale.unsqueeze(-1), flat))


def _ratio(a: Tensor, b: Tensor) -> Tensor:
    """a / b, and 0 where b is 0."""
    return torch.where(b > 0, a / b, 0.0)
