"""A run with what can be done with it, for notebooks: ``shoal.load`` gives these. Each method is the function of the same name, the run put in.

run = shoal.load("runs/sanity"); run.generate("I love"); run.score("I love machine"); run.classify("reviews.csv")
run.attention("I love").weights; run.lens("I love").loss; run.head_scores().table()
"""

from __future__ import annotations

from dataclasses import dataclass

from shoal.inference.classify import classify
from shoal.inference.evaluate import evaluate
from shoal.inference.generate import generate
from shoal.inference.heads import head_scores
from shoal.inference.inside import attention, lens
from shoal.inference.score import score
from shoal.train.run import Run


@dataclass(frozen=True)
class Trained(Run):
    generate = generate
    score = score
    classify = classify
    evaluate = evaluate
    attention = attention
    lens = lens
    head_scores = head_scores

    def best(self) -> Trained:
        return Trained(**vars(super().best()))

    def at(self, step: int) -> Trained:
        return Trained(**vars(super().at(step)))
