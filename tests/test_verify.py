"""`shoal verify`: all is well here, what is wrong is seen, and the exit code says so."""

from __future__ import annotations

from importlib.util import find_spec

import pytest
from torch import Tensor

from shoal import cli, mixers, verify
from shoal.nn import scan


@pytest.mark.filterwarnings("ignore")
def test_all_is_well(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["verify"]) == 0
    out = capsys.readouterr().out
    lines = out.splitlines()[1:]
    assert all(line.endswith(" ok") for line in lines)
    assert all(f"{name}: " in out for name in mixers.MIXERS)
    assert [f"gradients of {library} " in out for library in verify.OTHERS] == [find_spec(library) is not None for library in verify.OTHERS]


def test_what_is_wrong_is_seen(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    right = scan._sequential

    def wrong(u: Tensor, step: Tensor, A: Tensor, B: Tensor, C: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        return right(u, step, A * 1.001, B, C, state)

    monkeypatch.setattr(scan, "_sequential", wrong)
    monkeypatch.setattr(verify, "OTHERS", {})
    with pytest.raises(SystemExit) as stop:
        cli.main(["verify"])
    out, err = capsys.readouterr()
    assert stop.value.code == 1
    failed = [line.split("  ")[0] for line in out.splitlines() if line.endswith("FAILED")]
    scan_fails = [f"scan, sequential, {dtype}: values and gradients" for dtype in ("float64", "float32")]
    assert failed == [*scan_fails, "mamba: token by token = all at once"]  # a single token takes another form
    assert all(name in err for name in failed)


def test_nan_is_wrong() -> None:
    assert not verify.Check("x", float("nan"), 1.0).ok and verify.Check("x", 1.0, 1.0).ok
