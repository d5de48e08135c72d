"""What a run says of itself before its first step, against what it does."""

import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from mmengine.optim import CosineAnnealingLR, LinearLR, MultiStepLR, OptimWrapper
from mmengine.registry import MODELS as ROOT_MODELS
from tiny_runs import HGKD, ROOT, SPARK, tiny, tiny_hgkd, write_images
from torch import nn

from hgkd.api import train as train_tool
from hgkd.masking import RandomMask
from hgkd.registry import build_runner
from hgkd.training.in_force import cells_text, images_text, kept_at_once, normalisation, rate_text, tensor_bytes
from hgkd.weights.files import read_checkpoint


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return write_images(tmp_path_factory.mktemp("images"))


def wrapper(*rates):
    groups = [{"params": [nn.Parameter(torch.zeros(1))], "lr": rate} for rate in rates]
    return OptimWrapper(torch.optim.SGD(groups, lr=0.1))


def test_rates():
    found = wrapper(0.1, 0.02)
    schedulers = [
        LinearLR(found, start_factor=0.01, begin=0, end=4, by_epoch=False),
        CosineAnnealingLR(found, eta_min=0.001, begin=4, end=20, by_epoch=False),
    ]
    text = "lr 0.1 (the largest of 2 groups); LinearLR from 0.01 of it in steps 1 to 4; "
    text += "CosineAnnealingLR to 0.001 in steps 5 to 20"
    assert rate_text(found, schedulers, 0, 20, 5) == text
    short = "the schedule ends after step 20, the training after step 10"
    assert rate_text(found, schedulers, 0, 10, 5) == f"{text}; {short}"
    assert rate_text(found, schedulers, 1, 20, 5) == f"{text}; 0.001 now, after step 1"
    steps = MultiStepLR(wrapper(0.1), milestones=[30, 60], gamma=0.1)
    assert rate_text(wrapper(0.1), [steps], 0, 100, 1) == "lr 0.1; MultiStepLR times 0.1 after 30, 60 in epochs 1 to the end"
    assert rate_text(wrapper(0.1), [], 0, 100, 1) == "lr 0.1; constant"
    assert rate_text(SimpleNamespace(), [], 0, 1, 1) is None  # several optimisers


def test_cells():
    def model(**options):
        return SimpleNamespace(mask=RandomMask(**options), mask_grid=(7, 7), image_size=(224, 224))

    assert cells_text(model(mask_ratio=0.75)) == "12 of 49 visible (mask_ratio 0.75); grid 7 x 7 of 32 px"
    assert cells_text(model(mask_ratio=0.6, rounding="floor", final_mask_ratio=0.75)) == (
        "19 of 49 visible (mask_ratio 0.6) at the beginning, 12 (0.75) at the end; grid 7 x 7 of 32 px"
    )
    assert cells_text(model(mask_ratio=[0.0, 0.75], unmasked_share=0.2)) == (
        "12 to 49 of 49 visible, drawn for each image (mask_ratio 0 to 0.75); all in the last 20 % of the steps; "
        "grid 7 x 7 of 32 px"
    )
    assert cells_text(nn.Linear(1, 1)) is None


def test_images():
    loader = SimpleNamespace(dataset=range(50), batch_size=8, drop_last=True, batch_sampler=None)
    assert images_text(loader, 2, {"limit": 50, "label_fraction": 1.0}) == (
        "50 used (limit=50); each epoch leaves out 2 that fill no batch, others each time"
    )
    loader.drop_last = False
    assert images_text(loader, 2, {}) == "50 used"


def test_checkpoints_on_disk():
    loop = SimpleNamespace(max_epochs=10, max_iters=100)
    hook = SimpleNamespace(max_keep_ckpts=2, save_best="knn/top1", interval=3, by_epoch=True)
    assert kept_at_once(hook, loop) == 4
    hook.max_keep_ckpts = -1  # all: after epochs 3, 6, 9, and the last
    assert kept_at_once(hook, loop) == 5
    hook.by_epoch = False
    assert kept_at_once(hook, loop) == 35


def test_the_normalisation_of_detectors():
    pytest.importorskip("mmdet")
    part = ROOT_MODELS.build(dict(type="mmengine.ImgDataPreprocessor", mean=[1.0, 2.0, 3.0], std=[4.0, 5.0, 6.0]))
    assert normalisation(part) == ([1.0, 2.0, 3.0], [4.0, 5.0, 6.0])


def told(folder):
    (log,) = folder.glob("*/*.log")
    (text,) = re.findall(r"in force:\n((?:\w+ +.*\n)+)", log.read_text())
    return dict(line.split(maxsplit=1) for line in text.splitlines())


def test_a_run_says_once_what_is_in_force(images, tmp_path):
    options = tiny_hgkd(images, teacher_features=str(tmp_path / "store"))
    runner = train_tool.train(HGKD, tmp_path / "run", options=options)
    found = told(tmp_path / "run")
    assert found["rate"] == "lr 0.00025; LinearLR from 0.01 of it in steps 1 to 2; CosineAnnealingLR to 0 in steps 3 to 4"
    assert found["cells"] == "2 of 4 visible (mask_ratio 0.6); grid 2 x 2 of 32 px"
    assert found["images"] == "16 used"
    student = "student 64 x 64 px, mean 0.5 0.5 0.5, std 0.5 0.5 0.5"
    assert found["pixels"] == f"{student}; teacher 64 x 64 px, mean 0.5 0.5 0.5, std 0.5 0.5 0.5"
    stored = sum(file.stat().st_size - 128 for file in (tmp_path / "store").glob("*.npy"))  # 128: numpy's header
    assert found["features"].endswith(f"in {tmp_path / 'store'} ({stored / 16 / 1024:.0f} KB an image)")
    each = int(found["checkpoints"].split()[0])
    assert abs(each - (tmp_path / "run/epoch_2.pth").stat().st_size / 2**20) < 1
    assert runner.optim_wrapper.optimizer.param_groups[0]["initial_lr"] == 0.00025


def test_an_average_of_the_weights_counts_in_the_checkpoint(images, tmp_path):
    ema = [*train_tool.load_config(SPARK, options=tiny(images)).custom_hooks, dict(type="EMAHook")]
    options = tiny(images, student="resnet10t", epochs=1, warmup_epochs=0, custom_hooks=ema)
    train_tool.train(SPARK, tmp_path / "run", options=options)
    each = int(told(tmp_path / "run")["checkpoints"].split()[0])
    content = read_checkpoint(tmp_path / "run/epoch_1.pth")
    assert abs(each - (tensor_bytes(content["state_dict"]) * 2 + tensor_bytes(content["optimizer"])) / 2**20) < 1
    assert abs(each - (tmp_path / "run/epoch_1.pth").stat().st_size / 2**20) < 2


def test_a_resumed_run_says_the_rate_that_it_has(images, tmp_path):
    options = tiny(images, val_train_root=None, val_test_root=None)
    train_tool.train(SPARK, tmp_path / "run", options=options)
    resumed = train_tool.load_config(SPARK, tmp_path / "run", resume=tmp_path / "run/epoch_1.pth", options=options)
    runner = build_runner(resumed)
    runner.train()
    logs = sorted((tmp_path / "run").glob("*/*.log"))
    rate = re.search(r"^rate +(.*)$", logs[-1].read_text(), re.MULTILINE)
    assert rate
    assert rate[1].endswith("; 0.0005 now, after step 2")


def test_finetuning_says_it_too(images, tmp_path):
    options = {"data_root": str(images), "val_root": None, "num_classes": 2, "student": "test_resnet", "image_size": 32}
    options |= {"workers": 0, "batch_size": 8, "epochs": 1}
    train_tool.train(ROOT / "downstream/classification/resnet18_10e_cifar128.py", tmp_path / "run", options=options)
    found = told(tmp_path / "run")
    assert found.keys() == {"rate", "pixels", "images", "checkpoints"}
    assert found["pixels"].startswith("model 32 x 32 px, mean ")
    assert Path(tmp_path / "run/epoch_1.pth").is_file()
