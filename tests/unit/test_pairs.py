"""The pair cache: written in shards, continued where it stopped, refused when it is not what it says."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import safetensors.torch
import torch
from method_support import pairs_header

from distill.cache.pairs import HEADER, MANIFEST, Pairs
from distill.cache.writer import shard_rows, write_pairs
from distill.data.rng import sample_noise
from distill.files import sha256_file, write_json, write_safetensors
from distill.models.conditions import Labels
from distill.models.denoiser import Denoiser
from distill.nets.unet import UNet
from distill.process.flow import Flow

SHAPE = (1, 8, 8)


def teacher() -> Denoiser:
    torch.manual_seed(0)
    net = UNet(width=8, embedding=16, groups=4)
    for parameter in net.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return Denoiser(net, Flow(), "velocity", SHAPE)


def write(folder: Path, shard: int = 4, **changes) -> Path:
    write_pairs(folder, teacher(), pairs_header(**changes), batch_size=3, shard_bytes=shard * (4 * 64 + 12))
    return folder


def test_pairs_are_the_teachers_endpoints_of_the_noise_of_their_ids(tmp_path):
    pairs = Pairs(write(tmp_path))
    assert len(pairs) == 10
    assert [shard.count for shard in pairs.shards] == [4, 4, 2]
    rows = torch.tensor([9, 0, 5, 5])
    batch = pairs.fetch(rows, torch.arange(4))
    assert torch.equal(batch.ids, rows)
    assert batch.cond.get("label").tolist() == [9, 0, 5, 5]
    assert torch.equal(batch.z, sample_noise(3, "pairs", rows, SHAPE))
    with torch.no_grad():
        expected = teacher().eval().transport(batch.z, batch.cond, solver="euler", steps=3)[0]
    assert torch.allclose(batch.x0, expected, atol=1e-5)
    assert pairs.fingerprint() == Pairs(tmp_path).fingerprint()


def test_shards_do_not_change_what_is_stored(tmp_path):
    whole, parts = Pairs(write(tmp_path / "a", shard=100)), Pairs(write(tmp_path / "b", shard=3))
    rows = torch.arange(10)
    one, other = (pairs.fetch(rows, rows) for pairs in (whole, parts))
    assert torch.equal(one.z, other.z)
    assert torch.allclose(one.x0, other.x0, atol=1e-6)  # other batches, other rounding
    assert shard_rows((4, 64, 64)) == 64 * 2**20 // (4 * 4 * 64 * 64 + 12)


def test_a_stopped_writer_continues_shard_by_shard(tmp_path, monkeypatch):
    whole = write(tmp_path / "whole")

    class Stop(Exception):
        pass

    def stop_after(count: int):
        seen = 0

        def hook(n):
            nonlocal seen
            seen += n
            if seen >= count:
                raise Stop

        return hook

    folder = tmp_path / "parts"
    with pytest.raises(Stop):
        write_pairs(
            folder, teacher(), pairs_header(), batch_size=3, shard_bytes=4 * 268, on_samples=stop_after(5)
        )
    with pytest.raises(FileNotFoundError, match="no finished pair cache"):
        Pairs(folder)
    kept = (folder / "pairs-00000.safetensors").stat().st_mtime_ns
    write(folder)
    assert (folder / "pairs-00000.safetensors").stat().st_mtime_ns == kept
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == {
        p.name: p.read_bytes() for p in whole.iterdir()
    }


def test_a_folder_begun_with_other_settings_is_refused(tmp_path):
    (tmp_path / HEADER).write_text(json.dumps(pairs_header(steps=9).to_dict()))
    with pytest.raises(ValueError, match=r"begun with other \['steps'\]: found \[9\]"):
        write(tmp_path)


def break_manifest(folder: Path, **changes) -> None:
    manifest = json.loads((folder / MANIFEST).read_text())
    manifest["header"] |= changes
    (folder / MANIFEST).write_text(json.dumps(manifest))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"orientation": "z=data, x0=noise"}, "orientation: found 'z=data, x0=noise', expected"),
        ({"noise_checksum": "0" * 64}, "noise_checksum: this torch .* draws another noise stream"),
        ({"schema": 99}, "schema: found 99, this version reads 2"),
        ({"count": 11}, "count: the shards hold 10 pairs, the header expects 11"),
        ({"dtype": "float16"}, "dtype: found 'float16', expected one of 'float32'"),
        ({"noise": "lost"}, "noise: found 'lost', expected one of 'seed', 'stored'"),
        ({"conditions": Labels(5).config()}, r"label: expected classes 0 .. 4, found 0 .. 9"),
        ({"colour": "blue"}, "header.colour: no such key"),
    ],
)
def test_a_manifest_that_lies_is_refused(tmp_path, changes, message):
    write(tmp_path)
    break_manifest(tmp_path, **changes)
    with pytest.raises(ValueError, match=message) as error:
        Pairs(tmp_path)
    assert MANIFEST in str(error.value)


def test_truncated_and_missing_shards_are_named(tmp_path):
    write(tmp_path)
    shard = tmp_path / "pairs-00001.safetensors"
    data = shard.read_bytes()
    shard.write_bytes(data[:-8])
    with pytest.raises(
        ValueError, match=r"pairs-00001.safetensors: sha256: .*4 pairs is truncated or changed"
    ):
        Pairs(tmp_path)
    shard.write_bytes(bytes([data[-1] ^ 1]).join([data[:-1], b""]))
    with pytest.raises(ValueError, match="pairs-00001"):
        Pairs(tmp_path)
    shard.unlink()
    with pytest.raises(
        FileNotFoundError, match=r"pairs-00001.safetensors: missing; manifest.json expects it to hold 4"
    ):
        Pairs(tmp_path)


def test_a_teacher_that_makes_nan_is_refused(tmp_path):
    broken = teacher()
    with torch.no_grad():
        broken.net.out.bias.fill_(float("nan"))
    with pytest.raises(FloatingPointError, match="teacher: non-finite samples for ids"):
        write_pairs(tmp_path, broken, pairs_header())
    assert not (tmp_path / MANIFEST).exists()


def foreign(folder: Path, **columns) -> Path:
    """A cache of 10 pairs as another program would write it, with its noise stored."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.arange(10)
    table = {
        "ids": ids,
        "label": ids.to(torch.int32),
        "x0": torch.rand(10, *SHAPE, generator=generator) * 2 - 1,
        "z": torch.randn(10, *SHAPE, generator=generator),
    } | columns
    path = folder / "pairs-00000.safetensors"
    write_safetensors(path, {k: v for k, v in table.items() if v is not None})
    shard = {"file": path.name, "count": 10, "sha256": sha256_file(path)}
    write_json(
        folder / MANIFEST,
        {"header": pairs_header(noise="stored", noise_checksum="").to_dict(), "shards": [shard]},
    )
    return folder


def test_stored_noise_is_read_as_it_stands(tmp_path):
    pairs = Pairs(foreign(tmp_path))
    rows = torch.tensor([3, 1])
    generator = torch.Generator().manual_seed(0)
    torch.rand(10, *SHAPE, generator=generator)
    assert torch.equal(pairs.fetch(rows, rows).z, torch.randn(10, *SHAPE, generator=generator)[rows])


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        (
            {"x0": torch.full((10, *SHAPE), float("nan"))},
            "x0: found values up to nan, expected finite ones up to 50",
        ),
        (
            {"x0": torch.full((10, *SHAPE), 51.0)},
            "x0: found values up to 51.0, expected finite ones up to 50",
        ),
        ({"z": torch.randn(10, *SHAPE) * 14.6}, "z: standard deviation: found .*, expected 0.9 .. 1.1"),
        ({"z": torch.zeros(10, *SHAPE)}, "the stored noise was scaled, or z and x0 are swapped"),
        ({"z": torch.randn(9, *SHAPE)}, r"z: found \(9, 1, 8, 8\), expected \(10, 1, 8, 8\)"),
        ({"x0": torch.zeros(10, 3, 8, 8)}, r"x0: found \(10, 3, 8, 8\), expected \(10, 1, 8, 8\)"),
        ({"z": None}, "z: found nothing, expected"),
        ({"ids": torch.zeros(10, dtype=torch.int64)}, "ids: found some twice"),
    ],
)
def test_values_that_no_pairs_have_are_refused(tmp_path, columns, message):
    with pytest.raises(ValueError, match=message):
        Pairs(foreign(tmp_path, **columns))


# ---- what a killed writer left is verified before a manifest certifies it ----


class _Killed(BaseException):
    pass


def killed_before_the_manifest(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def kill(path: Path, value: object) -> None:
        if path.name == MANIFEST:
            raise _Killed
        write_json(path, value)

    with monkeypatch.context() as patched:
        patched.setattr("distill.cache.writer.write_json", kill)
        with pytest.raises(_Killed):
            write(folder)


def zeroed(path: Path) -> None:
    table = safetensors.torch.load_file(path)
    safetensors.torch.save_file(table | {"x0": torch.zeros_like(table["x0"])}, path)


def swapped(path: Path) -> None:
    path.write_bytes(path.with_name("pairs-00001.safetensors").read_bytes())


DAMAGE = {
    "zeros": zeroed,
    "another shard": swapped,
    "a flipped bit": lambda path: path.write_bytes(path.read_bytes()[:-1] + b"\x01"),
    "truncated": lambda path: path.write_bytes(path.read_bytes()[:-9]),
    "empty": lambda path: path.write_bytes(b""),
    "no record": lambda path: path.with_suffix(".json").unlink(),
    "a record that is no JSON": lambda path: path.with_suffix(".json").write_text("{"),
    "a record of other pairs": lambda path: path.with_suffix(".json").write_text(
        '{"header": {}, "sha256": ""}'
    ),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_bad_shard_of_an_unfinished_cache_is_made_again(tmp_path, monkeypatch, damage):
    whole, folder = write(tmp_path / "whole"), tmp_path / "parts"
    killed_before_the_manifest(folder, monkeypatch)
    DAMAGE[damage](folder / "pairs-00000.safetensors")
    told: list[str] = []
    write_pairs(folder, teacher(), pairs_header(), batch_size=3, shard_bytes=4 * 268, tell=told.append)
    assert any("pairs-00000.safetensors: " in line and line.endswith("; made again") for line in told)
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == {
        p.name: p.read_bytes() for p in whole.iterdir()
    }


def test_whole_shards_are_kept_also_where_the_manifest_was_written(tmp_path):
    """A kill between the manifest and the stage's record: nothing is made again, what was changed is."""
    folder = write(tmp_path)
    told: list[str] = []
    before = {p.name: p.stat().st_mtime_ns for p in folder.glob("pairs-*")}
    write_pairs(folder, teacher(), pairs_header(), batch_size=3, shard_bytes=4 * 268, tell=told.append)
    assert {p.name: p.stat().st_mtime_ns for p in folder.glob("pairs-*")} == before
    assert told == []
    zeroed(folder / "pairs-00002.safetensors")
    write_pairs(folder, teacher(), pairs_header(), batch_size=3, shard_bytes=4 * 268, tell=told.append)
    assert len(told) == 1
    assert Pairs(folder).fetch(torch.tensor([9]), torch.tensor([0])).x0.abs().sum() > 0
