"""Training checkpoints: one file with everything that training needs and nothing that is frozen (contract *Checkpoint*).

Tensors are whole and named, so a checkpoint of two processes continues on one and the reverse. `torch.load`
runs with `weights_only=True`: tensors and plain containers, no code.
"""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import Any

import torch

from distill.engine.module import DistillModule
from distill.engine.parallel import full_state, load_optimizer_state, optimizer_state
from distill.engine.progress import Progress
from distill.files import write_atomic

SCHEMA = 1
NAME = "last.ckpt"


def state_of(module: DistillModule, config: dict[str, Any]) -> dict[str, Any]:
    """The declared keys: networks and their averages by role, optimizers by key, progress, counters, sampler,
    the method's own state, config, versions. Collective: every process calls it."""
    names = module.parameter_names()
    return {
        "schema": SCHEMA,
        "networks": {role: full_state(network) for role, network in module.networks.items()},
        "ema": {role: full_state(network) for role, network in module.ema.items()},
        "optimizers": {key: optimizer_state(o, names) for key, o in module.optimizers_by_key.items()},
        "progress": module.progress.to_dict(),
        "nonfinite": module.nonfinite.to_dict(),
        "sampler": module.result().sampler.to_dict(),
        "method": module.state(),
        "config": config,
        "torch": str(torch.__version__),
    }


def save(path: Path, module: DistillModule, config: dict[str, Any]) -> None:
    """Write a checkpoint atomically: a killed writer leaves the previous one. Collective; the main process
    writes."""
    state = state_of(module, config)
    if module.world.main:
        for role, network in state["networks"].items():
            if not all(bool(value.isfinite().all()) for value in network.values()):
                kept = f"{path} stays as it was" if path.is_file() else "none was saved yet"
                raise FloatingPointError(
                    f"network {role!r}: weights are not finite; last good checkpoint: {kept}"
                )
        write_atomic(path, lambda temporary: torch.save(state, temporary))
    module.world.barrier()


def read(path: Path) -> dict[str, Any]:
    """Read a checkpoint onto the CPU; the error names the file."""
    try:
        with zipfile.ZipFile(path) as archive:
            if (damaged := archive.testzip()) is not None:
                raise ValueError(f"damaged at {damaged}")
        state = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise FileNotFoundError(f"{path}: no such checkpoint") from None
    except Exception as error:
        raise ValueError(
            f"{path}: not a readable checkpoint ({error}); redo=<stage> trains from the start"
        ) from error
    if not isinstance(state, dict) or state.get("schema") != SCHEMA:
        found = state.get("schema") if isinstance(state, dict) else type(state).__name__
        raise ValueError(f"{path}: schema: found {found!r}, this version reads {SCHEMA}")
    return state


def restore(state: dict[str, Any], module: DistillModule, *, where: Path) -> None:
    """Load networks, averages and counters, strictly in both directions, before the networks are distributed.
    Optimizers: `restore_optimizers`, once they exist."""
    for part, modules in (("networks", module.networks), ("ema", dict(module.ema.items()))):
        if set(state[part]) != set(modules):
            raise ValueError(
                f"{where}: {part}: found {sorted(state[part])}, this method has {sorted(modules)}"
            )
        for role, network in modules.items():
            try:
                network.load_state_dict(state[part][role])
            except RuntimeError as error:
                raise ValueError(f"{where}: {part}.{role}: does not fit the network: {error}") from error
    module.progress = Progress(**state["progress"])
    module.nonfinite.load(state["nonfinite"])
    module.load_state(state.get("method", {}))


def restore_optimizers(state: dict[str, Any], module: DistillModule, *, where: Path) -> None:
    """Load every optimizer's state; the base learning rates stay those of today's config."""
    found, names = state["optimizers"], module.parameter_names()
    if set(found) != set(module.optimizers_by_key):
        wanted = sorted(module.optimizers_by_key)
        raise ValueError(f"{where}: optimizers: found {sorted(found)}, this method has {wanted}")
    for key, optimizer in module.optimizers_by_key.items():
        load_optimizer_state(optimizer, found[key], names)
