"""Pairs of another model, latents of another autoencoder, and monitors that judge in the features of the loss."""

from __future__ import annotations

import warnings
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from method_support import pairs_header

from distill.cache.pairs import Pairs
from distill.cache.writer import write_pairs
from distill.methods.hipa import HiPA
from distill.methods.mmd import MMD
from distill.models.decoder import Autoencoder, Pixels
from distill.models.denoiser import Denoiser
from distill.models.description import Description
from distill.models.extractors.random_conv import load_random_conv
from distill.models.features import load_digits64
from distill.models.native import load_model, save_model
from distill.models.spec import SamplerSpec
from distill.nets.autoencoder import ConvAutoencoder
from distill.nets.unet import UNet
from distill.process.flow import Flow
from distill.stages.adapt import adapted
from distill.stages.monitor import warn_of_judge
from distill.stages.same_model import check_decoder, check_fingerprint

SPEC = SamplerSpec(steps=3, any_steps=True)


def unet(channels: int = 1) -> Denoiser:
    torch.manual_seed(0)
    net = UNet(channels=channels, width=8, embedding=16, groups=4, multipliers=[1])
    return Denoiser(net, Flow(), "velocity", (channels, 8, 8), decoder=Pixels())


def test_pairs_of_other_weights_are_refused(tmp_path: Path) -> None:
    """Those of the model itself, and of the base of its adapters, are not."""
    save_model(tmp_path / "teacher", unet(), SPEC)
    own = Description.read(tmp_path / "teacher").weights.sha256
    base = load_model(tmp_path / "teacher").denoiser
    save_model(tmp_path / "student", adapted(base, {"lora": {"rank": 2}}), SPEC)
    for name, teacher in (("own", own), ("other", "0" * 64)):
        write_pairs(tmp_path / name, base, replace(pairs_header(), teacher=teacher))
    for start in ("teacher", "student"):
        folders = {"init": tmp_path / start}
        check_fingerprint(HiPA.PAIRS_OF, Pairs(tmp_path / "own"), folders)
        check_fingerprint(None, Pairs(tmp_path / "other"), folders)
        with pytest.raises(
            ValueError, match=f"data: .* of a model with the weights 0000.*, but init has {own[:12]}"
        ):
            check_fingerprint(HiPA.PAIRS_OF, Pairs(tmp_path / "other"), folders)


def test_latents_of_another_autoencoder_are_refused() -> None:
    def autoencoder(seed: int, scale: float = 1.0) -> Autoencoder:
        torch.manual_seed(seed)
        return Autoencoder(ConvAutoencoder(latent=2, width=4, levels=1), scale=scale)

    student = unet(2).with_(decoder=autoencoder(0))
    check_decoder(student, SimpleNamespace(decoder=autoencoder(0)), trained=True)
    check_decoder(student, SimpleNamespace(decoder=Pixels()), trained=True)
    check_decoder(student, SimpleNamespace(decoder=autoencoder(1)), trained=False)
    with pytest.raises(
        ValueError, match=r"data: has latents of another autoencoder than the student's: \S+: found other"
    ):
        check_decoder(student, SimpleNamespace(decoder=autoencoder(1)), trained=True)
    with pytest.raises(
        ValueError, match=r"than the student's: found .*'scale': 0.5.*, expected .*'scale': 1.0"
    ):
        check_decoder(student, SimpleNamespace(decoder=autoencoder(0, scale=0.5)), trained=False)


def test_a_judge_that_is_in_the_loss_is_warned_of() -> None:
    student = unet()
    student.sampler = SPEC
    trained_in = MMD(student, steps=1, features=load_digits64()).feature_space
    with pytest.warns(
        UserWarning, match="monitor.features: found digits64, in whose features the loss compares"
    ):
        warn_of_judge(trained_in, load_digits64())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warn_of_judge(trained_in, load_random_conv())
        warn_of_judge(MMD(student, steps=1).feature_space, load_digits64())
        warn_of_judge(HiPA(student, features=load_digits64()).feature_space, load_digits64())
