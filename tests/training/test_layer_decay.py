"""Learning rates that fall from head to stem: timm's layers, SparK's layers, refusals."""

import pytest
import timm
import torch
from refusals import refused
from torch import nn

from hgkd.training import LayerDecayConstructor


class Model(nn.Module):
    """What the constructor reads of a ``ClassifierTraining``."""

    def __init__(self, network):
        super().__init__()
        self.classifier = nn.Module()
        self.classifier.network = network
        self.generator = nn.Linear(2, 2)


def rates(network, layer_decay=0.5, **options):
    """Parameter name -> (learning rate, weight decay)."""
    model = Model(network)
    cfg = dict(optimizer=dict(type="AdamW", lr=1.0, weight_decay=0.1))
    wrapper = LayerDecayConstructor(cfg, dict(layer_decay=layer_decay, **options))(model)
    names = {id(p): name for name, p in model.named_parameters()}
    found = {names[id(p)]: (g["lr"], g["weight_decay"]) for g in wrapper.optimizer.param_groups for p in g["params"]}
    assert len(found) == len(names)  # each once
    return {name.removeprefix("classifier.network."): values for name, values in found.items()}, wrapper


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "deit_tiny_distilled_patch16_224"])
def test_vit_blocks(name):
    """The table of MAE's and G2SD's util/lr_decay.py: all but patches, positions, class token and blocks has the full rate."""
    found, wrapper = rates(timm.create_model(name, num_classes=3, depth=2, embed_dim=32, num_heads=2))
    assert found["head.weight"] == (1.0, 0.1)
    assert found["head.bias"] == (1.0, 0.0)
    assert found["norm.weight"] == (1.0, 0.0)
    if "distilled" in name:
        assert found["dist_token"] == (1.0, 0.0)
        assert found["head_dist.weight"] == (1.0, 0.1)
    assert found["blocks.1.mlp.fc1.weight"] == (0.5, 0.1)
    assert found["blocks.0.mlp.fc1.weight"] == (0.25, 0.1)
    assert found["patch_embed.proj.weight"] == (0.125, 0.1)
    assert found["pos_embed"] == found["cls_token"] == (0.125, 0.0)
    assert found["generator.weight"] == (1.0, 0.1)
    assert wrapper.get_lr()["lr"][0] == 1.0  # the logged one


def test_every_block_of_a_cnn_is_a_layer():
    found, _ = rates(timm.create_model("resnet18", num_classes=3))
    assert found["fc.weight"][0] == 1.0
    assert found["layer4.1.conv1.weight"][0] == 0.5
    assert found["layer4.0.conv1.weight"][0] == 0.25
    assert found["layer1.0.conv1.weight"][0] == 0.5**8
    assert found["conv1.weight"] == (0.5**9, 0.1)
    assert found["bn1.weight"] == (0.5**9, 0.0)


def test_sparks_layers_of_a_resnet50():
    """The table of SparK's downstream_imagenet/models/__init__.py: ids 0 (stem) to 7 (fc)."""
    with torch.device("meta"):
        network = timm.create_model("resnet50", num_classes=3)
    found, _ = rates(network, blocks_per_layer=(3, 2, 3, 3))
    expected = {
        "conv1.weight": 0,
        "bn1.weight": 0,
        "layer1.0.conv1.weight": 1,
        "layer1.2.conv1.weight": 1,
        "layer2.0.downsample.0.weight": 2,
        "layer2.1.conv1.weight": 2,
        "layer2.3.conv1.weight": 3,
        "layer3.2.conv1.weight": 4,
        "layer3.3.conv1.weight": 5,
        "layer4.0.conv1.weight": 6,
        "layer4.2.bn3.bias": 6,
        "fc.bias": 7,
    }
    assert {name: found[name][0] for name in expected} == {name: 0.5 ** (7 - layer) for name, layer in expected.items()}


def test_sparks_layers_of_a_convnext():
    """The official table: 0 (stem), 1, 2 (stages), 3 to 5 (third stage by threes), 6 (last stage), 7 (norm and head)."""
    with torch.device("meta"):
        network = timm.create_model("convnext_tiny", num_classes=3)
    found, _ = rates(network, blocks_per_layer=(3, 3, 3, 3))
    expected = {
        "stem.0.weight": 0,
        "stages.0.blocks.2.conv_dw.weight": 1,
        "stages.1.downsample.1.weight": 2,
        "stages.2.downsample.1.weight": 3,
        "stages.2.blocks.2.gamma": 3,
        "stages.2.blocks.3.conv_dw.weight": 4,
        "stages.2.blocks.8.conv_dw.weight": 5,
        "stages.3.downsample.1.weight": 6,
        "stages.3.blocks.0.conv_dw.weight": 6,
        "head.norm.weight": 7,
        "head.fc.weight": 7,
    }
    assert {name: found[name][0] for name in expected} == {name: 0.5 ** (7 - layer) for name, layer in expected.items()}


@pytest.mark.parametrize(
    ("paramwise", "refusal"),
    [
        (None, ("layer-decay-out-of-range", "paramwise_cfg=dict", "layer_decay=number", "0", "1")),
        (dict(layer_decay=1.5), ("layer-decay-out-of-range", "layer_decay", "1.5")),
        (dict(layer_decay=0.5, bias_decay_mult=0.0), ("layer-decay-out-of-range", "bias_decay_mult")),
        (dict(layer_decay=0.5, blocks_per_layer=(3, 3)), ("blocks-per-layer-differ", "blocks_per_layer=(3, 3)", "ResNet", "4")),
    ],
)
def test_what_does_not_fit_is_refused(paramwise, refusal):
    model = Model(timm.create_model("test_resnet", num_classes=3))
    with refused(ValueError, *refusal):
        LayerDecayConstructor(dict(optimizer=dict(type="AdamW", lr=1.0)), paramwise)(model)


def test_a_vit_has_no_stages():
    model = Model(timm.create_model("test_vit", num_classes=3))
    with refused(ValueError, "blocks-per-layer-differ", "0"):
        LayerDecayConstructor(dict(optimizer=dict(type="AdamW", lr=1.0)), dict(layer_decay=0.5, blocks_per_layer=(1,)))(model)
