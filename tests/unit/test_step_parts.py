"""The parts of a training step that were made fast: the same numbers as their plain definitions."""

from __future__ import annotations

import copy
import math

import numpy as np
import pytest
import torch
from lightning.pytorch.loggers.logger import DummyLogger
from test_engine import Points, fit, make
from torch import nn

from distill.data import rng
from distill.data.rng import Draws, philox
from distill.engine.ema import EmaUpdater
from distill.engine.fit import Fit, train
from distill.engine.nonfinite import flagged_step, nonfinite, step_unless
from distill.engine.params import ParameterSet


def test_philox_is_the_same_on_arrays_and_tensors_of_any_layout():
    generator = torch.Generator().manual_seed(0)
    counter = [torch.randint(0, 2**32, (7, 5), generator=generator) for _ in range(4)]
    tensors = philox(counter, 0xFEDCBA9876543210)
    arrays = philox([word.numpy() for word in counter], 0xFEDCBA9876543210)
    column, row = counter[0][:, :1], counter[1][:1]
    broadcast = philox((row, column, column, 0 * row), 3)
    full = philox((row.expand(7, 5), column.expand(7, 5), column.expand(7, 5), torch.zeros(7, 5).long()), 3)
    for a, b in zip([*tensors, *broadcast], [*arrays, *full], strict=True):
        assert np.array_equal(np.asarray(a), np.asarray(b))
        assert int(np.min(np.asarray(a))) >= 0
        assert int(np.max(np.asarray(a))) < 2**32


def test_uniforms_are_the_words_of_philox(monkeypatch):
    index = torch.tensor([5, 2**33 + 1, 0])
    found = Draws(4, "s", 9, index).uniform("u", (6,))
    rows, columns = index[:, None], torch.arange(2)[None]
    words = philox((columns, rows & 0xFFFFFFFF, rows >> 32, 0 * columns), rng.stream_key(4, "s", 9, "u"))
    cells = (torch.stack(words, dim=-1) >> 8).flatten(1)[:, :6].double()
    assert torch.equal(found.double(), ((cells + 0.5) * 2.0**-24).float().double())


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_nonfinite_finds_each_kind(bad):
    fine, wrong = torch.tensor(3e38), torch.tensor(bad)
    assert nonfinite(fine, fine) == 0  # their sum would overflow
    assert nonfinite(-fine, torch.tensor(0.0)) == 0
    assert nonfinite(fine, wrong) == nonfinite(wrong, fine) == nonfinite(wrong, -wrong) == 1
    assert nonfinite(fine, wrong).dtype == torch.float32


@pytest.mark.parametrize("step", [flagged_step, step_unless])
def test_a_flagged_step_changes_nothing_and_another_is_the_plain_one(step):
    plain, flagged = nn.Linear(3, 2), nn.Linear(3, 2)
    flagged.load_state_dict(plain.state_dict())
    optimizers = [torch.optim.AdamW(net.parameters(), lr=0.1, fused=True) for net in (plain, flagged)]
    for bad in (0.0, 1.0, 0.0):
        for net in (plain, flagged):
            for parameter in net.parameters():
                parameter.grad = torch.full_like(parameter, math.nan if bad else 0.5)
        if not bad:
            optimizers[0].step()
        before = copy.deepcopy(flagged.state_dict())
        step(optimizers[1], torch.tensor(bad))
        for name, value in flagged.state_dict().items():
            assert torch.equal(value, plain.state_dict()[name])
            assert torch.equal(value, before[name]) == bool(bad)
    states = [optimizer.state_dict()["state"] for optimizer in optimizers]
    assert all(torch.equal(states[0][i][key], states[1][i][key]) for i in states[0] for key in states[0][i])
    assert int(states[1][0]["step"]) == 2


def test_a_updater_averages_parameters_and_copies_buffers_even_replaced_ones():
    network = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    average = copy.deepcopy(network)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(1.0)
    expected = [0.75 * a + 0.25 * p for a, p in zip(average.parameters(), network.parameters(), strict=True)]
    updater = EmaUpdater(*(ParameterSet.of(net, "") for net in (average, network)))
    network[1].running_mean = torch.tensor([5.0, 6.0])  # another tensor than the one that was looked up
    updater.update(0.75)
    for found, value in zip(average.parameters(), expected, strict=True):
        assert torch.allclose(found, value, atol=1e-7)
    assert torch.equal(average[1].running_mean, torch.tensor([5.0, 6.0]))


def test_a_updater_refuses_another_network():
    two = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    with pytest.raises(ValueError, match="average: found 2 parameters, the network that it follows has 4"):
        EmaUpdater(*(ParameterSet.of(net, "") for net in (nn.Linear(2, 2), two)))


def test_networks_are_walked_once_a_run_not_once_a_step(tmp_path, monkeypatch):
    walks = []
    method = make()
    method.parameters_of = lambda update, plain=method.parameters_of: (
        walks.append(update.name) or plain(update)
    )
    fit(method, tmp_path, steps=6)
    assert method.progress.iteration == 11
    # Once for the record, once for the optimizers and once for the steps.
    assert sorted(walks) == [*3 * ["fake"], *3 * ["student"]]


class Entries(DummyLogger):
    """A logger that keeps what it gets."""

    def __init__(self):
        super().__init__()
        self.entries = []

    def log_metrics(self, metrics, step):
        assert metrics["step"] == step
        self.entries.append(metrics)


@pytest.mark.parametrize("accumulate", [2, 4])
def test_what_is_logged_is_the_mean_over_micro_batches(tmp_path, accumulate):
    whole, parts = Entries(), Entries()
    for entries, count in ((whole, 1), (parts, accumulate)):
        fit_options = Fit(steps=3, batch_size=8, accumulate=count, log_every=1)
        train(make(), Points(), fit_options, folder=tmp_path / str(count), config={}, loggers=[entries])
    assert len(whole.entries) == len(parts.entries) == 3
    for name in ("student/loss", "fake/loss", "fake/mean", "fake/grad_norm"):
        assert [entry[name] for entry in parts.entries] == pytest.approx(
            [entry[name] for entry in whole.entries], abs=1e-5
        )


def test_what_was_looked_up_is_forgotten_where_parameters_may_be_replaced(tmp_path):
    method = fit(make(), tmp_path, steps=2)
    assert sorted(method._step_caches) == ["fake", "student"]
    method.distribute("none", torch.device("cpu"))  # shards networks, where there are several processes
    assert method._step_caches == {}
    fit(method, tmp_path, steps=4)
    method.prepare(method.optim, seed=0)
    assert method._step_caches == {}


def test_attributes_that_hold_nothing_or_text_stay_attributes_of_their_kind():
    method = make()
    method.label = "a"
    method.label = None
    assert method.label is None
    method.fake = None  # a submodule is taken off, not hidden
    assert method._modules["fake"] is None
    assert method.fake is None
