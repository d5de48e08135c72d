"""Getting at a model inside its wrappers."""

from __future__ import annotations

from typing import Any

from mmengine.model import BaseModel, is_model_wrapper
from mmengine.runner import Runner
from torch import nn
from torch.utils.data import DataLoader

from hgkd.errors import InvalidValueError


def plain_model(runner: Runner) -> BaseModel:
    """The model without its data-parallel wrapper."""
    model: BaseModel = runner.model.module if is_model_wrapper(runner.model) else runner.model
    return model


def check_channels(model: nn.Module, loader: DataLoader[Any] | None, place: str) -> None:
    """Compare the channels that a model takes with those that a loader's images have, as far as both say.

    Args:
        place: of the loader in the config.

    Raises:
        ValueError: they differ.
    """
    takes = next((getattr(model, part) for part in ("student", "classifier") if hasattr(model, part)), model)
    wanted = getattr(takes, "in_chans", None)
    waiting = [getattr(loader, "dataset", None)]
    while waiting:
        dataset: Any = waiting.pop()
        waiting += list(getattr(dataset, "datasets", ()))
        if not isinstance(wanted, int) or not hasattr(dataset, "in_chans"):
            continue
        found = 3 if dataset.in_chans is None else dataset.in_chans
        if found != wanted:
            raise InvalidValueError(
                "channels-differ",
                f"the images of {place} are read with {found} channels, and the model takes {wanted}; set "
                f"in_chans={found}, which "
                f"is for data and model alike (images of {found} channels), or in_chans={wanted}",
            )
