"""`lpips` and `dists`: perceptual distances between two images in the layers of an ImageNet classifier, from weight files that
the user gives; nothing is ever downloaded.

The classifier is that of torchvision's files (VGG16, AlexNet), whose convolutions are read by their names; torchvision itself
is not needed. The weights of the layers are files of torchmetrics, which is installed with this package.
"""

from __future__ import annotations

import hashlib
import importlib.util
import pickle
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.nn import functional as F

from distill.data.plain import plain_torch
from distill.files import sha256_file
from distill.models.extractors.images import ImageExtractor, check_images, to_rgb
from distill.models.weights import read_tensors

SMALLEST = 32  # pixels of a side: after four halvings of VGG16 two are left
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
# LPIPS scales images in [-1, 1] by these; here they are in [0, 1].
LPIPS_MEAN = tuple((shift + 1) / 2 for shift in (-0.030, -0.088, -0.188))
LPIPS_STD = tuple(scale / 2 for scale in (0.458, 0.448, 0.450))
EPS = 1e-8  # in LPIPS's norm: its root has a gradient at 0
C1 = C2 = 1e-6  # of DISTS


@dataclass(frozen=True)
class Layout:
    """The convolutions of a classifier by their number in the file, a stage of those up to a layer that is compared.

    Attributes:
        file: its public name, which ends with the start of its sha256. stages: numbers of convolutions.
        pooled: stages before which it is halved. kernel: of that pooling. first: (stride, padding) of the first convolution;
            others keep the size.
    """

    file: str
    stages: tuple[tuple[int, ...], ...]
    pooled: tuple[int, ...]
    kernel: int
    first: tuple[int, int]


LAYOUTS = {
    "vgg": Layout(
        "vgg16-397923af.pth",
        ((0, 2), (5, 7), (10, 12, 14), (17, 19, 21), (24, 26, 28)),
        pooled=(1, 2, 3, 4),
        kernel=2,
        first=(1, 1),
    ),
    "alex": Layout(
        "alexnet-owt-7be5be79.pth", ((0,), (3,), (6,), (8,), (10,)), pooled=(1, 2), kernel=3, first=(4, 2)
    ),
}


@dataclass(frozen=True)
class Weights:
    """The tensors of a file by name; `where` starts messages."""

    where: str
    tensors: Mapping[str, Any]

    @classmethod
    def read(cls, name: str, file: Path) -> Weights:
        """Of a file of torch or safetensors, on the CPU. Raises ValueError naming the extractor and the file."""
        where = f"features {name}: {file}"
        try:
            if file.suffix == ".safetensors":
                return cls(where, read_tensors(file))
            found = torch.load(file, map_location="cpu", weights_only=True)
        except (pickle.UnpicklingError, SafetensorError, RuntimeError, EOFError) as error:
            raise ValueError(f"{where}: cannot be read: {error}") from error
        if not isinstance(found, Mapping):
            raise ValueError(f"{where}: found a {type(found).__name__}, expected tensors by name")
        return cls(where, found)

    def named(self, name: str, dimensions: int) -> Tensor:
        """One tensor, in float32. Raises ValueError where it is missing or has another number of dimensions."""
        found = self.tensors.get(name)
        if not isinstance(found, Tensor) or found.dim() != dimensions:
            what = f"shape {list(found.shape)}" if isinstance(found, Tensor) else "nothing"
            raise ValueError(
                f"{self.where}: {name}: found {what}, expected {dimensions} dimensions, as in the public weight file"
            )
        return found.float()


class Stages(nn.Module):
    """The convolutions of a classifier, with ReLU. Their widths are those of the weights.

    Args:
        layout: of the file. weights: `features.<number>.weight` and `.bias`; others are not read.
        smooth: halve by the root of a blurred square (DISTS) instead of by the maximum.
    """

    blur: Tensor

    def __init__(self, layout: Layout, weights: Weights, *, smooth: bool = False) -> None:
        super().__init__()
        self.layout, self.smooth, self.convs, self.widths = layout, smooth, nn.ModuleDict(), []
        for stage in layout.stages:
            for number in stage:
                weight, bias = (
                    weights.named(f"features.{number}.{part}", d) for part, d in (("weight", 4), ("bias", 1))
                )
                stride, padding = (1, weight.shape[-1] // 2) if number else layout.first
                conv = nn.Conv2d(weight.shape[1], weight.shape[0], weight.shape[-1], stride, padding)
                conv.load_state_dict({"weight": weight, "bias": bias})
                self.convs[str(number)] = conv
            self.widths.append(len(weight))
        row = torch.tensor([0.25, 0.5, 0.25])
        self.register_buffer("blur", torch.outer(row, row)[None, None], persistent=False)

    def forward(self, x: Tensor) -> list[Tensor]:
        """[B, C_i, H_i, W_i] after the last convolution of each stage, for normalised images [B, 3, H, W]."""
        found = []
        for place, stage in enumerate(self.layout.stages):
            if place in self.layout.pooled:
                x = self._halved(x)
            for number in stage:
                x = F.relu(self.convs[str(number)](x))
            found.append(x)
        return found

    def _halved(self, x: Tensor) -> Tensor:
        if not self.smooth:
            return F.max_pool2d(x, self.layout.kernel, 2)
        blur = self.blur.expand(x.shape[1], -1, -1, -1)
        return (F.conv2d(x.square(), blur, stride=2, padding=1, groups=x.shape[1]) + 1e-12).sqrt()


class Perceptual(ImageExtractor, ABC):
    """Images at their own size through the stages of a classifier: as features, the mean of each channel of each stage
    [B, D]; between two images, `distance`, which subclasses write.

    Raises ValueError for images of less than 32 pixels a side."""

    def __init__(
        self,
        name: str,
        stages: Stages,
        mean: tuple[float, ...],
        std: tuple[float, ...],
        sha256: str | None,
    ) -> None:
        super().__init__(name, sum(stages.widths), 0, mean, std, full_count=5000, sha256=sha256)
        self.stages = stages

    def layers(self, images: Tensor) -> list[Tensor]:
        """[B, C_i, H_i, W_i] of images [B, 1 or 3, H, W] in [-1, 1], in float32."""
        if min(check_images(self.name, images).shape[-2:]) < SMALLEST:
            raise ValueError(
                f"{self.name} reads images [B, 1 or 3, H, W] of at least {SMALLEST}x{SMALLEST}, got {list(images.shape)}"
            )
        with torch.autocast(images.device.type, enabled=False):
            return self.compared((to_rgb(images.float()) + 1) / 2)

    def compared(self, pixels: Tensor) -> list[Tensor]:
        """The layers that are compared, of RGB in [0, 1]."""
        made: list[Tensor] = self.stages((pixels - self.mean) / self.std)
        return made

    def forward(self, images: Tensor) -> Tensor:
        """Images [B, 1 or 3, H, W] in [-1, 1] to features [B, D] in float32."""
        return torch.cat([layer.mean((2, 3)) for layer in self.layers(images)], 1)

    @abstractmethod
    def distance(self, pred: Tensor, target: Tensor) -> Tensor:
        """[B], 0 for equal images."""


class LPIPS(Perceptual):
    """sum_l mean_hw sum_c w_lc (f_lc / |f_l| - g_lc / |g_l|)^2 (Zhang et al. 2018, 1801.03924, eq. 1).

    Args:
        stages: of VGG16 or AlexNet. weights: w_l [C_l] of each stage.
    """

    def __init__(
        self, stages: Stages, weights: list[Tensor], name: str = "lpips", sha256: str | None = None
    ) -> None:
        super().__init__(name, stages, LPIPS_MEAN, LPIPS_STD, sha256)
        if [len(weight) for weight in weights] != stages.widths:
            raise ValueError(
                f"features lpips: weights: found {[len(weight) for weight in weights]} channels, expected {stages.widths}: "
                "those of another network"
            )
        self.weights = nn.ParameterList(weights)

    def distance(self, pred: Tensor, target: Tensor) -> Tensor:
        """LPIPS [B] of images [B, 1 or 3, H, W] in [-1, 1]."""
        parts = []
        for weight, f, g in zip(self.weights, self.layers(pred), self.layers(target), strict=True):
            difference = (_normalised(f) - _normalised(g)).square()
            parts.append(torch.einsum("c,bchw->b", weight, difference) / (f.shape[-2] * f.shape[-1]))
        return torch.stack(parts).sum(0)


class DISTS(Perceptual):
    """1 - sum_l sum_c (alpha_lc s1 + beta_lc s2), the similarity of the means and of the structure of channels, over the image
    itself and five smoothly pooled stages of VGG16 (Ding et al. 2020, 2004.07728, eqs. 4 to 7).

    Args:
        stages: of VGG16, smooth. alpha, beta: [3 + sum C_l]; divided here by the sum of both.
    """

    alpha: Tensor
    beta: Tensor

    def __init__(
        self, stages: Stages, alpha: Tensor, beta: Tensor, name: str = "dists", sha256: str | None = None
    ) -> None:
        super().__init__(name, stages, IMAGENET_MEAN, IMAGENET_STD, sha256)
        self.dim += 3  # the image itself
        if not len(alpha) == len(beta) == self.dim:
            raise ValueError(
                f"features dists: weights: found alpha and beta of {len(alpha)} and {len(beta)} channels, expected {self.dim}: "
                "those of another network"
            )
        whole = alpha.sum() + beta.sum()
        self.register_buffer("alpha", alpha / whole, persistent=False)
        self.register_buffer("beta", beta / whole, persistent=False)

    def compared(self, pixels: Tensor) -> list[Tensor]:
        """The image and the stages."""
        return [pixels, *super().compared(pixels)]

    def distance(self, pred: Tensor, target: Tensor) -> Tensor:
        """DISTS [B] of images [B, 1 or 3, H, W] in [-1, 1]."""
        means, structures = [], []
        for f, g in zip(self.layers(pred), self.layers(target), strict=True):
            mf, mg = f.mean((2, 3), keepdim=True), g.mean((2, 3), keepdim=True)
            variances = ((f - mf).square() + (g - mg).square()).mean((2, 3))
            covariance = ((f - mf) * (g - mg)).mean((2, 3))
            means.append(((2 * mf * mg + C1) / (mf.square() + mg.square() + C1)).flatten(1))
            structures.append((2 * covariance + C2) / (variances + C2))
        return 1 - torch.cat(means, 1) @ self.alpha - torch.cat(structures, 1) @ self.beta


def _normalised(layer: Tensor) -> Tensor:
    return layer / (layer.square().sum(1, keepdim=True) + EPS).sqrt()


@plain_torch()
def load_lpips(
    device: torch.device | str = "cpu",
    path: str | None = None,
    net: Literal["vgg", "alex"] = "vgg",
    weights: str | None = None,
) -> LPIPS:
    """LPIPS in VGG16 or AlexNet of the file `path`, frozen; `weights` is the file of the layers' weights where it is not
    torchmetrics'.

    Raises FileNotFoundError naming the file, or ValueError for other weights than expected."""
    if net not in LAYOUTS:
        raise ValueError(f"features lpips: net: found {net!r}, expected one of {list(LAYOUTS)}")
    layout = LAYOUTS[net]
    file = _file("lpips", path, layout.file)
    own = _weights_of("lpips", weights, f"lpips_models/{net}.pth")
    stages, linear = Stages(layout, Weights.read("lpips", file)), Weights.read("lpips", own)
    layers = [linear.named(f"lin{place}.model.1.weight", 4).flatten() for place in range(len(layout.stages))]
    name = _name("lpips" if net == "vgg" else f"lpips_{net}", layout, file)
    return LPIPS(stages, layers, name, _digest(file, own)).frozen(device)


@plain_torch()
def load_dists(
    device: torch.device | str = "cpu", path: str | None = None, weights: str | None = None
) -> DISTS:
    """DISTS in VGG16 of the file `path`, frozen; `weights` is the file of alpha and beta where it is not torchmetrics'.

    Raises FileNotFoundError naming the file, or ValueError for other weights than expected."""
    layout = LAYOUTS["vgg"]
    file = _file("dists", path, layout.file)
    own = _weights_of("dists", weights, "dists_models/weights.pt")
    given = Weights.read("dists", own)
    stages = Stages(layout, Weights.read("dists", file), smooth=True)
    alpha, beta = (given.named(name, 4).flatten() for name in ("alpha", "beta"))
    return DISTS(stages, alpha, beta, _name("dists", layout, file), _digest(file, own)).frozen(device)


def _file(name: str, path: str | None, public: str) -> Path:
    file = None if path is None else Path(path) / public if Path(path).is_dir() else Path(path)
    if file is None or not file.is_file():
        found = "null" if path is None else path
        raise FileNotFoundError(
            f"features {name}: path: found {found}, expected the local file {public} of torchvision: "
            f"https://download.pytorch.org/models/{public}"
        )
    return file


def _weights_of(name: str, given: str | None, inside: str) -> Path:
    """The file of the layers' weights: the given one, or that of torchmetrics."""
    spec = None if given is not None else importlib.util.find_spec("torchmetrics")
    package = Path(str(spec.origin)).parent if spec is not None else Path()
    file = package / "functional/image" / inside if given is None else Path(given)
    if not file.is_file():
        raise FileNotFoundError(
            f"features {name}: weights: {file}: no such file; expected the weights of the layers, which torchmetrics has as "
            f"functional/image/{inside}"
        )
    return file


def _name(name: str, layout: Layout, file: Path) -> str:
    """The plain name for the public file alone, whose name ends with the start of its sha256."""
    start = layout.file.removesuffix(".pth").rpartition("-")[2]
    return name if sha256_file(file).startswith(start) else f"{name}_other"


def _digest(*files: Path) -> str:
    return hashlib.sha256("".join(sha256_file(file) for file in files).encode()).hexdigest()
