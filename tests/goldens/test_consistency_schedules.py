"""Goldens of the consistency family that are scalings, grids and schedules (data/consistency/README.md); float64, rtol 1e-5.

Numbers of the runs that the files tabulate (lengths, scales, decays) are those that the README gives.
"""

from __future__ import annotations

import pytest
import torch
from conftest import Load
from translate import close, numbers

from distill.process.curriculum import ECT_MAPPINGS, ect_r, ect_ratio, ema_and_scales
from distill.process.edm import EDM
from distill.process.scalings import SIGMA_WEIGHTS, cm_scalings, edm_scalings, rescaled_time, sigma_weight
from distill.process.times import karras_grid

FAMILY = "consistency"
TOTAL = 800_000
RUNS = {
    "cifar_ct": {"ema": 0.9, "start": 2, "end": 150},
    "in64_ct": {"ema": 0.95, "start": 2, "end": 200},
    "fixed_cd": {"ema": 0.95, "start": 40, "end": 40, "ema_mode": "fixed", "scale_mode": "fixed"},
    "fixed_prog": {"ema": 0.95, "start": 2, "end": 150, "ema_mode": "fixed"},
}


@pytest.mark.parametrize(("prefix", "scalings"), [("edm", edm_scalings), ("cm", cm_scalings)])
def test_scalings(load: Load, prefix: str, scalings) -> None:
    file = load(FAMILY, "cm_scalings")
    found = scalings(file["sigma"])
    for name in ("c_skip", "c_out", "c_in"):
        # c_out of "cm" is a difference, sigma - sigma_min: zero at sigma_min, where the file may hold rounding
        close(getattr(found, name), file[f"{prefix}_{name}"], 1e-12, 1e-9)
    close(1000 * found.c_noise, file["rescaled_t"], 0.0, 1e-9)
    close(rescaled_time(file["sigma"]), file["rescaled_t"], 0.0, 1e-12)


def test_weights(load: Load) -> None:
    file = load(FAMILY, "cm_scalings")
    keys = {"snr+1": "w_snrp1", "truncated-snr": "w_truncated_snr"}
    for name in SIGMA_WEIGHTS:
        close(sigma_weight(name, file["sigma"]), file[keys.get(name, f"w_{name}")], 0.0, 1e-9)


def test_karras_grid(load: Load) -> None:
    file = load(FAMILY, "cm_scalings")
    for steps in numbers(file, r"karras(\d+)"):
        expected = file[f"karras{steps}"]
        levels = karras_grid(EDM(), steps)
        assert levels.dtype == torch.float64
        close(levels.float(), expected, 0.0, 2e-6)
        # Without the clean end: the discretisation that training draws its pairs from.
        close(karras_grid(EDM(), steps - 1, clean_end=False).float(), expected[:-1], 0.0, 2e-6)


@pytest.mark.parametrize("run", RUNS)
def test_curricula(load: Load, run: str) -> None:
    file = load(FAMILY, "cm_schedules")
    found = [ema_and_scales(step, TOTAL, **RUNS[run]) for step in file["steps"].tolist()]
    assert [scales for _, scales in found] == file[f"{run}_N"].tolist()
    close(torch.tensor([ema for ema, _ in found], dtype=torch.float64), file[f"{run}_ema"], 0.0, 1e-12)


@pytest.mark.parametrize("mapping", ECT_MAPPINGS)
def test_ect_mapping(load: Load, mapping: str) -> None:
    file = load(FAMILY, "ect")
    for q in numbers(file, rf"r_{mapping}_q(\d+)"):
        expected = file[f"r_{mapping}_q{q}"]
        for stage, row in enumerate(expected):
            close(ect_r(file["t"], stage, q, mapping), row, 1e-12, 1e-9)


def test_ect_ratio(load: Load) -> None:
    file = load(FAMILY, "ect")
    for q in numbers(file, r"ratio_q(\d+)"):
        found = [ect_ratio(stage, q) for stage in range(len(file[f"ratio_q{q}"]))]
        close(torch.tensor(found, dtype=torch.float64), file[f"ratio_q{q}"], 0.0, 1e-12)
