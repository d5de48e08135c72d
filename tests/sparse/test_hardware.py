"""What holds on hardware that the tests do not have: fake capabilities, fake CUDA tensors, counted launches, guards."""

import subprocess
import sys
from collections import Counter

import pytest
import timm
import torch
import torch.nn.functional as F
from refusals import refused
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from hgkd.config.short_options import amp_dtype
from hgkd.sparse import CellLayout, MaskedTensor, PackedTensor, convert, hardware, kernels, layout, measure_parity, sparsify
from hgkd.training import sync_norm
from hgkd.training.sync_norm import SyncedBatchNorm2d

GPU = torch.device("cuda:1")
UNEVEN = torch.tensor([[[True, False], [False, False]], [[True, True], [True, True]]])


class CalledOperations(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.seen: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        accumulates = name == "index_put_" and len(args) > 3 and args[3]
        self.seen["index_put_ (sorted)" if accumulates else name] += 1
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))


# --- where and how a kernel is started ------------------------------------------------------------------------------------


def test_a_kernel_starts_on_the_device_of_its_tensors(monkeypatch) -> None:
    fused = pytest.importorskip("hgkd.sparse.fused")
    current, started = [0], []

    class Guard:
        def __init__(self, device: torch.device) -> None:
            self.device = device

        def __enter__(self) -> None:
            current.append(self.device.index)

        def __exit__(self, *_: object) -> None:
            current.pop()

    class Kernel:
        def __getitem__(self, grid):
            return lambda *arguments, **constants: started.append((current[-1], grid, arguments, constants))

    monkeypatch.setattr(torch.cuda, "device", Guard)
    fused.launch(GPU, Kernel(), (2, 3), "source", BLOCK=4)
    assert started == [(1, (2, 3), ("source",), {"BLOCK": 4})]
    assert current == [0]


def test_sizes_that_change_from_step_to_step_are_not_compiled_for() -> None:
    fused = pytest.importorskip("hgkd.sparse.fused")
    for kernel, sizes in ((fused._gather_multiply, {"rows", "points"}), (fused._weight_gradient, {"rows", "points", "slices"})):
        if hasattr(kernel, "params"):  # absent in the interpreter
            assert {p.name for p in kernel.params if p.do_not_specialize} == sizes
            assert not {p.name for p in kernel.params if p.is_constexpr} & sizes


@pytest.mark.parametrize(("found", "serves"), [((7, 5), False), ((8, 0), True), ((9, 0), True)])
def test_triton_serves_from_capability_8_on(found, serves, monkeypatch) -> None:
    fused = pytest.importorskip("hgkd.sparse.fused")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: found)
    monkeypatch.setattr(torch.version, "hip", None)
    assert fused.serves(torch.bfloat16, GPU) == fused.serves(torch.float16, GPU) == serves
    assert not fused.serves(torch.float64, GPU)
    assert not fused.serves(torch.bfloat16, torch.device("cpu"))


TF32 = """
import runpy
import torch
tf32_allowed = runpy.run_path(HARDWARE)["tf32_allowed"]
assert (tf32_allowed("matmul"), tf32_allowed("conv")) == (False, True), "torch's defaults"
torch.backends.cuda.matmul.allow_tf32 = True
torch.backends.cudnn.allow_tf32 = False
assert (tf32_allowed("matmul"), tf32_allowed("conv")) == (True, False), "the older setting"
torch.backends.cuda.matmul.fp32_precision = "ieee"
torch.backends.cudnn.conv.fp32_precision = "tf32"
assert (tf32_allowed("matmul"), tf32_allowed("conv")) == (False, True), "the newer one"
torch.backends.cuda.matmul.fp32_precision = "tf32"
try:
    torch.backends.cuda.matmul.allow_tf32
except RuntimeError:
    assert tf32_allowed("matmul"), "while the older raises"
torch.backends.cuda.matmul.fp32_precision = "none"
torch.backends.fp32_precision = "tf32"
assert tf32_allowed("matmul"), "the setting of all"
"""


def test_tf32_by_either_of_torchs_settings() -> None:
    """In a process of its own: torch's two settings cannot be put back once they were mixed."""
    if not hasattr(torch.backends.cuda.matmul, "fp32_precision"):
        pytest.skip("this torch has the older setting alone")
    done = subprocess.run([sys.executable, "-c", f"HARDWARE = {hardware.__file__!r}\n" + TF32], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_fp32_products_follow_the_setting_of_convolutions(monkeypatch) -> None:
    """A 1x1 layer is then a convolution, a 3x3 layer of tiles; values stay."""
    layers = [(torch.randn(8, 64, 1, 1), 0, "matmul"), (torch.randn(8, 64, 3, 3), 1, "im2col")]
    cells = CellLayout(UNEVEN, 4)
    packed = torch.randn(cells.num_cells, 64, 4, 4).contiguous(memory_format=torch.channels_last)
    for weight, pad, kernel in layers:
        geometry = kernels.ConvGeometry(4, tuple(weight.shape[2:]), (1, 1), (pad, pad), (1, 1))
        assert kernels.choose_kernel(weight, 1, geometry, cells) == kernel
        before = kernels.convolve(packed, weight, None, 1, geometry, cells)
        with monkeypatch.context() as patch, CalledOperations() as calls:
            patch.setattr(kernels, "_follows_cudnn", lambda x: True)
            found = kernels.convolve(packed, weight, None, 1, geometry, cells)
        assert calls.seen["convolution"] == 1
        assert not calls.seen["mm"] + calls.seen["addmm"]
        torch.testing.assert_close(found, before, rtol=1e-4, atol=1e-4)


def test_fp32_on_a_gpu_is_one_product_a_layer_not_slices_of_a_cache(monkeypatch) -> None:
    """Launches of a layer of 128 channels on fake CUDA tensors; the CPU's slices are 4 MB."""
    monkeypatch.setenv("HGKD_KERNELS", "torch")
    geometry = kernels.ConvGeometry(8, (3, 3), (1, 1), (1, 1), (1, 1))
    assert len(kernels._slices(8 * 12 * 64, 9 * 128, kernels._slice_elements(torch.device("cpu")))) > 5
    try:
        with FakeTensorMode(), CalledOperations() as calls:
            cells = given_layout(torch.arange(96, device=GPU), (8, 7, 7), 8)
            rows = torch.empty(96, 128, 8, 8, device=GPU).contiguous(memory_format=torch.channels_last)
            weight, grad = torch.empty(128, 128, 3, 3, device=GPU), torch.empty(96 * 64, 128, device=GPU)
            kernels.convolve(rows, weight, None, 1, geometry, cells, "im2col")  # autograd would ask for a driver
            kernels._input_gradient(grad, weight, geometry, cells, True)
            kernels._weight_gradient(kernels.rows_of(rows), grad, weight, geometry, cells, True)
        assert (calls.seen["mm"], calls.seen["addmm_"]) == (2, 1)
        assert calls.seen["nonzero"] == calls.seen["_local_scalar_dense"] == 0
    finally:
        layout.regular_stencil.cache_clear()
        kernels._transposed_stencil.cache_clear()


def given_layout(positions: torch.Tensor, shape: tuple[int, int, int], cell: int) -> CellLayout:
    """A layout of given positions: counting the cells of a fake mask is not possible."""
    made = CellLayout.__new__(CellLayout)
    made.visible = torch.empty(shape, dtype=torch.bool, device=positions.device)
    made.cell, made.renormalize, made.batch, made.grid = cell, False, shape[0], shape[1:]
    made.image_size = (shape[1] * cell, shape[2] * cell)
    made._positions, made.num_cells, made._cache = positions, positions.numel(), {}
    return made


@pytest.mark.parametrize(
    ("gpu", "native", "expected"),
    [(False, False, torch.bfloat16), (True, True, torch.bfloat16), (True, False, torch.float16)],
)
def test_amp_does_not_take_emulated_bfloat16(gpu, native, expected, monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation or native)
    assert amp_dtype() is expected


# --- what is kept is kept for each device ---------------------------------------------------------------------------------


def test_stencils_are_made_once_for_each_device_and_never_kept_from_a_recording(monkeypatch) -> None:
    made = []
    find = layout.made_once(lambda size, device: made.append((size, device)))
    for device in ("cpu", "cpu", "meta", "cpu"):
        find(3, torch.device(device))
    assert made == [(3, torch.device("cpu")), (3, torch.device("meta"))]
    monkeypatch.setattr(layout, "is_capturing", lambda device: True)
    find(3, torch.device("cpu"))
    find(3, torch.device("cpu"))
    assert len(made) == 4


def test_weights_are_laid_out_again_when_the_device_changes(monkeypatch) -> None:
    """A GPU gathers from 16 channels on, the CPU from 64; and a conversion of the type is no new device."""
    net = sparsify(nn.Sequential(nn.Conv2d(32, 32, 3, padding=1)), 8)
    assert not net[0].weight.is_contiguous(memory_format=torch.channels_last)
    monkeypatch.setattr(convert, "gathers", lambda weight, groups: weight.shape[1] >= 16)
    net.double()
    assert not net[0].weight.is_contiguous(memory_format=torch.channels_last)
    nn.ModuleList([net]).to("meta")  # as part of a larger model
    assert net[0].weight.is_contiguous(memory_format=torch.channels_last)


# --- statistics -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [PackedTensor, MaskedTensor])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sums_over_an_image_are_fp32_under_autocast(kind, dtype) -> None:
    """4096 values of 31 to 33: their sum is beyond fp16's range, and beyond the steps of bf16."""
    values = 32 + torch.rand(2, 3, 64, 128)
    cells = CellLayout(torch.ones(2, 4, 8, dtype=torch.bool), 16)
    x = kind.pack(values.to(dtype), cells)
    expected = values.to(dtype).double()
    with torch.autocast("cpu", torch.bfloat16):
        total, mean, norm = x.sum((2, 3)), x.mean((2, 3)), x.norm(2, (2, 3))
    assert total.dtype == norm.dtype == torch.float32
    torch.testing.assert_close(total.double(), expected.sum((2, 3)), rtol=1e-6, atol=0)
    torch.testing.assert_close(norm.double(), expected.square().sum((2, 3)).sqrt(), rtol=1e-6, atol=0)
    assert mean.dtype == dtype
    torch.testing.assert_close(mean.double(), expected.mean((2, 3)), rtol=torch.finfo(dtype).eps, atol=0)


def test_group_norm_of_half_types_is_computed_in_fp32() -> None:
    x = (100 + torch.randn(2, 8, 8, 8)).bfloat16()
    cells = CellLayout(UNEVEN, 4)
    found = F.group_norm(PackedTensor.pack(x, cells), 2).to_dense()
    expected = F.group_norm(PackedTensor.pack(x.double(), cells), 2).to_dense()
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.double(), expected, rtol=2**-7, atol=2**-7)


@pytest.mark.parametrize("affine", [True, False])
def test_masked_batch_norm_is_that_of_the_visible_rows(affine) -> None:
    """Values, gradients and running statistics in fp64, against torch's norm of the rows that are visible."""
    cells, weights = CellLayout(UNEVEN, 4), torch.randn(2, 3, 8, 8, dtype=torch.float64)
    x, rows = (weights.flip(0).clone().requires_grad_() for _ in range(2))
    norms = [nn.BatchNorm2d(3, affine=affine).double() for _ in range(2)]
    for norm in norms if affine else []:
        nn.init.uniform_(norm.weight, 0.5, 1.5, generator=torch.Generator().manual_seed(0))
    found = norms[0](MaskedTensor.pack(x, cells)).to_dense()
    expected = cells.scatter_cells(norms[1](cells.gather_cells(rows, 4)))
    for out in (found, expected):
        (out * weights).sum().backward()
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(x.grad, rows.grad, rtol=1e-12, atol=1e-12)
    for name, value in norms[0].state_dict().items():
        torch.testing.assert_close(value, norms[1].state_dict()[name], rtol=1e-12, atol=1e-12)
    for parameter, other in zip(norms[0].parameters(), norms[1].parameters(), strict=True):
        torch.testing.assert_close(parameter.grad, other.grad, rtol=1e-12, atol=1e-12)


def test_masked_batch_norm_keeps_its_digits_far_from_zero() -> None:
    """In one pass, as the difference of two sums, nothing of the variance would be left."""
    x = torch.randn(2, 3, 8, 8) + 3e4
    cells = CellLayout(UNEVEN, 4)
    norms = [nn.BatchNorm2d(3, momentum=1.0), nn.BatchNorm2d(3, momentum=1.0).double()]
    found, expected = (norm(MaskedTensor.pack(x.to(p.dtype), cells)).to_dense() for norm in norms for p in [norm.weight])
    torch.testing.assert_close(found.double(), expected, rtol=1e-2, atol=2e-2)
    torch.testing.assert_close(norms[0].running_var.double(), norms[1].running_var, rtol=1e-2, atol=0)


# --- repeatable, and without waits ----------------------------------------------------------------------------------------

ATOMIC = {"index_add", "index_add_", "scatter_add", "scatter_add_", "scatter_reduce", "_embedding_bag_backward"}


@pytest.mark.parametrize("backend", ["gather", "masked"])
@pytest.mark.parametrize("name", ["seresnet18", "ecaresnet26t", "convnextv2_atto", "tf_efficientnet_b0"])
def test_a_step_has_no_operation_that_adds_atomically_and_masked_never_waits(name, backend) -> None:
    net = sparsify(timm.create_model(name, num_classes=0, global_pool=""), 32, backend).train()
    cells = CellLayout(UNEVEN, 32)
    with CalledOperations() as calls:
        net(torch.randn(2, 3, 64, 64), visible=cells).plain.square().mean().backward()
    assert not set(calls.seen) & ATOMIC
    assert not calls.seen["nonzero"] + calls.seen["_local_scalar_dense"]


def test_rows_are_added_in_a_fixed_order_on_a_gpu() -> None:
    rows, index, values = torch.zeros(5, 2), torch.tensor([1, 1, 4]), torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]])
    kernels._add_rows(rows, index, values)
    assert rows.tolist() == [[0, 0], [4, 6], [0, 0], [0, 0], [5, 6]]
    with FakeTensorMode(), CalledOperations() as calls:
        kernels._add_rows(
            torch.empty(5, 2, device=GPU), torch.empty(3, dtype=torch.int64, device=GPU), torch.empty(3, 2, device=GPU)
        )
    assert calls.seen["index_put_ (sorted)"] == 1
    assert not calls.seen["index_add_"]


def test_masked_batch_norm_with_one_value_is_torchs_error() -> None:
    cells = CellLayout(torch.tensor([[[True, False]]]), 1)
    with pytest.raises(ValueError, match="Expected more than 1 value per channel"):
        nn.BatchNorm2d(3)(MaskedTensor.pack(torch.randn(1, 3, 1, 2), cells))


def test_an_image_without_a_visible_cell_is_refused_from_counts_that_came_with_the_one_wait(monkeypatch) -> None:
    """On a GPU the counts are copied without a wait, ahead of the wait that is there anyway; what arrives decides."""
    order = []
    send, find = layout._sent_to_host, torch.Tensor.nonzero
    monkeypatch.setattr(layout, "_sent_to_host", lambda counts: order.append("sent") or send(counts))
    monkeypatch.setattr(torch.Tensor, "nonzero", lambda mask: order.append("waited") or find(mask))
    with refused(ValueError, "image-without-visible-cell", "[0, 2]"):
        CellLayout(torch.tensor([[[False]], [[True]], [[False]]]), 4)
    assert order == ["sent", "waited"]


# --- batch normalisation over processes -----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["dense", "packed", "masked", "masked, nothing hidden"])
def test_synchronised_norms_on_cuda_are_torchs_whatever_the_mask(kind, monkeypatch) -> None:
    """Processes whose masks differ would wait for each other's all-reduces for ever, were they others."""
    called = []
    monkeypatch.setattr(sync_norm, "get_world_size", lambda: 2)
    monkeypatch.setattr(sync_norm, "_torch_serves", lambda device: True)
    monkeypatch.setattr(sync_norm, "all_reduce", lambda value: called.append("all_reduce") or value)
    forward = nn.SyncBatchNorm.forward
    monkeypatch.setattr(nn.SyncBatchNorm, "forward", lambda layer, x: called.append(type(x)) or forward(layer, x))
    images, visible = torch.randn(2, 3, 8, 8), torch.ones_like(UNEVEN) if kind.endswith("hidden") else UNEVEN
    pack = {"dense": lambda x, cells: x, "packed": PackedTensor.pack}.get(kind, MaskedTensor.pack)
    x = pack(images, CellLayout(visible, 4))
    # torch's own falls back to the ordinary norm where no process group is there
    found, expected = (norm(x) if kind == "dense" else norm(x).to_dense() for norm in (SyncedBatchNorm2d(3), nn.BatchNorm2d(3)))
    torch.testing.assert_close(found, expected)
    assert called == [torch.Tensor]


def test_which_devices_torchs_synchronised_norm_takes() -> None:
    assert not sync_norm._torch_serves(torch.device("cpu"))
    assert sync_norm._torch_serves(GPU)


def test_parity_runs_where_it_is_told() -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4))
    assert measure_parity(net, 4, device=torch.device("cpu")).worst < 1e-9


def test_names_of_processors_tell_machines_apart(monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: f"card {device.index}")
    assert hardware.name_of(GPU) == "card 1"
    assert str(torch.get_num_threads()) in hardware.name_of(torch.device("cpu"))
