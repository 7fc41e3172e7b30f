"""A network of diffusers as a net of this package."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from distill.data.cond import Cond
from distill.models.pretrained import DTYPES, class_named
from distill.nets.net import Net
from distill.process.base import at_least_float32
from distill.process.guidance_w import w_embedding


class Core(Net, ABC):
    """`net(x [B,*S], t [B], cond)` -> [B,*S] in at least float32, with a network of diffusers inside. A family adds `call`.

    Args:
        config: the network's own config with its `_class_name`; entries of diffusers' version and path are left out.
        time_scale: the network gets `time_scale * t`.
        dtype: of weights, inputs and conditions: float32, bfloat16 or float16.

    Raises:
        ValueError: names the entry of `config` that the family cannot represent, or `dtype`.
    """

    classes: ClassVar[tuple[str, ...]]  # of diffusers
    inputs: ClassVar[tuple[str, ...]] = ()  # names in `Cond` that must be there
    bottleneck: str  # the module that discriminators read
    adapter_targets: ClassVar[tuple[str, ...]] = (
        "to_q",
        "to_k",
        "to_v",
        "to_out.0",
    )  # of adapters by default
    # kind of guidance terms (`models.guidance_adapters`) -> blocks
    guidance_blocks: ClassVar[Mapping[str, list[str]]] = {}
    fixed: ClassVar[
        Mapping[str, tuple[Any, ...]]
    ] = {}  # entry of the config -> values that `call` is right for

    def __init__(self, config: dict[str, Any], time_scale: float = 1.0, dtype: str = "float32") -> None:
        super().__init__()
        name = str(config.get("_class_name"))
        if name not in self.classes:
            raise ValueError(f"config._class_name: found {name!r}, expected one of {', '.join(self.classes)}")
        if dtype not in DTYPES:
            raise ValueError(f"dtype: found {dtype!r}, expected one of {', '.join(DTYPES)}")
        for key, values in self.fixed.items():
            if (found := config.get(key, values[0])) not in values:
                listed = " or ".join(repr(value) for value in values)
                raise ValueError(f"config.{key}: found {found!r}, expected {listed}")
        self.time_scale = time_scale
        made = class_named("diffusers", name, "config._class_name").from_config(config)
        # Not the class's own `to`, which warns of modules to keep in float32 even where it has none.
        self.net = made if dtype == "float32" else nn.Module.to(made, DTYPES[dtype])

    def forward(self, x: Tensor, t: Tensor, cond: Cond) -> Tensor:
        """The network's prediction; its learned variance, if any, is left out."""
        if missing := [name for name in self.inputs if name not in cond.values]:
            raise ValueError(
                f"cond: {missing[0]}: missing; {type(self).__name__} needs {', '.join(self.inputs)}"
            )
        dtype = next(self.net.parameters()).dtype
        return at_least_float32(self.call(x.to(dtype), self.time_scale * t, _cast(cond, dtype)))

    def feature_map(self, out: Tensor | tuple[Tensor, ...], x: Tensor) -> Tensor:
        """[B,C,h,w] of the output of the bottleneck for x [B,*S]: a map, or the tokens [B,h*w,C] of the image, row by row,
        which are the last of a joint transformer's."""
        made = out[-1] if isinstance(out, tuple) else out
        if made.ndim == 3:
            patch = math.isqrt(x.shape[2] * x.shape[3] // made.shape[1])
            made = made.transpose(1, 2).unflatten(2, (x.shape[2] // patch, x.shape[3] // patch))
        return at_least_float32(made)

    @abstractmethod
    def call(self, x: Tensor, t: Tensor, cond: Cond) -> Tensor:
        """The network's output [B,*S] of x and conditions in the network's dtype, and times [B] in its unit."""


class TextUNet(Core):
    """`UNet2DConditionModel`.

    Args:
        guidance_embedding: features of the guidance w as an input (latent consistency: 256), the network's
            `time_cond_proj_dim`; 0: none. Its weights are 0 at the start, so that the network begins as the one without.
    """

    classes = ("UNet2DConditionModel",)
    bottleneck = "net.mid_block"
    guidance_blocks = {  # noqa: RUF012 (read only)
        "embedding": ["net.time_embedding"],
        "attention": ["attn2"],
        "offset": ["attn2"],
    }

    def __init__(
        self,
        config: dict[str, Any],
        time_scale: float = 1.0,
        dtype: str = "float32",
        *,
        guidance_embedding: int = 0,
    ) -> None:
        if (found := config.get("time_cond_proj_dim")) is not None:
            raise ValueError(
                f"config.time_cond_proj_dim: found {found}, a latent consistency model; expected a teacher, with null"
            )
        if guidance_embedding:
            if guidance_embedding < 4:
                raise ValueError(f"guidance_embedding: found {guidance_embedding}, expected 0 or at least 4")
            config = {**config, "time_cond_proj_dim": guidance_embedding}
        super().__init__(config, time_scale, dtype)
        self.guidance_embedding, self.embeds_guidance = guidance_embedding, guidance_embedding > 0
        if guidance_embedding:
            nn.init.zeros_(self.net.time_embedding.cond_proj.weight)

    def embedded(self, x: Tensor, cond: Cond) -> Tensor | None:
        """[B, features] of the guidance w, in the type of x; None without."""
        w = cond.get("guidance_w")
        if (w is not None) != self.embeds_guidance:
            found = "missing" if w is None else "found"
            raise ValueError(
                f"guidance_w: {found}, but guidance_embedding of this net is {self.guidance_embedding}"
            )
        return None if w is None else w_embedding(w, self.guidance_embedding).to(x.dtype)


def plain(config: Mapping[str, Any]) -> dict[str, Any]:
    """A network's config without what does not change the network."""
    return {key: value for key, value in config.items() if key == "_class_name" or not key.startswith("_")}


def _cast(cond: Cond, dtype: torch.dtype) -> Cond:
    values = {
        name: value.to(dtype) if value.is_floating_point() and name != "guidance_w" else value
        for name, value in cond.values.items()
    }
    return Cond(len(cond), values)
