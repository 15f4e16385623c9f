"""What was trained can be used: continue a prompt, exactly and at random; bad prompts are refused."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from laws import generator
from laws_training import MLP, MODULAR, SMALL, finished
from scipy.stats import chisquare

from shoal import rng
from shoal.config import AdamW, MemorizeConfig, ModularConfig, with_seed, with_values
from shoal.config.fields import ConfigError
from shoal.inference import evaluate, generate, next_token_probabilities
from shoal.inference.evaluate import batches
from shoal.inference.generate import sample
from shoal.inference.pick import pick
from shoal.inference.sampling import Sampling
from shoal.train.fleet import Fleet
from shoal.train.run import Run

TEXT = "I love machines"


def trained(config: Any, steps: int) -> Run:
    fleet, _ = finished(Fleet.build([with_seed(replace(config, steps=steps, evaluate_every=steps, log_every=steps), s) for s in range(2)]))
    return fleet.one(1)


@pytest.fixture(scope="module", params=["learned", "rotary"])
def memory(request: pytest.FixtureRequest) -> Run:
    """A decoder that knows two strings that differ in length and from their first character."""
    task = MemorizeConfig(strings=(TEXT, "no, we do not"))
    config = replace(MODULAR, task=task, model=replace(SMALL, init_scale=5.0), optimizer=AdamW(lr=1e-2), batch_size=0, evaluate=("train",))
    return trained(with_values(config, {"model.positions": request.param}), 120)


def test_greedy_continues_what_was_memorised(memory: Run) -> None:
    """From any beginning of a string, through the cache; what comes out is the rest, and nothing after it."""
    for text in (TEXT, "no, we do not"):
        for cut in range(1, len(text)):
            assert generate(memory, text[:cut]) == text[cut:]
    assert generate(memory, TEXT[:3], max_tokens=4) == TEXT[3:7]
    assert generate(memory) in (TEXT, "no, we do not")
    assert evaluate(memory, "train")["accuracy"] > 0.96  # one of the first characters cannot be known


def test_a_batch_is_each_prompt_by_itself(memory: Run) -> None:
    prompts = torch.tensor([[*memory.task.start, *memory.task.tokenizer.encode(text[:4])] for text in (TEXT, "no, we do not")])
    keys = rng.key(torch.arange(2), "sample")
    together = sample(memory, prompts, 8, Sampling(temperature=1.0), keys)
    assert together.shape == (2, 8)
    for row in range(2):
        assert sample(memory, prompts[row : row + 1], 8, Sampling(temperature=1.0), keys[row : row + 1])[0].equal(together[row])


def test_probabilities_are_those_of_sampling(memory: Run) -> None:
    """next_token_probabilities of the training rows: sums of 1, and greedy generation takes their largest."""
    batch = batches(memory, "train")[0]
    p = next_token_probabilities(memory, batch)
    assert torch.allclose(p.sum(-1), torch.ones(p.shape[:-1]))
    for row, text in enumerate((TEXT, "no, we do not")):
        best = p[row].argmax(-1).tolist()
        assert memory.task.tokenizer.decode(best[1 : len(text)]) == text[1:] and best[len(text)] == memory.task.end


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_frequencies_of_draws(temperature: float) -> None:
    """100,000 keys against the softmax, by chi-square."""
    logits = torch.randn(6, generator=generator(3)) * 1.5
    draws = pick(logits.expand(100_000, -1), temperature, rng.key(torch.arange(100_000), "sample"))
    expected = (logits.double() / temperature).softmax(-1).numpy() * 100_000
    assert chisquare(torch.bincount(draws, minlength=6).numpy(), expected).pvalue > 1e-3


def test_extreme_logits() -> None:
    """Without NaN: nearly certain, and impossible."""
    logits = torch.tensor([[0.0, 1e4, -1e30], [5.0, -torch.inf, 5.0]]).repeat(500, 1)
    draws = pick(logits, 1.0, rng.key(torch.arange(1000), "sample")).view(500, 2)
    assert (draws[:, 0] == 1).all() and set(draws[:, 1].tolist()) == {0, 2}
    assert pick(logits[:2], 0.0, torch.zeros(2, dtype=torch.int64)).tolist() == [1, 0]


def test_seeds_and_temperature(memory: Run) -> None:
    """The same seed gives the same text and others others; a hot text is not the memorised one, a cold one is."""
    hot = [generate(memory, "I l", temperature=3.0, seed=seed) for seed in range(5)]
    assert hot == [generate(memory, "I l", temperature=3.0, seed=seed) for seed in range(5)] and len(set(hot)) == 5
    assert generate(memory, "I l", temperature=0.01, seed=9) == TEXT[3:]


def test_the_answers_of_an_embedding_mlp_and_of_characters() -> None:
    """A model without a time axis, on "a op b ="; and a decoder that writes the digits of its answer one after the other."""
    task = ModularConfig(p=11, operation="add", train_fraction=0.85, val_fraction=0.1)
    written = replace(MODULAR, task=replace(task, tokens="digits"), model=replace(SMALL, init_scale=5.0), optimizer=AdamW(lr=1e-2, wd=0.0))
    for config, least in ((replace(MLP, task=task), 0.9), (written, 0.15)):
        run = trained(config, 300)
        rows, decode = batches(run, "train")[0], run.task.tokenizer.decode
        prompts = [decode(tokens[: tokens.index(run.task.tokenizer.encode("=")[0]) + 1]) for tokens in rows.tokens.tolist()]
        right = [generate(run, prompt) == decode(target) for prompt, target in zip(prompts, rows.targets.tolist(), strict=True)]
        share = sum(right) / len(right)
        assert len(right) == 103 and share > least and share == pytest.approx(evaluate(run, "train")["exact"])


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"prompt": "I lo", "temperature": -0.1}, "temperature: must be 0 (most probable token) or more, not -0.1"),
    ({"prompt": "I lo", "temperature": float("nan")}, "temperature: must be 0 (most probable token) or more, not nan"),
    ({"prompt": "I löve"}, "prompt: unknown character 'ö'; known: ' '"),
    ({"prompt": TEXT + TEXT}, "prompt: 31 tokens are more than the model's 16 positions; shorten it"),
    ({"prompt": "I lo", "max_tokens": 13}, "tokens: must lie between 1 and 12, what is left of the model's 16 positions, not 13"),
    ({"prompt": "I lo", "max_tokens": 0}, "tokens: must lie between 1 and 12"),
]


@pytest.mark.parametrize(("arguments", "message"), REFUSED)
def test_refusals(arguments: dict[str, Any], message: str) -> None:
    config = replace(MODULAR, task=MemorizeConfig(strings=(TEXT,)), evaluate=("train",))
    with pytest.raises(ConfigError) as caught:
        generate(Fleet.build([config]).one(0), **arguments)
    assert str(caught.value).startswith(message)


def test_refusals_of_tables() -> None:
    """Without a begin token a prompt is needed, and a model that reads three tokens needs three."""
    run = Fleet.build([MLP]).one(0)
    for prompt, message in (
        ("", "prompt: this task has no begin token"),
        ("3 +", "num_inputs: this model reads 3 tokens at once, and there are only 2"),
        ("3 + 11 =", "prompt: unknown"),
    ):
        with pytest.raises(ConfigError, match=message.replace("+", r"\+")):
            generate(run, prompt)


def test_the_longest_prompt_has_room_for_one_token() -> None:
    run = Fleet.build([replace(MODULAR, task=MemorizeConfig(strings=(TEXT,)), evaluate=("train",))]).one(0)
    assert len(sample(run, torch.tensor([[*run.task.start, *run.task.tokenizer.encode(TEXT)]]), 1, Sampling(), torch.zeros(1, dtype=torch.int64))[0]) == 1
    assert len(generate(run, TEXT)) <= 1
