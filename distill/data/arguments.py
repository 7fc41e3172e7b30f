"""Checks of arguments of Python calls."""

from __future__ import annotations

import math
import operator
import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

ROUNDING = 0.01  # images may exceed [-1, 1] by this without a warning
FAR = 10.0  # larger |x| raises: such values are not an image, even before clamping


def integer(name: str, value: Any, at_least: int | None = None) -> int:
    """Convert an int, a numpy integer or a 0-d integer tensor to an int.

    Raises ValueError naming the argument for other types (floats, booleans, None, strings) and for values below `at_least`."""
    shaped = getattr(value, "ndim", 0) != 0
    boolean = isinstance(value, bool | np.bool_) or getattr(value, "dtype", None) in (torch.bool, np.bool_)
    try:
        number = operator.index(value)
    except (TypeError, ValueError):
        number = None
    if number is None or shaped or boolean:
        raise ValueError(f"{name}: found {_shown(value)}, expected an integer")
    if at_least is not None and number < at_least:
        raise ValueError(f"{name}: expected at least {at_least}, found {number}")
    return number


def finite(name: str, value: Any) -> float:
    """Convert a real number, also of numpy or a 0-d tensor, to a float.

    Raises ValueError naming the argument for other types (booleans, strings, None), NaN and infinity."""
    plain = value.item() if isinstance(value, Tensor | np.generic | np.ndarray) and value.ndim == 0 else value
    if isinstance(plain, bool) or not isinstance(plain, int | float) or not math.isfinite(plain):
        raise ValueError(f"{name}: found {_shown(value)}, expected a finite number")
    return float(plain)


def flag(name: str, value: Any) -> bool:
    """Convert a bool, also of numpy, to a bool. Raises ValueError naming the argument for other types."""
    if not isinstance(value, bool | np.bool_):
        raise ValueError(f"{name}: found {_shown(value)}, expected true or false")
    return bool(value)


def labels(name: str, value: Any, num_classes: int | None = None, *, null: bool = False) -> Tensor:
    """Convert an int, a sequence, an array or a tensor of integers to int64 labels, 0-d or [n], on the device of a tensor.

    With `num_classes`, labels must be in 0 .. num_classes - 1; with `null`, also -1. Values on an accelerator are not checked.
    Raises ValueError naming the argument."""
    if isinstance(value, Tensor | np.ndarray | np.generic):
        found = torch.as_tensor(value)
    elif isinstance(value, Sequence) and not isinstance(value, str | bytes):
        found = torch.tensor([integer(name, entry) for entry in value], dtype=torch.int64, device="cpu")
    else:
        found = torch.tensor(integer(name, value), dtype=torch.int64, device="cpu")
    if found.is_floating_point() or found.is_complex() or found.dtype == torch.bool or found.ndim > 1:
        raise ValueError(f"{name}: expected integers of shape [B], found {found.dtype} {tuple(found.shape)}")
    check_range(name, found, num_classes, null=null)
    return found.to(torch.int64)


def check_range(name: str, label: Tensor, num_classes: int | None, *, null: bool = True) -> None:
    """Raise ValueError unless integer labels are in 0 .. num_classes - 1, or -1 if `null`.

    Labels on an accelerator are not checked, to avoid a device sync; neither are those of a traced call."""
    if label.device.type != "cpu" or label.numel() == 0 or torch.compiler.is_compiling():
        return
    low, high, least = int(label.min()), int(label.max()), -1 if null else 0
    if low < least or (num_classes is not None and high >= num_classes):
        most = "and up" if num_classes is None else f".. {num_classes - 1}"
        also = " or -1, the null condition" if null else ""
        found = sorted(set(label.flatten().tolist()))
        shown = f"{found[:8]}" if len(found) <= 8 else f"{found[0]} .. {found[-1]}"
        raise ValueError(f"{name}: expected classes 0 {most}{also}, found {shown}")


def pixels(name: str, images: Any) -> Tensor:
    """Return images [N, C, H, W], N >= 1, unchanged. Raises ValueError naming the argument for other types, ranks or ranges
    (`check_span`)."""
    if not isinstance(images, Tensor):
        raise ValueError(f"{name}: found {type(images).__name__}, expected a tensor of images [N, C, H, W]")
    if not images.is_floating_point():
        hint = "; convert bytes with images.float() / 127.5 - 1" if images.dtype == torch.uint8 else ""
        raise ValueError(f"{name}: found values of {images.dtype}, expected floats in [-1, 1]{hint}")
    if images.ndim != 4 or len(images) == 0:
        raise ValueError(
            f"{name}: expected images [N, C, H, W] with N >= 1, found shape {list(images.shape)}"
        )
    check_span(name, images)
    return images


def check_span(name: str, images: Tensor) -> None:
    """Raise ValueError if values are not in [-1, 1]: if all are at least 0 and some above 1, or if some exceed `FAR`.

    Smaller excesses are accepted: they are unclamped samples. Non-finite values are not checked here."""
    low, high = (float(value) for value in images.detach().aminmax())
    if not math.isfinite(low) or not math.isfinite(high):
        return
    if max(-low, high) > FAR or (low >= 0 and high > 1 + ROUNDING):
        hint = (
            "convert [0, 255] with images / 127.5 - 1"
            if low >= 0
            else "scale them, or use images.clamp(-1, 1)"
        )
        raise ValueError(f"{name}: found values {low:.4g} .. {high:.4g}, expected [-1, 1]; {hint}")


def warn_of_span(name: str, images: Tensor, stacklevel: int) -> None:
    """Warn of values outside [-1, 1], or of images without values below 0."""
    low, high = (float(value) for value in images.detach().aminmax())
    if max(-low, high) > 1 + ROUNDING:
        message = f"found values {low:.4g} .. {high:.4g}, expected [-1, 1]; use images.clamp(-1, 1)"
    elif low >= 0 and len(images) > 1:
        message = "found no value below 0, expected [-1, 1]; convert [0, 1] with 2 * images - 1"
    else:
        return
    warnings.warn(f"{name}: {message}", stacklevel=stacklevel + 1)


def device(name: str, value: Any) -> torch.device:
    """Return a device of this machine. Raises ValueError naming the argument."""
    try:
        found = torch.device(value)
        torch.empty(0, device=found)
    except (RuntimeError, TypeError, AssertionError, NotImplementedError) as error:
        lines = str(error).strip().splitlines()
        raise ValueError(
            f"{name}: found {_shown(value)}, expected a device of this machine, such as cpu ({lines[0] if lines else 'none'})"
        ) from error
    return found


def _shown(value: Any) -> str:
    """Return a value for a message; long ones are cut and their type is appended."""
    text = repr(value).replace("\n", " ")
    return text if len(text) < 60 else f"{text[:60]}... ({type(value).__name__})"
