"""Key styles are one-to-one, and only axes of length 1 are ever bridged."""

import pytest
import timm
import torch
from hypothesis import given
from hypothesis import strategies as st

from hgkd.sparse.spconv import from_krsc, to_krsc
from hgkd.weights.cnn_names import STYLES, fitted, renamed, styles_for

NETWORKS = {
    "resnet18": {},
    "resnet50d": {"layers": (1, 1, 1, 1)},
    "convnext_tiny": {"depths": (1, 1, 1, 1), "dims": (8, 8, 8, 8)},
    "convnextv2_tiny": {"depths": (1, 1, 1, 1), "dims": (8, 8, 8, 8)},
    "mobilenetv3_small_050": {},
}


@pytest.mark.parametrize("name", NETWORKS)
def test_no_two_weights_share_a_name(name: str) -> None:
    network = timm.create_model(name, num_classes=0, global_pool="", **NETWORKS[name])
    for style in styles_for(network):
        assert len(renamed(network, style)) == len(network.state_dict()), style.name
        assert style is STYLES[0] or set(renamed(network, style)).isdisjoint({"conv1.weight", "stem.0.weight"})


def test_styles_are_told_apart() -> None:
    network = timm.create_model("convnextv2_atto", num_classes=0, global_pool="")
    names = [frozenset(renamed(network, style)) for style in styles_for(network)]
    assert len(names) == len(set(names)) == 6


@given(st.lists(st.integers(1, 4), min_size=1, max_size=4), st.lists(st.integers(1, 4), min_size=1, max_size=4))
def test_fitted_never_moves_values_between_axes(found: list[int], expected: list[int]) -> None:
    value, place = torch.arange(float(torch.Size(found).numel())).reshape(found), torch.zeros(expected)
    result = fitted({"a": value}, {"a": place})["a"]
    if value.squeeze().shape == place.squeeze().shape:
        assert result.shape == place.shape
    else:
        assert result.shape == value.shape
    assert torch.equal(result.flatten(), value.flatten())


@given(st.lists(st.integers(1, 5), min_size=4, max_size=4))
def test_spconv_layout_and_back(shape: list[int]) -> None:
    weight = torch.randn(shape)
    assert torch.equal(from_krsc(to_krsc(weight)), weight)


def test_spconv_layout_convolves_alike() -> None:
    weight, image = torch.randn(4, 3, 3, 3), torch.randn(1, 3, 5, 5)
    windows = image.unfold(2, 3, 1).unfold(3, 3, 1)  # (1, C, h, w, R, S)
    found = torch.einsum("nchwrs,krsc->nkhw", windows, to_krsc(weight))
    torch.testing.assert_close(found, torch.nn.functional.conv2d(image, weight))
