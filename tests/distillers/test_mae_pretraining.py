"""MAE's own pretraining: it learns, hides whole cells, and what it writes is a teacher."""

from pathlib import Path
from typing import Any

import pytest
import torch
from mmengine.optim import OptimWrapper
from refusals import refused

from hgkd.distillers.mae import MAEPretraining
from hgkd.registry import MODELS
from hgkd.structures import TeacherNeeds
from hgkd.teachers.mae import MAETeacher

ARCH = {
    "embed_dim": 64,
    "depth": 2,
    "num_heads": 2,
    "decoder_embed_dim": 32,
    "decoder_depth": 2,
    "decoder_num_heads": 2,
}


def _model(**kwargs: Any) -> MAEPretraining:
    return MAEPretraining(**{"arch": ARCH, "image_size": 32, "patch_size": 8, **kwargs})


def _images(count: int = 4) -> torch.Tensor:
    return torch.randint(0, 256, (count, 3, 32, 32), dtype=torch.uint8)


def test_loss_falls_on_a_fixed_batch_and_every_weight_takes_part() -> None:
    model = _model()
    ramp = torch.arange(32).view(1, 1, 1, 32) * 6 + torch.arange(4).view(4, 1, 1, 1) * 10
    batch = {"inputs": ramp.expand(4, 3, 32, 32).to(torch.uint8), "index": torch.arange(4)}
    wrapper = OptimWrapper(torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=3e-3))
    history = [model.train_step(batch, wrapper)["mae_loss"].item() for _ in range(40)]
    assert sum(history[-5:]) / 5 < 0.5 * history[0]
    model(batch["inputs"], mode="loss")["mae_loss"].backward()
    without = [name for name, p in model.named_parameters() if p.requires_grad and not bool(p.grad.abs().sum() > 0)]
    assert without == []
    assert {name for name, p in model.named_parameters() if not p.requires_grad} == {
        "network.pos_embed",
        "network.decoder_pos_embed",
    }


def test_state_holds_the_network_under_the_official_names_and_nothing_else() -> None:
    names = set(_model().state_dict())
    assert all(name.startswith("network.") for name in names)
    assert {"network.cls_token", "network.blocks.0.attn.qkv.weight", "network.decoder_pred.bias"} <= names


def test_whole_cells_are_hidden_and_the_count_is_truncated() -> None:
    model = _model(image_size=(32, 96), mask_cell=16, mask_ratio=0.6)  # 2 x 6 cells: 4.8 visible become 4
    seen = []
    encode = model.network.encode
    model.network.encode = lambda images, ids_keep: seen.append(ids_keep) or encode(images, ids_keep)
    model(torch.randint(0, 256, (2, 3, 32, 96), dtype=torch.uint8), mode="loss")
    (ids_keep,) = seen
    assert ids_keep.shape == (2, 4 * 4)
    for i in range(2):
        visible = torch.zeros(4 * 12, dtype=torch.bool)
        visible[ids_keep[i]] = True
        cells = visible.view(2, 2, 6, 2).sum((1, 3))
        assert set(cells.flatten().tolist()) == {0, 4}


@pytest.mark.parametrize("norm_pix", [True, False])
def test_the_loss_is_the_error_of_the_hidden_patches_pixels(norm_pix: bool) -> None:
    model = _model(norm_pix=norm_pix).eval()
    pictures = _images(2)
    torch.manual_seed(3)
    loss = model(pictures, mode="loss")["mae_loss"]
    assert loss.dtype == torch.float32
    torch.manual_seed(3)
    visible = model.mask(2, (4, 4), device="cpu")
    images = (pictures / 255 - model.mean) / model.std
    ids_keep = visible.flatten(1).nonzero()[:, 1].view(2, 4)
    predicted = model.network.predict_pixels(model.network.encode(images, ids_keep), ids_keep)
    errors = []
    for i, r, c in (~visible).nonzero().tolist():
        patch = images[i, :, 8 * r : 8 * r + 8, 8 * c : 8 * c + 8].permute(1, 2, 0).flatten()
        target = (patch - patch.mean()) / (patch.var() + 1e-6).sqrt() if norm_pix else patch
        errors.append((predicted[i, 4 * r + c] - target).square().mean())
    torch.testing.assert_close(loss, torch.stack(errors).mean())


def test_predict_gives_one_sample_an_image_from_the_whole_image() -> None:
    model = _model().eval()
    data = {"inputs": _images(3), "label": torch.tensor([5, 6, 7]), "index": torch.tensor([0, 2, 4]), "split": ["bank"] * 3}
    samples = model.val_step(data)
    assert [(s.label, s.index, s.split) for s in samples] == [(5, 0, "bank"), (6, 2, "bank"), (7, 4, "bank")]
    with torch.no_grad():
        tokens = model(data["inputs"], mode="tensor")
    assert tokens.shape == (3, 17, 64)
    torch.testing.assert_close(samples[1].features, tokens[1, 1:].mean(0))
    assert len({tuple(s.features.tolist()) for s in model.val_step(data)} | {tuple(s.features.tolist()) for s in samples}) == 3


@pytest.mark.parametrize("kind", ["exported", "checkpoint"])
def test_what_it_writes_is_a_teacher_of_the_same_network(tmp_path: Path, kind: str) -> None:
    # 2 heads of 32 and 2 of 16, mean and std: nothing of this is in the shapes of the weights
    model = _model(image_size=(32, 64), mean=(0.1, 0.2, 0.3), std=(0.5, 0.5, 0.5), norm_pix=False).eval()
    if kind == "exported":
        path = model.save_teacher(tmp_path / "mae.safetensors")
    else:
        path = tmp_path / "epoch_1.pth"
        torch.save({"state_dict": model.state_dict(), "meta": {"hgkd": model.meta()}, "optimizer": {}}, path)
    teacher = MAETeacher(path)
    assert teacher.network.arch == model.network.arch
    assert "trained on pixels plain" in teacher.kind
    assert teacher.prepare((4, 8), 8) == (4, 8)
    images = torch.randint(0, 256, (2, 3, 32, 64), dtype=torch.uint8)
    tokens = teacher(images / 255, None, TeacherNeeds(blocks=(1,))).tokens[1]
    with torch.no_grad():
        expected = model(images, mode="tensor")[:, 1:]
        normed = teacher.network.norm(tokens.flatten(2).transpose(1, 2))
    torch.testing.assert_close(normed, expected, rtol=1e-5, atol=1e-5)


def test_refusals_say_what_to_do() -> None:
    with refused(ValueError, "cell-no-multiple-of-patch", "mask_cell", "12", "patch_size", "8"):
        _model(mask_cell=12)
    with refused(ValueError, "image-size-not-divided"):
        _model(image_size=36)
    with refused(ValueError, "mask-ratio-hides-nothing"):
        _model(mask_ratio=0.0)
    with refused(ValueError, "mask-ratio-too-high"):
        _model(mask_ratio=0.99)
    with refused(ValueError, "decoder-missing", "decoder"):
        _model(arch={**ARCH, "decoder_depth": 0})
    model = _model()
    with refused(ValueError, "images-of-another-size", "40 x 40", "32 x 32", "image_size"):
        model(torch.zeros(1, 3, 40, 40, dtype=torch.uint8), mode="loss")
    with refused(ValueError, "mode-unknown"):
        model(_images(), mode="train")


def test_is_registered() -> None:
    built = MODELS.build({"type": "MAEPretraining", "arch": {"base": "tiny", "depth": 1, "decoder_depth": 1}, "image_size": 32})
    assert built.network.arch.embed_dim == 192
