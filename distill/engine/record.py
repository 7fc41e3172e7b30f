"""What a checkpoint records of its training, and the check that `train` continues the same one."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from distill.engine.made import differences, over_length
from distill.engine.module import DistillModule
from distill.engine.parallel import local
from distill.engine.stored import Refused, Stored
from distill.typed import parse

SHOWN = 6  # differences that a message names


@dataclass(frozen=True)
class Seam:
    """A training of `steps` was extended when it had reached step `reached`."""

    steps: int
    reached: int


@dataclass(frozen=True)
class Record:
    """Record of one training.

    Attributes:
        made: its description, see `engine.made.made_of`.
        config: further plain containers of the caller to compare.
        steps: planned length. seams: where it was extended.
    """

    made: dict[str, Any]
    config: dict[str, Any]
    steps: int
    seams: list[Seam] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """Plain containers."""
        return asdict(self)


def record_in(stored: Stored) -> Record:
    """The record of a checkpoint. Raises `Refused` where it has none."""
    try:
        return parse(Record, stored.state["record"], f"{stored.path}: record")
    except ValueError as error:
        raise Refused(str(error)) from error


def continued(stored: Stored, wanted: Record, module: DistillModule, seams: Sequence[Seam] | None) -> Record:
    """The record of a training that continues from a checkpoint with the settings `wanted`; its seams must be `seams`, if
    given. Collective. Raises `Refused` naming every difference."""
    where, found = stored.path, record_in(stored)
    reached = stored.state["progress"]["step"]
    if wanted.steps < found.steps:
        raise Refused(
            f"{where}: steps: found {wanted.steps}, but the training was planned to {found.steps}; expected at least that"
        )
    ours, theirs = dict(wanted.made), dict(found.made)
    for role, weights in (theirs.get("start") or {}).items():
        # A method that is passed again holds the weights at the end of the earlier call.
        if weights != (ours["start"] or {}).get(role) and _holds(module, role, stored):
            ours["start"] = {**ours["start"], role: weights}
    pairs = [({"config": found.config, **theirs}, {"config": wanted.config, **ours})]
    if found.steps != wanted.steps and "optim" in theirs:
        pairs.append(
            (
                {"config": found.config, **over_length(theirs, found.steps)},
                {"config": wanted.config, **over_length(ours, wanted.steps)},
            )
        )
    changes = min((list(differences(*pair)) for pair in pairs), key=len)
    if changes:
        raise Refused(f"{where}: is the checkpoint of another training: {told(changes)}")
    joined = found.seams
    if wanted.steps > found.steps:
        joined = [*joined, Seam(found.steps, reached)]
    if seams is not None and list(seams) != joined:
        raise Refused(
            f"{where}: seams: found {[asdict(s) for s in joined]}, the stage was begun with {[asdict(s) for s in seams]}"
        )
    return Record(found.made | {"optim": wanted.made["optim"]}, found.config, wanted.steps, joined)


@torch.no_grad()
def _holds(module: DistillModule, role: str, stored: Stored) -> bool:
    """Whether a network has exactly the values of a checkpoint, on every process. Collective."""
    own = module.trained[role].state() if role in module.trained else {}
    keys = stored.under("networks", role)
    shapes = {name: stored.shapes[key] for name, key in keys.items()}
    same = {name: tuple(value.shape) for name, value in own.items()} == shapes and all(
        torch.equal(local(value), local(stored.like(keys[name], value))) for name, value in own.items()
    )
    return bool(own) and not module.world.any(not same)


def told(changes: Iterable[tuple[str, Any, Any]]) -> str:
    """Differences as text."""
    lines = [_line(*change) for change in changes]
    return "; ".join([*lines[:SHOWN], *([f"and {len(lines) - SHOWN} more"] if len(lines) > SHOWN else [])])


def _line(place: str, found: Any, wanted: Any) -> str:
    if place.startswith(("start.", "frozen.")):
        kind, _, role = place.partition(".")
        return f"{role}: began with other {'weights' if kind == 'start' else 'frozen weights'}"
    if place == "data":
        return "data: are not those that it was trained on"
    return f"{place}: found {_short(found)}, expected {_short(wanted)}"


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:80]}..."
