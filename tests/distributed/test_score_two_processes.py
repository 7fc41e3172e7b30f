"""Score distillation: two processes give what one gives, a continued run what an unbroken one gives, and no network is held
twice."""

from __future__ import annotations

import gc
import math
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from checkpoint_support import checkpoint_of
from score_worker import (
    HALF,
    IN_UNITS,
    METHODS,
    NODES,
    QUICK,
    STEPS,
    UNIT,
    Build,
    make,
    plateau,
    write_nodes,
)
from test_two_processes import assert_close, load, start
from torch import Tensor
from worker import fit

from distill.engine.parallel import units
from distill.engine.update import Loss
from distill.methods.families.matching import DistributionMatching
from distill.models.denoiser import Denoiser
from distill.models.native import read_weights
from distill.world import World

BUILDS = {build.__name__: build for build in METHODS}


# A test of each method; slow but for those in `QUICK`.
every_method = pytest.mark.parametrize(
    "name", [pytest.param(b.__name__, marks=() if b in QUICK else pytest.mark.slow) for b in METHODS]
)


@pytest.fixture(scope="module")
def results(request, tmp_path_factory) -> Path:
    """The folder where two processes have trained the methods: alone and together, whole and continued. All of them, where a
    slow test is among those that run."""
    slow = any(item.get_closest_marker("slow") for item in request.session.items)
    folder = tmp_path_factory.mktemp("score")
    start(folder, 2, f"score_worker.{'all' if slow else 'quick'}")
    return folder


def found(results: Path, name: str, run: str) -> dict[str, Tensor]:
    """What a run stored, without what depends on the number of processes by intent."""
    return {key: value for key, value in load(results / name / run, "found").items() if key != "held"}


def ends(whole: dict[str, Tensor], continued: dict[str, Tensor]) -> dict[str, Tensor]:
    """The unbroken run, with logs of the steps of the continued one alone."""
    assert len(continued["student/loss"]) == STEPS - HALF
    return {key: value[-len(continued[key]) :] if "/" in key else value for key, value in whole.items()}


@every_method
def test_losses_norms_nodes_weights_and_averages_of_two_are_those_of_one(results, name):
    one, two = found(results, name, "one"), found(results, name, "world")
    assert len(one["student/loss"]) == STEPS
    assert_close(one, two)


@every_method
def test_so_are_those_of_two_that_are_not_sharded(results, name):
    assert_close(found(results, name, "one"), found(results, name, "none"))


@pytest.mark.slow
@pytest.mark.parametrize("name", [build.__name__ for build in IN_UNITS])
def test_also_where_blocks_of_the_nets_are_gathered_on_their_own(results, name):
    assert len(units(METHODS[BUILDS[name]]().net, UNIT)) > 1
    assert_close(found(results, name, "one"), found(results, name, "units"))


@pytest.mark.parametrize("run", ["one-on-two", "two-on-one"])
@every_method
def test_checkpoints_of_one_continue_on_two_and_the_reverse(results, name, run):
    continued = found(results, name, run)
    assert_close(ends(found(results, name, "one"), continued), continued)


@pytest.mark.parametrize(("whole", "run"), [("one", "one-on-one"), ("world", "two-on-two")])
@every_method
def test_a_continued_run_is_bit_equal_to_an_unbroken_one(results, name, whole, run):
    continued = found(results, name, run)
    for key, value in ends(found(results, name, whole), continued).items():
        assert torch.equal(value, continued[key]), key


@pytest.mark.slow
@pytest.mark.parametrize("run", ["one", "none", "world", "one-on-two", "two-on-one"])
def test_the_checkpoint_lies_on_the_way_inside_a_window(results, run):
    """Else the tests above say nothing of the walk. Rows of it: node, steps at it, the last window's mean (-1: none), sum and
    count of this window."""
    steps = found(results, "disback", run)["student/node"].tolist()
    assert steps == [3, 3, 2, 2, 1, 1, 0, 0][-len(steps) :]
    walk = found(results, "plateau", run)["state/walk"]
    assert walk[:, 0].tolist() == [3, 3, 3, 2, 2, 2, 2, 1][-len(walk) :]
    at_checkpoint = checkpoint_of(results / "plateau" / "one" / "half")["method"]
    assert (at_checkpoint["node"], at_checkpoint["stayed"]) == (2, 1)
    assert at_checkpoint["sum"] > 0


@pytest.mark.slow
def test_the_window_of_two_processes_is_saved_as_the_mean_of_both(results):
    """Not as that of the process that writes: their losses differ by far more than by rounding."""
    one, two = (checkpoint_of(results / "plateau" / run / "half")["method"] for run in ("one", "world"))
    assert one.keys() == two.keys()
    assert two["sum"] == pytest.approx(one["sum"], rel=1e-5)
    assert two["count"] == one["count"] == 2  # micro batches


@every_method
def test_checkpoints_hold_what_is_trained_and_its_average_alone(results, name):
    roles = {"student", "fake"} | (
        {"head"} if name in ("gan_on_fake", "gan_on_teacher", "disback") else set()
    )
    method = make(BUILDS[name], World(), results / "nodes")
    sizes = {role: sum(p.numel() for p in network.parameters()) for role, network in method.networks.items()}
    for run in ("one", "world"):
        state = checkpoint_of(results / name / run)
        assert set(state["networks"]) == roles == set(sizes)
        assert set(state["ema"]) == {"student"}
        assert set(state["optimizers"]) == {"student", "fake"}
        moments = [m for states in state["optimizers"].values() for s in states.values() for m in s.values()]
        weights = [w for part in ("networks", "ema") for net in state[part].values() for w in net.values()]
        assert sum(w.numel() for w in weights) == sum(sizes.values()) + sizes["student"]
        assert sum(m.numel() for m in moments if m.dim()) == 2 * sum(sizes.values())
        assert not any(isinstance(value, Tensor) for value in leaves(state["record"])), "digests alone"
        del state["record"]
        assert not any(role in key for key in keys(state) for role in ("teacher", "frozen"))


def leaves(value: object) -> list[object]:
    """Every value of nested dicts and lists."""
    if isinstance(value, dict | list | tuple):
        return [
            leaf for part in (value.values() if isinstance(value, dict) else value) for leaf in leaves(part)
        ]
    return [value]


def keys(value: object) -> list[str]:
    """Every key of nested dicts."""
    if not isinstance(value, dict):
        return []
    return [str(key) for key in value] + [key for part in value.values() for key in keys(part)]


@every_method
def test_the_teacher_s_bytes_stay_those_of_its_file(results, name):
    """Of DisBack, those of the node that was the last target."""
    nodes = sorted((results / "nodes").iterdir())
    assert len(nodes) == NODES + 1
    torch.manual_seed(1)
    files = {"disback": nodes[0], "plateau": nodes[2]}
    own = read_weights(files[name]) if name in files else METHODS[BUILDS[name]]().net.state_dict()
    for run in ("one", "world", "none", "one-on-two", "two-on-one"):
        kept = load(results / name / run, "found")
        assert {key.removeprefix("teacher.net.") for key in kept if key.startswith("teacher.")} == set(own)
        for key, value in own.items():
            assert torch.equal(kept[f"teacher.net.{key}"], value), f"{run}: {key}"


@every_method
def test_sharding_cuts_the_teacher_as_well(results, name):
    (whole,) = load(results / name / "one", "found")["held"].tolist()
    assert load(results / name / "none", "found")["held"].tolist() == [whole, whole]
    shares = load(results / name / "world", "found")["held"].tolist()
    assert sum(shares) == whole
    assert max(shares) < 0.55 * whole


def test_skipped_steps_say_nothing_of_a_plateau(tmp_path, monkeypatch):
    """Windows of two steps: means 1, 0.4, none at all, 0.1 and 0.1, of which only the last has not fallen by half."""
    write_nodes(tmp_path / "nodes")
    method, nodes, nan = make(plateau, World(), tmp_path / "nodes"), [], math.nan
    for loss in (1.0, nan, 0.4, 0.4, nan, nan, nan, 0.1, 0.1, 0.1):
        told = Loss(torch.tensor(loss))
        monkeypatch.setattr(DistributionMatching, "student_loss", lambda *_, told=told: told)
        method.student_loss(None, None)
        method.after_step()
        nodes.append(method.node)
    assert nodes == [3] * 9 + [2]


def alive() -> list[Denoiser | Tensor]:
    """Denoisers and tensors that the garbage collector knows and has not frozen."""
    gc.collect()
    return [thing for thing in gc.get_objects() if issubclass(type(thing), Denoiser | Tensor)]


@pytest.fixture
def nothing_alive() -> Iterator[None]:
    """Leaves out what was there before the test."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.mark.parametrize("name", ["sid", "gan_on_teacher", "plateau"])
def test_each_network_is_held_once_and_shares_nothing(name, tmp_path, nothing_alive):
    build: Build = BUILDS[name]
    write_nodes(tmp_path / "nodes")
    before = {id(thing): thing for thing in alive()}
    method = make(build, World(), tmp_path / "nodes")
    fit(method, tmp_path / "run", steps=2)
    there = [thing for thing in alive() if id(thing) not in before]
    teacher = method.frozen["teacher"]
    networks = [method.networks["student"], method.networks["fake"], method.ema["student"], teacher]
    assert {id(thing) for thing in there if isinstance(thing, Denoiser)} == {id(n) for n in networks}
    assert list(method.frozen) == ["teacher"]
    assert not {id(p) for p in method.parameters()} & {id(p) for p in teacher.parameters()}, "no submodule"

    everything = [*networks, *([method.networks["head"]] if "head" in method.networks else [])]
    places = [value.untyped_storage().data_ptr() for net in everything for value in net.state_dict().values()]
    assert len(set(places)) == len(places)

    # Copies that are no module: what has the shape of the largest weight is a weight, or a moment of a trained one.
    shape = max((p.shape for p in teacher.parameters()), key=lambda shape: shape.numel())
    each = sum(p.shape == shape for p in teacher.parameters())
    alike = {t.untyped_storage().data_ptr() for t in there if isinstance(t, Tensor) and t.shape == shape}
    assert len(alike) == each * (len(networks) + 2 * 2)
