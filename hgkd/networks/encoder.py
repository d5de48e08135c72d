"""Students' encoders: any convolutional network of timm, of another library or of the user, its levels found by a dry run.

timm (huggingface/pytorch-image-models, Apache-2.0) is the model zoo; the network keeps timm's own module and
parameter names, so that its weights leave as they are. The CIFAR stem (3x3, stride 1, no pooling) is that of the
ResNet paper's CIFAR experiments (arXiv 1512.03385, section 4.2).
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import timm
import torch
from timm.models.resnet import ResNet
from torch import Tensor, nn

from hgkd.errors import InvalidValueError, code_of
from hgkd.networks.libraries import HOW_TO_NAME, build_library_network, library_of
from hgkd.networks.taps import Tapped
from hgkd.networks.vit import check_timm_name
from hgkd.pixels import channels_of, check_in_chans, note_pixels
from hgkd.weights.importing import import_weights

STEMS = ("default", "cifar")
_OWN_ARGUMENTS = ("num_classes", "global_pool", "features_only", "pretrained", "checkpoint_path")
_DRY_SIZE = 128


@dataclass(frozen=True)
class Level:
    """One level of an encoder: index among ``forward_intermediates``' features, image pixels per place, channels."""

    index: int
    stride: int
    channels: int


def build_encoder(
    name: str,
    *,
    stem: str = "default",
    checkpoint: str | os.PathLike[str] | None = None,
    pretrained: bool = False,
    **timm_kwargs: Any,
) -> nn.Module:
    """A CNN without classifier and pooling; ``model.forward_features(x)`` gives its last feature map (B, C, h, w).

    Args:
        name: timm's name, e.g. 'resnet50', 'convnext_tiny', 'resnet50.a1_in1k'; or one of :mod:`hgkd.networks.libraries`, e.g.
            'mmdet.CSPNeXt', 'torchvision.resnet18'.
        stem: 'cifar' replaces a ResNet's stem by a 3x3 stride-1 convolution without pooling: total stride 8.
        checkpoint: local weight file to start from, in timm's naming or another of :mod:`hgkd.weights.cnn_names` (SparK,
            ConvNeXt, mmpretrain, torchvision, transformers), or a folder of ``hgkd export --to timm``; loaded strictly;
            only what an encoder has no place for, a classifier say, is left out.
        pretrained: ask timm for its pretrained weights (a download, unless timm has them already).
        timm_kwargs: passed to ``timm.create_model``, e.g. ``drop_path_rate=0.1``, or to the other library's class; there
            ``taps`` names the submodules whose outputs are the levels.

    Raises:
        ValueError: unknown name or stem, a network that is no hierarchical CNN, or options that exclude each other.
        WeightsError: the checkpoint does not fit.
    """
    if library_of(name) is not None:
        return _build_foreign(name, stem, checkpoint, pretrained, timm_kwargs)
    try:
        check_timm_name("encoder", name)
    except ValueError as error:
        if timm.is_model(name.partition(".")[0]) or code_of(error) != "timm-name-unknown":
            raise
        raise InvalidValueError("timm-name-unknown", f"{error} {HOW_TO_NAME}") from error
    if stem not in STEMS:
        raise InvalidValueError("stem-unknown", f"stem must be one of {', '.join(map(repr, STEMS))}, got {stem!r}")
    taken = [key for key in _OWN_ARGUMENTS if key in timm_kwargs]
    if taken:
        raise InvalidValueError(
            "timm-option-reserved", f"{', '.join(taken)} cannot be passed on to timm for an encoder: hgkd sets it itself"
        )
    channels = check_in_chans(timm_kwargs.get("in_chans", 3), f"in_chans of encoder {name!r}")
    if pretrained and checkpoint is not None:
        raise InvalidValueError(
            "weights-named-twice", "give either pretrained=True or a checkpoint, not both: the second would overwrite the first"
        )
    if pretrained and stem != "default":
        raise InvalidValueError(
            "no-pretrained-for-stem",
            f"pretrained=True has no weights for stem={stem!r}; use stem='default' or pretrained=False",
        )
    try:
        model = timm.create_model(name, pretrained=pretrained, num_classes=0, global_pool="", **timm_kwargs)
    except AssertionError as error:  # e.g. inception_next: "Cannot disable pooling"
        raise InvalidValueError(
            "encoder-not-buildable", f"timm cannot build {name!r} without its classifier and pooling: {error}"
        ) from error
    if channels != 3:
        note_pixels(model, channels)
    if stem == "cifar":
        use_cifar_stem(model, name)
    encoder_levels(model)  # refuses what is no CNN
    if checkpoint is not None:
        # a norm after pooling, which no level of a student sees; DINOv3's and EUPE's ConvNeXt files hold it twice
        import_weights(model, checkpoint, allow=("head.norm.", "norms.", "projectors."))
    return model


def _build_foreign(
    name: str, stem: str, checkpoint: str | os.PathLike[str] | None, pretrained: bool, kwargs: dict[str, Any]
) -> nn.Module:
    """The same of a network that is not timm's."""
    if stem != "default":
        raise InvalidValueError("stem-of-timm", f"stem={stem!r} is for timm's ResNets, not for {name!r}; use stem='default'")
    if pretrained:
        raise InvalidValueError(
            "pretrained-of-timm",
            f"pretrained=True asks timm, which has no {name!r}; give a weight file: encoder_checkpoint=FILE",
        )
    model = build_library_network(name, **kwargs)
    encoder_levels(model)  # refuses what is no CNN
    if checkpoint is not None:
        import_weights(model, checkpoint)
    return model


def encoder_levels(model: nn.Module, image_size: int | tuple[int, int] = _DRY_SIZE) -> list[Level]:
    """The levels of an encoder, finest first, by running it once on an image of zeros.

    One level per distinct stride, its deepest feature. Strides below 4 (stems) are left out, except in networks whose
    total stride is 8 or less.

    Raises:
        ValueError: the network is no hierarchical CNN that works at any image size.
    """
    size = (image_size, image_size) if isinstance(image_size, int) else image_size
    kind = str(model.pretrained_cfg["architecture"]) if isinstance(model, Tapped) else type(model).__name__
    advice = "a student must be a hierarchical CNN, of timm e.g. 'resnet50' or 'convnext_tiny'"
    if not hasattr(model, "forward_intermediates"):
        raise InvalidValueError(
            "encoder-without-levels", f"{kind} has no forward_intermediates to read features from; {advice}"
        )
    try:
        with evaluating(model), torch.no_grad():
            features = _intermediates(model, torch.zeros(1, channels_of(model), *size), None)
    except (AssertionError, RuntimeError, ValueError, TypeError) as error:
        raise InvalidValueError(
            "encoder-does-not-run", f"{kind} does not run on a {size[0]} x {size[1]} image ({error}); {advice}"
        ) from error
    levels: dict[int, Level] = {}
    for index, feature in enumerate(features):
        stride = size[0] // feature.shape[2] if feature.dim() == 4 and feature.shape[2] else 0
        fits = stride > 0 and (feature.shape[2] * stride, feature.shape[3] * stride) == size
        if not fits or stride & (stride - 1):
            raise InvalidValueError(
                "encoder-feature-shape",
                f"{kind} gives a feature of shape {tuple(feature.shape)} for a {size[0]} x {size[1]} image, "
                f"which is no (B, C, H/s, W/s) with s a power of two; {advice}",
            )
        levels[stride] = Level(index, stride, feature.shape[1])
    if len(levels) < 2 or list(levels) != sorted(levels):
        raise InvalidValueError(
            "encoder-not-hierarchical",
            f"{kind} is not hierarchical: its features have the strides {', '.join(map(str, levels))} "
            f"(a Vision Transformer has one only); {advice}",
        )
    total = max(levels)
    return [level for level in levels.values() if level.stride >= 4 or total <= 8]


def encoder_features(model: nn.Module, images: Tensor, levels: Iterable[Level]) -> list[Tensor]:
    """The features of the given levels, finest first; ``images`` dense (normalised) or packed by ``model.pack``."""
    return _intermediates(model, images, [level.index for level in levels])


def freeze_unused(model: nn.Module, levels: Iterable[Level]) -> list[str]:
    """Stop training of parameters that no level depends on (a head's norm, say), and return their names.

    They stay in ``state_dict``; without this they would stop distributed training, which waits for every gradient.
    """
    named = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    with evaluating(model), torch.enable_grad():
        features = encoder_features(model, torch.zeros(1, channels_of(model), _DRY_SIZE, _DRY_SIZE), levels)
        total = torch.stack([feature.sum() for feature in features]).sum()
        gradients = torch.autograd.grad(total, [parameter for _, parameter in named], allow_unused=True)
    unused = [(name, parameter) for (name, parameter), grad in zip(named, gradients, strict=True) if grad is None]
    for _, parameter in unused:
        parameter.requires_grad_(False)
    return [name for name, _ in unused]


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """``model`` in eval mode, every submodule's own mode restored afterwards."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training


def _intermediates(model: nn.Module, images: Tensor, indices: list[int] | None) -> list[Tensor]:
    features = cast(Any, model).forward_intermediates(
        images, indices=indices, stop_early=indices is not None, intermediates_only=True
    )
    return list(features)


def use_cifar_stem(model: nn.Module, name: str) -> None:
    if not isinstance(model, ResNet):
        raise InvalidValueError(
            "cifar-stem-without-resnet", f"stem='cifar' is for timm's ResNets, not for {name!r} ({type(model).__name__})"
        )
    replaced = next(layer for layer in cast(nn.Module, model.conv1).modules() if isinstance(layer, nn.Conv2d))
    stem = nn.Conv2d(replaced.in_channels, cast(nn.BatchNorm2d, model.bn1).num_features, 3, padding=1, bias=False)
    nn.init.kaiming_normal_(stem.weight, mode="fan_out", nonlinearity="relu")  # as timm initialises the others
    setattr(model, "conv1", stem)  # noqa: B010 (timm annotates both more narrowly)
    setattr(model, "maxpool", nn.Identity())  # noqa: B010
