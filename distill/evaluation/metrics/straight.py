"""How straight a flow's paths are, along Euler's method (`samplers.straightness`)."""

from __future__ import annotations

from functools import partial

from distill.evaluation.metric import Metric
from distill.evaluation.samples import Sampled
from distill.samplers.straightness import straightness


def _straightness(row: Sampled, part: int) -> float | None:
    """S (part 0) or S / mean |z - x0|^2 (part 1); None for a model without paths."""
    return None if row.path is None else float(straightness(*row.path)[part])


def one_step_gap(row: Sampled) -> float | None:
    """Mean of |x1 - xN|^2, summed over coordinates, of samples in one Euler step and in all N steps of the path."""
    if row.path is None:
        return None
    path, velocities = row.path
    one_step = path[0] - velocities[0]  # from t = 1 to t = 0 at once
    return float((one_step - path[-1]).flatten(1).square().sum(1).mean())


STRAIGHTNESS = Metric(
    "straightness",
    order=190,
    measure=partial(_straightness, part=0),
    meaning="mean squared difference between velocity and displacement along Euler's path; 0 for straight paths; flows only",
    rows=True,
    better="lower",
)
STRAIGHTNESS_NORM = Metric(
    "straightness_norm",
    order=200,
    measure=partial(_straightness, part=1),
    meaning="straightness over transport, free of scale",
    of="points",
    rows=True,
    title="S / transport",
    form=".4f",
    better="lower",
)
ONE_STEP_GAP = Metric(
    "one_step_gap",
    order=210,
    measure=one_step_gap,
    meaning="mean squared distance between one Euler step and as many as straightness is measured with",
    of="points",
    rows=True,
    title="one-step gap",
    form=".4f",
    better="lower",
)
