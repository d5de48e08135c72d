"""An exported folder is the same network, for timm and for load_backbone, or it is not written at all."""

import json
import os
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import safetensors.torch
import timm
import torch
from full_disk import full_disk
from PIL import Image
from refusals import refused
from student_checkpoints import randomised, write_student
from tiny_runs import load_tool
from torch import nn

from hgkd.errors import DataError, WeightsError
from hgkd.export import PARTS, TARGETS, ExportError, export, exporter, load_backbone, read_student
from hgkd.export.exporter import _read_images
from hgkd.export.job import Written
from hgkd.export.targets import timm as timm_target
from hgkd.students import SparseUNet, build_encoder
from hgkd.writing import WriteError


def same_weights(a: nn.Module, b: nn.Module) -> bool:
    left, right = a.state_dict(), b.state_dict()
    return left.keys() == right.keys() and all(torch.equal(left[k], right[k]) for k in left)


@pytest.mark.parametrize(
    ("name", "kwargs"),
    [("test_resnet", {}), ("test_convnext.r160_in1k", {}), ("test_efficientnet", {"drop_path_rate": 0.1}),
     ("test_resnet", {"channels": (16, 24, 40, 64)})],
)  # fmt: skip
def test_timm_reads_the_same_network(tmp_path: Path, name: str, kwargs: dict) -> None:
    source = write_student(tmp_path / "a.pth", name, kwargs=kwargs)
    report = export(tmp_path / "a.pth", tmp_path / "out")

    again = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True).eval()
    assert same_weights(source, again)
    assert again.pretrained_cfg["mean"] == pytest.approx(source.pretrained_cfg["mean"])
    assert again.pretrained_cfg["std"] == pytest.approx(source.pretrained_cfg["std"])
    images = torch.rand(2, 3, 64, 96)
    expected = source.forward_features(images)
    assert torch.equal(again.forward_features(images), expected)
    if "convnext" not in name:  # its head normalises after pooling
        torch.testing.assert_close(again(images), expected.mean((2, 3)))

    ours = load_backbone(tmp_path / "out")
    assert same_weights(source, ours)
    assert torch.equal(ours.forward_features(images), expected)

    assert report.max_difference == 0
    assert report.parameters == sum(p.numel() for p in source.parameters())
    assert report.tensors == len(source.state_dict())
    assert str(tmp_path / "out") in report.loaded_with
    assert sorted(os.listdir(tmp_path)) == ["a.pth", "out"]
    assert sorted(os.listdir(tmp_path / "out")) == [
        "README.md",
        "config.json",
        "model.safetensors",
        "run_card.json",
        "run_card.md",
    ]


def test_a_backbone_leaves_at_the_size_that_is_asked_for(tmp_path: Path) -> None:
    write_student(tmp_path / "a.pth")
    report = export(tmp_path / "a.pth", tmp_path / "timm", "timm", image_size=64)
    assert report.max_difference == 0.0
    model = timm.create_model(f"local-dir:{tmp_path / 'timm'}", pretrained=True, num_classes=0)
    assert tuple(model.pretrained_cfg["input_size"]) == (3, 64, 64)
    signature = export(tmp_path / "a.pth", tmp_path / "pt2", "pt2", image_size=(64, 96)).signature
    assert signature is not None
    assert signature.input.size == (64, 96)
    with refused(ValueError, "image-size-of-backbone", "64", "classifier"):
        export(tmp_path / "a.pth", tmp_path / "c", "timm", part="classifier", image_size=64)
    with refused(ValueError, "image-size-not-positive", "0"):
        export(tmp_path / "a.pth", tmp_path / "d", "timm", image_size=0)


def test_a_backbone_leaves_at_the_size_of_its_run(tmp_path: Path) -> None:
    write_student(tmp_path / "a.pth")
    checkpoint = torch.load(tmp_path / "a.pth", weights_only=False)
    checkpoint["meta"]["cfg"] = "model = dict(type='MaskedDistiller', image_size=[96, 64])\n"
    torch.save(checkpoint, tmp_path / "a.pth")
    for asked, size in ((None, [3, 96, 64]), (160, [3, 160, 160])):
        export(tmp_path / "a.pth", tmp_path / "out", "timm", image_size=asked, force=True)
        assert json.loads((tmp_path / "out/config.json").read_text())["pretrained_cfg"]["input_size"] == size


def test_timm_adds_a_fresh_classifier(tmp_path: Path) -> None:
    source = write_student(tmp_path / "a.pth")
    export(tmp_path / "a.pth", tmp_path / "out")
    again = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True, num_classes=7).eval()
    assert again(torch.rand(1, 3, 64, 64)).shape == (1, 7)
    assert all(torch.equal(v, again.state_dict()[k]) for k, v in source.state_dict().items())


def test_cifar_stem_is_read_by_us_and_refused_by_timm(tmp_path: Path) -> None:
    source = write_student(tmp_path / "a.pth", "resnet10t", "cifar", encoder=build_encoder("resnet10t", stem="cifar"))
    report = export(tmp_path / "a.pth", tmp_path / "out")
    assert "load_backbone" in report.loaded_with
    assert "timm cannot build the cifar stem" in report.notes[0]
    ours = load_backbone(tmp_path / "out")
    assert same_weights(source, ours)
    images = torch.rand(1, 3, 32, 32)
    assert torch.equal(ours.forward_features(images), source.forward_features(images))
    with pytest.raises(RuntimeError, match="Unknown model"):
        timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True)


def test_force_replaces_only_an_export(tmp_path: Path) -> None:
    write_student(tmp_path / "a.pth")
    second = write_student(tmp_path / "b.pth")
    out = tmp_path / "out"
    out.mkdir()
    export(tmp_path / "a.pth", out)  # an empty folder is free
    with refused(FileExistsError, "folder-not-empty", "--out", "--force"):
        export(tmp_path / "b.pth", out)
    export(tmp_path / "b.pth", out, force=True)
    assert same_weights(load_backbone(out), second)
    assert sorted(os.listdir(tmp_path)) == ["a.pth", "b.pth", "out"]

    (out / "thesis.tex").write_text("work of years")
    with refused(ValueError, "force-on-other-things", "thesis.tex"):
        export(tmp_path / "a.pth", out, force=True)
    assert (out / "thesis.tex").read_text() == "work of years"
    with refused(FileExistsError, "output-is-a-file"):
        export(tmp_path / "a.pth", tmp_path / "b.pth", force=True)


def test_failed_proof_leaves_nothing_and_keeps_the_old(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    old = write_student(tmp_path / "a.pth")
    export(tmp_path / "a.pth", tmp_path / "out")
    create = timm.create_model

    def slightly_different(*args: object, **kwargs: object) -> nn.Module:
        model = create(*args, **kwargs)
        model.layer1[0].act2 = nn.Identity()
        return model

    write_student(tmp_path / "b.pth")
    monkeypatch.setattr(timm_target.timm, "create_model", lambda name, **kw: slightly_different(name, **kw)
                        if name.startswith("local-dir:") else create(name, **kw))  # fmt: skip
    with refused(ExportError, "export-outputs-differ"):
        export(tmp_path / "b.pth", tmp_path / "out", force=True)
    assert same_weights(load_backbone(tmp_path / "out"), old)
    with pytest.raises(ExportError):
        export(tmp_path / "b.pth", tmp_path / "new")
    assert sorted(os.listdir(tmp_path)) == ["a.pth", "b.pth", "out"]


@pytest.mark.parametrize("broken", [float("nan"), float("inf")])
def test_outputs_that_are_not_finite_are_no_proof(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, broken: float) -> None:
    """``max(0.0, nan)`` is 0.0: an export whose outputs are all NaN once "differed by 0.0"."""
    write_student(tmp_path / "a.pth")
    write = lambda job: Written("load", "a library", lambda images: job.features(images) * broken, 1, 1)  # noqa: E731
    monkeypatch.setitem(exporter.TARGETS, "timm", replace(exporter.TARGETS["timm"], write=write))
    with refused(ExportError, "export-outputs-not-finite", "backbone"):
        export(tmp_path / "a.pth", tmp_path / "out")
    write_student(tmp_path / "b.pth")
    checkpoint = torch.load(tmp_path / "b.pth", weights_only=False)
    checkpoint["state_dict"]["student.encoder.layer1.0.bn1.running_var"].fill_(-1)  # finite
    torch.save(checkpoint, tmp_path / "b.pth")
    with refused(ExportError, "source-outputs-not-finite", "backbone", "b.pth"):
        export(tmp_path / "b.pth", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("to", ["timm", "torchvision", "mmseg", "transformers", "sparse", "spconv", "torchscript"])
def test_a_full_disk_is_one_sentence_and_leaves_the_old_export(tmp_path: Path, to: str) -> None:
    write_student(tmp_path / "a.pth", "resnet18")
    out = tmp_path / "out"
    with full_disk(100_000), pytest.raises(WriteError, match=r"cannot write .*out: .* MB are free .*; nothing was left there"):
        export(tmp_path / "a.pth", out, to)
    assert os.listdir(tmp_path) == ["a.pth"]
    if to == "timm":
        export(tmp_path / "a.pth", out)
        before = {name: (out / name).read_bytes() for name in os.listdir(out)}
        with full_disk(100_000), pytest.raises(WriteError):
            export(tmp_path / "a.pth", out, force=True)
        assert {name: (out / name).read_bytes() for name in os.listdir(out)} == before


def test_proof_sees_changed_missing_and_added_weights() -> None:
    source, other = (timm.create_model("test_resnet", num_classes=0).eval() for _ in range(2))
    with refused(ExportError, "export-weights-changed"):
        timm_target.same_weights(source, other)
    with refused(ExportError, "export-weights-changed", "fc.bias", "fc.weight"):
        timm_target.same_weights(source, timm.create_model("test_resnet", num_classes=2))


def test_diverged_weights_are_not_exported(tmp_path: Path) -> None:
    encoder = timm.create_model("test_resnet", num_classes=0, global_pool="")
    nn.init.constant_(encoder.layer1[0].conv1.weight, float("nan"))
    write_student(tmp_path / "a.pth", encoder=encoder)
    with refused(WeightsError, "weights-not-finite", "1", "layer1.0.conv1.weight"):
        export(tmp_path / "a.pth", tmp_path / "out")


def test_checkpoint_refusals(tmp_path: Path) -> None:
    write_student(tmp_path / "good.pth")
    content = (tmp_path / "good.pth").read_bytes()
    (tmp_path / "cut.pth").write_bytes(content[: len(content) // 2])
    torch.save({"state_dict": {"fc.weight": torch.zeros(1)}}, tmp_path / "foreign.pth")
    torch.save({"conv1.weight": torch.zeros(1)}, tmp_path / "bare.pth")
    write_student(tmp_path / "short.pth", drop="layer4.")
    write_student(tmp_path / "newer.pth", format=2)
    write_student(tmp_path / "mae.pth", mae={"embed_dim": 64})

    def fails(name: str, refusal: tuple[object, ...], error: type[Exception] = WeightsError) -> None:
        with refused(error, *refusal):
            export(tmp_path / name, tmp_path / "out")
        assert not (tmp_path / "out").exists()

    fails("absent.pth", ("checkpoint-missing", "absent.pth"), FileNotFoundError)
    fails("cut.pth", ("weight-file-damaged", "cut.pth"))
    fails("foreign.pth", ("checkpoint-not-of-hgkd", "hgkd"))
    fails("bare.pth", ("checkpoint-not-of-hgkd",))
    fails("short.pth", ("weights-do-not-fit", "layer4.0.bn1.bias"))
    fails("mae.pth", ("mae-where-student-needed", "--backbone", "mae.pth"))
    fails("newer.pth", ("checkpoint-format", "2", "1"))


def test_weights_of_another_network_are_refused(tmp_path: Path) -> None:
    other = timm.create_model("test_convnext", num_classes=0, global_pool="")
    write_student(tmp_path / "a.pth", "test_resnet", encoder=other)
    with pytest.raises(WeightsError):
        export(tmp_path / "a.pth", tmp_path / "out")


def test_read_student_takes_the_encoder_alone(tmp_path: Path) -> None:
    source = write_student(tmp_path / "a.pth")
    student = read_student(tmp_path / "a.pth")
    assert student.state.keys() == source.state_dict().keys()
    assert student.metrics == {"knn/top1": 42.5}


def test_load_backbone_refusals(tmp_path: Path) -> None:
    write_student(tmp_path / "a.pth")
    out = tmp_path / "out"
    export(tmp_path / "a.pth", out)
    with refused(FileNotFoundError, "export-folder-missing", "nowhere"):
        load_backbone(tmp_path / "nowhere")
    with refused(FileNotFoundError, "export-config-missing", "config.json"):
        load_backbone(tmp_path)

    (out / "run_card.json").unlink()  # by which a changed file is told before it is read
    weights = safetensors.torch.load_file(out / "model.safetensors")
    safetensors.torch.save_file({**weights, "extra": torch.zeros(1)}, out / "model.safetensors")
    with refused(WeightsError, "weights-do-not-fit", "extra"):
        load_backbone(out)
    safetensors.torch.save_file({k: v for k, v in weights.items() if k != "bn1.bias"}, out / "model.safetensors")
    with refused(WeightsError, "weights-do-not-fit", "bn1.bias"):
        load_backbone(out)
    content = (out / "model.safetensors").read_bytes()
    (out / "model.safetensors").write_bytes(content[:1000])
    with refused(WeightsError, "file-not-safetensors"):
        load_backbone(out)
    (out / "config.json").write_text("{")
    with refused(WeightsError, "export-config-not-json"):
        load_backbone(out)
    (out / "config.json").write_text('{"architecture": "test_resnet"}')
    with refused(WeightsError, "encoder-not-described"):
        load_backbone(out)


def test_request_refusals(tmp_path: Path) -> None:
    write_student(tmp_path / "a.pth")

    def fails(refusal: tuple[object, ...], *arguments: object, error: type[Exception] = ValueError, **options: object) -> None:
        with refused(error, *refusal):
            export(tmp_path / "a.pth", tmp_path / "out", *arguments, **options)
        assert not (tmp_path / "out").exists()

    fails(("target-unknown", "tim", "timm"), "tim")
    fails(("target-unknown", "torchvison", "torchvision"), "torchvison")
    fails(("part-unknown", "backbon", "backbone"), part="backbon")
    fails(("target-without-part", "timm", "student", "sparse"), part="student")
    fails(("target-without-part", "onnx", "decoder", "sparse"), "onnx", part="decoder")
    fails(("target-option-unknown", "timm", "opset", "none"), opset=18)
    fails(("target-option-unknown", "onnx", "cell"), "onnx", cell=32)
    fails(("licence-field-unknown", "weight", "weights"), licences={"weight": "mit"})
    fails(("no-images-to-compare",), error=DataError, images=tmp_path / "nowhere")
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures/a.png").write_bytes(b"no picture")
    fails(("image-unreadable", "pictures/a.png"), error=DataError, images=tmp_path / "pictures")
    Image.new("RGB", (8, 8)).save(tmp_path / "pictures/a.png")
    content = (tmp_path / "pictures/a.png").read_bytes()
    # Pillow raises SyntaxError and ValueError on such files: github.com/python-pillow/Pillow/issues/4472
    (tmp_path / "pictures/a.png").write_bytes(content[:8] + bytes(4) + b"IHDR" + content[40:])
    fails(("image-unreadable", "pictures/a.png"), error=DataError, images=tmp_path / "pictures")


def test_real_images_take_part_in_the_proof(tmp_path: Path) -> None:
    write_student(tmp_path / "a.pth")
    (tmp_path / "pictures").mkdir()
    for i in range(3):
        Image.new("RGB", (80, 50), (60 * i, 100, 20)).save(tmp_path / f"pictures/{i}.jpg")
    report = export(tmp_path / "a.pth", tmp_path / "out", images=tmp_path / "pictures")
    assert report.images == 3
    assert export(tmp_path / "a.pth", tmp_path / "few", images=tmp_path / "pictures", max_images=2).images == 2
    with refused(ValueError, "count-not-positive", "max_images", "1", "0"):
        export(tmp_path / "a.pth", tmp_path / "none", images=tmp_path / "pictures", max_images=0)
    assert json.loads((tmp_path / "out/run_card.json").read_text())["export"]["real_images"] == 3


def test_real_images_of_twelve_bits_are_read_by_their_range(tmp_path: Path) -> None:
    (tmp_path / "pictures").mkdir()
    Image.fromarray(np.full((40, 40), 2048, np.uint16)).save(tmp_path / "pictures/a.png")
    network = SimpleNamespace(pretrained_cfg={"input_size": (3, 32, 32)})
    source = SimpleNamespace(classes=[], network=network)
    images, _ = _read_images(tmp_path / "pictures", 1, source, False, (0, 4095))
    assert images.mean().item() == pytest.approx(0.5, abs=0.01)
    write_student(tmp_path / "a.pth")
    with refused(ValueError, "value-range-without-images", "value_range=(0, 4095)"):
        export(tmp_path / "a.pth", tmp_path / "out", value_range=(0, 4095))
    given = [str(tmp_path / "a.pth"), "--out", str(tmp_path / "out"), "--images", str(tmp_path / "pictures")]
    assert load_tool("export").main([*given, "--value-range", "0", "4095"]) == 0


def test_every_target_is_described() -> None:
    for name, target in TARGETS.items():
        assert target.name == name
        assert target.summary
        assert set(target.part) <= set(PARTS)


def test_round_trip_through_training(tmp_path: Path) -> None:
    """timm -> sparse student -> one training step -> export -> timm, bit for bit what was trained."""
    start = randomised(timm.create_model("resnet18", num_classes=0, global_pool="", layers=(1, 1, 1, 1)))
    safetensors.torch.save_file(start.state_dict(), tmp_path / "start.safetensors")
    student = SparseUNet("resnet18", encoder_kwargs={"layers": (1, 1, 1, 1)}, encoder_checkpoint=tmp_path / "start.safetensors",
                         decoder_width=32, min_decoder_width=8)  # fmt: skip
    assert same_weights(start, student.encoder)
    optimizer = torch.optim.SGD(student.parameters(), lr=0.1)
    visible = torch.tensor([[[True, False], [False, True]]])
    student.train()(torch.rand(1, 3, 64, 64), visible).decoded.square().mean().backward()
    optimizer.step()
    # the sparse engine keeps some kernels channels_last, which must not leave
    assert not student.encoder.layer3[0].conv2.weight.is_contiguous()
    trained = {key: value.clone() for key, value in student.encoder.state_dict().items()}
    assert not torch.equal(trained["conv1.weight"], start.conv1.weight)

    meta = {"hgkd": {"encoder": student.encoder_spec, "format": 1}}
    torch.save({"meta": meta, "state_dict": {f"student.{k}": v for k, v in student.state_dict().items()}}, tmp_path / "a.pth")
    report = export(tmp_path / "a.pth", tmp_path / "out")
    again = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True)
    assert again.state_dict().keys() == trained.keys()
    assert all(torch.equal(value, trained[key]) for key, value in again.state_dict().items())
    assert all(value.is_contiguous() for value in again.state_dict().values())
    assert report.max_difference == 0
