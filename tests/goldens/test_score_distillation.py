"""Goldens of score distillation (data/score_distillation/README.md): float32, losses to rtol 1e-4 / atol 1e-5, gradients to
rtol 1e-3 / atol 1e-5 of the largest.

All references average over the batch after they sum (SiD, Diff-Instruct) or average (DMD2, DisBack, FastGen) over a sample.
Networks are called with their graphs also where the references forbid gradients: our losses must not need that.
"""

from __future__ import annotations

import re

import torch
from conftest import Load
from score_nets import (
    SIGMA_DATA,
    Weights,
    close_gradient,
    close_gradients,
    close_loss,
    edm_features,
    edm_x0,
    eps_features,
    eps_prediction,
    eps_x0,
    gan_head,
    part,
    table,
)
from torch import Tensor
from translate import numbers

from distill.methods.losses.backtrack import Backtrack, node_steps
from distill.methods.losses.gan import discriminator_loss, generator_loss
from distill.methods.losses.score import (
    diff_instruct_loss,
    dmd_gradient,
    dmd_loss,
    fake_score_loss,
    fake_score_weight,
    sid_loss,
)
from distill.models.guidance import guide
from distill.process.edm import EDM
from distill.process.times import karras_level, lognormal_level, sid_level
from distill.process.vp import VPScaledLinear
from distill.samplers.student_rollout import few_step_output, mixture_output, visited_state

FAMILY = "score_distillation"
CLS_WEIGHT = 1e-2
"""Of the discriminator's loss in DMD2's fake update, the README's 0.01."""
THROUGH_HEAD = 1e-4
"""Tolerance, as a share of the largest, of gradients through the tiny head: its norms of groups of two numbers amplify
rounding, so that float32 is 3e-5 of the largest off float64 (the file's own numbers 2e-5)."""


def tags(file: Weights, pattern: str) -> list[tuple[str, ...]]:
    """The groups of a pattern in the keys of a file ("" for one that is absent); none is a failure."""
    found = sorted(match.groups(default="") for key in file if (match := re.fullmatch(pattern, key)))
    assert found, f"no key matches {pattern!r}"
    return found


def both_predictions(file: Weights, x: Tensor, sigma: Tensor, noise: str = "noise") -> tuple[Tensor, Tensor]:
    """(teacher's, fake's) data at the noised x, with the graph through both inputs."""
    x_t = EDM().add_noise(x, file[noise], sigma)
    return edm_x0(part(file, "teacher"), x_t, sigma), edm_x0(part(file, "fake"), x_t, sigma)


def same_levels(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found.to(expected.dtype), expected, rtol=1e-5, atol=0)


# --- SiD and Diff-Instruct -----------------------------------------------------------------------------------


def sid_fake(file: Weights, fake: Weights, x: Tensor) -> Tensor:
    process, sigma = EDM(), file["sigma"].flatten()
    prediction = edm_x0(fake, process.add_noise(x, file["noise"], sigma), sigma)
    return fake_score_loss(
        prediction, x, file["noise"], sigma, process, weighting="edm", sigma_data=SIGMA_DATA
    )


def test_sid_fake_score(load: Load) -> None:
    file = load(FAMILY, "sid_fake_score")
    sigma, fake = file["sigma"].flatten(), part(file, "fake", trained=True)
    same_levels(lognormal_level(file["z_normal"].flatten().double()), sigma)
    weight = fake_score_weight(EDM(), sigma, "edm", sigma_data=SIGMA_DATA)
    torch.testing.assert_close(weight, file["weight"].flatten(), rtol=1e-5, atol=0)
    loss = sid_fake(file, fake, file["x"])
    close_loss(loss, file["loss_elem"].flatten(1).sum(1))
    close_loss(loss.mean(), file["loss"])
    loss.mean().backward()
    close_gradients(fake, file, "grad_fake")


def test_a_sample_that_is_not_finite_shows_in_the_fake_score_and_spoils_no_other(load: Load) -> None:
    """The reference drops the sample and divides by the full batch; here it stays visible."""
    file = load(FAMILY, "sid_fake_score")
    whole = file["x_nan"].flatten(1).isfinite().all(1)
    assert 0 < whole.sum() < len(whole)
    loss = sid_fake(file, part(file, "fake"), file["x_nan"])
    assert torch.equal(loss.isfinite(), whole)
    close_loss(loss[whole].sum() / len(whole), file["loss_nan"])


def test_sid_generator(load: Load) -> None:
    file = load(FAMILY, "sid_generator")
    for alpha, longer, tmax in tags(file, r"loss_a([\d.]+?)(_tmax(\d+))?"):
        x = file["x"].clone().requires_grad_(True)
        sigma = file[f"sigma_tmax{tmax or 800}"].flatten()
        same_levels(sid_level(file["u"].flatten().double(), float(tmax or 800)), sigma)
        y_teacher, y_fake = both_predictions(file, x, sigma)
        if not longer:
            close_gradient(y_teacher, file["y_real"])
            close_gradient(y_fake, file["y_fake"])
        loss = sid_loss(x, y_teacher, y_fake, alpha=float(alpha))
        suffix = f"a{alpha}{longer}"
        close_loss(loss, file[f"loss_elem_{suffix}"].flatten(1).sum(1))
        close_loss(loss.mean(), file[f"loss_{suffix}"])
        loss.mean().backward()
        close_gradient(x.grad, file[f"grad_x_{suffix}"])


def test_sid_generator_at_the_ends_of_the_noise_range(load: Load) -> None:
    file = load(FAMILY, "sid_generator")
    same_levels(sid_level(file["u_end"].flatten().double()), file["sigma_end"].flatten())
    for (alpha,) in tags(file, r"loss_end_a([\d.]+)"):
        x = file["x"].clone().requires_grad_(True)
        loss = sid_loss(x, *both_predictions(file, x, file["sigma_end"].flatten()), alpha=float(alpha))
        close_loss(loss.mean(), file[f"loss_end_a{alpha}"])
        loss.mean().backward()
        close_gradient(x.grad, file[f"grad_x_end_a{alpha}"])


def test_sid_generator_of_a_sample_that_is_not_finite(load: Load) -> None:
    file = load(FAMILY, "sid_generator")
    x, sigma = file["x_nan"], file["sigma_tmax800"].flatten()
    whole = x.flatten(1).isfinite().all(1)
    assert 0 < whole.sum() < len(whole)
    for (alpha,) in tags(file, r"loss_nan_a([\d.]+)"):
        loss = sid_loss(x, *both_predictions(file, x, sigma), alpha=float(alpha))
        assert torch.equal(loss.isfinite(), whole)
        close_loss(loss[whole], file[f"loss_elem_nan_a{alpha}"].flatten(1).sum(1))
        close_loss(loss[whole].sum() / len(whole), file[f"loss_nan_a{alpha}"])


def test_sid_scale_and_reduction(load: Load) -> None:
    file = load(FAMILY, "sid_generator")
    x = file["x"]
    predictions = both_predictions(file, x, file["sigma_tmax800"].flatten())
    whole = sid_loss(x, *predictions, alpha=0.5)
    scaled = sid_loss(x, *predictions, alpha=0.5, loss_scale_g=100.0, reduction="mean")
    torch.testing.assert_close(scaled, whole * 100 / x[0].numel(), rtol=1e-5, atol=1e-5)


def test_diff_instruct_generator(load: Load) -> None:
    file = load(FAMILY, "diff_instruct_generator")
    x, sigma = file["x"].clone().requires_grad_(True), file["sigma"].flatten()
    same_levels(lognormal_level(file["z_normal"].flatten().double()), sigma)
    loss = diff_instruct_loss(x, *both_predictions(file, x, sigma))
    close_loss(loss, file["loss_elem"].flatten(1).sum(1))
    close_loss(loss.mean(), file["loss"])
    loss.mean().backward()
    close_gradient(x.grad, file["grad_x"])


# --- DMD2 on an EDM teacher ----------------------------------------------------------------------------------


def levels(file: Weights, key: str) -> Tensor:
    """The noise levels at the indices ``key`` [B], of the file's table, which is ours."""
    sigmas = file["karras_sigmas"]
    found = karras_level(torch.arange(len(sigmas)).double() / (len(sigmas) - 1))
    torch.testing.assert_close(found, sigmas.double(), rtol=1e-5, atol=0)
    return sigmas[file[key]]


def test_dmd2_edm_generator(load: Load) -> None:
    file = load(FAMILY, "dmd2_edm")
    x = file["x"].clone().requires_grad_(True)
    y_teacher, y_fake = both_predictions(file, x, levels(file, "t"))
    close_gradient(y_teacher, file["pred_real"])
    close_gradient(y_fake, file["pred_fake"])
    close_gradient(dmd_gradient(x, y_teacher, y_fake, floor=0.0), file["dm_grad"])
    loss = dmd_loss(x, y_teacher, y_fake, floor=0.0).mean()
    close_loss(loss, file["loss_dm"])
    loss.backward()
    close_gradient(x.grad, file["grad_x_dm"])


def test_dmd2_edm_adversarial_terms(load: Load) -> None:
    """Noised at t_gan, and clean: no noise, but the network is told the lowest level."""
    file = load(FAMILY, "dmd2_edm")
    fake, lowest = part(file, "fake"), file["karras_sigmas"][:1].expand(len(file["x"]))
    for suffix in ("", "_clean"):
        x = file["x"].clone().requires_grad_(True)
        sigma = lowest if suffix else levels(file, "t_gan")
        x_t = x if suffix else EDM().add_noise(x, file["noise_gan"], sigma)
        features = edm_features(fake, x_t, sigma)
        loss = generator_loss(gan_head(file, features)(features)).mean()
        close_loss(loss, file[f"gen_cls_loss{suffix}"])
        loss.backward()
        close_gradient(x.grad, file[f"grad_x_gan{suffix}"], THROUGH_HEAD)


def test_dmd2_edm_fake_update(load: Load) -> None:
    """The fake score and the discriminator on its features learn together."""
    file = load(FAMILY, "dmd2_edm")
    process, x, fake = EDM(), file["x"], part(file, "fake", trained=True)
    sigma = levels(file, "t")
    prediction = edm_x0(fake, process.add_noise(x, file["noise"], sigma), sigma)
    denoising = fake_score_loss(
        prediction,
        x,
        file["noise"],
        sigma,
        process,
        weighting="edm",
        sigma_data=SIGMA_DATA,
        reduction="mean",
    ).mean()
    close_loss(denoising, file["loss_fake"])

    features = {}
    for name, samples, suffix in (("real", file["x_real"], "_real"), ("fake", x, "")):
        level = levels(file, f"t_gan{suffix}")
        features[name] = edm_features(
            fake, process.add_noise(samples, file[f"noise_gan{suffix}"], level), level
        )
    head = gan_head(file, features["real"])
    real, made = head(features["real"]), head(features["fake"])
    close_loss(real.sigmoid().flatten(), file["prob_real"].flatten())
    close_loss(made.sigmoid().flatten(), file["prob_fake"].flatten())
    adversarial = discriminator_loss(real, made).mean()
    close_loss(adversarial, file["guidance_cls_loss"])

    total = denoising + CLS_WEIGHT * adversarial
    close_loss(total, file["total_guidance"])
    total.backward()
    close_gradients(fake, file, "grad_fake")
    close_gradients(dict(head.layers.named_parameters()), file, "grad_head", THROUGH_HEAD)


# --- DMD2 and DisBack on Stable Diffusion's process ----------------------------------------------------------


def guided_x0(
    file: Weights, process: VPScaledLinear, weights: Weights, x_t: Tensor, t: Tensor, scale: float
) -> Tensor:
    """Data predicted with guidance, which the references apply above a scale of 1 only."""
    wanted = eps_prediction(weights, x_t, t, file["text_emb"])
    if scale > 1:
        wanted = guide(eps_prediction(weights, x_t, t, file["uncond_emb"]), wanted, scale)
    return process.convert("eps", wanted, x_t, t.double(), "x0")


def test_dmd2_sd_generator(load: Load) -> None:
    file = load(FAMILY, "dmd2_sd_eps")
    process, t = table(file), file["t"]
    for (scale,) in tags(file, r"loss_dm_cfg([\d.]+)"):
        x = file["x"].clone().requires_grad_(True)
        x_t = process.add_noise(x, file["noise"], t.double())
        y_teacher = guided_x0(file, process, part(file, "teacher"), x_t, t, float(scale))
        y_fake = guided_x0(file, process, part(file, "fake"), x_t, t, 1.0)
        close_gradient(y_teacher, file[f"pred_real_cfg{scale}"])
        close_gradient(y_fake, file["pred_fake"])
        loss = dmd_loss(x, y_teacher, y_fake, floor=0.0).mean()
        close_loss(loss, file[f"loss_dm_cfg{scale}"])
        loss.backward()
        close_gradient(x.grad, file[f"grad_x_cfg{scale}"])


def eps_score_loss(file: Weights, process: VPScaledLinear, weights: Weights, x: Tensor) -> Tensor:
    t = file["t"].double()
    prediction = eps_prediction(weights, process.add_noise(x, file["noise"], t), t, file["text_emb"])
    loss = fake_score_loss(prediction, x, file["noise"], t, process, weighting="eps", reduction="mean")
    return loss.mean()


def test_dmd2_sd_fake_update(load: Load) -> None:
    file = load(FAMILY, "dmd2_sd_eps")
    fake = part(file, "fake", trained=True)
    loss = eps_score_loss(file, table(file), fake, file["x"])
    close_loss(loss, file["loss_fake"])
    loss.backward()
    close_gradients(fake, file, "grad_fake")


def test_dmd2_sd_adversarial_term(load: Load) -> None:
    file = load(FAMILY, "dmd2_sd_eps")
    x = file["x"].clone().requires_grad_(True)
    x_t = table(file).add_noise(x, file["noise_gan"], file["t_gan"].double())
    features = eps_features(part(file, "fake"), x_t, file["t_gan"], file["text_emb"])
    loss = generator_loss(gan_head(file, features)(features)).mean()
    close_loss(loss, file["gen_cls_loss"])
    loss.backward()
    close_gradient(x.grad, file["grad_x_gan"], THROUGH_HEAD)


def test_dmd2_backward_simulation(load: Load) -> None:
    """Step 0 starts from ``noise_final``; step k runs k steps from ``z0``, and ``noise_final`` makes its input."""
    file = load(FAMILY, "dmd2_backward_simulation")
    process, weights = table(file), part(file, "generator")
    times = [float(t) for t in file["denoising_step_list"]]

    def predict_x0(x: Tensor, t: Tensor) -> Tensor:
        return eps_x0(process, weights, x, t, file["text_emb"])

    steps = numbers(file, r"step(\d+)_x0")
    assert steps == list(range(len(times)))
    for k in steps:
        assert set(file[f"step{k}_t"].tolist()) == {times[k]}
        start = file["z0"] if k else file["noise_final"]
        noise = torch.cat([file["noise_renoise"][: max(k - 1, 0)], file["noise_final"][None]])
        state = visited_state(predict_x0, process, start, times, noise, k)
        close_gradient(state, file[f"step{k}_noisy_input"])
        x0 = few_step_output(predict_x0, process, start, times, noise, k)
        close_gradient(x0, file[f"step{k}_x0"])
        rest = torch.zeros(len(times), *start.shape)  # what is added after step k does not matter to it
        chosen = torch.full((len(start),), k)
        mixed = mixture_output(predict_x0, process, start, times, torch.cat([noise[:k], rest]), chosen)
        close_gradient(mixed, file[f"step{k}_x0"])


def test_disback_student_and_recording(load: Load) -> None:
    """Stage 1: a copy of the teacher learns the samples of the one-step student, which is fed unit noise."""
    file = load(FAMILY, "disback")
    process = table(file)
    x = eps_x0(process, part(file, "generator"), file["z"], file["t_cond"], file["text_emb"])
    close_gradient(x, file["x0_student"])
    node = part(file, "teacher", trained=True)
    loss = eps_score_loss(file, process, node, file["x0_student"])
    close_loss(loss, file["stage1_loss"])
    loss.backward()
    close_gradients(node, file, "stage1_grad")


def test_disback_targets(load: Load) -> None:
    """Stage 2: DMD with the target's weights exchanged; guidance acts on stored nodes as on the teacher."""
    file = load(FAMILY, "disback")
    process, t = table(file), file["t"]
    for target, scale in tags(file, r"stage2_loss_(\w+)_cfg([\d.]+)"):
        x = file["x0_student"].clone().requires_grad_(True)
        x_t = process.add_noise(x, file["noise"], t.double())
        y_target = guided_x0(file, process, part(file, target), x_t, t, float(scale))
        y_fake = guided_x0(file, process, part(file, "fake"), x_t, t, 1.0)
        loss = dmd_loss(x, y_target, y_fake, floor=0.0).mean()
        close_loss(loss, file[f"stage2_loss_{target}_cfg{scale}"])
        loss.backward()
        close_gradient(x.grad, file[f"stage2_grad_x_{target}_cfg{scale}"])


def test_disback_path_is_not_the_released_one(load: Load) -> None:
    """The README's settings: recorded 24000 .. 25000 with a node every 100, an interval of 1000. The release
    switches once, to its node 24900, and never to the teacher; here every node is visited and the teacher last."""
    first, end, every, interval = 24000, 25000, 100, 1000
    released = [tuple(event) for event in load(FAMILY, "disback")["released_switches"].tolist()]
    nodes = [first, *(first + step for step in node_steps(end - first, every))]
    switches = Backtrack(len(nodes) - 1, interval).switches()
    events = [(first + step, nodes[node]) for step, node in switches]
    assert events[: len(released)] == released, "the first stored target is the release's first, too"
    assert len(events) > len(released)
    assert [node for _, node in events] == nodes[-2::-1]
    assert events[-1][1] == first, "node 0, the teacher"


# --- FastGen's form of the same losses -----------------------------------------------------------------------


def test_fastgen_distribution_matching(load: Load) -> None:
    """Its normaliser has 1e-6 added and no floor, which is less than the tolerance."""
    file = load(FAMILY, "fastgen_vsd_gan_fdistill")
    x = file["gen"].clone().requires_grad_(True)
    loss = dmd_loss(x, file["teacher_x0"], file["fake_x0"], floor=0.0).mean()
    close_loss(loss, file["vsd_loss"])
    loss.backward()
    close_gradient(x.grad, file["vsd_grad_gen"])


def test_fastgen_adversarial_losses(load: Load) -> None:
    """Logits of several heads a sample."""
    file = load(FAMILY, "fastgen_vsd_gan_fdistill")
    logits = file["fake_logits"].clone().requires_grad_(True)
    loss = generator_loss(logits).mean()
    close_loss(loss, file["gan_gen"])
    loss.backward()
    close_gradient(logits.grad, file["gan_gen_grad"])
    close_loss(discriminator_loss(file["real_logits"], file["fake_logits"]).mean(), file["gan_disc"])
