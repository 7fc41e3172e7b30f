"""Interrupt or corrupt a run, continue it with the same command, and compare its result with that of an undisturbed run.

    python scripts/chaos.py [--recipe instaflow] [--kills 10] [--operations 20] [--corruptions 20] [override ...]

--kills N: kill the process group N times at random moments (--signal TERM or INT instead of KILL).
--operations N: kill the process before, during or after N file operations (such as `replace */model.safetensors`; see
`scripts/disturb.py`), chosen among the operations of the undisturbed run; -1 for all.
--corruptions N: flip a bit in, truncate, empty, delete or replace N files of interrupted runs and of the finished run; -1 for
every kind of file and corruption. The same command must raise an error that names the file, or make the file again.

Afterwards the weights must be bit-equal, the metrics equal (except times), the sha256 of every file correct, and no temporary
file left. If not, prints a list and exits with status 1. With trainer.devices=2 among the overrides, the process of rank 0 is
killed.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import disturb
import forks
import safetensors.torch
import torch

import distill.stages.train
import distill.train  # noqa: F401  (imported once, for all forks)
from distill.files import TEMPORARY_SUFFIX
from distill.stages.artifact import read_artifact, verify_files

TIMED = {"images_per_second", "train_seconds", "peak_memory_bytes"}
# What the process of a run does first.
DISTURBED = "import disturb; disturb.from_environment()"
PATIENCE = 600.0  # seconds; a start that takes longer is killed
RUN = Path("runs/run")


class Failed(Exception):
    """A run was not continued correctly."""


class Starts:
    """Starts a command, and the processes of its run, in forks, which need no imports."""

    def __init__(self, verb: str, arguments: Sequence[str]) -> None:
        self.verb, self.arguments = verb, list(arguments)
        self.several = any(a.startswith("trainer.devices=") and a != "trainer.devices=1" for a in arguments)

    def run(
        self,
        folder: Path,
        spec: dict[str, Any] | None = None,
        *,
        after: float = PATIENCE,
        number: int = signal.SIGKILL,
    ) -> tuple[int, str]:
        """Run the command in `folder`; returns (exit code, output).

        `disturb.install(spec)` is called first, in the process of rank 0; after `after` seconds the process group gets the
        signal `number`."""
        log = folder / "log.txt"
        log.write_text("")
        pid = os.fork()
        if not pid:
            self._forked(folder, log, spec)
        return self._wait(pid, after, number), log.read_text(errors="replace")

    def _forked(self, folder: Path, log: Path, spec: dict[str, Any] | None) -> None:
        """Run the command in this process and exit."""
        try:
            os.setsid()
            os.chdir(folder)
            for number, flags in enumerate([os.O_RDONLY, os.O_WRONLY, os.O_WRONLY]):
                os.dup2(
                    os.open(log if number else os.devnull, flags | (os.O_APPEND if number else 0)), number
                )
            sys.stdout, sys.stderr = (os.fdopen(number, "w", closefd=False) for number in (1, 2))
            os.environ["DISTURB"] = json.dumps(spec)
            forks.fork_processes()
            forks.Process.before = DISTURBED
        except BaseException:
            os._exit(1)
        forks.run(self.verb, self.arguments, "" if self.several else DISTURBED)

    @staticmethod
    def _wait(pid: int, after: float, number: int) -> int:
        """Return the exit code; -SIGALRM if the process ended neither by itself nor by the signal."""
        deadline, hopeless = time.monotonic() + after, time.monotonic() + after + PATIENCE
        while time.monotonic() < hopeless:
            ended, status = os.waitpid(pid, os.WNOHANG)
            if ended:
                return os.waitstatus_to_exitcode(status)
            if time.monotonic() > deadline:
                os.killpg(pid, number)
                deadline = hopeless
            time.sleep(0.005)
        os.killpg(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        return -int(signal.SIGALRM)


def last_line(output: str) -> str:
    """Return the last line of a log."""
    return (output.replace("\r", "\n").strip().splitlines() or [""])[-1]


def differences(whole: Path, parts: Path) -> list[str]:
    """Return the differences of two finished runs."""
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
    if (whole / "metrics.json").is_file():
        rows = [json.loads((folder / "metrics.json").read_text())["rows"] for folder in (whole, parts)]
        for a, b in zip(*rows, strict=True):
            found += [
                f"metrics: {a['model']}@{a['steps']}: {k}" for k in a if k not in TIMED and a[k] != b[k]
            ]
    return found if models else ["no model was saved"]


def same_end(whole: Path, folder: Path) -> None:
    """Raise `Failed` unless the run in `folder` equals the undisturbed one."""
    if found := differences(whole / RUN, folder / RUN):
        raise Failed("\n".join(found))


# ---- kills at random moments ----


def random_kills(
    starts: Starts, whole: Path, folder: Path, options: argparse.Namespace, seconds: float
) -> None:
    """Kill the run `options.kills` times at random moments, then run it to the end."""
    chance, number = random.Random(options.seed), signal.Signals[f"SIG{options.signal}"]
    kill = tries = 0
    while kill < options.kills and tries < 4 * options.kills:
        tries += 1
        # Later starts are shorter, because finished stages are skipped: half of the moments are early.
        moment = chance.uniform(0.05, 1.0) * seconds * chance.choice([0.5, 1.0])
        code, output = starts.run(folder, after=moment, number=number)
        print(f"after {moment:5.1f} s: exit {code}, at: {last_line(output)[:110]}")
        if code in (-number, 128 + number):
            kill += 1
        elif code == 0:  # finished before the kill: start another run
            same_end(whole, folder)
            shutil.rmtree(folder / "runs")
        else:
            raise Failed(f"a start failed: {last_line(output)}")
    if kill < options.kills:
        raise Failed(f"only {kill} of {options.kills} kills hit a running process")
    finish(starts, whole, folder)
    print(f"kills at random moments: {kill} tried, {kill} survived")


def finish(starts: Starts, whole: Path, folder: Path) -> None:
    """Run to the end and compare with the undisturbed run."""
    code, output = starts.run(folder)
    if code != 0:
        raise Failed(f"the last start failed: {last_line(output)}")
    same_end(whole, folder)


# ---- kills at file operations ----


def spec_for(folder: Path, stages: Sequence[str], **more: Any) -> dict[str, Any]:
    """Return the argument of `disturb.install` for the run in `folder`."""
    return {"root": str((folder / RUN).resolve()), "stages": list(stages), **more}


def distinct(record: Path) -> list[tuple[str, str]]:
    """Return the operations of the undisturbed run, each kind once, in order."""
    return list(
        dict.fromkeys((what, kind) for what, kind in map(json.loads, record.read_text().splitlines()))
    )


def operation_kills(
    starts: Starts, whole: Path, folder: Path, points: Sequence[tuple[str, str, str]], stages: Sequence[str]
) -> dict[str, Path]:
    """Kill a run at each of `points` and continue it; start a new run if it finishes first.

    Returns copies of the folder after some of the kills, by kind of file."""
    kills, unreached, states = Counter[str](), 0, {}
    mark = folder / "mark"
    for number, (what, kind, when) in enumerate(points):
        mark.unlink(missing_ok=True)
        spec = spec_for(folder, stages, what=what, kind=kind, when=when, number=1, mark=str(mark))
        code, output = starts.run(folder, spec)
        if mark.exists():
            kills[what] += 1
            print(f"{when} {what} {kind}: exit {code}")
            if (
                kind in ("*/artifact.json", "*/checkpoints/step_#", "*/pairs-#.safetensors")
                and kind not in states
            ):
                states[kind] = folder.with_name(f"state{number}")
                shutil.copytree(folder / "runs", states[kind] / "runs")
        elif code == 0:
            unreached += 1
            same_end(whole, folder)
            shutil.rmtree(folder / "runs")
        else:
            raise Failed(f"{when} {what} {kind}: a start failed: {last_line(output)}")
    finish(starts, whole, folder)
    total = sum(kills.values())
    listed = ", ".join(f"{what} {count}" for what, count in kills.most_common())
    print(
        f"kills at file operations: {total} tried, {total} survived ({listed}); {unreached} not reached again"
    )
    return states


# ---- corruptions ----


def flip(path: Path) -> None:
    """Flip a bit in the middle of a file."""
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(bytes(data))


def instead(make: Callable[[Path], object]) -> Callable[[Path], None]:
    """Return a function that deletes a file and calls `make` on its path."""

    def replaced(path: Path) -> None:
        path.unlink()
        make(path)

    return replaced


CORRUPTIONS: dict[str, Callable[[Path], object]] = {
    "flipped bit": flip,
    "first half": lambda path: os.truncate(path, path.stat().st_size // 2),
    "empty": lambda path: os.truncate(path, 0),
    "deleted": Path.unlink,
    "folder": instead(Path.mkdir),
    "fifo": instead(os.mkfifo),
    "link to nowhere": instead(lambda path: path.symlink_to("nowhere")),
    "JSON: null": instead(lambda path: path.write_text("null")),
    "JSON: NaN": instead(lambda path: path.write_text('{"schema": NaN}')),
    "JSON: one key twice": instead(lambda path: path.write_text('{"schema": 1, "schema": 2}')),
    "JSON: deep": instead(lambda path: path.write_text("[" * 100_000)),
    "not UTF-8": instead(lambda path: path.write_bytes(b"\xff\xfe{}")),
}


def cases(state: Path, stages: Sequence[str]) -> list[tuple[Path, str]]:
    """Return (file, corruption) for each kind of file of a run and each applicable corruption; not for the lock."""
    root, kinds = state / RUN, dict[str, Path]()
    for path in sorted(root.rglob("*")):
        if path.is_file() and path.name != ".lock" and path.stat().st_size > 0:
            kinds.setdefault(str(disturb.kind_of(str(path), str(root.resolve()), list(stages))), path)
    files = [path.relative_to(state) for path in kinds.values()]
    return [(p, w) for p in files for w in CORRUPTIONS if p.suffix == ".json" or not w.startswith("JSON")]


def corruptions(
    starts: Starts, whole: Path, states: Sequence[Path], stages: Sequence[str], options: argparse.Namespace
) -> None:
    """Corrupt one file in each copy of the states, and run the same command."""
    tried = [(state, path, change) for state in states for path, change in cases(state, stages)]
    if options.corruptions >= 0:
        tried = random.Random(options.seed).sample(tried, min(options.corruptions, len(tried)))
    ends, wrong = Counter[str](), []
    for number, (state, path, change) in enumerate(tried):
        folder = whole.with_name(f"corrupt{number}")
        shutil.copytree(state / "runs", folder / "runs", symlinks=True)
        CORRUPTIONS[change](folder / path)
        code, output = starts.run(folder)
        end = last_line(output)
        try:
            if code == 0:
                same_end(whole, folder)
                outcome = "made again or not needed"
            elif (
                code == 1
                and "Traceback" not in output
                and (path.name in output or f"{path.parent}:" in output)
            ):
                outcome = "error names the file"  # or its folder, if the stage's record cannot be read
            else:
                raise Failed(f"exit {code}: {output[-600:]}")
        except (Failed, OSError, ValueError) as error:
            wrong.append(f"{path}, {change} ({state.name}): {error}")
            outcome = "WRONG"
        ends[outcome] += 1
        print(f"{path}, {change}: {outcome}: {end[:110]}")
        shutil.rmtree(folder)
    listed = ", ".join(f"{count} {outcome}" for outcome, count in ends.most_common())
    print(f"corruptions: {len(tried)} tried, {len(tried) - len(wrong)} survived ({listed})")
    if wrong:
        raise Failed("\n".join(wrong))


def stages_of(starts: Starts, scratch: Path) -> list[str]:
    """Return the names of the run's stages, from its plan."""
    place = scratch / "plan"
    place.mkdir()
    code, output = Starts(starts.verb, [*starts.arguments, "plan=true", "trainer.devices=1"]).run(place)
    if code != 0:
        raise Failed(f"the plan failed: {last_line(output)}")
    return re.findall(r"^ +\d+\. (\S+)", output, flags=re.MULTILINE)


def disturb_all(options: argparse.Namespace, scratch: Path) -> None:
    """Make the undisturbed run, then the tests that `options` select."""
    overrides = options.overrides or ["profile=smoke", "profile.steps=60", "trainer.checkpoint_every=5"]
    starts = Starts(options.verb, [f"recipe={options.recipe}", "name=run", *overrides])
    whole, parts, killed = scratch / "whole", scratch / "parts", scratch / "killed"
    for folder in (whole, parts, killed):
        folder.mkdir()
    stages, record = stages_of(starts, scratch), scratch / "operations.jsonl"
    start = time.monotonic()
    code, output = starts.run(whole, spec_for(whole, stages, record=str(record)))
    seconds = time.monotonic() - start
    if code != 0:
        raise Failed(f"the undisturbed run failed: {last_line(output)}")
    print(f"undisturbed: {seconds:.1f} s")
    if options.kills:
        random_kills(starts, whole, parts, options, seconds)
    states: dict[str, Path] = {}
    if options.operations or options.corruptions:
        points = [(*point, when) for point in distinct(record) for when in disturb.WHEN]
        points = [p for p in points if p[2] != "half" or (p[0] == "fsync" and TEMPORARY_SUFFIX in p[1])]
        if 0 <= options.operations < len(points):
            chosen = random.Random(options.seed).sample(range(len(points)), options.operations)
            points = [points[i] for i in sorted(chosen)]
        states = operation_kills(starts, whole, killed, points, stages)
    if options.corruptions:
        corruptions(starts, whole, [whole, *states.values()], stages, options)


def main() -> int:
    """Parse the command line and run the tests; returns the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--operations", type=int, default=0)
    parser.add_argument("--corruptions", type=int, default=0)
    parser.add_argument("--recipe", default="instaflow")
    parser.add_argument("--signal", default="KILL", choices=["KILL", "TERM", "INT"])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--verb", default="distill.train")
    parser.add_argument("overrides", nargs="*", default=[])
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as scratch:
        try:
            disturb_all(options, Path(scratch).resolve())
        except Failed as error:
            print(error)
            return 1
    print("bit-equal")
    return 0


if __name__ == "__main__":
    sys.exit(main())
