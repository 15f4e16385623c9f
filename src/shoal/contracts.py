"""The few shapes everything else agrees on. Nothing here computes.

Axes, the same letters everywhere: R runs, B batch, T time, S scored positions, D width, H heads, K head
width, F feed-forward width, V vocabulary, N state size. ``*L`` is the leading run axis: ``(R,)`` in a fleet,
``(1,)`` for a fleet of one, ``()`` for a single run taken out of its fleet. Only ``shoal.nn`` looks at L; everything
above it is written over ``...`` leading axes.

Laws every implementation must keep are in ``tests/laws.py``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

from torch import Tensor, device


class Batch(NamedTuple):
    """What one step (or one piece of an evaluation) looks at."""

    tokens: Tensor  # int64 [*L, B, T]
    targets: Tensor  # int64 [*L, B, S]
    weights: Tensor  # float32 [*L, B, S]; 0 = not scored
    mask: Tensor | None = None  # bool [*L, B, T]; True = real token, None = all real
    at: Tensor | slice | None = None  # int64 [*L, B, S] scored positions; None = all; a slice when every row scores the same ones, which then costs no gather

    def each(self, function: Callable[[Tensor], Tensor]) -> Batch:
        """The same function of every tensor in it."""
        return Batch(*(function(x) if isinstance(x, Tensor) else x for x in self))  # pyright: ignore[reportArgumentType]


class Context(NamedTuple):
    """What a model may know beside its tokens."""

    mask: Tensor | None = None  # as Batch.mask
    positions: Tensor | None = None  # int64 [*L, B, T] place of each token; None = 0 .. T-1 (after the cache's, when there is one)
    at: Tensor | slice | None = None  # as Batch.at: the last block and the head run there only
    key: Tensor | None = None  # int64 [*L, B] dropout keys, one per row (so pieces of a batch draw what the whole would); None = evaluation
    turns: Tensor | None = None  # float32 [T, K] or [*L, B, T, K] of ``shoal.nn.rotary``, once for all layers; None = a mixer that wants them makes its own


class Sums(NamedTuple):
    """Sums, never means: so accumulation over pieces of a batch is exact, padding included."""

    loss: Tensor  # float32 [*L] summed weighted loss, nats
    weight: Tensor  # float32 [*L] summed weights
    metrics: dict[str, tuple[Tensor, Tensor]]  # name -> (sum, count), each float32 [*L]


@dataclass(frozen=True)
class Tables:
    """A task's data on the device. Per-run tensors have a leading R; shared ones do not."""

    per_run: dict[str, Tensor] = field(default_factory=dict)
    shared: dict[str, Tensor] = field(default_factory=dict)

    def keep(self, index: Tensor) -> Tables:
        """The tables of the runs ``index`` (int64 [R']), in that order."""
        return Tables({name: table.index_select(0, index) for name, table in self.per_run.items()}, self.shared)


class Tokenizer(Protocol):
    vocab_size: int

    def encode(self, text: str) -> list[int]: ...  # ValueError naming what it does not know
    def decode(self, tokens: Sequence[int]) -> str: ...


class Task(Protocol):
    """Makes the data, and says which positions are scored."""

    vocab_size: int
    max_length: int  # the longest T any batch or generation needs
    splits: tuple[str, ...]  # e.g. ("train", "val", "test"); what evaluation() accepts
    fingerprint: str  # hash of the data's definition, without the per-run fields
    tokenizer: Tokenizer
    start: tuple[int, ...]  # tokens put before a prompt in generation (begin-of-text), () if none
    end: int | None  # token that ends a generation, None if none

    def setup(self, per_run: Mapping[str, Sequence[Any]], device: device | str) -> Tables:
        """``per_run``: for every PerRun field of the task's config, and ``split_seed``, one value per run.

        Must be the same for run r alone and in a fleet (padding aside).
        """
        ...

    def batch(self, tables: Tables, key: Tensor, step: Tensor, size: int) -> Batch:
        """Pure. ``key`` int64 [R] names the run's order of data (not the step); ``step`` int64 scalar. ``size`` rows; 0 = the whole training table."""
        ...

    def evaluation(self, tables: Tables, split: str, rows: int) -> Iterator[Batch]:
        """The whole split in pieces of at most ``rows`` rows, lengths padded to one shape; rows that are not there have weight 0."""
        ...

    def describe(self, tables: Tables, run: int) -> dict[str, Any]:
        """Counts and hashes of run ``run``'s data, for the report (JSON values)."""
        ...


class Mixer(Protocol):
    """Moves information along time: an nn.Module over ``...`` leading axes.

    Law: a masked position writes no state and is never read, so left padding is right for every mixer.
    """

    def forward(self, x: Tensor, context: Context, cache: Any = None) -> tuple[Tensor, Any]:
        """x [*L, B, T, D] -> [*L, B, S, D] (S = T unless context.at). Training, prefill and decoding are this one function."""
        ...

    def init_cache(self, batch: int, length: int) -> Any: ...  # room for ``length`` positions of ``batch`` sequences in every run
    def init_rules(self) -> Sequence[tuple[str, Any]]: ...  # of its own parameters that do not begin as the model's matrices and biases do, by names within it
    def undecayed(self) -> Sequence[str]: ...  # names within it of parameters no weight decay touches
    def flops(self, batch: int, time: int, scored: int) -> int: ...  # matrix products of one forward pass of one run, a multiply-add counted as 2
    def state_bytes(self, length: int) -> int: ...  # cache of one sequence of this length


class Model(Protocol):
    """Token ids to hidden states; logits are a separate call, so a fused loss never holds [*L, B, T, V]."""

    def forward(self, tokens: Tensor, context: Context, cache: Any = None) -> tuple[Tensor, Any]: ...
    def logits(self, hidden: Tensor) -> Tensor: ...
    def linear_head(self) -> tuple[Tensor, Tensor | None, float] | None: ...  # weight [*L, D, V], bias, softcap; None: logits are no linear map of hidden
    def init_cache(self, batch: int, length: int) -> Any: ...
    def init_rules(
        self, configs: Sequence[Any]
    ) -> Sequence[tuple[str, Any]]: ...  # for these runs: (pattern of parameter names, distribution); first match wins, no match is an error
    def undecayed(self) -> list[str]: ...  # names of the parameters no weight decay touches
    def hidden_matrices(self) -> list[str]: ...  # names of the parameters Muon may orthogonalise: not embeddings, not the head
    def flops(self, batch: int, time: int, scored: int) -> int: ...


Objective = Callable[[Any, Batch, Tensor | None], Sums]  # (model, batch, dropout keys [*L, B] or None) -> sums

Params = dict[str, Tensor]  # name -> [*L, ...]; a matrix is [*L, in, out]
State = dict[str, Params]  # moment's name -> one tensor per parameter; saved and compacted as it is


class Optimizer(Protocol):
    """Changes parameters in place, every run with its own hyperparameters.

    ``hyper``: name -> float32 [*L], already scheduled. ``step``: int64 scalar or [*L], updates already made.
    ``alive`` bool [*L]: where False, parameters and state must not change by one bit (gradients there are zeroed by the caller).
    """

    def init(self, params: Params) -> State: ...
    def update(self, params: Params, grads: Params, state: State, hyper: Mapping[str, Tensor], step: Tensor, alive: Tensor) -> None: ...
