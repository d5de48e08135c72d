"""Detectors and segmentors on images of more than 8 bits, and backbones for other channels than theirs."""

import cv2
import numpy as np
import pytest
import torch
from mmcv.transforms import Compose
from mmengine.config import Config
from PIL import Image

from hgkd.errors import code_of
from hgkd.openmmlab.backbone import TimmBackbone
from hgkd.openmmlab.config import load_with_care, merge_options, skip_unreadable_images
from hgkd.openmmlab.images import LoadReadableImage
from hgkd.openmmlab.weights import load_backbone_file

RAMP = np.linspace(0, 4095, 20 * 24).reshape(20, 24).astype(np.uint16)
SCALED = np.rint(RAMP.astype(np.float64) * 255 / 4095)


def test_grey_images_of_12_bits_fill_the_range(tmp_path):
    Image.fromarray(RAMP).save(tmp_path / "a.png")
    found = LoadReadableImage(value_range=[0, 4095])({"img_path": str(tmp_path / "a.png")})["img"]
    assert (found.shape, found.dtype) == ((20, 24, 3), np.uint8)
    np.testing.assert_array_equal(found[..., 0], SCALED)
    assert LoadReadableImage()({"img_path": str(tmp_path / "a.png")})["img"].max() == 16  # as of 16 bits


def test_colours_of_12_bits_stay_in_their_order(tmp_path):
    rgb = np.stack([RAMP, RAMP[::-1], RAMP[:, ::-1]], axis=-1)
    cv2.imwrite(str(tmp_path / "a.png"), rgb[..., ::-1])
    found = LoadReadableImage(value_range=(0, 4095))({"img_path": str(tmp_path / "a.png")})["img"]
    np.testing.assert_array_equal(found[..., ::-1], np.rint(rgb.astype(np.float64) * 255 / 4095))  # BGR


def test_pictures_of_8_bits_are_not_concerned(tmp_path):
    Image.fromarray((RAMP // 16).astype(np.uint8)).save(tmp_path / "a.png")
    plain, ranged = (LoadReadableImage(value_range=given) for given in (None, (0, 4095)))
    found = [load({"img_path": str(tmp_path / "a.png")})["img"] for load in (plain, ranged)]
    np.testing.assert_array_equal(*found)


def test_the_short_option_reaches_every_pipeline():
    dataset = {"type": "CocoDataset", "pipeline": [{"type": "LoadImageFromFile"}, {"type": "PackDetInputs"}]}
    loaders = {f"{part}_dataloader": {"dataset": dataset} for part in ("train", "val", "test")}
    cfg = Config({"default_scope": "mmdet", "model": {}, **loaders})
    merge_options(cfg, {"value_range": [0, 4095]})
    for part in ("train", "val", "test"):
        pipeline = cfg[f"{part}_dataloader"].dataset.pipeline
        load_with_care(pipeline, {"required": True})
        assert pipeline[0] == {"type": "hgkd.LoadReadableImage", "required": True, "value_range": [0, 4095]}
        assert "value_range" not in pipeline[1]
    with pytest.raises(ValueError, match=r"low < high"):
        merge_options(cfg, {"value_range": [4095, 0]})


def test_a_pipeline_that_a_hook_switches_to_reads_images_as_the_first(tmp_path):
    dataset = {"type": "CocoDataset", "pipeline": [{"type": "LoadImageFromFile"}]}
    hook = {"type": "PipelineSwitchHook", "switch_epoch": 1, "switch_pipeline": [{"type": "LoadImageFromFile"}]}
    cfg = Config({"default_scope": "mmdet", "model": {}, "train_dataloader": {"dataset": dataset}, "custom_hooks": [hook]})
    merge_options(cfg, {"value_range": [0, 4095]})
    skip_unreadable_images(cfg, str(tmp_path))
    later = Compose(cfg.custom_hooks[0].switch_pipeline)  # as the hook itself builds it
    Image.fromarray(RAMP).save(tmp_path / "a.png")
    np.testing.assert_array_equal(later({"img_path": str(tmp_path / "a.png")})["img"][..., 0], SCALED)
    (tmp_path / "b.png").write_bytes(b"cut off")
    assert later({"img_path": str(tmp_path / "b.png")}) is None
    assert (tmp_path / "unreadable_files.txt").read_text().splitlines() == [str(tmp_path / "b.png")]


def test_a_backbone_for_other_channels_is_refused(tmp_path):
    file = tmp_path / "four.pth"
    torch.save(TimmBackbone("test_resnet", out_indices=(0, 1), in_chans=4).network.state_dict(), file)
    with pytest.raises(
        ValueError, match=r"takes images of 4 channels, .* backbone 3: mmdet and mmseg read .* 8-bit BGR"
    ) as error:
        load_backbone_file(TimmBackbone("test_resnet", out_indices=(0, 1)), file)
    assert code_of(error.value) == "channels-differ"
