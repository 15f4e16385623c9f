"""Where text comes from and how it becomes token ids: corpora, tokenizers, encoded corpora. What is scored, and how it is split, is a task's affair.

CharacterTokenizer("hello").encode("hell")
"""

from shoal.data.tokenizers import CharacterTokenizer, WordTokenizer

__all__ = ["CharacterTokenizer", "WordTokenizer"]
