"""LPIPS and DISTS from weight files: equal to torchmetrics', which runs here on a stand-in for torchvision's classifiers."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torchmetrics.functional.image.dists as their_dists
import torchmetrics.functional.image.lpips as their_lpips
from method_support import optim
from safetensors.torch import save_file
from torch import Tensor, nn

from distill.data.batch import Batch
from distill.data.cond import Cond
from distill.data.rng import Draws
from distill.engine.update import Step
from distill.methods.hipa import HiPA
from distill.models.decoder import Pixels
from distill.models.denoiser import Denoiser
from distill.models.extractors.perceptual import LAYOUTS, Perceptual, load_dists, load_lpips
from distill.models.features import PerceptualDistance
from distill.nets.unet import UNet
from distill.process.flow import Flow

WIDTHS = {
    "vgg": (64, 64, 128, 128, 256, 256, 256, 512, 512, 512, 512, 512, 512),
    "alex": (64, 192, 384, 256, 256),
}
SIZES = {"vgg": (3,) * 13, "alex": (11, 5, 3, 3, 3)}


def convolutions(net: str, widths: tuple[int, ...]) -> dict[str, Tensor]:
    """Random weights with the names of torchvision's file."""
    noise, before, found = torch.Generator().manual_seed(0), 3, {}
    numbers = [number for stage in LAYOUTS[net].stages for number in stage]
    for number, width, size in zip(numbers, widths, SIZES[net], strict=True):
        scale = (2 / (before * size * size)) ** 0.5
        found[f"features.{number}.weight"] = scale * torch.randn(width, before, size, size, generator=noise)
        found[f"features.{number}.bias"] = 0.1 * torch.randn(width, generator=noise)
        before = width
    return found | {"classifier.6.bias": torch.zeros(3)}


def classifier(net: str, weights: dict[str, Tensor]) -> nn.Sequential:
    """The part `features` of torchvision's network."""
    layers: list[nn.Module] = []
    for place, (stage, kernel) in enumerate(
        zip(LAYOUTS[net].stages, (0, *(LAYOUTS[net].kernel,) * 4), strict=True)
    ):
        if place in LAYOUTS[net].pooled:
            layers.append(nn.MaxPool2d(kernel, 2))
        for number in stage:
            assert len(layers) == number
            weight = weights[f"features.{number}.weight"]
            stride, padding = (4, 2) if net == "alex" and number == 0 else (1, weight.shape[-1] // 2)
            layers += [
                nn.Conv2d(weight.shape[1], weight.shape[0], weight.shape[-1], stride, padding),
                nn.ReLU(),
            ]
    made = nn.Sequential(*layers)
    made.load_state_dict({name[9:]: value for name, value in weights.items() if name.startswith("features.")})
    return made


def images(seed: int, count: int = 2) -> Tensor:
    return torch.rand(count, 3, 40, 33, generator=torch.Generator().manual_seed(seed)) * 2 - 1


@pytest.mark.parametrize("net", ["alex", "vgg"])
def test_distances_are_those_of_torchmetrics(
    net: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = convolutions(net, WIDTHS[net])
    torch.save(weights, tmp_path / LAYOUTS[net].file)
    features = classifier(net, weights)
    monkeypatch.setattr(their_lpips, "_get_tv_model_features", lambda *_: features)
    x, y = images(1).requires_grad_(), images(2)
    ours, theirs = load_lpips(path=str(tmp_path), net=net), their_lpips._LPIPS(net=net)
    assert ours.name == ("lpips_other" if net == "vgg" else "lpips_alex_other"), "not the public weights"
    check(ours, x, y, theirs(x, y).flatten())
    if net == "vgg":
        monkeypatch.setattr(their_dists, "_TORCHVISION_AVAILABLE", True)
        monkeypatch.setattr(their_dists, "VGG16_Weights", SimpleNamespace(DEFAULT=None), raising=False)
        made = SimpleNamespace(features=features)
        monkeypatch.setattr(their_dists, "vgg16", lambda weights: made, raising=False)
        wanted = their_dists.DISTSNetwork()((x + 1) / 2, (y + 1) / 2, require_grad=True)
        check(load_dists(path=str(tmp_path)), x, y, wanted)


def check(ours: Perceptual, x: Tensor, y: Tensor, wanted: Tensor) -> None:
    """The same distance and gradient; a distance of equal images is 0, and its gradient finite."""
    found = ours.distance(x, y)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
    (mine,), (other,) = (torch.autograd.grad(each.sum(), x, retain_graph=True) for each in (found, wanted))
    torch.testing.assert_close(mine, other, rtol=1e-3, atol=1e-3 * float(other.abs().max()))
    flat = torch.full((1, 1, 32, 32), -1.0, requires_grad=True)
    same = ours.distance(flat, flat.detach())
    same.sum().backward()
    assert abs(float(same.detach())) < 1e-6
    assert flat.grad is not None
    assert bool(flat.grad.isfinite().all())
    assert not any(p.requires_grad for p in ours.parameters())


@pytest.fixture
def tiny(tmp_path: Path) -> dict[str, str]:
    """Arguments of `load_dists` and `load_lpips`: VGG16 with two channels a layer, in safetensors, and weights of layers."""
    save_file(convolutions("vgg", (2,) * 13), tmp_path / "vgg.safetensors")
    linear = {f"lin{place}.model.1.weight": torch.rand(1, 2, 1, 1) for place in range(5)}
    torch.save(
        linear | {"alpha": torch.rand(1, 13, 1, 1), "beta": torch.rand(1, 13, 1, 1)}, tmp_path / "own.pt"
    )
    return {"path": str(tmp_path / "vgg.safetensors"), "weights": str(tmp_path / "own.pt")}


@pytest.mark.parametrize("load", [load_lpips, load_dists])
def test_hipa_trains_in_the_distance_of_the_extractor(load: Any, tiny: dict[str, str]) -> None:
    features = load(**tiny)
    assert isinstance(features, PerceptualDistance)
    assert features(images(0)).shape == (2, features.dim)
    assert "8-bit RGB, at its own size, mean" in features.preprocessing
    torch.manual_seed(0)
    net = UNet(channels=3, width=8, embedding=16, groups=4, multipliers=[1], num_classes=0)
    method = HiPA(Denoiser(net, Flow(), "velocity", (3, 32, 32), decoder=Pixels()), features=features)
    method.prepare({"student": optim()}, seed=0)
    rows = torch.arange(2)
    x0, z = torch.rand(2, 3, 32, 32) - 0.5, torch.randn(2, 3, 32, 32)
    loss = method.loss(Batch(rows, rows, Cond.nothing(2), x0=x0, z=z), Step(0, Draws(0, "s", 0, rows)))
    made = method.samples(method.student, z, Cond.nothing(2))
    torch.testing.assert_close(loss.logs["perceptual"], features.distance(made, x0).mean())
    small = Denoiser(net, Flow(), "velocity", (3, 16, 16), decoder=Pixels())
    with pytest.raises(
        ValueError, match=r"features: \w+ reads images .* of at least 32x32, got \[2, 3, 16, 16\]"
    ):
        HiPA(small, features=features)


def test_other_files_are_refused(tiny: dict[str, str], tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"features lpips: path: found null, .* vgg16-397923af.pth"):
        load_lpips()
    with pytest.raises(
        FileNotFoundError, match=r"features dists: path: found .*none.pth, .* vgg16-397923af.pth"
    ):
        load_dists(path=str(tmp_path / "none.pth"))
    with pytest.raises(FileNotFoundError, match=r"features lpips: weights: none.pth: no such file"):
        load_lpips(path=tiny["path"], weights="none.pth")
    with pytest.raises(ValueError, match="features lpips: net: found 'squeeze', expected one of"):
        load_lpips(path=tiny["path"], net="squeeze")  # type: ignore[arg-type]
    with pytest.raises(
        ValueError, match=r"features lpips: .*: features.3.weight: found nothing, expected 4 dim"
    ):
        load_lpips(path=tiny["path"], net="alex", weights=tiny["weights"])
    with pytest.raises(
        ValueError, match=r"features lpips: weights: found \[64, .* channels, expected \[2, 2,"
    ):
        load_lpips(path=tiny["path"])
    with pytest.raises(
        ValueError, match=r"features dists: weights: found alpha and beta of 1475 .* expected 13"
    ):
        load_dists(path=tiny["path"])
    for name, content in (("broken.pth", b"no tensors"), ("broken.safetensors", b"none")):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=rf"features dists: .*{name}: cannot be read"):
            load_dists(path=str(tmp_path / name))
    torch.save([1], tmp_path / "list.pth")
    with pytest.raises(
        ValueError, match=r"features dists: .*list.pth: found a list, expected tensors by name"
    ):
        load_dists(path=str(tmp_path / "list.pth"))
