"""One function, replayed: a CUDA graph on a GPU, a plain call on a CPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


class Captured:
    """Calls ``function()``, which must work on fixed tensors without asking the host anything; its result is overwritten by the next call.

    On CUDA the first call runs it ``warmup`` times beside the main stream (compilation, workspaces), then records it; so the function must
    be harmless to repeat then: ``quiet`` is entered around those runs. ``pool``: memory shared with others, whose results are used before this is called.
    """

    def __init__(self, function: Callable[[], Any], device: torch.device, quiet: Callable[[], Any], warmup: int = 3, pool: Any = None) -> None:
        self.function, self.device, self.quiet, self.warmup, self.pool = function, device, quiet, warmup, pool
        self.graph: torch.cuda.CUDAGraph | None = None
        self.result: Any = None

    def __call__(self) -> Any:
        if self.device.type != "cuda":
            return self.function()
        if self.graph is None:
            self.record()
        assert self.graph is not None
        self.graph.replay()
        return self.result

    def record(self) -> None:
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream), self.quiet():
            for _ in range(self.warmup):
                self.function()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self.pool):
            self.result = self.function()
        self.graph = graph
