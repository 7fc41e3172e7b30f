"""Data on two processes: each sample once an epoch, also after a kill, and files that are those of one process."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from shard_support import write_shards
from test_two_processes import start


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder where both worlds have done their jobs; 40 samples, 5 iterations an epoch."""
    folder = tmp_path_factory.mktemp("data")
    write_shards(folder, [17, 11, 12])
    jobs = ("read", "latents", "pairs")
    start(folder, 1, *(f"data_worker.{job}" for job in (*jobs, "stopped")))
    start(folder, 2, *(f"data_worker.{job}" for job in (*jobs, "continue")))
    return folder


def read(folder: Path, world: int, iteration: int) -> list[int]:
    """What a world read in one iteration, rank by rank."""
    parts = [
        json.loads((folder / "read" / f"{world}-{iteration}-{rank}.json").read_text())
        for rank in range(world)
    ]
    assert all(len(part) == 8 // world for part in parts)
    return [number for part in parts for number in part]


def test_each_sample_once_an_epoch(results: Path) -> None:
    """Two processes with two workers each, and three after a kill, read in each iteration what one process reads."""
    for epoch in (0, 5):
        found = Counter(number for i in range(5) for number in read(results, 2, epoch + i))
        assert found == dict.fromkeys(range(40), 1)
    assert [read(results, 2, i) for i in range(10)] == [read(results, 1, i) for i in range(10)]


def test_encoded_images_are_those_of_one_process(results: Path) -> None:
    """Byte for byte, also of a stage that was stopped, with a shard that is not what was written."""
    one, two, stopped = (results / f"latents-{name}" for name in ("1", "2", "stopped"))
    names = sorted(path.name for path in one.iterdir())
    assert names == [
        "decoder.safetensors",
        *(f"latents-0000{i}.safetensors" for i in range(5)),
        "latents.json",
    ]
    for other in (two, stopped):
        assert sorted(path.name for path in other.iterdir()) == names
        assert all((other / name).read_bytes() == (one / name).read_bytes() for name in names)
    tables = [load_file(one / name) for name in names if name.startswith("latents-0")]
    assert [number for table in tables for number in table["ids"].tolist()] == list(range(40))
    assert [number for table in tables for number in table["label"].tolist()] == [i % 10 for i in range(40)]
    assert all(table["x0"].dtype == torch.bfloat16 for table in tables)


def test_pairs_are_those_of_one_process(results: Path) -> None:
    """Byte for byte, of several shards; an error of one process ends both, and leaves the whole shards with their notes."""
    one, two = (results / f"pairs-{size}" for size in (1, 2))
    names = sorted(path.name for path in one.iterdir())
    assert names == ["manifest.json", *(f"pairs-0000{number}.safetensors" for number in range(3))]
    assert sorted(path.name for path in two.iterdir()) == names
    assert all((two / name).read_bytes() == (one / name).read_bytes() for name in names)
    left = {size: sorted(path.name for path in (results / f"broken-{size}").iterdir()) for size in (1, 2)}
    assert left[1] == ["header.json", "pairs-00000.json", "pairs-00000.safetensors"]
    assert left[2] == [*left[1], "pairs-00002.json", "pairs-00002.safetensors"]
