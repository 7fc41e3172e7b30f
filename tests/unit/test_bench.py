"""The benchmarks measure what they say: structure and bookkeeping, never times."""

from __future__ import annotations

import importlib
import re
import sys
from pathlib import Path

import pytest
import torch

from distill.data.digits import Digits

BENCH = Path(__file__).resolve().parents[2] / "scripts" / "bench"
TINY = ["--nets", "1", "--runs", "1", "--blocks", "2", "--block-steps", "2"]
RATIO = r"\d+\.\d{3} \(\d+\.\d{3} \.\. \d+\.\d{3}\)"


@pytest.fixture
def overhead(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCH))
    return importlib.import_module("overhead")


@pytest.fixture
def peers(overhead):
    return importlib.import_module("peers")


def compared(text: str) -> list[str]:
    """What the table's rows compare; each row must hold all its numbers."""
    lines = [line for line in text.splitlines() if re.match(r"\| (MLP|U-Net)", line)]
    for line in lines:
        assert re.fullmatch(rf"\| [^|]+ \| \d+\.\d\d \| [^|]+ \| {RATIO} \| {RATIO} \| [+-]\d+ \|", line), (
            line
        )
    return [line.split(" | ")[2] for line in lines]


def test_overhead_prints_both_tables(overhead, capsys):
    overhead.main([*TINY, "--profile"])
    text = capsys.readouterr().out
    assert compared(text) == [
        "engine / bare",
        "engine / bare, same loss",
        "bare, same loss / bare",
        "bare / bare, again",
    ]
    profile = text.split(overhead.PROFILE_HEADER)[1].strip().splitlines()
    assert len(profile) == 30
    assert any("distill/data/rng.py" in line for line in profile), "the bare loop draws with torch alone"
    more = [float(line.split("|")[2]) for line in profile]
    assert more == sorted(more, reverse=True)
    assert more[0] > 0


def test_every_loop_does_the_same_number_of_steps(overhead):
    case, data, clock = overhead.CASES["1"].with_block(3), Digits(), overhead.Clock()
    loops = overhead.bare_loops(case, data)
    overhead.measure(case, data, loops, 2, clock)
    assert [loop.done for loop in loops.values()] == [9, 9, 9]  # two blocks, and one that is not timed
    assert {name: len(times) for name, times in clock.times.items()} == dict.fromkeys(("engine", *loops), 2)
    assert all(cpu > 0 and wall > 0 for times in clock.times.values() for cpu, wall in times)


def test_ratios_are_taken_block_by_block(overhead):
    clock = overhead.Clock(times={"a": [(2.0, 9.0), (3.0, 4.0)], "b": [(1.0, 3.0), (2.0, 1.0)]})
    assert overhead.ratios(clock, "a", "b", 0) == [2.0, 1.5]
    assert overhead.ratios(clock, "a", "b", 1) == [3.0, 4.0]
    assert overhead.spread([1.0, 2.0, 3.0, 4.0, 5.0]) == "3.000 (2.000 .. 4.000)"


@pytest.mark.parametrize("name", ["1", "20"])
def test_loops_that_do_other_work_are_refused(overhead, name, monkeypatch):
    case, data = overhead.CASES[name], Digits()
    overhead.check_equal(case, data)
    with monkeypatch.context() as patched:
        patched.setattr(overhead, "decay_at", lambda step, decay, ramp: 0.5)
        with pytest.raises(RuntimeError, match=r"averages: .* differs after 3 steps"):
            overhead.check_equal(case, data)
    monkeypatch.setattr(overhead.nn.utils, "clip_grad_norm_", lambda parameters, norm: None)
    monkeypatch.setattr(overhead, "CLIP", 1e-3)
    with pytest.raises(RuntimeError, match=r"weights: .* differs after 3 steps"):
        overhead.check_equal(case, data)


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    """Write a stand-in for torchcfm's package."""

    def write(body: str) -> Path:
        folder = tmp_path / "torchcfm"
        folder.mkdir(exist_ok=True)
        (folder / "__init__.py").write_text("")
        (folder / "conditional_flow_matching.py").write_text(body)
        for name in ("torchcfm", "torchcfm.conditional_flow_matching"):
            monkeypatch.delitem(sys.modules, name, raising=False)
        importlib.invalidate_caches()
        return tmp_path

    yield write
    for name in ("torchcfm", "torchcfm.conditional_flow_matching"):
        sys.modules.pop(name, None)


MATCHER = """
import torch
class ConditionalFlowMatcher:
    def __init__(self, sigma):
        self.sigma = sigma
    def sample_location_and_conditional_flow(self, x0, x1):
        t = torch.rand(len(x0))
        wide = t[:, None, None, None]
        return t, wide * x1 + (1 - wide) * x0, x1 - x0
"""


def test_peers_without_a_peer_compares_two_bare_loops(peers, capsys):
    peers.main(TINY)
    assert compared(capsys.readouterr().out) == ["engine / stand-in", "stand-in / bare"]


def test_peers_runs_a_peers_loss(peers, checkout, capsys):
    peers.main([*TINY, "--peer", "torchcfm", "--path", str(checkout(MATCHER))])
    assert compared(capsys.readouterr().out) == ["engine / torchcfm", "torchcfm / bare"]


def test_the_adapter_turns_time_and_velocity_round(peers, overhead, checkout):
    """A net that knows the velocity eps - x0 at t = 1 - tau has loss 0."""
    path = checkout(MATCHER.replace("torch.rand(len(x0))", "torch.full((len(x0),), 0.25)"))
    loss, seen = peers.load("torchcfm", path), {}

    class Loop:
        def take(self):
            seen["x0"] = torch.randn(4, 1, 8, 8)
            return seen["x0"], None

        def net(self, x_t, t, cond):
            assert torch.equal(t, torch.full((4,), 0.75))
            return (x_t - seen["x0"]) / t[:, None, None, None]  # x_t = (1 - t) x0 + t eps

    assert loss(Loop()) < 1e-10


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (None, r"--path: .* holds no folder torchcfm; expected a checkout of torchcfm"),
        (
            "import no_such_module",
            r"--path: torchcfm\..* cannot be imported: No module named 'no_such_module'",
        ),
        ("x = 1", r"has no ConditionalFlowMatcher: another version"),
    ],
)
def test_a_path_that_does_not_hold_the_peer_is_told(peers, checkout, tmp_path, capsys, body, message):
    path = tmp_path if body is None else checkout(body)
    with pytest.raises(SystemExit) as stopped:
        peers.main([*TINY, "--peer", "torchcfm", "--path", str(path)])
    assert stopped.value.code == 2
    assert re.search(message, capsys.readouterr().err)


def test_a_peer_found_elsewhere_is_not_measured(peers, checkout, tmp_path, capsys):
    sys.path.insert(0, str(checkout(MATCHER)))
    try:
        importlib.import_module("torchcfm.conditional_flow_matching")
    finally:
        sys.path.pop(0)
    other = tmp_path / "other"
    (other / "torchcfm").mkdir(parents=True)
    with pytest.raises(ValueError, match=r"was imported from .*; expected a checkout"):
        peers.load("torchcfm", other)
    with pytest.raises(ValueError, match="--path: missing"):
        peers.load("torchcfm", None)


def test_a_loss_that_does_less_is_refused(peers, overhead):
    case = overhead.CASES["1"]

    def loop(loss):
        return overhead.Bare(overhead.method(case).student.net, Digits(), 4, loss)

    peers.check(loop(overhead.plain_loss))
    with pytest.raises(ValueError, match="expected a finite scalar loss"):
        peers.check(loop(lambda loop: overhead.plain_loss(loop) * float("nan")))
    with pytest.raises(ValueError, match=r"all but \d+ of \d+ parameters"):
        peers.check(loop(lambda loop: loop.parameters[0].sum()))


def test_help_says_what_was_never_run(peers, capsys):
    with pytest.raises(SystemExit):
        peers.main(["--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert "Never run: any other version" in text
    for peer in peers.PEERS:
        assert f"{peer} 1.0" in text, f"{peer}: say whether its adapter was run"


def test_bad_numbers_are_refused(overhead, capsys):
    with pytest.raises(SystemExit):
        overhead.main(["--blocks", "0"])
    assert "--blocks: expected a whole number of at least 1, found '0'" in capsys.readouterr().err


@pytest.mark.slow
def test_reliability_prints_its_table(monkeypatch, capsys):
    monkeypatch.syspath_prepend(str(BENCH))
    monkeypatch.setattr(
        sys, "argv", ["reliability.py", *["--width", "8", "--steps", "4", "--repeats", "1", "--threads", "1"]]
    )
    importlib.import_module("reliability").main()
    rows = [
        line.split("|")[1].strip() for line in capsys.readouterr().out.splitlines() if line.startswith("| ")
    ]
    assert rows[1:] == [
        "step with EMA / without",
        "step with a checkpoint every 20 / without",
        "the same twice (noise of this machine)",
        "write a checkpoint (with fsync)",
        "read one and restore",
        "size of a checkpoint",
    ]
