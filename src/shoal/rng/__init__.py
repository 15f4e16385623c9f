"""Random numbers as a pure function of (seed, purpose, step): the same integers on every device and in every fleet.

rng.uniform(rng.key(torch.tensor([0, 1]), "example", 7), 4)   # [2, 4], the same on any machine
"""

from shoal.rng.draws import bits, fold, key, permutation, quarters, randint, shuffled, uniform

__all__ = ["bits", "fold", "key", "permutation", "quarters", "randint", "shuffled", "uniform"]
