"""``load("family", "file")``: the tensors of one golden file.

The folder is the environment variable DISTILL_GOLDENS, by default ``tests/goldens/data``. A missing file
fails (and never skips): other files with the same names and keys but other numbers may stand in for the ones
in the repository, so a test may take shapes, step counts, inputs and expected values from the file only.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file
from torch import Tensor

Load = Callable[[str, str], dict[str, Tensor]]


@pytest.fixture(scope="session")
def load() -> Load:
    folder = Path(os.environ.get("DISTILL_GOLDENS") or Path(__file__).parent / "data")

    def read(family: str, file: str) -> dict[str, Tensor]:
        path = folder / family / f"{file}.safetensors"
        if not path.is_file():
            pytest.fail(f"golden file {path} is missing (DISTILL_GOLDENS names its folder)", pytrace=False)
        return load_file(path)

    return read
