"""High frequencies and edges of images, and distances in them (HiPA, arXiv 2311.18158): pure functions of images [B,C,H,W]."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from distill.process.base import at_least_float32

LUMINANCE = (0.299, 0.587, 0.114)
# The gradient of sqrt is infinite at 0, which is every flat region.
EDGE_FLOOR = 1e-12


def check_rho(rho: float) -> None:
    """Raise ValueError naming `rho` unless it is a share of the Nyquist frequency, in (0, 1]."""
    if not 0 < rho <= 1:
        raise ValueError(f"rho: found {rho}, expected a share of the Nyquist frequency in (0, 1]")


def high_pass(images: Tensor, rho: float = 0.25) -> Tensor:
    """H(x) = IFFT2(M FFT2(x)) per channel, M = 1 where sqrt(fx^2 + fy^2) >= rho / 2, in cycles a pixel; else 0.

    A linear projection: H(H(x)) = H(x), H(constant) = 0, |x|^2 = |H(x)|^2 + |x - H(x)|^2. Float32 at least, since transforms in
    half precision exist for powers of two alone.

    Raises:
        ValueError: rho outside (0, 1].
    """
    check_rho(rho)
    images = at_least_float32(images)
    height, width = images.shape[-2:]
    spectrum = torch.fft.rfft2(images)
    columns = torch.fft.rfftfreq(width, dtype=torch.float64, device=images.device)
    mask = _mask(height, columns, rho)
    made: Tensor = torch.fft.irfft2(spectrum * mask, s=(height, width))
    return made


def edges(images: Tensor, *, luminance: bool = False) -> Tensor:
    """E(x) = sqrt(Gx^2 + Gy^2 + 1e-12) [B,C,H,W] with Sobel kernels [-1 0 1; -2 0 2; -1 0 1] / 4 and its transpose, on images
    whose borders are repeated; of their luminance [B,1,H,W] where `luminance` and there are three channels.

    A step of height 1 has E = 1 in the two columns beside it."""
    images = at_least_float32(images)
    if luminance and images.shape[1] == 3:
        weights = torch.tensor(LUMINANCE, dtype=images.dtype, device=images.device)
        images = (images * weights.view(1, 3, 1, 1)).sum(1, keepdim=True)
    x = F.pad(images, (1, 1, 1, 1), mode="replicate")
    smooth_rows = (x[..., :-2, :] + 2 * x[..., 1:-1, :] + x[..., 2:, :]) / 4
    smooth_columns = (x[..., :, :-2] + 2 * x[..., :, 1:-1] + x[..., :, 2:]) / 4
    across = smooth_rows[..., 2:] - smooth_rows[..., :-2]
    down = smooth_columns[..., 2:, :] - smooth_columns[..., :-2, :]
    return torch.sqrt(across.square() + down.square() + EDGE_FLOOR)


def fourier_distance(pred: Tensor, target: Tensor, rho: float = 0.25) -> Tensor:
    """mean |H(pred) - H(target)| of a sample, [B]."""
    return high_pass(pred - target.detach(), rho).abs().flatten(1).mean(1)  # H is linear


def edge_distance(pred: Tensor, target: Tensor, *, luminance: bool = False) -> Tensor:
    """mean |E(pred) - E(target)| of a sample, [B]."""
    difference = edges(pred, luminance=luminance) - edges(target.detach(), luminance=luminance)
    return difference.abs().flatten(1).mean(1)


def feature_distance(pred: Tensor, target: Tensor) -> Tensor:
    """||f / ||f|| - g / ||g||||^2 of features f, g [B,D], [B]: 0 for the same direction, at most 4."""
    return (F.normalize(pred, dim=1) - F.normalize(target.detach(), dim=1)).square().sum(1)


def high_frequency_ratio(images: Tensor, rho: float = 0.25) -> Tensor:
    """R(x), the share of the variance within images that lies in high frequencies, sum |H(x)|^2 / sum |x - mean(x)|^2 over the
    whole batch; the mean is that of a channel of an image. White noise at rho = 0.5: 55/63 at 8x8, .806 at 64x64.

    More than the teacher's is noise or ringing, not detail: compare |R_student - R_teacher|."""
    images = at_least_float32(images)
    centred = images - images.mean((-2, -1), keepdim=True)
    whole = centred.square().sum().clamp(min=EDGE_FLOOR)
    return high_pass(centred, rho).square().sum() / whole


def _mask(height: int, columns: Tensor, rho: float) -> Tensor:
    """[H, W // 2 + 1] of 0 and 1: the half of the spectrum that a real transform keeps."""
    rows = torch.fft.fftfreq(height, dtype=torch.float64, device=columns.device)
    return (torch.hypot(rows[:, None], columns[None, :]) >= 0.5 * rho).float()
