"""What a family of diffusers pipelines says of its folders, and how a folder becomes a model."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from distill.models.conditions import Conditions
from distill.models.decoder import Decoder
from distill.models.denoiser import Denoiser
from distill.models.families.core import Core, plain
from distill.models.families.schedulers import Meaning, meaning, sampled
from distill.models.families.vae import decoder_of
from distill.models.generator import Generator
from distill.models.pretrained import CONFIGS, Folder

SCHEDULER = "scheduler"


@dataclass
class Encoded:
    """Prompts as conditions.

    Attributes:
        values: name -> [n, ...], see `data.cond.Cond`. nulls: name -> [1, ...], the null condition.
        truncated: prompts that were cut at the encoder's length.
    """

    values: dict[str, Tensor]
    nulls: dict[str, Tensor] = field(default_factory=dict)
    truncated: int = 0


class Family(ABC):
    """One kind of pipeline.

    Attributes:
        pipelines: its classes in `model_index.json`. core: its net. network: the part that holds it.
        encoders: parts that make conditions of prompts -> classes that they may have; empty for families without.
        guidable: it knows a null condition.
        time_scale: see `Core`.
    """

    pipelines: tuple[str, ...]
    core: type[Core]
    network: str
    encoders: Mapping[str, tuple[str, ...]] = {}
    guidable: bool = True
    time_scale: float = 1.0

    def options(self, folder: Folder, shape: Sequence[int], constants: Mapping[str, Any]) -> dict[str, Any]:
        """Further arguments of `core`, from `constants`, inputs that never change. Raises ValueError naming `constants`."""
        if constants:
            raise ValueError(f"constants: found {dict(constants)}, but this family has no constant inputs")
        return {}

    def meaning(self, folder: Folder, shape: Sequence[int]) -> Meaning:
        """Process, prediction and sampler, from the scheduler's config."""
        folder.class_of(SCHEDULER)
        tokens = shape[-2] * shape[-1] // 4  # of the transformers whose times depend on it: patches of 2x2
        return meaning(folder.config(SCHEDULER), str(folder.path / SCHEDULER / CONFIGS[1]), tokens)

    def used_encoders(self, folder: Folder) -> Mapping[str, tuple[str, ...]]:
        """Those of `encoders` that a folder must have."""
        return self.encoders

    def pixels(self, folder: Folder) -> int:
        """Side in pixels of the image of one number of a sample's height."""
        channels = int(folder.config(self.network)["in_channels"])
        return self.decoder(folder, weights=False).shape((channels, 1, 1))[-1]

    def decoder(self, folder: Folder, *, weights: bool = True) -> Decoder:
        """What samples are; without `weights`, on the meta device."""
        return decoder_of(folder, weights=weights)

    def shape(self, folder: Folder, resolution: int | None) -> tuple[int, ...]:
        """Shape of one sample: by the network's own size, or that of images of `resolution` pixels."""
        config = folder.config(self.network)
        size = config.get("sample_size") or 0
        if resolution is not None:
            side = self.pixels(folder)
            if resolution < 1 or resolution % side:
                raise ValueError(f"resolution: found {resolution}, expected a multiple of {side}")
            size = resolution // side
        if isinstance(size, list):
            return (int(config["in_channels"]), *map(int, size))
        if size < 1:
            raise ValueError(
                f"resolution: missing; {folder.path / self.network} names no sample_size; expected the side of images "
                "in pixels"
            )
        return (int(config["in_channels"]), size, size)

    @abstractmethod
    def text(self, folder: Folder) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """name -> (shape of a row, type) of encoded prompts, without encoding any; {} for families without prompts."""

    def encode(
        self, folder: Folder, prompts: Sequence[str], negative: str, dtype: str, batch_size: int
    ) -> Encoded:
        """Encode prompts, one text encoder in memory at a time; `negative` is the null condition."""
        raise ValueError(f"prompts: {folder.path} holds a {folder.pipeline}, which takes no prompts")

    def conditions(self, folder: Folder) -> Conditions | None:
        """The conditions of models without prompts; None for those that take prompts."""
        return None

    def load(
        self,
        folder: Folder,
        conditions: Conditions,
        *,
        resolution: int | None = None,
        dtype: str = "float32",
        constants: Mapping[str, Any] | None = None,
        solver: str | None = None,
        grid: str | None = None,
        weights: bool = True,
    ) -> Generator:
        """The model of a folder; without `weights`, its net and decoder are on the meta device. For `solver` and `grid` see
        `schedulers.sampled`.

        Raises:
            ValueError, FileNotFoundError: names the part, the entry of its config, or the option.
        """
        folder.class_of(self.network, self.core.classes)
        folder.weights(self.network)
        shape, config = self.shape(folder, resolution), plain(folder.config(self.network))
        found, options = self.meaning(folder, shape), self.options(folder, shape, constants or {})
        where = folder.path / self.network / CONFIGS[0]
        try:
            with torch.device("cpu" if weights else "meta"):
                net = self.core(config, self.time_scale, dtype, **options)
            if weights:
                net.net.load_state_dict(folder.load(self.network, dtype=dtype).state_dict())
            model = Denoiser(
                net,
                found.process,
                found.kind,
                shape,
                conditions=conditions,
                guidable=self.guidable and conditions.has_null,
                decoder=self.decoder(folder, weights=weights),
            )
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from error
        file = str(folder.path / SCHEDULER / CONFIGS[1])
        sampler = sampled(found, folder.config(SCHEDULER), file, solver=solver, grid=grid)
        model.sampler = sampler
        return Generator(model.eval().requires_grad_(True), sampler)
