"""FLUX.1 dev and schnell: a transformer on packed latents, a flow, with CLIP's pooled state and a T5 encoder."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from distill.data.cond import Cond
from distill.models.families.core import Core
from distill.models.families.family import Encoded, Family
from distill.models.families.schedulers import Meaning
from distill.models.families.text import CLIP, CLIP_TOKENIZER, T5, T5_TOKENIZER, clip_states, t5_states
from distill.models.pretrained import Folder
from distill.typed import check_keys, parse

GUIDANCE = 3.5  # the pipeline's default
LENGTHS = {True: 512, False: 256}  # T5 tokens of dev and of schnell
SCHNELL_STEPS = 4


class Flux(Core):
    """`FluxTransformer2DModel`.

    Args:
        guidance: the constant guidance input of networks with `guidance_embeds` (dev), null for others. It is no input of a
            student, as the w of latent consistency is.
    """

    classes = ("FluxTransformer2DModel",)
    guidance_blocks = {"embedding": ["time_text_embed"], "attention": ["attn"], "offset": ["attn"]}  # noqa: RUF012 (read only)
    inputs = ("context", "pooled")

    def __init__(
        self,
        config: dict[str, Any],
        time_scale: float = 1.0,
        dtype: str = "float32",
        *,
        guidance: float | None = None,
    ) -> None:
        if bool(config.get("guidance_embeds")) != (guidance is not None):
            takes = "takes" if config.get("guidance_embeds") else "does not take"
            raise ValueError(f"guidance: found {guidance}, but the network {takes} the guidance as an input")
        super().__init__(config, time_scale, dtype)
        self.guidance = guidance
        self.bottleneck = f"net.transformer_blocks.{int(config['num_layers']) // 2}"

    def call(self, x: Tensor, t: Tensor, cond: Cond) -> Tensor:
        batch, channels, height, width = x.shape
        rows, columns = height // 2, width // 2
        # [B,C,2r,2c] -> [B,rc,4C]: a token for each patch of 2x2.
        tokens = x.reshape(batch, channels, rows, 2, columns, 2).permute(0, 2, 4, 1, 3, 5)
        context = cond.values["context"]
        places = torch.zeros(rows, columns, 3, device=x.device, dtype=x.dtype)
        places[..., 1] = torch.arange(rows, device=x.device)[:, None]
        places[..., 2] = torch.arange(columns, device=x.device)[None]
        guidance = None if self.guidance is None else torch.full((batch,), self.guidance, device=x.device)
        made: Tensor = self.net(
            hidden_states=tokens.reshape(batch, rows * columns, 4 * channels),
            timestep=t,
            guidance=guidance,
            pooled_projections=cond.values["pooled"],
            encoder_hidden_states=context,
            txt_ids=torch.zeros(context.shape[1], 3, device=x.device, dtype=x.dtype),
            img_ids=places.reshape(rows * columns, 3),
            return_dict=False,
        )[0]
        made = made.reshape(batch, rows, columns, channels, 2, 2).permute(0, 3, 1, 4, 2, 5)
        return made.reshape(batch, channels, height, width)


class FluxFamily(Family):
    """See the module. `constants`: guidance, of networks that take it (dev)."""

    pipelines = ("FluxPipeline",)
    core, network = Flux, "transformer"
    encoders = {  # noqa: RUF012 (read only)
        **{"tokenizer": CLIP_TOKENIZER, "text_encoder": CLIP},
        **{"tokenizer_2": T5_TOKENIZER, "text_encoder_2": T5},
    }
    guidable = False

    def _embeds(self, folder: Folder) -> bool:
        return bool(folder.config(self.network).get("guidance_embeds"))

    def options(self, folder: Folder, shape: Sequence[int], constants: Mapping[str, Any]) -> dict[str, Any]:
        check_keys(constants, ("guidance",), "constants")
        if not self._embeds(folder):
            if constants:
                raise ValueError(
                    "constants.guidance: found a number, but this network takes no guidance (schnell); expected none"
                )
            return {}
        return {"guidance": parse(float, constants.get("guidance", GUIDANCE), "constants.guidance")}

    def meaning(self, folder: Folder, shape: Sequence[int]) -> Meaning:
        found = super().meaning(folder, shape)
        if self._embeds(folder):
            return found
        return replace(found, sampler=replace(found.sampler, steps=SCHNELL_STEPS))

    def shape(self, folder: Folder, resolution: int | None) -> tuple[int, ...]:
        channels = int(folder.config("vae")["latent_channels"])
        side = self.decoder(folder, weights=False).shape((channels, 1, 1))[-1]
        if int(folder.config(self.network)["in_channels"]) != 4 * channels:
            raise ValueError(
                f"{folder.path / self.network}: in_channels: expected {4 * channels}, four times the VAE's channels"
            )
        if resolution is None:
            raise ValueError(
                "resolution: missing; this network takes any; expected the side of images in pixels, such as 1024"
            )
        if resolution < 1 or resolution % (2 * side):
            raise ValueError(f"resolution: found {resolution}, expected a multiple of {2 * side}")
        return (channels, resolution // side, resolution // side)

    def text(self, folder: Folder) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        width = int(folder.config("text_encoder_2")["d_model"])
        return {
            "context": ((LENGTHS[self._embeds(folder)], width), torch.float32),
            "pooled": ((int(folder.config("text_encoder")["hidden_size"]),), torch.float32),
        }

    def encode(
        self, folder: Folder, prompts: Sequence[str], negative: str, dtype: str, batch_size: int
    ) -> Encoded:
        if negative:
            raise ValueError(f"negative: found {negative!r}, but FLUX has no null condition; expected none")
        clip = clip_states(folder, "", prompts=prompts, dtype=dtype, batch_size=batch_size)
        length = LENGTHS[self._embeds(folder)]
        long = t5_states(
            folder, "_2", prompts=prompts, length=length, dtype=dtype, batch_size=batch_size, masked=False
        )
        assert clip.pooled is not None
        return Encoded({"context": long.last, "pooled": clip.pooled}, {}, int(long.cut.sum()))


FAMILY = FluxFamily()
