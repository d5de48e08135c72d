"""Trained and random teachers are told apart, and a run does not start with a random one."""

from pathlib import Path

import pytest
import timm
import torch
from refusals import refused
from teaching import ARCH

from hgkd.distillers import MAEPretraining, MaskedDistiller
from hgkd.errors import WeightsError
from hgkd.teachers import MAETeacher, TimmTeacher
from hgkd.teachers.health import _knn, feature_health, weight_health

SIZES = {"depth": 3, "embed_dim": 32, "num_heads": 2, "img_size": 64}


def with_directions(weights: dict[str, torch.Tensor], strength: float) -> dict[str, torch.Tensor]:
    """What training leaves in a matrix: one direction of the given size, in edges of the random spectrum."""
    out = dict(weights)
    for name, value in weights.items():
        if name.startswith("blocks.") and value.ndim == 2:
            rows, columns = (torch.nn.functional.normalize(torch.randn(n), dim=0) for n in value.shape)
            edge = value.std() * (value.shape[0] ** 0.5 + value.shape[1] ** 0.5)
            out[name] = value + strength * edge * torch.outer(rows, columns)
    return out


@pytest.mark.parametrize("width", [16, 32, 192])
def test_spectrum_of_random_and_of_trained_matrices(width: int) -> None:
    weights = timm.create_model("vit_tiny_patch16_224", embed_dim=width, num_heads=2, depth=2, num_classes=0).state_dict()
    assert 0.85 < weight_health(weights).spectrum < 1.0
    assert weight_health(weights).looks_random
    found = weight_health(with_directions(weights, 1.5))
    assert found.spectrum == pytest.approx(1.5, abs=0.2)
    assert not found.looks_random
    assert "looks trained: spectral score 1." in str(found)


def test_the_largest_singular_value_is_torchs() -> None:
    values = with_directions({"blocks.0.attn.qkv.weight": torch.randn(60, 20)}, 2.0)
    matrix = values["blocks.0.attn.qkv.weight"]
    matrix -= matrix.mean()
    expected = torch.linalg.svdvals(matrix)[0] / (matrix.std() * (60**0.5 + 20**0.5))
    assert weight_health(values).spectrum == pytest.approx(float(expected), rel=1e-3)


def test_broken_weights_look_random() -> None:
    for value in (torch.zeros(8, 8), torch.full((8, 8), torch.nan)):
        assert weight_health({"blocks.0.mlp.fc1.weight": value}).looks_random
    with refused(ValueError, "no-blocks-to-judge"):
        weight_health({"conv1.weight": torch.ones(2, 2)})


def distiller(file: Path, **teacher: bool) -> MaskedDistiller:
    return MaskedDistiller(
        student=dict(type="SparseUNet", encoder="test_resnet", decoder_width=16, min_decoder_width=8),
        objectives=dict(hgkd=dict(type="HGKD")),
        mask=dict(type="RandomMask", mask_ratio=0.5),
        image_size=64,
        teacher=dict(type="MAETeacher", checkpoint=str(file), **teacher),
    )


def test_a_run_does_not_start_with_a_random_teacher_unless_told(tmp_path: Path) -> None:
    pretraining = MAEPretraining(ARCH, 64)
    file = pretraining.save_teacher(tmp_path / "mae.safetensors")
    with refused(WeightsError, "teacher-looks-random", "mae.safetensors", "model.teacher.allow_random=True"):
        distiller(file)
    assert distiller(file, allow_random=True).teacher is not None
    pretraining.network.load_state_dict(with_directions(pretraining.network.state_dict(), 1.5))
    assert distiller(pretraining.save_teacher(file, overwrite=True)).teacher is not None
    assert MAETeacher(file).info.kind == "mae"


def test_features_against_those_of_a_random_network() -> None:
    teacher = TimmTeacher("vit_tiny_patch16_224", allow_random=True, **SIZES)
    with torch.no_grad():  # the patch embedding looks at colour only, the blocks do nothing: images of a class are alike
        for name, value in teacher.network.named_parameters():
            if name.startswith("blocks."):
                value.mul_(0.0 if name.endswith(("proj.weight", "fc2.weight")) else 1.0)
            elif name == "pos_embed":
                value.zero_()
        teacher.family.native_positions.zero_()
    teacher.prepare((2, 2), 16)
    labels = torch.arange(4).repeat(5)
    colours = torch.eye(4)[:, :3][labels].view(20, 3, 1, 1)
    images = (colours + 0.02 * torch.rand(20, 3, 32, 32)).clamp(0, 1)
    before = {k: v.clone() for k, v in teacher.network.state_dict().items()}
    found = feature_health(teacher, images, labels)
    assert found.knn == 100.0
    assert 1.0 <= found.random_rank <= 19.0
    assert 1.0 <= found.rank <= 5.0  # four colours, and a little noise
    assert "k-NN 100.0 % (random network" in str(found)
    assert all(torch.equal(v, before[k]) for k, v in teacher.network.state_dict().items())
    assert feature_health(teacher, images).knn is None


def test_knn_by_hand() -> None:
    features = torch.tensor([[1.0, 0.0], [0.9, 0.1], [0.0, 1.0], [0.1, 0.9]])
    assert _knn(features, torch.tensor([0, 0, 1, 1]), neighbours=1) == 100.0
    assert _knn(features, torch.tensor([0, 1, 0, 1]), neighbours=1) == 0.0


def test_blocks_that_fuse_their_matrices_are_judged_too() -> None:
    network = timm.create_model("vit_pwee_patch16_reg1_gap_256", num_classes=0)
    assert weight_health(network.state_dict()).looks_random
