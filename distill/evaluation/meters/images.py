"""Images against real images, in pixels and in a feature space."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from distill.data.source import decoded
from distill.evaluation.grid import image_grid, save_png
from distill.evaluation.measure import Reference, extract, measure
from distill.evaluation.meters.meter import Meter, Shown, at_least
from distill.models.features import FeatureExtractor

TRIED = 64  # real images that a trial measures
WIDTH = 8  # features of a trial: a distance of wide ones takes seconds
PICTURE_WIDTH = 2560  # pixels that the picture of samples may have


@dataclass
class ImageMeter(Meter):
    """Attributes:
    data: the real images, a source with `images` [n,C,H,W] in [-1, 1], `labels` and `name`; or latents of one.
    features: the feature extractor.
    k: neighbours of precision, recall, density and coverage.
    grid_columns: samples a row of the picture. real_row: a last row of real images of the same classes.
    """

    kind: ClassVar[str] = "images"

    data: Any
    features: Any
    k: int = 5
    grid_columns: int = 10
    real_row: bool = False

    def __post_init__(self) -> None:
        at_least(self, "k", "grid_columns")
        self.data = decoded(self.data)
        self.least, self.shown, self.caption = self.k + 2, self.grid_columns, "one noise a column"

    def fingerprint(self) -> str:
        """Of the real images and the extractor's weights."""
        return f"{self.data.fingerprint()} {self.features.name} {self.features.sha256}"

    def trial(
        self, sample_shape: Sequence[int], labels: Tensor | None
    ) -> tuple[dict[str, float | None], dict[str, float]]:
        """Raises ValueError where samples and data differ in shape, where the feature space does not read such images, or where
        the real set is too small."""
        real = self.data
        if not hasattr(real, "images"):
            raise ValueError(
                f"data: found {type(real).__name__}, which cannot be read as a whole; expected a set of images to "
                "compare with: type eval.meter.data={...} and monitor.data={...} (docs/data.md)"
            )
        if tuple(real.sample_shape) != tuple(sample_shape):
            raise ValueError(
                f"data: the real samples have the shape {list(real.sample_shape)}, but the models make {list(sample_shape)}"
            )
        if getattr(real, "value_range", ()) is None:
            raise ValueError(
                f"features: images [C,H,W] are expected, but the models make samples of shape {list(sample_shape)}; "
                "use eval=points and monitor=null for points"
            )
        chosen = few(real.labels, len(real), max(TRIED, 2 * self.least))
        images = real.fetch(chosen, chosen).x0
        try:
            with torch.no_grad():
                _, logits = self.features.features_and_logits(images[:2])
        except (ValueError, RuntimeError) as error:
            raise ValueError(f"features: {error}") from error
        stand_in: Any = _StandIn(self.features, logits)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of few images
            reference = Reference(
                images, None if real.labels is None else real.labels[chosen], stand_in, k=self.k
            )
            wanted = None if labels is None else labels[few(labels, len(labels), len(images))]
            made = images if wanted is None else images[: len(wanted)]
            return measure(made, wanted, reference, stand_in), reference.references(reference.floor())

    def prepare(self, seed: int, stream: str, count: int, device: torch.device) -> None:
        """Extract the features of all real images."""
        self.real = Reference(
            self.data.images.to(device),
            self.data.labels,
            self.features,
            k=self.k,
            seed=seed,
            classes=getattr(self.data, "classes", None),
        )
        self.device, self.description = device, f"{self.data.name}, all images"

    @torch.no_grad()
    def extract(self, samples: Tensor, device: torch.device) -> dict[str, Tensor]:
        """`features` [n,F] and, of an extractor that classifies, `predicted` [n]."""
        features, predicted = extract(self.features, samples.to(device, torch.float32))
        return {"features": features} | ({} if predicted is None else {"predicted": predicted})

    def measure(
        self, samples: Tensor, labels: Tensor | None, extracted: Mapping[str, Tensor] | None = None
    ) -> dict[str, float | None]:
        """See `measure.measure`."""
        assert isinstance(self.real, Reference)
        return measure(samples.to(self.device), labels, self.real, self.features, extracted)

    def draw(self, shown: Sequence[Shown], path: Path, seed: int, stream: str) -> None:
        """A labelled row of images each."""
        columns = max(2, min(self.grid_columns, PICTURE_WIDTH // shown[0].samples.shape[-1]))
        rows = [(row.title, row.samples[:columns]) for row in shown]
        if self.real_row:
            chosen = one_a_class(self.data.labels, columns, len(self.data))
            rows.append(("real", self.data.fetch(chosen, chosen).x0))
        save_png(image_grid(rows), path)


class _StandIn:
    """An extractor's name and classes with features that are cheap to compute: a trial finds out which numbers are defined."""

    def __init__(self, extractor: FeatureExtractor, logits: Tensor | None) -> None:
        self.name, self.dim, self.sha256 = extractor.name, min(extractor.dim, WIDTH), extractor.sha256
        self.full_count, self.preprocessing = extractor.full_count, extractor.preprocessing
        self.quantise, self.batch = extractor.quantise, TRIED
        self.classes = None if logits is None else logits.shape[1]

    def features_and_logits(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        """Features [B, D], cosines of sums of pixels, so that no two images agree; logits where the extractor has them."""
        rows = images.flatten(1).double()
        weights = torch.arange(1, rows.shape[1] + 1).double().sqrt()
        features = (
            ((rows * weights).sum(1, keepdim=True) + torch.arange(1, self.dim + 1).double()).cos().float()
        )
        return features, None if self.classes is None else features[:, :1].expand(-1, self.classes)


def few(labels: Tensor | None, count: int, wanted: int) -> Tensor:
    """Up to `wanted` of the numbers 0 .. count - 1: those of two samples of every class as far as they go, the rarest class
    first, so that a class of one sample is among them."""
    if labels is None:
        return torch.arange(min(count, wanted)) * count // min(count, wanted)
    _, classes, sizes = labels.unique(return_inverse=True, return_counts=True)
    rows = classes.argsort(stable=True)  # class by class
    turns = torch.arange(len(rows)) - (sizes.cumsum(0) - sizes)[classes[rows]]
    key = (turns // 2 * (1 + sizes.max()) + sizes[classes[rows]]) * len(sizes) + classes[rows]
    return rows[key.argsort(stable=True)[:wanted]].sort().values


def one_a_class(labels: Tensor | None, columns: int, count: int) -> Tensor:
    """Up to `columns` rows of a set of `count` images: the first ones, or with labels a class a column in turn, as the
    labels of samples go round the classes."""
    if labels is None:
        return torch.arange(min(columns, count))
    classes = [(labels == label).nonzero()[:, 0] for label in labels.unique()]
    turns = [(classes[c % len(classes)], c // len(classes)) for c in range(columns)]
    return torch.stack([rows[turn % len(rows)] for rows, turn in turns])
