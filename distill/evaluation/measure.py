"""One row of numbers for one set of images, against a reference whose half of the work is done once."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

import torch
from torch import Tensor

from distill.data.arguments import integer, pixels, warn_of_span
from distill.data.names import class_names
from distill.data.plain import plain_torch
from distill.evaluation.checks import as_rows, check_labels
from distill.evaluation.metric import metrics, values
from distill.evaluation.protocol import Protocol
from distill.evaluation.samples import Options, Samples, stratified_split
from distill.models.extractors.images import rounded
from distill.models.features import FeatureExtractor


def checked(name: str, images: Tensor) -> Tensor:
    """Images [N, C, H, W] as float32. Raises ValueError where they are no floats of the range [-1, 1]; warns where they
    leave it a little, or seem to lie in [0, 1]."""
    images = pixels(name, images).detach().to(torch.float32)
    warn_of_span(name, images, stacklevel=4)
    return images


@plain_torch()
@torch.no_grad()
def extract(extractor: FeatureExtractor, images: Tensor) -> tuple[Tensor, Tensor | None]:
    """Float64 features [N, F] and, where the extractor classifies, predicted classes [N] of images [N, C, H, W] in [-1, 1] that
    lie on the extractor's device, `extractor.batch` at a time.

    Images are rounded to the 256 levels of a file first where the extractor says so (`quantise`): the numbers are
    then those of the saved files.
    """
    features, predicted = [], []
    for part in images.split(extractor.batch):
        found, logits = extractor.features_and_logits(rounded(part) if extractor.quantise else part)
        features.append(found.to(torch.float64))
        if logits is not None:
            predicted.append(logits.argmax(1))
    return torch.cat(features), torch.cat(predicted) if predicted else None


class RealSet(Samples):
    """A real set: what it scores itself, and how rows that are compared with it were measured. `kind` says whose metrics apply:
    "images" or "points"."""

    kind = "images"

    def halves(self, splits: int) -> list[tuple[Tensor, Tensor]]:
        """Pairs of index tensors, `splits` times a stratified half and the other."""
        generator = torch.Generator("cpu").manual_seed(self.options.seed)
        half = len(self) // 2
        return [stratified_split(self.labels, len(self), half, generator) for _ in range(splits)]

    @plain_torch()
    @torch.no_grad()
    def floor(self, splits: int = 5) -> dict[str, float]:
        """The metrics with a `floor` of one half of the real set against the other, mean over `splits`.

        Distances are biased upward by the small halves, so a good model measured with more samples may lie below them; `half`
        says how many. Warns where the covariances of the halves are singular."""
        found: dict[str, list[float]] = {}
        for rows, others in self.halves(splits):
            real = self.part(others, "half of the real")
            half = self.part(rows, "half of the real", real)
            for known in metrics(self.kind):
                if known.floor and (value := known.measure(half)) is not None:
                    found.setdefault(known.name, []).append(value)
        return {name: fmean(each) for name, each in found.items()} | {"half": float(len(self) // 2)}

    @plain_torch()
    @torch.no_grad()
    def references(self, floor: Mapping[str, float] | None = None) -> dict[str, float]:
        """Values that gates may name: those that metrics have for the real set itself (`heldout_nn`, `pixel_std`, `class_std`,
        `class_accuracy`), where defined, and `floor_<metric>` for every entry of `floor`."""
        real = {m.real_key: self.once(m.real) for m in metrics(self.kind) if m.real is not None}
        known = {name: value for name, value in real.items() if value is not None}
        return known | {f"floor_{name}": value for name, value in (floor or {}).items()}

    def protocol(self, count: int, description: str, class_balanced: bool = True, **more: Any) -> Protocol:
        """The protocol of rows of `count` samples against this set; `more`: further entries. `floor` defaults to `floor()`."""
        floor = more.pop("floor", None)
        return Protocol(
            count=count,
            class_balanced=class_balanced,
            reference=description,
            reference_count=len(self),
            projections=self.options.projections,
            seed=self.options.seed,
            floor=self.floor() if floor is None else floor,
            **more,
        )


class Reference(RealSet):
    """Real images that rows are compared with; what metrics compute of them alone is shared by all rows.

    images [M, C, H, W] in [-1, 1] on the extractor's device, labels [M] integers or None. `k`, `projections`, `seed` and
    `heldout`: see `samples.Options`. `classes` names the labels, in their order: there is a `class_accuracy` only where the
    extractor's `classes` hold all of these names; without it, labels are taken as the numbers of the extractor's classes.
    Statistics and distances live on `device` (float64 is needed, so not on MPS).
    Raises ValueError for fewer than k + 1 images, labels of another length, non-finite pixels or features, or
    values that are no floats of the range [-1, 1] (images in [0, 255], say).
    """

    @plain_torch()
    def __init__(
        self,
        images: Tensor,
        labels: Tensor | None,
        extractor: FeatureExtractor,
        k: int = 5,
        projections: int = 256,
        seed: int = 0,
        heldout: int = 400,
        device: torch.device | str = "cpu",
        classes: Sequence[str] | None = None,
    ) -> None:
        k, projections = integer("k", k, at_least=1), integer("projections", projections, at_least=1)
        seed, heldout = integer("seed", seed), integer("heldout", heldout, at_least=1)
        images = checked("reference images", images)
        rows = as_rows("reference images", images, at_least=max(k + 1, 4))
        if labels is not None:
            check_labels("reference", labels, len(images))
        self.extractor, self.device = extractor, torch.device(device)
        self.resolution, self.digest = tuple(images.shape[1:]), _digest(images, labels)
        features, predicted = extract(extractor, images)
        super().__init__(
            "reference",
            rows.to(self.device),
            Options(k, projections, seed, heldout, extractor.name, _class_numbers(classes, extractor)),
            labels=None if labels is None else labels.cpu(),
            features=as_rows("reference features", features).to(self.device),
            predicted=predicted,
        )

    def protocol(self, count: int, description: str, class_balanced: bool = True, **more: Any) -> Protocol:
        """As `RealSet.protocol`, with the extractor and the images."""
        extractor = self.extractor
        return super().protocol(
            count,
            description,
            class_balanced,
            features=extractor.name,
            features_sha256=extractor.sha256,
            full_count=extractor.full_count,
            preprocessing=extractor.preprocessing,
            resolution=self.resolution,
            reference_digest=self.digest,
            k=self.options.k,
            **more,
        )


@plain_torch()
@torch.no_grad()
def measure(
    images: Tensor,
    labels: Tensor | None,
    reference: Reference,
    extractor: FeatureExtractor,
    extracted: Mapping[str, Tensor] | None = None,
) -> dict[str, float | None]:
    """The entries of a metrics.json row that follow from the samples alone; None where a metric is undefined.

    images [N, C, H, W] in [-1, 1] on the extractor's device, labels [N] (the requested classes) or None. Pixels
    are taken as they are: the caller clamps. `extracted`: what `extract` finds, if it is known: `features` and perhaps
    `predicted`. Raises ValueError for fewer than k + 1 samples, another resolution or extractor
    than the reference's, non-finite pixels, or values that are no floats of the range [-1, 1] (images in [0, 255], say).
    """
    wanted = reference.extractor
    if (extractor.name, extractor.sha256) != (wanted.name, wanted.sha256):
        raise ValueError(f"the reference was made with {wanted.name}, not with {extractor.name}")
    images = checked("generated images", images)
    if tuple(images.shape[1:]) != reference.resolution:
        expected, found = list(reference.resolution), list(images.shape[1:])
        raise ValueError(f"generated images are {found}, the reference images are {expected}")
    rows = as_rows("generated images", images, at_least=reference.options.k + 1).to(reference.device)
    if labels is not None:
        check_labels("generated", labels, len(images))
    if extracted is None:
        features, predicted = extract(extractor, images)
    else:
        features, predicted = extracted["features"], extracted.get("predicted")
    samples = Samples(
        "generated",
        rows,
        reference.options,
        reference,
        labels=labels,
        features=features.to(reference.device),
        predicted=predicted,
    )
    return values(samples, "images")


def _class_numbers(classes: Sequence[str] | None, extractor: FeatureExtractor) -> Tensor | None:
    """[classes] the extractor's number of each named class; empty where it does not know one, None where nothing is
    named."""
    known = getattr(extractor, "classes", None)
    if not classes or known is None:
        return None
    names = class_names(classes)
    found = [known.index(name) for name in names] if set(names) <= set(known) else []
    return torch.tensor(found, dtype=torch.int64)


def _digest(images: Tensor, labels: Tensor | None) -> str:
    """sha256 over float32 pixels and int64 labels, as the data sets' `fingerprint`."""
    found = hashlib.sha256(images.detach().cpu().float().contiguous().numpy().tobytes())
    if labels is not None:
        found.update(labels.cpu().to(torch.int64).contiguous().numpy().tobytes())
    return found.hexdigest()
