"""The names under which numbers are printed, and that they reach every page."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from torch import nn

from distill.evaluation.protocol import Protocol
from distill.evaluation.report import columns, legend, report, table
from distill.exporters.card import card
from distill.models.conditions import Labels
from distill.models.decoder import Pixels
from distill.models.denoiser import Denoiser
from distill.models.generator import Generator
from distill.models.spec import SamplerSpec
from distill.process.flow import Flow


def protocol(
    features: str = "digits64", count: int = 2000, full_count: int | None = 2000, **more: Any
) -> Protocol:
    return Protocol(
        features=features,
        features_sha256="ab" * 32,
        count=count,
        class_balanced=True,
        reference="digits, all images",
        reference_count=1797,
        reference_digest="cd" * 32,
        resolution=(1, 8, 8),
        full_count=full_count,
        **more,
    )


ROW = {
    "model": "student", "steps": 1, "nfe": 1, "fd": 0.05, "kid": -0.001, "cmmd": None, "sliced_wasserstein": 0.04,
    "precision": 0.9, "recall": 0.8, "density": 1.0, "coverage": 0.95, "class_std": 0.3, "nn_train": 2.0,
    "class_accuracy": 0.99, "teacher_mse": None, "straightness": None, "images_per_second": 1000.0,
}  # fmt: skip


class TestNames:
    def test_at_full_count_carry_the_features(self) -> None:
        names = protocol().names()
        assert names["fd"] == "fd_digits64"
        assert names["kid"] == "kid_digits64"
        assert names["recall"] == "recall_digits64"
        assert names["class_accuracy"] == "class_accuracy_digits64"
        assert names["sliced_wasserstein"] == "sliced_wasserstein"  # of pixels
        assert "cmmd" not in names
        assert protocol(count=5000).names() == names
        assert len(set(names.values())) == len(names)

    def test_below_the_full_count_carry_the_count_too(self) -> None:
        names = protocol(count=500).names()
        assert names["fd"] == "fd_digits64@500"
        counted = {"fd", "kid", "recall", "coverage", "sliced_wasserstein"}
        assert {metric for metric, name in names.items() if name.endswith("@500")} == counted
        assert (
            names["precision"] == "precision_digits64"
        )  # a mean over samples: any count estimates the same value
        assert protocol(count=1999).names()["fd"] == "fd_digits64@1999"

    def test_only_full_inception_is_an_fid(self) -> None:
        assert protocol("inception", 50_000, 50_000).names()["fd"] == "fid"
        assert protocol("inception", 49_999, 50_000).names()["fd"] == "fid@49999"
        assert protocol("inception", 5000, 50_000).names()["kid"] == "kid_inception@5000"
        for features in ("inception_other", "digits64", "dino", "clip", "efficientnet_lite0"):
            for count in (10, 10**6):
                assert "fid" not in protocol(features, count, 50_000).names()["fd"]

    def test_cmmd_is_of_clip_and_plain_only_for_its_tower(self) -> None:
        assert protocol("clip", 10_000, 10_000).names()["cmmd"] == "cmmd"
        assert protocol("clip", 2000, 10_000).names()["cmmd"] == "cmmd@2000"
        assert protocol("clip_p32_224", 2000, 10_000).names()["cmmd"] == "cmmd_clip_p32_224@2000"
        assert "cmmd" not in protocol("clipart", 2000, 2000).names()

    def test_without_a_full_count_always_carry_the_count(self) -> None:
        assert protocol(count=10**6, full_count=None).names()["fd"] == "fd_digits64@1000000"


class TestFile:
    def test_holds_the_names_and_comes_back(self) -> None:
        original = protocol(count=500, floor={"fd": 0.05, "half": 898.0}, preprocessing="8-bit RGB")
        plain = original.to_dict()
        assert plain["names"] == original.names()
        assert Protocol.from_dict(plain) == original

    def test_of_an_older_version_is_read(self) -> None:
        plain = protocol().to_dict()
        for key in ("names", "full_count", "preprocessing"):
            del plain[key]
        old = Protocol.from_dict(plain)
        assert old == replace(protocol(), full_count=None)
        assert old.names()["fd"] == "fd_digits64@2000"

    def test_errors_name_the_entry(self) -> None:
        plain = protocol().to_dict()
        with pytest.raises(ValueError, match=r"protocol.colour: no such key"):
            Protocol.from_dict(plain | {"colour": "red"})
        del plain["count"]
        with pytest.raises(ValueError, match=r"protocol.count: missing"):
            Protocol.from_dict(plain)


class TestPages:
    def test_the_line_names_the_floor_by_its_own_count(self) -> None:
        text = protocol(floor={"fd": 0.0537, "sliced_wasserstein": 0.04, "half": 898.0}).describe()
        assert "real halves of 898: fd_digits64@898 0.0537, sliced_wasserstein@898 0.04" in text
        assert "reduced" not in text
        assert (
            "500 class-balanced samples (reduced: the full count is 2000)" in protocol(count=500).describe()
        )
        assert "network input 8-bit RGB" in protocol(preprocessing="8-bit RGB").describe()
        assert "\n" not in text

    @pytest.mark.parametrize("count", [500, 2000])
    def test_tables_report_and_card_print_the_names(self, count: int) -> None:
        used = protocol(count=count)
        tag = "@500" if count == 500 else ""
        heading = table([ROW], used.names()).splitlines()[0]
        assert (
            f"| nfe | fd_digits64{tag} ↓ | kid_digits64{tag}·10³ ↓ | sliced_wasserstein{tag} ↓ |" in heading
        )
        assert f"| precision_digits64 | recall_digits64{tag} ↑ |" in heading
        assert "cmmd" not in heading
        model = Generator(
            Denoiser(
                nn.Identity(),
                Flow(),
                "velocity",
                (1, 8, 8),
                coupling="endpoint",
                conditions=Labels(10),
                decoder=Pixels(),
            ),
            SamplerSpec(steps=1, times={1: (1.0, 0.0)}),
        )
        for page in (
            report("r", [ROW], used, {}, []),
            card("r", model, [ROW], used, grid=False),
        ):
            assert heading in page
            assert f"Protocol: {used.describe()}." in page
            if count == 500:  # no number stands under the metric's plain name
                assert "fd_digits64 " not in page
                assert "fd_digits64`" not in page
            assert "FID" not in page.replace("not an FID", "")
        with pytest.raises(ValueError, match="protocol: found None"):
            card("r", model, [ROW], None, grid=False)
        assert "## Measured" not in card("r", model, [], None, grid=False)

    def test_the_legend_follows_the_names(self) -> None:
        def text(used: Protocol) -> str:
            return legend(used, columns([ROW | {"cmmd": 1.0}]))

        assert "`fd_digits64`: the Fréchet distance in the features digits64 (not an FID)" in text(protocol())
        assert "`@`" not in text(protocol())
        assert "`@` and a count" in text(protocol(count=500))
        assert "`fid`: the Fréchet distance in Inception features;" in text(
            protocol("inception", 50_000, 50_000)
        )
        assert "`cmmd@500`" in text(protocol("clip", 500, 10_000))
