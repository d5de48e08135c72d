"""Checks of a machine."""

import re
from types import SimpleNamespace

import pytest
from PIL import Image

from hgkd.diagnosis import environment as doctor
from hgkd.diagnosis.environment import Check, check_environment, exit_code


@pytest.fixture
def images(tmp_path):
    for n in range(4):
        Image.new("RGB", (9, 9)).save(tmp_path / f"{n}.png")
    return tmp_path


def test_this_machine_is_fit(images, tmp_path):
    checks = check_environment(tmp_path / "work", images, planned_mb=1)
    assert [check.name for check in checks if check.state == "failure"] == []
    assert exit_code(checks) == 0
    assert {"versions", "torch and torchvision", "work folder", "images"} <= {check.name for check in checks}
    assert "4 looked at, 0 cannot be read" in checks[-1].found


def missing(name):
    raise ImportError(f"No module named {name!r}")


def test_failures_bring_their_fix(monkeypatch, tmp_path):
    assert "setuptools<80" in doctor.check_pkg_resources(missing).fix
    assert doctor.check_torchvision(missing).state == "failure"
    assert "install torch and torchvision together" in doctor.check_torchvision(missing).fix
    both = doctor.check_mm_forks(lambda name: "1.0" if "mmengine" in name else None)
    assert both.state == "failure"
    assert both.found.startswith("mmengine and onedl-mmengine share")
    monkeypatch.setattr(doctor, "_installed", lambda name: None if name == "timm" else "1")
    assert doctor.check_versions().fix == "pip install -c constraints.txt timm"


def test_the_sparse_backend_is_named_with_its_reason():
    def absent(name):
        raise ModuleNotFoundError("No module named 'spconv'", name="spconv")

    check = doctor.check_sparse_backend(absent)
    assert check.state == "ok"
    assert re.match("gather, as it needs no library besides torch; spconv is not installed", check.found)
    assert doctor.check_sparse_backend(lambda name: None).found.endswith("model.student.backend=spconv would serve, too")
    broken = doctor.check_sparse_backend(missing)
    assert broken.state == "warning"
    assert "uninstall spconv, or install a build that fits" in broken.fix


def test_a_fork_stands_for_its_original(monkeypatch):
    monkeypatch.setattr(doctor, "_installed", lambda name: None if name == "mmengine" else "1")
    check = doctor.check_versions()
    assert check.state == "ok"
    assert "onedl-mmengine 1" in check.found


def test_work_folders(monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    assert "choose another one with --work-dir" in doctor.check_work_dir(tmp_path / "file/below", 1).fix
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda path: SimpleNamespace(free=5 * 2**20))
    assert doctor.check_work_dir(tmp_path, 4).state == "ok"
    full = doctor.check_work_dir(tmp_path, 6)
    assert (full.state, exit_code([full])) == ("failure", 1)
    assert "5 MB free, 6 MB planned" in full.found


def test_images(images):
    (images / "1.png").write_bytes(b"")
    check = doctor.check_images(images)
    assert check.state == "warning"
    assert str(images / "1.png") in check.fix
    assert exit_code([check]) == 0
    assert doctor.check_images(images / "none").state == "failure"


def test_text():
    assert str(Check("a", "ok", "b")) == "[  ok   ] a: b"
    assert str(Check("a", "failure", "b", "c")) == "[failure] a: b\n          fix: c"
