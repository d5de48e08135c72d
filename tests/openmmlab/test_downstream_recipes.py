import re

import mmengine
import pytest
from downstream_runs import RECIPES, ROOT, need, scope, train_tool
from mmengine.optim import build_optim_wrapper
from mmengine.registry import MODELS, PARAM_SCHEDULERS
from torch import nn

from hgkd.openmmlab.config import drop_downloads, model_config

need("mmdet", "mmseg")


def rates_along(cfg, optimiser):
    """The highest learning rates of all groups, and those at the end."""
    # by the epoch is enough: mmengine converts some of OpenMMLab's schedules to steps when it knows how many there are
    described = [{key: value for key, value in part.items() if key != "convert_to_iter_based"} for part in cfg.param_scheduler]
    parts = [(part, PARAM_SCHEDULERS.build({**part, "optimizer": optimiser})) for part in described]
    optimiser.step()  # else torch warns that schedulers go first
    highest = [group["lr"] for group in optimiser.param_groups]

    def go(by_epoch, start, stop):
        for _ in range(start, stop):
            for part, scheduler in parts:
                if part.get("by_epoch", True) == by_epoch:
                    scheduler.step()
            highest[:] = [max(rate, group["lr"]) for rate, group in zip(highest, optimiser.param_groups, strict=True)]

    steps = cfg.train_cfg.get("max_iters")
    warm_up = max((part["end"] for part in described if part["type"] == "LinearLR"), default=0)
    go(False, 0, warm_up)
    if steps is None:
        go(True, 0, cfg.train_cfg.max_epochs)
    else:
        go(False, warm_up, steps)
    return highest, [group["lr"] for group in optimiser.param_groups]


@pytest.mark.parametrize("recipe", RECIPES)
def test_recipe_builds_its_model_and_optimiser(recipe, monkeypatch):
    def no_download(*args, **kwargs):
        raise AssertionError("a recipe must not fetch anything")

    monkeypatch.setattr(mmengine.runner.checkpoint, "load_from_http", no_download)
    cfg = train_tool.load_config(ROOT / recipe)
    if "max_iters" in cfg.train_cfg:
        cfg = train_tool.load_config(ROOT / recipe, options={"iterations": 800})  # the same schedule in fewer steps
    assert cfg.runner_type == "hgkd.DownstreamRunner"
    assert cfg.backbone is None
    distilled = cfg.model.type == "hgkd.FeatureDistiller"
    assert distilled == ("mgd_" in recipe or "g2sd_" in recipe)
    if distilled:
        cfg.model.allow_random_teacher = True
        for part in ("student", "teacher"):
            cfg.model[part] = model_config(cfg.model[part])
    drop_downloads(cfg.model)
    with scope(cfg.default_scope):
        model = MODELS.build(cfg.model)
        optimiser = build_optim_wrapper(model, cfg.optim_wrapper).optimizer
    trained = {id(p) for p in model.parameters() if p.requires_grad}
    assert {id(p) for group in optimiser.param_groups for p in group["params"] if p.requires_grad} == trained
    rates = {group["lr"] for group in optimiser.param_groups}
    assert (len(rates) > 1) == ("convnext" in recipe)
    for highest, last in zip(*rates_along(cfg, optimiser), strict=True):
        # OpenMMLab ends at a twentieth, or a little above; a floor above a group's own rate would undo its decay
        assert last <= highest / 15


TIMM_TO_PUBLISHED = [
    (r"backbone\.network\.stem", "backbone.downsample_layers.0"),
    (r"backbone\.network\.stages\.(\d)\.downsample", r"backbone.downsample_layers.\1"),
    (r"backbone\.network\.stages\.(\d)\.blocks", r"backbone.stages.\1"),
]


def layer_rates(recipe):
    """Name as in the published ConvNeXt -> share of the full learning rate."""
    cfg = train_tool.load_config(ROOT / recipe)
    with scope(cfg.default_scope):
        model = MODELS.build(cfg.model)
        optimiser = build_optim_wrapper(model, cfg.optim_wrapper).optimizer
    rates = {id(p): group["lr"] / 1e-4 for group in optimiser.param_groups for p in group["params"]}
    found = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            for ours, theirs in TIMM_TO_PUBLISHED:
                name = re.sub(ours, theirs, name)
            found[name] = rates[id(parameter)]
    return found


def test_layer_decay_of_convnext_detectors_is_the_published():
    from mmdet.engine.optimizers.layer_decay_optimizer_constructor import get_layer_id_for_convnext

    for name, rate in layer_rates("downstream/detection/faster-rcnn_convnext-t_3x_coco.py").items():
        assert rate == pytest.approx(0.95 ** (7 - get_layer_id_for_convnext(name, 6))), name


def test_stage_decay_of_convnext_segmentors():
    from mmseg.engine.optimizers.layer_decay_optimizer_constructor import get_stage_id_for_convnext

    rates = layer_rates("downstream/segmentation/upernet_convnext-t_160k_ade20k.py")
    for name, rate in rates.items():
        published = 0.9 ** (7 - get_stage_id_for_convnext(name, 8))
        if name.startswith(("backbone.stages", "backbone.downsample_layers.0")):
            assert rate == pytest.approx(published / 0.81), name  # as _base_/student.py says
        elif name.startswith("backbone.downsample_layers"):
            stage = int(name.split(".")[2])
            assert rate == rates[f"backbone.stages.{stage}.0.conv_dw.weight"]
        else:
            assert rate == published == 1.0, name


def test_mgd_of_reppoints_compares_convolutions():
    cfg = train_tool.load_config(ROOT / "downstream/detection/mgd_reppoints_x101-dcn_r50_2x_coco.py").model
    assert [tap.student for tap in cfg.taps] == [f"neck.fpn_convs.{level}.conv" for level in range(5)]
    with scope("mmdet"):
        neck = MODELS.build(cfg.student.neck)
    for convolution in neck.fpn_convs:  # what makes it another map than the neck's
        assert isinstance(convolution.conv, nn.Conv2d)
        assert convolution.with_norm


@pytest.mark.parametrize("recipe", [r for r in RECIPES if "retinanet" in str(r) and "bccd" in str(r)])
def test_no_batch_of_one_image_where_a_norm_sees_a_single_place(recipe):
    """The FPN's coarsest map of 128 x 96 pixels is 1 x 1; with one image its norm has one value a channel."""
    cfg = train_tool.load_config(ROOT / recipe, options={})
    assert cfg.train_dataloader.batch_size > 1
    assert cfg.train_dataloader.drop_last
