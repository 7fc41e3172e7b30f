"""What the score-distillation methods share: the generator's input, times, labels, the fake score and its diagnostics.

Three networks: the student G, the frozen teacher T, and the fake score F, a copy of the teacher that follows G's samples.
"""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from distill.data.batch import Batch
from distill.data.cond import Cond
from distill.data.rng import Draws
from distill.engine.module import DistillModule
from distill.engine.networks import check_apart
from distill.engine.update import Diagnostics
from distill.methods.families.student_input import StudentInput
from distill.methods.families.suits import (
    LARGEST_FACTOR,
    check_clean_end,
    error_factor,
    guides,
    refuse_unused,
)
from distill.methods.losses.score import FAKE_SCORE_KINDS, fake_score_loss, fake_score_weight
from distill.methods.losses.score_times import Times, times_of
from distill.models.denoiser import Denoiser, check_same_samples, check_sigma_data
from distill.models.result import Result
from distill.process.base import Process
from distill.process.edm import EDM

AUTO = {"x0": "edm", "eps": "eps", "v": "v", "velocity": "flow"}
# Noise levels at which diagnostics show what teacher and fake score predict.
SHOWN_LEVELS = (0.3, 1.0, 3.0)
# By noise level, diagnostics are means over as many samples in each of these bins.
BINS = 10
# Below this share of the data's standard deviation the student has collapsed.
COLLAPSED = 0.2


def conditions_of(labels: str, num_classes: int, batch: Batch, draws: Draws) -> Cond:
    """What to make samples of: the conditions of the batch ("data"), or labels drawn evenly ("uniform").

    Raises:
        ValueError: labels of a batch that has none.
    """
    if num_classes and labels == "uniform":
        return Cond.of_labels(draws.integer("label", num_classes))
    if num_classes and batch.cond.label is None:
        raise ValueError(
            f"labels: found 'data', but the data source has none and the model has {num_classes} classes; expected 'uniform'"
        )
    return batch.cond


def score_errors(
    model: Denoiser,
    x: Tensor,
    cond: Cond,
    draws: Draws,
    times: Times,
    *,
    weighting: str,
    sigma_data: float,
    reduction: str,
    guidance_scale: float = 1.0,
    null_prob: float = 0.0,
) -> Tensor:
    """[B]: `fake_score_loss` of a score model on samples x [B,*S] (no gradient to them) at drawn times and noise."""
    t, eps = times(draws), draws.normal("eps", x.shape[1:])
    x_t = model.process.add_noise(x.detach(), eps, t)
    if null_prob > 0:
        cond = cond.drop(draws.uniform("null") < null_prob)
    prediction = model.predict(FAKE_SCORE_KINDS[weighting], x_t, t, cond, guidance_scale)
    return fake_score_loss(
        prediction, x, eps, t, model.process, weighting=weighting, sigma_data=sigma_data, reduction=reduction
    )


def check_ratio(updates: int) -> None:
    """Refuse a number of fake updates for each one of the student that is none."""
    if not isinstance(updates, int) or updates < 1:
        raise ValueError(f"fake_updates_per_generator: expected an integer of at least 1, found {updates!r}")


def check_score_options(
    model: Denoiser, *, weighting: str, sigma_data: float, reduction: str, labels: str
) -> str:
    """The weighting of a score model's loss: `weighting`, or for "auto" what goes with its kind of prediction.

    Raises:
        ValueError: names the option that is unknown, outside its range, not defined under the model's process, or a
            `sigma_data` of "edm" that is not the one that the model assumes.
    """
    process, kind = model.process, model.kind
    if labels not in ("data", "uniform"):
        raise ValueError(f"labels: found {labels!r}, expected 'data' or 'uniform'")
    if reduction not in ("sum", "mean"):
        raise ValueError(f"reduction: found {reduction!r}, expected 'sum' or 'mean'")
    if not 0 < sigma_data < math.inf:
        raise ValueError(f"sigma_data: found {sigma_data}, expected a positive number")
    if weighting != "auto" and weighting not in FAKE_SCORE_KINDS:
        raise ValueError(
            f"weighting: found {weighting!r}, expected 'auto' or one of {sorted(FAKE_SCORE_KINDS)}"
        )
    found = AUTO.get(kind) if weighting == "auto" else weighting
    if found is None:
        raise ValueError(
            f"weighting: found 'auto' for a model that predicts {kind!r}, expected one of {sorted(FAKE_SCORE_KINDS)}"
        )
    try:
        process.check_kind(FAKE_SCORE_KINDS[found])
    except ValueError as error:
        raise ValueError(f"weighting: found {weighting!r}: {error}") from error
    if found == "edm":
        check_sigma_data(model, sigma_data)
    return found


def check_weighting(
    method: object, model: Denoiser, weighting: str, times: Mapping[str, Any], sigma_data: float
) -> None:
    """Refuse a weighting of the fake score's loss that has no mean over its times, and a `sigma_data` that nothing asks for.

    Raises:
        ValueError: names the option.
    """
    process, told = model.process, FAKE_SCORE_KINDS[weighting]
    if weighting != "edm":
        refuse_unused(method, {"sigma_data": sigma_data}, f"with the weighting {weighting!r}")
    if times.get("name") == "uniform" and times.get("low", 0.0) == 0:
        check_clean_end(
            process, model.kind, told, lambda t: fake_score_weight(process, t, weighting), "weighting"
        )


def _check_amplification(process: Process, kind: str, t: float) -> None:
    """Refuse a student of noise predictions where its x0 = (x - sigma eps) / alpha is mostly their error."""
    level = float(error_factor(process, kind, "x0", torch.tensor([t], dtype=torch.float64)))
    if not level <= LARGEST_FACTOR:
        raise ValueError(
            f"levels: the first is {level:.4g}, and a student that predicts {kind} multiplies its error by that to tell x0; "
            f"expected at most {LARGEST_FACTOR:g}, such as levels: [2.5], or a student that predicts v or x0"
        )


class ScoreDistillation(DistillModule):
    """Student, frozen teacher and fake score. Subclasses say in which order they are updated and with which loss.

    Args:
        levels, unit_noise: see `StudentInput`. labels: "data", those of the batch, or "uniform" over the classes.
        weighting: of the fake score's loss: "edm", "eps", "v", "flow", or "auto", by the teacher's kind.
        reduction: of losses over the dimensions of a sample, "sum" or "mean".
        guidance_teacher: the teacher's guidance while the student is trained. guidance_fake, guidance_fake_train: the
            fake score's, then and while it is trained itself (long-short guidance).
        null_prob: share of dropped conditions while the fake score is trained; needed where its guidance is not 1 (0: the
            fake score without a condition; below 0: away from it).
        noise_scale: of the student's sampler, see `SamplerSpec`; training never uses it.
    """

    replaces_teacher = False  # whether the method writes other weights into its teacher

    def __init__(
        self,
        student: Denoiser,
        teacher: Denoiser,
        *,
        levels: Sequence[float] | None,
        unit_noise: bool,
        generator_times: Mapping[str, Any],
        fake_times: Mapping[str, Any],
        weighting: str,
        sigma_data: float,
        reduction: str,
        guidance_teacher: float,
        guidance_fake: float,
        guidance_fake_train: float,
        null_prob: float,
        labels: str,
        noise_scale: float,
    ) -> None:
        super().__init__(student)
        self._check_models(student, teacher)
        self._check_guidance(
            teacher,
            null_prob,
            guidance_teacher=guidance_teacher,
            guidance_fake=guidance_fake,
            guidance_fake_train=guidance_fake_train,
        )
        process = student.process
        self.weighting = check_score_options(
            teacher,
            weighting=weighting,
            sigma_data=sigma_data,
            reduction=reduction,
            labels=labels,
        )
        self.input = StudentInput(process, levels, unit_noise)
        _check_amplification(process, student.kind, self.input.times[0])
        self.generator_times = times_of(process, generator_times, "generator_times")
        self.fake_times = times_of(process, fake_times, "fake_times")
        check_weighting(self, teacher, self.weighting, fake_times, sigma_data)
        self.fake = copy.deepcopy(teacher)
        # Where its weights are replaced, those that were given stay.
        self.teacher = self.keep_frozen(
            "teacher", copy.deepcopy(teacher) if self.replaces_teacher else teacher
        )
        self.sigma_data, self.reduction, self.labels = sigma_data, reduction, labels
        self.guidance_teacher, self.guidance_fake = guidance_teacher, guidance_fake
        self.guidance_fake_train, self.null_prob, self.noise_scale = (
            guidance_fake_train,
            null_prob,
            noise_scale,
        )
        self.result()
        if self.input.steps == 1:
            refuse_unused(self, {"noise_scale": noise_scale}, "for a student of one step")

    @staticmethod
    def _check_models(student: Denoiser, teacher: Denoiser) -> None:
        check_apart("teacher", teacher, student)
        check_same_samples(student, teacher)
        if teacher.coupling != "independent" or teacher.boundary is not None:
            raise ValueError(
                f"teacher: found a model of {teacher.coupling} noise and data, which has no score; expected a diffusion or "
                "flow model"
            )
        for name, model in (("student", student), ("teacher", teacher)):
            if model.embeds_guidance:
                raise ValueError(
                    f"{name}: takes the guidance as an input, which this method does not give; expected a model without"
                )
        for name, weight in teacher.named_parameters():
            if not weight.is_meta and not bool(weight.isfinite().all()):
                raise ValueError(f"teacher: {name}: found weights that are not finite")

    @staticmethod
    def _check_guidance(teacher: Denoiser, null_prob: float, **scales: float) -> None:
        for name, scale in scales.items():
            if not math.isfinite(scale):
                raise ValueError(f"{name}: found {scale}, expected a finite number")
            if scale != 1 and not guides(teacher):
                raise ValueError(
                    f"{name}: found {scale}, but the teacher was trained without a null condition; expected 1"
                )
        if not 0 <= null_prob < 1:
            raise ValueError(f"null_prob: expected a probability in [0, 1), found {null_prob}")
        if null_prob > 0 and not teacher.num_classes:
            raise ValueError(
                f"null_prob: found {null_prob}, but the teacher has no conditions to drop; expected 0"
            )
        for name in ("guidance_fake", "guidance_fake_train"):
            if scales[name] != 1 and null_prob == 0:
                raise ValueError(
                    f"null_prob: found 0, but {name} = {scales[name]} asks the fake score without a condition, which it would "
                    "never learn; expected a share above 0, such as 0.1"
                )

    def result(self) -> Result:
        """Exactly the steps that it was trained for: "endpoint" for one step from t_max, else "few_step". Never guidable: the
        student is only asked with a condition; the teacher's guidance is baked in."""
        sampler = self.input.spec(self.guidance_teacher, self.noise_scale)
        whole = self.input.times == [self.student.process.t_max]
        return Result(sampler, "endpoint" if whole else "few_step", boundary=self.student.boundary)

    def conditions(self, batch: Batch, draws: Draws) -> Cond:
        """What to make samples of."""
        return conditions_of(self.labels, self.student.num_classes, batch, draws)

    def noised(self, x: Tensor, times: Times, draws: Draws) -> tuple[Tensor, Tensor, Tensor]:
        """(x_t, eps, t) of samples x at drawn times."""
        t, eps = times(draws), draws.normal("eps", self.student.sample_shape)
        return self.student.process.add_noise(x, eps, t), eps, t

    def fake_errors(self, x: Tensor, cond: Cond, draws: Draws) -> Tensor:
        """Denoising score matching of the fake score on samples x (no gradient to them), [B]."""
        return score_errors(
            self.fake,
            x,
            cond,
            draws,
            self.fake_times,
            weighting=self.weighting,
            sigma_data=self.sigma_data,
            reduction=self.reduction,
            guidance_scale=self.guidance_fake_train,
            null_prob=self.null_prob,
        )

    def _by_level(self, x: Tensor, cond: Cond, draws: Draws) -> dict[str, Tensor]:
        """Means over ten bins of the student's times, from clean to noisy, as many samples in each: the noise level, and mean
        |teacher - fake|, |x - teacher| and (fake - x)^2 of predictions of x0 on samples x [B,*S]."""
        x_t, _, t = self.noised(x, self.generator_times, draws)
        told = self.teacher.x0(x_t, t, cond, self.guidance_teacher)
        learned = self.fake.x0(x_t, t, cond, self.guidance_fake)
        level = torch.exp(-self.student.process.log_ratio(t))
        found = {
            "level": level,
            "gap": (told - learned).abs().flatten(1).mean(1),
            "teacher_error": (x - told).abs().flatten(1).mean(1),
            "fake_error": (learned - x).square().flatten(1).mean(1),
        }
        order = level.argsort()
        return {
            f"{name}_bin{number}": part.mean()
            for name, values in found.items()
            for number, part in enumerate(values[order].tensor_split(BINS))
            if len(part)
        }

    def diagnostics(self, batch: Batch, draws: Draws) -> Diagnostics:
        """Samples of the average, what teacher and fake score make of them at three noise levels, and their errors by level."""
        student, process = self.best(), self.student.process
        assert isinstance(student, Denoiser)
        cond = self.conditions(batch, draws)
        x = self.input.mixture(student, cond, draws)
        eps = draws.normal("eps", self.student.sample_shape)
        scalars = {"x_mean": x.mean(), "x_std": x.std(), "x_max": x.abs().max()}
        if batch.x0 is not None:
            scalars["x_std_data"] = batch.x0.std()
            _warn_of_collapse(float(scalars["x_std"]), float(scalars["x_std_data"]))
        scalars |= self._by_level(x, cond, draws)
        rows = [("student", x)]
        for level in SHOWN_LEVELS:
            t = process.matching_time(
                EDM(), torch.full((len(x),), level, dtype=torch.float64, device=x.device)
            )
            x_t = process.add_noise(x, eps, t)
            told = self.teacher.x0(x_t, t, cond, self.guidance_teacher)
            learned = self.fake.x0(x_t, t, cond, self.guidance_fake)
            scalars[f"gap_{level:g}"] = (told - learned).square().mean()
            rows += [(f"teacher x0, {level:g}", told), (f"fake x0, {level:g}", learned)]
        return Diagnostics(scalars, rows)


def _warn_of_collapse(found: float, data: float) -> None:
    if found < COLLAPSED * data:
        warnings.warn(
            f"the student's samples have the standard deviation {found:.3g}, the data {data:.3g}: the student has collapsed "
            "(lower the learning rates or raise fake_updates_per_generator), or has hardly been trained",
            stacklevel=3,
        )
