"""Resets global settings of torch for code whose result must not depend on them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch

# (backend, operator, precision of float32 products): the defaults of torch.
PRECISIONS = (
    ("cuda", "matmul", "ieee"),
    ("cudnn", "conv", "tf32"),
    ("cudnn", "rnn", "tf32"),
    ("mkldnn", "matmul", "ieee"),
    ("mkldnn", "conv", "ieee"),
    ("mkldnn", "rnn", "ieee"),
)
NAMED_PRECISIONS = hasattr(torch.backends.cuda.matmul, "fp32_precision")  # torch 2.8 has one global setting
ATTENTION = ("flash_sdp", "mem_efficient_sdp", "math_sdp", "cudnn_sdp")
AUTOCAST = ("cpu", "cuda", "mps", "xpu")


@contextmanager
def plain_torch() -> Iterator[None]:
    """Use torch's default settings inside the block (or, as a decorator, the call), and restore the caller's settings after it.

    The settings are: default dtype (float32) and device (CPU), autocast and inference mode (off), precision of float32
    products, `torch.backends.cudnn.benchmark`, and the enabled attention kernels. Gradient mode is not changed. Some of these
    settings are global to the process and affect other threads during the block.
    """
    with ExitStack() as stack:
        if torch.is_inference_mode_enabled():
            stack.enter_context(torch.inference_mode(False))
            stack.enter_context(torch.set_grad_enabled(False))  # leaving inference mode enables gradients
        for kind in AUTOCAST:
            if torch.is_autocast_enabled(kind):
                stack.enter_context(torch.autocast(kind, enabled=False))
        if torch.get_default_device().type != "cpu":
            stack.enter_context(torch.device("cpu"))
        if (dtype := torch.get_default_dtype()) != torch.float32:
            stack.callback(torch.set_default_dtype, dtype)
            torch.set_default_dtype(torch.float32)
        if (products := torch.get_float32_matmul_precision()) != "highest" and not NAMED_PRECISIONS:
            stack.callback(torch.set_float32_matmul_precision, products)
            torch.set_float32_matmul_precision("highest")
        for backend, operator, precision in PRECISIONS:
            _set(
                stack, getattr(getattr(torch.backends, backend), operator, None), "fp32_precision", precision
            )
        _set(stack, torch.backends.cudnn, "benchmark", False)
        for name in ATTENTION:
            enable = getattr(torch.backends.cuda, f"enable_{name}")
            if not getattr(torch.backends.cuda, f"{name}_enabled")():
                stack.callback(enable, False)
                enable(True)
        yield


def _set(stack: ExitStack, owner: Any, name: str, value: Any) -> None:
    """Set an attribute until the stack exits; does nothing if torch has no such attribute or the value is the same."""
    before = getattr(owner, name, None)
    if before is None or before == value or (before == "none" and value == "ieee"):
        return
    stack.callback(setattr, owner, name, before)
    setattr(owner, name, value)
