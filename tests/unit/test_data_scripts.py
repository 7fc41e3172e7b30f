"""Fashion-MNIST and emoji: reading and conversion, on small files of their formats."""

from __future__ import annotations

import gzip
import importlib
import io
import json
import re
import shutil
import subprocess
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from shard_support import png
from tests_support import ROOT, SMALL, call_verb, run_verb

from distill.data.idx import FashionMnist
from distill.data.webdataset import Shards

SCRIPTS = ROOT / "scripts" / "data"


def idx(array: np.ndarray) -> bytes:
    sizes = b"".join(size.to_bytes(4, "big") for size in array.shape)
    return gzip.compress(bytes((0, 0, 8, array.ndim)) + sizes + array.astype(np.uint8).tobytes())


def write_fashion(folder: Path, count: int = 20, side: int = 4) -> np.ndarray:
    folder.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(0).integers(0, 256, (count, side, side), dtype=np.uint8)
    for stem in ("train", "t10k"):
        (folder / f"{stem}-images-idx3-ubyte.gz").write_bytes(idx(pixels))
        (folder / f"{stem}-labels-idx1-ubyte.gz").write_bytes(idx(np.arange(count) % 10))
    return pixels


def test_fashion_mnist(tmp_path: Path) -> None:
    pixels = write_fashion(tmp_path)
    data = FashionMnist(str(tmp_path), size=7)
    assert (len(data), data.sample_shape, data.num_classes, len(data.classes)) == (20, (1, 7, 7), 10, 10)
    batch = data.fetch(torch.tensor([11, 2]), torch.arange(2))
    assert batch.cond.get("label").tolist() == [1, 2]
    wanted = torch.from_numpy(pixels[[11, 2]])[:, None].float() / 127.5 - 1
    torch.testing.assert_close(batch.x0[:, :, 1:5, 1:5], wanted)
    assert (batch.x0[:, :, 0] == -1).all()
    assert (batch.x0[:, :, 5:] == -1).all()
    assert torch.equal(data.images[[11, 2]], batch.x0)
    assert data.fingerprint() != FashionMnist(str(tmp_path), size=8).fingerprint()
    labels, images = (tmp_path / f"train-{kind}-ubyte.gz" for kind in ("labels-idx1", "images-idx3"))
    for path, content, words in (
        (labels, idx(np.arange(19) % 10), "found 20 images, but 19 labels"),
        (labels, idx(np.arange(20)), "found the label 19"),
        (labels, idx(pixels), "is no IDX file of bytes in 1 dimensions"),
        (images, images.read_bytes()[:-30], "is truncated or not compressed"),
        (
            images,
            gzip.compress(gzip.decompress(images.read_bytes())[:-1]),
            "found 319 bytes, expected 20 x 4 x 4",
        ),
        (images, b"plain", "is truncated or not compressed"),
    ):
        before = path.read_bytes()
        path.write_bytes(content)
        with pytest.raises(ValueError, match=re.escape(words)):
            FashionMnist(str(tmp_path))
        path.write_bytes(before)
    for options, words in (({"split": "val"}, "split: found 'val'"), ({"size": 3}, "size: found 3")):
        with pytest.raises(ValueError, match=words):
            FashionMnist(str(tmp_path), **options)
    with pytest.raises(FileNotFoundError, match=r"train-images-idx3-ubyte\.gz: missing; python scripts/data"):
        FashionMnist(str(tmp_path / "none"))


def script(monkeypatch: pytest.MonkeyPatch, name: str):
    monkeypatch.syspath_prepend(str(SCRIPTS))
    return importlib.import_module(name)


FASHION = sorted(path.stem for path in (ROOT / "recipes").glob("fashion_*.yaml"))


@pytest.mark.parametrize("recipe", FASHION)
def test_recipes_of_fashion_mnist_plan(tmp_path: Path, recipe: str) -> None:
    write_fashion(tmp_path / "data", side=28)
    given = (f"recipe={recipe}", f"data.path={tmp_path / 'data'}", "plan=true")
    planned = call_verb(tmp_path, "train", *given, check=True).stdout
    assert "4,600,961  4,600,961" in planned
    missing = call_verb(tmp_path, "train", f"recipe={recipe}", "data.path=none").stderr
    assert "python scripts/data/fashion_mnist.py" in missing


@pytest.mark.slow
@pytest.mark.parametrize("recipe", FASHION)
def test_recipes_of_fashion_mnist_run(tmp_path: Path, recipe: str) -> None:
    write_fashion(tmp_path / "data", count=60, side=28)
    given = (f"recipe={recipe}", f"data.path={tmp_path / 'data'}", "profile=smoke", "teacher.net.groups=8")
    run_verb(tmp_path, "train", *given, *SMALL)
    run = tmp_path / "runs" / f"{recipe}-smoke"
    metrics = json.loads((run / "metrics.json").read_text())
    assert metrics["protocol"]["reference_count"] == 60
    assert (run / "export/model.safetensors").is_file()


@pytest.mark.skipif(
    shutil.which("dpkg-deb") is None, reason="the script needs dpkg-deb, which Debian and Ubuntu have"
)
def test_fashion_mnist_is_unpacked_and_checked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = script(monkeypatch, "fashion_mnist")
    root = tmp_path / "root"
    write_fashion(root / "usr/share/datasets/fashion-mnist")
    (root / "usr/share/doc/dataset-fashion-mnist").mkdir(parents=True)
    (root / "usr/share/doc/dataset-fashion-mnist/copyright").write_text("MIT")
    (root / "DEBIAN").mkdir()
    control = (
        "Package: dataset-fashion-mnist\nVersion: 1\nArchitecture: all\nMaintainer: x <x@y>\nDescription: x\n"
    )
    (root / "DEBIAN/control").write_text(control)
    subprocess.run(["dpkg-deb", "-b", str(root), str(tmp_path / "x.deb")], check=True, capture_output=True)
    made.unpack(tmp_path / "x.deb", tmp_path / "out")
    assert (tmp_path / "out" / "copyright").read_text() == "MIT"
    made.check(tmp_path / "out", {"train": 20, "test": 20})
    with pytest.raises(ValueError, match=r"found 20 images, .* a class, expected 60000"):
        made.check(tmp_path / "out", made.COUNTS)


def package(path: Path, vendor: str, count: int = 40) -> Path:
    """A small package of the layout of npm: emoji with a transparent border, every fourth with a skin tone."""
    entries, files = [], {}
    for i in range(count):
        code = f"1F6{i:02X}"
        pixels = np.zeros((64, 64, 4), dtype=np.uint8)
        pixels[8:56, 8:56] = (i, 0, 0, 255)
        entry = {"name": f"FACE {i}", "short_name": f"f{i}", "unified": code, "image": f"{code}.png"}
        entry |= {"category": "Smileys & Emotion" if i % 2 else "Flags", f"has_img_{vendor}": i != 3}
        if i % 4 == 0:
            entry["skin_variations"] = {
                "1F3FD": {"unified": f"{code}-1F3FD", "image": f"{code}-t.png", f"has_img_{vendor}": True}
            }
            files[f"{code}-t.png"] = png(pixels)
        files[f"{code}.png"] = png(pixels)
        entries.append(entry)
    content = {
        "package.json": json.dumps({"name": f"emoji-datasource-{vendor}"}).encode(),
        "emoji.json": json.dumps(entries).encode(),
        **{f"img/{vendor}/64/{name}": data for name, data in files.items()},
    }
    with tarfile.open(path, "w:gz") as tar:
        for name, data in content.items():
            info = tarfile.TarInfo(f"package/{name}")
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def test_emoji(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    emoji = script(monkeypatch, "emoji")
    monkeypatch.setattr(emoji, "VALIDATION", 300)
    packages = [package(tmp_path / f"{vendor}.tgz", vendor) for vendor in ("twitter", "google")]
    counts = emoji.convert(tmp_path / "out", packages, 32, True)
    assert sum(counts.values()) == 2 * (39 + 10)
    splits = {}
    for split, count in counts.items():
        pattern = str(tmp_path / "out" / f"{split}-00000.tar")
        data = Shards(pattern, caption="txt", label="cls", num_classes=len(emoji.CATEGORIES))
        assert (len(data), data.sample_shape) == (count, (3, 32, 32))
        splits[split] = {re.match(r"face \d+", caption).group() for caption in data.captions()}
        assert set(data.labels.tolist()) == {3, 7}
    assert not splits["train"] & splits["val"]
    assert min(len(names) for names in splits.values()) > 3
    captions = data.captions()
    assert any(caption.endswith(", medium skin tone, google style") for caption in captions)
    row = next(i for i, caption in enumerate(captions) if "skin" not in caption)
    image = ((data.fetch(torch.tensor([row]), torch.arange(1)).x0[0] + 1) * 127.5).round()
    assert (image[:, 0, 0] == 255).all(), "transparent pixels are white"
    number = int(captions[row].split()[1].rstrip(","))
    assert image[:, 16, 16].tolist() == [number, 0, 0]
    assert "CC-BY 4.0" in (notice := (tmp_path / "out" / "NOTICE").read_text())
    assert "Apache-2.0" in notice
    emoji.convert(tmp_path / "again", packages, 32, True)
    same = [(tmp_path / name / "train-00000.tar").read_bytes() for name in ("out", "again")]
    assert same[0] == same[1]
    assert sum(emoji.convert(tmp_path / "plain", packages[:1], 64, False).values()) == 39
    for args, words in (
        ((tmp_path / "out", packages, 32, True), "found train-00000.tar, expected a folder without shards"),
        ((tmp_path / "t", [packages[0]] * 2, 32, True), "found a vendor twice"),
        (
            (tmp_path / "a", [package(tmp_path / "a.tgz", "apple")], 32, True),
            "expected emoji-datasource-twitter or",
        ),
    ):
        with pytest.raises(ValueError, match=re.escape(words)):
            emoji.convert(*args)
