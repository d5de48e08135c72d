"""The ViT student: a MAE whose encoder sees the visible patches and whose light decoder fills in the others.

Network, names of the parameters and positions are MAE's (arXiv 2111.06377, :mod:`hgkd.teachers.mae`), so that a student starts
from a MAE file and its checkpoint serves as one. DMAE (arXiv 2208.12256) and G2SD (arXiv 2302.14771) distil such students.

What differs from MAE: cells may be several patches wide; patches are kept cell by cell, which changes nothing because
attention does not see order, and makes every block's output a sparse map without copying.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hgkd.errors import InvalidValueError
from hgkd.masking import grid_of
from hgkd.networks.mae import MaskedAutoencoder, make_arch, positions_of, read_mae, set_positions, unpatchify
from hgkd.pixels import check_in_chans, check_pixels, check_same_pixels, statistics_of, to_unit_range
from hgkd.registry import MODELS
from hgkd.sparse import CellLayout, PackedTensor
from hgkd.sparse.hardware import require
from hgkd.structures import StudentOutput
from hgkd.students.base import Student
from hgkd.weights.loading import load_strict


@MODELS.register_module()
class MaskedViT(Student):
    """A masked student that is a ViT.

    Args:
        arch: 'tiny', 'small', 'base', 'large', 'huge', or a dict of sizes (see :class:`hgkd.networks.mae.MAEArch`).
        patch_size: side of a patch in pixels; None: that of the arch.
        cell: side of a mask cell in pixels, a multiple of ``patch_size``; None is one patch, as in MAE.
        checkpoint: MAE file to start from, of the same sizes; when it has no decoder, that starts at random.
        mean, std: of the pixels in [0, 1], a number a channel; None: what ``checkpoint`` notes, else ImageNet's, RGB.
        in_chans: channels of the images; None: that of the arch, 3 where it does not say.

    Attributes:
        network: the :class:`hgkd.networks.mae.MaskedAutoencoder`.
        cell, out_stride: pixels a mask cell, and a position of the decoder's output (one patch).
        decoded_channels: width of the decoder, whose raw hidden state (no norm) is ``decoded``.
        pyramid_channels: {out_stride: decoded_channels}, the only scale.
        feature_channels, feature_strides: of the encoder's blocks.

    Raises:
        ValueError: sizes or numbers of heads that do not fit, no decoder, or other pixels than the file notes.
        FileNotFoundError, WeightsError: ``checkpoint`` is absent, damaged, no MAE, or of other sizes.
    """

    equal_counts = True
    takes_count = True

    def __init__(
        self,
        arch: str | Mapping[str, Any] = "small",
        patch_size: int | None = None,
        cell: int | None = None,
        checkpoint: str | Path | None = None,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        in_chans: int | None = None,
    ) -> None:
        super().__init__()
        given = {"patch_size": patch_size, "in_chans": in_chans}
        sizes = make_arch(arch, **{key: value for key, value in given.items() if value is not None})
        if sizes.decoder_depth < 1:
            raise InvalidValueError(
                "decoder-missing", "a masked ViT needs a decoder, but decoder_depth is 0; set it to at least 1"
            )
        channels = check_in_chans(sizes.in_chans, "model.student.in_chans")
        patch = sizes.patch_size
        self.cell = patch if cell is None else cell
        if self.cell < patch or self.cell % patch:
            raise InvalidValueError("cell-no-multiple-of-patch", f"cell {cell} is no multiple of patch_size {patch}")
        self.network = MaskedAutoencoder(sizes)
        noted = {} if checkpoint is None else self._start_from(checkpoint)
        mean, std = (noted.get(name) if own is None else own for name, own in (("mean", mean), ("std", std)))
        mean, std = statistics_of("model.student", channels, mean, std)
        if {"mean", "std"} <= noted.keys():
            of_file = check_pixels(noted["mean"], noted["std"], f"the pixels of {checkpoint}", channels)
            check_same_pixels((mean, std), of_file, checkpoint, "model.student.mean and std")
        # run only when an objective asks for pixels; see predict_pixels
        self._gives_pixels = False
        self.network.decoder_norm.requires_grad_(False)
        self.network.decoder_pred.requires_grad_(False)
        self.out_stride = patch
        self.decoded_channels = sizes.decoder_embed_dim
        self.pyramid_channels = {patch: sizes.decoder_embed_dim}
        self.feature_channels = (sizes.embed_dim,) * sizes.depth
        self.feature_strides = (patch,) * sizes.depth
        self._native_positions = positions_of(self.network)
        self._native_grid = self.network.arch.grid
        self.set_pixels(mean, std)

    def prepare(self, image_size: int | Sequence[int]) -> tuple[int, int]:
        """The mask grid (h, w) of images of this size, for which the positions are fitted.

        Raises:
            ValueError: the mask cells do not divide the size; the message names the nearest sizes that they do.
        """
        height, width = (image_size, image_size) if isinstance(image_size, int) else image_size
        grid = grid_of((height, width), self.cell)
        network = self.network
        network.arch = replace(network.arch, image_size=(height, width))
        set_positions(network, self._native_positions, self._native_grid, network.arch.grid)
        return grid

    def give_pixels(self) -> bool:
        """Let MAE's own head predict pixels from now on (``StudentOutput.pixels``), and train it; True.

        An objective that wants pixels calls this when it is prepared.
        """
        self._gives_pixels = True
        self.network.decoder_norm.requires_grad_(True)
        self.network.decoder_pred.requires_grad_(True)
        return True

    def forward(self, images: Tensor, visible: Tensor | None = None, num_cells: int | None = None) -> StudentOutput:
        """Encode the visible patches and decode the whole image.

        Args:
            images: (B, 3, H, W) in [0, 1] or uint8, RGB, of the prepared size.
            visible: bool (B, H/cell, W/cell), True = visible, as many in every image; None: everything.
            num_cells: True entries of ``visible`` where known, see :class:`hgkd.sparse.CellLayout`.

        Raises:
            ValueError: another image size or mask shape, or different numbers of visible cells.
        """
        images = to_unit_range(images)
        self._check_size(images)
        network = self.network
        grid = (images.shape[2] // self.cell, images.shape[3] // self.cell)
        layout = CellLayout(self.visible_of(images, visible, grid), self.cell, num_cells=num_cells)
        ids_keep = ids_keep_of_cells(layout, network.arch.patch_size, counted=num_cells is None)
        side = self.cell // network.arch.patch_size
        x = network.embed(self.normalise(images), ids_keep)
        features = []
        for block in network.blocks:
            x = block(x)
            tiles = x[:, 1:].reshape(layout.num_cells, side, side, x.shape[2]).permute(0, 3, 1, 2)
            features.append(PackedTensor.wrap(tiles, layout))
        hidden = network.decode(network.norm(x), ids_keep)
        decoded = hidden[:, 1:].transpose(1, 2).unflatten(2, network.arch.grid)
        pixels = None
        if self._gives_pixels:
            pixels = unpatchify(network.pixels_of(hidden), network.arch.patch_size, network.arch.grid)
        return StudentOutput(
            decoded=decoded,
            features=list(features),
            layout=layout,
            images=images,
            pyramid={self.out_stride: decoded},
            pixels=pixels,
        )

    def dense_features(self, images: Tensor) -> list[Tensor]:
        """The encoder's output after its norm, of whole images (B, 3, H, W) in [0, 1]: one map (B, D, gh, gw)."""
        self._check_size(images)
        tokens = self.network.encode(self.normalise(images))[:, 1:]
        return [tokens.transpose(1, 2).unflatten(2, self.network.arch.grid)]

    def pooled(self, images: Tensor) -> Tensor:
        """Mean patch token of the whole image, after the norm: (B, 3, H, W) in [0, 1] -> (B, D)."""
        return self.dense_features(images)[-1].mean(dim=(2, 3))

    def description(self) -> dict[str, Any]:
        """Description of this student for checkpoints, which read as a MAE, for evaluation and as a teacher."""
        return {"mae": asdict(self.network.arch), "pixels": self.pixel_values()}

    def _check_size(self, images: Tensor) -> None:
        size = self.network.arch.image_size
        if tuple(images.shape[-2:]) != size:
            raise InvalidValueError(
                "images-of-another-size",
                f"the images are {images.shape[-2]} x {images.shape[-1]} pixels, this ViT is prepared for "
                f"{size[0]} x {size[1]}; call prepare(image_size) first",
            )

    def _start_from(self, checkpoint: str | Path) -> Mapping[str, Any]:
        """Load a MAE file; returns the pixel statistics that it notes, may be empty."""
        own = self.network.arch
        found, weights, noted = read_mae(checkpoint, own.num_heads, own.decoder_num_heads)
        heads = ("num_heads", "decoder_num_heads") if found.decoder_depth else ("num_heads",)  # which no shape tells
        for size in ("embed_dim", "depth", "patch_size", "in_chans", *heads):
            there, here = getattr(found, size), getattr(own, size)
            if there != here:
                raise InvalidValueError(
                    "student-arch-differs",
                    f"{checkpoint} has {size} {there}, the student {here}; give the student the file's arch",
                )
        decoder = ("decoder_", "mask_token")
        self.network.arch = replace(own, image_size=found.image_size)
        set_positions(self.network, positions_of(self.network), own.grid, found.grid)
        load_strict(self.network, weights, source=str(checkpoint), ignore_missing=() if found.decoder_depth else decoder)
        return noted


def ids_keep_of_cells(layout: CellLayout, patch_size: int, counted: bool = True) -> Tensor:
    """Visible patches of each image, cell by cell and row by row in a cell, int64 (B, n).

    Args:
        counted: the number of cells was counted, so that the device was waited for; it may be so once more.

    Raises:
        ValueError: the images have different numbers of visible cells. Where nothing was counted, a GPU ends the process.
    """
    counts = layout.cells_per_image
    equal = (counts == layout.num_cells // layout.batch).all()
    require(
        equal.cpu() if counted else equal,
        lambda: InvalidValueError(
            "visible-counts-differ",
            f"a ViT student needs as many visible cells in every image, got {int(counts.min())} to {int(counts.max())}; "
            "use a mask generator with a fixed number",
        ),
    )
    (h, w), side = layout.grid, layout.cell // patch_size
    patches = torch.arange(h * w * side * side, device=layout.device).view(h, side, w, side)
    by_cell = patches.permute(0, 2, 1, 3).reshape(h * w, side * side)
    return by_cell[layout.cell_in_image].view(layout.batch, -1)
