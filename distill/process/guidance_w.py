"""The guidance weight w of the papers that embed it, and its one conversion to this package's guidance scale.

arXiv 2210.03142 and 2310.04378 write y_c + w (y_c - y_u), so w = 0 is unguided. Everywhere else here the scale is g in u + g
(c - u) with g = 1 + w. An argument called ``guidance_w`` is the former, ``guidance_scale`` the latter. Stable Diffusion's usual
g = 7.5 is w = 6.5.
"""

from __future__ import annotations

import math
import warnings

import torch
from torch import Tensor

from distill.process.base import at_least_float32

# Past this a "w" is more likely a scale in percent or a typing error than a weight somebody trains with.
_LARGE_W = 20.0


def scale_of_w(guidance_w: float | Tensor) -> float | Tensor:
    """guidance_scale g = 1 + w; a float or [B]."""
    return 1 + guidance_w


def w_of_scale(guidance_scale: float | Tensor) -> float | Tensor:
    """guidance_w w = g - 1; a float or [B]."""
    return guidance_scale - 1


def draw_w(uniform: Tensor, w_min: float, w_max: float) -> Tensor:
    """Weights of the samples, uniform in [w_min, w_max], from ``uniform`` ~ U[0, 1] of any shape; w_min = w_max fixes w.

    LCM trains on [5, 15] (SD 1.5) or [3, 15] (SDXL), guided distillation on [0, 4].

    Raises:
        ValueError: w_min exceeds w_max, or is below -1 (a negative scale).
    """
    check_w_range(w_min, w_max)
    return w_min + (w_max - w_min) * uniform


def check_w_range(w_min: float, w_max: float) -> None:
    """Refuse an invalid range of w; warn above 20, which may be a guidance scale in percent. Host numbers only.

    Raises:
        ValueError: w_min exceeds w_max, or is below -1.
    """
    if not -1 <= w_min <= w_max:
        raise ValueError(f"guidance_w: found the range [{w_min}, {w_max}], expected -1 <= w_min <= w_max")
    if w_max > _LARGE_W:
        warnings.warn(
            f"guidance_w: {w_max} is a guidance_scale of {scale_of_w(w_max)}; w = guidance_scale - 1, usually 0 .. 15",
            stacklevel=3,
        )


def w_embedding(guidance_w: Tensor, dim: int = 256) -> Tensor:
    """Features [B, dim] of w [B] for the time embedding of a w-conditioned network: [sin(1000 w f_i), cos(1000 w f_i)].

    f_i = 10000^(-i / (half - 1)), i = 0 .. half - 1, half = dim // 2; an odd ``dim`` ends in a column of zeros. These are the
    features of latent consistency models (``time_cond_proj_dim`` 256). The angles reach 15000 rad, so they are taken in
    float64; the result has the dtype of w (float32 at least).

    Raises:
        ValueError: ``dim`` is below 4 (two frequencies are needed), or w is not [B].
    """
    if dim < 4:
        raise ValueError(f"dim: found {dim}, expected at least 4")
    if guidance_w.dim() != 1:
        raise ValueError(f"guidance_w: found the shape {tuple(guidance_w.shape)}, expected [B]")
    half = dim // 2
    places = torch.arange(half, dtype=torch.float64, device=guidance_w.device)
    angles = 1000 * guidance_w.double()[:, None] * torch.exp(-math.log(10000.0) / (half - 1) * places)
    features = torch.cat([angles.sin(), angles.cos()], 1)
    return torch.nn.functional.pad(features, (0, dim % 2)).to(at_least_float32(guidance_w).dtype)
