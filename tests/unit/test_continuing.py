"""What `train` believes when it goes on from a checkpoint: its own training and nothing else, also without a recipe."""

from __future__ import annotations

import math
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_support import checkpoint_of, content, edited, former_file, last
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers.logger import DummyLogger
from test_engine import Affine, Points, Two, fit, make, settings, weights

from distill.engine import checkpoint
from distill.engine.fit import Fit, train
from distill.engine.former import content_digest
from distill.engine.schedule import Constant, Linear
from distill.engine.stored import FORMER
from distill.engine.update import Loss, Optim, Update
from distill.methods.disback import DisBack
from distill.models.denoiser import Denoiser
from distill.process.flow import Flow


class Scaled(Two):
    """With an option, a list of further settings and a network that it keeps to itself."""

    def __init__(self, student: Denoiser, teacher: Denoiser, scale: float = 1.0, extra: Any = None) -> None:
        super().__init__(student, teacher)
        self.scale = scale

    def student_loss(self, batch, step):
        return Loss(self.scale * super().student_loss(batch, step).total)


class Others(Points):
    """The same points with one number changed, under the same length."""

    data = Points.data.clone()
    data[17, 2] += 0.5

    def fingerprint(self):
        return "others"


class Nameless:
    """A source without a fingerprint."""

    sample_shape, num_classes = (4,), 0

    def __init__(self, data: torch.Tensor) -> None:
        self.data = data

    def __len__(self):
        return len(self.data)

    fetch = Points.fetch


def nets(seed: int = 0, teacher: int = 1) -> list[Denoiser]:
    made = []
    for number in (seed, teacher):
        torch.manual_seed(number)
        net = Denoiser(Affine(), Flow(), "velocity", (4,))
        for parameter in net.parameters():
            torch.nn.init.normal_(parameter)
        made.append(net)
    return made


def call(folder: Path, steps: int = 3, **changes: Any) -> dict[str, torch.Tensor]:
    """One call of `train` as from a notebook; `changes` say what differs from the usual one."""
    given = {
        "seed": 5,
        "stream": "train",
        "source": Points(),
        "lr": 0.05,
        "schedule": Constant(),
        "nets": nets(),
    }
    given |= {
        "batch_size": 8,
        "accumulate": 1,
        "precision": "32-true",
        "options": {},
        "optimizer": None,
    } | changes
    student, teacher = given["nets"]
    method = Scaled(student, teacher, **given["options"])
    optimizer = given["optimizer"] or partial(torch.optim.AdamW, lr=given["lr"])
    optim = {"student": settings(optimizer=optimizer, schedule=given["schedule"]), "fake": settings(ema=None)}
    method.prepare(optim, seed=given["seed"], stream=given["stream"])
    length = Fit(steps, given["batch_size"], given["accumulate"], given["precision"])
    train(method, given["source"], length, folder=folder)
    return weights(method)


def rate(lr: float) -> Any:
    return lambda parameters: torch.optim.AdamW(parameters, lr=lr)


OTHER: dict[str, tuple[dict[str, Any], str]] = {
    "seed": ({"seed": 6}, "seed: found 5, expected 6"),
    "stream": ({"stream": "other"}, "stream: found 'train', expected 'other'"),
    "rate": ({"lr": 0.1}, r"optim.student.groups: .*0.05.*0.1"),
    "optimizer": (
        {"optimizer": partial(torch.optim.Adam, lr=0.05)},
        "optim.student.optimizer: found .*AdamW",
    ),
    "schedule": ({"schedule": Constant(2)}, "optim.student.schedule.fields.warmup: found 0, expected 2"),
    "data": ({"source": Others()}, "data: are not those that it was trained on"),
    "data without a name": ({"source": Nameless(Points.data)}, "data: are not those"),
    "batch size": ({"batch_size": 4}, "batch_size: found 8, expected 4"),
    "accumulation": ({"accumulate": 2}, "accumulate: found 1, expected 2"),
    "precision": ({"precision": "bf16-mixed"}, "precision: found '32-true', expected 'bf16-mixed'"),
    "option": ({"options": {"scale": 2.0}}, r"options.scale: found '\(absent\)', expected 2.0"),
    "start": ({"nets": nets(7, 1)}, "student: began with other weights"),
    "teacher": ({"nets": nets(0, 7)}, "teacher: began with other frozen weights"),
}


@pytest.fixture(scope="module")
def begun(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("begun")
    call(folder)
    return folder


@pytest.mark.parametrize("name", list(OTHER))
def test_a_checkpoint_of_another_training_is_refused_by_name(begun: Path, name: str) -> None:
    changes, message = OTHER[name]
    before = content(begun)
    with pytest.raises(
        checkpoint.Refused, match=f"step_0000003: is the checkpoint of another training: .*{message}"
    ):
        call(begun, steps=6, **changes)
    assert content(begun) == before


def test_the_same_training_goes_on_in_whatever_way_it_is_written(begun: Path, tmp_path: Path) -> None:
    shutil.copytree(begun, tmp_path / "parts")
    parts, whole = call(tmp_path / "parts", steps=6, lr=5e-2), call(tmp_path / "whole", steps=6)
    assert all(torch.equal(parts[name], whole[name]) for name in whole)


def test_functions_without_a_name_are_told_apart(tmp_path: Path) -> None:
    """Two lambdas share a name; a rate may stand in the code or in what the function closes over."""
    call(tmp_path, optimizer=rate(0.05), options={"extra": lambda x: x + 1}, schedule=lambda step: 1.0)
    call(tmp_path, optimizer=rate(0.05), options={"extra": lambda x: x + 1}, schedule=lambda step: 1.0)
    for changes in (
        {"optimizer": rate(0.1)},
        {"options": {"extra": lambda x: x + 2}},
        {"schedule": lambda step: 0.5},
    ):
        usual = {"optimizer": rate(0.05), "options": {"extra": lambda x: x + 1}, "schedule": lambda step: 1.0}
        with pytest.raises(checkpoint.Refused, match="another training"):
            call(tmp_path, **usual | changes)


def test_data_without_a_fingerprint_are_known_by_their_samples(tmp_path: Path) -> None:
    call(tmp_path, source=Nameless(Points.data))
    call(tmp_path, source=Nameless(Points.data.clone()))
    with pytest.raises(checkpoint.Refused, match="data: are not those"):
        call(tmp_path, source=Nameless(Others.data))


def test_a_network_given_as_an_option_is_known_by_its_weights(tmp_path: Path) -> None:
    call(tmp_path, options={"extra": nets(3)[0]})
    call(tmp_path, options={"extra": nets(3)[0]})
    with pytest.raises(checkpoint.Refused, match=r"options.extra.weights"):
        call(tmp_path, options={"extra": nets(4)[0]})


def test_the_same_method_object_goes_on_and_does_not_train_elsewhere(tmp_path: Path) -> None:
    method = fit(make(), tmp_path / "a", steps=3)
    fit(method, tmp_path / "a", steps=5)
    assert method.progress.step == 5
    whole = fit(make(), tmp_path / "whole", steps=5)
    assert all(torch.equal(value, weights(method)[name]) for name, value in weights(whole).items())
    with pytest.raises(
        checkpoint.Refused, match=r"b: has no checkpoint, but this method was trained for 5 steps"
    ):
        fit(method, tmp_path / "b", steps=5)
    # Prepared again, it is another training, from its weights.
    method.prepare({"student": settings(), "fake": settings(ema=None)}, seed=5)
    fit(method, tmp_path / "b", steps=2)
    assert method.progress.step == 2
    again = make()
    again.load_state_dict(method.state_dict())
    again.prepare({"student": settings(), "fake": settings(ema=None)}, seed=5)
    fit(again, tmp_path / "b", steps=3)  # other weights at the start, but those of the checkpoint
    assert again.progress.step == 3


def test_fewer_steps_than_planned_are_refused(begun: Path) -> None:
    with pytest.raises(checkpoint.Refused, match="steps: found 2, but the training was planned to 3"):
        call(begun, steps=2)


def test_longer_training_leaves_seams_and_a_schedule_over_its_length_may_follow(tmp_path: Path) -> None:
    call(tmp_path, 4, schedule=Linear(4))
    call(tmp_path, 8, schedule=Linear(8))
    call(tmp_path, 10, schedule=Linear(8))
    record = checkpoint_of(tmp_path)["record"]
    assert (record["steps"], record["seams"]) == (
        10,
        [{"steps": 4, "reached": 4}, {"steps": 8, "reached": 8}],
    )
    with pytest.raises(checkpoint.Refused, match=r"schedule.fields.total: found 8, expected 9"):
        call(tmp_path, 12, schedule=Linear(9))


EDITS: list[Any] = [
    lambda s: s["networks"]["student"]["net.w"].add_(1e-3),
    lambda s: s["ema"]["student"]["net.b"].zero_(),
    lambda s: s["optimizers"]["fake"]["fake.net.w"]["exp_avg"].zero_(),
    lambda s: s["progress"].update(seconds=0.0),
    lambda s: s["nonfinite"].update(student=[1, 0, 0]),
    lambda s: s["record"]["made"].update(seed=6),
]


@pytest.mark.parametrize("number", range(len(EDITS)))
def test_an_edited_checkpoint_is_refused(begun: Path, tmp_path: Path, number: int) -> None:
    edited(begun, tmp_path, EDITS[number])
    with pytest.raises(checkpoint.Refused, match=r"not a readable checkpoint .*(sha256|bytes)"):
        call(tmp_path, steps=6)


def test_a_mixture_of_two_checkpoints_is_refused(begun: Path, tmp_path: Path) -> None:
    call(tmp_path / "longer", steps=5)
    shutil.copytree(begun, tmp_path / "mixed")
    shard = next(last(tmp_path / "longer").glob("shard_*"))
    shutil.copyfile(shard, last(tmp_path / "mixed") / shard.name)
    with pytest.raises(checkpoint.Refused, match="does not fit its sha256"):
        call(tmp_path / "mixed", steps=6)


NUMBERS: list[tuple[Any, str]] = [
    (lambda s: s["progress"].update(step=4), r"progress.step: found 4, expected 3 after 5 iterations"),
    (lambda s: s["progress"].update(iteration=9), r"progress.step: found 3, expected 5 after 9 iterations"),
    (lambda s: s["progress"].update(images=8), r"progress.images: found 8, expected 24"),
    (lambda s: s["progress"].update(step=3.0), r"progress.step: found 3.0, expected int"),
    (lambda s: s["progress"].update(speed=3), r"progress.speed: no such key"),
    (lambda s: s["nonfinite"].update(student=[7, 0, 0]), r"nonfinite.student: found \[7, 0, 0\]"),
    (
        lambda s: s["optimizers"]["fake"]["fake.net.w"]["step"].add_(2),
        r"optimizers.fake: found 7 steps, expected 5",
    ),
    (lambda s: s["record"].update(steps=2), r"progress.step: found 3, expected at most the planned 2"),
]


@pytest.mark.parametrize("number", range(len(NUMBERS)))
def test_numbers_that_do_not_agree_are_refused_even_with_a_fitting_digest(
    begun: Path, tmp_path: Path, number: int
) -> None:
    change, message = NUMBERS[number]
    edited(begun, tmp_path, change, certified=True)
    with pytest.raises(checkpoint.Refused, match=message):
        call(tmp_path, steps=6)


def test_the_file_of_an_earlier_version_is_continued(begun: Path, tmp_path: Path) -> None:
    whole = call(tmp_path / "whole", steps=6)
    former_file(begun, tmp_path / "parts")
    parts = call(tmp_path / "parts", steps=6)
    assert all(torch.equal(parts[name], whole[name]) for name in whole)
    assert [path.name for path in sorted((tmp_path / "parts").iterdir())] == ["last.ckpt", "step_0000006"]
    call(tmp_path / "parts", steps=8)
    assert [p.name for p in sorted((tmp_path / "parts").iterdir())] == ["step_0000006", "step_0000008"]


FORMER_FILES: list[tuple[Any, str]] = [
    (lambda s: s["networks"]["fake"]["net.w"].fill_(math.nan), r"network 'fake': weights are not finite"),
    (lambda s: s["ema"]["student"]["net.w"].fill_(math.inf), r"average 'student': weights are not finite"),
    (
        lambda s: s["optimizers"]["fake"]["fake.net.b"]["exp_avg_sq"].fill_(math.inf),
        r"optimizer 'fake': exp_avg_sq of fake.net.b is not finite",
    ),
    (lambda s: s.pop("ema"), r"not a readable checkpoint \(ema: missing\)"),
    (lambda s: s.update(schema=1), "schema: found 1, expected 2: an earlier version wrote it"),
]


def test_the_file_of_an_earlier_version_says_what_is_wrong(begun: Path, tmp_path: Path) -> None:
    for change, message in FORMER_FILES:
        state = torch.load(former_file(begun, tmp_path), weights_only=True)
        del state["sha256"]
        change(state)
        torch.save(state | {"sha256": content_digest(state)}, tmp_path / FORMER)
        with pytest.raises(checkpoint.Refused, match=message):
            call(tmp_path)
    state = torch.load(former_file(begun, tmp_path), weights_only=True)
    state["progress"]["seconds"] = 0.0
    torch.save(state, tmp_path / FORMER)
    with pytest.raises(checkpoint.Refused, match=r"last.ckpt: .*does not fit its sha256"):
        call(tmp_path)
    (tmp_path / FORMER).unlink()
    (tmp_path / FORMER).mkdir()
    with pytest.raises(checkpoint.Refused, match="not a regular file"):
        call(tmp_path)


@pytest.mark.parametrize("part", ["average", "optimizer"])
def test_averages_and_moments_that_are_not_finite_never_replace_a_checkpoint(
    tmp_path: Path, part: str
) -> None:
    method = fit(make(), tmp_path, steps=2)
    good = content(tmp_path)
    with torch.no_grad():
        if part == "average":
            method.ema["student"].net.b[0] = math.nan
        else:
            method.optimizers_by_key["fake"].state[method.fake.net.w]["exp_avg"][0] = math.inf
    with pytest.raises(
        FloatingPointError, match=f"{part} '.*not finite; last good checkpoint: .*step_0000002"
    ):
        checkpoint.save(tmp_path, method, {})
    assert content(tmp_path) == good


class Noded(Scaled):
    """Takes model folders, as the methods that walk along stored nodes do."""

    FOLDERS = DisBack.FOLDERS

    def __init__(self, student: Denoiser, teacher: Denoiser, nodes: list[str]) -> None:
        super().__init__(student, teacher)


def test_model_folders_are_known_by_their_weights_and_not_by_their_place(tmp_path: Path) -> None:
    def noded(folder: Path) -> None:
        method = Noded(*nets(), nodes=[str(folder)])
        method.prepare({"student": settings(), "fake": settings(ema=None)}, seed=5)
        train(method, Points(), Fit(2, 8), folder=tmp_path / "run")

    for name, text in (("a", b"one"), ("b", b"one"), ("c", b"two")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "model.safetensors").write_bytes(text)
    noded(tmp_path / "a")
    noded(tmp_path / "b")
    with pytest.raises(checkpoint.Refused, match=r"options.nodes: found"):
        noded(tmp_path / "c")


def test_an_update_has_the_settings_of_its_name() -> None:
    assert list(Update.__dataclass_fields__) == [
        *["name", "trains", "loss", "every", "start", "before", "mode"]
    ]
    update = Update(
        "student", {"student": nets()[0]}, lambda batch, step: Loss(torch.zeros(())), every=3, start=2
    )
    for iteration in range(20):
        assert update.runs_before(iteration) == sum(update.runs_at(i) for i in range(iteration))
    assert Optim(partial(torch.optim.SGD, lr=1.0), Constant()).averaged


def test_what_runs_between_iterations_is_outside_the_precision_of_the_step(tmp_path: Path) -> None:
    """Evaluations, snapshots, logs and progress: under bf16-mixed they would measure another model than is saved."""
    casts: dict[str, set[bool]] = {}

    def note(name: str) -> None:
        casts.setdefault(name, set()).add(torch.is_autocast_enabled("cpu"))

    class Noting(Scaled):
        def student_loss(self, batch, step):
            note("loss")
            return super().student_loss(batch, step)

        def snapshots(self):
            return [2]

    class Watching:
        """An evaluation."""

        def due(self, before, now):
            return True

        def resume(self, step):
            note("resume")

        def __call__(self, module):
            note("evaluation")
            return {"eval/seen": 1.0}

    class Logging(DummyLogger):
        def log_metrics(self, metrics, step):
            note("log")

    class Watcher(Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            note("callback")

    method, watching = Noting(*nets()), Watching()
    method.prepare({"student": settings(), "fake": settings(ema=None)}, seed=5)
    hooks: dict[str, Any] = {
        "evaluation": watching,
        "loggers": [Logging()],
        "callbacks": [Watcher()],
        "snapshot": lambda step: note("snapshot"),
    }
    hooks["on_progress"] = lambda step, text: note("progress")
    with torch.autocast("cpu", torch.bfloat16):
        train(method, Points(), Fit(3, 8, precision="bf16-mixed", log_every=1), folder=tmp_path, **hooks)
    others = ("resume", "evaluation", "log", "snapshot", "progress", "callback")
    assert casts == {"loss": {True}, **{name: {False} for name in others}}


def test_training_goes_on_with_the_threads_of_its_checkpoint(tmp_path: Path) -> None:
    """The last bits of sums depend on their number."""
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        call(tmp_path)
        torch.set_num_threads(1)
        call(tmp_path, steps=4)
        assert torch.get_num_threads() == 2
        state = checkpoint_of(tmp_path)
        assert state["threads"] == 2
    finally:
        torch.set_num_threads(before)
