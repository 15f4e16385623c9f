"""The Triton scan on one GPU beside the official CUDA kernel: which plans are right, which are fastest, and the ratios. Under two minutes on an H100.

python benchmarks/scan_h100.py                    # prints as it goes; ends with what to set in src/shoal/nn/scan_triton.py

Plans are compiled and checked against float64 in parallel processes, then timed here one by one. A plan that fails is reported and left out.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec

import torch
from torch import Tensor

from shoal.nn import scan_triton
from shoal.nn.scan import selective_scan
from shoal.nn.scan_triton import Plan, backward, forward

print = partial(print, flush=True)
SOURCE = "state-spaces/mamba selective_scan_cuda, measured on one H100"
FLOAT, BRAIN = torch.float32, torch.bfloat16


@dataclass(frozen=True)
class Case:
    name: str
    shape: tuple[int, int, int, int, int]  # R, B, T, D, N
    dtype: torch.dtype
    official: tuple[float, float]  # milliseconds, forward and backward


CASES = [
    Case("long", (1, 64, 2048, 1536, 16), FLOAT, (6.64, 17.57)),
    Case("long", (1, 64, 2048, 1536, 16), BRAIN, (3.25, 14.57)),
    Case("short", (256, 64, 32, 16, 16), FLOAT, (1.42, 4.17)),
]
FORWARD = [(2, 4, None), (4, 4, None), (4, 4, 80), (4, 8, None), (4, 2, None), (8, 4, None), (8, 4, 80)]  # steps, warps, registers
BACKWARD = [  # chunk, steps, warps, registers; four steps take the longest to compile
    (32, 4, 4, None),
    (64, 4, 4, None),
    (4, 4, 4, None),
    (32, 2, 4, None),
    (64, 2, 4, None),
    (32, 2, 2, None),
    (32, 2, 4, 168),
    (32, 2, 4, 128),
    (2, 2, 4, None),
    (32, 1, 4, None),
]


def plans(direction: str) -> list[Plan]:
    if direction == "forward":
        return [Plan(32, steps, warps, registers, 2, 4, None) for steps, warps, registers in FORWARD]
    return [Plan(chunk, min(4, chunk), 4, None, steps, warps, registers) for chunk, steps, warps, registers in BACKWARD]


def shown(plan: Plan, direction: str) -> str:
    cut = (plan.steps, plan.warps, plan.registers) if direction == "forward" else (plan.back_steps, plan.back_warps, plan.back_registers)
    return f"chunk {plan.chunk:2d} steps {cut[0]} warps {cut[1]} registers {cut[2] or 'free'}"


Six = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]


def make(shape: tuple[int, ...], dtype: torch.dtype) -> Six:
    """u, delta, A, B, C, D."""
    R, B, T, D, N = shape
    u, delta, in_, out = (torch.randn(R, B, T, n, device="cuda").to(dtype) for n in (D, D, N, N))
    return u, 2 * delta - 3, -torch.rand(R, D, N, device="cuda") * N - 0.1, in_, out, torch.randn(R, D, device="cuda")


def wrong(plan: Plan, direction: str, name: str, dtype: torch.dtype) -> str:
    """Runs in a process of its own: compiles the plan as the case will use it and compares with float64; '' if right."""
    try:
        torch.manual_seed(0)
        tensors = make((2, 3, 32, 16, 16) if name == "short" else (2, 2, 77, 80, 16), dtype)
        exact = [x.double().requires_grad_() for x in tensors]
        y, _ = selective_scan(*exact, form="reference")
        dy = torch.randn_like(tensors[0])
        got, _, kept = forward(*tensors, None, True, plan)
        pairs = [("y", got, y)]
        if direction == "backward":
            grads = backward(dy, None, *tensors, kept, plan)[:6]
            pairs += list(zip(["u", "delta", "A", "B", "C", "D"], grads, torch.autograd.grad(y, exact, dy.double()), strict=True))
        errors = {what: ((a.double() - b).norm() / b.norm()).item() for what, a, b in pairs}
        tolerance = 1e-5 if dtype == FLOAT else 1e-2
        return "" if all(e < tolerance for e in errors.values()) else "wrong: " + ", ".join(f"{k} {v:.0e}" for k, v in errors.items())
    except Exception as error:
        return f"failed: {type(error).__name__}: {str(error)[-300:]}"


def milliseconds(function: Callable[[], object], repeats: int = 20) -> tuple[float, float]:
    """Median and spread (largest less smallest)."""
    for _ in range(3):
        function()
    marks = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(repeats)]
    for start, end in marks:
        start.record()
        function()
        end.record()
    torch.cuda.synchronize()
    times = [start.elapsed_time(end) for start, end in marks]
    return statistics.median(times), max(times) - min(times)


def copy_speed() -> float:
    a = torch.empty(1 << 28, device="cuda")
    b = torch.empty_like(a)
    return 2 * 4 * a.numel() / milliseconds(lambda: b.copy_(a))[0] / 1e9


Key = tuple[Plan, str, str, torch.dtype]


def checked(seconds: float, workers: int) -> set[Key]:
    """The plans that compile and are right."""
    pool = ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn"))
    wanted = [(plan, direction, case.name, case.dtype) for direction in ("backward", "forward") for case in CASES for plan in plans(direction)]
    futures = {pool.submit(wrong, *key): key for key in wanted}
    good: set[Key] = set()
    try:
        for future in as_completed(futures, timeout=seconds):
            plan, direction, name, dtype = futures[future]
            if future.exception() or future.result():
                print(f"left out: {direction} {name} {dtype} {shown(plan, direction)}: {future.exception() or future.result()}")
            else:
                good.add(futures[future])
    except TimeoutError:
        print(f"left out: {sum(not future.done() for future in futures)} plans that did not compile in {seconds:.0f} s")
    pool.shutdown(wait=False, cancel_futures=True)
    return good


def measure(case: Case, good: set[Key]) -> None:
    tensors = make(case.shape, case.dtype)
    dy, best, keeping = torch.randn_like(tensors[0]), {}, 0.0
    for direction, official in zip(("forward", "backward"), case.official, strict=True):
        rows = []
        for plan in plans(direction):
            if (plan, direction, case.name, case.dtype) not in good:
                continue
            try:
                if direction == "forward":
                    time_, spread = milliseconds(lambda plan=plan: forward(*tensors, None, True, plan))
                else:
                    _, _, kept = forward(*tensors, None, True, plan)
                    time_, spread = milliseconds(lambda plan=plan, kept=kept: backward(dy, None, *tensors, kept, plan))
                    keeping = milliseconds(lambda plan=plan: forward(*tensors, None, True, plan), 10)[0]  # a short chunk costs the other pass
            except Exception as error:
                print(f"left out: {direction} {shown(plan, direction)}: {type(error).__name__}: {str(error)[:200]}")
                continue
            rows.append((time_, keeping, plan))
            note = f" (forward {keeping:.3f})" if keeping else ""
            print(f"| {case.name} {str(case.dtype)[6:]} | {direction} | {shown(plan, direction)}{note} | {time_:.3f} | {spread:.3f} | {official / time_:.2f} |")
        if rows:
            best[direction] = min(rows, key=lambda row: row[0] + row[1])
    if len(best) == 2:
        (t_f, _, p_f), (t_b, _, p_b) = best["forward"], best["backward"]
        alone, _ = milliseconds(lambda: forward(*tensors, None, False, p_f))
        print(f"BEST {case.name} {str(case.dtype)[6:]}: forward {t_f:.3f} ms (without gradients {alone:.3f}), backward {t_b:.3f} ms; ", end="")
        print(f"official {case.official[0]} and {case.official[1]}: {sum(case.official) / (t_f + t_b):.2f} times faster in all")
        joined = Plan(p_b.chunk, min(p_f.steps, p_b.chunk), p_f.warps, p_f.registers, *p_b[4:])
        both = [milliseconds(lambda: forward(*tensors, None, True, joined))[0]]
        _, _, kept = forward(*tensors, None, True, joined)
        both.append(milliseconds(lambda: backward(dy, None, *tensors, kept, joined))[0])
        print(f"SET  {case.name.upper()} = {joined}  # {both[0]:.3f} + {both[1]:.3f} ms, {sum(case.official) / sum(both):.2f} times faster")


def others() -> None:
    """Other ways to do the short case, forward and backward together."""
    u, delta, A, B, C, D = (x.requires_grad_() for x in make(CASES[2].shape, FLOAT))

    def with_scan(form: str) -> None:
        selective_scan(u, delta, A, B, C, D, form=form)[0].sum().backward()  # type: ignore[arg-type]

    def with_mambapy() -> None:
        from mambapy.pscan import pscan  # pyright: ignore[reportMissingImports]

        step = torch.nn.functional.softplus(delta).unsqueeze(-1)
        decay, inputs = (step * A[:, None, None]).exp(), step * u.unsqueeze(-1) * B.unsqueeze(-2)
        h = pscan(decay.flatten(0, 1), inputs.flatten(0, 1)).view(decay.shape)
        ((h * C.unsqueeze(-2)).sum(-1) + D[:, None, None] * u).sum().backward()

    ways: dict[str, Callable[[], None]] = {f"shoal, {form}": partial(with_scan, form) for form in ("triton", "sequential", "reference")}
    if find_spec("mambapy"):
        ways["mambapy's pscan"] = with_mambapy
    else:
        print("mambapy is not installed: left out")
    print("transformers' own scan is a loop inside its mixer, like our reference form: not timed apart")
    for name, way in ways.items():
        try:
            print(f"| short float32 | {name} | forward and backward | {milliseconds(way, 5)[0]:.2f} |")
        except Exception as error:
            print(f"{name} failed: {type(error).__name__}: {str(error)[:200]}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=75, help="for compiling and checking")
    parser.add_argument("--workers", type=int, default=max(1, min(14, (os.cpu_count() or 2) - 1)))
    args = parser.parse_args()
    began = time.perf_counter()
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, triton {scan_triton.triton.__version__}; copy {copy_speed():.2f} TB/s")
    print(f"times faster: beside {SOURCE}")
    good = checked(args.seconds, args.workers)
    print(f"{len(good)} plans right after {time.perf_counter() - began:.0f} s")
    print("| case | direction | plan | ms | spread | times faster |\n|---|---|---|---|---|---|")
    for case in CASES:
        measure(case, good)
    others()
    print(f"{time.perf_counter() - began:.0f} s in all")
    os._exit(0)  # without waiting for what did not compile


if __name__ == "__main__":
    main()
