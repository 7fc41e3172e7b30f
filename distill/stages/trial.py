"""Tries a measurement before anything is trained: data, feature space and gates must fit the samples to come."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from hydra.errors import InstantiationException
from hydra.utils import instantiate
from torch import Tensor

from distill.evaluation.measure import Reference, measure
from distill.models.features import FeatureExtractor
from distill.stages.targets import resolve

TRIED = 64  # real images that a trial measures
WIDTH = 8  # of the features that stand in: a distance of wide ones takes seconds


class _Stand:
    """An extractor's name and classes with features that cost nothing: a trial asks whether numbers can be had,
    not what they are."""

    def __init__(self, extractor: FeatureExtractor, logits: Tensor | None) -> None:
        self.name, self.dim, self.sha256 = extractor.name, min(extractor.dim, WIDTH), extractor.sha256
        self.full_count, self.preprocessing = extractor.full_count, extractor.preprocessing
        self.quantise, self.batch = extractor.quantise, TRIED
        self.classes = None if logits is None else logits.shape[1]

    def __call__(self, images: Tensor) -> Tensor:
        """Features [B, D]: cosines of sums of pixels, so that no two images agree."""
        rows = images.flatten(1).double()
        weights = torch.arange(1, rows.shape[1] + 1).double().sqrt()
        return ((rows * weights).sum(1, keepdim=True) + torch.arange(1, self.dim + 1).double()).cos().float()

    def features_and_logits(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        """Features, and logits where the extractor has them."""
        features = self(images)
        logits = None if self.classes is None else features[:, :1].expand(-1, self.classes)
        return features, logits


def try_images(
    data: Mapping[str, Any],
    features: Mapping[str, Any],
    sample_shape: Sequence[int],
    labels: Tensor | None,
    k: int,
) -> tuple[dict[str, float | None], dict[str, float]]:
    """(a row, values of the real set) of a measurement of images `sample_shape` against `data`: what is None there is
    None in the evaluation to come, whose samples have `labels` [count]; the numbers mean nothing.

    Raises ValueError where samples and data differ in shape, where the feature space does not read such images, or
    where the real set is too small."""
    for what, config in (("data", data), ("features", features)):
        resolve(config, what)
    real = instantiate(dict(data))
    if tuple(real.sample_shape) != tuple(sample_shape):
        raise ValueError(
            f"data: the real samples have the shape {list(real.sample_shape)}, but the models make {list(sample_shape)}"
        )
    if len(sample_shape) != 3:
        raise ValueError(
            f"features: images [C,H,W] are expected, but the models make samples of shape {list(sample_shape)}; "
            "use eval=points and monitor=null for points"
        )
    chosen = few(real.labels, len(real), max(TRIED, 2 * (k + 2)))
    images = real.fetch(chosen, chosen).x0
    real_labels = None if real.labels is None else real.labels[chosen]
    try:
        extractor = instantiate(dict(features))
        with torch.no_grad():
            _, logits = extractor.features_and_logits(images[:2])
    except InstantiationException as error:
        raise ValueError(f"features: {error.__cause__ or error}") from error
    except (ValueError, RuntimeError) as error:
        raise ValueError(f"features: {error}") from error
    stand: Any = _Stand(extractor, logits)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of few images
        reference = Reference(images, real_labels, stand, k=k)
        asked = None if labels is None else labels[few(labels, len(labels), len(images))]
        made = images[: len(images) if asked is None else len(asked)]
        return measure(made, asked, reference, stand), reference.references(reference.floor())


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
