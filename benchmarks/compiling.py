"""What a fleet waits for before its first step, and what its steps then take: as shoal compiles it beside everything as one program, each in a process.

    python benchmarks/compiling.py --study attention-variants --variant attention "AFT full" --device cuda
    python benchmarks/compiling.py --variant Fastformer --set task.max_bytes=300000 task.vocab_size=512 batch_size=4 precision=float32

"blocks": a deep model's blocks share a program, and evaluations are compiled only where they are many. "whole": the objective is one program, and so is
each split's evaluation. Nothing that was compiled before is found again; --threads compilers at once. "first" is the first evaluation and the first step
with all that precedes them; steps/s is of the fleet: median [range] of --repeats of --seconds. No timing is asserted anywhere.
"""

from __future__ import annotations

import argparse
import importlib
import multiprocessing
import os
import statistics
import time
from typing import Any

import yaml

FORMS = ("blocks", "whole")


def measured(options: argparse.Namespace, variant: str | None, form: str) -> tuple[float, float, list[float]]:
    """Seconds to build, seconds to the first step, steps/s of each repeat."""
    os.environ |= {"TORCHINDUCTOR_FORCE_DISABLE_CACHES": "1", "TORCHINDUCTOR_COMPILE_THREADS": str(options.threads)}
    from shoal.config import with_seed, with_values
    from shoal.studies import STUDIES
    from shoal.train import compiled
    from shoal.train import fleet as fleets

    if form == "whole":
        compiled.DEEP, fleets.FEW = 1 << 30, 0
    compiled.LONG = 1 << 30
    settings = importlib.import_module(STUDIES[options.study]).full().settings()
    run = next(run for told, run in settings if variant in (None, told.get("variant")))
    run = with_values(run, {"steps": 1_000_000, "evaluate_every": 100_000, "budget": 0.0, **options.set})
    began = time.perf_counter()
    fleet = fleets.Fleet.build([with_seed(run, seed) for seed in range(options.runs)], options.device, compile=True)
    built = time.perf_counter()
    fleet.advance(1)
    fleet.flat.sum().item()
    first, rates = time.perf_counter(), []
    for _ in range(options.repeats):
        steps, start = 0, time.perf_counter()
        while time.perf_counter() - start < options.seconds:
            fleet.advance(10)
            fleet.flat.sum().item()
            steps += 10
        rates.append(steps / (time.perf_counter() - start))
    return built - began, first - built, rates


def _apart(pipe: Any, *arguments: Any) -> None:
    pipe.send(measured(*arguments))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--study", default="attention-variants")
    parser.add_argument("--variant", nargs="*", default=[None], help="the study's first setting where none is named")
    parser.add_argument("--set", nargs="*", default=[], metavar="PATH=VALUE", help="fields of the runs")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=1.0)
    options = parser.parse_args()
    options.set = {path: yaml.safe_load(value) for path, _, value in (one.partition("=") for one in options.set)}

    print(f"{'variant':28} {'form':8} {'build':>7} {'first':>7} {'steps/s':>24}")
    for variant in options.variant:
        for form in FORMS:
            ours, theirs = multiprocessing.get_context("spawn").Pipe()
            process = multiprocessing.get_context("spawn").Process(target=_apart, args=(theirs, options, variant, form))
            process.start()
            theirs.close()
            build, first, rates = ours.recv()
            process.join()
            spread = f"{statistics.median(rates):.4g} [{min(rates):.4g}, {max(rates):.4g}]"
            print(f"{variant or 'the first':28} {form:8} {build:7.1f} {first:7.1f} {spread:>24}", flush=True)


if __name__ == "__main__":
    main()
