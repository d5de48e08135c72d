"""What every kind of weight file is, and how often a command reads one."""

import json
import os
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from refusals import refused
from safetensors.torch import save_file
from student_checkpoints import write_student
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from hgkd.distillers import ClassifierTraining
from hgkd.errors import WeightsError
from hgkd.evaluation import load_extractor
from hgkd.export import export
from hgkd.networks import ImageClassifier
from hgkd.networks.mae import MaskedAutoencoder, make_arch, save_mae
from hgkd.openmmlab import TimmBackbone, load_backbone_file
from hgkd.pictures.reconstruction import load_reconstructor
from hgkd.weights import cnn_names, files
from hgkd.weights.identify import Kind, WeightFile, identify

ARCH = {"embed_dim": 64, "depth": 1, "num_heads": 1, "decoder_embed_dim": 64, "decoder_depth": 1, "decoder_num_heads": 1}
GOLDEN = Path(__file__).parents[1] / "golden"


def mae(decoder: bool = True) -> MaskedAutoencoder:
    sizes = ARCH if decoder else {**ARCH, "decoder_depth": 0}
    return MaskedAutoencoder(make_arch({**sizes, "image_size": (32, 32)}))


def vit(**kwargs: Any) -> dict[str, Tensor]:
    network = VisionTransformer(img_size=32, embed_dim=64, depth=1, num_heads=1, num_classes=0, **kwargs)
    return network.state_dict()


def cnn(style: cnn_names.KeyStyle, name: str) -> dict[str, Tensor]:
    sizes = (
        {"depths": (1, 1, 1, 1), "dims": (4, 4, 4, 4)}
        if "convnext" in name
        else {"layers": (1, 1, 1, 1), "channels": (4, 4, 4, 4)}
    )
    return cnn_names.renamed(timm.create_model(name, num_classes=2, **sizes), style)


def weights(*names: str) -> dict[str, Tensor]:
    return {name: torch.zeros(2) for name in names}


RESNET = cnn(cnn_names.TIMM, "resnet18")
HF = "embeddings.patch_embeddings.projection.weight"

# name -> content of torch.save, kind, naming, a part of the detail
FILES: dict[str, tuple[Any, Kind, str, str]] = {
    "encoder_of_an_unknown_section": ({"meta": {"hgkd": {"new": 1}}, "state_dict": {}}, Kind.UNKNOWN, "", "not describe"),
    "official_mae_with_decoder": ({"model": mae().state_dict()}, Kind.MAE, "timm", "with its decoder"),
    "official_mae_encoder": ({"model": mae(decoder=False).state_dict()}, Kind.MAE_ENCODER, "timm", "computed"),
    "mae_of_transformers": (
        {**weights("vit." + HF, "decoder.decoder_embed.weight"), "vit.embeddings.cls_token": torch.zeros(1, 1, 4)},
        Kind.MAE,
        "Hugging Face ViT",
        "with its decoder",
    ),
    "timm_vit": (vit(), Kind.VIT, "timm", ""),
    "dino_training": ({"student": vit(), "teacher": vit()}, Kind.VIT, "timm", ""),
    "dinov2": (vit(init_values=1e-5), Kind.VIT, "timm", "DINOv2"),
    "dinov2_with_registers": (
        {**vit(init_values=1.0), **weights("register_tokens")},
        Kind.VIT,
        "DINOv2 with registers",
        "DINOv2",
    ),
    "dinov3": (
        weights("patch_embed.proj.weight", "rope_embed.periods", "blocks.0.norm1.weight"),
        Kind.VIT,
        "timm",
        "DINOv3",
    ),
    "beit": ({**vit(), **weights("blocks.0.attn.relative_position_bias_table")}, Kind.VIT, "timm", "BEiT"),
    "openai_clip": (
        weights("visual.transformer.resblocks.0.attn.in_proj_weight", "transformer.resblocks.0.attn.in_proj_weight"),
        Kind.VIT,
        "OpenAI CLIP",
        "CLIP",
    ),
    "clip_of_transformers": (
        weights("vision_model.embeddings.patch_embedding.weight", "vision_model.pre_layrnorm.weight"),
        Kind.VIT,
        "Hugging Face CLIP",
        "CLIP",
    ),
    "vit_of_transformers": (weights(HF, "embeddings.cls_token"), Kind.VIT, "Hugging Face ViT", ""),
    "swin": (weights("patch_embed.proj.weight", "layers.0.blocks.0.norm1.weight"), Kind.NETWORK, "timm", "Swin"),
    "resnet": (RESNET, Kind.CNN, "timm", "ResNet"),
    "resnet_of_transformers": (cnn(cnn_names.TRANSFORMERS_RESNET, "resnet18"), Kind.CNN, "transformers ResNet", "a ResNet"),
    **{
        style.name.replace(" ", "_"): (cnn(style, "convnext_atto"), Kind.CNN, style.name, "a ConvNeXt")
        for style in cnn_names.STYLES
        if style is not cnn_names.TRANSFORMERS_RESNET
    },
    "spark": (
        {"module": {"mask_tokens.0": torch.zeros(1), **{f"sparse_encoder.sp_cnn.{key}": v for key, v in RESNET.items()}}},
        Kind.SPARK,
        "timm",
        "ResNet",
    ),
    "spark_of_mmpretrain": (
        {
            "meta": {"epoch": 1},
            "state_dict": {
                **{f"backbone.{key}": value for key, value in RESNET.items()},
                **weights("neck.dec.0.conv1.weight", "mask_tokens.0"),
            },
        },
        Kind.SPARK,
        "timm",
        "ResNet",
    ),
    "detector": ({"meta": {}, "state_dict": weights("backbone.conv1.weight", "bbox_head.cls.weight")}, Kind.MODEL, "", ""),
    "segmentor_alone": ({"state_dict": weights("backbone.conv1.weight", "decode_head.x.weight")}, Kind.MODEL, "", ""),
    "distilled_detector": (
        {"meta": {}, "state_dict": weights("student.backbone.conv1.weight", "student.neck.x", "losses.0.weight")},
        Kind.DISTILLED_MODEL,
        "",
        "",
    ),
    "two_sets": ({"a": weights("x"), "b": weights("y")}, Kind.UNKNOWN, "", "2 sets of weights"),
    "plain": (weights("some.weight"), Kind.UNKNOWN, "", "its first names are some.weight"),
    "no_weights": ({"epoch": 3}, Kind.UNKNOWN, "", "holds no tensors"),
    "a_list": ([1, 2], Kind.UNKNOWN, "", "holds a list"),
}


@pytest.mark.parametrize("name", FILES)
def test_files_of_others(tmp_path: Path, name: str) -> None:
    content, kind, naming, detail = FILES[name]
    torch.save(content, tmp_path / "f.pth")
    found = identify(tmp_path / "f.pth")
    assert (found.kind, found.naming) == (kind, naming)
    assert detail in found.detail
    assert found.spec is None


@pytest.mark.parametrize(
    ("name", "kind", "spec"),
    [
        ("unet_student.pth", Kind.STUDENT, "resnet18"),
        ("vit_student.pth", Kind.VIT_STUDENT, None),
        ("mae.pth", Kind.MAE_RUN, None),
        ("mae.safetensors", Kind.MAE, None),
        ("classifier.pth", Kind.CLASSIFIER, "convnext_atto"),
        ("distilled_student.pth", Kind.MODEL, None),
        ("sparse.safetensors", Kind.SPARSE, None),
        ("export_timm", Kind.EXPORT, "resnet18"),
        ("export_sparse", Kind.EXPORT, "resnet18"),
        ("export_student", Kind.EXPORT, "resnet18"),
        ("export_classifier", Kind.EXPORT, "convnext_atto"),
    ],
)
def test_files_of_hgkd(name: str, kind: Kind, spec: str | None) -> None:
    found = identify(GOLDEN / name)
    assert found.kind is kind
    assert getattr(found.spec, "name", None) == spec


def test_folders(tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    write_student(run / "epoch_1.pth")
    (run / "last_checkpoint").write_text("epoch_1.pth")
    assert (identify(run).kind, identify(run).path) == (Kind.STUDENT, run / "epoch_1.pth")

    export(run, tmp_path / "script", "torchscript")
    assert dict(identify(tmp_path / "script").card) == {"target": "torchscript", "part": "backbone"}

    card = tmp_path / "script/run_card.json"  # as earlier versions wrote it
    card.write_text(card.read_text().replace('"part": "backbone"', '"what": "backbone"').replace('"torchscript"', '"program"'))
    assert dict(identify(tmp_path / "script").card) == {"target": "pt2", "part": "backbone"}

    other = tmp_path / "other"
    other.mkdir()
    (other / "config.json").write_text(json.dumps({"architectures": ["X"]}))
    save_file(RESNET, other / "model.safetensors")
    found = identify(other)
    assert found.kind is Kind.UNKNOWN
    with refused(WeightsError, "weight-file-is-a-folder", "other", "other/model.safetensors"):
        found.tensors()


def test_what_cannot_be_read_is_refused(tmp_path: Path) -> None:
    torch.save(RESNET, tmp_path / "whole.pth")
    whole = (tmp_path / "whole.pth").read_bytes()
    (tmp_path / "half.pth").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "junk.pth").write_bytes(b"junk")
    (tmp_path / "empty.pth").write_bytes(b"")
    save_file(RESNET, tmp_path / "whole.safetensors")
    (tmp_path / "half.safetensors").write_bytes((tmp_path / "whole.safetensors").read_bytes()[:500])
    for name in ("half.pth", "junk.pth", "empty.pth", "half.safetensors"):
        with pytest.raises(WeightsError, match=name):
            identify(tmp_path / name)
    with refused(FileNotFoundError, "weight-file-missing", "nothing.pth"):
        identify(tmp_path / "nothing.pth")


def test_one_set_of_several(tmp_path: Path) -> None:
    torch.save({"a": RESNET, "b": vit()}, tmp_path / "f.pth")
    assert identify(tmp_path / "f.pth", "a").kind is Kind.CNN
    assert identify(tmp_path / "f.pth", "b").kind is Kind.VIT
    found = identify(tmp_path / "f.pth", "b")
    assert found.tensors("a").keys() == RESNET.keys()
    assert found.tensors("b").keys() == found.tensors().keys() == vit().keys()


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often each file is read, by name."""
    count: Counter[str] = Counter()
    load, load_file = torch.load, files.load_file

    def counted(real: Any) -> Any:
        def read(path: Any, *args: Any, **kwargs: Any) -> Any:
            count[Path(path).name] += 1
            return real(path, *args, **kwargs)

        return read

    monkeypatch.setattr(torch, "load", counted(load))
    monkeypatch.setattr(files, "load_file", counted(load_file))
    return count


@pytest.mark.parametrize(
    "name", ["unet_student.pth", "vit_student.pth", "mae.pth", "mae.safetensors", "classifier.pth", "export_timm"]
)
def test_evaluate_takes_every_file_as_it_is_and_reads_it_once(name: str, reads: Counter[str]) -> None:
    features = load_extractor(GOLDEN / name)(torch.rand(1, 3, 64, 64))
    assert features.isfinite().all()
    assert reads == {"model.safetensors" if name == "export_timm" else name: 1}


def test_a_mae_needs_no_prefix_and_may_have_one(tmp_path: Path, reads: Counter[str]) -> None:
    torch.save({"model": mae(decoder=False).state_dict()}, tmp_path / "encoder.pth")
    save_mae(mae(), tmp_path / "whole.safetensors")
    images = torch.rand(1, 3, 32, 32)
    for name in ("encoder.pth", "whole.safetensors"):
        plain, prefixed = load_extractor(tmp_path / name), load_extractor(f"mae:{tmp_path / name}")
        assert plain.settings == prefixed.settings
        assert torch.equal(plain(images), prefixed(images))
    assert set(reads.values()) == {2}  # one for each extractor


def test_a_fine_tuned_vit_is_read_once(tmp_path: Path, reads: Counter[str]) -> None:
    network = {"name": "vit_tiny_patch16_224", "depth": 1, "embed_dim": 32, "num_heads": 2}
    model = ClassifierTraining(classifier=network, num_classes=3, image_size=32)
    run = tmp_path / "run"
    run.mkdir()
    torch.save({"meta": {"hgkd": model.meta()}, "state_dict": model.state_dict(), "message_hub": {}}, run / "epoch_1.pth")
    (run / "last_checkpoint").write_text("epoch_1.pth")
    assert load_extractor(run).kind == "classifier"
    assert reads == {"epoch_1.pth": 1}


def test_a_vit_of_others_is_named_with_its_network(tmp_path: Path) -> None:
    torch.save(timm.create_model("vit_tiny_patch16_224", depth=1).state_dict(), tmp_path / "vit.pth")
    with refused(WeightsError, "checkpoint-not-of-hgkd", "--checkpoint", "vit.pth", "--backbone", "NAME"):
        load_extractor(tmp_path / "vit.pth")


def test_moco_v3_is_no_mae(tmp_path: Path) -> None:
    """MoCo v3 has MAE's positions; its projection of patches is as it was initialised, bias 0, for good."""
    state = mae(decoder=False).state_dict()
    weight = state["patch_embed.proj.weight"]
    bound = (6 / (3 * 16 * 16 + 64)) ** 0.5
    weight.copy_((torch.rand(weight.shape, generator=torch.Generator().manual_seed(0)) * 2 - 1) * bound)
    state["patch_embed.proj.bias"].zero_()
    torch.save({"state_dict": {f"module.{key}": value for key, value in state.items()}}, tmp_path / "moco.pth")
    found = identify(tmp_path / "moco.pth")
    assert (found.kind, found.detail[:7]) == (Kind.VIT, "MoCo v3")
    state["patch_embed.proj.bias"][3] = 0.01  # trained
    torch.save(state, tmp_path / "mae.pth")
    assert identify(tmp_path / "mae.pth").kind is Kind.MAE_ENCODER


@pytest.mark.parametrize(("name", "part"), [("unet_student.pth", "backbone"), ("classifier.pth", "classifier")])
def test_export_reads_a_checkpoint_once(tmp_path: Path, reads: Counter[str], name: str, part: str) -> None:
    export(GOLDEN / name, tmp_path / "out", part=part)
    assert reads[name] == 1


@pytest.mark.parametrize("name", ["vit_student.pth", "mae.pth", "mae.safetensors"])
def test_a_reconstruction_reads_its_file_once(name: str, reads: Counter[str]) -> None:
    load_reconstructor(GOLDEN / name).columns(torch.zeros(1, 3, 64, 64, dtype=torch.uint8), 0.5, 0)
    assert reads == {name: 1}


def test_a_downstream_backbone_is_read_once(tmp_path: Path, reads: Counter[str]) -> None:
    network = {"layers": (1, 1, 1, 1), "channels": (8, 12, 16, 24)}
    load_backbone_file(TimmBackbone("resnet18", **network), GOLDEN / "export_timm")
    assert reads == {"model.safetensors": 1}


@pytest.mark.parametrize("name", ["vit_student.pth", "mae.safetensors"])
def test_fine_tuning_reads_its_start_once(name: str, reads: Counter[str]) -> None:
    sizes = {"patch_size": 8, "embed_dim": 16, "depth": 2, "num_heads": 2}
    ImageClassifier("vit_tiny_patch16_224", 2, 64, backbone=GOLDEN / name, **sizes)
    assert reads == {name: 1}


def test_a_file_is_read_once_for_features_and_for_fine_tuning(tmp_path: Path, reads: Counter[str]) -> None:
    """As in ``hgkd evaluate finetune``; a file that was written since is read again."""
    sizes = {"patch_size": 8, "embed_dim": 16, "depth": 2, "num_heads": 2}
    path = Path(shutil.copy(GOLDEN / "mae.safetensors", tmp_path))
    with files.reading_once():
        load_extractor(path)
        with files.reading_once():
            ImageClassifier("vit_tiny_patch16_224", 2, 64, backbone=path, **sizes)
        assert reads == {"mae.safetensors": 1}
        os.utime(path, (1, 1))
        load_extractor(path)
        assert reads == {"mae.safetensors": 2}
    load_extractor(path)
    assert reads == {"mae.safetensors": 3}


def test_the_answer_stands_for_its_path(tmp_path: Path, reads: Counter[str]) -> None:
    torch.save(RESNET, tmp_path / "f.pth")
    found = identify(tmp_path / "f.pth")
    assert isinstance(found, WeightFile)
    assert identify(found) is found
    assert Path(found) == tmp_path / "f.pth"
    assert str(found) == str(tmp_path / "f.pth")
    assert found.tensors().keys() == RESNET.keys()
    assert reads == {"f.pth": 1}


def test_the_command_says_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from hgkd.cli import doctor, visualize

    path = GOLDEN / "vit_student.pth"
    assert doctor.main(["file", str(path)]) == 0
    told = capsys.readouterr().out
    assert "ViT student of an hgkd run; serves as a teacher" in told
    assert f"hgkd evaluate ... --backbone {path}" in told
    Image.fromarray(np.full((64, 64, 3), 90, np.uint8)).save(tmp_path / "a.png")
    arguments = ["--backbone", str(path), "--images", str(tmp_path / "a.png"), "--out", str(tmp_path / "out")]
    assert visualize.main(["attention", *arguments, "--image-size", "64", "--device", "cpu"]) == 0

    torch.save(weights("some.weight"), tmp_path / "f.pth")
    assert doctor.main(["file", str(tmp_path / "f.pth")]) == 1
    assert doctor.main(["file", str(tmp_path / "none.pth")]) == 2
