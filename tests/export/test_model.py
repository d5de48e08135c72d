"""``--part model``: a whole network of mmengine without what only its training needed."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from mmengine.config import Config
from mmengine.runner.checkpoint import load_checkpoint
from refusals import refused
from safetensors.torch import load_file
from torch import nn

from hgkd.errors import WeightsError
from hgkd.export import ExportError, export
from hgkd.export import model as model_module

PLAIN = "model = dict(type='FasterRCNN', backbone=dict(depth=18), out=(0, 1))\noptim_wrapper = dict(lr=0.1)\n"
DISTILLED = (
    "model = dict(type='FeatureDistiller', teacher='mmdet::big.py', teacher_checkpoint='gone.pth', "
    "student=dict(type='FasterRCNN', backbone=dict(depth=18)))\n"
)


class Detector(nn.Module):
    def __init__(self, **config: object) -> None:
        super().__init__()
        self.backbone, self.bbox_head = nn.Conv2d(3, 4, 3), nn.Linear(4, 2)


def write(path: Path, state: dict, cfg: object = PLAIN) -> None:
    optimizer = torch.optim.SGD([torch.zeros(2, requires_grad=True)], 0.1).state_dict()
    torch.save(
        {
            "meta": {"cfg": cfg, "epoch": 2, "dataset_meta": {"classes": ("cell",)}},
            "state_dict": state,
            "optimizer": optimizer,
            "param_schedulers": [],
        },
        path,
    )


def library(monkeypatch: pytest.MonkeyPatch, build: object) -> list:
    """mmdet as a stand-in: what it was asked to build."""
    asked = []
    registry = SimpleNamespace(MODELS=SimpleNamespace(build=lambda config: asked.append(config) or build()))
    monkeypatch.setattr(model_module, "optional", lambda module: (registry, "mmdet 3.3.0"))
    return asked


def test_the_weights_alone_under_the_models_own_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = library(monkeypatch, Detector)
    source = Detector().state_dict()
    write(tmp_path / "a.pth", source)
    report = export(tmp_path / "a.pth", tmp_path / "out", "mmdet", part="model", licences={"weights": "mit"})
    assert report.proven_with.endswith("mmdet 3.3.0: its own model takes every weight")
    assert asked[0].backbone.depth == 18  # a detector reads its config by attributes
    assert asked == [{"type": "FasterRCNN", "backbone": {"depth": 18}, "out": (0, 1), "_scope_": "mmdet"}]
    assert set(report.files) == {"model.pth", "model.safetensors", "model_config.py"}
    again = Detector()
    load_checkpoint(again, str(tmp_path / "out/model.pth"), strict=True)
    found = [again.state_dict(), load_file(tmp_path / "out/model.safetensors")]
    assert all(torch.equal(state[key], value) for state in found for key, value in source.items())
    content = torch.load(tmp_path / "out/model.pth")
    assert set(content) == {"meta", "state_dict"}
    assert content["meta"] == {"dataset_meta": {"classes": ("cell",)}}
    cfg = Config.fromfile(tmp_path / "out/model_config.py")
    assert (cfg.default_scope, cfg.model.type, cfg.model.out) == ("mmdet", "FasterRCNN", (0, 1))
    card = json.loads((tmp_path / "out/run_card.json").read_text())
    assert card["network"] == {"name": "FasterRCNN"}
    assert (card["source"]["epoch"], card["licences"]["weights"]) == (2, "mit")
    assert report.parameters == sum(p.numel() for p in again.parameters())


@pytest.mark.parametrize(
    ("backbone", "modules"), [("ResNet", ["colorsys"]), ("hgkd.TimmBackbone", ["colorsys", "hgkd.openmmlab"])]
)
def test_the_config_imports_what_its_parts_need(tmp_path: Path, monkeypatch, backbone: str, modules: list[str]) -> None:
    library(monkeypatch, Detector)
    imports = "custom_imports = dict(imports=['hgkd.openmmlab', 'colorsys'], allow_failed_imports=False)\n"
    model = f"model = dict(type='FasterRCNN', backbone=[dict(type={backbone!r}, name='resnet18')])\n"
    write(tmp_path / "a.pth", Detector().state_dict(), imports + model)
    export(tmp_path / "a.pth", tmp_path / "out", "mmdet", part="model")
    assert Config.fromfile(tmp_path / "out/model_config.py").custom_imports.imports == modules


def test_of_a_distillation_the_student_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = library(monkeypatch, Detector)
    source = Detector().state_dict()
    others = {"teacher.neck.weight": torch.ones(1), "generators.0.weight": torch.ones(1), "generators.0.bias": torch.ones(1)}
    write(tmp_path / "a.pth", {**{f"student.{key}": value for key, value in source.items()}, **others}, DISTILLED)
    report = export(tmp_path / "a.pth", tmp_path / "out", "mmdet", part="model")
    assert load_file(tmp_path / "out/model.safetensors").keys() == source.keys()
    assert report.notes == ["left behind, as only the training needs it: 1 of teacher, 2 of generators"]
    assert asked[0]["type"] == "FasterRCNN"
    card = json.loads((tmp_path / "out/run_card.json").read_text())
    assert (card["teacher"]["name"], card["teacher"]["file"]) == ("mmdet::big.py", "gone.pth")


def test_training_parts_beside_a_plain_model_stay_behind(tmp_path: Path) -> None:
    write(tmp_path / "a.pth", {"classifier.weight": torch.ones(2), "objectives.kd.weight": torch.ones(1)})
    assert list(model_module.read_model(tmp_path / "a.pth").state) == ["classifier.weight"]


def test_what_could_not_be_proven_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "a.pth", Detector().state_dict(), cfg="model = build(lambda: 1)\n")
    report = export(tmp_path / "a.pth", tmp_path / "out", "mmdet", part="model")
    assert "no model was built: the checkpoint does not describe it in plain values" in report.proven_with
    assert not (tmp_path / "out/model_config.py").exists()
    write(tmp_path / "a.pth", Detector().state_dict())
    monkeypatch.setattr(model_module, "optional", lambda module: (None, "mmdet is not installed"))
    assert "mmdet is not installed" in export(tmp_path / "a.pth", tmp_path / "b", "mmdet", part="model").proven_with

    def unknown() -> None:
        raise KeyError("MyHead")

    library(monkeypatch, unknown)
    assert "mmdet cannot (KeyError: 'MyHead')" in export(tmp_path / "a.pth", tmp_path / "c", "mmdet", part="model").proven_with


@pytest.mark.parametrize(
    ("described", "message"),
    [
        ({"encoder": {"name": "resnet18"}, "format": 1}, "but a student of pretraining; --part backbone exports its encoder"),
        ({"classifier": {"name": "resnet18"}, "format": 1}, "but a classifier of hgkd; --part classifier exports it"),
        ({"mae": {}, "format": 1}, r"but a masked autoencoder of hgkd, which is a teacher: model.teacher.checkpoint=.*a.pth"),
    ],
)
def test_a_network_of_hgkd_is_no_model_of_another_library(tmp_path: Path, described: dict, message: str) -> None:
    write(tmp_path / "a.pth", {"student.encoder.conv.weight": torch.ones(2)})
    checkpoint = torch.load(tmp_path / "a.pth")
    checkpoint["meta"]["hgkd"] = described
    torch.save(checkpoint, tmp_path / "a.pth")
    with pytest.raises(WeightsError, match=f"holds no model of mmdet, mmseg or mmpretrain {message}"):
        export(tmp_path / "a.pth", tmp_path / "out", "mmdet", part="model")


def test_a_model_of_another_library(tmp_path: Path) -> None:
    write(tmp_path / "a.pth", Detector().state_dict(), PLAIN + "default_scope = 'mmseg'\n")
    with refused(ValueError, "trained-with-another-library", "mmseg", "mmdet", "--to"):
        export(tmp_path / "a.pth", tmp_path / "out", "mmdet", part="model")


def test_refusals(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(refusal: tuple[object, ...], error: type[Exception] = WeightsError) -> None:
        with refused(error, *refusal):
            export(tmp_path / "a.pth", tmp_path / "out", "mmdet", part="model")
        assert not (tmp_path / "out").exists()

    fails(("weight-file-missing", "a.pth"), FileNotFoundError)
    torch.save({"conv.weight": torch.ones(1)}, tmp_path / "a.pth")
    fails(("checkpoint-not-of-mmengine", "state_dict"))
    write(tmp_path / "a.pth", {"teacher.weight": torch.ones(1)})
    fails(("checkpoint-of-training-parts", "teacher"))
    write(tmp_path / "a.pth", {"backbone.weight": torch.tensor([float("nan")])})
    fails(("weights-not-finite", "1", "backbone.weight"))
    library(monkeypatch, Detector)
    write(tmp_path / "a.pth", {"backbone.weight": torch.ones(1)})
    fails(("library-refuses-weights", "mmdet", "FasterRCNN", "backbone.weight"), ExportError)
    with refused(ValueError, "model-takes-no-images"):
        export(tmp_path / "a.pth", tmp_path / "out", "mmdet", part="model", images=tmp_path)
    with refused(ValueError, "target-without-part", "timm", "model"):
        export(tmp_path / "a.pth", tmp_path / "out", part="model")
