"""Images behind an address: the same as on a disk, fetched once, and told by name when they cannot be had."""

import io
import os
import pickle
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from refusals import refused
from torch.utils.data import DataLoader
from web import served

from hgkd.data import EpochSampler, LabelledImages, SeededIndex, UnlabelledImages, remote
from hgkd.errors import DataError, InvalidValueError, MissingFileError, MissingPackageError, StoppedError

pytest.importorskip("aiohttp")
EVAL = {"kind": "eval"}


def picture(seed, side=24):
    file = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (side, side, 3), dtype=np.uint8)).save(file, "PNG")
    return file.getvalue()


def write_shard(path, numbers):
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as shard:
        for i in numbers:
            info = tarfile.TarInfo(f"{i:03}.png")
            info.size = len(picture(i))
            shard.addfile(info, io.BytesIO(picture(i)))
    return path


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HGKD_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("HGKD_CACHE_GB", raising=False)
    monkeypatch.setattr(remote, "PAUSES", (0.0, 0.0))
    write_shard(tmp_path / "web/shards/images-000000.tar", range(4))
    write_shard(tmp_path / "web/shards/images-000001.tar", range(4, 7))
    return tmp_path / "web"


@pytest.fixture
def web(folder):
    with served(folder) as server:
        yield server


def copies(tmp_path):
    """Files in the cache that are copies, and bytes of all."""
    files = [path for path in (tmp_path / "cache").rglob("*") if path.is_file()]
    return [path for path in files if not path.suffix], sum(path.stat().st_size for path in files)


def same(one, other):
    return len(one) == len(other) and all(torch.equal(one[i]["inputs"], other[i]["inputs"]) for i in range(len(one)))


@pytest.mark.parametrize("part", ["shards", "shards/images-{000000..000001}.tar", "shards/images-*.tar"])
def test_shards_are_those_of_the_disk_in_the_same_order(web, folder, part, tmp_path):
    there = UnlabelledImages(f"{web.url}/{part}", image_size=16, transform=EVAL)
    here = UnlabelledImages(folder / "shards", image_size=16, transform=EVAL)
    assert same(there, here)
    assert there.path(5) == f"{web.url}/shards/images-000001.tar/005.png"
    assert list(EpochSampler(there, seed=2)) == list(EpochSampler(here, seed=2))
    asked = len(web.got)
    assert same(UnlabelledImages(f"{web.url}/{part}", image_size=16, transform=EVAL), here)
    assert same(pickle.loads(pickle.dumps(there)), here)
    assert len(web.got) == asked  # all is in the cache
    assert len(copies(tmp_path)[0]) == 2


def test_reading_processes_and_ranks(web, folder):
    there = UnlabelledImages(f"{web.url}/shards", image_size=16)
    shares = []
    for rank in range(2):
        sampler = EpochSampler(there, seed=0)
        sampler.rank, sampler.world_size = rank, 2
        sampler.skip = 1
        shares.append([int(i) for batch in DataLoader(there, 2, sampler=sampler, num_workers=2) for i in batch["index"]])
    order = [int(i) for i in EpochSampler(there, seed=0)]
    assert shares[0] == order[2::2]
    assert shares[1][:2] == order[3::2]


def test_an_image_is_read_by_its_range_where_the_cache_is_full(web, folder, tmp_path, monkeypatch):
    size = (folder / "shards/images-000000.tar").stat().st_size
    monkeypatch.setenv("HGKD_CACHE_GB", str(1.5 * size / 1e9))
    there = UnlabelledImages(f"{web.url}/shards", image_size=16, transform=EVAL)
    kept, total = copies(tmp_path)
    assert len(kept) == 1
    assert total <= 1.5 * size
    web.sent = 0
    here = UnlabelledImages(folder / "shards", image_size=16, transform=EVAL)
    batches = torch.cat([batch["inputs"] for batch in DataLoader(there, 2, num_workers=1)])  # and in a process of its own
    assert torch.equal(batches, torch.stack([item["inputs"] for item in here]))
    assert web.sent == sum(len(picture(i)) for i in range(4, 7))
    web.got.clear()
    assert same(
        UnlabelledImages(f"{web.url}/shards", image_size=16, transform=EVAL, limit=1),
        UnlabelledImages(folder / "shards", image_size=16, transform=EVAL, limit=1),
    )
    assert {start for name, start in web.got} != {0}  # the index of what did not fit was kept
    monkeypatch.setenv("HGKD_CACHE_GB", "0")
    assert same(UnlabelledImages(f"{web.url}/shards/images-000001.tar", image_size=16, transform=EVAL), _Part(here, 4))


class _Part:
    """Items of a data set from one on."""

    def __init__(self, dataset, start):
        self.items = [dataset[i] for i in range(start, len(dataset))]

    def __len__(self):
        return len(self.items)

    def __getitem__(self, index):
        return self.items[index]


def test_what_others_left_in_the_cache_goes_first(web, folder, tmp_path, monkeypatch):
    size = (folder / "shards/images-000000.tar").stat().st_size
    old = tmp_path / "cache/other/copy"
    old.parent.mkdir(parents=True)
    old.write_bytes(bytes(size))
    monkeypatch.setenv("HGKD_CACHE_GB", str(2.2 * size / 1e9))
    UnlabelledImages(f"{web.url}/shards", image_size=16)
    assert not old.exists()
    assert len(copies(tmp_path)[0]) == 2


@pytest.mark.parametrize("ranges", [True, False])
def test_breaks_and_refusals_are_tried_again(web, folder, ranges, monkeypatch):
    web.ranges = ranges
    monkeypatch.setattr(remote, "_PIECE", 4000)
    web.broken, web.refused = 1, 1
    there = UnlabelledImages(f"{web.url}/shards/images-000001.tar", image_size=16, transform=EVAL)
    assert [there.image(i).tobytes() for i in range(3)] == [Image.open(io.BytesIO(picture(i))).tobytes() for i in range(4, 7)]


def test_what_was_fetched_is_gone_on_with(web, folder, tmp_path, monkeypatch):
    monkeypatch.setattr(remote, "_PIECE", 4000)
    size = (folder / "shards/images-000000.tar").stat().st_size
    shard = f"{web.url}/shards/images-000000.tar"
    give = web.root
    pieces = remote.RemoteStore._piece
    monkeypatch.setattr(
        remote.RemoteStore,
        "_piece",
        lambda self, name, start, count: pieces(self, name, start, count) if start < 8000 else _gone(),
    )
    with refused(StoppedError, "address-unreachable", shard, "3"):
        UnlabelledImages(shard, image_size=16)
    assert [path.stat().st_size for path in (tmp_path / "cache").rglob("*.partial")] == [8000]
    monkeypatch.setattr(remote.RemoteStore, "_piece", pieces)
    web.sent = 0
    assert len(UnlabelledImages(shard, image_size=16)) == 4
    assert web.sent == size - 8000
    assert give == web.root
    assert not list((tmp_path / "cache").rglob("*.partial"))


def _gone():
    raise ConnectionResetError("gone")


def test_a_changed_shard_is_fetched_anew(web, folder):
    shard = f"{web.url}/shards/images-000001.tar"
    assert len(UnlabelledImages(shard, image_size=16)) == 3
    write_shard(folder / "shards/images-000001.tar", range(8, 13))
    os.utime(folder / "shards/images-000001.tar", ns=(1, 1))
    assert len(UnlabelledImages(shard, image_size=16)) == 5


def test_a_server_that_goes_down_ends_the_run_and_marks_no_image(folder, monkeypatch):
    monkeypatch.setenv("HGKD_CACHE_GB", "0")
    with served(folder) as web:
        there = UnlabelledImages(f"{web.url}/shards", image_size=16)
        there[0]
    with refused(StoppedError, "address-unreachable", "--resume"):
        there[1]
    assert there.bad_files() == []
    with pytest.raises(
        StoppedError, match="cannot be read after 3 tries"
    ):  # torch keeps type and text of what a process raises
        list(DataLoader(there, 2, num_workers=1))


def test_refusals_come_before_training(web, folder, monkeypatch):
    def fails(address, kind, *refusal, **options):
        with refused(kind, *refusal):
            UnlabelledImages(address, image_size=16, **options)

    fails(f"{web.url}/shards/images-000009.tar", MissingFileError, "address-not-found", f"{web.url}/shards/images-000009.tar")
    fails(f"{web.url}/shards/images-00000{{0..2}}.tar", MissingFileError, "address-not-found", "images-000002.tar")
    fails(f"{web.url}/shards/none-*.tar", MissingFileError, "pattern-without-files", "none-*.tar")
    fails(f"{web.url}/shards/images-{{0..1.tar", InvalidValueError, "pattern-braces-unbalanced")
    fails("http://127.0.0.1:9/a.tar", StoppedError, "address-unreachable", "http://127.0.0.1:9/a.tar")
    fails("http://127.0.0.1:9/", StoppedError, "address-unreachable", "http://127.0.0.1:9/")  # a folder is listed
    fails("nowhere://host/a.tar", InvalidValueError, "address-protocol-unknown", "nowhere")
    monkeypatch.setenv("HGKD_CACHE_GB", "many")
    fails(f"{web.url}/shards", InvalidValueError, "cache-limit-not-a-number", "many")
    monkeypatch.delenv("HGKD_CACHE_GB")
    web.denied = True
    fails(f"{web.url}/shards", DataError, "address-not-allowed", "403")
    fails(f"{web.url}/shards/images-000000.tar?key=secret", DataError, "address-not-allowed", "403")
    web.denied = False
    path = folder / "shards/images-000001.tar"
    path.write_bytes(path.read_bytes()[:2000])
    fails(f"{web.url}/shards/images-000001.tar", DataError, "shard-damaged", f"{web.url}/shards/images-000001.tar")
    web.broken = 99
    fails(f"{web.url}/shards/images-000000.tar", StoppedError, "address-unreachable")


def test_fewer_bytes_than_the_server_had_said(web, monkeypatch):
    store = remote.RemoteStore(web.url)
    monkeypatch.setattr(store._fs, "cat_file", lambda *args, **kwargs: b"few")
    with refused(StoppedError, "download-truncated", "3"):
        store.prepare(["shards/images-000000.tar"])


def test_without_a_protocols_package(web, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "s3fs", None)
    with refused(MissingPackageError, "protocol-package-missing", "s3fs", "s3://bucket/shards"):
        UnlabelledImages("s3://bucket/shards", image_size=16)


def test_queries_and_credentials_are_not_shown(web, log):
    address = f"{web.url}/shards/images-000001.tar?signature=secret"
    there = UnlabelledImages(address.replace("http://", "http://user:word@"), image_size=16)
    assert "secret" not in there.path(0)
    assert "word" not in there.path(0)
    assert there.path(0).endswith("images-000001.tar/004.png")
    assert not log.told("secret")
    assert not log.told("word")


@pytest.fixture
def pictures(folder):
    for i in range(6):
        path = folder / f"photos/{'ab'[i % 2]}/{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(picture(i))
    return folder / "photos"


def test_folders_of_images_and_of_classes(web, pictures):
    there = UnlabelledImages(f"{web.url}/photos", image_size=16)
    here = UnlabelledImages(pictures, image_size=16)
    assert [Path(name).name for name in there.names()] == [Path(name).name for name in here.names()]
    for i in range(6):
        assert torch.equal(there[SeededIndex(i, 4)]["inputs"], here[SeededIndex(i, 4)]["inputs"])
    with refused(DataError, "shards-without-labels", "2", f"{web.url}/shards"):
        LabelledImages(f"{web.url}/shards", image_size=16)
    labelled = LabelledImages(f"{web.url}/photos", image_size=16)
    assert labelled.classes == ["a", "b"]
    assert labelled.labels.tolist() == [0, 0, 0, 1, 1, 1]
    with refused(DataError, "no-class-folders", f"{web.url}/photos/a"):
        LabelledImages(f"{web.url}/photos/a", image_size=16)


def test_lists_of_addresses(web, pictures, tmp_path):
    listed = tmp_path / "list.txt"
    listed.write_text(f"photos/a/0.png\n{web.url}/photos/b/1.png\n")
    assert len(list(UnlabelledImages(web.url, listed, image_size=16))) == 2
    listed.write_text("shards/images-000000.tar\nshards/images-000001.tar\n")
    assert len(UnlabelledImages(web.url, listed, image_size=16)) == 7
    listed.write_text("http://elsewhere.org/1.png\n")
    with refused(DataError, "listed-path-leaves-root", "http://elsewhere.org/1.png", web.url):
        UnlabelledImages(web.url, listed, image_size=16)
    listed.write_text("../secret.png\n")
    with refused(DataError, "listed-path-leaves-root", "../secret.png"):
        UnlabelledImages(f"{web.url}/photos", listed, image_size=16)
    listed.write_text("a/7.png\n")
    with refused(DataError, "listed-images-missing", f"{web.url}/photos/a/7.png"):
        UnlabelledImages(f"{web.url}/photos", listed, image_size=16)
    (pictures / "labels.csv").write_text("path,label\na/0.png,x\nb/1.png,y\na/2.png,x\n")
    labelled = LabelledImages(f"{web.url}/photos", image_size=16, list_file=f"{web.url}/photos/labels.csv")
    assert labelled.classes == ["x", "y"]
    assert labelled.labels.tolist() == [0, 0, 1]
    gone = tmp_path / "gone.txt"
    gone.write_text("a/0.png\na/2.png\nb/1.png\nb/3.png\na/9.png\n")
    dataset = UnlabelledImages(f"{web.url}/photos", gone, image_size=16, max_bad_share=0.2)
    assert dataset[4]["index"] == 0  # counted as a file that is not there
    assert dataset.bad_files() == [f"{web.url}/photos/a/9.png"]


def test_tables_behind_an_address(web, folder, monkeypatch):
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    table = pa.table({"image": [picture(i) for i in range(6)], "label": list("abcabc")})
    (folder / "tables").mkdir()
    pq.write_table(table, folder / "tables/train.parquet", row_group_size=2)
    monkeypatch.setattr(remote, "_LARGE", 1)
    for limit in ("1", "0"):  # a copy, and ranges
        monkeypatch.setenv("HGKD_CACHE_GB", limit)
        there = LabelledImages(f"{web.url}/tables", image_size=16)
        assert there.classes == ["a", "b", "c"]
        assert same(there, LabelledImages(folder / "tables", image_size=16))


def test_memory_as_an_object_store(monkeypatch, tmp_path):
    fsspec = pytest.importorskip("fsspec")
    monkeypatch.setenv("HGKD_CACHE", str(tmp_path / "cache"))
    store = fsspec.filesystem("memory")
    for i in range(3):
        store.pipe(f"/bucket/set/{i}.png", picture(i))
    store.pipe("/bucket/set/.hidden.png", b"")
    there = UnlabelledImages("memory://bucket/set", image_size=16)
    assert [there.path(i) for i in range(3)] == [f"memory://bucket/set/{i}.png" for i in range(3)]
    assert len(list(there)) == 3
