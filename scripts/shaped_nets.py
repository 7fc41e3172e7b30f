"""Networks of the shapes of known teachers, with random weights and constant conditions, for scripts that measure."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from distill.data.cond import Cond

SHAPES = Path(__file__).resolve().parents[1] / "tests" / "shapes"
NAMES = {"sd15": "SD 1.5", "sdxl": "SDXL", "dit_xl2": "DiT-XL/2", "flux": "Flux"}


class Shaped(nn.Module):
    """A network of diffusers with constant conditions: `net(x [B,*S], t [B], cond)`."""

    num_classes = 0

    def __init__(self, made: nn.Module, constants: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.net = made
        for name, value in constants.items():
            self.register_buffer(name, value, persistent=False)
        self.constants = tuple(constants)

    def forward(self, x: Tensor, t: Tensor, cond: Cond) -> Tensor:
        """The prediction, without a learned variance."""
        given = {
            name: getattr(self, name).expand(len(x), *getattr(self, name).shape[1:])
            for name in self.constants
        }
        added = {name: given.pop(name) for name in ("text_embeds", "time_ids") if name in given}
        more = {"added_cond_kwargs": added} if added else {}
        out: Tensor = self.net(x.to(self.net.dtype), timestep=1000 * t, **given, **more).sample
        return out[:, : x.shape[1]].float()


def shaped(name: str, device: torch.device) -> tuple[nn.Module, tuple[int, ...], int]:
    """(net, sample shape, batch) of a shape, with random weights on the device."""
    import diffusers

    with device:
        if name == "tiny":
            options = {
                "sample_size": 8,
                "block_out_channels": (8, 16),
                "cross_attention_dim": 16,
                "layers_per_block": 1,
            }
            options |= {"attention_head_dim": 4, "norm_num_groups": 4}
            options |= {"down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D")}
            net = diffusers.UNet2DConditionModel(
                **options, up_block_types=("UpBlock2D", "CrossAttnUpBlock2D")
            )
            return Shaped(net, {"encoder_hidden_states": torch.randn(1, 4, 16)}), (4, 8, 8), 4
        if name == "dit_xl2":
            net = diffusers.DiTTransformer2DModel(
                num_layers=28,
                num_attention_heads=16,
                attention_head_dim=72,
                in_channels=4,
                out_channels=8,
                sample_size=32,
            )
            return Shaped(net, {"class_labels": torch.tensor([207])}), (4, 32, 32), 16
        if name == "flux":  # its size alone: nothing runs it
            return diffusers.FluxTransformer2DModel(guidance_embeds=True), (16, 128, 128), 1
        config = json.loads((SHAPES / f"{name}.json").read_text())["unet/config.json"]
        net = diffusers.UNet2DConditionModel.from_config(config)
        constants = {"encoder_hidden_states": torch.randn(1, 77, config["cross_attention_dim"])}
        if name == "sdxl":
            constants |= {"text_embeds": torch.randn(1, 1280), "time_ids": torch.full((1, 6), 512.0)}
        return (
            Shaped(net, constants),
            (4, config["sample_size"], config["sample_size"]),
            2 if name == "sdxl" else 8,
        )
