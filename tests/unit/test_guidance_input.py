"""The guidance w as an input: conditions that carry it, nets that embed it, models that get it later."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from distill.data.cond import NULL_LABEL, Cond
from distill.models.build import build_net
from distill.models.denoiser import Denoiser
from distill.models.guidance import check_guidance_range, check_guidance_scale
from distill.nets.layers import GuidanceEmbedding
from distill.process.edm import EDM
from distill.process.flow import Flow
from distill.process.guidance_w import w_embedding
from distill.process.vp import VPCosine
from distill.stages.train import adapted

LABELS, W = torch.tensor([3, 0, 5]), torch.tensor([0.5, 2.0, 7.0])


# ---- conditions ----


def test_conditions_carry_w() -> None:
    cond = Cond.of_labels(LABELS).with_guidance(W)
    assert torch.equal(cond.get("guidance_w"), W)
    assert torch.equal(cond.get("label"), LABELS)
    assert Cond.of_labels(LABELS).get("guidance_w") is None
    for number in (2, 2.5):
        same = Cond.nothing(3).with_guidance(number)
        assert same.get("guidance_w").tolist() == [number] * 3
        assert same.get("guidance_w").dtype == torch.float32
    assert cond.with_guidance(None).get("guidance_w") is None
    assert len(cond.with_guidance(1.0)) == 3


def test_the_null_condition_and_dropped_rows_keep_w() -> None:
    """w says what the net imitates, whatever it is conditioned on."""
    cond = Cond.of_labels(LABELS).with_guidance(W)
    null, dropped = cond.null(), cond.drop(torch.tensor([True, False, True]))
    assert null.get("label").tolist() == [NULL_LABEL] * 3
    assert dropped.get("label").tolist() == [NULL_LABEL, 0, NULL_LABEL]
    assert torch.equal(null.get("guidance_w"), W)
    assert torch.equal(dropped.get("guidance_w"), W)
    bare = Cond.nothing(3).with_guidance(W)
    assert torch.equal(bare.null().get("guidance_w"), W)
    assert torch.equal(bare.drop(torch.ones(3).bool()).get("guidance_w"), W)


def test_rows_are_joined_and_moved_with_their_w() -> None:
    cond = Cond.of_labels(LABELS).with_guidance(W)
    both = cond.cat(cond.null().with_guidance(2 * W))
    assert both.size == 6
    assert both.get("label").tolist() == [3, 0, 5, -1, -1, -1]
    assert both.get("guidance_w").tolist() == [*W.tolist(), *(2 * W).tolist()]
    assert Cond.nothing(3).with_guidance(W).cat(Cond.nothing(3).with_guidance(W)).get("guidance_w").shape == (
        6,
    )
    moved = cond.to("meta")
    assert (moved.get("label").device.type, moved.get("guidance_w").device.type) == ("meta", "meta")
    assert Cond.nothing(3).with_guidance(W).to("meta").get("guidance_w").device.type == "meta"
    assert cond.to("cpu").get("guidance_w") is cond.get("guidance_w")


def test_wrong_conditions() -> None:
    for wrong in (W[:2], W[:, None], torch.tensor(1.0)):
        with pytest.raises(ValueError, match=r"guidance_w: expected \[3\] numbers, found shape"):
            Cond.of_labels(LABELS).with_guidance(wrong)
    with pytest.raises(ValueError, match="cannot join conditions of"):
        Cond.nothing(3).with_guidance(W).cat(Cond.nothing(3))
    with pytest.raises(ValueError, match="cannot join conditions of"):
        Cond.of_labels(LABELS).cat(Cond.nothing(3))


# ---- nets ----

UNET = {"_target_": "distill.nets.unet.UNet", "width": 8, "embedding": 16, "groups": 4, "num_classes": 10}
POINTS = {"_target_": "distill.nets.mlp.MLP", "shape": [1, 8, 8], "width": 16, "num_classes": 10}
NETS: dict[str, dict[str, Any]] = {
    "unet": UNET,
    "mlp": POINTS,
    "edm": {"_target_": "distill.nets.precond.EDMPrecond", "net": UNET},
}
nets = pytest.mark.parametrize("name", list(NETS))


def with_w(config: dict[str, Any], features: int = 12) -> dict[str, Any]:
    """The same net with the input, wherever it stands in the config."""
    if "net" in config:
        return config | {"net": with_w(config["net"], features)}
    return config | {"guidance_embedding": features}


def filled(config: dict[str, Any]) -> nn.Module:
    """A net of this config with no weight that is 0, but for those of the guidance."""
    torch.manual_seed(0)
    net = build_net(config)
    for key, parameter in net.named_parameters():
        if "guidance" not in key:
            nn.init.normal_(parameter, std=0.2)
    return net


def inputs() -> tuple[Tensor, Tensor, Cond]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(3, 1, 8, 8, generator=generator)
    return x, torch.tensor([0.2, 0.5, 0.9]), Cond.of_labels(LABELS)


@nets
def test_a_net_with_w_begins_as_the_net_without(name: str) -> None:
    x, t, cond = inputs()
    plain, guided = filled(NETS[name]), filled(with_w(NETS[name]))
    fresh = set(guided.state_dict()) - set(plain.state_dict())
    assert fresh == {"net.guidance.out.weight" if name == "edm" else "guidance.out.weight"}
    guided.load_state_dict(plain.state_dict(), strict=False)
    for w in (W, 0 * W):
        assert torch.equal(guided(x, t, cond.with_guidance(w)), plain(x, t, cond))


@nets
def test_w_is_trained_and_then_says_something_about_its_own_sample(name: str) -> None:
    x, t, cond = inputs()
    net = filled(with_w(NETS[name]))
    layer = next(module for module in net.modules() if isinstance(module, GuidanceEmbedding))
    net(x, t, cond.with_guidance(W)).square().sum().backward()
    assert bool(layer.out.weight.grad.any())
    nn.init.normal_(layer.out.weight)
    with torch.no_grad():
        before = net(x, t, cond.with_guidance(W))
        after = net(x, t, cond.with_guidance(torch.tensor([0.5, 2.0, 6.0])))
    assert torch.allclose(before[:2], after[:2], atol=1e-6)
    assert not torch.allclose(before[2], after[2], atol=1e-3)


def test_the_embedding_is_the_published_features_through_one_layer_without_bias() -> None:
    layer = GuidanceEmbedding(12, 5)
    assert [name for name, _ in layer.named_parameters()] == ["out.weight"]
    assert not bool(layer(W).any())
    nn.init.normal_(layer.out.weight)
    torch.testing.assert_close(layer(W), w_embedding(W, 12) @ layer.out.weight.T)
    for features in (2, 1, -4):
        with pytest.raises(
            ValueError, match=f"guidance_embedding: found {features}, expected 0 .none. or at least 4"
        ):
            GuidanceEmbedding(features, 5)


@nets
def test_a_net_and_its_conditions_must_agree(name: str) -> None:
    x, t, cond = inputs()
    with pytest.raises(
        ValueError, match="guidance_w: found a guidance embedding's input, but this net was built"
    ):
        build_net(NETS[name])(x, t, cond.with_guidance(W))
    with pytest.raises(ValueError, match="guidance_w: missing; this net was trained with the guidance w"):
        build_net(with_w(NETS[name]))(x, t, cond)


@nets
def test_a_model_knows_whether_its_net_takes_w(name: str) -> None:
    for config, expected in ((NETS[name], False), (with_w(NETS[name]), True)):
        model = Denoiser(build_net(config), EDM(), "x0", (1, 8, 8))
        assert model.embeds_guidance is expected


# ---- adapting a model that is there ----


@nets
def test_adapt_keeps_the_function_exactly(name: str) -> None:
    x, t, cond = inputs()
    model = Denoiser(filled(NETS[name]), EDM(), "x0", (1, 8, 8), guidable=True, coupling="independent")
    told = with_w(NETS[name])
    changes = {"net": {"net": {"guidance_embedding": 12}} if name == "edm" else {"guidance_embedding": 12}}
    kept = copy.deepcopy(NETS[name])
    other = adapted(model, changes)
    config = other.net_config()
    assert config == told
    assert NETS[name] == kept
    assert torch.equal(other.x0(x, t, cond.with_guidance(W)), model.x0(x, t, cond))
    assert (other.kind, other.conditions.num_classes, other.guidable, other.coupling) == (
        "x0",
        10,
        True,
        "independent",
    )
    assert other.net is not model.net
    assert build_net(config).load_state_dict(other.net.state_dict())
    # Adapting it once more changes nothing.
    nn.init.normal_(next(m for m in other.net.modules() if isinstance(m, GuidanceEmbedding)).out.weight)
    again = adapted(other, changes)
    assert torch.equal(again.x0(x, t, cond.with_guidance(W)), other.x0(x, t, cond.with_guidance(W)))


def test_adapt_reads_a_net_as_another_kind() -> None:
    model = Denoiser(filled(POINTS), VPCosine(), "eps", (1, 8, 8))
    other = adapted(model, {"kind": "v"})
    x, t, cond = inputs()
    assert (other.kind, other.net_config()) == ("v", POINTS)
    assert torch.equal(other(x, t, cond), model(x, t, cond))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"net": {"width": 32}}, "adapt.net: the weights do not fit the changed net"),
        ({"net": {"depth": 2}}, r"adapt.net: .* has no parameters for the weights \['layers.2.weight'"),
        ({"net": {"guidance_embeding": 12}}, "adapt.net.guidance_embeding: no such key"),
        ({"net": {"guidance_embedding": 2}}, "adapt.net: guidance_embedding: found 2"),
        ({"net": {"width": 0}}, "adapt.net: width, depth: expected at least 1"),
        ({"kind": "v"}, "kind 'v' needs .* which Flow does not keep"),
    ],
)
def test_wrong_changes(changes: dict[str, Any], message: str) -> None:
    model = Denoiser(filled(POINTS), Flow(), "velocity", (1, 8, 8))
    with pytest.raises(ValueError, match=message):
        adapted(model, changes)


# ---- ranges and scales ----


def test_ranges_and_nets_must_agree() -> None:
    check_guidance_range(True, 0.0, 4.0)
    check_guidance_range(False, None, None)
    check_guidance_range(True, 2.0, 2.0)
    for case, message in (
        ((True, None, None), "w_min, w_max: missing; the student's net takes"),
        ((True, None, None, "teacher"), "w_min, w_max: missing; the teacher's net takes"),
        ((True, 1.0, None), "w_min, w_max: found 1.0 and None, expected both or neither"),
        ((True, 2.0, 1.0), "w_min, w_max: found 2.0 and 1.0, expected -1 <= w_min <= w_max"),
        ((True, -1.5, 1.0), "w_min, w_max: found -1.5 and 1.0"),
        ((False, 0.0, 1.0), "w_min, w_max: found 0.0 and 1.0, but the student's net does not take"),
    ):
        with pytest.raises(ValueError, match=message):
            check_guidance_range(*case)
    with pytest.warns(UserWarning, match="guidance_w: 30.0 is a guidance_scale of 31.0"):
        check_guidance_range(True, 0.0, 30.0)
    check_guidance_scale(True, 3.0)
    check_guidance_scale(False, 1.0)
    with pytest.raises(
        ValueError, match=r"guidance_scale: found 3.0, but the teacher was trained without a null"
    ):
        check_guidance_scale(False, 3.0)
