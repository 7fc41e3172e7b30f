"""The recipe of pixels in the latent space of a toy autoencoder that the test trains; and runs of schema 1, continued."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import safetensors.torch
import torch
from PIL import Image
from tests_support import refusal, run_verb
from torch.nn import functional as F

import distill
from distill.cache.latents import Latents
from distill.cache.pairs import Pairs
from distill.data.digits import Digits
from distill.files import sha256_file
from distill.models.autoencoder import save_autoencoder
from distill.models.conditions import Labels
from distill.models.decoder import Autoencoder
from distill.nets.autoencoder import ConvAutoencoder

OLD = Path(__file__).parents[1] / "unit" / "data" / "schema_1"
SMOKE = ("recipe=instaflow", "profile=smoke", "data=latents", "teacher.net.channels=4", "teacher.net.width=8")


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An autoencoder of the digits, trained until it reconstructs them; its latents are normalised by channel."""
    torch.manual_seed(0)
    net, images = ConvAutoencoder(width=16), Digits().images
    adam = torch.optim.Adam(net.parameters(), 5e-3)
    for _ in range(250):
        batch = images[torch.randint(len(images), (128,))]
        loss = F.mse_loss(net(batch), batch)
        adam.zero_grad()
        loss.backward()
        adam.step()
    with torch.no_grad():
        assert float(F.mse_loss(net(images), images)) < float(images.var()) / 10
        latents = net.encode(images)
    mean, std = latents.mean((0, 2, 3)).tolist(), latents.std((0, 2, 3)).tolist()
    folder = tmp_path_factory.mktemp("autoencoder")
    save_autoencoder(folder, Autoencoder(net, mean=mean, std=std))
    return folder


@pytest.mark.slow
def test_latents_are_those_of_the_images_normalised(toy: Path) -> None:
    latents, digits, rows = Latents(Digits(), toy), Digits(), torch.tensor([5, 1700, 5])
    batch = latents.fetch(rows, torch.arange(3))
    assert (latents.sample_shape, len(latents), latents.conditions) == ((4, 4, 4), len(digits), Labels(10))
    assert batch.cond.get("label").tolist() == digits.labels[rows].tolist()
    torch.testing.assert_close(batch.x0, latents.decoder.encode(digits.images[rows]), atol=1e-5, rtol=1e-5)
    everything = latents.fetch(torch.arange(len(digits)), torch.arange(len(digits))).x0
    assert float(everything.mean().abs()) < 1e-3
    assert float(everything.std()) == pytest.approx(1, abs=0.01)
    assert latents.fingerprint() == Latents(Digits(), toy).fingerprint() != digits.fingerprint()


def test_the_recipe_of_pixels_runs_on_latents(toy: Path, tmp_path: Path) -> None:
    run_verb(tmp_path, "train", *SMOKE, "name=run", f"data.autoencoder={toy}")
    run = tmp_path / "runs" / "run"
    assert Pairs(run / "pairs").sample_shape == (4, 4, 4)
    student = distill.load(run / "export")
    images = student.sample(20, label=3)
    assert images.shape == (20, 1, 8, 8)
    assert -1 <= float(images.min()) < float(images.max()) <= 1
    rows = json.loads((run / "metrics.json").read_text())["rows"]
    assert {(row["model"], row["steps"]) for row in rows} >= {("teacher", 50), ("student", 1)}
    assert all(row["fd"] > 0 and row["pixel_std"] > 0 for row in rows)
    assert json.loads((run / "metrics.json").read_text())["protocol"]["reference"] == "digits, all images"
    assert Image.open(run / "grid.png").size[0] > 100
    # Frozen, so the same in every stage; no checkpoint holds it.
    kept = safetensors.torch.load_file(toy / "decoder.safetensors")
    for folder in ("teacher", "reflow", "distill", "export"):
        stored = safetensors.torch.load_file(run / folder / "model.safetensors")
        assert all(torch.equal(stored[f"decoder/{name}"], tensor) for name, tensor in kept.items())
    card = (run / "export" / "README.md").read_text()
    assert "images of 1x8x8 (channels x height x width) in [-1, 1] for 10 classes" in card
    run_verb(tmp_path, "sample", "model=runs/run/export", "count=20", "out=some.png")


def test_wrong_autoencoders_are_refused_before_anything_runs(toy: Path, tmp_path: Path) -> None:
    wide = tmp_path / "wide"
    save_autoencoder(wide, Autoencoder(ConvAutoencoder(channels=3, width=4)))
    assert "does not encode the data: images: found shape" in refusal(
        tmp_path, "train", *SMOKE, "name=a", f"data.autoencoder={wide}"
    )
    assert "decoder.json: missing" in refusal(tmp_path, "train", *SMOKE, "name=b", "data.autoencoder=nowhere")
    assert "net: does not take samples of shape (4, 4, 4)" in refusal(
        tmp_path, "train", *SMOKE, "name=c", f"data.autoencoder={toy}", "teacher.net.channels=1"
    )


def test_an_export_of_schema_1_makes_the_samples_that_it_made() -> None:
    """Made by `recipe=instaflow profile=smoke` with a tiny net, before schema 2."""
    expected = safetensors.torch.load_file(OLD / "samples.safetensors")
    assert json.loads((OLD / "export" / "model.json").read_text())["schema"] == 1
    generator = distill.load(OLD / "export")
    # Bit-equal where they were made; another processor's convolutions may round otherwise.
    torch.testing.assert_close(generator.sample(12), expected["samples"], atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(generator.sample(3, label=4, seed=1), expected["seed1"], atol=1e-6, rtol=1e-6)


def test_a_run_of_schema_1_is_continued(tmp_path: Path) -> None:
    """Teacher, pairs and reflow were made before schema 2; what follows is what would have followed then."""
    shutil.copytree(OLD / "run", tmp_path / "runs" / "old_toy")
    before = {path: sha256_file(path) for path in (tmp_path / "runs").rglob("*.safetensors")}
    net = ("stages.reflow.net.width=8", "stages.reflow.net.features=4")
    unmeasured = ("stages.evaluate=null", "stages.export.evaluate=null")
    run_verb(tmp_path, "train", "recipe=toy_instaflow", "profile=smoke", "name=old_toy", *net, *unmeasured)
    run = tmp_path / "runs" / "old_toy"
    assert {path: sha256_file(path) for path in before} == before
    assert json.loads((run / "reflow" / "model.json").read_text())["schema"] == 1
    assert json.loads((run / "export" / "model.json").read_text())["schema"] == 2
    made = safetensors.torch.load_file(run / "export" / "model.safetensors")
    for name, tensor in safetensors.torch.load_file(OLD / "student.safetensors").items():
        torch.testing.assert_close(made[name], tensor, atol=1e-6, rtol=1e-6)
