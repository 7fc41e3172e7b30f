"""Training stages that are made longer: where, and whether what was trained is what is trained on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from distill.engine import checkpoint
from distill.engine.record import Seam, record_in
from distill.engine.stored import Refused
from distill.stages.artifact import EXTENDED
from distill.typed import parse
from distill.world import World


def seams_of(content: Mapping[str, Any]) -> list[Seam]:
    """Where a stage of this identity was made longer."""
    return parse(list[Seam], content.get(EXTENDED, []), EXTENDED)


def seams_after(
    folder: Path, content: Mapping[str, Any], compared: Mapping[str, Any]
) -> list[dict[str, int]]:
    """The seams of a stage of the identity `content` that is made longer now, as an identity holds them: those of its
    checkpoint, and the step that it is at.

    folder: of its checkpoints. compared: the config that they hold. Raises `Refused` for a checkpoint of another
    training."""
    found, _ = checkpoint.newest(folder, World())
    if found is None:
        raise Refused(f"{folder}: has no checkpoint")
    record, steps, known = record_in(found), content["config"]["steps"], seams_of(content)
    longer = [*record.seams, Seam(record.steps, found.state["progress"]["step"])]
    # A start that made the stage longer may have ended before its first checkpoint.
    fits = known == (record.seams if record.steps == steps else longer)
    if record.config != compared or record.steps > steps or not fits:
        raise Refused(f"{found.path}: is the checkpoint of another training than the stage was begun with")
    return [asdict(seam) for seam in longer]
