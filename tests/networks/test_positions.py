"""Positions for another grid: fixed ones are computed, learned ones are resampled, whoever loads them."""

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from timm.layers import resample_abs_pos_embed
from torch import Tensor

from hgkd.networks import ImageClassifier
from hgkd.networks.mae import MaskedAutoencoder, make_arch
from hgkd.networks.positions import follow_sincos, positions_for, sincos_positions
from hgkd.structures import TeacherNeeds
from hgkd.students import MaskedViT
from hgkd.teachers import MAETeacher, TimmTeacher

NATIVE, PATCH, WIDTH = (4, 4), 16, 64
SIZES: dict[str, Any] = {"embed_dim": WIDTH, "depth": 2, "num_heads": 1}
ARCH: dict[str, Any] = {**SIZES, "patch_size": PATCH, "image_size": (64, 64), "decoder_depth": 0}
MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.2, 0.2)


def encoder(folder: Path, positions: Tensor) -> Path:
    torch.manual_seed(0)
    network = MaskedAutoencoder(make_arch(ARCH))
    network.pos_embed.data.copy_(positions)
    path = folder / "encoder.safetensors"
    save_file(network.state_dict(), path)
    return path


def learned() -> Tensor:
    return torch.randn(1, 1 + NATIVE[0] * NATIVE[1], WIDTH, generator=torch.Generator().manual_seed(0))


def resampled(positions: Tensor, grid: tuple[int, int], prefix: int = 1) -> Tensor:
    return resample_abs_pos_embed(positions, list(grid), list(NATIVE), num_prefix_tokens=prefix)


@pytest.mark.parametrize("grid", [(4, 4), (2, 3), (7, 6)])
@pytest.mark.parametrize("fixed", [True, False])
def test_a_mae_encoder_has_the_same_positions_and_tokens_as_either_teacher(
    grid: tuple[int, int], fixed: bool, tmp_path: Path
) -> None:
    positions = sincos_positions(WIDTH, NATIVE) if fixed else learned()
    file = encoder(tmp_path, positions)
    options: dict[str, Any] = {"checkpoint": file, "normalize": (MEAN, STD), "allow_random": True}
    teachers = [
        MAETeacher(**options),
        TimmTeacher("vit_tiny_patch16_224", img_size=64, **SIZES, **options),
    ]
    images, tokens = torch.rand(2, 3, grid[0] * PATCH, grid[1] * PATCH), []
    for teacher in teachers:
        teacher.prepare(grid, PATCH)
        tokens.append(teacher(images, None, TeacherNeeds((1,))).tokens[1])
    expected = positions if grid == NATIVE else sincos_positions(WIDTH, grid) if fixed else resampled(positions, grid)
    for teacher in teachers:
        torch.testing.assert_close(teacher.network.pos_embed.data, expected)
    torch.testing.assert_close(tokens[0], tokens[1])


def test_classifiers_and_students_fit_them_alike(tmp_path: Path) -> None:
    file = encoder(tmp_path, sincos_positions(WIDTH, NATIVE))
    classifier = ImageClassifier("vit_tiny_patch16_224", 3, (96, 32), backbone=file, **SIZES)
    torch.testing.assert_close(classifier.network.pos_embed.data, sincos_positions(WIDTH, (6, 2)))
    student = MaskedViT({**ARCH, "decoder_depth": 1, "decoder_embed_dim": 32, "decoder_num_heads": 1}, checkpoint=file)
    student.prepare((96, 32))
    torch.testing.assert_close(student.network.pos_embed.data, sincos_positions(WIDTH, (6, 2)))


def test_tokens_before_the_patches_keep_their_positions() -> None:
    patches = sincos_positions(WIDTH, NATIVE, class_token=False)
    before = torch.randn(1, 2, WIDTH)
    for prefix in (0, 2):
        positions = torch.cat([before[:, :prefix], patches], 1)
        fitted = positions_for((2, 5), positions, NATIVE, prefix)
        assert torch.equal(fitted[:, :prefix], before[:, :prefix])
        torch.testing.assert_close(fitted[:, prefix:], sincos_positions(WIDTH, (2, 5), class_token=False))


def test_fp16_files_are_recognised_and_near_ones_are_not() -> None:
    positions = sincos_positions(WIDTH, NATIVE)
    assert follow_sincos(positions.half(), NATIVE, 1)
    assert not follow_sincos(positions + 0.01, NATIVE, 1)
    assert not follow_sincos(positions, (2, 8), 1)
    assert not follow_sincos(torch.zeros(1, 17, 6), NATIVE, 1)


@settings(max_examples=20, deadline=None)
@given(st.tuples(st.integers(1, 9), st.integers(1, 9)), st.tuples(st.integers(1, 9), st.integers(1, 9)))
def test_there_and_back_is_where_fixed_positions_were(native: tuple[int, int], grid: tuple[int, int]) -> None:
    positions = sincos_positions(16, native)
    back = positions_for(native, positions_for(grid, positions, native, 1), grid, 1)
    assert torch.equal(back, positions)
