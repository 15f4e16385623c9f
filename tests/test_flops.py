"""The three counts of a step beside what PyTorch counts and what others have published, budgets, and `shoal flops`."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import laws
import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from shoal import cli, models
from shoal.config import (
    AdamW,
    BigramConfig,
    DecoderConfig,
    EmbeddingMLPConfig,
    EncoderConfig,
    MemorizeConfig,
    ModularConfig,
    Muon,
    RecallConfig,
    RunConfig,
    StudyConfig,
    with_seed,
    with_values,
)
from shoal.config.fields import ConfigError
from shoal.contracts import Batch
from shoal.mixers import MIXERS
from shoal.studies import driver
from shoal.studies.study import Study
from shoal.train import flops, optimizers
from shoal.train.flops import Shape, budgeted, counts
from shoal.train.objectives import OBJECTIVES
from shoal.train.plan import validate

SHAPE = Shape(rows=3, time=laws.LONGEST, scored=laws.LONGEST)
GPT = DecoderConfig(width=256, num_layers=4, num_heads=16, feed_forward=1024, tied=True)
RUN = RunConfig(task=ModularConfig(p=7, test_fraction=0.0, val_fraction=0.5), model=DecoderConfig(width=16, num_layers=1, num_heads=2, feed_forward=32))


def on_meta(config: Any, vocab_size: int = laws.VOCABULARY, max_length: int = laws.LONGEST, lead: tuple[int, ...] = ()) -> Any:
    with torch.device("meta"):
        return models.build(config, vocab_size, max_length, lead)


def counted(config: Any, lead: tuple[int, ...], vocab_size: int = laws.VOCABULARY) -> int:
    """Products of one training step, forward and backward, as PyTorch counts them."""
    model, g = models.build(config, vocab_size, laws.LONGEST, lead), laws.generator()
    laws.filled(model).float()
    tokens, targets = (torch.randint(vocab_size, (*lead, SHAPE.rows, SHAPE.time), generator=g) for _ in range(2))
    one_place = laws.one_place(config)
    at = slice(0, 1) if one_place else None
    batch = Batch(tokens, targets[..., :1] if one_place else targets, torch.ones((*lead, SHAPE.rows, 1 if one_place else SHAPE.time)), at=at)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        loss = OBJECTIVES["cross_entropy"](model, batch, None).loss.sum()
        torch.autograd.grad(loss, list(model.parameters()))
    return counter.get_total_flops()


# --- the counts


@pytest.mark.parametrize("name", laws.model_cases())
def test_a_training_step_is_three_forward_passes(name: str) -> None:
    config = laws.model_cases()[name].config
    if isinstance(config, EncoderConfig) and config.frozen:
        pytest.skip("reads each sentence once, before its first step")
    scored = 1 if laws.one_place(config) else SHAPE.scored
    one = counted(config, ())
    assert counted(config, (laws.R,)) == laws.R * one
    told = flops.step(RunConfig(model=config), on_meta(config), SHAPE._replace(scored=scored)).products
    drawn = isinstance(config, DecoderConfig) and "performer" in config.mixers  # its directions are not trained: their products have one gradient, not two
    assert 0.9 * told < one < told if drawn else one == told


@pytest.mark.parametrize("tied", [False, True])
def test_a_large_vocabulary(tied: bool) -> None:
    """Products that the fused cross-entropy makes a second time are none of this count."""
    config = DecoderConfig(width=8, num_layers=1, num_heads=2, feed_forward=12, tied=tied)
    one = counted(config, (), 5000)
    assert one == flops.step(RunConfig(model=config), on_meta(config, 5000), SHAPE).products and counted(config, (laws.R,), 5000) == laws.R * one


def test_the_assignments_rule_gives_published_numbers() -> None:
    """Two students of the course trained this shape at 256 positions on 655 million tokens, or half of them, and logged 6.53e16 and 3.27e16 FLOPs."""
    shape = Shape(rows=10, time=256, scored=256)
    each = flops.step(RunConfig(model=GPT), on_meta(GPT, 50_257, 256), shape).assignment
    assert each % shape.tokens == 0
    assert each // shape.tokens == 6 * (50_257 * 256 + 256 * 256 + 4 * (12 * 256**2 + 13 * 256) + 2 * 256) + 12 * 4 * 256 * 256
    assert [f"{each / shape.tokens * tokens:.2e}" for tokens in (655.36e6, 327.68e6)] == ["6.53e+16", "3.27e+16"]


def test_the_assignments_rule_without_attention() -> None:
    """Layers of another mixer cost their parameters, and so do models without layers."""
    for config, layers in ((replace(GPT, mixers=("mamba",)), 0), (replace(GPT, mixers=("attention", "mamba", "mamba")), 2), (EmbeddingMLPConfig(), 0)):
        model = on_meta(config, 99, 8)
        size = sum(p.numel() for p in model.parameters())
        assert flops.step(RunConfig(model=config), model, Shape(2, 8, 8)).assignment == 16 * (6 * size + 12 * layers * 256 * 8)


@pytest.mark.parametrize("mixer", MIXERS)
def test_parts_make_the_whole(mixer: str) -> None:
    config = replace(laws.MIXER_EXAMPLES[mixer], mixers=(mixer, "attention"), num_layers=3, feed_forward=12)
    model = on_meta(config)
    for shape in (SHAPE, SHAPE._replace(scored=2)):
        parts = flops.products(model, shape)
        assert sum(parts.values()) == model.flops(*shape)
        assert parts["embedding"] == 0 and parts["head"] == 2 * shape.rows * shape.scored * config.width * laws.VOCABULARY
        assert parts["feed-forward"] == 4 * shape.rows * config.width * 12 * (2 * shape.time + shape.scored)
    assert sum(flops.parameters(model).values()) == sum(p.numel() for p in model.parameters())


def test_parameters_by_group() -> None:
    assert flops.parameters(on_meta(GPT, 100, 10)) == {
        "embedding": 100 * 256, "positions": 10 * 256, "mixer": 4 * 4 * (256**2 + 256), "norms": 9 * 2 * 256,
        "feed-forward": 4 * (8 * 256**2 + 5 * 256), "head": 0,
    }  # fmt: skip
    free = flops.parameters(on_meta(replace(GPT, tied=False, head_bias=True), 100, 10))
    assert free["head"] == 100 * 256 + 100 and free["embedding"] == 100 * 256


@pytest.mark.parametrize("config", [Muon(), Muon(newton_schulz_steps=3), AdamW()])
def test_hardware(config: Any) -> None:
    run = RunConfig(optimizer=config, model=replace(GPT, width=64, num_heads=4, feed_forward=128, num_layers=2))
    model = on_meta(run.model, 5000, 32)
    shape = Shape(4, 32, 32)
    parts, forward = flops.hardware(run, model, shape), flops.products(model, shape)
    assert flops.step(run, model, shape).hardware == 3 * model.flops(*shape) + sum(parts.values())
    assert parts["scores again"] == 2 * (4 * 32 * 32 * 64) * 2, "one product of scores in each of two layers"
    assert parts["head again"] == 0
    for changes in ({"precision": "bfloat16"}, {"batch_size": 1}):
        big = shape if "precision" in changes else shape._replace(rows=40_000)
        again = flops.hardware(replace(run, **changes), model, big)["head again"]
        assert again == forward["head"] * big.rows // shape.rows
    for other in (replace(run, precision="bfloat16", objective="stablemax"), replace(run, precision="float32")):
        assert flops.hardware(other, model, shape)["head again"] == 0
    assert flops.hardware(replace(run, precision="bfloat16"), on_meta(run.model, 4000, 32), shape)["head again"] == 0
    if isinstance(config, Muon):
        matrices = {name: torch.ones(1, *p.shape) for name, p in model.named_parameters() if name in model.hidden_matrices()}
        with FlopCounterMode(display=False) as counter:
            for matrix in matrices.values():
                optimizers.newton_schulz(optimizers.wide(matrix), config.newton_schulz_steps, torch.float32)
        assert parts["Newton-Schulz"] == counter.get_total_flops()
    else:
        assert "Newton-Schulz" not in parts and parts["elementwise"] == 17 * sum(p.numel() for p in model.parameters())


def test_a_small_vocabulary() -> None:
    """Its embedding's gradient is a product with one-hot rows on a GPU."""
    parts = flops.hardware(RUN, on_meta(RUN.model, 99, 8), Shape(2, 8, 1))
    assert parts["embedding"] == 2 * 2 * 8 * 99 * 16 and parts["scores again"] == 0
    assert "embedding" not in flops.hardware(RUN, on_meta(RUN.model, 513, 8), Shape(2, 8, 1))


# --- budgets


@pytest.mark.parametrize("rule", flops.Counts._fields)
def test_budgeted(rule: Any) -> None:
    price = getattr(counts(RUN), rule)
    for budget, steps in ((price, 1), (price + 1, 1), (2 * price - 1, 1), (1000 * price, 1000), (1e15, int(1e15) // price)):
        run = replace(RUN, budget=float(budget), budget_rule=rule, steps=7)
        assert budgeted(run) == replace(run, steps=steps) and budgeted(budgeted(run)) == budgeted(run)
        assert budgeted(with_seed(run, 5)) == with_seed(budgeted(run), 5)
    assert budgeted(replace(RUN, steps=7)) == replace(RUN, steps=7)


def test_runs_that_are_alike_are_counted_once() -> None:
    known: dict[RunConfig, flops.Counts] = {}
    base = replace(RUN, budget=1e12)
    others = [
        with_values(base, change)
        for change in (
            {"optimizer.lr": 0.5, "optimizer.wd": 0.0, "model.init_scale": 2.0, "seeds.init": 4, "seeds.split": 5, "budget": 1e13, "variant": "x", "clip": 1.0},
            {"model.width": 32}, {"batch_size": 9}, {"optimizer": Muon()}, {"optimizer": Muon(newton_schulz_steps=2)}, {"model.tied": True},
            {"task.p": 11}, {"gradient.direction": "egalitarian"}, {"task": RecallConfig()}, {"model": EmbeddingMLPConfig()},
        )
    ]  # fmt: skip
    for rule in flops.Counts._fields:
        for run in (replace(run, budget_rule=rule) for run in (base, *others)):
            assert budgeted(run, known) == budgeted(run)
    assert len(known) == 1 + len(others) - 1 and known[flops._priced(base)] == counts(base)


def test_a_model_without_products() -> None:
    """A bigram table has parameters to pay for, and no product."""
    run = replace(RUN, model=BigramConfig(), budget=1e12)
    assert counts(run).products == 0 and budgeted(run).steps == 10**12 // (RUN.batch_size * 4 * 6 * 9 * 9)
    with pytest.raises(ConfigError, match="budget_rule: by products a step of this model costs nothing; count by assignment or hardware"):
        budgeted(replace(run, budget_rule="products"))


@pytest.mark.parametrize("rule", flops.Counts._fields)
def test_a_budget_below_one_step(rule: Any) -> None:
    price = getattr(counts(RUN), rule)
    run = replace(RUN, budget=price - 1.0, budget_rule=rule)
    for ask in (budgeted, validate, lambda run: driver._wanted(study([run]), driver.Rows())):
        with pytest.raises(ConfigError, match=rf"^budget: .* less than one step, which costs .* by the rule {rule}; raise it") as error:
            ask(run)
        assert f"{price:.4g}" in str(error.value)


def test_a_budget_beyond_counting() -> None:
    with pytest.raises(ConfigError, match=r"^budget: 1e\+40 FLOPs pay for .* steps of .* each, more than can be counted; lower it"):
        budgeted(replace(RUN, budget=1e40))


def test_the_shape_is_the_fleets() -> None:
    for run in (RUN, replace(RUN, task=RecallConfig(length=9, train_lengths="uniform"), batch_size=6), replace(RUN, task=MemorizeConfig(), batch_size=0)):
        from shoal.train.fleet import Fleet

        record = Fleet.build([run, with_seed(run, 1)]).record()["model"]
        assert record["flops"] == counts(run)._asdict() and record["batch"] == list(flops.outline(run).shape)
        assert record["parameters"] == sum(flops.parameters(flops.outline(run).model).values())


def study(runs: list[RunConfig]) -> Study:
    return Study(name="spend", question="What does it buy?", main_metric="val/loss", wanted=lambda rows: runs)


def test_a_study_spends_its_budget(tmp_path: Path) -> None:
    """The stored config has the steps, whatever was asked for; a resumed study knows its runs again."""
    price = counts(RUN).products
    budget = 12.5 * price
    runs = [with_seed(replace(RUN, budget=budget, budget_rule="products", evaluate=("val",)), seed) for seed in (0, 1)]
    results = [driver.run(study(runs), tmp_path / "out", device="cpu", progress=False) for _ in range(2)]
    for result in results:
        assert [(row["steps"], row["config.steps"], row["budget"]) for row in result.rows] == [(12, 12, budget)] * 2
    assert results[0].rows[0]["flops.products"] * 12 <= budget
    words = (tmp_path / "out" / "report.md").read_text()
    assert "budget" in words and "budget_rule" in words and "products" in words
    wanted = StudyConfig(run=RUN, grid={"budget": [price * 3.0, price * 5.0]}, seeds=1).runs()
    result = driver.run(study([replace(run, budget_rule="products") for run in wanted]), tmp_path / "grid", device="cpu", progress=False)
    assert sorted(row["steps"] for row in result.rows) == [3, 5] and len({row["fleet"] for row in result.rows}) == 1


# --- shoal flops


def shown(capsys: pytest.CaptureFixture[str], *line: str) -> tuple[int, str, str]:
    code = cli.main(["flops", *line])
    out, err = capsys.readouterr()
    return code, out, err


def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "gpt.yaml"
    path.write_text(
        "task: {type: recall, num_tokens: 16, length: 32}\nmodel: {type: decoder, width: 32, num_heads: 2, feed_forward: 128}\nbatch_size: 8\nevaluate: []\n"
    )
    code, out, err = shown(capsys, str(path), "--model.tied", "--budget", "1e12")
    assert (code, err) == (0, "")
    run = RunConfig(task=RecallConfig(), model=DecoderConfig(width=32, num_heads=2, feed_forward=128, tied=True), batch_size=8, budget=1e12)
    each, steps = counts(run), budgeted(run).steps
    lines = {" ".join(words[:-3] or words): words[-3:] for line in out.splitlines() if (words := line.split())}
    for rule, count in each._asdict().items():
        assert [float(x) for x in lines[rule]] == pytest.approx([count / 256, count, count * steps], rel=1e-3)
    assert [float(x) for x in lines["(multiply-adds)"]] == pytest.approx([each.assignment / 512, each.assignment / 2, each.assignment * steps / 2], rel=1e-3)
    size = sum(p.numel() for p in flops.outline(run).model.parameters())
    assert f"{size:,}" in out and "is the embedding" in out and "recall, vocabulary" in out
    assert f"a budget of 1e+12 FLOPs by assignment pays for {steps:,} steps: {steps * 256:,} tokens, {steps * 256 / size:.4g} a parameter" in out
    shares = [float(line.split()[-1].rstrip("%")) for line in out.split("products  ")[-1].split("hardware beside")[0].splitlines()[1:] if line]
    assert math.isclose(sum(shares), 100, abs_tol=0.5)

    path.write_text("{}")
    assert "no budget; 1,000 steps: 2,048,000 tokens" in shown(capsys, str(path))[1]


def test_command_of_language(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """The text is read, which standard error says, and its tokens are told."""
    monkeypatch.setenv("SHOAL_CACHE", str(tmp_path / "cache"))
    for name in "abcdefgh":
        (tmp_path / f"{name}.txt").write_text(name * 998)  # 1,000 tokens with <s> and </s>
    path = tmp_path / "gpt.yaml"
    path.write_text(f"task: {{type: language, corpus: {tmp_path}/*.txt, tokenizer: bytes, length: 10, val_fraction: 0.25}}\nbatch_size: 30\nsteps: 50\n")
    code, out, err = shown(capsys, str(path), "--evaluate", "[val]", "--model.num_layers", "0")
    assert code == 0 and err == f"shoal: reading {tmp_path}/*.txt; a text that is new here is encoded first\n"
    assert (
        "a step reads 30 x 10 = 300 tokens\n" in out and "no budget; 50 steps: 15,000 tokens" in out and out.endswith("2.5 epochs of 6,000 training tokens\n")
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            ["--budget", "10"],
            "budget: 10 FLOPs are less than one step, which costs 5.219e+09 by the rule assignment; raise it, or make the model or the batch smaller",
        ),
        (["--budget", "-1"], "budget: must be 0 (none) or a number of FLOPs such as 1e15, not -1.0"),
        (["--budget_rule", "none"], "budget_rule: "),
        (["--evaluate", "[best]"], "evaluate: this task has no split 'best'"),
        (["--model.wdth", "3"], "model.wdth: unknown key; did you mean width?"),
    ],
)
def test_bad_input(options: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "gpt.yaml"
    path.write_text("{}")
    code, out, err = shown(capsys, str(path), *options)
    assert (code, out) == (2, "") and err.startswith(f"shoal: {message}") and err.count("\n") == 1
