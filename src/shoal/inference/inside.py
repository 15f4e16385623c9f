"""Looking inside a trained decoder: where every head looks in a text, and what each layer would already say (the logit lens).

    maps = attention(load("runs/gpt"), "def f(x):")      # maps.tokens, maps.weights [layers, H, T, T], maps.png()
    circuitsvis.attention.attention_heads(**maps.circuitsvis()[0])         # layer by layer
    bertviz.head_view(**maps.bertviz())
    lens(load("runs/gpt"), "def f(x):").loss             # nats after the embedding and after every layer

The model's own forward pass is run once, with what enters its parts recorded; every mixer says itself which weights it then uses. Layers and heads are
counted from 0. Not here: scores of heads (``heads``), drawing (``shoal.results.inside``), what a head's output does to the logits.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, overload

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from shoal.config.fields import check
from shoal.contracts import Context
from shoal.inference.evaluate import TOKENS
from shoal.inference.prompts import all_encoded, device_of, left_padded
from shoal.inference.score import check_foretells, pieces
from shoal.mixers.attention import Attention
from shoal.models.decoder import Decoder
from shoal.results import inside as figures
from shoal.train.run import Run


@dataclass(frozen=True)
class Maps:
    """Where a text's tokens look, in every layer that has attention."""

    tokens: list[str]  # [T]
    layers: tuple[int, ...]  # their places in the decoder, whose other layers have no weights to show
    weights: NDArray[np.float32]  # [layers, H, T, T]: from the token of a row to that of a column; rows sum to 1, but for mixer "zeroed"

    def chosen(self, layer: int | None = None, head: int | None = None) -> tuple[list[int], list[int]]:
        """The layers and heads meant; None = all. ConfigError for one that is not there."""
        known, num_heads = ", ".join(map(str, self.layers)), self.weights.shape[1]
        check(layer is None or layer in self.layers, "layer", f"layer {layer} has no attention weights; layers that have: {known} (counted from 0)")
        check(head is None or 0 <= head < num_heads, "head", f"must be 0 to {num_heads - 1}, not {head}")
        return list(self.layers) if layer is None else [layer], list(range(num_heads)) if head is None else [head]

    def png(self, layer: int | None = None, head: int | None = None) -> bytes:
        """A map for every layer and head, or for those that are named."""
        layers, heads = self.chosen(layer, head)
        weights = self.weights[[self.layers.index(number) for number in layers]][:, heads]
        return figures.png(lambda: figures.grid(self.tokens, weights, layers, heads))

    def circuitsvis(self) -> list[dict[str, Any]]:
        """For every layer, what circuitsvis.attention.attention_heads and attention_patterns take: tokens, and attention [H, T, T]."""
        return [{"tokens": self.tokens, "attention": layer} for layer in self.weights]

    def bertviz(self) -> dict[str, Any]:
        """What bertviz.head_view and model_view take: attention, for every layer a tensor [1, H, T, T], and tokens. They number the layers that there are."""
        return {"attention": tuple(torch.from_numpy(layer)[None] for layer in self.weights), "tokens": self.tokens}


@overload
def attention(run: Run, text: str, most: int | None = None) -> Maps: ...
@overload
def attention(run: Run, text: list[str], most: int | None = None) -> list[Maps]: ...
def attention(run: Run, text: str | list[str], most: int | None = None) -> Maps | list[Maps]:
    """The maps of a text, begin tokens included; of several texts a list, to each what it has alone.

    Of each the first tokens are read, as many as the model has positions, or ``most``; a warning says what was cut.

    ConfigError for an empty text, unknown characters, and a model without attention weights.
    """
    mixers = attending(run)
    rows = _read(run, [text] if isinstance(text, str) else text, most)
    found: list[Maps | None] = [None] * len(rows)
    for piece in pieces([len(row) for row in rows], TOKENS["cpu"]):
        tokens, context = left_padded([rows[i] for i in piece], device_of(run))
        weights = torch.stack(list(weights_of(run, tokens, context).values())).float().cpu().numpy()  # [layers, B, H, T, T]
        for place, i in enumerate(piece):
            own = slice(weights.shape[-1] - len(rows[i]), None)
            found[i] = Maps(spelled(run, rows[i]), tuple(mixers), np.ascontiguousarray(weights[:, place, :, own, own]))
    maps = [one for one in found if one is not None]
    return maps[0] if isinstance(text, str) else maps


@dataclass(frozen=True)
class Lens:
    """What the model would say after the embedding and after each layer, if the rest of the layers added nothing (nostalgebraist 2020)."""

    tokens: list[str]  # [T]
    after: list[str]  # [n] "embedding", "layer 0", ...; the last is the model itself
    top: list[list[str]]  # [n][T] the likeliest next token at each position
    probability: NDArray[np.float32]  # [n, T] that token's
    nll: NDArray[np.float32]  # [n, T-1] of the token that does come next, nats

    @property
    def loss(self) -> list[float]:
        """[n] mean nats a token; NaN of a text of one token."""
        return [float(x.mean()) if x.size else math.nan for x in self.nll]

    def table(self) -> str:
        """A line for every layer."""
        lines = [f"{'after':10}  {'nats':>7}  likeliest next token at the end", *map(self._line, range(len(self.after)))]
        return "\n".join(lines) + "\n"

    def _line(self, i: int) -> str:
        return f"{self.after[i]:10}  {self.loss[i]:7.4f}  {self.top[i][-1]!r} ({self.probability[i, -1]:.2f})"

    def png(self) -> bytes:
        return figures.png(lambda: figures.lens(self.tokens, self.after, self.top, self.probability, self.loss))


@torch.inference_mode()
def lens(run: Run, text: str, most: int | None = None) -> Lens:
    """The final norm and the head applied to the residual stream after every layer; with norm_place "post", whose layers end in a norm, the head alone.

    ``most``: as in ``attention``.
    """
    model = _decoder(run)
    check_foretells(run)
    check(model.config.residual, "run", f"{run.id} has no residual connections (model.residual), so its layers share no space that the head could read")
    (row,) = _read(run, [text], most)
    tokens = torch.tensor([row], device=device_of(run))
    top, probability, nll = [], [], []
    _, stream = recorded(model, tokens, Context())
    for x in stream:
        log_p = model.logits(model.norm(x))[0].float().log_softmax(-1)  # [T, V]
        best = log_p.max(-1)
        top.append(spelled(run, best.indices.tolist()))
        probability.append(best.values.exp().cpu().numpy())
        nll.append(-log_p[:-1].gather(-1, tokens[0, 1:, None])[:, 0].cpu().numpy())
    after = ["embedding", *(f"layer {i}" for i in range(len(stream) - 1))]
    return Lens(spelled(run, row), after, top, np.stack(probability), np.stack(nll))


def attending(run: Run) -> dict[int, Attention]:
    """The mixers that have attention weights, by layer. ConfigError where there are none."""
    mixers: list[nn.Module] = [block.mixer for block in _blocks(_decoder(run))]
    names = [run.config.model.mixers[i % len(run.config.model.mixers)] for i in range(len(mixers))]  # pyright: ignore[reportAttributeAccessIssue]
    found = {i: mixer for i, mixer in enumerate(mixers) if isinstance(mixer, Attention)}
    check(bool(found), "run", f"{run.id} has no attention weights to look at: its mixers are {', '.join(names)}; take a run with softmax attention")
    return found


def weights_of(run: Run, tokens: Tensor, context: Context) -> dict[int, Tensor]:
    """int64 [B, T] -> for every layer that attends [B, H, T, T]."""
    with torch.inference_mode():
        inputs, _ = recorded(_decoder(run), tokens, context)
        return {layer: mixer.weights(*inputs[layer]) for layer, mixer in attending(run).items()}


def recorded(model: Decoder, tokens: Tensor, context: Context) -> tuple[dict[int, tuple[Tensor, Context]], list[Tensor]]:
    """One forward pass: what entered every mixer, x [B, T, D] and its context; and the residual stream [B, T, D] before the first block and after each."""
    inputs: dict[int, tuple[Tensor, Context]] = {}
    stream: list[Tensor] = []

    def enters(_: nn.Module, given: tuple[Any, ...], *, layer: int) -> None:
        inputs[layer] = given[:2]

    hooks = [_blocks(model)[0].register_forward_pre_hook(lambda _, given: stream.append(given[0]))]
    for layer, block in enumerate(_blocks(model)):
        hooks.append(block.mixer.register_forward_pre_hook(partial(enters, layer=layer)))
        hooks.append(block.register_forward_hook(lambda _, given, result: stream.append(result[0])))
    try:
        model(tokens, context)
    finally:
        for hook in hooks:
            hook.remove()
    return inputs, stream


def spelled(run: Run, tokens: Sequence[int]) -> list[str]:
    """Each token's text; <s> and </s> for those that begin and end one, · for others without any."""
    special = {run.task.end: "</s>"} | dict.fromkeys(run.task.start, "<s>")
    return [run.task.tokenizer.decode([token]) or special.get(token, "·") for token in tokens]


def _blocks(model: Decoder) -> list[Any]:
    return list(model.blocks)


def _decoder(run: Run) -> Decoder:
    kind = type(run.model).__name__
    check(isinstance(run.model, Decoder), "run", f"{run.id} is no decoder but a model of kind {kind}, and has no layers to look into")
    assert isinstance(run.model, Decoder)
    check(len(run.model.blocks) > 0, "run", f"{run.id} has no layers to look into (model.num_layers 0)")
    return run.model


def _read(run: Run, texts: Sequence[str], most: int | None) -> list[list[int]]:
    """Tokens of each text behind the task's begin tokens, cut."""
    rows, positions = all_encoded(run, texts), run.task.max_length
    check(most is None or most > len(run.task.start), "most", f"must be {len(run.task.start) + 1} or more tokens, not {most}")
    reach = positions if most is None else min(most, positions)
    limit = f"the model's {positions} positions" if reach == positions else f"{reach}"
    for number, row in enumerate(rows, 1):
        name = "prompt" if len(rows) == 1 else f"prompt {number}"
        check(len(row) > len(run.task.start), name, "is empty; give a text of at least one token")
        if len(row) > reach:
            warnings.warn(f"{name}: {len(row)} tokens are more than {limit}; the first {reach} are read, the others cut", stacklevel=3)
    return [row[:reach] for row in rows]
