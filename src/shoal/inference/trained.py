"""A run with what can be done with it, for notebooks: ``shoal.load`` gives these. Each method is the function of the same name, the run put in.

run = shoal.load("runs/sanity"); run.generate("I love"); run.score("I love machines"); run.classify("reviews.csv")
"""

from __future__ import annotations

from dataclasses import dataclass

from shoal.inference.classify import classify
from shoal.inference.evaluate import evaluate
from shoal.inference.generate import generate
from shoal.inference.score import score
from shoal.train.run import Run


@dataclass(frozen=True)
class Trained(Run):
    generate = generate
    score = score
    classify = classify
    evaluate = evaluate

    def at(self, step: int) -> Trained:
        return Trained(**vars(super().at(step)))
