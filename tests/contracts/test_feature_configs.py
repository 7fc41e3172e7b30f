"""Every feature extractor on disk: it builds and keeps the contract, or says which extra and which file it lacks."""

from __future__ import annotations

import importlib.util
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import InstantiationException
from hydra.utils import instantiate
from omegaconf import OmegaConf

from distill.models.extractors.inception import FILE as INCEPTION
from distill.recipe import compose
from distill.train import main

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = sorted((ROOT / "configs" / "features").glob("*.yaml"))
# name -> (dim, full count, image shape, extra, package behind it, weight file; the last three None where all is shipped)
EXPECTED: dict[str, tuple[int, int, tuple[int, ...], str | None, str | None, str]] = {
    "clip": (768, 10_000, (3, 8, 8), "features", "transformers", "model.safetensors"),
    "digits64": (64, 2000, (1, 8, 8), None, None, "digits64.safetensors"),
    "dists": (1475, 5000, (3, 32, 32), None, None, "vgg16-397923af.pth"),
    "lpips": (1472, 5000, (3, 32, 32), None, None, "vgg16-397923af.pth"),
    "dino": (1024, 10_000, (3, 8, 8), "features", "transformers", "model.safetensors"),
    "efficientnet_lite0": (
        1280,
        5000,
        (1, 8, 8),
        "features",
        "efficientnet_lite_pytorch",
        "efficientnet-lite0-57934424.pth",
    ),
    "inception": (2048, 50_000, (3, 8, 8), "fid", "cleanfid", INCEPTION),
    "random_conv": (512, 2000, (1, 8, 8), None, None, ""),
}


NEED_A_PATH = ("clip", "dino", "dists", "inception", "lpips")  # the weights are the user's


def build(name: str, **options: Any) -> Any:
    """The extractor of a config file as Evaluate makes it; errors are those of the loader."""
    path = ROOT / "configs" / "features" / f"{name}.yaml"
    try:
        return instantiate(OmegaConf.load(path), device="cpu", **options)
    except InstantiationException as error:
        raise error.__cause__ or error from None


def test_counts() -> None:
    """What this file covers; a new extractor raises the number here and gets a line above."""
    assert len(CONFIGS) == 8
    assert [path.stem for path in CONFIGS] == sorted(EXPECTED)


@pytest.mark.parametrize("name", sorted(EXPECTED))
def test_builds_or_names_the_extra_and_the_file(name: str) -> None:
    dim, full_count, shape, extra, package, file = EXPECTED[name]
    if name in NEED_A_PATH or (package is not None and importlib.util.find_spec(package) is None):
        with pytest.raises((ImportError, FileNotFoundError), match=f"^features {name}: ") as told:
            build(name)
        text = str(told.value)
        assert extra is None or f"'distill[{extra}]'" in text
        assert file in text
        assert "\n" not in text
        return
    extractor = build(name)
    assert (extractor.name, extractor.dim, extractor.full_count) == (name, dim, full_count)
    assert re.fullmatch("[0-9a-f]{64}", extractor.sha256)
    assert isinstance(extractor.preprocessing, str)
    assert extractor.batch >= 1
    assert not extractor.training
    assert not any(p.requires_grad for p in extractor.parameters())
    images = torch.rand(3, *shape, generator=torch.Generator().manual_seed(0)) * 2 - 1
    features, logits = extractor.features_and_logits(images)
    assert features.shape == (3, dim)
    assert torch.isfinite(features).all()
    assert (logits is None) == (name != "digits64"), "logits are of the data's classes"
    torch.testing.assert_close(
        extractor(images[:1]), features[:1], atol=1e-4, rtol=1e-4
    )  # alone or in a batch
    with pytest.raises(ValueError, match=rf"^{name} reads images .*got \[5, 2\]"):
        extractor(torch.zeros(5, 2))


@pytest.mark.parametrize("name", sorted(name for name, row in EXPECTED.items() if row[4] is not None))
def test_a_missing_package_is_named_with_its_extra_and_the_weights(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    *_, extra, package, file = EXPECTED[name]
    assert package is not None
    for module in [m for m in sys.modules if m.partition(".")[0] == package]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, package, None)
    options = {}
    if name != "efficientnet_lite0":
        (tmp_path / "config.json").write_text("{}")
        (tmp_path / file).write_bytes(b"")
        options["path"] = str(tmp_path)
    with pytest.raises(ImportError, match=rf"^features {name}: {package} cannot be imported") as told:
        build(name, **options)
    assert f"pip install 'distill[{extra}]'" in str(told.value)
    assert (str(tmp_path) if options else file) in str(told.value)


@pytest.mark.parametrize("name", NEED_A_PATH)
def test_a_folder_without_weights_is_named(name: str, tmp_path: Path) -> None:
    *_, extra, _, file = EXPECTED[name]
    with pytest.raises(FileNotFoundError, match=rf"^features {name}: path: found null.*{re.escape(file)}"):
        build(name)
    with pytest.raises(FileNotFoundError, match=re.escape(str(tmp_path))) as told:
        build(name, path=str(tmp_path))
    assert extra is None or f"'distill[{extra}]'" in str(told.value)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(FileNotFoundError, match=re.escape(file)):
        build(name, path=str(tmp_path))


@pytest.fixture
def train(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    """`distill.train recipe=instaflow plan=true ...` in this process: what it prints or ends with."""

    def call(*arguments: str) -> str:
        monkeypatch.chdir(tmp_path)
        command = ["distill.train", "recipe=instaflow", "profile=smoke", "plan=true", *arguments]
        monkeypatch.setattr(sys, "argv", command)
        monkeypatch.setenv("HYDRA_FULL_ERROR", "0")
        GlobalHydra.instance().clear()
        try:
            compose.run_verb(main)
        except SystemExit as ended:
            return str(ended.code)
        return capsys.readouterr().out

    return call


def test_features_are_a_group_of_the_command_line(train: Any, tmp_path: Path) -> None:
    if importlib.util.find_spec("efficientnet_lite_pytorch") is not None:
        assert "evaluate  new" in train("features=efficientnet_lite0")
    # The monitor and the evaluation read the chosen group; the first of them notices the missing folder.
    folder = tmp_path / "clip"
    found = train("features=clip", f"features.path={folder}")
    assert re.search(
        rf"error: stages\.\w+: (monitor\.features: )?features clip: path: found no {re.escape(str(folder))}/config.json",
        found,
    )
    assert "features: found 'resnet'" in train("features=resnet")
    assert (
        "; expected clip, digits64, dino, dists, efficientnet_lite0, inception, lpips, random_conv"
        in train("features=resnet")
    )
    assert "did you mean features.size?" in train("features=dino", "features.sise=3")
    told = train("eval.meter.features.path=x")
    assert "eval.meter.features is the group 'features'; override features.path=" in told
    assert "eval.features: is now eval.meter.features" in train("eval.features.path=x")
