"""Running the verbs: in this process where a command is refused or only reads, in a fork where it trains or is killed."""

from __future__ import annotations

import atexit
import contextlib
import fcntl
import gc
import importlib
import io
import json
import os
import pkgutil
import runpy
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn, TextIO
from unittest import mock

import forks
import torch
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra

# Hydra copies the whole store for each composition (0.1 s), although it copies every config that it loads from it. The tests
# compose some hundred times.
ConfigStore.__deepcopy__ = lambda self, memo: self

ROOT = Path(__file__).resolve().parents[1]
OF_TOKENS = ("distilled_decoding", "distilled_decoding2")
SMALL_TOKENS = ("teacher.net.width=16", "teacher.net.depth=1")
SMALL = ("teacher.net.width=8", "teacher.net.multipliers=[1]")  # of recipes of images: half the layers


def environment() -> dict[str, str]:
    """The user's environment without what would leak into a test."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("WANDB_", "HYDRA_"))}
    return kept | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


# For `before`: the processes of a run are started as by a user.
STARTED_ANEW = "import distill.launch, subprocess; distill.launch.subprocess = subprocess"
# The package of another folder, in a fork that has imported that of the checkout.
PACKAGE_OF = """
import sys
for name in [n for n in sys.modules if n.partition(".")[0] == "distill"]:
    del sys.modules[name]
sys.path[:] = [{!r}, *(p for p in sys.path if p not in ("", {!r}))]
"""
# Rooms whose modules a verb may import when it needs them.
ROOMS = ("data", "evaluation.meters", "evaluation.metrics", "exporters", "methods", "nets", "stages")
_server: list[tuple[TextIO, TextIO]] = []  # where calls are written, and answers read
cpu_of_forks = [0.0]  # seconds; this process is not their parent, so that its own times leave them out


def start_server() -> None:
    """Fork the process that runs verbs, in the state in which this one is: call it before the first test.

    It forks for every verb in its turn, since the imports take longer than most runs of the tests."""
    calls, answers = os.pipe(), os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(calls[1])
        os.close(answers[0])
        serve(os.fdopen(calls[0]), os.fdopen(answers[1], "w", buffering=1))
    os.close(calls[0])
    os.close(answers[1])
    _server.append((os.fdopen(calls[1], "w", buffering=1), os.fdopen(answers[0])))
    atexit.register(os.kill, pid, signal.SIGKILL)


def serve(calls: TextIO, answers: TextIO) -> NoReturn:
    """Answer each call, a line of JSON, by the number of the fork that runs it, then by its exit code and its CPU seconds."""
    for room in ROOMS:
        package = importlib.import_module(f"distill.{room}")
        for found in pkgutil.iter_modules(package.__path__, f"{package.__name__}."):
            importlib.import_module(found.name)
    forks.fork_processes()
    gc.collect()
    gc.freeze()  # else the forks' collector would copy all pages
    for line in calls:
        call = json.loads(line)
        pid = os.fork()
        if pid == 0:
            with contextlib.suppress(OSError):
                start_verb(call)
            os._exit(1)
        print(pid, file=answers)
        _, status, used = os.wait4(pid, 0)
        print(os.waitstatus_to_exitcode(status), used.ru_utime + used.ru_stime, file=answers)
    os._exit(0)


def start_verb(call: dict[str, Any]) -> NoReturn:
    """Run a verb in this process as the shell of a user would."""
    os.setsid()
    os.chdir(call["folder"])
    os.environ.clear()
    os.environ.update(call["env"])
    for number, name in enumerate([os.devnull, call["out"], call["err"]]):
        os.dup2(os.open(name, os.O_WRONLY if number else os.O_RDONLY), number)
    # In place of those that pytest captures with.
    sys.stdin, sys.stdout = open(0, closefd=False), open(1, "w", closefd=False)  # noqa: SIM115
    sys.stderr = open(2, "w", buffering=1, errors="backslashreplace", closefd=False)  # noqa: SIM115
    forks.run(call["module"], call["arguments"], call["before"])


class Started:
    """A verb that runs in a fork; it must be waited for before the next one is started."""

    def __init__(self, folder: Path, verb: str, *arguments: str, before: str = "") -> None:
        self.command = [verb, *arguments]
        self._place = tempfile.TemporaryDirectory()
        self._out, self._err = Path(self._place.name, "out"), Path(self._place.name, "err")
        for file in (self._out, self._err):
            file.touch()
        call = {"folder": str(folder), "module": f"distill.{verb}", "arguments": arguments, "before": before}
        call |= {"env": environment(), "out": str(self._out), "err": str(self._err)}
        ((calls, self._told),) = _server
        print(json.dumps(call), file=calls)
        self.pid = int(self._told.readline())

    def ended(self) -> bool:
        """Whether the process has come to its end."""
        with contextlib.suppress(OSError):
            return Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
        return True

    def wait(self, timeout: float = 300) -> subprocess.CompletedProcess[str]:
        """Its exit code and what it wrote; killed after `timeout` seconds."""
        alarm = threading.Timer(timeout, os.kill, (self.pid, signal.SIGKILL))
        alarm.start()
        code, seconds = self._told.readline().split()
        alarm.cancel()
        cpu_of_forks[0] += float(seconds)
        result = subprocess.CompletedProcess(
            self.command, int(code), self._out.read_text(), self._err.read_text()
        )
        self._place.cleanup()
        return result


def run_verb(
    folder: Path, verb: str, *arguments: str, check: bool = True, timeout: float = 300, before: str = ""
) -> subprocess.CompletedProcess[str]:
    """`python -m distill.<verb> arguments` in a fork, for what trains; with `check`, a failure shows the end of its messages.
    What is refused, or only reads, is faster with `call_verb`. `before` is Python that the fork runs first."""
    result = Started(folder, verb, *arguments, before=before).wait(timeout)
    if check:
        assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-4000:]
    return result


def package_of(folder: Path) -> str:
    """`before` of a verb that runs with the package in `folder`, and with nothing of the checkout."""
    return PACKAGE_OF.format(str(folder), str(ROOT))


def fork(function: Callable[..., object], *arguments: object) -> int:
    """The number of a fork of this process that calls the function; exit code 1 where it raises."""
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            function(*arguments)
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    return pid


def forked(function: Callable[..., object], *arguments: object) -> int:
    """The exit code of a fork of this process that calls the function."""
    return os.waitstatus_to_exitcode(os.waitpid(fork(function, *arguments), 0)[1])


@contextlib.contextmanager
def command_line(folder: Path, *arguments: str) -> Iterator[None]:
    """Inside the block this process stands in `folder` with the environment and `sys.argv` of a user, and Hydra is as at the
    start of a process. Afterwards everything is as before, torch's threads included."""
    place, threads, argv = Path.cwd(), torch.get_num_threads(), sys.argv
    GlobalHydra.instance().clear()
    try:
        with mock.patch.dict(os.environ, environment(), clear=True):
            os.chdir(folder)
            sys.argv = list(arguments)
            yield
    finally:
        sys.argv = argv
        os.chdir(place)
        torch.set_num_threads(threads)
        GlobalHydra.instance().clear()


def call_verb(
    folder: Path, verb: str, *arguments: str, check: bool = False
) -> subprocess.CompletedProcess[str]:
    """`python -m distill.<verb> arguments` in this process, to its exit code and what it wrote to both streams."""
    module, code = f"distill.{verb}", 0
    out, err = io.StringIO(), io.StringIO()
    with (
        command_line(folder, module, *arguments),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
    ):
        imported = sys.modules.pop(module, None)
        try:
            runpy.run_module(module, run_name="__main__", alter_sys=True)
        except SystemExit as ended:
            if isinstance(ended.code, str):
                err.write(f"{ended.code}\n")
            code = ended.code if isinstance(ended.code, int) else int(ended.code is not None)
        except Exception:
            err.write(traceback.format_exc())
            code = 1
        finally:
            if imported is not None:
                sys.modules[module] = imported
    result = subprocess.CompletedProcess([verb, *arguments], code, out.getvalue(), err.getvalue())
    if check:
        assert code == 0, result.stdout[-2000:] + result.stderr[-4000:]
    return result


def refusal(folder: Path, verb: str, *arguments: str) -> str:
    """The one message that a command ends with, without a traceback and with exit code 1."""
    refused = call_verb(folder, verb, *arguments)
    assert refused.returncode == 1, refused.stdout[-2000:] + refused.stderr[-4000:]
    assert "Traceback" not in refused.stderr, refused.stderr[-4000:]
    assert refused.stderr.count("error:") == 1, refused.stderr[-4000:]
    return refused.stderr


def shared_run(place: Path, recipe: str) -> Path:
    """A folder with a finished `runs/run` of the recipe with tiny numbers and nets, made once for all processes of pytest.
    Tests read it; `copied_run` is for those that change it."""
    folder = place / recipe
    with (place / f"{recipe}.lock").open("w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        if not (folder / "done").exists():
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()
            small = () if recipe.startswith("toy_") else SMALL_TOKENS if recipe in OF_TOKENS else SMALL
            run_verb(folder, "train", f"recipe={recipe}", "profile=smoke", "name=run", *small)
            (folder / "done").touch()
    return folder


def copied_run(source: Path, target: Path) -> Path:
    """`target` with a copy of the finished `runs/run` in `source`."""
    shutil.copytree(source / "runs", target / "runs")
    return target


def signal_when(
    folder: Path,
    number: signal.Signals,
    options: Sequence[str],
    there: Callable[[], bool],
    timeout: float = 200,
) -> subprocess.CompletedProcess[str]:
    """Start `distill.train` and send it the signal as soon as `there` says so; how it ended."""
    started = Started(folder, "train", *options)
    deadline = time.monotonic() + timeout
    while not there() and not started.ended() and time.monotonic() < deadline:
        time.sleep(0.005)
    reached = there() and not started.ended()
    os.kill(started.pid, number if reached else signal.SIGKILL)
    result = started.wait()
    assert reached, f"the run ended with {result.returncode} too early: {result.stderr[-2000:]}"
    return result


def kill_when(folder: Path, options: Sequence[str], there: Callable[[], bool], timeout: float = 200) -> None:
    """Start `distill.train` and SIGKILL it as soon as `there` says so; its processes die with it."""
    ended = signal_when(folder, signal.SIGKILL, options, there, timeout)
    assert ended.returncode == -signal.SIGKILL
