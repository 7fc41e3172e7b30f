"""Checks that pairs are samples of the model that they are compared with, and latents those of the student's autoencoder."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from distill.cache.pairs import Pairs
from distill.models.description import Description
from distill.models.model import Model
from distill.stages.base import Stage
from distill.stages.generate import Generate
from distill.stages.targets import resolve


def check_pairs_of(stage: Any, stages: Mapping[str, Stage]) -> None:
    """Raise ValueError where the pairs that a training stage reads are samples of another stage's model than that of the role
    `PAIRS_OF` of its method, or the one that its adapters stand on."""
    role = getattr(resolve(stage.method, "method"), "PAIRS_OF", None)
    made = stages[stage.data] if role is not None and isinstance(stage.data, str) else None
    if role is None or not isinstance(made, Generate):
        return
    name: str = getattr(stage, role)
    if made.teacher not in _bases(name, stages):
        raise ValueError(
            f"data: the pairs of {stage.data!r} are samples of {made.teacher!r}, but {role} is {name!r}; expected pairs of the "
            "same model, from whose noise the student starts"
        )


def _bases(name: str, stages: Mapping[str, Stage]) -> list[str]:
    """A stage, and below a student with adapters the stages that it started from."""
    below = getattr(stages[name], "init", None)
    adapts = (getattr(stages[name], "adapt", None) or {}).get("lora") is not None
    further = [] if below is None else _bases(below, stages)
    return [name, *(further if adapts or len(further) > 1 else [])]


def check_fingerprint(role: str | None, source: Any, folders: Mapping[str, Path]) -> None:
    """`check_pairs_of` of pairs that no stage of the run made: by the sha256 of the weights, when they exist."""
    if role is None or not isinstance(source, Pairs):
        return
    described = Description.read(folders[role])
    known = [described.weights.sha256] + ([] if described.base is None else [described.base.sha256])
    if source.header.teacher not in known:
        raise ValueError(
            f"data: the pairs in {source.folder} are samples of a model with the weights {source.header.teacher[:12]}, but "
            f"{role} has {known[-1][:12]}; expected pairs of the same model, from whose noise the student starts"
        )


def check_decoder(student: Model, source: Any, *, trained: bool) -> None:
    """Raise ValueError where a source has latents of another autoencoder than the student's. `trained`: weights are
    there and are compared, too."""
    decoder = getattr(source, "decoder", None)
    if decoder is None or not (theirs := decoder.weights()):
        return
    own, where = student.decoder.weights(), "data: has latents of another autoencoder than the student's"
    if (found := decoder.config()) != (wanted := student.decoder.config()):
        raise ValueError(f"{where}: found {found}, expected {wanted}")
    for name, tensor in theirs.items() if trained else ():
        least = min(tensor.dtype, own[name].dtype, key=lambda dtype: dtype.itemsize)
        if not torch.equal(tensor.to(least), own[name].to(tensor.device, least)):
            raise ValueError(f"{where}: {name}: found other weights; expected latents of the student's")
