"""Train a tokenizer on images: the first stage of Distilled Decoding's embedded teacher.

van den Oord et al. 2017 (arXiv 1711.00937): the images are encoded, every position is replaced by its nearest code, and
decoded; the loss is |x - decoded|^2 + |sg(z) - e|^2 + beta |z - sg(e)|^2 (eq. 3), with gradients through the look-up
(straight-through).

What the loss should look like: it falls within some hundred steps to the reconstruction error that the codebook allows (.015 a
pixel on the digits); `codes_used` grows to most of the codebook. A share that stays small means that codes are dead.

Deviations: no discriminator and no perceptual loss, which LlamaGen's and VAR's tokenizers have (they are for large images). The
codebook is trained by the second term, as in LlamaGen; the paper's appendix has moving averages. Codes that no vector of a
batch is nearest to are drawn to the vector that is nearest to them, with weight `revive` (ours: else some stay where they
began).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from distill.data.batch import Batch
from distill.data.rng import Draws, stream_key
from distill.engine.module import DistillModule
from distill.engine.update import Diagnostics, Loss, Step, Update
from distill.methods.losses.tokens import look_up_losses
from distill.models.generator import Generator
from distill.models.model import Model
from distill.models.result import Result
from distill.models.spec import SamplerSpec
from distill.models.tokens import Tokenizer as TokenizerModel
from distill.nets.tokenizer import LookUp


class Tokenizer(DistillModule):
    """A VQ-VAE.

    Args:
        student: the tokenizer.
        commitment: beta, the weight of the encoder's distance to its codes.
        revive: weight of the distance of codes to their nearest vectors, for codes that a sample does not use.
    """

    MODELS: ClassVar[tuple[type[Model], ...]] = (TokenizerModel,)
    reads = ("x0",)

    def __init__(self, student: Model, *, commitment: float = 0.25, revive: float = 0.1) -> None:
        super().__init__(student)
        for name, weight in (("commitment", commitment), ("revive", revive)):
            if not weight >= 0:
                raise ValueError(f"{name}: found {weight}, expected at least 0")
        self.commitment, self.revive = commitment, revive

    def updates(self) -> Sequence[Update]:
        """One update: encoder, decoder and codebook."""
        return [Update("student", {"student": self.student}, self.loss)]

    def result(self) -> Result:
        """It makes no samples: the sampler is a form."""
        return Result(SamplerSpec(steps=1, times={1: (1.0, 0.0)}), "endpoint")

    def loss(self, batch: Batch, step: Step) -> Loss:
        """arXiv 1711.00937, eq. 3."""
        assert batch.x0 is not None
        found = self._looked_up(self.student.net, batch)
        error = (found.images - batch.x0).square().flatten(1).mean(1)
        book, commit = look_up_losses(found.vectors, found.codes, self.commitment)
        total = error + book + commit + self.revive * found.idle
        return Loss(total.mean(), {"reconstruction": error.mean(), "codes_used": self._used(found)})

    @staticmethod
    def _looked_up(net: Any, batch: Batch) -> LookUp:
        images = batch.x0
        assert images is not None
        found: LookUp = net(images, images.new_zeros(len(images)), batch.cond, parts=True)
        return found

    def _used(self, found: LookUp) -> Tensor:
        """Share of the codebook that a batch uses."""
        net: Any = self.student.net
        return found.images.new_zeros(net.vocabulary).scatter(0, found.index.flatten(), 1.0).mean()

    def diagnostics(self, batch: Batch, draws: Draws) -> Diagnostics:
        """Reconstructed images, their error, and the share of codes that they use."""
        assert batch.x0 is not None
        found = self._looked_up(self.best().net, batch)
        scalars = {
            "reconstruction": (found.images - batch.x0).square().mean(),
            "codes_used": self._used(found),
        }
        return Diagnostics(scalars, [("data", batch.x0), ("reconstructed", found.images)])

    @torch.no_grad()
    def monitored(self, generator: Generator, source: Any, ids: Tensor, seed: int, stream: str) -> Tensor:
        """Reconstructed images of the data, so that a monitor's `fd` is that of the reconstruction."""
        seeded = torch.Generator("cpu").manual_seed(stream_key(seed, stream) % 2**63)
        rows = torch.randperm(len(source), generator=seeded)[ids % len(source)]  # data often have an order
        batch = source.fetch(rows, rows).to(generator.device)
        made = generator.denoiser.x0(batch.x0, batch.x0.new_zeros(len(ids)), batch.cond)
        return generator.decoded(made)
