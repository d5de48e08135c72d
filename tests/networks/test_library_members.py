"""Networks of mmdet, mmseg and torchvision in the sparse engine: exact, or refused by the name of a layer."""

import pytest
import torch
from downstream_runs import need
from torch import nn

from hgkd.errors import NoSparseRuleError
from hgkd.networks import build_encoder
from hgkd.networks.members import LIBRARY_FAMILIES, LIBRARY_REFUSED
from hgkd.sparse import measure_parity, sparsify

need("mmdet", "mmseg")


@pytest.mark.parametrize("family", LIBRARY_FAMILIES, ids=lambda family: family.member)
def test_exact_against_masked_and_dense(family):
    torch.manual_seed(0)
    parity = measure_parity(family.build(short=True))
    assert parity.worst < 1e-9, parity


@pytest.mark.parametrize("member", LIBRARY_REFUSED)
def test_refused_by_the_name_of_the_layer(member):
    options, layer, _ = LIBRARY_REFUSED[member]
    with pytest.raises(NoSparseRuleError, match=rf"layer \S+ ?\(?{layer}\b"):
        measure_parity(build_encoder(member, **options))


def test_depthwise_blocks_of_cspnext():
    net = build_encoder("mmdet.CSPNeXt", deepen_factor=0.167, widen_factor=0.125, use_depthwise=True)
    assert any(layer.groups == layer.in_channels > 1 for layer in net.modules() if isinstance(layer, nn.Conv2d))
    assert measure_parity(net).worst < 1e-9


@pytest.mark.parametrize("cell", [32, 64])
def test_pools_wider_than_the_image(cell):
    """SPP's window of 13 places covers whole maps of 2 x 3 and 4 x 6 places."""
    pools = nn.ModuleList(nn.MaxPool2d(kernel, 1, kernel // 2) for kernel in (5, 9, 13))

    class Pyramid(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.pools = nn.Conv2d(3, 4, 32, stride=32), pools

        def forward(self, x):
            x = self.stem(x)
            return torch.cat([x, *(pool(x) for pool in self.pools)], dim=1)

    assert measure_parity(Pyramid(), cell).worst < 1e-9


class Focus(nn.Module):
    """As YOLOX has it: four phases of the image beside each other."""

    def __init__(self, step=2, last=None):
        super().__init__()
        self.conv, self.step, self.last = nn.Conv2d(3 * step * step, 4, 3, padding=1), step, last

    def forward(self, x):
        phases = [x[..., i :: self.step, j : self.last : self.step] for j in range(self.step) for i in range(self.step)]
        return self.conv(torch.cat(phases, dim=1))


def test_focus_is_exact_at_any_step_that_divides_the_cell():
    assert measure_parity(Focus(2), 8).worst < 1e-9
    assert measure_parity(Focus(4), 8).worst < 1e-9


@pytest.mark.parametrize("focus", [Focus(3), Focus(2, last=-1)], ids=["step 3", "without the last column"])
def test_phases_that_leave_the_cells_are_refused(focus):
    visible = torch.tensor([[[True, False], [False, True]]])
    with pytest.raises(NoSparseRuleError, match="selects positions or images"):
        sparsify(focus, 8)(torch.zeros(1, 3, 16, 16), visible=visible)


class Dropped(nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.drop = layer

    def forward(self, x):
        return self.drop(x)


def test_stochastic_depth_of_the_libraries_drops_whole_images():
    from mmcv.cnn.bricks import DropPath
    from torchvision.ops import StochasticDepth

    visible = torch.ones(16, 2, 2, dtype=torch.bool)
    visible[:, 0, 0] = False
    for layer in (DropPath(0.5), StochasticDepth(0.5, "row"), StochasticDepth(0.5, "batch")):
        torch.manual_seed(0)
        found = sparsify(Dropped(layer).train(), 4)(torch.ones(16, 1, 8, 8), visible=visible).to_dense().flatten(1)
        kept = found.amax(1)
        assert set(kept.tolist()) == ({0.0, 2.0} if getattr(layer, "mode", "row") == "row" else {kept[0].item()})
        assert torch.equal(found.sum(1), kept * 48)  # 3 of 4 cells of 16 places, all or none
        still = sparsify(Dropped(layer).eval(), 4)(torch.ones(16, 1, 8, 8), visible=visible).to_dense().flatten(1)
        assert torch.equal(still.sum(1), torch.full((16,), 48.0))
