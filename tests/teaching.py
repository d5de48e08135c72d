"""Small students and teachers' outputs that the tests of objectives share."""

from typing import Any

import torch
from torch import Tensor, nn

from hgkd.sparse import CellLayout
from hgkd.structures import StudentOutput, TeacherInfo, TeacherOutput
from hgkd.students import MaskedViT, SparseUNet

INFO = TeacherInfo("mae", width=12, depth=4, patch_size=16, decoder_width=10, decoder_depth=4)
ENCODER_ONLY = TeacherInfo("mae-encoder", width=12, depth=4, patch_size=16)
GRID = (4, 4)  # 64-pixel images
# two of four 32-pixel cells are visible
CELLS = torch.tensor([[[True, False], [False, True]], [[False, True], [False, True]]])
ARCH: dict[str, Any] = {
    "embed_dim": 16,
    "depth": 3,
    "num_heads": 2,
    "decoder_embed_dim": 16,
    "decoder_depth": 1,
    "decoder_num_heads": 2,
}


def make_student(kind: str) -> nn.Module:
    """'vit' or 'cnn', for 64-pixel images with 2 x 2 cells."""
    student = MaskedViT(ARCH, cell=32) if kind == "vit" else SparseUNet("test_resnet", decoder_width=16, min_decoder_width=8)
    assert student.prepare(64) == (2, 2)
    return student


def run(student: nn.Module) -> tuple[StudentOutput, CellLayout]:
    out = student(torch.rand(2, 3, 64, 64), CELLS)
    return out, out.layout


def teacher_out(blocks: tuple[int, ...] = (0, 1, 2, 3), visible_only: bool = False) -> TeacherOutput:
    shown = on_positions(CELLS)[:, None] if visible_only else 1.0
    tokens = {block: torch.randn(2, INFO.width, *GRID) * shown for block in blocks}
    return TeacherOutput(tokens, GRID, decoded=torch.randn(2, 10, *GRID))


def on_positions(cells: Tensor) -> Tensor:
    """Mask of cells (B, 2, 2) on the teacher's grid."""
    return cells.repeat_interleave(2, 1).repeat_interleave(2, 2)


def rows(feature: Tensor, positions: Tensor) -> Tensor:
    """(B, C, h, w) at the positions (B, h, w) -> (N, C)."""
    return feature.permute(0, 2, 3, 1)[positions]
