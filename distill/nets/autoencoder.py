"""Autoencoders between images and latents: the frozen nets of `models.decoder.Autoencoder`."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

from torch import Tensor, nn

from distill.nets.net import Net


class AutoencoderNet(Net, ABC):
    """Images [B,C,H,W] <-> latents [B,c,h,w]."""

    @abstractmethod
    def image_shape(self, latent_shape: Sequence[int]) -> tuple[int, ...]:
        """Shape [C,H,W] of the image that latents of a shape decode to. Raises ValueError naming `sample_shape` for latents
        of another shape."""

    @abstractmethod
    def encode(self, images: Tensor) -> Tensor:
        """[B,C,H,W] in [-1, 1] -> [B,c,h,w]; of a variational autoencoder the mean of the posterior."""

    def encode_sample(self, images: Tensor, noise: Tensor) -> Tensor:
        """A sample of the posterior: mean + std * noise, with standard normal noise [B,c,h,w].

        Raises ValueError for an autoencoder without a posterior."""
        raise ValueError(
            f"posterior: found 'sample', but {type(self).__name__} has no posterior; expected mean"
        )

    @abstractmethod
    def decode(self, latents: Tensor) -> Tensor:
        """[B,c,h,w] -> [B,C,H,W], about in [-1, 1]."""

    def forward(self, images: Tensor) -> Tensor:
        """Reconstructed images, what training compares with the images."""
        return self.decode(self.encode(images))


class ConvAutoencoder(AutoencoderNet):
    """A small convolutional autoencoder: `levels` halvings, two 3x3 convolutions each, SiLU between them.

    Args:
        channels: of the images. latent: channels of the latents. width: channels inside.
        levels: halvings; H and W of the images must be multiples of 2 ** levels.
    """

    def __init__(self, *, channels: int = 1, latent: int = 4, width: int = 32, levels: int = 1) -> None:
        super().__init__()
        if min(channels, latent, width, levels) < 1:
            raise ValueError(
                f"channels, latent, width, levels: found {[channels, latent, width, levels]}, expected at least 1"
            )
        self.channels, self.latent, self.factor = channels, latent, 2**levels
        down: list[nn.Module] = [nn.Conv2d(channels, width, 3, padding=1)]
        up: list[nn.Module] = [nn.Conv2d(latent, width, 3, padding=1)]
        for _ in range(levels):
            down += [nn.SiLU(), nn.Conv2d(width, width, 3, stride=2, padding=1)]
            down += [nn.SiLU(), nn.Conv2d(width, width, 3, padding=1)]
            up += [nn.SiLU(), nn.Upsample(scale_factor=2), nn.Conv2d(width, width, 3, padding=1)]
            up += [nn.SiLU(), nn.Conv2d(width, width, 3, padding=1)]
        self.encoder = nn.Sequential(*down, nn.SiLU(), nn.Conv2d(width, latent, 3, padding=1))
        self.decoder = nn.Sequential(*up, nn.SiLU(), nn.Conv2d(width, channels, 3, padding=1))

    def image_shape(self, latent_shape: Sequence[int]) -> tuple[int, ...]:
        if len(latent_shape) != 3 or latent_shape[0] != self.latent:
            raise ValueError(
                f"sample_shape: found {list(latent_shape)}, but the autoencoder has latents [{self.latent},h,w]"
            )
        return (self.channels, *(size * self.factor for size in latent_shape[1:]))

    def encode(self, images: Tensor) -> Tensor:
        if images.shape[1] != self.channels or any(size % self.factor for size in images.shape[2:]):
            raise ValueError(
                f"images: found shape {list(images.shape)}, but the autoencoder takes {self.channels} channels and sizes "
                f"that are multiples of {self.factor}"
            )
        return self.encoder(images)

    def decode(self, latents: Tensor) -> Tensor:
        return self.decoder(latents)
