"""Teachers from diffusers folders: one file a family, found by its `FAMILY`."""

from __future__ import annotations

import importlib
import pkgutil
from functools import cache

from distill.models.families.family import Family
from distill.models.pretrained import INDEX, Folder


@cache
def families() -> dict[str, Family]:
    """name -> every family on disk."""
    found = {}
    for module in pkgutil.iter_modules(__path__):
        family = getattr(importlib.import_module(f"{__name__}.{module.name}"), "FAMILY", None)
        if isinstance(family, Family):
            found[module.name] = family
    return found


def family_of(folder: Folder, name: str = "auto") -> tuple[str, Family]:
    """(name, family) of a folder.

    Raises:
        ValueError: names `family`: the pipeline is of no family, or of another one than `name`.
    """
    known = families()
    if name != "auto" and name not in known:
        raise ValueError(f"family: found {name!r}, expected auto or one of {', '.join(known)}")
    right = next((each for each, family in known.items() if folder.pipeline in family.pipelines), None)
    if right is None:
        listed = ", ".join(pipeline for family in known.values() for pipeline in family.pipelines)
        raise ValueError(
            f"{folder.path / INDEX}: _class_name: found {folder.pipeline!r}, expected one of {listed}"
        )
    if name not in ("auto", right):
        raise ValueError(
            f"family: found {name!r}, but {folder.path} holds a {folder.pipeline}; expected {right!r}, or auto"
        )
    return right, known[right]
