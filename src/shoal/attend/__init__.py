"""Attention by hand: queries for given keys and values, and what no query can do.

from shoal.attend import ByHand

hand = ByHand(keys=[[1, 0], [0, 1], [0.5, 0.5]], values=[[1, 0], [0, 1], [3, 3]])
print(hand.select(3).explanation)       # k3 = 0.5 k1 + 0.5 k2, so for every query w3 = w1^0.5 w2^0.5 ...
"""

from shoal.attend.goals import Answer, ByHand

__all__ = ["ByHand", "Answer"]
