"""HiPA: one-step students by low-rank adapters, from pairs of noise and teacher sample, with losses on high frequencies.

Zhang & Hooi 2023, "HiPA: Enabling One-Step Text-to-Image Diffusion Models via High-Frequency-Promoting Adaptation" (arXiv
2311.18158). The adapted net makes x0 in one call from the noise z of a stored pair; its decoded image is compared with the
teacher's image of the same noise: a perceptual distance, and distances of high Fourier frequencies and of edges.

What the loss should look like: it falls by half within some hundred steps and goes on slowly. Watch `diagnostics/hf_student`
beside `diagnostics/hf_teacher`, the share of high frequencies: an untrained student's is above the teacher's where the net
amplifies its noise, and below it where its images are blurred.

Deviations: no code is published, and the formulas are ours (docs/adapters.md). The perceptual distance is LPIPS or DISTS where
`features` is one of them, or that between normalised features of another extractor of this package, beside a squared error of
pixels; the authors' network is not known.
The adapters are the option `student=lora` of the stage, so that all weights can be trained too. The noise level of the start
can be chosen.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from distill.data.batch import Batch
from distill.data.cond import Cond
from distill.data.rng import Draws
from distill.engine.module import DistillModule
from distill.engine.update import Diagnostics, Loss, Step, Update
from distill.methods.families.feature_space import check_extractor
from distill.methods.families.student_input import StudentInput
from distill.methods.families.suits import check_start, refuse_unused
from distill.methods.losses.distances import l2
from distill.methods.losses.frequency import (
    check_rho,
    edge_distance,
    feature_distance,
    fourier_distance,
    high_frequency_ratio,
)
from distill.models.adapters import adapter_of
from distill.models.denoiser import Denoiser
from distill.models.features import PerceptualDistance
from distill.models.result import Result
from distill.typed import filled, settle

# Above this a learning rate that suits other nets moves the image too far.
USUAL_FACTOR = 30.0


@dataclass(frozen=True)
class HighFrequency:
    """Distances of high frequencies.

    Attributes:
        fourier: weight of mean |H(x) - H(y)|, H a high-pass filter; edges: weight of mean |E(x) - E(y)|, E Sobel's edges.
        rho: the filter's lowest frequency as a share of the Nyquist frequency, in (0, 1].
        luminance: edges of the luminance instead of each channel.
    """

    fourier: float = 1.0
    edges: float = 1.0
    rho: float = 0.25
    luminance: bool = False

    def __post_init__(self) -> None:
        settle(self)
        check_rho(self.rho)
        for name in ("fourier", "edges"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name}: found {getattr(self, name)}, expected at least 0")


class HiPA(DistillModule):
    """One step from noise to the teacher's image.

    Args:
        student: starts from the teacher; with `student=lora` a frozen net with adapters.
        level: noise level sigma / alpha of the start; None: that of t_max.
        mse: weight of the squared error of pixels.
        perceptual: weight of the distance between the features of `features`.
        features: a feature extractor of images (group `features`), or None for no such distance.
        high_frequency: see `HighFrequency`.
    """

    PAIRS_OF = "init"
    reads = ("x0", "z")

    def __init__(
        self,
        student: Denoiser,
        *,
        level: float | None = None,
        mse: float = 1.0,
        perceptual: float = 1.0,
        features: nn.Module | None = None,
        high_frequency: HighFrequency | Mapping[str, Any] = HighFrequency(),
    ) -> None:
        super().__init__(student)
        if student.embeds_guidance:
            raise ValueError(
                "student: takes the guidance as an input, which this method does not give; expected a model without"
            )
        self.input = StudentInput(student.process, None if level is None else [level], name="level")
        self.start = self.input.times[0]
        self._check_start()
        for name, weight in (("mse", mse), ("perceptual", perceptual)):
            if not 0 <= weight < math.inf:
                raise ValueError(f"{name}: found {weight}, expected at least 0")
        if features is None:
            refuse_unused(self, {"perceptual": perceptual}, "without `features`")
        self.mse, self.perceptual = mse, perceptual
        self.high = filled(HighFrequency(), high_frequency, "high_frequency")
        self._check_images(features)
        self.features = None if features is None else self.keep_frozen("features", features)
        weights = (mse, self.high.fourier, self.high.edges, 0.0 if features is None else perceptual)
        if not any(weights):
            raise ValueError(
                "mse, perceptual, high_frequency: found no weight above 0, expected a distance to train"
            )
        self.recomputes = bool(student.decoder.weights())

    def _check_start(self) -> None:
        """Refuse a start at which the student's error is far larger in its image, and warn of a large one."""
        kind = self.student.kind
        factor = check_start(self.student.process, kind, self.start)
        if factor > USUAL_FACTOR:
            warnings.warn(
                f"level: at t = {self.start:g} the student multiplies the error of its predicted {kind} by {factor:.3g}; "
                "choose a lower level, or a small learning rate",
                stacklevel=3,
            )

    def _check_images(self, features: nn.Module | None) -> None:
        """The distances of images need some, and an extractor that takes them and gives them a gradient."""
        decoder = self.student.decoder
        if not decoder.images and (features is not None or self.high.fourier or self.high.edges):
            raise ValueError(
                "high_frequency: the student's samples are no images; expected features: null and "
                "high_frequency: {fourier: 0, edges: 0}"
            )
        if features is not None:
            check_extractor(features, decoder.shape(self.student.sample_shape))

    def updates(self) -> Sequence[Update]:
        """One update: the student."""
        return [Update("student", {"student": self.student}, self.loss)]

    def result(self) -> Result:
        """One step: "endpoint" from t_max, else "few_step". Not guidable: the pairs' guidance is learned."""
        whole = self.start == self.student.process.t_max
        return Result(
            self.input.spec(1.0, 1.0), "endpoint" if whole else "few_step", boundary=self.student.boundary
        )

    def samples(self, student: Denoiser, z: Tensor, cond: Cond) -> Tensor:
        """x0 [B,*S] of noise z [B,*S] in one call."""
        t = torch.full((len(z),), self.start, dtype=torch.float64, device=z.device)
        return student.x0(student.process.prior(self.input.scale * z), t, cond)

    def images(self, samples: Tensor) -> Tensor:
        """Decoded samples, not clamped; a decoder with weights keeps no activations for the backward pass."""
        decode = self.student.decoder.decode
        if self.recomputes and samples.requires_grad:
            made: Tensor = checkpoint(decode, samples, use_reentrant=False)
            return made
        return decode(samples)

    def terms(self, made: Tensor, wanted: Tensor) -> dict[str, tuple[float, Tensor]]:
        """name -> (weight, distance [B]) between images, without those of weight 0."""
        high = self.high
        found = {
            "mse": (self.mse, lambda: l2(made, wanted)),
            "fourier": (high.fourier, lambda: fourier_distance(made, wanted, high.rho)),
            "edges": (high.edges, lambda: edge_distance(made, wanted, luminance=high.luminance)),
        }
        if self.features is not None:
            found["perceptual"] = (self.perceptual, lambda: self.perceived(made, wanted))
        return {name: (weight, distance()) for name, (weight, distance) in found.items() if weight > 0}

    def perceived(self, made: Tensor, wanted: Tensor) -> Tensor:
        """[B]: the extractor's own distance between images, LPIPS or DISTS, or that of its features."""
        assert self.features is not None
        if isinstance(self.features, PerceptualDistance):
            return self.features.distance(made, wanted)
        return feature_distance(self.features(made), self.features(wanted))

    def loss(self, batch: Batch, step: Step) -> Loss:
        """mse |y' - y|^2 + perceptual d_f(y', y) + fourier |H(y') - H(y)| + edges |E(y') - E(y)| of decoded images (means)."""
        assert batch.x0 is not None
        assert batch.z is not None
        made = self.images(self.samples(self.student, batch.z, batch.cond))
        with torch.no_grad():
            wanted = self.images(batch.x0)
        terms = {name: (weight, d.mean()) for name, (weight, d) in self.terms(made, wanted).items()}
        total = torch.stack([weight * distance for weight, distance in terms.values()]).sum()
        logs = {name: distance for name, (_, distance) in terms.items()}
        if (known := self.student.decoder.range) is not None:
            logs["saturated"] = ((made < known[0]) | (made > known[1])).float().mean()
        return Loss(total, logs)

    def diagnostics(self, batch: Batch, draws: Draws) -> Diagnostics:
        """Share of high frequencies of the student's and the teacher's images, and the norm of the adapters' terms."""
        assert batch.x0 is not None
        student, z = self.best(), batch.z
        assert isinstance(student, Denoiser)
        scalars: dict[str, Tensor] = {}
        if (adapter := adapter_of(student.net)) is not None and self.world.size == 1:
            norms = torch.stack([layer.norm() for layer in adapter.layers().values()])
            scalars = {"adapter_norm": norms.square().sum().sqrt(), "adapter_norm_max": norms.max()}
        if z is None:
            return Diagnostics(scalars)
        x0 = self.samples(student, z, batch.cond)
        if student.decoder.images:
            for name, samples in (("hf_student", x0), ("hf_teacher", batch.x0)):
                images = student.decoder.clamp(self.images(samples))
                scalars[name] = high_frequency_ratio(images, self.high.rho)
        return Diagnostics(scalars, [("teacher", batch.x0), ("student, 1 step", x0)])
