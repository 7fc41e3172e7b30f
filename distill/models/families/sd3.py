"""Stable Diffusion 3 and 3.5: a joint transformer, a flow on latents, with two CLIP encoders and a T5 encoder."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from distill.data.cond import Cond
from distill.models.families.core import Core
from distill.models.families.family import Encoded, Family
from distill.models.families.text import (
    CLIP_PROJECTED,
    CLIP_TOKENIZER,
    T5,
    T5_TOKENIZER,
    clip_states,
    t5_states,
    token_length,
)
from distill.models.pretrained import INDEX, Folder

T5_LENGTH = 256
OPTIONAL = {"tokenizer_3": T5_TOKENIZER, "text_encoder_3": T5}


class SD3(Core):
    """`SD3Transformer2DModel`."""

    classes = ("SD3Transformer2DModel",)
    guidance_blocks = {"embedding": ["time_text_embed"], "attention": ["attn"], "offset": ["attn"]}  # noqa: RUF012 (read only)
    inputs = ("context", "pooled")

    def __init__(self, config: dict[str, Any], time_scale: float = 1.0, dtype: str = "float32") -> None:
        super().__init__(config, time_scale, dtype)
        self.bottleneck = f"net.transformer_blocks.{int(config['num_layers']) // 2}"

    def call(self, x: Tensor, t: Tensor, cond: Cond) -> Tensor:
        made: Tensor = self.net(
            hidden_states=x,
            timestep=t,
            encoder_hidden_states=cond.values["context"],
            pooled_projections=cond.values["pooled"],
            return_dict=False,
        )[0]
        return made


class StableDiffusion3(Family):
    """See the module; a pipeline without T5 has zeros in its place."""

    pipelines = ("StableDiffusion3Pipeline",)
    core, network = SD3, "transformer"
    encoders = {  # noqa: RUF012 (read only)
        **{"tokenizer": CLIP_TOKENIZER, "text_encoder": CLIP_PROJECTED},
        **{"tokenizer_2": CLIP_TOKENIZER, "text_encoder_2": CLIP_PROJECTED},
        **OPTIONAL,
    }
    time_scale = 1000.0

    def used_encoders(self, folder: Folder) -> Mapping[str, tuple[str, ...]]:
        used = {
            part: classes for part, classes in self.encoders.items() if part not in OPTIONAL or part in folder
        }
        if len(missing := [part for part in OPTIONAL if part not in used]) == 1:
            raise ValueError(
                f"{folder.path / INDEX}: {missing[0]}: missing; expected both of {', '.join(OPTIONAL)}, or none"
            )
        return used

    def text(self, folder: Folder) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        pooled = sum(int(folder.config(f"text_encoder{suffix}")["projection_dim"]) for suffix in ("", "_2"))
        length = token_length(folder, "tokenizer") + T5_LENGTH
        return {
            "context": ((length, self._width(folder)), torch.float32),
            "pooled": ((pooled,), torch.float32),
        }

    def _width(self, folder: Folder) -> int:
        return int(folder.config(self.network)["joint_attention_dim"])

    def encode(
        self, folder: Folder, prompts: Sequence[str], negative: str, dtype: str, batch_size: int
    ) -> Encoded:
        given = [*prompts, negative]
        states = [
            clip_states(folder, suffix, prompts=given, dtype=dtype, batch_size=batch_size, hidden=True)
            for suffix in ("", "_2")
        ]
        clip = torch.cat([each.penultimate for each in states if each.penultimate is not None], -1)
        width, cut = self._width(folder), states[0].cut | states[1].cut
        if "text_encoder_3" in folder:
            long = t5_states(
                folder,
                "_3",
                prompts=given,
                length=T5_LENGTH,
                dtype=dtype,
                batch_size=batch_size,
                masked=False,
            )
            last = long.last
        else:
            last = torch.zeros(len(given), T5_LENGTH, width)
        context = torch.cat([pad(clip, (0, width - clip.shape[-1])), last], 1)
        pooled = torch.cat([each.pooled for each in states if each.pooled is not None], -1)
        return Encoded(
            {"context": context[:-1], "pooled": pooled[:-1]},
            {"context": context[-1:], "pooled": pooled[-1:]},
            int(cut[:-1].sum()),
        )


FAMILY = StableDiffusion3()
