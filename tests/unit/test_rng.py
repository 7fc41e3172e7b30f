"""Randomness is a function of what it is for (contract *Randomness*)."""

import torch

from distill.data.order import Order
from distill.data.rng import Draws, noise_checksum, philox, sample_noise


def test_philox_known_answers():
    # Random123's known-answer vectors for philox4x32-10.
    cases = [
        ((0, 0, 0, 0), 0, (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((0xFFFFFFFF,) * 4, 0xFFFFFFFFFFFFFFFF, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0x299F31D0 << 32) | 0xA4093822,
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ]
    for counter, key, expected in cases:
        words = philox([torch.tensor([c]) for c in counter], key)
        assert tuple(int(w) for w in words) == expected


def test_draws_do_not_depend_on_the_split_or_on_the_order_of_calls():
    index = torch.arange(8)
    whole = Draws(3, "train/student", 17, index)
    normal, uniform = whole.normal("eps", (1, 8, 8)), whole.uniform("t")
    for part in (index[:3], index[3:], index[[6, 1]]):
        draws = Draws(3, "train/student", 17, part)
        assert torch.equal(draws.uniform("t"), uniform[part])
        assert torch.equal(draws.normal("eps", (1, 8, 8)), normal[part])


def test_draws_differ_by_seed_stream_step_and_name():
    index = torch.arange(4)
    draws = [
        Draws(0, "a", 0, index),
        Draws(1, "a", 0, index),
        Draws(0, "b", 0, index),
        Draws(0, "a", 1, index),
    ]
    values = [d.uniform("t") for d in draws] + [draws[0].uniform("s")]
    assert len({tuple(v.tolist()) for v in values}) == len(values)


def test_draws_have_the_distributions_they_claim():
    draws = Draws(0, "x", 0, torch.arange(400))
    normal, uniform = draws.normal("n", (501,)).double(), draws.uniform("u", (501,)).double()
    count = normal.numel()
    assert abs(normal.mean()) < 4 / count**0.5
    assert abs(normal.var() - 1) < 4 * (2 / count) ** 0.5
    assert abs((normal**4).mean() - 3) < 4 * (96 / count) ** 0.5
    assert uniform.min() > 0
    assert uniform.max() < 1
    assert abs(uniform.mean() - 0.5) < 4 / (12 * count) ** 0.5
    correlation = torch.corrcoef(normal.T[:20])
    assert (correlation - torch.eye(20)).abs().max() < 5 / 400**0.5
    integers = draws.integer("i", 10, (501,))
    assert integers.min() == 0
    assert integers.max() == 9
    assert (integers.flatten().bincount() / count - 0.1).abs().max() < 5e-3


def test_sample_noise_is_a_function_of_the_id():
    ids = torch.tensor([5, 0, 9])
    noise = sample_noise(1, "pairs", ids, (1, 4, 4))
    for row, i in zip(noise, ids, strict=True):
        assert torch.equal(row, sample_noise(1, "pairs", i[None], (1, 4, 4))[0])
    assert not torch.equal(noise[0], sample_noise(1, "pairs2", ids[:1], (1, 4, 4))[0])
    assert noise_checksum(1, "pairs", (1, 4, 4)) != noise_checksum(2, "pairs", (1, 4, 4))


def test_order_visits_everything_once_an_epoch_and_seeks():
    order = Order(10, seed=4)
    assert sorted(order.at(0, 10).tolist()) == list(range(10))
    assert sorted(order.at(10, 10).tolist()) == list(range(10))
    assert not torch.equal(order.at(0, 10), order.at(10, 10))
    long = order.at(0, 35)
    for start, count in ((0, 7), (7, 20), (27, 8)):
        assert torch.equal(Order(10, seed=4).at(start, count), long[start : start + count])
