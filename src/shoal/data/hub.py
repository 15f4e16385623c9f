"""Sets of the Hugging Face hub, named "hub:NAME[:CONFIG[:SPLIT]]", by way of the package datasets (extra hf). Not here: what their rows mean.

rows("hub:yelp_polarity", "data", "test", "or give a file")      # dicts, one by one
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from shoal.config.fields import ConfigError, check


def named(data: str, field: str) -> tuple[str, str, str]:
    """(NAME, CONFIG, SPLIT), "" for what is not said. ConfigError (``field``) if it is of no such form."""
    _, name, *rest = data.split(":")
    check(len(rest) <= 2 and bool(name), field, f"{data!r} should read hub:NAME, hub:NAME:CONFIG or hub:NAME:CONFIG:SPLIT")
    config, split = [*rest, "", ""][:2]
    return name, config, split


def rows(data: str, field: str, split: str, fix: str, **options: Any) -> Iterator[dict[str, Any]]:
    """``split``: if ``data`` says none. ``fix``: what to do where there is no network. ``options`` go to ``datasets.load_dataset``."""
    name, config, said = named(data, field)
    with _told(data, field, fix):
        yield from map(dict, _package(data, field, fix).load_dataset(name, config or None, split=said or split, **options))


def splits(data: str, field: str, fix: str) -> list[str]:
    """The names of all splits there are."""
    name, config, _ = named(data, field)
    with _told(data, field, fix):
        return list(_package(data, field, fix).get_dataset_split_names(name, config or None))


def _package(data: str, field: str, fix: str) -> Any:
    try:
        import datasets
    except ImportError:
        raise ConfigError(field, f"{data} needs the package datasets: pip install 'shoal[hf]'; {fix}") from None
    return datasets


@contextmanager
def _told(data: str, field: str, fix: str) -> Iterator[None]:
    """Whatever the hub's client, and what it runs on, raise: there is no common class."""
    try:
        yield
    except ConfigError:
        raise
    except Exception as error:
        raise ConfigError(field, f"cannot read {data} from the hub ({type(error).__name__}: {' '.join(str(error).split())}); {fix}") from None
