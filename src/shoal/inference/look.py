"""All there is to see inside a trained decoder with one text, as `shoal inspect` prints and writes it: attention maps, the logit lens, kinds of heads.

found = look(load("runs/gpt"), "def f(x):"); found.report(); save(found, Path("inside"))
"""

from __future__ import annotations

import json
import math
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shoal.config.fields import ConfigError
from shoal.inference.heads import Heads, head_scores
from shoal.inference.inside import Lens, Maps, attending, attention, lens
from shoal.results.store import plain, write_atomic
from shoal.results.wording import plural
from shoal.train.run import Run

DIGITS = 6  # of a number in the file
NUMBERS = 2**20  # weights at most, of all maps: a file of some 10 MB; 85 tokens with 12 layers of 12 heads, 512 with 2 of 2


@dataclass(frozen=True)
class Inside:
    run: str
    maps: Maps
    heads: Heads | None  # None: sequences are too short for any
    lens: Lens | None  # None: the model foretells no next token, or has no stream to read

    def report(self) -> str:
        layers, num_heads = ", ".join(map(str, self.maps.layers)), self.maps.weights.shape[1]
        parts = [f"{plural(len(self.maps.tokens), 'token')}; attention in layer {layers}, {plural(num_heads, 'head')} each\n"]
        if self.heads:
            parts.append(f"attention on {self.heads.length} random tokens that come twice, from the second copy:\n{self.heads.table()}")
        if self.lens:
            parts.append(f"loss on this text, the head applied after each layer:\n{self.lens.table()}")
        return "\n".join(parts)

    def record(self) -> dict[str, Any]:
        """For JSON."""
        heads, seen = self.heads, self.lens
        return {
            "run": self.run,
            "tokens": self.maps.tokens,
            "layers": self.maps.layers,
            "attention": self.maps.weights.astype(float).round(DIGITS).tolist(),
            "heads": heads and {"scores": heads.rows, "even": heads.even, "length": heads.length, "offset": heads.offset},
            "lens": seen and {"after": seen.after, "loss": seen.loss, "top": seen.top, "probability": seen.probability.tolist(), "nats": seen.nll.tolist()},
        }


def look(run: Run, text: str) -> Inside:
    """ConfigError for what ``attention`` refuses; what else cannot be had is left out, with a warning that says why, as is what of a text is too long."""
    mixers = attending(run)
    most = math.isqrt(NUMBERS // sum(mixer.num_heads for mixer in mixers.values()))
    maps, heads, seen = attention(run, text, most), None, None
    try:
        heads = head_scores(run)
    except ConfigError as error:
        warnings.warn(error.message, stacklevel=2)
    try:
        with warnings.catch_warnings(action="ignore"):  # of what is cut, said once
            seen = lens(run, text, most)
    except ConfigError as error:
        warnings.warn(f"no logit lens: {error.message}", stacklevel=2)
    return Inside(run.id, maps, heads, seen)


def save(found: Inside, directory: Path, layer: int | None = None, head: int | None = None) -> None:
    """inside.json, attention.png (of a layer, of a head), heads.png, lens.png."""
    write_atomic(directory / "inside.json", json.dumps(plain(found.record()), ensure_ascii=False).encode())  # on one line: a map has T^2 numbers
    write_atomic(directory / "attention.png", found.maps.png(layer, head))
    for name, part in (("heads", found.heads), ("lens", found.lens)):
        if part is not None:
            write_atomic(directory / f"{name}.png", part.png())
