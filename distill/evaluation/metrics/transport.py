"""What a model does with each noise: how far it moves it, and how near it comes to the teacher."""

from __future__ import annotations

from distill.evaluation.metric import Metric
from distill.evaluation.samples import Sampled, Samples


def transport_cost(x: Samples) -> float | None:
    """Mean of |sample - noise|^2, summed over coordinates."""
    if x.noise is None:
        return None
    return float((x.values - x.noise).square().sum(1).mean())


def teacher_mse(row: Sampled) -> float | None:
    """Mean squared difference from the samples that the row `follows` made of the same noise; None for other rows."""
    if row.followed is None:
        return None
    return float((row.samples - row.followed).double().square().mean())


def teacher_latent_mse(row: Sampled) -> float | None:
    """As `teacher_mse`, before decoding."""
    if row.latents is None or row.followed_latents is None:
        return None
    return float((row.latents - row.followed_latents).double().square().mean())


TEACHER_LATENT_MSE = Metric(
    "teacher_latent_mse",
    order=165,
    measure=teacher_latent_mse,
    meaning="mean squared difference from the teacher's latents of the same noise",
    of="prompts",
    rows=True,
    title="teacher mse, latents",
    form=".4f",
    better="lower",
    comparable=False,  # the teachers differ
)
TEACHER_MSE = Metric(
    "teacher_mse",
    order=170,
    measure=teacher_mse,
    meaning="mean squared difference from the teacher's sample of the same noise, where a student is meant to follow it",
    rows=True,
    title="teacher mse",
    form=".4f",
    better="lower",
    comparable=False,  # the teachers differ
)
TRANSPORT_COST = Metric(
    "transport_cost",
    order=180,
    measure=transport_cost,
    meaning="mean squared distance from noise to sample, summed over coordinates; reflow must not raise it",
    of="points",
    title="transport",
    reads=("values", "noise"),
)
