"""scripts/gpu_check.py and scripts/scaling_table.py work, on a CPU with tiny nets: what they find on a GPU is not tested."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import gpu_check
import gpu_training
import pytest
import scaling_table
import torch


def started(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["gpu_check.py", *arguments])
    code: int = gpu_check.main()
    return code


@pytest.mark.slow
def test_every_check_passes_on_a_cpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert started(monkeypatch, "--device", "cpu", "--tiny", "--out", str(tmp_path)) == 0
    report, table = sorted(tmp_path.iterdir())
    found = json.loads(report.read_text())
    outcomes = {row["check"]: row["outcome"] for row in found["checks"]}
    assert outcomes.pop("no sync in a step") == "skipped"
    assert len(outcomes) == 10
    assert set(outcomes.values()) == {"passed"}, found["checks"]
    numbers = {row["check"]: row.get("numbers", {}) for row in found["checks"]}
    assert numbers["kill and continue"] == {"largest difference of the weights": 0.0}
    assert 0 < numbers["bfloat16"]["difference of the weights, of what training moved"] < 0.5
    assert numbers["memory"]["kept_bytes"] > 10_000
    for row in ("reflow", "dmd, LoRA", "sid"):
        assert numbers[f"speed: {row}, tiny"]["seconds"] > 0
    assert table.read_text().count("\n| ") == 12


@pytest.mark.gpu
def test_every_check_passes_on_this_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert started(monkeypatch, "--out", str(tmp_path)) == 0


def test_a_failed_check_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_check, "flagged_step", lambda optimizer, bad: optimizer.step())
    options = ("--device", "cpu", "--tiny", "--only", "fused", "--out", str(tmp_path))
    assert started(monkeypatch, *options) == 1
    report = json.loads(next(tmp_path.glob("*.json")).read_text())
    assert report["checks"][0]["outcome"] == "failed"
    assert "a flagged step changed weights" in report["checks"][0]["why"]


def test_without_a_gpu_it_says_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit):
        started(monkeypatch)
    assert "found no CUDA device; expected one, or --device cpu --tiny" in capsys.readouterr().err


@pytest.mark.slow
def test_operations_of_a_step() -> None:
    """DiT's paper counts 118.6 billion products of a forward at 256 pixels; a product and its sum are two operations, and a
    backward takes two forwards."""
    assert gpu_training.flops("dit_xl2") == pytest.approx(6 * 118.6e9 * 16, rel=0.01)


def test_bytes_a_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of whole students: weights, gradients, two moments, and the average, in float32."""
    parameters = sum(p.numel() for p in gpu_check.shaped("tiny", torch.device("meta"))[0].parameters())
    reflow, sid = (
        sum(scaling_table.memory("tiny", name, lora=False).total().values()) for name in ("reflow", "SiD")
    )
    assert reflow == pytest.approx(20 * parameters, rel=0.01)
    # The teacher and the fake score, with its moments; gradients exist of one network at a time.
    assert sid - reflow == pytest.approx(16 * parameters, rel=0.01)
    eight = sum(scaling_table.memory("tiny", "SiD", lora=False).total(8).values())
    assert sid / 8 <= eight < sid / 4, "tiny tensors are padded"
    assert sum(scaling_table.memory("tiny", "SiD", lora=True).total().values()) < 0.5 * sid
