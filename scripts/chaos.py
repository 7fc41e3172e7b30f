"""Kill a run at random moments, continue it with the same command, and compare its end with a run that was
never killed.

    python scripts/chaos.py [--kills 10] [--recipe instaflow] [--signal KILL] [override ...]

Every kill hits the whole process group; the moments are spread over the time that the undisturbed run took,
so training, checkpoint and pair writing, evaluation and export are all hit. At the end the weights must be
bit-equal, the metrics equal (except times), every artifact's sha256 right and no temporary file left. Exit
code 1 and a list otherwise.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import safetensors.torch
import torch

from distill.files import TEMPORARY_SUFFIX
from distill.pipeline.stage import read_artifact, verify_files

TIMED = {"images_per_second", "train_seconds", "peak_memory_bytes"}


def run(
    folder: Path, command: list[str], *, kill_after: float | None, number: signal.Signals
) -> tuple[int, str]:
    """Run the command in `folder`; after `kill_after` seconds its process group gets the signal. (exit code,
    last line said)."""
    with (folder / "log.txt").open("ab") as log:
        process = subprocess.Popen(
            command, cwd=folder, stdout=log, stderr=log, stdin=subprocess.DEVNULL, start_new_session=True
        )
        try:
            process.wait(kill_after)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, number)
            process.wait()
    said = (folder / "log.txt").read_text(errors="replace").replace("\r", "\n").strip().splitlines()
    return process.returncode, said[-1] if said else ""


def differences(whole: Path, parts: Path) -> list[str]:
    """What the two finished runs do not share."""
    found = [f"left behind: {path}" for path in parts.rglob(f".*{TEMPORARY_SUFFIX}")]
    models = sorted(path.relative_to(whole) for path in whole.rglob("model.safetensors"))
    for path in models:
        one, other = (safetensors.torch.load_file(folder / path) for folder in (whole, parts))
        found += [f"{path}: {name}" for name in one if not torch.equal(one[name], other[name])]
    for path in sorted(parts.iterdir()):
        if path.is_dir():
            record = read_artifact(path)
            if record is None:
                found.append(f"{path}: not finished")
            else:
                verify_files(path, record)
    rows = [json.loads((folder / "metrics.json").read_text())["rows"] for folder in (whole, parts)]
    for a, b in zip(*rows, strict=True):
        found += [f"metrics: {a['model']}@{a['steps']}: {k}" for k in a if k not in TIMED and a[k] != b[k]]
    return found if models else ["no model was made"]


def main() -> int:
    """Parse, disturb, report."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--recipe", default="instaflow")
    parser.add_argument("--signal", default="KILL", choices=["KILL", "TERM", "INT"])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--verb", default="distill.train")
    parser.add_argument("overrides", nargs="*", default=[])
    options = parser.parse_args()
    overrides = options.overrides or ["profile=smoke", "profile.steps=60", "trainer.checkpoint_every=5"]
    command = [sys.executable, "-m", options.verb, f"recipe={options.recipe}", "name=run", *overrides]
    number, chance = signal.Signals[f"SIG{options.signal}"], random.Random(options.seed)
    with tempfile.TemporaryDirectory() as scratch:
        whole, parts = Path(scratch) / "whole", Path(scratch) / "parts"
        whole.mkdir()
        parts.mkdir()
        start = time.monotonic()
        code, said = run(whole, command, kill_after=None, number=number)
        seconds = time.monotonic() - start
        if code != 0:
            print(f"the undisturbed run failed: {said}")
            return 1
        print(f"undisturbed: {seconds:.1f} s")
        kill = tries = 0
        while kill < options.kills and tries < 4 * options.kills:
            tries += 1
            # Starting takes seconds in which nothing can be hurt: half of the moments lie after them.
            moment = chance.uniform(0.2, 1.0) * seconds * chance.choice([0.5, 1.0])
            code, said = run(parts, command, kill_after=moment, number=number)
            print(f"after {moment:5.1f} s: exit {code}, at: {said[:110]}")
            if code in (-number, 128 + number):
                kill += 1
            elif code == 0:  # finished before its kill: disturb another one from the start
                found = differences(whole / "runs" / "run", parts / "runs" / "run")
                if found:
                    print("\n".join(found))
                    return 1
                shutil.rmtree(parts / "runs")
            else:
                print(f"a start was refused: {said}")
                return 1
        if kill < options.kills:
            print(f"only {kill} of {options.kills} kills hit a running process")
            return 1
        code, said = run(parts, command, kill_after=None, number=number)
        if code != 0:
            print(f"the last start failed: {said}")
            return 1
        found = differences(whole / "runs" / "run", parts / "runs" / "run")
    print("\n".join(found) or f"bit-equal after {kill} kills")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
