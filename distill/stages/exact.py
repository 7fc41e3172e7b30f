"""The Exact stage: a teacher in closed form, without training."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from distill.data.points import mixture_means
from distill.models.analytic import exact_denoiser
from distill.models.build import build_process
from distill.models.denoiser import Denoiser
from distill.models.generator import Generator
from distill.models.native import save_model
from distill.models.spec import SamplerSpec
from distill.stages.base import ModelStage, StageContext, check_types
from distill.stages.made import Made

SPEC = SamplerSpec(steps=100, any_steps=True, solver="euler")  # Euler over the default grid


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
        return Made(model=Generator(self._denoiser(), SPEC))

    def run(self, context: StageContext) -> dict[str, Any]:
        """Save the model folder."""
        if context.world.main:
            save_model(context.folder, self._denoiser(), SPEC)
        return {"train_seconds": None, "peak_memory_bytes": None}

    def _denoiser(self) -> Denoiser:
        """Build the model on the CPU."""
        process = build_process(self.process)
        return exact_denoiser(process, mixture_means(self.ring, self.means), self.std, labelled=self.labelled)
