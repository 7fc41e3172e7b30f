"""A residual multilayer perceptron for points and tiny images: the net of the toy recipes and of exact-teacher tests."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import ClassVar

from torch import Tensor, nn
from torch.nn import functional as F

from distill.data.cond import Cond
from distill.nets.layers import ClassEmbedding, GuidanceEmbedding, TimeEmbedding, add_guidance, label_of
from distill.nets.net import Net


class MLP(Net):
    """[B,*shape] at times t [B] -> [B,*shape]: `depth` residual SiLU layers of `width`, each seeing the time and the class.

    Args:
        shape: S, the shape of a sample; flattened inside.
        features: sines and cosines of the time, of angular frequencies `time_scale` down to `time_scale` / 1000.
        num_classes: class labels; 0 for none.
        zero_out: start with an output of 0.
        guidance_embedding: features of the guidance w as an input (`guidance_w` of `Cond`); 0: no such input.
    """

    # kind of guidance terms (`models.guidance_adapters`) -> blocks
    guidance_blocks: ClassVar[dict[str, list[str]]] = {"embedding": ["embed"], "offset": ["embed"]}

    def __init__(
        self,
        *,
        shape: Sequence[int] = (2,),
        width: int = 128,
        depth: int = 3,
        features: int = 32,
        num_classes: int = 0,
        time_scale: float = 30.0,
        zero_out: bool = True,
        guidance_embedding: int = 0,
    ) -> None:
        super().__init__()
        if width < 1 or depth < 1:
            raise ValueError(f"width, depth: expected at least 1, found {width}, {depth}")
        if not shape or min(shape) < 1 or num_classes < 0:
            raise ValueError(
                f"shape, num_classes: found {list(shape)} and {num_classes}, expected positive sizes and at least 0"
            )
        self.shape, self.num_classes, self.time_scale = tuple(shape), num_classes, time_scale
        dim = math.prod(self.shape)
        self.time = TimeEmbedding(features, max_period=1000.0)
        self.embed = nn.Linear(features, width)
        self.label = ClassEmbedding(num_classes, width) if num_classes else None
        self.guidance = GuidanceEmbedding(guidance_embedding, width) if guidance_embedding else None
        self.stem = nn.Linear(dim, width)
        self.bottleneck = f"layers.{depth - 1}"  # its output is the features of discriminators
        self.layers = nn.ModuleList([nn.Linear(width, width) for _ in range(depth)])
        self.out = nn.Linear(width, dim)
        if zero_out:
            nn.init.zeros_(self.out.weight)
            nn.init.zeros_(self.out.bias)

    def forward(self, x: Tensor, t: Tensor, cond: Cond) -> Tensor:
        """[B,*shape] at network times t [B] under `cond` -> [B,*shape]."""
        embedding = self.embed(self.time(t * self.time_scale).to(self.embed.weight.dtype))
        if self.label is not None:
            embedding = embedding + self.label(label_of(cond, self.num_classes))
        embedding = add_guidance(embedding, self.guidance, cond.get("guidance_w"))
        hidden = self.stem(x.flatten(1).to(self.stem.weight.dtype))
        for layer in self.layers:
            hidden = hidden + layer(F.silu(hidden + embedding))
        return self.out(F.silu(hidden)).reshape(x.shape)
