"""Two processes train a tokenizer, a model of its tokens and students of Distilled Decoding as one does."""

from __future__ import annotations

from pathlib import Path

import pytest
from parts_worker import TOKENS
from test_two_processes import assert_close, load, start


@pytest.mark.slow
def test_two_processes_train_models_of_tokens_as_one(tmp_path: Path):
    start(tmp_path, 1, "parts_worker.tokens")
    start(tmp_path, 2, "parts_worker.tokens")
    for name in TOKENS:
        one = load(tmp_path, f"{name}-none-1")
        for shard in ("none", "world"):
            # Adam amplifies the rounding of gradients near 0: 6 steps of 1e-3.
            assert_close(one, load(tmp_path, f"{name}-{shard}-2"), 1e-3)
