"""What a model writes after some prompts at some temperatures, side by side, and how much it repeats itself.

    lines = side_by_side(run, ["def f(x):", "import"], temperatures=(0, 0.7, 1.0), samples=2)
    print(table(lines))
    measures([line["tokens"] for line in lines])      # {"repetition": .., "distinct-1": .., "distinct-2": ..}

n-grams are of tokens. Repetition is the share of the 4-grams that were in the same text before; distinct-n the number of different n-grams in all texts over
that of all their n-grams (Li et al. 2016, arXiv 1510.03055): it falls with the amount of text, so compare it between equal amounts.
"""

from __future__ import annotations

import io
import math
import shutil
from collections.abc import Sequence
from itertools import chain
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from shoal.inference.generate import continued
from shoal.inference.sampling import Sampling
from shoal.train.run import Run

REPEATED = 4  # tokens of the n-grams that repetition counts
NARROWEST = 24  # columns of a text


def side_by_side(
    run: Run, prompts: Sequence[str], temperatures: Sequence[float] = (0.0,), samples: int = 1, max_tokens: int | None = None, seed: int = 0,
    *, top_k: int = 0, top_p: float = 1.0, penalty: float = 1.0, steps: int | None = None,
) -> list[dict[str, Any]]:  # fmt: skip
    """A line for each prompt, sample and temperature: "prompt", "temperature", "seed", "text", "tokens" (ids). Sample s has the seed ``seed`` + s."""
    settings = [Sampling(temperature=t, top_k=top_k, top_p=top_p, penalty=penalty) for t in temperatures]
    asked = [(prompt, seed + s) for prompt in prompts for s in range(samples)]
    columns = [continued(run, [prompt for prompt, _ in asked], max_tokens, how, [seed for _, seed in asked], steps) for how in settings]
    return [
        {"prompt": prompt, "temperature": how.temperature, "seed": seed, "text": run.task.tokenizer.decode(tokens), "tokens": tokens}
        for (prompt, seed), row in zip(asked, zip(*columns, strict=True), strict=True)
        for how, tokens in zip(settings, row, strict=True)
    ]


def measures(texts: Sequence[Sequence[int]]) -> dict[str, float]:
    """Of texts as tokens; NaN where none is long enough."""
    repeated = [(len(grams) - len(set(grams)), len(grams)) for grams in (ngrams(text, REPEATED) for text in texts)]
    found = {"repetition": _share(sum(again for again, _ in repeated), sum(count for _, count in repeated))}
    for n in (1, 2):
        grams = list(chain.from_iterable(ngrams(text, n) for text in texts))
        found[f"distinct-{n}"] = _share(len(set(grams)), len(grams))
    return found


def _different(lines: Sequence[dict[str, Any]], temperature: float) -> list[Sequence[int]]:
    """The texts at a temperature; at 0, where a sample is the same as any other, each once."""
    found = [line for line in lines if line["temperature"] == temperature]
    return [line["tokens"] for line in (found if temperature else {(line["prompt"], *line["tokens"]): line for line in found}.values())]


def ngrams(tokens: Sequence[int], n: int) -> list[tuple[int, ...]]:
    return [tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1)]


def _share(some: int, all: int) -> float:
    return some / all if all else math.nan


def table(lines: Sequence[dict[str, Any]], width: int = 0) -> str:
    """The lines of ``side_by_side``: a row for each prompt and sample, a column for each temperature, and below what ``measures`` says of each column.

    ``width`` in characters; 0 = the terminal's.
    """
    temperatures = list(dict.fromkeys(line["temperature"] for line in lines))
    made = Table(box=SIMPLE_HEAD, show_lines=True, pad_edge=False)
    made.add_column("prompt", max_width=NARROWEST, overflow="fold")
    for temperature in temperatures:
        made.add_column(f"temperature {temperature:g}", min_width=NARROWEST, ratio=1, overflow="fold")
    for start in range(0, len(lines), len(temperatures)):
        row = lines[start : start + len(temperatures)]
        made.add_row(*map(Text, (row[0]["prompt"], *(line["text"] for line in row))))
    found = [measures(_different(lines, temperature)) for temperature in temperatures]
    for name in found[0]:
        made.add_row(name, *("none" if math.isnan(column[name]) else f"{column[name]:.3f}" for column in found))
    least = (NARROWEST + 3) * (len(temperatures) + 1)
    console = Console(file=io.StringIO(), width=max(width or shutil.get_terminal_size().columns, least), color_system=None)
    console.print(made)
    return "\n".join(line.rstrip() for line in console.file.getvalue().strip("\n").splitlines())  # pyright: ignore[reportAttributeAccessIssue]
