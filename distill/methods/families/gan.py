"""The discriminator of DMD2: bottleneck features of a score network and a small head."""

from __future__ import annotations

import torch
from torch import nn

from distill.methods.families.options import Gan
from distill.models.bottleneck import BottleneckFeatures
from distill.models.denoiser import Denoiser
from distill.nets.heads import GanHead, VectorHead


def features_for(options: Gan, fake: Denoiser, teacher: Denoiser) -> BottleneckFeatures:
    """The features that the options name.

    Raises:
        ValueError: `groups` other than the default for features without group norms.
    """
    features = BottleneckFeatures(fake if options.features == "fake" else teacher)
    shape = features.shape()
    if len(shape) == 1 and options.groups != Gan.groups:
        raise ValueError(
            f"gan.groups: found {options.groups}, which changes nothing for features of shape {list(shape)}; expected "
            f"{Gan.groups}"
        )
    return features


def make_head(features: BottleneckFeatures, groups: int, seed: int) -> nn.Module:
    """A head [B, *shape of the features] -> [B, 1], its weights a function of `seed` alone; on the meta device for features of
    a model there.

    Raises:
        ValueError: features of a shape that no head takes.
    """
    shape, model = features.shape(), features.denoiser
    device = "meta" if any(p.is_meta for p in model.parameters()) else "cpu"
    if len(shape) not in (1, 3) or (len(shape) == 3 and shape[1] != shape[2]):
        raise ValueError(
            f"gan: found features of shape {list(shape)}, expected [channels] or [channels, size, size]"
        )
    with torch.random.fork_rng(devices=[]), torch.device(device):
        torch.manual_seed(seed % 2**63)
        try:
            return GanHead(shape[0], shape[1], groups=groups) if len(shape) == 3 else VectorHead(shape[0])
        except ValueError as error:
            raise ValueError(f"gan: {error}") from error
