"""Tokens per second of language models: a fleet of one beside a nanoGPT-style step, and many small runs as one fleet beside one run after another.

    python benchmarks/language.py --json language.json          # one GPU, some six minutes, most of it compiling
    python benchmarks/language.py --quick                       # nothing is begun after 110 seconds; --cases "GPT-2 124M" for what that leaves out
    python benchmarks/language.py --device cpu --tiny           # does it work? seconds

The plain step is what karpathy/nanoGPT does to train one GPT, written anew: pre-norm blocks with GELU and without biases, tied table (padded to 50,304 rows,
as there), ``torch.compile``, bfloat16 autocast over float32 weights, fused attention, clipping, fused AdamW with decay of matrices only. Its data lie on the
device, which is quicker than there. The fleet is the same model with the same optimizer, in bfloat16 over float32 master weights, on tokens of a made-up
corpus, whose frequencies fall off as those of words do. MFU is matrix products per second (shoal.train.flops, V = 50,257 for both) over 989 TFLOP/s, an
H100's in dense bfloat16.

Each rate is the median of ``--repeats`` timed pieces of ``--seconds``, with the range. "first" is seconds from nothing to the end of the first step. Then, for
each case, where the time of a step of the fleet goes: its parts run alone, as CUDA graphs, and its longest kernels. No timing is asserted anywhere.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from throughput import timed
from torch import Tensor, nn
from torch.nn import functional as F
from torch.profiler import ProfilerActivity, profile

from shoal.config import AdamW, DecoderConfig, LanguageConfig, RunConfig, with_seed, with_values
from shoal.contracts import Context
from shoal.data.encoded import Encoded
from shoal.tasks import language
from shoal.train.capture import Captured
from shoal.train.compiled import Finished
from shoal.train.fleet import Fleet
from shoal.train.flops import Counts, counts

PEAK = 989e12  # FLOP/s of an H100 (SXM), dense bfloat16
PADDED = 64  # nanoGPT rounds 50,257 up to a multiple of this


@dataclass(frozen=True)
class Case:
    width: int
    num_layers: int
    num_heads: int
    length: int
    batch_size: int
    runs: int = 1  # of the fleet; more than one are beside one after the other
    vocab_size: int = 50_257

    @property
    def tokens(self) -> int:
        """Of one step of one run."""
        return self.batch_size * self.length

    def config(self) -> RunConfig:
        model = DecoderConfig(
            width=self.width, num_layers=self.num_layers, num_heads=self.num_heads, feed_forward=4 * self.width, activation="gelu", bias=False, tied=True
        )
        far = 10_000_000
        return RunConfig(
            task=LanguageConfig(corpus="made up", length=self.length, sampler="random"),
            model=model,
            optimizer=AdamW(lr=6e-4, wd=0.1, beta2=0.95, decay="matrices"),
            clip=1.0,
            batch_size=self.batch_size,
            precision="bfloat16",
            steps=far,
            log_every=far,
            evaluate_every=far,
            evaluate=(),
        )


CASES = {
    "search 64": Case(width=64, num_layers=4, num_heads=2, length=128, batch_size=64, runs=32),
    "30M": Case(width=384, num_layers=6, num_heads=6, length=256, batch_size=64),
    "GPT-2 124M": Case(width=768, num_layers=12, num_heads=12, length=1024, batch_size=16),
    "search 128": Case(width=128, num_layers=4, num_heads=4, length=128, batch_size=64, runs=32),
}
QUICK = ("search 64", "30M", "GPT-2 124M")
TINY = {
    "search": Case(width=16, num_layers=2, num_heads=2, length=16, batch_size=4, runs=3, vocab_size=300),
    "one": Case(width=16, num_layers=2, num_heads=2, length=32, batch_size=2, vocab_size=300),
}


# --- a corpus that needs no text


@dataclass(frozen=True)
class Words:
    """As much of a tokenizer as training asks for."""

    vocab_size: int
    fingerprint: str = "made up"

    @property
    def special(self) -> dict[str, int]:
        return {"<s>": self.vocab_size - 2, "</s>": self.vocab_size - 1}


@contextlib.contextmanager
def corpus(vocab_size: int, num_tokens: int) -> Iterator[np.ndarray]:
    """Tokens of which the k-th most frequent is 1 / (k + 10) as frequent, in documents of 1,000; LanguageTask reads these, whatever it is asked for."""
    share = 1 / (np.arange(vocab_size) + 10.0)
    drawn = np.searchsorted(np.cumsum(share / share.sum()), np.random.default_rng(0).random(num_tokens)).clip(max=vocab_size - 1)
    starts = np.append(np.arange(0, num_tokens, 1000), num_tokens)
    count, usual = len(starts) - 1, language.encoded
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory, "tokens.bin")
        drawn.astype("<u2").tofile(path)
        tokens: Any = np.memmap(path, "<u2", "r")
        words: Any = Words(vocab_size)
        made = Encoded(tokens, starts, np.diff(starts), [str(d) for d in range(count)], np.zeros(count, np.int8), words, f"made up {vocab_size}")
        language.encoded = lambda config: made
        try:
            yield tokens
        finally:
            language.encoded = usual


# --- the plain step


class PlainBlock(nn.Module):
    def __init__(self, case: Case) -> None:
        super().__init__()
        width, self.num_heads = case.width, case.num_heads
        self.norm1, self.norm2 = nn.LayerNorm(width, bias=False), nn.LayerNorm(width, bias=False)
        self.qkv, self.out = nn.Linear(width, 3 * width, bias=False), nn.Linear(width, width, bias=False)
        self.up, self.down = nn.Linear(width, 4 * width, bias=False), nn.Linear(4 * width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        B, T, D = x.shape
        q, k, v = (y.view(B, T, self.num_heads, -1).transpose(1, 2) for y in self.qkv(self.norm1(x)).split(D, dim=-1))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(y.transpose(1, 2).reshape(B, T, D))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class Plain(nn.Module):
    """GPT-2 as one would write it for one run; returns the loss."""

    def __init__(self, case: Case) -> None:
        super().__init__()
        rows = -(-case.vocab_size // PADDED) * PADDED
        self.embedding, self.position = nn.Embedding(rows, case.width), nn.Embedding(case.length, case.width)
        self.blocks = nn.ModuleList(PlainBlock(case) for _ in range(case.num_layers))
        self.norm, self.head = nn.LayerNorm(case.width, bias=False), nn.Linear(case.width, rows, bias=False)
        self.embedding.weight = self.head.weight
        for p in self.parameters():
            if p.dim() == 2:
                nn.init.normal_(p, std=0.02)

    def forward(self, tokens: Tensor, targets: Tensor) -> Tensor:
        x = self.embedding(tokens) + self.position.weight[: tokens.shape[1]]
        for block in self.blocks:
            x = block(x)
        logits = self.head(self.norm(x))
        return F.cross_entropy(logits.view(-1, logits.shape[-1]), targets.reshape(-1))


def plain_step(case: Case, corpus: np.ndarray, device: str) -> Callable[[int], None]:
    """step(n) makes n updates."""
    data = torch.from_numpy(corpus.astype(np.int64)).to(device)
    model = Plain(case).to(device)
    matrices, vectors = ([p for p in model.parameters() if (p.dim() == 2) == yes] for yes in (True, False))
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=6e-4, betas=(0.9, 0.95), fused=True)
    loss_of = torch.compile(model) if device == "cuda" else model
    window = torch.arange(case.length + 1, device=device)

    def step(n: int) -> None:
        for _ in range(n):
            start = torch.randint(len(data) - case.length, (case.batch_size, 1), device=device)
            rows = data[start + window]
            with torch.autocast(device, torch.bfloat16):
                loss = loss_of(rows[:, :-1], rows[:, 1:])
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

    return step


def fleet_of(case: Case, runs: int, device: str) -> Fleet:
    """Learning rates and seeds, as a search has them."""
    rates = [2e-4 * 2 ** (r % 8) for r in range(runs)]
    return Fleet.build([with_seed(with_values(case.config(), {"optimizer.lr": rate}), r) for r, rate in enumerate(rates)], device)


# --- measuring


@dataclass
class Rate:
    case: str
    name: str
    runs: int
    rates: list[float]  # tokens per second, all runs together
    mfu: float
    first: float  # seconds
    memory: float  # GiB a run

    @property
    def median(self) -> float:
        return statistics.median(self.rates)


def measured(name: str, what: str, case: Case, runs: int, make: Callable[[], Callable[[int], Any]], price: Counts, args: argparse.Namespace) -> Rate:
    gc.collect()  # a fleet before this one, with its graphs
    if args.device == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    began = time.perf_counter()
    step = make()
    step(1)
    _wait(args.device)
    first = time.perf_counter() - began
    rates = [rate * case.tokens for rate in timed(step, runs, args.device, args.seconds, args.repeats)]
    memory = torch.cuda.max_memory_reserved() / 2**30 / runs if args.device == "cuda" else 0.0
    mfu = statistics.median(rates) * price.products / case.tokens / PEAK
    return Rate(name, what, runs, rates, mfu, first, memory)


def _wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def seconds_of(function: Callable[[], Any], device: str, repeats: int) -> float:
    """Of one call, replayed as a graph on a GPU: the median of ``repeats`` times 10 calls."""
    captured = Captured(function, torch.device(device), contextlib.nullcontext)
    times = []
    for _ in range(repeats + 1):
        _wait(device)
        began = time.perf_counter()
        for _ in range(10):
            captured()
        _wait(device)
        times.append((time.perf_counter() - began) / 10)
    return statistics.median(times[1:])


def where(fleet: Fleet, args: argparse.Namespace) -> dict[str, float]:
    """Seconds of a whole step, and of its parts alone, each forward and backward as it is in a step (mixers with their projections, all layers together)."""
    config, model = fleet.config, fleet.model
    batch = fleet._draw(fleet.tables, fleet.order_key, fleet.clock, config.batch_size)
    sums, grad = fleet._gradients(batch)
    nobody = torch.zeros_like(fleet.status, dtype=torch.bool)
    width, num_layers = config.model.width, config.model.num_layers  # pyright: ignore[reportAttributeAccessIssue]
    hidden = torch.randn(*batch.tokens.shape, width, device=fleet.device, dtype=fleet.weights.dtype).requires_grad_()
    block: Any = next(iter(model.blocks))  # pyright: ignore
    mixer, feed_forward = fleet._compiled(lambda x: block.mixer(x, Context())[0]), fleet._compiled(lambda x: block.feed_forward(x))
    known = Finished(model, hidden)

    def both(function: Callable[[], Tensor], module: nn.Module) -> Callable[[], Any]:
        asked = [p for p in module.parameters() if p.requires_grad]
        return lambda: torch.autograd.grad(function().sum(), [hidden, *asked], allow_unused=True)

    update = (fleet.optimizer, fleet.asked, fleet.layout, fleet.flat, fleet.weights, fleet.state, grad, sums, fleet.hyper, fleet.clip, fleet.clock, nobody)
    parts = {
        "data": lambda: fleet._draw(fleet.tables, fleet.order_key, fleet.clock, config.batch_size),
        "head and loss": both(lambda: fleet._objective(known, batch, None).loss, model),
        "mixers": both(lambda: mixer(hidden), block.mixer),
        "feed-forward": both(lambda: feed_forward(hidden), block.feed_forward),
        "optimizer": lambda: fleet._update(*update),
    }
    times = {name: seconds_of(part, args.device, args.repeats) for name, part in parts.items()}
    for name in ("mixers", "feed-forward"):
        times[name] *= num_layers
    return times


def kernels(fleet: Fleet, device: str, steps: int = 5) -> list[tuple[str, float, float]]:
    """The longest kernels of a step: name, microseconds a step, calls a step."""
    with profile(activities=[ProfilerActivity.CUDA if device == "cuda" else ProfilerActivity.CPU]) as trace:
        fleet.advance(steps)
        _wait(device)
    taken = [(event.key, event.device_time_total if device == "cuda" else event.self_cpu_time_total, event.count) for event in trace.key_averages()]
    return [(name, total / steps, count / steps) for name, total, count in sorted(taken, key=lambda event: -event[1])]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", choices=["cpu", "cuda"])
    parser.add_argument("--cases", nargs="*", choices=list(CASES), help="default: all")
    parser.add_argument("--runs", type=int, help="of the fleets that have more than one")
    parser.add_argument("--quick", action="store_true", help=f"{', '.join(QUICK)}; short pieces, no fleet of one beside a large one")
    parser.add_argument("--tiny", action="store_true", help="models and data of no interest")
    parser.add_argument("--seconds", type=float)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--no-parts", action="store_true", help="not where the time goes")
    parser.add_argument("--limit", type=float, help="seconds after which nothing is begun")
    parser.add_argument("--json")
    args = parser.parse_args()
    args.seconds = args.seconds or (0.02 if args.tiny else 0.5 if args.quick else 2.0)
    args.limit = args.limit or (110.0 if args.quick else float("inf"))
    cases = TINY if args.tiny else {name: CASES[name] for name in args.cases or (QUICK if args.quick else CASES)}
    began = time.perf_counter()
    torch.set_float32_matmul_precision("high")  # as nanoGPT does
    hardware = torch.cuda.get_device_name() if args.device == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    print(f"{hardware}, torch {torch.__version__}, {args.repeats} repeats of {args.seconds:g} s: median [range] tokens/s", flush=True)
    rates: list[Rate] = []
    tables: dict[str, Any] = {}

    def late(name: str) -> bool:
        over = time.perf_counter() - began > args.limit
        if over:
            print(f"{name}: left out, {args.limit:g} s are over", flush=True)
        return over

    for name, case in cases.items():
        case = replace(case, runs=args.runs) if args.runs and case.runs > 1 else case
        with corpus(case.vocab_size, 1 << (14 if args.tiny else 22)) as tokens:
            price, built = counts(case.config()), []
            print(f"\n{name}: {case}\n  a step of one run: " + ", ".join(f"{rule} {count:.4g}" for rule, count in price._asdict().items()), flush=True)

            def ours(runs: int, case: Case = case, built: list[Fleet] = built) -> Callable[[int], Any]:
                built[:] = [fleet_of(case, runs, args.device)]
                return built[0].advance

            jobs: list[tuple[str, int, Callable[[], Callable[[int], Any]]]] = [
                ("nanoGPT-style", 1, lambda case=case, tokens=tokens: plain_step(case, tokens, args.device)),
                *([("fleet", 1, lambda: ours(1))] if case.runs > 1 and not args.quick else []),
                ("fleet", case.runs, lambda case=case: ours(case.runs)),
            ]
            for what, runs, make in jobs:
                if late(f"{name}, {what}"):
                    continue
                built.clear()
                try:
                    rate = measured(name, what, case, runs, make, price, args)
                except torch.OutOfMemoryError:
                    print(f"  {what}, R {runs}: out of memory", flush=True)
                    continue
                rates.append(rate)
                show(rate, rates)
            if built and not args.no_parts and (case.runs > 1 or not args.quick) and not late(f"{name}, parts of a step"):
                tables[name] = parts_of_a_step(built[0], case, next(r for r in reversed(rates) if r.case == name), args)
            built.clear()
    print(f"\n{time.perf_counter() - began:.0f} seconds in all")
    if args.json:
        found = {"hardware": hardware, "torch": torch.__version__, "rates": [vars(r) | {"median": r.median} for r in rates], "parts": tables}
        Path(args.json).write_text(json.dumps(found, indent=1))


def show(rate: Rate, rates: list[Rate]) -> None:
    base = next(r for r in rates if r.case == rate.case)
    times = "" if base is rate else f"{rate.median / base.median:7.2f} x {base.name}"
    alone = next((r for r in rates if r.case == rate.case and r.name == rate.name and r.runs == 1 and r is not rate), None)
    times += f", {rate.median / alone.median:.2f} x R 1" if alone else ""
    spread, used = f"[{min(rate.rates):,.4g}, {max(rate.rates):,.4g}]", f"first {rate.first:5.1f} s  {rate.memory:6.3f} GiB a run"
    print(f"  {rate.name:14} R {rate.runs:3} {rate.median:12,.0f} {spread:24} MFU {rate.mfu:6.1%}  {used}{times}", flush=True)


def parts_of_a_step(fleet: Fleet, case: Case, rate: Rate, args: argparse.Namespace) -> dict[str, Any]:
    whole = case.tokens * rate.runs / rate.median
    longest = kernels(fleet, args.device)
    times = where(fleet, args)
    times["norms, residuals, embedding, glue"] = whole - sum(times.values())
    print(f"  a step of {rate.runs} runs takes {whole * 1e3:.2f} ms; its parts alone (what is left is the difference):")
    for name, taken in times.items():
        print(f"    {name:34} {taken * 1e3:9.3f} ms {taken / whole:7.1%}")
    print(f"  kernels: {sum(taken for _, taken, _ in longest) / 1e3:.2f} ms a step; the longest:")
    for name, taken, count in longest[:12]:
        print(f"    {taken:10.1f} us {count:6.1f} x  {name[:110]}", flush=True)
    return {"step": whole, "parts": times, "kernels": longest[:40]}


if __name__ == "__main__":
    main()
