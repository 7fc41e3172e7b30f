"""The shipped classifier: what its features are, and that no other file passes for it."""

from __future__ import annotations

import json
from importlib import resources
from pathlib import Path

import pytest
import torch

from distill.data.digits import Digits
from distill.models.features import AssetError, Digits64, load_digits64


def copy_asset(folder: Path) -> Path:
    for name in ("digits64.safetensors", "digits64.json"):
        (folder / name).write_bytes((resources.files("distill.assets") / name).read_bytes())
    return folder


def test_features_have_norm_8_and_gradients_reach_the_images_only() -> None:
    net = load_digits64()
    images = Digits().images[:5].clone().requires_grad_()
    features = net(images)
    torch.testing.assert_close(features.norm(dim=1), torch.full((5,), 8.0))
    features[:, 0].sum().backward()
    assert images.grad is not None
    assert images.grad.abs().sum() > 0
    assert not net.training
    assert not any(p.requires_grad for p in net.parameters())


def test_one_pass_gives_what_two_give() -> None:
    net, images = load_digits64(), Digits().images[:7]
    features, logits = net.features_and_logits(images)
    assert features.shape == (7, net.dim)
    assert logits is not None
    assert torch.equal(features, net(images))
    assert torch.equal(logits, net.classify(images))


def test_card_agrees_with_the_weights() -> None:
    card = json.loads((resources.files("distill.assets") / "digits64.json").read_text())
    net, data = load_digits64(), Digits()
    assert net.sha256 == card["sha256"]
    assert sum(p.numel() for p in net.parameters()) == card["parameters"]
    assert card["test_accuracy"] >= 0.985
    assert (net.classify(data.images).argmax(1) == data.labels).double().mean() > 0.99
    assert len((resources.files("distill.assets") / "digits64.safetensors").read_bytes()) < 400_000


def test_other_weights_are_refused(tmp_path: Path) -> None:
    weights = copy_asset(tmp_path) / "digits64.safetensors"
    load_digits64(folder=tmp_path)
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    expected = json.loads((tmp_path / "digits64.json").read_text())["sha256"]
    with pytest.raises(AssetError, match=f"digits64.safetensors has sha256 .* expects {expected}"):
        load_digits64(folder=tmp_path)
    weights.unlink()
    with pytest.raises(AssetError, match=r"digits64.safetensors is missing"):
        load_digits64(folder=tmp_path)


def test_other_sizes_are_refused() -> None:
    with pytest.raises(ValueError, match=r"reads images \[B, 1, 8, 8\]"):
        Digits64()(torch.zeros(2, 3, 8, 8))
