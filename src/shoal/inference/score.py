"""How probable a model finds a text: log-probability of continuations, perplexity and bits per byte, and which tokens surprised it.

    [found] = score(load("runs/flop-final"), " machine learning.", prompts="I love")     # found.log_probability, found.perplexity, found.nll

Protocol. A text is read behind the task's begin token and its prompt; each of its own tokens is scored once, given what stands before it in its window of
``length`` tokens (the model's positions). A text that is longer is read in windows that begin ``stride`` tokens apart, and a token is scored in the
first window that has it: with a stride of ``length`` (the default) windows lie side by side, as in training's evaluation; with less, every token behind
the first window sees at least length - stride tokens before it, and it costs length / stride times as much. With ``ends`` the end token is scored too.

Prompt and text are encoded apart, as generation does. Not here: evaluation on a task's own splits (``evaluate``), how a mean loss becomes a claim.
"""

from __future__ import annotations

import html
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from shoal.config import DecoderConfig
from shoal.config.fields import ConfigError, check
from shoal.contracts import Context, Tokenizer
from shoal.data.corpora import documents
from shoal.inference.evaluate import TOKENS
from shoal.inference.prompts import check_writes, device_of
from shoal.mixers import LEAKY
from shoal.nn.linear_cross_entropy import linear_cross_entropy
from shoal.train.run import Run

ROWS = 256  # of one piece, at most
SHOWN = 20_000  # tokens in a page
TABLE = ("text", "place", "token", "piece", "nats", "bits", "likeliest")


@dataclass(frozen=True)
class Score:
    """The scored tokens of a text, or of several, one after the other (``together``)."""

    name: str
    tokens: NDArray[np.int64]  # [n]
    nll: NDArray[np.float64]  # [n] minus log-probability of each, nats
    best: NDArray[np.int64]  # [n] what the model took for the likeliest in its place
    num_bytes: int  # UTF-8, of what was scored

    @property
    def log_probability(self) -> float:
        """Sum over the tokens, nats."""
        return -float(self.nll.sum())

    @property
    def nats_per_token(self) -> float:
        return float(self.nll.mean())

    @property
    def perplexity(self) -> float:
        return math.exp(min(self.nats_per_token, 700.0))

    @property
    def bits_per_byte(self) -> float:
        """What tokenizers can be compared by. NaN of a text without bytes."""
        return -self.log_probability / math.log(2) / self.num_bytes if self.num_bytes else math.nan


def score(
    run: Run, texts: str | Sequence[str], prompts: str | Sequence[str] = "", *, stride: int = 0, ends: bool = False, names: Sequence[str] = ()
) -> list[Score]:
    """One ``Score`` a text. ``prompts``: one for all, or one each. ``stride`` 0 = windows side by side. ConfigError for an empty text, or such a run."""
    texts = [texts] if isinstance(texts, str) else list(texts)
    prompts = [prompts] * len(texts) if isinstance(prompts, str) else list(prompts)
    check(len(prompts) == len(texts), "prompts", f"give one for all texts, or {len(texts)}, one each, not {len(prompts)}")
    task = run.task
    length, end = task.max_length, [task.end] if ends and task.end is not None else []
    check(0 <= stride <= length, "stride", f"must be 0 (windows side by side) to {length}, the model's positions, not {stride}")
    check_foretells(run)
    rows, first, sizes = [], [], []
    for number, (prompt, text) in enumerate(zip(prompts, texts, strict=True), 1):
        given, own = [*task.start, *task.tokenizer.encode(prompt)], task.tokenizer.encode(text)
        check(bool(own) and len(given) + len(own) > 1, "text", f"text {number} of {len(texts)} is empty; there is no token to score")
        rows.append(np.array([*given, *own, *end], np.int64))
        first.append(max(len(given), 1))  # without a begin token nothing foretells the first
        sizes.append(len(text.encode()) - len(task.tokenizer.decode(own[: first[-1] - len(given)]).encode()))
    nll = [np.zeros(len(row)) for row in rows]
    best = [np.zeros(len(row), np.int64) for row in rows]
    found = windows([len(row) for row in rows], first, length, stride or length)
    for piece in pieces([stop - start - 1 for _, start, _, stop in found], TOKENS[device_of(run).type]):
        part = [found[i] for i in piece]
        values, likeliest = _forward(run, [rows[text][start:stop] for text, start, _, stop in part])
        for i, (text, start, scored, stop) in enumerate(part):
            nll[text][scored:stop] = values[i, scored - start - 1 : stop - start - 1]
            best[text][scored:stop] = likeliest[i, scored - start - 1 : stop - start - 1]
    return [Score(names[i] if names else str(i + 1), row[k:], nll[i][k:], best[i][k:], sizes[i]) for i, (row, k) in enumerate(zip(rows, first, strict=True))]


def score_file(run: Run, path: str | Path, stride: int = 0) -> list[Score]:
    """A .txt, or one document a line of JSON with a ``document`` or ``text``: one ``Score`` a document, its end token among what is scored."""
    path = Path(path)
    check(path.is_file(), "--file", f"there is no file {path}; give a .txt, or a .jsonl with a document or text in every line")
    try:
        try:
            found = list(documents(str(path), "document"))
        except ConfigError as error:
            if error.path != "task.column":
                raise
            found = list(documents(str(path), "text"))
    except ConfigError as error:
        raise ConfigError("--file", error.message) from None
    check(bool(found), "--file", f"{path} has no text in it")
    return score(run, [text for _, text in found], stride=stride, ends=True, names=[name for name, _ in found])


def together(scores: Sequence[Score], name: str = "all") -> Score:
    tokens, nll, best = (np.concatenate([getattr(one, part) for one in scores]) for part in ("tokens", "nll", "best"))
    return Score(name, tokens, nll, best, sum(one.num_bytes for one in scores))


def summary(scores: Sequence[Score]) -> dict[str, str]:
    """What the command prints, of all texts together."""
    one = together(scores)
    return {
        "texts": f"{len(scores):,}",
        "tokens": f"{len(one.tokens):,}",
        "log-probability": f"{one.log_probability:.6g} nats",
        "nats per token": f"{one.nats_per_token:.6g}",
        "perplexity": f"{one.perplexity:.6g}",
        "bits per byte": f"{one.bits_per_byte:.6g}",
    }


def check_foretells(run: Run) -> None:
    """ConfigError unless the run's logits are those of the next token's softmax, given what stands before it."""
    check_writes(run)
    ahead = run.config.objective in ("cross_entropy", "cross_entropy_float64", "likelihood")
    model = run.config.model
    blind = not isinstance(model, DecoderConfig) or (model.causal and not any(name in LEAKY for name in model.mixers))
    fix = f"take a run that was trained by cross_entropy or likelihood, with model.causal true and no mixer that sees what comes later ({', '.join(LEAKY)})"
    check(ahead and blind, "run", f"{run.id} (objective {run.config.objective}) gives no probability of the next token; {fix}")


def windows(lengths: Sequence[int], first: Sequence[int], length: int, stride: int) -> list[tuple[int, int, int, int]]:
    """(text, start, scored, stop): tokens start to stop of it, at most length + 1, in which those from ``scored`` on are scored. Each, from ``first``, once."""
    found = []
    for text, (total, done) in enumerate(zip(lengths, first, strict=True)):
        start = 0
        while done < total:
            stop = min(start + length + 1, total)
            if stop > done:
                found.append((text, start, done, stop))
                done = stop
            start += stride
    return found


def pieces(lengths: Sequence[int], most: int) -> Iterator[list[int]]:
    """Numbers of rows, those of similar length together: at most ROWS of them, of ``most`` tokens with padding (one row has as many as it has)."""
    piece: list[int] = []
    for i in np.argsort(lengths, kind="stable").tolist():
        if piece and (len(piece) == ROWS or (len(piece) + 1) * lengths[i] > most):
            yield piece
            piece = []
        piece.append(i)
    if piece:
        yield piece


@torch.inference_mode()
def _forward(run: Run, rows: Sequence[NDArray[np.int64]]) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """-> nll and the likeliest tokens, [B, T], of each row's tokens but its first. Filled up at the right, which nothing before it sees."""
    tokens = torch.nn.utils.rnn.pad_sequence([torch.from_numpy(row) for row in rows], batch_first=True).to(device_of(run))
    hidden, _ = run.model(tokens[:, :-1], Context())
    nll, best = _nll(run, hidden, tokens[:, 1:])
    return nll.double().cpu().numpy(), best.cpu().numpy()


def _nll(run: Run, hidden: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    head = run.model.linear_head()
    if head is not None:
        return linear_cross_entropy(hidden, head[0], head[1], targets, head[2])
    logits = run.model.logits(hidden).float()
    return -logits.log_softmax(-1).gather(-1, targets.unsqueeze(-1)).squeeze(-1), logits.argmax(-1)


def table(scores: Sequence[Score], tokenizer: Tokenizer) -> str:
    """A line per token: its text, place (from 0), id, what it spells, nats, bits, what was likeliest. Spellings are JSON, so that each stays on its line."""
    spell = _spelling(scores, tokenizer)
    lines = ["\t".join(TABLE)]
    for one in scores:
        for place, (token, nll, best) in enumerate(zip(one.tokens.tolist(), one.nll.tolist(), one.best.tolist(), strict=True)):
            pair = [json.dumps(spell[token], ensure_ascii=False), json.dumps(spell[best], ensure_ascii=False)]
            lines.append(f"{one.name}\t{place}\t{token}\t{pair[0]}\t{nll:.6f}\t{nll / math.log(2):.6f}\t{pair[1]}")
    return "\n".join(lines) + "\n"


def page(scores: Sequence[Score], tokenizer: Tokenizer, vocab_size: int) -> str:
    """One HTML file without any request: the text, the more surprising a token the darker; full colour at log2(V) bits, what a blind guess costs."""
    spell, full = _spelling(scores, tokenizer), math.log2(vocab_size)
    left, parts = SHOWN, []
    for one in scores:
        spans = []
        for start, stop, text in _characters(one.tokens[:left].tolist(), tokenizer):
            bits, best = float(one.nll[start:stop].sum()) / math.log(2), json.dumps(spell[int(one.best[start])], ensure_ascii=False)
            told = f"{bits:.2f} bits, p = {2**-bits:.3g}; likeliest: {best}"
            shown = html.escape(text.replace("\n", "↵\n") or "·")  # · spells nothing: the end token
            spans.append(f'<span style="--s:{min(bits / full, 1):.3f}" title="{html.escape(told)}">{shown}</span>')
        left -= len(one.tokens)
        told = f"{len(one.tokens):,} tokens · perplexity {one.perplexity:.4g} · {one.bits_per_byte:.4g} bits per byte"
        parts.append(f"<h2>{html.escape(one.name)}</h2><p>{told}</p><pre>{''.join(spans)}</pre>")
        if left <= 0:
            parts.append(f"<p>The first {SHOWN:,} of {sum(len(one.tokens) for one in scores):,} tokens are shown.</p>")
            break
    return PAGE.format(full=full, body="\n".join(parts))


def _characters(tokens: Sequence[int], tokenizer: Tokenizer) -> Iterator[tuple[int, int, str]]:
    """(start, stop, text) of tokens one by one; those that are parts of one character together."""
    start = 0
    for stop in range(1, len(tokens) + 1):
        text = tokenizer.decode(tokens[start:stop])
        if not text.endswith("\ufffd") or stop - start == 4 or stop == len(tokens):
            yield start, stop, text
            start = stop


def _spelling(scores: Sequence[Score], tokenizer: Tokenizer) -> dict[int, str]:
    ids = np.unique(np.concatenate([x for one in scores for x in (one.tokens, one.best)]))
    return {token: tokenizer.decode([token]) for token in ids.tolist()}


PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="color-scheme" content="light dark"><title>surprise · shoal</title><style>
body {{ font: 16px/1.5 system-ui, sans-serif; max-width: 860px; margin: 24px auto; padding: 0 20px; }}
h2 {{ font-size: 17px; margin: 26px 0 0; }} p {{ color: #7a838f; font-size: 14px; margin: 2px 0 10px; }}
pre {{ font: 15px/1.75 ui-monospace, monospace; white-space: pre-wrap; overflow-wrap: anywhere; margin: 0; }}
span {{ background: rgb(217 115 13 / calc(var(--s) * 0.85)); border-radius: 3px; box-shadow: inset -1px 0 rgb(128 128 128 / 0.25); }}
.bar {{ height: 10px; width: 340px; border-radius: 3px; outline: 1px solid #8884; background: linear-gradient(90deg, #d9730d00, #d9730dd9); }}
.ends {{ width: 340px; display: flex; justify-content: space-between; }}
</style></head><body><div class="bar"></div><p class="ends"><i>0 bits: certain</i><i>{full:.1f} bits: a blind guess</i></p>
{body}
</body></html>
"""
