"""Training checkpoints: everything that training needs and nothing that is frozen.

Tensors are named, and each process saves and reads the rows that it has, so a checkpoint of two processes continues on one and
the reverse. `engine.stored` says how they lie on disk. `torch.load` runs with `weights_only=True`: tensors and plain
containers, no code.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Collection, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor, nn

from distill.engine import former, stored
from distill.engine.module import DistillModule
from distill.engine.parallel import is_sharded, part_to_save
from distill.engine.progress import Progress
from distill.engine.stored import PARTS, Folder, Key, Piece, Refused, Stored, not_finite
from distill.files import await_file, remove, stamp
from distill.typed import parse
from distill.world import World

PLAIN = (type(None), bool, int, float, str)


def tensors_of(module: DistillModule) -> dict[Key, Tensor]:
    """What is trained of networks and averages by role, and the state of optimizers by update and parameter; as it lies on
    this process, sharded or whole."""
    names = module.parameter_names()
    found: dict[Key, Tensor] = {}
    for part, sets in (("networks", module.trained), ("ema", module.averaged)):
        for role, parameters in sets.items():
            for name, value in parameters.state().items():
                if not isinstance(value, Tensor):  # an extra state of a module
                    raise ValueError(f"{part}.{role}.{name}: found {type(value).__name__}, expected a tensor")
                found[part, role, name] = value
    for update, optimizer in module.optimizers_by_key.items():
        for parameter, entries in optimizer.state.items():
            for entry, value in entries.items():
                if (
                    is_sharded(parameter)
                    and isinstance(value, Tensor)
                    and value.dim()
                    and not is_sharded(value)
                ):
                    raise ValueError(
                        f"optim.{update}.optimizer: {type(optimizer).__name__} keeps {entry} of a sharded parameter as a plain "
                        "tensor, of which a checkpoint would hold one process's part alone; expected an optimizer of "
                        "torch.optim, or one process"
                    )
                if isinstance(value, Tensor):
                    found["optimizers", update, names[id(parameter)], entry] = value
    return found


def plain_state_of(
    module: DistillModule, record: Mapping[str, Any], callbacks: Sequence[Callback] = ()
) -> dict[str, Any]:
    """The rest: names of roles, plain values of optimizers, progress, counters, sampler, the method's own state, the record of
    what is trained, versions; and the state of callbacks that have one. Collective: the state of a method may be."""
    names = module.parameter_names()
    told = {callback.state_key: found for callback in callbacks if (found := callback.state_dict())}
    return {
        "networks": list(module.trained),
        "ema": list(module.averaged),
        "optimizers": {
            update: {
                names[id(parameter)]: {name: v for name, v in entries.items() if not isinstance(v, Tensor)}
                for parameter, entries in optimizer.state.items()
            }
            for update, optimizer in module.optimizers_by_key.items()
        },
        "progress": module.progress.to_dict(),
        "nonfinite": module.nonfinite.to_dict(),
        "sampler": module.result().sampler.to_dict(),
        "method": module.state(),
        "record": dict(record),
        "threads": torch.get_num_threads(),  # the last bits of sums depend on it
        "torch": str(torch.__version__),
    } | ({"callbacks": told} if told else {})


def name_of(module: DistillModule) -> str:
    """The name of a checkpoint of a module as it is now."""
    progress = module.progress
    further = progress.iteration - module.student_update.iterations_for(progress.step)
    return f"step_{progress.step:07d}" + (f"+{further}" if further else "")


def save(
    folder: Path,
    module: DistillModule,
    record: Mapping[str, Any],
    callbacks: Sequence[Callback] = (),
    keep: int = 1,
) -> Path:
    """Save a checkpoint in `folder` and delete those before the `keep` newest; returns its path. A killed writer leaves the
    earlier ones. Collective.

    Raises, on every process and before it writes, FloatingPointError where a number in it is not finite, and ValueError
    where a callback or the method has a state that could not be read again."""
    world, tensors = module.world, tensors_of(module)
    state = plain_state_of(module, record, callbacks)
    own = {
        key: Piece(*rows)
        for key, value in tensors.items()
        if (rows := part_to_save(value, world.main)) is not None
    }
    world.together(lambda: check(folder, state, {key: piece.value for key, piece in own.items()}))
    shapes = {key: tuple(value.shape) for key, value in tensors.items()}
    path = stored.write(folder, name_of(module), state, shapes, own, world, keep)
    if world.main and len(stored.checkpoints(folder)) >= keep:
        remove(folder / stored.FORMER)
    return path


def check(folder: Path, state: Mapping[str, Any], own: Mapping[Key, Tensor]) -> None:
    """Raise the errors of `save`."""
    for part, found in state.items():
        if part == "callbacks":
            for key, kept in found.items():
                check_plain(kept, f"callbacks: {key}: state_dict")
        check_plain(found, part)
    if (sentence := not_finite(state, own)) is not None:
        names = stored.checkpoints(folder)
        last = f"{folder / names[0]} stays as it was" if names else "none was saved yet"
        raise FloatingPointError(f"{sentence}; last good checkpoint: {last}")


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


def names_in(folder: Path) -> list[str]:
    """Names of the checkpoints in a folder, the newest first, whether they are sound or not."""
    found = stored.checkpoints(folder)
    return [*found, stored.FORMER] if (folder / stored.FORMER).exists() else found


def newest(folder: Path, world: World) -> tuple[Stored | None, list[str]]:
    """The newest sound checkpoint in a folder, None where there is none at all, and what is wrong with newer ones.

    The main process looks, and each file is checked by one of the processes. Collective. Raises `Refused`, naming them all,
    where none is sound."""
    broken: list[str] = []
    for name in world.decided(lambda: names_in(folder)):
        path = folder / name
        if name == stored.FORMER:
            if world.size > 1:
                await_file(path, world.decided(partial(stamp, path)))
            return former.read(path), broken
        if (sentence := stored.unsound(path, world)) is None:
            return _complete(Folder(path)), broken
        broken.append(f"{path}: not a readable checkpoint ({sentence})")
    if broken:
        raise Refused("; ".join(broken))
    return None, []


def _complete(found: Folder) -> Folder:
    """The checkpoint, with a state of every part."""
    if missing := [part for part in PARTS if part not in found.state]:
        raise Refused(f"{found.path}: not a readable checkpoint ({missing[0]}: missing)")
    return found


def begin(found: Stored, module: DistillModule) -> None:
    """Check that a checkpoint fits a module, and take over its counters; before the networks are distributed.

    Raises `Refused` for other networks, averages or updates, and counters that contradict each other."""
    state, where = found.state, found.path
    wanted: dict[str, Collection[str]] = {
        "networks": module.trained,
        "ema": module.averaged,
        "optimizers": module.optim,
    }
    for part, roles in wanted.items():
        if set(state[part]) != set(roles):
            raise Refused(f"{where}: {part}: found {sorted(state[part])}, this method has {sorted(roles)}")
    for part, sets in (("networks", module.trained), ("ema", module.averaged)):
        for role, parameters in sets.items():
            own = {name: tuple(value.shape) for name, value in parameters.state().items()}
            theirs = {name: found.shapes[key] for name, key in found.under(part, role).items()}
            for name in sorted({*own, *theirs}):
                if own.get(name) != theirs.get(name):
                    raise Refused(
                        f"{where}: {part}.{role}: does not fit the network: {name}: found {_shape(theirs, name)}, expected "
                        f"{_shape(own, name)}"
                    )
    module.progress = checked_progress(found, module)
    module.nonfinite.load(state["nonfinite"])
    module.load_state(state["method"])


def _shape(shapes: Mapping[str, Sequence[int]], name: str) -> str:
    return f"shape {list(shapes[name])}" if name in shapes else "nothing"


def checked_progress(found: Stored, module: DistillModule) -> Progress:
    """The checkpoint's progress; raises `Refused` if its counters contradict each other."""
    state, where = found.state, found.path
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
    for name in state["optimizers"]:
        steps = [
            float(found.whole(key))
            for key in found.shapes
            if key[:2] == ("optimizers", name) and key[3] == "step"
        ]
        taken = runs.get(name, 0) - counts.get(name, [0])[0]
        if steps and max(steps) != taken:
            raise Refused(f"{where}: optimizers.{name}: found {max(steps):g} steps, expected {taken}")
    return progress


def restore(found: Stored, module: DistillModule) -> None:
    """Load networks and averages, which are on their devices and sharded now."""
    for part, sets in (("networks", module.trained), ("ema", module.averaged)):
        for role, parameters in sets.items():
            own = parameters.state()
            parameters.load({name: found.like((part, role, name), value) for name, value in own.items()})


def restore_callbacks(found: Stored, callbacks: Sequence[Callback]) -> None:
    """Give callbacks their state back. One that the checkpoint does not know begins anew; a state without its callback is
    refused only where it cannot be read: callbacks may be added and taken away."""
    states = found.state.get("callbacks", {})
    if not isinstance(states, dict):
        raise Refused(f"{found.path}: callbacks: found {type(states).__name__}, expected a mapping")
    for callback in callbacks:
        if callback.state_key in states:
            callback.load_state_dict(states[callback.state_key])


def restore_optimizers(found: Stored, module: DistillModule) -> None:
    """Load the state of every optimizer; base learning rates come from the current config."""
    names = module.parameter_names()
    for update, optimizer in module.optimizers_by_key.items():
        plain, keys = found.state["optimizers"][update], dict[str, dict[str, Key]]()
        for key in found.shapes:
            if key[:2] == ("optimizers", update):
                keys.setdefault(key[2], {})[key[3]] = key
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        known = [names[id(p)] for p in parameters]
        if unknown := sorted({*plain, *keys} - set(known)):
            raise Refused(f"{found.path}: optimizers.{update}: found unknown parameters {unknown[:4]}")
        states = {}
        for number, (name, parameter) in enumerate(zip(known, parameters, strict=True)):
            if name in plain or name in keys:
                own = {entry: found.like(key, parameter) for entry, key in keys.get(name, {}).items()}
                states[number] = dict(plain.get(name, {})) | own
        # torch's own loading puts every value on the device that the optimizer's kernels want it on.
        optimizer.load_state_dict({"state": states, "param_groups": optimizer.state_dict()["param_groups"]})
