"""Shared by all tests: few threads, no network, no run folder of the user's."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
torch.set_num_threads(1)


@pytest.fixture
def verb(tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Run `python -m distill.<verb> arguments` in a temporary folder, as a user would."""

    def call(name: str, *arguments: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        environment = {k: v for k, v in os.environ.items() if not k.startswith(("WANDB_", "HYDRA_"))}
        environment |= {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        result = subprocess.run(
            [sys.executable, "-m", f"distill.{name}", *arguments], cwd=tmp_path, env=environment, text=True,
            capture_output=True, timeout=300, stdin=subprocess.DEVNULL, check=False,
        )  # fmt: skip
        if check:
            assert result.returncode == 0, result.stderr[-4000:]
        return result

    return call
