"""The tutorial of a detector, all its commands in their order, with thin networks on a few small images."""

import copy
import re
from pathlib import Path

import pytest
import torch
from downstream_runs import need, scope
from mmengine.config import Config
from small_models import write_bccd
from tiny_commands import readers_folder, run_replaced, tiny_student
from tiny_runs import ROOT, write_images
from torch import nn
from tutorial_pages import blocks_of, run_page

from hgkd.api.train import load_config
from hgkd.openmmlab import dry_run_downstream
from hgkd.openmmlab.weights import Pixels, prepared_pixels
from hgkd.weights.run_folder import find_last_checkpoint

PAGE = ROOT / "docs/tutorials/detector.md"
THIN = 0.125  # of CSPNeXt's widths; RTMDet-tiny has 0.375
TINY = {
    "hgkd/": tiny_student(**{"model.student.encoder_kwargs.widen_factor": THIN}),
    "my_detector.py": {"batch_size": 2, "epochs": 2, "workers": 0, "param_scheduler.0.end": 1},
}


def thin(cfg):
    """RTMDet with thin layers and small pictures; other configs as they are."""
    if cfg.model.type != "RTMDet":
        return cfg
    cfg = copy.deepcopy(cfg)
    cfg.model.backbone.widen_factor = THIN
    cfg.model.neck.update(in_channels=[32, 64, 128], out_channels=16)
    cfg.model.bbox_head.update(in_channels=16, feat_channels=16, stacked_convs=1)
    # all places are kept: an untrained detector finds ties, of which NMS and a limit keep any
    cfg.model.test_cfg.update(max_per_img=1000, nms=dict(type="nms", iou_threshold=1.0))
    for loader in (cfg.train_dataloader, cfg.val_dataloader, cfg.test_dataloader):
        for step in loader.dataset.pipeline:
            if "scale" in step:
                step.scale = (128, 96)
    return cfg


def decide(folder):
    """Give the checkpoint of a work folder heads that tell boxes apart: untrained ones find ties, of which NMS keeps any."""
    from mmengine.registry import MODELS

    file = find_last_checkpoint(folder)
    checkpoint = torch.load(file, weights_only=False)
    with scope("mmdet"):
        model = MODELS.build(Config.fromstring(checkpoint["meta"]["cfg"], ".py").model).eval()
    model.load_state_dict(checkpoint["state_dict"])

    def spread(layer, inputs, outputs):
        layer.weight.data /= outputs.std()
        return outputs / outputs.std()

    torch.manual_seed(0)
    for name, layer in model.named_modules():
        if ("rtm_cls" in name or "rtm_reg" in name) and isinstance(layer, nn.Conv2d):
            nn.init.normal_(layer.weight)
            nn.init.zeros_(layer.bias)
            layer.register_forward_hook(spread)
    with torch.no_grad():
        model(torch.randn(1, 3, 96, 128))
    checkpoint["state_dict"] = model.state_dict()
    torch.save(checkpoint, file)


def run(words):
    options = {}
    if words[0] == "train":
        (options,) = [options for start, options in TINY.items() if words[1].startswith(start)]
        if "--resume" in words:  # trains on: one epoch more
            options = options | {"epochs": options["epochs"] + 1}
    code = run_replaced(words, options, thin)
    if words[0] == "train" and "--resume" in words:
        decide(Path("work_dirs/detector"))
    return code


@pytest.mark.slow
def test_the_page_shows_what_happens(tmp_path, monkeypatch):
    need("mmdet")
    pytest.importorskip("onnxruntime")
    readers_folder(tmp_path, monkeypatch)
    # odd numbers: the last batch is not filled
    write_images(tmp_path / "home/photos/more", classes=["c"], each=1)
    write_bccd(tmp_path / "home/boxes", train=3)
    monkeypatch.setattr("tutorial_pages.WIDTH", "100")  # tables of this page are as wide
    run_page(PAGE, run)
    objects = (tmp_path / "predicted/predictions.jsonl").read_text().splitlines()
    assert len(objects) == len(list((tmp_path / "predicted/pictures").iterdir())) > 0


def test_its_config_starts_from_retinanet_too(tmp_path):
    need("mmdet")
    (text,) = [block.text for block in blocks_of(PAGE.read_text()) if block.text.startswith("# my_detector.py")]
    other = re.search(r'"hgkd::downstream/detection/retinanet[^"]*"', PAGE.read_text())[0]
    (tmp_path / "my_detector.py").write_text(re.sub(r'"hgkd::[^"]*"', other, text))
    cfg = load_config(tmp_path / "my_detector.py", options={"data_root": "boxes"})
    assert cfg.model.type == "RetinaNet"
    scales = [step.scale for step in cfg.train_dataloader.dataset.pipeline if "scale" in step]
    assert scales == [step.scale for step in cfg.test_dataloader.dataset.pipeline if "scale" in step] == [(160, 120)]
    assert cfg.val_dataloader.dataset.metainfo.classes == ("WBC", "RBC", "Platelets")


def test_a_config_of_openmmlabs_own_takes_the_export(tmp_path, monkeypatch):
    need("mmdet")
    monkeypatch.chdir(tmp_path)
    (text,) = [block.text for block in blocks_of(PAGE.read_text()) if block.text.startswith("# my_rtmdet.py")]
    (tmp_path / "my_rtmdet.py").write_text(text)
    write_bccd(tmp_path / "boxes", train=2)
    options = {"data_root": "boxes", "batch_size": 2, "workers": 0, "epochs": 2}
    cfg = thin(load_config(tmp_path / "my_rtmdet.py", tmp_path / "run", options=options))
    assert cfg.model.type == "RTMDet"
    given = prepared_pixels(cfg.model.data_preprocessor, cfg.train_dataloader.dataset.pipeline)
    assert given.agrees(Pixels((123.675, 116.28, 103.53), (58.395, 57.12, 57.375), "RGB"))
    assert "\nlosses " in dry_run_downstream(cfg)
