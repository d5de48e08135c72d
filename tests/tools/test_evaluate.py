"""hgkd evaluate from end to end on coloured squares that any network tells apart."""

import csv
import json
import os
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from refusals import refused

from hgkd.api import evaluate as evaluate_api
from hgkd.cli import evaluate
from hgkd.data import LabelledImages
from hgkd.evaluation import FeatureExtractor, extract, knn_accuracy, load_extractor

COLOURS = {"blue": (30, 40, 220), "green": (20, 200, 60), "red": (230, 30, 30)}


@pytest.fixture
def squares(tmp_path: Path) -> Path:
    rng = np.random.default_rng(0)
    for part, count in (("train", 6), ("test", 4)):
        for name, colour in COLOURS.items():
            folder = tmp_path / part / name
            folder.mkdir(parents=True)
            for i in range(count):
                pixels = np.clip(np.array(colour) + rng.normal(0, 25, (40, 48, 3)), 0, 255).astype(np.uint8)
                Image.fromarray(pixels).save(folder / f"{i}.png")
    return tmp_path


def run(root: Path, *options: str) -> int:
    common = ["--train", f"{root}/train", "--test", f"{root}/test", "--image-size", "32", "--workers", "0"]
    return evaluate.main([*options, *common, "--device", "cpu"])


def test_both_methods(squares: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = ["--json", f"{squares}/out/r.json", "--csv", f"{squares}/out/r.csv"]
    code = run(squares, "knn", "linear", "--backbone", "test_resnet", "--k", "3", "5", "--limit-per-class", "5", *files)
    assert code == 0
    results = json.loads((squares / "out/r.json").read_text())
    assert sorted(results) == ["knn", "linear"]
    for method, result in results.items():
        assert result["method"] == method
        assert result["backbone"] == "test_resnet"
        assert result["top1"] == 100.0, "noisy squares of one colour each must be told apart"
        assert result["ci95"] == [100.0, 100.0]
        assert result["per_class"] == {"blue": 100.0, "green": 100.0, "red": 100.0}
        assert (result["train_images"], result["test_images"]) == (15, 12)
        assert result["settings"]["extractor"]["weights"] == "random, seed 0"
    assert {setting: score["top1"] for setting, score in results["knn"]["scores"].items()} == {"k=3": 100.0, "k=5": 100.0}
    assert results["linear"]["predicted"] == [0] * 4 + [1] * 4 + [2] * 4
    assert results["knn"]["test_list"] == results["linear"]["test_list"]
    assert len(results["linear"]["sweep"]) == 5
    printed = capsys.readouterr().out
    assert "knn" in printed
    assert "linear, top-1 % on held-out training images: C=0.001" in printed

    assert run(squares, "knn", "--backbone", "test_resnet", "--k", "3", *files) == 0
    assert json.loads((squares / "out/r.json").read_text())["method"] == "knn"  # a single one stands alone
    with open(squares / "out/r.csv") as file:
        lines = list(csv.DictReader(file))
    settings = [(line["method"], line["setting"], line["train_images"]) for line in lines]
    assert settings == [("knn", "k=3", "15"), ("knn", "k=5", "15"), ("linear", "C by sweep", "15"), ("knn", "k=3", "18")]
    assert lines[0]["top1"] == "100.00"


def paint_noise(root: Path) -> None:
    """Colour noise instead of colours: neither blind nor perfect."""
    rng = np.random.default_rng(1)
    for file in sorted(root.rglob("*.png")):
        Image.fromarray(rng.integers(0, 255, (40, 48, 3), dtype=np.uint8)).save(file)


def test_few_shot_and_a_paired_test_of_two_backbones(squares: Path, capsys: pytest.CaptureFixture[str]) -> None:
    paint_noise(squares)
    for name in ("test_resnet", "test_convnext"):
        options = ["--shots", "1", "3", "--draws", "4", "--json", f"{squares}/{name}.json"]
        assert run(squares, "fewshot", "knn", "--k", "3", "--backbone", name, *options) == 0
    result = json.loads((squares / "test_resnet.json").read_text())["fewshot"]
    assert list(result["scores"]) == ["1 a class", "3 a class"]
    for score in result["scores"].values():
        assert score["top1"] == pytest.approx(100 * np.mean(score["correct"]), abs=1e-3)
        assert set(np.round(4 * np.array(score["correct"]), 3)) <= {0, 1, 2, 3, 4}  # shares of four draws
        assert score["std"] > 0
    assert "+-" in capsys.readouterr().out

    files = [f"{squares}/test_resnet.json", f"{squares}/test_convnext.json"]
    assert evaluate.main(["compare", *files]) == 0
    printed = capsys.readouterr().out
    assert "k=3" in printed
    assert "1 a class" in printed

    next((squares / "test").rglob("*.png")).unlink()
    assert run(squares, "knn", "--k", "3", "--backbone", "test_resnet", "--json", files[1]) == 0
    capsys.readouterr()
    assert evaluate.main(["compare", *files]) == 2
    assert "tested on different images: 12 of" in capsys.readouterr().err


def test_lists_give_what_their_folders_give(squares: Path) -> None:
    paint_noise(squares)
    lists = squares / "lists"
    lists.mkdir()
    for part in ("train", "test"):
        files = sorted((squares / part).rglob("*.png"))
        (lists / f"{part}.csv").write_text("".join(f"{f.relative_to(squares / part)},{f.parent.name}\n" for f in files))
    options = {"image_size": 32, "workers": 0, "device": "cpu", "ks": (3,), "backbone": "test_resnet"}
    by_folder = evaluate_api.evaluate(["knn"], train=f"{squares}/train", test=f"{squares}/test", **options)["knn"]
    # the list of the test images lies among them, that of the training images elsewhere
    (lists / "test.csv").rename(squares / "test/test.csv")
    with refused(ValueError, "listed-images-missing"):
        evaluate_api.evaluate(["knn"], train=f"{lists}/train.csv", test=f"{squares}/test/test.csv", **options)
    (lists / "train.csv").rename(squares / "train/train.csv")
    by_list = evaluate_api.evaluate(["knn"], train=f"{squares}/train/train.csv", test=f"{squares}/test/test.csv", **options)[
        "knn"
    ]
    assert by_list["predicted"] == by_folder["predicted"]
    assert by_list["test_list"] == by_folder["test_list"]
    again = evaluate_api.evaluate(
        ["knn"], train=f"{squares}/train/train.csv", test=f"{squares}/test", data_root=f"{squares}/train", **options
    )["knn"]
    assert again["scores"] == by_folder["scores"]


def test_csv_of_other_columns_is_refused_before_the_work(squares: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (squares / "r.csv").write_text("method,top1\n")
    assert run(squares, "knn", "--backbone", "gone.pth", "--csv", f"{squares}/r.csv") == 2
    assert "has the columns method, top1" in capsys.readouterr().err


def test_agrees_with_the_library(squares: Path) -> None:
    paint_noise(squares)
    options = {"image_size": 32, "workers": 0, "device": "cpu", "ks": (3,)}
    found = evaluate_api.evaluate(["knn"], "test_resnet", f"{squares}/train", f"{squares}/test", **options)["knn"]
    bank, queries = (
        extract(load_extractor("test_resnet"), LabelledImages(f"{squares}/{part}", image_size=32)) for part in ("train", "test")
    )
    expected = knn_accuracy(bank.features, bank.labels, queries.features, queries.labels, ks=[3])[3]
    assert found["top1"] == pytest.approx(expected)
    assert found["top1"] == pytest.approx(np.mean(list(found["per_class"].values())))  # equal class sizes
    low, high = found["ci95"]
    assert low < found["top1"] < high


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["knn", "--backbone", "resnet81", "--k", "3"], "unknown backbone 'resnet81'; did you mean"),
        (["knn", "--backbone", "test_resnet"], r"k must lie in 1 .. 18, the number of training images, got [20]"),
        (["linear", "--backbone", "gone.pth"], "checkpoint gone.pth does not exist"),
    ],
)
def test_mistakes_end_with_a_line(squares: Path, options: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(squares, *options) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("methods", "refusal"),
    [
        (["knn", "k-NN"], ("method-unknown", "'k-NN'", "'knn'")),
        ("knn", ("methods-not-a-list", "'knn'", "['knn']")),
    ],
)
def test_a_misspelt_method_is_refused_before_anything_is_read(
    squares: Path, methods: list[str], refusal: tuple[str, ...]
) -> None:
    with refused(ValueError, *refusal):
        evaluate_api.evaluate(methods, "gone.pth", f"{squares}/train", f"{squares}/test")


def test_class_folders_must_agree(squares: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (squares / "test/red").rename(squares / "test/scarlet")
    assert run(squares, "knn", "--backbone", "test_resnet", "--k", "3") == 2
    assert "['red', 'scarlet'] are in one of them only" in capsys.readouterr().err


def test_function_and_command_line_share_defaults() -> None:
    import inspect

    args = vars(evaluate.parse_args(["knn", "--backbone", "a", "--train", "b", "--test", "c"]))
    for name, parameter in inspect.signature(evaluate_api.evaluate).parameters.items():
        if parameter.default is not inspect.Parameter.empty:
            found = args[name]
            assert (tuple(found) if isinstance(found, list) else found) == parameter.default, name


def test_random_weights_follow_the_seed(squares: Path) -> None:
    torch.manual_seed(123)
    options = {"image_size": 32, "workers": 0, "device": "cpu", "ks": (3,)}
    a, b = (evaluate_api.evaluate(["knn"], "test_resnet", f"{squares}/train", f"{squares}/test", **options) for _ in range(2))
    assert a == b


def test_fine_tuning_is_the_launchers_and_is_compared_like_the_others(
    squares: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    launched = []

    def launch(config, work_dir, options):
        launched.append((config, options))
        return launcher(config, work_dir, options=options)

    launcher = evaluate_api.launch
    monkeypatch.setattr(evaluate_api, "launch", launch)
    weights = squares / "weights.pth"
    torch.save(timm.create_model("test_resnet", num_classes=0).state_dict(), weights)
    read, load = [], torch.load
    monkeypatch.setattr(torch, "load", lambda path, *args, **kwargs: (read.append(path), load(path, *args, **kwargs))[1])
    start = ["finetune", "--backbone", "test_resnet", "--checkpoint", str(weights)]
    options = ["--finetune-options", "epochs=12", "batch_size=6", "warmup_epochs=1", "lr=0.05"]
    for name in ("a", "b"):
        assert run(squares, *start, "--json", f"{squares}/{name}.json", "--csv", f"{squares}/all.csv", *options) == 0
    assert read.count(weights) == 2  # once a command
    found = json.loads((squares / "a.json").read_text())
    assert found["top1"] == 100  # three colours
    assert (list(found["scores"]), found["settings"]["epochs"]) == (["classifier"], 12)
    assert found == json.loads((squares / "b.json").read_text())  # the seed is the training's, too
    config, given = launched[0]
    assert (config, given["backbone"], given["num_classes"]) == (evaluate_api.RECIPE, str(weights), 3)
    assert len((squares / "all.csv").read_text().splitlines()) == 3
    assert evaluate.main(["compare", f"{squares}/a.json", f"{squares}/b.json"]) == 0
    assert "classifier" in capsys.readouterr().out


def test_fine_tuning_a_mae_file_needs_the_networks_name() -> None:
    extractor = FeatureExtractor("mae", {"name": "mae", "weights": "mae.pth"})
    with refused(ValueError, "network-name-missing", "--finetune-options"):
        evaluate_api.fine_tune(extractor, 3, {})


@pytest.mark.parametrize("key", ["image_size", "data_root", "train_dataloader.dataset.value_range"])
def test_fine_tuning_for_other_images_than_those_of_the_test_is_refused(key: str) -> None:
    with refused(ValueError, "finetune-option-of-images", f"{key}=64", "--image-size"):
        evaluate_api.evaluate(["finetune"], "test_resnet", "absent", "absent", finetune_options={"epochs": 1, key: 64})


def test_test_images_that_are_training_images_are_told(squares: Path, capsys: pytest.CaptureFixture[str]) -> None:
    common = ["--backbone", "test_resnet", "--image-size", "32", "--workers", "0", "--device", "cpu", "--k", "1"]
    assert evaluate.main(["knn", *common, "--train", f"{squares}/test", "--test", f"{squares}/test"]) == 0
    assert "12 of the 12 test images are training images, too, so the results are too good" in capsys.readouterr().err
    assert evaluate.main(["knn", *common, "--train", f"{squares}/train", "--test", f"{squares}/test"]) == 0
    assert "training images, too" not in capsys.readouterr().err


def test_names_that_are_not_utf8_and_deep_images(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Terminals and files cannot hold such names as they are."""
    root = tmp_path / os.fsdecode(b"d\xe9ep")
    for part in ("train", "test"):
        for name, level in ((b"b\xe9e", 1000), (b"ant", 3000)):
            folder = root / part / os.fsdecode(name)
            folder.mkdir(parents=True)
            for i in range(3):
                pixels = np.random.default_rng(i).integers(level, level + 500, (40, 40), dtype=np.uint16)
                Image.fromarray(pixels).save(folder / f"{i}.png")
    common = ["--backbone", "test_resnet", "--image-size", "32", "--workers", "0", "--device", "cpu", "--k", "1"]
    common += [
        "--train",
        f"{root}/train",
        "--test",
        f"{root}/test",
        "--json",
        f"{tmp_path}/a.json",
        "--csv",
        f"{tmp_path}/a.csv",
    ]
    assert evaluate.main(["knn", *common, "--value-range", "0", "4095"]) == 0
    assert evaluate.main(["knn", *common, "--value-range", "0", "4095"]) == 0  # appends to the same file
    capsys.readouterr().out.encode()
    result = json.loads((tmp_path / "a.json").read_text())
    assert set(result["per_class"]) == {"ant", r"b\xe9e"}
    assert result["settings"]["reading"] == {"rules": 2, "value_range": [0.0, 4095.0], "use_alpha": True}
