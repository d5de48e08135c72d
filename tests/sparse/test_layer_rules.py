"""Single operations: random geometry against masked-dense compute, gradients by finite differences, refusals by message."""

from collections import Counter
from unittest import mock

import pytest
import timm.layers
import torch
import torch.nn.functional as F
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from refusals import refused
from timm.layers.conv2d_same import conv2d_same
from timm.layers.pool2d_same import AvgPool2dSame, MaxPool2dSame
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from hgkd.errors import NoSparseRuleError
from hgkd.sparse import CellLayout, MaskedTensor, PackedTensor, kernels, layer_rule, sparsify
from hgkd.sparse.kernels import ConvGeometry, choose_kernel, convolve
from hgkd.sparse.packed import _geometry
from hgkd.sparse.rectangle import RectangleTensor

RECTANGLES = -1.0  # in the place of a share


def random_layout(seed: int, batch: int, h: int, w: int, cell: int, share: float) -> CellLayout:
    """Cells drawn with a probability, at least one an image; RECTANGLES: one rectangle an image, all of a random size."""
    generator = torch.Generator().manual_seed(seed)
    if share == RECTANGLES:
        visible = torch.zeros(batch, h, w, dtype=torch.bool)
        rows, columns = (int(torch.randint(1, side + 1, (), generator=generator)) for side in (h, w))
        for image in visible:
            top, left = (int(torch.randint(side, (), generator=generator)) for side in (h - rows + 1, w - columns + 1))
            image[top : top + rows, left : left + columns] = True
        return CellLayout(visible, cell)
    visible = torch.rand(batch, h, w, generator=generator) < share
    visible[:, -1, 0] = True
    return CellLayout(visible, cell)


def compare(
    function, layout: CellLayout, x: Tensor, parameters: list[Tensor], tolerance: float, kinds=(PackedTensor, RectangleTensor)
) -> None:
    """Value and gradients of ``function(sparse, *parameters)`` in all backends that can hold the layout."""
    kinds = [kind for kind in kinds if kind is not RectangleTensor or layout.rectangle is not None]
    results = []
    for kind in (*kinds, MaskedTensor):
        leaf = x.clone().requires_grad_()
        weights = [p.clone().requires_grad_() for p in parameters]
        out = function(kind.pack(leaf, layout), *weights).to_dense()
        probe = torch.randn(out.shape, dtype=out.dtype, generator=torch.Generator().manual_seed(5))
        grads = torch.autograd.grad((out * probe).sum(), [leaf, *weights])
        results.append([out, *grads])
    for kind, result in zip(kinds, results[:-1], strict=True):
        for found, expected in zip(result, results[-1], strict=True):
            scale = expected.abs().max().clamp_min(1.0)
            apart = torch.where(found == expected, 0.0, found - expected)  # a maximum of padding alone: minus infinity in both
            assert (apart.abs().max() / scale).item() < tolerance, kind


GRIDS = {
    "batch": st.integers(1, 3),
    "h": st.integers(1, 4),
    "w": st.integers(1, 4),
    "share": st.sampled_from([0.0, 0.3, 0.7, 1.0, RECTANGLES]),
    "seed": st.integers(0, 10_000),
}


@settings(max_examples=80, deadline=None)
@given(
    **GRIDS,
    kernel=st.tuples(st.integers(1, 7), st.integers(1, 7)),
    stride=st.integers(1, 4),
    dilation=st.integers(1, 3),
    groups=st.sampled_from([1, 1, 3, "depthwise"]),
    channels=st.sampled_from([3, 9, 18]),
    factor=st.integers(1, 3),
    double=st.booleans(),
    bias=st.booleans(),
    shift=st.integers(0, 1),
)
def test_convolution(batch, h, w, share, seed, kernel, stride, dilation, groups, channels, factor, double, bias, shift):
    s_in = stride * factor
    reach = [dilation * (k - 1) for k in kernel]
    # of all paddings, those that keep the output on the grid
    padding = tuple(r // 2 + (shift if stride > 2 else 0) for r in reach)
    for size, r, p in zip((h * s_in, w * s_in), reach, padding, strict=True):
        assume((size + 2 * p - r - 1) // stride + 1 == size // stride)
    layout = random_layout(seed, batch, h, w, s_in, share)
    dtype = torch.float64 if double else torch.float32
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(batch, channels, h * s_in, w * s_in, generator=generator, dtype=dtype)
    groups = channels if groups == "depthwise" else groups
    out_channels = 2 * channels
    weight = torch.randn(out_channels, channels // groups, *kernel, generator=generator, dtype=dtype)
    parameters = [weight] + ([torch.randn(out_channels, generator=generator, dtype=dtype)] if bias else [])

    def conv(x, weight, bias=None):
        return F.conv2d(x, weight, bias, stride, padding, dilation, groups)

    compare(conv, layout, x, parameters, 1e-9 if double else 1e-4)


@settings(max_examples=25, deadline=None)
@given(**GRIDS, kernel=st.sampled_from([2, 3, 4, 5]), dilation=st.integers(1, 3), factor=st.integers(1, 3))
def test_convolution_with_same_padding(batch, h, w, share, seed, kernel, dilation, factor):
    layout = random_layout(seed, batch, h, w, factor, share)
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(batch, 4, h * factor, w * factor, generator=generator, dtype=torch.float64)
    weight = torch.randn(5, 4, kernel, kernel, generator=generator, dtype=torch.float64)
    compare(lambda x, w: F.conv2d(x, w, padding="same", dilation=dilation), layout, x, [weight], 1e-9)


@settings(max_examples=30, deadline=None)
@given(**GRIDS, kernel=st.integers(1, 5), stride=st.integers(1, 3), dilation=st.integers(1, 2), factor=st.integers(1, 3),
       layer=st.sampled_from(["conv", "std", "max", "avg"]), groups=st.sampled_from([1, 4]))  # fmt: skip
def test_same_padding_of_timm(batch, h, w, share, seed, kernel, stride, dilation, factor, layer, groups):
    """Padding by ``torch.nn.functional.pad``, more below and right than above and left."""
    dilation = 1 if layer == "avg" else dilation
    layout = random_layout(seed, batch, h, w, stride * factor, share)
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(batch, 4, h * stride * factor, w * stride * factor, generator=generator, dtype=torch.float64)
    weight = torch.randn(4, 4 // groups, kernel, kernel, generator=generator, dtype=torch.float64)
    torch.manual_seed(seed)
    std = timm.layers.StdConv2dSame(4, 8, kernel, stride=stride, dilation=dilation).double()
    function, parameters = {
        "conv": (lambda x, w: conv2d_same(x, w, None, (stride,) * 2, (0, 0), (dilation,) * 2, groups), [weight]),
        "std": (std, []),
        "max": (MaxPool2dSame(kernel, stride, dilation=dilation), []),
        "avg": (AvgPool2dSame(kernel, stride), []),
    }[layer]
    compare(function, layout, x, parameters, 1e-9)


@settings(max_examples=20, deadline=None)
@given(**GRIDS, size=st.integers(3, 5), stride=st.integers(1, 3), factor=st.integers(2, 3))
def test_blur_reflects_the_border(batch, h, w, share, seed, size, stride, factor):
    assume(((stride - 1) + size - 1) // 2 < factor * stride)
    layout = random_layout(seed, batch, h, w, stride * factor, share)
    x = torch.randn(batch, 3, h * stride * factor, w * stride * factor, dtype=torch.float64)
    blur = timm.layers.BlurPool2d(3, size, stride).double()
    assume(blur(x).shape[2:] == (h * factor, w * factor))
    compare(blur, layout, x, [], 1e-9)


def test_padding_is_for_the_next_window_only() -> None:
    x = F.pad(packed(), (1, 1, 1, 1))
    with refused(NoSparseRuleError, "operation-after-padding", "relu"):
        F.relu(x)
    with refused(ValueError, "dense-of-padded"):
        x.to_dense()
    assert F.conv2d(x, torch.randn(4, 4, 3, 3)).shape == packed().shape


@pytest.mark.parametrize(
    ("operation", "refusal"),
    [
        (lambda x: F.pad(x, (0, 0, 0, 0, 1, 1)), ("padding-without-sparse-rule",)),
        (lambda x: F.pad(x, (1, 1), mode="circular"), ("padding-without-sparse-rule", "mode='circular'")),
        (lambda x: F.pad(F.pad(x, (1, 1)), (1, 1)), ("padded-twice",)),
        (
            lambda x: F.conv2d(F.pad(x, (1, 1, 1, 1), value=2.0), torch.randn(4, 4, 3, 3)),
            ("padding-without-sparse-rule", "value=2.0"),
        ),
        (lambda x: F.max_pool2d(F.pad(x, (1, 1, 1, 1)), 5, 1, 1), ("padding-without-sparse-rule", "max_pool2d")),
        (
            lambda x: F.avg_pool2d(F.pad(x, (1, 1, 1, 1), mode="reflect"), 3, 1),
            ("padding-without-sparse-rule", "mode='reflect'"),
        ),
    ],
)
def test_paddings_without_a_rule(operation, refusal: tuple[str, ...]) -> None:
    with refused(NoSparseRuleError, *refusal):
        operation(packed())


@pytest.mark.parametrize(
    ("kernel_name", "slice_elements"), [("im2col", kernels._SLICE_ELEMENTS), ("im2col", 1), ("halo", 1), ("map", 1)]
)
@settings(max_examples=25, deadline=None)
@given(**GRIDS, kernel=st.sampled_from([1, 2, 3, 5, 7]), stride=st.integers(1, 3), factor=st.integers(1, 3))
def test_every_kernel_on_every_shape(kernel_name, slice_elements, batch, h, w, share, seed, kernel, stride, factor):
    """The choice of kernel is about speed only; so is how much of a map is gathered at a time."""
    s_in = stride * factor
    padding = (kernel - 1) // 2
    assume((h * s_in + 2 * padding - kernel) // stride + 1 == h * factor)
    assume((w * s_in + 2 * padding - kernel) // stride + 1 == w * factor)
    layout = random_layout(seed, batch, h, w, s_in, share)
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(batch, 3, h * s_in, w * s_in, generator=generator, dtype=torch.float64)
    weight = torch.randn(4, 3, kernel, kernel, generator=generator, dtype=torch.float64)

    def conv(x, weight):
        if isinstance(x, MaskedTensor):
            return F.conv2d(x, weight, stride=stride, padding=padding)
        given = {"stride": stride, "padding": padding, "dilation": 1}
        geometry = _geometry("conv2d", x, (kernel, kernel), given)
        return x.like(convolve(x.plain, weight, None, 1, geometry, x.cells, kernel_name))

    with mock.patch.object(kernels, "_SLICE_ELEMENTS", slice_elements):
        compare(conv, layout, x, [weight], 1e-9, kinds=(PackedTensor,))


def test_cells_around_by_hand() -> None:
    """Visible cells of a 2 x 3 grid are numbered 0 to 3; 4 is a hidden one, 5 lies outside."""
    layout = CellLayout(torch.tensor([[[True, False, True], [False, True, True]]]), 2)
    around = layout.cells_around(1).view(-1, 3, 3).tolist()
    assert around[0] == [[5, 5, 5], [5, 0, 4], [5, 4, 2]]
    assert around[3] == [[4, 1, 5], [2, 3, 5], [5, 5, 5]]
    # the row above each cell's first place: cell 3 sees the lower left place of cell 1, whose rows are 4 to 7
    assert layout.neighbours(2, 1, 1, (-1,), (0,), outside=1).flatten().tolist() == [17, 17, 16, 6]


def test_outputs_of_an_input_by_hand() -> None:
    """Kernel 3, stride 2, padding 1: an even place is the middle of one window, an odd one the end of two."""
    geometry = ConvGeometry(4, (3, 3), (2, 2), (1, 1), (1, 1))
    output, tap, fits = kernels._outputs_of(geometry, 0, torch.device("cpu"))
    positions = torch.stack([output, tap, fits], 2).tolist()
    found = [[(o, k) for o, k, fit in place if fit] for place in positions]
    assert found == [[(0, 1)], [(1, 0), (0, 2)], [(1, 1)], [(2, 0), (1, 2)]]


@settings(max_examples=25, deadline=None)
@given(**GRIDS, kernel=st.tuples(st.integers(1, 4), st.integers(1, 4)), dilation=st.integers(1, 3), stride=st.integers(1, 4))
def test_input_gradients_of_uneven_windows(batch, h, w, share, seed, kernel, dilation, stride):
    """Different kernels along the axes, dilated and strided; the padding is what keeps the output on the grid."""
    s_in = 2 * stride
    layout = random_layout(seed, batch, h, w, s_in, share)
    x = torch.randn(batch, 2, h * s_in, w * s_in, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    weight = torch.randn(3, 2, *kernel, generator=torch.Generator().manual_seed(seed + 1), dtype=torch.float64)
    height, width = (max(0, dilation * (k - 1) + 1 - stride) for k in kernel)
    sides = (width // 2, width - width // 2, height // 2, height - height // 2)

    def conv(x, weight):
        if isinstance(x, MaskedTensor):
            return F.conv2d(F.pad(x, sides), weight, stride=stride, dilation=dilation)
        geometry = ConvGeometry(s_in, kernel, (stride, stride), (sides[2], sides[0]), (dilation, dilation))
        return x.like(convolve(x.plain, weight, None, 1, geometry, x.cells, "im2col"))

    compare(conv, layout, x, [weight], 1e-9, kinds=(PackedTensor,))


@pytest.mark.parametrize(("stride", "padding"), [(2, (2, 3, 2, 3)), (1, (3, 3, 3, 3)), (1, (0, 6, 6, 0)), (2, (3, 3, 3, 3))])
def test_depthwise_layers_with_large_windows_and_uneven_borders(stride, padding) -> None:
    layout = random_layout(0, 2, 3, 4, 2, 0.7)
    x, weight = torch.randn(2, 5, 6, 8, dtype=torch.float64), torch.randn(5, 1, 7, 7, dtype=torch.float64)
    geometry = ConvGeometry(2, (7, 7), (stride, stride), (padding[2], padding[0]), (1, 1))
    assert choose_kernel(weight, 5, geometry, layout) == "map"
    compare(lambda x, weight: F.conv2d(F.pad(x, padding), weight, stride=stride, groups=5), layout, x, [weight], 1e-9)


@settings(max_examples=40, deadline=None)
@given(**GRIDS, kernel=st.integers(1, 5), stride=st.integers(1, 3), factor=st.integers(1, 3), average=st.booleans(),
       ceil=st.booleans(), include=st.booleans())  # fmt: skip
def test_pooling(batch, h, w, share, seed, kernel, stride, factor, average, ceil, include):
    s_in = stride * factor
    padding = min(max(0, (kernel - stride + 1) // 2), kernel // 2)
    x = torch.randn(batch, 3, h * s_in, w * s_in, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    try:
        probe = F.max_pool2d(x, kernel, stride, padding, ceil_mode=ceil)
    except RuntimeError:
        assume(False)
    assume(probe.shape[2:] == (h * factor, w * factor))
    layout = random_layout(seed, batch, h, w, s_in, share)

    def pool(x):
        if average:
            return F.avg_pool2d(x, kernel, stride, padding, ceil, include)
        return F.max_pool2d(x, kernel, stride, padding, 1, ceil)

    compare(pool, layout, x, [], 1e-9)


@pytest.mark.parametrize("kind", [PackedTensor, RectangleTensor, MaskedTensor])
def test_max_pool_counts_hidden_places_as_zero_and_the_border_as_nothing(kind) -> None:
    """Hand-computed: all values -1; a window that touches a hidden position gives 0, one at the image's border -1."""
    visible = torch.tensor([[[True, False]]])
    layout = CellLayout(visible, 2)
    out = F.max_pool2d(kind.pack(torch.full((1, 1, 2, 4), -1.0), layout), 3, 1, 1).to_dense(fill=7.0)
    assert out[0, 0].tolist() == [[-1.0, 0.0, 7.0, 7.0], [-1.0, 0.0, 7.0, 7.0]]


@settings(max_examples=25, deadline=None)
@given(**GRIDS, factor=st.integers(1, 3), training=st.booleans())
def test_norms_and_image_statistics(batch, h, w, share, seed, factor, training):
    layout = random_layout(seed, batch, h, w, factor, share)
    assume(layout.num_cells * factor * factor > 1)
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(batch, 6, h * factor, w * factor, generator=generator, dtype=torch.float64)
    scale, shift = (torch.randn(6, generator=generator, dtype=torch.float64) for _ in range(2))

    def batch_norm(x, scale, shift):
        mean, var = torch.zeros(6, dtype=torch.float64), torch.ones(6, dtype=torch.float64)
        return F.batch_norm(x, mean, var, scale, shift, training)

    compare(batch_norm, layout, x, [scale, shift], 1e-7)
    compare(lambda x, a, b: F.group_norm(x, 3, a, b, 1e-2), layout, x, [scale, shift], 1e-7)
    compare(lambda x: x * torch.sigmoid(x.mean((2, 3), keepdim=True)), layout, x, [], 1e-9)
    compare(lambda x: x + F.adaptive_avg_pool2d(x, 1), layout, x, [], 1e-9)
    compare(lambda x: x - x.amax((2, 3), keepdim=True), layout, x, [], 1e-9)
    compare(lambda x: x / (1 + x.norm(p=2, dim=(2, 3), keepdim=True)), layout, x, [], 1e-7)
    compare(lambda x: x / (1 + x.norm(dim=1, keepdim=True) + x.norm(dim=(2, 3), keepdim=True)), layout, x, [], 1e-7)


@settings(max_examples=25, deadline=None)
@given(**GRIDS, factor=st.integers(1, 3))
def test_norm_of_a_channel_that_is_zero(batch, h, w, share, seed, factor):
    """A channel that an activation has silenced in an image: its gradient is torch's, which is 0, and not NaN."""
    layout = random_layout(seed, batch, h, w, factor, share)
    x = torch.randn(batch, 4, h * factor, w * factor, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    x[:, 1], x[0, 2] = 0.0, 0.0
    mask = layout.mask(1)

    def scaled(norm: Tensor, x: Tensor) -> Tensor:
        return x / (1 + norm + norm.mean(1, keepdim=True))

    def by_rule(x):
        return scaled(x.norm(p=2, dim=(2, 3), keepdim=True), x)

    compare(by_rule, layout, x, [], 1e-9)
    leaf, expected = x.clone().requires_grad_(), x.clone().requires_grad_()
    by_rule(PackedTensor.pack(leaf, layout)).to_dense().sum().backward()
    (scaled((expected * mask).norm(p=2, dim=(2, 3), keepdim=True), expected) * mask).sum().backward()
    torch.testing.assert_close(leaf.grad, expected.grad, rtol=1e-9, atol=1e-9)
    assert leaf.grad.isfinite().all()


def test_image_mean_by_hand() -> None:
    """One of two cells visible: only its four values count."""
    x = torch.arange(8.0).view(1, 1, 2, 4)
    layout = CellLayout(torch.tensor([[[False, True]]]), 2)
    for kind in (PackedTensor, RectangleTensor, MaskedTensor):
        assert kind.pack(x, layout).mean((2, 3)).tolist() == [[(2 + 3 + 6 + 7) / 4]]


def test_group_norm_is_torchs_when_everything_is_visible() -> None:
    x = torch.randn(2, 6, 4, 4, dtype=torch.float64)
    layout = CellLayout(torch.ones(2, 2, 2, dtype=torch.bool), 2)
    assert torch.allclose(F.group_norm(PackedTensor.pack(x, layout), 3).to_dense(), F.group_norm(x, 3), atol=1e-12)


def test_gradcheck() -> None:
    layout = random_layout(0, 2, 2, 3, 4, 0.5)
    x = torch.randn(2, 3, 8, 12, dtype=torch.float64, requires_grad=True)
    dense = torch.randn(2, 3, 3, 3, dtype=torch.float64, requires_grad=True)
    depthwise = torch.randn(3, 1, 3, 3, dtype=torch.float64, requires_grad=True)

    def network(x, dense, depthwise, fill):
        packed = PackedTensor.pack(x, layout)
        geometry = _geometry("conv2d", packed, (3, 3), {"stride": 2, "padding": 1, "dilation": 1})
        packed = packed.like(convolve(packed.plain, depthwise, None, 3, geometry, layout))
        geometry = _geometry("conv2d", packed, (3, 3), {"stride": 1, "padding": 1, "dilation": 1})
        packed = packed.like(convolve(packed.plain, dense, None, 1, geometry, layout, "im2col"))
        return packed.to_dense(fill)

    fill = torch.randn(2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(network, (x, dense, depthwise, fill))


def test_pack_and_back() -> None:
    layout = random_layout(3, 3, 2, 4, 6, 0.4)
    x = torch.randn(3, 5, 12, 24)
    packed = PackedTensor.pack(x, layout)
    assert packed.shape == (layout.num_cells, 5, 6, 6)
    assert packed.is_contiguous(memory_format=torch.channels_last)
    mask = layout.mask(1)
    assert torch.equal(packed.to_dense(), x * mask)
    token = torch.arange(5.0)
    assert torch.equal(packed.to_dense(fill=token), torch.where(mask, x, token.view(1, 5, 1, 1)))
    assert packed.stride == 1
    assert F.max_pool2d(packed, 3).stride == 3


def test_kernel_choice() -> None:
    packed = PackedTensor.pack(torch.randn(1, 96, 8, 8), random_layout(0, 1, 2, 2, 4, 1.0))
    pointwise = _geometry("c", packed, (1, 1), {"stride": 1, "padding": 0, "dilation": 1})
    spatial = _geometry("c", packed, (3, 3), {"stride": 1, "padding": 1, "dilation": 1})
    layout = packed.cells
    assert choose_kernel(torch.empty(8, 96, 1, 1), 1, pointwise, layout) == "matmul"
    assert choose_kernel(torch.empty(8, 96, 3, 3), 1, spatial, layout) == "im2col"
    assert choose_kernel(torch.empty(8, 63, 3, 3), 1, spatial, layout) == "halo"
    assert choose_kernel(torch.empty(96, 1, 3, 3), 96, spatial, layout) == "halo"
    # tiles of 10 x 10 for cells of 4 x 4 hold more than three whole maps when every cell is visible, less when 1 of 4 is
    large = _geometry("c", packed, (7, 7), {"stride": 1, "padding": 3, "dilation": 1})
    assert choose_kernel(torch.empty(96, 1, 7, 7), 96, large, layout) == "map"
    assert choose_kernel(torch.empty(48, 2, 7, 7), 48, large, layout) == "halo"
    few = CellLayout(torch.tensor([[[True, False], [False, False]]]), 4)
    assert choose_kernel(torch.empty(96, 1, 7, 7), 96, large, few) == "halo"


class WaitingCalls(TorchDispatchMode):
    """Counts what makes a program wait for a GPU: sizes or values that it has to know, and copies from the host."""

    WAITING = ("nonzero", "_local_scalar_dense", "lift_fresh")

    def __init__(self) -> None:
        super().__init__()
        self.seen: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        if name in self.WAITING:
            self.seen[name] += 1
        if name in ("index", "index_put_") and any(i is not None and i.dtype == torch.bool for i in args[1]):
            self.seen["index by a mask"] += 1
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", ["resnet18", "resnetblur18", "tf_efficientnet_b0", "convnextv2_atto"])
def test_a_step_waits_for_the_device_once(name) -> None:
    """Forward and backward; the visible cells are counted, of the whole batch and, on the way, of each image."""
    net = sparsify(timm.create_model(name, num_classes=0, global_pool=""), 32).train()
    visible = torch.tensor([[[True, False], [True, True]], [[False, True], [False, False]]])
    images = torch.randn(2, 3, 64, 64)
    with WaitingCalls() as calls:
        net(images, visible=visible).plain.square().mean().backward()
    assert calls.seen == {"nonzero": 1}


# --- refusals -------------------------------------------------------------------------------------------------------------


def packed(channels: int = 4) -> PackedTensor:
    return PackedTensor.pack(torch.randn(2, channels, 8, 8), CellLayout(torch.ones(2, 2, 2, dtype=torch.bool), 4))


@pytest.mark.parametrize(
    ("operation", "refusal"),
    [
        (lambda x: torch.fft.fft2(x), ("operation-without-sparse-rule", "fft_fft2")),
        (lambda x: x.flatten(1), ("operation-without-sparse-rule", "flatten")),
        (lambda x: x.sum(), ("reduction-of-positions", "None")),
        (lambda x: x.mean(2), ("reduction-of-positions", "(2,)")),
        (lambda x: x[:1], ("index-of-positions",)),
        (lambda x: x.permute(1, 0, 2, 3), ("permute-of-positions",)),
        (lambda x: x + torch.randn(2, 4, 8, 8), ("dense-operand",)),
        (lambda x: x * F.avg_pool2d(x, x.size()[2:]).sigmoid(), ("resolutions-differ", "1", "4")),
        (lambda x: x.add_(F.max_pool2d(x, x.shape[2:]).expand_as(x)), ("resolutions-differ", "adaptive_avg_pool2d(x, 1)")),
        (lambda x: torch.cat([x, F.avg_pool2d(x, 2)], 1), ("resolutions-differ", "1", "2")),
        (lambda x: F.layer_norm(x, (4, 4, 4)), ("norm-over-positions",)),
        (lambda x: F.linear(x, torch.randn(4, 4)), ("linear-over-positions",)),
        (lambda x: torch.cat([x, x], 0), ("concatenation-of-positions",)),
        (lambda x: F.interpolate(x, scale_factor=2, mode="bilinear"), ("interpolation-not-nearest", "mode='nearest'")),
    ],
)
def test_operations_that_would_be_wrong_are_refused(operation, refusal: tuple[str, ...]) -> None:
    with refused(NoSparseRuleError, *refusal):
        operation(packed())


@pytest.mark.parametrize(
    ("operation", "refusal"),
    [
        (lambda x: F.conv2d(x, torch.randn(4, 4, 3, 3)), ("window-moves-positions", "6", "8")),
        (lambda x: F.conv2d(x, torch.randn(4, 3, 1, 1)), ("conv-channels-differ", "3", "4")),
        (lambda x: F.max_pool2d(x, 8, 8), ("cells-too-small-for-stride",)),
        (lambda x: x + packed(), ("masks-differ",)),
        (lambda x: x * torch.randn(3, 4, 1, 1), ("operand-shape", "2")),
    ],
)
def test_geometry_and_masks_that_do_not_fit(operation, refusal: tuple[str, ...]) -> None:
    with refused(ValueError, *refusal):
        operation(packed())


@pytest.mark.parametrize(
    ("visible", "cell", "error", "refusal"),
    [
        (torch.ones(1, 2, 2), 4, TypeError, ("visible-dtype",)),
        (torch.ones(2, 2, dtype=torch.bool), 4, ValueError, ("visible-shape",)),
        (torch.ones(1, 2, 2, dtype=torch.bool), 0, ValueError, ("cell-not-positive",)),
        (torch.zeros(2, 2, 2, dtype=torch.bool), 4, ValueError, ("image-without-visible-cell", "[0, 1]")),
    ],
)
def test_layouts_that_make_no_sense(visible, cell, error, refusal: tuple[str, ...]) -> None:
    with refused(error, *refusal):
        CellLayout(visible, cell)


def test_pack_refuses_an_image_of_another_size() -> None:
    with refused(ValueError, "dense-map-shape", "2 x 2", "4"):
        PackedTensor.pack(torch.randn(1, 3, 9, 8), CellLayout(torch.ones(1, 2, 2, dtype=torch.bool), 4))


class Flattening(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(2)


def test_a_layer_without_rule_is_named() -> None:
    net = sparsify(nn.Sequential(nn.Conv2d(3, 4, 1), nn.Sequential(Flattening())), 4)
    with refused(NoSparseRuleError, "operation-without-sparse-rule", "1.0", "Flattening"):
        net(torch.randn(1, 3, 8, 8), visible=torch.ones(1, 2, 2, dtype=torch.bool))
    with refused(NoSparseRuleError, "layer-without-sparse-rule", "0", "ConvTranspose2d"):
        sparsify(nn.Sequential(nn.ConvTranspose2d(3, 4, 2, 2)), 4)


def test_users_add_rules() -> None:
    class Gate(nn.Module):
        """Multiplies by the sigmoid of each image's mean: written for dense maps, with a view."""

        def forward(self, x: Tensor) -> Tensor:
            return x * x.mean((2, 3)).view(x.shape[0], -1, 1, 1).sigmoid()

    @layer_rule(Gate)
    def gate(layer, x):
        return x * x.mean((2, 3), keepdim=True).sigmoid()

    net = sparsify(nn.Sequential(Gate()), 4)
    x = torch.randn(2, 3, 8, 8)
    out = net(x, visible=torch.ones(2, 2, 2, dtype=torch.bool)).to_dense()
    assert torch.allclose(out, Gate()(x), atol=1e-6)


def test_one_cell_an_image_pools_as_the_image_does() -> None:
    x = torch.randn(2, 3, 8, 8)
    found = [
        (tensor * F.avg_pool2d(tensor, tensor.shape[2:])).to_dense()
        for tensor in (
            kind.pack(x, CellLayout(torch.ones(2, 1, 1, dtype=torch.bool), 8)) for kind in (PackedTensor, MaskedTensor)
        )
    ]
    for value in found:
        torch.testing.assert_close(value, x * F.avg_pool2d(x, 8))


def test_unknown_backend() -> None:
    with refused(ValueError, "sparse-backend-unknown", "minkowski"):
        sparsify(nn.Conv2d(3, 4, 1), 4, "minkowski")


def test_layers_outside_a_network_keep_the_mask() -> None:
    """No module remembers a mask: the same layer serves sparse and dense calls in turn."""
    layer = nn.BatchNorm2d(4).train()
    x = packed()
    assert layer(x).cells is x.cells
    assert type(layer(torch.randn(2, 4, 8, 8))) is Tensor
