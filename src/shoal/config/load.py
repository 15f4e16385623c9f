"""From YAML and ``--a.b value`` to configs and back, strictly; every error names the file, line, path, expected type and value.

cattrs does the structuring, PyYAML the reading. Stricter than either: no text becomes a number (but ``1e-3``, which YAML 1.1 calls text), no float
an integer, no key is given twice, no alias is followed, and nan and inf are refused. Unions of configs carry ``type:`` (see ``config.core.type_name``).

    run = load_run("gpt.yaml", parse_overrides(["--optimizer.lr", "3e-3"]))
    study = override(StudyConfig(), {"run.optimizer.type": "muon", "grid.optimizer.lr": [1e-3, 1e-2]})
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import itertools
import json
import math
import re
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import yaml
from cattrs import BaseValidationError, Converter, ForbiddenExtraKeysError
from cattrs.cols import homogenous_tuple_structure_factory, list_structure_factory
from cattrs.errors import AttributeValidationNote, IterableValidationNote
from cattrs.gen import make_dict_structure_fn

from shoal.config.core import RunConfig, StudyConfig, type_name, with_values
from shoal.config.fields import ConfigError, check
from shoal.config.models import ModuleConfig

C = TypeVar("C")
SHIPPED = Path(__file__).parent / "shipped"  # gpt-tiny.yaml
FLAG = object()  # what parse_overrides gives for "--a.b" without a value: true for a boolean field, an error for any other
_EXPONENT = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+")  # YAML 1.1 wants a dot and a sign: to PyYAML 1e-3 is text
_CHECKED_CELLS = 2000  # of a grid, before training; the command line refuses more runs than that without --yes


def load_run(path: str | Path, overrides: Mapping[str, Any] | None = None) -> RunConfig:
    """The run a YAML file describes, with dotted paths replaced. A name that no file has here may be one of those that come with shoal (``SHIPPED``)."""
    own = not Path(path).exists() and str(path) in {shipped.name for shipped in SHIPPED.iterdir()}
    data, lines = read_yaml(SHIPPED / path if own else path)
    return override(structure(RunConfig, data, str(path), lines), overrides or {})


def structure(cls: type[C], data: Any, source: str = "", lines: Mapping[str, int] | None = None) -> C:
    """Nested plain values -> a config. ``source`` and ``lines`` (path -> line) say in an error where the value stands."""
    try:
        return _structure(data, cls)
    except _Problems as found:
        placed = [(_line(problem.path, lines or {}), problem) for problem in found.problems]
    line, first = min(placed, key=lambda p: p[0])
    where = ": ".join(filter(None, [f"{source}:{line}" if line and source else source, first.path]))
    raise ConfigError(where, first.message)


def unstructure(config: Any) -> dict[str, Any]:
    """A config -> nested plain values, with ``type`` where a field is a union of configs. ``structure(type(c), unstructure(c)) == c``."""
    return _converter().unstructure(config)


def config_of(flat: Mapping[str, Any]) -> RunConfig:
    """The inverse of ``flatten``."""
    nested: dict[str, Any] = {}
    for path, value in flat.items():
        *parents, leaf = path.split(".")
        inner = nested
        for name in parents:
            inner = inner.setdefault(name, {})
        inner[leaf] = value
    return structure(RunConfig, nested)


def to_yaml(config: Any) -> str:
    data = unstructure(config)
    as_it_is = "\x85" not in json.dumps(data, ensure_ascii=False)  # PyYAML writes this one as a line break, and reads it back as one
    return yaml.safe_dump(data, sort_keys=False, allow_unicode=as_it_is, width=120)


def parse_overrides(args: Sequence[str]) -> dict[str, Any]:
    """``["--optimizer.lr", "3e-3", "--task.p=113", "--grid.steps", "100,200"]`` -> path -> value, read as YAML.

    Dashes in names are underscores. Values of ``--grid.`` are lists: "1e-3,1e-2" or "[1e-3, 1e-2]".
    """
    values: dict[str, Any] = {}
    rest = list(args)
    while rest:
        name, equals, text = rest.pop(0).partition("=")
        path = name[2:].replace("-", "_")
        check(name.startswith("--") and bool(path), name, "not expected here; a setting is given as --a.b value")
        if not equals and rest and not rest[0].startswith("--"):
            equals, text = "=", rest.pop(0)
        check(path not in values, path, "given twice")
        grid = path.startswith("grid.")
        check(bool(equals) or not grid, path, f"needs a list of values: --{path} VALUE,VALUE")
        if not equals:
            values[path] = FLAG
        else:
            values[path] = _parse_value(f"[{text}]" if grid and not text.startswith("[") else text, path)
    return values


def override(config: C, values: Mapping[str, Any]) -> C:
    """A copy with dotted paths replaced, all at once, checked as if it came from a file.

    ``optimizer.type`` changes the class: fields both have keep their values, the others get their defaults. ``grid.<path>`` sets the values a study varies;
    ``variants`` may be names of those there are, to keep only them.
    """
    kind, data = type(config), unstructure(config)
    for path in sorted(values, key=lambda p: not p.endswith(".type")):  # types first: they decide which fields there are
        value = values[path]
        if isinstance(config, StudyConfig) and path.startswith("grid."):
            data["grid"][path.removeprefix("grid.")] = value
            continue
        if isinstance(config, StudyConfig) and path == "variants" and not isinstance(value, dict):
            data["variants"] = _chosen(data["variants"], value)
            continue
        _require(path, data)
        *parents, last = path.split(".")
        group = functools.reduce(lambda d, part: d[part], parents, data)
        if value is FLAG:
            check(isinstance(group[last], bool), path, f"needs a value: --{path} VALUE")
            value = True
        if last == "type":
            cls = {type_name(c): c for c in _configs(_hint(config, parents))}.get(str(value))
            fresh = unstructure(cls()) if cls else {}
            kept = {name: group[name] for name in fresh if name in group}
            group.clear()
            group.update(fresh | kept)
        group[last] = value
    if isinstance(config, StudyConfig):
        for path in values:
            of_run, _, inner = path.partition("run.")
            if not of_run:
                check(inner not in data["grid"], path, f"has no effect, the grid varies it; use --grid.{inner} VALUE,VALUE")
                check(inner.split(".")[0] != "seeds", path, "has no effect, a study numbers its seeds; use --seeds and --first_seed")
    return structure(kind, data)


def _chosen(variants: Mapping[str, Any], names: Any) -> dict[str, Any]:
    """``--variants sgd,muon``: only these."""
    wanted = [name.strip() for name in names.split(",")] if isinstance(names, str) else [str(name) for name in names] if isinstance(names, list) else []
    check(bool(wanted), "variants", f"name some of {', '.join(variants) or 'none: this study has no variants'}")
    for name in wanted:
        check(name in variants, "variants", f"there is no variant {name!r}; {nearest(name, variants)}")
    return {name: changes for name, changes in variants.items() if name in wanted}


def difference(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """What changed between two flat dicts, one line a path: "optimizer.lr: 0.001 -> 0.003"."""
    return [
        f"{path}: {_show(old[path]) if path in old else 'not set'} -> {_show(new[path]) if path in new else 'not set'}"
        for path in dict.fromkeys([*old, *new])
        if path not in old or path not in new or old[path] != new[path]
    ]


def nearest(name: str, known: Iterable[str]) -> str:
    """ "did you mean wd?" for weight_decay, or what there is when nothing is near."""
    known = list(known)
    initials = "".join(word[:1] for word in name.split("_"))
    near = [k for k in known if k == initials and len(k) > 1] or difflib.get_close_matches(name, known, n=1)
    return f"did you mean {near[0]}?" if near else f"known here: {', '.join(known) or 'none'}"


# --- reading YAML ---


def read_yaml(path: str | Path) -> tuple[dict[str, Any], dict[str, int]]:
    """A file's mapping, and the line of every dotted path in it."""
    try:
        text = Path(path).read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ConfigError(str(path), f"is not UTF-8 text (byte {error.start})") from None
    except IsADirectoryError:
        raise ConfigError(str(path), "is a directory; name a YAML file in it") from None
    except OSError as error:
        raise ConfigError(str(path), (error.strerror or str(error)).lower()) from None
    lines = {"": 1}
    data = _read(text, str(path), lines)
    check(data is not None, str(path), "is empty; a config has at least one setting, such as `steps: 1000`")
    check(isinstance(data, dict), f"{path}:1", f"expected a mapping (`key: value` lines), not {_show(data)}")
    return data, lines


def _read(text: str, source: str, lines: dict[str, int]) -> Any:
    try:
        for event in yaml.parse(text, Loader=yaml.SafeLoader):
            if isinstance(event, yaml.AliasEvent):
                raise ConfigError(f"{source}:{event.start_mark.line + 1}", f"aliases (*{event.anchor}) are not read; write the value out")
        root = yaml.compose(text, Loader=yaml.SafeLoader)
        return None if root is None else _plain(root, "", source, lines)
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        fix = "; indent with spaces, not tabs" if "'\\t'" in str(error.problem) else ""
        raise ConfigError(f"{source}:{line}", f"not YAML: {error.problem}{fix}") from None
    except yaml.reader.ReaderError as error:
        raise ConfigError(f"{source}:{text.count(chr(10), 0, error.position) + 1}", f"not YAML: {error.reason}") from None
    except RecursionError:
        raise ConfigError(source, "not read: nested too deeply") from None


def _plain(node: yaml.Node, path: str, source: str, lines: dict[str, int]) -> Any:
    """A YAML node -> plain values; duplicate keys are errors."""
    if isinstance(node, yaml.SequenceNode):
        for i, item in enumerate(node.value):
            lines[f"{path}[{i}]"] = item.start_mark.line + 1
        return [_plain(item, f"{path}[{i}]", source, lines) for i, item in enumerate(node.value)]
    if isinstance(node, yaml.MappingNode):
        mapping: dict[str, Any] = {}
        for key, value in node.value:
            line = key.start_mark.line + 1
            check(isinstance(key, yaml.ScalarNode), f"{source}:{line}", "a key must be plain text")
            here = _join(path, key.value)
            check(key.value not in mapping, f"{source}:{line}: {here}", f"given twice (first on line {lines.get(here)})")
            lines[here] = line
            mapping[key.value] = _plain(value, here, source, lines)
        return mapping
    try:
        return yaml.SafeLoader("").construct_object(node)
    except ValueError as error:  # a date that does not exist, an integer of too many digits
        raise ConfigError(f"{source}:{node.start_mark.line + 1}: {path}", f"cannot be read: {str(error).split(':')[0]}") from None


def _parse_value(text: str, path: str) -> Any:
    try:
        return _read(text, "", {}) if text else ""
    except ConfigError as error:
        raise ConfigError(path, f"cannot read {_show(text)} ({error.message}); put text in quotes, a list in [ ]") from None


# --- structuring ---


class _Problems(Exception):
    def __init__(self, problems: list[ConfigError]) -> None:
        self.problems = problems


def _structure(data: Any, hint: Any, path: str = "") -> Any:
    try:
        config = _converter().structure(data, hint)
        return _checked_grid(config) if hint is StudyConfig else config
    except (BaseValidationError, ConfigError) as error:
        raise _Problems(list(_problems(error, path))) from None


def _problems(error: BaseException, path: str) -> Iterator[ConfigError]:
    """cattrs' tree of exceptions -> one ConfigError, with its full path, for each leaf."""
    if isinstance(error, BaseValidationError):
        for inner in error.exceptions:
            notes = [n for n in getattr(inner, "__notes__", ()) if isinstance(n, AttributeValidationNote | IterableValidationNote)]
            names = [n.name if isinstance(n, AttributeValidationNote) else f"[{n.index}]" for n in notes]
            yield from _problems(inner, functools.reduce(_join, names, path))
    elif isinstance(error, ForbiddenExtraKeysError):
        known = [f.name for f in dataclasses.fields(error.cl)]
        for name in sorted(map(str, error.extra_fields)):
            yield ConfigError(_join(path, name), f"unknown key; {nearest(name, known)}")
    elif isinstance(error, ConfigError):
        yield ConfigError(_join(path, error.path), error.message)
    elif isinstance(error, KeyError):
        yield ConfigError(_join(path, str(error.args[0])), "missing")
    else:
        raise error


def _checked_grid(config: StudyConfig) -> StudyConfig:
    """Every path a field of the run, every value of its type (1 becomes 1.0), every combination a valid run."""
    data = unstructure(config.run)
    grid: dict[str, list[Any]] = {}
    for path, values in config.grid.items():
        _require(path, data, "grid.")
        group, _, last = path.rpartition(".")
        check(last != "type", f"grid.{path}", "a type cannot be varied in a grid; run the study once for each")
        check(group != "seeds", f"grid.{path}", "has no effect, a study numbers its seeds; set seeds and first_seed")
        hint = _hint(config.run, path.split("."))
        check(not _configs(hint), f"grid.{path}", "is a group of fields; vary one of them")
        grid[path] = [_converter().unstructure(_structure(v, hint, f"grid.{path}"), unstructure_as=hint) for v in values]
    config = dataclasses.replace(config, grid=grid)
    for name, changes in config.variants.items():
        both = changes.keys() & grid.keys()
        check(not both, f"variants.{name}", f"changes {', '.join(sorted(both))}, which the grid varies too; leave it to one of them")
        check("variant" not in changes and not any(path.startswith("seeds.") for path in changes), f"variants.{name}", "cannot set a variant's name or seeds")
        try:
            override(config.run, changes)
        except ConfigError as error:
            raise ConfigError(f"variants.{name}.{error.path}", error.message) from None
    for cell in itertools.islice(itertools.product(*grid.values()), _CHECKED_CELLS):
        chosen = dict(zip(grid, cell, strict=True))
        try:
            with_values(config.run, chosen)
        except ConfigError as error:
            raise ConfigError("grid", f"{', '.join(f'{k} {_show(v)}' for k, v in chosen.items())}: {error}") from None
    return config


@functools.cache
def _converter() -> Converter:
    converter = Converter(detailed_validation=True, forbid_extra_keys=True, unstruct_collection_overrides={tuple: list})
    for kind, hook in ((float, _float), (int, _int), (bool, _exactly(bool)), (str, _exactly(str))):
        converter.register_structure_hook(kind, hook)
    converter.register_structure_hook_factory(lambda t: get_origin(t) is Literal, lambda t, _: _choice)
    converter.register_structure_hook_factory(lambda t: get_origin(t) is list, lambda t, c: _guarded(list, list_structure_factory(t, c)))
    converter.register_structure_hook_factory(lambda t: get_origin(t) is tuple, lambda t, c: _guarded(list, homogenous_tuple_structure_factory(t, c)))
    converter.register_structure_hook_factory(lambda t: get_origin(t) is dict, lambda t, c: _by_path(get_origin(get_args(t)[1])))
    converter.register_structure_hook_factory(dataclasses.is_dataclass, lambda t, c: _guarded(dict, make_dict_structure_fn(t, c)))
    converter.register_structure_hook_factory(lambda t: t is ModuleConfig, lambda t, c: _with_arguments(_guarded(dict, make_dict_structure_fn(t, c))))
    converter.register_structure_hook_factory(lambda t: len(_configs(t)) > 1, _tagged)
    converter.register_structure_hook_factory(lambda t: _is_union(t) and NoneType in get_args(t), _optional)  # asked first: the last one registered
    converter.register_unstructure_hook_factory(
        lambda t: len(_configs(t)) > 1, lambda _, c: lambda v: v and {"type": type_name(type(v))} | c.unstructure(v, type(v))
    )
    return converter


def _unexpected(value: Any, hint: Any, fix: str = "") -> ConfigError:
    return ConfigError("", f"expected {_describe(hint)}, not {_show(value)}{fix}")


def _exactly(kind: type) -> Any:
    def hook(value: Any, hint: Any) -> Any:
        if not isinstance(value, kind):
            raise _unexpected(value, hint)
        return value

    return hook


def _float(value: Any, hint: Any) -> float:
    number = float(value) if isinstance(value, str) and _EXPONENT.fullmatch(value) else value
    if isinstance(number, bool) or not isinstance(number, int | float):
        raise _unexpected(value, hint)
    check(abs(number) <= sys.float_info.max, "", f"expected a finite number, not {_show(value)}")  # false for nan, inf and integers no float holds
    return float(number)


def _int(value: Any, hint: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        whole = float(value) if isinstance(value, float) or (isinstance(value, str) and _EXPONENT.fullmatch(value)) else math.nan
        raise _unexpected(value, hint, f"; write {int(whole)}" if abs(whole) < 2**53 and whole.is_integer() else "")
    check(-(2**63) <= value < 2**63, "", f"expected a whole number of at most 64 bits, not {_show(value)}")
    return value


def _choice(value: Any, hint: Any) -> Any:
    if not any(type(value) is type(choice) and value == choice for choice in get_args(hint)):
        near = difflib.get_close_matches(str(value), map(str, get_args(hint)), n=1)
        raise _unexpected(value, hint, f"; did you mean {near[0]}?" if near else "")
    return value


def _guarded(kind: type, inner: Any) -> Any:
    """Only a list or a mapping gets to cattrs, which would take a text apart into letters."""

    def hook(value: Any, hint: Any) -> Any:
        if not isinstance(value, kind):
            raise _unexpected(value, hint, f"; write [{value}]" if kind is list and isinstance(value, str | int | float) else "")
        return inner(value, hint)

    return hook


def _with_arguments(inner: Any) -> Any:
    """The arguments of a module may be written as a mapping; they are kept as its JSON."""

    def hook(value: Any, hint: Any) -> Any:
        if isinstance(value, dict) and isinstance(value.get("arguments"), dict):
            value = value | {"arguments": json.dumps(value["arguments"])}
        return inner(value, hint)

    return hook


def _by_path(kind: type) -> Any:
    """``grid``: dotted path -> list of values; ``variants``: name -> mapping of dotted path -> value."""
    what, inner = ("dotted paths to lists", "a list of values") if kind is list else ("names to changes", "a mapping of dotted paths to values")

    def hook(value: Any, hint: Any) -> dict[str, Any]:
        check(isinstance(value, dict), "", f"expected a mapping of {what}, not {_show(value)}")
        for path, values in value.items():
            check(isinstance(values, kind), path, f"expected {inner}, not {_show(values)}")
        return {path: kind(values) for path, values in value.items()}

    return hook


def _optional(hint: Any, converter: Converter) -> Any:
    kinds = [k for k in get_args(hint) if k is not NoneType]
    inner = converter.get_structure_hook(Union[tuple(kinds)])  # noqa: UP007
    return lambda value, _: None if value is None else inner(value, hint if kinds[0] in (float, int, str, bool) else kinds[0])


def _tagged(hint: Any, converter: Converter) -> Any:
    classes = {type_name(c): c for c in _configs(hint)}

    def hook(value: Any, _: Any) -> Any:
        check(isinstance(value, dict), "", f"expected a mapping with `type: {'|'.join(classes)}`, not {_show(value)}")
        check("type" in value, "type", f"missing; one of {', '.join(classes)}")
        name = value["type"]
        check(isinstance(name, str) and name in classes, "type", f"unknown type {_show(name)}; {nearest(str(name), classes)}")
        return converter.structure({k: v for k, v in value.items() if k != "type"}, classes[name])

    return hook


# --- paths, types, words ---


def _require(path: str, data: Mapping[str, Any], prefix: str = "") -> None:
    """An error unless the dotted path exists in nested data."""
    here, level = "", data
    for part in path.split("."):
        check(isinstance(level, Mapping), prefix + here, f"has no fields of its own, so {path.removeprefix(here)[1:]} is no setting")
        if part not in level:
            ends = [p for p in _paths(data) if p.endswith(f".{path}")]
            fix = f"did you mean {prefix}{ends[0]}?" if ends else nearest(part, [k for k in level if k != "type"])
            raise ConfigError(prefix + _join(here, part) if not ends else prefix + path, f"unknown key; {fix}")
        here, level = _join(here, part), level[part]


def _paths(data: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    for name, value in data.items():
        yield f"{prefix}{name}"
        if isinstance(value, Mapping):
            yield from _paths(value, f"{prefix}{name}.")


def _hint(config: Any, parts: Sequence[str]) -> Any:
    """The declared type of the field at a path that exists, without its tags."""
    for part in parts[:-1]:
        config = getattr(config, part)
    return get_type_hints(type(config))[parts[-1]]


def _configs(hint: Any) -> list[type]:
    """The config classes a declared type allows."""
    return [k for k in (get_args(hint) if _is_union(hint) else (hint,)) if dataclasses.is_dataclass(k) and isinstance(k, type)]


def _is_union(hint: Any) -> bool:
    return get_origin(hint) in (Union, UnionType)


def _describe(hint: Any) -> str:
    if get_origin(hint) is Annotated:
        return _describe(get_args(hint)[0])
    if _is_union(hint):
        return " or ".join(_describe(k) for k in get_args(hint))
    if get_origin(hint) is Literal:
        return f"one of {', '.join(map(str, get_args(hint)))}"
    words = {float: "a number", int: "a whole number", bool: "true or false", str: "text", NoneType: "null"}
    return words.get(hint) or ("a mapping" if dataclasses.is_dataclass(hint) else "a list")


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path and name and not name.startswith("[") else path + name


def _line(path: str, lines: Mapping[str, int]) -> int:
    """The line of a path, or of the nearest one above it that is in the file; 0 without a file."""
    while path and path not in lines:
        path = path[: max(path.rfind("."), path.rfind("["), 0)]
    return lines.get(path, 0)


def _show(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 60 else f"{text[:57]}..."
