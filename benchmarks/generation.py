"""Tokens per second of generation: shoal beside ``transformers.generate``, the same random weights in both, GPT-2's shape (124M), batches of 1 and 64.

    python benchmarks/generation.py --json generation.json       # one GPU, some two minutes
    python benchmarks/generation.py --device cpu --tiny          # does it work? seconds

Greedy, so that both do the same work: a whole call each, which reads a prompt of ``--prompt`` random tokens and writes ``--tokens`` more. On a GPU shoal's
call records its step as a CUDA graph every time, which is in its time. transformers runs with its default cache and, with ``--static``, with its static one,
which compiles. A rate is the median of ``--repeats`` calls after one that is not counted. First both models' logits are compared, then what they write:
greedy texts part where two logits are equal to rounding, so the share of rows that agree is below 1 in bfloat16. No timing is asserted.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel

from shoal.config import DecoderConfig, RunConfig
from shoal.inference.generate import sample
from shoal.inference.sampling import GREEDY
from shoal.models import build

SHAPES = {"GPT-2 124M": (768, 12, 12, 50_257, 1024), "tiny": (32, 2, 4, 101, 64)}  # width, layers, heads, vocabulary, positions


def theirs(width: int, num_layers: int, num_heads: int, vocab_size: int, length: int) -> Any:
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=vocab_size, n_positions=length, n_embd=width, n_layer=num_layers, n_head=num_heads, activation_function="gelu",
        bos_token_id=None, eos_token_id=None, initializer_range=0.1,
    )  # fmt: skip
    return GPT2LMHeadModel(config).eval()


def ours(model: Any, width: int, num_layers: int, num_heads: int, vocab_size: int, length: int) -> Any:
    """A run that holds the same weights; of a task only what generation asks for."""
    config = DecoderConfig(width=width, num_layers=num_layers, num_heads=num_heads, feed_forward=4 * width, activation="gelu", tied=True)
    copy = build(config, vocab_size, length, ())
    given, state = model.transformer.state_dict(), {}
    state["embedding.weight"], state["position.weight"] = given["wte.weight"], given["wpe.weight"]
    for i in range(num_layers):
        for name in ("weight", "bias"):
            for part, x in zip(("query", "key", "value"), given[f"h.{i}.attn.c_attn.{name}"].chunk(3, dim=-1), strict=True):
                state[f"blocks.{i}.mixer.{part}.{name}"] = x
            for here, there in (("mixer.out", "attn.c_proj"), ("feed_forward.up", "mlp.c_fc"), ("feed_forward.down", "mlp.c_proj")):
                state[f"blocks.{i}.{here}.{name}"] = given[f"h.{i}.{there}.{name}"]
            state[f"blocks.{i}.mixer_norm.{name}"], state[f"blocks.{i}.feed_forward_norm.{name}"] = given[f"h.{i}.ln_1.{name}"], given[f"h.{i}.ln_2.{name}"]
            state[f"norm.{name}"] = given[f"ln_f.{name}"]
    copy.load_state_dict(state)
    return SimpleNamespace(config=RunConfig(model=config), task=SimpleNamespace(end=None, max_length=length), model=copy)


def rate(call: Callable[[], Tensor], tokens: int, repeats: int) -> tuple[float, float, float, Tensor]:
    """Tokens per second: median, lowest, highest; and what was written."""
    found, written = [], torch.empty(0)
    for _ in range(repeats + 1):
        began = time.perf_counter()
        written = call().cpu()  # waits
        found.append(tokens / (time.perf_counter() - began))
    return statistics.median(found[1:]), min(found[1:]), max(found[1:]), written


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"], choices=["float32", "bfloat16"])
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 64])
    parser.add_argument("--prompt", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--static", action="store_true", help="transformers with its static cache, too")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    shape = SHAPES["tiny" if options.tiny else "GPT-2 124M"]
    num_tokens = min(options.tokens, shape[-1] - options.prompt)
    caches = {"transformers": {}} | ({"transformers, static cache": {"cache_implementation": "static"}} if options.static else {})
    lines = []
    for dtype in options.dtypes:
        model = theirs(*shape)
        run = ours(model, *shape)
        model, run.model = model.to(options.device, getattr(torch, dtype)), run.model.to(options.device, getattr(torch, dtype))
        for batch in options.batches:
            prompt = torch.randint(shape[3], (batch, options.prompt), generator=torch.Generator().manual_seed(1)).to(options.device)
            keys = torch.zeros(batch, dtype=torch.int64, device=options.device)
            with torch.inference_mode():
                a, b = model(prompt).logits.float(), run.model.logits(run.model(prompt)[0]).float()
            difference = float((a - b).abs().max() / a.abs().max())
            calls: dict[str, Callable[[], Tensor]] = {"shoal": lambda prompt=prompt, keys=keys, run=run: sample(run, prompt, num_tokens, GREEDY, keys)}
            for name, cache in caches.items():
                calls[name] = lambda prompt=prompt, cache=cache, model=model: model.generate(
                    prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=num_tokens, do_sample=False, pad_token_id=0, **cache
                )[:, options.prompt :]
            written = {}
            for name, call in calls.items():
                median, low, high, written[name] = rate(call, batch * num_tokens, 2 if options.tiny else options.repeats)
                same = float((written[name] == written["shoal"]).all(-1).float().mean())
                lines.append({"name": name, "dtype": dtype, "batch": batch, "tokens/s": median, "low": low, "high": high, "rows alike": same})
                lines[-1] |= {"logits differ": difference, "tokens": num_tokens, "prompt": options.prompt}
                print(f"{name:27} {dtype:9} batch {batch:3}  {median:10,.0f} tokens/s [{low:,.0f}, {high:,.0f}]  rows alike {same:.2f}", flush=True)
            print(f"  logits differ by {difference:.1e} of the largest")
    if options.json:
        options.json.write_text(json.dumps({"device": torch.cuda.get_device_name() if options.device == "cuda" else "cpu", "lines": lines}, indent=1))


if __name__ == "__main__":
    main()
