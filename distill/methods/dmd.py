"""Distribution matching distillation: samples move along the difference of the teacher's and the fake score.

Diff-Instruct (Luo et al. 2023, arXiv 2305.18455): `normalise: false`. DMD (Yin et al. 2023, arXiv 2311.18828): the
direction normalised by the teacher's error. DMD2 (Yin et al. 2024, arXiv 2405.14867): several fake updates a generator
update, a GAN head on the fake score's features, and few-step students trained on the states that their own sampler visits
(backward simulation). A warm start on noise-data pairs (DMD2's for one-step SDXL) is a training stage of its own: method
`one_step` on a Generate stage's pairs, then `init` from it.

What the loss should look like: `student/loss` is half the mean square of the normalised direction (of Diff-Instruct a product
with the samples, whose value has no meaning): it is 0 in the first step, where the fake score equals the teacher, rises while
the two separate, then falls slowly. It does not measure quality. Watch `diagnostics/gap_*` (falling at first), `fake/loss`,
`diagnostics/x_std` (far below the data's means collapse), with a GAN `fake/logit_real` and `fake/logit_fake` (apart by a few,
not by tens), and `eval/fd`.

Diff-Instruct as published: `normalise: false`, `reduction: sum`, `updates: {fake_per_student: 1, first: fake}` and log-normal
times for both.

Deviations: between its updates the fake score of a few-step student learns a step drawn for each sample; DMD2
draws one a batch. Outside EDM all times are the process's own, of the GAN too. The normaliser has a floor in units of each
sample (0: the reference), since with few components it comes near 0. Samples that are not finite are not zeroed: the engine
skips and counts the step. DMD's regression on pairs is not part of the loss (DMD2 dropped it).
"""

from __future__ import annotations

from distill.methods.families.matching import DistributionMatching


class DMD(DistributionMatching):
    """Distribution matching distillation.

    Args:
        student: starts from the teacher.
        teacher: a diffusion or flow model; the fake score starts as its copy.
        sampling, fake, guidance, updates, gan: see `families.options`. With a GAN generated samples have the labels of
            `sampling.labels`, real ones their own.
        input: what a few-step student is trained on: "backward_sim", the states of its own sampler, or "real_noised", noised
            data (the mismatch that DMD2 removes; for comparisons, with the data's labels and two levels or more).
        generator_times: times of the student's loss, see `losses.score_times.times_of`; null: under EDM DMD2's table, indices
            20 .. 980, else `losses.score_times.usual_times`. `fake.times`: null: under EDM the indices 0 .. 999.
        reduction: of losses over the dimensions of a sample, "mean" or "sum".
        normalise: divide by the teacher's error (DMD); false: Diff-Instruct.
        floor: of the normaliser, in units of a sample's root mean square; 0: the reference.
        noise_scale: of the student's sampler, see `SamplerSpec`; training never uses it.
    """
