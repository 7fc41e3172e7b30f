"""Every option of every method: another value of it changes what the method does, or is refused by name."""

from __future__ import annotations

import copy
import importlib
import inspect
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from method_support import draws, mlp, noise, optim, ring_batch
from tests_support import ROOT
from torch import Tensor, nn

from distill.data.batch import Batch
from distill.data.cond import Cond
from distill.engine.module import DistillModule
from distill.engine.update import Step
from distill.models.decoder import Pixels
from distill.models.denoiser import Denoiser
from distill.process.base import Process
from distill.process.edm import EDM
from distill.process.flow import Flow
from distill.process.vp import VPCosine, VPScaledLinear

CLASSES = 8
IMAGES = ("hipa", "mmd")  # methods that are shown images of the size SHAPE, the others points
SHAPE = (3, 4, 4)


class Brightness(nn.Module):
    """Features of images: the mean of each row."""

    def forward(self, images: Tensor) -> Tensor:
        return images.mean((1, 3))


class Rows:
    """Training data of one shape, in [-1, 1], with labels."""

    num_classes = CLASSES

    def __init__(self, shape: tuple[int, ...], seed: int = 3) -> None:
        self.sample_shape = shape
        self.data = torch.randn(32, *shape, generator=torch.Generator().manual_seed(seed)).tanh()

    def __len__(self) -> int:
        return len(self.data)

    def fetch(self, rows: Tensor, index: Tensor) -> Batch:
        return Batch(rows, index, Cond.of_labels(rows % CLASSES), x0=self.data[rows])


SCORE: dict[str, list[Any]] = {
    "sampling.levels": [[4.0]],
    "sampling.unit_noise": [(True, {"sampling.levels": [4.0]})],
    "sampling.labels": ["data"],
    "generator_times": [{"name": "uniform", "low": 0.3, "high": 0.6}],
    "fake.times": [{"name": "uniform", "low": 0.3, "high": 0.6}],
    "fake.weighting": ["edm"],
    "fake.sigma_data": [(0.7, {"fake.weighting": "edm"})],
    "reduction": ["sum"],
    "guidance.teacher": [2.0],
    "guidance.null_prob": [0.5],
    "updates.fake_per_student": [3],
    "updates.first": ["fake"],
    "updates.samples": ["fresh"],
    "noise_scale": [(0.5, {"sampling.levels": [4.0, 1.0]})],
}
MATCHING = SCORE | {
    "input": [("real_noised", {"sampling.levels": [4.0, 1.0], "sampling.labels": "data"})],
    "normalise": [False],
    "floor": [5.0],
    "gan": [{}, {"weight_g": 1.0}, {"weight_d": 1.0}, {"diffusion": False}, {"features": "teacher"}],
}
# option -> values that differ from the default, each alone or with what it needs.
OTHERS: dict[str, dict[str, list[Any]]] = {
    "agd": {"guidance_scale": [[1.0, 3.0]], "sample_scale": [3.0]},
    "consistency": {
        "scales": [9],
        "grid": ["karras"],
        "solver": ["euler"],
        "loss": ["huber", "l2", "l1"],
        "huber_c": [0.3, (0.3, {"loss": "huber"})],
        "weight": ["snr", "snr+1", "karras", "truncated-snr"],
        "target_decay": [0.9],
        "guidance_scale": [2.0],
        "sample_steps": [[1, 3]],
    },
    "consistency_training": {
        "curriculum": ["cm", "ict"],
        "total_steps": [64],
        "s0": [(4, {"curriculum": "cm"}), (20, {"curriculum": "ict"})],
        "s1": [(15, {"curriculum": "cm"}), (40, {"curriculum": "ict"})],
        "mu0": [(0.5, {"curriculum": "cm"})],
        "q": [4.0],
        "stages": [2],
        "mean": [-0.5, (-0.5, {"curriculum": "ict"})],
        "std": [1.0, (1.0, {"curriculum": "ict"})],
        "huber_c": [0.1, (0.1, {"curriculum": "ict"})],
        "sample_steps": [[1, 3]],
    },
    "degrade": {
        key: SCORE[key] for key in SCORE if key.startswith(("sampling.", "fake.")) or key == "reduction"
    }
    | {"total_steps": [7], "node_every": [2]},
    "denoising": {
        "null_prob": [0.5],
        "times": ["lognormal"],
        "mean": [(0.0, {"times": "lognormal"})],
        "std": [(0.5, {"times": "lognormal"})],
        "weight": [("edm", {"times": "lognormal", "process": EDM(), "kind": "x0"})],
    },
    "disback": MATCHING
    | {
        "backtrack.steps_per_node": [3],
        "backtrack.criterion": ["plateau"],
        "backtrack.window": [(7, {"backtrack.criterion": "plateau"})],
        "backtrack.tolerance": [(0.5, {"backtrack.criterion": "plateau"})],
    },
    "dmd": MATCHING,
    "flow_matching": {"null_prob": [0.5]},
    "guided": {
        "w_min": [(-0.5, {"w_max": 1.0, "w": 8})],
        "w_max": [(2.0, {"w_max": 1.0, "w": 8})],
        "weight": ["constant", "snr", "snr_trunc"],
        "clip": [0.1],
    },
    "hipa": {
        "level": [2.5],
        "mse": [0.5],
        "perceptual": [(0.5, {"features": Brightness().eval()})],
        "features": [Brightness().eval()],
        "high_frequency.fourier": [0.5],
        "high_frequency.edges": [0.5],
        "high_frequency.rho": [0.75],
        "high_frequency.luminance": [True],
    },
    "lcm": {
        "w_min": [0.5],
        "w_max": [3.0],
        "ddim_steps": [25],
        "loss": ["l2", "l1", "pseudo_huber"],
        "huber_c": [0.1],
        "target_decay": [0.5],
        "timestep_scaling": [0.01],
        "sample_steps": [[1, 2]],
        "sample_w": [0.5],
        "embed_w": [False],
    },
    "mmd": {
        "steps": [2],
        "grid": [{"name": "shifted", "factor": 3.0}],
        "guidance_scale": [2.0],
        "features": [Brightness().eval()],
        "feature_scale": ["rms"],
        "kernel.name": ["linear", "rbf", "rbf_mixture"],
        "kernel.degree": [2],
        "kernel.c": [2.0],
        "kernel.gamma": [0.5, "median"],
        "kernel.scales": [([1.0], {"kernel.name": "rbf_mixture"})],
        "estimator": ["biased"],
        "classes": [True, None],
        "real": [(Rows(SHAPE, seed=5), {"bank": None})],
        "bank": [None, 10],
        "clamp": ["none"],  # tests/unit/test_mmd.py compares the gradients of the others
        "precision": ["float32"],
        "recompute": [False],
        "dropout": [True],
    },
    "one_step": {"steps": [3], "t_eps": [0.1]},
    "progressive": {
        "steps": [4],
        # One step starts where all but "snr" weigh the same: no signal is left.
        "weight": [(name, {"steps": 4}) for name in ("constant", "snr", "snr+1")],
        "guidance_scale": [2.0],
        "w_min": [(-0.5, {"w_min": 0.0, "w_max": 1.0, "w": 8, "teacher_w": 8})],
        "w_max": [(2.0, {"w_min": 0.0, "w_max": 1.0, "w": 8, "teacher_w": 8})],
    },
    "reflow": {"null_prob": [0.5]},
    "sid": {key: value for key, value in SCORE.items() if key != "reduction"}
    | {
        "sampling.labels": ["uniform"],
        "alpha": [1.2],
        "guidance.fake": [(2.0, {"guidance.null_prob": 0.1})],
        "guidance.fake_train": [(2.0, {"guidance.null_prob": 0.1})],
        "updates.first": ["student"],
        "updates.samples": [("shared", {"updates.first": "student"})],
        "loss_scale_g": [1.0],
        "floor": [5.0],
    },
}
SETTINGS: dict[str, tuple[Process, str]] = {
    "guided": (VPCosine(), "v"),
    "lcm": (VPScaledLinear(), "v"),
    "progressive": (VPCosine(), "v"),
}
OF_TOKENS = (
    "autoregressive",
    "distilled_decoding",
    "distilled_decoding2",
    "teacher_score",
    "tokenizer",
)  # tests/unit/test_tokens.py has their options
PATHS = {
    path.stem: path
    for path in sorted((ROOT / "configs" / "method").glob("*.yaml"))
    if path.stem not in OF_TOKENS
}
CASES = [
    pytest.param(stem, option, value, id=f"{stem}-{option}-{number}")
    for stem, options in OTHERS.items()
    for option, values in options.items()
    for number, value in enumerate(values)
]


def method_class(path: Path) -> tuple[type[DistillModule], dict[str, Any]]:
    config = yaml.safe_load(path.read_text())
    module, _, name = config.pop("_target_").rpartition(".")
    return getattr(importlib.import_module(module), name), config


def made(stem: str, options: dict[str, Any]) -> DistillModule:
    cls, known = method_class(PATHS[stem])
    options = dict(options)
    process, kind = SETTINGS.get(stem, (Flow(), "velocity"))
    process, kind = options.pop("process", process), options.pop("kind", kind)
    embeds = stem in ("agd", "lcm") and options.get("embed_w", True)
    widths = {"student": options.pop("w", 8 if embeds else 0), "teacher": options.pop("teacher_w", 0)}
    taken = inspect.signature(cls).parameters
    samples: dict[str, Any] = {"shape": SHAPE, "decoder": Pixels()} if stem in IMAGES else {}
    given: dict[str, Any] = {
        role: mlp(process, kind, classes=CLASSES, w=widths.get(role, 0), seed=seed, **samples)
        for seed, role in enumerate(("teacher", "generator", "student"))
        if role in taken
    }
    given |= {"nodes": []} if "nodes" in taken else {}
    if "total_steps" in taken:
        known["total_steps"] = 16
    for name, value in options.items():
        block, _, inner = name.partition(".")
        known[block] = known[block] | {inner: value} if inner else value
    method = cls(**given, **known)
    if hasattr(method, "fake"):  # it starts as the teacher, where distribution matching has no loss
        for parameter in method.fake.parameters():
            torch.nn.init.normal_(parameter, std=0.2, generator=torch.Generator().manual_seed(4))
    method.prepare({update.name: optim() for update in method.updates()}, seed=0)
    method.before_training(Rows(method.student.sample_shape))
    for name, average in method.ema.items():  # a target that has fallen behind
        for parameter in average.parameters():
            parameter.data.mul_(1.0 if name in method.networks else 0.9)
    return method


def batch(shape: tuple[int, ...]) -> Batch:
    found = ring_batch(classes=CLASSES)
    if len(shape) == 1:
        z = noise(len(found), dtype=torch.float32)
        more = {"path": torch.stack([z, found.x0], 1), "guidance": torch.linspace(1, 4, len(found))}
        return Batch(**vars(found) | {"z": z, "times": torch.tensor([1.0, 0.0])} | more)
    x0, z = (torch.randn(len(found), *shape, generator=torch.Generator().manual_seed(n)) for n in (1, 2))
    return Batch(**vars(found) | {"x0": x0, "z": z})


def seen(method: DistillModule) -> dict[str, Any]:
    """What a method does: its losses, the course of its updates and averages, what its student is, its own rules."""
    found: dict[str, Any] = {"result": method.result(), "snapshots": list(method.snapshots())}
    for iteration in (0, 9):
        shared: dict[str, Any] = {}
        for update in method.plan:
            step = Step(iteration, draws(32).named(update.name), shared)
            found[f"{update.name}, {iteration}"] = update.loss(
                batch(method.student.sample_shape), step
            ).total.item()
    found["updates"] = [(update.name, update.every, update.start, update.mode) for update in method.plan]
    found["averages"] = {name: [average.decay(k) for k in (0, 5)] for name, average in method.further.items()}
    # Of DisBack's walk, which needs nodes to show, and of memory, which no number shows.
    rules = ("path", "criterion", "window", "tolerance", "recompute")
    found["rules"] = [copy.deepcopy(getattr(method, name, None)) for name in rules]
    return found


def test_every_option_is_here() -> None:
    def names(config: dict[str, Any]) -> set[str]:
        blocks = {name: value for name, value in config.items() if isinstance(value, dict)}
        return {*config} - {*blocks} | {f"{block}.{name}" for block in blocks for name in blocks[block]}

    assert {stem: names(method_class(path)[1]) for stem, path in PATHS.items()} == {
        stem: set(options) for stem, options in OTHERS.items()
    }


@pytest.mark.parametrize(("stem", "option", "value"), CASES)
def test_another_value_does_something_else(stem: str, option: str, value: Any) -> None:
    value, needs = value if isinstance(value, tuple) else (value, {})
    one, other = seen(made(stem, needs)), seen(made(stem, needs | {option: value}))
    assert one != other
    assert seen(made(stem, needs)) == one


IDLE: list[tuple[str, dict[str, Any], str]] = [
    (
        "consistency",
        {"loss": "l2", "huber_c": 0.1},
        "huber_c: found 0.1, which changes nothing with the loss 'l2'",
    ),
    ("consistency_training", {"mu0": 0.5}, "mu0: found 0.5, which changes nothing with the curriculum 'ect'"),
    (
        "consistency_training",
        {"curriculum": "cm", "q": 4.0},
        "q: found 4.0, which changes nothing with the curriculum 'cm'",
    ),
    ("consistency_training", {"curriculum": "cm", "stages": 4}, "stages: found 4, which changes nothing"),
    ("consistency_training", {"curriculum": "cm", "mean": 0.0}, "mean: found 0.0, which changes nothing"),
    (
        "consistency_training",
        {"curriculum": "cm", "huber_c": 0.1},
        "huber_c: found 0.1, which changes nothing",
    ),
    ("consistency_training", {"curriculum": "ict", "mu0": 0.5}, "mu0: found 0.5, which changes nothing"),
    ("consistency_training", {"curriculum": "ict", "q": 4.0}, "q: found 4.0, which changes nothing"),
    ("consistency_training", {"s0": 4}, "s0, s1: found 4 and None, but 'ect' has no levels to count"),
    (
        "denoising",
        {"mean": 0.0},
        "mean: found 0.0, which changes nothing where times are uniform; expected -1.2",
    ),
    ("denoising", {"std": 0.5}, "std: found 0.5, which changes nothing where times are uniform"),
    (
        "degrade",
        {"fake.sigma_data": 0.7},
        "fake.sigma_data: found 0.7, which changes nothing with the weighting 'flow'",
    ),
    ("degrade", {"sampling.unit_noise": True}, "sampling.unit_noise: found true, which changes nothing"),
    (
        "disback",
        {"backtrack.window": 7},
        "backtrack.window: found 7, which changes nothing with the criterion",
    ),
    ("disback", {"backtrack.tolerance": 0.5}, "backtrack.tolerance: found 0.5, which changes nothing"),
    (
        "disback",
        {"backtrack.criterion": "plateau", "backtrack.steps_per_node": 3},
        "backtrack.steps_per_node: found 3, which changes nothing",
    ),
    (
        "dmd",
        {"normalise": False, "floor": 0.1},
        "floor: found 0.1, which changes nothing without `normalise`",
    ),
    ("dmd", {"gan": {"groups": 4}}, "gan.groups: found 4, which changes nothing for features of shape"),
    (
        "dmd",
        {"gan": {"weight_g": 0.0, "weight_d": 0.0}},
        "gan.weight_g, weight_d: found 0 and 0, which changes nothing",
    ),
    ("dmd", {"noise_scale": 0.5}, "noise_scale: found 0.5, which changes nothing for a student of one step"),
    ("dmd", {"fake.sigma_data": 0.7}, "fake.sigma_data: found 0.7, which changes nothing with the weighting"),
    ("hipa", {"perceptual": 0.5}, "perceptual: found 0.5, which changes nothing without `features`"),
    ("lcm", {"loss": "l1", "huber_c": 0.1}, "huber_c: found 0.1, which changes nothing with the loss 'l1'"),
    (
        "lcm",
        {"w_min": 1.0, "w_max": 1.0, "w": 0, "sample_w": 2.0},
        "sample_w: found 2.0, expected 1.0 .. 1.0",
    ),
    (
        "lcm",
        {"embed_w": False, "sample_w": 0.5},
        "sample_w: found 0.5, which changes nothing for a student without the input w",
    ),
    (
        "lcm",
        {"embed_w": False, "w_min": 1.0, "w_max": 1.0},
        "embed_w: found False, which changes nothing for one value of w",
    ),
    (
        "lcm",
        {"w": 0},
        r"w_min, w_max, embed_w: found 0.0, 1.0, True, expected a student with a guidance embedding",
    ),
    ("sid", {"guidance.fake": 2.0}, "guidance.null_prob: found 0, but guidance.fake = 2.0 needs"),
    ("sid", {"noise_scale": 0.5}, "noise_scale: found 0.5, which changes nothing for a student of one step"),
    ("sid", {"sampling.unit_noise": True}, "sampling.unit_noise: found true, which changes nothing"),
    (
        "dmd",
        {"updates.first": "fake", "updates.samples": "shared"},
        "updates.samples: found 'shared' with updates.first 'fake'",
    ),
]


@pytest.mark.parametrize(
    ("stem", "options", "message"), IDLE, ids=[f"{n}-{case[0]}" for n, case in enumerate(IDLE)]
)
def test_what_would_do_nothing_is_refused(stem: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}"):
        made(stem, options)


@pytest.mark.parametrize(
    ("stem", "options", "message"),
    [
        (
            "flow_matching",
            {"null_prob": 0.5},
            "null_prob: found 0.5, which changes nothing for a net without classes",
        ),
        (
            "reflow",
            {"null_prob": 0.5},
            "null_prob: found 0.5, which changes nothing for a net without classes",
        ),
        (
            "denoising",
            {"null_prob": 0.5},
            "null_prob: found 0.5, which changes nothing for a net without classes",
        ),
        (
            "consistency",
            {"guidance_scale": 2.0},
            "guidance_scale: found 2.0, but the teacher was trained without a null",
        ),
        (
            "progressive",
            {"guidance_scale": 2.0},
            "guidance_scale: found 2.0, but the teacher was trained without a null",
        ),
        ("guided", {"w_max": 2.0}, "w_max: found 2.0, but the teacher was trained without a null condition"),
        ("lcm", {"w_max": 2.0}, "w_max: found 2.0, but the teacher was trained without a null condition"),
        (
            "sid",
            {"guidance": {"teacher": 2.0}},
            "guidance.teacher: found 2.0, but the teacher was trained without a null",
        ),
        (
            "dmd",
            {"guidance": {"null_prob": 0.5}},
            "guidance.null_prob: found 0.5, but the teacher has no conditions to drop",
        ),
    ],
)
def test_models_without_conditions_are_neither_guided_nor_unguided(
    stem: str, options: dict[str, Any], message: str
) -> None:
    cls, known = method_class(PATHS[stem])
    process, kind = SETTINGS.get(stem, (Flow(), "velocity"))
    w = 8 if stem in ("lcm", "guided") else 0
    given: dict[str, Denoiser] = {"student": mlp(process, kind, seed=1, w=w, guidable=True)}
    if "teacher" in inspect.signature(cls).parameters:
        given["teacher"] = mlp(process, kind, guidable=True)
    with pytest.raises(ValueError, match=f"^{message}"):
        cls(**given, **{**known, **options})
