"""What Windows and macOS do not have, taken away here: no run of these tests is one on such a system."""

import ntpath
import os
import signal
import subprocess
import sys
from types import SimpleNamespace

import pytest
from mmengine.device import utils as device_utils
from tiny_runs import SPARK, tiny, write_images

from hgkd.api import train as train_tool
from hgkd.data import stores
from hgkd.data.stores import LocalStore, read_part
from hgkd.diagnosis.dry_run import dry_run
from hgkd.registry import build_runner
from hgkd.training import loop, runner, work_folder
from hgkd.training.hooks import progress

ALL_COMMANDS = """
import importlib, pkgutil, sys
for name in ("fcntl", "resource", "triton", "termios", "pwd", "grp"):
    sys.modules[name] = None  # an import of it fails
import hgkd.cli
for part in pkgutil.iter_modules(hgkd.cli.__path__):
    importlib.import_module(f"hgkd.cli.{part.name}")
import hgkd.api, hgkd.data, hgkd.sparse, hgkd.training
"""


@pytest.fixture
def windows(monkeypatch):
    """No file locks, no signal of a child's end, no reading at a place, no account of memory."""
    monkeypatch.delattr(os, "pread")
    names = {name: value for name, value in vars(signal).items() if name != "SIGCHLD"}
    monkeypatch.setattr(loop, "signal", SimpleNamespace(**names))
    monkeypatch.setattr(work_folder, "fcntl", None)
    monkeypatch.setattr(progress, "resource", None)


def load(folder, **options):
    options = tiny(
        write_images(folder / "images"), val_train_root=None, val_test_root=None, epochs=1, warmup_epochs=0, **options
    )
    return train_tool.load_config(SPARK, folder / "run", options=options)


def test_a_training_without_what_windows_lacks(windows, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    cfg = load(tmp_path, workers=1, **{"env_cfg.mp_cfg.mp_start_method": "spawn"})
    build_runner(cfg).train()
    assert (tmp_path / "run/epoch_1.pth").is_file()
    (log,) = (tmp_path / "run").glob("*/*.log")
    assert "no file locks that hgkd knows" in log.read_text()
    assert "peak_memory_mb" not in log.read_text()


def test_a_dry_run_says_that_the_memory_is_not_known(windows, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert "not known on this system" in dry_run(load(tmp_path))


def test_a_member_of_a_shard_is_read_without_pread(windows, tmp_path):
    (tmp_path / "a").write_bytes(b"0123456789")
    assert read_part(str(tmp_path / "a"), 3, 4) == b"3456"
    with pytest.raises(OSError, match="ends within"):
        read_part(str(tmp_path / "a"), 8, 4)


def test_a_list_that_leads_to_another_drive_leaves_the_folder(monkeypatch):
    monkeypatch.setattr(stores, "os", SimpleNamespace(path=ntpath))
    store = LocalStore("C:\\photos")
    assert store.name_of("D:\\a.jpg") is None
    assert store.name_of("..\\a.jpg") is None
    assert store.name_of("birds/a.jpg") == "birds\\a.jpg"


@pytest.mark.slow
def test_every_command_is_imported_without_the_modules_of_posix_and_without_triton(tmp_path):
    subprocess.run([sys.executable, "-c", ALL_COMMANDS], check=True, cwd=tmp_path)


def test_an_apple_gpu_is_used_only_when_asked_for(monkeypatch):
    monkeypatch.setattr(device_utils, "DEVICE", "mps")
    monkeypatch.setenv("HGKD_DEVICE", "mps")
    assert runner.leave_apple_gpu() is None
    assert device_utils.get_device() == "mps"
    monkeypatch.delenv("HGKD_DEVICE")
    assert "HGKD_DEVICE=mps" in runner.leave_apple_gpu()
    assert device_utils.get_device() == "cpu"
