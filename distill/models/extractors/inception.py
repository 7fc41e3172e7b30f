"""`inception`: the features of FID, through clean-fid; the one space whose Fréchet distance is called `fid`.

The protocol is clean-fid's mode `clean` (Parmar et al. 2022, 2104.11222): images rounded and clamped to uint8, each
channel resized to 299x299 by PIL's antialiased bicubic filter on floats, clipped to 0..255 and not rounded again; the
TorchScript Inception of 2015-12-05; pooled features. The moments and the distance are `distill.evaluation.metrics.frechet`'s.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from distill.data.plain import plain_torch
from distill.models.extractors.images import check_images, import_extra, to_bytes, to_rgb, verified

NAME, EXTRA = "inception", "fid"
FILE = "inception-2015-12-05.pt"
SHA256 = "f58cb9b6ec323ed63459aa4fb441fe750cfe39fafad6da5cb504a16f19e958f4"
SIZE = 299

Resize = Callable[[NDArray[np.uint8]], NDArray[np.float32]]
"""uint8 [H, W, 3] to float32 [299, 299, 3] in 0..255."""


class Inception(nn.Module):
    """Pooled Inception features [B, 2048], for measuring only: the resize on the host has no gradient.

    network: [B, 3, 299, 299] in 0..255 to [B, dim]; `resize` as of clean-fid. `sha256` is that of the network's file:
    with another one than FID's the name is `inception_other`, and no number of it is called `fid`.
    """

    full_count = 50_000
    quantise = True
    batch = 32
    preprocessing = "8-bit RGB, PIL bicubic antialiased to 299x299 on floats (clean-fid's mode clean)"

    def __init__(
        self, network: nn.Module, resize: Resize, sha256: str | None = None, dim: int = 2048
    ) -> None:
        super().__init__()
        self.name = NAME if sha256 == SHA256 else "inception_other"
        self.network, self.resize, self.sha256, self.dim = network, resize, sha256, dim

    def forward(self, images: Tensor) -> Tensor:
        """Images [B, 1 or 3, H, W] in [-1, 1] to features [B, dim] in float32; ValueError where a gradient is asked."""
        check_images(self.name, images)
        if images.requires_grad and torch.is_grad_enabled():
            raise ValueError(
                f"{self.name} measures and gives no gradient; expected images without requires_grad"
            )
        pixels = to_rgb(to_bytes(images)).permute(0, 2, 3, 1).cpu().numpy()
        inputs = torch.from_numpy(np.stack([self.resize(image) for image in pixels])).permute(0, 3, 1, 2)
        with torch.no_grad(), torch.autocast(images.device.type, enabled=False):
            return self.network(inputs.to(images.device)).float()

    def features_and_logits(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        """Features, and no logits: the network knows none of the data's classes."""
        return self(images), None


@plain_torch()
def load_inception(device: torch.device | str = "cpu", path: str | None = None) -> Inception:
    """clean-fid's Inception and resize with the weights in the folder (or file) `path`, frozen; never downloads.

    Raises FileNotFoundError naming the file and the extra, ImportError without clean-fid, AssetError for another file:
    TorchScript is code, so it is opened only after its sha256 is known to be right.
    """
    file = None if path is None else Path(path) / FILE if Path(path).is_dir() else Path(path)
    if file is None or not file.is_file() or file.name != FILE:
        found = "null" if path is None else path
        raise FileNotFoundError(
            f"features {NAME}: path: found {found}, expected the local folder of {FILE} (96 MB, which clean-fid downloads "
            f"to /tmp when it is first used online); pip install 'distill[{EXTRA}]' brings clean-fid"
        )
    # These two modules need no torchvision, whose builds must match torch's; cleanfid.fid does.
    resizing = import_extra("cleanfid.resize", NAME, EXTRA, file)
    networks = import_extra("cleanfid.inception_torchscript", NAME, EXTRA, file)
    sha256 = verified(file, SHA256, NAME)
    network: Any = networks.InceptionV3W(str(file.parent), download=False, resize_inside=False)
    extractor = Inception(network, resizing.build_resizer("clean"), sha256)
    extractor.requires_grad_(False).eval().to(device)
    return extractor
