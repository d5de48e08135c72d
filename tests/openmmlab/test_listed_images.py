"""Listed images that are absent, or no images: what is there instead is said."""

import pytest
from PIL import Image
from refusals import refused

from hgkd.errors import DataError, abbreviate
from hgkd.openmmlab.data_checks.listed_images import check_images, check_readable, image_size, look_at


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("a.jpg ", "'a.jpg' is there, without the blanks around it"),
        ("a.JPG", "'a.jpg' is there, in other upper and lower case"),
        ("a.jpg.jpg", "'a.jpg' is there, without its last suffix, which the data set adds"),
        ("images/a.jpg", "'a.jpg' is there, without its folders"),
        ("b\\a.jpg", "'b/a.jpg' is there, with / for"),
        ("a.jpg,cat", "'a.jpg' is there, without what follows its first comma or blank: a list has names alone"),
        ("a.jpg cat", "'a.jpg' is there, without what follows its first comma or blank"),
        ("\ufeffa.jpg", "begins with a byte order mark"),
        ("z.jpg", r"\(z.jpg\)"),
    ],
)
def test_what_is_there_instead(tmp_path, name, hint):
    (tmp_path / "b").mkdir()
    for file in ("a.jpg", "b/a.jpg"):
        (tmp_path / file).touch()
    with pytest.raises(FileNotFoundError, match=rf"1 of the 1 images of .*{hint}.*set data_root"):
        check_images(tmp_path / "list", tmp_path, [name], "val_dataloader")


def test_what_is_no_image():
    many = [f"{number}.jpg" for number in range(20)]
    assert check_readable([], 20, "val_dataloader") == []
    assert (
        "2 of 20 images cannot be opened: cut off, or no images (0.jpg, 1.jpg)"
        in check_readable(many[:2], 20, "train_dataloader")[0]
    )
    for name, unreadable in (("train_dataloader", many[:11]), ("val_dataloader", many[:1])):
        with refused(DataError, "annotated-images-unreadable", name, len(unreadable), "20"):
            check_readable(unreadable, 20, name)


def test_sizes(tmp_path):
    exif = Image.Exif()
    exif[274] = 6
    Image.new("RGB", (8, 4)).save(tmp_path / "a.jpg", exif=exif)
    (tmp_path / "b.jpg").write_text("text")
    found = look_at([tmp_path / "a.jpg", tmp_path / "b.jpg"], lambda file: (image_size(file, True), image_size(file, False)))
    assert [size for _, size in found] == [((4, 8), (8, 4)), (None, None)]
    assert list(look_at([], len)) == []


def test_few():
    assert abbreviate([1, 2, 3], 2) == "1, 2 and 1 more"
