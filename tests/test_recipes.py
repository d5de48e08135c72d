"""Shipped recipes are found by their names, and by mmengine's hgkd::."""

from pathlib import Path

import pytest
from mmengine.config import Config
from refusals import refused
from tiny_runs import tiny, write_images

from hgkd.api.train import train
from hgkd.cli.recipes import main as recipes
from hgkd.config import read_config
from hgkd.recipes import SHIPPED, find_recipe, plan_names, recipe_names, register_recipes, summary_of

ROOT = Path(__file__).parents[1]
NAME = "hgkd_vit-s14_resnet18_10e_cifar128"


def test_every_config_of_the_checkout_is_shipped():
    files = [p for folder in ("configs", "downstream") for p in (ROOT / folder).rglob("*.py") if "_base_" not in p.parts]
    names = {p.relative_to(ROOT).with_suffix("").as_posix().removeprefix("configs/") for p in files}
    assert set(recipe_names()) | set(plan_names()) == names
    assert len(names) > 90


@pytest.mark.parametrize(
    "name", [NAME, f"hgkd/{NAME}", f"hgkd/{NAME}.py", f"configs/hgkd/{NAME}.py", f"hgkd::hgkd/{NAME}.py", f"hgkd::hgkd/{NAME}"]
)
def test_a_recipe_has_several_names(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert find_recipe(name).samefile(ROOT / f"configs/hgkd/{NAME}.py")


def test_a_file_comes_first(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / f"{NAME}.py").write_text("x = 1")
    assert find_recipe(f"{NAME}.py") == Path(f"{NAME}.py")


def test_an_unknown_name_is_told_with_the_nearest():
    with refused(FileNotFoundError, "recipe-missing", "hgkd_vit-s14_resnet18_10e_cifar128"):
        find_recipe("hgkd_vit-s14_resnet81_10e_cifar128")


def test_every_recipe_says_what_it_does():
    assert all(summary_of(name) for name in recipe_names() if not name.startswith("downstream/"))


@pytest.mark.parametrize("name", ["hgkd/hgkd_mae-tiny_resnet18_shapes", "downstream/classification/resnet18_10e_cifar128"])
def test_a_config_elsewhere_starts_from_a_recipe(name, tmp_path):
    register_recipes()
    (tmp_path / "mine.py").write_text(f'_base_ = "hgkd::{name}.py"\nbatch_size = 3\n')
    mine, original = Config.fromfile(tmp_path / "mine.py"), Config.fromfile(SHIPPED / f"{name}.py")
    assert mine.batch_size == 3
    assert mine.model.type == original.model.type
    assert mine.train_dataloader.dataset.type == original.train_dataloader.dataset.type


def test_a_config_that_starts_from_a_recipe_trains(tmp_path):
    """mmengine marks all that it inherits with ``_scope_``, and hands the mark on to ``collate_fn``."""
    (tmp_path / "mine.py").write_text('_base_ = "hgkd::spark/spark_resnet18_shapes.py"\n')
    options = tiny(write_images(tmp_path / "images"), epochs=1, warmup_epochs=0)
    runner = train(tmp_path / "mine.py", tmp_path / "run", options=options)
    assert runner.iter == 2


@pytest.mark.parametrize("name", ["detection/rtmdet_cspnext-tiny_24e_bccd", "segmentation/upernet_r18_1k_camvid"])
def test_a_detector_of_ones_own_starts_from_a_recipe(name, tmp_path):
    """By its name or by its path: the same config, all of it in mmdet's or mmseg's registries."""
    pytest.importorskip("mmdet")
    pytest.importorskip("mmseg")
    folder = ROOT / "downstream"
    (tmp_path / "by_name.py").write_text(f'_base_ = "hgkd::downstream/{name}.py"\nbatch_size = 3\n')
    (tmp_path / "by_path.py").write_text(f"_base_ = '{folder / name}.py'\nbatch_size = 3\n")
    by_name, by_path = read_config(tmp_path / "by_name.py"), read_config(tmp_path / "by_path.py")
    assert by_name.to_dict() == by_path.to_dict()
    assert "hgkd" not in str(by_name.train_dataloader)


def test_the_command_lists_and_finds(capsys):
    assert recipes(["bccd"]) == 0
    out = capsys.readouterr().out
    assert "downstream/detection/retinanet_r18_12e_bccd " in out
    assert "cifar" not in out
    assert recipes(["--plans"]) == 0
    assert "comparisons/cifar128 " in capsys.readouterr().out
    assert recipes(["--path", NAME]) == 0
    assert capsys.readouterr().out.strip() == str((ROOT / f"configs/hgkd/{NAME}.py").resolve())
    assert recipes(["no-such"]) == 2
