"""The EncodeImages stage: images as latents of a teacher's autoencoder, made once a run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from hydra.utils import instantiate

from distill.cache.latent_files import MANIFEST, TYPES, LatentFiles, LatentHeader, write_latents
from distill.data.source import Source, workers_for
from distill.models.autoencoder import WEIGHTS as DECODER_WEIGHTS
from distill.models.conditions import Conditions, Labels, of_source
from distill.models.model import Model
from distill.models.native import load_model
from distill.models.prompts import FILES as PROMPT_FILES
from distill.models.prompts import Prompts
from distill.stages.base import ModelStage, Stage, StageContext, check_types
from distill.stages.encode import replaced_of
from distill.stages.made import Made, PairsMade
from distill.stages.ownership import patterns
from distill.stages.threads import use_threads

TARGET = "distill.stages.encode_images.EncodeImages"


@dataclass
class EncodeImages(Stage):
    """Encode images with the autoencoder of a teacher, for methods that read images. The expansion of a recipe inserts it
    where data with captions meet such a method.

    Attributes:
        teacher: name of the stage whose model has the autoencoder and the conditions.
        data: config of a source of images, with captions for a teacher of prompts (image i has prompt i), or classes. Its
            images are cropped and resized to what the teacher's latents decode to.
        posterior: mean, or sample: one sample of the posterior for each image, drawn once.
        dtype: of the files: float32 or bfloat16. batch_size: images a call of the encoder.
        stream: of the noise of `posterior: sample`.
    """

    REFERENCES: ClassVar[tuple[str, ...]] = ("teacher",)
    BY_CONTENT: ClassVar[tuple[str, ...]] = ("data",)
    FILES: ClassVar[tuple[str, ...]] = (
        r"latents-\d{5,}\.(safetensors|json)",
        *patterns(MANIFEST, DECODER_WEIGHTS, *PROMPT_FILES),
    )
    NEEDED: ClassVar[tuple[str, ...]] = (MANIFEST,)

    teacher: str
    data: dict[str, Any]
    posterior: str = "mean"
    dtype: str = "bfloat16"
    batch_size: int = 16
    stream: str = "latents"

    def __post_init__(self) -> None:
        check_types(self)
        for name, known in (("posterior", ("mean", "sample")), ("dtype", tuple(TYPES))):
            if (found := getattr(self, name)) not in known:
                raise ValueError(
                    f"{name}: found {found!r} (data.encode.latents.{name}), expected one of {list(known)}"
                )
        if self.batch_size < 1:
            raise ValueError(
                f"batch_size: found {self.batch_size} (data.encode.latents.batch_size), expected at least 1"
            )

    def check(self, stages: Mapping[str, Stage]) -> None:
        """The teacher is a stage that makes a model."""
        super().check(stages)
        if not isinstance(stages[self.teacher], ModelStage):
            raise ValueError(f"teacher: {self.teacher!r} makes no model; expected a stage with a model")

    def _source(self, resolution: Any = None) -> Source:
        given = dict(self.data) if resolution is None else {**self.data, "resolution": resolution}
        return instantiate(given)

    def _images(self, teacher: Model) -> Source:
        """The images in the size that the teacher's latents decode to."""
        channels, height, width = teacher.decoder.shape(teacher.sample_shape)
        found = self.data.get("resolution")
        sides = [found, found] if isinstance(found, int) else None if found is None else list(found)
        if sides not in (None, [height, width]):
            raise ValueError(
                f"data.resolution: found {found}, but the latents of {self.teacher!r} decode to {height}x{width} pixels; "
                "expected null, or teacher.resolution for another size"
            )
        source = self._source([height, width])
        if source.sample_shape[0] != channels:
            raise ValueError(
                f"data.channels: found images of {source.sample_shape[0]} channels, expected {channels}"
            )
        return source

    def fingerprint(self) -> str:
        """The digest of the images."""
        return self._source().fingerprint()

    def dry_run(self, before: Mapping[str, Made]) -> Made:
        """Read one image, and compare its size and condition with the teacher's."""
        teacher = before[self.teacher].model
        assert teacher is not None
        model = teacher.denoiser
        if not model.decoder.images:
            raise ValueError(f"teacher: {self.teacher!r} makes no images; expected an autoencoder of images")
        self._check_conditions(self._images(model), model.conditions)
        return Made(pairs=PairsMade(model.sample_shape, model.conditions, model.decoder, 1.0, has=("x0",)))

    def _check_conditions(self, source: Source, conditions: Conditions) -> None:
        if isinstance(conditions, Labels):
            conditions.accepts(of_source(source))
            if not source.num_classes:
                raise ValueError(
                    f"data.label: found no classes, but {self.teacher!r} has {conditions.words()}"
                )
        if isinstance(conditions, Prompts) and conditions.period != len(source):
            raise ValueError(
                f"data: found {len(source)} images, but {self.teacher!r} has {conditions.period} prompts; expected the "
                "captions of the images as its prompts"
            )

    def begun(self, folder: Path) -> bool:
        """Whether a shard exists."""
        return any(folder.glob("latents-*.safetensors"))

    def run(self, context: StageContext) -> dict[str, Any]:
        """Write the shards that are missing, and read them once."""
        teacher = load_model(context.inputs["teacher"]).denoiser
        source = self._images(teacher)
        self._check_conditions(source, teacher.conditions)
        use_threads(context, sum(weight.numel() for weight in teacher.decoder.weights().values()))
        header = LatentHeader.of(
            source,
            teacher.conditions,
            teacher.decoder,
            teacher.sample_shape,
            dtype=self.dtype,
            posterior=self.posterior,
            seed=context.seed,
            stream=self.stream,
        )
        with context.display.bar(len(source), unit="image") as bar:
            write_latents(
                context.folder,
                source,
                teacher.conditions,
                teacher.decoder,
                header,
                batch_size=self.batch_size,
                device=context.device,
                world=context.world,
                workers=workers_for(source, context.settings.workers),
                on_samples=bar.update,
            )
        LatentFiles(context.folder)
        return {"count": header.count, **replaced_of(source, context.world)}
