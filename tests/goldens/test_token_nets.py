"""LlamaGen, VAR and the Distilled Decoding student of LlamaGen against the reference implementation
(`data/distilled_decoding/README.md`)."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from distill.data.cond import Cond
from distill.models.build import build_net
from distill.models.conditions import Labels
from distill.models.decoder import Codes, indices
from distill.models.denoiser import Denoiser
from distill.models.generator import Generator
from distill.models.guidance import guide
from distill.models.spec import SamplerSpec
from distill.models.tokens import TokenTeacher
from distill.nets.llamagen import LlamaGen, rotation_2d
from distill.nets.scales import Scales
from distill.nets.token_net import TokenNet
from distill.nets.tokenizer import nearest_codes
from distill.nets.var import VAR
from distill.nets.vq import ScaleTokenizer, VQTokenizer
from distill.process.prefix import Prefix
from distill.samplers.token_filters import Filters

FAMILY = "distilled_decoding"
NEAR = {"atol": 2e-5, "rtol": 1e-4}
GREEDY = Filters(temperature=0)


def weights(found: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix("w."): value for name, value in found.items() if name.startswith("w.")}


def filled(net: nn.Module, state: dict[str, Tensor], allowed: set[str]) -> nn.Module:
    """The net with the reference's weights; names that only one of both has must be allowed."""
    missing, unexpected = net.load_state_dict(state, strict=False)
    assert {*missing, *unexpected} <= allowed, {*missing, *unexpected} - allowed
    return net.eval()


def llama(found: dict[str, Tensor], *, student: bool) -> LlamaGen:
    state = weights(found)
    width = state["norm.weight"].shape[0]
    depth = 1 + max(int(n.split(".")[1]) for n in state if n.startswith("layers."))
    vocabulary = state["output.weight"].shape[0]
    grid, heads = 3, 4
    net = LlamaGen(
        width=width,
        depth=depth,
        heads=heads,
        grid=grid,
        vocabulary=vocabulary,
        size=8,
        num_classes=state["cls_embedding.embedding_table.weight"].shape[0] - 1,
        hidden=state["layers.0.feed_forward.w1.weight"].shape[0],
        student=student,
    )
    filled(net, state, {"codebook"})
    codebook = (
        found["codebook"]
        if student
        else torch.randn(vocabulary, 8, generator=torch.Generator().manual_seed(0))
    )
    net.codebook.copy_(codebook)
    return net


def teacher(net: TokenNet, filters: Filters = GREEDY) -> TokenTeacher:
    shape = (sum(net.groups), net.codebook.shape[1])
    return TokenTeacher(net, shape, decoder=Codes.of(net.codebook), filters=filters, guidable=True).eval()


def made_by(model: TokenTeacher, cond: Cond, scale: float) -> Tensor:
    """Tokens of greedy decoding with the cache."""
    z = torch.randn(len(cond), *model.sample_shape, generator=torch.Generator().manual_seed(1))
    return indices(model.decoder, model.transport(z, cond, guidance_scale=scale)[0])


@torch.no_grad()
def test_llamagen(load):
    found = load(FAMILY, "llamagen_gpt")
    net = llama(found, student=False)
    rotation = rotation_2d(3, 8)
    assert_close(rotation, found["freqs_cis"], **NEAR)
    assert float(rotation[0].abs().max()) == 0
    cond, last = Cond.of_labels(found["cond"]), found["targets"][:, -1:]
    codes = net.codebook[torch.cat([found["idx"], last], 1)]
    t = torch.zeros(len(codes))
    logits, dropped = net(codes, t, cond), net(codes, t, cond.null())
    assert_close(logits, found["logits"], **NEAR)
    assert_close(dropped, found["logits_uncond"], **NEAR)
    assert_close(guide(dropped, logits, 2.0), found["logits_cfg2"], **NEAR)
    loss = nn.functional.cross_entropy(logits.flatten(0, 1), found["targets"].flatten())
    assert_close(loss, found["loss"], **NEAR)
    for scale in (1, 2):
        assert torch.equal(made_by(teacher(net), cond, float(scale)), found[f"greedy_cfg{scale}"])


def student_states(found: dict[str, Tensor], net: TokenNet, label: Tensor):
    """(k, state, logits and tokens of the net, its samples) of every k groups of data in a file."""
    cond = Cond.of_labels(label)
    for name in sorted(found):
        if not name.endswith(".x_in"):
            continue
        k = int(name[1:].partition(".")[0])
        t = torch.full((len(label),), Prefix(net.groups).time(k))
        yield k, found[name], net(found[name], t, cond, heads=True), lambda x, t=t: net(x, t, cond)


@torch.no_grad()
def test_the_student_of_llamagen(load):
    found = load(FAMILY, "llamagen_dd_student")
    net = llama(found, student=True)
    seen = 0
    for k, x, (logits, tokens), samples in student_states(found, net, found["cond"]):
        state = Prefix(net.groups).add_noise(
            net.codebook[found["q"]], found["noise"], torch.full((len(x),), 1 - k / 9)
        )
        assert_close(state, x, **NEAR)
        assert_close(logits, found[f"t{k}.logits"], **NEAR)
        assert_close(tokens, found[f"t{k}.tokens"], **NEAR)
        net.split = 3
        assert_close(samples(x), found[f"t{k}.final_seq_split3"], **NEAR)
        seen += 1
    assert seen >= 2
    net.split = 5
    model = Denoiser(
        net, Prefix(net.groups), "x0", (9, 8), conditions=Labels(4), decoder=Codes.of(net.codebook)
    )
    spec = SamplerSpec(steps=2, times={2: (1.0, 1 - 4 / 9, 0.0)}, mode="sde", renoise="same")
    made = Generator(model, spec).generate(found["noise"], Cond.of_labels(found["cond"]))
    assert_close(made, found["two_step_0_4_split5"], **NEAR)


@pytest.mark.parametrize("family", ["llamagen", "var"])
def test_gradients_reach_every_parameter_of_a_student(load, family):
    found = load(FAMILY, f"{family}_dd_student")
    net = llama(found, student=True) if family == "llamagen" else var(found, student=True)
    x, k, label = (
        (found["t4.x_in"], 4, found["cond"])
        if family == "llamagen"
        else (found["t1.x_in"], 1, found["label"])
    )
    t = torch.full((2,), Prefix(net.groups).time(k))
    logits, tokens = net(x, t, Cond.of_labels(label), heads=True)
    (logits.square().mean() + tokens.square().mean()).backward()
    assert all(p.grad is not None and bool(p.grad.abs().sum() > 0) for p in net.parameters())


@torch.no_grad()
def test_maps_of_scales(load):
    found = load(FAMILY, "var_multiscale_quant")
    quantize = Scales((1, 2, 3, 4), 4)
    for k, phi in enumerate(quantize.phis):
        phi.load_state_dict({name: found[f"phi{k}.{name}"] for name in ("weight", "bias")})
    places = [list(quantize.phis).index(quantize.phi(k)) for k in range(4)]
    assert places == found["phi_index_per_scale_4"].tolist()
    ten = Scales(range(1, 11), 4)
    assert [list(ten.phis).index(ten.phi(k)) for k in range(10)] == found["phi_index_per_scale_10"].tolist()
    codes = [found["embedding"][found[f"idx{k}"]] for k in range(4)]
    f_hat = quantize.start(2, found["embedding"])
    for k, part in enumerate(codes):
        f_hat = f_hat + quantize.part(part, k)
        assert_close(f_hat, found[f"fhat{k}"], **NEAR)
        if k < 3:
            wanted = found[f"next_input{k}"].flatten(2).transpose(1, 2)
            assert_close(quantize.resized(f_hat, k + 1), wanted, **NEAR)
    assert_close(quantize.inputs(torch.cat(codes, 1)), found["var_input"], **NEAR)
    assert_close(quantize.total(torch.cat(codes, 1)), found["embed_to_fhat_last"], **NEAR)
    vectors = quantize.vectors(found["f"], found["embedding"])
    tokens = nearest_codes(vectors, found["embedding"]).split(quantize.groups, 1)
    assert all(torch.equal(token, found[f"idx{k}"]) for k, token in enumerate(tokens))


def var(found: dict[str, Tensor], *, student: bool = False) -> VAR:
    state = weights(found)
    rows, width = state["class_emb.weight"].shape
    net = VAR(
        depth=1 + max(int(n.split(".")[1]) for n in state if n.startswith("blocks.")),
        width=width,
        heads=state["blocks.0.attn.scale_mul_1H11"].shape[1],
        scales=(1, 2, 3),
        vocabulary=state["head.weight"].shape[0],
        size=state["word_embed.weight"].shape[1],
        num_classes=rows - 1,
        student=student,
    )
    filled(net, state, {"codebook", "lvl_1L", *(n for n in net.state_dict() if n.startswith("quantize."))})
    assert torch.equal(net.level, state["lvl_1L"][0])
    net.codebook.copy_(found["codebook" if student else "quant.embedding"])
    return net


@torch.no_grad()
def test_the_student_of_var(load):
    found = load(FAMILY, "var_dd_student")
    net = var(found, student=True)
    seen = 0
    for k, x, (logits, tokens), samples in student_states(found, net, found["label"]):
        t = torch.full((len(x),), Prefix(net.groups).time(k))
        assert_close(Prefix(net.groups).add_noise(net.codebook[found["q"]], found["noise"], t), x, **NEAR)
        assert_close(logits, found[f"t{k}.logits"], **NEAR)
        assert_close(tokens, found[f"t{k}.tokens"], **NEAR)
        for split in (0, 1, 2):
            net.split = sum(net.groups[:split])
            assert_close(samples(x), found[f"t{k}.final_seq_split{split}"], **NEAR)
        seen += 1
    assert seen == 3


@torch.no_grad()
def test_var(load):
    found = load(FAMILY, "var_transformer")
    net = var(found)
    for k, phi in enumerate(net.quantize.phis):
        phi.load_state_dict({name: found[f"quant.phi{k}.{name}"] for name in ("weight", "bias")})
    cond, codes = Cond.of_labels(found["label"]), net.codebook[found["idx"]]
    t = torch.zeros(len(codes))
    assert_close(net.quantize.inputs(codes), found["x_in"], **NEAR)
    assert_close(net(codes, t, cond), found["logits"], **NEAR)
    assert_close(net(codes, t, cond.null()), found["logits_uncond"], **NEAR)
    linear = Filters(temperature=0, guidance_schedule="linear")
    made = made_by(teacher(net, linear), cond, 2.5)
    assert_close(net.quantize.total(net.codebook[made]), found["greedy_fhat_cfg1p5"], **NEAR)
    # A known prefix of two scales is as if they had been made: no scale sees a later one.
    state, again = net.begin(cond), net.begin(cond)
    net.advance(state, None)
    first, second = net.codebook[made[:, :1]], net.codebook[made[:, 1:5]]
    net.advance(state, first)
    assert_close(net.advance(state, second), net.advance(again, torch.cat([first, second], 1)), **NEAR)


@torch.no_grad()
def test_blocks_with_a_shared_layer_are_those_of_layers_that_each_add_its_own_numbers(load):
    """W silu(c) + b of all blocks, and g of each, is a layer of the block with the bias b + g."""
    found = load(FAMILY, "var_transformer")
    own = var(found)
    shared = build_net(own.config() | {"shared_adaln": True})
    one = shared.shared_ada_lin[1]
    state = dict(own.state_dict())
    for number in range(len(own.blocks)):
        bias = f"blocks.{number}.ada_lin.1.bias"
        state[f"blocks.{number}.ada_lin.1.weight"] = one.weight
        state[bias] = one.bias + shared.blocks[number].ada_gss.flatten()
    assert not torch.equal(*(state[f"blocks.{number}.ada_lin.1.bias"] for number in (0, 1)))
    own.load_state_dict(state)
    filled = {name: value for name, value in state.items() if ".ada_lin." not in name or "head_nm" in name}
    assert not shared.load_state_dict(filled, strict=False).unexpected_keys
    codes, cond = own.codebook[found["idx"]], Cond.of_labels(found["label"])
    assert_close(
        shared(codes, torch.zeros(len(codes)), cond), own(codes, torch.zeros(len(codes)), cond), **NEAR
    )
    made = [made_by(teacher(net, Filters(temperature=0)), cond, 2.5) for net in (shared, own)]
    assert torch.equal(*made)


@pytest.mark.parametrize(
    ("make", "millions"),
    [
        (lambda: LlamaGen(), 111),
        (lambda: LlamaGen(width=1024, depth=24, heads=16), 343),
        (lambda: LlamaGen(student=True), 98.3),
        (lambda: LlamaGen(width=1024, depth=24, heads=16, student=True), 326),
        (lambda: VAR(depth=16), 310),
        (lambda: VAR(depth=16, student=True), 327),
        (lambda: VAR(depth=20, student=True), 635),
        (
            lambda: VAR(depth=36, scales=(1, 2, 3, 4, 6, 9, 13, 18, 24, 32), shared_adaln=True),
            2354,
        ),  # the paper: 2.3 B
        (lambda: VQTokenizer(), 72),
        (lambda: ScaleTokenizer(), 109),
    ],
    ids=[
        "LlamaGen-B",
        "LlamaGen-L",
        "LlamaGen-B-DD",
        "LlamaGen-L-DD",
        "VAR-d16",
        "VAR-d16-DD",
        "VAR-d20-DD",
        "VAR-d36",
        "VQ-16",
        "VAE",
    ],
)
def test_sizes_of_the_public_models(make, millions):
    with torch.device("meta"):
        net = make()
    found = sum(p.numel() for n, p in net.named_parameters() if not n.startswith("quantize."))
    assert found / 1e6 == pytest.approx(millions, rel=5e-3)
