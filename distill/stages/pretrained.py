"""The Pretrained stage: a pipeline's folder of diffusers as a model of the run."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, ClassVar

from distill.engine.memory import Memory, decoder_row, network_row
from distill.models.conditions import Conditions
from distill.models.families import family_of
from distill.models.families.vae import PART as VAE
from distill.models.generator import Generator
from distill.models.native import load_model, save_model
from distill.models.pretrained import DTYPES, Folder
from distill.models.prompts import Prompts
from distill.stages.base import ModelStage, Stage, StageContext, check_types
from distill.stages.encode import Encode
from distill.stages.made import Made

TARGET = "distill.stages.pretrained.Pretrained"


@dataclass
class Pretrained(ModelStage):
    """Load a diffusers pipeline: its network as the model's net, its VAE as the decoder, the meaning from its scheduler.

    Attributes:
        path: the pipeline's folder.
        family: auto, or the name of a file of `models.families`: another pipeline is refused.
        prompts: name of an `Encode` stage, for families with a text encoder. (In recipes the config of the prompts, which the
            expansion replaces.)
        negative: prompt of the null condition, used by that stage.
        resolution: side of the images in pixels; None: the network's own.
        variant: of the weights' files: fp16 for model.fp16.safetensors; None: those without.
        dtype: of the network's weights: float32, bfloat16 or float16.
        constants: constant inputs of the family.
        solver: of the teacher's sampler; None: ddim, or euler for flows.
        grid: None: trailing times, or the shifted times of flows; scheduler: those of the solver's scheduler in diffusers, with
            the options of the folder's.
    """

    REFERENCES: ClassVar[tuple[str, ...]] = ("prompts",)

    path: str
    family: str = "auto"
    prompts: str | None = None
    negative: str = ""
    resolution: int | None = None
    variant: str | None = None
    dtype: str = "float32"
    constants: dict[str, Any] = field(default_factory=dict)
    solver: str | None = None
    grid: str | None = None

    def __post_init__(self) -> None:
        check_types(self)
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype: found {self.dtype!r}, expected one of {', '.join(DTYPES)}")

    def check(self, stages: Mapping[str, Stage]) -> None:
        """Prompts come from an Encode stage."""
        super().check(stages)
        if self.prompts is not None and not isinstance(stages[self.prompts], Encode):
            raise ValueError(f"prompts: {self.prompts!r} encodes no prompts")

    def fingerprint(self) -> str:
        """Of the network, its scheduler and the VAE."""
        folder = Folder(self.path, self.variant)
        _, family = family_of(folder, self.family)
        parts = [part for part in (family.network, "scheduler", VAE) if part in folder]
        return folder.digest(parts)

    def dry_run(self, before: Mapping[str, Made]) -> Made:
        """Build the model without weights. Raises ValueError for a family that takes prompts, without them."""
        made = None if self.prompts is None else before[self.prompts].pairs
        model = self._load(None if made is None else made.conditions, weights=False)
        denoiser = model.denoiser
        rows = [network_row("network", denoiser.net), decoder_row(denoiser.decoder.weights())]
        return Made(model=model, memory=Memory([row for row in rows if row is not None]))

    def run(self, context: StageContext) -> dict[str, Any]:
        """Save the model folder, and load it once."""
        if context.world.main:
            prompts = None if self.prompts is None else Prompts.of_folder(context.inputs["prompts"])
            loaded = self._load(prompts)
            save_model(context.folder, loaded.denoiser, loaded.spec, file_bytes=context.settings.file_bytes)
        context.world.barrier()
        load_model(context.folder)
        return {"train_seconds": None, "peak_memory_bytes": None}

    def _load(self, prompts: Conditions | None, *, weights: bool = True) -> Generator:
        folder = Folder(self.path, self.variant)
        _, family = family_of(folder, self.family)
        conditions = family.conditions(folder) or prompts
        if conditions is None:
            raise ValueError(
                f"prompts: missing; {folder.path} holds a {folder.pipeline}, which takes prompts: "
                "data=prompts data.path=FILE"
            )
        return family.load(
            folder,
            conditions,
            resolution=self.resolution,
            dtype=self.dtype,
            constants=self.constants,
            solver=self.solver,
            grid=self.grid,
            weights=weights,
        )


def has_autoencoder(config: Mapping[str, Any]) -> bool:
    """Whether the pipeline of a stage's config works on latents; False for a folder that cannot be read, which the stage
    reports itself."""
    with suppress(OSError, ValueError, KeyError):
        return VAE in Folder(config["path"], config.get("variant"))
    return False
