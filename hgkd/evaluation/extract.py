"""Frozen features of any backbone that hgkd can name: students, exports, timm CNNs and ViTs, MAE files.

One feature an image: the mean over places of the last level of a CNN, or of the patch tokens after one block of a ViT; of other
timm models the output of their own pooling. CNNs and ViTs also show where things are: maps of every level, and attention.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import timm
import torch
import torch.nn.functional as F
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from hgkd.errors import DataError, InvalidValueError, MissingFileError, unknown_name_message
from hgkd.networks.vit import check_timm_name, is_vit, patch_attention
from hgkd.pixels import PixelNormalisation, pixel_statistics, to_unit_range
from hgkd.structures import TeacherNeeds
from hgkd.weights.identify import MASKED_AUTOENCODERS, RUNS, WeightFile, identify
from hgkd.weights.run_file import ClassifierSpec

if TYPE_CHECKING:
    from hgkd.networks import ImageClassifier
    from hgkd.teachers import Teacher

_WEIGHT_SUFFIXES = (".pth", ".pt", ".ckpt", ".bin", ".safetensors", ".tar")


@dataclass
class FeatureSet:
    """Features of a data set, in its order.

    Attributes:
        features: (N, C), fp32, on the CPU.
        labels: class indices (N,).
        indices: their places in the data set (N,), ascending.
        skipped: images of the data set that are not among them, because their files cannot be read.
    """

    features: Tensor
    labels: Tensor
    indices: Tensor
    skipped: int = 0


class FeatureExtractor(nn.Module):
    """A frozen network that turns images into one feature each.

    Args:
        kind: 'student', 'export', 'timm' or 'mae'.
        settings: what was loaded and which part of it, as plain values for a report.
    """

    attention_name = ""

    def __init__(self, kind: str, settings: dict[str, Any]) -> None:
        super().__init__()
        self.kind = kind
        self.settings = {"kind": kind, **settings}

    @property
    def channels(self) -> int:
        """Channels of the images."""
        parts: tuple[Any, ...] = (self, getattr(self, "teacher", None), getattr(self, "classifier", None))
        return next((int(part.in_chans) for part in parts if hasattr(part, "in_chans")), 3)

    @property
    def reads_channels(self) -> int | None:
        """``in_chans`` of the data sets for this network: None, where they are RGB images."""
        return None if self.channels == 3 else self.channels

    def forward(self, images: Tensor) -> Tensor:
        """Images (B, 3, H, W), RGB, in [0, 1] -> features (B, C)."""
        return self.maps(images).mean(dim=(2, 3))

    def maps(self, images: Tensor, level: int | None = None) -> Tensor:
        """Features (B, C, h, w) of a level.

        Args:
            level: of a CNN, 0 = the finest; of a ViT the block, 0 = the first; negative ones count from the end. None: that
                of :meth:`forward`.

        Raises:
            ValueError: no such level, or a network without maps.
        """
        raise InvalidValueError(
            "no-feature-maps", f"{self.settings.get('name')} gives no maps of features; take a CNN or a plain ViT"
        )

    def attention(self, images: Tensor, level: int | None = None) -> Tensor:
        """Attention map (B, h, w), 0 or more; ``attention_name`` says what it is. See :meth:`maps`."""
        raise InvalidValueError(
            "no-attention-maps", f"{self.settings.get('name')} gives no map of attention; take a CNN or a plain ViT"
        )

    def _level(self, level: int, count: int, what: str) -> int:
        if not -count <= level < count:
            raise InvalidValueError(
                "feature-level-out-of-range",
                f"{what} {level} does not exist: {self.settings['name']} has {what}s 0 .. {count - 1}",
            )
        return level % count


class CNNExtractor(PixelNormalisation, FeatureExtractor):
    """Mean over places of ``model.forward_features``; the model's own mean and std normalise the images."""

    attention_name = "activation energy (Zagoruyko & Komodakis, arXiv 1612.03928): squares, summed over channels"

    def __init__(self, model: nn.Module, kind: str, settings: dict[str, Any]) -> None:
        super().__init__(kind, settings)
        self.model = model.eval().requires_grad_(False)
        self.set_pixels(*pixel_statistics(model))

    def maps(self, images: Tensor, level: int | None = None) -> Tensor:
        images = self.normalise(images)
        if level is not None:
            from hgkd.networks.encoder import encoder_features, encoder_levels

            levels = encoder_levels(self.model)
            return encoder_features(self.model, images, [levels[self._level(level, len(levels), "level")]])[0]
        last: Tensor = self.model.forward_features(images)  # type: ignore[operator]
        from hgkd.networks.taps import last_channels

        if last.ndim != 4 or last.shape[1] != last_channels(self.model):
            raise InvalidValueError(
                "features-of-other-shape",
                f"{self.settings.get('name')} gives features of shape {tuple(last.shape)}, expected (B, "
                f"{last_channels(self.model)}, h, w); only CNNs, and ViTs with a block, can be evaluated",
            )
        return last

    def attention(self, images: Tensor, level: int | None = None) -> Tensor:
        return self.maps(images, level).square().sum(dim=1)


class TokenExtractor(FeatureExtractor):
    """Mean of a teacher's patch tokens after one block; all is visible, the teacher resizes and normalises inside."""

    attention_name = "attention of the class token to the patches, mean over heads (without a class token: of all patches)"

    def __init__(self, teacher: Teacher, block: int | None, kind: str, settings: dict[str, Any]) -> None:
        depth = teacher.info.depth
        block = depth - 1 if block is None else block
        if not 0 <= block < depth:
            raise InvalidValueError(
                "feature-block-out-of-range", f"block {block} does not exist: {settings['name']} has blocks 0 .. {depth - 1}"
            )
        super().__init__(kind, {**settings, "block": block})
        self.teacher = teacher
        self.block = block
        self._grid: tuple[int, int] | None = None

    def maps(self, images: Tensor, level: int | None = None) -> Tensor:
        block = self._prepared(images, level)
        visible = torch.ones(len(images), *cast(tuple[int, int], self.teacher.grid), dtype=torch.bool, device=images.device)
        tokens: Tensor = self.teacher(images, visible, TeacherNeeds(blocks=(block,))).tokens[block]
        return tokens

    def attention(self, images: Tensor, level: int | None = None) -> Tensor:
        found: Tensor = self.teacher.attention(images, self._prepared(images, level))
        return found

    def _prepared(self, images: Tensor, level: int | None) -> int:
        patch = self.teacher.info.patch_size
        grid = max(1, round(images.shape[2] / patch)), max(1, round(images.shape[3] / patch))
        if grid != self._grid:  # one token a cell: patches of about the images' own size
            self.teacher.prepare(grid, patch)
            self._grid = grid
        return self.block if level is None else self._level(level, self.teacher.info.depth, "block")


class FineTunedViT(FeatureExtractor):
    """Mean of the patch tokens of a fine-tuned ViT after one block (no norm), at the image size that it was trained for."""

    attention_name = TokenExtractor.attention_name

    def __init__(self, classifier: ImageClassifier, block: int | None, settings: dict[str, Any]) -> None:
        super().__init__("classifier", settings)
        self.classifier = classifier.requires_grad_(False)
        self.block = self._level(-1 if block is None else block, len(classifier.network.blocks), "block")
        self.settings["block"] = self.block

    def maps(self, images: Tensor, level: int | None = None) -> Tensor:
        network = self.classifier.network
        block = self.block if level is None else self._level(level, len(network.blocks), "block")
        inputs = self.classifier.normalise(_resized(images, self.classifier.spec.image_size))
        found: Tensor = network.forward_intermediates(inputs, [block], intermediates_only=True)[0]
        return found

    def attention(self, images: Tensor, level: int | None = None) -> Tensor:
        network = self.classifier.network
        if not isinstance(network, VisionTransformer):  # others have their own attention
            return super().attention(images, level)
        block = self.block if level is None else self._level(level, len(network.blocks), "block")
        inputs = self.classifier.normalise(_resized(images, self.classifier.spec.image_size))
        tokens = network.blocks[:block](network.norm_pre(network._pos_embed(network.patch_embed(inputs))))
        patches = patch_attention(network.blocks[block], tokens, network.num_prefix_tokens, network.has_class_token)
        return patches.unflatten(1, network.patch_embed.grid_size)


class PooledExtractor(PixelNormalisation, FeatureExtractor):
    """Pooled features of any other timm model, by the model's own pooling, at the size that it was made for."""

    def __init__(self, model: nn.Module, kind: str, settings: dict[str, Any]) -> None:
        cfg = cast(Mapping[str, Any], model.pretrained_cfg)
        self.input_size = tuple(cfg["input_size"][1:])
        super().__init__(kind, {**settings, "input_size": list(self.input_size)})
        self.model = model.eval().requires_grad_(False)
        self.set_pixels(*pixel_statistics(model))

    def forward(self, images: Tensor) -> Tensor:
        pooled: Tensor = self.model(self.normalise(_resized(images, self.input_size)))
        return pooled


def _resized(images: Tensor, size: tuple[int, int]) -> Tensor:
    """Images (B, 3, H, W) in [0, 1] at the size (H, W) that a network was made for."""
    if tuple(images.shape[-2:]) == size:
        return images
    return F.interpolate(images, size, mode="bicubic", align_corners=False, antialias=True).clamp(0, 1)


def load_extractor(
    spec: str | os.PathLike[str],
    checkpoint: str | os.PathLike[str] | None = None,
    block: int | None = None,
    *,
    pretrained: bool = False,
    seed: int = 0,
) -> FeatureExtractor:
    """Make the extractor that a backbone specification asks for.

    Args:
        spec: a checkpoint of hgkd's runner (.pth), or its work folder; a folder of ``hgkd export``; a MAE file, with or
            without its decoder; or a timm model name. What a file is, is found from its content.
        checkpoint: weight file for a timm name, loaded strictly (a classifier in it is left aside).
        block: for ViTs, index of the block whose patch tokens are averaged (0 = first); None is the last.
        pretrained: let timm download its weights for a timm name.
        seed: of the random weights of a timm name with neither ``checkpoint`` nor ``pretrained``.

    Raises:
        ValueError: unknown name (the nearest ones are told), no such block, or an option that ``spec`` does not take.
        FileNotFoundError: ``spec`` or ``checkpoint`` is a path that does not exist.
        WeightsError: damaged or unfitting weights.
    """
    text = os.fspath(spec)
    if text.startswith("mae:"):
        _refuse(text, "a MAE file holds its own weights", checkpoint=checkpoint, pretrained=pretrained)
        return _mae(identify(_existing(text.removeprefix("mae:"))), block)
    path = Path(text).expanduser()
    if not path.exists() and not text.endswith(_WEIGHT_SUFFIXES) and os.sep not in text:
        return _timm(text, checkpoint, block, pretrained, seed)
    _refuse(text, "a file holds its own weights", checkpoint=checkpoint, pretrained=pretrained)
    if not path.exists():
        raise MissingFileError(
            "backbone-missing",
            f"checkpoint {text} does not exist; expected a checkpoint of hgkd train, its work folder, a folder of hgkd "
            "export, a MAE file, or timm's name of a network",
        )
    return _of_file(identify(spec), text, block)


def _of_file(file: WeightFile, text: str, block: int | None) -> FeatureExtractor:
    if file.kind in MASKED_AUTOENCODERS:
        return _mae(file, block)
    if isinstance(file.spec, ClassifierSpec) and is_vit(file.spec.name):
        return _fine_tuned_vit(file, file.spec, block)
    if file.path.is_dir():
        _refuse(text, "an export holds its own CNN", block=block)
        return _export(file)
    if file.kind in RUNS:
        _refuse(text, "a checkpoint holds its own CNN", block=block)
    return _student(file)


def _refuse(spec: str, why: str, **options: object) -> None:
    given = [name for name, value in options.items() if value is not None and value is not False]
    if given:
        raise InvalidValueError(
            "backbone-option-unused", f"backbone {spec!r} takes no {' or '.join(given)}: {why}; leave it out"
        )


def _student(file: WeightFile) -> FeatureExtractor:
    from hgkd.networks.backbones import read_student

    student = read_student(file, otherwise=f"give a file of others as --checkpoint {file} --backbone NAME, timm's name for it")
    return CNNExtractor(student.build(), "student", {**student.spec.to_dict(), "weights": str(file)})


def _fine_tuned_vit(file: WeightFile, spec: ClassifierSpec, block: int | None) -> FeatureExtractor:
    from hgkd.networks.classifier import load_classifier

    return FineTunedViT(load_classifier(file), block, {"name": spec.name, "kwargs": spec.kwargs, "weights": str(file)})


def _export(file: WeightFile) -> FeatureExtractor:
    from hgkd.networks.backbones import read_source

    source = read_source(file)
    return CNNExtractor(source.network, "export", {**source.describe(), "weights": str(file)})


def _mae(file: WeightFile, block: int | None) -> FeatureExtractor:
    from hgkd.teachers import MAETeacher

    return TokenExtractor(MAETeacher(file), block, "mae", {"name": "mae", "weights": str(file)})


def _timm(
    name: str, checkpoint: str | os.PathLike[str] | None, block: int | None, pretrained: bool, seed: int
) -> FeatureExtractor:
    if not timm.is_model(name.partition(".")[0]):
        message = unknown_name_message("backbone", name, timm.list_models())
        raise InvalidValueError("backbone-unknown", f"{message} (nor is it a file or a folder)")
    check_timm_name("backbone", name)
    if checkpoint is not None and pretrained:
        raise InvalidValueError("weights-named-twice", "checkpoint and pretrained both name weights; give one of them")
    file = None if checkpoint is None else _existing(checkpoint)
    unnamed = "timm" if pretrained else f"random, seed {seed}"
    settings = {"name": name, "weights": unnamed if file is None else str(file)}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if is_vit(name):
            from hgkd.teachers import TimmTeacher

            teacher = TimmTeacher(name, checkpoint=file, pretrained=pretrained, allow_random=True)
            return TokenExtractor(teacher, block, "timm", settings)
        if block is not None:
            raise InvalidValueError("block-without-vit", f"{name} is no ViT and has no block {block}; leave block out")
        if not _is_cnn(name):
            from hgkd.weights.importing import import_weights

            model = timm.create_model(name, pretrained=pretrained, num_classes=0)
            if file is not None:
                import_weights(model, file)
            return PooledExtractor(model, "timm", settings)
        from hgkd.networks.encoder import build_encoder

        return CNNExtractor(build_encoder(name, checkpoint=file, pretrained=pretrained), "timm", settings)


def _existing(file: str | os.PathLike[str]) -> Path:
    path = Path(file).expanduser()
    if not path.is_file():
        raise MissingFileError("weight-file-missing", f"weight file {path} does not exist")
    return path


def _is_cnn(name: str) -> bool:
    """Whether timm's model gives (B, C, h, w) maps at any image size, as a student's encoder does."""
    from hgkd.networks.encoder import build_encoder

    try:
        with torch.random.fork_rng(devices=[]):
            build_encoder(name)
    except ValueError:
        return False
    return True


@torch.no_grad()
def extract(
    extractor: FeatureExtractor,
    dataset: Dataset[dict[str, Any]],
    batch_size: int = 64,
    workers: int = 0,
    device: torch.device | str = "cpu",
) -> FeatureSet:
    """Features and labels of a whole data set, in order.

    Args:
        dataset: items ``{'inputs': uint8 (C, H, W) or float, 'label': int, 'index': int}``. An index that comes twice is an
            image that took the place of an unreadable one; it counts once.
        batch_size: images at once.
        workers: processes that read images; 0 reads in this one.
        device: where the network computes.
    """
    loader: DataLoader[dict[str, Any]] = DataLoader(dataset, batch_size, num_workers=workers, collate_fn=_collate)
    extractor = extractor.to(device).eval()
    features, labels, indices = [], [], []
    for batch in loader:
        images = to_unit_range(batch["inputs"].to(device))
        features.append(extractor(images).float().cpu())
        labels.append(batch["label"])
        indices += batch["index"]
    if not indices:
        raise DataError("data-set-empty", "the data set is empty: no image, no feature")
    first_place = {index: place for place, index in reversed(list(enumerate(indices)))}
    keep = torch.tensor(sorted(first_place.values()))
    places = torch.tensor(indices)[keep]
    return FeatureSet(torch.cat(features)[keep], torch.cat(labels)[keep], places, skipped=len(indices) - len(keep))


def _collate(items: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        "inputs": torch.stack([item["inputs"] for item in items]),
        "label": torch.tensor([item["label"] for item in items]),
        "index": [int(item["index"]) for item in items],
    }
