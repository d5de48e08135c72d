"""Whole trainings and evaluations from tables and addresses: the same results as from files, resumed within an epoch."""

import io
import os
import tarfile

import pytest
from mmengine.hooks import Hook
from refusals import refused
from tiny_runs import SPARK, same, tiny, write_images
from torch.utils.data import Dataset
from web import served

from hgkd.api import evaluate as evaluate_api
from hgkd.api import train as train_tool
from hgkd.data.sampler import SeededBatch
from hgkd.errors import MissingFileError
from hgkd.registry import build_runner
from hgkd.training.runner import DistillRunner
from hgkd.weights.files import read_checkpoint

OPTIONS = {
    **{"batch_size": 4, "epochs": 1, "warmup_epochs": 0, "val_train_root": None, "val_test_root": None},
    **{"default_hooks.checkpoint.every_steps": 1, "default_hooks.checkpoint.every_minutes": None},
}


class Killed(BaseException):
    """Stands for kill -9."""


class KillAt(Hook):
    priority = "LOWEST"

    def __init__(self, step):
        self.step = step

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
        if runner.iter + 1 == self.step:
            raise Killed


def train(data_root, work_dir, hook=None, resume=False, **options):
    cfg = train_tool.load_config(SPARK, work_dir, resume=resume, options={**tiny(data_root, **OPTIONS), **options})
    runner = build_runner(cfg)
    if hook is not None:
        runner.register_hook(hook)
    runner.train()
    return read_checkpoint(work_dir / f"epoch_{runner.max_epochs}.pth")["state_dict"]


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return write_images(tmp_path_factory.mktemp("images"))


@pytest.fixture
def table(images, tmp_path):
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    paths = sorted(images.rglob("*.png"))
    columns = {"image": [path.read_bytes() for path in paths], "label": [path.parent.name for path in paths]}
    (tmp_path / "table").mkdir()
    pq.write_table(pa.table(columns), tmp_path / "table/train-00000-of-00001.parquet", row_group_size=4)
    return tmp_path / "table"


def test_a_training_from_tables_is_resumed_within_an_epoch(table, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("hgkd.data.tables.KEPT_BYTES", 2 * 4 * 64 * 64 * 3)
    unbroken = train(table, tmp_path / "whole")
    with pytest.raises(Killed):
        train(table, tmp_path / "broken", KillAt(3), workers=1)
    assert same(train(table, tmp_path / "broken", resume=True, workers=1), unbroken)


def test_features_of_tables_are_those_of_files(images, table):
    found = [
        evaluate_api.evaluate(["knn"], "test_resnet", str(place), str(place), image_size=32, ks=[3], workers=0, device="cpu")
        for place in (images, table, table / "train-*.parquet")
    ]
    correct = [result["knn"]["top1"] for result in found]
    assert correct[0] == correct[1] == correct[2]
    assert found[1]["knn"]["per_class"] == found[0]["knn"]["per_class"]


def test_a_training_behind_an_address_is_that_of_the_disk(images, tmp_path, monkeypatch):
    pytest.importorskip("aiohttp")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HGKD_CACHE", str(tmp_path / "cache"))
    (tmp_path / "web").mkdir()
    paths = sorted(images.rglob("*.png"))
    for number in range(2):
        with tarfile.open(tmp_path / f"web/{number}.tar", "w") as shard:
            for i, path in list(enumerate(paths))[number::2]:
                info = tarfile.TarInfo(f"{i}.png")
                info.size = path.stat().st_size
                shard.addfile(info, io.BytesIO(path.read_bytes()))
    here = train(tmp_path / "web", tmp_path / "here")
    monkeypatch.setenv("HGKD_CACHE_GB", str(1.2 * (tmp_path / "web/0.tar").stat().st_size / 1e9))  # one is read by ranges
    with served(tmp_path / "web") as web:
        there = train(f"{web.url}/{{0..1}}.tar", tmp_path / "there", workers=1)
        assert same(here, there)
        with refused(MissingFileError, "address-not-found", f"{web.url}/7.tar"):
            train(f"{web.url}/7.tar", tmp_path / "none")


class Pids(Dataset):
    def __len__(self):
        return 8

    def __getitem__(self, index):
        return os.getpid()


def test_reading_processes_stay_and_get_arrays():
    loader = DistillRunner.build_dataloader(
        {
            "dataset": Pids(),
            "sampler": {"type": "hgkd.EpochSampler", "shuffle": True},
            "batch_size": 2,
            "num_workers": 1,
            "collate_fn": {"type": "default_collate"},
        }
    )
    epochs = [{int(pid) for batch in loader for pid in batch} for _ in range(2)]
    assert epochs[0] == epochs[1]
    assert len(epochs[0]) == 1
    assert epochs[0] != {os.getpid()}
    assert all(isinstance(batch, SeededBatch) for batch in loader.batch_sampler)
    here = DistillRunner.build_dataloader({"dataset": Pids(), "sampler": {"type": "DefaultSampler"}, "batch_size": 2})
    assert not here.persistent_workers
