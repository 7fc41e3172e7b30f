"""The Encode stage: prompts as conditions of a pipeline's text encoders, made once a run."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import torch
from hydra.utils import instantiate

from distill.cache.latent_files import MANIFEST as LATENTS
from distill.cache.latent_files import LatentFiles
from distill.cache.pairs import MANIFEST, Pairs
from distill.cache.tokens import TOKENS, Tokens
from distill.data.machine import machine_memory
from distill.data.prompts import Prompts as PromptFile
from distill.data.source import Replacing, Source
from distill.engine.memory import Memory, Size, stored_row
from distill.files import canonical_json, sha256_text
from distill.models.decoder import Points
from distill.models.families import family_of
from distill.models.pretrained import DTYPES, Folder
from distill.models.prompts import (
    DESCRIPTION,
    TENSORS,
    Prompts,
    PromptSource,
    Table,
    TextEncoders,
    read_table,
    write_table,
)
from distill.models.weights import FLOATS, stored_tensors
from distill.stages.base import Stage, StageContext, check_types
from distill.stages.made import Made, PairsMade
from distill.stages.ownership import patterns
from distill.typed import unknown_key
from distill.world import World

TARGET = "distill.stages.encode.Encode"
PROMPTS = "distill.data.prompts.Prompts"


class Captions:
    """The captions of a source of images as prompts."""

    def __init__(self, source: Any) -> None:
        self.source = source

    def __len__(self) -> int:
        return len(self.source)

    @cached_property
    def prompts(self) -> list[str]:
        """One an image."""
        found: list[str] = self.source.captions()
        return found

    def fingerprint(self) -> str:
        """Of the images and their captions."""
        found: str = self.source.fingerprint()
        return found


@dataclass
class Encode(Stage):
    """Encode prompts with the text encoders of a pipeline. The expansion of a recipe inserts it.

    Attributes:
        path: the pipeline's folder.
        prompts: config of a `data.prompts.Prompts`, or of a source of images with `captions()`.
        negative: the prompt of the null condition.
        resolution, variant: see `stages.pretrained.Pretrained`.
        dtype: of the encoders' weights. batch_size: prompts a call. (In recipes: `data.encoder_dtype` and
            `data.encoder_batch_size`, of images with captions `data.encode.dtype` and `data.encode.batch_size`.)
    """

    FILES: ClassVar[tuple[str, ...]] = patterns(DESCRIPTION, TENSORS)
    NEEDED: ClassVar[tuple[str, ...]] = (DESCRIPTION, TENSORS)
    BY_CONTENT: ClassVar[tuple[str, ...]] = ("prompts",)

    path: str
    prompts: dict[str, Any]
    negative: str = ""
    resolution: int | None = None
    variant: str | None = None
    dtype: str = "float32"
    batch_size: int = 64

    def __post_init__(self) -> None:
        check_types(self)
        if self.dtype not in DTYPES:
            raise ValueError(
                f"dtype: found {self.dtype!r} (data.encoder_dtype), expected one of {', '.join(DTYPES)}"
            )
        if self.batch_size < 1:
            raise ValueError(
                f"batch_size: found {self.batch_size} (data.encoder_batch_size), expected at least 1"
            )

    def _file(self) -> PromptFile | Captions:
        options = {key: value for key, value in self.prompts.items() if key != "_target_"}
        if self.prompts.get("_target_", PROMPTS) != PROMPTS:
            return Captions(instantiate(self.prompts))
        known = ("path", "key", "limit")
        if unknown := [key for key in options if key not in known]:
            raise ValueError(unknown_key("data", unknown[0], known))
        try:
            return PromptFile(**options)
        except (ValueError, OSError) as error:
            raise type(error)(f"data.{error}") from error

    def fingerprint(self) -> str:
        """The digests of the prompts and of the text encoders, and the shapes of samples and conditions."""
        folder = Folder(self.path, self.variant)
        _, family = family_of(folder)
        encoders = TextEncoders.of(folder, self.negative, self.dtype)
        shapes = {name: shape for name, (shape, _) in family.text(folder).items()}
        shapes |= {"sample": family.shape(folder, self.resolution)}
        return f"{self._file().fingerprint()} {encoders.sha256} {sha256_text(canonical_json(shapes))}"

    def dry_run(self, before: Mapping[str, Made]) -> Made:
        """Read the prompts; conditions of zeros have the shapes of the encoded ones."""
        file, folder = self._file(), Folder(self.path, self.variant)
        _, family = family_of(folder)
        TextEncoders.of(folder, self.negative, self.dtype)
        shapes = family.text(folder)
        self._check_memory(
            len(file), sum(math.prod(shape) * dtype.itemsize for shape, dtype in shapes.values())
        )
        prompts = file.prompts
        values = {
            name: torch.zeros(1, *shape, dtype=dtype).expand(len(prompts), *shape)
            for name, (shape, dtype) in shapes.items()
        }
        nulls = {name: value[:1] for name, value in values.items()} if family.guidable else {}
        shape = family.shape(folder, self.resolution)
        conditions = Prompts.of_table(Table(prompts, values, nulls, shape))
        width = DTYPES[self.dtype].itemsize
        rows = [
            stored_row(part, [Size(shape, width, sharded=False) for shape in weights_shapes(folder, part)])
            for part in family.used_encoders(folder)
            if part.startswith("text_encoder")
        ]
        pairs = PairsMade(shape, conditions, Points(), 1.0, has=())
        return Made(pairs=pairs, memory=Memory(rows, alternate=True))

    def _check_memory(self, count: int, row: int) -> None:
        """Raise ValueError where `count` encoded prompts of `row` bytes, which stay in memory while a stage uses them, take
        more than half of this machine's."""
        if (total := count * row) > (memory := machine_memory()) // 2:
            raise ValueError(
                f"data.limit: found {self.prompts.get('limit')}: {count} encoded prompts take {total} bytes, {row} each, and "
                f"this machine has {memory} bytes of memory; expected at most {memory // 2 // row} prompts"
            )

    def run(self, context: StageContext) -> dict[str, Any]:
        """Encode on the main process, on the CPU, and write the folder."""
        prompts, folder = self._file().prompts, Folder(self.path, self.variant)
        _, family = family_of(folder)
        if context.world.main:
            source = TextEncoders.of(folder, self.negative, self.dtype)
            encoded = source.encode(prompts, self.batch_size)
            if not all(
                bool(value.isfinite().all())
                for value in (*encoded.values.values(), *encoded.nulls.values())
                if value.is_floating_point()
            ):
                raise ValueError(
                    f"dtype: {self.dtype} makes conditions that are not finite; expected float32"
                )
            write_table(context.folder, prompts, source, encoded, family.shape(folder, self.resolution))
            if encoded.truncated:
                context.display.line(
                    f"{encoded.truncated} of {len(prompts)} prompts are longer than the text encoder reads and were cut"
                )
        context.world.barrier()
        return {"count": len(prompts), "truncated": read_table(context.folder).truncated}


def weights_shapes(folder: Folder, part: str) -> list[tuple[int, ...]]:
    """Shapes of the weights of a part, from the headers of its files; without numbers of tokens, which are no weights."""
    return [
        shape
        for file in folder.weights(part)
        for shape, dtype in stored_tensors(file).values()
        if dtype in FLOATS
    ]


def source_of(data: str | Mapping[str, Any], inputs: Mapping[str, Path]) -> Source:
    """The training data of a stage: the tokens, latents, pairs or prompts of its input `data`, or the source of a config."""
    if not isinstance(data, str):
        return instantiate(data)
    readers: dict[str, Callable[[Path], Source]] = {TOKENS: Tokens, LATENTS: LatentFiles, MANIFEST: Pairs}
    for name, reader in readers.items():
        if (inputs["data"] / name).is_file():
            return reader(inputs["data"])
    return PromptSource(inputs["data"])


def replaced_of(source: Source, world: World) -> dict[str, int]:
    """Broken samples that others were read for, over all processes, since the last start; empty for sources that count none."""
    if not isinstance(source, Replacing):
        return {}
    counts = world.gather(source.replaced)
    return {"replaced": sum(counts or [])}
