"""Labelled images for training: a share of the labels, crops that follow the epoch."""

import numpy as np
import torch
from PIL import Image
from refusals import refused

from hgkd.data import LabelledImages, SeededIndex


def test_a_share_of_the_labels_is_balanced_and_drawn_with_its_seed(tmp_path):
    for name, count in (("a", 20), ("b", 30), ("c", 2)):
        (tmp_path / name).mkdir()
        for i in range(count):
            Image.new("RGB", (8, 8)).save(tmp_path / name / f"{i:02}.png")

    def draw(**options):
        data = LabelledImages(tmp_path, image_size=8, **options)
        return [data.path(i) for i in range(len(data))], np.bincount(data.labels).tolist()

    everything, _ = draw()
    tenth, counts = draw(label_fraction=0.1)
    assert counts == [2, 3, 1]  # at least one of every class
    assert set(tenth) < set(everything)
    assert draw(label_fraction=0.1)[0] == tenth
    assert draw(label_fraction=0.1, label_seed=1)[0] != tenth
    with refused(ValueError, "label-fraction-out-of-range", "label_fraction", "0", "1", "1.5"):
        draw(label_fraction=1.5)


def test_labelled_images_for_training_follow_the_epoch(tmp_path):
    (tmp_path / "a").mkdir()
    pixels = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a/0.png")
    data = LabelledImages(tmp_path, image_size=16, transform=dict(kind="augment"))
    first, again, other = (data[SeededIndex(0, seed)]["inputs"] for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    with refused(ValueError, "resize-ratio-without-crop", "resize_ratio=1.1"):
        LabelledImages(tmp_path, resize_ratio=1.1, transform=dict(kind="train"))
