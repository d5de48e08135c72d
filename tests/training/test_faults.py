"""A training on a folder where everything that can be wrong with images is wrong, and gets worse while it runs."""

from pathlib import Path

import numpy as np
import pytest
from mmengine.hooks import Hook
from PIL import Image
from refusals import refused
from tiny_runs import SPARK, tiny, write_images

from hgkd.api import train as train_tool
from hgkd.data import UnlabelledImages
from hgkd.errors import DataError
from hgkd.registry import build_runner

NOISE = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)


def save(image, path, **options):
    image.save(path, **options)


def cut(path, kind):
    save(Image.fromarray(NOISE), path, format=kind)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip_bytes(path):
    save(Image.fromarray(NOISE), path, format="PNG")
    content = bytearray(path.read_bytes())
    content[40:60] = bytes(20)
    path.write_bytes(content)


UNREADABLE = {
    "truncated.jpg": lambda path: cut(path, "JPEG"),
    "truncated.png": lambda path: cut(path, "PNG"),
    "zero_bytes.jpg": lambda path: path.write_bytes(b""),
    "a_page.jpg": lambda path: path.write_text("<html>not found</html>"),
    "header_only.jpg": lambda path: path.write_bytes(b"\xff\xd8\xff\xe0"),
    "damaged.png": flip_bytes,
    "link_to_nothing.jpg": lambda path: path.symlink_to("nothing.jpg"),
    "link_to_itself.jpg": lambda path: path.symlink_to(path.name),
}
READABLE = {
    "png_called_jpg.jpg": lambda path: save(Image.fromarray(NOISE), path, format="PNG"),
    "one_pixel.png": lambda path: save(Image.new("RGB", (1, 1), "red"), path),
    "cmyk.jpg": lambda path: save(Image.new("CMYK", (40, 40), (9, 99, 200, 0)), path),
    "grey_16_bit.png": lambda path: save(Image.fromarray(NOISE[..., 0].astype(np.uint16) * 257), path),
    "alpha.png": lambda path: save(Image.fromarray(NOISE).convert("RGBA"), path),
    "palette.gif.png": lambda path: save(Image.fromarray(NOISE).convert("P"), path),
    "black_and_white.png": lambda path: save(Image.new("1", (40, 40)), path),
    "wide.png": lambda path: save(Image.new("RGB", (30_000, 3)), path),
    "high.jpg": lambda path: save(Image.new("RGB", (2, 30_000)), path),
}


@pytest.fixture
def folder(tmp_path):
    root = write_images(tmp_path / "images", each=16)
    for name, make in {**UNREADABLE, **READABLE}.items():
        make(root / name)
    (root / "a_folder.jpg").mkdir()
    save(Image.fromarray(NOISE), root / "a_folder.jpg/inside.png")
    return root


class DeleteOne(Hook):
    """Removes an image after the first step; it is read in the second epoch in vain."""

    def __init__(self, path):
        self.path = path

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
        self.path.unlink(missing_ok=True)


def test_a_training_outlives_all_of_it_and_lists_what_it_could_not_read(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    options = tiny(folder, workers=1, val_train_root=None, val_test_root=None)
    options |= {"train_dataloader.dataset.max_bad_share": 0.2, "train_dataloader.drop_last": False}
    cfg = train_tool.load_config(SPARK, tmp_path / "run", options=options)
    runner = build_runner(cfg)
    victim = folder / "a/3.png"
    runner.register_hook(DeleteOne(victim))
    runner.train()
    assert runner.epoch == 2
    listed = (tmp_path / "run/unreadable_files.txt").read_text().split("\n")[:-1]
    assert listed == sorted([str(victim), *(str(folder / name) for name in UNREADABLE)])
    assert str(folder / "a_folder.jpg/inside.png") not in listed


def test_above_the_set_share_it_ends_and_says_which(folder, tmp_path):
    dataset = UnlabelledImages(folder, image_size=16, max_bad_share=0.1)
    with refused(DataError, "too-many-bad-images", "50", "images", "max_bad_share=0.1"):
        list(dataset)


def test_a_listed_folder_is_skipped_like_a_damaged_file(folder, tmp_path):
    (tmp_path / "list.txt").write_text("a_folder.jpg\na/0.png\na/1.png\n")
    dataset = UnlabelledImages(folder, list_file=tmp_path / "list.txt", image_size=16, max_bad_share=0.5)
    assert dataset[0]["index"] == 1
    assert [Path(path).name for path in dataset.bad_files()] == ["a_folder.jpg"]
