"""What the score-distillation methods share: the generator's input, times, labels, the fake score and its diagnostics.

Three networks: the student G, the frozen teacher T, and the fake score F, a copy of the teacher that follows G's samples.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from distill.data.batch import Batch
from distill.data.cond import Cond
from distill.data.rng import Draws, stream_key
from distill.engine.module import DistillModule
from distill.engine.update import Diagnostics
from distill.methods.losses.score import FAKE_SCORE_KINDS, fake_score_loss
from distill.models.denoiser import Denoiser
from distill.models.spec import SamplerSpec
from distill.process.base import Process
from distill.process.edm import EDM
from distill.process.times import karras_index_level, lognormal_level, sid_level
from distill.samplers.backward import check_times, few_step_output, mixture_output

Times = Callable[[Draws], Tensor]
AUTO = {"x0": "edm", "eps": "eps", "v": "v", "velocity": "flow"}
# Noise levels at which diagnostics show what teacher and fake score predict.
SHOWN_LEVELS = (0.3, 1.0, 3.0)


def times_of(process: Process, options: Mapping[str, Any], where: str) -> Times:
    """A sampler of times [B] (float64) from its options.

    {name: uniform, low, high}: uniform in the process's time, as shares of its range; {name: logit_normal, mean, std}: the
    share is a sigmoid of a normal number; {name: lognormal, mean, std}: EDM's noise levels; {name: sid, t_max}: SiD's;
    {name: karras, low, high}: uniform indices of DMD2's table of 1000. Levels are translated to the process's own time.

    Raises:
        ValueError: an unknown name or option, named by `where`.
    """
    given = dict(options)
    name = given.pop("name", None)
    span = process.t_max - process.t_min

    def uniform(draws: Draws, low: float = 0.0, high: float = 1.0) -> Tensor:
        return process.t_min + span * (low + (high - low) * draws.uniform("t").double())

    def logit_normal(draws: Draws, mean: float = 0.0, std: float = 1.0) -> Tensor:
        return process.t_min + span * torch.sigmoid(mean + std * draws.normal("t").double())

    def at(level: Tensor) -> Tensor:
        return process.time_of(-torch.log(level.double()))

    def lognormal(draws: Draws, mean: float = -1.2, std: float = 1.2) -> Tensor:
        return at(lognormal_level(draws.normal("t").double(), mean, std))

    def sid(draws: Draws, t_max: float = 800.0) -> Tensor:
        return at(sid_level(draws.uniform("t").double(), t_max))

    def karras(draws: Draws, low: int = 20, high: int = 980) -> Tensor:
        return at(karras_index_level(draws.uniform("t"), low, high))

    known: dict[str, Callable[..., Tensor]] = {
        f.__name__: f for f in (uniform, logit_normal, lognormal, sid, karras)
    }
    if name not in known:
        raise ValueError(f"{where}.name: found {name!r}, expected one of {sorted(known)}")
    try:
        known[name](Draws(0, where, 0, torch.zeros(1, dtype=torch.int64)), **given)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{where}: found {given} for {name!r}: {error}") from error
    return lambda draws: known[name](draws, **given)


class StudentInput:
    """Where the generator's steps start, and how it is sampled.

    Args:
        levels: noise levels sigma / alpha of the N start times, falling; None: one step from t_max. SiD: [2.5].
        unit_noise: feed unit noise at the first time instead of noise of that level (DMD2's one-step SDXL).
    """

    def __init__(self, process: Process, levels: Sequence[float] | None, unit_noise: bool = False) -> None:
        self.process = process
        if levels is None:
            self.times = [process.t_max]
        else:
            wanted = [float(level) for level in levels]
            if not wanted or not all(level > 0 for level in wanted):
                raise ValueError(f"levels: found {list(levels)}, expected positive noise levels, or null")
            ratio = -torch.log(torch.tensor(wanted, dtype=torch.float64))
            if not bool(process.covers(ratio).all()):
                raise ValueError(f"levels: found {wanted}, expected noise levels that {process!r} has")
            self.times = process.time_of(ratio).tolist()
        check_times(process, self.times)
        first = torch.tensor([self.times[0]], dtype=torch.float64)
        whole = float(process.prior(torch.ones(1, 1, dtype=torch.float64)))
        at_end = self.times[0] == process.t_max
        self.scale = 1.0 if at_end else (1.0 if unit_noise else float(process.sigma(first))) / whole

    @property
    def steps(self) -> int:
        """N."""
        return len(self.times)

    def spec(self, kind: str, guidance_baked: float, noise_scale: float) -> SamplerSpec:
        """Exactly N steps, each from fresh noise."""
        return SamplerSpec(
            steps=self.steps,
            times={self.steps: (*self.times, self.process.t_min)},
            mode="sde",
            kind=kind,
            start_scale=self.scale,
            guidance_baked=guidance_baked,
            noise_scale=noise_scale,
        )

    def _given(self, draws: Draws, shape: Sequence[int]) -> tuple[Tensor, Callable[[int], Tensor]]:
        z = draws.normal("z", shape)
        return self.process.prior(self.scale * z), lambda i: draws.normal(f"renoise{i}", shape)

    def output(self, student: Denoiser, cond: Cond, draws: Draws) -> Tensor:
        """x [B,*S], the output of one of the N steps, the same for the whole batch and all processes, with its graph."""
        start, noise = self._given(draws, student.sample_shape)
        k = stream_key(draws.seed, draws.stream, draws.step, "k") % self.steps
        return few_step_output(lambda x, t: student.x0(x, t, cond), self.process, start, self.times, noise, k)

    def mixture(self, student: Denoiser, cond: Cond, draws: Draws) -> Tensor:
        """x [B,*S] of a step of its own for each sample, without a graph: what the fake score learns."""
        start, noise = self._given(draws, student.sample_shape)
        k = draws.integer("k", self.steps)
        return mixture_output(lambda x, t: student.x0(x, t, cond), self.process, start, self.times, noise, k)


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


def weighting_for(weighting: str, kind: str) -> str:
    """The weighting of the fake score's loss; "auto" goes by what the net predicts.

    Raises:
        ValueError: an unknown weighting.
    """
    if weighting == "auto":
        return AUTO[kind]
    if weighting not in FAKE_SCORE_KINDS:
        raise ValueError(
            f"weighting: found {weighting!r}, expected 'auto' or one of {sorted(FAKE_SCORE_KINDS)}"
        )
    return weighting


class ScoreDistillation(DistillModule):
    """Student, frozen teacher and fake score. Subclasses say in which order they are updated and with which loss.

    Args:
        levels, unit_noise: see `StudentInput`. labels: "data", those of the batch, or "uniform" over the classes.
        weighting: of the fake score's loss: "edm", "eps", "v", "flow", or "auto", by the teacher's kind.
        reduction: of losses over the dimensions of a sample, "sum" or "mean".
        guidance_teacher: the teacher's guidance while the student is trained. guidance_fake, guidance_fake_train: the
            fake score's, then and while it is trained itself (long-short guidance).
        null_prob: share of dropped conditions while the fake score is trained; needed where its guidance is not 1.
        noise_scale: of the student's sampler, see `SamplerSpec`; training never uses it.
    """

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
        self._check(
            student, teacher, labels, null_prob, (guidance_teacher, guidance_fake, guidance_fake_train)
        )
        if reduction not in ("sum", "mean"):
            raise ValueError(f"reduction: found {reduction!r}, expected 'sum' or 'mean'")
        process = student.process
        self.input = StudentInput(process, levels, unit_noise)
        self.coupling = "endpoint" if self.input.steps == 1 else "few_step"
        self.generator_times = times_of(process, generator_times, "generator_times")
        self.fake_times = times_of(process, fake_times, "fake_times")
        self.fake = copy.deepcopy(teacher)
        self.teacher = self.keep_frozen("teacher", teacher)
        self.weighting = weighting_for(weighting, teacher.kind)
        self.sigma_data, self.reduction, self.labels = sigma_data, reduction, labels
        self.guidance_teacher, self.guidance_fake = guidance_teacher, guidance_fake
        self.guidance_fake_train, self.null_prob, self.noise_scale = (
            guidance_fake_train,
            null_prob,
            noise_scale,
        )
        student.guidable = False
        self.spec()

    @staticmethod
    def _check(
        student: Denoiser, teacher: Denoiser, labels: str, null_prob: float, scales: Sequence[float]
    ) -> None:
        if teacher.process.config() != student.process.config():
            raise ValueError(
                f"teacher: lives under {teacher.process!r}, the student under {student.process!r}; expected one process"
            )
        if teacher.coupling != "independent":
            raise ValueError(
                f"teacher: found a model of {teacher.coupling} noise and data, which has no score; expected a diffusion or "
                "flow model"
            )
        if any(scale != 1 for scale in scales) and not teacher.guidable:
            raise ValueError(
                f"guidance_teacher: found the scales {list(scales)}, but the teacher was trained without a null condition; "
                "expected 1"
            )
        if labels not in ("data", "uniform"):
            raise ValueError(f"labels: found {labels!r}, expected 'data' or 'uniform'")
        if not 0 <= null_prob < 1:
            raise ValueError(f"null_prob: expected a probability in [0, 1), found {null_prob}")

    def spec(self) -> SamplerSpec:
        """Exactly the steps that it was trained for."""
        return self.input.spec(self.student.kind, self.guidance_teacher, self.noise_scale)

    def conditions(self, batch: Batch, draws: Draws) -> Cond:
        """What to make samples of."""
        if self.labels == "data" or not self.student.num_classes:
            return batch.cond
        return Cond.of_labels(draws.integer("label", self.student.num_classes))

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

    def diagnostics(self, batch: Batch, draws: Draws) -> Diagnostics:
        """Samples of the average, and what teacher and fake score make of them at three noise levels."""
        student, process = self.best(), self.student.process
        assert isinstance(student, Denoiser)
        cond = self.conditions(batch, draws)
        x = self.input.mixture(student, cond, draws)
        eps = draws.normal("eps", self.student.sample_shape)
        scalars = {"x_mean": x.mean(), "x_std": x.std(), "x_max": x.abs().max()}
        if batch.x0 is not None:
            scalars["x_std_data"] = batch.x0.std()
        rows = [("student", x)]
        for level in SHOWN_LEVELS:
            t = process.matching_time(
                EDM(), torch.full((len(x),), level, dtype=torch.float64, device=x.device)
            )
            x_t = process.add_noise(x, eps, t)
            told, learned = self.teacher.x0(x_t, t, cond, self.guidance_teacher), self.fake.x0(x_t, t, cond)
            scalars[f"gap_{level:g}"] = (told - learned).square().mean()
            rows += [(f"teacher x0, {level:g}", told), (f"fake x0, {level:g}", learned)]
        return Diagnostics(scalars, rows)
