"""What callers may have set in torch, put aside while a result is made that must not depend on it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch

# (backend, operator, precision of its float32 products): what torch itself starts with.
PRECISIONS = (
    ("cuda", "matmul", "ieee"),
    ("cudnn", "conv", "tf32"),
    ("cudnn", "rnn", "tf32"),
    ("mkldnn", "matmul", "ieee"),
    ("mkldnn", "conv", "ieee"),
    ("mkldnn", "rnn", "ieee"),
)
NAMED_PRECISIONS = hasattr(torch.backends.cuda.matmul, "fp32_precision")  # torch 2.8 has one setting for all
ATTENTION = ("flash_sdp", "mem_efficient_sdp", "math_sdp", "cudnn_sdp")
AUTOCAST = ("cpu", "cuda", "mps", "xpu")


@contextmanager
def plain_torch() -> Iterator[None]:
    """Torch as it is after `import torch`, for the length of a block (or, as a decorator, of a call).

    Set aside, and restored at the end also after an error: the default dtype (float32) and device (the CPU), autocast,
    inference mode (results are ordinary tensors), the precision of float32 products, cuDNN's choice of algorithms by
    timing, and the implementations that attention may use. Whether gradients are recorded stays as it is. These are states
    of the process or the thread: other threads that compute at the same time see some of them.
    """
    with ExitStack() as stack:
        if torch.is_inference_mode_enabled():
            stack.enter_context(torch.inference_mode(False))
            stack.enter_context(torch.set_grad_enabled(False))  # leaving inference mode would turn them on
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
    """Give an attribute a value until the stack is left; only where it has another, and torch knows it."""
    before = getattr(owner, name, None)
    if before is None or before == value or (before == "none" and value == "ieee"):
        return
    stack.callback(setattr, owner, name, before)
    setattr(owner, name, value)
