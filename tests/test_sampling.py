"""How a token is chosen: beside a plain loop in float64 and beside transformers, frequencies beside probabilities; what is refused."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from laws import generator
from scipy.stats import chisquare

from shoal import rng
from shoal.config.fields import ConfigError
from shoal.inference.sampling import Sampling, likeliest, penalised

DRAWS = 40_000


def probabilities(logits: np.ndarray, temperature: float, top_k: int, top_p: float) -> np.ndarray:
    """What is drawn from, by the definition: sort, cut, cut again, divide."""
    p = np.exp(logits / temperature - (logits / temperature).max())
    order = sorted(range(len(p)), key=lambda i: -p[i])[: top_k or len(p)]
    total, kept, so_far = sum(p[i] for i in order), [], 0.0
    for i in order:
        kept.append(i)
        so_far += p[i] / total
        if so_far >= top_p:
            break
    found = np.zeros_like(p)
    found[kept] = p[kept]
    return found / found.sum()


@pytest.mark.parametrize("temperature", [0.4, 1.0, 2.5])
@pytest.mark.parametrize(("top_k", "top_p"), [(0, 1.0), (4, 1.0), (0, 0.7), (6, 0.8), (1, 0.5)])
def test_frequencies(temperature: float, top_k: int, top_p: float) -> None:
    """Draws by chi-square; never a token that was cut."""
    logits = torch.randn(9, generator=generator(int(temperature * 10) + top_k)) * 1.5
    how = Sampling(temperature=temperature, top_k=top_k, top_p=top_p)
    counts = torch.bincount(how.pick(logits.expand(DRAWS, -1), rng.key(torch.arange(DRAWS), "sample")), minlength=9).numpy()
    expected = probabilities(logits.double().numpy(), temperature, top_k, top_p)
    there = expected > 0
    assert (counts[~there] == 0).all()
    assert there.sum() == 1 or chisquare(counts[there], expected[there] * DRAWS).pvalue > 1e-3


def test_the_cuts_are_those_of_a_loop() -> None:
    """Many random logits at once; a nucleus is the fewest that reach p, and there is always one."""
    logits = torch.randn(300, 17, generator=generator(1), dtype=torch.float64) * 3
    for top_k, top_p in ((0, 0.3), (5, 1.0), (5, 0.9), (99, 0.999), (0, 1e-9), (17, 0.5)):
        kept = likeliest(logits, top_k, top_p)
        assert kept.numpy().tolist() == [(probabilities(row.numpy(), 1.0, top_k, top_p) > 0).tolist() for row in logits]
    assert likeliest(torch.zeros(8), 3, 1.0).tolist() == [True] * 3 + [False] * 5  # of equals the first
    assert likeliest(torch.tensor([0.0, -torch.inf, 5.0]), 2, 0.5).tolist() == [False, False, True]


def test_beside_transformers() -> None:
    processors: Any = pytest.importorskip("transformers.generation.logits_process")
    logits, tokens = torch.randn(50, 30, generator=generator(2)) * 4, torch.randint(30, (50, 12), generator=generator(3))
    for penalty in (0.7, 1.3):
        said = Sampling(penalty=penalty).said(tokens, None, 30)
        assert said is not None
        assert penalised(logits, said, penalty).equal(processors.RepetitionPenaltyLogitsProcessor(penalty)(tokens, logits))
    for top_k, top_p in ((7, 1.0), (0, 0.8)):
        theirs = processors.TopKLogitsWarper(top_k) if top_k else processors.TopPLogitsWarper(top_p)
        assert likeliest(logits, top_k, top_p).equal(theirs(tokens, logits).isfinite())


def test_a_penalty_sees_what_is_real() -> None:
    """Padding was not said; without a penalty nothing is written down; with it the most probable token gives way, whatever its logit's sign."""
    tokens, mask = torch.tensor([[0, 0, 3], [1, 2, 2]]), torch.tensor([[False, False, True], [True, True, True]])
    said = Sampling(penalty=2.0).said(tokens, mask, 4)
    assert said is not None and said.tolist() == [[False, False, False, True], [False, True, True, False]]
    assert Sampling().said(tokens, mask, 4) is None
    logits = torch.tensor([[0.0, 0.0, 1.0, 1.5], [-9.0, -9.0, -1.0, -1.5]])
    keys = torch.zeros(2, dtype=torch.int64)
    assert Sampling(penalty=2.0).pick(logits, keys, said).tolist() == [2, 3] and Sampling().pick(logits, keys).tolist() == [3, 2]


def test_extreme_temperatures() -> None:
    """The coldest is the most probable token, the hottest is uniform over what was not cut."""
    logits, keys = torch.tensor([3.0, 50.0, 49.99, -torch.inf]).expand(4000, -1), rng.key(torch.arange(4000), "sample")
    for temperature in (1e-5, 1e-40, 5e-324):
        assert (Sampling(temperature=temperature).pick(logits, keys) == 1).all()
    counts = torch.bincount(Sampling(temperature=1e300, top_k=3).pick(logits, keys), minlength=4)
    assert counts[3] == 0 and chisquare(counts[:3].numpy()).pvalue > 1e-3


NUMBER = float("nan")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"temperature": -1.0}, "temperature: must be 0 (most probable token) or more, not -1.0"),
        ({"temperature": NUMBER}, "temperature: must be 0"),
        ({"temperature": float("inf")}, "temperature: must be 0"),
        ({"top_k": -1}, "top_k: must be 0 (all tokens) or more, not -1"),
        ({"top_p": 0.0}, "top_p: must lie above 0 and not above 1 (all tokens), not 0.0"),
        ({"top_p": 1.1}, "top_p: must lie above 0"),
        ({"top_p": NUMBER}, "top_p: must lie above 0"),
        ({"penalty": 0.0}, "penalty: must be above 0 (1 = none; above 1 discourages what was said), not 0.0"),
        ({"penalty": NUMBER}, "penalty: must be above 0"),
    ],
)
def test_refusals(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        Sampling(**values)
    assert str(caught.value).startswith(message)
