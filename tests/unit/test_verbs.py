"""What a verb does before it does anything."""

from __future__ import annotations

import subprocess
import sys

import pytest
from tests_support import environment

CODE = """
import os, sys
seen = {{}}

class Watch:
    def find_spec(self, name, path=None, target=None):
        if name == "torch":
            seen["policy"] = os.environ.get("OMP_WAIT_POLICY")

sys.meta_path.insert(0, Watch())
import distill.{verb}
assert seen == {{"policy": "passive"}}, seen
assert "torch.distributed.fsdp" not in sys.modules
"""


@pytest.mark.parametrize("verb", ["train", "sample"])
def test_threads_are_told_to_sleep_before_torch_starts_them(verb):
    kept = {k: v for k, v in environment().items() if k != "OMP_WAIT_POLICY"}
    result = subprocess.run(
        [sys.executable, "-c", CODE.format(verb=verb)], env=kept, text=True, capture_output=True, check=False
    )
    assert result.returncode == 0, result.stderr
