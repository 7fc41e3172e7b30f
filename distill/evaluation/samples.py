"""The sets of samples that metrics read: values, features and labels, with shared work done once a set."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor

from distill.evaluation.checks import check_labels
from distill.evaluation.paths import EulerPath
from distill.models.generator import Generator

Result = TypeVar("Result")


@dataclass(frozen=True)
class Options:
    """What the metrics of one evaluation share.

    Attributes:
        k: neighbours of precision, recall, density and coverage. projections: directions of the sliced Wasserstein distance.
        seed: of the directions and of splits. heldout: real images set aside for `heldout_nn`, at most a quarter of them.
        space: name of the feature space. class_numbers: [classes] the extractor's number of each class; empty where it does not
            know one, None where labels are its numbers.
    """

    k: int = 5
    projections: int = 256
    seed: int = 0
    heldout: int = 400
    space: str = ""
    class_numbers: Tensor | None = None


@dataclass(eq=False)
class Samples:
    """A set of N samples.

    Attributes:
        name: what messages call the set: "generated", "reference".
        values: [N, D] float64, pixels in [-1, 1] or coordinates.
        real: the set that these are compared with; None for the real set itself.
        labels (as those that follow, None where there are none): [N] int64 classes that were requested.
        features: [N, F] float64. predicted: [N] classes found by the extractor.
        noise: [N, D] the initial noise of the samples.
    """

    name: str
    values: Tensor
    options: Options = field(default_factory=Options)
    real: Any = None
    labels: Any = None
    features: Any = None
    predicted: Any = None
    noise: Any = None
    _done: dict[Callable[[Any], Any], Any] = field(default_factory=dict, repr=False)

    def __len__(self) -> int:
        return len(self.values)

    def once(self, work: Callable[[Any], Result]) -> Result:
        """`work(self)`, computed once."""
        if work not in self._done:
            self._done[work] = work(self)
        result: Result = self._done[work]
        return result

    def part(self, rows: Tensor, name: str, real: Samples | None = None) -> Samples:
        """The samples `rows` as a set of their own, compared with `real`."""
        picked: dict[str, Any] = {
            key: None if (found := getattr(self, key)) is None else found[rows.to(found.device)]
            for key in ("values", "labels", "features", "predicted", "noise")
        }
        return Samples(name=name, options=self.options, real=real, **picked)


@dataclass(frozen=True)
class Sampled:
    """How the samples of a row were made: what a metric of `rows` reads.

    Attributes:
        steps, count, seconds: sampler steps, samples, and the time that sampling took.
        samples: [N, *S]. followed: [N, *S] the samples of the row that this one follows, or None.
        clip: CLIP score of samples of a model's prompts, for meters that have it, or None.
        latents, followed_latents: the same before decoding, for meters that ask for them, or None.
        path: how straight the model's flow is, or None.
        facts: what the stage that trained the model recorded.
    """

    generator: Generator
    steps: int
    count: int
    seconds: float
    samples: Tensor
    followed: Tensor | None = None
    path: EulerPath | None = None
    facts: dict[str, Any] = field(default_factory=dict)
    latents: Tensor | None = None
    followed_latents: Tensor | None = None
    clip: Callable[[Tensor, Generator], float] | None = None


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
