"""MAE pretraining (arXiv 2111.06377): makes the teacher that H-GKD's target 'inferred' needs, when none can be had.

Patches are hidden in whole cells (``mask_cell``), so that a teacher can be trained on the masks that its students will use; the
default is MAE's own, one patch a cell.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from mmengine.model import BaseModel
from torch import Tensor

from hgkd.data.transforms import as_size
from hgkd.distillers.masked import check_size, feature_samples
from hgkd.errors import InvalidValueError
from hgkd.masking import RandomMask, expand, grid_of, ids_keep_of
from hgkd.networks.mae import MaskedAutoencoder, mae_loss, make_arch, pixel_target, save_mae
from hgkd.pixels import (
    PixelNormalisation,
    check_in_chans,
    pixels_noted_by,
    statistics_of,
    to_unit_range,
)
from hgkd.registry import MODELS
from hgkd.structures import FeatureSample
from hgkd.weights.run_file import FORMAT


@MODELS.register_module()
class MAEPretraining(PixelNormalisation, BaseModel):
    """A MAE being trained.

    Args:
        arch: 'tiny', 'small', 'base', 'large', 'huge', or a dict of sizes (see :class:`hgkd.networks.mae.MAEArch`).
        image_size: side in pixels, or (H, W).
        patch_size: side of a patch in pixels.
        mask_ratio: share of hidden patches, MAE's 0.75; the number of visible cells is truncated, as there.
        mask_cell: side of the cells that are hidden as a whole, a multiple of ``patch_size``; None: one patch.
        norm_pix: predict pixels standardised patch by patch.
        mean, std: of the pixels in [0, 1], a number a channel; None: ImageNet's, RGB.
        data_preprocessor: see mmengine's ``BaseModel``.
        in_chans: channels of the images; None: that of the arch, 3 where it does not say.

    Raises:
        ValueError: sizes that do not fit, or a ratio that leaves nothing visible or nothing to predict.
    """

    def __init__(
        self,
        arch: str | Mapping[str, Any],
        image_size: int | Sequence[int],
        patch_size: int = 16,
        mask_ratio: float = 0.75,
        mask_cell: int | None = None,
        norm_pix: bool = True,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        data_preprocessor: Mapping[str, Any] | None = None,
        in_chans: int | None = None,
    ) -> None:
        super().__init__(data_preprocessor=None if data_preprocessor is None else dict(data_preprocessor))
        self.cell = patch_size if mask_cell is None else mask_cell
        if self.cell < patch_size or self.cell % patch_size:
            raise InvalidValueError(
                "cell-no-multiple-of-patch", f"mask_cell {mask_cell} is no multiple of patch_size {patch_size}"
            )
        self.mask = RandomMask(mask_ratio, rounding="floor")
        if mask_ratio == 0.0:
            raise InvalidValueError(
                "mask-ratio-hides-nothing",
                f"mask_ratio {mask_ratio} hides nothing, so MAE has nothing to predict; MAE's own is 0.75",
            )
        self.image_size = as_size(image_size)
        self.mask_grid = grid_of(self.image_size, self.cell)
        self.mask.check(self.mask_grid)
        self.mask.count(self.mask_grid)  # refuses a ratio for each image: the encoder takes as many patches of all
        self.norm_pix = norm_pix
        counted = {} if in_chans is None else {"in_chans": in_chans}
        sizes = make_arch(arch, patch_size=patch_size, image_size=self.image_size, **counted)
        if sizes.decoder_depth < 1:
            raise InvalidValueError(
                "decoder-missing", "MAE pretraining needs a decoder, but decoder_depth is 0; set it to at least 1"
            )
        channels = check_in_chans(sizes.in_chans, "model.in_chans")
        mean, std = statistics_of("model", channels, mean, std)
        self.network = MaskedAutoencoder(sizes)
        self.set_pixels(mean, std)

    def init_weights(self) -> None:
        """Nothing: the network has set its weights itself."""

    def forward(  # type: ignore[override]
        self, inputs: Tensor, mode: str = "tensor", **data: object
    ) -> dict[str, Tensor] | list[FeatureSample] | Tensor:
        """Loss, features or samples of a batch.

        Args:
            inputs: uint8 (B, C, H, W), or float in [0, 1].
            mode: 'loss' -> {'mae_loss': scalar}; 'tensor' -> (B, 1 + N, D) encoder output of whole images; 'predict' -> one
                ``FeatureSample`` an image, the mean patch token.

        Raises:
            ValueError: images of another size than ``image_size``.
        """
        check_size(inputs, self.image_size)
        images = self.normalise(to_unit_range(inputs))
        if mode == "loss":
            return {"mae_loss": self.loss(images)}
        encoded = self.network.encode(images)
        if mode == "predict":
            return feature_samples(encoded[:, 1:].mean(1).float(), data)
        if mode == "tensor":
            return encoded
        raise InvalidValueError("mode-unknown", f"mode must be 'loss', 'predict' or 'tensor', got {mode!r}")

    def loss(self, images: Tensor) -> Tensor:
        """MAE's loss on normalised images, with a fresh mask."""
        ratio = self.cell // self.network.arch.patch_size
        cells = self.mask(len(images), self.mask_grid, device=images.device)
        visible = expand(cells, ratio).flatten(1)
        ids_keep = ids_keep_of(visible, self.mask.count(self.mask_grid) * ratio**2)
        predicted = self.network.predict_pixels(self.network.encode(images, ids_keep), ids_keep)
        target = pixel_target(images, self.network.arch.patch_size, self.norm_pix)
        return mae_loss(predicted, target, visible)

    def load_meta(self, meta: Mapping[str, Any]) -> str | None:
        """Normalise as the checkpoint did whose meta this is, see :meth:`hgkd.pixels.PixelNormalisation.restore_pixels`."""
        pixels = pixels_noted_by(meta.get("pixels"))
        return None if pixels is None else self.restore_pixels(*pixels)

    def meta(self) -> dict[str, Any]:
        """Description of the network for checkpoints."""
        return {"mae": asdict(self.network.arch), "pixels": self.pixels(), "format": FORMAT}

    def pixels(self) -> dict[str, Any]:
        """Pixel statistics that the network was trained with, for a file of its weights."""
        return {**self.pixel_values(), "norm_pix": self.norm_pix}

    def save_teacher(self, path: str | Path, overwrite: bool = False) -> Path:
        """Write the network as a file that :class:`hgkd.teachers.mae.MAETeacher` takes, in the official naming."""
        return save_mae(self.network, path, self.pixels(), overwrite)
