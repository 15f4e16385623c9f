"""The rooms of the house: imports point one way, files stay short, and ``import shoal`` costs nothing."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import shoal

ROOT = Path(shoal.__file__).parent
FILES = sorted(ROOT.rglob("*.py"))
CONTRACTS = {"contracts", "rng", "config"}
MAY_IMPORT = {  # room -> other rooms of shoal
    "config": set(),
    "contracts": set(),
    "rng": set(),
    "nn": CONTRACTS,
    "mixers": CONTRACTS | {"nn"},
    "models": CONTRACTS | {"nn", "mixers", "data"},
    "data": {"config"},
    "tasks": CONTRACTS | {"data"},
    "results": {"config"},
    "attend": {"config", "rng", "results"},
    "train": CONTRACTS | {"nn", "mixers", "models", "data", "tasks"},
    "finetune": CONTRACTS | {"nn", "models", "data", "tasks", "train"},
    "inference": CONTRACTS | {"nn", "mixers", "models", "data", "tasks", "train", "results"},
    "studies": CONTRACTS | {"finetune", "nn", "mixers", "models", "data", "tasks", "train", "inference", "results"},
    "verify": CONTRACTS | {"nn", "mixers"},
    "commands": CONTRACTS | {"attend", "data", "finetune", "inference", "studies"},
    "cli": CONTRACTS | {"commands", "data", "tasks", "train", "inference", "results", "studies", "verify"},
    "__main__": {"cli"},
    "__init__": set(),
}
NO_TORCH = {"config", "results", "__init__"}


def imported(source: str) -> set[str]:
    """Dotted names of every module (or member) a source imports, inside functions and type checking included."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative imports hide which room is meant"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def offences(room: str, source: str) -> list[str]:
    found = []
    for name in sorted(imported(source)):
        top, _, rest = name.partition(".")
        if top == "shoal" and (other := rest.partition(".")[0]) != room and other not in MAY_IMPORT[room]:
            found.append(f"{room} imports {name}")
        if top == "torch" and room in NO_TORCH:
            found.append(f"{room} imports torch")
    return found


def room_of(path: Path) -> str:
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_point_one_way(path: Path) -> None:
    assert room_of(path) in MAY_IMPORT, "a new room: say in MAY_IMPORT what it may import"
    assert offences(room_of(path), path.read_text(encoding="utf-8")) == []


def test_the_rule_sees_offences() -> None:
    assert offences("nn", "from shoal.train.fleet import Fleet") == ["nn imports shoal.train.fleet.Fleet"]
    assert offences("config", "def f():\n    import torch.nn as nn") == ["config imports torch"]
    assert offences("results", "from shoal import models, config") == ["results imports shoal.models"]
    assert offences("models", "import shoal.mixers\nfrom shoal.models import x\nimport torch") == []


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_files_stay_short(path: Path) -> None:
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 500, "split it"


def test_nothing_heavy_at_import() -> None:
    """import shoal, the configs and the command line load no torch (nor what takes as long)."""
    code = "import shoal, shoal.config.load, shoal.cli, sys; print([m for m in ('torch', 'scipy', 'matplotlib', 'pandas', 'pyarrow') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]", done.stdout


def test_public_names_exist() -> None:
    listed = [name for name in dir(shoal) if name in shoal._MODULE]
    assert {"RunConfig", "StudyConfig", "Study", "Claim", "Sample", "Figure", "Rows", "grid", "run", "load", "generate"} <= set(listed)
    for name in listed:
        assert getattr(shoal, name).__name__ == name or name == "PerRun"
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        shoal.nothing  # noqa: B018
