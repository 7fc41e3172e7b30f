"""`model.json`: what the weights of a model folder mean, read strictly."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from distill.files import read_json
from distill.models.conditions import classes
from distill.models.decoder import Decoder, Pixels, Points
from distill.models.spec import SamplerSpec
from distill.models.weights import FLOATS, WEIGHTS
from distill.typed import parse

SCHEMA = 2
DESCRIPTION = "model.json"
DENOISER = "distill.models.denoiser.Denoiser"


@dataclass(frozen=True)
class Weights:
    """The file of the weights or their index, a name beside the description, its sha256, and, where they are stored in another
    float type than the net's, that type: they are converted without a warning. None: not said."""

    file: str
    sha256: str
    dtype: str | None = None

    def __post_init__(self) -> None:
        if self.dtype not in (None, *FLOATS.values()):
            raise ValueError(f"dtype: found {self.dtype!r}, expected one of {list(FLOATS.values())}")
        if not re.fullmatch("[0-9a-f]{64}", self.sha256):
            raise ValueError(f"sha256: found {self.sha256!r}, expected 64 hexadecimal digits")


@dataclass(frozen=True)
class Base:
    """The model that the weights are an adapter of.

    Attributes:
        folder: its model folder, from the one of the description. sha256: of its weights file.
    """

    folder: str
    sha256: str


@dataclass(frozen=True)
class Description:
    """The entries of `model.json`, see docs/formats.md.

    Attributes:
        model: `Model.config()`, which `models.build.build_model` makes the model from.
        base: of an adapter's weights; None for a whole model.
    """

    schema: int
    sampler: SamplerSpec
    weights: Weights
    model: dict[str, Any]
    base: Base | None = None

    @classmethod
    def read(cls, folder: Path) -> Description:
        """That of a model folder, of this schema or an older one.

        Raises FileNotFoundError, or ValueError naming the file and the entry; the entries of `model` are checked
        by `models.build.build_model`."""
        path, value = folder / DESCRIPTION, _contents(folder)
        found = value.get("schema") if isinstance(value, Mapping) else type(value).__name__
        if found not in (1, SCHEMA) or isinstance(found, bool):
            raise ValueError(f"{path}: schema: found {found!r}, this version reads {SCHEMA}")
        own = {key: value[key] for key in ("schema", "sampler", "weights", "base") if key in value}
        model = {key: entry for key, entry in value.items() if key not in own}
        if "sampler" in own:
            kind = model.get("kind")
            own["sampler"] = SamplerSpec.from_dict(own["sampler"], f"{path}: sampler", kind=kind)
        model = _of_schema_1(model, f"{path}: ") if found == 1 else model
        return parse(cls, own | {"model": model}, f"{path}: ")


def decoder_of_schema_1(sample_shape: Any) -> Decoder:
    """What the samples of files of schema 1 are: pixels where they have three dimensions, else points."""
    return Pixels() if isinstance(sample_shape, list | tuple) and len(sample_shape) == 3 else Points()


def _of_schema_1(model: dict[str, Any], where: str) -> dict[str, Any]:
    """The model's config from a file of schema 1: it had `num_classes`, and `value_range`, which followed from the shape."""
    if "num_classes" not in model:
        raise ValueError(f"{where}num_classes: missing; expected int")
    count = parse(int, model.pop("num_classes"), f"{where}num_classes")
    if count < 0:
        raise ValueError(f"{where}num_classes: found {count}, expected at least 0")
    shape = parse(list[int], model.get("sample_shape"), f"{where}sample_shape")
    decoder = decoder_of_schema_1(shape)
    wanted = None if decoder.range is None else list(decoder.range)
    if (found := model.pop("value_range", wanted)) != wanted:
        raise ValueError(f"{where}value_range: found {found}, expected {wanted} of samples {shape}")
    if unknown := {"conditions", "decoder", "_target_"} & set(model):
        raise ValueError(f"{where}{min(unknown)}: found in a file of schema 1, expected none")
    new = {"_target_": DENOISER, "conditions": classes(count).config(), "decoder": decoder.config()}
    return {"boundary": None} | model | new


def _contents(folder: Path) -> Any:
    if not folder.is_dir():
        raise FileNotFoundError(
            f"{folder}: no such folder; expected a model folder with {WEIGHTS} and {DESCRIPTION}"
        )
    if not (folder / DESCRIPTION).is_file() and (folder / "export" / DESCRIPTION).is_file():
        raise FileNotFoundError(f"{folder}: this is a run, not a model; did you mean {folder / 'export'}?")
    return read_json(folder / DESCRIPTION)
