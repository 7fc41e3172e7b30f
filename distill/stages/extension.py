"""Training stages that are made longer: where, and whether what was trained is what is trained on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from distill.engine import checkpoint
from distill.engine.record import Seam, record_in
from distill.stages.artifact import EXTENDED
from distill.typed import parse


def seams_of(content: Mapping[str, Any]) -> list[Seam]:
    """Where a stage of this identity was made longer."""
    return parse(list[Seam], content.get(EXTENDED, []), EXTENDED)


def seams_after(path: Path, content: Mapping[str, Any], compared: Mapping[str, Any]) -> list[dict[str, int]]:
    """The seams of a stage of the identity `content` that is made longer now, as an identity holds them: those of its
    checkpoint, and the step that it is at.

    compared: the config that its checkpoints hold. Raises `checkpoint.Refused` for a checkpoint of another training."""
    state = checkpoint.read(path)
    record, steps, known = record_in(state, path), content["config"]["steps"], seams_of(content)
    longer = [*record.seams, Seam(record.steps, state["progress"]["step"])]
    # A start that made the stage longer may have ended before its first checkpoint.
    fits = known == (record.seams if record.steps == steps else longer)
    if record.config != compared or record.steps > steps or not fits:
        raise checkpoint.Refused(
            f"{path}: is the checkpoint of another training than the stage was begun with"
        )
    return [asdict(seam) for seam in longer]
