"""Where the time of one captured step goes on a GPU: the kernels of ten steps, longest first.

python benchmarks/profile_step.py --runs 64 --precision bfloat16
"""

from __future__ import annotations

import argparse
from dataclasses import replace

import torch
from throughput import CASES
from torch.profiler import ProfilerActivity, profile

from shoal.config import StudyConfig
from shoal.train.fleet import Fleet


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", default="modular", choices=list(CASES))
    parser.add_argument("--runs", type=int, default=64)
    parser.add_argument("--precision", default="bfloat16")
    args = parser.parse_args()
    config = replace(CASES[args.case], precision=args.precision, log_every=1_000)
    fleet = Fleet.build(StudyConfig(run=config, seeds=args.runs).runs(), "cuda")
    fleet.advance(20)
    with profile(activities=[ProfilerActivity.CUDA]) as trace:
        fleet.advance(10)
        torch.cuda.synchronize()
    events = sorted(trace.key_averages(), key=lambda event: -event.device_time_total)
    total = sum(event.device_time_total for event in events)
    print(f"{total / 10:,.0f} microseconds of kernels a step")
    for event in events[:40]:
        print(f"{event.device_time_total / 10:8.1f} us  {event.count / 10:5.1f} x  {event.key[:150]}")


if __name__ == "__main__":
    main()
