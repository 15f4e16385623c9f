"""Masked diffusion: the bound beside a plain loop and beside the exact average over everything that can be hidden; its draws; training, and the sampler."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from laws import B, R, close, generator
from laws_training import CORPUS, MODULAR, SMALL, eight, finished, leaves_of, of_run
from scipy.stats import chisquare, kstest
from torch import Tensor

from shoal import rng
from shoal.config import AdamW, LanguageConfig, with_values
from shoal.config.fields import ConfigError
from shoal.contracts import Batch, Context
from shoal.inference import diffusion as sampler
from shoal.inference import evaluate, generate
from shoal.inference.sampling import Sampling
from shoal.models.decoder import Decoder
from shoal.train.diffusion import masked_diffusion, rates, row_keys
from shoal.train.fleet import Fleet
from shoal.train.objectives import add
from shoal.train.plan import validate
from shoal.train.run import Run

V, T = 7, 6
MASK = V - 1
TASK = LanguageConfig(corpus=str(CORPUS), tokenizer="characters", length=8, val_fraction=0.2, mask_token=True)
HOT = Sampling(temperature=1.0)
RUN = replace(MODULAR, task=TASK, model=replace(SMALL, num_layers=1, causal=False), objective="masked_diffusion", batch_size=8, steps=30, evaluate_every=15)


class Table:
    """Answers every canvas with logits that depend on all of it and on the place; says what it saw."""

    vocab_size = V

    def __init__(self) -> None:
        g = generator(1)
        self.by_token, self.by_place = torch.randn(T, V, V, generator=g), torch.randn(T, V, generator=g)
        self.seen: list[tuple[Tensor, Tensor | None]] = []

    def __call__(self, tokens: Tensor, context: Context) -> tuple[Tensor, None]:
        self.seen.append((tokens, context.mask))
        here = torch.ones(tokens.shape) if context.mask is None else context.mask.float()
        return (self.by_token[torch.arange(tokens.shape[-1]), tokens] * here[..., None]).sum(-2, keepdim=True) + self.by_place, None

    def logits(self, hidden: Tensor) -> Tensor:
        return hidden

    def linear_head(self) -> None:
        return None


def whole_batch(rows: int = B) -> Batch:
    """[R, rows, T], everything real and scored."""
    tokens = torch.randint(MASK, (R, rows, T), generator=generator(2))
    return Batch(tokens, tokens.roll(-1, -1), torch.ones(R, rows, T))


def keys(rows: int, step: int = 0) -> Tensor:
    return row_keys(rng.key(torch.arange(R), "dropout", step), rows)


def exact_bound(model: Table, row: Tensor) -> float:
    """Over every number and every choice of what is hidden of the row's T - 1 tokens, straight from the definition."""
    total, length = 0.0, T - 1
    for n in range(1, length + 1):
        choices = list(itertools.combinations(range(1, T), n))
        for hidden in choices:
            canvas = row.clone()
            canvas[list(hidden)] = MASK
            logits = model(canvas[None], Context())[0][0][:, :MASK].double()
            nll = sum(-logits[j].log_softmax(-1)[row[j]].item() for j in hidden)
            total += length / n * nll / len(choices) / length
    return total


def test_bound_is_the_average_over_all_that_can_be_hidden() -> None:
    """Of 4,000 draws for each of two rows, within four standard errors; the weight counts tokens, so that loss is nats per token."""
    model, batch, count = Table(), whole_batch(2), 4000
    for b in range(2):
        repeated = batch.each(lambda x, b=b: x[:1, b : b + 1].expand(1, count, T))
        key = row_keys(rng.key(torch.tensor([3 + b]), "dropout"), count)
        each = (
            torch.stack([masked_diffusion(model, repeated.each(lambda x, i=i: x[:, i : i + 50]), key[:, i : i + 50]).loss[0] for i in range(0, count, 50)]) / 50
        )
        error = each.std() / len(each) ** 0.5
        assert abs(each.mean().item() - exact_bound(model, batch.tokens[0, b])) < 4 * error
        assert masked_diffusion(model, repeated, key).weight.item() == count * (T - 1)


def test_one_draw_by_hand() -> None:
    """Loss and metrics from what the model was shown: n = ceil(rate * L) hidden, never the first; the mask token is no answer; others' weights at 0."""
    model, batch, key = Table(), whole_batch(), keys(B)
    weights = torch.rand(R, B, T, generator=generator(4)) * (torch.rand(R, B, T, generator=generator(5)) < 0.8)
    weights[1, 2] = 0
    batch = batch._replace(weights=weights)
    sums = masked_diffusion(model, batch, key)
    canvas, logits = model.seen[0][0], model(*(model.seen[0][0], Context()))[0]
    for r in range(R):
        loss, named, asked, all_named, rows = 0.0, 0, 0, 0, 0
        for b in range(B):
            scored = [j for j in range(1, T) if weights[r, b, j - 1] > 0]
            hidden = [j for j in range(T) if canvas[r, b, j] == MASK]
            assert set(hidden) <= set(scored) and len(hidden) == math.ceil(rates(key)[r, b].item() * len(scored))
            assert all(canvas[r, b, j] == batch.tokens[r, b, j] for j in range(T) if j not in hidden)
            right = 0
            for j in hidden:
                scores = logits[r, b, j, :MASK].double()
                loss -= scores.log_softmax(-1)[batch.tokens[r, b, j]].item() * weights[r, b, j - 1].item() * len(scored) / len(hidden)
                right += int(scores.argmax() == batch.tokens[r, b, j])
            named, asked, all_named, rows = named + right, asked + len(hidden), all_named + (right == len(hidden) > 0), rows + (hidden != [])
        assert sums.loss[r].item() == pytest.approx(loss, rel=1e-5) and sums.weight[r].item() == pytest.approx(weights[r, :, :-1].sum().item())
        assert [x[r].item() for pair in (sums.metrics["accuracy"], sums.metrics["exact"]) for x in pair] == [named, asked, all_named, rows]


def test_evaluation() -> None:
    """Four rates a row, in pairs whose hidden tokens are disjoint and nearly all; the same wherever the row stands; what fills a window up is not seen."""
    model, batch = Table(), whole_batch()
    weights = batch.weights.clone()
    weights[0, 1, 3:] = 0  # tokens 4 and 5 of this row are no text
    batch = batch._replace(weights=weights)
    sums = masked_diffusion(model, batch, None)
    assert len(model.seen) == 4 and sums.weight[0].item() == pytest.approx(B * (T - 1) - 2)
    hidden = [canvas == MASK for canvas, _ in model.seen]
    scored = torch.nn.functional.pad(weights[..., :-1], (1, 0)) > 0
    for low, high in zip(hidden[::2], hidden[1::2], strict=True):
        assert ((low | high) == scored).all() and ((low & high).sum(-1) <= 1).all() and (low.sum(-1) <= high.sum(-1)).all()
    counts = torch.stack([h.sum(-1) for h in hidden])[:, 1:].double()
    assert counts.mean().item() == pytest.approx((T - 1 + 1) / 2, abs=0.6)
    _, mask = model.seen[0]
    assert mask is not None and mask[0, 1].tolist() == [True] * 4 + [False] * 2 and mask[1:].all()
    order = torch.tensor([2, 0, 3, 1])
    for a, b in zip(leaves_of(masked_diffusion(model, batch.each(lambda x: x[:, order]), None)), leaves_of(sums), strict=True):
        close(a, b, 1e-5)


def test_rates() -> None:
    """Uniform, and spread evenly over neighbouring rows: every 16 of them have one in nearly every sixteenth; runs and steps differ."""
    t = rates(keys(4096))
    assert (t > 0).all() and (t <= 1).all() and kstest(t[0].numpy(), "uniform").pvalue > 0.01
    for start in (0, 37):
        assert ((t[:, start : start + 16] * 16).ceil().long().sort(-1).values.diff(dim=-1) > 0).float().mean() > 0.6
        assert (t[:, start : start + 256].mean(-1) - 0.5).abs().max() < 0.01  # independent draws: 0.018 is one standard deviation
    assert not rates(keys(4))[0].equal(rates(keys(4))[1]) and not rates(keys(4)).equal(rates(keys(4, 1)))
    first = torch.stack([rates(row_keys(rng.key(torch.arange(500), "dropout", step), 1)) for step in range(4)]).flatten()
    assert kstest(first.numpy(), "uniform").pvalue > 0.01


def test_pieces_and_runs_draw_alike() -> None:
    """With keys as without (the laws): pieces of a batch are the batch, gradients included, and a run alone is the run in its fleet."""
    fleet = Decoder(replace(SMALL, causal=False), V, T, (R,)).double()
    with torch.no_grad():
        for p in fleet.parameters():
            p.copy_(torch.randn(p.shape, generator=generator(7)) * 0.3)
    batch, key = whole_batch(8), keys(8)
    whole = masked_diffusion(fleet, batch, key)
    cuts = (slice(0, 3), slice(3, 8))
    total = add(*(masked_diffusion(fleet, batch.each(lambda x, cut=cut: x[:, cut]), key[:, cut]) for cut in cuts))
    for a, b in zip(leaves_of(total), leaves_of(whole), strict=True):
        close(a, b, 1e-5)
    for a, b in zip(*(torch.autograd.grad(s.loss.sum(), list(fleet.parameters())) for s in (total, whole)), strict=True):
        close(a, b, 1e-5)
    alone = Decoder(replace(SMALL, causal=False), V, T).double()
    alone.load_state_dict({name: p[1] for name, p in fleet.state_dict().items()})
    for a, b in zip(leaves_of(masked_diffusion(alone, batch.each(lambda x: x[1]), key[1])), leaves_of(whole), strict=True):
        close(a, b[1], 1e-5)


def test_large_vocabulary(monkeypatch: pytest.MonkeyPatch) -> None:
    """Through the fused loss, tied and with a softcap, as through logits."""
    for config in (replace(SMALL, causal=False, tied=True), replace(SMALL, causal=False, softcap=2.0, head_bias=True)):
        model = Decoder(config, V, T, (R,)).double()
        with torch.no_grad():
            for p in model.parameters():
                p.copy_(torch.randn(p.shape, generator=generator(7)) * 0.3)
        batch, key = whole_batch(), keys(B)
        found = []
        for large in (V, V + 1):
            monkeypatch.setattr("shoal.train.diffusion.LARGE_VOCABULARY", large)
            found.append(leaves_of(masked_diffusion(model, batch, key)))
        for a, b in zip(*found, strict=True):
            close(a, b, 1e-5)


def test_one_graph() -> None:
    model = Decoder(replace(SMALL, causal=False, num_layers=1), V, T, (R,))
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape, generator=generator(7)) * 0.3)
    torch.compiler.reset()
    compiled = torch.compile(masked_diffusion, fullgraph=True, backend="eager")
    for key in (keys(B), None):
        for a, b in zip(leaves_of(compiled(model, whole_batch(), key)), leaves_of(masked_diffusion(model, whole_batch(), key)), strict=True):
            close(a, b, 1e-5)


# --- fleets


def test_fleet() -> None:
    """Learns; in pieces as whole, and a run alone as with its mates."""
    runs = eight(replace(RUN, optimizer=AdamW(lr=3e-3)))
    fleet, found = finished(Fleet.build(runs))
    assert all(found[r, 30, "val/loss"] < found[r, 0, "val/loss"] for r in range(8))
    _, pieces = finished(Fleet.build([replace(run, accumulate=4) for run in runs[:2]]))
    _, alone = finished(Fleet.build(runs[3:4]))
    for got, expected in ((of_run(pieces, 1), of_run(found, 1)), (of_run(alone, 0), of_run(found, 3))):
        assert got.keys() == expected.keys()
        for key in got:
            if key[1].endswith("loss"):
                assert got[key] == pytest.approx(expected[key], rel=1e-4), key
    assert evaluate(fleet.one(2), "val")["loss"] == pytest.approx(found[2, 30, "val/loss"], rel=1e-4)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model.causal": True}, "model.causal: .* model.causal to false"),
        ({"task.mask_token": False}, "task.mask_token: .* set task.mask_token to true"),
        ({"objective": "cross_entropy"}, "objective: .* set it to masked_diffusion, or model.causal to true"),
        ({"batch_size": 2**20 + 1}, "batch_size: masked_diffusion tells 1,048,576 rows apart"),
    ],
)
def test_refused(changes: dict[str, Any], message: str) -> None:
    validate(RUN)
    with pytest.raises(ConfigError, match=message):
        validate(with_values(RUN, changes))


# --- the sampler


class Chain:
    """Knows a chain of tokens exactly: each is the one before plus 0, 1 or 2 with its probabilities; posteriors by forward and backward sums."""

    vocab_size = V
    step = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)

    def __init__(self) -> None:
        self.transition = sum(p * torch.eye(MASK, dtype=torch.float64).roll(k, 1) for k, p in enumerate(self.step))

    def __call__(self, tokens: Tensor, context: Context) -> tuple[Tensor, None]:
        known = torch.where((tokens == MASK)[..., None], 1.0, torch.nn.functional.one_hot(tokens.clamp(max=MASK - 1), MASK)).double()
        left, right = [known[:, 0]], [torch.ones_like(known[:, 0])]
        for t in range(1, tokens.shape[-1]):
            left.append(left[-1] @ self.transition)  # before its own evidence
            right.append((right[-1] * known[:, -t]) @ self.transition.T)
            left[-1] = left[-1] * known[:, t]
        probability = torch.stack(left, 1) * torch.stack(right[::-1], 1)
        logits = torch.cat((probability, torch.full_like(probability[..., :1], 1e9)), -1)
        logits[..., :-1] = logits[..., :-1].log()
        assert isinstance(context.at, slice)
        return logits[:, context.at], None

    def logits(self, hidden: Tensor) -> Tensor:
        return hidden


def test_samples_have_the_models_distribution() -> None:
    """One token at a time from a model that knows the posteriors gives the chain, whichever place is uncovered first. Of so many steps few uncover two."""
    run: Any = type("Stub", (), {"model": Chain()})()
    count, num = 1000, 3
    out = sampler.sample(run, torch.zeros(count, 1, dtype=torch.int64), num, 500, HOT, rng.fold(rng.key(torch.tensor(0), "sample"), torch.arange(count)))
    assert out.shape == (count, num) and (out < MASK).all()
    steps = torch.cat((torch.zeros(count, 1, dtype=torch.int64), out), 1).diff(dim=1) % MASK
    steps = steps[(steps < 3).all(-1)]
    assert len(steps) > 0.98 * count
    observed = torch.bincount((steps * torch.tensor([9, 3, 1])).sum(-1), minlength=27)
    expected = torch.cartesian_prod(*[Chain.step] * 3).prod(-1) * len(steps)
    assert chisquare(observed.numpy(), expected.numpy()).pvalue > 1e-3


def test_sampler_in_few_steps() -> None:
    """One step draws every place by itself; the prompt stays; the same key gives the same text; steps below 1 are refused."""
    run: Any = type("Stub", (), {"model": Chain()})()
    key = rng.fold(rng.key(torch.tensor(1), "sample"), torch.arange(4000))
    prompt = torch.tensor([[1, 2]]).expand(4000, 2)
    out = sampler.sample(run, prompt, 2, 1, HOT, key)
    marginal = (Chain().transition @ Chain().transition)[2] * 4000
    there = marginal > 0
    assert chisquare(torch.bincount(out[:, 1], minlength=MASK)[there].numpy(), marginal[there].numpy()).pvalue > 1e-3
    assert sampler.sample(run, prompt[:9], 2, 1, HOT, key[:9]).equal(out[:9])
    assert (sampler.sample(run, prompt[:9], 3, 2, Sampling(), key[:9])[:, 0] == 2).all()
    with pytest.raises(ConfigError, match="steps"):
        sampler.sample(run, prompt, 2, 0, HOT, key)


def test_generate() -> None:
    """Text from a trained run by the same call as from any other: as much as is asked for, never the mask token; too much is refused."""
    fleet, _ = finished(Fleet.build([replace(RUN, steps=5)]))
    run: Run = fleet.one(0)
    assert isinstance(generate(run, "a", temperature=1.0), str)
    assert len(generate(run, "a", max_tokens=3, temperature=1.0, seed=1)) <= 3
    with pytest.raises(ConfigError, match="tokens: must lie between 1 and 7, as the model has 8 positions, not 8"):
        generate(run, "a", max_tokens=8)
