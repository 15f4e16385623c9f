"""Linear attention in chunks beside its explicit T x T form and softmax attention, in one run; and how far random features are from exact attention.

    python benchmarks/linear_attention.py                          # CPU, and CUDA where there is one
    python benchmarks/linear_attention.py --lengths 8192 --compile
    python benchmarks/linear_attention.py --features               # a table of errors, on the CPU

Forward and backward, the forms in turn, so that what disturbs one disturbs all: median [range] of ``--repeats`` after two that do not count. "times" is a
form's time over that in chunks: above 1, chunks are faster. Memory is the peak beside the inputs on a GPU, what is kept for the backward pass on a CPU.
No timing is asserted anywhere.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from shoal.mixers.linear_attention import Elu, linear_attention
from shoal.mixers.performer import RandomFeatures, directions
from shoal.train.memory import keep_freed_memory

HEADS, WIDTH = 8, 64
ROWS = {"cpu": 1, "cuda": 2}
LENGTHS = {"cpu": [512, 1024, 2048], "cuda": [512, 2048, 8192]}
DTYPES = {"cpu": [torch.float32], "cuda": [torch.float32, torch.bfloat16]}
COUNTS, DRAWS = [16, 64, 256, 1024], 64


def chunks(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    of = Elu(WIDTH)
    return linear_attention(of.queries(q), of.keys(k), v)[0]


def explicit(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    of = Elu(WIDTH)
    pairs = (of.queries(q).transpose(-3, -2) @ of.keys(k).transpose(-3, -2).mT).tril()
    total = pairs.sum(-1, keepdim=True, dtype=torch.float32)
    return ((pairs @ v.transpose(-3, -2)) / total).to(v.dtype).transpose(-3, -2)


def softmax(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = (y.transpose(-3, -2) for y in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(-3, -2)


FORMS: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {"chunks": chunks, "explicit": explicit, "softmax": softmax}


def once(form: Callable[..., Tensor], inputs: list[Tensor]) -> float:
    """Seconds of forward and backward."""
    wait = torch.cuda.synchronize if inputs[0].is_cuda else (lambda: None)
    wait()
    began = time.perf_counter()
    y = form(*inputs)
    torch.autograd.grad(y, inputs, torch.ones_like(y))
    wait()
    return time.perf_counter() - began


def memory(form: Callable[..., Tensor], inputs: list[Tensor]) -> float:
    """MiB."""
    if inputs[0].is_cuda:
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        once(form, inputs)
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    kept: dict[int, int] = {}

    def keep(x: Tensor) -> Tensor:
        kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        form(*inputs)
    return sum(kept.values()) / 2**20


def shown(seconds: list[float]) -> str:
    low, middle, high = (1e3 * f(seconds) for f in (min, statistics.median, max))
    return f"{middle:10.2f} {f'[{low:.2f}, {high:.2f}]':20}"


def times(device: str, lengths: list[int], repeats: int, compile: bool) -> None:
    name = torch.cuda.get_device_name() if device == "cuda" else f"{torch.get_num_threads()} threads"
    for dtype in DTYPES[device]:
        kind = f"{str(dtype).removeprefix('torch.')}{', compiled' if compile else ''}"
        for length in lengths:
            print(f"\n{device}, {name}: {ROWS[device]} rows of {length:,}, {HEADS} heads of {WIDTH}, {kind}; torch {torch.__version__}")
            print(f"{'':10}{'forward + backward, ms':>24}{'':11}{'times':>8}{'memory, MiB':>13}", flush=True)
            torch.compiler.reset()
            forms = {form: torch.compile(f, dynamic=False) if compile else f for form, f in FORMS.items()}
            inputs = [torch.randn(ROWS[device], length, HEADS, WIDTH, device=device, dtype=dtype, requires_grad=True) for _ in range(3)]
            found = {form: [] for form in forms}
            for repeat in range(repeats + 2):
                for form, f in forms.items():
                    seconds = once(f, inputs)
                    if repeat >= 2:
                        found[form].append(seconds)
            base = statistics.median(found["chunks"])
            for form, seconds in found.items():
                print(f"{form:10}{shown(seconds)}{statistics.median(seconds) / base:12.2f}{memory(forms[form], inputs):13.1f}  n {repeats}", flush=True)


def errors(scale: float, length: int = 100) -> list[float]:
    """Root mean square over ``DRAWS`` of the difference to exact attention, where values are N(0, 1) and queries and keys N(0, scale^2)."""
    draw = torch.Generator().manual_seed(0)
    q, k, v = (s * torch.randn(1, length, 1, WIDTH, generator=draw) for s in (scale, scale, 1.0))
    exact, found = softmax(q, k, v), []
    for count in COUNTS:
        features, squares = RandomFeatures(WIDTH, count), []
        for seed in range(DRAWS):
            features.weight = directions(torch.tensor(seed), WIDTH, count)
            y, _ = linear_attention(features.queries(q), features.keys(k), v)
            squares.append((y - exact).square().mean().item())
        found.append(statistics.fmean(squares) ** 0.5)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), help="both, where there are both")
    parser.add_argument("--lengths", type=int, nargs="*")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--features", action="store_true")
    args = parser.parse_args()
    if args.features:
        print(f"error of attention by random features: root mean square over {DRAWS} draws; heads of {WIDTH}, 100 positions, values N(0, 1)")
        print(f"{'queries, keys':16}{''.join(f'{count:>10}' for count in COUNTS)}   slope")
        for scale in (0.25, 0.5, 1.0):
            found = errors(scale)
            points = [torch.tensor(values, dtype=torch.float64).log() for values in (COUNTS, found)]
            x, y = (p - p.mean() for p in points)
            print(f"{f'N(0, {scale:g}^2)':16}{''.join(f'{error:10.4f}' for error in found)}{float((x * y).sum() / (x * x).sum()):8.2f}", flush=True)
        return
    keep_freed_memory()  # as a fleet does
    torch.manual_seed(0)
    for device in (args.device,) if args.device else ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",):
        times(device, args.lengths or LENGTHS[device], args.repeats, args.compile)


if __name__ == "__main__":
    main()
