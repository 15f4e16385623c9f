"""Run-steps per second of fleets beside a plain PyTorch loop of one run: the same model, batch, data and optimizer, in the same process.

    python benchmarks/throughput.py --device cpu                       # the CPU table
    python benchmarks/throughput.py --device cuda --runs 1 8 64 256    # the GPU table

A run-step is one update of one run. Each rate is the median of ``--repeats`` timed pieces of at least ``--seconds``, with the range. "first" is seconds from
nothing to the end of the first step (building, compiling, capturing). No timing is asserted anywhere.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from shoal.config import AdamW, DecoderConfig, MemorizeConfig, ModularConfig, RunConfig, StudyConfig
from shoal.train.fleet import DTYPES, Fleet

MODULAR = RunConfig(
    task=ModularConfig(p=97, operation="div", train_fraction=0.5, val_fraction=0.5, test_fraction=0.0),
    model=DecoderConfig(width=128, num_layers=2, num_heads=4, feed_forward=512),
    optimizer=AdamW(lr=1e-3, wd=1.0, beta2=0.98),
    batch_size=512,
    steps=1_000_000,
    evaluate=(),
    evaluate_every=1_000_000,
)
SMALL = replace(  # width 8, 2 layers, T = 32, batch 64: one head and no feed-forward, as small recall models have; every position is scored
    MODULAR,
    task=MemorizeConfig(strings=tuple("".join(chr(97 + (7 * i + 3 * j + i * j) % 26) for j in range(31)) for i in range(64))),
    model=DecoderConfig(width=8, num_layers=2, num_heads=1, feed_forward=0),
    batch_size=64,
)
CASES = {"modular": MODULAR, "small": SMALL}


class PlainBlock(nn.Module):
    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.num_heads = config.num_heads
        self.norm1, self.qkv, self.out = nn.LayerNorm(config.width), nn.Linear(config.width, 3 * config.width), nn.Linear(config.width, config.width)
        hidden = config.feed_forward
        self.feed_forward = (
            nn.Sequential(nn.LayerNorm(config.width), nn.Linear(config.width, hidden), nn.ReLU(), nn.Linear(hidden, config.width)) if hidden else None
        )

    def forward(self, x: Tensor) -> Tensor:
        B, T, D = x.shape
        q, k, v = (y.view(B, T, self.num_heads, -1).transpose(1, 2) for y in self.qkv(self.norm1(x)).split(D, dim=-1))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(y.transpose(1, 2).reshape(B, T, D))
        return x if self.feed_forward is None else x + self.feed_forward(x)


class Plain(nn.Module):
    """The same decoder as one would write it for one run."""

    def __init__(self, config: DecoderConfig, vocab_size: int, max_length: int) -> None:
        super().__init__()
        self.embedding, self.position = nn.Embedding(vocab_size, config.width), nn.Embedding(max_length, config.width)
        self.blocks = nn.ModuleList(PlainBlock(config) for _ in range(config.num_layers))
        self.norm, self.head = nn.LayerNorm(config.width), nn.Linear(config.width, vocab_size, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens) + self.position.weight[: tokens.shape[1]]
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


@dataclass
class Rate:
    name: str
    runs: int
    precision: str
    rates: list[float]  # run-steps per second
    first: float
    memory: float = 0.0  # GiB

    @property
    def median(self) -> float:
        return statistics.median(self.rates)


def timed(step: Callable[[int], Any], runs: int, device: str, seconds: float, repeats: int) -> list[float]:
    """step(n) makes n steps. Run-steps per second of each repeat."""

    def once(n: int) -> float:
        if device == "cuda":
            torch.cuda.synchronize()
        began = time.perf_counter()
        step(n)
        if device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - began

    once(3)
    n = max(3, round(seconds / (once(5) / 5)))
    return [runs * n / once(n) for _ in range(repeats)]


def plain(config: RunConfig, device: str, compiled: bool, seconds: float, repeats: int) -> Rate:
    """One run, written plainly: batches of random rows (with replacement, the cheapest draw), fused AdamW, zero_grad, backward, all positions computed."""
    began = time.perf_counter()
    fleet = Fleet.build([config], device, compile=False)
    whole = fleet.task.batch(fleet.tables, fleet.order_key, fleet.clock, 0)
    tokens, targets = whole.tokens[0].contiguous(), whole.targets[0].contiguous()
    last = isinstance(whole.at, slice)
    model = Plain(config.model, fleet.task.vocab_size, fleet.task.max_length).to(device)  # pyright: ignore[reportArgumentType]
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.98), weight_decay=1.0, fused=True)
    forward = torch.compile(model) if compiled else model
    dtype = DTYPES[config.precision]

    def step(n: int) -> None:
        for _ in range(n):
            index = torch.randint(len(tokens), (config.batch_size,), device=device)
            with torch.autocast(device, dtype, enabled=dtype != torch.float32):
                logits = forward(tokens[index])
            logits, target = (logits[:, -1], targets[index][:, -1]) if last else (logits.flatten(0, 1), targets[index].flatten())
            loss = F.cross_entropy(logits.float(), target)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()

    step(1)
    if device == "cuda":
        torch.cuda.synchronize()
    first = time.perf_counter() - began
    return Rate(f"plain loop, {'compiled' if compiled else 'eager'}", 1, config.precision, timed(step, 1, device, seconds, repeats), first)


def fleet(config: RunConfig, runs: int, device: str, compiled: bool, seconds: float, repeats: int, note: str = "") -> Rate:
    if device == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    began = time.perf_counter()
    built = Fleet.build(StudyConfig(run=config, seeds=runs).runs(), device, compile=compiled)
    built.advance(1)
    first = time.perf_counter() - began
    rates = timed(built.advance, runs, device, seconds, repeats)
    memory = torch.cuda.max_memory_reserved() / 2**30 if device == "cuda" else 0.0
    kind = "compiled" if compiled else ("captured eager" if device == "cuda" else "eager")
    return Rate(f"fleet, {kind}{note}", runs, config.precision, rates, first, memory)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--case", default="modular", choices=list(CASES))
    parser.add_argument("--runs", type=int, nargs="*", default=[1, 4, 16])
    parser.add_argument("--precision", nargs="*", default=["float32"], choices=list(DTYPES))
    parser.add_argument("--forms", nargs="*", default=["eager"], choices=["eager", "compiled"])
    parser.add_argument("--plain", nargs="*", default=["eager"], choices=["eager", "compiled"])
    parser.add_argument(
        "--evaluated",
        type=int,
        nargs="*",
        default=[],
        help="also with the whole training and validation tables evaluated every 50 steps, at these numbers of runs",
    )
    parser.add_argument("--seconds", type=float, default=2.0)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", default=None)
    args = parser.parse_args()
    case, rates = CASES[args.case], []
    hardware = torch.cuda.get_device_name() if args.device == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    print(f"{args.case}, {hardware}, torch {torch.__version__}, {args.repeats} repeats of {args.seconds:g} s: median [range] run-steps/s", flush=True)

    def show(rate: Rate) -> None:
        rates.append(rate)
        base = next((r.median for r in rates if r.name == "plain loop, eager" and r.precision == rate.precision), None)
        ratio = f"{rate.median / base:8.2f} x plain" if base else ""
        spread = f"[{min(rate.rates):.4g}, {max(rate.rates):.4g}]"
        print(
            f"{rate.name:34} {rate.precision:9} R {rate.runs:5}  {rate.median:10,.4g} {spread:20}{ratio}  first {rate.first:6.1f} s  {rate.memory:5.1f} GiB",
            flush=True,
        )

    for precision in args.precision:
        config = replace(case, precision=precision)
        for form in args.plain:
            show(plain(config, args.device, form == "compiled", args.seconds, args.repeats))
        for form in args.forms:
            for runs in args.runs:
                try:
                    show(fleet(config, runs, args.device, form == "compiled", args.seconds, args.repeats))
                except torch.OutOfMemoryError:
                    print(f"fleet, {form}, {precision}, R {runs}: out of memory", flush=True)
            for runs in args.evaluated:
                checked = replace(config, evaluate=("train", "val"), evaluate_every=50)
                show(fleet(checked, runs, args.device, form == "compiled", args.seconds, args.repeats, ", evaluated"))
    if args.json:
        with open(args.json, "w") as file:
            json.dump([vars(rate) | {"median": rate.median} for rate in rates], file, indent=1)


if __name__ == "__main__":
    main()
