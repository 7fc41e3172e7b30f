"""`model.json`: what the weights of a model folder mean, read strictly."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from distill.files import read_json
from distill.models.boundary import Boundary
from distill.models.generator import value_range
from distill.models.spec import SamplerSpec
from distill.typed import parse

SCHEMA = 1
WEIGHTS, DESCRIPTION = "model.safetensors", "model.json"
LARGEST_SAMPLE = 2**26  # numbers; an image of 8 megapixels has 2**25


@dataclass(frozen=True)
class Weights:
    """The file of the weights, a name beside the description, and its sha256."""

    file: str
    sha256: str

    def __post_init__(self) -> None:
        if not re.fullmatch("[0-9a-f]{64}", self.sha256):
            raise ValueError(f"sha256: found {self.sha256!r}, expected 64 hexadecimal digits")


@dataclass(frozen=True)
class Description:
    """The entries of `model.json`, see docs/formats.md. `net` and `process` are configs for `models.build`."""

    schema: int
    net: dict[str, Any]
    process: dict[str, Any]
    kind: str
    sample_shape: tuple[int, ...]
    guidable: bool
    coupling: Literal["independent", "paired", "endpoint", "few_step"]
    num_classes: int
    sampler: SamplerSpec
    weights: Weights
    boundary: Boundary | None = None
    value_range: tuple[float, float] | None = None

    def __post_init__(self) -> None:
        shape = self.sample_shape
        if not shape or min(shape) < 1 or math.prod(shape) > LARGEST_SAMPLE:
            raise ValueError(
                f"sample_shape: found {list(shape)}, expected positive sizes of at most {LARGEST_SAMPLE} numbers in all"
            )
        if self.num_classes < 0:
            raise ValueError(f"num_classes: found {self.num_classes}, expected at least 0")
        if self.sampler.guidance_scale != 1 and not self.guidable:
            raise ValueError(
                f"sampler.guidance_scale: found {self.sampler.guidance_scale}, but the model is not guidable; expected 1"
            )

    @classmethod
    def read(cls, folder: Path) -> Description:
        """That of a model folder.

        Raises FileNotFoundError, or ValueError naming the file and the entry."""
        return cls.of(_contents(folder), folder / DESCRIPTION)

    @classmethod
    def of(cls, value: Any, path: Path) -> Description:
        """The contents `value` of the file `path`; raises ValueError naming it and the entry."""
        found = value.get("schema") if isinstance(value, Mapping) else type(value).__name__
        if found != SCHEMA or isinstance(found, bool):
            raise ValueError(f"{path}: schema: found {found!r}, this version reads {SCHEMA}")
        given = dict(value)
        if "sampler" in given:
            kind = given.get("kind")
            given["sampler"] = SamplerSpec.from_dict(given["sampler"], f"{path}: sampler", kind=kind)
        read = parse(cls, given, f"{path}: ")
        if "value_range" in given and given["value_range"] != (wanted := value_range(read.sample_shape)):
            raise ValueError(
                f"{path}: value_range: found {given['value_range']}, expected {wanted} of samples {list(read.sample_shape)}"
            )
        return read


def read_description(folder: Path) -> dict[str, Any]:
    """`model.json` of a model folder as plain containers, checked in every entry.

    Raises FileNotFoundError, or ValueError naming the file and the entry."""
    value = _contents(folder)
    Description.of(value, folder / DESCRIPTION)
    assert isinstance(value, dict)
    return value


def _contents(folder: Path) -> Any:
    if not folder.is_dir():
        raise FileNotFoundError(
            f"{folder}: no such folder; expected a model folder with {WEIGHTS} and {DESCRIPTION}"
        )
    if not (folder / DESCRIPTION).is_file() and (folder / "export" / DESCRIPTION).is_file():
        raise FileNotFoundError(f"{folder}: this is a run, not a model; did you mean {folder / 'export'}?")
    return read_json(folder / DESCRIPTION)
