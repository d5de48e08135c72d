"""Every shipped detector and segmentor starts as its config has it: dry run, a step, a validation, a checkpoint that loads.

Networks and images are an eighth of their size (:mod:`small_models`), on data sets of a few images in the layout of the true
ones. Some of OpenMMLab's own configs, as a user's config inherits them, start in the same way.
"""

import gc

import pytest
import torch
from downstream_runs import RECIPES, measure_tool, need, scope, train_tool
from mmengine.registry import MODELS
from small_models import LAYOUTS, shrink
from tiny_runs import ROOT

from hgkd.cli import train as train_command
from hgkd.openmmlab import merge_options
from hgkd.openmmlab.backbone import TimmBackbone
from hgkd.training.hooks.alarms import LossAlarmHook

need("mmdet", "mmseg")


@pytest.fixture(scope="module", autouse=True)
def _quick():
    """Without what costs the most here, and takes no part: the dumped config in good style, mmdet's collections of garbage."""
    gc.freeze()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("mmengine.config.config.FormatCode", lambda text, **options: (text, True))
        yield
    gc.unfreeze()


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A tiny data set by the name of its layout."""
    made = {}

    def find(layout):
        if layout not in made:
            made[layout] = tmp_path_factory.mktemp(layout)
            LAYOUTS[layout](made[layout])
        return str(made[layout])

    return find


def layout_of(cfg):
    dataset = cfg.val_dataloader.dataset
    if "shapes" in dataset.data_root:
        return "shapes"
    return {"ADE20KDataset": "ade20k", "CityscapesDataset": "cityscapes", "BaseSegDataset": "camvid"}.get(
        dataset.type, "bccd" if "bccd" in dataset.data_root else "coco"
    )


def save_random(model, folder, name):
    """A weight file of a model that is built for it."""
    file = folder / f"{name}.pth"
    built = MODELS.build(model)
    built = built.network if isinstance(built, TimmBackbone) else built
    torch.save({"state_dict": built.state_dict(), "meta": {}}, file)
    return str(file)


def start(config, data, folder, **options):
    """Dry run, training of one step, and test of its checkpoint; the metrics of the test."""
    cfg = shrink(train_tool.load_config(config, folder / "run"))
    options |= {"data_root": data(layout_of(cfg)), "workers": 0, "batch_size": 2}
    student = cfg.model.get("student", cfg.model)
    with scope(cfg.default_scope):
        options["backbone"] = save_random(student.backbone, folder, "backbone")
        if "teacher" in cfg.model:
            options["teacher_checkpoint"] = save_random(cfg.model.teacher, folder, "teacher")
    merge_options(cfg, options)
    by_steps = "max_iters" in cfg.train_cfg
    steps = 1 if by_steps else cfg.train_dataloader.dataset.get("times", 1)  # 2 images, in 3x recipes three times
    length = cfg.train_cfg.max_iters if by_steps else steps * cfg.train_cfg.max_epochs
    assert f" {length} steps of 2 images" in train_command.dry_run_downstream(cfg)
    merge_options(cfg, {"iterations" if by_steps else "epochs": 1})
    runner = train_tool.train(cfg)
    assert runner.iter == steps
    assert runner.val_loop is not None
    # RTMDet's loss rises tenfold from a first one near 0, which is no divergence
    (alarm,) = (hook for hook in runner.hooks if isinstance(hook, LossAlarmHook))
    assert (alarm.spike, alarm.patience) == (50.0 if student.type == "RTMDet" else 5.0, 20)
    log = "".join(file.read_text() for file in (folder / "run").glob("*/*.log"))
    assert "(val)" in log
    return measure_tool.run_test(cfg, folder / "run" / ("iter_1.pth" if by_steps else "epoch_1.pth"))


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_recipe_starts(recipe, data, tmp_path):
    assert start(ROOT / recipe, data, tmp_path)


# One of each kind of model that docs/howto/downstream.md names, and others; values: what shrinks defaults that their config
# leaves out, and lets a detector that has learnt nothing find something.
STOCK = {
    "mmdet::faster_rcnn/faster-rcnn_r50_fpn_1x_coco.py": {},
    "mmdet::mask_rcnn/mask-rcnn_r50_fpn_1x_coco.py": {},
    "mmdet::retinanet/retinanet_r50_fpn_1x_coco.py": {},
    "mmdet::dcn/cascade-mask-rcnn_x101-32x4d-dconv-c3-c5_fpn_1x_coco.py": {},
    "mmdet::reppoints/reppoints-moment_r50_fpn-gn_head-gn_2x_coco.py": {},
    "mmdet::solo/solo_r50_fpn_1x_coco.py": {},
    "mmdet::fcos/fcos_r50-caffe_fpn_gn-head_1x_coco.py": {"model.bbox_head.norm_cfg": dict(type="GN", num_groups=4)},
    "mmdet::deformable_detr/deformable-detr_r50_16xb2-50e_coco.py": {"model.bbox_head.embed_dims": 32},
    "mmdet::rtmdet/rtmdet_tiny_8xb32-300e_coco.py": {"model.test_cfg.min_bbox_size": -1},
    "mmdet::yolox/yolox_tiny_8xb8-300e_coco.py": {},
    "mmseg::upernet/upernet_r50_4xb4-160k_ade20k-512x512.py": {},
    "mmseg::pspnet/pspnet_r50-d8_4xb2-40k_cityscapes-512x1024.py": {},
    "mmseg::deeplabv3/deeplabv3_r50-d8_4xb4-80k_ade20k-512x512.py": {},
    "mmseg::segformer/segformer_mit-b0_8xb2-160k_ade20k-512x512.py": {},
    "mmseg::stdc/stdc1_4xb12-80k_cityscapes-512x1024.py": {},
}


@pytest.mark.parametrize("stock", STOCK)
def test_a_config_over_the_libraries_own_starts(stock, data, tmp_path):
    mine = tmp_path / "mine.py"
    mine.write_text(f"_base_ = {stock!r}\n")
    assert start(mine, data, tmp_path, **STOCK[stock])
