"""Classifier-free guidance (arXiv 2207.12598) in the one convention of this package."""

from __future__ import annotations

import torch
from torch import Tensor

from distill.process.base import expand


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
