"""Distribution matching: what DMD and DisBack share, the student's update, the fake score's, and the GAN on its features."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from distill.data.batch import Batch
from distill.data.cond import Cond
from distill.engine.update import Loss, Step, Update
from distill.methods.losses.gan import discriminator_loss, generator_loss
from distill.methods.losses.score import descend, diff_instruct_loss, dmd_gradient
from distill.methods.losses.score_student import ScoreDistillation, times_of
from distill.models.denoiser import Denoiser
from distill.models.tap import Tap
from distill.nets.heads import GanHead, VectorHead

GAN = {"weight_g": 3e-3, "weight_d": 1e-2, "diffusion": True, "groups": 8, "features": "fake"}


class DistributionMatching(ScoreDistillation):
    """Distribution matching distillation; the options are described at `methods.dmd.DMD`."""

    def __init__(
        self,
        student: Denoiser,
        teacher: Denoiser,
        *,
        levels: Sequence[float] | None = None,
        unit_noise: bool = False,
        input: str = "backward_sim",
        generator_times: Mapping[str, Any] | None = None,
        fake_times: Mapping[str, Any] | None = None,
        weighting: str = "auto",
        sigma_data: float = 0.5,
        reduction: str = "mean",
        guidance_teacher: float = 1.0,
        null_prob: float = 0.0,
        normalise: bool = True,
        floor: float = 1e-3,
        fake_updates_per_generator: int = 5,
        gan: Mapping[str, Any] | None = None,
        labels: str = "uniform",
        noise_scale: float = 1.0,
    ) -> None:
        super().__init__(
            student,
            teacher,
            levels=levels,
            unit_noise=unit_noise,
            generator_times=generator_times or {"name": "karras", "low": 20, "high": 980},
            fake_times=fake_times or {"name": "karras", "low": 0, "high": 999},
            weighting=weighting,
            sigma_data=sigma_data,
            reduction=reduction,
            guidance_teacher=guidance_teacher,
            guidance_fake=1.0,
            guidance_fake_train=1.0,
            null_prob=null_prob,
            labels=labels,
            noise_scale=noise_scale,
        )
        if fake_updates_per_generator < 1:
            raise ValueError(
                f"fake_updates_per_generator: expected at least 1, found {fake_updates_per_generator}"
            )
        if input not in ("backward_sim", "real_noised"):
            raise ValueError(f"input: found {input!r}, expected 'backward_sim' or 'real_noised'")
        if not floor >= 0:
            raise ValueError(f"floor: expected at least 0, found {floor}")
        self.real_noised, self.normalise, self.floor = input == "real_noised", normalise, floor
        self.ratio, self.gan = fake_updates_per_generator, None if gan is None else {**GAN, **gan}
        if self.gan is not None:
            self._add_head(set(gan or ()) - set(GAN))

    def _add_head(self, unknown: set[str]) -> None:
        """The discriminator's head on the bottleneck of the fake score or of the teacher."""
        assert self.gan is not None
        if unknown or self.gan["features"] not in ("fake", "teacher"):
            raise ValueError(
                f"gan: found {self.gan}, expected {sorted(GAN)} and features 'fake' or 'teacher'"
            )
        self.tap = Tap(self.fake if self.gan["features"] == "fake" else self.teacher)
        shape = self.tap.shape()
        self.head: nn.Module = (
            GanHead(shape[0], shape[1], groups=self.gan["groups"])
            if len(shape) == 3
            else VectorHead(shape[0])
        )
        self.gan_times = times_of(
            self.student.process, {"name": "karras", "low": 0, "high": 999}, "gan.times"
        )

    def updates(self) -> Sequence[Update]:
        """The student first; the fake score (and the head, with it) in every iteration."""
        critics: dict[str, nn.Module] = {"fake": self.fake}
        if self.gan is not None:
            critics["head"] = self.head
        return [
            Update("student", {"student": self.student}, self.student_loss, every=self.ratio),
            Update("fake", critics, self.fake_loss),
        ]

    def samples(self, batch: Batch, step: Step, cond: Cond) -> Tensor:
        """x [B,*S] with the graph of its last step."""
        if not self.real_noised:
            return self.input.output(self.student, cond, step.draws)
        if batch.x0 is None:
            raise ValueError(
                "input: found 'real_noised', but the data source has no data; expected 'backward_sim'"
            )
        times = torch.tensor(self.input.times, dtype=torch.float64, device=batch.x0.device)
        t = times[step.draws.integer("k", self.input.steps)]
        z = step.draws.normal("z", self.student.sample_shape)
        return self.student.x0(self.student.process.add_noise(batch.x0, z, t), t, cond)

    def student_loss(self, batch: Batch, step: Step) -> Loss:
        """|x - sg(x - g)|^2 / 2 with g = (yF - yT) / m, no gradient through either network; plus the GAN's term."""
        cond = batch.cond if self.gan is not None else self.conditions(batch, step.draws)
        x = self.samples(batch, step, cond)
        step.shared["x"] = x.detach()
        with torch.no_grad():
            x_t, _, t = self.noised(x, self.generator_times, step.draws)
            y_teacher = self.teacher.x0(x_t, t, cond, self.guidance_teacher)
            y_fake = self.fake.x0(x_t, t, cond)
        if self.normalise:
            direction = dmd_gradient(x, y_teacher, y_fake, floor=self.floor)
            per_sample = descend(x, direction, reduction=self.reduction)
        else:
            direction = y_fake - y_teacher
            per_sample = diff_instruct_loss(x, y_teacher, y_fake, reduction=self.reduction)
        with torch.no_grad():
            logs = {
                "gap": (y_teacher - y_fake).abs().mean(),
                "direction": direction.square().mean().sqrt(),
                "teacher_error": (x - y_teacher).abs().mean(),
                "x_mean": x.mean(),
                "x_std": x.std(),
            }
        total = per_sample.mean()
        if self.gan is not None:
            fooled = generator_loss(self.logits(x, cond, step, "generated")).mean()
            logs["gan"] = fooled.detach()
            total = total + self.gan["weight_g"] * fooled
        return Loss(total, logs)

    def fake_loss(self, batch: Batch, step: Step) -> Loss:
        """The fake score learns the student's samples (those of the student's update where it ran); the head tells them
        from data."""
        cond = batch.cond if self.gan is not None else self.conditions(batch, step.draws)
        x = step.shared.pop("x", None)
        if x is None:
            x = self.input.mixture(self.student, cond, step.draws)
        errors = self.fake_errors(x, cond, step.draws)
        if self.gan is None:
            return Loss(errors.mean())
        if batch.x0 is None:
            raise ValueError("gan: the data source has no data; expected real samples")
        real, made = self.logits(batch.x0, cond, step, "real"), self.logits(x, cond, step, "generated")
        told = discriminator_loss(real, made).mean()
        logs = {"score": errors.mean(), "gan": told, "logit_real": real.mean(), "logit_fake": made.mean()}
        return Loss(errors.mean() + self.gan["weight_d"] * told, logs)

    def logits(self, x: Tensor, cond: Cond, step: Step, name: str) -> Tensor:
        """[B, 1]: what the head says of x, noised at drawn times where `diffusion` says so, else at the cleanest."""
        assert self.gan is not None
        process, draws = self.student.process, step.draws
        if self.gan["diffusion"]:
            t = self.gan_times(draws.named(name))
            x = process.add_noise(x, draws.normal(f"{name}_eps", self.student.sample_shape), t)
        else:
            clean = torch.full((len(x),), 0.002, dtype=torch.float64, device=x.device)
            t = process.time_of(-torch.log(clean))
        return self.head(self.tap(x, t, cond))
