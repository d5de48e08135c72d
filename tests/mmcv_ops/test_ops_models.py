"""Small detectors of mmdet over these operators: one loss with its gradients, one prediction."""

import pytest
import torch
from mmengine.config import Config


def detector(name: str):
    """A detector of mmdet's own configuration, with a narrow ResNet-18, and two images of 64 pixels with boxes and masks."""
    from mmdet.registry import MODELS
    from mmdet.testing import demo_mm_inputs
    from mmdet.utils import register_all_modules

    register_all_modules()
    # not mmengine.hub.get_config, which runs pip where it finds no package
    config = Config.fromstring(f"_base_ = 'mmdet::{name}'", ".py").model
    config.backbone.update(depth=18, base_channels=8, init_cfg=None, norm_cfg={"type": "BN"})
    config.neck.update(in_channels=[8, 16, 32, 64], out_channels=16)
    if "rpn_head" in config:
        config.rpn_head.update(in_channels=16, feat_channels=16)
        for extractor in (config.roi_head.bbox_roi_extractor, config.roi_head.mask_roi_extractor):
            extractor.out_channels = 16
        config.roi_head.bbox_head.update(in_channels=16, fc_out_channels=32)
        config.roi_head.mask_head.update(in_channels=16, conv_out_channels=16, num_convs=1)
        config.test_cfg.rcnn.score_thr = 0.0
    else:
        config.bbox_head.update(in_channels=16, feat_channels=16, stacked_convs=1)
        config.test_cfg.score_thr = 0.0
    model = MODELS.build(config)
    model.init_weights()
    batch = demo_mm_inputs(2, image_shapes=[(3, 64, 64)] * 2, num_items=[2, 0], with_mask="rpn_head" in config)
    return model, batch


@pytest.mark.parametrize(
    ("name", "terms"),
    [
        ("retinanet/retinanet_r18_fpn_1x_coco.py", {"loss_cls", "loss_bbox"}),
        ("mask_rcnn/mask-rcnn_r50_fpn_1x_coco.py", {"loss_rpn_cls", "loss_rpn_bbox", "loss_cls", "loss_bbox", "loss_mask"}),
    ],
)
def test_detector(ops, name, terms):
    pytest.importorskip("mmdet")
    model, batch = detector(name)
    losses = model(**model.data_preprocessor(batch, True), mode="loss")
    assert terms <= set(losses)
    total, _ = model.parse_losses(losses)
    total.backward()
    assert total.isfinite()
    idle = [name for name, p in model.named_parameters() if p.requires_grad and (p.grad is None or not p.grad.isfinite().all())]
    assert not idle
    model.eval()
    with torch.no_grad():
        results = model(**model.data_preprocessor(batch, False), mode="predict")
    found = results[0].pred_instances
    assert len(results) == 2
    assert 0 < len(found) <= 100
    assert found.bboxes.shape == (len(found), 4)
    if "loss_mask" in terms:
        assert found.masks.shape == (len(found), 64, 64)
