"""The paths of a flow from noise to data, for measures of how straight they are."""

from __future__ import annotations

import torch
from torch import Tensor

from distill.data.rng import sample_noise
from distill.models.generator import Generator
from distill.process.flow import Flow
from distill.samplers.ode import rollout


def has_paths(generator: Generator) -> bool:
    """Whether a model is an ODE whose paths can be straight: a flow that is valid at all times."""
    model = generator.denoiser
    return model.coupling not in ("endpoint", "few_step") and isinstance(model.process, Flow)


@torch.inference_mode()
def euler_paths(
    generator: Generator, ids: Tensor, seed: int, stream: str, steps: int
) -> tuple[Tensor, Tensor]:
    """(path [steps + 1, B,*S], velocities [steps, B,*S]) of the samples `ids` [B] along Euler's uniform grid, with the
    model's own guidance and the conditions of these ids."""
    model = generator.denoiser
    z = sample_noise(seed, stream, ids, model.sample_shape).to(generator.device)
    cond = generator.conditions.of(ids).with_guidance(generator.spec.embedded()).to(generator.device)
    grid = torch.linspace(1.0, 0.0, steps + 1, dtype=torch.float64, device=z.device)
    return rollout(lambda x, t: model.velocity(x, t, cond, generator.spec.guidance_scale), z, grid)
