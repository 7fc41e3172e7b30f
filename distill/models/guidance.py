"""Classifier-free guidance (arXiv 2207.12598) in the one convention of this package."""

from __future__ import annotations

import torch
from torch import Tensor

from distill.process.base import expand
from distill.process.guidance_w import check_w_range


def guide(uncond: Tensor, cond: Tensor, scale: float | Tensor) -> Tensor:
    """uncond + scale (cond - uncond), [B, *S] in at least float32; ``scale`` is a float or [B].

    scale = 1 is the conditional prediction (callers then skip the unconditional forward), 0 the unconditional
    one. It is InstaFlow's ``a`` and diffusers' ``guidance_scale``; guided distillation's w is scale - 1.
    Commutes with ``Process.convert``.

    Raises:
        ValueError: the two predictions differ in shape, or ``scale`` is a tensor of another length.
    """
    if uncond.shape != cond.shape:
        raise ValueError(f"shapes differ: uncond {tuple(uncond.shape)}, cond {tuple(cond.shape)}")
    dtype = torch.promote_types(torch.promote_types(uncond.dtype, cond.dtype), torch.float32)
    uncond, cond = uncond.to(dtype), cond.to(dtype)
    factor = expand(scale.to(dtype), cond) if isinstance(scale, Tensor) else scale
    return uncond + factor * (cond - uncond)


def check_guidance_scale(guidable: bool, scale: float) -> None:
    """Require a null condition of a guided teacher.

    Raises:
        ValueError: names `guidance_scale`.
    """
    if scale != 1 and not guidable:
        raise ValueError(
            f"guidance_scale: found {scale}, but the teacher was trained without a null condition; expected 1"
        )


def check_guidance_range(
    embeds: bool, w_min: float | None, w_max: float | None, who: str = "student"
) -> None:
    """Reject an invalid range of the guidance w, and a range where the net takes no w (or none where it does); warn about w
    above 20, which is probably a guidance scale.

    Raises:
        ValueError: names `w_min`, `w_max`.
    """
    if (w_min is None) != (w_max is None):
        raise ValueError(f"w_min, w_max: found {w_min} and {w_max}, expected both or neither")
    if w_min is not None and w_max is not None:
        if not -1 <= w_min <= w_max:
            raise ValueError(f"w_min, w_max: found {w_min} and {w_max}, expected -1 <= w_min <= w_max")
        check_w_range(w_min, w_max)  # warns of a guidance scale given for w
    if embeds and w_min is None:
        raise ValueError(f"w_min, w_max: missing; the {who}'s net takes the guidance w as an input")
    if not embeds and w_min is not None:
        raise ValueError(
            f"w_min, w_max: found {w_min} and {w_max}, but the {who}'s net does not take the guidance as an input; "
            "expected a net with `guidance_embedding`, or null"
        )
