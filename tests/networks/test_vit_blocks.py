"""What hgkd/networks/vit.py says of modules' outputs and of blocks."""

import pytest
import timm
import torch
from refusals import refused
from torch import Tensor, nn

from hgkd.networks.vit import check_attention_is_read, is_finite, watch_nonfinite


class Divide(nn.Module):
    def __init__(self, by: float) -> None:
        super().__init__()
        self.by = by

    def forward(self, x: Tensor) -> Tensor:
        return x / self.by


def test_modules_whose_output_is_not_finite_are_listed_in_order_with_what_they_give() -> None:
    network = nn.Sequential(nn.Identity(), Divide(0.0), nn.Identity(), nn.Sequential(Divide(float("inf"))))
    with watch_nonfinite(network) as seen:
        network(torch.ones(2))
    assert seen == [("1", "inf"), ("2", "inf"), ("3.0", "NaN"), ("3", "NaN")]
    network(torch.ones(2))
    assert len(seen) == 4, "the hooks are gone"
    assert is_finite(torch.ones(2))
    assert not is_finite(torch.tensor([1.0, float("nan")]))


@pytest.mark.parametrize(
    ("name", "read"),
    [("vit_tiny_patch16_224", True), ("vit_base_patch16_rpn_224", True), ("beit_base_patch16_224", False)],
)
def test_whose_attention_is_read(name: str, read: bool) -> None:
    with torch.device("meta"):
        block = timm.create_model(name, depth=1).blocks[0]
    if read:
        check_attention_is_read(block)
    else:
        with refused(ValueError, "attention-not-read", "timm.models.beit.Block", "timm.models.beit.Attention"):
            check_attention_is_read(block)
