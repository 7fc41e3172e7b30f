"""Training checkpoints: one file with everything that training needs and nothing that is frozen.

Tensors are whole and named, so a checkpoint of two processes continues on one and the reverse. `torch.load` runs with
`weights_only=True`: tensors and plain containers, no code. The file holds a sha256 of its content, so that an edited file, or
one made from two checkpoints, is refused.
"""

from __future__ import annotations

import hashlib
import math
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor, nn

from distill.engine.made import feed
from distill.engine.module import DistillModule
from distill.engine.parallel import full_values, load_optimizer_state, optimizer_state
from distill.engine.progress import Progress
from distill.files import write_atomic
from distill.typed import parse

SCHEMA = 2
NAME = "last.ckpt"
PLAIN = (type(None), bool, int, float, str)
PARTS = ("networks", "ema", "optimizers", "progress", "nonfinite", "sampler", "method", "record")


class Refused(ValueError):
    """Training cannot continue from a checkpoint."""


def state_of(
    module: DistillModule, record: Mapping[str, Any], callbacks: Sequence[Callback] = ()
) -> dict[str, Any]:
    """The declared keys: what is trained of networks and averages by role, optimizers by update, progress, counters, sampler,
    the method's own state, the record of what is trained, versions; and the state of callbacks that have one. Collective:
    every process calls it."""
    names = module.parameter_names()
    told = {callback.state_key: found for callback in callbacks if (found := callback.state_dict())}
    return {
        "schema": SCHEMA,
        "networks": {role: full_values(trained.state()) for role, trained in module.trained.items()},
        "ema": {name: full_values(average.state()) for name, average in module.averaged.items()},
        "optimizers": {key: optimizer_state(o, names) for key, o in module.optimizers_by_key.items()},
        "progress": module.progress.to_dict(),
        "nonfinite": module.nonfinite.to_dict(),
        "sampler": module.result().sampler.to_dict(),
        "method": module.state(),
        "record": dict(record),
        "threads": torch.get_num_threads(),  # the last bits of sums depend on it
        "torch": str(torch.__version__),
    } | ({"callbacks": told} if told else {})


def save(
    path: Path, module: DistillModule, record: Mapping[str, Any], callbacks: Sequence[Callback] = ()
) -> None:
    """Write a checkpoint atomically: a killed writer leaves the previous one. Collective; the main process
    writes. Raises, on every process and before it writes, FloatingPointError where a number in it is not finite, and ValueError
    where a callback or the method has a state that `read` could not read again."""
    state = state_of(module, record, callbacks)
    wrong = module.world.broadcast(_wrong(state, path) if module.world.main else None)
    if wrong is not None:
        raise wrong
    if module.world.main:
        state["sha256"] = content_digest(state)
        write_atomic(path, lambda temporary: torch.save(state, temporary))
    module.world.barrier()


def _wrong(state: Mapping[str, Any], path: Path) -> Exception | None:
    """Why a state must not be saved at `path`."""
    try:
        for part, found in state.items():
            if part == "callbacks":
                for key, own in found.items():
                    check_plain(own, f"callbacks: {key}: state_dict")
            check_plain(found, part)
    except ValueError as error:
        return error
    if (sentence := next(not_finite(state), None)) is None:
        return None
    kept = f"{path} stays as it was" if path.is_file() else "none was saved yet"
    return FloatingPointError(f"{sentence}; last good checkpoint: {kept}")


def read(path: Path) -> dict[str, Any]:
    """Read a checkpoint onto the CPU. Raises FileNotFoundError, or `Refused` where it cannot be read, was written by an
    earlier version, was changed afterwards, or holds numbers that are not finite; the error names the file."""
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such checkpoint")
    try:
        if not path.is_file():
            raise ValueError("not a regular file")
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise Refused(f"{path}: not a readable checkpoint ({error})") from error
    found = state.get("schema") if isinstance(state, dict) else type(state).__name__
    if found == 1:
        raise Refused(
            f"{path}: schema: found 1, expected {SCHEMA}: an earlier version wrote it, which did not note what was trained"
        )
    if found != SCHEMA:
        raise Refused(f"{path}: schema: found {found!r}, this version reads {SCHEMA}")
    digest = state.pop("sha256", None)
    if missing := [key for key in PARTS if not isinstance(state.get(key), dict)]:
        raise Refused(f"{path}: not a readable checkpoint ({missing[0]}: missing)")
    if digest != content_digest(state):
        raise Refused(
            f"{path}: not a readable checkpoint (its content does not fit its sha256: it was changed)"
        )
    if (wrong := next(not_finite(state), None)) is not None:
        raise Refused(f"{path}: {wrong}; expected a state to go on from")
    return state


def content_digest(state: Any) -> str:
    """sha256 over nested plain containers and tensors."""
    digest = hashlib.sha256()
    _feed(digest, state)
    return digest.hexdigest()


def _feed(digest: Any, value: Any) -> None:
    if isinstance(value, Tensor):
        feed(digest, value)
    elif isinstance(value, Mapping):
        digest.update(f"{{{len(value)} ".encode())
        for key in sorted(value, key=repr):
            _feed(digest, key)
            _feed(digest, value[key])
    elif isinstance(value, list | tuple):
        digest.update(f"[{len(value)} ".encode())
        for entry in value:
            _feed(digest, entry)
    else:
        digest.update(f"{type(value).__name__} {value!r} ".encode())


def not_finite(state: Mapping[str, Any]) -> Iterator[str]:
    """A sentence for each network, average and optimizer state that holds a number that is not finite."""
    for part, word in (("networks", "network"), ("ema", "average")):
        for role, tensors in state[part].items():
            if not all(_finite(value) for value in tensors.values()):
                yield f"{word} {role!r}: weights are not finite"
    for key, parameters in state["optimizers"].items():
        for name, values in parameters.items():
            for entry in values:
                if not _finite(values[entry]):
                    yield f"optimizer {key!r}: {entry} of {name} is not finite"


def _finite(value: Any) -> bool:
    if isinstance(value, Tensor):
        return bool(value.isfinite().all())
    return not isinstance(value, float) or math.isfinite(value)


def restore(state: dict[str, Any], module: DistillModule, *, where: Path) -> None:
    """Load networks, averages and counters, strictly in both directions, before the networks are distributed.
    Optimizers: `restore_optimizers`, once they exist."""
    for part, sets in (("networks", module.trained), ("ema", module.averaged)):
        if set(state[part]) != set(sets):
            raise Refused(f"{where}: {part}: found {sorted(state[part])}, this method has {sorted(sets)}")
        for role, parameters in sets.items():
            try:
                parameters.load(state[part][role])
            except RuntimeError as error:
                raise Refused(f"{where}: {part}.{role}: does not fit the network: {error}") from error
    progress = checked_progress(state, module, where)
    module.nonfinite.load(state["nonfinite"])
    module.load_state(state["method"])
    module.progress = progress


def checked_progress(state: Mapping[str, Any], module: DistillModule, where: Path) -> Progress:
    """The checkpoint's progress; raises `Refused` if its counters contradict each other."""
    try:
        progress = parse(Progress, state["progress"], f"{where}: progress")
        counts = parse(dict[str, list[int]], state["nonfinite"], f"{where}: nonfinite")
    except ValueError as error:
        raise Refused(str(error)) from error
    runs = {update.name: update.runs_before(progress.iteration) for update in module.plan}
    expected = {"step": runs[module.student_update.name]}
    if batch_size := state["record"].get("made", {}).get("batch_size"):
        expected["images"] = expected["step"] * batch_size
    for name, value in expected.items():
        if getattr(progress, name) != value:
            raise Refused(
                f"{where}: progress.{name}: found {getattr(progress, name)}, expected {value} after "
                f"{progress.iteration} iterations"
            )
    if progress.step > (planned := state["record"].get("steps", progress.step)):
        raise Refused(
            f"{where}: progress.step: found {progress.step}, expected at most the planned {planned}"
        )
    if progress.iteration < 0 or progress.seconds < 0:
        raise Refused(f"{where}: progress: found {state['progress']}, expected counts of at least 0")
    for name, skipped in counts.items():
        if name not in runs or len(skipped) != 3 or not 0 <= max(skipped) == skipped[0] <= runs[name]:
            raise Refused(
                f"{where}: nonfinite.{name}: found {skipped}, expected counts of {runs.get(name)} steps"
            )
    for name, parameters in state["optimizers"].items():
        steps = [float(v["step"]) for v in parameters.values() if "step" in v]
        taken = runs.get(name, 0) - counts.get(name, [0])[0]
        if steps and max(steps) != taken:
            raise Refused(f"{where}: optimizers.{name}: found {max(steps):g} steps, expected {taken}")
    return progress


def check_plain(value: Any, where: str) -> None:
    """Raise ValueError for what `torch.load(weights_only=True)` does not read, or not as it was. Types must be exact, because
    pickle saves a subclass by the name of its class."""
    kind = type(value)
    if kind in (dict, OrderedDict):
        for key, entry in value.items():
            if type(key) not in PLAIN:
                raise ValueError(
                    f"{where}: found the key {key!r} ({type(key).__name__}), expected a string or a number"
                )
            check_plain(entry, f"{where}[{key!r}]")
    elif kind in (list, tuple):
        for number, entry in enumerate(value):
            check_plain(entry, f"{where}[{number}]")
    elif kind not in (*PLAIN, Tensor, nn.Parameter):
        raise ValueError(
            f"{where}: found {kind.__name__}, expected None, numbers, strings, tensors, lists and dicts of them"
        )


def restore_callbacks(state: Mapping[str, Any], callbacks: Sequence[Callback], *, where: Path) -> None:
    """Give callbacks their state back. One that the checkpoint does not know begins anew; a state without its callback is
    refused only where it cannot be read: callbacks may be added and taken away."""
    found = state.get("callbacks", {})
    if not isinstance(found, dict):
        raise Refused(f"{where}: callbacks: found {type(found).__name__}, expected a mapping")
    for callback in callbacks:
        if callback.state_key in found:
            callback.load_state_dict(found[callback.state_key])


def restore_optimizers(state: dict[str, Any], module: DistillModule, *, where: Path) -> None:
    """Load the state of every optimizer; base learning rates come from the current config."""
    found, names = state["optimizers"], module.parameter_names()
    if set(found) != set(module.optimizers_by_key):
        wanted = sorted(module.optimizers_by_key)
        raise Refused(f"{where}: optimizers: found {sorted(found)}, this method has {wanted}")
    for key, optimizer in module.optimizers_by_key.items():
        load_optimizer_state(optimizer, found[key], names)
