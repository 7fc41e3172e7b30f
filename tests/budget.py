"""What the suite costs: seconds of CPU by folder and of the slowest files, at the end of a run. A busy machine stretches them
less than seconds on the clock. Nothing fails on them."""

from __future__ import annotations

import resource
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tests_support import cpu_of_forks

BUDGET = 700  # the aim in seconds of CPU, for 6 minutes on two cores; 1,160 on a slow machine when it was last measured
SHOWN = 10

_before = [0.0]
_spent: Counter[str] = Counter()
_processes: list[float] = []


def cpu_seconds() -> float:
    """User and system time of this process, of what it has waited for, and of the forks that ran verbs."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(u.ru_utime + u.ru_stime for u in used) + cpu_of_forks[0]


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Iterator[Any]:
    report = yield
    now = cpu_seconds()
    report.cpu, _before[0] = now - _before[0], now  # the first one of a process holds what its imports took
    return report


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if hasattr(report, "cpu"):
        _spent[report.nodeid.partition("::")[0]] += report.cpu


def pytest_terminal_summary(terminalreporter: Any) -> None:
    if len(_spent) < 2:
        return
    folders: Counter[str] = Counter()
    for file, seconds in _spent.items():
        folders[Path(file).parent.as_posix()] += seconds
    total = sum(_spent.values())
    terminalreporter.section(f"{total:.0f} seconds of CPU (budget of the default tests: {BUDGET})")
    for title, spent in (("folders", folders), ("files", Counter(dict(_spent.most_common(SHOWN))))):
        terminalreporter.line(f"{title}: " + ", ".join(f"{name} {s:.0f}" for name, s in spent.most_common()))
