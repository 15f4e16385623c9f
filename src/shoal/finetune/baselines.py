"""What stands beside every fine-tuned encoder: always the commonest class, a bag of words, and a linear probe on what the encoder makes of sentences untrained.

Each is fitted on the training sentences, its one dial is set by validation, and the test is looked at once. With scikit-learn (extra hf), on the CPU.

for baseline in baselines(read(config), features): print(baseline.name, baseline.accuracy("test"))
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from shoal.config.fields import ConfigError
from shoal.data.sentences import Sentences

STRENGTHS = (1e-4, 0.001, 0.01, 0.1, 1.0, 10.0)  # C of scikit-learn's logistic regression, the inverse of its penalty
WORDS = r"\w+|[^\w\s]"  # words, and marks by themselves
MAJORITY, BAG, PROBE = "always the commonest class", "bag of words", "linear probe"
Features = Mapping[str, NDArray[np.float32]]  # split -> [n, D], in the order of the sentences


@dataclass(frozen=True)
class Baseline:
    name: str
    about: str  # what it is, and what validation chose
    right: dict[str, NDArray[np.bool_]]  # val and test -> [n]

    def accuracy(self, split: str) -> float:
        return float(self.right[split].mean())


def baselines(data: Sentences, features: Features) -> list[Baseline]:
    return [majority(data), bag_of_words(data), linear_probe(data, features)]


def majority(data: Sentences) -> Baseline:
    common, count = Counter(data.labels["train"]).most_common(1)[0]
    share = count / len(data.labels["train"])
    return Baseline(MAJORITY, f"class {data.classes[common]}, {share:.1%} of the training sentences", _right(data, lambda split: common))


def bag_of_words(data: Sentences) -> Baseline:
    """Logistic regression on words and pairs of neighbours, weighed by tf-idf (1 + log of the count, times log of the rarity)."""
    text = _sklearn("feature_extraction.text")
    count = text.TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True, token_pattern=WORDS)
    tables = {split: count.fit_transform(texts) if split == "train" else count.transform(texts) for split, texts in data.texts.items()}
    return _regression(data, tables, BAG, f"logistic regression on {tables['train'].shape[1]:,} words and pairs of words, tf-idf")


def linear_probe(data: Sentences, features: Features) -> Baseline:
    """Logistic regression on the encoder's own output, each number of it at mean 0 and deviation 1 over the training sentences."""
    mean, deviation = features["train"].mean(0), features["train"].std(0) + 1e-6
    tables = {split: (table - mean) / deviation for split, table in features.items()}
    return _regression(data, tables, PROBE, f"logistic regression on the pretrained encoder's {mean.size} numbers a sentence")


def _regression(data: Sentences, tables: Mapping[str, Any], name: str, about: str) -> Baseline:
    """Of several strengths of the penalty the one with the best validation accuracy, the stronger of equals."""
    linear = _sklearn("linear_model")
    fitted = [linear.LogisticRegression(C=strength, max_iter=10_000).fit(tables["train"], data.labels["train"]) for strength in STRENGTHS]
    scores = [model.score(tables["val"], data.labels["val"]) for model in fitted]
    best = int(np.argmax(scores))
    return Baseline(name, f"{about}; C = {STRENGTHS[best]:g} by validation", _right(data, lambda split: fitted[best].predict(tables[split])))


def _right(data: Sentences, predicted: Any) -> dict[str, NDArray[np.bool_]]:
    return {split: np.asarray(predicted(split) == np.asarray(data.labels[split])) for split in ("val", "test")}


def _sklearn(module: str) -> Any:
    import importlib

    try:
        return importlib.import_module(f"sklearn.{module}")
    except ImportError:
        raise ConfigError("", "the baselines of fine-tuning need scikit-learn: pip install 'shoal[hf]'") from None
