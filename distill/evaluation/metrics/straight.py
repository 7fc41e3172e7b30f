"""How straight a flow's paths are, along Euler's method (`evaluation.paths.EulerPath`); None for a model without paths."""

from __future__ import annotations

from distill.evaluation.metric import Metric

STRAIGHTNESS = Metric(
    "straightness",
    order=190,
    measure=lambda row: row.path and row.path.deviation,
    meaning="mean squared difference between velocity and displacement along Euler's path; 0 for straight paths; flows only",
    rows=True,
    better="lower",
)
STRAIGHTNESS_NORM = Metric(
    "straightness_norm",
    order=200,
    measure=lambda row: row.path and row.path.deviation / row.path.chord,
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
    measure=lambda row: row.path and row.path.gap,
    meaning="mean squared distance between one Euler step and as many as straightness is measured with",
    of="points",
    rows=True,
    title="one-step gap",
    form=".4f",
    better="lower",
)
