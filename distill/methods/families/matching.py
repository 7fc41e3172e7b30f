"""Distribution matching, the base class of DMD and DisBack: student's loss, fake score's loss, GAN."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from distill.data.batch import Batch
from distill.data.cond import Cond
from distill.data.rng import stream_key
from distill.engine.update import Loss, Optim, Step
from distill.methods.families.gan import features_for, make_head
from distill.methods.families.options import (
    FakeScore,
    Gan,
    Guidance,
    Sampling,
    TeacherGuidance,
    Updates,
)
from distill.methods.families.score import ScoreDistillation
from distill.methods.families.suits import refuse_unused
from distill.methods.losses.gan import discriminator_loss, generator_loss
from distill.methods.losses.score import descend, diff_instruct_loss, dmd_gradient
from distill.models.denoiser import Denoiser
from distill.typed import filled

CLEANEST = 0.002  # noise level of the GAN's input without `gan.diffusion`: the first of DMD2's table
SAMPLING = Sampling(labels="uniform")
UPDATES = Updates(fake_per_student=5)
Given = Mapping[str, Any]


class DistributionMatching(ScoreDistillation):
    """Distribution matching distillation; the options are described at `methods.dmd.DMD`."""

    GENERATOR_TIMES: ClassVar[Mapping[str, Any]] = {"name": "karras", "low": 20, "high": 980}
    FAKE_TIMES: ClassVar[Mapping[str, Any]] = {"name": "karras", "low": 0, "high": 999}
    ORDER: ClassVar[tuple[str, str]] = ("student", "shared")

    @classmethod
    def needs(cls, options: Mapping[str, Any]) -> tuple[str, ...]:
        """Real samples for a GAN, or to start from."""
        real = options.get("gan") is not None or options.get("input") == "real_noised"
        return (*cls.reads, "x0") if real else cls.reads

    def __init__(
        self,
        student: Denoiser,
        teacher: Denoiser,
        *,
        sampling: Sampling | Given = SAMPLING,
        input: str = "backward_sim",
        generator_times: Given | None = None,
        fake: FakeScore | Given = FakeScore(),
        guidance: TeacherGuidance | Given = TeacherGuidance(),
        updates: Updates | Given = UPDATES,
        reduction: str = "mean",
        normalise: bool = True,
        floor: float = 1e-3,
        gan: Gan | Given | None = None,
        noise_scale: float = 1.0,
    ) -> None:
        guided = filled(TeacherGuidance(), guidance, "guidance")
        super().__init__(
            student,
            teacher,
            sampling=filled(SAMPLING, sampling, "sampling"),
            generator_times=generator_times,
            fake=filled(FakeScore(), fake, "fake"),
            guidance=guided if isinstance(guided, Guidance) else Guidance(**vars(guided)),
            updates=filled(UPDATES, updates, "updates"),
            reduction=reduction,
            noise_scale=noise_scale,
        )
        self._check_input(input)
        if not 0 <= floor < math.inf:
            raise ValueError(f"floor: expected a finite number of at least 0, found {floor}")
        if not normalise:
            refuse_unused(self, {"floor": floor}, "without `normalise`")
        self.real_noised, self.normalise, self.floor = input == "real_noised", normalise, floor
        self.gan = None if gan is None else filled(Gan(), gan, "gan")
        if self.gan is not None:
            self.features = features_for(self.gan, self.fake, self.teacher)
            self.head = make_head(self.features, self.gan.groups, seed=0)

    def _check_input(self, input: str) -> None:
        if input not in ("backward_sim", "real_noised"):
            raise ValueError(f"input: found {input!r}, expected 'backward_sim' or 'real_noised'")
        if input == "backward_sim":
            return
        if self.input.steps < 2:
            raise ValueError(
                "input: found 'real_noised' for a student of one step, which starts from noise alone; expected 'backward_sim', "
                "or two levels and more"
            )
        if self.input.unit_noise:
            raise ValueError(
                "sampling.unit_noise: found true, but with input 'real_noised' the student starts from noised data; expected "
                "false"
            )
        if self.labels == "uniform" and self.student.conditions.has_null:
            raise ValueError(
                "sampling.labels: found 'uniform', but with input 'real_noised' the student starts from data, which have "
                "labels of their own; expected 'data'"
            )

    def prepare(self, optim: Mapping[str, Mapping[str, Any] | Optim], *, seed: int, **settings: Any) -> None:
        """As the base class; the head's first weights are a function of the seed, the same on every process."""
        if self.gan is not None:
            self.head = make_head(self.features, self.gan.groups, seed=stream_key(seed, "head"))
        super().prepare(optim, seed=seed, **settings)

    def critics(self) -> dict[str, nn.Module]:
        """The fake score, and with a GAN the head."""
        return super().critics() | ({} if self.gan is None else {"head": self.head})

    def samples(self, batch: Batch, step: Step, cond: Cond) -> Tensor:
        """x [B,*S] with the graph of the student's last step."""
        if not self.real_noised:
            return super().samples(batch, step, cond)
        real = _data(batch, "input", "'backward_sim'")
        times = torch.tensor(self.input.times, dtype=torch.float64, device=real.device)
        t = times[step.draws.integer("k", self.input.steps)]
        z = step.draws.normal("z", self.student.sample_shape)
        return self.student.x0(self.student.process.add_noise(real, z, t), t, cond)

    def fresh_samples(self, batch: Batch, step: Step, cond: Cond) -> Tensor:
        """x [B,*S] of the fake score's update."""
        samples = self.samples if self.real_noised else super().fresh_samples
        return samples(batch, step, cond)

    def student_loss(self, batch: Batch, step: Step) -> Loss:
        """|x - sg(x - g)|^2 / 2 with g = (yF - yT) / m, no gradient through either network; plus the GAN's term."""
        if self.gan is not None:
            _data(batch, "gan", "null")
        x, cond = self.student_samples(batch, step)
        with torch.no_grad():
            y_teacher, y_fake = self.predictions(x, cond, step.draws)
        if self.normalise:
            direction = dmd_gradient(x, y_teacher, y_fake, floor=self.floor)
            per_sample = descend(x, direction, reduction=self.reduction)
        else:
            direction = y_fake - y_teacher
            per_sample = diff_instruct_loss(x, y_teacher, y_fake, reduction=self.reduction)
        logs = self.describe(x, y_teacher, y_fake) | {"direction": direction.square().mean().sqrt()}
        total = per_sample.mean()
        if self.gan is not None:
            fooled = generator_loss(self.logits(x, cond, step, "generated")).mean()
            logs["gan"] = fooled.detach()
            total = total + self.gan.weight_g * fooled
        return Loss(total, logs)

    def fake_loss(self, batch: Batch, step: Step) -> Loss:
        """Denoising score matching on the student's samples; with a GAN the loss of the head, on them and on data."""
        x, cond = self.fake_samples(batch, step)
        errors = self.matching(self.fake, x, cond, step.draws)
        if self.gan is None:
            return Loss(errors.mean())
        data = _data(batch, "gan", "null")
        real, made = self.logits(data, batch.cond, step, "real"), self.logits(x, cond, step, "generated")
        gan = discriminator_loss(real, made).mean()
        right = torch.cat([real.detach() > 0, made.detach() < 0]).float().mean()
        logs = {"score": errors.mean(), "gan": gan, "logit_real": real.mean(), "logit_fake": made.mean()}
        return Loss(errors.mean() + self.gan.weight_d * gan, logs | {"accuracy": right})

    def logits(self, x: Tensor, cond: Cond, step: Step, name: str) -> Tensor:
        """[B, 1]: the head's logit for x, noised to the fake score's times with `gan.diffusion`, else read at `CLEANEST`."""
        assert self.gan is not None
        process, draws = self.student.process, step.draws
        if self.gan.diffusion:
            t = self.matching.times(draws.named(name))
            x = process.add_noise(x, draws.normal(f"{name}_eps", self.student.sample_shape), t)
        else:
            clean = torch.full((len(x),), CLEANEST, dtype=torch.float64, device=x.device)
            t = process.time_of(-torch.log(clean))
        logit: Tensor = self.head(self.features(x, t, cond))
        return logit


def _data(batch: Batch, option: str, instead: str) -> Tensor:
    """Real samples, for the option that needs them."""
    if batch.x0 is None:
        raise ValueError(f"{option}: needs real samples, but the data source has none; expected {instead}")
    return batch.x0
