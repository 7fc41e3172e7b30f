"""The engine: updates derive everything else; a dummy method with two networks and two optimizers shows
it."""

from __future__ import annotations

import copy
import math
from collections import Counter, OrderedDict, defaultdict
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from checkpoint_support import checkpoint_of, content, flip, last, opened
from lightning.pytorch.callbacks import Callback
from torch import nn

from distill.data.batch import Batch
from distill.data.cond import Cond
from distill.engine import checkpoint
from distill.engine.ema import decay_at
from distill.engine.fit import Fit, train
from distill.engine.module import DistillModule
from distill.engine.schedule import Constant, Cosine, Linear
from distill.engine.update import Loss, Optim, Update
from distill.models.denoiser import Denoiser
from distill.models.result import Result
from distill.models.spec import SamplerSpec
from distill.process.flow import Flow


class Affine(nn.Module):
    """x -> w x + b, elementwise over [B,4]."""

    def __init__(self) -> None:
        super().__init__()
        self.w, self.b = nn.Parameter(torch.ones(4)), nn.Parameter(torch.zeros(4))

    def forward(self, x, t, cond):
        return self.w * x + self.b


class Two(DistillModule):
    """A student every second iteration and a fake net every iteration, which sees what the student left in
    `shared`."""

    def __init__(self, student, teacher):
        super().__init__(student)
        self.fake = Denoiser(copy.deepcopy(teacher.net), Flow(), "velocity", (4,))
        self.teacher = self.keep_frozen("teacher", teacher)
        self.seen = []

    def updates(self):
        return [
            Update("student", {"student": self.student}, self.student_loss, every=2),
            Update("fake", {"fake": self.fake}, self.fake_loss),
        ]

    def result(self):
        return Result(SamplerSpec(steps=1, any_steps=True), "independent")

    def student_loss(self, batch, step):
        x = self.student(step.draws.normal("z", (4,)), step.draws.uniform("t"), batch.cond)
        step.shared["x"] = x.detach()
        # The gradient flows through the fake net's input while its weights are frozen.
        return Loss(
            (self.fake(x, x[:, 0], batch.cond) - 0.5 * self.teacher(x, x[:, 0], batch.cond) + batch.x0)
            .square()
            .mean()
        )

    def fake_loss(self, batch, step):
        self.seen.append(
            (
                step.iteration,
                "x" in step.shared,
                self.student.net.w.requires_grad,
                self.fake.net.w.requires_grad,
            )
        )
        z = step.shared.get("x", step.draws.normal("z", (4,)))
        return Loss((self.fake(z, z[:, 0], batch.cond) - batch.x0).square().mean(), {"mean": z.mean()})


class Points:
    """40 points in 4 dimensions."""

    sample_shape = (4,)
    data = torch.randn(40, 4, generator=torch.Generator().manual_seed(2))

    def __len__(self):
        return 40

    def fetch(self, rows, index):
        return Batch(rows, index, Cond.nothing(len(rows)), x0=self.data[rows])

    def fingerprint(self):
        return "points"


def settings(**changes) -> Optim:
    return Optim(
        **{"optimizer": partial(torch.optim.AdamW, lr=0.05), "schedule": Constant(), "clip": 1.0, "ema": 0.9}
        | changes
    )


def make(**changes) -> Two:
    torch.manual_seed(0)
    nets = [Denoiser(Affine(), Flow(), "velocity", (4,)) for _ in range(2)]
    for parameter in nets[1].parameters():
        nn.init.normal_(parameter)
    method = Two(*nets)
    method.prepare({"student": settings(**changes), "fake": settings(ema=None)}, seed=5)
    return method


def weights(method: Two) -> dict[str, torch.Tensor]:
    return {
        f"{part}.{k}": v.clone()
        for part, m in (("net", method.student), ("ema", method.ema["student"]), ("fake", method.fake))
        for k, v in m.state_dict().items()
    }


def fit(method: Two, folder: Path, steps: int, **options) -> Two:
    train(method, Points(), Fit(steps=steps, batch_size=8, **options), folder=folder, config={"a": 1})
    return method


def test_two_updates_share_one_iteration(tmp_path):
    method = fit(make(), tmp_path, steps=5)
    assert method.progress.step == 5
    assert method.progress.iteration == 9  # the student runs at 0, 2, 4, 6, 8
    assert method.progress.images == 40
    assert [seen[0] for seen in method.seen] == list(range(9))
    assert [seen[1] for seen in method.seen] == [i % 2 == 0 for i in range(9)]
    assert all(
        seen[2:] == (False, True) for seen in method.seen
    )  # only what the update trains receives gradients


def test_frozen_networks_are_neither_registered_nor_saved(tmp_path):
    method = fit(make(), tmp_path, steps=3)
    assert not any("teacher" in name for name, _ in method.named_parameters())
    state = checkpoint_of(tmp_path)
    assert sorted(state) == [
        "ema",
        "method",
        "networks",
        "nonfinite",
        "optimizers",
        "progress",
        "record",
        "sampler",
        "threads",
        "torch",
    ]
    assert sorted(state["networks"]) == ["fake", "student"]
    assert sorted(state["ema"]) == ["student"]
    assert sorted(state["optimizers"]) == ["fake", "student"]
    assert all(p.grad is None and not p.requires_grad for p in method.frozen["teacher"].parameters())


def test_continuing_equals_not_stopping(tmp_path):
    whole = weights(fit(make(), tmp_path / "whole", steps=12))
    fit(make(), tmp_path / "parts", steps=7)
    parts = fit(make(), tmp_path / "parts", steps=12)
    assert parts.progress.step == 12
    for name, value in weights(parts).items():
        assert torch.equal(value, whole[name]), name


def test_accumulation_equals_the_whole_batch(tmp_path):
    whole, parts = (weights(fit(make(), tmp_path / str(k), steps=6, accumulate=k)) for k in (1, 4))
    for name, value in parts.items():
        assert torch.allclose(value, whole[name], atol=1e-6), name
    assert any(not torch.equal(value, weights(make())[name]) for name, value in parts.items())


@pytest.mark.parametrize("twice", [False, True])
def test_clip_bounds_the_step_and_ema_follows(tmp_path, twice):
    """Also where an update trains the same parameters in two roles."""
    before = weights(make())
    method = make(optimizer=partial(torch.optim.SGD, lr=1.0), clip=1e-3, ema=0.5, ema_ramp=False)
    if twice:
        both = {"student": method.student, "again": method.student.with_()}
        method.updates = lambda: [Update("student", both, method.student_loss)]
        method.prepare({"student": method.optim["student"]}, seed=5)
    after = weights(fit(method, tmp_path, steps=1))
    moved = torch.cat([after[f"net.net.{k}"] - before[f"net.net.{k}"] for k in "wb"])
    assert torch.isclose(moved.norm(), torch.tensor(1e-3), rtol=1e-3)
    for k in "wb":
        middle = (after[f"net.net.{k}"] + before[f"net.net.{k}"]) / 2
        assert torch.allclose(after[f"ema.net.{k}"], middle, atol=1e-7)


class Flaky(Two):
    """Its fake loss is not a number in every 20th iteration, and in iterations 200 to 299 in every 10th."""

    def fake_loss(self, batch, step):
        every = 10 if 200 <= step.iteration < 300 else 20
        bad = step.iteration % every == 0
        return Loss(super().fake_loss(batch, step).total * (math.nan if bad else 1.0))


@pytest.mark.slow
def test_too_many_nonfinite_steps_of_a_thousand_end_the_run(tmp_path):
    def flaky():
        torch.manual_seed(0)
        method = Flaky(*(Denoiser(Affine(), Flow(), "velocity", (4,)) for _ in range(2)))
        method.prepare({"student": settings(), "fake": settings(ema=None)}, seed=5)
        return method

    fine = fit(flaky(), tmp_path / "fine", steps=510, checkpoint_every=40, max_nonfinite_share=0.06)
    assert fine.nonfinite.to_dict() == {"student": [0, 0, 0], "fake": [56, 0, 1]}
    # 50 are allowed; with five more in 200 .. 299 the 51st is iteration 900, in whichever session it comes.
    fit(flaky(), tmp_path / "parts", steps=400, checkpoint_every=40)
    with pytest.raises(
        FloatingPointError, match=r"'fake'.*in 51 of at most 1000 steps.*step_0000440 at step 440"
    ):
        fit(flaky(), tmp_path / "parts", steps=510, checkpoint_every=40)


def test_schedules_and_ramp():
    assert [Constant(2)(s) for s in range(3)] == [0.5, 1.0, 1.0]
    linear, cosine = Linear(total=10, warmup=2), Cosine(total=10, warmup=2, final=0.1)
    assert (linear(0), linear(2), linear(6), linear(10)) == (0.5, 1.0, 0.5, 0.0)
    assert (cosine(2), cosine(10)) == (1.0, pytest.approx(0.1))
    assert cosine(6) == pytest.approx(0.55)
    assert decay_at(0, 0.999, True) == pytest.approx(2 / 11)
    assert decay_at(10**6, 0.999, True) == 0.999
    assert decay_at(0, 0.999, False) == 0.999


def test_errors_name_the_field(tmp_path):
    method = make()
    with pytest.raises(
        ValueError,
        match=r"optim: found settings for \['student'\], this method has .* expected optim.fake too",
    ):
        method.prepare({"student": settings()}, seed=0)
    with pytest.raises(ValueError, match=r"optim.studnt: no such key, did you mean optim.student\?"):
        method.prepare({"studnt": settings(), "fake": settings()}, seed=0)
    with pytest.raises(ValueError, match="batch_size: found 8, which cannot be split into accumulate=3"):
        fit(make(), tmp_path, steps=1, accumulate=3)
    with pytest.raises(ValueError, match="trains no network"):
        Update("student", {}, method.student_loss)
    fit(make(), tmp_path / "a", steps=2)
    found = opened(tmp_path / "a")
    found.state["ema"].remove("student")
    with pytest.raises(ValueError, match=r"ema: found \[\], this method has \['student'\]"):
        checkpoint.begin(found, make())
    (last(tmp_path / "a") / "state.pt").write_bytes(b"half a file")
    with pytest.raises(
        ValueError, match=r"not a readable checkpoint \(state.pt: found 11 bytes, expected \d+\)"
    ):
        fit(make(), tmp_path / "a", steps=3)


def test_weights_that_are_not_finite_never_replace_a_checkpoint(tmp_path):
    method = fit(make(), tmp_path, steps=2)
    good = content(tmp_path)
    with torch.no_grad():
        method.fake.net.b[0] = float("inf")
    with pytest.raises(
        FloatingPointError,
        match=r"network 'fake': weights are not finite; last good checkpoint: .*step_0000002",
    ):
        checkpoint.save(tmp_path, method, {})
    assert content(tmp_path) == good


class Text(str):
    """A string of another class."""


class Keeping(Callback):
    """A callback with the state `kept`."""

    def __init__(self, kept) -> None:
        self.kept = kept

    def state_dict(self):
        return self.kept


UNREADABLE = {
    r"\['a'\]\[0\]: found PosixPath": {"a": [Path("x")]},
    r"\['a'\]: found defaultdict": {"a": defaultdict(int, b=1)},
    r"\['a'\]: found Counter": {"a": Counter("ab")},
    r": found the key PosixPath\('x'\) \(PosixPath\)": {Path("x"): 1},
    r"\['a'\]: found Text": {"a": Text("b")},
    r": found the key 'b' \(Text\)": {Text("b"): 1},
    r"\['a'\]: found float64": {"a": np.float64(1)},
    r"\['a'\]\[0\]: found set": {"a": ({1},)},
}


def test_a_state_that_cannot_be_read_again_never_replaces_a_checkpoint(tmp_path):
    method = fit(make(), tmp_path, steps=1)
    before, record = content(tmp_path), checkpoint_of(tmp_path)["record"]
    for message, kept in UNREADABLE.items():
        with pytest.raises(ValueError, match="callbacks: Keeping: state_dict" + message):
            checkpoint.save(tmp_path, method, record, [Keeping(kept)])
    method.state = lambda: {"a": Text("b")}
    with pytest.raises(ValueError, match=r"method\['a'\]: found Text"):
        checkpoint.save(tmp_path, method, record)
    assert content(tmp_path) == before
    method.state = dict
    kept = {"a": OrderedDict(b=(1, None, True)), 3: [1.5, nn.Parameter(torch.ones(2))], "": {}}
    checkpoint.save(tmp_path, method, record, [Keeping(kept)])
    found = checkpoint_of(tmp_path)["callbacks"]["Keeping"]
    assert torch.equal(found[3].pop(), kept[3].pop())
    assert found == kept


@pytest.mark.parametrize("name", ["shard_00000.safetensors", "state.pt", "MANIFEST.json"])
def test_a_flipped_bit_is_found_and_the_checkpoint_before_continued(tmp_path, name):
    """With the end of an unbroken training; without an earlier checkpoint, training is refused."""
    fit(make(), tmp_path / "whole", steps=6)
    fit(make(), tmp_path / "a", steps=4, checkpoint_every=2)
    assert [p.name for p in sorted((tmp_path / "a").iterdir())] == ["step_0000002", "step_0000004"]
    flip(tmp_path / "a/step_0000004" / name)
    (tmp_path / "a/.step_0000005.part").mkdir()
    (tmp_path / "a/.step_0000005.part/state.pt").write_bytes(b"half")
    message = (
        rf"step_0000004: not a readable checkpoint \({name}: .*\): deleted, and an earlier one continued"
    )
    with pytest.warns(UserWarning, match=message):
        method = fit(make(), tmp_path / "a", steps=6, checkpoint_every=100)
    assert [p.name for p in sorted((tmp_path / "a").iterdir())] == ["step_0000002", "step_0000006"]
    whole = checkpoint_of(tmp_path / "whole")
    for role, own in checkpoint_of(tmp_path / "a")["networks"].items():
        assert all(torch.equal(value, whole["networks"][role][key]) for key, value in own.items())
    assert method.progress.step == 6
    for folder in (tmp_path / "a").iterdir():
        (folder / name).unlink()
    with pytest.raises(
        checkpoint.Refused, match=rf"step_0000006: .*\({name}: missing.*step_0000002: .*{name}: missing"
    ):
        fit(make(), tmp_path / "a", steps=8)


def test_a_network_is_in_training_mode_in_its_own_update_alone(tmp_path):
    """What another update trains is asked as it will be used, without dropout."""
    method, modes = make(), []

    def noting(name):
        plain = getattr(method, name)

        def noted(batch, step):
            modes.append((name, method.student.training, method.fake.training, method.teacher.training))
            return plain(batch, step)

        return noted

    for name in ("student_loss", "fake_loss"):
        setattr(method, name, noting(name))
    method.prepare({"student": settings(), "fake": settings(ema=None)}, seed=5)
    fit(method, tmp_path, steps=2)
    assert modes == [
        ("student_loss", True, False, False),
        ("fake_loss", False, True, False),
        ("fake_loss", False, True, False),
        ("student_loss", True, False, False),
        ("fake_loss", False, True, False),
    ]
