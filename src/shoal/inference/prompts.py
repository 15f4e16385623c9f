"""Prompts: from a file or a list to one batch of tokens, left-padded.

tokens, context = left_padded(all_encoded(run, ["def f(x):", "import"]))     # [B, T]; context has the mask and the place of every token
hidden, _ = run.model(tokens, context)
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from shoal.config import EncoderConfig
from shoal.config.fields import ConfigError, check
from shoal.contracts import Context
from shoal.train.run import Run

FORMS = "give a .json list of texts, .jsonl with prompt or text in every line, or plain text, one prompt a line"


def check_writes(run: Run) -> None:
    """ConfigError unless the run's model is about tokens."""
    classifies = isinstance(run.config.model, EncoderConfig)
    check(not classifies, "run", f"{run.id} says which class a sentence is of, and knows nothing of a next token; take a run that was trained on text")


def encoded(run: Run, prompt: str) -> list[int]:
    """The task's begin tokens and the text's. ConfigError ("prompt") if that is none, or for characters the tokenizer does not know."""
    check_writes(run)
    tokens = [*run.task.start, *run.task.tokenizer.encode(prompt)]
    check(bool(tokens), "prompt", "this task has no begin token; give at least one token to continue")
    return tokens


def left_padded(rows: Sequence[Sequence[int]], device: torch.device | str = "cpu") -> tuple[Tensor, Context]:
    """B rows of tokens -> int64 [B, T], T the longest row's, and mask and positions [B, T]. Rows of equal length need neither, so any model reads them."""
    longest = max(map(len, rows))
    tokens = torch.tensor([[0] * (longest - len(row)) + [*row] for row in rows], device=device)
    missing = torch.tensor([longest - len(row) for row in rows], device=device).unsqueeze(-1)
    if all(len(row) == longest for row in rows):
        return tokens, Context()
    place = torch.arange(longest, device=device) - missing
    return tokens, Context(mask=place >= 0, positions=place.clamp(min=0))


def all_encoded(run: Run, prompts: Sequence[str]) -> list[list[int]]:
    """``encoded``, of several; an error says which."""
    check(len(prompts) > 0, "prompt", "there is none; give at least one")
    found = []
    for number, prompt in enumerate(prompts, 1):
        try:
            found.append(encoded(run, prompt))
        except ConfigError as error:
            raise ConfigError("prompt" if len(prompts) == 1 else f"prompt {number}", error.message) from None
    return found


def device_of(run: Run) -> torch.device:
    return next(run.model.parameters()).device


def read(path: Path) -> list[str]:
    """The prompts of a file. ConfigError ("--prompts") naming the line that is not as it should be."""
    check(path.is_file(), "--prompts", f"there is no file {path}; {FORMS}")
    try:
        text = path.read_text(encoding="utf-8")
        match path.suffix:
            case ".json":
                found = json.loads(text)
                check(isinstance(found, list), "--prompts", f"{path} is no JSON list; {FORMS}")
                prompts = [_text(value, f"{path}, entry {number}") for number, value in enumerate(found, 1)]
            case ".jsonl":
                lines = [(number, line) for number, line in enumerate(text.split("\n"), 1) if line.strip()]  # JSON may have U+2028 as it is
                prompts = [_text(_json(line, f"{path}, line {number}"), f"{path}, line {number}") for number, line in lines]
            case _:
                prompts = [line for line in text.split("\n") if line]
    except UnicodeDecodeError as error:
        raise ConfigError("--prompts", f"{path} is no UTF-8 text ({error.reason} at byte {error.start}); {FORMS}") from None
    except json.JSONDecodeError as error:
        raise ConfigError("--prompts", f"{path} is no JSON ({error}); {FORMS}") from None
    check(bool(prompts), "--prompts", f"{path} has no prompt in it; {FORMS}")
    return prompts


def _json(line: str, where: str) -> Any:
    try:
        return json.loads(line)
    except json.JSONDecodeError as error:
        raise ConfigError("--prompts", f"{where} is no JSON ({error}); {FORMS}") from None


def _text(value: Any, where: str) -> str:
    """A text, or what an object has as "prompt" or "text"."""
    if isinstance(value, dict):
        value = value.get("prompt", value.get("text"))
    if not isinstance(value, str):
        raise ConfigError("--prompts", f'{where} is neither a text nor an object with a text as "prompt" or "text"; {FORMS}')
    return value
