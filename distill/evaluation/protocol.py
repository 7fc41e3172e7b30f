"""What was measured: the facts that make a number comparable, and the floor that real data reach."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from statistics import fmean

import torch
from torch import Tensor

from distill.evaluation.checks import check_labels
from distill.evaluation.frechet import fd
from distill.evaluation.kid import kid
from distill.evaluation.sliced import sliced_wasserstein


@dataclass(frozen=True)
class Protocol:
    """The `protocol` entry of metrics.json; two numbers compare only where all of it but `floor` agrees."""

    features: str
    """Name of the feature space, e.g. `digits64`; `fd` is an FID only for `inception`."""
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

    def to_dict(self) -> dict[str, object]:
        """Plain containers for JSON, in the order of the fields."""
        plain = asdict(self)
        plain["resolution"] = list(self.resolution)
        plain["floor"] = dict(self.floor)
        return plain

    def describe(self) -> str:
        """One line to print beside the numbers."""
        balance = "class-balanced samples" if self.class_balanced else "samples"
        weights = f" ({self.features_sha256[:8]})" if self.features_sha256 else ""
        size = "x".join(str(n) for n in self.resolution)
        text = (
            f"{self.features}{weights}: {self.count} {balance} against {self.reference_count} real images "
            f"of {size} ({self.reference}, {self.reference_digest[:8]}), k={self.k}, "
            f"{self.projections} projections, seed {self.seed}"
        )
        if self.straightness_steps is not None:
            text += f", straightness over {self.straightness_steps} steps"
        if self.floor:
            text += "; real halves: " + ", ".join(f"{name} {v:.4g}" for name, v in self.floor.items())
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
        labels = torch.zeros(count, dtype=torch.int64)
    check_labels("stratified_split", labels, count)
    groups = [(labels.cpu() == label).nonzero()[:, 0] for label in labels.unique().tolist()]
    exact = [len(group) * size / count for group in groups]
    quotas = [int(value) for value in exact]
    by_remainder = sorted(range(len(groups)), key=lambda i: quotas[i] - exact[i])
    for i in by_remainder[: size - sum(quotas)]:
        quotas[i] += 1
    rest, chosen = [], []
    for group, quota in zip(groups, quotas, strict=True):
        mixed = group[torch.randperm(len(group), generator=generator)]
        chosen.append(mixed[:quota])
        rest.append(mixed[quota:])
    return torch.cat(rest), torch.cat(chosen)


def real_floor(
    features: Tensor,
    images: Tensor,
    labels: Tensor | None,
    splits: int = 5,
    projections: int = 256,
    seed: int = 0,
) -> dict[str, float]:
    """`fd`, `kid` and `sliced_wasserstein` between two stratified halves of the real set, mean over `splits`.

    features [N, D], images [N, C, H, W], labels [N] or None. The two distances are biased upward by the
    small halves, so a good model measured with more samples may lie below them; `half` says how many.
    """
    if len(features) != len(images):
        raise ValueError(f"{len(features)} features belong to {len(images)} images")
    generator = torch.Generator().manual_seed(seed)
    found: dict[str, list[float]] = {"fd": [], "kid": [], "sliced_wasserstein": []}
    half = len(images) // 2
    for _ in range(splits):
        a, b = stratified_split(labels, len(images), half, generator)
        found["fd"].append(fd(features[a], features[b]))
        found["kid"].append(kid(features[a], features[b]))
        found["sliced_wasserstein"].append(sliced_wasserstein(images[a], images[b], projections, seed))
    return {name: fmean(values) for name, values in found.items()} | {"half": float(half)}
