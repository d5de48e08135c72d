"""The built wheel, installed into an empty folder, is a whole product: commands, recipes, three lines of Python."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from tiny_runs import tiny, write_images

from hgkd.recipes import plan_names, recipe_names
from hgkd.writing import locked

ROOT = Path(__file__).parents[1]
RECIPE = "spark/spark_resnet18_shapes"
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """Folder that holds what a wheel of this checkout installs, without its requirements."""
    wheels, folder = tmp_path_factory.mktemp("wheels"), tmp_path_factory.mktemp("site")
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "-q"]
    build = [*pip, "wheel", "--no-deps", "--no-build-isolation", "--no-index", "-w", str(wheels), str(ROOT)]
    # another process of the same test run may build the same checkout, in the same folder build/
    with locked(tmp_path_factory.getbasetemp().parent / "wheel.lock"):
        subprocess.run(build, check=True, capture_output=True)
    (wheel,) = wheels.glob("hgkd-*.whl")
    subprocess.run([*pip, "install", "--no-deps", "--no-index", "--target", str(folder), str(wheel)], check=True)
    return folder


@pytest.fixture(scope="module")
def hgkd(installed, tmp_path_factory):
    """Runs the installed command in an empty folder, which it returns with the finished process."""
    folder = tmp_path_factory.mktemp("elsewhere")
    env = {**os.environ, "PYTHONPATH": str(installed), "OMP_NUM_THREADS": "1"}

    def run(*arguments, program=(str(installed / "bin/hgkd"),)):
        command = [sys.executable, *program, *map(str, arguments)]
        return folder, subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=300, check=False)

    return run


def test_the_installed_package_is_what_runs(hgkd, installed):
    _, found = hgkd(program=("-c", "import hgkd; print(hgkd.__file__)"))
    assert Path(found.stdout.strip()).is_relative_to(installed)


def test_it_holds_every_recipe_and_every_one_loads(hgkd):
    _, found = hgkd("recipes")
    assert [line.split()[0] for line in found.stdout.splitlines()] == recipe_names()
    code = (
        "from mmengine.config import Config; from hgkd.recipes import *; register_recipes()\n"
        "from hgkd.openmmlab.forks import find_fork_configs; find_fork_configs()\n"
        "print(sum(bool(Config.fromfile(find_recipe(name))) for name in [*recipe_names(), *plan_names()]))"
    )
    _, loaded = hgkd(program=("-c", code))
    assert loaded.stdout.strip() == str(len(recipe_names()) + len(plan_names())), loaded.stderr


def test_it_trains_exports_and_evaluates_by_name(hgkd, tmp_path):
    images = write_images(tmp_path / "images")
    options = [f"{key}={value}" for key, value in tiny(images, epochs=1, warmup_epochs=0).items()]
    folder, trained = hgkd("train", RECIPE, "--work-dir", "run", "--cfg-options", *options)
    assert trained.returncode == 0, trained.stderr
    _, exported = hgkd("export", "run/epoch_1.pth", "--to", "timm", "--out", "student")
    assert exported.returncode == 0, exported.stderr
    assert (folder / "student/model.safetensors").is_file()
    where = ["--train", images, "--test", images, "--image-size", "64", "--workers", "0", "--k", "1"]
    _, measured = hgkd("evaluate", "knn", "--backbone", "student", *where)
    assert measured.returncode == 0, measured.stderr
    assert "knn" in measured.stdout


def test_a_config_elsewhere_starts_from_a_shipped_one(hgkd):
    code = (
        "from pathlib import Path; from hgkd.api.train import load_config\n"
        f"Path('mine.py').write_text('_base_ = \"hgkd::{RECIPE}.py\"')\n"
        "print(load_config('mine.py').model.type)"
    )
    _, found = hgkd(program=("-c", code))
    assert found.stdout.strip() == "MaskedDistiller", found.stderr


def test_python_functions_are_there(hgkd):
    code = "import hgkd; print(hgkd.train.__name__, hgkd.evaluate.__name__, callable(hgkd.export)); import hgkd.export"
    _, found = hgkd(program=("-c", code))
    assert found.stdout.split() == ["train", "evaluate", "True"], found.stderr


def test_a_mistake_has_exit_code_2(hgkd):
    _, found = hgkd("train", "no-such-recipe")
    assert found.returncode == 2
    assert "config no-such-recipe does not exist" in found.stderr
    assert "Traceback" not in found.stderr
