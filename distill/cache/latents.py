"""Latents as training data: the samples of another source, encoded once by a frozen autoencoder."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from distill.data.batch import Batch
from distill.data.plain import plain_torch
from distill.data.source import Source
from distill.files import canonical_json
from distill.models.autoencoder import entry_of, load_autoencoder
from distill.models.conditions import of_source
from distill.models.decoder import Decoder

BATCH = 256  # samples that are encoded at once


class Latents:
    """The latents of `images` under an autoencoder; models that are trained on them decode their samples with it.

    Args:
        images: a source of images.
        autoencoder: a folder that `models.autoencoder.save_autoencoder` wrote: decoder.json and decoder.safetensors.

    They are encoded when the first batch is fetched, and kept in memory. Raises ValueError naming `autoencoder` where it does
    not take the images, or makes latents that are not finite.
    """

    def __init__(self, images: Source, autoencoder: str | Path) -> None:
        self.decoded, self.decoder = images, load_autoencoder(autoencoder)
        self._latents: Tensor | None = None
        self.conditions = of_source(images)
        self.num_classes = self.conditions.num_classes
        try:
            self.sample_shape = tuple(
                _encoded(self.decoded, self.decoder, torch.zeros(1, dtype=torch.int64)).shape[1:]
            )
            decoded = self.decoder.shape(self.sample_shape)
        except (ValueError, RuntimeError) as error:
            raise ValueError(f"autoencoder: {autoencoder} does not encode the data: {error}") from error
        if decoded != tuple(images.sample_shape):
            raise ValueError(
                f"autoencoder: {autoencoder} decodes samples of shape {list(decoded)}, the data have "
                f"{list(images.sample_shape)}"
            )

    def __len__(self) -> int:
        return len(self.decoded)

    def fetch(self, rows: Tensor, index: Tensor) -> Batch:
        """The latents at `rows` with the conditions and the ids of the images."""
        if self._latents is None:
            self._latents = _all(self.decoded, self.decoder, self.fingerprint())
        return replace(self.decoded.fetch(rows, index), x0=self._latents[rows])

    def fingerprint(self) -> str:
        """sha256 over the images and the autoencoder."""
        text = f"{self.decoded.fingerprint()} {canonical_json(entry_of(self.decoder))}"
        return hashlib.sha256(text.encode()).hexdigest()


_latents: dict[
    str, Tensor
] = {}  # of the last source, by fingerprint: a run makes the same source for every stage


def _all(source: Source, decoder: Decoder, digest: str) -> Tensor:
    """All latents [n,*S]."""
    if digest not in _latents:
        rows = torch.arange(len(source), device="cpu")
        latents = torch.cat([_encoded(source, decoder, part) for part in rows.split(BATCH)])
        if not bool(latents.isfinite().all()):
            raise ValueError("autoencoder: makes latents that are not finite")
        _latents.clear()
        _latents[digest] = latents
    return _latents[digest]


@plain_torch()
@torch.no_grad()
def _encoded(source: Source, decoder: Decoder, rows: Tensor) -> Tensor:
    x0 = source.fetch(rows, rows).x0
    if x0 is None:
        raise ValueError("images: the source has no images")
    return decoder.encode(x0)
