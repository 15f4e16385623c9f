"""Cross-entropy of a linear head on one GPU: compiled PyTorch on logits written out beside the fused forms. Under 90 seconds on an H100.

python benchmarks/linear_cross_entropy.py        # prints as it goes; ends with what to set, and which form "auto" should take where

Tied heads in bfloat16, forward and backward of the summed loss, with the argmax a training step measures. Plans of the Triton kernels are compiled
and checked against float64 in parallel processes, then timed here one by one. A form that fails (memory) is reported and left out.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import statistics
import time
from collections.abc import Callable
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from shoal.nn import linear_cross_entropy as fused
from shoal.nn import linear_cross_entropy_triton as kernels
from shoal.nn.linear_cross_entropy import Form, linear_cross_entropy
from shoal.nn.linear_cross_entropy_triton import Plan, forward, gradient

print = partial(print, flush=True)
BRAIN, FLOAT = torch.bfloat16, torch.float32


@dataclass(frozen=True)
class Case:
    runs: int
    rows: int
    width: int
    dtype: torch.dtype = BRAIN
    tokens: int = 50257

    def __str__(self) -> str:
        return f"({self.runs}, {self.rows}, {self.width}, {self.tokens}) {str(self.dtype)[6:]}"


CASES = [Case(32, 4096, 64), Case(8, 8192, 128), Case(1, 32768, 384), Case(1, 16384, 768), Case(8, 2048, 64, FLOAT)]
CUTS = {  # rows, tokens, warps, stages of the forward kernel; tokens and rows change places in the backward one
    "NARROW": [(128, 64, 4, 3), (128, 64, 8, 3), (128, 128, 8, 3), (64, 64, 4, 3), (64, 128, 4, 3), (128, 64, 4, 2), (128, 64, 8, 4), (256, 64, 8, 3)],
    "WIDE": [(128, 64, 8, 3), (128, 64, 8, 2), (128, 128, 8, 2), (64, 64, 4, 3), (64, 64, 4, 2), (64, 128, 4, 2), (64, 128, 8, 2), (128, 32, 4, 3)],
}


def plan_of(cut: tuple[int, int, int, int]) -> Plan:
    rows, tokens, warps, stages = cut
    return Plan(rows, tokens, warps, stages, tokens, rows, warps, stages)


def make(case: Case) -> tuple[Tensor, Tensor, Tensor]:
    """hidden [R, 1, N, D], table [R, V, D], targets; logits of a size they have in training."""
    hidden = torch.randn(case.runs, 1, case.rows, case.width, device="cuda", dtype=case.dtype, requires_grad=True)
    table = torch.randn(case.runs, case.tokens, case.width, device="cuda", dtype=case.dtype).mul_(2 * case.width**-0.5).requires_grad_()
    return hidden, table, torch.randint(case.tokens, (case.runs, 1, case.rows), device="cuda")


def wrong(cut: tuple[int, int, int, int], width: int) -> str:
    """Runs in a process of its own: compiles the plan as the case will use it and compares with float64; '' if right."""
    try:
        torch.manual_seed(0)
        hidden, table, targets = make(Case(1, 272, width))
        exact = [x.detach().double().requires_grad_() for x in (hidden, table)]
        nll, _ = linear_cross_entropy(exact[0], exact[1].mT, None, targets, form="reference")
        grad = torch.rand_like(nll)
        flat, weight, places = hidden[:, 0], table.mT, targets[:, 0]
        with torch.no_grad():
            got, _, log_sum, slope = forward(flat, weight, None, places, 0.0, True, plan_of(cut))
            grad_weight, _ = gradient(grad[:, 0].float(), flat, weight, None, places, log_sum, 0.0, plan_of(cut))
        by_hidden, by_table = torch.autograd.grad(nll, exact, grad)
        pairs = [("nll", got, nll[:, 0]), ("hidden", slope * grad[:, 0, :, None], by_hidden[:, 0]), ("weight", grad_weight.mT, by_table)]
        errors = {what: ((a.double() - b).norm() / b.norm()).item() for what, a, b in pairs}
        return "" if all(e < 1e-2 for e in errors.values()) else "wrong: " + ", ".join(f"{k} {v:.0e}" for k, v in errors.items())
    except Exception as error:
        return f"failed: {type(error).__name__}: {str(error)[-300:]}"


def milliseconds(function: Callable[[], object], repeats: int = 10) -> tuple[float, float]:
    """Median and spread (largest less smallest)."""
    for _ in range(2):
        function()
    marks = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(repeats)]
    for start, end in marks:
        start.record()
        function()
        end.record()
    torch.cuda.synchronize()
    times = [start.elapsed_time(end) for start, end in marks]
    return statistics.median(times), max(times) - min(times)


def whole(form: Form, compiled: bool, hidden: Tensor, table: Tensor, targets: Tensor) -> Callable[[], object]:
    def loss(hidden: Tensor, table: Tensor) -> tuple[Tensor, Tensor]:
        nll, best = linear_cross_entropy(hidden, table.mT, None, targets, form=form)
        return nll.sum(), (best == targets).sum()

    called = torch.compile(loss, fullgraph=True, dynamic=False) if compiled else loss
    return lambda: torch.autograd.grad(called(hidden, table)[0], [hidden, table])


def row(case: Case, name: str, function: Callable[[], object]) -> float:
    """Prints a line of the table; tokens per second, or 0 if it fails."""
    try:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        time_, spread = milliseconds(function)
    except Exception as error:
        print(f"| {case} | {name} | failed: {type(error).__name__}: {str(error)[:120]} |")
        return 0.0
    speed = case.runs * case.rows / time_ * 1e3
    products = 6 * speed * case.width * case.tokens / 1e12
    peak = torch.cuda.max_memory_allocated() / 1e9
    print(f"| {case} | {name} | 10 | {time_:.2f} | {spread:.2f} | {speed / 1e6:.3f} | {products:.0f} | {peak:.1f} |")
    return speed


def tuned(name: str, case: Case, verdicts: dict[tuple[int, int, int, int], Future[str]]) -> None:
    """Times both kernels for every plan that is right, and sets the best of each."""
    hidden, table, targets = make(case)
    flat, weight, places, grad = hidden.detach()[:, 0], table.detach().mT, targets[:, 0], torch.ones(case.runs, case.rows, device="cuda")
    _, _, log_sum, _ = forward(flat, weight, None, places, 0.0, False, kernels.plan(case.width, case.dtype))
    best: dict[str, tuple[float, tuple[int, int, int, int]]] = {}
    for cut, future in verdicts.items():
        if future.result():
            print(f"left out: {name} {cut}: {future.result()}")
            continue
        ways: dict[str, Callable[[], object]] = {
            "forward": partial(forward, flat, weight, None, places, 0.0, True, plan_of(cut)),
            "backward": partial(gradient, grad, flat, weight, None, places, log_sum, 0.0, plan_of(cut)),
        }
        for direction, way in ways.items():
            try:
                time_, spread = milliseconds(way, 5)
            except Exception as error:
                print(f"left out: {direction} {cut}: {type(error).__name__}: {str(error)[:120]}")
                continue
            shown = cut if direction == "forward" else (cut[1], cut[0], *cut[2:])
            print(f"| {case} | {direction} rows {shown[0]} tokens {shown[1]} warps {cut[2]} stages {cut[3]} | 5 | {time_:.2f} | {spread:.2f} |")
            best[direction] = min(best.get(direction, (time_, cut)), (time_, cut))
    if len(best) == 2:
        chosen = Plan(*plan_of(best["forward"][1])[:4], *plan_of(best["backward"][1])[4:])
        setattr(kernels, name, chosen)
        print(f"SET {name} = {chosen}  # {best['forward'][0]:.2f} + {best['backward'][0]:.2f} ms")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, default=max(1, min(14, (os.cpu_count() or 2) - 1)))
    parser.add_argument("--seconds", type=float, default=80, help="no case begins after this many")
    args = parser.parse_args()
    began = time.perf_counter()
    torch.manual_seed(0)
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, triton {kernels.triton.__version__}")
    pool = ProcessPoolExecutor(args.workers, mp_context=multiprocessing.get_context("spawn"))
    verdicts = {name: {cut: pool.submit(wrong, cut, width) for cut in CUTS[name]} for name, width in (("NARROW", 64), ("WIDE", 128))}
    pool.shutdown()  # all of them, so that nothing else runs on the GPU
    for name, case in zip(verdicts, CASES, strict=False):
        tuned(name, case, verdicts[name])
    print(f"plans after {time.perf_counter() - began:.0f} s")
    print("| (R, rows, D, V) | form | n | ms | spread | million tokens/s | TFLOP/s of products, none twice | peak GB |\n|---|---|---|---|---|---|---|---|")
    auto: list[str] = []
    for case in CASES:
        if time.perf_counter() - began > args.seconds:
            print(f"left out for want of time: {case}")
            continue
        tensors = make(case)
        speeds = {"reference": row(case, "logits written out, compiled", whole("reference", True, *tensors))}
        for numbers in (1 << 26, 1 << 28, 1 << 30) if case == CASES[2] else (fused.TILES["cuda"][1],):
            fused.TILES["cuda"] = (1 << 20, numbers)
            speed = row(case, f"chunked, {numbers >> 20} M numbers", whole("chunked", False, *tensors))
            speeds["chunked"] = max(speed, speeds.get("chunked", 0.0))
        fused.TILES["cuda"] = (1 << 20, 1 << 28)
        if case.width <= fused.MAX_WIDTH:
            speeds["triton"] = row(case, "triton", whole("triton", False, *tensors))
        fastest = max(speeds, key=lambda form: speeds[form])
        taken = fused._fastest(tensors[0], case.width, case.tokens)
        ratio = f"{speeds[fastest] / speeds['reference']:.2f} times the reference" if speeds["reference"] else "the reference failed"
        auto.append(f"AUTO {case}: {fastest} ({ratio}); now {taken}{'' if taken == fastest else ': CHANGE IT'}")
    print("\n".join(auto))
    print(f"{time.perf_counter() - began:.0f} s in all")


if __name__ == "__main__":
    main()
