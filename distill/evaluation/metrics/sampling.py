"""How a row's samples were made, and what that cost."""

from __future__ import annotations

from distill.evaluation.metric import Metric

GUIDANCE_SCALE = Metric(
    "guidance_scale",
    order=10,
    measure=lambda row: row.generator.spec.guidance_scale,
    meaning="the scale g in u + g (c - u)",
    rows=True,
    title="guidance",
    form="g",
    plotted=False,
)
GUIDANCE_W = Metric(
    "guidance_w",
    order=20,
    measure=lambda row: row.generator.spec.guidance_w,
    meaning="g - 1 as an input of the network",
    rows=True,
    title="w",
    form="g",
    plotted=False,
)
NFE = Metric(
    "nfe",
    order=30,
    measure=lambda row: row.generator.network_calls(row.steps),
    meaning="network calls a sample; guidance doubles them",
    rows=True,
    form="d",
    plotted=False,
)
IMAGES_PER_SECOND = Metric(
    "images_per_second",
    order=220,
    measure=lambda row: row.count / row.seconds,
    meaning="samples a second, which depends on the machine and its load",
    rows=True,
    title="images/s",
    form=".0f",
    better="higher",
    comparable=False,
)
TRAIN_SECONDS = Metric(
    "train_seconds",
    order=230,
    measure=lambda row: row.facts.get("train_seconds"),
    meaning="seconds of training",
    rows=True,
    form="",
    better="lower",
    comparable=False,
)
PEAK_MEMORY_BYTES = Metric(
    "peak_memory_bytes",
    order=240,
    measure=lambda row: row.facts.get("peak_memory_bytes"),
    meaning="most memory during training",
    rows=True,
    form="",
    better="lower",
    comparable=False,
)
