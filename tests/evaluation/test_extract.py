"""Features of every kind of backbone against plain timm calls."""

from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import timm
import torch
from refusals import refused
from student_checkpoints import randomised, write_student
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.utils.data import Dataset

from hgkd.distillers import ClassifierTraining
from hgkd.errors import WeightsError
from hgkd.evaluation import extract, load_extractor
from hgkd.export import export


class Pictures(Dataset):
    """Random pictures; ``indices`` are what the items say about themselves."""

    def __init__(self, indices: list[int], size: int = 64) -> None:
        self.indices = indices
        self.images = torch.randint(0, 256, (max(indices) + 1, 3, size, size), dtype=torch.uint8)

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, place: int) -> dict[str, Any]:
        index = self.indices[place]
        return {"inputs": self.images[index], "label": index % 3, "index": index, "split": "bank"}


def pooled(model: nn.Module, images: Tensor) -> Tensor:
    cfg = model.pretrained_cfg
    mean, std = (torch.tensor(cfg[key]).view(1, 3, 1, 1) for key in ("mean", "std"))
    with torch.no_grad():
        return model.eval().forward_features((images - mean) / std).flatten(2).mean(2)


def test_student_and_export_give_the_encoders_own_features(tmp_path: Path) -> None:
    source = write_student(tmp_path / "a.pth")
    export(tmp_path / "a.pth", tmp_path / "out")
    images = torch.rand(2, 3, 64, 96)
    expected = pooled(source, images)
    student, exported = load_extractor(tmp_path / "a.pth"), load_extractor(str(tmp_path / "out"))
    torch.testing.assert_close(student(images), expected)
    torch.testing.assert_close(exported(images), expected)
    assert (student.kind, exported.kind) == ("student", "export")
    assert exported.settings["name"] == "test_resnet"
    assert exported.settings["weights"] == str(tmp_path / "out")


@pytest.mark.parametrize("name", ["vit_tiny_patch16_dinov3_qkvb", "eva02_tiny_patch14_224", "test_vit_relpos"])
def test_rotary_and_relative_vits_give_their_tokens(name: str, tmp_path: Path) -> None:
    reference = timm.create_model(name, num_classes=0).eval()
    torch.save({"state_dict": {f"module.{key}": value for key, value in reference.state_dict().items()}}, tmp_path / "w.pth")
    extractor = load_extractor(name, checkpoint=tmp_path / "w.pth")
    images = torch.rand(2, 3, *reference.patch_embed.img_size)
    mean, std = (torch.tensor(reference.pretrained_cfg[key]).view(1, 3, 1, 1) for key in ("mean", "std"))
    with torch.no_grad():
        expected = reference.forward_intermediates((images - mean) / std, norm=False, intermediates_only=True)
    torch.testing.assert_close(extractor(images), expected[-1].mean((2, 3)), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(extractor.maps(images, 1), expected[1], rtol=1e-4, atol=1e-5)
    if name == "test_vit_relpos":
        with pytest.raises(ValueError, match="gives no attention"):
            extractor.attention(images)
    else:
        assert extractor.attention(images).shape == (2, *reference.patch_embed.grid_size)


def test_timm_name_with_a_file_or_a_seed(tmp_path: Path) -> None:
    source = randomised(timm.create_model("test_resnet", num_classes=10))
    safetensors.torch.save_file(source.state_dict(), tmp_path / "w.safetensors")
    images = torch.rand(2, 3, 64, 64)
    loaded = load_extractor("test_resnet", checkpoint=tmp_path / "w.safetensors")
    torch.testing.assert_close(loaded(images), pooled(source, images))

    before = torch.random.get_rng_state()
    first, again, other = (load_extractor("test_resnet", seed=seed) for seed in (1, 1, 2))
    assert torch.equal(torch.random.get_rng_state(), before)
    assert torch.equal(first(images), again(images))
    assert not torch.equal(first(images), other(images))
    assert first.settings["weights"] == "random, seed 1"


def test_vit_block(tmp_path: Path) -> None:
    vit = timm.create_model("vit_tiny_patch16_224", num_classes=0).eval()
    safetensors.torch.save_file(vit.state_dict(), tmp_path / "vit.safetensors")
    images = torch.rand(2, 3, 224, 224)  # the size of its position embedding
    mean, std = (torch.tensor(vit.pretrained_cfg[key]).view(1, 3, 1, 1) for key in ("mean", "std"))
    with torch.no_grad():
        maps = vit.forward_intermediates((images - mean) / std, norm=False, intermediates_only=True)
    for block in (0, 2):
        extractor = load_extractor("vit_tiny_patch16_224", checkpoint=tmp_path / "vit.safetensors", block=block)
        torch.testing.assert_close(extractor(images), maps[block].mean((2, 3)), rtol=1e-3, atol=1e-4)
    last = load_extractor("vit_tiny_patch16_224", checkpoint=tmp_path / "vit.safetensors")
    assert last.settings["block"] == len(maps) - 1
    torch.testing.assert_close(last(images), maps[-1].mean((2, 3)), rtol=1e-3, atol=1e-4)
    assert last(torch.rand(1, 3, 96, 64)).shape == (1, vit.num_features)  # another size, another grid
    with refused(ValueError, "feature-block-out-of-range", "99", "vit_tiny_patch16_224", "0", len(maps) - 1):
        load_extractor("vit_tiny_patch16_224", checkpoint=tmp_path / "vit.safetensors", block=99)


def test_mae_file(tmp_path: Path) -> None:
    # timm's ViT names its parameters as MAE's encoder does
    vit = VisionTransformer(img_size=64, embed_dim=128, depth=2, num_heads=2, num_classes=0).eval()
    torch.save({"model": vit.state_dict()}, tmp_path / "mae.pth")
    images = torch.rand(2, 3, 64, 64)
    mean, std = (torch.tensor(x).view(1, 3, 1, 1) for x in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    with torch.no_grad():
        maps = vit.forward_intermediates((images - mean) / std, norm=False, intermediates_only=True)
    for block in (0, 1):
        found = load_extractor(f"mae:{tmp_path / 'mae.pth'}", block=block)
        torch.testing.assert_close(found(images), maps[block].mean((2, 3)), rtol=1e-3, atol=1e-4)
    assert load_extractor(f"mae:{tmp_path / 'mae.pth'}").settings["block"] == 1


def test_a_fine_tuned_vit_and_a_work_folder(tmp_path: Path) -> None:
    kwargs = {"depth": 2, "embed_dim": 32, "num_heads": 2}
    model = ClassifierTraining(classifier={"name": "vit_tiny_patch16_224", **kwargs}, num_classes=3, image_size=64).eval()
    model.set_classes(("a", "b", "c"))
    content = {"meta": {"hgkd": model.meta()}, "state_dict": model.state_dict(), "message_hub": {}}
    torch.save(content, tmp_path / "epoch_1.pth")
    (tmp_path / "last_checkpoint").write_text(str(tmp_path / "epoch_1.pth"))
    images = torch.rand(2, 3, 64, 64)
    network: Any = model.classifier.network
    tokens = []
    network.blocks[0].register_forward_hook(lambda *parts: tokens.append(parts[-1]))
    with torch.no_grad():
        network.forward_features(model.classifier.normalise(images))
        for spec in (tmp_path / "epoch_1.pth", tmp_path):
            extractor = load_extractor(spec, block=0)
            torch.testing.assert_close(extractor(images), tokens[0][:, 1:].mean(1))
            assert extractor.settings["block"] == 0
            assert extractor.maps(torch.rand(1, 3, 96, 96), -1).shape == (1, 32, 4, 4)  # at the size of its training
    with refused(ValueError, "feature-level-out-of-range", "block", "5"):
        load_extractor(tmp_path, block=5)


def test_extract_keeps_order_and_counts_a_replaced_image_once() -> None:
    extractor = load_extractor("test_resnet")
    pictures = Pictures([0, 1, 2, 2, 4, 5, 6])  # image 3 was unreadable, image 2 took its place
    found = extract(extractor, pictures, batch_size=3)
    assert found.skipped == 1
    assert found.labels.tolist() == [0, 1, 2, 1, 2, 0]
    assert found.indices.tolist() == [0, 1, 2, 4, 5, 6]
    with torch.no_grad():
        for row, index in zip(found.features, [0, 1, 2, 4, 5, 6], strict=True):
            alone = extractor(pictures.images[index : index + 1].float() / 255)[0]
            torch.testing.assert_close(row, alone, rtol=1e-4, atol=1e-5)
    with_workers = extract(extractor, pictures, batch_size=4, workers=1)
    torch.testing.assert_close(with_workers.features, found.features, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("spec", "options", "error", "message"),
    [
        ("resnet81", {}, ValueError, "unknown backbone 'resnet81'; did you mean .*resnet18"),
        ("nowhere/a.pth", {}, FileNotFoundError, "checkpoint nowhere/a.pth does not exist"),
        ("mae:nowhere.pth", {}, FileNotFoundError, "weight file nowhere.pth does not exist"),
        ("test_resnet", {"checkpoint": "nowhere.pth"}, FileNotFoundError, "weight file nowhere.pth does not exist"),
        ("test_resnet", {"block": 3}, ValueError, "test_resnet is no ViT and has no block 3"),
        ("test_resnet", {"checkpoint": "a.pth", "pretrained": True}, ValueError, "give one of them"),
        ("mae:a.pth", {"checkpoint": "b.pth"}, ValueError, "takes no checkpoint: a MAE file holds its own weights"),
        ("a.pth", {"checkpoint": "b.pth"}, ValueError, "takes no checkpoint: a file holds its own weights"),
    ],
)
def test_refusals(spec: str, options: dict, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        load_extractor(spec, **options)


def test_a_cnn_has_no_block(tmp_path: Path) -> None:
    write_student(tmp_path / "a.pth")
    with refused(ValueError, "backbone-option-unused", "block"):
        load_extractor(tmp_path / "a.pth", block=0)


def test_unfitting_weights_are_refused(tmp_path: Path) -> None:
    other = timm.create_model("test_convnext", num_classes=0)
    safetensors.torch.save_file(other.state_dict(), tmp_path / "w.safetensors")
    with pytest.raises(WeightsError):
        load_extractor("test_resnet", checkpoint=tmp_path / "w.safetensors")
    (tmp_path / "junk.pth").write_bytes(b"junk")
    with refused(WeightsError, "weight-file-damaged", "junk.pth"):
        load_extractor(tmp_path / "junk.pth")


def test_a_file_of_others_is_named_with_its_network(tmp_path: Path) -> None:
    """The remedy is followed literally: timm's name as the backbone, the file as its checkpoint."""
    source = randomised(timm.create_model("test_resnet", num_classes=10))
    torch.save(source.state_dict(), tmp_path / "b.pth")
    with refused(WeightsError, "checkpoint-not-of-hgkd", "--checkpoint", "b.pth", "--backbone", "NAME"):
        load_extractor(tmp_path / "b.pth")
    images = torch.rand(1, 3, 64, 64)
    torch.testing.assert_close(load_extractor("test_resnet", checkpoint=tmp_path / "b.pth")(images), pooled(source, images))


def test_an_export_for_another_library_says_so(tmp_path: Path) -> None:
    write_student(tmp_path / "a.pth")
    export(tmp_path / "a.pth", tmp_path / "out", "torchscript")
    with refused(WeightsError, "export-of-another-target", "out", "torchscript", "--to"):
        load_extractor(tmp_path / "out")


def test_levels_of_a_cnn() -> None:
    extractor = load_extractor("resnet18")
    images = torch.rand(2, 3, 64, 96)
    model = extractor.model
    with torch.no_grad():
        expected = model.forward_intermediates((images - extractor.mean) / extractor.std, intermediates_only=True)
    for level, index in ((0, 1), (1, 2), (-1, 4), (3, 4)):  # the stem is no level
        torch.testing.assert_close(extractor.maps(images, level), expected[index])
    torch.testing.assert_close(extractor.maps(images), expected[4])
    torch.testing.assert_close(extractor(images), expected[4].mean((2, 3)))
    torch.testing.assert_close(extractor.attention(images, 0), (expected[1] ** 2).sum(1))
    with refused(ValueError, "feature-level-out-of-range", "level", "4", "resnet18", "0 .. 3"):
        extractor.maps(images, 4)


def test_attention_of_a_vit_is_its_class_tokens() -> None:
    extractor = load_extractor("vit_tiny_patch16_224", block=0)
    images = torch.rand(1, 3, 64, 96)
    for level in (None, 0, -1):
        attention = extractor.attention(images, level)
        assert attention.shape == (1, 4, 6)
        # all tokens share 1: what is missing goes to the class token
        assert 0 < attention.sum() < 1
    torch.testing.assert_close(extractor.attention(images), extractor.attention(images, 0))
    assert not torch.equal(extractor.attention(images), extractor.attention(images, 5))
    with refused(ValueError, "feature-level-out-of-range", "block", "12"):
        extractor.attention(images, 12)


def test_other_timm_models_give_what_they_pool(tmp_path: Path) -> None:
    source = timm.create_model("mixer_s32_224", num_classes=10)
    safetensors.torch.save_file(source.state_dict(), tmp_path / "w.safetensors")
    extractor = load_extractor("mixer_s32_224", checkpoint=tmp_path / "w.safetensors")
    images = torch.rand(1, 3, 224, 224)
    plain = source.eval()
    with torch.no_grad():
        expected = plain.forward_head(plain.forward_features((images - extractor.mean) / extractor.std), pre_logits=True)
    torch.testing.assert_close(extractor(images), expected)
    assert extractor(torch.rand(1, 3, 64, 80)).shape == expected.shape  # resized to what the network needs
    assert extractor.settings["input_size"] == [224, 224]
    with refused(ValueError, "no-feature-maps", "mixer_s32_224"):
        extractor.maps(images)
    with refused(ValueError, "no-attention-maps", "mixer_s32_224"):
        extractor.attention(images)


def test_features_that_are_no_maps_are_refused() -> None:
    extractor = load_extractor("test_resnet")
    extractor.model.forward_features = lambda x: x.flatten(2).transpose(1, 2)  # tokens (B, N, C)
    with refused(ValueError, "features-of-other-shape", "ViTs"):
        extractor(torch.rand(1, 3, 64, 64))
