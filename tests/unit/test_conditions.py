"""Conditions are named values with their nulls; what a model can be asked for is one object."""

from __future__ import annotations

import pytest
import torch

from distill.data.cond import NULL_LABEL, Cond
from distill.data.rng import Draws
from distill.models.conditions import Labels, Nothing, classes, of_source


def sequences(count: int, length: int) -> Cond:
    """Sequences of `length` tokens of 3 numbers, a size of the picture beside them; the null has one token."""
    return Cond(
        count,
        {
            "context": torch.randn(count, length, 3),
            "context_mask": torch.ones(count, length, dtype=torch.bool),
            "time_ids": torch.randn(count, 6),
        },
        {"context": torch.full((1, 1, 3), 7.0), "context_mask": torch.ones(1, 1, dtype=torch.bool)},
    )


def test_sequences_are_padded_and_their_masks_with_false():
    cond = sequences(2, 4)
    dropped = cond.drop(torch.tensor([True, False]))
    assert dropped.get("context")[0].tolist() == [[7.0] * 3, *[[0.0] * 3] * 3]
    assert dropped.get("context_mask").tolist() == [[True, False, False, False], [True] * 4]
    assert torch.equal(dropped.get("context")[1], cond.get("context")[1])
    assert torch.equal(dropped.get("time_ids"), cond.get("time_ids")), "has no null"
    both = cond.cat(cond.null())
    assert (both.size, both.get("context").shape) == (4, (4, 4, 3))
    assert both.get("context_mask").sum(1).tolist() == [4, 4, 1, 1]
    assert torch.equal(both.get("time_ids"), cond.get("time_ids").repeat(2, 1))
    longer = cond.cat(sequences(1, 6)).drop(torch.tensor([False, False, True]))
    assert longer.get("context_mask").sum(1).tolist() == [4, 4, 1]
    assert torch.equal(longer.rows(torch.tensor([1])).get("context")[0, :4], cond.get("context")[1])
    assert longer.to("meta").nulls["context"].device.type == "meta"


def test_wrong_values_are_named():
    context, null = torch.randn(2, 4, 3), torch.zeros(1, 4, 3)
    for values, nulls, message in (
        ({"context": torch.randn(3, 4)}, {}, r"context: expected a tensor \[2, ...\], found torch.float32 \[3, 4\]"),
        ({"context": context}, {"text": null}, r"nulls.text: found without a value; expected some of \['context'\]"),
        ({"context": context}, {"context": context}, r"nulls.context: expected a tensor \[1, ...\]"),
        ({"context": context}, {"context": null.double()}, r"nulls.context: found torch.float64 \[1, 4, 3\], expected"),
        (
            {"context": context, "context_mask": torch.ones(2, 4).bool()},
            {"context": null},
            "nulls.context_mask: missing",
        ),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            Cond(2, values, nulls)
    other = Cond(1, {"context": torch.randn(1, 5, 3)})
    with pytest.raises(
        ValueError, match=r"context: found shapes \[2, 4, 3\] and \[1, 5, 3\], expected equal ones, or"
    ):
        Cond(2, {"context": context}).cat(other)


def test_labels_and_nothing_say_what_a_model_can_be_asked_for():
    ids, draws = torch.tensor([0, 7, 11]), Draws(0, "t", 0, torch.arange(64))
    labels, nothing = Labels(3), Nothing()
    assert labels.of(ids).get("label").tolist() == [0, 1, 2]
    assert labels.ask(count=4).get("label").tolist() == [0, 1, 2, 0]
    assert labels.ask(count=2, label=2).get("label").tolist() == [2, 2]
    assert labels.draw(draws).get("label").unique().tolist() == [0, 1, 2]
    assert [cond.values for cond in (nothing.of(ids), nothing.ask(count=2), nothing.draw(draws))] == [{}] * 3
    for kind in (labels, nothing):
        columns = kind.columns(ids)
        kind.check(columns)
        stored, wanted = kind.stored(columns), kind.of(ids)
        assert stored.values.keys() == wanted.values.keys()
        assert all(torch.equal(stored.get(name), value) for name, value in wanted.values.items())
    assert nothing.columns(ids)["label"].tolist() == [NULL_LABEL] * 3
    with pytest.raises(ValueError, match="label: found 0, expected -1: no classes"):
        nothing.check(Labels(1).columns(ids))
    with pytest.raises(ValueError, match=r"label: expected classes 0 .. 1, found \[0, 1, 2\]"):
        Labels(2).check(labels.columns(ids))
    with pytest.raises(ValueError, match=r"prompt: found 'a', but this model takes no prompts"):
        nothing.ask(count=1, prompt="a")
    assert labels == classes(3) != Labels(4) != nothing == classes(0)
    assert labels.config() == {"_target_": "distill.models.conditions.Labels", "num_classes": 3}


def test_a_source_may_bring_conditions_of_its_own():
    class Source:
        num_classes = 2

    assert of_source(Source()) == Labels(2)
    Source.conditions = Nothing()  # type: ignore[attr-defined]
    assert of_source(Source()) == Nothing()
