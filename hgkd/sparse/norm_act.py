"""Normalisations that take activation and addition along, in training on a GPU with Triton.

timm's ResNet and RegNet blocks call normalisation, ReLU and addition one after the other, some ten passes over a feature map,
and its layer of convolution, normalisation and ReLU, of which many families are built, some seven. Where
:mod:`hgkd.sparse.fused_norm` serves, they are four; everywhere else, the CPU included, a layer's own forward runs.
"""

from __future__ import annotations

import importlib.util
import warnings
from types import ModuleType
from typing import Any, cast

import torch
import torch.nn.functional as F
from timm.layers import BatchNormAct2d, ConvNormAct
from timm.models import regnet
from timm.models.resnet import BasicBlock, Bottleneck
from torch import Tensor, nn

from hgkd.sparse.choice import kernels_mode
from hgkd.sparse.convert import layer_rule
from hgkd.sparse.hardware import is_capturing
from hgkd.sparse.kernels import rows_of
from hgkd.sparse.packed import PackedTensor
from hgkd.sparse.tensor import SparseTensor

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# against fp32, norm over norm: rounding of the result to the type, with room
LIMITS = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}


def _fused(x: SparseTensor) -> ModuleType | None:
    """The module of Triton kernels where they serve a feature map, else None."""
    on_gpu = isinstance(x, PackedTensor) and x.is_cuda and x.dtype in _DTYPES and x.channel_dim == 1 and x.pending is None
    if not on_gpu or importlib.util.find_spec("triton") is None or kernels_mode() == "torch":
        return None
    from hgkd.sparse import fused_norm  # imports Triton

    return fused_norm if agrees(x.device, x.dtype) else None


_agreed: dict[tuple[torch.device, torch.dtype], bool] = {}


def agrees(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether the kernels give torch's numbers on a device; checked when first asked, not while a CUDA graph is recorded."""
    if (device, dtype) not in _agreed:
        if is_capturing(device):
            return False
        try:
            error = _error(device, dtype)
            _agreed[device, dtype], found = error <= LIMITS[dtype], f"differ by {error:.2g} from torch's"
        except Exception as failure:  # whatever goes wrong in a compiler, torch's kernels serve
            _agreed[device, dtype], found = False, f"do not run ({failure})"
        if not _agreed[device, dtype]:
            warnings.warn(f"the fused norms in {dtype} {found} on {device}; torch's kernels are used", stacklevel=2)
    return _agreed[device, dtype]


@torch.enable_grad()
def _error(device: torch.device, dtype: torch.dtype) -> float:
    """Largest difference from torch in fp32, norm over norm, of the values and of all gradients of a small case."""
    from hgkd.sparse.fused_norm import NormAct

    generator = torch.Generator().manual_seed(0)  # the run's own random numbers stay what they were
    shapes = ((777, 72), (72,), (72,), (777, 72))
    given = [torch.randn(shape, generator=generator).to(device) for shape in shapes]
    probe = torch.randn(777, 72, generator=generator).to(device)
    given[0], given[3], probe = (value.to(dtype) for value in (given[0] + 3.0, given[3], probe))
    ours = [value.clone().requires_grad_() for value in given]
    theirs = [value.float().requires_grad_() for value in given]
    found = [NormAct.apply(*ours, True, 1e-5)[0]]  # type: ignore[no-untyped-call]
    rows, weight, bias, residual = theirs
    expected = [F.relu(F.batch_norm(rows, None, None, weight, bias, training=True) + residual)]
    # where a rounded result is 0 and the other is not, the gradients differ by all of it
    probe = probe * ((found[0] > 0) == (expected[0] > 0)).to(dtype)
    found += torch.autograd.grad(found[0], ours, probe)
    expected += torch.autograd.grad(expected[0], theirs, probe.float())
    pairs = [(a.detach().float(), b.detach()) for a, b in zip(found, expected, strict=True)]
    return max(float((a - b).norm() / b.norm()) for a, b in pairs)


def _is_plain(norm: object, act: object) -> bool:
    """Whether a normalisation and an activation are those that the kernels compute."""
    if type(norm) is BatchNormAct2d:
        inside = (norm.drop,) if norm.act is act else (norm.drop, norm.act)
        fits = _is_identity(*inside)
    else:
        fits = type(norm) is nn.BatchNorm2d  # of subclasses nothing is known: some are synchronised between processes
    if not fits or type(act) is not nn.ReLU:
        return False
    norm = cast(nn.BatchNorm2d, norm)
    return norm.training and norm.affine and norm.track_running_stats and norm.momentum is not None


def norm_act(kernels: Any, norm: nn.BatchNorm2d, x: PackedTensor, residual: SparseTensor | None = None) -> PackedTensor:
    """``relu(norm(x) + residual)`` by the kernels; updates the running statistics as ``norm`` would."""
    batch, channels, height, width = x.plain.shape
    count = batch * height * width
    added = None if residual is None else rows_of(residual.plain)
    out, mean, variance = kernels.NormAct.apply(rows_of(x.plain), norm.weight, norm.bias, added, True, norm.eps)
    with torch.no_grad():
        momentum = cast(float, norm.momentum)
        unbiased = variance * (count / (count - 1))
        for running, new in ((norm.running_mean, mean), (norm.running_var, unbiased)):
            cast(Tensor, running).lerp_(new.to(cast(Tensor, running).dtype), momentum)
        cast(Tensor, norm.num_batches_tracked).add_(1)
    return cast(PackedTensor, x.like(out.view(batch, height, width, channels).permute(0, 3, 1, 2)))


def _is_identity(*layers: object) -> bool:
    return all(isinstance(layer, nn.Identity) for layer in layers)


def _kernels(x: SparseTensor, *pairs: tuple[object, object]) -> ModuleType | None:
    """The kernels where they serve ordinary norms and ReLUs of two rows or more."""
    if not all(_is_plain(norm, act) for norm, act in pairs):
        return None
    few = isinstance(x, PackedTensor) and x.plain.shape[0] < 2  # torch refuses one value a channel, in its own words
    return None if few else _fused(x)


def _kernels_for(block: Any, x: SparseTensor, *pairs: tuple[object, object]) -> ModuleType | None:
    """The kernels where they serve all of a ResNet block, with nothing between its norms and ReLUs."""
    simple = block.se is None and block.drop_path is None and _is_identity(block.drop_block, block.aa)
    return _kernels(x, *pairs) if simple else None


@layer_rule(ConvNormAct)
def conv_norm_act(layer: Any, x: SparseTensor) -> SparseTensor:
    """timm's layer of convolution, normalisation and activation."""
    kernels = _kernels(x, (layer.bn, getattr(layer.bn, "act", None))) if layer.aa is None else None
    if kernels is None:
        return cast(SparseTensor, ConvNormAct.forward(layer, x))
    return norm_act(kernels, layer.bn, layer.conv(x))


@layer_rule(regnet.Bottleneck)
def regnet_bottleneck(block: Any, x: SparseTensor) -> SparseTensor:
    """RegNet's block (arXiv 2003.13678), whose last normalisation has no activation of its own; the others are layers above."""
    last = block.conv3
    simple = block.downsample is not None and last.aa is None and _is_identity(block.drop_path)
    kernels = _kernels(x, (last.bn, block.act3)) if simple else None
    if kernels is None:
        return cast(SparseTensor, regnet.Bottleneck.forward(block, x))
    return norm_act(kernels, last.bn, last.conv(block.se(block.conv2(block.conv1(x)))), block.downsample(x))


@layer_rule(BasicBlock)
def basic_block(block: Any, x: SparseTensor) -> SparseTensor:
    """timm's block of two convolutions (arXiv 1512.03385)."""
    kernels = _kernels_for(block, x, (block.bn1, block.act1), (block.bn2, block.act2))
    if kernels is None:
        return BasicBlock.forward(block, x)  # type: ignore[return-value]
    out = norm_act(kernels, block.bn1, block.conv1(x))
    shortcut = x if block.downsample is None else block.downsample(x)
    return norm_act(kernels, block.bn2, block.conv2(out), shortcut)


@layer_rule(Bottleneck)
def bottleneck(block: Any, x: SparseTensor) -> SparseTensor:
    """timm's block of three convolutions (arXiv 1512.03385)."""
    pairs = ((block.bn1, block.act1), (block.bn2, block.act2), (block.bn3, block.act3))
    kernels = _kernels_for(block, x, *pairs)
    if kernels is None:
        return Bottleneck.forward(block, x)  # type: ignore[return-value]
    out = norm_act(kernels, block.bn1, block.conv1(x))
    out = norm_act(kernels, block.bn2, block.conv2(out))
    shortcut = x if block.downsample is None else block.downsample(x)
    return norm_act(kernels, block.bn3, block.conv3(out), shortcut)
