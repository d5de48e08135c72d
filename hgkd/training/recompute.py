"""Activation checkpointing (arXiv 1604.06174): activations of named parts are computed again in the backward pass, not kept.

mmengine 0.10.7 uses torch's reentrant form, with which sparse tensors cannot leave a part, and lets batch normalisation update
its running statistics a second time when a part is computed again. Here neither happens.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint

from hgkd.errors import InvalidValueError, unknown_name_message


def recompute_activations(model: nn.Module, names: Sequence[str]) -> None:
    """Let the named modules of ``model`` keep their inputs only, in place.

    Raises:
        ValueError: a name that the model does not have, with the nearest ones.
    """
    modules = dict(model.named_modules())
    for name in names:
        if name not in modules:
            raise InvalidValueError(
                "checkpointing-module-unknown",
                unknown_name_message("module in activation_checkpointing", name, [n for n in modules if n]),
            )
        module = modules[name]
        contexts = partial(_contexts, module)
        module.forward = partial(checkpoint, module.forward, use_reentrant=False, context_fn=contexts)  # type: ignore[method-assign]


def _contexts(module: nn.Module) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    """Contexts of the first computation and of the second."""
    return nullcontext(), _statistics_at_rest(module)


@contextmanager
def _statistics_at_rest(module: nn.Module) -> Iterator[None]:
    layers = [layer for layer in module.modules() if isinstance(layer, _BatchNorm)]
    before = [layer.momentum for layer in layers]
    for layer in layers:
        layer.momentum = 0.0
    try:
        yield
    finally:
        for layer, momentum in zip(layers, before, strict=True):
            layer.momentum = momentum
