"""Parquet and Arrow files of images: the same items as files, in any process, with few row groups read."""

import io
import json
import logging
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from refusals import refused
from torch.utils.data import DataLoader

from hgkd.data import EpochSampler, LabelledImages, SeededIndex, UnlabelledImages
from hgkd.data import tables as module
from hgkd.errors import DataError, InvalidValueError, MissingPackageError

pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")
CLASSES = ["dog", "cat", "owl"]
EVAL = {"kind": "eval"}


def picture(seed, side=24):
    file = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (side, side, 3), dtype=np.uint8)).save(file, "PNG")
    return file.getvalue()


def features(**columns):
    """The schema's metadata as Hugging Face's library writes it."""
    return {"huggingface": json.dumps({"info": {"features": columns}})}


IMAGE, LABEL = {"_type": "Image"}, {"_type": "ClassLabel", "names": CLASSES}


def hub_table(numbers, **further):
    """As a data set of the Hub: struct and class numbers."""
    rows = [{"bytes": picture(i), "path": f"{i}.png"} for i in numbers]
    columns = {"image": rows, "label": [i % 3 for i in numbers], **further}
    return pa.table(columns).replace_schema_metadata(features(image=IMAGE, label=LABEL))


def write(path, table, rows=4):
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, path, row_group_size=rows)
    return path


def as_files(root, count):
    for i in range(count):
        folder = root / CLASSES[i % 3]
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{i:03}.png").write_bytes(picture(i))
    return root


@pytest.fixture
def snapshot(tmp_path):
    write(tmp_path / "data/train-00000-of-00002.parquet", hub_table(range(10)))
    write(tmp_path / "data/train-00001-of-00002-0a1b2c3d.parquet", hub_table(range(10, 15)))
    return tmp_path / "data"


def test_items_are_those_of_the_same_images_as_files(snapshot, tmp_path):
    tables = UnlabelledImages(snapshot, image_size=16)
    as_files(tmp_path / "files", 15)
    files = UnlabelledImages(tmp_path / "files", image_size=16)
    places = {Path(files.path(i)).name: i for i in range(15)}
    assert len(tables) == 15
    for i in range(15):
        theirs = files.image(places[f"{i:03}.png"])
        assert np.array_equal(np.asarray(tables.image(i)), np.asarray(theirs))
    assert tables.path(12) == str(snapshot / "train-00001-of-00002-0a1b2c3d.parquet/2")
    item = tables[SeededIndex(3, 9)]
    assert item["index"] == 3
    assert torch.equal(item["inputs"], tables[SeededIndex(3, 9)]["inputs"])


def test_labels_have_the_names_that_the_schema_gives(snapshot):
    dataset = LabelledImages(snapshot, image_size=8)
    assert dataset.classes == sorted(CLASSES)
    names = [dataset.classes[item["label"]] for item in dataset]
    assert names == [CLASSES[i % 3] for i in range(15)]  # in the order of the rows, which are read together
    few = LabelledImages(snapshot, image_size=8, limit_per_class=2)
    assert np.bincount(few.labels).tolist() == [2, 2, 2]
    tenth = LabelledImages(snapshot, image_size=8, label_fraction=0.4)
    assert np.bincount(tenth.labels).tolist() == [2, 2, 2]
    for i, item in enumerate(tenth):
        table, row = tenth.path(i).rsplit("/", 1)
        assert tenth.classes[item["label"]] == CLASSES[(int(row) + 10 * ("00001-of" in table)) % 3]


@pytest.mark.parametrize("values", [["b", "a", "b"], [7, 30, 7]])
def test_plain_columns_of_bytes_and_labels(tmp_path, values):
    table = pa.table({"id": ["x", "y", "z"], "photo": [picture(i) for i in range(3)], "label": values})
    path = write(tmp_path / "set.parquet", table)
    assert len(UnlabelledImages(path, image_size=8)) == 3
    dataset = LabelledImages(path, image_size=8)
    assert dataset.classes == sorted(map(str, set(values)))
    assert [dataset.classes[label] for label in dataset.labels] == list(map(str, values))


def test_columns_may_be_named(tmp_path):
    columns = {"before": [picture(1)], "after": [picture(2)], "kind": ["x"], "place": ["y"]}
    write(tmp_path / "a.parquet", pa.table(columns))
    with refused(DataError, "table-columns-unclear", "2", "before", "after", "image_column=NAME"):
        UnlabelledImages(tmp_path, image_size=8)
    with refused(DataError, "table-columns-unclear", "label_column=NAME"):
        LabelledImages(tmp_path, image_size=8, image_column="after")
    dataset = LabelledImages(tmp_path, image_size=24, image_column="after", label_column="place")
    assert dataset.classes == ["y"]
    assert np.array_equal(np.asarray(dataset.image(0)), np.asarray(Image.open(io.BytesIO(picture(2)))))
    with refused(InvalidValueError, "image-column-unknown", "kind", "before"):
        UnlabelledImages(tmp_path, image_size=8, image_column="kind")
    with refused(InvalidValueError, "label-column-unknown", "after"):
        LabelledImages(tmp_path, image_size=8, image_column="before", label_column="after")


def test_of_a_row_group_only_the_images_are_read_and_few_are_kept(snapshot, monkeypatch):
    dataset = keeping(2, snapshot, monkeypatch)
    read = []
    block = module._Parquet.block
    monkeypatch.setattr(module._Parquet, "block", lambda self, *args: read.append(args) or block(self, *args))
    assert dataset.blocks.of.tolist() == [0] * 4 + [1] * 4 + [2] * 2 + [3] * 4 + [4]
    list(dataset)
    assert {column for _, column in read} == {"image.bytes"}
    assert len(read) == 5
    assert len(dataset.source._kept) == 2
    del read[:]
    sampler = EpochSampler(dataset, seed=1)
    order = [int(i) for i in sampler]
    for i in order:
        dataset[i]
    assert sorted(order) == list(range(15))
    assert order != list(range(15))
    assert len(read) <= 5  # once each; at most, as two are kept from before


def test_few_row_groups_at_once_are_warned_of(snapshot, monkeypatch, log):
    monkeypatch.setattr(module, "KEPT_BYTES", 1)
    assert UnlabelledImages(snapshot, image_size=8).blocks.window == 1
    (record,) = log.told("row group")
    assert record.levelno == logging.WARNING


def test_the_order_keeps_to_windows_resumes_and_divides(snapshot, monkeypatch):
    dataset = keeping(2, snapshot, monkeypatch)
    whole, rest = EpochSampler(dataset, seed=0), EpochSampler(dataset, seed=0)
    order = [int(i) for i in whole]
    assert sorted(order) == list(range(15))
    groups = dataset.blocks.of[order].tolist()
    last = {group: place for place, group in enumerate(groups)}
    alive = [sum(group in groups[:place] and last[group] >= place for group in range(5)) for place in range(15)]
    assert max(alive) == 2
    rest.skip = 6
    assert [int(i) for i in rest] == order[6:]
    whole.set_epoch(1)
    assert [int(i) for i in whole] != order
    shares = []
    for rank in range(2):
        sampler = EpochSampler(dataset, seed=0)
        sampler.rank, sampler.world_size = rank, 2
        shares.append([int(i) for i in sampler])
    assert shares[0] == order[::2]
    assert shares[1][:7] == order[1::2]


def keeping(count, snapshot, monkeypatch):
    """A data set of which a process keeps so many row groups."""
    sizes = [
        pq.ParquetFile(path).metadata.row_group(group).column(0).total_uncompressed_size
        for path, groups in zip(sorted(snapshot.iterdir()), (3, 2), strict=True)
        for group in range(groups)
    ]
    monkeypatch.setattr(module, "KEPT_BYTES", count * max(sizes))
    dataset = UnlabelledImages(snapshot, image_size=8)
    assert dataset.blocks.window == count
    return dataset


def test_reading_processes_and_copies(snapshot):
    dataset = UnlabelledImages(snapshot, image_size=16, transform=EVAL)
    first = dataset[0]["inputs"]  # the parent has a file open before it forks
    again = pickle.loads(pickle.dumps(dataset))
    loader = DataLoader(dataset, 4, num_workers=2)
    batches = torch.cat([batch["inputs"] for batch in loader])
    assert torch.equal(batches[0], first)
    assert all(torch.equal(batches[i], again[i]["inputs"]) for i in range(15))
    few = UnlabelledImages(snapshot, image_size=16, transform=EVAL, limit=5)
    names = [dataset.path(i) for i in range(15)]
    places = [names.index(few.path(i)) for i in range(5)]
    assert places == sorted(places)
    assert all(torch.equal(few[i]["inputs"], batches[place]) for i, place in enumerate(places))


def test_damaged_rows_are_counted_like_damaged_files(tmp_path):
    rows = [picture(0), b"<html>", None, *(picture(i) for i in range(3, 10))]
    write(tmp_path / "a.parquet", pa.table({"image": pa.array(rows, pa.binary())}))
    dataset = UnlabelledImages(tmp_path, image_size=8, max_bad_share=0.3)
    assert dataset[1]["index"] == 3
    assert dataset.bad_files() == [str(tmp_path / f"a.parquet/{row}") for row in (1, 2)]
    with refused(DataError, "too-many-bad-images", "2", "10"):
        list(UnlabelledImages(tmp_path, image_size=8, max_bad_share=0.1))


def arrow_folder(folder, parts):
    """As ``save_to_disk`` writes it."""
    folder.mkdir(parents=True)
    names = [f"data-{n:05}-of-{len(parts):05}.arrow" for n in range(len(parts))]
    for name, numbers in zip(names, parts, strict=True):
        table = hub_table(numbers)
        with pa.OSFile(str(folder / name), "wb") as file, pa.ipc.new_stream(file, table.schema) as writer:
            writer.write_table(table, max_chunksize=3)
    (folder / "state.json").write_text(json.dumps({"_data_files": [{"filename": name} for name in names]}))
    (folder / "dataset_info.json").write_text("{}")
    return folder


def test_load_from_disk_is_mapped_and_in_any_order(tmp_path):
    root = arrow_folder(tmp_path / "set", [range(7), range(7, 12)])
    arrow_folder(tmp_path / "other", [range(90, 93)])
    (root / "cache-0123456789abcdef.arrow").write_bytes((tmp_path / "other/data-00000-of-00001.arrow").read_bytes())
    dataset = LabelledImages(root, image_size=24)
    assert len(dataset) == 12
    assert dataset.blocks is None
    images = [dataset.image(i) for i in range(12)]
    labels = [dataset.classes[label] for label in dataset.labels]
    found = sorted(zip(labels, (np.asarray(image).tobytes() for image in images), strict=True))
    expected = sorted((CLASSES[i % 3], np.asarray(Image.open(io.BytesIO(picture(i)))).tobytes()) for i in range(12))
    assert found == expected
    batches = [batch["inputs"] for batch in DataLoader(dataset, 5, num_workers=2)]
    assert torch.equal(torch.cat(batches)[11], dataset[11]["inputs"])
    assert len(LabelledImages(root / "data-00001*", image_size=24)) == 5
    (root / "data-00001-of-00002.arrow").unlink()
    with refused(DataError, "table-files-missing", "data-00001-of-00002.arrow"):
        UnlabelledImages(root, image_size=8)


def test_what_the_library_itself_writes(tmp_path):
    datasets = pytest.importorskip("datasets")
    kinds = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=CLASSES)})
    rows = [{"image": Image.open(io.BytesIO(picture(i))), "label": i % 3} for i in range(9)]
    written = datasets.Dataset.from_list(rows, features=kinds).shuffle(seed=0)
    expected = [(np.asarray(row["image"]), CLASSES[row["label"]]) for row in written]
    written.save_to_disk(str(tmp_path / "disk"), num_shards=2)
    (tmp_path / "parquet").mkdir()
    written.to_parquet(str(tmp_path / "parquet/train.parquet"))
    for folder in ("disk", "parquet"):
        unlabelled = UnlabelledImages(tmp_path / folder, image_size=24)
        assert all(np.array_equal(np.asarray(unlabelled.image(i)), expected[i][0]) for i in range(9))
        labelled = LabelledImages(tmp_path / folder, image_size=24)
        assert sorted(labelled.classes[label] for label in labelled.labels) == sorted(name for _, name in expected)
    datasets.DatasetDict({"train": written, "test": written}).save_to_disk(str(tmp_path / "parts"))
    with refused(DataError, "table-splits-mixed", "train", "test", tmp_path / "parts/train"):
        UnlabelledImages(tmp_path / "parts", image_size=8)
    assert len(UnlabelledImages(tmp_path / "parts/train", image_size=8)) == 9


def test_parts_of_a_snapshot_are_told_apart(snapshot):
    write(snapshot / "test-00000-of-00001.parquet", hub_table(range(30, 33)))
    with refused(DataError, "table-splits-mixed", "train", "test", snapshot / "test*"):
        UnlabelledImages(snapshot, image_size=8)
    assert len(UnlabelledImages(snapshot / "train*", image_size=8)) == 15
    assert len(LabelledImages(f"{snapshot}/test-*.parquet", image_size=8)) == 3
    assert len(UnlabelledImages(f"{snapshot}/train-0000{{0..1}}-*.parquet", image_size=8)) == 15


def test_tables_beside_pictures_are_what_is_said_about_them(snapshot, log):
    (snapshot / "a.png").write_bytes(picture(0))
    assert len(UnlabelledImages(snapshot, image_size=8)) == 1
    assert log.told("2 .parquet")
    with refused(InvalidValueError, "column-without-tables", "image_column", "photo"):
        UnlabelledImages(snapshot, image_size=8, image_column="photo")


def test_what_is_no_table_of_images_is_told(tmp_path):
    def fails(kind, *refusal):
        with refused(kind, *refusal):
            LabelledImages(tmp_path, image_size=8)

    path = tmp_path / "a.parquet"
    path.write_bytes(b"PAR1 no table")
    fails(DataError, "table-damaged", "a.parquet")
    write(path, pa.table({"n": [1]}))
    fails(DataError, "table-columns-unclear", "0", "n")
    write(
        path,
        pa.table(
            {"image": [{"bytes": None, "path": "/etc/passwd"}]},
            schema=pa.schema([("image", pa.struct([("bytes", pa.binary()), ("path", pa.string())]))]),
        ),
    )
    fails(DataError, "table-without-bytes", "to_parquet")
    write(path, hub_table([0, 1]).slice(0, 0))
    fails(DataError, "table-without-rows")
    unlabelled = hub_table([0, 1]).set_column(1, "label", pa.array([-1, -1]))
    write(path, unlabelled.replace_schema_metadata(features(image=IMAGE, label=LABEL)))
    fails(DataError, "table-rows-without-a-class", "2", "label")
    write(path, hub_table([0]))
    write(tmp_path / "b.parquet", pa.table({"image": [picture(0)], "label": [0]}))
    fails(DataError, "tables-differ", "b.parquet", "image")


def test_without_the_library(snapshot, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "pyarrow.parquet", None)
    with refused(MissingPackageError, "pyarrow-missing", "hgkd[parquet]"):
        UnlabelledImages(snapshot, image_size=8)
    (snapshot / "a.png").write_bytes(picture(0))
    assert len(UnlabelledImages(snapshot, image_size=8)) == 1
