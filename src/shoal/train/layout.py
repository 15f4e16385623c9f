"""All parameters of R runs in one buffer [*L, P].

An elementwise optimizer then costs a handful of operations however many layers a model has (on a CPU that is most of a small model's
step), a run's gradient norm is one reduction, and leaving a fleet is one index_select. Parameters are views of the buffer.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

ALIGN = 16  # floats: every view starts on 64 bytes, as vectorised kernels want


class Layout:
    """Where each parameter lies. ``groups``: group name -> parameter names, contiguous in this order; they must partition the parameters."""

    def __init__(self, shapes: Mapping[str, Sequence[int]], groups: Mapping[str, Sequence[str]]) -> None:
        names = [name for members in groups.values() for name in members]
        assert sorted(names) == sorted(shapes), "optimizer groups must partition the parameters"
        self.shapes = {name: tuple(shapes[name]) for name in names}
        self.start: dict[str, int] = {}
        self.groups: dict[str, tuple[int, int]] = {}
        self.members = {group: tuple(members) for group, members in groups.items()}
        place = 0
        for group, members in groups.items():
            first = place
            for name in members:
                self.start[name] = place
                place += -(-math.prod(self.shapes[name]) // ALIGN) * ALIGN
            self.groups[group] = (first, place)
        self.size = place

    def view(self, flat: Tensor, name: str) -> Tensor:
        """The parameter [*L, ...] in ``flat`` [*L, P]."""
        shape, start = self.shapes[name], self.start[name]
        return flat[..., start : start + math.prod(shape)].view((*flat.shape[:-1], *shape))

    def stack(self, flat: Tensor, group: str) -> Tensor:
        """The parameters of a group that have one shape, [*L, N, ...] in ``flat`` [*L, P]."""
        (first, last), names = self.groups[group], self.members[group]
        shape = self.shapes[names[0]]
        return flat[..., first:last].unflatten(-1, (len(names), -1))[..., : math.prod(shape)].unflatten(-1, shape)

    def views(self, flat: Tensor) -> dict[str, Tensor]:
        return {name: self.view(flat, name) for name in self.shapes}

    def pack(self, tensors: Mapping[str, Tensor], lead: int) -> Tensor:
        """Named tensors [*L, ...] -> [*L, P], gaps zero. ``lead`` = len(L)."""
        pieces = []
        for name, shape in self.shapes.items():
            piece = tensors[name].flatten(lead) if len(shape) else tensors[name].unsqueeze(-1)
            gap = -piece.shape[-1] % ALIGN
            pieces.append(torch.nn.functional.pad(piece, (0, gap)) if gap else piece)
        return torch.cat(pieces, dim=-1)

    def bind(self, module: nn.Module, flat: Tensor) -> dict[str, nn.Parameter]:
        """Make every parameter of ``module`` a view of ``flat``; returns them by name, in the layout's order."""
        parameters = {name: nn.Parameter(self.view(flat, name)) for name in self.shapes}
        for name, parameter in parameters.items():
            owner, _, leaf = name.rpartition(".")
            setattr(module.get_submodule(owner), leaf, parameter)
        return parameters
