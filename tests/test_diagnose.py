"""Diagnosis: faults do to batches what they say and nothing to other runs; rules see what invented curves show; the command; real runs, small."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from shoal import rng, tasks
from shoal.cli import main
from shoal.config import AdamW, DecoderConfig, LanguageConfig, RunConfig, flatten, run_id, with_seed
from shoal.config.fields import ConfigError
from shoal.inference.diagnose import ENOUGH, HEALTHY, LATE, MEANING, NOTHING_YET, RULES, SHORT, SOLVED, Curves, curves_of, diagnose
from shoal.results import Store
from shoal.studies import broken_runs
from shoal.train import faults
from shoal.train.fleet import Fleet
from shoal.train.plan import plan, validate

CORPUS = str(Path(__file__).parent / "corpus.jsonl")
SMALL = RunConfig(
    task=LanguageConfig(corpus=CORPUS, tokenizer="bytes", length=12),
    model=DecoderConfig(width=16, num_layers=1, num_heads=2, feed_forward=16),
    optimizer=AdamW(lr=1e-2),
    steps=4,
    batch_size=6,
    log_every=1,
    evaluate_every=2,
    evaluate=("train:16", "val:16"),
)
FAULTS = ("shift", "leak", "padding", "labels", "repeat")


def broken(fault: str) -> RunConfig:
    run = replace(SMALL, fault=fault)  # pyright: ignore[reportArgumentType]
    return replace(run, model=replace(SMALL.model, causal=False)) if fault == "leak" else run  # pyright: ignore[reportArgumentType]


# Faults


def drawn(fault: str, step: int, seeds: tuple[int, ...] = (0, 1)) -> Any:
    task = tasks.build(SMALL.task)
    tables = task.setup({"split_seed": list(seeds)}, "cpu")
    return faults.drawing(fault, task)(tables, rng.key(torch.tensor(seeds), "order"), torch.tensor(step), 6)


def test_a_batch_with_each_fault() -> None:
    right, task = drawn("none", 3), tasks.build(SMALL.task)
    assert faults.drawing("none", task) == task.batch, "a healthy run pays nothing"
    assert torch.equal(right.targets[..., :-1], right.tokens[..., 1:])
    assert torch.equal(drawn("shift", 3).targets, right.tokens)
    assert torch.equal(drawn("repeat", 3).tokens, drawn("none", 0).tokens) and not torch.equal(drawn("repeat", 3).tokens, right.tokens)
    apart = drawn("labels", 3)
    assert torch.equal(apart.tokens, right.tokens) and all(torch.equal(apart.targets[:, b], right.targets[:, (b - 1) % 6]) for b in range(6))
    for fault in FAULTS:
        assert torch.equal(drawn(fault, 3).tokens[1:], drawn(fault, 3, (1,)).tokens), "a run in a fleet draws what it draws alone"
        assert drawn(fault, 3).weights.all(), "everything is scored"


def test_padding_row_by_row() -> None:
    """Against a loop over rows: real tokens, then padding to the end, and the target of the last real token is padding."""
    generator = torch.Generator().manual_seed(5)
    tokens = torch.randint(1, 50, (2, 300, 16), generator=generator)
    targets = torch.cat([tokens[..., 1:], torch.randint(1, 50, (2, 300, 1), generator=generator)], -1)
    from shoal.contracts import Batch

    found = faults.padded(Batch(tokens, targets, torch.ones(2, 300, 16)), 0)
    lengths = []
    for run in range(2):
        for row in range(300):
            kept = int((found.tokens[run, row] != 0).sum())
            lengths.append(kept)
            assert found.tokens[run, row].tolist() == tokens[run, row, :kept].tolist() + [0] * (16 - kept)
            ahead = [*tokens[run, row, 1:kept].tolist(), *[0] * (16 - kept + 1)] if kept < 16 else [*targets[run, row].tolist()[:-1], 0]
            assert found.targets[run, row].tolist() == ahead
    counts = np.bincount(lengths, minlength=17)[1:]
    assert (counts > 10).all() and (counts < 80).all(), "all lengths, about alike: 37.5 of each are expected"


@pytest.mark.parametrize("fault", FAULTS)
def test_a_broken_run_trains_and_is_alone(fault: str) -> None:
    """Run r in a fleet = run r alone; and the whole step is one graph."""
    runs = [with_seed(broken(fault), seed) for seed in (3, 4)]
    validate(runs[0])
    together, alone = Fleet.build(runs).advance(4), Fleet.build(runs[1:]).advance(4)
    mine = together["run"] == 1
    for name in ("batch/loss", "val:16/loss"):
        assert np.allclose(together[name][mine], alone[name], rtol=1e-5, equal_nan=True)
    healthy = Fleet.build([with_seed(SMALL, 4)]).advance(4)
    assert not np.allclose(healthy["batch/loss"][healthy["step"] == 3], alone["batch/loss"][alone["step"] == 3], rtol=1e-5)
    assert len(plan([*runs, SMALL])) == 2, "a fault is another program"


def test_faults_compile() -> None:
    task = tasks.build(SMALL.task)
    tables = task.setup({"split_seed": [0]}, "cpu")
    key = rng.key(torch.tensor([0]), "order")
    draws = [faults.drawing(fault, task) for fault in ("shift", "padding", "labels", "repeat")]

    def every(step: torch.Tensor) -> list[torch.Tensor]:
        return [tensor for draw in draws for tensor in draw(tables, key, step, 6)[:3]]

    compiled = torch.compile(every, backend="eager", fullgraph=True)(torch.tensor(2))
    assert all(torch.equal(a, b) for a, b in zip(compiled, every(torch.tensor(2)), strict=True))


def test_faults_that_cannot_be() -> None:
    with pytest.raises(ConfigError, match="fault: leak is attention"):
        validate(replace(SMALL, fault="leak"))
    with pytest.raises(ConfigError, match=r"objective: .*fault to leak"):
        validate(replace(SMALL, model=DecoderConfig(causal=False)))
    with pytest.raises(ConfigError, match="fault: shift is a mistake with text"):
        validate(RunConfig(fault="shift"))


# Rules


def invented(
    loss: Callable[[Any], Any], accuracy: Callable[[Any], Any] | None = None, *, train: Any = None, val: Any = None, norm: Any = lambda t: 1.0 - 0.2 * t,
    noise: float = 0.02, n: int = 200, seed: int = 0,
) -> Curves:  # fmt: skip
    """Curves over the share t of the run in [0, 1]; evaluations are of the loss unless given, accuracy is what it is with text of such a loss. Noise makes
    accuracy worse where it makes the loss worse."""
    t, few, random = np.linspace(0, 1, n), np.linspace(0, 1, 21), np.random.default_rng(seed)
    scatter = random.normal(0, noise, n)
    steps, at = np.arange(n, dtype=float), few * (n - 1)
    values = [np.asarray(f(few) + 0 * few) for f in (train or loss, val or loss)]
    off = 0.1 * random.normal(0, noise, n) - 0.1 * scatter
    right = np.exp(-0.42 * loss(t)) if accuracy is None else accuracy(t)
    return Curves(steps, loss(t) + scatter, np.clip(right + off, 0, 1), norm(t) + 0 * t, (at, values[0]), (at, values[1]))


def bend(t: Any) -> Any:
    return 3.2 + 2.8 * np.exp(-6 * t)


def steep(t: Any) -> Any:
    return 0.01 + 6 * np.exp(-20 * t)


INVENTED: dict[str, Callable[[int], Curves]] = {
    HEALTHY: lambda s: invented(bend, seed=s),
    "dead initialisation": lambda s: invented(lambda t: 6 + 0 * t, lambda t: 0 * t, norm=lambda t: 0 * t, noise=1e-4, seed=s),
    "initialisation too large": lambda s: invented(lambda t: 5 + 15 * np.exp(-10 * t), lambda t: 0.05 * t, seed=s),
    "one batch repeated": lambda s: invented(steep, train=lambda t: 6 + 3 * t, val=lambda t: 6 + 3 * t, seed=s),
    "learning rate too high": lambda s: invented(lambda t: 6 + 40 * np.sqrt(t), lambda t: 0.01 + 0 * t, seed=s),
    "no warm-up": lambda s: invented(lambda t: bend(t) + 8 * np.exp(-(((t - 0.02) / 0.01) ** 2)), seed=s),
    "wrong loss shift": lambda s: invented(steep, lambda t: 1 - np.exp(-150 * t), seed=s),
    "leak from the future": lambda s: invented(lambda t: 0.2 + 5.8 * np.exp(-8 * t), seed=s),
    "overfitting": lambda s: invented(lambda t: 0.5 + 5.5 * np.exp(-4 * t), val=lambda t: 5 + np.exp(-15 * t) + 3 * t, seed=s),
    "mismatched labels": lambda s: invented(lambda t: 5 + np.exp(-40 * t), lambda t: 0.05 + 0 * t, seed=s),
    "learning rate too low": lambda s: invented(lambda t: 6 - 0.8 * t, lambda t: 0.05 * t, noise=0.01, seed=s),
    "unshuffled data": lambda s: invented(lambda t: bend(t) + 0.6 * np.sin(45 * t + s), noise=0.1, train=bend, val=bend, seed=s),
    "dropout too strong": lambda s: invented(lambda t: bend(t) + 0.5 * t, train=bend, val=bend, seed=s),
}  # fmt: skip


@pytest.mark.parametrize("name", INVENTED)
def test_invented_curves(name: str) -> None:
    for seed in range(5):
        found = diagnose(INVENTED[name](seed))
        assert found.name == name, found.text()


def test_padding_moves_loss_and_accuracy_together() -> None:
    t, random = np.linspace(0, 1, 200), np.random.default_rng(1)
    share = np.clip(random.normal(0.5, 0.06, 200), 0, 1) * (1 - np.exp(-100 * t))
    at = (np.linspace(0, 199, 11), np.linspace(6, 2, 11))
    found = diagnose(Curves(np.arange(200.0), (1 - share) * (bend(t) + 0.3), share + (1 - share) * 0.1 * t, np.ones(200), at, at))
    assert found.name == "unmasked padding" and "by -1.0" in found.findings[0].evidence


def test_every_rule_is_explained_and_tried() -> None:
    assert RULES.keys() == broken_runs.SETUP.keys() | broken_runs.IMPLEMENTATION.keys()
    assert RULES.keys() | {"behind the reference"} == MEANING.keys()
    assert RULES.keys() - INVENTED.keys() == {"unmasked padding"}
    assert len(broken_runs.SETUP) + len(broken_runs.IMPLEMENTATION) >= 8 and set(FAULTS) == {c["fault"] for c in broken_runs.IMPLEMENTATION.values()}


def test_scale_and_length_do_not_matter() -> None:
    """Nats or bits, 200 rows or 60: shapes decide."""
    for name in ("learning rate too low", "mismatched labels", "overfitting", "one batch repeated", HEALTHY):
        x = INVENTED[name](9)
        bits = replace(x, loss=x.loss / np.log(2), train=(x.train[0], x.train[1] / np.log(2)), val=(x.val[0], x.val[1] / np.log(2)))
        thin = replace(x, steps=x.steps[::3], loss=x.loss[::3], accuracy=x.accuracy[::3], grad_norm=x.grad_norm[::3])
        assert diagnose(bits).name == diagnose(thin).name == name


def test_what_is_no_fault() -> None:
    late = invented(lambda t: 0.01 + 6 * np.exp(-8 * t), val=lambda t: 6 + 8 * t)
    assert diagnose(late).name == HEALTHY and diagnose(late).remark == LATE, "arithmetic before it generalises"
    sudden = invented(lambda t: 2.1 / (1 + np.exp(40 * (t - 0.6))) + 0.01, lambda t: 1 / (1 + np.exp(-40 * (t - 0.6))))
    assert diagnose(sudden).name == HEALTHY and diagnose(sudden).remark == SOLVED, "recall: a level, then everything is right"
    stuck = invented(lambda t: 2.1 + 0 * t, lambda t: 0.12 + 0 * t, norm=lambda t: 2 * np.exp(-8 * t))
    assert diagnose(stuck).name == HEALTHY and diagnose(stuck).remark == NOTHING_YET
    heart = replace(invented(steep), val=(np.zeros(0), np.zeros(0)))
    assert diagnose(heart).name == HEALTHY, "by heart, and nothing else was asked"


def test_too_short() -> None:
    x = invented(bend, n=ENOUGH - 1)
    assert diagnose(x).name == SHORT and str(ENOUGH - 1) in diagnose(x).text()
    died = diagnose(replace(x, died=True))
    assert died.name == "learning rate too high" and "infinite" in died.findings[0].evidence
    some = replace(x, steps=x.steps[:1], loss=x.loss[:1], accuracy=x.accuracy[:1], grad_norm=x.grad_norm[:1])
    assert diagnose(some).name == SHORT and diagnose(replace(some, died=True)).name == "learning rate too high"


def test_any_curves_get_an_answer() -> None:
    """Constant, wild, without evaluations: no rule fails, and noise alone is not accused of being in order."""
    random = np.random.default_rng(7)
    for n in (ENOUGH, 37, 400):
        for x in (np.ones(n), np.zeros(n), random.lognormal(0, 3, n), 1e12 * random.random(n), np.linspace(5, 1, n)):
            none = (np.zeros(0), np.zeros(0))
            for at in (none, (np.arange(2.0), x[:2]), (np.arange(9.0), x[:9])):
                assert diagnose(Curves(np.arange(float(n)), x, np.clip(x, 0, 1), x, at, at)).text()
    accused = sum(diagnose(invented(bend, noise=0.4, seed=s)).name == "unshuffled data" for s in range(100))
    assert accused <= 5


def test_a_reference() -> None:
    well = invented(bend)
    worse = invented(lambda t: bend(t) + 0.9 * t)
    assert diagnose(worse).name == HEALTHY and diagnose(worse, well).name == "behind the reference"
    assert diagnose(well, well).name == diagnose(well, worse).name == HEALTHY
    solved = INVENTED["leak from the future"](0)
    plain = replace(solved, accuracy=np.clip(solved.accuracy + 0.3 * (solved.accuracy < 0.5), 0, 1))  # right so early that it need not be text
    assert diagnose(plain).name == HEALTHY and diagnose(plain, well).name == "leak from the future"
    assert diagnose(INVENTED["overfitting"](0), well).name == "overfitting"


def test_text_has_sentence_evidence_and_change() -> None:
    text = diagnose(INVENTED["overfitting"](0)).text()
    assert text.startswith("Overfitting.") and "validation loss" in text and all(f"  {word}: " in text for word in ("why", "seen", "try"))


# The command


def stored(directory: Path, curves: dict[str, Curves], batches: bool = True) -> list[str]:
    runs = [replace(SMALL, variant=name) for name in curves]
    store = Store.open(directory, {"study": "invented", "main_metric": "val:16/loss", "config": {}})
    store.start_fleet("f", {"runs": [{"id": run_id(run), "config": flatten(run)} for run in runs]})
    for place, x in enumerate(curves.values()):
        if batches:
            n = len(x.loss)
            table = {"step": np.arange(n), "run": np.full(n, place), "batch/loss": x.loss, "batch/accuracy": x.accuracy, "batch/grad_norm": x.grad_norm}
            store.append("f", table | {"learning_rate": np.full(n, 1e-9)})
        at = x.val[0].astype(np.int64)
        store.append("f", {"step": at, "run": np.full(len(at), place), "train:16/loss": x.train[1], "val:16/loss": x.val[1]})
    store.finish_fleet("f", {"runs": [{"status": "completed", "steps": 200, "seconds": 1.0} for _ in runs], "seconds": 1.0})
    return [run_id(run) for run in runs]


def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    low, well = stored(tmp_path / "s", {"low": INVENTED["learning rate too low"](0), "well": INVENTED[HEALTHY](0)})
    assert main(["diagnose", f"{tmp_path / 's'}:{low}"]) == 0
    assert capsys.readouterr().out.startswith("Learning rate too low.\n  why: ")
    assert main(["diagnose", str(tmp_path / "s"), "--reference", f"{tmp_path / 's'}:{well}"]) == 0
    said = capsys.readouterr()
    assert said.out == "Nothing wrong that the curves show.\n" and well in said.err, "the best of two is taken, and named"
    row = Store.read(tmp_path / "s").rows()[0]
    x = INVENTED["learning rate too low"](0)
    assert np.allclose(curves_of(row).loss, x.loss, rtol=1e-6) and np.allclose(curves_of(row).val[1], x.val[1])


def test_command_with_bad_input(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    stored(tmp_path / "s", {"no batches": INVENTED[HEALTHY](0)}, batches=False)
    for words, told in (
        ([str(tmp_path / "nothing")], "is not a study"),
        ([f"{tmp_path / 's'}:ffff"], "has no run 'ffff'"),
        ([str(tmp_path / "s")], "no losses of its batches"),
        ([str(tmp_path / "s"), "--referense", "x"], "did you mean reference"),
        ([], "RUN"),
    ):
        assert main(["diagnose", *words]) == 2
        said = capsys.readouterr()
        assert told in said.err and len(said.err.strip().splitlines()) == 1 and not said.out, said.err
