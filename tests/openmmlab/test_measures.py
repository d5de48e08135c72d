"""Scores, measures and losses that would end a run after its first epoch, or teach nothing, are refused before it."""

import pytest
from mmengine.config import Config
from refusals import refused

from hgkd.errors import DataError
from hgkd.openmmlab.measures import check_all_measured, check_best, check_coco_metric, check_pixel_heads

COCO = {"type": "CocoMetric", "metric": ["bbox", "segm"]}
IOU = {"type": "IoUMetric", "iou_metrics": ["mIoU", "mFscore"]}


def config(best, *evaluators):
    return Config({"default_hooks": {"checkpoint": {"save_best": best}}, "val_evaluator": list(evaluators)})


@pytest.mark.parametrize(
    ("best", "evaluator"),
    [
        ("coco/bbox_mAP", COCO),
        (["coco/segm_mAP_50", "coco/bbox_mAP"], COCO),
        ("mine/bbox_mAP", {**COCO, "prefix": "mine"}),
        ("coco/AR@300", {**COCO, "metric": "proposal"}),
        ("coco/AR@7", {**COCO, "metric": "proposal_fast", "proposal_nums": (5, 6, 7)}),
        ("mIoU", IOU),
        ("mPrecision", IOU),
        ("auto", COCO),
        (None, COCO),
        ("anything", {"type": "VOCMetric"}),
        ("coco/disc_precision", {**COCO, "classwise": True}),
    ],
)
def test_scores_that_are_given(best, evaluator):
    check_best(config(best, evaluator))
    check_best(Config({"val_evaluator": evaluator}))


@pytest.mark.parametrize(
    ("best", "evaluator", "known"),
    [
        ("bbox_mAP", COCO, "coco/bbox_mAP, coco/bbox_mAP_50"),
        ("coco/segm_mAP", {**COCO, "metric": "bbox"}, "coco/bbox_mAP"),
        ("coco/bbox_mAP_75", {**COCO, "metric_items": ["mAP"]}, "coco/bbox_mAP, coco/segm_mAP;"),
        (["auto", "mDice"], IOU, "aAcc, mAcc, mFscore, mIoU, mPrecision, mRecall"),
    ],
)
def test_a_best_score_that_nobody_gives(best, evaluator, known):
    """https://github.com/open-mmlab/mmdetection/issues/6138: ``KeyError: 'bbox_mAP'`` after the first validation."""
    with pytest.raises(DataError, match=rf"save_best=.* is no score of val_evaluator, which gives {known}.*or 'auto'"):
        check_best(config(best, evaluator))
    check_best(config(best, evaluator, {"type": "MyMetric"}))  # which may give it


def test_three_numbers_of_proposals():
    """https://github.com/AILab-CVC/YOLO-World/issues/286: pycocotools' summary reads three."""
    with refused(DataError, "proposal-nums-wrong", "val_evaluator.proposal_nums=(100,)", "(1, 10, 100)"):
        check_coco_metric({"metric": "bbox", "proposal_nums": (100,)}, {}, "val_evaluator")
    check_coco_metric({"metric": "bbox", "proposal_nums": (1, 10, 100)}, {}, "val_evaluator")
    check_coco_metric({"metric": "bbox", "proposal_nums": [300], "use_mp_eval": True}, {}, "val_evaluator")  # as of V3Det


@pytest.mark.parametrize(
    ("dataset", "message"),
    [
        (
            {"indices": 10},
            r"indices=10 leaves out images whose objects val_evaluator.ann_file counts as missed; write",
        ),
        (
            {"filter_cfg": {"min_size": 32}},
            r"filter_cfg={'min_size': 32} leaves out images .*set test_mode=True",
        ),
    ],
)
def test_a_part_of_the_images_that_are_counted(dataset, message):
    """https://github.com/see--/keras-centernet/issues/19: AP 0.075 for 0.364."""
    measure = {**COCO, "ann_file": "val.json"}
    with pytest.raises(DataError, match=f"val_dataloader: {message}"):
        check_all_measured(dataset, measure, "val_dataloader")
    check_all_measured(dataset, COCO, "val_dataloader")  # then it measures by what the data set hands on


def test_all_images_that_are_counted():
    measure = {**COCO, "ann_file": "val.json"}
    check_all_measured({"filter_cfg": {"min_size": 32}, "test_mode": True}, measure, "val_dataloader")
    check_all_measured({"filter_cfg": {"filter_empty_gt": False}}, measure, "val_dataloader")


def head(**options):
    return {"model.decode_head": {"num_classes": 2, "loss_decode": {"type": "CrossEntropyLoss"}, **options}}


@pytest.mark.parametrize(
    ("options", "refusal"),
    [
        (
            {"num_classes": 1},
            ("pixel-head-of-one-output", "0", "metainfo.classes=('background', NAME)"),
        ),
        (
            {"num_classes": 1, "loss_decode": [{"type": "mmseg.CrossEntropyLoss"}]},
            ("pixel-head-of-one-output", "model.decode_head.num_classes=2"),
        ),
        ({"out_channels": 1}, ("pixel-head-of-one-output", "0", "model.decode_head.loss_decode.use_sigmoid=True")),
        (
            {"loss_decode": {"type": "CrossEntropyLoss", "class_weight": [1.0] * 3}},
            ("class-weights-differ", "model.decode_head.loss_decode.class_weight", "3", "2"),
        ),
    ],
)
def test_losses_that_cannot_be(options, refusal):
    """https://github.com/open-mmlab/mmsegmentation/issues/2201 and 3811."""
    with refused(DataError, *refusal):
        check_pixel_heads(head(**options))


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"loss_decode": {"type": "CrossEntropyLoss", "class_weight": [1.0, 2.0]}},
        {"loss_decode": {"type": "CrossEntropyLoss", "class_weight": "weights.npy"}},
        {"out_channels": 1, "loss_decode": {"type": "CrossEntropyLoss", "use_sigmoid": True}},
        {"num_classes": 1, "loss_decode": [{"type": "DiceLoss"}]},
    ],
)
def test_losses_that_can(options):
    check_pixel_heads(head(**options))
