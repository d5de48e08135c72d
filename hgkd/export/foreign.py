"""What the targets of networks of other libraries share: all levels of a network, and norms that behave alike."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from hgkd.export.job import ExportError, Job
from hgkd.networks.taps import Tapped, maps_of, read_taps


def level_reader(job: Job, network: nn.Module) -> Callable[[Tensor], Tensor]:
    """Images in [0, 1] -> all levels of a network, flattened (B, N): the source, or one of its own library's."""
    taps = job.network.taps if isinstance(job.network, Tapped) else ()

    def read(images: Tensor) -> Tensor:
        inputs = job.normalise(images)
        # a library's network is asked as its own users ask it, not by what hgkd adds
        maps = read_taps(network, inputs, taps) if taps else maps_of(network(inputs))
        return torch.cat([level.flatten(1) for level in maps], 1)

    return read


def norm_settings(network: nn.Module) -> dict[str, tuple[float, float | None]]:
    """Name of a batch normalisation -> its eps and momentum, which no weight file holds."""
    return {name: (layer.eps, layer.momentum) for name, layer in network.named_modules() if isinstance(layer, _BatchNorm)}


def same_norms(source: nn.Module, again: nn.Module) -> None:
    """Check that two networks' batch normalisations have the same eps and momentum.

    Raises:
        ExportError: one differs.
    """
    before, after = norm_settings(source), norm_settings(again)
    for name, settings in before.items():
        if after.get(name) != settings:
            raise ExportError(
                "norm-settings-differ",
                f"the norm {name} has eps and momentum {settings} in the source and {after.get(name)} in what was read back; "
                "give norm_cfg of the student's encoder_kwargs in full",
            )
