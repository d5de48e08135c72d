"""Predictions of a detector or segmentor, drawn on images by mmdet's and mmseg's own visualisers."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from mmengine import registry as roots
from mmengine.config import Config
from mmengine.dataset import Compose
from mmengine.device import get_device
from mmengine.model import BaseModel
from mmengine.registry import DefaultScope

from hgkd.config.reading import read_config
from hgkd.data.frames import picture_names
from hgkd.data.images import find_images
from hgkd.errors import InvalidValueError, MissingFileError
from hgkd.mmcv_ops.finder import register_ops
from hgkd.openmmlab.config import (
    dataset_class,
    drop_teacher,
    is_downstream,
    load_with_care,
    merge_options,
)
from hgkd.openmmlab.data_checks.checks import class_names
from hgkd.openmmlab.images import LoadReadableImage
from hgkd.openmmlab.models import build_model
from hgkd.openmmlab.weights import student_weights
from hgkd.weights.files import read_checkpoint
from hgkd.writing import written_beside


@torch.no_grad()
def draw_predictions(
    config: str | os.PathLike[str] | Config,
    checkpoint: str | os.PathLike[str],
    images: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
    out: str | os.PathLike[str],
    score: float = 0.3,
    limit: int | None = None,
    options: Mapping[str, Any] | None = None,
    device: str | None = None,
) -> list[Path]:
    """Draw what a model predicts: boxes and masks, or the label map laid over the image.

    Args:
        config: of the detector, segmentor or its distillation (then the student is drawn).
        checkpoint: of that config's model, or the ``student.pth`` of a distillation.
        images: a folder, or files.
        out: folder for the pictures, made when absent; a picture is called like its image, as .png, with the image's
            folders before where two have the same name.
        score: boxes of a lower score are left out.
        limit: maximum number of images.
        options: overrides of the config, as in training.
        device: where it is computed, e.g. 'cpu'; None: the GPU if there is one.

    Returns:
        The pictures' files.

    Raises:
        FileNotFoundError: no such config, checkpoint or images.
        ValueError: the config is not one of mmdet or mmseg, the checkpoint does not fit, or an image cannot be read.
        WriteError: the disk does not take a picture.
    """
    register_ops()
    cfg = config.copy() if isinstance(config, Config) else read_config(config)
    if not is_downstream(cfg):
        raise InvalidValueError(
            "config-not-downstream",
            f"{cfg.filename} is no config of mmdet or mmseg: its default_scope is {cfg.get('default_scope')!r}",
        )
    merge_options(cfg, options or {})
    drop_teacher(cfg)
    files = _files(images)[:limit]
    with DefaultScope.overwrite_default_scope(cfg.default_scope):
        model = _model(cfg, checkpoint).to(device or get_device())
        dataset = cfg.test_dataloader.dataset
        load_with_care(dataset.pipeline, {"required": True})
        pipeline = Compose([step for step in dataset.pipeline if step["type"] != "LoadAnnotations"])
        visualizer = roots.VISUALIZERS.build({**cfg.visualizer, "name": f"drawing_{id(model)}", "vis_backends": None})
        visualizer.dataset_meta = _names(dataset, cfg.default_scope)
        pictures = []
        reading: Any = next((step for step in dataset.pipeline if step["type"] == "hgkd.LoadReadableImage"), {})
        load: Any = LoadReadableImage(required=True, value_range=reading.get("value_range"))
        for file, name in zip(files, picture_names(files), strict=True):
            data = pipeline({"img_path": str(file), "img_id": 0})
            result = model.test_step({"inputs": [data["inputs"]], "data_samples": [data["data_samples"]]})[0]
            # turned as the model has seen it: mmcv heeds the camera's note of which side is up
            pixels = np.ascontiguousarray(load({"img_path": str(file)})["img"][..., ::-1])
            target = Path(out) / f"{name}.png"
            threshold: dict[str, Any] = {"pred_score_thr": score} if cfg.default_scope == "mmdet" else {}
            with written_beside(target) as beside:
                visualizer.add_datasample(name, pixels, result.cpu(), draw_gt=False, out_file=str(beside), **threshold)
            pictures.append(target)
    return pictures


def _files(images: str | os.PathLike[str] | Sequence[str | os.PathLike[str]]) -> list[Path]:
    if isinstance(images, (str, os.PathLike)):
        folder = Path(images)
        files = [folder / name for name in find_images(str(folder))] if folder.is_dir() else [folder]
    else:
        files = [Path(image) for image in images]
    missing = [file for file in files if not file.is_file()]
    if missing or not files:
        raise MissingFileError(
            "image-missing", f"no image at {missing[0] if missing else images}; give a folder of images, or files"
        )
    return files


def _model(cfg: Config, checkpoint: str | os.PathLike[str]) -> BaseModel:
    content = read_checkpoint(checkpoint)
    state: Mapping[str, Any] = content.get("state_dict", {}) if isinstance(content, Mapping) else {}
    return build_model(cfg.model, cfg.default_scope, student_weights(state), str(checkpoint))


def _names(dataset: Mapping[str, Any], scope: str) -> dict[str, Any]:
    """Class names and colours of a data set, without reading its files."""
    cls = dataset_class(dataset, scope)
    names = {**getattr(cls, "METAINFO", {}), **(dataset.get("metainfo") or {})}
    names["classes"] = class_names(dataset, cls, "test_dataloader.dataset")
    palette = names.get("palette") or ()
    names["palette"] = [] if isinstance(palette, str) else list(palette)  # mmdet takes a tuple for one colour
    if len(names["palette"]) != len(names["classes"]):
        colours = np.random.default_rng(0).integers(0, 256, (len(names["classes"]), 3))
        names["palette"] = [tuple(int(value) for value in colour) for colour in colours]
    return names
