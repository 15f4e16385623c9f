"""Text from a masked diffusion model: everything behind the prompt starts hidden and is uncovered in steps, each token once (ancestral sampling with a linear
schedule: Sahoo et al. 2024, arXiv 2406.07524, section 3; what is uncovered stays).

With steps much fewer than tokens several are drawn at a time, independently, which is faster and worse; with as many as tokens it is about one at a time.

    sample(run, prompt, num_tokens=64, steps=64, how=Sampling(temperature=1.0), key=rng.key(torch.arange(8), "sample"))
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from shoal import rng
from shoal.config.fields import check
from shoal.contracts import Context
from shoal.inference.sampling import Sampling
from shoal.train.run import Run

EVERYTHING = Context()


@torch.inference_mode()
def sample(run: Run, prompt_tokens: Tensor, num_tokens: int, steps: int, how: Sampling, key: Tensor, context: Context = EVERYTHING) -> Tensor:
    """int64 [B, P], P at least 1 -> [B, num_tokens], never the mask token. key int64 [B]; temperature 0: the most probable tokens, places still drawn.

    ``context``: mask and positions of the prompt, [B, P]. A repetition penalty is on what is not hidden.
    """
    check(steps >= 1, "steps", f"must be 1 or more, not {steps}")
    model = run.model
    given, mask = prompt_tokens.shape[-1], model.vocab_size - 1
    canvas = torch.cat((prompt_tokens, prompt_tokens.new_full((len(prompt_tokens), num_tokens), mask)), dim=-1)
    place = torch.arange(num_tokens, device=key.device)
    real = None if context.mask is None else F.pad(context.mask, (0, num_tokens), value=True)
    positions = None if context.positions is None else torch.cat((context.positions, context.positions[:, -1:] + 1 + place), dim=-1)
    for step in range(steps):
        hidden, _ = model(canvas, Context(mask=real, positions=positions, at=slice(given, None)))
        logits = model.logits(hidden)[..., :-1].float()  # [B, num_tokens, V - 1]
        said = how.said(canvas, real, model.vocab_size)
        now = rng.fold(key, step)
        drawn = how.pick(logits, rng.fold(rng.fold(now, 0)[:, None], place), None if said is None else said[:, None, :-1])
        uncovered = rng.uniform(rng.fold(now, 1), num_tokens) < 1 / (steps - step)  # of those still hidden; in the last step all
        written = canvas[:, given:]
        canvas = torch.cat((prompt_tokens, torch.where((written == mask) & uncovered, drawn, written)), dim=-1)
    return canvas[:, given:]
