"""The command line: what it passes on, what it prints where, and one line with exit code 2 for whatever is wrong."""

from __future__ import annotations

import json
import math
import subprocess
import sys
import time
import types
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

import shoal.studies
from shoal import cli
from shoal.config import ModularConfig, RunConfig, StudyConfig, flatten
from shoal.config.fields import ConfigError
from shoal.inference import compare
from shoal.inference.sampling import Sampling

TOY = '''"""Does a toy learn? Said in the first line.

More.
"""
from types import SimpleNamespace
from shoal.config import RunConfig, StudyConfig

def quick(): return StudyConfig(run=RunConfig(steps=10), seeds=2)
def full(): return StudyConfig(run=RunConfig(steps=1000), grid={"optimizer.lr": [1e-3, 1e-2]})
def study(config): return SimpleNamespace(name="toy", config=config)

PRESETS = {"quick": quick, "full": full}
DEFAULT = ("quick", "full")
'''


@pytest.fixture
def toy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """A toy study, and a driver that only writes down how it was called."""
    calls: list[tuple[Any, ...]] = []
    claims = [
        {"claim": "It learns.", "verdict": "held", "value": 0.98765, "interval": [0.9, 1.0], "n": 4},
        {"claim": "It is fast", "verdict": "undecided", "value": math.nan, "interval": [-math.inf, math.inf], "n": 0},
    ]

    def record(name: str, result: Any) -> Any:
        def call(*args: Any, **options: Any) -> Any:
            calls.append((name, args, options))
            return result

        return call

    driver: Any = types.ModuleType("shoal.studies.driver")
    driver.run = record("run", types.SimpleNamespace(claims=claims, report=Path("there/report.html")))
    driver.train = record("train", types.SimpleNamespace(claims=[], report=Path("there/report.html")))
    driver.report = record("report", Path("there/report.html"))
    driver.load = record("load", "a run")
    monkeypatch.setattr(compare, "side_by_side", record("side_by_side", [{"text": "some text"}]))
    monkeypatch.setattr(sys.modules["shoal.inference.generate"], "stream", record("stream", iter(["some", " text"])))  # the package has a function generate
    monkeypatch.setitem(sys.modules, "shoal.studies.driver", driver)
    (tmp_path / "toy_study.py").write_text(TOY)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "toy_study", raising=False)
    monkeypatch.setattr(shoal.studies, "STUDIES", {"toy": "toy_study"})
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.chdir(tmp_path)
    return calls


def run(capsys: pytest.CaptureFixture[str], line: str | list[str]) -> tuple[int, str, str]:
    try:
        code = cli.main(line.split() if isinstance(line, str) else line)
    except SystemExit as exit:  # tyro's --help
        code = int(exit.code or 0)
    printed = capsys.readouterr()
    return code, printed.out, printed.err


# --- what is passed on, and printed ---


def test_run(toy: list[Any], capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = run(capsys, "run toy --seeds 3 --run.optimizer.lr 3e-3 --device cpu --grid.task.p=5,7 --out there --max-runs-per-fleet 4 --compile off")
    assert (code, err) == (0, "")
    assert out == "held       It learns: 0.9877 [0.9, 1], n = 4\nundecided  It is fast: nan no interval, n = 0\nthere/report.html\n"
    [(name, (study, directory), options)] = toy
    assert (name, directory) == ("run", Path("there"))
    assert study.config.seeds == 3 and study.config.run.optimizer.lr == 3e-3 and study.config.grid == {"task.p": [5, 7]}
    assert options.pop("command").startswith("shoal run toy --seeds 3 ")
    assert options == {"device": "cpu", "preset": "quick", "max_runs_per_fleet": 4, "compile": "off", "workers": 1}


def test_run_defaults(toy: list[Any], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    run(capsys, "run toy")
    run(capsys, "run toy --preset full")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    run(capsys, "run toy")
    run(capsys, "run toy --device cpu")
    assert [(options["preset"], str(args[1])) for _, args, options in toy] == [
        ("quick", "runs/toy"),
        ("full", "runs/toy-full"),
        ("full", "runs/toy"),
        ("quick", "runs/toy"),
    ]


def test_settings_before_the_study(toy: list[Any], capsys: pytest.CaptureFixture[str]) -> None:
    assert run(capsys, "run --run.steps 7 --first-seed 5 toy --run.model.tied")[0] == 0
    config = toy[0][1][0].config
    assert (config.run.steps, config.first_seed, config.run.model.tied) == (7, 5, True)


def test_run_fields(toy: list[Any], capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, "run toy --preset full --fields --run.steps 77")
    lines = [line.split(maxsplit=3) for line in out.splitlines()]
    assert code == 0 and toy == []
    assert ["run.steps", "per", "run", "77"] in lines
    assert ["run.task.p", "structural", "97"] in lines
    assert ["run.optimizer.type", "structural", "adamw"] in lines
    assert ["grid", "study", "{'optimizer.lr':", "[0.001, 0.01]}"] in lines


def test_many_runs_need_yes(toy: list[Any], capsys: pytest.CaptureFixture[str]) -> None:
    line = "run toy --seeds 1001 --grid.optimizer.lr 1e-3,1e-2"
    assert run(capsys, line) == (2, "", "shoal: grid: 2,002 runs (1001 seeds of every combination of optimizer.lr); more than 2,000 need --yes\n")
    assert toy == []
    assert run(capsys, f"{line} --yes")[0] == 0


def test_list(toy: list[Any], capsys: pytest.CaptureFixture[str]) -> None:
    assert run(capsys, "list") == (0, "toy  Does a toy learn? Said in the first line.\n     presets: quick, full\n", "")
    assert "toy_study" not in sys.modules, "listing imports no study"


def test_train(toy: list[Any], capsys: pytest.CaptureFixture[str]) -> None:
    Path("small.yaml").write_text("steps: 5\n")
    assert run(capsys, "train small.yaml --optimizer.type muon --clip 1") == (0, "there/report.html\n", "")
    [(name, (config, directory), options)] = toy
    assert (name, directory, config.steps, config.clip, type(config.optimizer).__name__) == ("train", Path("runs/small"), 5, 1.0, "Muon")
    assert options == {"device": "auto", "command": "shoal train small.yaml --optimizer.type muon --clip 1"}


def test_generate(toy: list[Any], capsys: pytest.CaptureFixture[str]) -> None:
    assert run(capsys, ["generate", "runs/toy:abc", "--prompt", "I love", "--tokens", "5", "--temperature", "0.5"]) == (0, "some text\n", "")
    how = Sampling(temperature=0.5)
    assert toy == [("load", ("runs/toy:abc",), {}), ("stream", ("a run", "I love", 5, how, 0, None), {})]
    toy.clear()
    Path("two.json").write_text('["a", "b"]')
    assert run(capsys, "generate runs/toy --prompts two.json --temperature 0,1 --samples 2 --top-k 5 --seed 3 --steps 9") == (0, "some text\n", "")
    options = {"steps": 9, "top_k": 5, "top_p": 1.0, "penalty": 1.0}
    assert toy == [("load", ("runs/toy",), {}), ("side_by_side", ("a run", ["a", "b"], [0.0, 1.0], 2, None, 3), options)]


def test_report(toy: list[Any], capsys: pytest.CaptureFixture[str]) -> None:
    assert run(capsys, "report runs/toy") == (0, "there/report.html\n", "")
    assert toy == [("report", (Path("runs/toy"),), {})]


def test_data(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "table.tsv"
    code, out, _ = run(capsys, f"data modular --p 7 --operation div --train-fraction 0.3 --out {path} --seed 4")
    assert code == 0
    rows = [line.split("\t") for line in path.read_text().splitlines()]
    assert len(rows) == 1 + 7 * 6 and len(rows[0]) == 5
    assert all(int(a) == int(b) * int(result) % 7 for a, _, b, result, _ in rows[1:])
    assert "hash" in out and "train: 13" in out
    run(capsys, f"data modular --p 7 --operation div --train-fraction 0.3 --out {path}.5 --seed 5")
    assert Path(f"{path}.5").read_text() != path.read_text(), "the seed chooses the split"
    assert run(capsys, f"data modular --p 7 --out {path}")[0] == 2, "a table that is there is not overwritten"


# --- bad command lines: exit code 2, one line, nothing on standard output, nothing trained ---

BAD = {
    "rum": "unknown command 'rum'; did you mean run?",
    "--foo": "unknown command '--foo'; known here: list, run, train, flops, finetune, generate, score, classify, diagnose, inspect, attend, report, data, "
    "verify",
    "list extra": "Unrecognized options: extra; see shoal list --help",
    "list --foo 3": "--foo: unknown option; known here: help",
    "run": "Missing from shoal run: STUDY a name from `shoal list` (required); see shoal run --help",
    "run toi": "unknown study 'toi'; did you mean toy?",
    "run zzz": "unknown study 'zzz'; known here: toy",
    "run toy extra": "Unrecognized options: extra; see shoal run --help",
    "run toy --preset quik": "unknown preset of toy 'quik'; did you mean quick?",
    "run toy --preset": "Missing value for argument '--preset'. Expected 1 values; see shoal run --help",
    "run toy --seeds x": 'seeds: expected a whole number, not "x"',
    "run toy --seeds 0": "seeds: at least 1 seed is needed, not 0",
    "run toy --seeds": "Missing value for argument '--seeds'. Expected 1 values; see shoal run --help",
    "run toy --device gpu": "invalid choice 'gpu' for argument '--device'. Expected one of ('auto', 'cpu', 'cuda'); see shoal run --help",
    "run toy --device cuda": '--device: "cuda" is not available here; use --device cpu',
    "run toy --devise cpu": "--devise: unknown option; did you mean device?",
    "run toy --sed 3": "--sed: unknown option; did you mean seeds?",
    "run toy --max-runs-per-fleet -1": "--max-runs-per-fleet: must be 0 (as memory allows) or more, not -1",
    "run toy --max-runs-per-fleet x": "Error parsing --max-runs-per-fleet: invalid literal for int() with base 10: 'x'; see shoal run --help",
    "run toy --lr 3": "lr: unknown key; did you mean run.optimizer.lr?",
    "run toy --run.optimizer.weight_decay 3": "run.optimizer.weight_decay: unknown key; did you mean wd?",
    "run toy --run.steps x": 'run.steps: expected a whole number, not "x"',
    "run toy --run.steps": "run.steps: needs a value: --run.steps VALUE",
    "run toy --run.steps 3 --run.steps 4": "run.steps: given twice",
    "run toy --grid.task.p []": "grid.task.p: the list of values is empty; give at least one or remove the line",
    "run toy --preset full --run.optimizer.lr 1": "run.optimizer.lr: has no effect, the grid varies it; use --grid.optimizer.lr VALUE,VALUE",
    "train": "Missing from shoal train: CONFIG.yaml fields of a run; what is not there has its default (required); see shoal train --help",
    "train nope.yaml": "nope.yaml: no such file or directory",
    "train .": ".: is a directory; name a YAML file in it",
    "train bad.yaml": "bad.yaml:2: optimizer.weight_decay: unknown key; did you mean wd?",
    "train good.yaml --lr 3": "lr: unknown key; did you mean optimizer.lr?",
    "train good.yaml --step 3": "--step: unknown option; did you mean steps?",
    "train good.yaml --device cuda": '--device: "cuda" is not available here; use --device cpu',
    "generate runs/toy": "--prompt: give a text, or a file of them with --prompts; one of the two",
    "generate runs/toy --prompt x --tokens -1": "--tokens: must be 0 (as far as the positions reach) or more, not -1",
    "generate runs/toy --prompt x --temperature -1": "--temperature: must be 0 (the likeliest token) or more, not -1.0",
    "generate runs/toy --prompt x --temperature nan": "--temperature: must be 0 (the likeliest token) or more, not nan",
    "generate runs/toy --prompt x --seed -1": "--seed: is a whole number from 0 to 2**31 - 1, not -1",
    "generate runs/toy --prompt x --top-p 0": "--top-p: must lie above 0 and not above 1 (all tokens), not 0.0",
    "generate runs/toy --prompt x --temprature 1": "--temprature: unknown option; did you mean temperature?",
    "report": "Missing from shoal report: DIR where the study was written (required); see shoal report --help",
    "data": "Missing from shoal data: TASK modular, recall, mqar or language (required) "
    "--out FILE.tsv columns a, op, b, result, split; or sequence, positions, answers; or document, bytes, tokens, split (required); "
    "see shoal data --help",
    "data mod --out x.tsv": "invalid choice 'mod' for argument 'task'. Expected one of ('modular', 'recall', 'mqar', 'language'); see shoal data --help",
    "data modular --out nowhere/x.tsv": "--out: there is no directory nowhere",
    "data modular --out .": "--out: . is a directory; name a file in it",
    "data recall --out x.tsv --num-queries 17": "num_queries: must lie between 1 and the 16 tokens, not 17",
    "data recall --out x.tsv --lenght 7": "--lenght: unknown option; did you mean length?",
    "data mqar --out x.tsv --input-seq-len 63": "input_seq_len: must be even, not 63",
    "data mqar --out x.tsv --num-pairs 7": "--num-pairs: unknown option; did you mean num_kv_pairs?",
    "data modular --out x.tsv --operatoin add": "--operatoin: unknown option; did you mean operation?",
    "data modular --out x.tsv --p 1": "p: the modulus must be 2 or more, not 1",
    "data modular --out x.tsv --operation dvi": "operation: unknown operation 'dvi'; did you mean 'div'?",
    "data modular --out x.tsv --train-fraction 1.5": "train_fraction: must lie strictly between 0 and 1, not 1.5",
    "data modular --out x.tsv --train-fraction 0.95": "train_fraction: train + val + test fractions sum to 1.05, past 1; lower one of them",
}


@pytest.mark.parametrize("line", BAD)
def test_bad_command_line(toy: list[Any], capsys: pytest.CaptureFixture[str], line: str) -> None:
    Path("bad.yaml").write_text("optimizer: {type: adamw,\n weight_decay: 3}\n")
    Path("good.yaml").write_text("steps: 3\n")
    before = sorted(Path().iterdir())
    assert run(capsys, line) == (2, "", f"shoal: {BAD[line]}\n")
    assert toy == [] and sorted(Path().iterdir()) == before


@pytest.mark.parametrize(
    ("error", "code", "text"),
    [
        (ConfigError("out", "other settings:\n  steps: 1 -> 2\n"), 2, "shoal: out: other settings:\n  steps: 1 -> 2"),
        (PermissionError(13, "Permission denied", "runs/toy"), 2, "shoal: runs/toy: Permission denied"),
        (KeyboardInterrupt(), 130, "shoal: stopped; the same command resumes"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_errors_of_the_driver(
    toy: list[Any], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, error: BaseException, code: int, text: str
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr(sys.modules["shoal.studies.driver"], "run", fail)
    assert run(capsys, "run toy") == (code, "", f"{text}\n")


def test_a_defect_is_not_hidden(toy: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise ValueError("shapes do not match")

    monkeypatch.setattr(sys.modules["shoal.studies.driver"], "run", fail)
    with pytest.raises(ValueError, match="shapes do not match"):
        cli.main(["run", "toy"])


def test_warnings_are_notes(toy: list[Any], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def warn(*_: Any) -> Path:
        with warnings.catch_warnings():
            warnings.simplefilter("always")
            warnings.warn("one file is missing", stacklevel=1)
        return Path("report.html")

    monkeypatch.setattr(sys.modules["shoal.studies.driver"], "report", warn)
    assert run(capsys, "report runs/toy") == (0, "report.html\n", "shoal: note: one file is missing\n")


# --- help ---


@pytest.mark.parametrize("line", ["", "--help", "-h", "help"])
def test_help(capsys: pytest.CaptureFixture[str], line: str) -> None:
    code, out, err = run(capsys, line)
    assert (code, err) == (0, "")
    assert out.startswith("shoal trains many small sequence models at once")
    for command in cli.COMMANDS:
        assert f"  shoal {command}" in out
    for word in ("runs/STUDY", "--out DIR", "DIR:ID", "--run.optimizer.lr 3e-3", "--grid.", "Exit code 2", "130"):
        assert word in out
    assert all(len(text) <= 108 for text in out.splitlines())


@pytest.mark.parametrize("command", cli.COMMANDS)
def test_help_of_a_command(capsys: pytest.CaptureFixture[str], command: str) -> None:
    code, out, err = run(capsys, f"{command} --help")
    assert (code, err) == (0, "")
    assert out.startswith(f"usage: shoal {command}") and f"shoal {command}" in out.partition("Example: ")[2]
    if "[OPTIONS]" in out and command != "attend":  # by hand: nothing to put on a device
        assert "--device" in out


def test_examples_of_the_help_parse() -> None:
    """Every example line of `shoal --help` names a command, and only options and settings that exist."""
    import shlex

    examples = [line.strip() for line in (cli.__doc__ or "").splitlines() if line.startswith("  shoal ")]
    assert len(examples) >= len(cli.COMMANDS)
    for line in examples:
        _, command, *rest = shlex.split(line.partition("   ")[0])
        ours, theirs = cli._split(rest, cli.COMMANDS[command])
        cli._parse(cli.COMMANDS[command], command, ours)
        for path, value in cli.parse_overrides(theirs).items():
            cli.override({"train": RunConfig(), "flops": RunConfig(), "run": StudyConfig(), "data": ModularConfig()}[command], {path: value})


def test_the_program_itself() -> None:
    """The real process: quick to answer, no traceback, exit codes."""
    began = time.perf_counter()
    done = subprocess.run([sys.executable, "-m", "shoal", "run", "nothing"], capture_output=True, text=True)
    took = time.perf_counter() - began
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("shoal: unknown study 'nothing'") and done.stderr.count("\n") == 1
    assert took < 5, f"{took:.1f} s: something heavy is imported"


def test_listed_studies_are_what_they_say(capsys: pytest.CaptureFixture[str]) -> None:
    """`shoal list` reads sources; the imported modules must agree, and every preset must be a config its study accepts."""
    import importlib

    code, out, _ = run(capsys, "list")
    assert code == 0
    for name, path in shoal.studies.STUDIES.items():
        module = importlib.import_module(path)
        assert (module.__doc__ or "").partition("\n")[0] in out
        assert f"presets: {', '.join(module.PRESETS)}\n" in out
        assert set(module.DEFAULT) <= set(module.PRESETS) and len(module.DEFAULT) == 2
        for preset in module.PRESETS.values():
            config = cli.override(preset(), {})
            assert config == preset()
            assert module.study(config).name == name
            json.dumps(flatten(config))
