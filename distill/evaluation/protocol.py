"""The protocol of an evaluation: everything that two numbers must share to be compared, and the names of its metrics."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from distill.evaluation.metric import metrics
from distill.typed import parse

NO_FEATURES = "none"  # in place of a feature space, where nothing real is compared with


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
    """What one half of the real set scores against the other."""
    full_count: int | None = None
    """Samples from which on a metric's plain name is used; None (files of older versions): never."""
    preprocessing: str = ""
    """What happens to images before the extractor's network, in words; empty: nothing."""

    def names(self, count: int | None = None) -> dict[str, str]:
        """metric -> the name under which its number is printed, for metrics that depend on features or count.

        Metrics of a feature space carry its name: `fd_digits64`. `fid` is the fd of `inception` alone, `cmmd`
        that of the CLIP tower of its paper (others: `cmmd_clip_...`; absent for features of no CLIP). Where the
        count (default: the protocol's) is below `full_count`, the metrics that depend on it carry it too:
        `fd_digits64@500`, `fid@5000`; never under the plain name.
        """
        count = self.count if count is None else count
        reduced = f"@{count}" if self.full_count is None or count < self.full_count else ""
        names = {}
        for known in metrics():
            name = known.name_in(self.features)
            if name is not None and (known.in_space or known.of_count):
                names[known.name] = name + reduced * known.of_count
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

    @property
    def of_points(self) -> bool:
        """Whether points were measured, as they are: without features and neighbours."""
        return self.features == "points"

    def describe(self) -> str:
        """One line to print beside the numbers."""
        if self.features == NO_FEATURES:
            return f"{self.count} samples, seed {self.seed}, compared with no real images"
        balance = "class-balanced samples" if self.class_balanced else "samples"
        weights = f" ({self.features_sha256[:8]})" if self.features_sha256 else ""
        size = "x".join(str(n) for n in self.resolution)
        points = self.of_points
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
