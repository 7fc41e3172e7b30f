"""The exact teacher of `models.analytic` against the golden rollouts of the same mixture (rectified_flow/README.md)."""

from __future__ import annotations

from conftest import Load
from translate import close, numbers

from distill.data.cond import Cond
from distill.models.analytic import exact_denoiser
from distill.process.flow import Flow
from distill.process.times import uniform_grid
from distill.samplers.ode import rollout
from distill.samplers.straightness import straightness


def test_gmm8_rollouts_of_the_model(load: Load) -> None:
    """Euler of the Denoiser, whose net predicts x0, is Euler of the closed-form velocity (tolerance 1e-7)."""
    file = load("rectified_flow", "gmm8_analytic")
    model = exact_denoiser(Flow(), file["means"].tolist(), float(file["std"]))
    z, cond = file["z"], Cond.nothing(len(file["z"]))
    for steps in numbers(file, r"euler(\d+)"):
        close(model.transport(z, cond, steps=steps)[0], file[f"euler{steps}"], 1e-7, 1e-7)
    for steps in numbers(file, r"straightness(\d+)"):
        if steps > 1:
            path, velocities = rollout(
                lambda x, t: model.velocity(x, t, cond), z, uniform_grid(Flow(), steps)
            )
            plain, norm = straightness(path, velocities)
            close(plain, file[f"straightness{steps}"], 1e-7, 1e-7)
            close(norm, file[f"straightness_norm{steps}"], 1e-7, 1e-7)
