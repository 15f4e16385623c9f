"""Text that every installation has: the standard library's source as Python, the docstrings of what is installed as English. Nothing is imported for it.

It differs between versions of Python, torch and numpy, and not between machines: what an installation generates (build variables) is left out.

[name for name, path in sources()]   # ["__future__.py", "__hello__.py", ...]
"""

from __future__ import annotations

import ast
import importlib
import importlib.util
import os
import re
import sysconfig
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

from shoal.config.fields import check

LEFT_OUT = re.compile(r"tests?|idle_test|idlelib|lib2to3|turtledemo|encodings|pydoc_data|site-packages|dist-packages|config-.*|_sysconfigdata.*")
# directories and files: tests, programs with a library's name, generated tables, other people's packages, and what differs by machine
PACKAGES = ("torch", "numpy")  # whose docstrings are read, beside the standard library's
ADDING = {"add_docstr", "_add_docstr", "add_newdoc"}  # functions that hold the documentation of what is not written in Python


def sources() -> list[tuple[str, Path]]:
    """(name, path) of the standard library's files, by name."""
    found = _files(Path(sysconfig.get_path("stdlib")))
    check(bool(found), "task.corpus", f"this Python keeps no source in {sysconfig.get_path('stdlib')}; use --task.corpus english, or a file or directory")
    return found


def docstrings() -> Iterator[tuple[str, str]]:
    """(module's path, its docstrings with blank lines between), then (topic, text) of Python's own help."""
    for package in PACKAGES:
        spec = importlib.util.find_spec(package)
        assert spec is not None and spec.submodule_search_locations
        for name, path in _files(Path(spec.submodule_search_locations[0])):
            yield f"{package}/{name}", _docstrings(path)
    for name, path in sources():
        yield name, _docstrings(path)
    if importlib.util.find_spec("pydoc_data.topics"):
        for topic, text in sorted(importlib.import_module("pydoc_data.topics").topics.items()):
            yield f"topics/{topic}", text


def inside(root: Path, wanted: Callable[[str], bool]) -> list[tuple[str, Path]]:
    """(path within ``root``, path) of the files whose own name and whose directories' names are wanted, by path."""
    found = []
    for place, directories, files in os.walk(root):
        directories[:] = filter(wanted, directories)
        paths = [Path(place, name) for name in filter(wanted, files)]
        found += [(path.relative_to(root).as_posix(), path) for path in paths]
    return sorted(found)


def _files(root: Path) -> list[tuple[str, Path]]:
    return [(name, path) for name, path in inside(root, lambda name: not LEFT_OUT.fullmatch(name)) if path.suffix == ".py"]


def _docstrings(path: Path) -> str:
    with warnings.catch_warnings(action="ignore"):  # of other people's escapes
        try:
            tree = ast.parse(path.read_bytes())
        except SyntaxError:  # written for a later Python than this one
            return ""
    texts = []
    for node in ast.walk(tree):
        match node:
            case ast.Module() | ast.ClassDef() | ast.FunctionDef() | ast.AsyncFunctionDef():
                texts.append(ast.get_docstring(node) or "")
            case ast.Call(func=ast.Name(id=called) | ast.Attribute(attr=called)) if called in ADDING:
                inside = (part.value for argument in node.args for part in ast.walk(argument) if isinstance(part, ast.Constant))
                texts += [text.strip("\n") for text in inside if isinstance(text, str) and "\n" in text]
    return "\n\n".join(filter(None, texts))
