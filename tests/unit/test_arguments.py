"""Arguments from Python are checked as those of a command line: nothing is taken for what it is not."""

from __future__ import annotations

import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from distill.data.arguments import device, finite, integer
from distill.data.cond import Cond
from distill.data.digits import Digits
from distill.data.points import Points
from distill.data.rng import Draws, sample_noise, stream_key
from distill.data.tensors import Tensors
from distill.evaluation.grid import image_grid, save_png, tile
from distill.evaluation.measure import Reference, measure
from distill.models.analytic import exact_denoiser
from distill.models.denoiser import Denoiser
from distill.models.features import load_digits64
from distill.models.generator import Generator
from distill.models.spec import SamplerSpec
from distill.nets.mlp import MLP
from distill.nets.unet import UNet
from distill.process.flow import Flow

NO_INTEGERS = [
    0.0,
    1.5,
    None,
    True,
    "0",
    [0],
    np.float64(0),
    np.bool_(True),
    torch.tensor(0.0),
    torch.tensor(True),
]
NO_INTEGERS += [torch.tensor([0]), np.array([0]), math.nan, 1j]
ZEROS = [0, np.int64(0), np.uint8(0), np.array(0), torch.tensor(0), torch.tensor(0, dtype=torch.int32)]
NO_NUMBERS = ["1", None, True, math.nan, math.inf, -math.inf, [1.0], torch.tensor([1.0]), np.array([1.0]), 1j]
NO_NUMBERS += [torch.tensor(math.nan), np.float32("inf"), np.bool_(True)]


@pytest.fixture(scope="module")
def model() -> Generator:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = UNet(width=8, embedding=16, groups=4, num_classes=10)
        for parameter in net.parameters():
            torch.nn.init.normal_(parameter, std=0.1)
    denoiser = Denoiser(net, Flow(), "velocity", (1, 8, 8), guidable=True)
    return Generator(denoiser.eval(), SamplerSpec(steps=1, any_steps=True))


def short(value: object) -> str:
    return f"{type(value).__name__}-{value}"


@pytest.mark.parametrize("value", ZEROS, ids=short)
def test_integers_of_every_library_are_the_same_seed(model: Generator, value: object) -> None:
    ids = torch.arange(3)
    assert stream_key(value, "x", 1) == stream_key(0, "x", 1)  # type: ignore[arg-type]
    assert torch.equal(sample_noise(value, "x", ids, (4,)), sample_noise(0, "x", ids, (4,)))  # type: ignore[arg-type]
    drawn = Draws(value, "x", value, ids).normal("a", (3,))  # type: ignore[arg-type]
    assert torch.equal(drawn, Draws(0, "x", 0, ids).normal("a", (3,)))
    assert torch.equal(model.sample(2, seed=value), model.sample(2, seed=0))  # type: ignore[arg-type]
    assert torch.equal(model.sample(2, value), model.sample(2, 0))  # type: ignore[arg-type]


@pytest.mark.parametrize("value", NO_INTEGERS, ids=short)
@pytest.mark.parametrize("name", ["seed", "count", "steps", "batch_size"])
def test_what_is_no_integer_is_refused(model: Generator, name: str, value: object) -> None:
    if value is None and name == "steps":
        return  # the model's own
    given = {"count": 2} | {name: value}
    with pytest.raises(ValueError, match=f"^{name}: found .*, expected an integer"):
        model.sample(**given)  # type: ignore[arg-type]


@pytest.mark.parametrize("value", NO_INTEGERS, ids=short)
def test_draws_refuse_seeds_that_are_none(value: object) -> None:
    for call in (
        lambda: stream_key(value, "x"),  # type: ignore[arg-type]
        lambda: stream_key(0, "x", value),  # type: ignore[arg-type]
        lambda: sample_noise(value, "x", torch.arange(2), (3,)),  # type: ignore[arg-type]
        lambda: Draws(value, "x", 0, torch.arange(2)).uniform("a"),  # type: ignore[arg-type]
        lambda: Points(ring={"count": 2, "radius": 1.0}, count=4, seed=value),  # type: ignore[arg-type]
    ):
        if isinstance(value, str) and call.__code__.co_consts[1:2] == (0,):
            continue  # a part of a stream may be text
        with pytest.raises(ValueError, match="expected an integer"):
            call()


def test_ids_are_integers() -> None:
    for ids in (torch.tensor([0.0]), torch.tensor(0), [0], torch.tensor([True])):
        with pytest.raises(ValueError, match="ids: found"):
            sample_noise(0, "x", ids, (3,))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "labels",
    [[3, 1], (3, 1), np.array([3, 1]), np.array([3, 1], np.uint8), torch.tensor([3, 1], dtype=torch.int8)],
)
def test_labels_of_every_library(model: Generator, labels: object) -> None:
    expected = model.sample(2, torch.tensor([3, 1]))
    assert torch.equal(model.sample(2, labels), expected)  # type: ignore[arg-type]
    assert Cond.of_labels(labels).get("label").tolist() == [3, 1]  # type: ignore[arg-type, union-attr]


@pytest.mark.parametrize(
    "labels",
    [2.7, [2.7, 1.0], np.array([1.5, 2]), torch.tensor([1.0, 2.0]), True, [True, False], "3", ["3", "1"]],
)
def test_labels_that_are_no_integers(model: Generator, labels: object) -> None:
    with pytest.raises(ValueError, match="label: "):
        model.sample(2, labels)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="label: "):
        Cond.of_labels(labels)  # type: ignore[arg-type]


def test_labels_outside_the_classes(model: Generator) -> None:
    for wrong in (10, [0, 10], -1, torch.tensor([-2, 0])):
        with pytest.raises(ValueError, match=re.escape("label: expected classes 0 .. 9, found ")):
            model.sample(2, wrong)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="one label or 3 of them, found 2"):
        model.sample(3, [0, 1])


@pytest.mark.parametrize("kind", ["unet", "mlp", "exact"])
def test_a_class_that_does_not_exist_is_not_the_null_condition(model: Generator, kind: str) -> None:
    if kind == "unet":
        denoiser, classes = model.denoiser, 10
    elif kind == "mlp":
        denoiser, classes = Denoiser(MLP(num_classes=4), Flow(), "velocity", (2,)), 4
    else:
        denoiser, classes = exact_denoiser(Flow(), labelled=True), 8
    x, t = torch.zeros(2, *denoiser.sample_shape), torch.full((2,), 0.5)
    for label in (classes, classes + 1, -2):
        with pytest.raises(ValueError, match=f"expected classes 0 .. {classes - 1} or -1"):
            denoiser.x0(x, t, Cond(2, {"label": torch.tensor([0, label])}))
        with pytest.raises(ValueError, match=f"expected classes 0 .. {classes - 1} or -1"):
            Cond.of_labels([0, label], num_classes=classes)
    null = denoiser.x0(x, t, Cond.of_labels([-1, 0]))
    assert torch.isfinite(null).all()


@pytest.mark.parametrize("value", NO_NUMBERS, ids=short)
def test_what_is_no_number_is_refused(model: Generator, value: object) -> None:
    with pytest.raises(ValueError, match=r"^x: found .*, expected a finite number"):
        finite("x", value)
    if value is not None:
        with pytest.raises(ValueError, match=r"guidance_scale: found .*, expected a finite number"):
            model.sample(2, guidance_scale=value)  # type: ignore[arg-type]
        with pytest.raises(ValueError, match="guidance_w: "):
            Cond.nothing(2).with_guidance(value)  # type: ignore[arg-type]


def test_numbers_of_every_library(model: Generator) -> None:
    expected = model.sample(2, guidance_scale=1.5)
    for value in (np.float32(1.5), np.float64(1.5), torch.tensor(1.5), np.array(1.5)):
        assert finite("x", value) == 1.5
        assert torch.equal(model.sample(2, guidance_scale=value), expected)  # type: ignore[arg-type]
    assert integer("x", np.int32(3), at_least=3) == 3
    with pytest.raises(ValueError, match="x: expected at least 3, found 2"):
        integer("x", 2, at_least=3)


def test_force_is_true_or_false(model: Generator) -> None:
    for value in ("no", 1, None):
        with pytest.raises(ValueError, match="force: found"):
            model.sample(2, force=value)  # type: ignore[arg-type]


@pytest.mark.parametrize("value", ["gpu", "cuda:99", 3.5, "", ["cpu"]])
def test_devices_are_those_of_this_machine(model: Generator, value: object) -> None:
    for call in (lambda: device("device", value), lambda: model.to(value)):  # type: ignore[arg-type]
        with pytest.raises(ValueError, match=r"device: found .*, expected a device of this machine"):
            call()


def wrong_images() -> dict[str, tuple[object, str]]:
    """Sets that are no images in [-1, 1]."""
    images = Digits().images[:40]
    return {
        "bytes": (images.add(1).mul(127.5).to(torch.uint8), "found values of torch.uint8"),
        "[0, 255]": (images.add(1).mul(127.5), "found values 0 .. 255"),
        "[0, 16]": (images.add(1).mul(8), "found values 0 .. 16"),
        "[0, 2]": (images.add(1), "found values 0 .. 2"),
        "far": (images.mul(100), "found values -100 .. 100"),
        "integers": (images.to(torch.int64), "found values of torch.int64"),
        "no batch": (images[0, 0], "8\\]"),
        "numpy": (images.numpy(), "N, "),
        "nothing": (images[:0], "N > 0|N >= 1"),
        "nan": (torch.full_like(images, math.nan), "non-finite"),
    }


@pytest.mark.parametrize("name", list(wrong_images()))
def test_images_of_another_range_are_refused(name: str, tmp_path: Path) -> None:
    images, told = wrong_images()[name]
    digits, extractor = Digits(), load_digits64()
    reference = Reference(digits.images[:200], digits.labels[:200], extractor)
    with pytest.raises(ValueError, match=told):
        measure(images, None, reference, extractor)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=told):
        Reference(images, None, extractor)  # type: ignore[arg-type]
    with pytest.raises((ValueError, AttributeError), match=f"{told}|split"):
        tile(images, 4)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=told):
        image_grid([("a", images)])  # type: ignore[list-item]


@pytest.mark.filterwarnings("ignore:.*singular")
def test_images_that_are_seldom_meant_get_a_word() -> None:
    digits, extractor = Digits(), load_digits64()
    reference = Reference(digits.images[:200], digits.labels[:200], extractor)
    for images, told in (
        (digits.images[:40].add(1).div(2), "found no value below 0"),
        (digits.images[:40].mul(1.5), r"found values -1.5 .. 1.5, expected \[-1, 1\]"),
    ):
        with pytest.warns(UserWarning, match=told):
            measure(images, None, reference, extractor)
    as_double = measure(digits.images[:40].double(), None, reference, extractor)
    assert as_double == measure(digits.images[:40], None, reference, extractor)


def test_a_picture_is_saved_and_nothing_else(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="image: found Tensor, expected a picture"):
        save_png(Digits().images[:4], tmp_path / "a.png")  # type: ignore[arg-type]
    assert not (tmp_path / "a.png").exists()


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"x0": [[1.0]]}, "x0: found list"),
        ({"x0": torch.zeros(2, 3, dtype=torch.int64)}, "x0: found values of torch.int64"),
        ({"x0": torch.full((2, 3), math.nan)}, "x0: found values that are not finite"),
        ({"x0": torch.zeros(2, 3), "z": torch.full((2, 3), math.inf)}, "z: found values that are not finite"),
        ({"x0": 255 * torch.rand(2, 1, 4, 4)}, "x0: found values .*, expected"),
        ({"x0": torch.zeros(2, 3), "labels": torch.tensor([True, False])}, "labels: expected 2 integers"),
        ({"x0": torch.zeros(2, 3), "labels": [0, 1]}, "labels: found list"),
    ],
)
def test_tensors_as_data(given: dict[str, Tensor], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        Tensors(**given)


@pytest.mark.parametrize(
    ("made", "message"),
    [
        (lambda: Cond(2.0), "size: found 2.0, expected an integer"),  # type: ignore[arg-type]
        (lambda: Cond(-1), "size: expected at least 0"),
        (
            lambda: Cond(2, {"label": torch.tensor([1])}),
            r"label: expected a tensor \[2\] of torch.int64, found .*\[1\]",
        ),
        (
            lambda: Cond(1, {"label": torch.tensor([1.0])}),
            r"label: expected a tensor \[1\] of torch.int64, found .*float",
        ),
        (lambda: Cond(1, {"label": [1]}), "label: .*found list"),  # type: ignore[arg-type]
        (
            lambda: Cond(2, {"guidance_w": torch.zeros(1)}),
            r"guidance_w: expected a tensor \[2\] of torch.float32",
        ),
        (lambda: Cond(1, {"guidance_w": torch.tensor([True])}), "guidance_w: .*found torch.bool"),
    ],
)
def test_a_condition_made_by_hand_is_checked(made: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        made()  # type: ignore[operator]


def test_noise_conditions_and_ids_that_do_not_belong_together(model: Generator) -> None:
    z, cond = torch.randn(2, 1, 8, 8), Cond.of_labels([1, 2])
    for call in (model.generate, model.one_step):
        assert call(z, cond).shape == z.shape
        with pytest.raises(ValueError, match="cond: found 2 conditions for 1 samples"):
            call(z[:1], cond)
        with pytest.raises(ValueError, match=r"z: expected noise \[B, 1, 8, 8\], found .*\[2, 8, 8\]"):
            call(z[:, 0], cond)
        with pytest.raises(ValueError, match=r"z: expected noise .* found torch.int64"):
            call(z.long(), cond)
    for ids in (torch.tensor([2]), torch.tensor([-1]), torch.tensor([0.5]), [0]):
        with pytest.raises(ValueError, match="ids: "):
            model.sample_ids(ids, cond, seed=0, stream="sample")  # type: ignore[arg-type]
