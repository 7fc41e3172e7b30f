"""PixArt-alpha and PixArt-Sigma: a transformer on latents with the states of a T5 encoder, whose padding is not attended."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from distill.data.cond import Cond
from distill.models.families.core import Core
from distill.models.families.family import Encoded, Family
from distill.models.families.text import T5, T5_TOKENIZER, t5_states
from distill.models.pretrained import Folder

LENGTHS = {"PixArtAlphaPipeline": 120, "PixArtSigmaPipeline": 300}  # tokens


class PixArt(Core):
    """`PixArtTransformer2DModel`; its learned variance is left out."""

    classes = ("PixArtTransformer2DModel", "Transformer2DModel")
    inputs = ("context", "context_mask")
    guidance_blocks = {"embedding": ["adaln_single.emb"], "attention": ["attn2"], "offset": ["attn2"]}  # noqa: RUF012 (read only)
    fixed = {"norm_type": ("ada_norm_single",)}  # noqa: RUF012 (read only)

    def __init__(self, config: dict[str, Any], time_scale: float = 1.0, dtype: str = "float32") -> None:
        super().__init__(config, time_scale, dtype)
        self.bottleneck = f"net.transformer_blocks.{int(config['num_layers']) // 2}"
        self.sized = bool(getattr(self.net, "use_additional_conditions", False))

    def call(self, x: Tensor, t: Tensor, cond: Cond) -> Tensor:
        added: dict[str, Tensor | None] = {"resolution": None, "aspect_ratio": None}
        if self.sized:
            height, width = (8 * side for side in x.shape[2:])
            size = torch.tensor([height, width], device=x.device, dtype=x.dtype)
            ratio = torch.tensor([height / width], device=x.device, dtype=x.dtype)
            added = {"resolution": size.expand(len(x), 2), "aspect_ratio": ratio.expand(len(x), 1)}
        made: Tensor = self.net(
            x,
            timestep=t,
            encoder_hidden_states=cond.values["context"],
            encoder_attention_mask=cond.values["context_mask"].to(x.dtype),
            added_cond_kwargs=added,
            return_dict=False,
        )[0]
        return made[:, : x.shape[1]]


class PixArtFamily(Family):
    """See the module."""

    pipelines = tuple(LENGTHS)
    core, network = PixArt, "transformer"
    encoders = {"tokenizer": T5_TOKENIZER, "text_encoder": T5}  # noqa: RUF012 (read only)

    def text(self, folder: Folder) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        length, width = LENGTHS[folder.pipeline], int(folder.config("text_encoder")["d_model"])
        return {"context": ((length, width), torch.float32), "context_mask": ((length,), torch.bool)}

    def encode(
        self, folder: Folder, prompts: Sequence[str], negative: str, dtype: str, batch_size: int
    ) -> Encoded:
        states = t5_states(
            folder,
            "",
            # The pipeline's cleaning of captions without its optional packages.
            prompts=[prompt.lower().strip() for prompt in (*prompts, negative)],
            length=LENGTHS[folder.pipeline],
            dtype=dtype,
            batch_size=batch_size,
            masked=True,
        )
        values = {"context": states.last, "context_mask": states.mask}
        return Encoded(
            {name: value[:-1] for name, value in values.items()},
            {name: value[-1:] for name, value in values.items()},
            int(states.cut[:-1].sum()),
        )


FAMILY = PixArtFamily()
