"""The Exact stage: a teacher in closed form, without training."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from distill.data.points import mixture_means
from distill.models.analytic import GaussianMixture, exact_denoiser
from distill.models.build import build_process
from distill.models.denoiser import Denoiser
from distill.models.native import describe, save_model
from distill.models.spec import SamplerSpec
from distill.stages.base import ModelStage, StageContext, check_types
from distill.stages.made import Made, Part

STEPS = 100  # default number of Euler steps


@dataclass
class Exact(ModelStage):
    """Save the exact denoiser of a mixture of Gaussians with equal weights (`models.analytic`) as a model folder.

    Attributes:
        process: config of the noise process.
        ring: {count, radius} of component means on a circle; exclusive with `means`.
        means: [K, D] component means.
        std: standard deviation of each component.
        labelled: whether component k is class k; the null condition is the whole mixture.
    """

    process: dict[str, Any]
    ring: dict[str, Any] | None = None
    means: list[Any] | None = None
    std: float = 0.1
    labelled: bool = False

    def __post_init__(self) -> None:
        check_types(self)
        self._denoiser()  # raises for wrong options

    def dry_run(self, before: Mapping[str, Made]) -> Made:
        """Build the model."""
        denoiser = self._denoiser()
        net = denoiser.net
        assert isinstance(net, GaussianMixture)
        return Made(model=Part(denoiser, net.config(), self._spec(denoiser)))

    def run(self, context: StageContext) -> dict[str, Any]:
        """Save the model folder."""
        denoiser = self._denoiser()
        net = denoiser.net
        assert isinstance(net, GaussianMixture)
        spec = self._spec(denoiser)
        if context.world.main:
            save_model(context.folder, net.state_dict(), describe(denoiser, net.config(), spec))
        return {"train_seconds": None, "peak_memory_bytes": None}

    @staticmethod
    def _spec(denoiser: Denoiser) -> SamplerSpec:
        """Return the Euler sampler on the default grid."""
        return SamplerSpec(steps=STEPS, any_steps=True, solver="euler")

    def _denoiser(self) -> Denoiser:
        """Build the model on the CPU."""
        process = build_process(self.process)
        return exact_denoiser(process, mixture_means(self.ring, self.means), self.std, labelled=self.labelled)
