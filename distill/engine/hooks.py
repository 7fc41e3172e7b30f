"""Lightning's hooks that are not called from its loop: those within a step, and those of its own checkpoints."""

from __future__ import annotations

from typing import Any, cast

import lightning as L
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.trainer import call

# In manual optimization Lightning calls them from `manual_backward` and its own optimizers, which the engine does not use.
WITHIN_STEPS = ("on_before_backward", "on_after_backward", "on_before_optimizer_step", "on_before_zero_grad")
OF_CHECKPOINTS = ("on_save_checkpoint", "on_load_checkpoint")


def overrides(given: object, hook: str, base: type) -> bool:
    """Whether an object or a class defines a hook itself, instead of inheriting that of `base`."""
    found = getattr(given, hook)
    return getattr(found, "__func__", found) is not getattr(base, hook)


def check_callback_hooks(callback: Callback | type[Callback], where: str) -> None:
    """Raise ValueError, starting with `where`, for a callback with hooks of Lightning's checkpoints: our checkpoints have other
    entries, and without these hooks its state would be lost."""
    for hook in OF_CHECKPOINTS:
        if overrides(callback, hook, Callback):
            kind = callback if isinstance(callback, type) else type(callback)
            raise ValueError(
                f"{where}: {kind.__name__} defines {hook}, which is called for checkpoints of Lightning's format alone; "
                "expected its state in state_dict and load_state_dict"
            )


class StepHooks:
    """Calls the hooks within a step that a callback or the method defines; others cost nothing but a look-up."""

    def __init__(self) -> None:
        self.defined: frozenset[str] = frozenset()

    def find(self, method: L.LightningModule) -> None:
        """Find out which of the hooks are defined; once, when a training begins."""
        callbacks = cast(Any, method.trainer).callbacks
        self.defined = frozenset(
            hook
            for hook in WITHIN_STEPS
            if overrides(method, hook, L.LightningModule)
            or any(overrides(callback, hook, Callback) for callback in callbacks)
        )

    def __call__(self, method: L.LightningModule, hook: str, *arguments: Any) -> None:
        """Call a hook of all callbacks, then of the method, as Lightning does."""
        if hook in self.defined:
            call._call_callback_hooks(method.trainer, hook, *arguments)
            call._call_lightning_module_hook(method.trainer, hook, *arguments)
