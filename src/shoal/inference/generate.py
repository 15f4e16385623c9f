"""Continue a prompt, one token at a time, with what the model remembers kept in its cache. Masked diffusion fills in what follows the prompt instead.

generate(load("runs/sanity"), "I lo")     # "ve machine learning"
"""

from __future__ import annotations

import torch
from torch import Tensor

from shoal import rng
from shoal.config.fields import ConfigError
from shoal.contracts import Context
from shoal.inference import diffusion
from shoal.inference.pick import pick
from shoal.train.run import Run


def generate(run: Run, prompt: str = "", max_tokens: int | None = None, temperature: float = 0.0, seed: int = 0) -> str:
    """The continuation alone, without the prompt. temperature 0 = the most probable token; max_tokens None = as far as the model's positions reach."""
    if temperature < 0 or temperature != temperature:
        raise ConfigError("temperature", f"must be 0 (most probable token) or more, not {temperature}")
    tokens = [*run.task.start, *run.task.tokenizer.encode(prompt)]
    if not tokens:
        raise ConfigError("prompt", "this task has no begin token; give at least one token to continue")
    room = room_after(run, len(tokens))
    if room < 1:
        raise ConfigError("prompt", f"{len(tokens)} tokens are more than the model's {run.task.max_length} positions; shorten it")
    max_tokens = room if max_tokens is None else max_tokens
    if not 1 <= max_tokens <= room:
        raise ConfigError("tokens", f"must lie between 1 and {room}, what is left of the model's {run.task.max_length} positions, not {max_tokens}")
    key = rng.key(torch.tensor(seed), "sample")
    produced = sample(run, torch.tensor([tokens]), max_tokens, temperature, key[None])[0].tolist()
    if run.task.end in produced:
        produced = produced[: produced.index(run.task.end)]
    return run.task.tokenizer.decode(produced)


def room_after(run: Run, given: int) -> int:
    """How many tokens can follow so many: the last that comes out is not put in, but where all places are filled in together."""
    return run.task.max_length - given + (run.config.objective != "masked_diffusion")


@torch.inference_mode()
def sample(run: Run, tokens: Tensor, max_tokens: int, temperature: float, key: Tensor) -> Tensor:
    """int64 [B, T] -> [B, max_tokens]; stops early only when every row has ended. key int64 [B]. Masked diffusion has as many steps as tokens."""
    if run.config.objective == "masked_diffusion":
        return diffusion.sample(run, tokens, max_tokens, max_tokens, temperature, key)
    model, produced = run.model, []
    cache = model.init_cache(len(tokens), tokens.shape[-1] + max_tokens)
    given = tokens
    for step in range(max_tokens):
        hidden, cache = model(given, Context(at=slice(-1, None)), cache)  # pyright: ignore[reportArgumentType]
        new = pick(model.logits(hidden)[:, -1].float(), temperature, rng.fold(key, step))
        produced.append(new)
        tokens = torch.cat((tokens, new[:, None]), dim=-1)
        given = tokens if cache is None else new[:, None]
        if run.task.end is not None and bool((torch.stack(produced, dim=-1) == run.task.end).any(-1).all()):  # GPT-2 begins texts with the same token
            break
    return torch.stack(produced, dim=-1)
