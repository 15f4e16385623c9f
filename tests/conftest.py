"""What every test shares."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

torch.set_num_threads(1)  # the tests' tensors are small: more threads only get in each other's way, and one keeps sums in one order


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The data sets that stand beside a checkout, which not every machine has."""
    path = Path(__file__).parents[2] / "shared" / "data"
    if not path.is_dir():
        pytest.skip(f"needs the data sets in {path}")
    return path
