"""DiT (arXiv 2212.09748): a transformer on latents with class labels."""

from __future__ import annotations

import torch
from torch import Tensor

from distill.data.cond import Cond
from distill.models.conditions import Conditions, Labels
from distill.models.families.core import Core
from distill.models.families.family import Family
from distill.models.pretrained import Folder


class DiT(Core):
    """`DiTTransformer2DModel`; class `num_embeds_ada_norm` of the network is its null class, label -1 here."""

    classes = ("DiTTransformer2DModel", "Transformer2DModel")
    inputs = ("label",)
    bottleneck = "net.transformer_blocks"
    guidance_blocks = {"attention": ["attn1"], "offset": ["attn1"]}  # noqa: RUF012 (read only)
    fixed = {"norm_type": ("ada_norm_zero",)}  # noqa: RUF012 (read only)

    def __init__(self, config: dict, time_scale: float = 1.0, dtype: str = "float32") -> None:
        super().__init__(config, time_scale, dtype)
        self.num_classes = int(config["num_embeds_ada_norm"])
        for module in self.net.modules():
            if hasattr(
                module, "dropout_prob"
            ):  # of labels, with torch's own random numbers: methods drop conditions
                module.dropout_prob = 0.0
        middle = int(config["num_layers"]) // 2
        self.bottleneck = f"net.transformer_blocks.{middle}"

    def call(self, x: Tensor, t: Tensor, cond: Cond) -> Tensor:
        label = cond.values["label"]
        label = torch.where(label < 0, self.num_classes, label)
        made: Tensor = self.net(x, timestep=t, class_labels=label, return_dict=False)[0]
        return made[:, : x.shape[1]]  # the other half is the learned variance


class ClassConditional(Family):
    """See the module."""

    pipelines = ("DiTPipeline",)
    core, network = DiT, "transformer"

    def text(self, folder: Folder) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        return {}

    def conditions(self, folder: Folder) -> Conditions | None:
        return Labels(int(folder.config(self.network)["num_embeds_ada_norm"]))


FAMILY = ClassConditional()
