"""Arguments of Python calls, checked as those of a command line are: what is no integer is not taken for one."""

from __future__ import annotations

import math
import operator
import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

ROUNDING = 0.01  # by which images may leave [-1, 1] without a word
FAR = 10.0  # |x| above this is no image, clamped or not


def integer(name: str, value: Any, at_least: int | None = None) -> int:
    """An int from an int, an integer of numpy or a 0-d integer tensor. Raises ValueError naming the argument for anything
    else (floats, booleans, None, text) and for less than `at_least`."""
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
    """A float from a real number, of numpy or a 0-d tensor too. Raises ValueError naming the argument for anything else
    (booleans, text, None) and for NaN and infinity."""
    plain = value.item() if isinstance(value, Tensor | np.generic | np.ndarray) and value.ndim == 0 else value
    if isinstance(plain, bool) or not isinstance(plain, int | float) or not math.isfinite(plain):
        raise ValueError(f"{name}: found {_shown(value)}, expected a finite number")
    return float(plain)


def flag(name: str, value: Any) -> bool:
    """A bool; raises ValueError naming the argument for anything else ("no" is true in Python)."""
    if not isinstance(value, bool | np.bool_):
        raise ValueError(f"{name}: found {_shown(value)}, expected true or false")
    return bool(value)


def labels(name: str, value: Any, num_classes: int | None = None, *, null: bool = False) -> Tensor:
    """int64 labels, 0-d or [n], from an int, a sequence, an array or a tensor of integers; on the device of a tensor.

    With `num_classes` they must lie in 0 .. num_classes - 1, and may be -1 where `null` is. Values on an accelerator are
    not looked at. Raises ValueError naming the argument."""
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
    """Raise ValueError unless integer labels lie in 0 .. num_classes - 1 (-1 too, where `null` is). Those on an
    accelerator are not waited for, and those of a traced call have no values."""
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
    """Images [N, C, H, W] of at least one, as they are. Raises ValueError naming them: no float tensor of that rank, or
    values of another range than [-1, 1] (`check_span`)."""
    if not isinstance(images, Tensor):
        raise ValueError(f"{name}: found {type(images).__name__}, expected a tensor of images [N, C, H, W]")
    if not images.is_floating_point():
        hint = "; images of bytes are images.float() / 127.5 - 1" if images.dtype == torch.uint8 else ""
        raise ValueError(f"{name}: found values of {images.dtype}, expected floats in [-1, 1]{hint}")
    if images.ndim != 4 or len(images) == 0:
        raise ValueError(
            f"{name}: expected images [N, C, H, W] with N >= 1, found shape {list(images.shape)}"
        )
    check_span(name, images)
    return images


def check_span(name: str, images: Tensor) -> None:
    """Raise ValueError for values of another range than [-1, 1]: none below 0 and some above 1, or some beyond `FAR`. What
    lies between is taken for samples that nobody clamped. Non-finite values are told by whoever needs finite ones."""
    low, high = (float(value) for value in images.detach().aminmax())
    if not math.isfinite(low) or not math.isfinite(high):
        return
    if max(-low, high) > FAR or (low >= 0 and high > 1 + ROUNDING):
        hint = (
            "images in [0, 255] are images / 127.5 - 1" if low >= 0 else "scale them, or images.clamp(-1, 1)"
        )
        raise ValueError(f"{name}: found values {low:.4g} .. {high:.4g}, expected [-1, 1]; {hint}")


def warn_of_span(name: str, images: Tensor, stacklevel: int) -> None:
    """Warn of values that are allowed but seldom meant: outside [-1, 1], or none below 0."""
    low, high = (float(value) for value in images.detach().aminmax())
    if max(-low, high) > 1 + ROUNDING:
        told = f"found values {low:.4g} .. {high:.4g}, expected [-1, 1]; images.clamp(-1, 1) clamps them"
    elif low >= 0 and len(images) > 1:
        told = "no value is below 0; images in [0, 1] are 2 * images - 1"
    else:
        return
    warnings.warn(f"{name}: {told}", stacklevel=stacklevel + 1)


def device(name: str, value: Any) -> torch.device:
    """A device that this machine has. Raises ValueError naming the argument."""
    try:
        found = torch.device(value)
        torch.empty(0, device=found)
    except (RuntimeError, TypeError, AssertionError, NotImplementedError) as error:
        told = str(error).strip().splitlines()
        raise ValueError(
            f"{name}: found {_shown(value)}, expected a device of this machine, such as cpu ({told[0] if told else 'none'})"
        ) from error
    return found


def _shown(value: Any) -> str:
    """A value in a message: short, with its type where that is what is wrong."""
    text = repr(value).replace("\n", " ")
    return text if len(text) < 60 else f"{text[:60]}... ({type(value).__name__})"
