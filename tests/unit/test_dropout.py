"""Nets with dropout: student and target drop the same units, teachers none, a resumed run what an uninterrupted one does."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from method_support import draws, optim, ring_batch, state, step
from torch import Tensor, nn

from distill.data.cond import Cond
from distill.data.points import Points
from distill.engine.fit import Fit, train
from distill.engine.module import DistillModule
from distill.engine.networks import seeded
from distill.engine.update import Step
from distill.methods.consistency import Consistency
from distill.methods.consistency_training import ConsistencyTraining
from distill.methods.dmd import DMD
from distill.methods.flow_matching import FlowMatching
from distill.methods.guided import Guided
from distill.methods.lcm import LCM
from distill.methods.progressive import Progressive
from distill.methods.sid import SiD
from distill.models.denoiser import Denoiser
from distill.process.base import Process
from distill.process.edm import EDM
from distill.process.flow import Flow
from distill.process.vp import VPCosine, VPScaledLinear


class Dropped(nn.Module):
    """A net that loses half of its hidden units, and keeps the masks that it has drawn. It does not see the time."""

    num_classes = 0

    def __init__(self, width: int = 64, masks: list[tuple[bool, Tensor]] | None = None) -> None:
        super().__init__()
        self.first, self.last, self.drop = nn.Linear(2, width), nn.Linear(width, 2), nn.Dropout(0.5)
        self.masks = masks

    def forward(self, x: Tensor, t: Tensor, cond: Cond) -> Tensor:
        mask = self.drop(torch.ones(len(x), self.first.out_features))
        if self.masks is not None:
            self.masks.append((self.training, mask))
        return self.last(torch.tanh(self.first(x)) * mask)


def dropped(process: Process, kind: str, seed: int = 0, masks: list[Any] | None = None) -> Denoiser:
    torch.manual_seed(seed)
    return Denoiser(Dropped(masks=masks), process, kind, (2,))


def prepared(method: DistillModule, seed: int = 5) -> DistillModule:
    method.prepare({update.name: optim() for update in method.updates()}, seed=seed)
    return method


TABLE = VPScaledLinear()
CONSISTENT: dict[str, tuple[Process, str, Callable[[Denoiser, Denoiser], DistillModule]]] = {
    "consistency": (Flow(), "velocity", Consistency),
    "consistency, target": (EDM(), "x0", lambda s, t: Consistency(s, t, target_decay=0.9)),
    "cm": (EDM(), "x0", lambda s, t: ConsistencyTraining(s, curriculum="cm", total_steps=100)),
    "ict": (EDM(), "x0", lambda s, t: ConsistencyTraining(s, curriculum="ict", total_steps=100)),
    "ect": (VPCosine(), "v", lambda s, t: ConsistencyTraining(s, curriculum="ect", total_steps=100)),
    "lcm": (TABLE, "v", lambda s, t: LCM(s, t, w_min=0, w_max=0, target_decay=0.0)),
    "lcm, target": (TABLE, "v", lambda s, t: LCM(s, t, w_min=0, w_max=0, target_decay=0.9)),
}


@pytest.mark.parametrize("name", CONSISTENT)
def test_student_and_target_drop_the_same_units(name: str, tmp_path: Path) -> None:
    process, kind, make = CONSISTENT[name]
    student, teacher = dropped(process, kind, 1), dropped(process, kind)
    student.net.masks, teacher.net.masks = mine, its = [], []
    method = prepared(make(student, teacher))
    for network in method.frozen.values():  # copies of what was given, with lists of their own
        network.net.masks = its
    for average in method.ema.values():
        average.net.masks = mine
    train(method, points(), Fit(steps=2, batch_size=16), folder=tmp_path, config={})
    assert len(mine) == 4, "a target and a prediction in each of two steps"
    for (target_mode, target), (mode, prediction) in (mine[:2], mine[2:]):
        assert (target_mode, mode) == (True, True)
        assert torch.equal(target, prediction)
        assert 0 < (target == 0).float().mean() < 1
        assert len(torch.unique(target, dim=0)) == len(target), "each sample has a mask of its own"
    assert not torch.equal(mine[0][1], mine[2][1]), "each step has masks of its own"
    assert not any(training for training, _ in its), "a teacher drops nothing"
    assert all((mask == 1).all() for _, mask in its)


def test_the_loss_of_one_state_is_zero_in_spite_of_dropout() -> None:
    student, teacher = dropped(Flow(), "velocity", 1), dropped(Flow(), "velocity")
    method = prepared(Consistency(student, teacher, loss="l2"))
    method.levels = torch.full((18,), 0.5, dtype=torch.float64)  # t = u: x_u is x_t
    method.student.train()
    assert method.loss(ring_batch(), step()).total.item() == 0
    other = Step(0, draws(), part=1)
    x, t = ring_batch().x0, torch.full((32,), 0.5)

    def ask(at: Step, name: str = "dropout") -> Tensor:
        with at.same_dropout(name):
            return method.student.x0(x, t, Cond.nothing(32))

    assert torch.equal(ask(step()), ask(step()))
    for elsewhere in (ask(other), ask(Step(1, draws().named("other"))), ask(step(), "another")):
        assert not torch.equal(ask(step()), elsewhere)


def points() -> Points:
    return Points(ring={"count": 8, "radius": 1.5}, count=64)


RESUMED: dict[str, tuple[Process, str, Callable[[Denoiser, Denoiser], DistillModule]]] = {
    "flow_matching": (Flow(), "velocity", lambda s, t: FlowMatching(s)),
    "consistency": (Flow(), "velocity", lambda s, t: Consistency(s, t, target_decay=0.9)),
    "ect": (Flow(), "velocity", lambda s, t: ConsistencyTraining(s, total_steps=6)),
    "progressive": (VPCosine(), "v", lambda s, t: Progressive(s, t, steps=4)),
    "guided": (VPCosine(), "v", Guided),
    "lcm": (TABLE, "v", lambda s, t: LCM(s, t, w_min=0, w_max=0)),
    "sid": (Flow(), "velocity", SiD),
    "dmd": (Flow(), "velocity", lambda s, t: DMD(s, t, updates={"fake_per_student": 2})),
}


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("name", RESUMED)
def test_a_resumed_run_drops_what_an_uninterrupted_one_does(
    name: str, accumulate: int, tmp_path: Path
) -> None:
    process, kind, make = RESUMED[name]

    def method() -> DistillModule:
        return prepared(make(dropped(process, kind, 1), dropped(process, kind)))

    def go(folder: str, steps: int) -> dict[str, Tensor]:
        running = method()
        fit = Fit(steps=steps, batch_size=16, accumulate=accumulate)
        train(running, points(), fit, folder=tmp_path / folder, config={})
        return state(running)

    whole = go("whole", 4)
    go("parts", 2)
    torch.rand(1234)  # another process has drawn other numbers
    continued = go("parts", 4)
    assert whole.keys() == continued.keys()
    assert all(torch.equal(whole[key], continued[key]) for key in whole)
    torch.rand(99)
    again = go("again", 4)
    assert all(torch.equal(whole[key], again[key]) for key in whole)


def test_the_masks_follow_from_the_seed(tmp_path: Path) -> None:
    found = []
    for seed in (0, 1):
        running = prepared(FlowMatching(dropped(Flow(), "velocity", 1)), seed=seed)
        running.student.net.masks = masks = []
        train(
            running,
            points(),
            Fit(steps=1, batch_size=16, accumulate=2),
            folder=tmp_path / str(seed),
            config={},
        )
        assert not torch.equal(masks[0][1], masks[1][1]), "micro batches have masks of their own"
        found.append(masks[0][1])
    assert not torch.equal(*found)


def test_torch_s_numbers_go_on_outside_as_if_nothing_had_been_drawn() -> None:
    torch.manual_seed(3)
    wanted = torch.rand(2)
    torch.manual_seed(3)
    first = torch.rand(1)
    with seeded(torch.device("cpu"), 7):
        inside = torch.rand(5)
        with seeded(torch.device("cpu"), 7):
            assert torch.equal(torch.rand(5), inside)
        after = torch.rand(5)
    assert torch.equal(torch.cat([first, torch.rand(1)]), wanted)
    with seeded(torch.device("cpu"), 7):
        assert torch.equal(torch.rand(5), inside)
        assert torch.equal(torch.rand(5), after)
    with pytest.raises(KeyError), seeded(torch.device("cpu"), 7):
        raise KeyError
    assert not torch.equal(torch.rand(1), inside[:1])


def test_what_is_not_trained_in_an_update_drops_nothing(tmp_path: Path) -> None:
    """The fake score learns, and is asked in the student's update; each net drops units in its own update alone."""
    student, teacher = dropped(Flow(), "velocity", 1), dropped(Flow(), "velocity")
    student.net.masks, teacher.net.masks = mine, its = [], []
    method = prepared(SiD(student, teacher))
    method.fake.net.masks = fake = []
    method.frozen["teacher"].net.masks = its
    train(method, points(), Fit(steps=1, batch_size=16), folder=tmp_path, config={})
    assert [mode for mode, _ in mine] == [False, True], "asked in the fake score's update, then trained"
    assert [mode for mode, _ in fake] == [True, False], "trained, then asked in the student's update"
    assert [mode for mode, _ in its] == [False]


def test_a_generator_that_is_set_to_evaluate_does_not_stop_dropout(tmp_path: Path) -> None:
    """A view of the trained net shares its mode."""
    running = prepared(FlowMatching(dropped(Flow(), "velocity", 1)))
    running.ema.pop("student")
    running.student.net.masks = masks = []

    class Watching:
        def due(self, before: int, now: int) -> bool:
            return True

        def resume(self, step: int) -> None:
            pass

        def __call__(self, module: DistillModule) -> dict[str, float]:
            module.as_generator().denoiser.eval()
            return {}

    watching: Any = Watching()
    running.optim = {"student": optim(ema=None)}
    train(running, points(), Fit(steps=2, batch_size=16), folder=tmp_path, config={}, evaluation=watching)
    assert [mode for mode, _ in masks] == [True, True]


def test_copies_of_a_net_with_dropout_are_what_they_were() -> None:
    teacher = dropped(Flow(), "velocity").train()
    before = copy.deepcopy(teacher.state_dict())
    method = Consistency(dropped(Flow(), "velocity", 1), teacher)
    assert teacher.training
    assert not method.teacher.training
    assert all(torch.equal(before[key], value) for key, value in teacher.state_dict().items())
