"""Stable Diffusion 1.x and 2.x: a U-Net on latents with the hidden states of one CLIP text encoder."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from distill.data.cond import Cond
from distill.models.families.core import TextUNet
from distill.models.families.family import Encoded, Family
from distill.models.families.text import CLIP, CLIP_TOKENIZER, clip_states, token_length
from distill.models.pretrained import Folder


class SD(TextUNet):
    """`UNet2DConditionModel` with text alone."""

    inputs = ("context",)
    fixed = {  # noqa: RUF012 (read only)
        "addition_embed_type": (None,),
        "class_embed_type": (None,),
        "encoder_hid_dim_type": (None,),
    }

    def call(self, x: Tensor, t: Tensor, cond: Cond) -> Tensor:
        made: Tensor = self.net(
            x,
            t,
            encoder_hidden_states=cond.values["context"],
            timestep_cond=self.embedded(x, cond),
            return_dict=False,
        )[0]
        return made


class StableDiffusion(Family):
    """See the module."""

    pipelines = ("StableDiffusionPipeline",)
    core, network = SD, "unet"
    encoders = {"tokenizer": CLIP_TOKENIZER, "text_encoder": CLIP}  # noqa: RUF012 (read only)

    def text(self, folder: Folder) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        width = int(folder.config("text_encoder")["hidden_size"])
        return {"context": ((token_length(folder, "tokenizer"), width), torch.float32)}

    def encode(
        self, folder: Folder, prompts: Sequence[str], negative: str, dtype: str, batch_size: int
    ) -> Encoded:
        states = clip_states(folder, "", prompts=[*prompts, negative], dtype=dtype, batch_size=batch_size)
        truncated = int(states.cut[:-1].sum())
        return Encoded({"context": states.last[:-1]}, {"context": states.last[-1:]}, truncated)


FAMILY = StableDiffusion()
