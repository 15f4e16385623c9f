"""The configs of the optimizers; what each does is in ``shoal/train/optimizers.py``. lr is the peak: the schedule multiplies it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from shoal.config.fields import PerRun, check


def _check(config: OptimizerConfig) -> None:
    for name, value in vars(config).items():
        if "beta" in name or name == "momentum":
            check(0 <= value < 1, name, f"must lie in [0, 1), not {value}")
        elif name.endswith(("lr", "wd", "eps")):
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


OptimizerConfig = SGD | Adam | AdamW | Adagrad | Muon
