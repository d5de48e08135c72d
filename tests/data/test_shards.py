"""Tar shards: the same images as the files, by number; damaged members are skipped, damaged shards are named."""

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

from hgkd.data import EpochSampler, SeededIndex, UnlabelledImages
from hgkd.data.shards import kind_of, shard_members
from hgkd.errors import DataError


def picture(seed: int, kind: str = "PNG") -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (20, 24, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format=kind)
    return buffer.getvalue()


def write_shard(path: Path, members: dict[str, bytes], **options: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", **options) as shard:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            shard.addfile(info, io.BytesIO(content))
    return path


def two_shards(root: Path) -> Path:
    """Five images in two shards, among other members."""
    write_shard(root / "a/one.tar", {"0.png": picture(0), "0.json": b"{}", "1.png": picture(1), "1.seg.png": picture(9)})
    write_shard(root / "b.tar", {f"x/{i}.png": picture(i) for i in range(2, 5)})
    return root


def test_items_are_those_of_the_same_images_as_files(tmp_path: Path) -> None:
    shards = UnlabelledImages(two_shards(tmp_path / "shards"), image_size=16)
    (tmp_path / "files").mkdir()
    for i in range(5):
        (tmp_path / f"files/{i}.png").write_bytes(picture(i))
    files = UnlabelledImages(tmp_path / "files", image_size=16)
    assert len(shards) == len(files) == 5
    for i in range(5):
        ours, theirs = shards[SeededIndex(i, 7)], files[SeededIndex(i, 7)]
        assert ours["index"] == i
        assert torch.equal(ours["inputs"], theirs["inputs"])
        assert shards.size(i) == files.size(i) == len(picture(i))
    assert shards.path(1) == str(tmp_path / "shards/a/one.tar/1.png")
    assert shards.path(4) == str(tmp_path / "shards/b.tar/x/4.png")


def test_the_sampler_resumes_and_divides_them_as_it_does_files(tmp_path: Path) -> None:
    dataset = UnlabelledImages(two_shards(tmp_path), image_size=16)
    whole, rest = EpochSampler(dataset, seed=3), EpochSampler(dataset, seed=3)
    rest.skip = 2
    order = [dataset[i]["index"] for i in whole]
    assert sorted(order) == list(range(5))
    assert [dataset[i]["index"] for i in rest] == order[2:]
    shares = []
    for rank in range(2):
        sampler = EpochSampler(dataset, seed=3)
        sampler.rank, sampler.world_size = rank, 2
        shares.append([dataset[i]["index"] for i in sampler][:2])
    assert not set(shares[0]) & set(shares[1])


def test_reading_processes_and_limits(tmp_path: Path) -> None:
    root = two_shards(tmp_path)
    dataset = UnlabelledImages(root, image_size=16, transform={"kind": "eval"})
    again = pickle.loads(pickle.dumps(dataset))
    loader = torch.utils.data.DataLoader(dataset, 2, num_workers=1)
    batches = torch.cat([batch["inputs"] for batch in loader])
    assert all(torch.equal(batches[i], again[i]["inputs"]) for i in range(5))
    few = UnlabelledImages(root, image_size=16, transform={"kind": "eval"}, limit=3)
    names = [dataset.path(i) for i in range(5)]
    assert len(few) == 3
    assert all(torch.equal(few[i]["inputs"], dataset[names.index(few.path(i))]["inputs"]) for i in range(3))


def test_damaged_members_are_counted_like_damaged_files(tmp_path: Path) -> None:
    cut = picture(1, "JPEG")
    good = {f"{i}.png": picture(i) for i in range(8)}
    write_shard(tmp_path / "a.tar", {"cut.jpg": cut[: len(cut) // 2], "empty.jpg": b"", "page.jpg": b"<html>", **good})
    dataset = UnlabelledImages(tmp_path, image_size=16, max_bad_share=0.3)
    assert dataset[0]["index"] == 3
    assert dataset.bad_files() == [str(tmp_path / f"a.tar/{name}.jpg") for name in ("cut", "empty", "page")]
    strict = UnlabelledImages(tmp_path, image_size=16, max_bad_share=0.2)
    with refused(DataError, "too-many-bad-images", "3", "11", "max_bad_share=0.2"):
        strict[0]


def test_a_shard_that_shrinks_or_goes_while_the_run_goes_on(tmp_path: Path) -> None:
    dataset = UnlabelledImages(two_shards(tmp_path), image_size=16, max_bad_share=0.9)
    first = shard_members(tmp_path / "b.tar", (".png",))[0]
    os.truncate(tmp_path / "b.tar", first[1] + first[2] // 2)
    assert dataset[2]["index"] == 0
    (tmp_path / "a/one.tar").unlink()
    with refused(DataError, "too-many-bad-images"):
        dataset[0]


def test_names_and_links_of_members_reach_no_file(tmp_path: Path) -> None:
    outside = tmp_path / "outside.png"
    outside.write_bytes(picture(77))
    root = tmp_path / "shards"
    write_shard(root / "a.tar", {"../../outside.png": picture(1), str(outside): picture(2)})
    with tarfile.open(root / "a.tar", "a") as shard:
        for name, kind in (("link.png", tarfile.SYMTYPE), ("hard.png", tarfile.LNKTYPE), ("pipe.png", tarfile.FIFOTYPE)):
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, str(outside)
            shard.addfile(info)
    before = sorted(tmp_path.rglob("*"))
    dataset = UnlabelledImages(root, image_size=(20, 24), transform={"kind": "eval"})
    assert len(dataset) == 2  # links and pipes are no images
    for i in range(2):
        expected = np.asarray(Image.open(io.BytesIO(picture(i + 1))))
        assert np.array_equal(dataset[i]["inputs"].permute(1, 2, 0).numpy(), expected)
    assert sorted(tmp_path.rglob("*")) == before


def test_shards_that_cannot_be_read_are_named_at_the_start(tmp_path: Path) -> None:
    def fails(refusal: tuple[object, ...]) -> None:
        with refused(DataError, *refusal):
            UnlabelledImages(tmp_path, image_size=16)

    (tmp_path / "a.tar").write_bytes(b"no tar at all" * 100)
    fails(("shard-damaged", "a.tar", "0"))
    write_shard(tmp_path / "a.tar", {f"{i}.png": picture(i) for i in range(3)})
    os.truncate(tmp_path / "a.tar", 2 * (512 + 2048) + 600)  # in the middle of the third
    fails(("shard-damaged", "a.tar"))
    (tmp_path / "a.tar").unlink()
    with tarfile.open(tmp_path / "a.tar", "w:gz") as shard:
        shard.addfile(tarfile.TarInfo("0.png"))
    fails(("shard-damaged",))
    write_shard(tmp_path / "a.tar", {"readme.txt": b"", ".png": picture(0), "0.seg.png": picture(1)})
    fails(("no-images-in-shards", "1", "key.jpg"))


def test_pictures_and_shards_in_one_folder_are_refused(tmp_path: Path) -> None:
    """One stray picture used to hide all shards."""
    two_shards(tmp_path)
    (tmp_path / "photo.png").write_bytes(picture(5))
    with refused(DataError, "images-and-shards-mixed", "1", "photo.png", "2", "a/one.tar", "list_file"):
        UnlabelledImages(tmp_path, image_size=16)
    (tmp_path / "list.txt").write_text("photo.png\n")
    assert len(UnlabelledImages(tmp_path, tmp_path / "list.txt", image_size=16)) == 1
    assert len(UnlabelledImages(tmp_path / "a", image_size=16)) == 2


@pytest.mark.parametrize(
    ("name", "kind"),
    [("a/0.jpg", ".jpg"), ("a.b/0.JPG", ".jpg"), ("0.seg.png", ".seg.png"), ("a/.png", ""), ("README", ""), ("x/..", "")],
)
def test_kinds(name: str, kind: str) -> None:
    assert kind_of(name) == kind


def test_fewer_shards_than_reading_processes(tmp_path: Path) -> None:
    """Streams leave processes without data then, and the run hangs (https://github.com/webdataset/webdataset/issues/188)."""
    write_shard(tmp_path / "a.tar", {f"{i}.png": picture(i) for i in range(5)})
    dataset = UnlabelledImages(tmp_path, image_size=16)
    shares = []
    for rank in range(2):
        sampler = EpochSampler(dataset, seed=0)
        sampler.rank, sampler.world_size = rank, 2
        loader = torch.utils.data.DataLoader(dataset, 1, sampler=sampler, num_workers=2)
        shares.append([int(batch["index"]) for batch in loader])
    assert [len(share) for share in shares] == [3, 3]  # as many steps in both; one image is shown again
    assert set(shares[0]) | set(shares[1]) == set(range(5))


def test_keys_may_occur_twice(tmp_path: Path) -> None:
    """The webdataset library gives up on these (https://github.com/webdataset/webdataset/issues/157)."""
    path = write_shard(tmp_path / "a.tar", {"0.png": picture(0)})
    with tarfile.open(path, "a") as shard:
        info = tarfile.TarInfo("0.png")
        info.size = len(picture(1))
        shard.addfile(info, io.BytesIO(picture(1)))
    write_shard(tmp_path / "b.tar", {"0.png": picture(2)})
    dataset = UnlabelledImages(tmp_path, image_size=(20, 24), transform={"kind": "eval"})
    expected = [np.asarray(Image.open(io.BytesIO(picture(i)))) for i in range(3)]
    assert [np.array_equal(item["inputs"].permute(1, 2, 0), expected[i]) for i, item in enumerate(dataset)] == [True] * 3
