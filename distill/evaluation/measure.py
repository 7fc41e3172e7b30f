"""One row of numbers for one set of samples, against a reference whose half of the work is done once."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

import torch
from torch import Tensor

from distill.data.arguments import integer, pixels, warn_of_span
from distill.data.names import class_names
from distill.data.plain import plain_torch
from distill.evaluation.checks import as_rows, check_labels
from distill.evaluation.metrics.cmmd import cmmd, mean_kernel, unit_rows
from distill.evaluation.metrics.diversity import class_std, nn_train, pixel_std
from distill.evaluation.metrics.frechet import frechet_distance, moments
from distill.evaluation.metrics.kid import kid, self_similarity
from distill.evaluation.metrics.precision import manifold, squared_radii
from distill.evaluation.metrics.sliced import quantile_distance, sorted_projections
from distill.evaluation.protocol import Protocol, is_clip, real_floor, stratified_split
from distill.models.extractors.images import rounded
from distill.models.features import FeatureExtractor

HELDOUT_SPLITS = 5


def checked(name: str, images: Tensor) -> Tensor:
    """Images [N, C, H, W] as float32. Raises ValueError where they are no floats of the range [-1, 1]; warns where they
    leave it a little, or seem to lie in [0, 1]."""
    images = pixels(name, images).detach().to(torch.float32)
    warn_of_span(name, images, stacklevel=4)
    return images


@dataclass(frozen=True)
class Extracted:
    """Float64 features [N, D] and, where the extractor classifies, its predicted classes [N]."""

    features: Tensor
    predicted: Tensor | None


@plain_torch()
@torch.no_grad()
def extract(extractor: FeatureExtractor, images: Tensor) -> Extracted:
    """Features of images [N, C, H, W] in [-1, 1] that lie on the extractor's device, `extractor.batch` at a time.

    Images are rounded to the 256 levels of a file first where the extractor says so (`quantise`): the numbers are
    then those of the saved files.
    """
    features, predicted = [], []
    for part in images.split(extractor.batch):
        found, logits = extractor.features_and_logits(rounded(part) if extractor.quantise else part)
        features.append(found.to(torch.float64))
        if logits is not None:
            predicted.append(logits.argmax(1))
    return Extracted(torch.cat(features), torch.cat(predicted) if predicted else None)


class Reference:
    """The real set: features, moments, radii and sorted projections, computed once and shared by all rows.

    images [M, C, H, W] in [-1, 1] on the extractor's device, labels [M] integers or None. `heldout` images
    (default 400, at most a quarter of the set) are set aside for `heldout_nn`: their mean distance to the
    nearest remaining image, averaged over five stratified splits. It is what an honest sampler reaches;
    `nn_train` below 0.9 of it says that samples copy training images.
    `classes` names the labels, in their order: there is a `class_accuracy` only where the extractor's `classes` hold all of
    these names. Without it, labels are taken as the numbers of the extractor's classes.
    The statistics and all later distances live on `device` (float64 is needed, so not on MPS).
    Raises ValueError for fewer than k + 1 images, labels of another length, non-finite pixels or
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
        self.k, self.projections, self.seed = k, projections, seed
        self.extractor_id = (extractor.name, extractor.sha256)
        self.full_count, self.preprocessing = extractor.full_count, extractor.preprocessing
        self.device = torch.device(device)
        self.resolution = tuple(images.shape[1:])
        self.images = rows.to(self.device)
        self.labels = None if labels is None else labels.cpu()
        self.digest = _digest(images, labels)
        extracted = extract(extractor, images)
        self.features = extracted.features.to(self.device)
        self.class_numbers = _class_numbers(classes, extractor)
        self.class_accuracy = self.accuracy(extracted.predicted, labels)
        self.mean, self.cov = moments(self.features, "reference features")
        self.radii = squared_radii(self.features, k, "reference features")
        self.similarity = self_similarity(self.features, "reference features")
        self.kernel = self._clip_kernel()
        self.sorted = sorted_projections(self.images, projections, seed, "reference images")
        self.pixel_std = pixel_std(self.images)
        self.class_std = _class_std(self.images, self.labels)
        self.heldout_nn = self._heldout_distance(min(heldout, len(images) // 4))

    def accuracy(self, predicted: Tensor | None, labels: Tensor | None) -> float | None:
        """Share of predicted classes [N] that are those of the labels [N]; None without either, or where the labels name
        classes that the extractor does not know."""
        numbers = self.class_numbers
        if predicted is None or labels is None or (numbers is not None and len(numbers) == 0):
            return None
        labels = labels.to(predicted.device)
        if numbers is not None:
            if int(labels.max()) >= len(numbers):
                raise ValueError(f"labels: found class {int(labels.max())}, the reference has {len(numbers)}")
            labels = numbers.to(labels.device)[labels]
        return float((predicted == labels).double().mean())

    def _clip_kernel(self) -> Tensor | None:
        """The real half of CMMD; None for features of no CLIP."""
        if not is_clip(self.extractor_id[0]):
            return None
        self.embeddings = unit_rows(self.features, "reference embeddings")
        return mean_kernel(self.embeddings, self.embeddings)

    def _heldout_distance(self, size: int) -> float:
        generator = torch.Generator("cpu").manual_seed(self.seed)
        distances = []
        for _ in range(HELDOUT_SPLITS):
            rest, held = stratified_split(self.labels, len(self.images), size, generator)
            distances.append(nn_train(self.images[held], self.images[rest]))
        return fmean(distances)

    def floor(self, splits: int = 5) -> dict[str, float]:
        """`real_floor` of this set."""
        clip = self.kernel is not None
        return real_floor(self.features, self.images, self.labels, splits, self.projections, self.seed, clip)

    def references(self, floor: Mapping[str, float] | None = None) -> dict[str, float]:
        """Values of the real set that gates may name.

        `heldout_nn`, `pixel_std`, `class_std`, `class_accuracy` (the latter two where defined), and
        `floor_<metric>` for every entry of `floor`.
        """
        values = {
            "heldout_nn": self.heldout_nn,
            "pixel_std": self.pixel_std,
            "class_std": self.class_std,
            "class_accuracy": self.class_accuracy,
        }
        known = {name: value for name, value in values.items() if value is not None}
        return known | {f"floor_{name}": value for name, value in (floor or {}).items()}

    def protocol(
        self,
        count: int,
        description: str,
        class_balanced: bool = True,
        straightness_steps: int | None = None,
        floor: Mapping[str, float] | None = None,
    ) -> Protocol:
        """The protocol of rows of `count` samples against this set; `floor` defaults to `floor()`."""
        return Protocol(
            features=self.extractor_id[0],
            features_sha256=self.extractor_id[1],
            count=count,
            class_balanced=class_balanced,
            reference=description,
            reference_count=len(self.images),
            reference_digest=self.digest,
            resolution=self.resolution,
            k=self.k,
            projections=self.projections,
            seed=self.seed,
            straightness_steps=straightness_steps,
            floor=self.floor() if floor is None else floor,
            full_count=self.full_count,
            preprocessing=self.preprocessing,
        )


@plain_torch()
@torch.no_grad()
def measure(
    images: Tensor, labels: Tensor | None, reference: Reference, extractor: FeatureExtractor
) -> dict[str, float | None]:
    """The entries of a metrics.json row that follow from the samples alone.

    images [N, C, H, W] in [-1, 1] on the extractor's device, labels [N] (the class asked for) or None. Pixels
    are taken as they are: the caller clamps. `class_std` is None without labels or where a class has one
    sample only (a smoke run), `class_accuracy` (a fraction) without labels, without logits, or
    where the reference's class names are not the extractor's, `cmmd` for
    features of no CLIP. Raises ValueError for fewer than k + 1 samples, another resolution or extractor
    than the reference's, non-finite pixels, or values that are no floats of the range [-1, 1] (images in [0, 255], say).
    """
    if (extractor.name, extractor.sha256) != reference.extractor_id:
        raise ValueError(
            f"the reference was made with {reference.extractor_id[0]}, not with {extractor.name}"
        )
    images = checked("generated images", images)
    if tuple(images.shape[1:]) != reference.resolution:
        expected, found = list(reference.resolution), list(images.shape[1:])
        raise ValueError(f"generated images are {found}, the reference images are {expected}")
    rows = as_rows("generated images", images, at_least=reference.k + 1).to(reference.device)
    if labels is not None:
        check_labels("generated", labels, len(images))
    extracted = extract(extractor, images)
    features = extracted.features.to(reference.device)
    balls = manifold(features, reference.features, reference.k, reference.radii)
    projected = sorted_projections(rows, reference.projections, reference.seed)
    return {
        "fd": frechet_distance(*moments(features, "generated features"), reference.mean, reference.cov),
        "kid": kid(features, reference.features, reference.similarity),
        "cmmd": _cmmd(features, reference),
        "sliced_wasserstein": quantile_distance(projected, reference.sorted),
        "precision": balls.precision,
        "recall": balls.recall,
        "density": balls.density,
        "coverage": balls.coverage,
        "class_std": _class_std(rows, labels),
        "pixel_std": pixel_std(rows),
        "nn_train": nn_train(rows, reference.images),
        "class_accuracy": reference.accuracy(extracted.predicted, labels),
    }


def _cmmd(features: Tensor, reference: Reference) -> float | None:
    if reference.kernel is None:
        return None
    return cmmd(unit_rows(features, "generated embeddings"), reference.embeddings, reference.kernel)


def _class_std(images: Tensor, labels: Tensor | None) -> float | None:
    if labels is None or int(labels.unique(return_counts=True)[1].min()) < 2:
        return None
    return class_std(images, labels)


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
