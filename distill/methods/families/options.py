"""Options of score distillation that belong together, each a nested block of a method's config."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

from distill.typed import settle


@dataclass(frozen=True)
class Sampling:
    """How the student makes samples during training.

    Attributes:
        levels: noise levels sigma / alpha at which the student's steps start, falling; None: one step from t_max. The paper
            of SiD, under EDM: [2.5].
        unit_noise: start from unit noise at the first time instead of noise of that level (DMD2's one-step SDXL).
        labels: "data": those of the batch; "uniform": drawn uniformly from the classes.
    """

    levels: list[float] | None = None
    unit_noise: bool = False
    labels: Literal["data", "uniform"] = "data"

    def __post_init__(self) -> None:
        settle(self)


@dataclass(frozen=True)
class FakeScore:
    """Loss of the fake score: denoising score matching on the student's samples.

    Attributes:
        times: times of the loss, see `losses.score_times.times_of`; None: the method's, see `usual_times` there.
        weighting: "edm", "eps", "v" or "flow", see `losses.score.fake_score_loss`; "auto": by the teacher's kind.
        sigma_data: of the weighting "edm".
    """

    times: dict[str, Any] | None = None
    weighting: Literal["auto", "edm", "eps", "v", "flow"] = "auto"
    sigma_data: float = 0.5

    def __post_init__(self) -> None:
        settle(self)
        if not self.sigma_data > 0:
            raise ValueError(f"sigma_data: found {self.sigma_data}, expected a positive number")


@dataclass(frozen=True)
class TeacherGuidance:
    """Guidance of the teacher.

    Attributes:
        teacher: guidance scale of the teacher in the student's loss.
        null_prob: share of dropped conditions while the fake score is trained.
    """

    teacher: float = 1.0
    null_prob: float = 0.0

    def __post_init__(self) -> None:
        settle(self)
        if not 0 <= self.null_prob < 1:
            raise ValueError(f"null_prob: found {self.null_prob}, expected a probability in [0, 1)")


@dataclass(frozen=True)
class Guidance(TeacherGuidance):
    """Long-short guidance (arXiv 2406.01561): the teacher's, and the fake score's.

    Attributes:
        fake: guidance scale of the fake score in the student's loss (LSG: kappa 2 = kappa 3).
        fake_train: the same while the fake score is trained (LSG: kappa 1). Where one of them is not 1, `null_prob` must be
            above 0. 0: without a condition; below 0: away from it.
    """

    fake: float = 1.0
    fake_train: float = 1.0


@dataclass(frozen=True)
class Updates:
    """Number and order of the updates of an iteration, and the samples that the fake score learns.

    Attributes:
        fake_per_student: fake updates for each update of the student.
        first: which of the two runs first in an iteration that has both: "student" (DMD2) or "fake" (SiD, Diff-Instruct);
            None: the order of the method's paper.
        samples: "shared": in an iteration where the student was updated, the fake score learns the samples of that update,
            which were made with the weights before it (DMD2; saves a forward pass); "fresh": samples of its own, made with
            the current weights; None: as in the method's paper, but "fresh" where the fake score is first.
    """

    fake_per_student: int = 1
    first: Literal["student", "fake"] | None = None
    samples: Literal["shared", "fresh"] | None = None

    def __post_init__(self) -> None:
        settle(self)
        if self.fake_per_student < 1:
            raise ValueError(f"fake_per_student: found {self.fake_per_student}, expected at least 1")


@dataclass(frozen=True)
class Gan:
    """DMD2's GAN on bottleneck features.

    Attributes:
        weight_g, weight_d: factors on the GAN's terms in the losses of the student and of the fake score.
        diffusion: add noise to real and generated samples before the features, at the times of the fake score.
        groups: of the head's group norms.
        features: of the "fake" score, which is trained with the head, or of the "teacher".
    """

    weight_g: float = 3e-3
    weight_d: float = 1e-2
    diffusion: bool = True
    groups: int = 8
    features: Literal["fake", "teacher"] = "fake"

    def __post_init__(self) -> None:
        settle(self)
        for name in ("weight_g", "weight_d"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name}: found {getattr(self, name)}, expected at least 0")
        if self.weight_g == self.weight_d == 0:
            raise ValueError(
                "weight_g, weight_d: found 0 and 0, which changes nothing; expected gan: null for no GAN"
            )


@dataclass(frozen=True)
class Backtracking:
    """When DisBack goes on to the next target.

    Attributes:
        steps_per_node: student steps at each stored target, one number for all or one for each (criterion "steps").
        criterion: "steps", or "plateau": when the mean of the student's loss over `window` steps is not below that of the
            window before by at least the share `tolerance`.
    """

    steps_per_node: int | list[int] = 100
    criterion: Literal["steps", "plateau"] = "steps"
    window: int = 50
    tolerance: float = 0.01

    def __post_init__(self) -> None:
        settle(self)
        if self.window < 1 or not 0 <= self.tolerance < 1:
            raise ValueError(
                f"window, tolerance: found {self.window} and {self.tolerance}, expected a window of at least 1 and a share in "
                "[0, 1)"
            )
