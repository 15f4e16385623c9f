"""The bigram table: its rows, their gradient, where its loss begins, and what it learns, which is known: the shares of what follows what."""

from __future__ import annotations

import math

import pytest
import torch
from laws import close, filled, generator, same
from torch.nn import functional as F

from shoal.config import BigramConfig
from shoal.contracts import Context
from shoal.models.bigram import Bigram
from shoal.nn import initialise

R, B, T, V = 2, 5, 30, 7


def test_gradient_is_predicted_shares_less_counts() -> None:
    """Softmax regression on one token: row a of the gradient is (times a was read) softmax(row a) - counts of what followed a."""
    model, g = filled(Bigram(BigramConfig(), V, T, (R,))), generator(1)
    tokens, targets = torch.randint(V, (2, R, B, T), generator=g)
    hidden, _ = model(tokens, Context())
    assert same(model.logits(hidden), hidden) and model.flops(B, T, T) == 0 and model.hidden_matrices() == []
    F.cross_entropy(hidden.flatten(0, 2), targets.flatten(), reduction="sum").backward()
    for r in range(R):
        counts = torch.zeros(V, V, dtype=torch.float64).index_put_((tokens[r].flatten(), targets[r].flatten()), torch.ones((), dtype=torch.float64), True)
        table = model.table.weight[r].detach()
        close(model.table.weight.grad[r], counts.sum(1, keepdim=True) * table.softmax(-1) - counts, 1e-12)


@pytest.mark.parametrize(("std", "above"), [(1.0, 0.5), (0.02, 0.0)])
def test_where_the_loss_begins(std: float, above: float) -> None:
    """E log sum exp of V normals is ln V + std^2 / 2 (V large), and the target's own logit is 0 in the mean."""
    size, model = 1500, Bigram(BigramConfig(embedding_std=std), 1500, 64, (1,))
    initialise(model, model.init_rules([BigramConfig(embedding_std=std)]), torch.tensor([3]))
    tokens, targets = torch.randint(size, (2, 1, 50, 64), generator=generator(2))
    with torch.no_grad():
        hidden, _ = model(tokens, Context())
        loss = F.cross_entropy(model.logits(hidden).flatten(0, 2), targets.flatten())
    assert abs(loss.item() - (math.log(size) + above)) < 0.06  # 3,200 targets: a standard error of 0.018 at std 1
