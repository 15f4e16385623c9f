"""Use what was trained: generate text, evaluate a split."""

from shoal.inference.evaluate import evaluate, next_token_probabilities
from shoal.inference.generate import generate

__all__ = ["evaluate", "generate", "next_token_probabilities"]
