"""Whole runs of the small recipes on generated shapes: two steps, validation, test, pictures."""

import json
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from downstream_runs import (
    FASTER_HEAD,
    measure_tool,
    need,
    scope,
    shapes_ade20k,
    shapes_coco,
    tiny_detector,
    tiny_segmentor,
    train_tool,
)
from full_disk import full_disk
from mmengine.registry import MODELS
from mmengine.visualization import Visualizer
from PIL import Image
from refusals import refused
from tiny_runs import ROOT, SPARK, load_tool, tiny, torchrun, write_images

from hgkd.cli import train as train_command
from hgkd.data.shapes import CLASSES
from hgkd.diagnosis.dry_run import dry_run
from hgkd.errors import DataError, StoppedError, WeightsError
from hgkd.openmmlab import DownstreamRunner, draw_predictions
from hgkd.openmmlab.config import without_scope
from hgkd.openmmlab.drawing import picture_names

need("mmdet", "mmseg")
DETECTOR = ROOT / "downstream/detection/faster-rcnn_r18_12e_bccd.py"
SEGMENTOR = ROOT / "downstream/segmentation/upernet_r18_1k_camvid.py"


def as_arguments(options):
    return ["--cfg-options", *(f"{key}={str(value).replace(' ', '')}" for key, value in options.items())]


def test_detector(tmp_path):
    root = shapes_coco(tmp_path / "data")
    file = root / "images/train/000001.jpg"
    file.write_bytes(file.read_bytes()[:600])  # cut off: OpenCV would decode the rest as grey
    encoder = timm.create_model("resnet18", num_classes=0)
    torch.save(encoder.state_dict(), tmp_path / "backbone.pth")
    options = {**tiny_detector(root), **FASTER_HEAD}
    frozen = {**options, "backbone": str(tmp_path / "backbone.pth"), "lr": 0.0}
    runner = train_tool.train(DETECTOR, tmp_path / "run", options=frozen)
    assert runner.iter == 2
    # the backbone's file is what it started from, and nothing moved with a learning rate of 0
    for name, value in runner.model.backbone.state_dict().items():
        if "running" not in name and "num_batches" not in name:
            assert torch.equal(value.cpu(), encoder.state_dict()[name]), name
    # the damaged image was left out, and counted
    assert (tmp_path / "run/unreadable_files.txt").read_text() == f"{file}\n"
    logs = "".join(log.read_text() for log in (tmp_path / "run").glob("*/*.log"))
    assert "1 of 4 training images could not be read" in logs
    assert "120 of 120 entries loaded" in logs
    assert "mmcv._ext: no compiled module installed" in logs or "mmcv's own compiled" in logs

    checkpoint = tmp_path / "run/epoch_1.pth"
    out = tmp_path / "out.json"
    assert measure_tool.main([str(DETECTOR), str(checkpoint), "--json", str(out), *as_arguments(options)]) == 0
    assert 0.0 <= json.loads(out.read_text())["coco/bbox_mAP"] <= 1.0

    blind = {**options, "model.test_cfg.rcnn.score_thr": 1.0}
    with refused(StoppedError, "nothing-detected", "epoch_1.pth"):
        measure_tool.run_test(DETECTOR, checkpoint, options=blind)

    cfg = train_tool.load_config(DETECTOR, options=options)
    pictures = draw_predictions(cfg, checkpoint, root / "images/val", tmp_path / "drawn", score=0.0)
    assert [picture.name for picture in pictures] == ["000000.png", "000001.png"]
    assert all(picture.stat().st_size > 0 for picture in pictures)

    assert train_tool.train(DETECTOR, tmp_path / "run", resume=True, options={**options, "epochs": 2}).epoch == 2
    assert (tmp_path / "run/unreadable_files.txt").read_text() == f"{file}\n"
    file.write_bytes((root / "images/train/000000.jpg").read_bytes())
    with refused(ValueError, "work-folder-in-use", "run"):
        train_tool.train(DETECTOR, tmp_path / "run", options=options)
    assert (tmp_path / "run/unreadable_files.txt").exists()
    for result in (tmp_path / "run").glob("*.pth"):
        result.unlink()
    train_tool.train(DETECTOR, tmp_path / "run", options=options)
    assert not (tmp_path / "run/unreadable_files.txt").exists()  # a new run does not report what is mended
    with refused(WeightsError, "checkpoint-of-another-model", "epoch_1.pth"):
        measure_tool.run_test(DETECTOR, checkpoint, options={**options, "model.roi_head.bbox_head.fc_out_channels": 16})


@pytest.mark.slow
def test_a_detector_on_two_processes(tmp_path):
    options = {**tiny_detector(shapes_coco(tmp_path / "data")), **FASTER_HEAD}
    command = [ROOT / "tools/train.py", DETECTOR, "--work-dir", "run", "--launcher", "pytorch", *as_arguments(options)]
    done = torchrun(command, tmp_path)
    assert done.returncode == 0, done.stderr[-4000:]
    log = "".join(file.read_text() for file in (tmp_path / "run").glob("*/*.log"))
    assert "Epoch(train) [1][1/1]" in log  # 4 images, 2 for each process
    assert "coco/bbox_mAP" in log
    # one process reads what two have written
    assert 0.0 <= measure_tool.run_test(DETECTOR, tmp_path / "run/epoch_1.pth", options=options)["coco/bbox_mAP"] <= 1.0


def test_segmentor(tmp_path, capsys, monkeypatch):
    root = shapes_ade20k(tmp_path / "data")
    options = tiny_segmentor(root)
    runner = train_tool.train(SEGMENTOR, tmp_path / "run", options=options)
    assert runner.iter == 2
    checkpoint = tmp_path / "run/iter_2.pth"
    metrics = measure_tool.run_test(SEGMENTOR, checkpoint, options=options)
    assert 0.0 <= metrics["mIoU"] <= 100.0
    result = tmp_path / "result.json"
    result.write_text("of before")
    write = Path.write_text

    def write_on_a_full_disk(path, *given, **kwargs):
        with full_disk(5):
            return write(path, *given, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_text", write_on_a_full_disk)
        arguments = [str(SEGMENTOR), str(checkpoint), "--json", str(result), *as_arguments(options)]
        assert measure_tool.main(arguments) == 2
    assert f"error: cannot write {result}: File too large" in capsys.readouterr().err
    assert result.read_text() == "of before"
    cfg = train_tool.load_config(SEGMENTOR, options=options)
    assert len(draw_predictions(cfg, checkpoint, root / "images/validation", tmp_path / "drawn", limit=1)) == 1
    with refused(FileNotFoundError, "image-missing", "nothing"):
        draw_predictions(cfg, checkpoint, tmp_path / "nothing", tmp_path / "drawn")


def test_dry_run(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    root = shapes_coco(tmp_path / "data")
    options = as_arguments({**tiny_detector(root), **FASTER_HEAD})
    assert train_command.main([str(DETECTOR), "--dry-run", *options]) == 0
    captured = capsys.readouterr()
    found = captured.out
    assert "2 steps of 2 images out of 4" in found
    assert "will be saved" not in captured.out + captured.err, "into a folder that has gone"
    assert "loss_rpn_cls" in found
    assert not (tmp_path / "work_dirs").exists()


def test_a_dry_run_with_batches_by_shape(tmp_path, capsys):
    options = {**tiny_detector(shapes_coco(tmp_path / "data")), **FASTER_HEAD}
    cfg = train_tool.load_config(DETECTOR, options=options)
    cfg.train_dataloader.batch_sampler = dict(type="AspectRatioBatchSampler")  # COCO's recipes
    assert "2 steps of 2 images out of 4" in train_command.dry_run_downstream(cfg)


def test_a_wrong_backbone_ends_the_run_before_training(tmp_path, capsys):
    root = shapes_coco(tmp_path / "data")
    weights = timm.create_model("resnet18", num_classes=0).state_dict()
    torch.save({f"backbone.{key}": value for key, value in weights.items()}, tmp_path / "backbone.pth")
    options = {**tiny_detector(root), **FASTER_HEAD, "backbone": str(tmp_path / "backbone.pth")}
    assert train_command.main([str(DETECTOR), "--work-dir", str(tmp_path / "run"), *as_arguments(options)]) == 2
    assert "has the prefix 'backbone.'" in capsys.readouterr().err
    assert not list((tmp_path / "run").glob("*.pth"))


def test_checkpoint_of_the_test_must_exist(tmp_path):
    with refused(FileNotFoundError, "checkpoint-missing"):
        measure_tool.run_test(DETECTOR, tmp_path / "x.pth")


@pytest.mark.parametrize("kind", ["detector", "segmentor"])
def test_a_turned_photo_is_drawn_as_the_model_sees_it(tmp_path, kind, monkeypatch):
    config, options = DETECTOR, {**tiny_detector(tmp_path), **FASTER_HEAD}
    if kind == "segmentor":
        config, options = SEGMENTOR, tiny_segmentor(tmp_path)
    cfg = train_tool.load_config(config, options=options)
    with scope(cfg.default_scope):
        torch.save({"state_dict": MODELS.build(cfg.model).state_dict(), "meta": {}}, tmp_path / "model.pth")
    pixels = np.zeros((48, 64, 3), np.uint8)
    pixels[:24] = 255
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned clockwise by 90 degrees: what is above comes to the right
    Image.fromarray(pixels).save(tmp_path / "a.jpg", exif=exif)
    seen = []
    monkeypatch.setattr(
        Visualizer,
        "set_image",
        lambda self, image, set_image=Visualizer.set_image: (seen.append(image), set_image(self, image)),
    )
    (picture,) = draw_predictions(cfg, tmp_path / "model.pth", tmp_path / "a.jpg", tmp_path / "drawn", score=1.1)
    with Image.open(picture) as drawn:
        assert drawn.size == (48, 64)
    assert seen[0].shape == (64, 48, 3)
    if kind == "detector":  # a segmentor's label map is laid over it already
        assert (seen[0][:, 30:] > 200).all()
        assert (seen[0][:, :18] < 50).all()


def test_only_downstream_configs_are_drawn(tmp_path):
    with refused(ValueError, "config-not-downstream"):
        draw_predictions(ROOT / "configs/spark/spark_resnet18_shapes.py", tmp_path / "x.pth", tmp_path, tmp_path)


def test_the_log_says_what_is_left_out(tmp_path):
    options = {**tiny_detector(shapes_coco(tmp_path / "data")), **FASTER_HEAD}
    cfg = train_tool.load_config(DETECTOR, tmp_path / "run", options=options)
    cfg.model.backbone.init_cfg = dict(type="Pretrained", checkpoint="torchvision://resnet18")
    for loader in ("train_dataloader", "val_dataloader"):
        cfg[loader].dataset.metainfo.classes = CLASSES[:7]
    cfg.model.roi_head.bbox_head.num_classes = 7
    DownstreamRunner.from_cfg(cfg)
    cfg.work_dir = str(tmp_path / "second")
    DownstreamRunner.from_cfg(cfg)
    assert len(list((tmp_path / "second").glob("*/vis_data/config.py"))) == 1  # not with the first run's
    log = "".join(file.read_text() for file in (tmp_path / "run").glob("*/*.log"))
    assert "model.backbone.init_cfg: torchvision://resnet18 is not downloaded" in log
    assert f"{CLASSES[7]} of {tmp_path}/data/annotations/train.json are not among the config's classes" in log


def test_a_frozen_random_backbone_is_refused(tmp_path):
    options = {**tiny_detector(shapes_coco(tmp_path / "data")), **FASTER_HEAD}
    frozen = {**options, "model.backbone.frozen_stages": 1}
    cfg = train_tool.load_config(DETECTOR, options=frozen)
    with refused(ValueError, "random-weights-frozen"):
        train_command.dry_run_downstream(cfg)
    checkpoint = tmp_path / "start.pth"
    with scope("mmdet"):
        torch.save({"state_dict": MODELS.build(cfg.model).state_dict(), "meta": {}}, checkpoint)
    cfg.load_from = str(checkpoint)  # then nothing stays random
    assert train_tool.train(cfg, tmp_path / "run").iter == 2


@pytest.mark.parametrize("split", ["val", "test"])
def test_an_unreadable_test_image_is_named(tmp_path, split, capsys):
    root = shapes_coco(tmp_path / "data")
    options = {**tiny_detector(root), **FASTER_HEAD}
    cfg = train_tool.load_config(DETECTOR, options=options)
    with scope("mmdet"):
        torch.save({"state_dict": MODELS.build(cfg.model).state_dict(), "meta": {}}, tmp_path / "model.pth")
    file = root / "images/val/000001.jpg"
    file.write_bytes(file.read_bytes()[:600])  # cut off
    if split == "val":
        called = train_command.main([str(DETECTOR), "--work-dir", str(tmp_path / "run"), *as_arguments(options)])
    else:
        called = measure_tool.main([str(DETECTOR), str(tmp_path / "model.pth"), *as_arguments(options)])
        with refused(DataError, "image-unreadable", "000001.jpg"):
            draw_predictions(cfg, tmp_path / "model.pth", [file], tmp_path / "drawn")
    assert called == 2
    assert "1 of 2 images cannot be opened: cut off, or no images (000001.jpg)" in capsys.readouterr().err


def test_pictures_of_a_tool(tmp_path, capsys, monkeypatch):
    from mmdet.visualization import DetLocalVisualizer

    root = shapes_coco(tmp_path / "data")
    options = {**tiny_detector(root), **FASTER_HEAD}
    with scope("mmdet"):
        model = MODELS.build(train_tool.load_config(DETECTOR, options=options).model)
    torch.save({"state_dict": model.state_dict(), "meta": {}}, tmp_path / "model.pth")
    paths = ["--images", str(root / "images"), "--out", str(tmp_path / "drawn"), "--device", "cpu", "--limit", "6"]
    arguments = ["predictions", "--config", str(DETECTOR), "--checkpoint", str(tmp_path / "model.pth"), *paths]
    assert load_tool("visualize").main([*arguments, *as_arguments(options)]) == 0
    # 000000.jpg is in both folders
    assert {file.name for file in (tmp_path / "drawn").glob("*.png")} == {
        "train_000000.png",
        "train_000001.png",
        "val_000000.png",
        "val_000001.png",
        "000002.png",
        "000003.png",
    }
    arguments[arguments.index(str(tmp_path / "drawn"))] = str(tmp_path / "full")
    draw = DetLocalVisualizer.add_datasample

    def draw_on_a_full_disk(*given, **options):
        with full_disk(500):
            draw(*given, **options)

    monkeypatch.setattr(DetLocalVisualizer, "add_datasample", draw_on_a_full_disk)
    assert load_tool("visualize").main([*arguments, *as_arguments(options)]) == 2
    assert "train_000000.png: File too large" in capsys.readouterr().err
    assert list((tmp_path / "full").iterdir()) == []


def test_names_of_pictures_differ():
    files = ["a/x.jpg", "b/x.jpg", "b/x.png", "b/y.png", "a/c/x.jpg", "a_x.jpg"]
    assert picture_names([Path(file) for file in files]) == ["a_x", "b_x", "b_x_2", "y", "a_c_x", "a_x_2"]
    assert picture_names([Path("/data/x.jpg")] * 2) == ["x", "x_2"]


def test_what_is_inherited_from_another_package_starts(tmp_path):
    """mmengine marks what a file inherits from another package with ``_scope_``."""
    options = {**tiny_detector(shapes_coco(tmp_path / "data")), **FASTER_HEAD}
    cfg = train_tool.load_config(DETECTOR, tmp_path / "run", options=options)
    cfg.train_cfg["_scope_"] = "other"
    # mmcv's and mmengine's own unpacking of these would hand the mark on
    cfg.model.neck.norm_cfg = dict(type="BN", _scope_="mmdet")
    cfg.train_dataloader.collate_fn = dict(type="pseudo_collate", _scope_="mmdet")
    runner = train_tool.train(cfg)
    assert (runner.epoch, runner.iter) == (1, 2)
    assert cfg.model.neck.norm_cfg["_scope_"] == "mmdet"  # what was handed in is not changed


def test_marks_of_the_scope_in_force_are_dropped():
    inner = {"type": "a", "_scope_": "mmdet"}
    part = {"_scope_": "mmdet", "x": [dict(inner)], "y": {"_scope_": "mmseg", "z": dict(inner)}}
    assert without_scope(part, "mmdet") == {"x": [{"type": "a"}], "y": {"_scope_": "mmseg", "z": inner}}
    assert part["x"] == [inner]


def test_a_student_after_a_detector_in_one_program(tmp_path):
    options = tiny(write_images(tmp_path / "images", each=4), epochs=1, warmup_epochs=0)
    with scope("mmdet"):  # which a detector's training leaves behind
        dry_run(train_tool.load_config(SPARK, tmp_path / "run", options=options))
        assert train_tool.train(SPARK, tmp_path / "run", options=options).epoch == 1
