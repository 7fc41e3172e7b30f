"""Shards that cannot be indexed: a stream with replacement, and what is refused."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from shard_support import members, numbers, picture, png, write_shards

from distill.data.resampled import Resampled
from distill.data.source import StepLoader
from distill.data.webdataset import Shards
from distill.evaluation.meters.images import ImageMeter


def test_pipes_are_sampled_with_replacement(tmp_path: Path) -> None:
    pytest.importorskip("webdataset", reason="the extra [webdataset] is not installed")
    write_shards(tmp_path, [6, 6])
    with pytest.warns(UserWarning, match="not exact"):
        data = Resampled(
            f"pipe:cat {tmp_path}/s-{{000..001}}.tar", 8, 12, label="cls", num_classes=10, buffer=8
        )

    def read(start: int, rank: int, workers: int) -> list[int]:
        options = {"stream": "t", "start": start, "stop": start + 3, "rank": rank, "world": 2}
        found = []
        for step in StepLoader(data, 8, 0, workers=workers, **options):
            assert step[0].cond.get("label").tolist() == [n % 10 for n in numbers(step[0].x0)]
            found += numbers(step[0].x0)
        data._stream = None  # as in another process
        return found

    first = read(0, 0, 0)
    assert len(first) == 12
    assert set(first) <= set(range(12))
    assert len(set(first)) > 1
    assert first != read(0, 1, 0), "processes draw on their own"
    assert first != read(3, 0, 0), "so does a training that is continued"
    assert len(read(0, 0, 2)) == 12
    broken = Resampled(f"pipe:cat {tmp_path}/s-000.tar", 8, 6, image="jpg")
    with pytest.raises(ValueError, match="has no member jpg"):
        broken.fetch(torch.arange(2), torch.arange(2))
    # There is no whole to compare samples with.
    with pytest.raises(ValueError, match=r"data: found Resampled, .*type eval\.meter\.data="):
        ImageMeter(data, None).trial((3, 8, 8), None)


def test_what_the_package_writes_is_read_by_index(tmp_path: Path) -> None:
    webdataset = pytest.importorskip("webdataset", reason="the extra [webdataset] is not installed")
    with webdataset.ShardWriter(str(tmp_path / "w-%02d.tar"), maxcount=3, verbose=0) as writer:
        for i in range(5):
            writer.write({"__key__": f"sub/{i:04d}", "png": png(picture(i)), "txt": f"number {i}", "cls": i})
    data = Shards(str(tmp_path / "w-{00..01}.tar"), caption="txt", label="cls", num_classes=5)
    assert numbers(data.images) == data.labels.tolist() == list(range(5))
    assert data.captions() == [f"number {i}" for i in range(5)]
    # Its own reader finds the same samples in shards of ours.
    pattern = write_shards(tmp_path / "ours", [2, 2])
    found = list(webdataset.WebDataset(pattern, shardshuffle=False))
    assert [sample["txt"] for sample in found] == [dict(members(i))[f"{i:06d}.txt"] for i in range(4)]


def test_bad_streams() -> None:
    for options, words in (
        ({"resolution": None}, "resolution: found null"),
        ({"samples": 0}, "samples: found 0"),
        ({"buffer": 0}, "buffer: found 0"),
        ({"shards": []}, "shards: found []"),
        ({"shards": "pipe:cat {0..1"}, "shards: found '{' without '}'"),
    ):
        with pytest.raises(ValueError, match=re.escape(words)):
            Resampled(**({"shards": "pipe:cat x.tar", "resolution": 8, "samples": 4} | options))
    one = Resampled("pipe:cat x.tar", 8, 4)
    assert one.fingerprint() != Resampled("pipe:cat x.tar", 8, 4, revision="2").fingerprint()
