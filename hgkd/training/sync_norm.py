"""Batch normalisation over the images of all processes, on every device, and over visible positions only.

``torch.nn.SyncBatchNorm`` refuses the CPU, and converting a sparsified network to it loses the layers' sparse forms. On
CUDA torch's own kernels serve what it takes; elsewhere the
statistics are taken in two passes (mean, then squared deviations), each summed over the processes by an all-reduce that
gradients pass through, so the result is that of one process with all images (Ioffe and Szegedy, arXiv 1502.03167).
"""

from __future__ import annotations

from typing import cast

import torch
from mmengine.dist import get_world_size
from timm.layers import BatchNormAct2d
from torch import Tensor, nn
from torch.distributed.nn.functional import all_reduce

from hgkd.errors import InvalidValueError
from hgkd.sparse import SparseTensor
from hgkd.sparse.convert import sync_batch_norm
from hgkd.sparse.masked import MaskedTensor
from hgkd.sparse.tensor import wide


def batch_norm_of_all(layer: nn.BatchNorm2d, x: Tensor) -> Tensor:
    """Normalise (B, C, H, W), dense or sparse, by the statistics of all processes, and update the running ones."""
    if _torch_serves(x.device):
        torchs = cast(nn.SyncBatchNorm, layer)
        served: Tensor = sync_batch_norm(torchs, x) if isinstance(x, SparseTensor) else nn.SyncBatchNorm.forward(torchs, x)
        return served
    data = x.plain if isinstance(x, SparseTensor) else x
    values = data.to(wide(data.dtype))
    places = x.visible_mask.to(values.dtype) if isinstance(x, MaskedTensor) else torch.ones_like(values[:, :1])
    count = _sum_over_processes(places.sum())
    mean = _sum_over_processes((values * places).sum((0, 2, 3))) / count
    deviation = (values - mean.view(1, -1, 1, 1)) * places
    variance = _sum_over_processes(deviation.square().sum((0, 2, 3))) / count
    if layer.track_running_stats:
        with torch.no_grad():
            _update_running(layer, mean, variance * count / (count - 1).clamp_min(1))
    normed: Tensor = deviation * torch.rsqrt(variance + layer.eps).view(1, -1, 1, 1)
    if layer.affine:
        normed = normed * layer.weight.view(1, -1, 1, 1) + layer.bias.view(1, -1, 1, 1) * places
    normed = normed.to(data.dtype)
    return x.like(normed) if isinstance(x, SparseTensor) else normed


def _torch_serves(device: torch.device) -> bool:
    """Whether torch's SyncBatchNorm takes a device: two all-reduces in place of six.

    The device alone decides: processes whose masks differ would wait for ever for each other's all-reduces, were they others.
    """
    return device.type == "cuda"


def _sum_over_processes(value: Tensor) -> Tensor:
    summed: Tensor = all_reduce(value.contiguous())
    return summed


def _update_running(layer: nn.BatchNorm2d, mean: Tensor, variance: Tensor) -> None:
    if layer.running_mean is None or layer.running_var is None or layer.num_batches_tracked is None:
        return
    layer.num_batches_tracked.add_(1)
    factor = 1 / float(layer.num_batches_tracked) if layer.momentum is None else layer.momentum
    layer.running_mean.lerp_(mean.to(layer.running_mean.dtype), factor)
    layer.running_var.lerp_(variance.to(layer.running_var.dtype), factor)


class SyncedBatchNorm2d(nn.BatchNorm2d):
    """``nn.BatchNorm2d`` whose training statistics are those of all processes."""

    process_group = None  # all processes; torch's SyncBatchNorm.forward reads this, and calls the next
    _check_non_zero_input_channels = nn.SyncBatchNorm._check_non_zero_input_channels

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or get_world_size() == 1:
            return super().forward(x)
        return batch_norm_of_all(self, x)


class SyncedBatchNormAct2d(BatchNormAct2d):
    """timm's normalisation with activation, likewise."""

    process_group = None
    _check_non_zero_input_channels = nn.SyncBatchNorm._check_non_zero_input_channels

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or get_world_size() == 1:
            return super().forward(x)
        normed: Tensor = self.act(self.drop(batch_norm_of_all(self, x)))
        return normed


_SYNCED: dict[type[nn.Module], type[nn.Module]] = {
    nn.BatchNorm2d: SyncedBatchNorm2d,
    BatchNormAct2d: SyncedBatchNormAct2d,
}


def sync_batch_norms(model: nn.Module) -> int:
    """Make the batch normalisations of a model take their statistics over all processes, in place; returns their number.

    Parameters, buffers and names stay.

    Raises:
        ValueError: there is none, or one of another class, which would not be synchronised.
    """
    changed = 0
    for name, module in model.named_modules():
        if type(module) in _SYNCED:
            module.__class__ = _SYNCED[type(module)]  # type: ignore[assignment]
            changed += 1
        elif isinstance(module, nn.modules.batchnorm._BatchNorm) and type(module) not in _SYNCED.values():
            raise InvalidValueError(
                "norm-not-synchronised",
                f"sync_bn knows nn.BatchNorm2d and timm's BatchNormAct2d, but {name} is a {type(module).__name__}",
            )
    if not changed:
        raise InvalidValueError("sync-bn-without-norm", "sync_bn is set, but the model has no batch normalisation; remove it")
    return changed
