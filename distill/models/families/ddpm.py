"""DDPM and DDIM pipelines: an unconditional U-Net on pixels."""

from __future__ import annotations

import torch
from torch import Tensor

from distill.data.cond import Cond
from distill.models.conditions import Conditions, Nothing
from distill.models.decoder import Decoder, Pixels
from distill.models.families.core import Core
from distill.models.families.family import Family
from distill.models.pretrained import Folder


class DDPM(Core):
    """`UNet2DModel` without classes: those of diffusers have no null class."""

    classes = ("UNet2DModel",)
    bottleneck = "net.mid_block"
    fixed = {"num_class_embeds": (None,), "class_embed_type": (None,)}  # noqa: RUF012 (read only)

    def call(self, x: Tensor, t: Tensor, cond: Cond) -> Tensor:
        made: Tensor = self.net(x, t, return_dict=False)[0]
        return made[:, : x.shape[1]]


class Unconditional(Family):
    """See the module."""

    pipelines = ("DDPMPipeline", "DDIMPipeline", "PNDMPipeline")
    core, network = DDPM, "unet"
    guidable = False

    def text(self, folder: Folder) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        return {}

    def conditions(self, folder: Folder) -> Conditions | None:
        return Nothing()

    def decoder(self, folder: Folder, *, weights: bool = True) -> Decoder:
        return Pixels()


FAMILY = Unconditional()
