"""The description of a trained student that a method returns."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from distill.models.boundary import Boundary
from distill.models.generator import Generator
from distill.models.model import COUPLINGS, Model
from distill.models.spec import SamplerSpec


@dataclass(frozen=True)
class Result:
    """What `DistillModule.result` returns; every model that is saved or sampled during training is described by it.

    Attributes:
        sampler: how the student is sampled.
        coupling: which pairs of noise and data it was trained on, see `models.model.Model`. There is no default: it
            depends on the loss.
        guidable: whether the method trained the null condition, so that guidance scales other than 1 make sense. A student
            forgets the teacher's null condition where conditions are never dropped.
        boundary: what turns the predicted x0 into the function that the loss trained; None: nothing.

    Raises:
        ValueError: an unknown coupling, or a sampler that guides a student without a null condition.
    """

    sampler: SamplerSpec
    coupling: str
    guidable: bool = False
    boundary: Boundary | None = None

    def __post_init__(self) -> None:
        if self.coupling not in COUPLINGS:
            raise ValueError(f"coupling: found {self.coupling!r}, expected one of {list(COUPLINGS)}")
        if self.sampler.guidance_scale != 1 and not self.guidable:
            raise ValueError(
                f"sampler.guidance_scale: found {self.sampler.guidance_scale}, but the student is not guidable; expected 1"
            )

    def of(self, model: nn.Module) -> Generator:
        """A `Model` with these properties."""
        assert isinstance(model, Model)
        described = model.with_(coupling=self.coupling, guidable=self.guidable, boundary=self.boundary)
        described.sampler = self.sampler
        return Generator(described, self.sampler)
