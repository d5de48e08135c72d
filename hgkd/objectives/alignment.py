"""Alignment of a student's feature map with a teacher's: grid, channels, block indices."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

import torch.nn.functional as F
from torch import Tensor, nn

from hgkd.errors import InvalidTypeError, InvalidValueError
from hgkd.structures import StudentOutput, TeacherInfo, TeacherOutput

if TYPE_CHECKING:
    from hgkd.sparse import CellLayout

PROJECTORS = ("linear", "mlp", "mlp2")


class DecodingStudent(Protocol):
    """Protocol of a student, as far as objectives read it.

    Attributes:
        decoded_channels, out_stride: channels of its decoder's output, image pixels per position there.
        pyramid_channels: stride -> channels, of every scale of the decoder.
        feature_channels, feature_strides: of the encoder's levels, or of a ViT's blocks.
        cell: pixels per mask cell.
        in_chans: channels of its images.
        mean, std: of its pixels in [0, 1], (1, in_chans, 1, 1).
    """

    decoded_channels: int
    out_stride: int
    pyramid_channels: dict[int, int]
    feature_channels: tuple[int, ...]
    feature_strides: tuple[int, ...]
    cell: int
    mean: Tensor
    std: Tensor

    @property
    def in_chans(self) -> int: ...

    def give_pixels(self) -> bool:
        """Whether the student predicts pixels itself from now on."""
        ...


def decoder_channels(student: DecodingStudent, stride: int | None) -> int:
    """Channels of the decoder at a scale; None: of its output.

    Raises:
        ValueError: the decoder does not pass that scale; the message names those that it does.
    """
    if stride is None:
        return student.decoded_channels
    if stride not in student.pyramid_channels:
        scales = ", ".join(map(str, student.pyramid_channels))
        raise InvalidValueError(
            "stride-not-in-decoder", f"stride {stride} is no scale of the student's decoder, which has the strides {scales}"
        )
    return student.pyramid_channels[stride]


def decoder_map(student_out: StudentOutput, stride: int | None) -> Tensor:
    """The decoder's map at a scale, or its output."""
    return student_out.decoded if stride is None else student_out.pyramid[stride]


def resolve_level(
    level: int | None, student: DecodingStudent, teacher_grid: tuple[int, int], mask_grid: tuple[int, int]
) -> int:
    """The index of the encoder level (of a ViT: the block) that is compared with a teacher's tokens.

    A level fits when its grid is the teacher's or a whole multiple, so that no position mixes visible and hidden ones.

    Args:
        level: negative counts from the end; None: the coarsest that fits.

    Raises:
        ValueError: out of range, too coarse, or none fits; the message names those that do.
    """
    sides = [student.cell // stride for stride in student.feature_strides]
    ratio = teacher_grid[0] // mask_grid[0]  # teacher tokens along a cell's side
    fitting = [i for i, side in enumerate(sides) if side % ratio == 0]
    known = ", ".join(f"{i} (stride {student.feature_strides[i]})" for i in fitting) or "none"
    if level is None:
        if not fitting:
            raise InvalidValueError(
                "student-too-coarse",
                f"no level of the student is as fine as the teacher's {teacher_grid[0]} x {teacher_grid[1]} tokens; "
                f"strides {student.feature_strides}, cells of {student.cell} px with {ratio} tokens a side",
            )
        return fitting[-1]
    count = len(sides)
    if not -count <= level < count:
        raise InvalidValueError(
            "student-level-out-of-range",
            f"student level {level} is out of range: the student has {count} levels, those that fit: {known}",
        )
    if level % count not in fitting:
        raise InvalidValueError(
            "student-level-no-multiple",
            f"student level {level} (stride {student.feature_strides[level]}) is no whole multiple of the teacher's "
            f"{teacher_grid[0]} x {teacher_grid[1]} tokens; levels that fit: {known}",
        )
    return level % count


def encoder_map(student_out: StudentOutput, level: int, grid: tuple[int, int]) -> Tensor:
    """An encoder level on the teacher's grid, (B, C, gh, gw), 0 at hidden positions."""
    return fit_grid(student_out.features[level].to_dense(0.0), grid)


def positions_count(layout: CellLayout, cells: int, grid: tuple[int, int]) -> int:
    """Number of positions on a grid that ``cells`` mask cells cover."""
    return cells * (grid[0] // layout.grid[0]) * (grid[1] // layout.grid[1])


def block_tokens(teacher_out: TeacherOutput, block: int) -> Tensor:
    """A block's tokens (B, D, gh, gw); ValueError when the teacher did not compute them."""
    if block not in teacher_out.tokens:
        raise InvalidValueError(
            "teacher-block-not-returned",
            f"the teacher returned blocks {sorted(teacher_out.tokens)}, not {block}; pass it this objective's `needs`",
        )
    return teacher_out.tokens[block]


def decoder_state(teacher_out: TeacherOutput) -> Tensor:
    """The decoder's hidden state (B, D', gh, gw); ValueError when the teacher did not compute it."""
    if teacher_out.decoded is None:
        raise InvalidValueError(
            "decoder-state-not-returned", "the teacher returned no decoder state; pass it this objective's `needs`"
        )
    return teacher_out.decoded


def fit_grid(feature: Tensor, grid: tuple[int, int]) -> Tensor:
    """A map (B, C, H, W) on another grid, (B, C, gh, gw).

    Averages the positions that fall together when (H, W) is a whole multiple of the grid, else interpolates bilinearly.
    """
    height, width = feature.shape[-2:]
    if (height, width) == grid:
        return feature
    if height % grid[0] == 0 and width % grid[1] == 0:
        return F.avg_pool2d(feature, (height // grid[0], width // grid[1]))
    return F.interpolate(feature, size=grid, mode="bilinear", align_corners=False)


def build_projector(kind: str, in_channels: int, out_channels: int) -> nn.Module:
    """A position-wise map of channels.

    Args:
        kind: 'linear' (one 1x1 convolution), 'mlp' (1x1, GELU, 1x1, as wide as its output) or 'mlp2' (two of these, one after
            the other): the kinds that DMAE's code calls fc-1layer, mlp-1layer and mlp-2layer.
    """
    if kind == "linear":
        return nn.Conv2d(in_channels, out_channels, 1)
    if kind == "mlp":
        return nn.Sequential(nn.Conv2d(in_channels, out_channels, 1), nn.GELU(), nn.Conv2d(out_channels, out_channels, 1))
    if kind == "mlp2":
        return nn.Sequential(*(build_projector("mlp", c, out_channels) for c in (in_channels, out_channels)))
    raise InvalidValueError("projector-unknown", f"projector must be one of {', '.join(map(repr, PROJECTORS))}, got {kind!r}")


def require_teacher(
    objective: object, info: TeacherInfo | None, grid: tuple[int, int] | None
) -> tuple[TeacherInfo, tuple[int, int]]:
    """The teacher's description and grid; ValueError when the distiller has no teacher."""
    if info is None or grid is None:
        raise InvalidValueError(
            "objective-without-teacher", f"{type(objective).__name__} needs a teacher; give the distiller one"
        )
    return info, (int(grid[0]), int(grid[1]))


def resolve_block(block: int, depth: int, what: str = "block") -> int:
    """The index in [0, depth) of a block; negative ones count from the end (-1 = last).

    Raises:
        TypeError: no whole number.
        ValueError: out of range; the message names the depth.
    """
    if isinstance(block, bool) or not isinstance(block, int):
        raise InvalidTypeError(
            "teacher-block-not-whole",
            f"{what}={block!r} is no block of the teacher, which has {what}s 0 .. {depth - 1}; give a whole number, -1 for the "
            "last",
        )
    if not -depth <= block < depth:
        raise InvalidValueError(
            "teacher-block-out-of-range",
            f"{what} {block} is out of range: the teacher has depth {depth}, so {what} is in [0, {depth - 1}] "
            f"or, counted from the end, in [-{depth}, -1]",
        )
    return block % depth
