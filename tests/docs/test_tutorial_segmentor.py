"""The tutorial of a segmentor, all its commands in their order, with thin networks on a few small images."""

import copy

import pytest
from downstream_runs import need
from small_models import write_camvid
from tiny_commands import WIDTHS, readers_folder, run_replaced, tiny_student
from tiny_runs import ROOT
from tutorial_pages import run_page

PAGE = ROOT / "docs/tutorials/segmentor.md"
TINY = {
    "hgkd/": tiny_student(**{"model.student.encoder_kwargs": str({"channels": list(WIDTHS)}).replace(" ", "")}),
    "my_segmentor.py": {"batch_size": 2, "iterations": 2, "workers": 0, "default_hooks.logger.interval": 1},
}


def thin(cfg):
    """UPerNet with thin layers and small pictures; other configs as they are."""
    if cfg.model.type != "EncoderDecoder":
        return cfg
    cfg = copy.deepcopy(cfg)
    cfg.model.backbone.base_channels = WIDTHS[0]  # the stem keeps its width: timm's ResNet has it at any width
    cfg.model.decode_head.update(in_channels=list(WIDTHS), channels=16)
    cfg.model.auxiliary_head.update(in_channels=WIDTHS[2], channels=8)
    for loader in (cfg.train_dataloader, cfg.val_dataloader, cfg.test_dataloader):
        for step in loader.dataset.pipeline:
            if "scale" in step:
                step.scale = (128, 64)
            if "crop_size" in step:
                step.crop_size = (64, 64)
    cfg.model.data_preprocessor.size = (64, 64)
    return cfg


def run(words):
    options = {}
    if words[0] == "train":
        (options,) = [options for start, options in TINY.items() if words[1].startswith(start)]
    return run_replaced(words, options, thin)


@pytest.mark.slow
def test_the_page_shows_what_happens(tmp_path, monkeypatch):
    need("mmseg")
    pytest.importorskip("onnxruntime")
    readers_folder(tmp_path, monkeypatch)
    write_camvid(tmp_path / "home/scenes")
    monkeypatch.setattr("tutorial_pages.WIDTH", "100")  # tables of this page are as wide
    run_page(PAGE, run)
    maps = {file.stem for file in (tmp_path / "predicted/label_maps").iterdir()}
    assert maps == {file.stem for file in (tmp_path / "home/scenes/images/test").iterdir()}
