"""The ViT student against MAE's network, its masks, its files and what it refuses."""

from typing import Any

import pytest
import torch
from refusals import refused
from torch import Tensor

from hgkd.distillers import MAEPretraining, MaskedDistiller
from hgkd.networks.mae import MaskedAutoencoder, mae_loss, make_arch, pixel_target, save_mae, unpatchify
from hgkd.networks.positions import sincos_positions
from hgkd.objectives import PixelReconstruction, Setup
from hgkd.registry import MODELS
from hgkd.sparse import CellLayout
from hgkd.students import MaskedViT
from hgkd.students.vit import ids_keep_of_cells
from hgkd.teachers import MAETeacher

ARCH: dict[str, Any] = {
    "embed_dim": 16,
    "depth": 2,
    "num_heads": 2,
    "decoder_embed_dim": 24,
    "decoder_depth": 2,
    "decoder_num_heads": 2,
    "patch_size": 8,
}
# 4 x 4 patches, 5 visible ones in each of two images
VISIBLE = torch.zeros(2, 16, dtype=torch.bool)
VISIBLE[0, [0, 3, 7, 8, 14]] = True
VISIBLE[1, [1, 2, 5, 11, 15]] = True
VISIBLE = VISIBLE.view(2, 4, 4)


def make(size: int | tuple[int, int] = 32, **options: Any) -> MaskedViT:
    student = MaskedViT(ARCH, **options)
    student.prepare(size)
    for name, p in student.network.named_parameters():  # biases and norms that are 0 and 1 hide errors
        if "pos_embed" not in name:
            p.data += 0.1 * torch.randn_like(p)
    return student


def ids_keep(visible: Tensor) -> Tensor:
    return visible.flatten(1).nonzero()[:, 1].view(len(visible), -1)


def test_it_is_the_mae_network() -> None:
    student, images = make(), torch.rand(2, 3, 32, 32)
    out = student(images, VISIBLE)
    network, x = student.network, student.normalise(images)
    hidden = network.decode(network.encode(x, ids_keep(VISIBLE)), ids_keep(VISIBLE))
    torch.testing.assert_close(out.decoded.flatten(2).transpose(1, 2), hidden[:, 1:])
    # block outputs lie where their patches are, and 0 elsewhere
    tokens = network.embed(x, ids_keep(VISIBLE))
    for block, feature in zip(network.blocks, out.features, strict=True):
        tokens = block(tokens)
        dense = feature.to_dense().flatten(2).transpose(1, 2)
        torch.testing.assert_close(dense[VISIBLE.flatten(1)], tokens[:, 1:].flatten(0, 1))
        assert not dense[~VISIBLE.flatten(1)].any()
        assert feature.stride == 8
    assert len(out.features) == len(student.feature_channels) == 2


def test_hidden_pixels_change_nothing() -> None:
    student, images = make(), torch.rand(2, 3, 32, 32)
    shown = VISIBLE.repeat_interleave(8, 1).repeat_interleave(8, 2)[:, None]
    other = torch.where(shown, images, torch.rand_like(images))
    torch.testing.assert_close(student(other, VISIBLE).decoded, student(images, VISIBLE).decoded, rtol=0, atol=0)


def test_cells_of_several_patches_are_their_patches() -> None:
    student = make()
    cells = torch.tensor([[[True, False], [False, True]], [[False, True], [True, False]]])
    patches = cells.repeat_interleave(2, 1).repeat_interleave(2, 2)
    images = torch.rand(2, 3, 32, 32)
    fine = student(images, patches)
    student.cell = 16
    coarse = student(images, cells)
    torch.testing.assert_close(coarse.decoded, fine.decoded)
    for a, b in zip(coarse.features, fine.features, strict=True):
        torch.testing.assert_close(a.to_dense(), b.to_dense())
        assert a.shape == (4, 16, 2, 2)


def test_kept_patches_by_hand() -> None:
    layout = CellLayout(torch.tensor([[[False, True], [False, True]]]), 16)
    assert ids_keep_of_cells(layout, 8).tolist() == [[2, 3, 6, 7, 10, 11, 14, 15]]


def test_no_mask_is_everything_visible() -> None:
    student, images = make(), torch.rand(2, 3, 32, 32)
    everything = student(images)
    torch.testing.assert_close(everything.decoded, student(images, torch.ones(2, 4, 4, dtype=torch.bool)).decoded)
    normed = student.network.norm(everything.features[-1].to_dense().flatten(2).transpose(1, 2))
    torch.testing.assert_close(student.dense_features(images)[-1].flatten(2).transpose(1, 2), normed)
    torch.testing.assert_close(student.pooled(images), normed.mean(1))


def test_pixels_with_plain_images_are_maes_own_loss() -> None:
    student = make(mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))
    objective = PixelReconstruction()
    objective.prepare(Setup(student, None, None, (4, 4)))
    images = torch.rand(2, 3, 32, 32)
    out = student(images, VISIBLE)
    network = student.network
    predicted = network.predict_pixels(network.encode(images, ids_keep(VISIBLE)), ids_keep(VISIBLE))
    expected = mae_loss(predicted, pixel_target(images, 8, True), VISIBLE.flatten(1))
    torch.testing.assert_close(objective(out, None, out.layout)["reconstruction"], expected)
    assert not list(objective.parameters())


def test_patches_come_back_to_their_places() -> None:
    images = torch.rand(2, 3, 16, 24)
    torch.testing.assert_close(unpatchify(pixel_target(images, 8, False), 8, (2, 3)), images)


def test_its_pixel_head_trains_only_when_asked_for() -> None:
    student = make()
    head = ("decoder_norm", "decoder_pred")
    assert {n for n, p in student.network.named_parameters() if not p.requires_grad and "pos_embed" not in n} == {
        f"{name}.{kind}" for name in head for kind in ("weight", "bias")
    }
    assert student(torch.rand(2, 3, 32, 32), VISIBLE).pixels is None
    student.give_pixels()
    assert student(torch.rand(2, 3, 32, 32), VISIBLE).pixels.shape == (2, 3, 32, 32)
    student(torch.rand(2, 3, 32, 32), VISIBLE).pixels.sum().backward()
    assert not [n for n, p in student.named_parameters() if p.requires_grad and p.grad is None]


@pytest.mark.parametrize(("arch", "width", "heads"), [("tiny", 192, 3), ("small", 384, 6), ("base", 768, 12)])
def test_named_sizes(arch: str, width: int, heads: int) -> None:
    with torch.device("meta"):
        student = MaskedViT(arch)
    assert student.feature_channels == (width,) * 12
    assert student.network.arch.num_heads == heads
    assert student.cell == student.out_stride == 16


@pytest.mark.parametrize("size", [(16, 40), (64, 64)])
def test_positions_follow_the_image_size(size: tuple[int, int]) -> None:
    student = make(size)
    grid = (size[0] // 8, size[1] // 8)
    torch.testing.assert_close(student.network.pos_embed.data, sincos_positions(16, grid))
    torch.testing.assert_close(student.network.decoder_pos_embed.data, sincos_positions(24, grid))
    assert student(torch.rand(1, 3, *size)).decoded.shape == (1, 24, *grid)


def distiller(**student: Any) -> MaskedDistiller:
    return MaskedDistiller(
        student=dict(type="MaskedViT", arch=ARCH, **student),
        objectives=dict(pixels=dict(type="PixelReconstruction")),
        mask=dict(type="RandomMask", mask_ratio=0.5),
        image_size=32,
    )


def test_a_checkpoint_of_a_student_serves_as_a_mae(tmp_path) -> None:
    model = distiller()
    assert set(model.meta()) == {"mae", "pixels", "format"}
    path = tmp_path / "epoch_1.pth"
    torch.save({"state_dict": model.state_dict(), "meta": {"hgkd": model.meta()}}, path)
    teacher = MAETeacher(path)
    assert teacher.info.kind == "mae"
    assert {k: v.tolist() for k, v in teacher.network.state_dict().items()} == {
        k: v.tolist() for k, v in model.student.network.state_dict().items()
    }


def test_it_starts_from_a_mae_file(tmp_path) -> None:
    pretrained = MAEPretraining(ARCH, 64, patch_size=8)
    file = pretrained.save_teacher(tmp_path / "mae.safetensors")
    student = MaskedViT(ARCH, checkpoint=file)
    student.prepare(32)
    own, theirs = student.network.state_dict(), pretrained.network.state_dict()
    assert all(torch.equal(own[k], theirs[k]) for k in own if "pos_embed" not in k)
    weights = {k: v for k, v in theirs.items() if not k.startswith(("decoder", "mask_token"))}
    torch.save(weights, tmp_path / "encoder.pth")
    half = MaskedViT(ARCH, checkpoint=tmp_path / "encoder.pth").network.state_dict()
    assert all(torch.equal(half[k], weights[k]) for k in weights)
    assert not torch.equal(half["decoder_embed.weight"], theirs["decoder_embed.weight"])


PIXELS = dict(mean=[0.25, 0.5, 0.125], std=[0.5, 0.25, 0.375])


def test_it_takes_the_pixels_of_the_file_and_hands_them_on(tmp_path) -> None:
    file = MAEPretraining(ARCH, 32, patch_size=8, **PIXELS).save_teacher(tmp_path / "mae.safetensors")
    student = MaskedViT(ARCH, checkpoint=file)
    student.prepare(32)
    images = torch.rand(2, 3, 32, 32)
    assert student.pixel_values() == student.description()["pixels"] == PIXELS
    teacher = MAETeacher(file)
    teacher.prepare((4, 4), 8)
    expected = teacher.network.encode(teacher.normalise(images))[:, 1:]
    torch.testing.assert_close(student.dense_features(images)[0].flatten(2).transpose(1, 2), expected)
    # the next one starts from this one's checkpoint
    model = distiller(checkpoint=str(file))
    torch.save({"state_dict": model.state_dict(), "meta": {"hgkd": model.meta()}}, tmp_path / "epoch_1.pth")
    assert MaskedViT(ARCH, checkpoint=tmp_path / "epoch_1.pth").pixel_values() == PIXELS
    assert MaskedViT(ARCH, checkpoint=file, **PIXELS).pixel_values() == PIXELS
    with refused(ValueError, "pixels-differ", "mae.safetensors", "0.485", "model.student.mean and std"):
        MaskedViT(ARCH, checkpoint=file, mean=(0.485, 0.456, 0.406))


def test_heads_are_those_of_the_file(tmp_path) -> None:
    """No shape tells them: the weights would fit, and give other features."""
    file = MAEPretraining({**ARCH, "num_heads": 1}, 32, patch_size=8).save_teacher(tmp_path / "heads.safetensors")
    with refused(ValueError, "student-arch-differs", "num_heads", "1", "2"):
        MaskedViT(ARCH, checkpoint=file)
    file = MAEPretraining({**ARCH, "decoder_num_heads": 3}, 32, patch_size=8).save_teacher(tmp_path / "decoder.safetensors")
    with refused(ValueError, "student-arch-differs", "decoder_num_heads", "3", "2"):
        MaskedViT(ARCH, checkpoint=file)
    encoder = MaskedAutoencoder(make_arch({**ARCH, "decoder_depth": 0, "decoder_num_heads": 3, "image_size": (32, 32)}))
    MaskedViT(ARCH, checkpoint=save_mae(encoder, tmp_path / "encoder.safetensors"))  # has no decoder


def test_it_is_registered() -> None:
    assert isinstance(MODELS.build(dict(type="MaskedViT", arch=ARCH)), MaskedViT)


@pytest.mark.parametrize(
    ("options", "refusal"),
    [
        (dict(arch="tinny"), ("mae-arch-unknown", "tinny", "tiny")),
        (dict(arch={**ARCH, "decoder_depth": 0}), ("decoder-missing",)),
        (dict(arch=ARCH, cell=12), ("cell-no-multiple-of-patch", "12", "patch_size", "8")),
    ],
)
def test_refusals(options: dict[str, Any], refusal: tuple[Any, ...]) -> None:
    with refused(ValueError, *refusal):
        MaskedViT(**options)


def test_refusals_of_inputs(tmp_path) -> None:
    student = make()
    with refused(ValueError, "images-of-another-size", "24 x 32", "32 x 32"):
        student(torch.rand(1, 3, 24, 32))
    with refused(ValueError, "visible-shape", "(1, 2, 2)"):
        student(torch.rand(1, 3, 32, 32), torch.ones(1, 2, 2, dtype=torch.bool))
    uneven = VISIBLE.clone()
    uneven[0, 0, 0] = False
    with refused(ValueError, "visible-counts-differ", "4", "5"):
        student(torch.rand(2, 3, 32, 32), uneven)
    with refused(ValueError, "image-size-not-divided", "32 x 32", "40 x 40"):
        student.prepare(36)
    file = MAEPretraining({**ARCH, "depth": 3}, 32, patch_size=8).save_teacher(tmp_path / "mae.safetensors")
    with refused(ValueError, "student-arch-differs", "depth", "3", "2"):
        MaskedViT(ARCH, checkpoint=file)
