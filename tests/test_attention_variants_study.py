"""The study of attention's variants: its runs are what they say, its measures equal loops written out, claims and tables say what invented rows say."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from invented_losses import losses

from shoal import models, tasks
from shoal.config import DecoderConfig, LanguageConfig, RunConfig, flatten, with_values
from shoal.config.fields import ConfigError
from shoal.config.load import override
from shoal.inference.evaluate import evaluate, tables_of
from shoal.results import Rows
from shoal.results.claims import judge
from shoal.results.tables import own
from shoal.studies import attention_measures as measures
from shoal.studies import attention_variants as variants
from shoal.studies.attention_measures import OTHER, PREFIX, TRAINED
from shoal.studies.attention_variants import ALIBI, BASE, MAMBA, RENORMALISED, SINUSOIDAL, WINDOWED, ZEROED
from shoal.train import flops
from shoal.train.fleet import Fleet
from shoal.train.plan import plan
from shoal.train.run import Run

CORPUS = str(Path(__file__).parent / "corpus.jsonl")
TASK = LanguageConfig(corpus=CORPUS, tokenizer="bytes", length=12, longest=3)
MODEL = DecoderConfig(width=16, num_layers=2, num_heads=2, feed_forward=16, init_std=0.5, embedding_std=0.5)


def untrained(name: str, task: LanguageConfig = TASK) -> Run:
    """Of large initial values, so that its heads look somewhere in particular."""
    run = with_values(RunConfig(task=task, model=MODEL, batch_size=4, steps=2), variants.VARIANTS[name] | {"variant": name})
    return Fleet.build([run], "cpu").one(0)


def nats(run: Run, tokens: torch.Tensor, place: int, target: int) -> float:
    """Of one token, after a forward pass of one window int64 [T]."""
    with torch.inference_mode():
        hidden, _ = run.model(tokens[None])
        return -float(run.model.logits(hidden)[0, place].double().log_softmax(-1)[target])


def stream(run: Run) -> torch.Tensor:
    """The validation part's tokens, int64 [N], one after the other."""
    windows = [batch.each(lambda x: x[0]) for batch in run.task.evaluation(tables_of(run.config, run.task), "val", 1)]
    rest = torch.cat([batch.targets[0][batch.weights[0] > 0] for batch in windows])
    return torch.cat([windows[0].tokens[0, :1], rest])


# room beyond a window


def test_a_language_model_may_have_room_for_more_than_its_windows() -> None:
    short, long = replace(TASK, longest=1), TASK
    task, other = tasks.build(long), tasks.build(short)
    assert (task.max_length, other.max_length) == (36, 12)
    model: Any = models.build(MODEL, task.vocab_size, task.max_length)
    assert model.position.weight.shape == (36, 16)
    key, step = torch.tensor([3]), torch.tensor(5)
    first, second = (one.batch(one.setup({"split_seed": [0]}, "cpu"), key, step, 4) for one in (task, other))
    assert torch.equal(first.tokens, second.tokens) and first.tokens.shape == (1, 4, 12), "windows are what they were"
    for wrong in (0, 2**20):
        with pytest.raises(ConfigError, match="longest: must be 1 to"):
            replace(TASK, longest=wrong)


# measures


@pytest.mark.parametrize("name", [BASE, ALIBI, MAMBA])
def test_loss_by_position_beyond_the_training_length(name: str) -> None:
    run = untrained(name)
    tokens, room = stream(run), 36
    sums: dict[int, list[float]] = {}
    for begin in range(0, len(tokens) - 1, room):
        window = tokens[begin : begin + room + 1]
        for place in range(len(window) - 1):
            stretch = place // 12 * 12 + min(place % 12 // 3 * 3 + 3, 12)  # 12 positions in stretches of 3
            sums.setdefault(stretch, []).append(nats(run, window[:-1], place, int(window[place + 1])))
    found = measures.beyond(run)
    assert [entry["position"] for entry in found] == sorted(sums) and [entry["tokens"] for entry in found] == [len(sums[at]) for at in sorted(sums)]
    assert [entry["nats"] for entry in found] == pytest.approx([np.mean(sums[at]) for at in sorted(sums)], rel=1e-5)


@pytest.mark.parametrize("name", [BASE, ZEROED, RENORMALISED])
def test_the_leak_is_what_the_future_tells(name: str) -> None:
    run = untrained(name)
    tokens = stream(run)
    windows = [tokens[begin : begin + 13] for begin in range(0, len(tokens) - 1, 12)][:-1]  # the last is not whole
    found = {entry["given"]: entry for entry in measures.leak(run)}
    places = [(2 * i + 1) * 12 // 16 for i in range(8)]
    assert found[TRAINED]["places"] >= len(windows) * len(places)
    if name != ZEROED:
        assert found[OTHER]["nats"] == pytest.approx(found[TRAINED]["nats"], rel=1e-5) == pytest.approx(found[PREFIX]["nats"], rel=1e-5)
        return
    batch = next(iter(run.task.evaluation(tables_of(run.config, run.task), "val:256", 4096))).each(lambda x: x[0])
    sums: dict[str, list[float]] = {TRAINED: [], OTHER: [], PREFIX: []}
    for row in range(len(batch.tokens)):
        for place in places:
            if batch.weights[row, place]:
                target, own_tokens, others = int(batch.targets[row, place]), batch.tokens[row], batch.tokens[row - 1]
                sums[TRAINED].append(nats(run, own_tokens, place, target))
                sums[OTHER].append(nats(run, torch.cat([own_tokens[: place + 1], others[place + 1 :]]), place, target))
                sums[PREFIX].append(nats(run, own_tokens[: place + 1], place, target))
    for given, values in sums.items():
        assert found[given]["nats"] == pytest.approx(np.mean(values), rel=1e-5) and found[given]["places"] == len(values)
    assert abs(found[OTHER]["nats"] - found[TRAINED]["nats"]) > 1e-4 < abs(found[PREFIX]["nats"] - found[TRAINED]["nats"])


def test_lost_attention_is_what_lies_above_the_diagonal() -> None:
    run = untrained(ZEROED)
    batch = next(iter(run.task.evaluation(tables_of(run.config, run.task), "val:16", 16))).each(lambda x: x[0])
    model: Any = run.model
    block = model.blocks[0]
    with torch.inference_mode():
        x = block.mixer_norm(model.embedding(batch.tokens) + model.position.weight[:12])
        q, k = (part(x).unflatten(-1, (2, 8)).transpose(1, 2).double() for part in (block.mixer.query, block.mixer.key))
        all_weights = (q @ k.mT / math.sqrt(8)).softmax(-1)
    expected = all_weights.triu(1).sum(-1).mean((0, 1)).tolist()
    found = measures.lost(run)
    assert [entry["lost"] for entry in found if entry["layer"] == 0] == pytest.approx(expected, abs=1e-5)
    assert {entry["layer"] for entry in found} == {0, 1} and found[11]["lost"] == pytest.approx(0, abs=1e-6) and found[0]["position"] == 1


def test_speed_and_samples() -> None:
    run = untrained(BASE, replace(TASK, length=40))
    (line,) = measures.speed(run)
    assert 0 < line["tokens per second"] < math.inf and line["device"] == "CPU"
    lines = measures.samples(run)
    assert [entry["prompt"] for entry in lines] == list(measures.PROMPTS.values()) and all(isinstance(entry["sample"], str) for entry in lines)
    long = measures.samples(run, {"too long": "x" * 50, "fits": "x"})
    assert [entry["prompt"] for entry in long] == ["x"], "within the positions it was trained on"
    with torch.no_grad():
        assert evaluate(run, "val")["loss"] > 0, "timing left the run as it was"
    assert not any(p.requires_grad for p in run.model.parameters())


# the runs


def test_full_is_the_assignments() -> None:
    config = variants.full()
    assert len(config.variants) >= 20 and config.seeds == 5
    run = config.run
    assert isinstance(run.model, DecoderConfig) and isinstance(run.task, LanguageConfig)
    assert (run.model.num_layers, run.model.width, run.model.num_heads, run.model.feed_forward) == (4, 128, 4, 512)
    assert (run.task.length, run.task.longest) == (100, 4)
    for one in {run.variant: run for run in config.runs()}.values():
        with torch.device("meta"):
            model = models.build(one.model, 4096, 400)
        assert flops.step(one, model, flops.Shape(64, 100, 100)).assignment * one.steps >= 1e14, one.variant


def test_a_search_then_fresh_seeds_in_fleets_of_one_size(tmp_path: Path) -> None:
    config = variants.full()
    study = variants.study(config)
    first = study.wanted(Rows())
    fleets = plan(first)
    assert len(fleets) == len(config.variants) and {len(fleet) for fleet in fleets} == {5}
    assert {run.seeds.split for run in first} == {variants.TUNING} and {run.steps for run in first} == {400}

    def loss(run: RunConfig) -> float:
        """Renormalised attention is a little luckier at another rate than attention's best."""
        rate = flatten(run)["optimizer.lr"]
        best = 1e-3 if run.variant.startswith(RENORMALISED) else 8e-3 if run.variant.startswith("AFT") else 2e-3
        return 4 + abs(math.log(rate / best))

    rows = losses(tmp_path, first, loss)
    both = study.wanted(rows)
    fresh = both[len(first) :]
    assert both[: len(first)] == first and {len(fleet) for fleet in plan(fresh)} == {5} and {run.steps for run in fresh} == {1600}
    rates = {run.variant: flatten(run)["optimizer.lr"] for run in fresh}
    assert rates[BASE] == rates[RENORMALISED] == 2e-3 and rates["AFT full"] == 8e-3
    assert {run.seeds.split for run in fresh} == set(range(5)) and list(rates) == list(config.variants)
    with pytest.raises(ConfigError, match="first_seed: seeds 1000 to 1000 are for tuning"):
        variants.study(override(config, {"first_seed": 998}))


def test_quick_trains_at_one_rate() -> None:
    config = variants.quick()
    study = variants.study(config)
    assert study.wanted(Rows()) == config.runs() and len(plan(config.runs())) == len(config.variants) >= 20
    assert {BASE, ZEROED, RENORMALISED, ALIBI, SINUSOIDAL, MAMBA, WINDOWED} <= config.variants.keys()


# claims and tables of invented rows

NAMES = sorted({name for one in variants.ORDERS for name in (one.low, one.high)} | {ZEROED, RENORMALISED, ALIBI, SINUSOIDAL, MAMBA, WINDOWED})
CONFIG = override(variants.full(), {"grid.optimizer.lr": [2e-3], "variants": NAMES, "seeds": 3})
STUDY = variants.study(CONFIG)
PAIRS = {"pairs": [{"nats": 5.0}]}


def rank(name: str) -> int:
    """How many stand above it in what is claimed."""
    below = [one.high for one in variants.ORDERS if one.low == name]
    return 1 + max(map(rank, below)) if below else 0


def invented(directory: Path, sign: float = 1.0) -> Rows:
    """All as it is claimed, or (-1) the other way round."""

    def loss(run: RunConfig) -> float:
        name = BASE if run.variant in (ZEROED, RENORMALISED) else run.variant
        return 4 + 0.3 * math.sin(run.seeds.split) - sign * 0.1 * rank(name)

    def looked(run: RunConfig) -> dict[str, Any]:
        further, zeroed = sign if run.variant in (BASE, SINUSOIDAL) else -sign, run.variant == ZEROED
        found: dict[str, Any] = {"beyond": [{"position": at, "nats": 4 + 0.2 * further * (at > 100), "tokens": 10} for at in range(50, 401, 50)], **PAIRS}
        if run.variant in variants.LEAKS:
            found["leak"] = [{"given": given, "nats": 4.0 + sign * zeroed * (given != TRAINED), "places": 8} for given in (TRAINED, OTHER, PREFIX)]
            found["speed"] = [{"tokens per second": 1e6, "device": "a device"}]
        return found | ({"lost": [{"layer": layer, "position": at, "lost": 0.5} for layer in range(2) for at in range(1, 101)]} if zeroed else {})

    return losses(directory, CONFIG.runs(), loss, measures=looked)


def test_claims_say_what_the_rows_say(tmp_path: Path) -> None:
    rows, turned = invented(tmp_path / "held"), invented(tmp_path / "turned", sign=-1)
    few = [claim.text for claim in STUDY.claims if judge(claim, rows)["verdict"] != "held"]
    assert len(few) == 1 and few[0].startswith("Zeroing after the softmax lowers the training loss"), "it is the baseline's here"
    others = [claim for claim in STUDY.claims if "learns:" not in claim.text]
    assert len(others) == len(STUDY.claims) - len(NAMES), "all are below counted pairs, either way"
    kept = [claim.text for claim in others if judge(claim, turned)["verdict"] == "held"]
    assert len(kept) == 2 and all("0.01 nats" in text for text in kept), "renormalised, and zeroed in validation, are the baseline's here"
    assert {judge(claim, turned)["verdict"] for claim in others} == {"held", "not held"}


def test_tables_and_figures(tmp_path: Path) -> None:
    rows = invented(tmp_path)
    found = {table.name: [dict(line) for line in table.make(rows)] for table in STUDY.tables if not own(table, rows)["error"]}
    assert found.keys() == {"variants", "cost", "beyond", "leak", "text", "perplexity"}
    ranking = found["variants"]
    assert [line["validation loss"].value for line in ranking] == sorted(line["validation loss"].value for line in ranking) and len(ranking) == len(NAMES)
    (base,) = (line for line in ranking if line["variant"] == BASE)
    (same,) = (line for line in ranking if line["variant"] == RENORMALISED)
    (averaging,) = (line for line in ranking if line["variant"] == "averaging")
    assert base["less that of attention"] is None and same["less that of attention"].value == 0 and base["learns"] == "yes"
    assert averaging["less that of attention"].value == pytest.approx(0.1 * rank(BASE)) and averaging["less that of attention"].n == 3
    assert base["validation perplexity"].value == pytest.approx(math.exp(base["validation loss"].value))
    beyond = {line["variant"]: line for line in found["beyond"]}
    assert list(beyond[BASE])[1:5] == ["1 to 100", "101 to 200", "201 to 300", "301 to 400"] and beyond[BASE]["last less first"].value == pytest.approx(0.2)
    (leak,) = (line for line in found["leak"] if line["variant"] == ZEROED)
    assert leak["had from the leak"].value == 1 and leak["attention lost"].value == 0.5
    assert [line["training perplexity in the text"] for line in found["text"]] == [949.59, 894.52]
    assert {line["variant"]: line for line in found["cost"]}[BASE]["tokens per second"] == 1e6 and found["cost"][0][
        "at the edge of what was tried"
    ] == "not tuned"
    for figure in STUDY.figures:
        assert figure.svg(rows).startswith("<svg")
        assert figure.svg(Rows()).startswith("<svg"), "of nothing, too"
