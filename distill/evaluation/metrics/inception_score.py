"""Inception Score (Salimans et al. 2016, 1606.03498): exp(E_x KL(p(y|x) || p(y))).

Of class probabilities by the Inception network alone does it deserve the name, and only on images of its classes; it
looks at no real image, so it belongs beside an FID and not in its place.
"""

from __future__ import annotations

import torch
from torch import Tensor

from distill.evaluation.checks import as_rows


def inception_score(probabilities: Tensor, block: int = 5000) -> float:
    """Mean over consecutive blocks of `block` samples of exp(mean KL(p_i || mean of the block's p)).

    probabilities [N, classes], rows sum to 1; p(y) is estimated in each block, and the last one may be smaller. The
    blocks are not shuffled: samples in the order of their labels give other values than mixed ones. At least 1, at
    most the number of classes. Raises ValueError for an empty set, non-finite or negative entries, rows that do not
    sum to 1 (to 1e-3, as of half precision), or block < 1.
    """
    rows = as_rows("probabilities", probabilities)
    if block < 1:
        raise ValueError(f"block: found {block}, expected at least 1")
    if (rows < 0).any() or ((rows.sum(1) - 1).abs() > 1e-3).any():
        raise ValueError(
            "probabilities: expected rows that are not negative and sum to 1 (softmax of logits)"
        )
    scores = []
    for part in rows.split(block):
        # xlogy: a class of probability 0 adds 0.
        divergence = torch.xlogy(part, part) - torch.xlogy(part, part.mean(0))
        scores.append(divergence.sum(1).mean().exp())
    return float(torch.stack(scores).mean())
