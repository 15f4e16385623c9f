"""shoal trains many small sequence models at once, every seed and setting side by side in one program,
and tells you, with statistics, what they learned.

  shoal list                                        the studies: their questions and presets
  shoal run grokking --seeds 8                      train a study's runs, check its claims, write its report
  shoal run grokking --fields                       every field of the study and its value
  shoal train gpt.yaml --optimizer.lr 3e-3          train one run that a file describes
  shoal finetune reviews.csv                        a pretrained encoder, taught classes of sentences
  shoal flops gpt.yaml --budget 1e15                what it costs, before it is trained
  shoal generate runs/sanity --prompt "I love"      text from a trained run
  shoal score runs/sanity --file notes.txt          perplexity of a file, or how probable a text is
  shoal classify runs/flop-final reviews.csv        positive or negative, without training for it
  shoal diagnose runs/gpt                           what is wrong with a run, told from its curves
  shoal inspect runs/sanity --prompt "I love"       maps of attention, kinds of heads, the logit lens
  shoal attend average 1 2                          attention by hand: a query, or why there is none
  shoal report runs/grokking                        write a study's report again
  shoal data modular --p 97 --out table.tsv         a task's data as a table
  shoal verify                                      check the scan and the mixers against independent code

`shoal COMMAND --help` tells the options of a command.

Files     A study goes to runs/STUDY (runs/STUDY-PRESET if the preset is not the default) or to --out DIR:
          report.html, report.md, results.json, claims.json, figures/, fleets/. The same command resumes
          what was interrupted or has finished; a changed config is refused there.
Runs      RUN is DIR or DIR:ID. Without an ID it is the best run by the study's main metric, which is
          named on standard error.
Settings  Any field is set by its dotted path: --run.optimizer.lr 3e-3. --run.optimizer.type muon changes
          the kind. --grid.optimizer.lr 1e-3,1e-2 trains every combination. Values are YAML:
          --run.evaluate "[train, val]"; a flag alone means true. In `train`, `flops` and `data` paths
          start at the run and at the task: --optimizer.lr 3e-3, --p 113.
Output    Results go to standard output, progress and notes to standard error. Exit code 2: change what
          was asked, one line says how. 1: `verify` found something wrong. 130: interrupted.
"""

from __future__ import annotations

import ast
import contextlib
import importlib
import importlib.metadata
import importlib.util
import io
import itertools
import json
import math
import os
import shlex
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import tyro
from tyro.conf import FlagCreatePairsOff, Positional, arg

from shoal.commands import Attend, Classify, Device, Diagnose, Finetune, Inspect, Score, print_fields
from shoal.commands import driver as _driver
from shoal.commands import finish as _finish
from shoal.commands import has_gpu as _has_gpu
from shoal.config import LanguageConfig, ModularConfig, MQARConfig, RecallConfig, RunConfig, StudyConfig
from shoal.config.core import type_name
from shoal.config.fields import ConfigError, check
from shoal.config.load import load_run, nearest, override, parse_overrides

MAX_RUNS = 2000  # more have to be confirmed with --yes


@dataclass(frozen=True, kw_only=True)
class List:
    """The studies: what each asks, and its presets. Example: shoal list"""

    target: ClassVar = ()

    def __call__(self) -> None:
        from shoal.studies import STUDIES

        width = max(map(len, STUDIES))
        for name, module in STUDIES.items():
            question, presets = _summary(module)
            print(f"{name:{width}}  {question}\n{'':{width}}  presets: {', '.join(presets)}")


@dataclass(frozen=True, kw_only=True)
class Run:
    """Train what a study wants, check its claims, write its report. The same command resumes it.

    Any field can be changed, --run.optimizer.lr 3e-3, or varied, --grid.optimizer.lr 1e-3,1e-2; `shoal run STUDY --fields` lists them.

    Example: shoal run grokking --seeds 8
    """

    target: ClassVar = (StudyConfig,)
    study: Annotated[Positional[str], arg(metavar="STUDY")]  # a name from `shoal list`
    preset: Annotated[str | None, arg(metavar="NAME", help_behavior_hint="(default: by device)")] = None  # one of the study's presets
    seeds: Annotated[str | None, arg(metavar="N", help_behavior_hint="(default: the preset's)")] = None  # how many seeds
    device: Device = "auto"  # where to train
    out: Annotated[Path | None, arg(metavar="DIR", help_behavior_hint="(default: runs/STUDY)")] = None  # directory for the results
    fields: FlagCreatePairsOff[bool] = False  # print the fields of the preset and train nothing
    yes: FlagCreatePairsOff[bool] = False  # allow more than 2,000 runs
    max_runs_per_fleet: Annotated[int, arg(metavar="N")] = 0  # runs trained side by side at most; 0 = as many as memory allows
    compile: Literal["auto", "on", "off"] = "auto"  # compile the training step
    workers: Annotated[int, arg(metavar="N")] = 1  # fleets trained at once, each in its own process; with several GPUs on each in turn

    def __call__(self, overrides: Mapping[str, Any], command: str) -> None:
        from shoal.studies import STUDIES

        check(self.max_runs_per_fleet >= 0, "--max-runs-per-fleet", f"must be 0 (as memory allows) or more, not {self.max_runs_per_fleet}")
        module = importlib.import_module(_pick(self.study, STUDIES, "study"))
        default = module.DEFAULT[_has_gpu(self.device)]
        preset = self.preset or default
        seeds = parse_overrides([f"--seeds={self.seeds}"]) if self.seeds else {}
        config: StudyConfig = override(_pick(preset, module.PRESETS, f"preset of {self.study}")(), {**overrides, **seeds})
        if self.fields:
            return print_fields(config)
        varied = [*(["the variants"] if config.variants else []), *config.grid]
        many = f"{config.num_runs:,} runs ({config.seeds} seeds of every combination of {', '.join(varied) or 'one config'})"
        check(config.num_runs <= MAX_RUNS or self.yes, "grid", f"{many}; more than {MAX_RUNS:,} need --yes")
        out = self.out or Path("runs", self.study if preset == default else f"{self.study}-{preset}")
        limits = {"max_runs_per_fleet": self.max_runs_per_fleet or None, "compile": self.compile, "workers": self.workers}
        _finish(_driver().run(module.study(config), out, device=self.device, preset=preset, command=command, **limits))


@dataclass(frozen=True, kw_only=True)
class Train:
    """Train one run that a YAML file describes. Any field can be changed: --optimizer.lr 3e-3.

    Example: shoal train gpt.yaml --steps 2000
    """

    target: ClassVar = (RunConfig,)
    config: Annotated[Positional[Path], arg(metavar="CONFIG.yaml")]  # fields of a run; what is not there has its default
    device: Device = "auto"  # where to train
    out: Annotated[Path | None, arg(metavar="DIR", help_behavior_hint="(default: runs/CONFIG)")] = None  # directory for the results

    def __call__(self, overrides: Mapping[str, Any], command: str) -> None:
        run = load_run(self.config, overrides)
        _has_gpu(self.device)
        _finish(_driver().train(run, self.out or Path("runs", self.config.stem), device=self.device, command=command))


@dataclass(frozen=True, kw_only=True)
class Flops:
    """What a run costs before it is trained: its parameters, its FLOPs by three rules, where they go, what a budget pays for.

    assignment: 6 parameters + 12 layers width length a token. products: matrix products, forward and backward. hardware: all that a GPU executes.
    Any field can be changed: --model.width 128.

    Example: shoal flops gpt.yaml --budget 1e15
    """

    target: ClassVar = (RunConfig,)
    config: Annotated[Positional[Path], arg(metavar="CONFIG.yaml")]  # fields of a run; what is not there has its default

    def __call__(self, overrides: Mapping[str, Any], command: str) -> None:
        run = load_run(self.config, overrides)
        if isinstance(run.task, LanguageConfig):
            _say(f"reading {run.task.corpus}; a text that is new here is encoded first")
        from shoal.train.flops import explain
        from shoal.train.plan import validate

        validate(run)
        print(explain(run))


@dataclass(frozen=True, kw_only=True)
class Generate:
    """Continue a text with a trained run: as it comes; or several texts or temperatures side by side, with how much each temperature repeats itself.

    Several: shoal generate runs/gpt --prompts prompts.json --temperature 0,0.7,1 --samples 3

    Example: shoal generate runs/sanity --prompt "I love"
    """

    target: ClassVar = ()
    run: Annotated[Positional[str], arg(metavar="RUN")]  # DIR or DIR:ID
    prompt: Annotated[str | None, arg(metavar="TEXT", help_behavior_hint="")] = None  # what the model reads first
    prompts: Annotated[Path | None, arg(metavar="FILE", help_behavior_hint="")] = None  # or several: a .json list, .jsonl with prompt or text, or one a line
    tokens: Annotated[int, arg(metavar="N")] = 0  # how many at most; 0 = as far as the positions reach that were trained on
    temperature: Annotated[str, arg(metavar="T[,T..]")] = "0"  # 0 = always the likeliest token
    top_k: Annotated[int, arg(metavar="K")] = 0  # draw from the K likeliest tokens; 0 = from all
    top_p: Annotated[float, arg(metavar="P")] = 1.0  # draw from the fewest likeliest tokens that together have this probability; 1 = from all
    repetition_penalty: Annotated[float, arg(metavar="X")] = 1.0  # divides the logits of tokens that occur already (Keskar et al. 2019); 1 = none
    samples: Annotated[int, arg(metavar="N")] = 1  # of each prompt at each temperature; sample s has the seed S + s
    seed: Annotated[int, arg(metavar="S")] = 0  # of the draws, at a temperature above 0
    steps: Annotated[int, arg(metavar="N")] = 0  # of masked diffusion, to fill all places; 0 = one for each token
    out: Annotated[Path | None, arg(metavar="FILE.jsonl", help_behavior_hint="")] = None  # also write prompt, temperature, seed, text and tokens, a line each
    device: Device = "auto"  # where to generate

    def __call__(self) -> None:
        temperatures = self._check()
        found = _has_gpu(self.device)
        from shoal.inference.compare import side_by_side, table
        from shoal.inference.generate import stream
        from shoal.inference.prompts import read
        from shoal.inference.sampling import Sampling

        texts = [self.prompt] if self.prompt is not None else read(self.prompts or Path())
        run = _driver().load(self.run)
        if found:
            run.model.to("cuda")
        options = {"top_k": self.top_k, "top_p": self.top_p, "penalty": self.repetition_penalty}
        tokens, steps = self.tokens or None, self.steps or None
        if len(texts) * len(temperatures) * self.samples == 1 and self.out is None:
            for piece in stream(run, texts[0], tokens, Sampling(temperature=temperatures[0], **options), self.seed, steps):
                print(piece, end="", flush=True)
            return print()
        lines = side_by_side(run, texts, temperatures, self.samples, tokens, self.seed, steps=steps, **options)
        if self.out is not None:
            from shoal.tasks.stream import write_new

            write_new(self.out, (json.dumps(line, ensure_ascii=False) + "\n" for line in lines))
        print(table(lines) if len(lines) > 1 else lines[0]["text"])

    def _check(self) -> list[float]:
        """The temperatures."""
        try:
            temperatures = [float(part) for part in self.temperature.split(",")]
        except ValueError:
            raise ConfigError("--temperature", f"give a number, or several such as 0,0.7,1, not {self.temperature!r}") from None
        for temperature in temperatures:
            check(0 <= temperature < math.inf, "--temperature", f"must be 0 (the likeliest token) or more, not {temperature}")
        check(len(set(temperatures)) == len(temperatures), "--temperature", f"give each once, not {self.temperature}")
        check((self.prompt is None) != (self.prompts is None), "--prompt", "give a text, or a file of them with --prompts; one of the two")
        check(self.tokens >= 0, "--tokens", f"must be 0 (as far as the positions reach) or more, not {self.tokens}")
        check(self.top_k >= 0, "--top-k", f"must be 0 (all tokens) or more, not {self.top_k}")
        check(0 < self.top_p <= 1, "--top-p", f"must lie above 0 and not above 1 (all tokens), not {self.top_p}")
        check(0 < self.repetition_penalty < math.inf, "--repetition-penalty", f"must be above 0 (1 = none), not {self.repetition_penalty}")
        check(self.samples >= 1, "--samples", f"must be 1 or more, not {self.samples}")
        check(self.steps >= 0, "--steps", f"must be 0 (one for each token) or more, not {self.steps}")
        check(0 <= self.seed <= 2**31 - self.samples, "--seed", f"is a whole number from 0 to 2**31 - {self.samples}, not {self.seed}")
        if self.out is not None:
            check(not self.out.exists(), "--out", f"{self.out} exists already; name another file or remove this one")
            check(self.out.parent.is_dir(), "--out", f"there is no directory {self.out.parent}")
        return temperatures


@dataclass(frozen=True, kw_only=True)
class Report:
    """Write a study's report, figures and claims again from its stored results.

    Example: shoal report runs/grokking
    """

    target: ClassVar = ()
    directory: Annotated[Positional[Path], arg(metavar="DIR")]  # where the study was written

    def __call__(self) -> None:
        print(_driver().report(self.directory))


@dataclass(frozen=True, kw_only=True)
class Data:
    """Write a task's data as a table, and print its counts and hash. Any field of the task can be set: --p 113 --train-fraction 0.3.

    modular: a op b = c, all rows, with their splits. Residues modulo p are numbers, permutations of S5 the images of 0 to 4; div+mul is one table of both.
    recall, mqar: the test sequences of a seed, the positions that are asked (from 0), and the answers.
    language: the documents of a corpus, their sizes and splits; and how well tokens can be foretold without a model (nats).

    Example: shoal data modular --p 97 --operation div+mul --split paired --out table.tsv
    """

    target: ClassVar = (ModularConfig, RecallConfig, MQARConfig, LanguageConfig)
    task: Annotated[Positional[Literal["modular", "recall", "mqar", "language"]], arg(metavar="TASK")]  # modular, recall, mqar or language
    out: Annotated[Path, arg(metavar="FILE.tsv")]  # columns a, op, b, result, split; or sequence, positions, answers; or document, bytes, tokens, split
    seed: Annotated[int, arg(metavar="N")] = 0  # of the split, or of the test sequences

    def __call__(self, overrides: Mapping[str, Any], command: str) -> None:
        check(0 <= self.seed < 2**31, "--seed", f"is a whole number from 0 to 2**31 - 1, not {self.seed}")
        config = override({type_name(kind): kind for kind in self.target}[self.task](), overrides)
        check(not self.out.is_dir(), "--out", f"{self.out} is a directory; name a file in it")
        check(self.out.parent.is_dir(), "--out", f"there is no directory {self.out.parent}")
        from shoal.tasks import export

        facts = export(config, self.seed, self.out)
        for name, value in (*((name, facts[name]) for name in facts if name != "notes"), *(("note", note) for note in facts.get("notes", ()))):
            print(f"{name}: {value}")


@dataclass(frozen=True, kw_only=True)
class Verify:
    """Is what is installed right? Compares every form of the selective scan with a loop in float64, every mixer with itself run by run and token by
    token, and Mamba with that of transformers and mambapy where these are installed. Exit code 1 if anything is off.

    Example: shoal verify
    """

    target: ClassVar = ()

    def __call__(self) -> None:
        from shoal.verify import checks, table

        found = list(checks())
        print(table(found))
        wrong = [check.name for check in found if not check.ok]
        if wrong:
            raise SystemExit(_stop(f"not as it should be: {'; '.join(wrong)}", 1))


COMMANDS: dict[str, Any] = {
    "list": List,
    "run": Run,
    "train": Train,
    "flops": Flops,
    "finetune": Finetune,
    "generate": Generate,
    "score": Score,
    "classify": Classify,
    "diagnose": Diagnose,
    "inspect": Inspect,
    "attend": Attend,
    "report": Report,
    "data": Data,
    "verify": Verify,
}


def main(argv: Sequence[str] | None = None) -> int:
    """The exit code: 0, 2 for what the user must change (one message on standard error), 130 when interrupted."""
    args = list(sys.argv[1:] if argv is None else argv)
    with warnings.catch_warnings():
        warnings.showwarning = lambda message, *_, **__: _say(f"note: {' '.join(str(message).split())}")
        try:
            _dispatch(args)
            sys.stdout.flush()
        except ConfigError as error:
            return _stop(str(error), 2)
        except BrokenPipeError:  # `shoal list | head`: nobody reads on, which is no error
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        except OSError as error:
            return _stop(": ".join(str(part) for part in (error.filename, error.strerror or error) if part), 2)
        except KeyboardInterrupt:
            return _stop("stopped; the same command resumes", 130)
    return 0


def _dispatch(args: list[str]) -> None:
    if not args or args[0] in ("-h", "--help", "help"):
        return print(__doc__)
    if args[0] == "--version":
        return print("shoal", importlib.metadata.version("shoal"))
    command = _pick(args[0], COMMANDS, "command")
    ours, theirs = _split(args[1:], command)
    parsed = _parse(command, args[0], ours)
    if not command.target:
        parsed()
    else:
        parsed(parse_overrides(theirs), shlex.join(["shoal", *args]))


def _split(args: list[str], command: Any) -> tuple[list[str], list[str]]:
    """The command's own arguments, and all the other ``--a.b value`` for a command that has a ``target`` (or one of several) to override."""
    options = {f.name: "bool" not in str(f.type) for f in fields(command)} | {"help": False}  # name -> takes a value
    settings = [f.name for target in command.target for f in fields(target)]
    ours: list[str] = []
    theirs: list[str] = []
    while args:
        head, *args = args
        flag, equals, _ = head.partition("=")
        name = flag[2:].replace("-", "_") if flag.startswith("--") else ""
        near = nearest(name, [*options, *settings])
        unknown = name and name not in options and name not in settings
        if unknown and (not command.target or ("." not in name and near.startswith("did you mean"))):
            raise ConfigError(flag, f"unknown option; {near}")
        takes_value = bool(name and not equals and args and not args[0].startswith("--") and options.get(name, True))
        (ours if not name or name in options else theirs).extend([head, *args[:takes_value]])
        args = args[takes_value:]
    return ours, theirs


def _parse(command: Any, name: str, args: list[str]) -> Callable[..., None]:
    """tyro's parser; its error box becomes one line."""
    box = io.StringIO()
    try:
        with contextlib.redirect_stderr(box):
            return tyro.cli(command, prog=f"shoal {name}", args=args, use_underscores=False)
    except SystemExit as exit:
        if not exit.code:
            raise
        _title, *lines = [text for line in box.getvalue().splitlines() if (text := line.strip("│╰╯ "))]
        body = itertools.dropwhile(lambda line: not line.strip("─-"), lines)  # a rule under the title where the terminal has no box characters
        text = " ".join(itertools.takewhile(lambda line: line.strip("─-") and "Got errors" not in line, body))
        raise ConfigError("", f"{text.rstrip('.')}; see shoal {name} --help") from None


def _pick(name: str, known: Mapping[str, Any], kind: str) -> Any:
    check(name in known, "", f"unknown {kind} {name!r}; {nearest(name, known)}" if name not in known else "")
    return known[name]


def _summary(module: str) -> tuple[str, list[str]]:
    """Question and presets of a study, read from its source: importing it would import torch."""
    spec = importlib.util.find_spec(module)
    assert spec is not None and spec.origin is not None
    tree = ast.parse(Path(spec.origin).read_text(encoding="utf-8"))
    presets: list[str] = []
    for node in tree.body:
        match node:
            case (
                ast.Assign(targets=[ast.Name(id="PRESETS")], value=ast.Dict(keys=keys))
                | ast.AnnAssign(target=ast.Name(id="PRESETS"), value=ast.Dict(keys=keys))
            ):
                presets = [str(key.value) for key in keys if isinstance(key, ast.Constant)]
    return (ast.get_docstring(tree) or "").partition("\n")[0], presets


def _say(message: str) -> None:
    print("shoal:", message.strip(), file=sys.stderr)


def _stop(message: str, code: int) -> int:
    _say(message)
    return code


if __name__ == "__main__":
    sys.exit(main())
