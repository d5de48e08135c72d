"""Bank and query."""

from PIL import Image
from refusals import refused

from hgkd.data import BankAndQuery


def folder(root, classes):
    for name in classes:
        (root / name).mkdir(parents=True)
        Image.new("RGB", (8, 8)).save(root / name / "0.png")
    return dict(type="LabelledImages", data_root=str(root), image_size=8)


def test_items_are_tagged(tmp_path):
    data = BankAndQuery(folder(tmp_path / "a", ["x", "y"]), folder(tmp_path / "b", ["x", "y"]))
    assert [(item["split"], item["label"]) for item in (data[i] for i in range(len(data)))] == [
        ("bank", 0),
        ("bank", 1),
        ("query", 0),
        ("query", 1),
    ]
    assert data.metainfo == {"classes": ("x", "y")}


def test_different_classes_are_refused(tmp_path):
    with refused(ValueError, "bank-and-query-classes-differ", "(2)", "(1)"):
        BankAndQuery(folder(tmp_path / "a", ["x", "y"]), folder(tmp_path / "b", ["x"]))


def test_images_in_both_are_told(tmp_path, monkeypatch):
    """A k-NN finds an image itself, and is right for that reason only."""
    told = []
    monkeypatch.setattr("hgkd.data.bank_and_query.print_log", lambda text, **_: told.append(text))
    both = folder(tmp_path / "a", ["x", "y"])
    BankAndQuery(both, both)
    assert len(told) == 1
    assert told[0].startswith("2 of the 2 images that the k-NN must classify are in its memory, too")
    BankAndQuery(both, folder(tmp_path / "b", ["x", "y"]))
    assert len(told) == 1
