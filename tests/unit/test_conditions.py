"""Conditions are named values with their nulls; what a model can be asked for is one object."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from distill.cache.pairs import Header, Pairs
from distill.cache.writer import write_pairs
from distill.data.cond import NULL_LABEL, Cond
from distill.data.rng import Draws, noise_checksum
from distill.engine.fit import Fit, train
from distill.engine.schedule import Linear
from distill.engine.update import Optim
from distill.exporters.card import card
from distill.methods.reflow import Reflow
from distill.models import conditions
from distill.models.conditions import Conditions, Labels, Nothing, classes, of_source
from distill.models.denoiser import Denoiser
from distill.models.native import load_model, save_model
from distill.nets import mlp
from distill.nets.net import Net
from distill.process.flow import Flow


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


# ---- a kind that the package does not have: a class beside the others, and the net that reads it ----


class Sentences(Conditions):
    """Sentences as sequences of letters, [L,4] each; the null is one empty letter."""

    kind = "sentences"

    def __init__(self, sentences: Sequence[str]) -> None:
        self.sentences = list(sentences)

    @property
    def period(self) -> int:
        return len(self.sentences)

    def encode(self, texts: Sequence[str]) -> Cond:
        length = max(map(len, texts))
        codes = torch.tensor([[ord(c) for c in text.ljust(length)] for text in texts], dtype=torch.float32)
        context = torch.stack([(codes * k / 7).sin() for k in range(1, 5)], 2)
        mask = torch.tensor([[i < len(text) for i in range(length)] for text in texts])
        nulls = {"context": torch.zeros(1, 1, 4), "context_mask": torch.ones(1, 1, dtype=torch.bool)}
        return Cond(len(texts), {"context": context, "context_mask": mask}, nulls)

    def of(self, ids: torch.Tensor) -> Cond:
        return self.encode([self.sentences[i % self.period] for i in ids.tolist()])

    def ask(self, *, count: int, label: Any = None, prompt: Any = None) -> Cond:
        assert label is None
        return self.of(torch.arange(count)) if prompt is None else self.encode([prompt] * count)

    def draw(self, draws: Draws) -> Cond:
        return self.of(draws.integer("sentence", self.period))

    def columns(self, ids: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"sentence": (ids % self.period).to(torch.int32)}

    def check(self, columns: Any) -> None:
        assert int(columns["sentence"].max()) < self.period

    def stored(self, columns: Any) -> Cond:
        return self.of(columns["sentence"])

    def words(self) -> str:
        return f"{self.period} sentences"


class Reader(Net):
    """A net that adds the mean of a sentence's letters."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.x, self.context = torch.nn.Linear(size + 1, size), torch.nn.Linear(4, size)

    def forward(self, x: torch.Tensor, t: torch.Tensor, cond: Cond) -> torch.Tensor:
        context, mask = cond.get("context"), cond.get("context_mask")[..., None]
        mean = (context * mask).sum(1) / mask.sum(1)
        return self.x(torch.cat([x, t[:, None].to(x.dtype)], 1)) + self.context(mean)


def test_a_further_kind_is_one_class_and_the_net_that_reads_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Pairs, training with dropped conditions, guidance, model folders, sampling and cards use its interface alone."""
    for cls, module in ((Sentences, conditions), (Reader, mlp)):
        monkeypatch.setattr(cls, "__module__", module.__name__)
        monkeypatch.setattr(module, cls.__name__, cls, raising=False)
    torch.manual_seed(0)
    asked = Sentences(["a", "three words here", "two words"])
    teacher = Denoiser(Reader(6), Flow(), "velocity", (6,), conditions=asked, guidable=True)
    header = Header(
        (6,), 9, 0, "pairs", noise_checksum(0, "pairs", (6,)), "t", "euler", 2, 1.5,
        asked.config(), teacher.decoder.config(),
    )  # fmt: skip
    write_pairs(tmp_path / "pairs", teacher, header)
    pairs, rows = Pairs(tmp_path / "pairs"), torch.arange(9)
    batch = pairs.fetch(rows, rows)
    assert of_source(pairs) == asked
    assert torch.equal(teacher.transport(batch.z, batch.cond, steps=2, guidance_scale=1.5)[0], batch.x0)
    method = Reflow(copy.deepcopy(teacher), null_prob=0.5)
    adam = Optim(partial(torch.optim.Adam, lr=1e-2), Linear(4))
    method.prepare({"student": adam}, seed=0)
    train(method, pairs, Fit(steps=4, batch_size=8), folder=tmp_path / "run", config={})
    student = method.as_generator()
    assert student.denoiser.guidable
    save_model(tmp_path / "export", student.denoiser, replace(student.spec, guidance_scale=2.0))
    again = load_model(tmp_path / "export")
    assert again.conditions == asked
    samples = again.sample(3, prompt="three words here", steps=2)
    assert torch.equal(samples[1], again.sample(3, steps=2)[1]), "the sentence of sample 1"
    assert not torch.allclose(samples[2], again.sample(3, steps=2)[2])
    assert "for 3 sentences" in card("r", again, [], None, grid=False)
