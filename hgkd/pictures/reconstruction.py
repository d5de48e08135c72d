"""Reconstructions of hidden positions by masked models: MAE (arXiv 2111.06377), SparK (arXiv 2301.03580)."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from hgkd.config.reading import check_plain_data
from hgkd.errors import InvalidValueError, MissingFileError
from hgkd.masking import RandomMask, grid_of, ids_keep_of
from hgkd.pictures.columns import Columns, hide_cells
from hgkd.pictures.distillation import distillation_columns
from hgkd.pictures.features import _finite
from hgkd.registry import MODELS
from hgkd.weights.identify import Kind, WeightFile, identify
from hgkd.weights.loading import load_strict
from hgkd.weights.run_file import literal_config


class Reconstructor(Protocol):
    """A masked model that predicts pixels.

    Attributes:
        image_size: (H, W) that it was trained with.
        mask_ratio: share of hidden cells in its training; of files that do not say, MAE's 0.75.
        in_chans: channels of its images.
    """

    image_size: tuple[int, int]
    mask_ratio: float
    in_chans: int

    def columns(self, inputs: Tensor, mask_ratio: float, seed: int) -> Columns:
        """Image, what is seen of it, and the reconstruction, of uint8 images (B, 3, H, W)."""


def load_reconstructor(checkpoint: str | os.PathLike[str]) -> Reconstructor:
    """The pixel-predicting model in a file.

    A checkpoint of a distillation with ``PixelReconstruction`` (SparK's objective, with a CNN or a ViT student), of
    ``MAEPretraining``, or a MAE file with decoder.

    Raises:
        FileNotFoundError: no such file.
        ValueError: it holds no model that predicts pixels.
        WeightsError: damaged, or no such file at all.
    """
    if not Path(checkpoint).expanduser().exists():
        raise MissingFileError("checkpoint-missing", f"checkpoint {checkpoint} does not exist")
    file = identify(checkpoint)
    model = literal_config(file.meta.get("cfg")).get("model") or {}
    if model.get("type") == "MaskedDistiller":
        return _DistilledPixels(file.path, model, file.content["state_dict"], _student_pixels(file))
    return _MAEPixels(file, model)


def _student_pixels(file: WeightFile) -> dict[str, Any]:
    """The student's option for its pixel statistics, which may come from the file that it started from."""
    if file.kind is Kind.VIT_STUDENT:
        from hgkd.networks.mae import read_mae

        return {key: value for key, value in read_mae(file)[2].items() if key in ("mean", "std")}
    pixels = getattr(file.spec, "pixels", None)
    return {"normalize": pixels} if pixels else {}


@dataclass
class _DistilledPixels:
    """A student with a pixel objective, without teacher and other objectives."""

    path: Path
    model: Mapping[str, Any]
    state: Mapping[str, Tensor]
    pixels: Mapping[str, Any]

    def __post_init__(self) -> None:
        objectives = self.model.get("objectives") or {}
        pixels = [name for name, objective in objectives.items() if objective.get("type") == "PixelReconstruction"]
        if not pixels:
            kinds = ", ".join(str(objective.get("type")) for objective in objectives.values())
            raise InvalidValueError(
                "no-pixels-predicted",
                f"{self.path} was trained with {kinds or 'no objective'} and predicts no pixels; a reconstruction needs a "
                "checkpoint with PixelReconstruction (configs/spark), or a MAE",
            )
        self.name = pixels[0]
        size = self.model["image_size"]
        self.image_size = (size, size) if isinstance(size, int) else tuple(size)
        self.mask_ratio = float((self.model.get("mask") or {}).get("mask_ratio", 0.6))
        student = self.model["student"]
        arch = student.get("arch")
        inside = (student.get("encoder_kwargs"), arch if isinstance(arch, Mapping) else None)
        self.in_chans = int(
            student.get("in_chans") or next((part["in_chans"] for part in inside if part and "in_chans" in part), 3)
        )

    def columns(self, inputs: Tensor, mask_ratio: float, seed: int) -> Columns:
        started_from = ("encoder_checkpoint", "checkpoint", "pretrained")  # the weights are in the checkpoint
        config = {
            "type": "MaskedDistiller",
            "student": {k: v for k, v in self.model["student"].items() if k not in started_from} | dict(self.pixels),
            "objectives": {self.name: {k: v for k, v in self.model["objectives"][self.name].items() if k != "teacher"}},
            "mask": {"type": "RandomMask", "mask_ratio": mask_ratio},
            "image_size": tuple(inputs.shape[-2:]),
        }
        check_plain_data(config, str(self.path))
        model = MODELS.build({"_scope_": "hgkd", **config})
        parts = ("student.", f"objectives.{self.name}.")
        load_strict(model, {k: v for k, v in self.state.items() if k.startswith(parts)}, source=str(self.path))
        columns = distillation_columns(model, inputs, seed)
        columns["reconstruction"] = columns.pop(self.name)
        return columns


class _MAEPixels:
    """A masked autoencoder with its decoder."""

    def __init__(self, file: WeightFile, model: Mapping[str, Any]) -> None:
        from hgkd.networks.mae import read_mae
        from hgkd.teachers.mae import MAETeacher

        arch, _, pixels = read_mae(file)
        self.teacher = MAETeacher(file, allow_random=True)
        self.teacher.require_decoder()
        self.norm_pix = pixels.get("norm_pix") is not False  # files that do not say: MAE's default
        self.image_size, self.in_chans = arch.image_size, arch.in_chans
        self.cell = int(model.get("mask_cell") or arch.patch_size)
        self.mask_ratio = float(model.get("mask_ratio", 0.75))

    @torch.no_grad()
    def columns(self, inputs: Tensor, mask_ratio: float, seed: int) -> Columns:
        from hgkd.networks.mae import patchify, unpatchify

        patch = self.teacher.info.patch_size
        cells = grid_of((inputs.shape[-2], inputs.shape[-1]), self.cell)
        grid = self.teacher.prepare(cells, self.cell)
        images = inputs if inputs.is_floating_point() else inputs.float() / 255
        generator = torch.Generator().manual_seed(seed)
        visible = RandomMask(mask_ratio, rounding="floor")(len(images), cells, device="cpu", generator=generator)
        patches = self.teacher.patch_mask(visible)
        ids_keep = ids_keep_of(patches)
        normalised = self.teacher.normalise(images)
        network = self.teacher.network
        predicted = network.predict_pixels(network.encode(normalised, ids_keep), ids_keep)
        if self.norm_pix:  # back with the true mean and std of each patch, which the network never sees
            own = patchify(normalised, patch)
            predicted = predicted * (own.var(-1, keepdim=True) + 1e-6).sqrt() + own.mean(-1, keepdim=True)
        predicted = torch.where(patches[:, :, None], patchify(normalised, patch), predicted)
        pixels = self.teacher.denormalise(unpatchify(predicted, patch, grid))
        return {"image": images, "seen": hide_cells(images, visible), "reconstruction": pixels.clamp(0.0, 1.0)}


def reconstruction_columns(
    model: Reconstructor, inputs: Tensor, mask_ratio: float | None = None, seed: int = 0
) -> tuple[Columns, float]:
    """Columns of reconstructed hidden positions, and the share of hidden cells that was used.

    Hidden positions are brought back to pixels with their own true mean and std where the model was trained on standardised
    ones (as MAE's and SparK's pictures are): colours and contrast are then given, only the structure is the model's.

    Args:
        inputs: uint8 (B, C, H, W), or float in [0, 1].
        mask_ratio: share of hidden cells in (0, 1); None: that of its training.
        seed: of the mask.

    Raises:
        ValueError: a ratio that hides nothing or everything, a size that the model cannot take, or a prediction of NaN.
    """
    ratio = model.mask_ratio if mask_ratio is None else mask_ratio
    if not 0.0 < ratio < 1.0:
        raise InvalidValueError("mask-ratio-out-of-range", f"mask_ratio is the share of hidden cells, in (0, 1), got {ratio}")
    columns = model.columns(inputs, ratio, seed)
    _finite(columns["reconstruction"], "predicted pixels")
    return columns, ratio
