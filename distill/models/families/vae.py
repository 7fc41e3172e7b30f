"""Autoencoders of diffusers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from distill.models.decoder import Autoencoder, Decoder
from distill.models.families.core import plain
from distill.models.pretrained import Folder, class_named
from distill.nets.autoencoder import AutoencoderNet

PART = "vae"


class DiffusersVAE(AutoencoderNet):
    """`AutoencoderKL` of diffusers; an image's latents are the mean of its posterior.

    Args:
        config: its config, with `_class_name`.
    """

    classes: ClassVar[tuple[str, ...]] = ("AutoencoderKL",)

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__()
        if (name := config.get("_class_name")) not in self.classes:
            raise ValueError(f"config._class_name: found {name!r}, expected {' or '.join(self.classes)}")
        self.net = class_named("diffusers", str(name), "config._class_name").from_config(config).eval()
        self.latent, self.channels = int(config["latent_channels"]), int(config["out_channels"])
        self.factor = 2 ** (len(config["block_out_channels"]) - 1)

    def image_shape(self, latent_shape: Sequence[int]) -> tuple[int, ...]:
        if len(latent_shape) != 3 or latent_shape[0] != self.latent:
            raise ValueError(
                f"sample_shape: found {list(latent_shape)}, but the autoencoder has latents [{self.latent},h,w]"
            )
        return (self.channels, *(size * self.factor for size in latent_shape[1:]))

    def encode(self, images: Tensor) -> Tensor:
        latents: Tensor = self.net.encode(images).latent_dist.mode()
        return latents

    def encode_sample(self, images: Tensor, noise: Tensor) -> Tensor:
        posterior = self.net.encode(images).latent_dist
        latents: Tensor = posterior.mean + posterior.std * noise
        return latents

    def decode(self, latents: Tensor) -> Tensor:
        images: Tensor = self.net.decode(latents, return_dict=False)[0]
        return images


def decoder_of(folder: Folder, *, weights: bool = True) -> Decoder:
    """The decoder of a folder's VAE; without `weights`, on the meta device."""
    folder.class_of(PART, DiffusersVAE.classes)
    folder.weights(PART)
    config = folder.config(PART)
    numbers: dict[str, Any]
    scale = float(config.get("scaling_factor") or 1.0)
    if config.get("latents_mean") is not None:
        numbers = {"mean": config["latents_mean"], "std": [s / scale for s in config["latents_std"]]}
    else:
        numbers = {"scale": scale, "shift": float(config.get("shift_factor") or 0.0)}
    if not weights:
        with torch.device("meta"):
            return Autoencoder(DiffusersVAE(plain(config)), **numbers)
    net = DiffusersVAE(plain(config))
    net.net.load_state_dict(folder.load(PART).state_dict())
    return Autoencoder(net, **numbers)
