"""The metrics of `evaluation.metrics` as `torchmetrics.Metric`, for any LightningModule: `SampleMetric("fd", extractor)`.

Values over several processes are those of one process on all samples: what was seen is gathered, and counts and sums are added.

Take from torchmetrics itself what it has: `image.kid.KernelInceptionDistance` (KID as published, the mean over random subsets;
of all rows at once it equals our `kid`), `image.inception.InceptionScore`, `multimodal.CLIPScore`, `MeanSquaredError` (our
`teacher_mse`), `image.lpip.LearnedPerceptualImagePatchSimilarity` and `image.DeepImageStructureAndTextureSimilarity`.
Ours stay, because:

- fd: `FrechetInceptionDistance` needs torch-fidelity and squares sums of features, which loses digits; ours centres them first.
- kid: without subsets it has no randomness of its own. cmmd, precision, recall, density, coverage, sliced_wasserstein, energy,
  class_std, pixel_std, nn_train, transport_cost, straightness: torchmetrics has none.
- class_accuracy: predictions are those of the feature extractor's own classifier.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric

from distill.evaluation.checks import as_rows
from distill.evaluation.measure import checked, extract
from distill.evaluation.metric import Metric as Declared
from distill.evaluation.metric import metric, metrics
from distill.evaluation.samples import Options, Samples
from distill.process.base import at_least_float32

SIDES = ("generated", "reference")


class SampleMetric(Metric):
    """One metric of a set of samples, most of them compared with a real set.

    Args:
        name: of a metric of samples: "fd", "recall", "energy", ...
        extractor: the feature space, on the device of the samples; needed for metrics of features and of predicted classes.
        k, projections, seed: see `evaluation.samples.Options`.
        keep_real: `reset` keeps the real set.

    `forward` returns the value of its batch against the real set; real samples are added by `update(..., real=True)`.
    Over several processes each must have samples of one side at least.

    Raises ValueError for another name, or without an extractor that the metric needs.
    """

    is_differentiable = False
    full_state_update = (
        True  # else `forward` merges its batch's state, of which the real set is a part, into the whole
    )

    def __init__(
        self,
        name: str,
        extractor: Any = None,
        *,
        k: int = 5,
        projections: int = 256,
        seed: int = 0,
        keep_real: bool = True,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        known = {metric.name: metric for metric in metrics() if not metric.rows}
        if name not in known:
            raise ValueError(f"name: found {name!r}, expected one of {', '.join(known)}")
        self.name, self.keep_real = name, keep_real
        self._extractor = [extractor]  # in a list: its weights are no part of the module's checkpoint
        extracted = {"features", "predicted"} & set(self.metric.reads)
        if extracted and extractor is None:
            raise ValueError(f"extractor: found None, but {name!r} is a metric of features")
        space = "" if extractor is None else extractor.name
        self.options = Options(k, projections, seed, space=space)
        for side in SIDES:
            for key in self.metric.reads:
                self.add_state(f"{side}_{key}", default=[], dist_reduce_fx="cat")

    @property
    def metric(self) -> Declared:
        """The declaration, which holds functions and cannot be pickled."""
        return metric(self.name)

    @property
    def higher_is_better(self) -> bool | None:  # type: ignore[override]
        """None where the real set's value, or neither direction, is best."""
        return {"higher": True, "lower": False}.get(self.metric.better)

    @torch.no_grad()
    def update(
        self,
        samples: Tensor,
        labels: Tensor | None = None,
        noise: Tensor | None = None,
        *,
        real: bool = False,
    ) -> None:
        """Add samples [N, *S], images in [-1, 1] or points, to the generated set, or to the real one.

        labels: [N] int64 classes, for class_std and class_accuracy. noise: [N, *S] the initial noise, for transport_cost.
        Raises ValueError where they are missing, and what `evaluation.measure.measure` raises for samples."""
        name = SIDES[real]
        images = checked(f"{name} images", samples) if self.metric.of == "images" else samples
        found: dict[str, Any] = {"labels": labels, "values": as_rows(f"{name} samples", images)}
        found["noise"] = None if noise is None else as_rows("noise", noise)
        if {"features", "predicted"} & set(self.metric.reads):
            found["features"], found["predicted"] = extract(self._extractor[0], images)
        for key in self.metric.reads:
            if found[key] is None:
                raise ValueError(f"{key}: missing; {self.metric.name!r} is a metric of samples with {key}")
            getattr(self, f"{name}_{key}").append(found[key])

    @torch.no_grad()
    def compute(self) -> Tensor:
        """The value (0-d, float64). Raises ValueError where it is undefined, or without samples."""
        real = self._set("reference", None)
        generated = self._set("generated", real)
        value = self.metric.measure(generated)
        if value is None:
            raise ValueError(
                f"{self.metric.name}: is undefined for these samples, or in {self.options.space!r}"
            )
        return torch.tensor(value, dtype=torch.float64, device=self.device)

    def sync(self, *args: Any, **kwargs: Any) -> None:
        """Gather the states of all processes; one without samples of a side joins in with none of their width and type."""
        for key in self.metric.reads:
            for side, other in (SIDES, SIDES[::-1]):
                if not getattr(self, f"{side}_{key}") and (there := getattr(self, f"{other}_{key}")):
                    setattr(self, f"{side}_{key}", [there[0][:0]])
        super().sync(*args, **kwargs)

    def reset(self) -> None:
        """Forget the samples; with `keep_real`, not the real ones."""
        held = {key: getattr(self, key) for key in self._defaults if key.startswith("reference_")}
        kept = {key: list(value) if isinstance(value, list) else value for key, value in held.items()}
        super().reset()
        for key, value in (kept if self.keep_real else {}).items():
            setattr(self, key, value)

    def _set(self, side: str, real: Samples | None) -> Samples:
        held = {key: getattr(self, f"{side}_{key}") for key in self.metric.reads}
        joined: dict[str, Any] = {
            key: value if isinstance(value, Tensor) else torch.cat(value) if value else torch.empty(0, 1)
            for key, value in held.items()
        }
        values = joined.pop("values", torch.empty(0, 1))
        return Samples(side, values, self.options, real, **joined)


class Straightness(Metric):
    """S of a flow's Euler paths, or with `normalise` S over mean |z - x0|^2 (`samplers.straightness`), over all updates."""

    is_differentiable = False
    full_state_update = False
    higher_is_better = False
    deviation: Tensor
    chord: Tensor
    count: Tensor

    def __init__(self, *, normalise: bool = False, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.normalise = normalise
        for name in ("deviation", "chord", "count"):
            self.add_state(name, default=torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")

    @torch.no_grad()
    def update(self, path: Tensor, velocities: Tensor) -> None:
        """Add a path [N + 1, B, *S] with its velocities [N, B, *S], as `samplers.ode.rollout` returns them; N >= 2."""
        if len(velocities) < 2 or path.shape != (len(velocities) + 1, *velocities.shape[1:]):
            raise ValueError(
                f"path: found {list(path.shape)} and velocities {list(velocities.shape)}, expected [N + 1, B, *S] and "
                "[N, B, *S] with N of at least 2"
            )
        path, velocities = at_least_float32(path), at_least_float32(velocities)
        chord = path[0] - path[-1]
        self.deviation += (chord - velocities).square().flatten(2).sum(2).mean(0).double().sum()
        self.chord += chord.square().flatten(1).sum(1).double().sum()
        self.count += path.shape[1]

    def compute(self) -> Tensor:
        """The value (0-d, float64)."""
        return self.deviation / (self.chord if self.normalise else self.count)
