"""Classifiers: timm's own numbers, two heads, and every kind of file that one starts from."""

import pytest
import timm
import torch
from refusals import refused
from student_checkpoints import write_student

from hgkd.errors import WeightsError
from hgkd.export import export, load_backbone, read_student
from hgkd.networks import ImageClassifier, load_classifier
from hgkd.networks.mae import MaskedAutoencoder, make_arch, save_mae
from hgkd.networks.positions import sincos_positions
from hgkd.networks.vit import is_vit
from hgkd.students import MaskedViT
from hgkd.weights.run_file import ClassifierSpec

TINY = dict(depth=2, embed_dim=32, num_heads=2)
ARCH = dict(**TINY, decoder_embed_dim=16, decoder_depth=1, decoder_num_heads=2, image_size=(64, 64))
NETWORKS = [
    ("test_resnet", {}),
    ("test_convnext", {}),
    ("test_efficientnet", {}),
    ("vit_tiny_patch16_224", TINY),
    ("vit_tiny_patch16_224", dict(TINY, global_pool="avg")),
]


@pytest.mark.parametrize(("name", "kwargs"), NETWORKS)
def test_one_head_is_timms_own_network(name, kwargs):
    model = ImageClassifier(name, 3, 64, **kwargs).eval()
    inputs = torch.rand(2, 3, 64, 64)
    with torch.no_grad():
        out, expected = model(inputs), model.network(inputs)
    torch.testing.assert_close(out.logits, expected)
    assert out.distilled is out.logits
    assert model.predict(inputs).shape == (2, 3)
    assert tuple(out.feature.shape[1:]) == model.feature_shape(64)


def test_maps_that_timm_keeps_channels_last_are_maps_like_others():
    """Swin's, of which FeatureMapMGD took rows for channels."""
    model = ImageClassifier("swin_tiny_patch4_window7_224", 3, 64, img_size=64, embed_dim=24, depths=(1, 1, 1, 1)).eval()
    assert model.feature_shape(64) == (192, 2, 2)
    inputs = torch.rand(2, 3, 64, 64)
    with torch.no_grad():
        out = model(inputs)
    torch.testing.assert_close(out.feature, model.network.forward_features(inputs).movedim(3, 1))
    activation, classes = model.class_activation(inputs)
    assert activation.shape == (2, 2, 2)
    assert torch.equal(classes, out.logits.argmax(1))


@pytest.mark.parametrize(("name", "kwargs"), NETWORKS)
def test_two_heads_on_one_feature_are_averaged(name, kwargs):
    model = ImageClassifier(name, 3, 64, two_heads=True, **kwargs).eval()
    inputs = torch.rand(2, 3, 64, 64)
    with torch.no_grad():
        out = model(inputs)
        pooled = model.network.forward_head(model.network.forward_features(inputs), pre_logits=True)
    torch.testing.assert_close(out.distilled, model.distillation_head(pooled))
    assert not torch.allclose(out.distilled, out.logits)
    torch.testing.assert_close(model.predict(inputs), (out.logits + out.distilled) / 2)


def test_the_distillation_token_gives_both_heads_in_training_and_timms_mean_in_use():
    model = ImageClassifier("deit_tiny_distilled_patch16_224", 3, 64, **TINY)
    inputs = torch.rand(2, 3, 64, 64)
    trained = model.train()(inputs)
    with torch.no_grad():
        used = model.eval()(inputs)
        expected = model.network(inputs)
    torch.testing.assert_close(trained.logits, used.logits)
    torch.testing.assert_close(trained.distilled, used.distilled)
    torch.testing.assert_close(model.predict(inputs), expected)
    assert model.spec.two_heads
    assert model.feature_shape(64) == (32, 4, 4)


def test_the_feature_of_a_vit_is_its_patch_tokens_row_by_row():
    model = ImageClassifier("vit_tiny_patch16_224", 3, (64, 32), **TINY).eval()
    inputs = torch.rand(1, 3, 64, 32)
    with torch.no_grad():
        tokens = model.network.forward_features(inputs)[:, 1:]
        feature = model(inputs).feature
    assert feature.shape == (1, 32, 4, 2)
    torch.testing.assert_close(feature[0, :, 3, 1], tokens[0, 7])
    assert is_vit("vit_tiny_patch16_224")
    assert not is_vit("test_resnet")


def test_the_class_head_starts_where_it_is_told():
    model = ImageClassifier("test_resnet", 5, 64, two_heads=True, head_std=2e-5)
    assert 0 < model.network.fc.weight.abs().max() < 1e-3
    assert not model.network.fc.bias.any()
    assert model.distillation_head.weight.abs().max() > 1e-2  # timm's, as in G2SD's released code


def test_what_a_network_does_not_take_is_named():
    with refused(ValueError, "timm-option-refused", "densenet121", "drop_path=0.1", "model.classifier.drop_path=0"):
        ImageClassifier("densenet121", 3, drop_path=0.1)
    with refused(ValueError, "timm-option-refused", "s test_resnet takes no colour=", "red"):
        ImageClassifier("test_resnet", 3, colour="red")


def test_class_activation_is_cam_where_pooling_and_one_layer_follow():
    model = ImageClassifier("test_resnet", 3, 64, two_heads=True).eval()
    inputs = torch.rand(2, 3, 64, 64)
    with torch.no_grad():
        out = model(inputs)
    maps, classes = model.class_activation(inputs)
    assert classes.tolist() == ((out.logits + out.distilled) / 2).argmax(1).tolist()
    weight = (model.network.fc.weight + model.distillation_head.weight).detach() / 2
    places = out.feature.shape[2] * out.feature.shape[3]
    expected = torch.einsum("bc,bchw->bhw", weight[[2, 0]], out.feature).relu() / places
    torch.testing.assert_close(model.class_activation(inputs, torch.tensor([2, 0]))[0], expected)
    assert maps.shape == expected.shape
    assert all(p.grad is None for p in model.parameters())


def test_class_activation_of_a_vit_needs_pooled_patches():
    inputs = torch.rand(2, 3, 64, 32)
    maps, _ = ImageClassifier("vit_tiny_patch16_224", 3, (64, 32), global_pool="avg", **TINY).class_activation(inputs)
    assert maps.shape == (2, 4, 2)
    with refused(ValueError, "no-class-activation"):
        ImageClassifier("vit_tiny_patch16_224", 3, (64, 32), **TINY).class_activation(inputs)


def backbone_of(model):
    return {key: value for key, value in model.network.state_dict().items() if not key.startswith(model.head_names())}


@pytest.mark.parametrize("name", ["test_resnet", "test_convnext"])
def test_a_cnn_starts_from_a_students_checkpoint_and_its_export(name, tmp_path):
    encoder = write_student(tmp_path / "student.pth", name)
    export(tmp_path / "student.pth", tmp_path / "export", to="timm")
    for file in ("student.pth", "export"):
        model = ImageClassifier(name, 3, 64, backbone=tmp_path / file)
        expected = encoder.state_dict()
        found = backbone_of(model)
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[key], expected[key]) for key in expected)


def test_a_cnn_starts_from_a_file_of_others(tmp_path):
    other = timm.create_model("test_resnet", num_classes=7)
    torch.save({"state_dict": other.state_dict()}, tmp_path / "other.pth")
    model = ImageClassifier("test_resnet", 3, 64, backbone=tmp_path / "other.pth")
    expected = other.state_dict()
    assert all(torch.equal(value, expected[key]) for key, value in backbone_of(model).items())


@pytest.mark.parametrize("size", [64, 96])
@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "deit_tiny_distilled_patch16_224"])
def test_a_vit_starts_from_a_mae_with_sin_cos_positions_of_its_own_grid(name, size, tmp_path):
    mae = MaskedAutoencoder(make_arch(ARCH))
    mean, std = [0.1, 0.2, 0.3], [0.4, 0.5, 0.6]
    save_mae(mae, tmp_path / "mae.safetensors", {"mean": mean, "std": std, "norm_pix": True})
    model = ImageClassifier(name, 3, size, backbone=tmp_path / "mae.safetensors", **TINY)
    torch.testing.assert_close(model.spec.mean, tuple(mean))
    torch.testing.assert_close(model.network.blocks[1].mlp.fc1.weight, mae.blocks[1].mlp.fc1.weight)
    torch.testing.assert_close(model.network.norm.weight, mae.norm.weight)
    patches = model.network.num_prefix_tokens
    expected = sincos_positions(32, (size // 16, size // 16))
    torch.testing.assert_close(model.network.pos_embed[:, patches:], expected[:, 1:])
    assert not model.network.pos_embed[:, :patches].any()


def test_a_mae_and_its_classifier_see_the_same(tmp_path):
    mae = MaskedAutoencoder(make_arch(ARCH)).eval()
    save_mae(mae, tmp_path / "mae.safetensors")
    model = ImageClassifier("vit_tiny_patch16_224", 3, 64, backbone=tmp_path / "mae.safetensors", **TINY).eval()
    inputs = torch.rand(2, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(model.network.forward_features(inputs), mae.encode(inputs), rtol=1e-4, atol=1e-5)


# 54 patches: 7 x 7 and five more; 24: 4 x 4 and eight more; 48: one short of a square
@pytest.mark.parametrize("size", [(96, 144), (144, 256), (64, 96), (128, 192), (96, 128), (64, 64)])
@pytest.mark.parametrize("of", ["mae", "student"])
def test_a_vit_trained_on_oblong_images_starts_a_classifier_of_them(of, size, tmp_path):
    arch = dict(ARCH, image_size=size)
    if of == "mae":
        mae = MaskedAutoencoder(make_arch(arch)).eval()
        file = save_mae(mae, tmp_path / "mae.safetensors")
    else:
        student = MaskedViT(arch).eval()
        student.prepare(size)
        mae, file = student.network, tmp_path / "student.pth"
        state = {f"student.{key}": value for key, value in student.state_dict().items()}
        torch.save({"meta": {"hgkd": {**student.description(), "format": 1}}, "state_dict": state}, file)
    model = ImageClassifier("vit_tiny_patch16_224", 3, size, backbone=file, **TINY).eval()
    assert torch.equal(model.network.pos_embed, mae.pos_embed)
    inputs = torch.rand(2, 3, *size)
    with torch.no_grad():
        torch.testing.assert_close(model.network.forward_features(inputs), mae.encode(inputs), rtol=1e-4, atol=1e-5)
    larger = ImageClassifier("vit_tiny_patch16_224", 3, (size[0], 2 * size[1]), backbone=file, **TINY)
    torch.testing.assert_close(larger.network.pos_embed, sincos_positions(32, (size[0] // 16, size[1] // 8)))


@pytest.mark.parametrize(("name", "kwargs"), [("test_resnet", {"two_heads": True}), ("deit_tiny_distilled_patch16_224", TINY)])
def test_a_fine_tuned_file_gives_the_same_answers_and_a_backbone(name, kwargs, tmp_path):
    model = ImageClassifier(name, 3, 64, **kwargs).eval()
    state = {f"classifier.{key}": value for key, value in model.state_dict().items()}
    meta = {"hgkd": {"classifier": model.spec.to_dict(), "format": 1}}
    torch.save({"meta": meta, "state_dict": state}, tmp_path / "classifier.pth")
    loaded = load_classifier(tmp_path / "classifier.pth")
    inputs = torch.rand(2, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(loaded.predict(inputs), model.predict(inputs))
    assert loaded.spec == model.spec
    started = ImageClassifier(name, 5, 64, backbone=tmp_path / "classifier.pth", **kwargs)
    assert all(torch.equal(value, model.network.state_dict()[key]) for key, value in backbone_of(started).items())
    if model.is_vit:  # another size: positions refitted, all else the same
        assert load_classifier(tmp_path / "classifier.pth", 96).spec.image_size == (96, 96)
    meta["hgkd"]["format"] = 2
    torch.save({"meta": meta, "state_dict": state}, tmp_path / "classifier.pth")
    with refused(WeightsError, "checkpoint-format", "2", "1"):
        load_classifier(tmp_path / "classifier.pth")


def write_classifier(model, file):
    state = {f"classifier.{key}": value for key, value in model.state_dict().items()}
    torch.save({"meta": {"hgkd": {"classifier": model.spec.to_dict(), "format": 1}}, "state_dict": state}, file)
    return file


ROTARY = dict(depth=1, embed_dim=48, num_heads=3)


@pytest.mark.parametrize("name", ["vit_small_patch16_dinov3", "vit_small_patch16_rope_224", "vit_relpos_small_patch16_224"])
def test_a_fine_tuned_vit_without_a_position_embedding_is_read(name, tmp_path):
    """DINOv3's positions are angles, and others' are biases of attention."""
    model = ImageClassifier(name, 3, 64, **ROTARY).eval()
    assert getattr(model.network, "pos_embed", None) is None
    file = write_classifier(model, tmp_path / "rotary.pth")
    inputs = torch.rand(2, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(load_classifier(file).predict(inputs), model.predict(inputs))
        larger = load_classifier(file, 96)
        assert larger.predict(torch.rand(2, 3, 96, 96)).shape == (2, 3)
    started = ImageClassifier(name, 5, 64, backbone=file, **ROTARY)
    assert all(torch.equal(value, model.network.state_dict()[key]) for key, value in backbone_of(started).items())


@pytest.mark.parametrize("size", [(96, 128), (64, 128)])  # 48 and 32 patches: one more than 48 is a square
def test_positions_of_oblong_images_stay_where_they_are(size, tmp_path):
    model = ImageClassifier("vit_tiny_patch16_224", 3, size, **TINY)
    file = write_classifier(model, tmp_path / "oblong.pth")
    positions = model.network.pos_embed
    assert torch.equal(load_classifier(file).network.pos_embed, positions)
    assert torch.equal(ImageClassifier("vit_tiny_patch16_224", 5, size, backbone=file, **TINY).network.pos_embed, positions)
    # of twice the size every patch lies between its neighbours; in the middle of a constant row nothing changes
    with torch.no_grad():
        rows = torch.arange(size[0] // 16.0).view(-1, 1, 1).expand(-1, size[1] // 16, 32)
        positions[:, 1:] = rows.reshape(1, -1, 32)
    file = write_classifier(model, tmp_path / "rows.pth")
    double = load_classifier(file, (2 * size[0], 2 * size[1])).network.pos_embed
    grid = double[0, 1:].view(size[0] // 8, size[1] // 8, 32)
    assert torch.allclose(grid, grid[:, :1, :1].expand_as(grid), atol=1e-5)
    assert (grid[1:, 0, 0] > grid[:-1, 0, 0]).all()


def test_a_fine_tuned_vit_is_a_start_at_another_size(tmp_path):
    file = write_classifier(ImageClassifier("vit_tiny_patch16_224", 3, 64, **TINY), tmp_path / "vit.pth")
    assert ImageClassifier("vit_tiny_patch16_224", 3, 96, backbone=file, **TINY).network.pos_embed.shape == (1, 37, 32)


def test_own_pixels_stay_with_the_backbone(tmp_path):
    pixels = (0.1, 0.2, 0.3), (0.7, 0.8, 0.9)
    file = write_classifier(ImageClassifier("test_resnet", 3, 64, normalize=pixels), tmp_path / "own.pth")
    export(file, tmp_path / "out", to="timm")
    assert timm.create_model(f"local-dir:{tmp_path}/out").pretrained_cfg["mean"] == pytest.approx(pixels[0])
    for subject in (file, tmp_path / "out"):
        cfg = load_backbone(subject).pretrained_cfg
        assert (tuple(cfg["mean"]), tuple(cfg["std"])) == pixels
        assert ImageClassifier("test_resnet", 5, 64, backbone=subject).spec.mean == pixels[0]
    usual = write_classifier(ImageClassifier("test_resnet", 3, 64), tmp_path / "usual.pth")
    assert read_student(usual).spec.pixels is None


def test_an_image_size_that_a_network_does_not_take_is_told():
    model = ImageClassifier("vit_tiny_patch16_224", 3, 64, **TINY)
    with refused(ValueError, "image-size-refused", "80 x 80", "image_size"):
        model.feature_shape(80)


def test_files_of_another_kind_are_refused(tmp_path):
    write_student(tmp_path / "cnn.pth", "test_resnet")
    save_mae(MaskedAutoencoder(make_arch(dict(ARCH, num_heads=4))), tmp_path / "mae.safetensors")
    with refused(WeightsError, "network-differs", "cnn.pth", "test_resnet"):
        ImageClassifier("vit_tiny_patch16_224", 3, 64, backbone=tmp_path / "cnn.pth", **TINY)
    with refused(WeightsError, "attention-heads-differ", "4", "2"):
        ImageClassifier("vit_tiny_patch16_224", 3, 64, backbone=tmp_path / "mae.safetensors", **TINY)
    with refused(WeightsError, "weights-do-not-fit", "vit_tiny_patch16_224"):
        ImageClassifier(
            "vit_tiny_patch16_224", 3, 64, backbone=tmp_path / "mae.safetensors", **{**TINY, "depth": 3, "num_heads": 4}
        )
    save_mae(MaskedAutoencoder(make_arch(dict(ARCH, patch_size=8))), tmp_path / "small_patches.safetensors")
    with refused(WeightsError, "weights-do-not-fit", "vit_tiny_patch16_224"):
        ImageClassifier("vit_tiny_patch16_224", 3, 64, backbone=tmp_path / "small_patches.safetensors", **TINY)
    with refused(WeightsError, "network-not-found-in-file", "ResNet"):
        ImageClassifier("test_resnet", 3, 64, backbone=tmp_path / "mae.safetensors")
    with refused(WeightsError, "checkpoint-not-of-finetuning", "fine-tuning"):
        load_classifier(tmp_path / "cnn.pth")


@pytest.mark.parametrize(
    ("options", "refusal"),
    [
        (dict(name="resnet_eighteen"), ("timm-name-unknown", "classifier", "resnet_eighteen")),
        (dict(num_classes=0), ("classes-not-positive", "num_classes", "1", "0")),
        (dict(drop_path=1.0), ("drop-path-out-of-range", "drop_path", "0", "1", "1.0")),
        (dict(stem="tiny"), ("stem-unknown", "default", "cifar", "tiny")),
    ],
)
def test_options_out_of_range_are_refused(options, refusal):
    with refused(ValueError, *refusal):
        ImageClassifier(**{"name": "test_resnet", "num_classes": 3, **options})


def test_a_spec_survives_its_dict():
    spec = ClassifierSpec("resnet18", 2, (64, 96), "cifar", True, {"drop_path_rate": 0.1}, classes=("a", "b"))
    assert ClassifierSpec.parse({"hgkd": {"classifier": spec.to_dict(), "format": 1}}) == spec
    assert ClassifierSpec.parse({"hgkd": {"encoder": {}}}) is None
    assert ClassifierSpec.parse(None) is None
