"""The table of `scripts/certificates.py`: every method's student against the exact flow map of its teacher."""

from __future__ import annotations

from dataclasses import replace

import certificates
import pytest


@pytest.mark.slow
@pytest.mark.parametrize("name", certificates.CERTIFICATES)
def test_a_student_keeps_its_certificate(name: str) -> None:
    row = certificates.run(name)
    print(certificates.table([row], seed=0))
    assert row.missed() == []
    # A perfect student keeps every bound, one step of the teacher none of them.
    assert replace(row, student=row.floor).missed() == []
    assert len(row.certificate.bounds) >= 3
    assert len(replace(row, student=row.teacher).missed()) == len(row.certificate.bounds)


def row(**changes: float) -> certificates.Row:
    """A row with made-up numbers, good ones but for `changes`."""
    good = {"trajectory": 0.01, "energy": 0.0, "sliced": 0.01, "near": 0.9, "modes": 8}
    found, name = certificates.Found(**good), next(iter(certificates.CERTIFICATES))
    student = certificates.Found(**{**good, **changes})
    return certificates.Row(
        name, certificates.CERTIFICATES[name], student, found, found, "OneStep 1 x 2", "MLP", 1.0
    )


def test_a_missed_bound_is_named() -> None:
    assert row().missed() == []
    for name, value in (("trajectory", 5.0), ("energy", 0.5), ("near", 0.1), ("modes", 7)):
        assert [line.split()[1] for line in row(**{name: value}).missed()] == [name]
        # A student that is not a number keeps nothing.
        assert len(row(**{name: float("nan")}).missed()) == 1


def test_the_table_says_what_was_measured() -> None:
    text = certificates.table([row(trajectory=0.1234)], seed=7)
    assert "0.123 (0.010)" in text
    assert "Seed 7" in text
    assert "OneStep 1 x 2; MLP; 1 s" in text
    head, rule, line = text.splitlines()[:3]
    assert head.count("|") == rule.count("|") == line.count("|")
    assert certificates.summary(["a", "b", "b", "c", "b"]) == "a, b (2 times), c, b"


def test_every_method_that_follows_a_teacher_has_one(monkeypatch: pytest.MonkeyPatch) -> None:
    matching = {"sid", "dmd", "disback", "mmd"}
    assert {"reflow", "one_step", "progressive", "consistency", "ect", "lcm"} | matching <= set(
        certificates.CERTIFICATES
    )
    for name, entry in certificates.CERTIFICATES.items():
        bounds = {(what, how): bound for what, how, bound in entry.bounds}
        assert bounds["modes", "at least"] == 8
        assert bounds["near", "at least"] >= 0.65
        assert ("trajectory", "at most") in bounds or name in matching
        assert bounds.get(("trajectory", "at most"), 0.0) <= 0.2
        assert bounds["energy", "at most"] <= (0.007 if name in matching else 0.01)
    plain = certificates.CERTIFICATES["lcm"]
    assert plain.against == "flow map"
    assert replace(plain, trajectory=None).against == "distribution"
    assert set(plain.bounds) - set(replace(plain, trajectory=None).bounds) == {
        ("trajectory", "at most", 0.18)
    }
    monkeypatch.setattr(certificates, "run", lambda name, seed: row(modes=3))
    assert certificates.main(["reflow"]) == 1
    monkeypatch.setattr(certificates, "run", lambda name, seed: row())
    assert certificates.main(["reflow"]) == 0
    with pytest.raises(SystemExit):
        certificates.main(["reflows"])
