"""The language studies: their runs are what they say, claims and tables say what invented rows say, samples are drawn and parsed as defined."""

from __future__ import annotations

import ast
import importlib
import math
import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from invented_losses import DATA, losses

import shoal
from shoal.config import BigramConfig, DecoderConfig, HMMConfig, LanguageConfig, RunConfig, StudyConfig, flatten
from shoal.config.fields import ConfigError
from shoal.config.load import load_run, override
from shoal.results import Rows
from shoal.results.claims import judge
from shoal.results.tables import own
from shoal.studies import STUDIES, gpt_tiny, ladder, ladder_beyond
from shoal.studies.language import CODE, PARSED_TOKENS, parses, samples, texts
from shoal.train.plan import plan

NAMES = ("ladder", "ladder-beyond", "gpt-tiny")
MODULES: dict[str, ModuleType] = {name: importlib.import_module(STUDIES[name]) for name in NAMES}
PAIRS = {"pairs": [{"nats": 5.0}]}


def verdicts(study: Any, rows: Rows) -> list[str]:
    return [judge(claim, rows)["verdict"] for claim in study.claims]


def table(study: Any, rows: Rows, name: str) -> list[dict[str, Any]]:
    (found,) = (one for one in study.tables if one.name == name)
    assert not own(found, rows)["error"]
    return list(found.make(rows))


def noisy(seed: int) -> float:
    """Common to all runs of a seed, as its split is."""
    return 0.3 * math.sin(seed + 1)


# ladder


@pytest.mark.parametrize("preset", ["quick", "full"])
def test_ladder_is_the_assignments(preset: str) -> None:
    runs = {run.variant: run for run in ladder.PRESETS[preset]().runs()}
    names = [ladder.TRANSFORMER, ladder.MANY, ladder.ONE, ladder.AVERAGE, ladder.LOW_RANK, ladder.TABLE]
    assert list(runs) == names and len(plan(runs.values())) == 6
    models: list[Any] = [run.model for run in runs.values()]
    assert isinstance(models[-1], BigramConfig) and models[-1].embedding_std == 1.0
    assert [model.residual for model in models[:5]] == [True, False, False, False, False]
    assert [model.num_layers for model in models[1:5]] == [1, 1, 1, 0] and models[3].mixers == ("average",)
    assert [model.num_heads for model in models[1:3]] == [models[0].num_heads, 1] and models[3].width == models[4].width == 32
    assert [run.steps for run in runs.values()] == [2 * runs[ladder.TABLE].steps, *[runs[ladder.TABLE].steps] * 5]
    if preset == "full":
        first = runs[ladder.TRANSFORMER]
        assert (first.model, first.batch_size, first.steps) == (
            DecoderConfig(width=384, num_layers=6, num_heads=6, feed_forward=1536, head_bias=True), 32, 2000,
        )  # fmt: skip
        assert isinstance(first.task, LanguageConfig) and first.task.length == 256 and first.task.sampler == "random"
        assert [flatten(run)["optimizer.lr"] for run in runs.values()] == [1e-4, 6e-4, 6e-4, 1e-2, 1e-2, 1e-2]


LOSSES = {ladder.TRANSFORMER: 2.3, ladder.MANY: 3.0, ladder.ONE: 3.4, ladder.AVERAGE: 5.5, ladder.LOW_RANK: 4.0, ladder.TABLE: 4.4}


def ladder_rows(directory: Path, config: StudyConfig, sign: float = 1.0, begun: float = 0.0) -> Rows:
    def begin(run: RunConfig) -> float:
        return math.log(DATA["vocabulary"]) + (0.5 if run.variant == ladder.TABLE else 0.02) + begun

    return losses(directory, config.runs(), lambda run: 4 + sign * (LOSSES[run.variant] - 4) + noisy(run.seeds.split), begin, lambda run: PAIRS)


def test_ladder_claims_say_what_the_rows_say(tmp_path: Path) -> None:
    config = ladder.full()
    study = ladder.study(config)
    held = ladder_rows(tmp_path / "held", config)
    assert verdicts(study, held)[:-1] == ["held"] * 11
    assert verdicts(study, ladder_rows(tmp_path / "turned", config, sign=-1))[:5] == ["not held"] * 5
    assert verdicts(study, ladder_rows(tmp_path / "begun", config, begun=0.3))[5:11] == ["not held"] * 6
    told = {line["rung"]: line for line in table(study, held, "text")}
    mean = LOSSES[ladder.ONE] + float(np.mean([noisy(s) for s in range(3)])) - 0.1
    assert told[ladder.ONE]["ours"].value == pytest.approx(mean, rel=1e-6) and told[ladder.ONE]["training loss in the text"] == "3.4"
    assert [line["setting"] for line in table(study, held, "perplexity")] == list(config.variants)
    only = override(config, {"variants": [ladder.ONE]})
    assert len(ladder.study(only).claims) == 1 and table(ladder.study(only), Rows(), "text")[0]["ours"] == "not run"


def test_the_texts_figure_is_asked_of_its_tokens_alone() -> None:
    asked = [sum("text's figure" in claim.text for claim in ladder.study(ladder.PRESETS[preset]()).claims) for preset in ("quick", "full")]
    assert asked == [0, 1]


# ladder-beyond


@pytest.mark.parametrize("preset", ["quick", "full"])
def test_beyond_spends_the_same_on_every_model(preset: str) -> None:
    config = ladder_beyond.PRESETS[preset]()
    study = ladder_beyond.study(config)
    runs = study.wanted(Rows())
    assert {(run.budget, run.budget_rule) for run in runs} == {(config.run.budget, "products")} and config.run.budget > 0
    names = dict.fromkeys(ladder_beyond.model_of(run.variant) for run in runs)
    assert len(names) == (13 if preset == "full" else 10) and next(iter(names)) == ladder_beyond.BASE
    assert len(runs) == len(config.variants) * (2 if preset == "full" else 1) and not {run.seeds.split for run in runs} & set(range(config.seeds))
    hypotheses = [claim.text for claim in study.claims if f"“{ladder_beyond.BASE}”" in claim.text]
    assert len(hypotheses) >= 3 and (preset == "quick" or config.seeds >= 5)
    by_name = {ladder_beyond.model_of(run.variant): run for run in runs}
    assert isinstance(by_name[ladder_beyond.HMM].model, HMMConfig) and by_name[ladder_beyond.EM].objective == "likelihood"
    diffusion: Any = by_name[ladder_beyond.DIFFUSION]
    assert diffusion.objective == "masked_diffusion" and not diffusion.model.causal and diffusion.task.mask_token
    assert {flatten(run)["optimizer.type"] for name, run in by_name.items() if "Muon" in name} == {"muon"}
    assert len(plan(runs)) == len(names), "learning rates and seeds of a model share a fleet"


def beyond_rows(directory: Path, config: StudyConfig, loss: Callable[[str], float], best: float) -> tuple[Any, Rows]:
    """Both stages: the learning rate ``best`` is lower by 0.1 than the others of its model."""
    study = ladder_beyond.study(config)

    def of(run: RunConfig) -> float:
        name = ladder_beyond.model_of(run.variant)
        return loss(name) + noisy(run.seeds.split) - 0.1 * (flatten(run)["optimizer.lr"] == best)

    def measures(run: RunConfig) -> dict[str, Any]:
        share = 0.2 if run.variant == ladder_beyond.BASE else 0.01 * run.seeds.split
        return {"parsed": [{"samples": 64, "parse": 64 * share, "share": share, "share of real code": 0.4}], **PAIRS}

    cheap = [replace(run, steps=50) for run in study.wanted(Rows())]
    first = losses(directory / "first", cheap, of)
    runs = [replace(run, steps=50) for run in study.wanted(first)]
    return study, losses(directory / "both", runs, of, measures=measures)


def test_beyond_chooses_a_rate_and_judges_fresh_seeds(tmp_path: Path) -> None:
    config = ladder_beyond.full()
    rank = {name: i for i, name in enumerate(dict.fromkeys(a for a, _, _ in ladder_beyond.HYPOTHESES))}
    order = {ladder_beyond.ALL: -3.0, ladder_beyond.MODERN: -2.0, ladder_beyond.MUON: -1.0, ladder_beyond.HYBRID: -1.0, ladder_beyond.DECAY: -1.0}
    order |= {ladder_beyond.BASE: 0.0, ladder_beyond.MAMBA: 0.0, ladder_beyond.GRU: 0.5, ladder_beyond.LSTM: 0.5, ladder_beyond.RNN: 1.0}
    order |= {ladder_beyond.EM: 1.5, ladder_beyond.HMM: 2.0, ladder_beyond.DIFFUSION: 2.0}
    assert rank.keys() <= order.keys()
    study, rows = beyond_rows(tmp_path / "held", config, lambda name: 4 + 0.3 * order[name], 1e-3)
    assert verdicts(study, rows) == ["held"] * len(study.claims)
    lines = {line["setting"]: line for line in table(study, rows, "chosen")}
    assert len(lines) == 13 and lines[ladder_beyond.BASE]["learning rate"] == 1e-3
    assert lines[ladder_beyond.BASE]["at the edge of what was tried"] == "no" and lines[ladder_beyond.GRU]["at the edge of what was tried"] == "yes"
    assert lines[ladder_beyond.BASE]["FLOPs executed"] == 100 * 10**6 and lines[ladder_beyond.BASE]["epochs"] == 50 * 32 * 256 / 90_000
    (base, *_) = (line for line in table(study, rows, "parsing") if line["setting"] == ladder_beyond.BASE)
    assert base["share that parses"].value == pytest.approx(0.2) and base["share that parses"].n == 5 and base["share of real code"] == 0.4
    turned, rows = beyond_rows(tmp_path / "turned", ladder_beyond.quick(), lambda name: 4 - 0.3 * order[name], 3e-3)
    assert set(verdicts(turned, rows)[:-1]) == {"not held"}
    assert all(figure.svg(rows).startswith("<svg") for figure in turned.figures)


def test_beyond_keeps_tuning_seeds_apart() -> None:
    with pytest.raises(ConfigError, match="first_seed: seeds 1000 to 1001 are for tuning"):
        ladder_beyond.study(override(ladder_beyond.full(), {"first_seed": 998}))


# gpt-tiny


def test_gpt_tiny_is_the_file_that_comes_with_shoal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    run = load_run("gpt-tiny.yaml")
    assert gpt_tiny.full().run == run and isinstance(run.model, DecoderConfig) and isinstance(run.task, LanguageConfig)
    quick = flatten(gpt_tiny.quick().run)
    assert (run.model.width, run.model.num_heads, run.model.num_layers, run.task.length, run.task.tokenizer) == (32, 2, 2, 128, "gpt2")
    assert gpt_tiny.quick().run.model == run.model and quick["task.length"] == 128 and quick["task.tokenizer"] == "gpt2"
    Path("gpt-tiny.yaml").write_text("steps: 7\n")
    assert load_run("gpt-tiny.yaml").steps == 7, "a file of one's own comes first"
    with pytest.raises(ConfigError, match="no such file"):
        load_run("gpt-tinier.yaml")


def test_gpt_tiny_counts_the_steps_needed(tmp_path: Path) -> None:
    config = override(gpt_tiny.full(), {"seeds": 8})
    study = gpt_tiny.study(config)
    rows = losses(tmp_path, config.runs(), lambda run: 4 + 0.1 * noisy(run.seeds.split), measures=lambda run: PAIRS)
    assert verdicts(study, rows) == ["held"] * 3
    (line,) = table(study, rows, "steps needed")
    for row in rows:  # the loss falls in a straight line, by so much an evaluation
        lowest = row["final.val/loss"]
        assert gpt_tiny.needed(row) == 300 * math.ceil(10 - 0.01 * lowest / ((6.9 - lowest) / 10))
    assert line["steps needed"].value == np.median([gpt_tiny.needed(row) for row in rows])
    worse = losses(tmp_path / "worse", config.runs(), lambda run: 8.0, measures=lambda run: PAIRS)
    assert verdicts(study, worse) == ["not held"] * 3 and {gpt_tiny.needed(row) for row in worse} == {0.0}


# samples


@pytest.mark.parametrize(
    ("text", "ended", "right"),
    [
        ("x = 1\n", False, True),
        ("x = 1\ny = (", False, True),  # the last line is not whole
        ("x = 1\ny = (", True, False),
        ("x = 1", True, True),
        ("x = 1", False, False),  # no whole line
        ("", True, False),
        ("# a comment\n\n", False, False),  # no statement
        ('"""A cut docstring.\n', False, False),
        ("def f(x):\n", False, False),
        ("def f(x):\n    return x\n", False, True),
        ("x = '\0'\n", False, False),
        ("(" * 5000 + "\n", False, False),
        ("if x:\n\ty = 1\n        z = 2\n", False, False),
        ("s = '\\d'\n", False, True),
    ],
)
def test_what_parses(text: str, ended: bool, right: bool) -> None:
    assert parses(text, ended) is right


def test_real_code_parses_and_prompts_can_be_continued() -> None:
    source = Path(random.__file__).read_text()
    assert parses(source, True) and parses(source + "x = (", False)
    for body in (CODE["Newton's method"] + "        x -= change\n    return x\n", CODE["distances"] + "    return 1 - 0\n"):
        assert len(ast.parse(body).body) >= 1
    assert CODE["distances"].endswith("def cosine_dist(a, b):\n") and CODE["nothing"] == ""


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> shoal.Run:
    directory = tmp_path_factory.mktemp("language")
    (directory / "corpus").mkdir()
    for i in range(8):
        (directory / "corpus" / f"{i}.py").write_text("".join(f"x{j} = {(i * j) % 7}\n" for j in range(60)))
    values = {"run.task.corpus": str(directory / "corpus"), "run.task.tokenizer": "characters", "run.task.length": 48, "run.batch_size": 4, "run.steps": 20}
    values |= {"run.model.width": 16, "run.model.feed_forward": 16, "run.evaluate_every": 10, "run.task.max_bytes": 0, "seeds": 1, "variants": [ladder.ONE]}
    result = shoal.run(ladder.study(override(ladder.quick(), values)), directory / "out", progress=False)
    page = result.report.read_text()
    assert "Could not be drawn" not in page and all(figure.name in page for figure in ladder.study(ladder.quick()).figures)
    assert {row["measures"]["pairs"][0]["nats"] < 3 for row in result.rows} == {True}
    return result.load()


def test_samples_are_the_same_again_and_no_longer_than_asked(trained: shoal.Run) -> None:
    found = texts(trained, "x1 = ", 5, 12)
    assert found == texts(trained, "x1 = ", 5, 12) and len(found) == 5 and len({text for text, _ in found}) > 1
    assert all(len(text) == 12 or ended for text, ended in found), "of characters, a token each"
    assert found[:2] == texts(trained, "x1 = ", 2, 12)[:2], "each has a key of its own"
    far = texts(trained, "x = 1\n" * 100, 1, 1000)[0]
    assert far[1] or len(far[0]) == 48 - 24 + 1, "half of the positions are the prompt's"


def test_samples_of_one_seed(trained: shoal.Run) -> None:
    prompts = {"nothing": "", "a line": "x1 = 0\n"}
    lines = samples(trained, seed=0, prompts=prompts)
    assert [line["prompt"] for line in lines] == list(prompts) and all(isinstance(line["sample"], str) for line in lines)
    assert samples(trained, seed=1, prompts=prompts) == []
    assert [line["prompt"] for line in samples(trained)] == ["nothing"], "these characters cannot write the other prompts"


def test_share_that_parses(trained: shoal.Run) -> None:
    from shoal.studies.language import PARSED, parsed

    (line,) = parsed(trained)
    assert line["samples"] == PARSED and line["share"] == line["parse"] / PARSED
    assert line["share of real code"] == 1, f"{min(PARSED_TOKENS, 48)} characters of lines that are a statement each"
