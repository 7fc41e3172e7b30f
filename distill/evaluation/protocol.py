"""What was measured: the facts that make a number comparable, and the floor that real data reach."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from statistics import fmean
from typing import Any

import torch
from torch import Tensor

from distill.data.plain import plain_torch
from distill.evaluation.checks import check_labels
from distill.evaluation.metrics.cmmd import cmmd, unit_rows
from distill.evaluation.metrics.frechet import frechet_distance, moments
from distill.evaluation.metrics.kid import kid
from distill.evaluation.metrics.sliced import sliced_wasserstein
from distill.typed import parse

# Metrics of a feature space: in another space they are other numbers, so they carry its name.
OF_FEATURES = ("fd", "kid", "precision", "recall", "density", "coverage", "class_accuracy")
# Metrics that carry the count where it is below the extractor's `full_count`. The expected value of fd, cmmd and
# sliced_wasserstein falls, and that of recall and coverage rises, with the number of samples. kid is unbiased, but
# its spread grows as 1 / N until signs mean nothing, and what is published is of one count. Precision, density,
# nn_train and class_accuracy are means over samples: any count estimates the same value.
OF_COUNT = ("fd", "kid", "cmmd", "recall", "coverage", "sliced_wasserstein")


def is_clip(features: str) -> bool:
    """Whether a feature space is an image tower of CLIP, for which CMMD is defined."""
    return features == "clip" or features.startswith("clip_")


@dataclass(frozen=True)
class Protocol:
    """The `protocol` entry of metrics.json; two numbers compare only where all of it but `floor` agrees."""

    features: str
    """Name of the feature space, e.g. `digits64`; `fd` is an FID only for `inception` (see `names`)."""
    features_sha256: str | None
    """sha256 of the extractor's weight file."""
    count: int
    """Generated samples a row."""
    class_balanced: bool
    """Whether every class has equally many of them."""
    reference: str
    """The real set in words, e.g. `digits, all images`."""
    reference_count: int
    reference_digest: str
    """sha256 of the real images and labels."""
    resolution: tuple[int, ...]
    """[C, H, W] of the images."""
    k: int = 5
    """Neighbours of precision, recall, density and coverage, the point itself not counted."""
    projections: int = 256
    """Directions of the sliced Wasserstein distance."""
    seed: int = 0
    """Of the samples' noise, the directions and the splits."""
    straightness_steps: int | None = None
    """Solver steps along which straightness is measured; None where it is not."""
    floor: Mapping[str, float] = field(default_factory=dict)
    """`real_floor`: what one half of the real set scores against the other."""
    full_count: int | None = None
    """Samples from which on a metric's plain name is used; None (files of older versions): never."""
    preprocessing: str = ""
    """What happens to images before the extractor's network, in words; empty: nothing."""

    def names(self, count: int | None = None) -> dict[str, str]:
        """metric -> the name under which its number is printed, for all metrics that a plain name would belie.

        Metrics of a feature space carry its name: `fd_digits64`. `fid` is the fd of `inception` alone, `cmmd`
        that of the CLIP tower of its paper (others: `cmmd_clip_...`; absent for features of no CLIP). Where the
        count (default: the protocol's) is below `full_count`, the metrics of `OF_COUNT` carry it too:
        `fd_digits64@500`, `fid@5000`; so no proxy is quoted as the metric.
        """
        count = self.count if count is None else count
        names = {metric: f"{metric}_{self.features}" for metric in OF_FEATURES}
        names["sliced_wasserstein"] = "sliced_wasserstein"
        if self.features == "inception":
            names["fd"] = "fid"
        if is_clip(self.features):
            names["cmmd"] = "cmmd" if self.features == "clip" else f"cmmd_{self.features}"
        if self.full_count is None or count < self.full_count:
            names |= {metric: f"{names[metric]}@{count}" for metric in OF_COUNT if metric in names}
        return names

    def to_dict(self) -> dict[str, object]:
        """Plain containers for JSON, in the order of the fields, and `names`."""
        plain = asdict(self)
        plain["resolution"] = list(self.resolution)
        plain["floor"] = dict(self.floor)
        plain["names"] = self.names()
        return plain

    @classmethod
    def from_dict(cls, plain: Mapping[str, Any]) -> Protocol:
        """The inverse of `to_dict`; reads the entries of older files, which have no `names` or `full_count`.

        Raises ValueError naming an entry that is missing, unknown or of another type.
        """
        if not isinstance(plain, Mapping):
            raise ValueError(f"protocol: found {plain!r}, expected a mapping")
        return parse(cls, {key: value for key, value in plain.items() if key != "names"}, "protocol")

    def describe(self) -> str:
        """One line to print beside the numbers."""
        balance = "class-balanced samples" if self.class_balanced else "samples"
        weights = f" ({self.features_sha256[:8]})" if self.features_sha256 else ""
        size = "x".join(str(n) for n in self.resolution)
        points = len(self.resolution) == 1  # measured as they are: no features, no neighbours
        what = f"real points of {size} coordinates" if points else f"real images of {size}"
        reduced = self.full_count is not None and self.count < self.full_count
        text = (
            f"{self.features}{weights}: {self.count} {balance}"
            + (f" (reduced: the full count is {self.full_count})" if reduced else "")
            + f" against {self.reference_count} {what} ({self.reference}, {self.reference_digest[:8]}), "
            + ("" if points else f"k={self.k}, ")
            + f"{self.projections} projections, seed {self.seed}"
        )
        if self.preprocessing:
            text += f", network input {self.preprocessing}"
        if self.straightness_steps is not None:
            text += f", straightness over {self.straightness_steps} steps"
        if self.floor:
            half = int(self.floor.get("half", self.reference_count // 2))
            names = self.names(half)
            values = [f"{names.get(m, m)} {value:.4g}" for m, value in self.floor.items() if m != "half"]
            text += f"; real halves of {half}: " + ", ".join(values)
        return text


def stratified_split(
    labels: Tensor | None, count: int, size: int, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Indices (the rest, `size` chosen ones) of `count` samples, classes in the same proportions in both.

    The class quotas are rounded by largest remainder so that exactly `size` are chosen; `labels` [count] or
    None for one class. A split that ignores classes gives a floor two to three times as high.
    Raises ValueError unless 0 < size < count.
    """
    if not 0 < size < count:
        raise ValueError(f"cannot choose {size} of {count} samples and leave some")
    if labels is None:
        labels = torch.zeros(count, dtype=torch.int64, device="cpu")
    check_labels("stratified_split", labels, count)
    groups = [(labels.cpu() == label).nonzero()[:, 0] for label in labels.unique().tolist()]
    exact = [len(group) * size / count for group in groups]
    quotas = [int(value) for value in exact]
    by_remainder = sorted(range(len(groups)), key=lambda i: quotas[i] - exact[i])
    for i in by_remainder[: size - sum(quotas)]:
        quotas[i] += 1
    rest, chosen = [], []
    for group, quota in zip(groups, quotas, strict=True):
        mixed = group[torch.randperm(len(group), generator=generator, device="cpu")]
        chosen.append(mixed[:quota])
        rest.append(mixed[quota:])
    return torch.cat(rest), torch.cat(chosen)


@plain_torch()
def real_floor(
    features: Tensor,
    images: Tensor,
    labels: Tensor | None,
    splits: int = 5,
    projections: int = 256,
    seed: int = 0,
    clip: bool = False,
) -> dict[str, float]:
    """`fd`, `kid` and `sliced_wasserstein` between two stratified halves of the real set, mean over `splits`;
    with `clip`, whose features these are, also `cmmd`.

    features [N, D], images [N, C, H, W], labels [N] or None. fd, cmmd and sliced_wasserstein are biased upward by
    the small halves, so a good model measured with more samples may lie below them; `half` says how many.
    Warns where the covariances of the halves are singular; ValueError if the counts differ.
    """
    if len(features) != len(images):
        raise ValueError(f"{len(features)} features belong to {len(images)} images")
    generator = torch.Generator("cpu").manual_seed(seed)
    metrics = ("fd", "kid", "sliced_wasserstein", *(("cmmd",) if clip else ()))
    found: dict[str, list[float]] = {metric: [] for metric in metrics}
    half = len(images) // 2
    for _ in range(splits):
        a, b = stratified_split(labels, len(images), half, generator)
        pair = [moments(features[half_of], "half of the real features") for half_of in (a, b)]
        found["fd"].append(frechet_distance(*pair[0], *pair[1]))
        found["kid"].append(kid(features[a], features[b]))
        found["sliced_wasserstein"].append(sliced_wasserstein(images[a], images[b], projections, seed))
        if clip:
            found["cmmd"].append(cmmd(unit_rows(features[a]), unit_rows(features[b])))
    return {name: fmean(values) for name, values in found.items()} | {"half": float(half)}
