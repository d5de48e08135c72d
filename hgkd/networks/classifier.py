"""A timm network with its classifier, started from a distilled backbone: what is fine-tuned, and what fine-tuning learns from.

A backbone is a CNN student's checkpoint or export (:mod:`hgkd.export`), a ViT student's or MAE's file, a fine-tuned classifier
of this project, or a file of others; it is loaded strictly, and only the classifier may start at random.

Two heads as G2SD's specific distillation has them (arXiv 2302.14771, after DeiT, arXiv 2012.12877): timm's
``deit_*_distilled_*`` have a distillation token and its head; every other network gets a second linear head on its pooled
feature. Both heads' logits are averaged when the network is used.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import timm
import torch
from timm.models.deit import VisionTransformerDistilled
from torch import Tensor, nn

from hgkd.data.transforms import as_size
from hgkd.errors import InvalidValueError, WeightsError, first_line
from hgkd.networks.backbones import read_source
from hgkd.networks.encoder import STEMS, evaluating, use_cifar_stem
from hgkd.networks.libraries import home_of, library_of
from hgkd.networks.mae import read_mae
from hgkd.networks.positions import positions_for
from hgkd.networks.vit import check_timm_name, classifier_heads, head_names, is_vit
from hgkd.pixels import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    PixelNormalisation,
    channels_of,
    check_in_chans,
    check_normalize,
    check_pixels,
    note_pixels,
    pixel_statistics,
    require_statistics,
)
from hgkd.weights.identify import Kind, WeightFile, identify
from hgkd.weights.loading import load_strict
from hgkd.weights.run_file import ClassifierSpec, EncoderSpec, network_state
from hgkd.weights.vit_names import in_dialect, to_timm_names

_PREFIX = "classifier."
_Pixels = tuple[Sequence[float], Sequence[float]]


@dataclass
class ClassifierOutput:
    """Result of ``classifier(images)``.

    Attributes:
        logits: of the class head, (B, K).
        distilled: of the second head, (B, K); ``logits`` themselves when there is one head only.
        feature: the last feature map (B, C, h, w), before pooling; of a ViT its patch tokens. Of a network that gives tokens
            on no grid (timm's Hiera, say) what it gives.
    """

    logits: Tensor
    distilled: Tensor
    feature: Tensor

    @property
    def prediction(self) -> Tensor:
        """The logits (B, K) that count when the network is used, which are the heads' mean."""
        return self.logits if self.distilled is self.logits else (self.logits + self.distilled) / 2


class ImageClassifier(PixelNormalisation):
    """A timm CNN or ViT with one or two linear heads.

    Args:
        name: timm's name, e.g. 'resnet50', 'vit_small_patch16_224', 'deit_small_distilled_patch16_224'.
        num_classes: K, 1 or more.
        image_size: side in pixels, or (H, W); only a ViT depends on it.
        stem: 'cifar' for a ResNet with a 3x3 stride-1 stem.
        two_heads: see the module's header.
        drop_path: rate of stochastic depth, in [0, 1).
        head_std: std of the class head's initial weights, with bias 0 (MAE fine-tunes from 2e-5); None: timm's.
        backbone: file or export that the network starts from; also a work folder, whose last checkpoint is taken.
            None: timm's random weights.
        normalize: (mean, std) of the pixels in [0, 1], RGB; None: the file's, else what timm notes for the name.
        kwargs: further arguments of ``timm.create_model``, e.g. ``global_pool='avg'``.

    Attributes:
        network: timm's.
        distillation_head: the second head where timm's network has none, else None.
        spec: what rebuilds all this.

    Raises:
        ValueError: an unknown name or stem, or options that do not fit together.
        FileNotFoundError, WeightsError: the backbone is absent, damaged, or of another architecture.
    """

    def __init__(
        self,
        name: str,
        num_classes: int,
        image_size: int | Sequence[int] = 224,
        stem: str = "default",
        two_heads: bool = False,
        drop_path: float = 0.0,
        head_std: float | None = None,
        backbone: str | os.PathLike[str] | None = None,
        normalize: Sequence[Sequence[float]] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__()
        _refuse_library(name, f"{name} cannot be a classifier here")
        check_timm_name("classifier", name)
        if stem not in STEMS:
            raise InvalidValueError("stem-unknown", f"stem must be one of {', '.join(map(repr, STEMS))}, got {stem!r}")
        channels = check_in_chans(kwargs.get("in_chans", 3), f"in_chans of {name!r}")
        if num_classes < 1:
            raise InvalidValueError(
                "classes-not-positive",
                f"num_classes must be 1 or more, got {num_classes}; set it to the number of class folders",
            )
        if not 0.0 <= drop_path < 1.0:
            raise InvalidValueError("drop-path-out-of-range", f"drop_path must be a rate in [0, 1), got {drop_path}")
        size = as_size(image_size)
        kwargs = {"drop_path_rate": drop_path, **kwargs} if drop_path else dict(kwargs)
        sized: dict[str, Any] = {"img_size": size} if is_vit(name) else {}
        try:
            network: Any = timm.create_model(name, pretrained=False, num_classes=num_classes, **sized, **kwargs)
        except TypeError as error:  # timm hands on what a network does not know
            unknown = re.search(r"unexpected keyword argument '(\w+)'", str(error))
            if unknown is None:
                raise
            option = "drop_path" if unknown[1] == "drop_path_rate" else unknown[1]
            remedy = "set model.classifier.drop_path=0" if option == "drop_path" else "leave it out"
            raise InvalidValueError(
                "timm-option-refused", f"timm's {name} takes no {option}={kwargs.get(unknown[1])!r}; {remedy}"
            ) from error
        if channels != 3:
            note_pixels(network, channels)
        if stem == "cifar":
            use_cifar_stem(network, name)
        self.network = network
        self.is_vit = bool(sized)
        self.has_token = isinstance(network, VisionTransformerDistilled)
        if self.has_token:
            network.set_distilled_training(True)
            two_heads = True
        self.distillation_head = deepcopy(self._heads()[0]) if two_heads and not self.has_token else None
        if self.distillation_head is not None:
            self.distillation_head.reset_parameters()
        if head_std is not None:
            class_head = self._heads()[0]  # the second one keeps timm's, as in G2SD's released code
            nn.init.trunc_normal_(class_head.weight, std=head_std)
            nn.init.zeros_(class_head.bias)
        pixels = None if backbone is None else self._start_from(_existing(backbone), stem)
        if normalize is not None:
            pixels = check_normalize(normalize, f"normalize of {name!r}", channels)
        require_statistics(channels, pixels, "model.classifier.normalize")
        mean, std = pixels or pixel_statistics(network)
        self.spec = ClassifierSpec(name, num_classes, size, stem, two_heads, kwargs)
        self.set_pixels(mean, std)

    @classmethod
    def from_spec(cls, spec: ClassifierSpec, image_size: int | Sequence[int] | None = None) -> ImageClassifier:
        """The classifier that a checkpoint describes, with random weights."""
        return cls(
            spec.name,
            spec.num_classes,
            image_size or spec.image_size,
            spec.stem,
            spec.two_heads,
            normalize=(spec.mean, spec.std),
            **spec.kwargs,
        )

    def set_pixels(self, mean: Sequence[float], std: Sequence[float]) -> None:
        """Normalise with these statistics of the pixels in [0, 1], RGB, from now on."""
        mean, std = check_pixels(mean, std, f"the pixels of {self.spec.name!r}", channels_of(self.network))
        self.spec = replace(self.spec, mean=mean, std=std)
        super().set_pixels(mean, std)

    def forward(self, inputs: Tensor) -> ClassifierOutput:
        """Logits and the last feature map of normalised images (B, 3, H, W)."""
        network = self.network
        features = network.forward_features(inputs)
        return ClassifierOutput(*self._heads_logits(features), self._map(features, inputs))

    def _heads_logits(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """Logits of both heads, the same twice where there is one."""
        network = self.network
        if self.has_token:
            return network.forward_head(features) if self.training else _both_tokens(network, features)
        pooled = network.forward_head(features, pre_logits=True)
        logits = self._heads()[0](pooled)
        return logits, logits if self.distillation_head is None else self.distillation_head(pooled)

    def class_activation(self, inputs: Tensor, classes: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Grad-CAM (arXiv 1610.02391, eq. 1 and 2) on the last feature map: which places speak for a class.

        With mean pooling and one linear layer it is CAM (arXiv 1512.04150) but for a factor.

        Args:
            inputs: normalised images (B, 3, H, W).
            classes: index of a class for each image (B,); None: the network's answers.

        Returns:
            Maps (B, h, w), 0 or more, and the classes.

        Raises:
            ValueError: a ViT that answers from its class token alone, of which the last patch tokens know nothing.
        """
        network = self.network
        with torch.no_grad():
            features = network.forward_features(inputs)
        with torch.enable_grad():
            features.requires_grad_()
            logits = ClassifierOutput(*self._heads_logits(features), features).prediction
            classes = logits.argmax(1) if classes is None else classes
            (gradient,) = torch.autograd.grad(logits.gather(1, classes[:, None]).sum(), features)
        gradient = self._map(gradient, inputs)
        if not gradient.any():
            raise InvalidValueError(
                "no-class-activation",
                f"{self.spec.name} answers from its class token alone, so its patches have no class activation; show its "
                "attention instead, or fine-tune with model.classifier.global_pool=avg",
            )
        weights = gradient.mean(dim=(2, 3), keepdim=True)
        return (weights * self._map(features.detach(), inputs)).sum(dim=1).relu(), classes

    def predict(self, inputs: Tensor) -> Tensor:
        """The ``prediction`` to normalised images (B, 3, H, W): logits (B, K)."""
        out: ClassifierOutput = self(inputs)
        return out.prediction

    def feature_shape(self, image_size: int | Sequence[int]) -> tuple[int, int, int]:
        """Channels and grid (C, h, w) of the last feature map, by a dry run.

        Raises:
            ValueError: the network takes no images of that size.
        """
        height, width = as_size(image_size)
        try:
            with evaluating(self), torch.no_grad():
                feature = self(torch.zeros(1, self.in_chans, height, width, device=self.mean.device)).feature
        except (AssertionError, RuntimeError) as error:
            raise InvalidValueError(
                "image-size-refused",
                f"{self.spec.name} takes no images of {height} x {width} px ({first_line(error)}); set another image_size",
            ) from error
        return cast("tuple[int, int, int]", tuple(feature.shape[1:]))

    def _heads(self) -> tuple[Any, ...]:
        return classifier_heads(self.network)

    def head_names(self) -> tuple[str, ...]:
        """Beginnings of the network's entries that belong to its classifier."""
        return head_names(self.network)

    def _map(self, features: Tensor, inputs: Tensor) -> Tensor:
        network = self.network
        if not self.is_vit:  # timm's Swin and its kin keep channels last, and say so
            return features.permute(0, 3, 1, 2) if getattr(network, "output_fmt", "") == "NHWC" else features
        patch = network.patch_embed.patch_size
        grid = (inputs.shape[2] // patch[0], inputs.shape[3] // patch[1])
        return features[:, network.num_prefix_tokens :].transpose(1, 2).unflatten(2, grid)

    # --- starting from a file ---------------------------------------------------------------------------------------

    def _start_from(self, file: WeightFile, stem: str) -> _Pixels | None:
        """Load the backbone of a file; returns the pixel statistics that it notes."""
        path = file.path
        if file.kind is Kind.CLASSIFIER:
            spec = cast(ClassifierSpec, file.spec)
            self._refuse_other(path, spec.name, spec.stem, stem)
            state = network_state(file.content, str(path))
            self._load(self.fit_positions(state, str(path), self._grid(spec.image_size)) if self.is_vit else state, str(path))
            return spec.mean, spec.std
        if self.is_vit:
            weights, pixels, heads, grid = _vit_weights(file)
            own_heads = cast(Any, self.network).blocks[0].attn.num_heads
            if heads is not None and heads != own_heads:  # which no shape tells
                raise WeightsError(
                    "attention-heads-differ",
                    f"{path} has {heads} attention heads, the network to be trained {own_heads}; set student to it",
                )
            weights = in_dialect(self.network, weights, str(path))
            self._load(self.fit_positions(weights, str(path), grid), str(path))
            return pixels
        described = path.is_dir() or "hgkd" in file.meta
        own = str(self.network.pretrained_cfg["architecture"])
        source = read_source(file, None if described else EncoderSpec(own, stem), allow=() if described else ("head.norm.",))
        self._refuse_other(path, source.spec.name, source.spec.stem, stem)
        self._load(source.network.state_dict(), str(path))
        return pixel_statistics(source.network) if described else None

    def _refuse_other(self, path: Path, name: str, file_stem: str, stem: str) -> None:
        own = str(self.network.pretrained_cfg["architecture"])
        _refuse_library(name, f"{path} holds a {name!r}")
        if name.partition(".")[0] != own:
            raise WeightsError(
                "network-differs",
                f"{path} holds a {name!r}, but a {own!r} is to be trained; set student={name}, or another file",
            )
        if file_stem != stem:
            raise WeightsError(
                "stem-differs", f"{path} holds a {name!r} with stem {file_stem!r}; set model.classifier.stem={file_stem}"
            )

    def _load(self, state: Mapping[str, Tensor], source: str) -> None:
        heads = self.head_names()
        # a network that pools before its last norm calls it otherwise, and starts it anew (MAE's fine-tuning does)
        missing = (*heads, *(("fc_norm.", "dist_token") if self.is_vit else ()))
        unexpected = (*heads, *(("norm.", "fc_norm.", "mask_token", "decoder_", "dist_token") if self.is_vit else ()))
        own = self.network.state_dict()
        inside = {key: value for key, value in state.items() if not key.startswith(heads)}
        try:
            load_strict(self.network, inside, source=source, ignore_missing=missing, ignore_unexpected=unexpected)
        except WeightsError as error:
            name = self.network.pretrained_cfg["architecture"]
            raise WeightsError(
                "weights-do-not-fit",
                f"{source} does not fit a {name!r} ({len(inside)} entries in the file, {len(own)} in the network); is it the "
                f"backbone of another architecture? {error}",
            ) from error

    def _grid(self, image_size: tuple[int, int]) -> tuple[int, int]:
        """Patches (rows, columns) of an image, of this ViT's patch size."""
        rows, columns = self.network.patch_embed.dynamic_feat_size(image_size)
        return rows, columns

    def fit_positions(
        self, weights: Mapping[str, Tensor], source: str, in_grid: tuple[int, int] | None = None
    ) -> dict[str, Tensor]:
        """A file's position embedding on this network's grid, with a place for the distillation token.

        Args:
            in_grid: patches (rows, columns) that the file's positions are for; None: some square, as in the files of others.
        """
        network = self.network
        found = weights.get("pos_embed")
        if found is None or network.pos_embed is None:
            return dict(weights)
        prefix = 0 if network.no_embed_class else network.num_prefix_tokens
        grid = tuple(network.patch_embed.grid_size)
        side = int(found.shape[1] ** 0.5)  # patches among positions that may include one or two other tokens
        in_grid = in_grid or (side, side)
        in_file = found.shape[1] - in_grid[0] * in_grid[1]
        positions = positions_for(grid, found.float(), in_grid, in_file, f"{source}: pos_embed")
        if prefix > in_file:  # MAE's class token has no position either: zeros
            extra = positions.new_zeros(1, prefix - in_file, positions.shape[2])
            positions = torch.cat([positions[:, :in_file], extra, positions[:, in_file:]], 1)
        return {**weights, "pos_embed": positions}


def _refuse_library(name: str, told: str) -> None:
    """Raise ValueError for a network that is a student, but not timm's."""
    if library_of(name) is not None:
        raise WeightsError(
            "finetuning-of-timm", f"{told}, and hgkd fine-tunes networks of timm only; {home_of(name)}, and fine-tune it there"
        )


def load_classifier(path: str | os.PathLike[str], image_size: int | Sequence[int] | None = None) -> ImageClassifier:
    """The classifier of a checkpoint that fine-tuning wrote (or of a work folder: its last), heads included, in eval mode.

    Args:
        image_size: for which a ViT's positions are refitted; None: that of its training.

    Raises:
        FileNotFoundError, WeightsError: absent, damaged, or no fine-tuned classifier.
    """
    file = identify(path)
    path, content = file.path, file.content
    if file.kind is not Kind.CLASSIFIER:
        raise WeightsError(
            "checkpoint-not-of-finetuning",
            f"{path} is no checkpoint of fine-tuning ({file.about}); for a file of others name its network",
        )
    spec = cast(ClassifierSpec, file.spec)
    model = ImageClassifier.from_spec(spec, image_size)
    state = {k.removeprefix(_PREFIX): v for k, v in content["state_dict"].items() if k.startswith(_PREFIX)}
    if model.is_vit:
        inside = {k.removeprefix("network."): v for k, v in state.items() if k.startswith("network.")}
        fitted = model.fit_positions(inside, str(path), model._grid(spec.image_size))  # some have rotary positions alone
        state |= {f"network.{name}": value for name, value in fitted.items()}
    load_strict(model, state, source=str(path))
    model.spec = replace(spec, image_size=model.spec.image_size)
    return model.eval()


def _both_tokens(network: Any, features: Tensor) -> tuple[Tensor, Tensor]:
    """Logits of both tokens in eval mode, where timm's own head gives their mean."""
    return network.head(features[:, 0]), network.head_dist(features[:, 1])


def _existing(backbone: str | os.PathLike[str]) -> WeightFile:
    """What a file or folder is that a network starts from; of one that does not exist the error says what is expected."""
    path = Path(backbone).expanduser()
    if not path.exists():
        read_source(path)
    return identify(backbone)


def _vit_weights(file: WeightFile) -> tuple[dict[str, Tensor], _Pixels | None, int | None, tuple[int, int] | None]:
    """Weights of a ViT's file in timm's names, and what it notes: pixel statistics, attention heads, grid of its positions."""
    path = file.path
    if file.kind is Kind.EXPORT:
        raise WeightsError(
            "export-where-vit-needed", f"{path} is an export, which holds a CNN; give the ViT student's checkpoint"
        )
    if file.kind is Kind.STUDENT:
        name = cast(EncoderSpec, file.spec).name
        raise WeightsError("network-differs", f"{path} holds a {name!r}, but a ViT is to be trained; set student to it")
    if file.kind in (Kind.VIT_STUDENT, Kind.MAE_RUN, Kind.MAE):
        arch, weights, pixels = read_mae(file)
        return weights, (pixels.get("mean", IMAGENET_MEAN), pixels.get("std", IMAGENET_STD)), arch.num_heads, arch.grid
    return to_timm_names(file.tensors(), str(path))[1], None, None, None
