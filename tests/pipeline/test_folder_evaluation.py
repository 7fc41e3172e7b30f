"""Folders of images measured from the command line: which classes are meant, which channels, and what was left out."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from distill.data.digits import Digits
from distill.data.folder import ImageFolder
from distill.evaluation.measure import Reference, measure
from distill.models.features import load_digits64
from distill.stages.request import Request
from distill.stages.standalone import evaluate, summary

WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
FEATURES = {"_target_": "distill.models.features.load_digits64"}
DIGITS = {"digits": Path(__file__).resolve().parents[2] / "configs" / "data" / "digits.yaml"}


def write(folder: Path, names: tuple[str, ...], *, colour: bool = False, first: int = 0) -> Path:
    """Six digits a class, in sub-folders of these names."""
    digits = Digits()
    for label, name in enumerate(names):
        for i, row in enumerate((digits.labels == label).nonzero()[first : first + 6, 0].tolist()):
            pixels = digits.images[row, 0].add(1).mul(127.5).round().byte().numpy()
            path = folder / name / f"{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(np.dstack([pixels] * 3) if colour else pixels).save(path)
    return folder


def evaluated(model: Path, reference: Path | str, out: Path) -> dict:
    """metrics.json of one evaluation."""
    request = Request(model=str(model), reference=str(reference), features=FEATURES, out=str(out))
    return json.loads((evaluate(request, DIGITS) / "metrics.json").read_text())


def numbers() -> tuple[str, ...]:
    return tuple(str(label) for label in range(10))


def test_words_are_not_taken_for_classes(tmp_path: Path) -> None:
    named = evaluated(write(tmp_path / "named", numbers()), "digits", tmp_path / "a")
    padded = write(tmp_path / "padded", tuple(f"0{label}" for label in range(10)))
    words = evaluated(write(tmp_path / "words", WORDS), "digits", tmp_path / "b")
    assert named["rows"][0]["class_accuracy"] > 0.95
    assert named["note"] == ""
    assert evaluated(padded, "digits", tmp_path / "c")["rows"] == [named["rows"][0] | {"model": "padded"}]
    row = words["rows"][0]
    assert row["class_accuracy"] is None
    assert row["class_std"] is None
    assert row["fd"] == pytest.approx(named["rows"][0]["fd"], rel=1e-6)
    assert "No numbers by class: the sub-folders eight, five, four, ..." in words["note"]
    assert words["protocol"]["class_balanced"] is False
    assert words["note"] in (tmp_path / "b" / "report.md").read_text()
    assert words["note"] in summary(tmp_path / "b")


def test_a_reference_of_other_names_or_none(tmp_path: Path) -> None:
    """Equal words are equal classes, whose numbers the classifier of digits does not know."""
    words, other = write(tmp_path / "words", WORDS), write(tmp_path / "other", WORDS, first=6)
    row = evaluated(words, other, tmp_path / "a")["rows"][0]
    assert row["class_std"] is not None
    assert row["class_accuracy"] is None
    flat = tmp_path / "flat"
    flat.mkdir()
    for path in other.rglob("*.png"):
        path.rename(flat / f"{path.parent.name}{path.name}")
    found = evaluated(words, flat, tmp_path / "b")
    assert found["rows"][0]["class_std"] is None
    assert found["note"] == "No numbers by class: the reference has no classes."


@pytest.mark.filterwarnings("ignore:.*singular")
def test_the_classifier_looks_at_the_names(tmp_path: Path) -> None:
    """Of a reference whose classes are some of the digits, a label means the digit that its folder names."""
    digits, extractor = Digits(), load_digits64()
    chosen = (digits.labels == 3) | (digits.labels == 7)
    images, labels = digits.images[chosen], (digits.labels[chosen] == 7).long()
    right = Reference(images, labels, extractor, classes=("3", "7"))
    assert right.references()["class_accuracy"] == pytest.approx(1, abs=0.01)
    assert measure(images[:40], labels[:40], right, extractor)["class_accuracy"] == pytest.approx(1, abs=0.03)
    for names in (("cat", "dog"), ("three", "seven"), ("3", "11")):
        wrong = Reference(images, labels, extractor, classes=names)
        assert "class_accuracy" not in wrong.references()
        assert measure(images[:40], labels[:40], wrong, extractor)["class_accuracy"] is None
        assert measure(images[:40], labels[:40], wrong, extractor)["class_std"] is not None
    with pytest.raises(ValueError, match="labels: found class 2, the reference has 2"):
        measure(images[:40], labels[:40] + 1, right, extractor)


def test_grey_saved_as_rgb_is_measured_as_grey(tmp_path: Path) -> None:
    grey = evaluated(write(tmp_path / "grey", numbers()), "digits", tmp_path / "a")["rows"][0]
    colour = write(tmp_path / "colour", numbers(), colour=True)
    assert ImageFolder(str(colour)).sample_shape == (3, 8, 8)
    assert evaluated(colour, "digits", tmp_path / "b")["rows"] == [grey | {"model": "colour"}]
    # And as a reference of grey samples, whose numbers are those of the grey reference.
    other = write(tmp_path / "other", numbers(), colour=True, first=6)
    plain = write(tmp_path / "plain", numbers(), first=6)
    samples = tmp_path / "grey"
    found, expected = (evaluated(samples, r, tmp_path / f"out_{r.name}")["rows"] for r in (other, plain))
    pixels = np.asarray(Image.open(colour / "0" / "0.png")).copy()
    assert {k: v for k, v in found[0].items() if k in ("nn_train", "pixel_std")} == {
        k: v for k, v in expected[0].items() if k in ("nn_train", "pixel_std")
    }
    pixels[0, 0, 0] ^= 8
    Image.fromarray(pixels).save(colour / "0" / "0.png")
    with pytest.raises(ValueError, match=r"has images of \[1, 8, 8\], but those to measure are \[3, 8, 8\]"):
        evaluated(colour, "digits", tmp_path / "c")


def test_what_was_left_out_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    samples, reference = write(tmp_path / "samples", numbers()), write(tmp_path / "real", numbers(), first=6)
    (samples / "@eaDir").mkdir()
    (samples / "captions.json").write_text("{}")
    (reference / "3" / "to_4").symlink_to("../4")
    found = evaluated(samples, reference, tmp_path / "a")
    assert found["note"] == (
        "Samples: left out: 1 hidden or of other programs (@eaDir); 1 not images (1 .json). "
        "Reference: left out: 1 links to folders that are read anyway (3/to_4)."
    )
    assert (
        found["protocol"]["reference"] == "real, all images"
    )  # compares with an evaluation without the link
    printed = capsys.readouterr().err
    assert f"warning: {samples}: left out: 1 hidden or of other programs (@eaDir)" in printed
    assert found["note"] in (tmp_path / "a" / "report.md").read_text()
