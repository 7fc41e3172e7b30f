"""Latents in files, and captions of folders: what is read, and what is refused."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
import teacher_support
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from shard_support import picture

from distill.cache.latent_files import MANIFEST, LatentFiles, LatentHeader, write_latents
from distill.data.folder import ImageFolder
from distill.data.rng import sample_noise
from distill.data.tensors import Tensors
from distill.models.conditions import Labels, Nothing
from distill.models.decoder import Autoencoder, Pixels
from distill.models.families.vae import DiffusersVAE
from distill.nets.autoencoder import ConvAutoencoder
from distill.world import World

CPU = torch.device("cpu")


def images(count: int = 7) -> Tensors:
    x0 = torch.rand(count, 3, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1
    return Tensors(x0, labels=torch.arange(count) % 4)


def decoder() -> Autoencoder:
    torch.manual_seed(0)
    return Autoencoder(ConvAutoencoder(channels=3, latent=2, width=4), scale=0.5, shift=0.1)


def write(folder: Path, data: Tensors, conditions=None, coder=None, **more) -> LatentHeader:
    conditions, coder = conditions or Labels(4), coder or decoder()
    shape = tuple(coder.encode(data.images[:1]).shape[1:])
    options = {"dtype": "bfloat16", "posterior": "mean", "seed": 0, "stream": "l", "shard_bytes": 250} | more
    header = LatentHeader.of(data, conditions, coder, shape, **options)
    write_latents(folder, data, conditions, coder, header, batch_size=2, device=CPU, world=World())
    return header


def test_latents_with_their_classes(tmp_path: Path) -> None:
    data, coder = images(), decoder()
    header = write(tmp_path, data)
    assert (header.rows, header.noise) == (3, "")
    found = LatentFiles(tmp_path)
    assert (len(found), found.sample_shape, found.num_classes) == (7, (2, 4, 4), 4)
    rows = torch.tensor([6, 0, 3])
    batch = found.fetch(rows, torch.arange(3))
    assert torch.equal(batch.x0, batch.x0.bfloat16().float())
    torch.testing.assert_close(batch.x0, coder.encode(data.images[rows]), rtol=2**-8, atol=1e-3)
    assert batch.cond.get("label").tolist() == [2, 0, 3]
    assert batch.ids.tolist() == rows.tolist()
    torch.testing.assert_close(found.decoder.decode(batch.x0), coder.decode(batch.x0))
    write(tmp_path / "plain", data, Nothing(), dtype="float32")
    plain = LatentFiles(tmp_path / "plain")
    assert not plain.fetch(rows, rows).cond.values
    torch.testing.assert_close(plain.fetch(rows, rows).x0, coder.encode(data.images[rows]))
    assert plain.fingerprint() != found.fingerprint()


def test_samples_of_the_posterior(tmp_path: Path) -> None:
    torch.manual_seed(1)
    vae = teacher_support.vae()
    net = DiffusersVAE(dict(vae.config) | {"_class_name": "AutoencoderKL"})
    net.net.load_state_dict(vae.state_dict())
    coder, data = Autoencoder(net, scale=0.2), images()
    write(tmp_path, data, Nothing(), coder, posterior="sample", dtype="float32", seed=5)
    rows = torch.arange(7)
    posterior = vae.encode(data.images).latent_dist
    noise = sample_noise(5, "l", rows, posterior.mean.shape[1:])
    wanted = (posterior.mean + posterior.std * noise) * 0.2
    # The tables of the file alone: the net's class is rebuilt from files only with its family's config.
    tables = [load_file(path) for path in sorted(tmp_path.glob("latents-*.safetensors"))]
    torch.testing.assert_close(torch.cat([table["x0"] for table in tables]), wanted)
    for coder in (decoder(), Pixels()):
        with pytest.raises(ValueError, match="posterior: found 'sample'"):
            write(tmp_path / "none", data, Nothing(), coder, posterior="sample")


def test_broken_latents(tmp_path: Path) -> None:
    write(tmp_path / "good", images())
    shard, manifest = "latents-00001.safetensors", MANIFEST

    def broken(name: str) -> Path:
        place = tmp_path / name
        shutil.copytree(tmp_path / "good", place)
        return place

    def told(place: Path, words: str, kind: type[Exception] = ValueError) -> None:
        with pytest.raises(kind, match=re.escape(words)):
            LatentFiles(place)

    place = broken("missing")
    (place / shard).unlink()
    told(place, f"{shard}: missing", FileNotFoundError)
    place = broken("changed")
    table = load_file(place / shard)
    save_file(table | {"x0": table["x0"] + 1}, place / shard)
    told(place, f"{shard}: sha256: found")
    place = broken("unfinished")
    (place / manifest).unlink()
    told(place, "holds no finished latents", FileNotFoundError)
    for name, change, words in (
        (
            "count",
            lambda value: value["header"].update(count=8),
            "header.count: found 8, but the shards hold 7",
        ),
        ("order", lambda value: value["shards"].reverse(), "shards: found other files or counts"),
        ("schema", lambda value: value["header"].update(schema=2), "schema: found 2, this version reads 1"),
        ("more", lambda value: value.update(more=1), "more"),
        ("posterior", lambda value: value["header"].update(posterior="max"), "posterior"),
    ):
        place = broken(name)
        value = json.loads((place / manifest).read_text())
        change(value)
        (place / manifest).write_text(json.dumps(value))
        told(place, words)
    for options, words in (
        ({"dtype": "int8"}, "dtype: found 'int8'"),
        ({"posterior": "max"}, "posterior: found"),
    ):
        with pytest.raises(ValueError, match=words):
            write(tmp_path / "options", images(), **options)
    with pytest.raises(ValueError, match=r"data\.label: found no classes"):
        write(tmp_path / "unlabelled", Tensors(images().images))
    far = decoder()
    with torch.no_grad():
        far.net.encoder[0].weight.fill_(float("inf"))
    with pytest.raises(FloatingPointError, match="latents that are not finite"):
        write(tmp_path / "infinite", images(), coder=far)


def test_captions_of_a_folder(tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    for name, number in (("a.png", 1), ("b/c.png", 2), ("b/d.png", 3)):
        Image.fromarray(picture(number)).save(tmp_path / name)

    def lines(*entries: object) -> None:
        (tmp_path / "metadata.jsonl").write_text("\n".join(json.dumps(entry) for entry in entries) + "\n\n")

    good = [{"file_name": f"{name}.png", "text": f"  the {name}\n"} for name in ("b/d", "a", "./b/c")]
    lines(*good)
    data = ImageFolder(tmp_path, caption="text")
    assert data.captions() == ["the a", "the ./b/c", "the b/d"]
    assert (data.num_classes, data.labels, data.remarks) == (0, None, "")
    before = data.fingerprint()
    with pytest.warns(UserWarning, match="left out"):
        plain = ImageFolder(tmp_path)
    assert plain.fingerprint() != before
    with pytest.raises(ValueError, match="caption: found null"):
        plain.captions()
    lines(*good[:2], {"file_name": "b/c.png", "text": "other"})
    assert ImageFolder(tmp_path, caption="text").fingerprint() != before
    for entries, words in (
        (good[:2], "b/c.png: has no line (1 images have none)"),
        ([*good, {"file_name": "e.png", "text": "x"}], "e.png: is no image of the folder"),
        ([*good, good[0]], "line 4: file_name: found b/d.png twice"),
        ([{"file_name": "a.png"}], "line 1: text: found None, expected a caption"),
        ([{"file_name": "a.png", "text": " "}], "line 1: text: found ' ', expected a caption"),
        ([{"text": "a"}], "line 1: file_name: found {'text': 'a'}"),
        ([3], "line 1: file_name: found 3"),
    ):
        lines(*entries)
        with pytest.raises(ValueError, match=re.escape(words)):
            ImageFolder(tmp_path, caption="text")
    (tmp_path / "metadata.jsonl").write_text("{")
    with pytest.raises(ValueError, match="line 1: is not JSON"):
        ImageFolder(tmp_path, caption="text")
    (tmp_path / "metadata.jsonl").unlink()
    with pytest.raises(FileNotFoundError, match=r"metadata\.jsonl: missing; expected lines such as"):
        ImageFolder(tmp_path, caption="text")
