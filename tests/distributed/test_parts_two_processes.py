"""Two processes train parts of networks as one does: heads, adapters and terms on one base, blocks in blocks; and losses over
the rows of all processes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from test_two_processes import assert_close, load, start

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> Path:
    """The folder where both worlds have done all jobs."""
    folder = tmp_path_factory.mktemp("parts")
    jobs = [f"parts_worker.{name}" for name in ("parts", "lora", "guidance", "rows", "mmd")]
    start(folder, 1, *jobs)
    start(folder, 2, *jobs, "parts_worker.nested")
    return folder


def test_no_process_holds_a_network_that_is_sharded(tmp_path):
    """Memory of five networks (teacher, student, fake score, two averages) that start from files, in units of one: [process,
    once they are built or once they are placed]."""
    for size in (1, 2):  # by themselves: other jobs leave memory that is used again
        start(tmp_path, size, "parts_worker.mapped")
    one, two = load(tmp_path, "mapped-1"), load(tmp_path, "mapped-2")
    assert bool((one["memory"] > 4.5).all()), one["memory"]
    assert bool((two["memory"][:, 0] < 0.5).all()), two["memory"]
    assert bool((two["memory"][:, 1] < 2.8).all()), two["memory"]
    assert_close(one["weights"], two["weights"], 1e-7)


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("bank", [0, 40])
@pytest.mark.parametrize("shard", ["none", "world"])
def test_one_mmd_over_all_processes(results, shard, bank, accumulate):
    """The gradient of one process with one micro batch, whatever the processes and micro batches."""
    one = load(results, f"mmd-none-{bank}-1-1")
    for size in (1, 2):
        found = load(results, f"mmd-{shard}-{bank}-{accumulate}-{size}")
        assert found.keys() == one.keys()
        for name, gradient in one.items():
            assert float(gradient.norm()) > 1e-6, name
            assert float((found[name] - gradient).norm()) < 1e-4 * float(gradient.norm()), (size, name)


def test_blocks_in_blocks_and_methods_beside_forward_have_the_gradients_of_the_whole_net(results):
    found = load(results, "nested")
    assert {name: len(gradients) for name, gradients in found.items()} == {"forward": 22, "logits": 2}
    assert all(difference < 1e-6 for gradients in found.values() for difference in gradients.values())


@pytest.mark.parametrize("shard", ["none", "world"])
@pytest.mark.parametrize("name", ["head", "heads"])
def test_parts_of_networks_are_trained_as_on_one_process(results, name, shard):
    """A head, two heads on one base."""
    one, two = load(results, f"{name}-{shard}-1"), load(results, f"{name}-{shard}-2")
    assert len(one) == {"head": 42, "heads": 70}[name]
    assert_close(one, two)
    frozen = [key for key in one if "base" in key or "gain" in key]
    assert len(frozen) == {"head": 30, "heads": 50}[name]
    assert all(torch.equal(one[key], two[key]) for key in frozen)


@pytest.mark.parametrize("shard", ["none", "world"])
def test_adapters_on_one_base_are_trained_as_on_one_process(results, shard):
    """Student, fake score, averages and teacher hold the base once, and on two processes a half of it each."""
    one, two = load(results, f"lora-{shard}-1"), load(results, f"lora-{shard}-2")
    assert_close(one["weights"], two["weights"])
    for found in (one["weights"], two["weights"]):  # the base stays as it was, bit by bit
        base = {
            key.removeprefix("before."): value for key, value in found.items() if key.startswith("before.")
        }
        assert len(base) > 10
        assert all(torch.equal(found[f"frozen.teacher.{key}"], value) for key, value in base.items())
    moved = [key for key in one["weights"] if key.endswith("lora_B.weight") and one["weights"][key].any()]
    assert len(moved) >= 20
    numbers = one["numbers"]
    adapters = numbers["whole"] - numbers["teacher"]
    assert 0 < adapters < 4 * 0.8 * numbers["teacher"], "four adapters, one base"
    assert two["numbers"]["whole"] == numbers["whole"]
    if shard == "world":
        assert two["numbers"]["local"] <= 0.55 * numbers["whole"]


@pytest.mark.parametrize("kind", ["embedding", "offset"])
@pytest.mark.parametrize("shard", ["none", "world"])
def test_guidance_terms_are_trained_as_on_one_process(results, shard, kind):
    one, two = load(results, f"guidance-{kind}-{shard}-1"), load(results, f"guidance-{kind}-{shard}-2")
    assert_close(one, two)
    terms = [key for key in one if key.startswith("terms.")]
    assert len(terms) >= 1
    assert all(one[key].any() for key in terms if key.endswith(("out.weight", "out.3.weight")))


def test_rows_of_all_processes_give_the_gradient_of_the_whole_batch(results):
    one, two = load(results, "rows-1"), load(results, "rows-2")
    assert torch.equal(one["labels"], two["labels"])
    assert_close(one, two)
