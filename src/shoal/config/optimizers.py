"""The configs of the optimizers; what each does is in ``shoal/train/optimizers.py``. lr is the peak: the schedule multiplies it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from shoal.config.fields import PerRun, check


def _check(config: OptimizerConfig) -> None:
    for name, value in vars(config).items():
        if "beta" in name or name == "momentum":
            check(0 <= value < 1, name, f"must lie in [0, 1), not {value}")
        elif name.endswith(("lr", "wd", "eps", "smoothing")):
            check(0 <= value < float("inf"), name, f"must be a finite number of 0 or more, not {value}")


@dataclass(frozen=True, kw_only=True)
class SGD:
    lr: PerRun[float] = 0.1
    wd: PerRun[float] = 0.0  # added to the gradient (L2), as in torch.optim.SGD
    momentum: PerRun[float] = 0.0
    nesterov: bool = False
    __post_init__ = _check


@dataclass(frozen=True, kw_only=True)
class Adam:
    lr: PerRun[float] = 1e-3
    wd: PerRun[float] = 0.0  # added to the gradient (L2), as in torch.optim.Adam
    beta1: PerRun[float] = 0.9
    beta2: PerRun[float] = 0.999
    eps: PerRun[float] = 1e-8
    __post_init__ = _check


@dataclass(frozen=True, kw_only=True)
class AdamW:
    lr: PerRun[float] = 1e-3
    wd: PerRun[float] = 0.01  # decoupled: p -= lr wd p
    beta1: PerRun[float] = 0.9
    beta2: PerRun[float] = 0.999
    eps: PerRun[float] = 1e-8
    decay: Literal["all", "matrices"] = "all"  # matrices: not biases, norms and other vectors
    decay_to: Literal["zero", "start"] = "zero"  # start: p -= lr wd (p - p at initialisation)
    __post_init__ = _check


@dataclass(frozen=True, kw_only=True)
class Adagrad:
    lr: PerRun[float] = 1e-2
    wd: PerRun[float] = 0.0  # added to the gradient (L2), as in torch.optim.Adagrad
    eps: PerRun[float] = 1e-10
    __post_init__ = _check


@dataclass(frozen=True, kw_only=True)
class Muon:
    """Muon on the model's hidden matrices, AdamW on all the rest."""

    lr: PerRun[float] = 0.02
    wd: PerRun[float] = 0.0
    momentum: PerRun[float] = 0.95
    nesterov: bool = True
    newton_schulz_steps: int = 5
    adam_lr: PerRun[float] = 1e-3
    adam_wd: PerRun[float] = 0.0
    adam_beta1: PerRun[float] = 0.9
    adam_beta2: PerRun[float] = 0.98
    adam_eps: PerRun[float] = 1e-8

    def __post_init__(self) -> None:
        _check(self)
        check(self.newton_schulz_steps >= 1, "newton_schulz_steps", f"must be 1 or more, not {self.newton_schulz_steps}")


@dataclass(frozen=True, kw_only=True)
class BaumWelch:
    """Expectation maximisation of a hidden Markov model (Baum et al. 1970), by the objective "likelihood"."""

    lr: PerRun[float] = 1.0  # how far the probabilities move towards the expected shares: 1 = all the way (with the whole table as the batch, classic EM)
    smoothing: PerRun[float] = 0.0  # added to every expected count of a token, as a share of a batch's mean count
    __post_init__ = _check


@dataclass(frozen=True, kw_only=True)
class Gradient:
    """What becomes of a run's gradient between clipping and the optimizer, in this order: filter, direction, noise. See ``shoal/train/interventions.py``."""

    filter: Literal["none", "ema", "ma"] = "none"  # Grokfast: g + gain * (running mean of the gradients)
    filter_gain: PerRun[float] = 2.0  # lambda there
    filter_decay: PerRun[float] = 0.98  # alpha there, of the exponential mean
    filter_window: int = 100  # steps of the moving average, which adds nothing until it is full, and takes so many times the weights' memory
    direction: Literal["plain", "orthogonal", "egalitarian"] = "plain"
    # orthogonal: without the part along the weights, each tensor at its old length; egalitarian: each matrix with all its singular values made 1
    noise: PerRun[float] = 0.0  # standard deviation of Gaussian noise

    def __post_init__(self) -> None:
        check(0 <= self.filter_decay < 1, "filter_decay", f"must lie in [0, 1), not {self.filter_decay}")
        check(self.filter_window >= 1, "filter_window", f"must be 1 or more, not {self.filter_window}")
        for name in ("filter_gain", "noise"):
            check(0 <= getattr(self, name) < float("inf"), name, f"must be a finite number of 0 or more, not {getattr(self, name)}")


@dataclass(frozen=True, kw_only=True)
class Weights:
    """What is done to a run's weights beside the optimizer's update. See ``shoal/train/interventions.py``."""

    noise: PerRun[float] = 0.0  # standard deviation of Gaussian noise on the weights the training step computes with
    fixed_norm: bool = False  # after every update all weights together are scaled back to their length at initialisation

    def __post_init__(self) -> None:
        check(0 <= self.noise < float("inf"), "noise", f"must be a finite number of 0 or more, not {self.noise}")


OptimizerConfig = SGD | Adam | AdamW | Adagrad | Muon | BaumWelch
