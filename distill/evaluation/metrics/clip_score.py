"""CLIP score (Hessel et al. 2021, arXiv 2104.08718): how well images fit their prompts."""

from __future__ import annotations

from distill.evaluation.metric import Metric
from distill.evaluation.samples import Sampled


def clip_score(row: Sampled) -> float | None:
    """max(mean of 100 cos(image, prompt), 0) over all samples; None without a CLIP model."""
    return None if row.clip is None else row.clip(row.samples, row.generator)


CLIP_SCORE = Metric(
    "clip_score",
    order=205,
    measure=clip_score,
    meaning="100 x mean cosine of the CLIP embeddings of image and prompt, at least 0",
    of="prompts",
    rows=True,
    form=".2f",
    better="higher",
)
