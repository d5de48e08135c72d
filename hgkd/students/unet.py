"""The student: a sparse encoder that sees the visible cells, densified level by level, and a light UNet decoder.

Design after SparK (arXiv 2301.03580; released code keyu-tian/SparK, MIT, read for facts only): norm over visible
positions, mask token at the others, projection to the decoder's width (1x1 at the coarsest level, 3x3 above), so tokens
reach visible cells through the 3x3 projection on purpose; decoder widths that halve from stage to stage.

What differs: the encoder computes visible cells only (``hgkd.sparse``); the decoder is of any depth (``out_stride``),
adds a level after up-sampling to its scale rather than before, and begins with a convolution block at the coarsest
scale, so that hidden positions learn of visible ones even when nothing is up-sampled; the coarsest projection is there
also when the widths agree; mask tokens and widths have no dependence on the image size. The norm before the mask token
is BatchNorm for every encoder, where SparK takes LayerNorm for ConvNeXt; the decoder's activation is ReLU for ReLU6, and
each stage ends with one, where SparK's ends with its norm; widths are halved by the up-sampling convolution, where SparK
keeps them there and halves them in the stage's second convolution.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from hgkd.errors import InvalidValueError, NoSparseRuleError
from hgkd.networks.backbones import trained_pixels
from hgkd.networks.encoder import build_encoder, encoder_features, encoder_levels, evaluating, freeze_unused
from hgkd.pixels import (
    PixelStatistics,
    check_in_chans,
    check_normalize,
    check_same_pixels,
    note_pixels,
    pixel_statistics,
    require_statistics,
    to_unit_range,
)
from hgkd.registry import MODELS
from hgkd.sparse import CellLayout, MaskedTensor, SparseTensor, sparsify
from hgkd.sparse.rectangle import uncrop, visible_crop
from hgkd.structures import StudentOutput
from hgkd.students.base import Student, check_decode
from hgkd.weights.identify import identify
from hgkd.weights.run_file import EncoderSpec

SKIPS = ("all", "last")
_SAME = 1e-3  # of the largest value: fp32 rounds by 1e-5 through a deep network


class Densify(nn.Module):
    """Sparse level -> dense map of the decoder's width.

    Args:
        in_channels: channels of the level.
        out_channels: channels of the result.
        kernel_size: of the projection, odd.
    """

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(in_channels)  # on a sparse tensor: statistics over the visible positions
        self.mask_token = nn.Parameter(torch.zeros(in_channels))
        self.projection = nn.Conv2d(in_channels, out_channels, kernel_size, padding=kernel_size // 2)
        nn.init.trunc_normal_(self.mask_token, std=0.02, a=-0.02, b=0.02)

    def forward(self, level: SparseTensor, cropped: bool = False) -> Tensor:
        """(B, C, h, w) sparse -> (B, C', h, w) dense, or the visible rectangles alone."""
        normed = cast(SparseTensor, self.norm(level))
        dense = visible_crop(normed) if cropped else normed.to_dense(fill=self.mask_token)
        if cropped or level.cells.all_visible:  # the token is unused: a zero gradient, as DDP waits for one
            dense = dense + 0.0 * self.mask_token.view(1, -1, 1, 1)
        projected: Tensor = self.projection(dense)
        return projected


class DecoderStage(nn.Module):
    """Two 3x3 convolutions with BatchNorm and ReLU, after optional up-sampling by 2 and addition of a level.

    Args:
        in_channels, out_channels: channels before and after.
        upsample: double the resolution first.
    """

    def __init__(self, in_channels: int, out_channels: int, upsample: bool = True) -> None:
        super().__init__()
        self.upsample = nn.ConvTranspose2d(in_channels, out_channels, 4, stride=2, padding=1) if upsample else None
        self.convolutions = nn.Sequential(
            nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False),
            nn.BatchNorm2d(out_channels),
            nn.ReLU(inplace=True),
            nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False),
            nn.BatchNorm2d(out_channels),
            nn.ReLU(inplace=True),
        )

    def forward(self, x: Tensor, level: Tensor | None = None) -> Tensor:
        """(B, C, h, w) [+ level (B, C', 2h, 2w)] -> (B, C', 2h, 2w), or h, w without up-sampling."""
        if self.upsample is not None:
            x = self.upsample(x)
        if level is not None:
            x = x + level
        decoded: Tensor = self.convolutions(x)
        return decoded


@MODELS.register_module()
class SparseUNet(Student):
    """A masked student made of any CNN of timm, of another library or of the user.

    Args:
        encoder: the network's name; see :func:`hgkd.students.build_encoder`.
        stem: 'default', or 'cifar' for ResNets on small images; see :func:`hgkd.students.build_encoder`.
        encoder_kwargs: further arguments of ``timm.create_model``, or of the other library's class.
        encoder_checkpoint: local weights to start the encoder from: a file, or a folder of an export. One of hgkd's says what
            pixels it was trained with.
        pretrained: start from timm's own pretrained weights.
        cell: side of a mask cell in pixels, a multiple of the encoder's total stride; None is the total stride itself.
        decoder_width: channels at the coarsest scale, halved at every further one.
        min_decoder_width: the halving stops here.
        out_stride: image pixels per position of the decoder's output; a power of two up to the total stride.
        skips: 'all' levels feed the decoder, or the 'last' only.
        backend, renormalize: of :func:`hgkd.sparse.sparsify`.
        in_chans: channels of the images; with ``pretrained`` timm spreads its weights of three over them.
        normalize: (mean, std) of the pixels in [0, 1], a number each for every channel; None: what the file of
            ``encoder_checkpoint`` was trained with, else what timm notes for the name, which is for three channels only.

    Attributes:
        encoder: the sparsified network; its ``state_dict`` is timm's own.
        encoder_spec: {'name', 'stem', 'kwargs'}, what :func:`build_encoder` needs to build it again; with ``normalize``, or
            where a file says others than timm, also 'pixels'.
        cell, out_stride: as above.
        decoded_channels: channels of the decoder's output.
        pyramid_channels: stride -> channels, of every scale of the decoder.
        feature_channels, feature_strides: of the encoder's levels, finest first.
        frozen: names of encoder parameters that no level of the decoder depends on; they do not train.

    Raises:
        ValueError: unknown names, no CNN, ``cell`` or ``out_stride`` that do not fit; the message says what would. Or
            ``normalize`` is not what the file was trained with.
        NoSparseRuleError: the network holds a layer that the sparse engine cannot mask.
    """

    takes_count = True
    takes_rectangle = True
    decodes_rectangles = True

    def __init__(
        self,
        encoder: str = "resnet18",
        stem: str = "default",
        encoder_kwargs: dict[str, Any] | None = None,
        encoder_checkpoint: str | Path | None = None,
        pretrained: bool = False,
        cell: int | None = None,
        decoder_width: int = 256,
        min_decoder_width: int = 32,
        out_stride: int = 16,
        skips: str = "all",
        backend: str = "gather",
        renormalize: bool = False,
        in_chans: int | None = None,
        normalize: Sequence[Sequence[float]] | None = None,
    ) -> None:
        super().__init__()
        if skips not in SKIPS:
            raise InvalidValueError("skips-unknown", f"skips must be one of {', '.join(map(repr, SKIPS))}, got {skips!r}")
        if not 1 <= min_decoder_width <= decoder_width:
            raise InvalidValueError(
                "decoder-widths",
                f"decoder widths must satisfy 1 <= min_decoder_width <= decoder_width, "
                f"got {min_decoder_width} and {decoder_width}",
            )
        kwargs = plain_values(encoder_kwargs or {})
        channels = check_in_chans(kwargs.get("in_chans", 3) if in_chans is None else in_chans, "model.student.in_chans")
        if kwargs.get("in_chans", channels) != channels:
            raise InvalidValueError(
                "channels-given-twice",
                f"in_chans={channels} and encoder_kwargs.in_chans={kwargs['in_chans']} of the student differ; set one of them",
            )
        where = "model.student.normalize"
        file = None if encoder_checkpoint is None else identify(encoder_checkpoint)
        of_file = None if file is None else trained_pixels(file)
        require_statistics(channels, normalize or of_file, where)
        kwargs |= {"in_chans": channels} if channels != 3 or "in_chans" in kwargs else {}
        pixels = None if normalize is None else check_normalize(normalize, where, channels)
        network = build_encoder(encoder, stem=stem, checkpoint=file, pretrained=pretrained, **kwargs)
        if of_file is not None:
            if pixels is not None:
                check_same_pixels(pixels, of_file, encoder_checkpoint, where)
            elif channels != 3 or of_file != pixel_statistics(network):  # what timm says of the name needs no note
                pixels = of_file
        self._levels = encoder_levels(network)
        total = self._levels[-1].stride
        if pixels is not None:
            note_pixels(network, pixels=pixels)
        noted = {} if pixels is None else {"pixels": [list(values) for values in pixels]}
        self.encoder_spec = {"name": encoder, "stem": stem, "kwargs": kwargs, **noted}
        self.cell = check_cell(total if cell is None else cell, total)
        self.out_stride = check_out_stride(out_stride, total)
        self.feature_channels = tuple(level.channels for level in self._levels)
        self.feature_strides = tuple(level.stride for level in self._levels)
        used = [level for level in self._levels if level.stride >= out_stride] if skips == "all" else self._levels[-1:]
        self.set_pixels(*pixel_statistics(network))
        self.renormalize = renormalize
        self.encoder = sparsify(network, self.cell, backend, renormalize)
        self._check_sparse()
        self.frozen = freeze_unused(self.encoder, used)

        strides = [total >> stage for stage in range(total.bit_length()) if total >> stage >= out_stride]
        widths = [max(min_decoder_width, decoder_width >> stage) for stage in range(len(strides))]
        self.decoded_channels = widths[-1]
        self.pyramid_channels = dict(zip(strides, widths, strict=True))
        self.densify = nn.ModuleDict(
            {
                str(level.stride): Densify(
                    level.channels, self.pyramid_channels[level.stride], 1 if level.stride == total else 3
                )
                for level in used
            }
        )
        before = [widths[0], *widths[:-1]]
        self.decoder = nn.ModuleDict(
            {
                str(stride): DecoderStage(before[stage], widths[stage], upsample=stage > 0)
                for stage, stride in enumerate(strides)
            }
        )
        for part in (self.densify, self.decoder):  # as the maps are that an encoder's levels make
            part.to(memory_format=torch.channels_last)

    def pixels_of(self, description: Mapping[str, Any]) -> PixelStatistics | None:
        """See :meth:`Student.pixels_of`; None also where neither it nor this student notes any: both take the network's own."""
        noted = any("pixels" in spec for spec in (description.get("encoder", {}), self.encoder_spec or {}))
        return EncoderSpec.parse(description, "the checkpoint").trained_pixels() if noted else None

    def restore_pixels(self, mean: Sequence[float], std: Sequence[float]) -> str | None:
        """See :meth:`hgkd.pixels.PixelNormalisation.restore_pixels`; checkpoints note them, too."""
        changed = super().restore_pixels(mean, std)
        if changed is not None:
            self.encoder_spec = {**(self.encoder_spec or {}), "pixels": [list(mean), list(std)]}
            note_pixels(self.encoder, pixels=(mean, std))
        return changed

    def forward(
        self,
        images: Tensor,
        visible: Tensor | None = None,
        num_cells: int | None = None,
        rectangle: tuple[int, int] | None = None,
        decode: str = "all",
    ) -> StudentOutput:
        """Encode the visible cells and decode the whole image, or its visible rectangle.

        Args:
            images: (B, C, H, W) in [0, 1] or uint8, of three channels RGB; H and W multiples of ``cell``.
            visible: bool (B, H/cell, W/cell), True = visible; None: everything.
            num_cells, rectangle: what is known of ``visible``, see :class:`hgkd.sparse.CellLayout`.
            decode: 'all' places, or the 'visible' ones alone, where every image shows one rectangle: the decoder then sees no
                mask tokens, costs as much as its crop does, and gives zeros at hidden places.

        Raises:
            ValueError: another size or mask than the student takes, an unknown ``decode``, or 'visible' with a mask without
                rectangles.
        """
        images = to_unit_range(images)
        grid = self.prepare(tuple(images.shape[-2:]))
        layout = CellLayout(self.visible_of(images, visible, grid), self.cell, self.renormalize, num_cells, rectangle)
        alone = layout.num_cells * (self.cell // self.feature_strides[-1]) ** 2 == 1
        if self.training and alone and any(type(level.norm) is nn.BatchNorm2d for level in self.densify.values()):
            raise InvalidValueError(
                "one-visible-cell",
                f"one visible cell in the whole batch ({images.shape[0]} image of {grid[0]} x {grid[1]} cells): BatchNorm "
                "needs two values to have a variance; raise batch_size, lower mask_ratio or enlarge image_size",
            )
        packed = cast(Any, self.encoder).pack(self.normalise(images), layout)
        features = cast("list[SparseTensor]", encoder_features(self.encoder, packed, self._levels))
        pyramid = self.decode(features, decode)
        decoded = pyramid[self.out_stride]
        return StudentOutput(decoded=decoded, features=features, layout=layout, images=images, pyramid=pyramid)

    def decode(self, features: Sequence[SparseTensor], places: str = "all") -> dict[int, Tensor]:
        """The encoder's sparse levels, finest first -> stride -> decoder map (B, C, H/stride, W/stride), coarsest first.

        Args:
            places: 'all' or 'visible', see :meth:`forward`.
        """
        cells = features[-1].cells
        cropped = check_decode(places) == "visible" and not cells.all_visible
        if cropped and cells.rectangle is None:
            raise InvalidValueError(
                "decode-without-rectangles",
                "decode='visible' needs masks that show one rectangle in each image, all of one size; on a GPU their size must "
                "be given (rectangle). Use RectangleMask, or decode='all'",
            )
        by_stride = dict(zip(map(str, self.feature_strides), features, strict=True))
        dense = {stride: densify(by_stride[stride], cropped) for stride, densify in self.densify.items()}
        stages = iter(self.decoder.items())
        stride, stage = next(stages)
        pyramid = {int(stride): stage(dense[stride])}
        decoded = pyramid[int(stride)]
        for stride, stage in stages:
            decoded = pyramid[int(stride)] = stage(decoded, dense.get(stride))
        return {stride: uncrop(decoded, cells) for stride, decoded in pyramid.items()} if cropped else pyramid

    def dense_features(self, images: Tensor) -> list[Tensor]:
        """The levels of whole images by the ordinary dense network, finest first; images (B, 3, H, W) in [0, 1]."""
        return encoder_features(self.encoder, self.normalise(images), self._levels)

    @torch.no_grad()
    def _check_sparse(self) -> None:
        """One tiny masked image through the encoder, so that a layer without a sparse rule is named here.

        Then the same image through the reference: what a layer reads off ``x.shape`` is a cell's in one, an image's in the
        other, and no rule can see that.
        """
        visible = torch.tensor([[[True, False], [False, True]]])
        side = 2 * self.cell
        image = torch.arange(self.in_chans * side * side).sin().view(1, self.in_chans, side, side)  # draws no random number
        with evaluating(self.encoder):
            packed = cast(Any, self.encoder).pack(image, visible)
            found = cast("list[SparseTensor]", encoder_features(self.encoder, packed, self._levels))
            wrong = None if isinstance(packed, MaskedTensor) else self._unlike_the_reference(image, packed, found)
        if wrong is not None:
            raise NoSparseRuleError(
                "layer-depends-on-shape",
                f"the encoder, masked: {wrong}. A layer that reads sizes off x.shape sees a cell, not the image. Take "
                "its mean as x.mean((2, 3), keepdim=True), or give it a rule (docs/reference/students.md, 'Your own layers')",
            )

    def _unlike_the_reference(self, image: Tensor, packed: SparseTensor, found: Sequence[SparseTensor]) -> str | None:
        """What tells ``found``, the levels of ``packed``, from those of the reference; None where they agree."""
        try:
            reference = MaskedTensor.pack(image, packed.cells)
            expected = cast("list[SparseTensor]", encoder_features(self.encoder, reference, self._levels))
        except (ValueError, RuntimeError) as error:
            return f"the reference (backend 'masked') refuses it: {error}"
        for level, features, wanted in zip(self._levels, found, expected, strict=True):
            right, apart = wanted.to_dense(), features.to_dense() - wanted.to_dense()
            same = apart.abs().max() <= _SAME * right.abs().max()  # never of NaN, as of 0 / 0 where hidden
            if not same:
                return f"its features of stride {level.stride} are not the reference's (backend 'masked')"
        return None


def plain_values(value: Any) -> Any:
    """A config's value in plain dictionaries and lists: files of hgkd hold nothing else."""
    if isinstance(value, Mapping):
        return {str(key): plain_values(inner) for key, inner in value.items()}
    return type(value)(map(plain_values, value)) if type(value) in (list, tuple) else value


def check_cell(cell: int, total_stride: int) -> int:
    """Return ``cell``, or raise ValueError when it is no multiple of the encoder's total stride."""
    if cell < 1 or cell % total_stride:
        low = max(total_stride, cell // total_stride * total_stride)
        near = " or ".join(map(str, dict.fromkeys((low, low + total_stride))))
        raise InvalidValueError(
            "cell-not-divided",
            f"cell {cell} is no multiple of the encoder's total stride {total_stride}; nearest that are: {near}",
        )
    return cell


def check_out_stride(out_stride: int, total_stride: int) -> int:
    """Return ``out_stride``, or raise ValueError when the decoder cannot end there."""
    allowed = [2**power for power in range(total_stride.bit_length())]
    if out_stride not in allowed:
        raise InvalidValueError(
            "out-stride-not-reached",
            f"out_stride {out_stride} cannot be reached from the encoder's total stride {total_stride}; "
            f"allowed: {', '.join(map(str, allowed))}",
        )
    return out_stride
