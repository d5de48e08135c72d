"""Every family of ``hgkd.sparse.families``: exact, or refused by name."""

import pytest
import timm
import torch
from torch import nn

from hgkd.errors import NoSparseRuleError
from hgkd.sparse import measure_parity
from hgkd.sparse.families import FAMILIES, REFUSED


@pytest.mark.parametrize("family", FAMILIES, ids=lambda f: f.member)
def test_exact_against_masked_and_dense(family) -> None:
    torch.manual_seed(0)
    parity = measure_parity(family.build(short=True))
    assert parity.worst < 1e-9, parity


@pytest.mark.parametrize("member", REFUSED)
def test_refused_by_the_name_of_the_layer(member: str) -> None:
    layer, _ = REFUSED[member]
    net = timm.create_model(member, num_classes=0, global_pool="")
    with pytest.raises(NoSparseRuleError, match=rf"called by layer \S+: {layer}\b"):
        measure_parity(net, 64)


def test_parity_finds_what_is_wrong() -> None:
    """A layer that leaks between cells in one backend only, through a rule that is wrong on purpose."""

    class Shift(nn.Module):
        def forward(self, x):
            return x + 0.0

    class Scale(Shift):
        def forward(self, x):
            return x * (1.5 if type(x).__name__ == "PackedTensor" else 1.0)

    right = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), Shift())
    wrong = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), Scale())
    assert measure_parity(right, 4).worst < 1e-9
    found = measure_parity(wrong, 4)
    assert found.outputs > 0.1
    assert found.gradients > 0.1
    assert found.dense > 0.1
    assert found.statistics < 1e-9  # the norm comes before the error


@pytest.mark.parametrize("broken", [float("nan"), float("inf")])
def test_parity_takes_no_nan_for_equal(broken: float) -> None:
    """Both sides NaN at the same positions differ by NaN, which ``max`` and comparisons pass over."""

    class Diverged(nn.Module):
        def forward(self, x):
            return x * broken

    parity = measure_parity(nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), Diverged()), 4)
    assert parity.outputs == parity.gradients == parity.dense == parity.worst == float("inf")


def test_parity_leaves_the_network_alone() -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4)).eval()
    before = {key: value.clone() for key, value in net.state_dict().items()}
    measure_parity(net, 4)
    assert not net.training
    assert all(torch.equal(value, before[key]) for key, value in net.state_dict().items())
