"""Distribution matching: what DMD and DisBack share, the student's update, the fake score's, and the GAN on its features."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from distill.data.batch import Batch
from distill.data.cond import Cond
from distill.data.rng import stream_key
from distill.engine.update import Loss, Optim, Step, Update
from distill.methods.families.score import ScoreDistillation, check_ratio
from distill.methods.families.suits import refuse_unused
from distill.methods.losses.gan import discriminator_loss, generator_loss
from distill.methods.losses.score import descend, diff_instruct_loss, dmd_gradient
from distill.methods.losses.score_times import usual_times
from distill.models.bottleneck import BottleneckFeatures
from distill.models.denoiser import Denoiser
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
            generator_times=usual_times(
                student.process, generator_times, {"name": "karras", "low": 20, "high": 980}, fake=False
            ),
            fake_times=usual_times(
                student.process, fake_times, {"name": "karras", "low": 0, "high": 999}, fake=True
            ),
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
        check_ratio(fake_updates_per_generator)
        self._check_input(input)
        if not 0 <= floor < math.inf:
            raise ValueError(f"floor: expected a finite number of at least 0, found {floor}")
        if not normalise:
            refuse_unused(self, {"floor": floor}, "without `normalise`")
        self.real_noised, self.normalise, self.floor = input == "real_noised", normalise, floor
        self.ratio, self.gan = fake_updates_per_generator, None if gan is None else gan_options(gan)
        if self.gan is not None:
            self.tap = BottleneckFeatures(self.fake if self.gan["features"] == "fake" else self.teacher)
            shape = self.tap.shape()
            if len(shape) == 1 and self.gan["groups"] != GAN["groups"]:
                raise ValueError(
                    f"gan.groups: found {self.gan['groups']}, which changes nothing for features of shape {list(shape)}; "
                    f"expected {GAN['groups']}"
                )
            self.head = make_head(shape, self.gan["groups"], seed=0)

    def _check_input(self, input: str) -> None:
        if input not in ("backward_sim", "real_noised"):
            raise ValueError(f"input: found {input!r}, expected 'backward_sim' or 'real_noised'")
        if input == "real_noised" and self.input.steps < 2:
            raise ValueError(
                "input: found 'real_noised' for a student of one step, which starts from noise alone; expected 'backward_sim', "
                "or two levels and more"
            )
        if input == "real_noised" and self.input.unit_noise:
            raise ValueError(
                "unit_noise: found true, but with input 'real_noised' the student starts from noised data; expected false"
            )
        if input == "real_noised" and self.labels == "uniform" and self.student.num_classes:
            raise ValueError(
                "labels: found 'uniform', but with input 'real_noised' the student starts from data, which have labels of "
                "their own; expected 'data'"
            )

    def prepare(self, optim: Mapping[str, Mapping[str, Any] | Optim], *, seed: int, **settings: Any) -> None:
        """As the base; the head's first weights follow from the seed, whatever ran before, on every process."""
        if self.gan is not None:
            self.head = make_head(self.tap.shape(), self.gan["groups"], seed=stream_key(seed, "head"))
        super().prepare(optim, seed=seed, **settings)

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
        real = _data(batch, "input", "'backward_sim'")
        times = torch.tensor(self.input.times, dtype=torch.float64, device=real.device)
        t = times[step.draws.integer("k", self.input.steps)]
        z = step.draws.normal("z", self.student.sample_shape)
        return self.student.x0(self.student.process.add_noise(real, z, t), t, cond)

    def student_loss(self, batch: Batch, step: Step) -> Loss:
        """|x - sg(x - g)|^2 / 2 with g = (yF - yT) / m, no gradient through either network; plus the GAN's term."""
        cond = self.conditions(batch, step.draws)
        if self.gan is not None:
            _data(batch, "gan", "null")
        x = self.samples(batch, step, cond)
        step.shared["x"] = x.detach()
        if cond.label is not None:
            step.shared["label"] = cond.label
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
            error = (x - y_teacher).abs().flatten(1).mean(1)
            logs = {
                "gap": (y_teacher - y_fake).abs().mean(),
                "direction": direction.square().mean().sqrt(),
                "teacher_error": error.mean(),
                "teacher_error_min": error.min(),
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
        x, cond = self._generated(batch, step)
        errors = self.fake_errors(x, cond, step.draws)
        if self.gan is None:
            return Loss(errors.mean())
        data = _data(batch, "gan", "null")
        real, made = self.logits(data, batch.cond, step, "real"), self.logits(x, cond, step, "generated")
        told = discriminator_loss(real, made).mean()
        right = torch.cat([real.detach() > 0, made.detach() < 0]).float().mean()
        logs = {"score": errors.mean(), "gan": told, "logit_real": real.mean(), "logit_fake": made.mean()}
        return Loss(errors.mean() + self.gan["weight_d"] * told, logs | {"accuracy": right})

    @torch.no_grad()
    def _generated(self, batch: Batch, step: Step) -> tuple[Tensor, Cond]:
        """Samples and their conditions: those of the student's update where it ran in this iteration."""
        if "x" in step.shared:
            x = step.shared.pop("x")
            return x, Cond(len(x), step.shared.pop("label", None))
        cond = self.conditions(batch, step.draws)
        if self.real_noised:
            return self.samples(batch, step, cond), cond
        return self.input.mixture(self.student, cond, step.draws), cond

    def logits(self, x: Tensor, cond: Cond, step: Step, name: str) -> Tensor:
        """[B, 1]: what the head says of x, noised at the fake score's times where `diffusion` says so, else at the cleanest."""
        assert self.gan is not None
        process, draws = self.student.process, step.draws
        if self.gan["diffusion"]:
            t = self.fake_times(draws.named(name))
            x = process.add_noise(x, draws.normal(f"{name}_eps", self.student.sample_shape), t)
        else:
            clean = torch.full((len(x),), 0.002, dtype=torch.float64, device=x.device)
            t = process.time_of(-torch.log(clean))
        return self.head(self.tap(x, t, cond))


def gan_options(given: Mapping[str, Any]) -> dict[str, Any]:
    """The options of the GAN, those that are not given as in `GAN`.

    Raises:
        ValueError: names the option that is unknown or outside its range.
    """
    if not isinstance(given, Mapping):
        raise ValueError(f"gan: found {given!r}, expected null or options among {sorted(GAN)}")
    if unknown := sorted(set(given) - set(GAN)):
        raise ValueError(f"gan.{unknown[0]}: no such option; expected some of {sorted(GAN)}")
    options = {**GAN, **given}
    for name in ("weight_g", "weight_d"):
        if not 0 <= options[name] < math.inf:
            raise ValueError(f"gan.{name}: found {options[name]}, expected a finite number of at least 0")
    if options["weight_g"] == options["weight_d"] == 0:
        raise ValueError(
            "gan.weight_g, weight_d: found 0 and 0, which changes nothing; expected null for no GAN"
        )
    if not isinstance(options["diffusion"], bool):
        raise ValueError(f"gan.diffusion: found {options['diffusion']!r}, expected true or false")
    if options["features"] not in ("fake", "teacher"):
        raise ValueError(f"gan.features: found {options['features']!r}, expected 'fake' or 'teacher'")
    return options


def make_head(shape: Sequence[int], groups: int, seed: int) -> nn.Module:
    """A discriminator's head for features of `shape` (of one sample), its weights drawn from `seed` alone.

    Raises:
        ValueError: features that no head takes.
    """
    if len(shape) not in (1, 3) or (len(shape) == 3 and shape[1] != shape[2]):
        raise ValueError(
            f"gan: found features of shape {list(shape)}, expected [channels] or [channels, size, size]"
        )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed % 2**63)
        try:
            return GanHead(shape[0], shape[1], groups=groups) if len(shape) == 3 else VectorHead(shape[0])
        except ValueError as error:
            raise ValueError(f"gan: {error}") from error


def _data(batch: Batch, option: str, instead: str) -> Tensor:
    """Real samples, for the option that needs them."""
    if batch.x0 is None:
        raise ValueError(f"{option}: needs real samples, but the data source has none; expected {instead}")
    return batch.x0
