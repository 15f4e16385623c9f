"""Continue a prompt, or many, one token at a time, with what the model remembers kept in its cache. Masked diffusion fills in what follows the prompt instead.

    generate(load("runs/sanity"), "I lo")                                    # "ve machine learning"
    generate(run, ["def f(x):", "import"], temperature=0.8, top_p=0.95)      # a batch: to each what it gets alone
    for piece in stream(run, "def"): print(piece, end="")

Where a model's positions end (``reach``), text ends. One of a language task, which was trained on windows from anywhere in a text, reads the end of a prompt
that is too long and says what was cut; of any other task such a prompt is refused. A model without such an end goes on as long as it is asked to.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import overload

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from shoal import rng
from shoal.config import DecoderConfig, EmbeddingMLPConfig, LanguageConfig, ModuleConfig
from shoal.config.fields import ConfigError, check
from shoal.contracts import Context
from shoal.inference import diffusion
from shoal.inference.prompts import all_encoded, device_of, left_padded
from shoal.inference.sampling import GREEDY, Sampling
from shoal.mixers import SIZED
from shoal.train.capture import Captured
from shoal.train.run import Run

ROWS = 64  # prompts that are continued together, at most: their caches lie in memory side by side
CAPTURED = ("cuda",)  # where a step is recorded once and replayed
ASKED = {"cpu": 1, "cuda": 32}  # tokens after which a device is asked whether all rows have ended
EVERYTHING = Context()
LAST = slice(-1, None)


@overload
def generate(
    run: Run, prompt: str = "", max_tokens: int | None = None, temperature: float = 0.0, seed: int = 0,
    *, top_k: int = 0, top_p: float = 1.0, penalty: float = 1.0, steps: int | None = None,
) -> str: ...  # fmt: skip
@overload
def generate(
    run: Run, prompt: Sequence[str], max_tokens: int | None = None, temperature: float = 0.0, seed: int = 0,
    *, top_k: int = 0, top_p: float = 1.0, penalty: float = 1.0, steps: int | None = None,
) -> list[str]: ...  # fmt: skip
def generate(
    run: Run, prompt: str | Sequence[str] = "", max_tokens: int | None = None, temperature: float = 0.0, seed: int = 0,
    *, top_k: int = 0, top_p: float = 1.0, penalty: float = 1.0, steps: int | None = None,
) -> str | list[str]:  # fmt: skip
    """The continuation alone, without the prompt; of several prompts a list, each continued as it would be alone (the same seed gives it the same draws).

    temperature 0 = the most probable token; max_tokens None = as far as the positions trained on reach. ``top_k``, ``top_p``, ``penalty``: see ``Sampling``.
    ``steps``: of masked diffusion, in which all places are filled; None = one for every token.
    """
    how = Sampling(temperature=temperature, top_k=top_k, top_p=top_p, penalty=penalty)
    prompts = [prompt] if isinstance(prompt, str) else list(prompt)
    found = [run.task.tokenizer.decode(tokens) for tokens in continued(run, prompts, max_tokens, how, [seed] * len(prompts), steps)]
    return found[0] if isinstance(prompt, str) else found


def continued(run: Run, prompts: Sequence[str], max_tokens: int | None, how: Sampling, seeds: Sequence[int], steps: int | None = None) -> list[list[int]]:
    """The tokens that follow each prompt, up to the one that ends a text. One seed for each."""
    check(steps is None or run.config.objective == "masked_diffusion", "steps", "only masked diffusion takes steps; leave it out")
    asked = [_fitted(run, tokens, max_tokens) for tokens in all_encoded(run, prompts)]
    keys = rng.key(torch.tensor(seeds), "sample").to(device_of(run))
    found: list[list[int]] = [[]] * len(asked)
    for piece in _pieces(run, asked):
        tokens, context = left_padded([asked[i][0] for i in piece], device_of(run))
        produced = sample(run, tokens, max(asked[i][1] for i in piece), how, keys[piece], context, steps).tolist()
        for i, row in zip(piece, produced, strict=True):
            found[i] = list(_until_end(run, row[: asked[i][1]]))
    return found


def stream(
    run: Run,
    prompt: str = "",
    max_tokens: int | None = None,
    how: Sampling = GREEDY,
    seed: int = 0,
    steps: int | None = None,
) -> Iterator[str]:
    """What ``generate`` gives, as it comes: pieces that are whole characters. Masked diffusion has its text all at once."""
    if run.config.objective == "masked_diffusion":
        yield run.task.tokenizer.decode(continued(run, [prompt], max_tokens, how, [seed], steps)[0])
        return
    check(steps is None, "steps", "only masked diffusion takes steps; leave it out")
    ((tokens, count),) = [_fitted(run, tokens, max_tokens) for tokens in all_encoded(run, [prompt])]
    given, context = left_padded([tokens], device_of(run))
    key = rng.key(torch.tensor([seed]), "sample").to(device_of(run))
    yield from whole_characters(run.task.tokenizer.decode, _until_end(run, (int(new) for new in each_token(run, given, count, how, key, context))))


def whole_characters(decode: Callable[[list[int]], str], tokens: Iterator[int]) -> Iterator[str]:
    """The text of tokens as they come. A character in several tokens waits for its last; what never becomes one is U+FFFD, as at once."""
    so_far, shown, text = [], 0, ""
    for token in tokens:
        so_far.append(token)
        text = decode(so_far)
        ready = len(text.rstrip("\ufffd"))
        if ready > shown:
            yield text[shown:ready]
            shown = ready
    if len(text) > shown:
        yield text[shown:]


def reach(run: Run) -> int | None:
    """The positions a model has: as many as it was trained on where each has parameters of its own, or it is a module of the user's; else None, without end."""
    model = run.config.model
    ends = isinstance(model, EmbeddingMLPConfig | ModuleConfig)
    if isinstance(model, DecoderConfig):
        ends = model.positions == "learned" or any(name in SIZED for name in model.mixers)
    return run.task.max_length if ends else None


def room_after(run: Run, given: int) -> int:
    """How many tokens can follow so many in the length trained on: the last that comes out is not put in, but where all places are filled in together."""
    return run.task.max_length - given + (run.config.objective != "masked_diffusion")


def _fitted(run: Run, tokens: list[int], max_tokens: int | None) -> tuple[list[int], int]:
    """What is read of a prompt, and how many tokens may follow it. Warns of what was cut, and of lengths that were not trained on."""
    given, trained, room = len(tokens), run.task.max_length, room_after(run, len(tokens))
    if max_tokens is not None and max_tokens >= 1 and (room >= max_tokens or reach(run) is None):
        if room < max_tokens:
            warnings.warn(f"{given} tokens and {max_tokens} more are longer than the {trained} this model was trained on", stacklevel=4)
        return tokens, max_tokens
    if max_tokens is None and room >= 1:
        return tokens, room
    if max_tokens is None and reach(run) is None:
        warnings.warn(f"the prompt's {given} tokens are more than the {trained} this model was trained on", stacklevel=4)
        return tokens, trained
    if not isinstance(run.config.task, LanguageConfig):
        check(room >= 1, "prompt", f"{given} tokens are more than the model's {trained} positions; shorten it")
        raise ConfigError("tokens", f"must lie between 1 and {room}, what is left of the model's {trained} positions, not {max_tokens}")
    most = room_after(run, 1)
    check(max_tokens is None or 1 <= max_tokens <= most, "tokens", f"must lie between 1 and {most}, as the model has {trained} positions, not {max_tokens}")
    kept = trained - trained // 2 if max_tokens is None else room_after(run, max_tokens)
    more = "" if max_tokens is None else f" and {max_tokens} more"
    warnings.warn(
        f"prompt: {given} tokens{more} are more than the model's {trained} positions; the first {given - kept} were cut, the last {kept} read", stacklevel=4
    )
    return tokens[-kept:], room_after(run, kept) if max_tokens is None else max_tokens


def _pieces(run: Run, asked: Sequence[tuple[list[int], int]]) -> list[list[int]]:
    """Which prompts go together, those of similar length. Models that know nothing of padding need equal lengths, and masked diffusion equal places to fill."""
    told = not isinstance(run.config.model, EmbeddingMLPConfig | ModuleConfig)
    filled = run.config.objective == "masked_diffusion"
    kinds = [(0 if told else len(tokens), count if filled else 0) for tokens, count in asked]
    pieces: list[list[int]] = []
    for i in sorted(range(len(asked)), key=lambda i: (kinds[i], len(asked[i][0]))):
        if not pieces or len(pieces[-1]) == ROWS or kinds[pieces[-1][-1]] != kinds[i]:
            pieces.append([])
        pieces[-1].append(i)
    return pieces


def _until_end(run: Run, tokens: Sequence[int] | Iterator[int]) -> Iterator[int]:
    for token in tokens:
        if token == run.task.end:
            return
        yield token


@torch.inference_mode()
def sample(run: Run, tokens: Tensor, max_tokens: int, how: Sampling, key: Tensor, context: Context = EVERYTHING, steps: int | None = None) -> Tensor:
    """int64 [B, T] -> [B, max_tokens]; stops early only when every row has ended. key int64 [B]. Masked diffusion has ``steps``, None: as many as tokens."""
    if run.config.objective == "masked_diffusion":
        return diffusion.sample(run, tokens, max_tokens, max_tokens if steps is None else steps, how, key, context)
    produced: list[Tensor] = []
    ended, every = torch.zeros(len(tokens), dtype=torch.bool, device=tokens.device), ASKED[tokens.device.type]
    for new in each_token(run, tokens, max_tokens, how, key, context):
        produced.append(new)
        if run.task.end is not None:
            ended |= new == run.task.end  # not in the prompt: GPT-2 begins texts with the same token
            if len(produced) % every == 0 and bool(ended.all()):
                break
    return torch.stack(produced, dim=-1)


@torch.inference_mode()
def each_token(run: Run, tokens: Tensor, max_tokens: int, how: Sampling, key: Tensor, context: Context = EVERYTHING) -> Iterator[Tensor]:
    """int64 [B, T] -> int64 [B], one after the other. The prompt is read in one pass; then a step reads one token and what the cache has of the others.

    On a GPU a step is one CUDA graph: nothing in it waits for the host. Rows whose learned positions have ended stay on the last one.
    """
    model = run.model
    said = how.said(tokens, context.mask, model.vocab_size)
    hidden, cache = model(tokens, context._replace(at=LAST), model.init_cache(len(tokens), tokens.shape[-1] + max_tokens - 1))
    new = how.pick(model.logits(hidden)[:, -1].float(), rng.fold(key, 0), said)
    yield new.clone()
    places = None if context.positions is None else context.positions[:, -1:] + 1
    step, end = torch.ones((), dtype=torch.int64, device=tokens.device), reach(run)
    captured = tokens.device.type in CAPTURED and cache is not None
    if captured:
        cache = tree_map(torch.clone, cache)  # of its own memory, for steps to write to

    def advance() -> None:
        nonlocal tokens, cache
        if said is not None:
            said.scatter_(-1, new[:, None], True)
        if cache is None:
            tokens = torch.cat((tokens, new[:, None]), dim=-1)
        if places is not None and end is not None:
            places.clamp_(max=end - 1)
        hidden, after = model(tokens if cache is None else new[:, None], Context(positions=places, at=LAST), cache)
        new.copy_(how.pick(model.logits(hidden)[:, -1].float(), rng.fold(key, step), said))
        step.add_(1)
        if places is not None:
            places.add_(1)
        if captured:
            for old, now in zip(tree_leaves(cache), tree_leaves(after), strict=True):
                old.copy_(now)
        else:
            cache = after

    @contextmanager
    def unchanged() -> Iterator[None]:
        state = [x for x in (new, step, said, places, *tree_leaves(cache)) if x is not None]
        saved = [x.clone() for x in state]
        yield
        for x, before in zip(state, saved, strict=True):
            x.copy_(before)

    following = Captured(advance, tokens.device, unchanged) if captured else advance
    for _ in range(1, max_tokens):
        following()
        yield new.clone()
