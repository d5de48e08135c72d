"""The feature cache: right values, one teacher pass a picture, and no stale content."""

import errno
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from refusals import refused
from torch import Tensor, nn

from hgkd.errors import StoppedError
from hgkd.registry import MODELS
from hgkd.structures import TeacherInfo, TeacherOutput
from hgkd.teachers import Teacher
from hgkd.teachers.cache import FeatureCache, FeatureStore, function_digest, store_bytes, weights_digest


def features(rows: Tensor) -> Tensor:
    """Made-up tokens (N, 4, 2, 2) that differ from row to row and are exact in fp16."""
    return rows.float().view(-1, 1, 1, 1) + torch.arange(16.0).view(1, 4, 2, 2) / 16


class Counting:
    """Stands for the teacher and counts the pictures it is shown."""

    def __init__(self, rows: Tensor) -> None:
        self.rows, self.shown = rows, 0

    def __call__(self, selection: Tensor) -> TeacherOutput:
        self.shown += int(selection.sum())
        return TeacherOutput(tokens={3: features(self.rows[selection])}, grid=(2, 2))


def test_each_picture_is_computed_once(tmp_path) -> None:
    index, flipped = torch.tensor([4, 1, 4]), torch.tensor([False, True, True])
    rows = 2 * index + flipped
    for shown in (3, 0):  # the second time in a new cache: another run with the same identity
        cache = FeatureCache(tmp_path, {"teacher": "a"}, 5, [3], 4, (2, 2))
        teacher = Counting(rows)
        found = cache.tokens(index, flipped, [3], teacher)
        assert torch.equal(found.tokens[3], features(rows))
        assert teacher.shown == shown
    teacher = Counting(torch.tensor([8, 0]))
    found = cache.tokens(torch.tensor([4, 0]), torch.tensor([False, False]), [3], teacher)
    assert teacher.shown == 1, "only the picture that was never met"
    assert torch.equal(found.tokens[3], features(torch.tensor([8, 0])))


@pytest.mark.parametrize("lost", [slice(None), slice(5, 9)])
def test_a_row_that_a_power_failure_took_in_part_is_computed_again(tmp_path, lost) -> None:
    index, flipped = torch.tensor([4, 1]), torch.tensor([False, True])
    rows = 2 * index + flipped
    cache = FeatureCache(tmp_path, {"teacher": "a"}, 5, [3], 4, (2, 2))
    cache.tokens(index, flipped, [3], Counting(rows))
    values = np.load(cache.stores[3].path, mmap_mode="r+")
    values[3].reshape(-1)[lost] = 0  # pages that never reached the disk are zeros; the checksum did
    del values
    teacher = Counting(rows)
    found = FeatureCache(tmp_path, {"teacher": "a"}, 5, [3], 4, (2, 2)).tokens(index, flipped, [3], teacher)
    assert teacher.shown == 1
    assert torch.equal(found.tokens[3], features(rows))
    assert not FeatureStore(tmp_path, {"teacher": "a", "block": 3}, 10, (4, 2, 2)).missing(rows).any()


def test_another_identity_is_another_store(tmp_path) -> None:
    first = FeatureStore(tmp_path, {"teacher": "a"}, 2, (4, 2, 2))
    first.write(torch.tensor([0]), features(torch.tensor([0])))
    second = FeatureStore(tmp_path, {"teacher": "b"}, 2, (4, 2, 2))
    assert second.path != first.path
    assert second.missing(torch.tensor([0])).all()


def test_features_beyond_fp16_are_refused(tmp_path) -> None:
    store = FeatureStore(tmp_path, {}, 1, (1, 1, 1))
    with refused(ValueError, "store-overflows", "fp16"):
        store.write(torch.tensor([0]), torch.full((1, 1, 1, 1), 1e6))
    assert store.missing(torch.tensor([0])).all()


def test_digests_see_what_changes() -> None:
    layer = nn.Linear(2, 2)
    before = weights_digest(layer)
    assert before == weights_digest(layer)
    with torch.no_grad():
        layer.weight[0, 0] += 1e-3
    assert weights_digest(layer) != before


def test_digests_do_not_see_how_weights_lie_in_memory() -> None:
    layers = nn.Sequential(nn.Conv2d(2, 2, 3), nn.BatchNorm2d(2))  # with a counter, which has no axes
    before = weights_digest(layers)
    assert weights_digest(layers.to(memory_format=torch.channels_last)) == before
    assert not layers[0].weight.is_contiguous()


CLIP = """
import timm
from hgkd.teachers.cache import function_digest

sizes = {"depth": 2, "embed_dim": 32, "num_heads": 2}
print(function_digest(timm.create_model("vit_base_patch32_clip_224", **sizes)))
print(function_digest(timm.create_model("vit_base_patch32_clip_quickgelu_224", **sizes)))
"""


def test_what_a_network_does_with_its_weights_has_a_digest_that_is_the_same_in_every_process() -> None:
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    said = [subprocess.run([sys.executable, "-c", CLIP], check=True, capture_output=True, text=True, env=env) for _ in "ab"]
    assert said[0].stdout == said[1].stdout
    assert len(set(said[0].stdout.split())) == 2


def test_digests_see_heads_epsilons_and_activations_without_a_module() -> None:
    def layer(**changes):
        return nn.TransformerEncoderLayer(8, **{"nhead": 2, "dim_feedforward": 8, "activation": nn.functional.relu, **changes})

    changes = ({}, {"nhead": 4}, {"layer_norm_eps": 1e-6}, {"activation": nn.functional.gelu}, {"norm_first": True})
    assert len({function_digest(layer(**change)) for change in changes}) == len(changes)
    assert function_digest(layer()) == function_digest(layer().eval())


class Scaled(Teacher):
    """Its tokens depend on settings that are in no layer."""

    def __init__(self, scale: float = 1.0, power: float = 1.0) -> None:
        super().__init__("float32", (0.5,), (0.25,))
        self.scale, self._power = scale, power
        self.info = TeacherInfo("scaled", width=4, depth=1, patch_size=16)
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.network = nn.Conv2d(1, 4, 16, stride=16)
        self.freeze()


def test_settings_of_an_own_teacher_are_part_of_its_identity() -> None:
    named = [str(Scaled(**settings).identity()) for settings in ({}, {}, {"scale": 2.0}, {"power": 2.0})]
    assert named[0] == named[1]
    assert len(set(named)) == 3
    used = Scaled()
    used.prepare((2, 2), 32)
    used.source, used.allow_random, used._proved = "elsewhere", True, True
    assert str(used.identity()) == named[0]  # neither its file nor the size of the images


def test_shipped_teachers_have_no_settings_beside_their_network() -> None:
    assert (
        "settings" not in MODELS.build({"type": "TimmTeacher", "name": "vit_tiny_patch16_224", "allow_random": True}).identity()
    )


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_features_that_are_not_finite_are_the_teachers_fault_and_never_stored(tmp_path, value) -> None:
    store = FeatureStore(tmp_path, {}, 4, (1, 1, 1))
    with refused(ValueError, "teacher-image-not-finite", "1") as caught:
        store.write(torch.tensor([0, 3]), torch.tensor([1.0, value]).view(2, 1, 1, 1))
    assert "without" not in str(caught.value)
    assert store.missing(torch.arange(4)).all()
    assert not store.read(torch.arange(4)).any()


def test_the_size_is_what_the_files_take_and_is_said_before(tmp_path, monkeypatch) -> None:
    logged: list[str] = []
    monkeypatch.setattr("hgkd.teachers.cache.print_log", lambda text, *_: logged.append(text))
    FeatureCache(tmp_path, {"teacher": "a"}, 5, [3, 7], 4, (2, 2))
    planned = store_bytes(5, 2, 4, (2, 2))
    assert planned == 2 * 2 * 5 * (4 * 2 * 2 * 2 + 4)
    headers = 128 * 4  # of numpy's files
    assert sum(file.stat().st_size for file in tmp_path.glob("*.npy")) == planned + headers
    assert "features of 5 images take 720 bytes" in logged[0]


def test_a_store_that_does_not_fit_the_disk_is_refused_before_anything_is_written(tmp_path) -> None:
    with refused(StoppedError, "store-too-large", "GB", "teacher_features=None"):
        FeatureCache(tmp_path / "new", {}, 10**12, [3], 384, (14, 14))
    assert not (tmp_path / "new").exists()


def test_a_store_has_all_its_disk_space_from_the_beginning(tmp_path) -> None:
    """A file with holes ends the process by a bus error on a full disk, https://github.com/numpy/numpy/issues/21964."""
    store = FeatureStore(tmp_path, {}, 64, (16, 8, 8))
    assert store.path.stat().st_blocks * 512 >= store.path.stat().st_size
    rows = torch.arange(3)
    store.write(rows, torch.ones(3, 16, 8, 8))
    assert torch.equal(FeatureStore(tmp_path, {}, 64, (16, 8, 8)).read(rows), torch.ones(3, 16, 8, 8)), "reopening kept them"


def test_a_disk_that_is_full_at_opening_is_an_error_with_a_remedy(tmp_path, monkeypatch) -> None:
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full)
    with refused(StoppedError, "store-not-writable", "teacher_features=None"):
        FeatureStore(tmp_path, {}, 4, (1, 1, 1))
    assert not list(tmp_path.glob("*.npy"))
    monkeypatch.delattr(os, "posix_fallocate")  # other systems: space by writing
    store = FeatureStore(tmp_path, {}, 4, (64, 8, 8))
    assert store.path.stat().st_blocks * 512 >= store.path.stat().st_size
    assert not store.read(torch.arange(4)).any()


def test_a_damaged_file_is_named(tmp_path) -> None:
    store = FeatureStore(tmp_path, {}, 4, (1, 1, 1))
    store.write(torch.arange(4), torch.ones(4, 1, 1, 1))
    path = store.path
    path.write_bytes(path.read_bytes()[:130])
    with refused(ValueError, "store-damaged"):
        FeatureStore(tmp_path, {}, 4, (1, 1, 1))
    path.unlink()  # as the message says
    assert FeatureStore(tmp_path, {}, 4, (1, 1, 1)).missing(torch.arange(4)).all()


MAKE = """
import sys, time
from pathlib import Path
import torch
from hgkd.teachers import cache

folder, name = Path(sys.argv[1]), sys.argv[2]
allocate = cache._allocate

def slowly(path):
    (folder / f"{name}.inside").touch()
    while not (folder / "go").exists():
        time.sleep(0.01)
    allocate(path)

cache._allocate = slowly
print("begins", flush=True)
store = cache.FeatureStore(folder / "store", {"a": 1}, 4, (2, 1, 1))
row = int(name)
store.write(torch.tensor([row]), torch.full((1, 2, 1, 1), 1.0 + row))
print("done", flush=True)
"""


def test_two_runs_that_start_together_share_one_store(tmp_path) -> None:
    pytest.importorskip("fcntl")
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    runs = []
    for name in "01":
        command = [sys.executable, "-c", MAKE, str(tmp_path), name]
        runs.append(subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=env))
    try:
        assert [run.stdout.readline() for run in runs] == ["begins\n"] * 2
        while not list(tmp_path.glob("*.inside")):
            time.sleep(0.01)
        time.sleep(0.3)  # the other one has had the time to come in, too
        assert len(list(tmp_path.glob("*.inside"))) == 1
        (tmp_path / "go").touch()
        assert [run.communicate(timeout=60)[0] for run in runs] == ["done\n"] * 2
    finally:
        for run in runs:
            run.kill()
            run.wait()
    store = FeatureStore(tmp_path / "store", {"a": 1}, 4, (2, 1, 1))
    assert store.missing(torch.arange(4)).tolist() == [False, False, True, True]
    assert store.read(torch.tensor([0, 1]))[:, 0, 0, 0].tolist() == [1.0, 2.0]
