"""Base class of teachers: frozen, always in eval mode, own size and normalisation, no more blocks than asked for."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from mmengine.logging import print_log
from torch import Tensor, nn

from hgkd.errors import InvalidValueError, WeightsError
from hgkd.masking import expand, ids_keep_of
from hgkd.networks.vit import check_attention_is_read, patch_attention
from hgkd.pixels import PixelNormalisation, check_pixels, pixels_text
from hgkd.structures import Capabilities, TeacherInfo, TeacherNeeds, TeacherOutput
from hgkd.teachers.cache import function_digest, plain_settings, weights_digest
from hgkd.teachers.health import can_be_judged, check_outputs, weight_health

if TYPE_CHECKING:
    from typing_extensions import Self

# attributes that change no token, or that are told of by another part of a teacher's identity
_OF_EVERY_TEACHER = frozenset(vars(nn.Module())) | {
    *("_dtype_follows", "_proved", "grid", "input_size", "ratio"),
    *("allow_random", "has_class_token", "kind", "source"),
}
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def usual_precision(device: torch.device) -> torch.dtype:
    """Precision of a frozen teacher that nobody chose one for: bfloat16 on GPUs that multiply in it, else fp32.

    Its rounding is far below what a student leaves unexplained, and fp32 without TF32 is several times as dear there. Cards
    that only emulate it (below Ampere) gain nothing.
    """
    real = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.bfloat16 if real else torch.float32


class Teacher(PixelNormalisation):
    """Base of teachers; subclasses set ``info`` and ``network``, give the steps below and call :meth:`freeze`.

    Args:
        dtype: precision that the network computes in; outputs are fp32. None: :func:`usual_precision` of the device that the
            teacher is on.
        mean, std: of the pixels in [0, 1] that the network was trained with, RGB.

    Attributes:
        info: static facts.
        input_size: (H, W) that images are resized to; set by :meth:`prepare`.
        grid: (gh, gw) of the tokens; set by :meth:`prepare`.
        ratio: tokens along a mask cell's side; set by :meth:`prepare`.
        has_class_token: the first token is one.
        source: where the weights are from, for messages.
        allow_random: the user knows that the weights may be random.
    """

    info: TeacherInfo
    has_class_token = True
    source = "the teacher"
    allow_random = False
    network: Any

    def __init__(self, dtype: str | None, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        if dtype is not None and dtype not in DTYPES:
            raise InvalidValueError("dtype-unknown", f"dtype must be one of {', '.join(DTYPES)}, or None, got {dtype!r}")
        self._dtype_follows = dtype is None
        self.dtype = torch.float32 if dtype is None else DTYPES[dtype]
        self.set_pixels(*check_pixels(mean, std, "the teacher's normalize (model.teacher.normalize)", len(mean)))
        self.grid: tuple[int, int] | None = None
        self.input_size = (0, 0)
        self.ratio = 1
        self._proved = False  # its outputs on the first images were looked at

    # --- what a subclass gives --------------------------------------------------------------------------------------

    def _set_grid(self, grid: tuple[int, int]) -> None:
        """Fit the position embedding to a token grid; nothing by default, for networks without one."""

    def _forward(self, images: Tensor, ids_keep: Tensor | None, needs: TeacherNeeds) -> TeacherOutput:
        """Tokens of normalised images of ``input_size``.

        Args:
            ids_keep: int64 (B, n), the patches that the network sees, in ascending order; None: all of them.

        Returns:
            Tokens on the whole grid, 0 at patches that were not seen.
        """
        raise NotImplementedError

    def _before_block(self, images: Tensor, block: int) -> tuple[Tensor, nn.Module, int]:
        """All tokens of normalised whole images that enter a block, that block, and how many tokens are no patches.

        Without it the teacher gives no :meth:`attention`.
        """
        raise NotImplementedError

    def _patch_attention(self, images: Tensor, block: int) -> Tensor:
        """How much the class token of normalised whole images attends to each patch in a block, (B, N), fp32."""
        tokens, layer, prefix = self._before_block(images, block)
        return patch_attention(layer, tokens, prefix, self.has_class_token)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        super()._apply(fn, recurse)
        at = next(self.parameters(), None)
        if self._dtype_follows and at is not None and usual_precision(at.device) != self.dtype:
            self.dtype = usual_precision(at.device)
            self._set_precision()
        return self

    def _set_precision(self) -> None:
        for part in self.children():  # mean and std stay fp32
            part.to(self.dtype)

    # --- protocol ---------------------------------------------------------------------------------------------------

    def freeze(self) -> None:
        """No gradients, eval mode, the asked precision; a subclass calls it once its weights are in."""
        self.requires_grad_(False)
        self._set_precision()
        super().train(False)

    def train(self, mode: bool = True) -> Teacher:
        """A teacher stays in eval mode, whatever it is told."""
        return super().train(False)

    def check(self, needs: TeacherNeeds) -> None:
        """Refuse what this teacher cannot give.

        Raises:
            ValueError: a block out of range, a decoder that is not there, or visible patches alone where whole images are
                needed.
        """
        for block in needs.blocks:
            if not 0 <= block < self.info.depth:
                raise InvalidValueError(
                    "teacher-block-out-of-range",
                    f"teacher block {block} does not exist: this teacher has {self.info.depth} blocks, "
                    f"indices 0 to {self.info.depth - 1}",
                )
        if needs.visible_only and self.capabilities.no_dropping:
            raise InvalidValueError("teacher-sees-whole-images", self.capabilities.no_dropping)
        if needs.decoder_block is None:
            return
        self.require_decoder()
        if not 0 <= needs.decoder_block < self.info.decoder_depth:
            raise InvalidValueError(
                "decoder-block-out-of-range",
                f"decoder block {needs.decoder_block} does not exist: this teacher's decoder has "
                f"{self.info.decoder_depth} blocks, indices 0 to {self.info.decoder_depth - 1}",
            )

    @property
    def capabilities(self) -> Capabilities:
        """What this teacher can be asked for, and why not the rest."""
        attention = "" if self._has_attention() else f"{type(self).__name__} gives no attention; use a ViT teacher"
        blocks = getattr(self.network, "blocks", None)
        if not attention and blocks is not None and type(self)._before_block is not Teacher._before_block:
            try:
                check_attention_is_read(blocks[-1])
            except ValueError as error:
                attention = str(error)
        return Capabilities(
            class_token=self.has_class_token,
            registers=0,
            no_attention=attention,
            no_decoder="" if self.info.decoder_depth else self._no_decoder(),
        )

    def _has_attention(self) -> bool:
        """Whether a subclass gives attention in one of the ways that there are."""
        ways = ("_before_block", "_patch_attention", "attention")
        return any(getattr(type(self), way) is not getattr(Teacher, way) for way in ways)

    @property
    def gives_attention(self) -> bool:
        """Whether :meth:`attention` is there."""
        return self._has_attention()

    def check_attention(self) -> None:
        """Raise ValueError when :meth:`attention` cannot be had; the message says why."""
        if type(self).attention is Teacher.attention and self.capabilities.no_attention:  # else a subclass's own
            raise InvalidValueError("teacher-without-attention", self.capabilities.no_attention)

    def require_decoder(self) -> None:
        """Raise ValueError, naming the file and the one to use instead, when there is no decoder."""
        if self.info.decoder_depth == 0:
            raise InvalidValueError("teacher-without-decoder", self._no_decoder())

    def require_trained(self) -> None:
        """Raise WeightsError when the weights look random and nobody said that this is wanted.

        Only those of networks with attention blocks or ConvNeXt's under timm's names can be judged; others pass.
        """
        weights = {} if self.allow_random else self.network.state_dict()
        health = weight_health(weights) if can_be_judged(weights) else None
        if health is not None and health.looks_random:
            raise WeightsError(
                "teacher-looks-random",
                f"{self.source}: this teacher {health}. A student would learn noise from it. Look at the file with "
                "hgkd doctor teacher; when it is meant to be so, set model.teacher.allow_random=True",
            )

    def _no_decoder(self) -> str:
        return (
            f"a teacher of kind {self.info.kind!r} has no decoder, so it cannot infer hidden positions: the target 'inferred' "
            "and G2SD need a MAE teacher with its decoder; use HGKD with target='full', or MAETeacher with a full pretraining "
            "checkpoint"
        )

    def identity(self) -> dict[str, Any]:
        """What its tokens depend on beside images and input size, as plain values: a store of them is found by it."""
        own = plain_settings({key: value for key, value in vars(self).items() if key not in _OF_EVERY_TEACHER})
        return {
            "type": type(self).__qualname__,
            "weights": weights_digest(self),
            "function": function_digest(self.network),
            **asdict(self.info),
            **self.pixel_values(),
            **({"settings": own} if own else {}),  # of a class from elsewhere; without any, stores of before keep their names
        }

    def prepare(self, mask_grid: tuple[int, int], cell: int) -> tuple[int, int]:
        """Fix the input size so that the token grid is a whole multiple of the mask grid.

        Args:
            mask_grid: (h, w) cells.
            cell: side of a cell in student pixels. The number of tokens a cell side, max(1, round(cell / patch_size)),
                keeps the teacher's pixels about as large as the student's.

        Returns:
            (gh, gw), the token grid.
        """
        patch = self.info.patch_size
        self.ratio = max(1, round(cell / patch))
        self.grid = (mask_grid[0] * self.ratio, mask_grid[1] * self.ratio)
        self.input_size = (self.grid[0] * patch, self.grid[1] * patch)
        self._set_grid(self.grid)
        print_log(
            f"teacher ({self.info.kind}, {self.info.depth} blocks, width {self.info.width}): {self.grid[0]} x {self.grid[1]} "
            f"tokens of {patch} px, {self.ratio} a cell side, input {self.input_size[0]} x {self.input_size[1]}; "
            f"{pixels_text(self.mean, self.std)}",
            "current",
        )
        return self.grid

    @torch.no_grad()
    def forward(
        self,
        images: Tensor,
        visible: Tensor | None = None,
        needs: TeacherNeeds | None = None,
        cells_an_image: int | None = None,
    ) -> TeacherOutput:
        """The teacher's outputs for images.

        Args:
            images: (B, 3, H, W) in [0, 1], RGB, any size.
            visible: bool (B, h, w), True = visible; used with ``needs.visible_only``.
            needs: what to compute; default: the last block of whole images.
            cells_an_image: True entries of ``visible`` in every image, where known: the host then waits for nothing.

        Raises:
            RuntimeError: :meth:`prepare` was not called.
            ValueError: see :meth:`check`; ``visible_only`` without ``visible``.
            WeightsError: what it gives on the first images is not finite; the block is named.
        """
        if self.grid is None:
            raise RuntimeError("call teacher.prepare(mask_grid, cell) before the first forward")
        needs = needs or TeacherNeeds(blocks=(self.info.depth - 1,))
        self.check(needs)
        with torch.autocast(images.device.type, enabled=False):  # the teacher's own precision, whatever the student's is

            def see() -> TeacherOutput:
                return self._see(images, visible, needs, cells_an_image)

            out = see()
            if not self._proved:  # the first images of a run, so that a wrong teacher ends it before its first step
                given = (*out.tokens.values(), out.cls, out.decoded)
                check_outputs(self.network, given, see, self.source, self.dtype)
                self._proved = True
            return out

    def _see(self, images: Tensor, visible: Tensor | None, needs: TeacherNeeds, count: int | None) -> TeacherOutput:
        inputs = self._inputs(images)
        if not needs.visible_only:
            return self._forward(inputs, None, needs)
        if visible is None:
            raise InvalidValueError(
                "visible-missing", "needs.visible_only without a mask: pass visible (B, h, w), True = visible"
            )
        patches = self.patch_mask(visible)
        if count is not None:
            return self._forward(inputs, ids_keep_of(patches, count * self.ratio**2), needs)
        counts = patches.sum(1)
        if int(counts.min()) == int(counts.max()):
            return self._forward(inputs, ids_keep_of(patches), needs)
        # images with different numbers of visible cells: one pass for each number
        parts = []
        for count in counts.unique().tolist():
            members = (counts == count).nonzero().flatten()
            parts.append((members, self._forward(inputs[members], ids_keep_of(patches[members]), needs)))
        return _merge(parts, len(images))

    @torch.no_grad()
    def attention(self, images: Tensor, block: int = -1) -> Tensor:
        """How much the class token attends to each mask cell of whole images, mean over heads: (B, h, w), fp32.

        Without a class token, how much all tokens do.

        Args:
            images: (B, 3, H, W) in [0, 1].
            block: whose attention; negative counts from the end.
        """
        assert self.grid is not None
        self.check_attention()
        with torch.autocast(images.device.type, enabled=False):
            patches = self._patch_attention(self._inputs(images), block % self.info.depth)
        return F.avg_pool2d(patches.view(len(images), 1, *self.grid), self.ratio)[:, 0]

    def patch_mask(self, visible: Tensor) -> Tensor:
        """Visible patches of visible cells: bool (B, h, w) -> bool (B, gh*gw)."""
        assert self.grid is not None
        cells = (self.grid[0] // self.ratio, self.grid[1] // self.ratio)
        if tuple(visible.shape[1:]) != cells:
            raise InvalidValueError(
                "visible-shape", f"visible has shape {tuple(visible.shape)}, this teacher was prepared for {cells} cells"
            )
        return expand(visible, self.ratio).flatten(1)

    def _inputs(self, images: Tensor) -> Tensor:
        if tuple(images.shape[-2:]) != self.input_size:
            images = F.interpolate(images.float(), self.input_size, mode="bicubic", align_corners=False, antialias=True)
            images = images.clamp(0.0, 1.0)  # bicubic overshoots
        return self.normalise(images).to(self.dtype)

    def on_grid(self, tokens: Tensor, ids_keep: Tensor | None) -> Tensor:
        """(B, n, D) tokens of the kept patches -> fp32 (B, D, gh, gw), 0 elsewhere; without dropped ones a view in fp32."""
        assert self.grid is not None
        batch, _, width = tokens.shape
        tokens = tokens.float()
        if ids_keep is not None:
            full = tokens.new_zeros(batch, self.grid[0] * self.grid[1], width)
            tokens = full.scatter(1, ids_keep[:, :, None].expand_as(tokens), tokens)
        return tokens.transpose(1, 2).unflatten(2, self.grid)  # a view: channels_last, as objectives read it


def _merge(parts: list[tuple[Tensor, TeacherOutput]], batch: int) -> TeacherOutput:
    def join(values: list[Tensor]) -> Tensor:
        out = values[0].new_zeros(batch, *values[0].shape[1:])
        for (members, _), value in zip(parts, values, strict=True):
            out[members] = value
        return out

    first = parts[0][1]
    return TeacherOutput(
        tokens={block: join([out.tokens[block] for _, out in parts]) for block in first.tokens},
        grid=first.grid,
        cls=None if first.cls is None else join([out.cls for _, out in parts if out.cls is not None]),
        decoded=None if first.decoded is None else join([out.decoded for _, out in parts if out.decoded is not None]),
    )
