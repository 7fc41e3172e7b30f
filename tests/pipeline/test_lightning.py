"""Lightning's own callbacks, loggers and profilers, and a user's, from a recipe."""

from __future__ import annotations

import csv
import os
import sys
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar

import lightning as L
import pytest
import safetensors.torch
import torch
from checkpoint_support import checkpoint_of
from test_watching import DATA, FEATURES, TRAIN, recipe
from tests_support import SMALL, run_verb

from distill.files import read_json
from distill.recipe.run import run
from distill.stages.base import FastDevRun


class Noting(L.Callback):
    """A user's callback: counts batches, and may fail or ask to stop at a step."""

    seen: ClassVar[list[tuple[Any, ...]]] = []
    fail_at: ClassVar[int] = 0
    stop_at: ClassVar[int] = 0

    def __init__(self, label: str, every: int = 1) -> None:
        self.label, self.every, self.batches = label, every, 0

    def state_dict(self) -> dict[str, Any]:
        return {"batches": self.batches}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.batches = state_dict["batches"]

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.seen.append(("start", trainer.global_step, self.label))

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self.batches += 1
        self.seen.append(("end", trainer.global_step, self.batches, pl_module.progress.step))
        if trainer.global_step == self.fail_at:
            raise RuntimeError("a user's error")
        trainer.should_stop = trainer.global_step == self.stop_at

    def on_exception(
        self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException
    ) -> None:
        self.seen.append(("exception", str(exception)))


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Noting, "seen", [])


OWN = [{"_target_": "test_lightning.Noting", "label": "mine"}]
CSV = [{"_target_": "lightning.pytorch.loggers.CSVLogger"}]


def start(folder: Path, trainer: dict[str, Any] | None = None, **more: Any) -> Path:
    """Run the teacher of `test_watching` without a monitor."""
    made = recipe(folder, monitor=None, steps=5)
    made["trainer"] |= trainer or {}
    return run(made | more, name="r", recipe_name="toy") / "teacher"


def weights(stage: Path) -> dict[str, torch.Tensor]:
    return safetensors.torch.load_file(stage / "model.safetensors")


def test_a_callback_of_ones_own_and_a_csv_logger(tmp_path: Path) -> None:
    stage = start(tmp_path, callbacks=OWN, loggers=CSV)
    assert Noting.seen == [("start", 0, "mine"), *(("end", n, n, n) for n in range(1, 6))]
    with (stage / "logs/lightning_logs/version_0/metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [int(row["step"]) for row in rows] == [1, 2, 3, 4, 5]
    assert all(float(row["student/loss"]) > 0 for row in rows)


def test_a_callback_that_fails_is_told_and_its_state_goes_on_with_the_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = start(tmp_path / "whole", callbacks=OWN, loggers=CSV)
    del Noting.seen[:]
    monkeypatch.setattr(Noting, "fail_at", 4)
    with pytest.raises(ValueError, match="a user's error"):
        start(tmp_path / "parts", {"checkpoint_every": 2}, callbacks=OWN, loggers=CSV)
    assert Noting.seen[-1] == ("exception", "a user's error")
    stage = tmp_path / "parts/r/teacher"
    state = checkpoint_of(stage / "checkpoints")
    assert (state["progress"]["step"], state["callbacks"]) == (2, {"Noting": {"batches": 2}})
    del Noting.seen[:]
    monkeypatch.setattr(Noting, "fail_at", 0)
    start(tmp_path / "parts", {"checkpoint_every": 2}, callbacks=OWN, loggers=CSV)
    assert Noting.seen == [("start", 2, "mine"), *(("end", n, n, n) for n in (3, 4, 5))]
    assert all(torch.equal(value, weights(whole)[name]) for name, value in weights(stage).items())
    # Lightning's logger writes a folder for each start; nothing that it wrote before is lost.
    assert {p.name for p in (stage / "logs/lightning_logs").iterdir()} == {"version_0", "version_1"}


def test_a_callback_that_ends_training_early_is_refused_with_a_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Noting, "stop_at", 3)
    with pytest.raises(ValueError, match="callbacks: one of them ended training at step 3 of 5"):
        start(tmp_path, callbacks=OWN)
    state = checkpoint_of(tmp_path / "r/teacher/checkpoints")
    assert state["progress"]["step"] == 3


def test_a_profiler_writes_its_table(tmp_path: Path) -> None:
    stage = start(tmp_path, {"profiler": "simple"})
    (table,) = (stage / "logs").glob("*profile*.txt")
    assert "run_training_batch" in table.read_text()


def test_a_trial_trains_some_iterations_and_saves_nothing(tmp_path: Path) -> None:
    whole = start(tmp_path / "whole")
    with pytest.raises(FastDevRun, match="fast_dev_run=2: ran that many iterations"):
        start(tmp_path / "tried", {"fast_dev_run": 2}, callbacks=OWN, loggers=CSV)
    assert [entry[:2] for entry in Noting.seen] == [("start", 0), ("end", 1), ("end", 2)]
    left = {p.name for p in (tmp_path / "tried/r/teacher").rglob("*") if p.is_file()}
    assert left == {"config.yaml", "identity.json", "execution.json"}
    stage = start(tmp_path / "tried")
    assert all(torch.equal(value, weights(whole)[name]) for name, value in weights(stage).items())


def test_a_trial_ends_the_command(tmp_path: Path) -> None:
    tried = run_verb(tmp_path, "train", "recipe=instaflow", "profile=smoke", "trainer.fast_dev_run=1", *SMALL)
    assert "stages.teacher: trainer.fast_dev_run=1: ran that many iterations" in tried.stderr
    assert "done" not in tried.stdout
    assert not list(tmp_path.rglob("*.safetensors"))


class FakeRun:
    """What W&B's `init` returns, as far as Lightning and the engine use it."""

    def __init__(self, calls: list[tuple[Any, ...]]) -> None:
        self.calls, self.summary = calls, {}
        calls.append(("summary", self.summary))

    def define_metric(self, name: str, **options: Any) -> None:
        self.calls.append(("define", name, options.get("step_metric")))

    def log(self, entry: dict[str, Any]) -> None:
        if "step" not in entry:  # tables and pictures
            self.calls.append(("show", entry))
            return
        self.calls.append(("log", entry["step"], entry["images"], entry["trainer/global_step"]))

    def finish(self) -> None:
        self.calls.append(("finish",))


class WandbError(Exception):
    """`wandb.Error`."""


def fake_wandb(monkeypatch: pytest.MonkeyPatch, raised: Exception | None = None) -> list[tuple[Any, ...]]:
    """What is asked of W&B, in place of its package; offline runs have a folder. `raised`: by `wandb.init` online."""
    calls: list[tuple[Any, ...]] = []

    def init(**options: Any) -> FakeRun:
        calls.append(("init", options))
        offline = options.get("mode") == "offline" or os.environ.get("WANDB_MODE") == "dryrun"
        if not offline and raised is not None:
            raise raised
        if offline:
            (Path(options["dir"]) / f"wandb/offline-run-{len(calls)}-{options['id']}").mkdir(parents=True)
        return FakeRun(calls)

    modules = {name: ModuleType(name) for name in ("wandb", "wandb.sdk", "wandb.sdk.lib", "wandb.wandb_run")}
    modules["wandb"].__dict__.update(init=init, run=None, util=None, Error=WandbError)
    modules["wandb"].__dict__.update(Table=lambda **given: given, Image=lambda path: Path(path).read_bytes())
    modules["wandb.sdk.lib"].__dict__["RunDisabled"] = type("RunDisabled", (), {})
    modules["wandb.wandb_run"].__dict__["Run"] = FakeRun
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr("lightning.pytorch.loggers.wandb._WANDB_AVAILABLE", True)
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("WANDB_MODE", "")  # is set again by Lightning, and taken away after the test
    monkeypatch.delenv("WANDB_MODE")
    return calls


def test_wandb_continues_its_run_offline_and_is_closed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = fake_wandb(monkeypatch)
    logger = {"_target_": "lightning.pytorch.loggers.WandbLogger", "project": "mine", "group": "g"}
    both = {"loggers": [logger], "callbacks": OWN}
    monkeypatch.setattr(Noting, "fail_at", 4)
    with pytest.raises(ValueError, match="a user's error"):
        start(tmp_path, {"checkpoint_every": 2}, **both)
    monkeypatch.setattr(Noting, "fail_at", 0)
    stage = start(tmp_path, {"checkpoint_every": 2}, **both)
    first, second = (call[1] for call in calls if call[0] == "init")
    run_id = (stage / "logs/wandb_id").read_text()
    for options in (first, second):
        assert (options["id"], options["resume"], options["project"]) == (run_id, "allow", "mine")
        assert (options["group"], options["dir"]) == ("g", str(stage / "logs"))
        assert (options["name"], options["job_type"]) == ("r/teacher", "train")
        assert options["tags"] == ["toy", "FlowMatching"]
        assert options["config"]["method"] == TRAIN["method"]
        assert options["config"]["digest"] == read_json(stage / "artifact.json")["digest"]
    assert calls.count(("define", "*", "images")) == 2
    assert calls.count(("finish",)) == 2
    assert calls[-1] == ("finish",)
    # The second run holds every step once, whatever the first one had not written; `wandb sync` uploads it alone.
    logged = [call[1:] for call in calls if call[0] == "log"]
    assert logged == [(n, 8 * n, n) for n in (1, 2, 3, 4, 1, 2, 3, 4, 5)]
    assert {p.name for p in (stage / "logs/wandb").iterdir()} == {
        "superseded",
        next(p.name for p in (stage / "logs/wandb").glob(f"offline-run-*-{run_id}")),
    }
    assert len(list((stage / "logs/wandb/superseded").iterdir())) == 1
    assert os.environ["WANDB_MODE"] == "dryrun", "without a key it stays offline"


WANDB = {"_target_": "lightning.pytorch.loggers.WandbLogger"}


def test_facts_are_the_summary_and_an_evaluation_is_a_run_with_table_and_picture(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = fake_wandb(monkeypatch)
    made = recipe(tmp_path, monitor=None, steps=2)
    meter = {"_target_": "distill.evaluation.meters.images.ImageMeter", "data": DATA, "features": FEATURES}
    made["stages"]["evaluate"] = {
        "_target_": "distill.stages.evaluate.Evaluate",
        "meter": meter,
        "models": {"teacher": {"stage": "teacher", "steps": [2, 1]}},
        "count": 32,
        "grid": [["teacher", 2], ["teacher", 1]],
    }
    folder = run(made | {"loggers": [WANDB, *CSV]}, name="r", recipe_name="toy")
    train, evaluate = (call[1] for call in calls if call[0] == "init")
    assert (train["job_type"], evaluate["job_type"]) == ("train", "evaluate")
    assert (evaluate["name"], evaluate["group"], evaluate["tags"]) == ("r/evaluate", "r", ["toy"])
    assert evaluate["id"] == (folder / "evaluate/logs/wandb_id").read_text() != train["id"]
    assert evaluate["config"]["digest"] == read_json(folder / "evaluate/artifact.json")["digest"]
    facts = [read_json(folder / stage / "artifact.json")["facts"] for stage in ("teacher", "evaluate")]
    ours, theirs = (call[1] for call in calls if call[0] == "summary")
    assert (ours["steps"], ours["parameters"]) == (2, facts[0]["parameters"])
    assert theirs == facts[1]
    table, picture = (call[1] for call in calls if call[0] == "show")
    rows = read_json(folder / "evaluate/metrics.json")["rows"]
    assert table["rows"]["columns"] == list(rows[0])
    assert table["rows"]["data"] == [list(row.values()) for row in rows]
    assert picture["grid"] == [(folder / "evaluate/grid.png").read_bytes()]
    assert [call[0] for call in calls][-1] == "finish"
    assert [call[0] for call in calls].count("finish") == 2


def test_wandb_that_cannot_be_reached_does_not_stop_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = fake_wandb(monkeypatch, raised=WandbError("no\nnetwork"))
    monkeypatch.setenv("WANDB_API_KEY", "k")
    with pytest.warns(UserWarning, match="W&B cannot be reached .no network.; this run is logged offline"):
        start(tmp_path, loggers=[WANDB])
    online, offline = (call[1] for call in calls if call[0] == "init")
    assert (online.get("mode"), offline["mode"]) == (None, "offline")
    assert [call[1] for call in calls if call[0] == "log"] == [1, 2, 3, 4, 5]


def test_other_errors_of_wandb_end_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = fake_wandb(monkeypatch, raised=TypeError("an option"))
    monkeypatch.setenv("WANDB_API_KEY", "k")
    with pytest.raises(TypeError, match="an option"):
        start(tmp_path, loggers=[WANDB])
    assert [call[0] for call in calls] == ["init"]


def test_an_offline_run_stays_where_it_is_when_the_stage_goes_on_online(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its entries are not sent again, so `wandb sync` must still find it."""
    calls = fake_wandb(monkeypatch)
    monkeypatch.setattr(Noting, "fail_at", 4)
    with pytest.raises(ValueError, match="a user's error"):
        start(tmp_path, {"checkpoint_every": 2}, loggers=[WANDB], callbacks=OWN)
    monkeypatch.setattr(Noting, "fail_at", 99)
    monkeypatch.setenv("WANDB_API_KEY", "k")
    monkeypatch.delenv("WANDB_MODE")
    stage = start(tmp_path, {"checkpoint_every": 2}, loggers=[WANDB], callbacks=OWN)
    assert [p.name.partition("-run")[0] for p in (stage / "logs/wandb").iterdir()] == ["offline"]
    assert [call[1] for call in calls if call[0] == "log"] == [1, 2, 3, 4, 3, 4, 5]
