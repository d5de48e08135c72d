"""Checkpoints and exports written by earlier versions still load, and give what they gave."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from downstream_runs import RETINANET, need, scope
from safetensors.torch import load_file
from tiny_runs import HGKD, tiny, write_images
from torch import Tensor

from hgkd.api import train as train_tool
from hgkd.evaluation import load_extractor
from hgkd.export import load_backbone, load_sparse, load_student
from hgkd.networks import ImageClassifier, load_classifier
from hgkd.openmmlab import TimmBackbone, load_backbone_file
from hgkd.pictures.reconstruction import load_reconstructor
from hgkd.sparse import load_sparse as load_sparse_file
from hgkd.structures import TeacherNeeds
from hgkd.teachers import ClassifierTeacher, MAETeacher
from hgkd.weights.files import read_weights
from hgkd.weights.loading import load_strict

HERE = Path(__file__).parent
ENCODER = {"name": "resnet18", "kwargs": {"layers": (1, 1, 1, 1), "channels": (8, 12, 16, 24)}}
CLASSIFIER = {"name": "convnext_atto", "kwargs": {"depths": (1, 1, 1, 1), "dims": (8, 16, 24, 32)}}
VISIBLE = torch.tensor([[[True, False], [True, True]], [[False, True], [False, True]]])
IMAGES = (torch.arange(2 * 3 * 64 * 64) * 7919 % 4093).float().div(4093).view(2, 3, 64, 64)
HGKD_OPTIONS: dict[str, Any] = {
    "student": ENCODER["name"],
    "model.student.encoder_kwargs": ENCODER["kwargs"],
    "model.student.min_decoder_width": 16,
    "model.objectives.hgkd.block": 1,
    "model.objectives.pooled.block": 1,
    "teacher": "vit_tiny_patch16_224",
    "model.teacher.allow_random": True,
    "model.teacher.depth": 2,
    "model.teacher.embed_dim": 32,
    "model.teacher.num_heads": 2,
    "model.student.decoder_width": 32,
}


def _timm(folder: Path) -> Tensor:
    return timm.create_model(f"local-dir:{folder}", pretrained=True).eval()(IMAGES)


def _teacher(path: Path) -> Tensor:
    teacher = MAETeacher(path, allow_random=True)
    teacher.prepare((4, 4), 16)
    visible = VISIBLE.repeat_interleave(2, 1).repeat_interleave(2, 2)
    out = teacher(IMAGES, visible, TeacherNeeds(blocks=(1,), decoder_block=0))
    return torch.cat([out.tokens[1].flatten(1), out.decoded.flatten(1)], 1)


def _masked(network: Any) -> Tensor:
    return network(IMAGES, visible=VISIBLE).to_dense()


def _pixels(path: Path) -> Tensor:
    model = load_reconstructor(path)
    return model.columns((IMAGES * 255).to(torch.uint8), 0.5, 0)["reconstruction"]


def _vit_classifier(path: Path) -> Tensor:
    """Features after the file: the head is drawn at random."""
    model = ImageClassifier(
        "vit_tiny_patch16_224", 2, 64, backbone=path, patch_size=8, embed_dim=16, depth=2, num_heads=2
    ).eval()
    return model(model.normalise(IMAGES)).feature


def _downstream_backbone(path: Path) -> Tensor:
    backbone = TimmBackbone(ENCODER["name"], **ENCODER["kwargs"]).eval()
    load_backbone_file(backbone, path)
    return backbone(IMAGES)[-1]


def _detector(path: Path) -> Tensor:
    from mmengine.registry import MODELS

    with scope("mmdet"):
        model = MODELS.build(detector())
    load_strict(model, read_weights(path), source=str(path))
    return torch.cat([level.flatten(1) for level in model.eval().extract_feat(IMAGES)], 1)


def detector() -> Any:
    cfg = train_tool.load_config(RETINANET).model
    cfg.backbone = dict(type="hgkd.TimmBackbone", name=ENCODER["name"], **ENCODER["kwargs"])
    cfg.neck.update(in_channels=[8, 12, 16, 24], out_channels=16)
    cfg.bbox_head.update(in_channels=16, feat_channels=16, stacked_convs=1, num_classes=8)
    return cfg


# name of the output -> file or folder, and what its public loader makes of it
LOADERS: dict[str, tuple[str, Callable[[Path], Tensor]]] = {
    "unet_student": ("unet_student.pth", lambda path: load_backbone(path).forward_features(IMAGES)),
    "unet_extractor": ("unet_student.pth", lambda path: load_extractor(path)(IMAGES)),
    "vit_teacher": ("vit_student.pth", _teacher),
    "vit_pixels": ("vit_student.pth", _pixels),
    "vit_backbone": ("vit_student.pth", _vit_classifier),
    "mae_teacher": ("mae.pth", _teacher),
    "mae_pixels": ("mae.pth", _pixels),
    "mae_backbone": ("mae.pth", _vit_classifier),
    "mae_exported": ("mae.safetensors", _teacher),
    "classifier": ("classifier.pth", lambda path: load_classifier(path).predict(IMAGES)),
    "classifier_backbone": ("classifier.pth", lambda path: load_backbone(path).forward_features(IMAGES)),
    "classifier_teacher": (
        "classifier.pth",
        lambda path: ClassifierTeacher(checkpoint=path, allow_random=True)(IMAGES).logits,
    ),
    "sparse_file": ("sparse.safetensors", lambda path: _masked(load_sparse_file(path))),
    "export_sparse": ("export_sparse", lambda path: _masked(load_sparse(path))),
    "export_student": ("export_student", lambda path: load_student(path)(IMAGES, VISIBLE).decoded),
    "export_timm": ("export_timm", lambda path: load_backbone(path).forward_features(IMAGES)),
    "export_timm_by_timm": ("export_timm", _timm),
    "export_timm_downstream": ("export_timm", _downstream_backbone),
    "export_classifier": ("export_classifier", _timm),
    "distilled_student": ("distilled_student.pth", _detector),
}


@torch.no_grad()
def outputs_of(name: str) -> Tensor:
    file, load = LOADERS[name]
    return load(HERE / file).flatten(1)


@pytest.mark.parametrize("name", LOADERS)
def test_a_file_of_an_earlier_version_gives_what_it_gave(name: str) -> None:
    if name == "distilled_student":
        need("mmdet")
    expected = load_file(HERE / "outputs.safetensors")[name].float()
    found = outputs_of(name)
    assert found.shape == expected.shape
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3 * float(expected.abs().max()))  # stored in half


def test_a_run_of_an_earlier_version_goes_on(tmp_path: Path) -> None:
    options = {**tiny(write_images(tmp_path / "images")), **HGKD_OPTIONS, "val_train_root": None, "val_test_root": None}
    options["teacher_features"] = str(tmp_path / "features")
    runner = train_tool.train(HGKD, tmp_path / "run", resume=HERE / "unet_student.pth", options=options)
    assert (runner.epoch, runner.iter) == (2, 4)
