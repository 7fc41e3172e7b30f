"""Samples and real data as rows of features: what a loss on distributions compares."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from distill.data.order import Order
from distill.data.source import Source
from distill.models.decoder import Decoder

PRECISIONS = {"float64": torch.float64, "float32": torch.float32}
CLAMPS = ("hard", "straight_through", "none")
SLACK = 1e-3  # by which real data may leave the range of their decoder
CHUNK = 256  # real samples a call of the extractor


class FeatureSpace:
    """phi(clamp(decode(samples))), divided by `scale`, as rows [B, D] of `dtype`.

    Args:
        decoder: of the model. extractor: a frozen network; None: the data themselves, pixels or coordinates.
        clamp: to the decoder's range: "hard" (no gradient where a number is clamped), "straight_through" or "none".
        dtype: of the rows.

    Raises:
        ValueError: names `clamp`.
    """

    def __init__(self, decoder: Decoder, extractor: nn.Module | None, clamp: str, dtype: torch.dtype) -> None:
        if clamp not in CLAMPS:
            raise ValueError(f"clamp: found {clamp!r}, expected one of {list(CLAMPS)}")
        self.decoder, self.extractor, self.clamp, self.dtype = decoder, extractor, clamp, dtype
        self.scale = 1.0

    def of_samples(self, samples: Tensor) -> tuple[Tensor, Tensor]:
        """Rows [B, D] of a model's samples [B,*S], and the share of numbers outside the decoder's range."""
        data = self.decoder.decode(samples)
        clamped = self.decoder.clamp(data)
        outside = (clamped != data).float().mean()
        if self.clamp == "hard":
            data = clamped
        elif self.clamp == "straight_through":
            data = data + (clamped - data).detach()
        return self.of_data(data), outside

    def of_data(self, data: Tensor) -> Tensor:
        """Rows [B, D] of data [B,*D]. The extractor computes in float32, whatever autocast says."""
        with torch.autocast(data.device.type, enabled=False):
            rows = data.float().flatten(1) if self.extractor is None else self.extractor(data.float())
            rows = rows.to(self.dtype)
            return rows if self.scale == 1 else rows / self.scale


def check_extractor(extractor: Any, shape: tuple[int, ...]) -> None:
    """Require a frozen network that turns images of this shape into features with a gradient; a call shows it.

    Raises:
        ValueError: names `features`.
    """
    if not isinstance(extractor, nn.Module):
        raise ValueError(
            f"features: found {type(extractor).__name__}, expected a feature extractor, such as those of the group features"
        )
    if trained := [name for name, p in extractor.named_parameters() if p.requires_grad]:
        raise ValueError(
            f"features: {len(trained)} parameters require a gradient, such as {trained[0]}; expected a frozen network"
        )
    if extractor.training:
        raise ValueError("features: found a network in training mode, expected extractor.eval()")
    device = next((p.device for p in extractor.parameters()), torch.device("cpu"))
    images = torch.zeros(2, *shape, device=device, requires_grad=True)
    try:
        with torch.enable_grad():
            rows = extractor(images)
    except (ValueError, RuntimeError) as error:
        raise ValueError(f"features: {error}") from error
    if rows.ndim != 2 or len(rows) != 2:
        raise ValueError(f"features: found rows of shape {list(rows.shape)} of 2 images, expected [2, D]")
    if not rows.requires_grad:
        raise ValueError("features: give no gradient to the images; expected a differentiable network")


@dataclass(frozen=True)
class RealRows:
    """Features of real samples, [M, D], and their classes, [M] or None."""

    rows: Tensor
    classes: Tensor | None


@torch.no_grad()
def real_rows(
    space: FeatureSpace,
    source: Source,
    count: int | None,
    seed: int,
    device: torch.device,
    *,
    decoded: bool,
) -> RealRows:
    """Features of `count` samples of a source (None: all), chosen by the seed. `decoded`: the source has data; else it has a
    model's samples, which are decoded here.

    Raises:
        ValueError: a source without samples, fewer than two of them, data outside their range, features that are not finite.
    """
    chosen = torch.arange(len(source))
    if count is not None and count < len(source):
        chosen = Order(len(source), seed, "bank").at(0, count).sort().values
    if len(chosen) < 2:
        raise ValueError(f"real: found {len(chosen)} samples, expected at least 2")
    rows, classes = [], []
    for part in chosen.split(CHUNK):
        batch = source.fetch(part, part).to(device)
        if batch.x0 is None:
            raise ValueError(f"real: {type(source).__name__} has no samples (x0)")
        shown = batch.x0 if decoded else space.decoder.decode(batch.x0)
        if decoded or not space.decoder.weights():
            check_range(space.decoder, shown)
        rows.append(space.of_data(space.decoder.clamp(shown)))
        classes.append(batch.cond.get("label"))
    found = torch.cat(rows)
    if not bool(found.isfinite().all()):
        raise ValueError("features: found numbers that are not finite of real samples")
    labels = [label for label in classes if label is not None]
    return RealRows(found, torch.cat(labels) if len(labels) == len(classes) else None)


def check_range(decoder: Decoder, data: Tensor) -> None:
    """Raise ValueError for real data outside the decoder's range; reads the device."""
    if decoder.range is None:
        return
    low, high = float(data.min()), float(data.max())
    if not (decoder.range[0] - SLACK <= low and high <= decoder.range[1] + SLACK):
        raise ValueError(
            f"real: found values {low:.4g} .. {high:.4g}, expected {list(decoder.range)}: images / 127.5 - 1 of 8 bits"
        )
