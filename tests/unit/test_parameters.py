"""Parameters are trained, not networks: a frozen base stays as it is, wherever it stands."""

from __future__ import annotations

import os
import signal
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from checkpoint_support import checkpoint_of
from engine_support import SHAPE, Headed, Matching, Points, base, denoiser, head_only, prepared
from tests_support import forked
from torch import nn

from distill.data.cond import Cond
from distill.engine.fit import Fit, train
from distill.engine.parallel import units
from distill.engine.params import ParameterSet
from distill.engine.update import Diagnostics, Loss, Update
from distill.stages.monitor import Monitor, Options
from distill.world import World

HEAD = ["net.head.0.bias", "net.head.0.weight", "net.head.3.bias", "net.head.3.weight"]


def fit(method: Any, folder: Path, steps: int = 6, **options: Any) -> Any:
    train(method, Points(), Fit(steps, 16, **options), folder=folder)
    return method


def test_a_head_alone_is_trained_averaged_and_saved(tmp_path: Path) -> None:
    method = head_only()
    before = {name: value.clone() for name, value in method.student.state_dict().items()}
    base_mode = method.student.net.base.training
    fit(method, tmp_path)
    for name, value in method.student.state_dict().items():
        assert torch.equal(value, before[name]) != (name in HEAD), name
    state = checkpoint_of(tmp_path)
    for part in ("networks", "ema"):
        assert all(sorted(tensors) == HEAD for tensors in state[part].values()), part
    assert sorted(state["ema"]) == ["student", "target"]
    assert sorted(state["optimizers"]["student"]) == [f"student.{name}" for name in HEAD]
    for average in method.ema.values():
        assert average.net.base is method.student.net.base, "a second copy of what is frozen"
        assert average.net.gain is method.student.net.gain
        assert not torch.equal(average.net.head[0].weight, method.student.net.head[0].weight)
    assert method.student.net.base.training is base_mode
    assert all(parameter.requires_grad for parameter in method.student.parameters())


def test_the_frozen_part_of_a_trained_network_is_in_eval_mode(tmp_path: Path) -> None:
    method, seen = head_only(), []
    loss = method.loss

    def noted(network: Any, batch: Any, step: Any) -> Loss:
        net = network.net
        seen.append((net.training, net.head[2].training, net.base.training, net.base[3].training))
        found = loss(network, batch, step)
        net.base.train()  # as a callback may: the next step finds the root in training mode, as it left it
        return found

    method.plan = [Update("student", method.plan[0].trains, partial(noted, method.student))]
    method.student_update = method.plan[0]
    fit(method, tmp_path, steps=2)
    assert seen == [(True, True, False, False)] * 2


def test_an_evaluation_leaves_every_module_in_its_mode(tmp_path: Path) -> None:
    method = head_only()
    for network in (method.student, method.ema["student"]):
        network.train()
        network.net.base.eval()
    before = {name: module.training for name, module in method.named_modules()}
    seen: list[bool] = []
    method.diagnostics = lambda batch, draws: seen.append(method.student.net.training) or Diagnostics()
    context = SimpleNamespace(seed=0, world=World(), folder=tmp_path)
    monitor = Monitor(Options(1, {}, {}, count=8, metric=None), context, lambda folder: None, Points())
    monitor._diagnose(method)
    samples, extracted = monitor._sample(method)
    assert samples is not None
    assert (samples.shape, extracted) == ((8, *SHAPE), {})
    assert seen == [False]
    assert {name: module.training for name, module in method.named_modules()} == before


def kill_at(folder: Path, at: int | None) -> None:
    """Train 10 steps, or die in step `at`."""
    method = head_only(dropout=0.1)
    loss = method.loss

    def deadly(network: Any, batch: Any, step: Any) -> Loss:
        if step.iteration == at:
            os.kill(os.getpid(), signal.SIGKILL)
        return loss(network, batch, step)

    method.plan = [Update("student", method.plan[0].trains, partial(deadly, method.student))]
    method.student_update = method.plan[0]
    fit(method, folder / "c", steps=10, checkpoint_every=3)
    state = {**method.student.state_dict(), **{f"ema {k}": v for k, v in method.ema.state_dict().items()}}
    torch.save(state, folder / "end.pt")


def test_a_killed_training_of_a_head_goes_on_bit_equal(tmp_path: Path) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    whole.mkdir()
    parts.mkdir()
    assert forked(kill_at, whole, None) == 0
    assert forked(kill_at, parts, 7) == -signal.SIGKILL
    assert checkpoint_of(parts / "c")["progress"]["step"] == 6
    assert forked(kill_at, parts, None) == 0
    one, other = (torch.load(folder / "end.pt", weights_only=True) for folder in (whole, parts))
    assert len(one) > 20
    assert all(torch.equal(value, other[name]) for name, value in one.items())


def test_sets_that_cannot_be_trained_are_refused_by_name() -> None:
    student, other = denoiser(Headed(base())), denoiser(Headed(base()))
    with pytest.raises(ValueError, match="a: found parameters that are not the network's"):
        ParameterSet.of((student, other.net.head), "a")
    with pytest.raises(ValueError, match="a: found no parameters"):
        ParameterSet.of((student, []), "a")

    class Both(Matching):
        def updates(self):
            parts = (self.student.net.head, self.student.net.base)
            loss = partial(self.loss, self.student)
            return [
                Update(name, {"student": (self.student, part)}, loss)
                for name, part in zip(("student", "fake"), parts, strict=True)
            ]

    with pytest.raises(ValueError, match="updates: fake: student: found other parameters than"):
        prepared(Both(student, other))
    with pytest.raises(ValueError, match="update 'a': mode: found 'test', expected 'train' or 'eval'"):
        Update("a", {"student": student}, lambda batch, step: Loss(torch.zeros(())), mode="test")  # type: ignore[arg-type]


class Whole(Matching):
    """The loss is one of the whole batch, |mean f(x) - mean x0|^2, which no mean over micro batches gives: the gradient at
    each output is found first, and then walked back in each micro batch."""

    calls = 0

    def updates(self):
        return [
            Update(
                "student", {"student": self.part(self.student)}, self.through, before=self.first, mode="eval"
            )
        ]

    def out(self, batch, step):
        return self.student(step.draws.normal("z", SHAPE), step.draws.uniform("t"), batch.cond)

    def first(self, batches, steps):
        self.calls += 1
        with torch.no_grad():
            outs = [self.out(batch, step) for batch, step in zip(batches, steps, strict=True)]
        everything = torch.cat(outs).requires_grad_(True)
        loss = (everything.mean(0) - torch.cat([batch.x0 for batch in batches]).mean(0)).square().sum()
        (gradient,) = torch.autograd.grad(loss, everything)
        for step, part in zip(steps, gradient.split([len(out) for out in outs]), strict=True):
            step.shared["gradient"] = part * len(steps)  # the engine divides by the number of micro batches

    def through(self, batch, step):
        assert not self.student.net.training
        return Loss((self.out(batch, step) * step.shared["gradient"]).sum())


class Direct(Whole):
    """The same in one micro batch, directly."""

    def updates(self):
        return [Update("student", {"student": self.part(self.student)}, self.direct, mode="eval")]

    def direct(self, batch, step):
        return Loss((self.out(batch, step).mean(0) - batch.x0.mean(0)).square().sum())


def test_a_loss_of_the_whole_batch_is_the_same_however_it_is_cut(tmp_path: Path) -> None:
    found = []
    for number, (kind, accumulate) in enumerate(((Direct, 1), (Whole, 1), (Whole, 4))):
        torch.manual_seed(0)
        method = prepared(kind(denoiser(Headed(base()))))
        found.append(fit(method, tmp_path / str(number), accumulate=accumulate))
    assert [method.calls for method in found] == [0, 6, 6]
    for name in HEAD:
        direct, *others = (method.student.state_dict()[name] for method in found)
        assert all(torch.allclose(direct, other, atol=1e-6) for other in others), name


def test_an_update_may_leave_conditions_for_the_next(tmp_path: Path) -> None:
    class Leaving(Matching):
        seen: list[Any]

        def updates(self):
            return [
                Update("student", {"student": self.part(self.student)}, self.leave),
                Update("fake", {"fake": self.part(self.fake)}, self.take),
            ]

        def leave(self, batch, step):
            step.shared["cond"] = Cond.of_labels(torch.full((len(batch),), step.part))
            return self.loss(self.student, batch, step)

        def take(self, batch, step):
            self.seen.append(step.shared["cond"].get("label").unique().tolist() == [step.part])
            return self.loss(self.fake, batch, step)

    method = prepared(Leaving(denoiser(Headed(base())), denoiser(Headed(base()))))
    method.seen = []
    fit(method, tmp_path, steps=2, accumulate=2)
    assert method.seen == [True] * 4


class Block(nn.Module):
    """Of 24 numbers, with a list of parts inside."""

    def __init__(self) -> None:
        super().__init__()
        self.parts = nn.ModuleList([nn.Linear(2, 4), nn.Linear(2, 4)])


def test_units_are_the_blocks_that_a_net_names_else_members_of_lists() -> None:
    """The inner ones first, and only large ones."""
    net = nn.Sequential(nn.Linear(2, 4), nn.ModuleList([Block(), Block()]))
    blocks = list(net[1])
    assert units(net, least=24) == blocks[::-1]
    assert units(net, least=1)[-2:] == blocks[::-1], "parts of blocks stand before them"
    assert {*units(net, least=1)} == {*blocks, *(part for block in blocks for part in block.parts)}
    net[1]._no_split_modules = ["Block"]
    assert units(net, least=1) == blocks[::-1]
    assert units(net, least=25) == []
