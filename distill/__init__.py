"""distill: distils diffusion and flow models into one-step and few-step image generators."""

from __future__ import annotations

import importlib
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from distill.models.generator import Generator

__version__ = "0.1.0"

if "MPLBACKEND" in os.environ:
    try:  # torchmetrics, which lightning brings, imports it before anything here draws
        importlib.import_module("matplotlib")
    except (
        ValueError
    ):  # a notebook's backend, in a program that it starts, where that backend is not installed
        del os.environ["MPLBACKEND"]
        for _name in [name for name in sys.modules if name.partition(".")[0] == "matplotlib"]:
            del sys.modules[_name]  # half imported
    except ImportError:
        pass


def load(path: str | Path, *, device: str = "cpu") -> Generator:
    """Load an exported student, any model folder of a run, or a student of the package:
    `distill.load("runs/instaflow/export").sample(8, label=3)`, `distill.load("digits/dmd")`."""
    from distill.models.native import load_model  # imports torch
    from distill.models.shipped import model_folder

    return load_model(model_folder(path), device=device)
