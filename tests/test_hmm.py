"""The hidden Markov model beside hmmlearn: likelihoods, and Baum-Welch step by step; and what its recursion keeps in float32."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hmmlearn.hmm import CategoricalHMM
from laws import close, generator, same
from laws_training import MEMORIZE, assert_alike, eight, everything, finished, of_run
from torch import Tensor

from shoal.config import AdamW, BaumWelch, HMMConfig, RunConfig
from shoal.config.fields import ConfigError
from shoal.contracts import Batch, Context
from shoal.models.hmm import HMM
from shoal.nn.forward_algorithm import forward_algorithm
from shoal.train import optimizers
from shoal.train.checkpoint import load, save
from shoal.train.fleet import Fleet
from shoal.train.objectives import OBJECTIVES
from shoal.train.plan import validate

R, B, T, N, V = 2, 7, 12, 4, 6


def random_model(lead: tuple[int, ...] = (R,), states: int = N, tokens: int = V, scale: float = 1.5) -> HMM:
    model = HMM(HMMConfig(num_states=states), tokens, 64, lead).double()
    with torch.no_grad():
        for seed, p in enumerate(model.parameters()):
            p.copy_(torch.randn(p.shape, generator=generator(seed), dtype=torch.float64) * scale)
    return model


def sequences(seed: int = 5) -> tuple[Tensor, Tensor, Batch]:
    """int64 [R, B, T + 1], how many of each row are real (at least 2), and the batch they make, filled up on the right."""
    tokens = torch.randint(V, (R, B, T + 1), generator=generator(seed))
    tokens[..., 1::2] = (tokens[..., ::2][..., : tokens[..., 1::2].shape[-1]] + 1) % V  # something to learn
    length = torch.randint(2, T + 2, (R, B), generator=generator(seed + 1))
    place = torch.arange(T)
    mask, weights = place < length[..., None], (place + 1 < length[..., None]).float()
    return tokens, length, Batch(tokens[..., :-1], tokens[..., 1:], weights, mask)


def rows_of(tokens: Tensor, length: Tensor) -> tuple[np.ndarray, list[int]]:
    """One run's sequences as hmmlearn wants them."""
    return np.concatenate([row[:n].numpy() for row, n in zip(tokens, length, strict=True)])[:, None], length.tolist()


def theirs(model: HMM, r: int) -> CategoricalHMM:
    other = CategoricalHMM(n_components=N, n_features=V, n_iter=1, tol=0, init_params="", params="ste")
    other.startprob_, other.transmat_, other.emissionprob_ = (p[r].detach().softmax(-1).numpy() for p in (model.initial, model.transition, model.emission))
    return other


@pytest.mark.parametrize("name", ["cross_entropy", "likelihood"])
def test_likelihood_of_hmmlearn(name: str) -> None:
    """The sum over rows is theirs without the first token's term, which is given here."""
    model, (tokens, length, batch) = random_model(), sequences()
    sums = OBJECTIVES[name](model, batch, None)
    for r in range(R):
        other = theirs(model, r)
        first = np.log(other.startprob_ @ other.emissionprob_)[tokens[r, :, 0].numpy()].sum()
        assert -sums.loss[r].item() == pytest.approx(other.score(*rows_of(tokens[r], length[r])) - first, rel=1e-6)


def test_logits_are_log_probabilities() -> None:
    """Each is theirs of the longer sequence less that of the shorter, to 1e-10; they sum to 1, so a softmax changes nothing."""
    model, (tokens, _, _) = random_model(), sequences()
    hidden, _ = model(tokens, Context())
    logits = model.logits(hidden)
    close(hidden.sum(-1), torch.ones(R, B, T + 1, dtype=torch.float64))
    close(logits.log_softmax(-1), logits)
    other, sequence = theirs(model, 1), tokens[1, 3].numpy()[:, None]
    scores = [other.score(sequence[:n]) for n in range(1, T + 2)]
    close(logits[1, 3, :T].gather(-1, tokens[1, 3, 1:, None]).squeeze(-1),
          torch.tensor(np.diff(scores)), 1e-10)  # fmt: skip


def em_step(model: HMM, optimizer: Any, state: Any, batch: Batch, step: int, lr: float = 1.0, smoothing: float = 0.0) -> None:
    """What a fleet does: the mean gradient, then the update."""
    sums, params = OBJECTIVES["likelihood"](model, batch, None), dict(model.named_parameters())
    grads = torch.autograd.grad(sums.loss.sum(), list(params.values()))
    mean = {name: g / sums.weight.view(-1, *[1] * (g.dim() - 1)) for name, g in zip(params, grads, strict=True)}
    hyper = {"lr": torch.full((R,), lr, dtype=torch.float64), "smoothing": torch.full((R,), smoothing, dtype=torch.float64)}
    with torch.no_grad():
        optimizer.update(params, mean, state, hyper, torch.tensor(step), torch.ones(R, dtype=torch.bool))


def test_em_of_hmmlearn() -> None:
    """Ten steps over all rows, of different lengths, from the same start."""
    model, (tokens, length, batch) = random_model(), sequences()
    others = [theirs(model, r) for r in range(R)]
    optimizer = optimizers.build(BaumWelch())
    state = optimizer.init(dict(model.named_parameters()))
    for step in range(10):
        em_step(model, optimizer, state, batch, step)
        for r, other in enumerate(others):
            other.fit(*rows_of(tokens[r], length[r]))
            for got, expected in ((model.initial, other.startprob_), (model.transition, other.transmat_), (model.emission, other.emissionprob_)):
                close(got[r].detach().exp(), torch.from_numpy(expected), 1e-8)


def test_counts_are_gradients() -> None:
    """Of the transitions as of the emissions: as many as there are tokens, the last of which goes nowhere; a padded row that is not scored has none."""
    model, (_, length, batch) = random_model(), sequences()
    assert batch.mask is not None
    gone = torch.arange(B) == 3
    batch = batch._replace(weights=batch.weights * ~gone[:, None])
    grads = torch.autograd.grad(OBJECTIVES["likelihood"](model, batch, None).loss.sum(), [model.initial, model.transition, model.emission])
    length = torch.where(gone, 0, length)
    for grad, expected in zip(grads, ((length > 0).sum(-1), (length - 1).clamp(min=0).sum(-1), length.sum(-1)), strict=True):
        close(-grad.flatten(1).sum(-1), expected.double(), 1e-6)


def expected_counts(model: HMM, r: int, sequences_of_run: Sequence[np.ndarray]) -> list[np.ndarray]:
    """Initial, transition and emission counts by the forward-backward algorithm as the textbook has it."""
    pi, a, b = (p[r].detach().softmax(-1).numpy() for p in (model.initial, model.transition, model.emission))
    counts = [np.zeros_like(pi), np.zeros_like(a), np.zeros_like(b)]
    for x in sequences_of_run:
        alpha, beta = [pi * b[:, x[0]]], [np.ones(N)]
        for token in x[1:]:
            alpha.append(alpha[-1] @ a * b[:, token])
        for token in x[:0:-1]:
            beta.insert(0, a @ (b[:, token] * beta[0]))
        total = alpha[-1].sum()
        counts[0] += alpha[0] * beta[0] / total
        for t, token in enumerate(x):
            counts[2][:, token] += alpha[t] * beta[t] / total
            if t:
                counts[1] += alpha[t - 1][:, None] * a * b[:, token] * beta[t] / total
    return counts


def test_stepwise_em() -> None:
    """Statistics that forget, per scored token, from the first batch's sums at the start's probabilities; emissions smoothed."""
    model, optimizer = random_model(), optimizers.build(BaumWelch())
    state, lr, smoothing, past = optimizer.init(dict(model.named_parameters())), 0.3, 0.1, None
    for step in range(4):
        tokens, length, batch = sequences(20 + step)
        counts = expected_counts(model, 1, [row[:n].numpy() for row, n in zip(tokens[1], length[1], strict=True)])
        counts = [c / batch.weights[1].sum().item() for c in counts]
        counts[2] += smoothing * counts[2].mean()
        start = [p[1].detach().softmax(-1).numpy() * c.sum(-1, keepdims=True) for p, c in zip(model.parameters(), counts, strict=True)]
        past = [(1 - lr) * s + lr * c for s, c in zip(past or start, counts, strict=True)]
        em_step(model, optimizer, state, batch, step, lr, smoothing)
        for p, s in zip(model.parameters(), past, strict=True):
            close(p[1].detach().exp(), torch.from_numpy(s / s.sum(-1, keepdims=True)), 1e-6)  # the loss is summed in float32


def test_rows_without_counts_stay() -> None:
    """A state that is never reached keeps its distributions; what has no counts in a row that has some gets a finite logarithm."""
    model, (_, _, batch) = random_model(), sequences()
    with torch.no_grad():
        model.initial[:, 0] = model.transition[..., 0] = -1e4  # state 0
        before = model.emission[:, 0].clone()
        batch = batch._replace(tokens=batch.tokens.clamp(max=V - 2), targets=batch.targets.clamp(max=V - 2))
    optimizer = optimizers.build(BaumWelch())
    em_step(model, optimizer, optimizer.init(dict(model.named_parameters())), batch, 0)
    assert model.emission[:, 0].equal(before) and all(p.isfinite().all() for p in model.parameters())
    assert (model.emission[:, 1:, -1].exp() < 1e-30).all() and OBJECTIVES["likelihood"](model, batch, None).loss.isfinite().all()


def test_long_in_float32() -> None:
    """1,024 tokens, 256 states: log probabilities and gradients beside float64."""
    tokens = torch.randint(50, (1, 2, 1024), generator=generator(3))
    found = []
    for dtype in (torch.float64, torch.float32):
        model = random_model((1,), 256, 50, scale=3.0).to(dtype)
        hidden, _ = model(tokens[..., :-1], Context())
        nll = -model.logits(hidden).gather(-1, tokens[..., 1:, None]).squeeze(-1)
        found.append([nll.detach(), *torch.autograd.grad(nll.mean(), list(model.parameters()))])
    for expected, got in zip(*found, strict=True):
        assert (got.double() - expected).abs().max() < 1e-5 * expected.abs().max()
    assert (found[1][0].double() - found[0][0]).abs().max() < 1e-5


def test_what_hardly_ever_happens() -> None:
    """Tokens that no state likes, and a token that only a state gives which is nearly excluded: finite, and right where float32 can hold it."""
    model = HMM(HMMConfig(num_states=3), 4, 8).float()
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
        model.emission[:, 3] = -150.0  # of every state
        model.emission[:2, 2] = -60.0
        model.transition[:, 2] = -40.0
    tokens = torch.tensor([[0, 3, 2, 2, 3, 1]])
    results = []
    for m in (model, HMM(HMMConfig(num_states=3), 4, 8).double()):
        m.load_state_dict(model.state_dict())
        hidden, _ = m(tokens)
        nll = -m.logits(hidden)[:, :-1].gather(-1, tokens[:, 1:, None]).sum()
        results.append([nll, *torch.autograd.grad(nll, list(m.parameters()))])
    for got, expected in zip(*results, strict=True):
        close(got.double(), expected, 1e-4)


def test_hidden_loop() -> None:
    """As a loop differentiated by PyTorch, masks included; and in one graph, hidden from the compiler."""
    g = generator(9)
    prior, transition = (torch.rand(*shape, generator=g, dtype=torch.float64).softmax(-1).requires_grad_() for shape in ((R, B, N), (R, N, N)))
    evidence = (3 * torch.randn(R, B, T, N, generator=g, dtype=torch.float64)).requires_grad_()
    mask, weight = torch.rand(R, B, T, generator=g) < 0.7, torch.randn(R, B, T, N, generator=g, dtype=torch.float64)

    def plain(mask: Tensor | None) -> Tensor:
        now, found = prior, []
        for t in range(T):
            belief = now * evidence[..., t, :].exp()
            new = belief / belief.sum(-1, keepdim=True) @ transition
            now = new if mask is None else torch.where(mask[..., t, None], new, now)
            found.append(now)
        return torch.stack(found, -2)

    torch.compiler.reset()
    compiled = torch.compile(forward_algorithm, fullgraph=True, backend="aot_eager")
    for m in (None, mask):
        expected = plain(m)
        slopes = torch.autograd.grad((expected * weight).sum(), (prior, transition, evidence))
        for function in (forward_algorithm, compiled):
            got = function(prior, transition, evidence, m)
            close(got, expected, 1e-12)
            for a, b in zip(torch.autograd.grad((got * weight).sum(), (prior, transition, evidence)), slopes, strict=True):
                close(a, b, 1e-10)


HMM_RUN = replace(MEMORIZE, model=HMMConfig(num_states=8), batch_size=0, clip=0.0, steps=40, evaluate_every=10)


@pytest.mark.parametrize("optimizer", [AdamW(lr=0.1, wd=0.0), BaumWelch()])
def test_fleet_learns(optimizer: Any) -> None:
    """By gradients and by EM, all runs; EM on the whole table never goes back."""
    objective = "likelihood" if isinstance(optimizer, BaumWelch) else "cross_entropy"
    runs = eight(replace(HMM_RUN, optimizer=optimizer, objective=objective))
    fleet, found = finished(Fleet.build(runs))
    for run in range(8):
        losses = [found[run, step, "batch/loss"] for step in range(40)]
        assert losses[-1] < 0.6 * losses[0]
        if objective == "likelihood":
            assert all(b <= a + 0.02 for a, b in itertools.pairwise(losses))  # of the first token too, which is not in the loss
    assert fleet.outcomes()[0] == {"status": "completed", "steps": 40}
    assert_alike(of_run(finished(Fleet.build(runs[5:6]))[1], 0), of_run(found, 5), 1e-3)


def test_resumed_em(tmp_path: Path) -> None:
    """Its statistics are saved: every bit as if nothing had been between."""
    runs = eight(replace(HMM_RUN, optimizer=BaumWelch(lr=0.4, smoothing=0.01), objective="likelihood", batch_size=4, steps=12))[:3]
    whole, before = finished(Fleet.build(runs))[0], Fleet.build(runs)
    before.advance(7)
    save(before, tmp_path / "checkpoint", {})
    after, _ = finished(load(runs, tmp_path / "checkpoint", "cpu")[0])
    assert all(same(x, everything(after)[name]) for name, x in everything(whole).items())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"optimizer": BaumWelch()}, "objective: baumwelch learns from expected counts, .* set it to likelihood"),
        ({"objective": "likelihood"}, "optimizer: .* set optimizer.type to baumwelch"),
        ({"objective": "likelihood", "optimizer": BaumWelch(), "model": MEMORIZE.model}, "model: .* set model.type to hmm"),
    ],
)
def test_refused(changes: dict[str, Any], message: str) -> None:
    validate(replace(HMM_RUN, objective="likelihood", optimizer=BaumWelch()))
    run: RunConfig = replace(HMM_RUN, **changes)
    with pytest.raises(ConfigError, match=message):
        validate(run)


def test_one_graph() -> None:
    """Objective and update compile whole; the same numbers."""
    model, optimizer, (_, _, batch) = random_model(), optimizers.build(BaumWelch()), sequences()
    torch.compiler.reset()
    compiled = torch.compile(OBJECTIVES["likelihood"], fullgraph=True, backend="eager")
    close(compiled(model, batch, None).loss, OBJECTIVES["likelihood"](model, batch, None).loss)
    alive, rate = torch.ones(R, dtype=torch.bool), torch.full((R,), 0.5, dtype=torch.float64)
    params = {name: p.detach() for name, p in model.named_parameters()}
    found = []
    for update in (optimizer.update, torch.compile(optimizer.update, fullgraph=True, backend="eager")):
        mine = {name: p.clone() for name, p in params.items()}
        update(mine, {name: -p.abs() for name, p in params.items()}, optimizer.init(mine), {"lr": rate, "smoothing": rate}, torch.tensor(0), alive)
        found.append(mine)
    for name in params:
        close(found[0][name], found[1][name])
