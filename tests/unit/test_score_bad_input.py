"""Wrong input to SiD, DMD, DisBack and Degrade ends in an error that names the field, what was found and what is expected."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_support import edited
from hydra import compose, initialize_config_dir
from method_support import mlp, nested, optim, prepared, ring_batch, step, trained
from omegaconf import OmegaConf
from torch import nn

from distill.data.cond import Cond
from distill.files import read_json, write_json
from distill.methods.degrade import Degrade
from distill.methods.disback import DisBack
from distill.methods.dmd import DMD
from distill.methods.losses.score_times import times_of
from distill.methods.sid import SiD
from distill.models.denoiser import Denoiser
from distill.models.native import save_model
from distill.models.spec import SamplerSpec
from distill.nets.unet import UNet
from distill.process.base import Process
from distill.process.edm import EDM
from distill.process.flow import Flow
from distill.process.vp import VPCosine, VPScaledLinear
from distill.recipe.compose import CONFIGS, register_recipes
from distill.recipe.plan import plan, refuse_changes
from distill.stages.nodes import check_path, read_nodes, write_manifest

CLASSES = 8


def disback(student: Denoiser, teacher: Denoiser, **options: Any) -> DisBack:
    return DisBack(student, teacher, [], **options)


MAKERS: dict[str, Callable[..., Any]] = {"sid": SiD, "dmd": DMD, "disback": disback, "degrade": Degrade}
SCORE = ["sid", "dmd", "disback"]


def refused(names: list[str], message: str, *, net: Mapping[str, Any] | None = None, **options: Any) -> None:
    """Every method of `names` refuses the options with the message."""
    given = {"process": Flow(), "kind": "velocity"} | dict(net or {})
    for name in names:
        with pytest.raises(ValueError, match=message):
            MAKERS[name](mlp(seed=1, **given), mlp(seed=0, **given), **nested(options))


# ---- where the student's steps start ----


def test_a_student_of_noise_predictions_does_not_start_where_they_are_multiplied_by_thousands() -> None:
    net = {"process": VPCosine(), "kind": "eps"}
    refused(SCORE, r"levels: the first is 2\.\d+e\+04, and a student that predicts eps multiplies", net=net)
    refused(SCORE, r"levels: the first is 101, and a student", net=net, levels=[101.0])
    for given in ({"levels": [99.0]}, {"levels": [2.5]}):
        DMD(mlp(seed=1, **net), mlp(**net), sampling=given)
    # Stable Diffusion's own first step, and any student that predicts something else.
    for process, kind in ((VPScaledLinear(), "eps"), (VPCosine(), "v")):
        DMD(mlp(process, kind, seed=1), mlp(process, kind))


def test_noised_data_have_a_level() -> None:
    options = {"input": "real_noised", "levels": [4.0, 1.0], "labels": "data", "unit_noise": True}
    refused(["dmd", "disback"], "unit_noise: found true, but with input 'real_noised'", **options)


LEVELS = [
    (EDM(), [0.0], r"levels: found \[0.0\], expected a list of positive, falling noise levels, or null"),
    (EDM(), [-2.5], r"levels: found \[-2.5\]"),
    (EDM(), [], r"levels: found \[\]"),
    (EDM(), [math.nan], r"sampling.levels\[0\]: found nan, expected a finite number"),
    (EDM(), 2.5, "sampling.levels: found 2.5, expected a list of float or null"),
    (EDM(), "2.5", "sampling.levels: found '2.5', expected a list"),
    (EDM(), ["2.5"], r"sampling.levels\[0\]: found '2.5', expected float"),
    (EDM(), [1.0, 2.5], r"levels: found \[1.0, 2.5\], expected a list of positive, falling"),
    (EDM(), [2.5, 2.5], r"levels: found \[2.5, 2.5\]"),
    (EDM(), [81.0], r"levels: found \[81.0\], expected noise levels that EDM\(.*\) has: 0 .. 80"),
    (EDM(), [math.inf], r"sampling.levels\[0\]: found inf, expected a finite number"),
    (VPScaledLinear(), [80.0, 2.5], r"expected noise levels that VPScaledLinear\(.*\) has: 0.02\d+ .. 14.6"),
    (VPScaledLinear(), [2.5, 0.001], "levels: found"),
]


@pytest.mark.parametrize(("process", "levels", "message"), LEVELS)
def test_levels(process: Process, levels: Any, message: str) -> None:
    refused(list(MAKERS), message, net={"process": process, "kind": "x0"}, levels=levels)


# ---- options of the methods ----

UNIFORM = {"name": "uniform"}
OPTIONS = [
    (["sid"], {"alpha": math.nan}, "alpha: found nan, expected a finite number"),
    (["sid"], {"alpha": math.inf}, "alpha: found inf"),
    (["sid"], {"loss_scale_g": 0.0}, "loss_scale_g: expected a positive number, found 0.0"),
    (["sid"], {"loss_scale_g": math.inf}, "loss_scale_g: .*found inf"),
    (["sid"], {"floor": 0.0}, "floor: expected a positive number, found 0.0"),
    (["dmd", "disback"], {"floor": -1e-3}, "floor: expected a finite number of at least 0, found -0.001"),
    (["dmd", "disback"], {"floor": math.inf}, "floor: .*found inf"),
    (["dmd", "disback"], {"floor": math.nan}, "floor: .*found nan"),
    (SCORE, {"fake_updates_per_generator": 0}, "updates.fake_per_student: found 0, expected at least 1"),
    (SCORE, {"fake_updates_per_generator": 2.5}, "updates.fake_per_student: found 2.5, expected int"),
    (SCORE, {"noise_scale": 0.0}, r"noise_scale: found 0.0, expected a number in \(0, 1.5\]"),
    (SCORE, {"noise_scale": -1.0}, "noise_scale: found -1.0"),
    (SCORE, {"noise_scale": 1.6}, "noise_scale: found 1.6"),
    (SCORE, {"noise_scale": math.nan}, "noise_scale: found nan"),
    (list(MAKERS), {"labels": "none"}, "sampling.labels: found 'none', expected one of 'data', 'uniform'"),
    (list(MAKERS), {"weighting": "snr"}, "fake.weighting: found 'snr', expected one of 'auto', 'edm', 'eps'"),
    (list(MAKERS), {"weighting": "v"}, "fake.weighting: found 'v': kind 'v' needs"),
    (list(MAKERS), {"sigma_data": 0.0}, "fake.sigma_data: found 0.0, expected a positive number"),
    (list(MAKERS), {"sigma_data": math.inf}, "fake.sigma_data: found inf"),
    (["dmd", "disback", "degrade"], {"reduction": "max"}, "reduction: found 'max', expected 'sum' or 'mean'"),
    (["dmd", "disback"], {"input": "clean"}, "input: found 'clean', expected 'backward_sim' or 'real_noised'"),
    (["dmd", "disback"], {"input": "real_noised"}, "input: found 'real_noised' for a student of one step"),
    (["disback"], {"steps_per_node": 0}, "steps_per_node: found 0, expected at least 1"),
    (["disback"], {"steps_per_node": [5]}, "steps_per_node: found 1 numbers for the 0 stored targets"),
    (["disback"], {"criterion": "loss"}, "backtrack.criterion: found 'loss', expected one of 'steps', 'plateau'"),
    (["disback"], {"criterion": "plateau", "window": 0}, "backtrack.window, tolerance: found 0"),
    (["disback"], {"criterion": "plateau", "tolerance": 1.0}, "backtrack.window, tolerance: found 50 and 1.0"),
    (["degrade"], {"total_steps": 0}, "total_steps: found 0, expected at least 1, or null"),
    (["degrade"], {"total_steps": 10, "node_every": 0}, "node_every: found 0"),
]  # fmt: skip


@pytest.mark.parametrize(("names", "options", "message"), OPTIONS)
def test_options(names: list[str], options: dict[str, Any], message: str) -> None:
    refused(names, message, **options)


TIMES = [
    ("sid", "generator_times: found 'sid', expected "),
    ({"t_max": 800.0}, "generator_times.name: found None, expected one of"),
    ({"name": "cosine"}, r"generator_times.name: found 'cosine', expected one of \['karras'"),
    (
        {"name": "sid", "t_max": 0.0},
        r"generator_times: .* t_max: found 0.0, expected a number in \(0, 1000\]",
    ),
    ({"name": "sid", "t_max": 1000.5}, "generator_times: .*t_max: found 1000.5"),
    ({"name": "sid", "t_max": math.nan}, "generator_times: .*t_max: found nan"),
    (
        {"name": "sid", "tmax": 800.0},
        r"generator_times.tmax: no such key, did you mean generator_times.t_max\?; expected t_max",
    ),
    ({"name": "karras", "low": 5, "high": 4}, "low, high: found 5 and 4, expected 0 <= low <= high < 1000"),
    ({"name": "karras", "high": 1000}, "low, high: found 20 and 1000"),
    ({"name": "uniform", "low": -0.1}, "generator_times: found {'low': -0.1} for 'uniform': expected shares"),
    ({"name": "uniform", "low": 0.7, "high": 0.6}, "expected shares of the range of times, 0 <= low <= high"),
    ({"name": "uniform", "high": 20.0}, "expected shares of the range"),
    ({"name": "lognormal", "std": 0.0}, "for 'lognormal': expected a finite mean and a positive std"),
    ({"name": "logit_normal", "mean": math.inf}, "for 'logit_normal': expected a finite mean"),
]


@pytest.mark.parametrize(("times", "message"), TIMES)
def test_times(times: Any, message: str) -> None:
    refused(SCORE, message, generator_times=times)
    refused(list(MAKERS), message.replace("generator_times", "fake.times"), fake_times=times)


def test_levels_that_a_table_does_not_have_are_told() -> None:
    """They would heap up at its ends; where the range holds all of them, nothing is said."""
    karras = {"name": "karras", "low": 0, "high": 999}
    with pytest.warns(
        UserWarning, match=r"t: 'karras' draws noise levels 0.002 .. 80, .* has 0.0\d+ .. 14.6"
    ):
        times_of(VPScaledLinear(), karras, "t")
    with pytest.warns(UserWarning, match="'sid' draws noise levels 0.002 .. 24.4"):
        times_of(VPScaledLinear(), {"name": "sid"}, "t")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for process in (EDM(), Flow(), VPCosine()):
            times_of(process, karras, "t")
            times_of(process, {"name": "sid", "t_max": 1000.0}, "t")
        times_of(VPScaledLinear(), UNIFORM, "t")
        times_of(VPScaledLinear(), {"name": "karras", "low": 300, "high": 600}, "t")


# ---- models that do not fit ----


def test_models() -> None:
    student = mlp(Flow(), seed=1)
    spoilt, guided, labelled = mlp(Flow()), mlp(Flow(), w=8), mlp(Flow(), classes=CLASSES)
    spoilt.net.out.bias.data[1] = math.nan
    wide = Denoiser(student.net, Flow(), "velocity", (3,))
    for one, other, message in (
        (student, mlp(VPCosine(), "v"), r"teacher: lives under VPCosine.*, the student under Flow\(\)"),
        (student, labelled, "teacher.conditions: found 8 classes, expected the student's no conditions"),
        (labelled, student, "teacher.conditions: found no conditions, expected the student's 8 classes"),
        (student, wide, r"teacher.sample_shape: found \(3,\), expected the student's \(2,\)"),
        (student, mlp(Flow(), coupling="paired"), "teacher: found a model of paired noise and data, which has no score"),
        (student, mlp(Flow(), coupling="few_step"), "teacher: found a model of few_step noise"),
        (student, guided, "teacher: takes the guidance as an input"),
        (guided, mlp(Flow()), "student: takes the guidance as an input"),
        (student, spoilt, "teacher: net.out.bias: found weights that are not finite"),
        (student, student, "teacher: shares weights with the student"),
    ):  # fmt: skip
        for name in SCORE:
            with pytest.raises(ValueError, match=message):
                MAKERS[name](copy.deepcopy(one) if one is not other else one, other)


def test_models_of_degrade() -> None:
    teacher, guided = mlp(Flow()), mlp(Flow(), w=8)
    for one, other, message in (
        (teacher, mlp(VPCosine(), "v"), r"generator: lives under VPCosine.*, the teacher under Flow\(\)"),
        (
            teacher,
            mlp(Flow(), classes=CLASSES),
            "generator.conditions: found 8 classes, expected the teacher's no conditions",
        ),
        (mlp(Flow(), coupling="endpoint"), teacher, "init: found a model of endpoint noise and data"),
        (teacher, guided, "generator: takes the guidance as an input"),
        (guided, teacher, "init: takes the guidance as an input"),
        (teacher, teacher, "generator: shares weights with the student"),
    ):
        with pytest.raises(ValueError, match=message):
            Degrade(one, other)


def test_a_distilled_generator_is_read_at_its_own_times() -> None:
    """A student of noise level 4 (time 0.8) makes nothing of use from any other."""
    generator = mlp(Flow(), seed=1, coupling="few_step")
    generator.sampler = SiD(mlp(Flow(), seed=1), mlp(Flow()), sampling={"levels": [4.0]}).result().sampler
    for options in ({}, {"levels": [2.5]}, {"levels": [4.0, 1.0]}, {"levels": [4.0], "unit_noise": True}):
        with pytest.raises(
            ValueError, match=r"levels, unit_noise: .* but the generator was made for {1: \(0.8"
        ):
            Degrade(mlp(Flow()), generator, sampling=options)
    assert Degrade(mlp(Flow()), generator, sampling={"levels": [4.0]}).input.times == pytest.approx([0.8])
    generator.coupling = "independent"  # a teacher can be read at any
    assert Degrade(mlp(Flow()), generator, sampling={"levels": [2.5]}).input.steps == 1


def test_a_kind_without_a_weighting_of_its_own() -> None:
    refused(
        list(MAKERS), "student: predicts 'score', which is unbounded at the clean end", net={"kind": "score"}
    )


# ---- guidance ----

GUIDANCE = [
    (
        {"guidance_teacher": 3.0},
        {},
        "guidance.teacher: found 3.0, but the teacher was trained without a null",
    ),
    ({"guidance_teacher": math.nan}, {"classes": CLASSES}, "guidance.teacher: found nan, expected a finite"),
    ({"null_prob": 1.0}, {}, r"guidance.null_prob: found 1.0, expected a probability in \[0, 1\)"),
    ({"null_prob": -0.1}, {}, "guidance.null_prob: found -0.1, expected a probability"),
]
FAKE_GUIDANCE = [
    ({"guidance_fake": 1.5, "null_prob": 0.1}, {}, "guidance.fake: found 1.5, but the teacher was trained"),
    ({"guidance_fake_train": 1.5, "null_prob": 0.1}, {}, "guidance.fake_train: found 1.5, but the teacher"),
    ({"guidance_fake": math.inf}, {"classes": CLASSES}, "guidance.fake: found inf"),
    (
        {"guidance_fake": 1.5},
        {"classes": CLASSES},
        "guidance.null_prob: found 0, but guidance.fake = 1.5 needs",
    ),
    (
        {"guidance_fake": 0.0},
        {"classes": CLASSES},
        "guidance.null_prob: found 0, but guidance.fake = 0.0 needs",
    ),
    (
        {"guidance_fake_train": -1.0},
        {"classes": CLASSES},
        "guidance.null_prob: found 0, but guidance.fake_train = -1",
    ),
]


@pytest.mark.parametrize(
    ("names", "options", "net", "message"),
    [(SCORE, *case) for case in GUIDANCE] + [(["sid"], *case) for case in FAKE_GUIDANCE],
)
def test_guidance(names: list[str], options: dict[str, Any], net: dict[str, Any], message: str) -> None:
    refused(names, message, net=net, **options)


# ---- labels and data ----


@pytest.mark.parametrize("name", list(MAKERS))
def test_labels_that_the_data_do_not_have(name: str) -> None:
    """Asked for, they are missed; drawn evenly, none are needed. A model without classes takes any data."""
    nets = partial(mlp, Flow(), classes=CLASSES)
    loss = "loss" if name == "degrade" else "fake_loss"
    missing = MAKERS[name](nets(seed=1), nets(seed=0), sampling={"labels": "data"})
    with pytest.raises(
        ValueError, match="labels: found 'data', but the data source has none and the model has 8"
    ):
        getattr(missing, loss)(ring_batch(), step())
    drawn = MAKERS[name](nets(seed=1), nets(seed=0), sampling={"labels": "uniform"})
    assert getattr(drawn, loss)(ring_batch(), step()).total.isfinite()
    plain = MAKERS[name](mlp(Flow(), seed=1), mlp(Flow()), sampling={"labels": "data"})
    assert getattr(plain, loss)(ring_batch(classes=CLASSES), step()).total.isfinite()


def test_a_gan_or_noised_data_without_data() -> None:
    batch = replace(ring_batch(), x0=None)
    method = DMD(mlp(Flow(), seed=1), mlp(Flow()), gan={})
    for loss in (method.student_loss, method.fake_loss):
        with pytest.raises(
            ValueError, match="gan: needs real samples, but the data source has none; expected null"
        ):
            loss(batch, step())
    method = DMD(mlp(Flow(), seed=1), mlp(Flow()), input="real_noised", sampling={"levels": [4.0, 1.0]})
    for loss in (method.student_loss, method.fake_loss):
        with pytest.raises(ValueError, match=r"input: needs real samples, .* expected 'backward_sim'"):
            loss(batch, step())
    assert DMD(mlp(Flow(), seed=1), mlp(Flow())).student_loss(batch, step()).total.isfinite()


def test_noised_data_have_labels_of_their_own() -> None:
    options = {"input": "real_noised", "levels": [4.0, 1.0], "labels": "uniform"}
    refused(
        ["dmd", "disback"], "labels: found 'uniform', but with input", net={"classes": CLASSES}, **options
    )


# ---- the GAN ----


def unet(size: int = 8, **options: Any) -> Denoiser:
    torch.manual_seed(0)
    net = UNet(**{"width": 8, "embedding": 16, "groups": 4, "num_classes": 0} | options)
    return Denoiser(net, Flow(), "velocity", (1, size, size))


GAN = [
    (
        {"wieght_g": 1.0},
        {},
        "gan.wieght_g: no such key, did you mean gan.weight_g",
    ),
    ("yes", {}, "gan: found 'yes', expected a mapping"),
    ({"weight_g": -1.0}, {}, "gan.weight_g: found -1.0, expected at least 0"),
    ({"weight_d": math.nan}, {}, "gan.weight_d: found nan"),
    ({"diffusion": "no"}, {}, "gan.diffusion: found 'no', expected bool"),
    ({"features": "both"}, {}, "gan.features: found 'both', expected one of 'fake', 'teacher'"),
    ({"groups": 5}, {}, "gan: groups: 16 channels cannot be split into 5 groups"),
    ({}, {"multipliers": (1, 2, 2)}, "gan: size: found features of 2 x 2, expected at least 4 x 4"),
    ({"features": "teacher"}, {"multipliers": (1, 2, 2)}, "gan: size: found features of 2 x 2"),
    ({}, {"size": 12, "multipliers": (1, 2)}, "gan: size: found 6, expected 4 times a power of two"),
]


@pytest.mark.parametrize(("gan", "net", "message"), GAN)
def test_gan(gan: Any, net: dict[str, Any], message: str) -> None:
    for make in (DMD, disback):
        with pytest.raises(ValueError, match=message):
            make(unet(**net), unet(**net), gan=gan)


def test_a_net_without_features() -> None:
    class Flat(nn.Module):
        num_classes = 0

        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(2, 2)

        def forward(self, x: torch.Tensor, t: torch.Tensor, cond: Cond) -> torch.Tensor:
            return self.layer(x)

    nets = [Denoiser(Flat(), Flow(), "velocity", (2,)) for _ in range(2)]
    with pytest.raises(ValueError, match="gan: the net Flat has no attribute `bottleneck`"):
        DMD(*nets, gan={})


def test_an_oblong_map_is_no_feature_of_the_head() -> None:
    nets = [unet() for _ in range(2)]
    for net in nets:
        net.sample_shape = (1, 8, 16)
    with pytest.raises(
        ValueError, match=r"gan: found features of shape \[16, 4, 8\], expected \[channels\] or"
    ):
        DMD(*nets, gan={})


# ---- averages ----


def test_a_negative_half_life() -> None:
    with pytest.raises(
        ValueError, match=r"optim.ema_halflife: expected images, at least 0, or null, found -1"
    ):
        prepared(SiD(mlp(Flow(), seed=1), mlp(Flow())), ema_halflife=-1.0)


# ---- nodes ----

MLP = {"_target_": "distill.nets.mlp.MLP", "width": 16, "depth": 2, "features": 8}


def saved(folder: Path, seed: int, kind: str = "velocity", **net: Any) -> Path:
    torch.manual_seed(seed)
    model = mlp(Flow(), kind, seed=seed, **net)
    save_model(folder, model, SamplerSpec(steps=50, any_steps=True))
    return folder


@pytest.fixture
def way(tmp_path: Path) -> tuple[Path, Path]:
    """(stage, teacher): a finished way of two nodes."""
    teacher, stage = saved(tmp_path / "teacher", 0), tmp_path / "record"
    for number in (1, 2):
        saved(stage / "nodes" / f"{number:03d}", number)
    write_manifest(stage, [10, 20], teacher)
    return stage, teacher


def change(path: Path, **values: Any) -> None:
    write_json(path, read_json(path) | values)


def test_the_nodes_of_a_way_are_read_in_their_order(way: tuple[Path, Path]) -> None:
    stage, teacher = way
    assert read_nodes(stage, teacher) == [teacher, stage / "nodes" / "001", stage / "nodes" / "002"]


SPOILS: dict[str, tuple[Callable[[Path, Path], object], str]] = {
    "no manifest": (
        lambda s, t: (s / "nodes.json").unlink(),
        "nodes.json: missing; expected a finished stage that saves",
    ),
    "newer": (
        lambda s, t: change(s / "nodes.json", schema=9),
        "nodes.json: schema: found 9, this version reads 1",
    ),
    "no start": (
        lambda s, t: write_json(s / "nodes.json", {"schema": 1, "nodes": []}),
        "nodes.json: start: missing",
    ),
    "a list": (lambda s, t: write_json(s / "nodes.json", []), "nodes.json: schema: found 'list'"),
    "another teacher": (
        lambda s, t: saved(t, 5),
        "start: found weights [0-9a-f]{12}, expected the teacher's",
    ),
    "a lost node": (
        lambda s, t: (s / "nodes" / "002" / "model.safetensors").unlink(),
        "002/model.safetensors: missing; .*nodes.json lists it as node 2",
    ),
    "a changed node": (
        lambda s, t: saved(s / "nodes" / "001", 7),
        "001/model.safetensors: sha256: found [0-9a-f]{12}, .* expects [0-9a-f]{12}",
    ),
    "another kind": (
        lambda s, t: change(s / "nodes" / "001" / "model.json", kind="x0"),
        "001/model.json: kind: found 'x0', expected the teacher's 'velocity'",
    ),
    "another net": (
        lambda s, t: change(s / "nodes" / "002" / "model.json", net=MLP | {"depth": 3}),
        r"002/model.json: net: found .*'depth': 3.*, expected the teacher's .*'depth': 2",
    ),
}


@pytest.mark.parametrize("name", list(SPOILS))
def test_spoilt_nodes(name: str, way: tuple[Path, Path]) -> None:
    spoil, message = SPOILS[name]
    spoil(*way)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        read_nodes(*way)


def test_weights_of_another_net_are_not_loaded(tmp_path: Path) -> None:
    """Strictly: a name too few, or another shape, ends it."""
    teacher = saved(tmp_path / "teacher", 0)
    narrow, deep = (saved(tmp_path / name, 1, classes=classes) for name, classes in (("a", 3), ("b", 0)))
    state = mlp(Flow(), seed=1).net.state_dict()
    state.pop("out.bias")
    save_model(deep, mlp(Flow(), seed=1), SamplerSpec(steps=50, any_steps=True), state)
    for node in (narrow, deep):
        with pytest.raises((ValueError, RuntimeError), match=r"label\.table|out\.bias"):
            DisBack(mlp(Flow(), seed=1), mlp(Flow()), [teacher, node])


def recorded(folder: Path, digest: str, **inputs: str) -> Path:
    """A stage's folder as far as its identity goes: recorded in one step from t_max."""
    method = {"_target_": "distill.methods.degrade.Degrade", "levels": None, "unit_noise": False}
    folder.mkdir()
    write_json(
        folder / "artifact.json",
        {"digest": digest, "identity": {"config": {"method": method}, "inputs": inputs}},
    )
    return folder


def test_a_way_is_that_of_the_student_s_own_samples(tmp_path: Path) -> None:
    stage = recorded(tmp_path / "record", "way", init="teacher's", generator="student's")
    student, teacher = (
        recorded(tmp_path / "student", "student's"),
        recorded(tmp_path / "teacher", "teacher's"),
    )
    method = {"levels": None, "unit_noise": False, "floor": 0.05}
    check_path(stage, student, method)
    with pytest.raises(
        ValueError,
        match=r"method.sampling.levels: found \[2.5\], but the nodes of .*record are recorded with None",
    ):
        check_path(stage, student, method | {"levels": [2.5]})
    with pytest.raises(ValueError, match=r"method.sampling.unit_noise: found True, .* recorded with False"):
        check_path(stage, student, method | {"unit_noise": True})
    for other in (teacher, None):
        with pytest.raises(ValueError, match=r"init: .*record was recorded for another student; set `init`"):
            check_path(stage, other, method)


# ---- going on with other settings ----


def composed(*overrides: str) -> dict[str, Any]:
    """A recipe as `distill.train` would compose it."""
    register_recipes()
    with initialize_config_dir(version_base="1.3", config_dir=str(CONFIGS)):
        plain = OmegaConf.to_container(compose("config", list(overrides)), resolve=True)
    assert isinstance(plain, dict)
    return {str(key): value for key, value in plain.items()}


TIMES_KEY = "stages.distill.method.generator_times"
BEGUN = ("recipe=sid", f"{TIMES_KEY}={{name: sid, t_max: 800.0}}")
CHANGES = [
    ("stages.distill.method.alpha=1.2", "method.alpha: 1.0 -> 1.2"),
    ("stages.distill.method.sampling.levels=[2.5]", r"method.sampling.levels: None -> \[2.5\]"),
    (
        "stages.distill.method.generator_times.t_max=600.0",
        "method.generator_times.t_max: 800.0 -> 600.0",
    ),
    ("stages.distill.method.floor=0.5", "method.floor: 1e-05 -> 0.5"),
]


def test_a_begun_run_is_not_continued_with_other_settings(tmp_path: Path) -> None:
    """The planner compares identities: what changed is named, and nothing runs."""
    for entry in (begun := plan(composed(*BEGUN), tmp_path, 0)):
        entry.folder.mkdir(parents=True)
        write_json(entry.folder / "identity.json", entry.identity | {"input_files": {}})
        (entry.folder / "checkpoints").mkdir()
        (entry.folder / "checkpoints/step_0000002").mkdir()
    again = plan(composed(*BEGUN), tmp_path, 0)
    refuse_changes(again, tmp_path)
    assert {e.name: e.state for e in again}["distill"] == "interrupted"
    assert len(begun) == len(again)
    for override, message in CHANGES:
        changed = plan(composed(*BEGUN, override), tmp_path, 0)
        with pytest.raises(ValueError, match=rf"stages.distill: .* other settings:\n +{message}"):
            refuse_changes(changed, tmp_path)


def test_a_checkpoint_of_other_settings_is_refused(tmp_path: Path) -> None:
    """Without the planner, by the engine: the config that `train` is given names what was trained."""
    from distill.data.points import Points
    from distill.engine.fit import Fit, train

    def run(steps: int, **options: Any) -> None:
        method = prepared(SiD(mlp(Flow(), seed=1), mlp(Flow()), **options))
        source = Points(ring={"count": 8, "radius": 1.5}, count=64)
        train(method, source, Fit(steps=steps, batch_size=16), folder=tmp_path, config={"method": options})

    run(1, alpha=1.0)
    run(2, alpha=1.0)
    with pytest.raises(ValueError, match=r"another training: .*options.alpha: found 1.0, expected 1.2"):
        run(3, alpha=1.2)


def test_a_checkpoint_without_a_fake_score_is_refused(tmp_path: Path) -> None:
    """It would start again as the teacher."""
    method = prepared(SiD(mlp(Flow(), seed=1), mlp(Flow())))
    trained(method, tmp_path / "begun", 1)
    edited(tmp_path / "begun", tmp_path / "run", lambda kept: kept["networks"].pop("fake"), certified=True)
    other = SiD(mlp(Flow(), seed=1), mlp(Flow()))
    other.prepare({update.name: optim() for update in other.updates()}, seed=5)
    with pytest.raises(
        ValueError, match=r"networks: found \['student'\], this method has \['fake', 'student'\]"
    ):
        trained(other, tmp_path / "run", 2)
