"""Running the verbs: in this process where a command is refused or only reads, in a fork where it trains, as a process of its
own where it is killed."""

from __future__ import annotations

import atexit
import contextlib
import fcntl
import importlib.util
import io
import json
import os
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
from types import ModuleType
from unittest import mock

import torch
from hydra._internal.hydra import Hydra
from hydra.core.global_hydra import GlobalHydra
from hydra.types import RunMode

ROOT = Path(__file__).resolve().parents[1]


def environment() -> dict[str, str]:
    """The user's environment without what would leak into a test."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("WANDB_", "HYDRA_"))}
    return kept | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


# Runs `python -m distill.<verb>` in forks of a process that has imported everything, since that takes longer than most runs of
# the tests. One line of JSON a call; answers with the number of the fork, then with its exit code and its seconds of CPU.
SERVER = """
import gc, json, os, runpy, sys, traceback
import distill.compare, distill.evaluate, distill.sample, distill.train
import distill.methods.disback, distill.pipeline.stages, scipy.linalg, sklearn.datasets

gc.collect()
gc.freeze()  # else the forks' collector would copy all pages
for line in sys.stdin:
    call = json.loads(line)
    pid = os.fork()
    if pid == 0:
        os.chdir(call["folder"])
        os.environ.clear()
        os.environ.update(call["env"])
        for number, name in enumerate([os.devnull, call["out"], call["err"]]):
            os.dup2(os.open(name, os.O_WRONLY if number else os.O_RDONLY), number)
        sys.argv = [call["module"], *call["arguments"]]
        sys.modules.pop(call["module"])
        code = 0
        try:
            runpy.run_module(call["module"], run_name="__main__", alter_sys=True)
        except SystemExit as ended:
            code = ended.code if isinstance(ended.code, int) else int(ended.code is not None)
            if isinstance(ended.code, str):
                print(ended.code, file=sys.stderr)
        except BaseException:
            traceback.print_exc()
            code = 1
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)  # taking the interpreter apart takes longer than many a run
    print(pid, flush=True)
    _, status, used = os.wait4(pid, 0)
    print(os.waitstatus_to_exitcode(status), used.ru_utime + used.ru_stime, flush=True)
"""
_server: list[subprocess.Popen[str]] = []
cpu_of_forks = [0.0]  # seconds; this process is not their parent, so that its own times leave them out


def server() -> subprocess.Popen[str]:
    """The process of `SERVER`; one for each process of pytest."""
    if not _server:
        command = [sys.executable, "-c", SERVER]
        _server.append(
            subprocess.Popen(
                command, env=environment(), text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE
            )
        )
        atexit.register(_server[0].kill)
    return _server[0]


def run_verb(
    folder: Path, verb: str, *arguments: str, check: bool = True, timeout: float = 300
) -> subprocess.CompletedProcess[str]:
    """`python -m distill.<verb> arguments` in a fork, for what trains; with `check`, a failure shows the end of its messages.
    What is refused, or only reads, is faster with `call_verb`."""
    process = server()
    assert process.stdin is not None
    assert process.stdout is not None
    with tempfile.TemporaryDirectory() as place:
        out, err = Path(place, "out"), Path(place, "err")
        for file in (out, err):
            file.touch()
        call = {"folder": str(folder), "module": f"distill.{verb}", "arguments": arguments}
        call |= {"env": environment(), "out": str(out), "err": str(err)}
        process.stdin.write(json.dumps(call) + "\n")
        process.stdin.flush()
        pid = int(process.stdout.readline())
        alarm = threading.Timer(timeout, os.kill, (pid, signal.SIGKILL))
        alarm.start()
        code, seconds = process.stdout.readline().split()
        cpu_of_forks[0] += float(seconds)
        alarm.cancel()
        result = subprocess.CompletedProcess([verb, *arguments], int(code), out.read_text(), err.read_text())
    if check:
        assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-4000:]
    return result


@contextlib.contextmanager
def command_line(folder: Path, *arguments: str) -> Iterator[None]:
    """Inside the block this process stands in `folder` with the environment and `sys.argv` of a user, and Hydra is as at the
    start of a process. Afterwards everything is as before, torch's threads included."""
    place, threads, argv = Path.cwd(), torch.get_num_threads(), sys.argv
    # Without -m the mode is RUN; asking Hydra for it would compose every config twice.
    mode = contextlib.nullcontext() if {"-m", "--multirun"} & set(arguments) else single_run()
    GlobalHydra.instance().clear()
    try:
        with mock.patch.dict(os.environ, environment(), clear=True), mode:
            os.chdir(folder)
            sys.argv = list(arguments)
            yield
    finally:
        sys.argv = argv
        os.chdir(place)
        torch.set_num_threads(threads)
        GlobalHydra.instance().clear()


def single_run() -> contextlib.AbstractContextManager[object]:
    """Hydra takes its mode for RUN inside the block."""
    return mock.patch.object(Hydra, "get_mode", return_value=RunMode.RUN)


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
    """A folder with a finished `runs/run` of the recipe with tiny numbers, made once for all processes of pytest: to be read
    alone, `copied_run` is for tests that change it."""
    folder = place / recipe
    with (place / f"{recipe}.lock").open("w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        if not (folder / "done").exists():
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()
            run_verb(folder, "train", f"recipe={recipe}", "profile=smoke", "name=run")
            (folder / "done").touch()
    return folder


def copied_run(source: Path, target: Path) -> Path:
    """`target` with a copy of the finished `runs/run` in `source`."""
    shutil.copytree(source / "runs", target / "runs")
    return target


def kill_when(folder: Path, options: Sequence[str], there: Callable[[], bool], timeout: float = 200) -> None:
    """Start `python -m distill.train` as a user would and SIGKILL all its processes as soon as `there` says so."""
    process = subprocess.Popen(
        [sys.executable, "-m", "distill.train", *options],
        cwd=folder,
        env=environment(),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    deadline = time.monotonic() + timeout
    while not there() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    ended = process.poll()
    if ended is None:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    assert ended is None, f"the run ended with {ended} before it could be killed"
    assert there()


def load_script(name: str) -> ModuleType:
    """`scripts/<name>.py` as a module, the same one each time."""
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, ROOT / "scripts" / f"{name}.py")
        assert spec is not None
        assert spec.loader is not None
        module = sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    return sys.modules[name]
