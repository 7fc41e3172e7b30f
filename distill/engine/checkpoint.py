"""Training checkpoints: one file with everything that training needs and nothing that is frozen (contract
*Checkpoint*).

`torch.load` runs with `weights_only=True`: tensors and plain containers, no code."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from distill.engine.module import DistillModule
from distill.engine.progress import Progress
from distill.files import write_atomic

SCHEMA = 1
NAME = "last.ckpt"


def state_of(module: DistillModule, config: dict[str, Any]) -> dict[str, Any]:
    """The declared keys: networks and their averages by role, optimizers by key, progress, sampler, config,
    versions."""
    return {
        "schema": SCHEMA,
        "networks": {role: network.state_dict() for role, network in module.networks.items()},
        "ema": {role: network.state_dict() for role, network in module.ema.items()},
        "optimizers": {key: optimizer.state_dict() for key, optimizer in module.optimizers_by_key.items()},
        "progress": module.progress.to_dict(),
        "sampler": module.spec().to_dict(),
        "config": config,
        "torch": str(torch.__version__),
    }


def save(path: Path, module: DistillModule, config: dict[str, Any]) -> None:
    """Write a checkpoint atomically: a killed writer leaves the previous one."""
    state = state_of(module, config)
    write_atomic(path, lambda temporary: torch.save(state, temporary))


def read(path: Path) -> dict[str, Any]:
    """Read a checkpoint onto the CPU; the error names the file."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise FileNotFoundError(f"{path}: no such checkpoint") from None
    except Exception as error:
        raise ValueError(f"{path}: not a readable checkpoint ({error})") from error
    if state.get("schema") != SCHEMA:
        raise ValueError(f"{path}: schema: found {state.get('schema')!r}, this version reads {SCHEMA}")
    return state


def restore(state: dict[str, Any], module: DistillModule, *, where: Path) -> None:
    """Load networks, averages and progress, strictly in both directions. Optimizers: `restore_optimizers`,
    once they exist."""
    for part, modules in (("networks", module.networks), ("ema", dict(module.ema.items()))):
        if set(state[part]) != set(modules):
            raise ValueError(
                f"{where}: {part}: found {sorted(state[part])}, this method has {sorted(modules)}"
            )
        for role, network in modules.items():
            network.load_state_dict(state[part][role])
    module.progress = Progress(**state["progress"])


def restore_optimizers(state: dict[str, Any], module: DistillModule, *, where: Path) -> None:
    """Load every optimizer's state; the base learning rates stay those of today's config."""
    found = state["optimizers"]
    if set(found) != set(module.optimizers_by_key):
        raise ValueError(
            f"{where}: optimizers: found {sorted(found)}, this method has {sorted(module.optimizers_by_key)}"
        )
    for key, optimizer in module.optimizers_by_key.items():
        optimizer.load_state_dict(found[key])
