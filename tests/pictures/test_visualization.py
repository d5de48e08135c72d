"""Pictures: known regions get known colours, neighbours are the right files, reconstructions keep what is visible."""

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from full_disk import full_disk
from PIL import Image
from refusals import refused
from torch import Tensor

from hgkd.data.images import read_crops
from hgkd.distillers import MaskedDistiller
from hgkd.errors import DataError
from hgkd.evaluation import FeatureSet, load_extractor
from hgkd.evaluation.extract import FeatureExtractor
from hgkd.networks.mae import MaskedAutoencoder, make_arch, save_mae
from hgkd.pictures.features import attention_columns, heat_colours, neighbour_columns, pca_columns
from hgkd.pictures.files import find_files, save_picture
from hgkd.pictures.reconstruction import load_reconstructor, reconstruction_columns
from hgkd.writing import WriteError

ARCH = {
    "embed_dim": 16,
    "depth": 1,
    "num_heads": 2,
    "patch_size": 8,
    "decoder_embed_dim": 16,
    "decoder_depth": 1,
    "decoder_num_heads": 2,
}


class Blocks(FeatureExtractor):
    """The images' own colours, averaged over blocks of 8 pixels; level 1: of 4."""

    def __init__(self) -> None:
        super().__init__("toy", {"name": "toy"})

    def maps(self, images: Tensor, level: int | None = None) -> Tensor:
        return torch.nn.functional.avg_pool2d(images, 4 if level == 1 else 8)

    def attention(self, images: Tensor, level: int | None = None) -> Tensor:
        return self.maps(images, level).sum(1)


def halves() -> Tensor:
    """Two images, each half red, half blue: left and right, above and below."""
    images = torch.zeros(2, 3, 32, 32)
    images[0, 0, :, :16], images[0, 2, :, 16:] = 1, 1
    images[1, 0, :16], images[1, 2, 16:] = 1, 1
    return images


def test_two_flat_regions_get_two_colours() -> None:
    columns = pca_columns(Blocks(), halves(), (None, 1))
    assert list(columns) == ["image", "last", "level 1"]
    colours = columns["last"]
    assert colours.shape == (2, 3, 4, 4)
    red, blue = colours[0, :, 0, 0], colours[0, :, 0, 3]
    assert (red - blue).abs().max() == 1
    for image, region in ((0, np.s_[:, :, :2]), (1, np.s_[:, :2])):  # equal features, equal colours, in both images
        torch.testing.assert_close(colours[image][region], red[:, None, None].expand_as(colours[image][region]))
    assert len(colours.permute(0, 2, 3, 1).reshape(-1, 3).unique(dim=0)) == 2
    assert columns["level 1"].shape == (2, 3, 8, 8)


def test_attention_is_bright_where_it_is_high() -> None:
    images = halves()
    images[:, :, 8:16, 8:16] = 1
    heat = attention_columns(Blocks(), images)["last"]
    brightness = heat.sum(1).flatten(1)
    assert brightness.argmax(1).tolist() == [5, 5]  # place (1, 1) of 4 x 4
    assert heat_colours(torch.ones(1, 2, 2)).sum() < 0.2
    dark, bright = heat_colours(torch.tensor([[[0.0, 1.0]]]))[0, :, 0].T
    assert dark.sum() < bright.sum()


@pytest.mark.parametrize("name", ["test_resnet", "vit_tiny_patch16_224"])
def test_real_backbones_give_maps_and_attention(name: str) -> None:
    images = halves().repeat_interleave(2, 2).repeat_interleave(2, 3)
    extractor = load_extractor(name)
    for columns in (pca_columns(extractor, images, (0, -1)), attention_columns(extractor, images, (0, -1))):
        assert list(columns) == ["image", "level 0", "level -1"]
        for maps in columns.values():
            assert maps.shape[:2] == (2, 3)
            assert maps.min() >= 0
            assert maps.max() <= 1
        assert columns["level 0"].flatten(1).std(1).min() > 0
    assert extractor.attention_name


def paint(folder: Path, colours: dict[str, tuple[int, int, int]], size: int = 20) -> list[Path]:
    folder.mkdir(parents=True, exist_ok=True)
    for name, colour in colours.items():
        Image.new("RGB", (size, size), colour).save(folder / f"{name}.png")
    return find_files([folder])


def test_neighbours_are_the_nearest_files_and_never_the_query(tmp_path: Path) -> None:
    bank = paint(tmp_path, {"a": (255, 0, 0), "b": (250, 20, 0), "c": (0, 0, 255), "d": (0, 30, 250)})
    features = read_crops(bank, 16).float().mean((2, 3))
    known = FeatureSet(features, torch.zeros(4), torch.arange(4))
    query = FeatureSet(features[[0]], torch.zeros(1), torch.tensor([0]))
    columns, found = neighbour_columns(query, [tmp_path / "a.png"], known, bank, 16, k=2, standardise=False)
    assert [path.name for path, _ in found[0]] == ["b.png", "d.png"]
    unit = torch.nn.functional.normalize(features, dim=1)
    assert found[0][0][1] == pytest.approx(float(unit[0] @ unit[1]), abs=1e-5)
    assert list(columns) == ["query", "1", "2"]
    torch.testing.assert_close(columns["1"][0, :, 0, 0], torch.tensor([250, 20, 0]) / 255)
    with refused(ValueError, "neighbours-out-of-range", "4", "5"):
        neighbour_columns(query, [tmp_path / "a.png"], known, bank, 16, k=4)


def test_picture_and_page_grow(tmp_path: Path) -> None:
    columns = {"image": halves(), "map": torch.rand(2, 3, 4, 4)}
    for name in ("first", "second"):
        path = save_picture(columns, tmp_path / "out", name, f"{name} & <caption> über \udce9")  # of a file name
    with Image.open(path) as picture:
        assert picture.format == "PNG"
        assert picture.size == (2 * 34, 14 + 2 * 34)
        assert picture.getpixel((2, 20)) == (255, 0, 0)
        assert picture.getpixel((30, 20)) == (0, 0, 255)
    page = (tmp_path / "out/pictures.html").read_text()
    assert re.findall("<h2>(.*?)</h2>", page) == ["first", "second"]
    assert "<figcaption>second &amp; &lt;caption&gt; über \\xe9</figcaption>" in page
    assert page.count("data:image/png;base64,") == 2


def test_of_nan_there_is_no_picture(tmp_path: Path) -> None:
    class Diverged:
        def maps(self, images: torch.Tensor, level: object) -> torch.Tensor:
            return images.mean(1, keepdim=True) * float("nan")

        attention = maps

        def columns(self, inputs: torch.Tensor, ratio: float, seed: int) -> dict:
            return {"image": inputs, "reconstruction": inputs * float("nan")}

    images = torch.rand(2, 3, 4, 4)
    for draw, what in ((pca_columns, "features"), (attention_columns, "maps")):
        with refused(ValueError, "features-not-finite", what):
            draw(Diverged(), images)
    with refused(ValueError, "features-not-finite"):
        reconstruction_columns(Diverged(), images, 0.5)


def test_a_full_disk_keeps_the_picture(tmp_path: Path) -> None:
    columns = {"image": torch.rand(2, 3, 64, 64)}
    path = save_picture(columns, tmp_path, "a", "first")
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    with full_disk(1000), pytest.raises(WriteError, match=r"cannot write .*a.png"):
        save_picture(columns, tmp_path, "a", "second")
    assert path.name == "a.png"
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before


def test_files_that_are_not_there_or_not_readable(tmp_path: Path) -> None:
    with refused(FileNotFoundError, "image-missing", "none"):
        find_files([tmp_path / "none"])
    with refused(DataError, "no-images"):
        find_files([tmp_path])
    (tmp_path / "broken.png").write_bytes(b"x")
    with refused(DataError, "image-unreadable", "broken.png"):
        read_crops(find_files([tmp_path]), 8)
    assert len(find_files([tmp_path, tmp_path / "broken.png"])) == 2
    assert len(find_files([tmp_path, tmp_path / "broken.png"], limit=1)) == 1


def mae_file(path: Path, norm_pix: bool, **changes: object) -> Path:
    torch.manual_seed(0)
    network = MaskedAutoencoder(make_arch({**ARCH, "image_size": (32, 32), **changes}))
    if network.arch.decoder_depth:
        torch.nn.init.zeros_(network.decoder_pred.weight)
        torch.nn.init.zeros_(network.decoder_pred.bias)
    return save_mae(network, path, {"mean": [0.5] * 3, "std": [0.25] * 3, "norm_pix": norm_pix})


@pytest.mark.parametrize("norm_pix", [False, True])
def test_reconstruction_of_a_mae_that_always_predicts_zero(tmp_path: Path, norm_pix: bool) -> None:
    model = load_reconstructor(mae_file(tmp_path / "mae.safetensors", norm_pix))
    assert model.image_size == (32, 32)
    inputs = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    columns, ratio = reconstruction_columns(model, inputs)
    assert ratio == 0.75
    images = inputs / 255
    hidden = (columns["seen"] != images).flatten(2).any(1).view(2, 32, 32)
    assert hidden[:, ::8, ::8].sum((1, 2)).tolist() == [12, 12]  # 12 of 16 patches
    shown = ~hidden[:, None].expand_as(images)
    torch.testing.assert_close(columns["reconstruction"][shown], images[shown], atol=1e-5, rtol=0)
    # zero is the mean: of the pixels in training, or of all values (colours together, as MAE) of the patch itself
    found = columns["reconstruction"][~shown]
    if norm_pix:
        own = images.unfold(2, 8, 8).unfold(3, 8, 8).mean((1, 4, 5)).repeat_interleave(8, 1).repeat_interleave(8, 2)
        expected = own[:, None].expand_as(images)[~shown]
    else:
        expected = torch.full_like(found, 0.5)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
    again, _ = reconstruction_columns(model, inputs, 0.5, seed=0)
    assert (again["seen"] != images).flatten(2).any(1).view(2, 32, 32)[:, ::8, ::8].sum() == 16


@pytest.mark.parametrize("kind", ["cnn", "vit"])
def test_reconstruction_with_the_pixels_of_the_file_that_a_student_started_from(tmp_path: Path, kind: str) -> None:
    """Its config says none, the checkpoint does; the file that it started from is gone."""
    mean, std = [0.25, 0.5, 0.125], [0.5, 0.25, 0.375]
    student: dict[str, Any] = dict(type="SparseUNet", encoder="test_resnet", decoder_width=16, min_decoder_width=8)
    said, start = dict(normalize=[mean, std]), dict(encoder_checkpoint="gone.pth")
    if kind == "vit":
        arch = dict(
            embed_dim=16, depth=1, num_heads=2, decoder_embed_dim=16, decoder_depth=1, decoder_num_heads=2, patch_size=8
        )
        student, said, start = dict(type="MaskedViT", arch=arch), dict(mean=mean, std=std), dict(checkpoint="gone.pth")
    rest = dict(
        type="MaskedDistiller",
        objectives=dict(pixels=dict(type="PixelReconstruction")),
        mask=dict(type="RandomMask", mask_ratio=0.5),
        image_size=64,
    )
    model = MaskedDistiller(student={**student, **said}, **{k: v for k, v in rest.items() if k != "type"})
    images, found = torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8), []
    for options in (said, start):
        meta = {"cfg": f"model = { ({**rest, 'student': {**student, **options}})!r}\n", "hgkd": model.meta()}
        torch.save({"meta": meta, "state_dict": model.state_dict()}, tmp_path / "epoch_1.pth")
        found.append(reconstruction_columns(load_reconstructor(tmp_path / "epoch_1.pth"), images)[0]["reconstruction"])
    assert torch.equal(*found)


def test_what_predicts_no_pixels_is_refused(tmp_path: Path) -> None:
    with refused(FileNotFoundError, "checkpoint-missing"):
        load_reconstructor(tmp_path / "none.pth")
    config = "model = dict(type='MaskedDistiller', objectives=dict(a=dict(type='HGKD')), student=dict(type='SparseUNet'))\n"
    torch.save({"meta": {"cfg": config}, "state_dict": {}}, tmp_path / "hgkd.pth")
    with refused(ValueError, "no-pixels-predicted", "hgkd.pth", "HGKD", "PixelReconstruction"):
        load_reconstructor(tmp_path / "hgkd.pth")
    mae_file(tmp_path / "encoder.safetensors", True, decoder_depth=0)
    with refused(ValueError, "teacher-without-decoder", "encoder-only"):
        load_reconstructor(tmp_path / "encoder.safetensors")
    model = load_reconstructor(mae_file(tmp_path / "mae.safetensors", True))
    for ratio in (0.0, 1.0):
        with refused(ValueError, "mask-ratio-out-of-range", "mask_ratio", "(0, 1)"):
            reconstruction_columns(model, torch.zeros(1, 3, 32, 32, dtype=torch.uint8), ratio)
