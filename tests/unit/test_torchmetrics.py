"""Our metrics as torchmetrics: the numbers of an evaluation's rows, and on two processes those of one."""

from __future__ import annotations

import json
import os
import pickle
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from tests_support import fork

from distill.data.digits import Digits
from distill.evaluation.measure import Reference, measure
from distill.evaluation.metric import metrics
from distill.evaluation.torchmetrics import SampleMetric, Straightness
from distill.launch import free_port
from distill.models.features import load_digits64
from distill.samplers.straightness import straightness

IMAGES = [m.name for m in metrics("images") if not m.rows and m.name != "cmmd"]
POINTS = ["energy", "transport_cost"]


def updated(name: str, part: slice = slice(None)) -> SampleMetric:
    """A metric of 120 noisy digits, or of points, against others; `part` of each batch of four."""
    if name in POINTS:
        metric = SampleMetric(name)
        random = torch.Generator().manual_seed(0)
        for number in range(4):
            metric.update(
                torch.randn(30, 2, generator=random)[part],
                noise=torch.zeros(30, 2)[part],
                real=number % 2 == 0,
            )
        return metric
    data, metric = Digits(), SampleMetric(name, load_digits64())
    noise = 0.1 * torch.randn(240, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    images = (data.images[:240] + noise).clamp(-1, 1)
    for rows in torch.arange(120).split(30):
        metric.update(data.images[240 + rows[part]], data.labels[240 + rows[part]], real=True)
        metric.update(images[rows[part]], data.labels[rows[part]])
    return metric


def paths(part: slice = slice(None)) -> Straightness:
    metric, random = Straightness(), torch.Generator().manual_seed(0)
    for _ in range(2):
        path, velocities = torch.randn(6, 8, 3, generator=random), torch.randn(5, 8, 3, generator=random)
        metric.update(path[:, part], velocities[:, part])
    return metric


def uneven(batches: Sequence[int], *, real: bool) -> SampleMetric:
    """The energy distance of some batches, of different sizes, to one real set."""
    random = torch.Generator().manual_seed(0)
    reference, *parts = (torch.randn(size, 2, generator=random) for size in (20, 8, 9, 5))
    metric = SampleMetric("energy")
    if real:
        metric.update(reference, real=True)
    for number in batches:
        metric.update(parts[number])
    return metric


def test_are_the_numbers_of_a_row() -> None:
    data, extractor = Digits(), load_digits64()
    reference = Reference(data.images[240:360], data.labels[240:360], extractor)
    noise = 0.1 * torch.randn(240, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    made = (data.images[:240] + noise).clamp(-1, 1)[:120]
    row = measure(made, data.labels[:120], reference, extractor)
    for name in IMAGES:
        assert float(updated(name).compute()) == pytest.approx(row[name], rel=1e-12), name


def worker(folder: Path, rank: int, port: int) -> None:
    torch.set_num_threads(1)
    world = {"RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    os.environ.update(world | {"GLOO_SOCKET_IFNAME": "lo"})
    sys.stdout = sys.stderr = (folder / f"log{rank}").open("w")
    torch.distributed.init_process_group("gloo")
    part = slice(rank, None, 2)
    found = {name: float(updated(name, part).compute()) for name in (*IMAGES, *POINTS)}
    found["straightness"] = float(paths(part).compute())
    found["uneven"] = float(uneven((0, 1) if rank == 0 else (2,), real=rank == 0).compute())
    (folder / f"{rank}.json").write_text(json.dumps(found))


def test_two_processes_compute_what_one_does(tmp_path: Path) -> None:
    port = free_port()
    running = [fork(worker, tmp_path, rank, port) for rank in range(2)]
    assert [os.waitpid(pid, 0)[1] for pid in running] == [0, 0], (tmp_path / "log0").read_text()
    one, two = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2))
    assert one == two
    assert set(one) == {*IMAGES, *POINTS, "straightness", "uneven"}
    assert one.pop("uneven") == pytest.approx(float(uneven((0, 1, 2), real=True).compute()), rel=1e-7)
    for name, value in one.items():
        expected = float(paths().compute() if name == "straightness" else updated(name).compute())
        counted = name in ("precision", "recall", "density", "coverage", "class_accuracy")
        assert value == (expected if counted else pytest.approx(expected, rel=1e-7, abs=1e-12)), name


def test_the_sums_of_straightness_are_its_mean() -> None:
    path, velocities = torch.randn(6, 8, 3), torch.randn(5, 8, 3)
    plain, norm = Straightness(), Straightness(normalise=True)
    for metric, expected in zip((plain, norm), straightness(path, velocities), strict=True):
        metric.update(path[:, :3], velocities[:, :3])
        metric.update(path[:, 3:], velocities[:, 3:])
        assert float(metric.compute()) == pytest.approx(float(expected), rel=1e-5)


def test_a_reset_keeps_the_real_set() -> None:
    metric, points = SampleMetric("energy"), torch.randn(20, 2)
    metric.update(torch.randn(20, 2), real=True)
    metric.update(points)
    first = metric.compute()
    metric.reset()
    metric.update(points)
    assert torch.equal(metric.compute(), first)
    assert metric.higher_is_better is False
    assert metric.state_dict() == {}


def test_forward_adds_its_batch_and_keeps_the_real_set() -> None:
    called, random = uneven((), real=True), torch.Generator().manual_seed(1)
    updated, parts = uneven((), real=True), torch.randn(3, 10, 2, generator=random)
    for part in parts:
        alone = uneven((), real=True)
        alone.update(part)
        assert float(called(part)) == float(alone.compute())
        updated.update(part)
    assert float(called.compute()) == float(updated.compute())


def test_can_be_pickled() -> None:
    metric = uneven((0, 1), real=True)
    assert float(pickle.loads(pickle.dumps(metric)).compute()) == float(metric.compute())


def test_wrong_arguments_are_named() -> None:
    with pytest.raises(ValueError, match="name: found 'nfe', expected one of fd, "):
        SampleMetric("nfe")
    with pytest.raises(ValueError, match="extractor: found None, but 'fd' is a metric of features"):
        SampleMetric("fd")
    with pytest.raises(ValueError, match="labels: missing; 'class_std' is a metric of samples with labels"):
        SampleMetric("class_std").update(torch.zeros(4, 1, 2, 2) - 1)
    with pytest.raises(ValueError, match=r"expected \[N \+ 1, B, \*S\]"):
        Straightness().update(torch.zeros(2, 3, 4), torch.zeros(1, 3, 4))
