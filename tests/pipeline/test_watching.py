"""Between the iterations of training: what is measured there is what is saved, and what is continued is read strictly."""

from __future__ import annotations

import json
import math
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra.utils import instantiate

from distill.engine.loggers import Jsonl, wandb_id
from distill.engine.logging import lines_of, read_entries
from distill.evaluation.measure import Reference, measure
from distill.models.native import load_model
from distill.recipe.run import run
from distill.stages import threads as threads_of
from distill.stages.base import Settings, StageContext
from distill.stages.display import Display
from distill.stages.evaluate import labels_of
from distill.stages.threads import PeakMemory, use_threads

DATA = {"_target_": "distill.data.digits.Digits"}
FEATURES = {"_target_": "distill.models.features.load_digits64"}
MONITOR = {"every_images": 16, "data": DATA, "features": FEATURES, "count": 40, "columns": 4}
TRAIN: dict[str, Any] = {
    "_target_": "distill.stages.train.Train",
    "method": {"_target_": "distill.methods.flow_matching.FlowMatching"},
    "data": DATA,
    "steps": 4,
    "batch_size": 8,
    "optim": {
        "student": {
            "optimizer": {"_target_": "torch.optim.AdamW", "lr": 0.05},
            "schedule": {"_target_": "distill.engine.schedule.Constant"},
            "ema": 0.5,
        }
    },
    "net": {
        "_target_": "distill.nets.mlp.MLP",
        "shape": [1, 8, 8],
        "width": 16,
        "num_classes": 10,
        "zero_out": False,
    },
    "process": {"_target_": "distill.process.flow.Flow"},
    "monitor": MONITOR,
}


def recipe(folder: Path, **changes: Any) -> dict[str, Any]:
    return {
        "stages": {"teacher": TRAIN | changes},
        "seed": 3,
        "runs_dir": str(folder),
        "trainer": {"accelerator": "cpu", "checkpoint_every": 1, "log_every": 1, "threads": 1},
        "loggers": (),
        "plan": False,
        "redo": None,
    }


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A stage trained in bf16-mixed, with evaluations after steps 2 and 4."""
    folder = tmp_path_factory.mktemp("mixed")
    return run(recipe(folder, precision="bf16-mixed"), name="r", recipe_name="toy") / "teacher"


def entries(stage: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (stage / "monitor/evaluations.jsonl").read_text().splitlines()]


def test_a_monitor_under_bf16_mixed_measures_the_model_that_is_saved_in_float32(mixed: Path) -> None:
    """Drawn and measured as an evaluation does: from the files, outside any autocast."""
    best = json.loads((mixed / "best.json").read_text())
    noted = next(e for e in entries(mixed) if e["step"] == best["step"])
    features, data = instantiate(FEATURES), instantiate(DATA)
    generator = load_model(mixed / "best")
    images = generator.sample(MONITOR["count"], seed=3, stream="monitor")
    reference = Reference(data.images, data.labels, features, k=5, seed=3)
    row = measure(images, labels_of(generator, MONITOR["count"]), reference, features)
    for name in ("fd", "kid", "sliced_wasserstein", "recall", "pixel_std", "class_accuracy"):
        assert noted[name] == pytest.approx(row[name], rel=1e-6, abs=1e-7), name
    with torch.autocast("cpu", torch.bfloat16):
        rounded = generator.denoiser.net(
            images, torch.full((40,), 0.5), generator.conditions.ask(count=MONITOR["count"])
        )
    assert rounded.dtype == torch.bfloat16, (
        "the net computes otherwise under autocast; else the test shows nothing"
    )


def test_an_autocast_around_the_run_changes_nothing(tmp_path: Path) -> None:
    plain = run(recipe(tmp_path / "a"), name="r", recipe_name="toy") / "teacher"
    with torch.autocast("cpu", torch.bfloat16):
        cast = run(recipe(tmp_path / "b"), name="r", recipe_name="toy") / "teacher"
    for name in ("model.safetensors", "best/model.safetensors", "monitor/evaluations.jsonl"):
        assert (plain / name).read_bytes() == (cast / name).read_bytes(), name


# ---- what is continued ----


@pytest.fixture
def begun(mixed: Path, tmp_path: Path) -> Path:
    """The stage as a kill right before its artifact would have left it."""
    shutil.copytree(mixed.parent, tmp_path / "r")
    (tmp_path / "r/teacher/artifact.json").unlink()
    return tmp_path / "r/teacher"


def goes_on(stage: Path) -> None:
    run(recipe(stage.parents[1], precision="bf16-mixed"), name="r", recipe_name="toy")


def test_a_stage_that_nobody_touched_goes_on(begun: Path, mixed: Path) -> None:
    goes_on(begun)
    assert (begun / "best.json").read_bytes() == (mixed / "best.json").read_bytes()
    assert (begun / "model.safetensors").read_bytes() == (mixed / "model.safetensors").read_bytes()


def changed(path: Path, **values: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def flipped(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(bytes(data))


SPOILED: list[tuple[str, Any, str]] = [
    (
        "best/model.safetensors",
        flipped,
        "best/model.safetensors: is not the file that .*best.json was written for",
    ),
    ("best/model.safetensors", Path.unlink, "best/model.safetensors: is not the file"),
    ("best/model.json", lambda p: changed(p, note=1), "best/model.json: is not the file"),
    (
        "best.json",
        lambda p: changed(p, value=0.001),
        r"best.json: found fd 0.001 of step \d, which does not fit",
    ),
    ("best.json", lambda p: changed(p, files=None), "is not the file"),
    ("best.json", lambda p: changed(p, value="low"), "best.json: value: found 'low', expected float"),
    ("best.json", Path.unlink, "best.json: missing, but .*evaluations.jsonl has evaluations"),
    (
        "monitor/evaluations.jsonl",
        lambda p: p.write_text("5\n"),
        "evaluations.jsonl, line 1: found 5, expected a mapping",
    ),
    ("logs/metrics.jsonl", lambda p: p.write_text("{}\n"), "metrics.jsonl, line 1: step: found None"),
    (
        "checkpoints",
        lambda p: [flipped(file) for file in p.glob("*/state.pt")],
        r"step_\d+: not a readable checkpoint \(state.pt: .*redo=teacher",
    ),
]


@pytest.mark.parametrize("number", range(len(SPOILED)))
def test_what_does_not_fit_is_not_believed(begun: Path, number: int) -> None:
    name, spoil, message = SPOILED[number]
    spoil(begun / name)
    with pytest.raises(ValueError, match=rf"stages.teacher: .*{message}"):
        goes_on(begun)


def test_a_best_model_kept_after_the_last_checkpoint_comes_again(
    mixed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed between `best.json` and the model, and after both: the end is the same."""
    from distill.stages.monitor import Monitor

    class Killed(BaseException):
        pass

    original = Monitor._summarize
    for number, done in enumerate((False, True)):
        folder = tmp_path / str(number)

        def dies(self: Any, module: Any, value: float, *, done: bool, when: bool = done) -> None:
            original(self, module, value, done=done)
            if done is when:
                raise Killed

        with monkeypatch.context() as patch:
            patch.setattr(Monitor, "_summarize", dies)
            with pytest.raises(Killed):
                run(recipe(folder, precision="bf16-mixed"), name="r", recipe_name="toy")
        stage = folder / "r/teacher"
        goes_on(stage)
        assert entries(stage) == entries(mixed)
        for name in ("best.json", "best/model.safetensors", "model.safetensors"):
            assert (stage / name).read_bytes() == (mixed / name).read_bytes(), name


LINES: list[tuple[bytes, str | None]] = [
    (b'{"step": 1, "loss": 0.5}\n{"step": 2, "lo', None),
    (b'{"step": 1, "loss": 0.5}\n\x00\x00\x00', None),
    (b'{"step": 1, "loss": null}\n', None),
    (b"", None),
    (b'{"step": 1}\ngarbage\n', "line 2: not valid JSON"),
    (b'5\n{"step": 1}\n', "line 1: found 5, expected a mapping"),
    (b'{"step": 1}\n\n{"step": 2}\n', "line 2: not valid JSON"),
    (b'{"step": 1, "loss": "\xff"}\n', "line 1: not valid JSON .*utf-8"),
    (b'{"step": 1.5}\n', "line 1: step: found 1.5"),
    (b'{"step": true}\n', "line 1.*step: found True"),
    (b'{"step": -1}\n', "line 1: step: found -1"),
    (b'{"loss": 1}\n', "line 1: step: found None"),
    (b'{"step": 1, "loss": "low"}\n', "line 1.*loss: found 'low'"),
    (b'{"step": 1, "loss": NaN}\n', "line 1: not valid JSON .*NaN"),
    (b'{"step": 1, "loss": 1e999}\n', "line 1.*loss: found inf"),
    (b'{"step": 1, "step": 2}\n', "line 1: not valid JSON .*twice"),
    (b"[" * 100000 + b"\n", "line 1: not valid JSON"),
]


@pytest.mark.parametrize("number", range(len(LINES)))
def test_a_log_is_read_strictly_but_for_a_line_that_was_cut_off(tmp_path: Path, number: int) -> None:
    content, message = LINES[number]
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(content)
    if message is None:
        Jsonl(tmp_path).resume(5)
        assert path.read_bytes() == content[: content.rfind(b"\n") + 1]
        return
    with pytest.raises(ValueError, match=rf"metrics.jsonl, {message}"):
        Jsonl(tmp_path).resume(5)
    assert path.read_bytes() == content, "what cannot be read is left alone"


def test_a_step_of_a_callback_s_entries_is_there_once_after_a_resume(tmp_path: Path) -> None:
    """One callback numbers entries from 0 and logs entry 2 after the checkpoint of step 2, the other one before it."""

    def log(logger: Jsonl, steps: range) -> list[dict[str, Any]]:
        for step in steps:
            logger.log_metrics({"memory": step + 0.5}, step=step - 1)
            logger.log_metrics({"step": step, "loss": 1.0}, step=step)
            logger.log_metrics({"norm": step + 0.25}, step=step)
        return read_entries(logger.path)

    for name in ("whole", "parts"):
        (tmp_path / name).mkdir()
    whole = log(Jsonl(tmp_path / "whole"), range(1, 6))
    log(Jsonl(tmp_path / "parts"), range(1, 4))
    for _ in range(2):
        again = Jsonl(tmp_path / "parts")
        again.resume(2)
        assert log(again, range(3, 6)) == whole


def test_other_files_of_a_log(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "metrics.jsonl")
    with pytest.raises(ValueError, match=r"metrics.jsonl: not a regular file"):
        read_entries(tmp_path / "metrics.jsonl")
    assert (
        lines_of([{"step": 1, "a": math.nan, "b": None, "c": math.inf}])
        == '{"step": 1, "a": null, "b": null, "c": null}\n'
    )
    assert wandb_id(tmp_path) == wandb_id(tmp_path), "written by the first call"
    (tmp_path / "wandb_id").write_bytes(b"\xff../x")
    with pytest.raises(ValueError, match=r"wandb_id: found .*expected 8 hexadecimal digits"):
        wandb_id(tmp_path)


# ---- threads and memory ----


def room(folder: Path, threads: int | None = None) -> StageContext:
    folder.mkdir(exist_ok=True)
    settings = Settings(accelerator="cpu", threads=threads)
    plain = {"name": "s", "folder": folder, "inputs": {}, "seed": 0, "settings": settings, "loggers": ()}
    return StageContext(
        **plain, display=Display(silent=True), run_folder=folder.parent, recipe="toy", digest="0"
    )


@pytest.fixture
def four_cores(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """A machine of 4 cores; returns what torch is told."""
    told: list[int] = []
    monkeypatch.setattr(threads_of, "available_cores", lambda: 4)
    monkeypatch.setattr(torch, "set_num_threads", told.append)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    return told


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"threads": 100000000}', r"threads: found 100000000, expected 1 .. 4, .*trainer.threads=4"),
        ('{"threads": 0}', "threads: found 0, expected 1"),
        ('{"threads": -1}', "threads: found -1, expected 1"),
        ('{"threads": true}', "threads: found True, expected int"),
        ('{"threads": "2"}', "threads: found '2', expected int"),
        ('{"threads": 2.0}', "threads: found 2.0, expected int"),
        ('{"thread": 2}', "thread: no such key, did you mean .*threads"),
        ("{}", "threads: missing"),
        ("5", "found 5, expected a mapping"),
        ("garbage", "not valid JSON"),
    ],
)
def test_a_thread_count_that_was_written_down_is_read_strictly(
    tmp_path: Path, four_cores: list[int], content: str, message: str
) -> None:
    (tmp_path / "execution.json").write_text(content)
    with pytest.raises(ValueError, match=rf"execution.json: {message}"):
        use_threads(room(tmp_path), 10)
    assert four_cores == []
    assert use_threads(room(tmp_path, threads=3), 10) == 3, "the option goes before the file"


def test_threads_are_at_most_the_cores(
    tmp_path: Path, four_cores: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ValueError, match=r"trainer.threads: found 5, expected 1 .. 4"):
        use_threads(room(tmp_path, threads=5), 10)
    for text, threads in {"": 4, "2": 2, " 3 ": 3, "2,1": 2, "999999999": 4}.items():
        monkeypatch.setenv("OMP_NUM_THREADS", text)
        assert use_threads(room(tmp_path / f"at{threads}{len(text)}"), 10**9) == threads
    for text in ("abc", "0", "-2", "1e3", "\N{SUPERSCRIPT TWO}", "9" * 5000):
        monkeypatch.setenv("OMP_NUM_THREADS", text)
        with pytest.raises(ValueError, match="OMP_NUM_THREADS: found"):
            use_threads(room(tmp_path / "wrong"), 10)
    assert four_cores == [4, 2, 3, 2, 4]


def test_the_peak_of_a_stage_is_not_that_of_the_one_before() -> None:
    first, size = PeakMemory(torch.device("cpu")), 300 * 2**20
    held = torch.ones(size // 4)
    of_first = first.bytes()
    del held
    second = PeakMemory(torch.device("cpu"))
    of_second = second.bytes()
    assert of_first is not None
    assert of_second is not None
    assert of_first - of_second > 0.9 * size
    assert second.bytes() >= of_second > 2**20


def test_where_the_system_cannot_tell_a_stage_s_peak_there_is_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(PeakMemory, "RESET", tmp_path / "nowhere" / "clear_refs")
    assert PeakMemory(torch.device("cpu")).bytes() is None
