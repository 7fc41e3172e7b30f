"""MMD finetuning: the whole sampler of S steps is trained to make the distribution of the data, in a feature space.

Aiello et al. 2023, "Fast Inference in Denoising Diffusion Models via MMD Finetuning" (arXiv 2301.07969). In a step the sampler
runs from noise to samples x_i with the graph of all its network calls, and the loss is the squared maximum mean discrepancy
between features of samples and of real data:

    MMD^2 = mean_{i != j} k(phi x_i, phi x_j) + mean_{i != j} k(phi y_i, phi y_j) - 2 mean_{i, j} k(phi x_i, phi y_j).

No teacher, no pairs, no adversary: the student starts from a teacher, or is a few-step student of another method, whose
own sampler is what is trained (sampler, times, fresh noise, guidance input). Afterwards it is valid for this step count alone.

What the loss should look like: it falls within some hundred steps and then scatters around a small value, which is often
negative (the estimator is unbiased). Its size depends on the kernel. A network in the loss can be exploited: watch `eval/fd` of
a monitor in another feature space, which also keeps the best student, and `student/saturated`, which must not rise for long.

Deviations: the loss of all processes and micro batches is one MMD (the paper's code averages those of small batches), and the
gradient is clipped once a step. Dropout is off inside the sampler (`dropout`). Kernels on distances, classes in the kernel, the
bank of real features and real data of another source are additions. Samplers and times are the student's; the paper's grid
has more than S steps where S does not divide the table, and calls the network at index 0 last. Real images are not flipped at
random. The default of `features` is the data themselves: the paper's network, that of FID, has no gradient here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from distill.data.batch import Batch
from distill.data.rng import Draws
from distill.data.source import Source
from distill.engine.module import DistillModule
from distill.engine.update import Diagnostics, Loss, Step, Update
from distill.methods.families.chain import chain_spec, run_chain
from distill.methods.families.discrepancy import Discrepancy
from distill.methods.families.feature_space import PRECISIONS, FeatureSpace, check_extractor, real_rows
from distill.models.denoiser import Denoiser
from distill.models.kernels import Kernel, Terms
from distill.models.result import Result
from distill.typed import filled

MEASURED = 1024  # real samples that scale and median distance are taken from, where there is no bank


class MMD(DistillModule):
    """MMD finetuning of a sampler.

    Args:
        student: any model; its sampler (`Denoiser.sampler`) is what is trained.
        steps: S; null: those of a few-step student, 5 of a model of any number of steps.
        grid: times of the steps, such as {name: trailing}; null: those of the student's sampler.
        guidance_scale: in every step; null: that of the student's sampler.
        features: a frozen extractor (group `features`); null: the data themselves, pixels or coordinates.
        feature_scale: "none", or "rms": features are divided by the root mean square of the real ones.
        kernel: see `models.kernels.Kernel`. estimator: "unbiased" or "biased".
        classes: compare samples with others of the same class alone; null: where the student has class labels.
        real: a source of real data; null: the training data.
        bank: so many real samples, whose features are computed once, are compared with in every step; null: all; 0: those of
            the step's batch.
        clamp: of decoded samples to [-1, 1]: "hard", "straight_through" or "none".
        precision: of features and kernels, "float64" or "float32".
        recompute: keep the activations of no network call, and compute them again in the backward pass.
        dropout: inside the chain.
    """

    reads = ("x0",)

    @classmethod
    def needs(cls, options: Mapping[str, Any]) -> tuple[str, ...]:
        """No samples in the batches where real data come from a source of their own."""
        return cls.reads if options.get("real") is None else ()

    def __init__(
        self,
        student: Denoiser,
        *,
        steps: int | None = None,
        grid: Mapping[str, Any] | None = None,
        guidance_scale: float | None = None,
        features: nn.Module | None = None,
        feature_scale: str = "none",
        kernel: Kernel | Mapping[str, Any] = Kernel(),  # noqa: B008 (never changed)
        estimator: str = "unbiased",
        classes: bool | None = False,
        real: Source | None = None,
        bank: int | None = 0,
        clamp: str = "hard",
        precision: str = "float64",
        recompute: bool = True,
        dropout: bool = False,
    ) -> None:
        super().__init__(student)
        self.spec = chain_spec(student, steps, grid, guidance_scale)
        shape = student.decoder.shape(student.sample_shape)
        if features is not None:
            check_extractor(features, shape)
            features = self.keep_frozen("features", features)
        if precision not in PRECISIONS:
            raise ValueError(f"precision: found {precision!r}, expected one of {list(PRECISIONS)}")
        self.feature_space = features
        self.space = FeatureSpace(student.decoder, features, clamp, PRECISIONS[precision])
        classes = student.conditions.num_classes > 0 if classes is None else classes
        check_real(student, real, bank, classes)
        self.loss_of = Discrepancy(filled(Kernel(), kernel, "kernel"), estimator, classes, feature_scale)
        self.real, self.bank = real, bank
        self.recompute, self.dropout = recompute, dropout
        self._finite: Tensor | None = None  # [S + 2] of the last batch: the states, then the features

    def updates(self) -> Sequence[Update]:
        """One update: the student; several micro batches are looked at together first."""
        mode: Literal["train", "eval"] = "train" if self.dropout else "eval"
        return [Update("student", {"student": self.student}, self.loss, before=self.first_pass, mode=mode)]

    def result(self) -> Result:
        """The trained sampler: "endpoint" for one step from t_max, else "few_step"; guidable where guidance was trained."""
        steps, process = self.spec.steps, self.student.process
        whole = steps == 1 and self.spec.start(process) == process.t_max
        guided = self.spec.guidance_scale != 1
        return Result(self.spec, "endpoint" if whole else "few_step", guided, self.student.boundary)

    def before_training(self, source: Source) -> None:
        """Compute the features of the bank, and with real features the scale and the median distance."""
        origin, count = self.real or source, MEASURED if self.bank == 0 else self.bank
        self.space.scale = 1.0
        found = real_rows(self.space, origin, count, self.seed, self.device, decoded=self.real is not None)
        self.space.scale = self.loss_of.learn(found, keep=self.bank != 0)

    def state(self) -> dict[str, Any]:
        """What was measured of real features."""
        return dict(self.loss_of.measured)

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Inverse of `state`."""
        self.loss_of.measured = {name: float(value) for name, value in state.items()}

    # --- one step

    def _sampled(self, batch: Batch, step: Step) -> tuple[Tensor, Tensor, Tensor]:
        """(features [B,D], states [S + 1,B,*S], the share of numbers that were clamped); the same in both passes."""
        with step.same_dropout("chain"):
            states = run_chain(self.student, self.spec, batch.cond, step.draws, self.recompute)
            rows, outside = self.space.of_samples(states[-1])
        return rows, states, outside

    def _terms(self, rows: Tensor, batches: Sequence[Batch]) -> Terms:
        """MMD^2 of the rows of all processes, from this one's."""
        gather = self.world.rows
        labels = real = None
        if self.loss_of.classes:
            labels = gather(torch.cat([self.loss_of.labels(batch.cond) for batch in batches]))
        if self.bank == 0:
            with torch.no_grad():
                real = gather(torch.cat([self.space.of_samples(x0_of(batch))[0] for batch in batches]))
        return self.loss_of(gather(rows), labels, real, labels)

    def first_pass(self, batches: Sequence[Batch], steps: Sequence[Step]) -> None:
        """Of several micro batches: the gradient of the loss of all of them at each feature. The second pass, `loss`, makes the
        same samples again and carries it on to the weights: exact, at the memory of one micro batch."""
        if len(batches) == 1:
            return
        with torch.no_grad():
            parts = [self._sampled(batch, step)[0] for batch, step in zip(batches, steps, strict=True)]
        rows = torch.cat(parts).requires_grad_(True)
        terms = self._terms(rows, batches)
        (gradient,) = torch.autograd.grad(terms.mmd2, rows)
        # The engine takes the mean over micro batches, and this is a sum.
        shares = (len(batches) * gradient).split([len(part) for part in parts])
        for step, share in zip(steps, shares, strict=True):
            step.shared |= {"mmd": torch.stack(terms).detach(), "mmd_gradient": share}

    def loss(self, batch: Batch, step: Step) -> Loss:
        """MMD^2 of the samples of all processes and micro batches (arXiv 2301.07969, eq. 8)."""
        rows, states, outside = self._sampled(batch, step)
        if not rows.requires_grad:
            raise ValueError(
                "features: the generated ones do not require a gradient; expected a trained student"
            )
        if (gradient := step.shared.get("mmd_gradient")) is None:
            terms = self._terms(rows, [batch])
            total = terms.mmd2
        else:
            terms, slope = Terms(*step.shared["mmd"]), (rows * gradient).sum()
            total = terms.mmd2 + slope - slope.detach()
        with torch.no_grad():
            finite = [state.isfinite().all() for state in states]
            self._finite = torch.stack([*finite, rows.isfinite().all()])
            logs = {"xx": terms.xx, "yy": terms.yy, "xy": terms.xy, "saturated": outside}
            logs["feature_rms"] = rows.square().mean().sqrt()
            logs |= {f"state_rms_{i}": state.square().mean().sqrt() for i, state in enumerate(states)}
        return Loss(total, logs)

    def nonfinite_place(self) -> str:
        """The first step of the last batch's chain after which something was not finite."""
        if self._finite is None or bool(self._finite.all()):
            return ""
        place = self._finite.tolist().index(False)
        if place > self.spec.steps:
            return "the features of the samples were not finite"
        times = self.spec.times[self.spec.steps]
        where = (
            f"after step {place} of {self.spec.steps}, from t = {times[place - 1]:g}"
            if place
            else "at the start"
        )
        return f"the states of the sampler were not finite {where}"

    def diagnostics(self, batch: Batch, draws: Draws) -> Diagnostics:
        """MMD^2 of the average's samples, and the share of numbers that are clamped."""
        states = run_chain(self.as_generator().denoiser, self.spec, batch.cond, draws, recompute=False)
        rows, outside = self.space.of_samples(states[-1])
        labels = self.loss_of.labels(batch.cond) if self.loss_of.classes else None
        real = self.space.of_samples(x0_of(batch))[0] if self.bank == 0 else None
        terms = self.loss_of(rows, labels, real, labels)
        scalars = {"mmd2": terms.mmd2, "saturated": outside}
        return Diagnostics(scalars, [("student", states[-1])] if self.student.decoder.images else [])


def x0_of(batch: Batch) -> Tensor:
    """The real samples of a batch."""
    assert batch.x0 is not None
    return batch.x0


def check_real(student: Denoiser, real: Source | None, bank: int | None, classes: bool) -> None:
    """Refuse real data that cannot be compared with the student's samples.

    Raises:
        ValueError: names `bank`, `real` or `classes`.
    """
    least = (
        "at least 2, 0 (the batch) or null (all)" if real is None else "at least 2, or null (all of `real`)"
    )
    if bank is not None and (bank < 0 or bank == 1 or (bank == 0 and real is not None)):
        raise ValueError(f"bank: found {bank}, expected a number of real samples, {least}")
    shape = student.decoder.shape(student.sample_shape)
    if real is not None and tuple(real.sample_shape) != shape:
        raise ValueError(
            f"real: found samples of shape {list(real.sample_shape)}, expected the student's decoded {list(shape)}"
        )
    known = student.conditions.num_classes
    if classes and (known == 0 or (real is not None and real.num_classes != known)):
        found = (
            f"`real` has {real.num_classes} and the student {known} classes"
            if known and real
            else "the student has none"
        )
        raise ValueError(f"classes: found true, but {found}; expected false")
