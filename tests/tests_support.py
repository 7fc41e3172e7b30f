"""Running the verbs as a user would: a process of its own, in a folder of its own."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).resolve().parents[1]


def environment() -> dict[str, str]:
    """The user's environment without what would leak into a test."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("WANDB_", "HYDRA_"))}
    return kept | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


def run_verb(
    folder: Path, verb: str, *arguments: str, check: bool = True, timeout: float = 300
) -> subprocess.CompletedProcess[str]:
    """`python -m distill.<verb> arguments` in `folder`; with `check`, a failure shows the end of its messages."""
    result = subprocess.run(
        [sys.executable, "-m", f"distill.{verb}", *arguments],
        cwd=folder,
        env=environment(),
        text=True,
        capture_output=True,
        timeout=timeout,
        stdin=subprocess.DEVNULL,
        check=False,
    )
    if check:
        assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-4000:]
    return result


def load_script(name: str) -> ModuleType:
    """`scripts/<name>.py` as a module, the same one each time."""
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, ROOT / "scripts" / f"{name}.py")
        assert spec is not None
        assert spec.loader is not None
        module = sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    return sys.modules[name]
