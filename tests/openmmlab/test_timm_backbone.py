import pytest
import timm
import torch
from refusals import refused
from student_checkpoints import randomised, write_student
from torch import nn

from hgkd.errors import WeightsError
from hgkd.export import export
from hgkd.openmmlab import TimmBackbone, load_backbone_file
from hgkd.openmmlab.weights import check_start, describe
from hgkd.training import LayerDecayConstructor
from hgkd.weights.identify import identify

TINY = dict(depths=(1, 1, 2, 1), dims=(8, 16, 24, 32))


def convnext(**options):
    return TimmBackbone("convnext_atto", **TINY, **options)


def test_names_are_timms_own_and_travel_both_ways():
    net = timm.create_model("convnext_atto", num_classes=0, global_pool="", **TINY)
    backbone = convnext()
    assert backbone.state_dict().keys() == net.state_dict().keys()
    backbone.load_state_dict(randomised(net).state_dict())
    images = torch.randn(2, 3, 64, 64)
    expected = net.forward_intermediates(images, intermediates_only=True)
    for found, level in zip(backbone.eval()(images), expected, strict=True):
        assert torch.equal(found, level)


def test_names_inside_a_detector():
    model = nn.Module()
    model.backbone = convnext(out_norm=True)
    names = model.state_dict().keys()
    assert "backbone.stem.0.weight" in names
    assert {name for name in names if "norms" in name} == {
        f"backbone.out_norms.{i}.{part}" for i in range(4) for part in ("weight", "bias")
    }
    other = nn.Module()
    other.backbone = convnext(out_norm=True)
    other.load_state_dict(model.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))


def test_outputs_channels_and_strides():
    backbone = convnext(out_indices=(1, 3), out_norm=True).eval()
    maps = backbone(torch.randn(1, 3, 64, 64))
    assert backbone.channels == (16, 32)
    assert [tuple(m.shape) for m in maps] == [(1, 16, 8, 8), (1, 32, 2, 2)]
    means = maps[0].mean(1)  # a fresh LayerNorm over the channels
    assert torch.allclose(means, torch.zeros_like(means), atol=1e-5)


def test_dilated_keeps_four_levels():
    maps = convnext(output_stride=8)(torch.randn(1, 3, 64, 64))
    assert [m.shape[-1] for m in maps] == [16, 8, 8, 8]


def test_frozen_stages_neither_train_nor_update():
    backbone = TimmBackbone("test_resnet", frozen_stages=2).train()
    frozen = {name for name, p in backbone.network.named_parameters() if not p.requires_grad}
    assert {"conv1.0.weight", "layer1.0.conv1.weight", "layer2.0.conv1.weight"} <= frozen
    assert not any(name.startswith(("layer3", "layer4")) for name in frozen)
    before = {k: v.clone() for k, v in backbone.state_dict().items() if "running" in k}
    backbone(torch.randn(2, 3, 64, 64))
    changed = {k for k, v in backbone.state_dict().items() if k in before and not torch.equal(v, before[k])}
    assert changed
    assert all(name.startswith(("layer3", "layer4")) for name in changed)


def test_norm_eval():
    backbone = TimmBackbone("test_resnet", norm_eval=True).train()
    before = {k: v.clone() for k, v in backbone.state_dict().items() if "running" in k}
    backbone(torch.randn(2, 3, 64, 64))
    assert all(torch.equal(v, backbone.state_dict()[k]) for k, v in before.items())
    assert backbone.network.layer1.training


@pytest.mark.parametrize(
    ("arguments", "refusal"),
    [
        (dict(name="convnext_tinny"), ("timm-name-unknown", "encoder", "convnext_tinny", "convnext_tiny")),
        (dict(name="test_resnet", out_indices=(0, 4)), ("out-indices-absent", "0 .. 3", "4", "8", "16", "32")),
        (dict(name="test_resnet", frozen_stages=-1), ("frozen-stages-absent", "0 .. 4", "0", "-1")),
    ],
)
def test_wrong_arguments(arguments, refusal):
    with refused(ValueError, *refusal):
        TimmBackbone(**arguments)


# strict loading


def test_an_export_for_timm_loads_whole(tmp_path):
    encoder = write_student(tmp_path / "a.pth", "test_resnet")
    export(tmp_path / "a.pth", tmp_path / "out", "timm")
    backbone = TimmBackbone("test_resnet")
    report = load_backbone_file(backbone, tmp_path / "out")
    assert report.loaded.matched == report.loaded.total == len(encoder.state_dict())
    assert all(torch.equal(v, backbone.state_dict()[k]) for k, v in encoder.state_dict().items())


def test_a_network_that_computes_otherwise_is_refused(tmp_path):
    write_student(tmp_path / "a.pth", kwargs=dict(act_layer="gelu"))
    export(tmp_path / "a.pth", tmp_path / "out", "timm")
    told = "exported from test_resnet, act_layer='gelu', and this config's backbone is test_resnet: all weights fit"
    refuse(TimmBackbone("test_resnet"), tmp_path / "out", told)
    for options in ({}, {"output_stride": 16}, {"drop_path_rate": 0.1, "frozen_stages": 1}):
        load_backbone_file(TimmBackbone("test_resnet", act_layer="gelu", **options), tmp_path / "out")


def test_a_classifier_is_left_aside_and_said(tmp_path):
    net = timm.create_model("test_resnet", num_classes=5)
    torch.save(net.state_dict(), tmp_path / "net.pth")
    report = load_backbone_file(TimmBackbone("test_resnet"), tmp_path / "net.pth")
    assert report.aside == {"fc": 2}


def refuse(backbone, path, refusal):
    before = {k: v.clone() for k, v in backbone.state_dict().items()}
    words = isinstance(refusal, str)  # several codes may meet one text
    with pytest.raises(WeightsError, match=refusal) if words else refused(WeightsError, *refusal):
        load_backbone_file(backbone, path)
    assert all(torch.equal(v, backbone.state_dict()[k]) for k, v in before.items())


def test_another_architecture_is_named_on_both_sides(tmp_path):
    write_student(tmp_path / "a.pth", "resnet18")
    export(tmp_path / "a.pth", tmp_path / "out", "timm")
    refuse(
        TimmBackbone("resnet50"),
        tmp_path / "out",
        r"holds an exported resnet18, and .* backbone is a ResNet-50 \(blocks 3-4-6-3\)",
    )
    (tmp_path / "out/model.safetensors").rename(tmp_path / "bare.safetensors")
    refuse(convnext(), tmp_path / "bare.safetensors", r"holds a ResNet-18 .*, and this config's backbone is a ConvNeXt or kin")
    refuse(TimmBackbone("resnet50"), tmp_path / "bare.safetensors", r"holds a ResNet-18 \(blocks 2-2-2-2\), and this config")


def test_a_missing_entry_is_named(tmp_path):
    state = timm.create_model("test_resnet", num_classes=0).state_dict()
    del state["layer2.0.conv1.weight"]
    torch.save(state, tmp_path / "net.pth")
    refuse(TimmBackbone("test_resnet"), tmp_path / "net.pth", r"1 missing: layer2\.0\.conv1\.weight")


def test_a_left_over_entry_is_named(tmp_path):
    state = timm.create_model("test_resnet", num_classes=0).state_dict()
    torch.save({**state, "decoder.weight": torch.zeros(1)}, tmp_path / "net.pth")
    refuse(TimmBackbone("test_resnet"), tmp_path / "net.pth", r"1 unexpected: decoder\.weight")


@pytest.mark.parametrize("wrap", [lambda state: state, lambda state: {"state_dict": state}])
@pytest.mark.parametrize("prefix", ["backbone.", "module.", "student.encoder."])
def test_a_prefix_is_named_with_the_remedy(tmp_path, prefix, wrap):
    state = timm.create_model("test_resnet", num_classes=0).state_dict()
    torch.save(wrap({prefix + k: v for k, v in state.items()}), tmp_path / "net.pth")
    refuse(
        TimmBackbone("test_resnet"),
        tmp_path / "net.pth",
        rf"has the prefix '{prefix}'.*hgkd export .*net.pth --encoder NAME",
    )


def test_a_block_of_another_resnet_is_no_prefix(tmp_path):
    from hgkd.openmmlab.weights import _plain_weights

    state = timm.create_model("resnet18d", num_classes=0).state_dict()  # no conv1.weight but in its blocks
    torch.save(state, tmp_path / "net.pth")
    assert _plain_weights(identify(tmp_path / "net.pth"), timm.create_model("resnet18", num_classes=0)).keys() == state.keys()
    refuse(TimmBackbone("resnet18"), tmp_path / "net.pth", r"backbone=.*net.pth holds a ResNet-18")


def test_values_that_are_not_finite_are_refused(tmp_path):
    state = timm.create_model("test_resnet", num_classes=0).state_dict()
    state["layer2.0.conv1.weight"][0] = float("nan")
    torch.save(state, tmp_path / "net.pth")
    refuse(
        TimmBackbone("test_resnet"),
        tmp_path / "net.pth",
        r"net.pth holds NaN or infinite values in 1 of its weights, e.g. layer2.0.conv1.weight; .* an earlier checkpoint",
    )


def test_no_option_is_named_that_a_training_does_not_have(tmp_path):
    state = timm.create_model("test_resnet", num_classes=0).state_dict()
    torch.save({**state, "decoder.weight": torch.zeros(1)}, tmp_path / "net.pth")
    with refused(WeightsError, "weights-do-not-fit", "1", "decoder.weight") as caught:
        load_backbone_file(TimmBackbone("test_resnet"), tmp_path / "net.pth")
    assert "allow" not in str(caught.value)


def test_a_training_checkpoint_is_told_how_to_export(tmp_path):
    write_student(tmp_path / "a.pth", "test_resnet")
    refuse(
        TimmBackbone("test_resnet"),
        tmp_path / "a.pth",
        r"training checkpoint of hgkd.*hgkd export .*a.pth --to timm --out FOLDER",
    )


def test_a_whole_detector_is_told_apart(tmp_path):
    state = {"backbone.conv1.weight": torch.zeros(1), "neck.conv.weight": torch.zeros(1)}
    torch.save({"state_dict": state}, tmp_path / "net.pth")
    refuse(TimmBackbone("test_resnet"), tmp_path / "net.pth", "whole detector or segmentor, not of a backbone")


@pytest.mark.parametrize(
    ("make", "refusal"), [(False, ("weight-file-missing",)), (True, ("folder-without-weights", "backbone.pth"))]
)
def test_no_file(tmp_path, make, refusal):
    path = tmp_path / "out"
    if make:
        path.mkdir()
    with refused(FileNotFoundError, *refusal):
        load_backbone_file(TimmBackbone("test_resnet"), path)


def test_a_stem_of_three_convolutions_is_named_with_the_remedy(tmp_path, ops):
    from mmseg.models.backbones import ResNet, ResNetV1c

    write_student(tmp_path / "a.pth", "resnet18")
    export(tmp_path / "a.pth", tmp_path / "out", "timm")
    refuse(
        ResNetV1c(depth=18),
        tmp_path / "out",
        r"exported resnet18 with one convolution as stem, and this config's backbone, .*, has three \(mmseg's ResNetV1c\). Set "
        r"model.backbone.type=ResNet \(in a distillation model.student.backbone.type=ResNet\)",
    )
    assert load_backbone_file(ResNet(18), tmp_path / "out").loaded.matched == 120


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(frozen_stages=1, norm_eval=False), r"first layers are frozen \(frozen_stages\). Set backbone=FILE"),
        (dict(norm_eval=True), r"its norms never take statistics \(norm_eval\). Set backbone=FILE"),
        (dict(frozen_stages=1, norm_eval=True), r"frozen \(frozen_stages\) and its norms never take statistics"),
    ],
)
def test_what_is_random_must_train(ops, options, message):
    from mmdet.models.backbones import ResNet

    for backbone in (ResNet(18, **options), TimmBackbone("test_resnet", **options)):
        with pytest.raises(ValueError, match=r"backbone=None: the backbone starts from random weights, and .*" + message):
            check_start(backbone)
    check_start(ResNet(18, **options, init_cfg=dict(type="Pretrained", checkpoint="local.pth")))
    check_start(ResNet(18, norm_eval=False))
    check_start(convnext())


def test_describe():
    assert describe(timm.create_model("resnet34").state_dict()) == "a ResNet-34 (blocks 3-4-6-3)"
    text = describe(convnext().state_dict())
    assert text == "a ConvNeXt or kin (blocks 1-1-2-1, 8 channels in the stem)"
    assert describe({"conv.weight": torch.zeros(1)}) == ""


# layer-wise decay


def decayed(rate=0.5, **options):
    model = nn.Module()
    model.backbone = convnext()
    model.head = nn.Linear(4, 4)
    wrapper = {"optimizer": {"type": "SGD", "lr": 1.0, "weight_decay": 0.1}}
    built = LayerDecayConstructor(wrapper, {"layer_decay": rate, **options})(model)
    of = {id(p): group for group in built.optimizer.param_groups for p in group["params"]}
    return {name: of[id(p)] for name, p in model.named_parameters() if p.requires_grad}


def test_learning_rates_fall_from_head_to_stem():
    groups = decayed(blocks_per_layer=(1, 1, 2, 1))
    # stem and four stages
    found = [groups[f"backbone.network.{name}"]["lr"] for name in ("stem.0.weight", "stages.0.blocks.0.conv_dw.weight")]
    assert found == [0.5**5, 0.5**4]
    assert groups["backbone.network.stages.3.blocks.0.conv_dw.weight"]["lr"] == 0.5
    assert groups["head.weight"]["lr"] == 1.0


def test_blocks_are_layers_by_default():
    groups = decayed()
    last_two = [groups[f"backbone.network.stages.2.blocks.{i}.conv_dw.weight"]["lr"] for i in (0, 1)]
    assert last_two[0] == last_two[1] / 2


def test_no_decay_of_weights_on_vectors():
    groups = decayed()
    assert groups["head.bias"]["weight_decay"] == groups["backbone.network.stem.0.bias"]["weight_decay"] == 0.0
    assert groups["head.weight"]["weight_decay"] == 0.1


def test_every_trained_parameter_is_in_one_group():
    model = nn.Module()
    model.backbone = convnext()
    built = LayerDecayConstructor({"optimizer": {"type": "SGD", "lr": 1.0}}, {"layer_decay": 0.9})(model)
    ids = [id(p) for group in built.optimizer.param_groups for p in group["params"]]
    assert sorted(ids) == sorted(id(p) for p in model.parameters() if p.requires_grad)


def test_decay_needs_a_timm_network():
    with refused(ValueError, "layer-decay-without-layers"):
        LayerDecayConstructor({"optimizer": {"type": "SGD", "lr": 1.0}}, {"layer_decay": 0.9})(nn.Linear(1, 1))
