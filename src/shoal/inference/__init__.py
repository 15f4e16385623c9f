"""Use what was trained: generate and score text, tell positive from negative, evaluate a split."""

from shoal.inference.classify import classify
from shoal.inference.evaluate import evaluate, next_token_probabilities
from shoal.inference.generate import generate
from shoal.inference.score import score

__all__ = ["classify", "evaluate", "generate", "next_token_probabilities", "score"]
