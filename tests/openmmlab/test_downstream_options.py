"""Options of detectors and segmentors: what wins, and what is refused."""

import re

import pytest
from downstream_runs import (
    DETECTOR,
    FASTER_HEAD,
    RECIPES,
    SEGMENTOR,
    need,
    shapes_ade20k,
    shapes_coco,
    tiny_detector,
    tiny_segmentor,
    train_tool,
)
from mmengine.config import Config
from refusals import refused
from tiny_runs import ROOT

from hgkd.cli import train as train_command
from hgkd.config import read_config
from hgkd.data.shapes import CLASSES
from hgkd.openmmlab import dry_run_downstream
from hgkd.openmmlab.config import datasets_of, file_options
from hgkd.openmmlab.heads import class_heads

need("mmdet", "mmseg")


def child(tmp_path, text, base=DETECTOR, name="child.py"):
    path = tmp_path / name
    path.write_text(f"_base_ = [{str(base)!r}]\n{text}\n")
    return path


def load(path, **options):
    return train_tool.load_config(path, "run", options={key.replace("__", "."): value for key, value in options.items()})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": 1e-3, "optim_wrapper.optimizer.lr": 2e-3}, "lr=0.001 and optim_wrapper.optimizer.lr=0.002 are one setting"),
        ({"epochs": 2, "train_cfg.max_epochs": 3}, "epochs=2 and train_cfg.max_epochs=3 are"),
        ({"workers": 2, "val_dataloader.num_workers": 0}, "workers=2 and val_dataloader.num_workers=0 are"),
    ],
)
def test_two_values_on_the_command_line_are_refused(options, message):
    with pytest.raises(ValueError, match=f"{message}.* the command line gives both; take one of them out"):
        train_tool.load_config(DETECTOR, options=options)
    for key, value in options.items():
        train_tool.load_config(DETECTOR, options={key: value})


def test_what_is_typed_by_its_path_stays_as_it_is():
    cfg = load(DETECTOR, epochs=6, param_scheduler__1__end=5, train_cfg__val_interval=2, param_scheduler__1__T_max=6)
    assert (cfg.train_cfg.max_epochs, cfg.train_cfg.val_interval, cfg.param_scheduler[1].end) == (6, 2, 5)
    cfg = load(DETECTOR, data_root="/new", val_evaluator__ann_file="data/bccd/annotations/other.json")
    assert cfg.val_evaluator.ann_file == "data/bccd/annotations/other.json"
    assert cfg.test_evaluator.ann_file == "/new/annotations/test.json"
    options = {"data_root": "/new", "test_dataloader.dataset._delete_": True, "test_dataloader.dataset.type": "CocoDataset"}
    assert train_tool.load_config(DETECTOR, options=options).test_dataloader.dataset.data_root == "/new"


def test_the_length_by_its_path_stretches_the_schedule_as_the_short_option_does():
    by_path, short = load(DETECTOR, train_cfg__max_epochs=6), load(DETECTOR, epochs=6)
    assert by_path.to_dict() == short.to_dict()
    assert by_path.param_scheduler[1].end == 6
    assert load(SEGMENTOR, train_cfg__max_iters=100).to_dict() == load(SEGMENTOR, iterations=100).to_dict()


@pytest.mark.parametrize(
    ("epochs", "cosine", "switch", "last"), [(30, (15, 30, 15), 28, 2), (5, (2, 5, 3), 4, 0), (1, (0, 1, 1), 0, 0)]
)
def test_the_length_stretches_cosines_and_what_ends_the_mosaics(epochs, cosine, switch, last):
    cfg = load(ROOT / "downstream/detection/rtmdet_cspnext-tiny_300e_coco.py", epochs=epochs)
    found = cfg.param_scheduler[1]
    assert (found.begin, found.end, found.T_max) == cosine  # with a T_max of less the rate would rise at the end
    assert [hook.switch_epoch for hook in cfg.custom_hooks if hook.type == "PipelineSwitchHook"] == [switch]
    cfg = load(ROOT / "downstream/detection/yolox_cspdarknet-tiny_300e_coco.py", epochs=epochs)
    assert [hook.num_last_epochs for hook in cfg.custom_hooks if hook.type == "YOLOXModeSwitchHook"] == [last]


def test_a_childs_values_win_and_its_short_options_count(tmp_path):
    path = child(tmp_path, "train_dataloader = dict(batch_size=16)")
    assert load(path).train_dataloader.batch_size == 16
    assert load(path, batch_size=3).train_dataloader.batch_size == 3
    path = child(tmp_path, "batch_size = 8\nepochs = 6\nlr = 0.5\ndata_root = '/new'", path, "grandchild.py")
    cfg = load(path)
    assert (cfg.train_dataloader.batch_size, cfg.optim_wrapper.optimizer.lr) == (8, 0.5)
    assert (cfg.train_cfg.max_epochs, cfg.param_scheduler[1].end) == (6, 6)
    assert cfg.val_evaluator.ann_file == "/new/annotations/val.json"
    cfg = load(path, epochs=4, data_root="/newer")
    assert (cfg.train_cfg.max_epochs, cfg.param_scheduler[1].end) == (4, 4)
    assert cfg.val_evaluator.ann_file == "/newer/annotations/val.json"
    last = child(tmp_path, "train_dataloader = dict(batch_size=2)", path, "last.py")
    assert load(last).train_dataloader.batch_size == 2


def test_variables_by_which_a_file_builds_its_parts_are_no_options(tmp_path):
    text = "batch_size = 8\ntrain_dataloader = dict(batch_size=batch_size // 2)\n"
    text += "epochs = 6\ntrain_cfg = dict(max_epochs=2 * epochs)"
    cfg = load(child(tmp_path, text))
    assert (cfg.train_dataloader.batch_size, cfg.train_cfg.max_epochs) == (4, 12)


@pytest.mark.parametrize("recipe", RECIPES)
def test_no_shipped_recipe_changes_itself(recipe):
    assert file_options(read_config(ROOT / recipe)) == {}


def test_a_dumped_config_is_the_same_run(tmp_path):
    cfg = load(child(tmp_path, "batch_size = 8\nepochs = 6"), lr=0.25)
    cfg.dump(tmp_path / "dumped.py")
    again = train_tool.load_config(tmp_path / "dumped.py", "run")
    assert again.to_dict() == Config.fromfile(tmp_path / "dumped.py").to_dict() | {"work_dir": "run"}
    assert again.param_scheduler == cfg.param_scheduler


@pytest.mark.parametrize(
    "recipe",
    [
        *(f"detection/{name}" for name in ("mgd_mask-rcnn_cascade-x101-dcn_r50_2x_coco", "rtmdet-ins_cspnext-tiny_300e_coco")),
        *(f"segmentation/{name}" for name in ("g2sd_upernet_r50_r18_1k_camvid", "pspnet_r18_80k_cityscapes")),
        "mmdet::retinanet/retinanet_r18_fpn_1x_coco.py",
    ],
)
def test_own_classes_fit_a_recipe(recipe):
    path = recipe if "::" in recipe else ROOT / f"downstream/{recipe}.py"
    cfg = train_tool.load_config(path, options={"classes": ["cell", "traffic light"]})
    counts = {head["num_classes"] for _, head in class_heads(cfg.model, "model")}
    assert counts == {2}
    for dataset in datasets_of(cfg):
        assert tuple(dataset["metainfo"]["classes"]) == ("cell", "traffic light")
        assert not dataset["metainfo"]["palette"], "colours of other classes"


def test_own_classes_start_a_training(tmp_path):
    by_hand = tiny_detector(shapes_coco(tmp_path / "boxes")) | FASTER_HEAD
    options = {key: value for key, value in by_hand.items() if not key.endswith(("metainfo.classes", "num_classes"))}
    cfg = train_tool.load_config(DETECTOR, tmp_path / "run", options={**options, "classes": list(CLASSES)})
    assert cfg.model == train_tool.load_config(DETECTOR, tmp_path / "run", options=by_hand).model
    assert "2 steps of 2 images out of 4" in dry_run_downstream(cfg)

    by_hand = tiny_segmentor(shapes_ade20k(tmp_path / "maps"))
    told = ("metainfo", "num_classes", "ignore_index", "seg_pad_val")
    options = {key: value for key, value in by_hand.items() if not key.endswith(told)}
    options |= {"classes": list(CLASSES), "ignored_label": 255}
    cfg = train_tool.load_config(SEGMENTOR, tmp_path / "run", options=options)
    same = train_tool.load_config(SEGMENTOR, tmp_path / "run", options=by_hand)
    assert (cfg.model, cfg.val_evaluator, cfg.test_evaluator) == (same.model, same.val_evaluator, same.test_evaluator)
    assert "2 steps of 2 images out of 4" in dry_run_downstream(cfg)
    steps = [step for dataset in datasets_of(cfg) for step in dataset["pipeline"] if step["type"] == "RandomCrop"]
    assert {step["ignore_index"] for step in steps} == {255}


def test_one_class_and_what_is_no_name():
    assert load(DETECTOR, classes="cell").train_dataloader.dataset.metainfo.classes == ("cell",)
    for wrong in (3, [], ["a", ""], [1, 2]):
        with refused(ValueError, "classes-not-names", repr(wrong)):
            load(DETECTOR, classes=wrong)
    with refused(ValueError, "option-without-place", "ignored_label=3"):
        load(DETECTOR, ignored_label=3)
    with refused(ValueError, "option-without-place", "a"):
        load("mmdet::grounding_dino/grounding_dino_swin-t_pretrain_obj365_goldg_cap4m.py", classes=["a"])


def test_a_variable_of_a_config_file_that_is_called_classes_is_no_option(tmp_path):
    cfg = load(child(tmp_path, "classes = ('a',)\nignored_label = 3"))
    assert cfg.model.roi_head.bbox_head.num_classes == 3


def test_configs_of_the_installed_packages(tmp_path, capsys):
    for name, kind in (
        ("mmdet::retinanet/retinanet_r18_fpn_1x_coco.py", "RetinaNet"),
        ("mmseg::pspnet/pspnet_r18-d8_4xb2-80k_cityscapes-512x1024.py", "EncoderDecoder"),
    ):
        cfg = train_tool.load_config(name, options={"data_root": "/new"})
        assert (cfg.model.type, cfg.runner_type) == (kind, "hgkd.DownstreamRunner")
        assert cfg.work_dir == f"work_dirs/{name.rpartition('/')[2].removesuffix('.py')}"
        assert cfg.train_dataloader.dataset.data_root == "/new"
    for name, near in (
        ("mmdet::retinanet_r18_fpn_1x_coco", "did you mean mmdet::retinanet/retinanet_r18_fpn_1x_coco.py?"),
        ("mmdet::retinanet/retinanet_r18_fpn_1x_cocos.py", "did you mean mmdet::retinanet/retinanet_r18_fpn_1x_coco.py"),
        ("mmfoo::a/b.py", "no package 'mmfoo' with configs is installed; installed are mmdet, mmseg"),
    ):
        assert train_command.main([name, "--work-dir", str(tmp_path)]) == 2
        assert near in capsys.readouterr().err


def test_a_dry_run_says_what_is_in_force(tmp_path):
    options = tiny_detector(shapes_coco(tmp_path / "data")) | FASTER_HEAD
    cfg = train_tool.load_config(DETECTOR, tmp_path / "run", options=options)
    report = dict(re.split(r"  +", line, maxsplit=1) for line in dry_run_downstream(cfg).splitlines())
    assert report["whole run"].endswith(" s for 2 steps, reading images and validations not counted")
    assert float(report["a step"].removesuffix(" s to compute")) > 0
    assert report["rate"].startswith(
        "lr 0.0002; LinearLR from 0.01 of it in steps 1 to 50; CosineAnnealingLR to 0 in epochs 1 to 1"
    )
    assert report["pixels"] == "model mean 123.7 116.3 103.5, std 58.4 57.12 57.38"
    assert report["images"] == "4 used"
    assert " MB each" in report["checkpoints"]
