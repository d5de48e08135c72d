"""From files of four channels to pictures and exports: the commands of a whole piece of work."""

import json

import numpy as np
import pytest
import torch
from tiny_runs import ROOT, load_tool, tiny

from hgkd.api.train import load_config
from hgkd.cli import doctor
from hgkd.errors import code_of
from hgkd.export import export
from hgkd.export.targets.graphs import onnx_runner
from hgkd.networks.backbones import load_backbone

train = load_tool("train")
HGKD = ROOT / "configs/hgkd/hgkd_vit-s14_resnet18_10e_cifar128.py"
VIT = {"allow_random": True, "depth": 2, "embed_dim": 32, "num_heads": 2}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two classes of 12-bit arrays of four channels."""
    root = tmp_path_factory.mktemp("channels")
    rng = np.random.default_rng(0)
    for label, name in enumerate(("ant", "bee")):
        (root / name).mkdir()
        for number in range(8):
            values = rng.integers(0, 3000, (64, 64, 4)) + np.array([0, 200, 900, 1000]) * label
            np.save(root / name / f"{number}.npy", values.astype(np.uint16))
    return root


@pytest.fixture(scope="module")
def measured(folder):
    """The lines of ``hgkd doctor pixels`` that are options."""
    lines = doctor.pixel_lines(str(folder), 4, (0, 4095))
    return dict(line.split("=", 1) for line in lines if not line.startswith("#"))


@pytest.fixture(scope="module")
def run(folder, measured, tmp_path_factory):
    """A run of two steps, with its log, pictures and dry run."""
    work = tmp_path_factory.mktemp("run") / "run"
    options = tiny(folder, teacher="vit_tiny_patch16_224", epochs=1, warmup_epochs=0, teacher_channels="[3,1,0]", **measured)
    options |= {f"model.teacher.{key}": value for key, value in VIT.items()}
    options |= {"model.objectives.hgkd.block": 1, "model.objectives.pooled.block": 1}
    options |= {"teacher_features": str(work.parent / "features"), "default_hooks.checkpoint.save_best": "None"}
    arguments = [str(HGKD), "--work-dir", str(work), "--cfg-options", *(f"{key}={value}" for key, value in options.items())]
    assert train.main([*arguments, "--dry-run"]) == 0
    assert train.main(arguments) == 0
    return work


def test_the_statistics_are_exact(folder, measured):
    values = np.stack([np.load(file) for file in folder.rglob("*.npy")]) / 4095
    mean, std = json.loads(measured["model.student.normalize"])
    assert mean == pytest.approx(values.mean((0, 1, 2)), abs=1e-6)
    assert std == pytest.approx(values.std((0, 1, 2)), abs=1e-6)
    assert (measured["in_chans"], measured["value_range"]) == ("4", "[0,4095]")


def test_a_run_says_its_channels_and_shows_the_teachers(run):
    log = next(run.rglob("*.log")).read_text()
    assert "teacher (channels 3 1 0) " in log
    assert "sees the channels 3, 1, 0 of 4" in log
    assert list(run.glob("pictures/*.png"))
    spec = torch.load(run / "epoch_1.pth", weights_only=False)["meta"]["hgkd"]["encoder"]
    assert spec["kwargs"]["in_chans"] == 4
    assert len(spec["pixels"][0]) == 4


def test_evaluation_and_pictures_read_such_images(run, folder, tmp_path, capsys):
    checkpoint = str(run / "epoch_1.pth")
    data = ["--train", str(folder), "--test", str(folder), "--image-size", "64", "--value-range", "0", "4095", "--workers", "0"]
    command = ["knn", "--backbone", checkpoint, *data, "--k", "3", "--json", str(tmp_path / "result.json")]
    assert load_tool("evaluate").main(command) == 0
    given = ["--images", str(folder), "--out", str(tmp_path / "out"), "--image-size", "64", "--value-range", "0", "4095"]
    visualize = load_tool("visualize")
    assert visualize.main(["pca", "--backbone", checkpoint, *given, "--level", "-2"]) == 0
    neighbours = ["neighbours", "--backbone", checkpoint, *given, "--bank", str(folder), "--k", "2", "--workers", "0"]
    assert visualize.main(neighbours) == 0
    assert {file.name for file in (tmp_path / "out").glob("*.png")} == {"pca.png", "neighbours.png"}


@pytest.mark.parametrize("target", ["timm", "onnx", "pt2", "sparse"])
def test_exports_take_as_many_channels_and_say_so(run, folder, tmp_path, target):
    report = export(run / "epoch_1.pth", tmp_path / "out", target, images=folder, max_images=2, value_range=(0, 4095))
    assert (report.channels, report.images) == (4, 2)
    assert any("takes images of 4 channels, (B, 4, H, W)" in note for note in report.notes)
    card = json.loads((tmp_path / "out/run_card.json").read_text())
    assert card["export"]["input_channels"] == 4
    if target == "onnx":
        assert onnx_runner(tmp_path / "out/model.onnx")(torch.rand(1, 4, 64, 64)).shape[0] == 1
    if target == "timm":
        assert load_backbone(tmp_path / "out")(torch.rand(1, 4, 64, 64)).ndim == 4


@pytest.mark.parametrize("target", ["mmdet", "torchvision", "transformers"])
def test_libraries_of_rgb_images_are_told_so(run, tmp_path, target):
    with pytest.raises(ValueError, match="networks of 3 channels, and this student takes 4; export it to timm, onnx"):
        export(run / "epoch_1.pth", tmp_path / "out", target)


def test_data_and_model_of_different_channels_are_told_apart_before_training(folder, measured, tmp_path):
    options = tiny(folder, **measured)
    options |= {"train_dataloader.dataset.in_chans": None, "val_train_root": None, "val_test_root": None}
    arguments = [f"{key}={value}" for key, value in options.items()]
    recipe = str(ROOT / "configs/spark/spark_resnet18_shapes.py")
    rgb = tmp_path / "rgb"
    rgb.mkdir()
    from PIL import Image

    for number in range(8):
        Image.new("RGB", (64, 64), (number, 9, 9)).save(rgb / f"{number}.png")
    arguments = [value for value in arguments if not value.startswith(("data_root", "in_chans"))]
    command = [recipe, "--work-dir", str(tmp_path / "run"), "--cfg-options", *arguments, f"data_root={rgb}"]
    assert train.main([*command, "model.student.in_chans=4"]) == 2


def test_the_message_of_such_a_mismatch():
    from torch.utils.data import ConcatDataset

    from hgkd.training.wrapping import check_channels

    class Images:
        in_chans = None

        def __len__(self):
            return 1

    class Loader:
        dataset = ConcatDataset([Images(), Images()])

    class Model(torch.nn.Module):
        in_chans = 4

    told = "val_dataloader are read with 3 channels, and the model takes 4; set in_chans=3"
    with pytest.raises(ValueError, match=told) as error:
        check_channels(Model(), Loader(), "val_dataloader")
    assert code_of(error.value) == "channels-differ"
    Images.in_chans = 4
    check_channels(Model(), Loader(), "val_dataloader")


def test_a_channel_that_is_the_same_everywhere_has_no_deviation(tmp_path):
    np.save(tmp_path / "a.npy", np.stack([np.random.default_rng(0).random((4, 4)), np.ones((4, 4))]))
    with pytest.raises(ValueError, match=r"channel 1 of the 1 images .* has no standard deviation"):
        doctor.pixel_lines(str(tmp_path), 2)


def test_the_statistics_of_rgb_pictures(tmp_path, capsys):
    from PIL import Image

    values = np.random.default_rng(0).integers(0, 256, (3, 20, 24, 3), dtype=np.uint8)
    for number, picture in enumerate(values):
        Image.fromarray(picture).save(tmp_path / f"{number}.png")
    (tmp_path / "broken.png").write_bytes(b"\x89PNG")
    assert doctor.main(["pixels", str(tmp_path)]) == 0
    said = capsys.readouterr().out
    assert "# 3 images, 1440 pixels in [0, 1]; 1 files cannot be read" in said
    mean = json.loads(said.split("model.student.normalize=")[1].splitlines()[0])[0]
    assert mean == pytest.approx((values / 255).mean((0, 1, 2)), abs=1e-6)


def test_short_options_reach_data_and_model(folder, measured, tmp_path):
    options = {"in_chans": 4, "teacher_channels": [2, 1, 0], "val_train_root": str(folder), "val_test_root": str(folder)}
    cfg = load_config(HGKD, tmp_path / "run", options={**options, "data_root": str(folder)})
    places = (
        cfg.model.student,
        cfg.train_dataloader.dataset,
        cfg.val_dataloader.dataset.bank,
        cfg.val_dataloader.dataset.query,
    )
    assert [place.in_chans for place in places] == [4] * 4
    assert cfg.model.teacher_channels == [2, 1, 0]
