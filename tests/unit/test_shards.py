"""Tar shards as data: the index of their members, the order, what is read, and what is refused."""

from __future__ import annotations

import gzip
import os
import re
from collections import Counter
from pathlib import Path

import pytest
import torch
from shard_support import members, numbers, picture, png, write_shards, write_tar

from distill.data.shard_index import braces, indexed, places
from distill.data.shard_order import ShardOrder
from distill.data.webdataset import Shards


def rows(*numbers: int) -> torch.Tensor:
    return torch.tensor(numbers)


def test_braces_as_in_a_shell():
    assert braces("a{8..11}.tar") == ["a8.tar", "a9.tar", "a10.tar", "a11.tar"]
    assert braces("a{008..011}{x,y}") == [f"a{n}{c}" for n in ("008", "009", "010", "011") for c in "xy"]
    assert braces("{a{1..2},b}/c") == ["a1/c", "a2/c", "b/c"]
    assert braces("{2..0}") == ["2", "1", "0"]
    assert braces("plain") == ["plain"]
    for pattern, words in (
        ("a{0..1", "found '{' without '}'"),
        ("a0..1}", "found '}' without '{'"),
        ("a{x}", "found {x}, expected {000..127}"),
        ("{0..9999999}", "expected at most"),
    ):
        with pytest.raises(ValueError, match=re.escape(words)):
            braces(pattern)


def test_samples_of_shards(tmp_path):
    data = Shards(write_shards(tmp_path, [3, 2]), label="cls", num_classes=10)
    assert (len(data), data.sample_shape, data.num_classes) == (5, (3, 8, 8), 10)
    batch = data.fetch(rows(4, 0, 2), rows(0, 1, 2))
    assert batch.ids.tolist() == [4, 0, 2] == numbers(batch.x0)
    assert batch.cond.get("label").tolist() == [4, 0, 2]
    wanted = torch.from_numpy(picture(4)).permute(2, 0, 1).float() / 127.5 - 1
    torch.testing.assert_close(batch.x0[0], wanted)
    assert data.labels.tolist() == [0, 1, 2, 3, 4]
    assert numbers(data.images) == [0, 1, 2, 3, 4]
    by_json = Shards(str(tmp_path / "s-000.tar"), label="json:class", num_classes=3, caption="json:text")
    assert by_json.captions() == ["picture 0", "picture 1", "picture 2"]
    assert by_json.fetch(rows(1), rows(0)).cond.get("label").tolist() == [1]
    few = Shards(str(tmp_path / "s-{000..001}.tar"), limit=4, resolution=[4, 6])
    assert (len(few), few.sample_shape, few.counts) == (4, (3, 4, 6), [3, 1])


def test_indexes_are_made_once_and_tell_the_content(tmp_path, monkeypatch):
    pattern = write_shards(tmp_path, [3, 2])
    first = Shards(pattern)
    index = tmp_path / "s-000.tar.index"
    before = index.stat().st_mtime_ns, index.stat().st_ino
    monkeypatch.setattr(
        "distill.data.shard_index.sha256_file", None
    )  # a second pass over a shard would call it
    assert Shards(pattern).fingerprint() == first.fingerprint()
    assert (index.stat().st_mtime_ns, index.stat().st_ino) == before
    monkeypatch.undo()
    assert Shards(pattern, limit=4).fingerprint() != first.fingerprint()
    # Another content of the same size is another data set, and a reader of the old one is told.
    content = (tmp_path / "s-001.tar").read_bytes()
    at = content.index(b"picture 3")
    (tmp_path / "s-001.tar").write_bytes(content[:at] + b"picture 7" + content[at + 9 :])
    assert Shards(pattern).fingerprint() != first.fingerprint()
    with pytest.raises((OSError, ValueError), match=r"s-001\.tar: .*changed"):
        first.fetch(rows(4), rows(0))
    # A broken index is made again.
    index.write_bytes(b"nothing")
    assert numbers(Shards(pattern).fetch(rows(2), rows(0)).x0) == [2]


def test_indexes_of_a_folder_that_cannot_be_written(tmp_path, monkeypatch):
    pattern = write_shards(tmp_path / "data", [2])
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    beside, cached = places(tmp_path / "data" / "s-000.tar", None)
    beside.mkdir()  # nothing can be written there, even by root
    assert len(Shards(pattern)) == 2
    assert cached.is_file()
    assert len(Shards(pattern, index_dir=str(tmp_path / "own"))) == 2
    assert len(list((tmp_path / "own").iterdir())) == 1


def test_members_that_are_no_samples_are_left_out(tmp_path):
    """Such as tar of macOS writes for each file, and data about the shard."""
    found = [
        ("__index__", b"{}"),
        ("._000000.png", b"x"),
        ("._000001.png", b"x"),
        *members(0),
        ("README", b"x"),
        ("._a/._1.png", b"x"),
        *members(1),
    ]
    data = Shards(str(write_tar(tmp_path / "a.tar", found)))
    assert numbers(data.images) == [0, 1]


def damaged(tmp_path: Path, name: str) -> Path:
    """A shard with one fault."""
    path = tmp_path / f"{name}.tar"
    whole = write_tar(tmp_path / "whole.tar", [m for i in range(4) for m in members(i)]).read_bytes()
    second = whole.index(b"000001.png")
    if name == "inside":
        path.write_bytes(whole[: second + 600])
    elif name == "between":
        path.write_bytes(whole[:second])
    elif name == "header":
        path.write_bytes(whole[: second + 4] + b"\xff" * 100 + whole[second + 104 :])
    elif name == "empty":
        path.write_bytes(b"")
    elif name == "garbage":
        path.write_bytes(os.urandom(10_000))
    elif name == "gzip":
        path.write_bytes(gzip.compress(whole))
    elif name == "joined":
        path.write_bytes(whole + whole)
    elif name == "none":
        write_tar(path, [])
    elif name == "apart":
        write_tar(path, [members(0)[0], *members(1), members(0)[1]])
    elif name == "twice":
        write_tar(path, [members(0)[0], members(0)[0]])
    return path


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("inside", "is truncated"),
        ("between", "is truncated: its end is missing"),
        ("header", "found a broken header at byte"),
        ("empty", "is empty"),
        ("garbage", "is truncated or no tar file"),
        ("gzip", "is compressed with gzip"),
        ("joined", "found data behind its end"),
        ("none", "holds no samples"),
        ("apart", "000000.txt: found other samples between the members of '000000'"),
        ("twice", "000000.png: found twice in the sample"),
        ("absent", "no such shard"),
    ],
)
def test_broken_shards_are_named(tmp_path, name, words):
    path = damaged(tmp_path, name)
    good = write_tar(tmp_path / "good.tar", members(0))
    with pytest.raises(
        (ValueError, FileNotFoundError), match=f"{re.escape(str(path))}: .*{re.escape(words)}"
    ):
        indexed([good, path])
    assert not path.with_name(path.name + ".index").exists()


def test_broken_samples(tmp_path):
    bad = members(3)
    bad[0] = (bad[0][0], bad[0][1][:-20])
    pattern = write_shards(tmp_path, [2, 3], changed={3: bad})
    with pytest.raises(ValueError, match=r"s-001\.tar: 000003\.png: cannot be read as an image"):
        Shards(pattern).fetch(rows(3), rows(0))
    data = Shards(pattern, broken="replace")
    with pytest.warns(UserWarning, match=r"replaced by the next sample.*s-001\.tar: 000003"):
        batch = data.fetch(rows(2, 3, 4), rows(0, 1, 2))
    assert numbers(batch.x0) == batch.ids.tolist() == [2, 4, 4]
    assert data.replaced == 1
    with pytest.raises(ValueError, match="000003"):
        _ = data.images
    # Missing members are known from the index; the last sample of a shard is replaced by its first.
    pattern = write_shards(tmp_path / "missing", [2, 3], changed={4: members(4)[:1]})
    with pytest.raises(ValueError, match=r"s-001\.tar: 000004: has no member txt"):
        Shards(pattern, caption="txt")
    data = Shards(pattern, caption="txt", broken="replace")
    with pytest.warns(UserWarning, match="000004: has no member txt"):
        assert data.captions() == ["picture 0", "picture 1", "picture 2", "picture 3", "picture 2"]
    other = write_shards(tmp_path / "sizes", [2], changed={1: [("1.png", png(picture(1, 9)))]})
    with pytest.raises(ValueError, match=r"found 9x9 pixels .* first image has 8x8"):
        Shards(other).fetch(rows(1), rows(0))
    nothing = write_tar(tmp_path / "n.tar", [(f"{i}.png", b"x") for i in range(3)])
    with (
        pytest.warns(UserWarning, match="replaced"),
        pytest.raises(OSError, match="found 3 broken samples in a row"),
    ):
        Shards(str(nothing), broken="replace")


def test_bad_options(tmp_path):
    pattern = write_shards(tmp_path, [2])
    for options, words in (
        ({"broken": "skip"}, "broken: found 'skip', expected one of ['fatal', 'replace']"),
        ({"window": 0}, "window: found 0"),
        ({"limit": 0}, "limit: found 0"),
        ({"label": "cls"}, "num_classes: found 0 with label=cls"),
        ({"num_classes": 3}, "num_classes: found 3 with label=None"),
        ({"label": "txt", "num_classes": 3}, "txt: found 'picture 0', expected a class in 0 .. 2"),
        ({"label": "cls", "num_classes": 1}, None),
        ({"caption": "a/b"}, "caption: found 'a/b'"),
        ({"caption": "txt:a"}, None),
        ({"channels": 2}, "channels: found 2"),
        ({"channels": 1}, "has colour, expected a grey image"),
        ({"image": "jpg"}, "has no member jpg"),
        ({"resolution": 0}, "resolution: found 0"),
    ):
        if words is not None:
            with pytest.raises(ValueError, match=re.escape(words)):
                Shards(pattern, **options)
    with pytest.raises(ValueError, match=re.escape("cls: found 1, expected a class in 0 .. 0")):
        Shards(pattern, label="cls", num_classes=1).fetch(rows(1), rows(0))
    with pytest.raises(ValueError, match=r"000000\.txt: is not JSON"):
        Shards(pattern, caption="txt:a")
    for shards, words in (
        ("pipe:cat x.tar", "shards: found 'pipe:cat x.tar', which cannot be read in any order"),
        ("s3://b/{0..3}.tar", "data=webdataset_stream"),
        ("", "shards: found ''"),
        ([pattern, pattern], "twice, expected each shard once"),
        ("a{0..", "shards: found '{' without '}'"),
    ):
        with pytest.raises(ValueError, match=re.escape(words)):
            Shards(shards)


def test_order_is_exact_and_seekable():
    counts = [5, 1, 7, 3, 4, 2, 6]
    order = ShardOrder(counts, seed=3, window=2)
    total = sum(counts)
    whole = order.at(0, 3 * total)
    for epoch in range(3):
        assert sorted(whole[epoch * total : (epoch + 1) * total].tolist()) == list(range(total))
    assert whole[:total].tolist() != whole[total : 2 * total].tolist()
    for start in (0, 1, 13, total - 1, total, 2 * total + 5):
        again = ShardOrder(counts, seed=3, window=2)  # as after a restart
        assert torch.equal(again.at(start, 9), whole[start : start + 9])
    assert not torch.equal(ShardOrder(counts, seed=4, window=2).at(0, total), whole[:total])
    # A window holds the samples of two whole shards, mixed.
    shard = torch.repeat_interleave(torch.arange(7), torch.tensor(counts))[whole[:total]].tolist()
    windows, done = 0, 0
    while done < total:
        first = shard[done]
        size = next(
            n
            for n in range(counts[first], total - done + 1)
            if Counter(shard[done : done + n]) == {s: counts[s] for s in set(shard[done : done + n])}
            and (len(set(shard[done : done + n])) == 2 or done + n == total)
        )
        windows, done = windows + 1, done + size
    assert windows == 4
    with pytest.raises(ValueError, match="window: found 0"):
        ShardOrder([1], 0, window=0)


def test_order_of_fifty_million_rows():
    """No permutation of all rows: a position in the middle needs that of four shards."""
    order = ShardOrder([10_000] * 5_000, seed=0)
    found = order.at(30_000_017, 1_000)
    assert len(found.unique()) == 1_000
    assert order._rows.numel() == 40_000
    assert torch.equal(ShardOrder([10_000] * 5_000, seed=0).at(30_000_500, 100), found[483:583])
