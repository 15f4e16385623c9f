"""Milliseconds of the selective scan on a CPU: shoal's two forms, the loop that indexes time (as public slow paths do), mambapy's parallel scan.

    python benchmarks/scan.py                              # both shapes and a fleet, one thread and two
    python benchmarks/scan.py --threads 1 --repeats 21

Float32, in one process, the forms in turn, so that what disturbs one disturbs all: median [range] of ``--repeats`` (of 3 for a form that takes over a second).
"times" is its forward and backward over that of the sequential form: above 1, sequential is faster. "kept" is what the forward pass keeps for the backward,
inputs included. No timing is asserted anywhere. The GPU's is ``scan_h100.py``.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from importlib.util import find_spec

import torch
from torch import Tensor
from torch.nn import functional as F

from shoal.nn import selective_scan
from shoal.train.memory import keep_freed_memory

SHAPES = {"long": (4, 256, 128, 16), "short": (64, 32, 16, 16), "fleet": (1024, 32, 16, 16)}  # batch, length, channels, states; a fleet is 16 runs of 64 rows
LIMIT = 20.0  # seconds a form may take once


def indexed(u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor) -> Tensor:
    step = F.softplus(delta)
    decay, inputs = (step.unsqueeze(-1) * A).exp(), (step * u).unsqueeze(-1) * B.unsqueeze(-2)
    state, outputs = torch.zeros_like(decay[:, 0]), []
    for t in range(u.shape[1]):
        state = decay[:, t] * state + inputs[:, t]
        outputs.append((state @ C[:, t].unsqueeze(-1)).squeeze(-1))
    return torch.stack(outputs, dim=1) + D * u


def mambapy(u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor) -> Tensor:
    from mambapy.pscan import pscan

    step = F.softplus(delta)
    states = pscan((step.unsqueeze(-1) * A).exp(), (step * u).unsqueeze(-1) * B.unsqueeze(-2))
    return (states @ C.unsqueeze(-1)).squeeze(-1) + D * u


def sequential(*inputs: Tensor) -> Tensor:
    return selective_scan(*inputs, form="sequential")[0]


def reference(*inputs: Tensor) -> Tensor:
    return selective_scan(*inputs, form="reference")[0]


FORMS: dict[str, Callable[..., Tensor]] = {"sequential": sequential, "reference": reference, "indexed loop": indexed, "mambapy pscan": mambapy}


def inputs_of(batch: int, length: int, channels: int, size: int) -> list[Tensor]:
    shapes = [(batch, length, channels), (batch, length, channels), (channels, size), (batch, length, size), (batch, length, size), (channels,)]
    found = [torch.randn(shape) for shape in shapes]
    found[2] = -torch.arange(1.0, size + 1).repeat(channels, 1)
    return [x.requires_grad_() for x in found]


def once(form: Callable[..., Tensor], inputs: list[Tensor]) -> tuple[float, float, int]:
    """Seconds of the forward pass without gradients, seconds of forward and backward, bytes kept between the two."""
    began = time.perf_counter()
    with torch.no_grad():
        form(*inputs)
    forward = time.perf_counter() - began
    kept: dict[int, int] = {}

    def keep(x: Tensor) -> Tensor:
        kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    began = time.perf_counter()
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        y = form(*inputs)
    torch.autograd.grad(y, inputs, torch.ones_like(y))
    return forward, time.perf_counter() - began, sum(kept.values())


def shown(seconds: list[float]) -> str:
    low, middle, high = (1e3 * f(seconds) for f in (min, statistics.median, max))
    return f"{middle:9.2f} {f'[{low:.2f}, {high:.2f}]':20}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="*", default=list(SHAPES), choices=list(SHAPES))
    parser.add_argument("--threads", type=int, nargs="*", default=[1, 2])
    parser.add_argument("--repeats", type=int, default=11)
    args = parser.parse_args()
    keep_freed_memory()  # as a fleet does
    torch.manual_seed(0)
    forms = {name: form for name, form in FORMS.items() if name != "mambapy pscan" or find_spec("mambapy")}
    for threads in args.threads:
        torch.set_num_threads(threads)
        for shape in args.shapes:
            batch, length, channels, size = SHAPES[shape]
            print(f"\n{shape}: batch {batch}, length {length}, channels {channels}, states {size}; threads {threads}, torch {torch.__version__}")
            print(f"{'':14}{'forward, ms':>12}{'':19}{'forward + backward, ms':>22}{'':9}{'times':>8}{'kept, MiB':>11}", flush=True)
            inputs = inputs_of(batch, length, channels, size)
            warm = {name: sum([once(form, inputs), once(form, inputs)][-1][:2]) for name, form in forms.items()}  # the first time is not like the others
            found: dict[str, list[tuple[float, float, int]]] = {name: [] for name in forms}
            for repeat in range(args.repeats):
                for name, form in forms.items():
                    if repeat < (args.repeats if warm[name] < 1 else 3) and warm[name] < LIMIT:
                        found[name].append(once(form, inputs))
            base = statistics.median(both for _, both, _ in found["sequential"])
            for name, runs in found.items():
                if not runs:
                    print(f"{name:14} over {LIMIT:g} s")
                    continue
                forwards, boths, kept = (list(column) for column in zip(*runs, strict=True))
                print(f"{name:14}{shown(forwards)}  {shown(boths)}{statistics.median(boths) / base:9.2f}{kept[0] / 2**20:11.1f}  n {len(runs)}", flush=True)


if __name__ == "__main__":
    main()
