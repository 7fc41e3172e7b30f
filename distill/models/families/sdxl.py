"""Stable Diffusion XL: a U-Net on latents with two CLIP text encoders, a pooled state and the sizes of the image."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from distill.data.cond import Cond
from distill.models.families.core import TextUNet
from distill.models.families.family import Encoded, Family
from distill.models.families.text import CLIP, CLIP_PROJECTED, CLIP_TOKENIZER, clip_states, token_length
from distill.models.pretrained import Folder
from distill.typed import check_keys, parse

SIZES = ("original_size", "crops", "target_size")


class SDXL(TextUNet):
    """`UNet2DConditionModel` with `addition_embed_type` text_time.

    Args:
        time_ids: [original height, width, top, left of the crop, target height, width], a constant of the model.
    """

    inputs = ("context", "pooled")
    fixed = {  # noqa: RUF012 (read only)
        "addition_embed_type": ("text_time",),
        "class_embed_type": (None,),
        "encoder_hid_dim_type": (None,),
    }

    def __init__(
        self,
        config: dict[str, Any],
        time_scale: float = 1.0,
        dtype: str = "float32",
        *,
        time_ids: list[int],
        guidance_embedding: int = 0,
    ) -> None:
        if len(time_ids) != 6:
            raise ValueError(f"time_ids: found {time_ids}, expected 6 numbers")
        if config.get("addition_embed_type") is None:
            config = {**config, "addition_embed_type": "missing"}  # refused by `fixed`
        super().__init__(config, time_scale, dtype, guidance_embedding=guidance_embedding)
        self.time_ids = [float(number) for number in time_ids]

    def call(self, x: Tensor, t: Tensor, cond: Cond) -> Tensor:
        sizes = torch.tensor(self.time_ids, device=x.device, dtype=x.dtype).expand(len(x), 6)
        made: Tensor = self.net(
            x,
            t,
            encoder_hidden_states=cond.values["context"],
            timestep_cond=self.embedded(x, cond),
            added_cond_kwargs={"text_embeds": cond.values["pooled"], "time_ids": sizes},
            return_dict=False,
        )[0]
        return made


class StableDiffusionXL(Family):
    """See the module. `constants`: original_size, crops, target_size, [height, width] each; default: the image, uncropped."""

    pipelines = ("StableDiffusionXLPipeline",)
    core, network = SDXL, "unet"
    encoders = {  # noqa: RUF012 (read only)
        **{"tokenizer": CLIP_TOKENIZER, "text_encoder": CLIP},
        **{"tokenizer_2": CLIP_TOKENIZER, "text_encoder_2": CLIP_PROJECTED},
    }

    def options(self, folder: Folder, shape: Sequence[int], constants: Mapping[str, Any]) -> dict[str, Any]:
        check_keys(constants, SIZES, "constants")
        size = list(self.decoder(folder, weights=False).shape(shape)[1:])
        default = {"original_size": size, "crops": [0, 0], "target_size": size}
        given = {
            name: list(parse(tuple[int, int], constants[name], f"constants.{name}"))
            for name in SIZES
            if name in constants
        }
        return {"time_ids": [number for name in SIZES for number in (default | given)[name]]}

    def text(self, folder: Folder) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        first, second = folder.config("text_encoder"), folder.config("text_encoder_2")
        width = int(first["hidden_size"]) + int(second["hidden_size"])
        return {
            "context": ((token_length(folder, "tokenizer"), width), torch.float32),
            "pooled": ((int(second["projection_dim"]),), torch.float32),
        }

    def encode(
        self, folder: Folder, prompts: Sequence[str], negative: str, dtype: str, batch_size: int
    ) -> Encoded:
        states = [
            clip_states(
                folder, suffix, prompts=[*prompts, negative], dtype=dtype, batch_size=batch_size, hidden=True
            )
            for suffix in ("", "_2")
        ]
        context = torch.cat([each.penultimate for each in states if each.penultimate is not None], -1)
        pooled = states[1].pooled
        assert pooled is not None
        # The pipeline's null condition is zeros, unless a negative prompt is given.
        keep = float(bool(negative) or not folder.index.get("force_zeros_for_empty_prompt", True))
        return Encoded(
            {"context": context[:-1], "pooled": pooled[:-1]},
            {"context": keep * context[-1:], "pooled": keep * pooled[-1:]},
            int((states[0].cut | states[1].cut)[:-1].sum()),
        )


FAMILY = StableDiffusionXL()
