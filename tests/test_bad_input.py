"""Bad input at the command line: exit code 2, one message that names the fix, no traceback, and no file made or changed."""

from __future__ import annotations

import hashlib
import pickle
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from shoal import cli
from shoal.config import DecoderConfig, EmbeddingMLPConfig, MemorizeConfig, ModularConfig, RunConfig
from shoal.config.load import to_yaml
from shoal.studies import driver
from shoal.train.fleet import Fleet

SMALL = DecoderConfig(width=8, num_layers=1, num_heads=2, feed_forward=8)
CONFIGS = {
    "words": RunConfig(task=MemorizeConfig(strings=("abc", "cab")), model=SMALL, steps=6, batch_size=0, evaluate=("train",), log_every=1),
    "table": RunConfig(task=ModularConfig(p=7, val_fraction=0.3), model=SMALL, steps=4, batch_size=8),
    "direct": RunConfig(task=ModularConfig(p=7, val_fraction=0.3), model=EmbeddingMLPConfig(num_inputs=3, embedding=4, hidden=(8,)), steps=4, batch_size=8),
    "composite": RunConfig(task=ModularConfig(p=6, val_fraction=0.3), model=SMALL, steps=2, batch_size=4),
}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory as one finds it after some work: files, trained runs, one study interrupted with a checkpoint and one before it trained anything."""
    here = tmp_path_factory.mktemp("made")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(here)
        for name, config in CONFIGS.items():
            Path(f"{name}.yaml").write_text(to_yaml(config))
        for name in ("words", "table", "direct"):
            assert cli.main(["train", f"{name}.yaml", "--device", "cpu"]) == 0
        with pytest.raises(KeyboardInterrupt):  # no checkpoint yet
            patch.setattr(Fleet, "advance", _interrupted(Fleet.advance, 2))
            driver.train(CONFIGS["words"], "runs/begun")
        patch.undo()
        patch.chdir(here)
        with pytest.raises(KeyboardInterrupt):
            patch.setattr(driver, "CHECKPOINT_EVERY", 0.0)
            patch.setattr(Fleet, "advance", _interrupted(Fleet.advance, 3))
            driver.train(CONFIGS["words"], "runs/half")
        Path("occupied").mkdir()
        Path("occupied", "thesis.tex").write_text("mine")
        Path("empty").mkdir()
        files = {
            "empty.yaml": b"",
            "comment.yaml": b"# later\n",
            "latin.yaml": "# Größe\nsteps: 3\n".encode("latin-1"),
            "twice.yaml": b"steps: 3\nclip: 1\nsteps: 4\n",
            "tabs.yaml": b"optimizer:\n\ttype: sgd\n",
            "list.yaml": b"- steps\n",
            "broken.yaml": b"steps: [1, 2\n",
            "anchor.yaml": b"steps: &n 3\nlog_every: *n\n",
            "wrong.yaml": b"optimizer:\n  type: adamw\n  lr: fast\n",
            "typo.yaml": b"model:\n  type: decoder\n  num_layer: 3\n",
            "kind.yaml": b"optimizer: {type: adamm}\n",
            "untyped.yaml": b"optimizer: {lr: 1}\n",
            "heads.yaml": b"model: {type: decoder, width: 16, num_heads: 3}\n",
            "no_val.yaml": b"task: {type: memorize}\n",
        }
        for name, data in files.items():
            Path(name).write_bytes(data)
    return here


def _interrupted(advance: Callable[[Fleet, int], object], at: int) -> Callable[[Fleet, int], object]:
    calls = 0

    def wrapped(fleet: Fleet, steps: int) -> object:
        nonlocal calls
        calls += 1
        if calls == at:
            raise KeyboardInterrupt
        return advance(fleet, 1)

    return wrapped


@pytest.fixture
def here(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of it to work in, on a machine without a GPU."""
    place = tmp_path / "here"
    shutil.copytree(made, place)
    monkeypatch.chdir(place)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    return place


def hashes() -> dict[str, str]:
    return {str(path): hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "directory" for path in Path().rglob("*") if path.name != ".lock"}


def refused(capsys: pytest.CaptureFixture[str], line: str, *texts: str) -> None:
    before = hashes()
    code = cli.main(shlex.split(line))
    printed = capsys.readouterr()
    assert (code, printed.out) == (2, "")
    assert printed.err.startswith("shoal: ") and printed.err.count("shoal: ") == 1 and "Traceback" not in printed.err
    for text in texts:
        assert text in printed.err
    assert hashes() == before


# A line, and what its message must say. "NEW" stands for --out new, which must not be there afterwards.
CASES = {
    # studies, presets, keys, types
    "run grokkin NEW": "unknown study 'grokkin'; did you mean grokking?",
    "run grokking --preset papr NEW": "unknown preset of grokking 'papr'; did you mean paper?",
    "run grokking --run.optimizer.weight_decay 1 NEW": "run.optimizer.weight_decay: unknown key; did you mean wd?",
    "run grokking --grid.optimizer.rate 1,2 NEW": "grid.optimizer.rate: unknown key",
    "run grokking --grid.optimizer 1,2 NEW": "grid.optimizer: is a group of fields; vary one of them",
    "run grokking --grid.optimizer.type adam,sgd NEW": "a type cannot be varied in a grid; run the study once for each",
    "run grokking --grid.seeds.init 1,2 NEW": "a study numbers its seeds; set seeds and first_seed",
    "run grokking --run.seeds.init 3 NEW": "a study numbers its seeds; use --seeds and --first_seed",
    "run grokking --run.steps many NEW": 'run.steps: expected a whole number, not "many"',
    "run grokking --run.steps 0 NEW": "steps: must be 1 or more, not 0",
    "run grokking --run.steps 1e3.5 NEW": "run.steps: expected a whole number",
    "run grokking --run.model.norm batch NEW": "run.model.norm: expected one of layer, rms, none",
    "run grokking --run.model.tied maybe NEW": "run.model.tied: expected true or false",
    "run arithmetic --run.optimizer.type adamw --run.optimizer.decay some NEW": 'run.optimizer.decay: expected one of all, matrices, not "some"',
    "run sanity --run.task.type modular NEW": "grid.task.unscored: unknown key; known here: p, operation",
    "run sanity --run.model.type embedding_mlp NEW": "model: embedding_mlp gives one answer to one short prompt",
    # the task
    "run grokking --run.task.p 1 NEW": "run.task.p: the modulus must be 2 or more, not 1",
    "run grokking --run.task.p -7 NEW": "run.task.p: the modulus must be 2 or more, not -7",
    "run grokking --run.task.p 3000 NEW": "task.p: the whole table is held in memory, so p may be at most 2048, not 3000",
    "run grokking --run.task.train_fraction 0 NEW": "run.task.train_fraction: must lie strictly between 0 and 1, not 0.0",
    "run grokking --run.task.train_fraction 1 NEW": "run.task.train_fraction: must lie strictly between 0 and 1, not 1.0",
    "run grokking --run.task.val_fraction -0.1 NEW": "run.task.val_fraction: must lie strictly between 0 and 1, not -0.1",
    "run grokking --run.task.test_fraction 1.5 NEW": "run.task.test_fraction: must lie in [0, 1), not 1.5",
    "run grokking --run.task.train_fraction 0.6 NEW": "train_fraction: train + val + test fractions sum to 1.1, past 1; lower one of them",
    "run grokking --grid.task.train_fraction 0.3,0.6 NEW": "task.train_fraction 0.6: train_fraction: train + val + test fractions sum to 1.1",
    "run grokking --run.task.p 7 --run.task.train_fraction 0.01 NEW": "task.train_fraction: 0.01 of 42 rows is no row to train on; raise it to 0.0238 or more",
    "run grokking --run.task.p 7 --run.task.val_fraction 0.01 NEW": "evaluate: there are no val rows; raise task.val_fraction, or leave val out of evaluate",
    "run sanity --run.task.strings '[\"\"]' NEW": "strings: an empty string cannot be memorised; remove it",
    "run sanity --run.task.strings '[abc, \"\"]' NEW": "strings: an empty string cannot be memorised; remove it",
    "run sanity --run.task.strings [] NEW": "strings: give at least one string",
    "run sanity --run.task.strings abc NEW": "run.task.strings: expected a list, not \"abc\"; write [abc]",
    "run sanity --grid.task.unscored 0,23 NEW": "task.unscored: 23 leaves no character scored; at most 22",
    "run sanity --grid.task.unscored 24 NEW": "unscored: 24 masks more than a whole string; at most 23",
    "run sanity --grid.task.unscored -1 NEW": "unscored: must be 0 or more",
    # seeds, grids
    "run sanity --seeds 0 NEW": "seeds: at least 1 seed is needed, not 0",
    "run sanity --seeds -2 NEW": "seeds: at least 1 seed is needed, not -2",
    "run sanity --seeds two NEW": 'seeds: expected a whole number, not "two"',
    "run sanity --seeds 1.5 NEW": "seeds: expected a whole number, not 1.5",
    "run sanity --first-seed -1 NEW": "first_seed: seeds are whole numbers from 0 to 2**31 - 1; -1 does not fit",
    "run sanity --first-seed 2147483646 NEW": "first_seed: seeds are whole numbers from 0 to 2**31 - 1",
    "run sanity --grid.optimizer.lr [] NEW": "grid.optimizer.lr: the list of values is empty; give at least one or remove the line",
    "run sanity --grid.optimizer.lr NEW": "grid.optimizer.lr: needs a list of values: --grid.optimizer.lr VALUE,VALUE",
    "run sanity --grid.optimizer.lr 1e-3,0.001 NEW": "grid.optimizer.lr: a value is listed twice",
    "run sanity --seeds 1001 NEW": "grid: 2,002 runs (1001 seeds of every combination of task.unscored); more than 2,000 need --yes",
    "run sanity --grid.optimizer.lr 1e-2 --run.optimizer.lr 1e-3 NEW": "run.optimizer.lr: has no effect, the grid varies it; use --grid.optimizer.lr",
    # the model, the optimizer, the batch
    "run sanity --run.model.num_heads 3 NEW": "run.model.num_heads: 3 heads do not divide the width 64; possible: 1, 2, 4, 8, 16, 32, 64",
    "run sanity --run.model.num_heads 0 NEW": "run.model.num_heads: must be 1 or more, not 0",
    "run sanity --run.model.dropout 1 NEW": "run.model.dropout: must lie in [0, 1), not 1.0",
    "run sanity --run.model.init_std -1 NEW": "run.model.init_std: must be a finite number of 0 or more, not -1.0",
    "run sanity --run.model.num_heads 64 --run.model.positions rotary NEW": "run.model.positions: rotary positions need an even head width, not 1",
    "run sanity --run.optimizer.lr .nan NEW": "run.optimizer.lr: expected a finite number, not NaN",
    "run sanity --run.optimizer.lr nan NEW": 'run.optimizer.lr: expected a number, not "nan"',
    "run sanity --run.optimizer.lr .inf NEW": "run.optimizer.lr: expected a finite number, not Infinity",
    "run sanity --run.optimizer.lr -1 NEW": "run.optimizer.lr: must be a finite number of 0 or more, not -1.0",
    "run sanity --run.optimizer.beta2 1 NEW": "run.optimizer.beta2: must lie in [0, 1), not 1.0",
    "run sanity --run.optimizer.type muon --run.optimizer.lr -1 NEW": "run.optimizer.lr: must be a finite number of 0 or more, not -1.0",
    "run sanity --run.optimizer.type muon --run.optimizer.adam_beta2 2 NEW": "run.optimizer.adam_beta2: must lie in [0, 1), not 2.0",
    "run sanity --run.optimizer.type lion NEW": 'run.optimizer.type: unknown type "lion"; known here: sgd, adam, adamw, adagrad, muon',
    "run grokking --run.batch_size 10 --run.accumulate 3 NEW": "run.accumulate: 3 pieces do not divide the batch of 10",
    "run grokking --run.batch_size -1 NEW": "run.batch_size: must be 0 (the whole training table) or more",
    "run sanity --run.schedule.warmup 1 NEW": "run.schedule.warmup: is a share of the run in [0, 1), not 1.0",
    "run sanity --run.clip -1 NEW": "run.clip: must be 0 (none) or more",
    # what is measured
    "run grokking --run.evaluate '[train, vla]' NEW": "evaluate: this task has no split 'vla'; it has train, val, test",
    "run sanity --run.evaluate '[val]' NEW": "evaluate: this task has no split 'val'; it has train",
    "run grokking --run.stop_metric val/accurcy NEW": "stop_metric: 'val/accurcy' is not measured; possible: train/loss, train/accuracy, train/exact",
    "run grokking --run.stop_metric test/accuracy NEW": "stop_metric: 'test/accuracy' is not measured; possible: train/loss",
    "run grokking --run.evaluate '[train]' --run.stop_metric null NEW": "main_metric: grokking is judged by val/accuracy, which is not measured; add it",
    # where to, and on what
    "run sanity --out occupied": "out: occupied is occupied: it is not empty and holds no study.yaml; choose another --out, or an empty directory",
    "run sanity --out empty.yaml": "out: cannot write to empty.yaml (File exists); choose another --out",
    "run sanity --out empty.yaml/below": "out: cannot write to empty.yaml/below (Not a directory); choose another --out",
    "run sanity --out /proc/nothing": "out: cannot write to /proc/nothing (No such file or directory); choose another --out",
    "run sanity --device cuda NEW": "--device: \"cuda\" is not available here; use --device cpu",
    "train words.yaml --device cuda NEW": "--device: \"cuda\" is not available here; use --device cpu",
    "run sanity --device tpu NEW": "invalid choice 'tpu' for argument '--device'",
    "run sanity --max-runs-per-fleet -1 NEW": "--max-runs-per-fleet: must be 0 (as memory allows) or more, not -1",
    "run sanity --compile maybe NEW": "invalid choice 'maybe' for argument '--compile'",
    "run sanity --out runs/words": "out: runs/words holds the study words, not sanity; choose another --out",
    "train words.yaml --steps 7": 'out: runs/words holds this study with other settings:\n  steps: 6 -> 7\n  runs: "1, hash',
    "train words.yaml --model.width 16 --seeds.init 4": "  model.width: 8 -> 16\n  seeds.init: 0 -> 4\n",
    # config files
    "train nothing.yaml NEW": "nothing.yaml: no such file or directory",
    "train empty NEW": "empty: is a directory; name a YAML file in it",
    "train empty.yaml NEW": "empty.yaml: is empty; a config has at least one setting, such as `steps: 1000`",
    "train comment.yaml NEW": "comment.yaml: is empty; a config has at least one setting",
    "train latin.yaml NEW": "latin.yaml: is not UTF-8 text (byte 4)",
    "train twice.yaml NEW": "twice.yaml:3: steps: given twice (first on line 1)",
    "train tabs.yaml NEW": "tabs.yaml:2: not YAML: found character '\\t' that cannot start any token; indent with spaces, not tabs",
    "train list.yaml NEW": "list.yaml:1: expected a mapping (`key: value` lines), not [\"steps\"]",
    "train broken.yaml NEW": "broken.yaml:2: not YAML: expected ',' or ']'",
    "train anchor.yaml NEW": "anchor.yaml:2: aliases (*n) are not read; write the value out",
    "train wrong.yaml NEW": 'wrong.yaml:3: optimizer.lr: expected a number, not "fast"',
    "train typo.yaml NEW": "typo.yaml:3: model.num_layer: unknown key; did you mean num_layers?",
    "train kind.yaml NEW": 'kind.yaml:1: optimizer.type: unknown type "adamm"; did you mean adam?',
    "train untyped.yaml NEW": "untyped.yaml:1: optimizer.type: missing; one of sgd, adam, adamw, adagrad, muon",
    "train heads.yaml NEW": "heads.yaml:1: model.num_heads: 3 heads do not divide the width 16; possible: 1, 2, 4, 8, 16",
    "train no_val.yaml NEW": "evaluate: this task has no split 'val'; it has train",
    "train words.yaml --seeds.init -1 NEW": "seeds.init: a seed is a whole number from 0 to 2**31 - 1, not -1",
    "train direct.yaml --model.num_inputs 2 NEW": "model.num_inputs: must be 3 to read both operands, not 2",
    # trained runs
    "generate runs/nothing --prompt a": "runs/nothing is not a study: there is no study.yaml in it; give the directory that `shoal run` wrote",
    "generate empty --prompt a": "empty is not a study: there is no study.yaml in it",
    "generate runs/begun --prompt a": "there is no checkpoint here; the run has not been trained yet",
    "generate runs/words:abc --prompt a": "runs/words: has no run 'abc'; it has ",
    "generate runs/words --prompt xyz": "prompt: unknown character 'x', 'y', 'z'; known: 'a', 'b', 'c'",
    "generate runs/table --prompt '3 % 4 ='": "prompt: unknown word '%'; known: 0, 1, 2, 3, 4, 5, 6, /, =",
    "generate runs/table --prompt ''": "prompt: this task has no begin token; give at least one token to continue",
    "generate runs/table --prompt '1 / 2 = 3 / 4'": "prompt: 7 tokens are more than the model's 4 positions; shorten it",
    "generate runs/direct --prompt 3": "this model reads 3 tokens at once, and there are only 1",
    "generate runs/words --prompt ab --tokens 9": "tokens: must lie between 1 and 2, what is left of the model's 4 positions, not 9",
    "generate runs/words --prompt a --tokens -1": "--tokens: must be 0 (as far as the positions reach) or more, not -1",
    "generate runs/words --prompt a --temperature -0.5": "--temperature: must be 0 (the likeliest token) or more, not -0.5",
    "generate runs/words --prompt a --temperature nan": "--temperature: must be 0 (the likeliest token) or more, not nan",
    "generate runs/words --prompt a --seed -1": "--seed: is a whole number from 0 to 2**31 - 1, not -1",
    "report empty": "empty is not a study: there is no study.yaml in it; give the directory that `shoal run` wrote",
    "report nothing": "nothing is not a study: there is no study.yaml in it",
    # tables
    "data modular --p 1 --out new": "p: the modulus must be 2 or more, not 1",
    "data modular --p 2.5 --out new": "p: expected a whole number, not 2.5",
    "data modular --out words.yaml": "out: words.yaml exists already; name another file or remove this one",
    "data modular --out occupied/thesis.tex/new": "--out: there is no directory occupied/thesis.tex",
    "data modular --p 7 --train-fraction 0.01 --out new": "task.train_fraction: 0.01 of 42 rows is no row to train on; raise it to 0.0238 or more",
    "data modular --seed -1 --out new": "--seed: is a whole number from 0 to 2**31 - 1, not -1",
}  # fmt: skip


@pytest.mark.parametrize("line", CASES)
def test_refused(here: Path, capsys: pytest.CaptureFixture[str], line: str) -> None:
    refused(capsys, line.replace("NEW", "--out new"), CASES[line])


# --- damaged files


def files_of(run: str) -> Path:
    [fleet] = Path("runs", run, "fleets").iterdir()
    return fleet / "checkpoint"


class Code:
    """What runs when its pickle is loaded."""

    def __reduce__(self) -> tuple[Callable[[str], None], tuple[str]]:
        return _run, ("pickled",)


def _run(name: str) -> None:
    raise AssertionError(f"{name} code was run")


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "cut short": (lambda path: path.write_bytes(path.read_bytes()[:-20]), "is damaged or cut short"),
    "cut in its header": (lambda path: path.write_bytes(path.read_bytes()[:30]), "is damaged or cut short"),
    "empty": (lambda path: path.write_bytes(b""), "is damaged or cut short"),
    "pickled": (lambda path: path.write_bytes(pickle.dumps(Code())), "is a pickle, which could run code when loaded; shoal reads safetensors only"),
    "saved by torch": (lambda path: torch.save({"weight": torch.zeros(3)}, path), "is a pickle, which could run code when loaded"),
    "gone": (lambda path: path.unlink(), "is missing"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_checkpoint_of_a_finished_run(here: Path, capsys: pytest.CaptureFixture[str], damage: str) -> None:
    harm, message = DAMAGE[damage]
    harm(files_of("words") / "model.safetensors")
    refused(capsys, "generate runs/words --prompt a", "model.safetensors", message, "delete")


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("file", ["model.safetensors", "optimizer.safetensors", "fleet.json"])
def test_damaged_checkpoint_of_a_run_to_resume(here: Path, capsys: pytest.CaptureFixture[str], damage: str, file: str) -> None:
    harm, message = DAMAGE[damage]
    path = files_of("half") / file
    harm(path)
    if (damage, file) == ("gone", "fleet.json"):
        message = "there is no checkpoint here"
    before = hashes()
    assert cli.main(["train", "words.yaml", "--out", "runs/half"]) == 2
    printed = capsys.readouterr()
    said = [line for line in printed.err.splitlines() if line.startswith("shoal: ")]
    assert printed.out == "" and len(said) == 1 and message in said[0] and "Traceback" not in printed.err
    assert hashes() == before


def test_damaged_records(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fleet = files_of("words").parent
    (fleet / "fleet.json").write_text('{"runs": [')
    refused(capsys, "report runs/words", "fleet.json: cannot be read", "restore it from a copy")
    Path("runs/table/study.yaml").write_text("study: [")
    refused(capsys, "report runs/table", "study.yaml cannot be read", "restore it from a copy")
    refused(capsys, "train table.yaml", "study.yaml cannot be read", "choose another --out")
    Path("runs/direct/study.yaml").write_text("")
    refused(capsys, "generate runs/direct --prompt 3", "study.yaml is not a study's record")


def test_the_half_is_a_sound_one(here: Path) -> None:
    """The damage above is what was refused: without it the same command goes on."""
    assert cli.main(["train", "words.yaml", "--out", "runs/half"]) == 0
    assert cli.main(["train", "words.yaml", "--out", "runs/begun"]) == 0
    assert cli.main(["generate", "runs/words", "--prompt", "a"]) == 0


# --- allowed, and said


def test_a_composite_modulus_drops_rows_and_says_so(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    why = "b shares a factor with 6, so it has no inverse"
    assert cli.main(["data", "modular", "--p", "6", "--operation", "div", "--out", "six.tsv"]) == 0
    printed = capsys.readouterr().out
    assert "rows: 12\nrows dropped: 18\n" in printed and why in printed
    assert len(Path("six.tsv").read_text().splitlines()) == 1 + 12
    assert cli.main(["train", "composite.yaml"]) == 0
    assert f"note: 18 of 30 rows are left out: {why}\n" in capsys.readouterr().err
    line = "run grokking --run.task.p 6 --run.steps 2 --seeds 1 --run.model.width 16 --run.model.num_heads 2 --out six --device cpu"
    assert cli.main(line.split()) == 0
    assert f"note: 18 of 30 rows are left out: {why}\n" in capsys.readouterr().err
    assert why in Path("six/report.html").read_text()
