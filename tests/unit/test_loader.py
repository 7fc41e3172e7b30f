"""The loader of training steps: the same batches for any number of workers and processes, exact epochs, also after a kill."""

from __future__ import annotations

import multiprocessing
import os
import signal
import warnings
from collections import Counter
from functools import partial

import pytest
import torch
from checkpoint_support import has_checkpoint
from engine_support import Points
from shard_support import members, numbers, write_shards

from distill.data.digits import Digits
from distill.data.machine import available_cores
from distill.data.source import StepLoader, _end_workers
from distill.data.webdataset import Shards
from distill.engine.fit import Fit, train
from distill.engine.schedule import Constant
from distill.engine.update import Optim
from distill.methods.flow_matching import FlowMatching
from distill.models.denoiser import Denoiser
from distill.nets.mlp import MLP
from distill.process.flow import Flow
from distill.stages.base import Settings


def loader(source, *, stop=6, start=0, batch_size=8, **more):
    return StepLoader(source, batch_size, 3, stream="t", start=start, stop=stop, **more)


def flat(batches):
    return [
        (batch.ids, batch.index, batch.x0, *batch.cond.values.values()) for step in batches for batch in step
    ]


def same(one, two):
    assert len(one) == len(two) > 0
    for a, b in zip(one, two, strict=True):
        assert len(a) == len(b)
        assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def test_batches_are_the_same_for_any_number_of_workers(tmp_path):
    shards = Shards(write_shards(tmp_path, [7, 5, 9]), label="cls", num_classes=10)
    for source in (shards, Digits()):
        wanted = flat(loader(source, accumulate=2, workers=0))
        for workers in (1, 2):
            same(flat(loader(source, accumulate=2, workers=workers)), wanted)
    assert (loader(shards, workers=None).workers, loader(Digits(), workers=None).workers) == (
        min(4, available_cores()),
        0,
    )
    for options, words in (
        ({"workers": -1}, "workers: expected at least 0"),
        ({"prefetch": 0}, "prefetch: "),
    ):
        with pytest.raises(ValueError, match=words):
            loader(shards, **options)


def test_each_sample_once_an_epoch_on_two_processes_with_two_workers(tmp_path):
    """Also where training goes on with another number of workers or processes."""
    pattern = write_shards(tmp_path, [9, 3, 14, 6, 8])  # 40 samples: 5 iterations
    seen: list[int] = []
    steps: dict[int, Counter] = {}

    def read(start: int, stop: int, world: int, workers: int) -> None:
        for rank in range(world):
            found = loader(Shards(pattern), start=start, stop=stop, rank=rank, world=world, workers=workers)
            for iteration, step in enumerate(found, start):
                assert [len(batch) for batch in step] == [8 // world]
                read_now = numbers(torch.cat([batch.x0 for batch in step]))
                steps.setdefault(iteration, Counter()).update(read_now)
                seen.extend(read_now)

    read(0, 7, world=2, workers=2)
    read(7, 9, world=2, workers=3)
    read(9, 10, world=1, workers=0)
    assert Counter(seen) == dict.fromkeys(range(40), 2)
    for epoch in (0, 5):
        assert sum((steps[epoch + i] for i in range(5)), Counter()) == dict.fromkeys(range(40), 1)
    once = dict(steps)
    steps.clear()
    read(0, 10, world=1, workers=1)
    assert steps == once


def test_replaced_samples_are_counted_in_workers(tmp_path):
    bad = [("000003.png", b"nothing"), *members(3)[1:]]
    data = Shards(write_shards(tmp_path, [8]), broken="replace")
    list(loader(data, stop=2, workers=2))
    assert data.replaced == 0
    data = Shards(write_shards(tmp_path / "bad", [8], changed={3: bad}), broken="replace")
    found = [numbers(step[0].x0) for step in loader(data, stop=2, workers=2)]
    assert data.replaced == 2
    assert all(Counter(step) == Counter([0, 1, 2, 4, 4, 5, 6, 7]) for step in found)
    with pytest.raises(ValueError, match="000003"):
        list(loader(Shards(str(tmp_path / "bad" / "s-000.tar")), workers=2))


def test_warnings_of_workers_reach_the_user(tmp_path, monkeypatch):
    """Workers inherit the filters of the process that starts them, which silences those about workers alone."""
    bad = [("000003.png", b"nothing"), *members(3)[1:]]
    data = Shards(write_shards(tmp_path, [8], changed={3: bad}), broken="replace")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(UserWarning, match=r"replaced by the next sample.*000003"):
            list(loader(data, stop=2, workers=2))
        monkeypatch.setattr(os, "sched_getaffinity", lambda process: {0}, raising=False)  # one core
        assert len(list(loader(Digits(), stop=2, workers=2))) == 2


def test_workers_leave_the_global_generator_alone():
    """Dropout draws from it: with and without workers, training is the same."""
    before = torch.get_rng_state()
    assert len(list(loader(Points(), workers=1))) == 6
    assert torch.equal(torch.get_rng_state(), before)


def test_bad_settings():
    for options, words in (
        ({"workers": -1}, "workers: expected at least 0"),
        ({"prefetch": 0}, "prefetch: expected"),
    ):
        with pytest.raises(ValueError, match=words):
            Settings(**options)
    assert Settings(workers=3, prefetch=5).fitting.items() >= {"workers": 3, "prefetch": 5}.items()


class Signalled(Points):
    """Every fetch sends its process what a terminal and a scheduler send."""

    def fetch(self, rows, index):
        for number in (signal.SIGINT, signal.SIGTERM):
            os.kill(os.getpid(), number)
        return super().fetch(rows, index)


def test_signals_do_not_end_workers():
    assert len(list(loader(Signalled(), workers=2))) == 6


def test_workers_end_with_their_loader_and_with_the_program():
    """They ignore SIGTERM, so a program that leaves a loader open would wait for them for ever."""
    children = set(multiprocessing.active_children())
    steps = iter(loader(Points(), workers=2))
    next(steps)
    assert len(multiprocessing.active_children()) == len(children) + 2
    steps.close()
    assert set(multiprocessing.active_children()) <= children

    def leave() -> None:
        kept.append(iter(loader(Points(), workers=2)))
        next(kept[0])
        _end_workers()  # as at the end of a program; then multiprocessing waits for its children

    kept: list = []
    process = multiprocessing.get_context("fork").Process(target=leave)
    process.start()
    process.join(60)
    alive = process.is_alive()
    process.kill()
    assert not alive
    assert process.exitcode == 0


def test_training_with_workers_and_a_kill(tmp_path):
    data = Shards(write_shards(tmp_path / "data", [9, 8]), label="cls", num_classes=10)

    def trained(name: str, *parts: tuple[int, int]) -> dict[str, torch.Tensor]:
        for steps, workers in parts:
            torch.manual_seed(0)
            net = MLP(shape=(3, 8, 8), width=16, depth=1, num_classes=10)
            method = FlowMatching(Denoiser(net, Flow(), "velocity", (3, 8, 8)))
            method.prepare(
                {"student": Optim(partial(torch.optim.AdamW, lr=1e-3), Constant())}, seed=0, stream="t"
            )
            fit = Fit(steps, 8, accumulate=2, workers=workers, checkpoint_every=100)
            train(method, data, fit, folder=tmp_path / name)
        return method.student.net.state_dict()

    whole, parts = trained("whole", (6, 0)), trained("parts", (3, 2), (6, 1))
    assert whole.keys() == parts.keys()
    assert all(torch.equal(whole[name], parts[name]) for name in whole)
    assert has_checkpoint(tmp_path / "parts")()
