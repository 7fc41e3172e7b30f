"""`scripts/chaos.py` in short; by hand it takes as many disturbances as one likes. And that it sees what went wrong."""

from __future__ import annotations

import json
import os
import re
import signal
import sys

import chaos
import pytest
import safetensors.torch
from tests_support import command_line, copied_run


@pytest.fixture(scope="module")
def told(tmp_path_factory) -> str:
    """What the script says of a few disturbances of each kind."""
    folder = tmp_path_factory.mktemp("chaos")
    counts = ["--kills", "1", "--operations", "3", "--corruptions", "2"]
    command = ["chaos", *counts, "--recipe", "toy_instaflow", "profile=smoke", "trainer.checkpoint_every=2"]
    out = folder / "said.txt"
    with out.open("w") as file, pytest.MonkeyPatch.context() as patch, command_line(folder, *command):
        patch.setattr(sys, "stdout", file)
        code = chaos.main()
    said = out.read_text()
    assert code == 0, said[-4000:]
    return said


def test_kills_at_random_moments(told):
    assert "kills at random moments: 1 tried, 1 survived" in told


def test_kills_at_file_operations(told):
    """Before, in the middle of and after named operations."""
    tried, survived = map(
        int, re.findall(r"^kills at file operations: (\d+) tried, (\d+) survived", told, flags=re.M)[0]
    )
    assert tried == survived >= 2
    assert len(set(re.findall(r"^(?:before|half|after) (\w+) ", told, flags=re.M))) >= 2


def test_corrupted_files(told):
    """Refused by name, or made again with the same bits."""
    assert "corruptions: 2 tried, 2 survived" in told
    assert "WRONG" not in told


def test_operations_are_named_by_the_kind_of_file(tmp_path):
    kind_of, root = sys.modules["disturb"].kind_of, str(tmp_path)
    for path, kind in {
        "teacher/checkpoints/.step_0000005.part/state.pt": "*/checkpoints/.step_#.part/state.pt",
        "pairs/pairs-00012.safetensors": "*/pairs-#.safetensors",
        "report.md": "report.md",
    }.items():
        assert kind_of(str(tmp_path / path), root, ["teacher", "pairs"]) == kind
    assert kind_of("/elsewhere/report.md", root, []) is None


@pytest.mark.parametrize("when", ["before", "half", "after"])
def test_a_process_dies_at_the_operation(tmp_path, when):
    path, mark = tmp_path / "run/x", tmp_path / "mark"
    path.parent.mkdir()
    spec = {"root": str(path.parent), "stages": [], "what": "fsync", "kind": "x", "when": when, "number": 2}
    pid = os.fork()
    if pid == 0:
        sys.modules["disturb"].install(spec | {"mark": str(mark)})
        for text in ("one", "two"):
            with path.open("w") as handle:
                handle.write(f"{text} of ten letters")
                handle.flush()
                os.fsync(handle.fileno())
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL
    assert mark.exists()
    assert path.read_text() == ("two of te" if when == "half" else "two of ten letters")


def test_another_end_is_seen(shared, tmp_path):
    """A weight, a number of the evaluation, a temporary file."""
    whole = shared("toy_instaflow")
    copied_run(whole, tmp_path)
    run = tmp_path / "runs/run"
    assert chaos.differences(whole / "runs/run", run) == []
    (run / "teacher" / ".model.json.part").touch()
    metrics = json.loads((run / "metrics.json").read_text())
    metrics["rows"][0]["energy"] += 1e-9
    (run / "metrics.json").write_text(json.dumps(metrics))
    found = chaos.differences(whole / "runs/run", run)
    assert len(found) == 2, found
    assert "left behind" in found[0]
    assert "energy" in found[1]
    path = next(iter(sorted(run.rglob("model.safetensors"))))
    tensors = safetensors.torch.load_file(path)
    name = next(iter(tensors))
    tensors[name].view(-1)[0] += 1
    safetensors.torch.save_file(tensors, path)
    with pytest.raises(ValueError, match=r"model\.safetensors: sha256"):
        chaos.differences(whole / "runs/run", run)
