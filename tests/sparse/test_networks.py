"""Whole networks: every backend against masked-dense compute, and the promises that a user relies on."""

import copy
import io
import pickle

import pytest
import timm
import timm.layers
import torch
from refusals import refused
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from hgkd.errors import NoSparseRuleError
from hgkd.sparse import BACKENDS, CellLayout, sparsify
from hgkd.sparse.convert import LAYER_RULES

SIZE, GRID = (64, 96), (2, 3)


def build(name: str) -> nn.Module:
    torch.manual_seed(1)
    model = timm.create_model(name, num_classes=0, global_pool="").double()
    for module in model.modules():  # a fresh network's residual branches and biases are 0 and would hide errors
        if isinstance(module, (nn.BatchNorm2d, nn.LayerNorm)) and module.weight is not None:
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.uniform_(module.bias, -0.5, 0.5)
    for parameter_name, parameter in model.named_parameters():
        if parameter_name.endswith("gamma"):  # layer scale starts at 1e-6
            nn.init.uniform_(parameter, 0.5, 1.5)
    return model


def images(batch: int = 3) -> Tensor:
    return torch.randn(batch, 3, *SIZE, dtype=torch.float64, generator=torch.Generator().manual_seed(2))


def uneven_mask() -> Tensor:
    """Three images with 1, 3 and 6 of 6 cells visible."""
    visible = torch.zeros(3, *GRID, dtype=torch.bool)
    visible[0, 1, 1] = True
    visible[1, 0, 0] = visible[1, 0, 1] = visible[1, 1, 2] = True
    visible[2] = True
    return visible


def run(model: nn.Module, backend: str, x: Tensor, visible: Tensor) -> dict[str, Tensor]:
    """Output, gradients and buffers of one forward and backward."""
    net = sparsify(model, 32, backend)
    x = x.clone().requires_grad_()
    out = net(x, visible=visible).to_dense()
    weights = torch.randn(out.shape, dtype=out.dtype, generator=torch.Generator().manual_seed(3))
    (out * weights).sum().backward()
    found = {"output": out.detach(), "images.grad": x.grad}
    found |= {f"{n}.grad": p.grad for n, p in net.named_parameters()}
    found |= {n: b.clone().double() for n, b in net.named_buffers()}
    return found


def difference(a: Tensor, b: Tensor) -> float:
    scale = b.abs().max().clamp_min(1e-12)
    return ((a - b).abs().max() / scale).item()


@pytest.mark.parametrize("name", ["resnet18d", "ecaresnet26t", "convnextv2_atto", "test_resnet", "test_convnext"])
def test_equals_masked_dense_in_eval_mode(name: str) -> None:
    """Training mode: ``test_families.py``, for every family."""
    model = build(name).eval()
    reference = run(model, "masked", images(), uneven_mask())
    found = run(model, "gather", images(), uneven_mask())
    assert found.keys() == reference.keys()
    for key, value in reference.items():
        assert value is not None, f"{key} got no gradient from the reference"
        assert difference(found[key], value) < 1e-9, key


@pytest.mark.parametrize("backend", ["gather", "masked"])
@pytest.mark.parametrize("name", ["resnet18d", "convnextv2_atto"])
def test_everything_visible_is_the_dense_network(name: str, backend: str) -> None:
    model = build(name).train()
    net = sparsify(model, 32, backend)
    x = images()
    everything = CellLayout(torch.ones(3, *GRID, dtype=torch.bool), 32)
    out = net(BACKENDS[backend].pack(x, everything)).to_dense()
    expected = model(x)
    assert difference(out, expected) < 1e-10
    assert difference(net(x), model(x)) < 1e-12, "without a mask it is the dense network"
    assert difference(net(x, visible=everything).to_dense(), model(x)) < 1e-10
    for (key, a), b in zip(net.state_dict().items(), model.state_dict().values(), strict=True):
        assert difference(a.double(), b.double()) < 1e-10, key


@pytest.mark.parametrize("name", ["resnet18", "convnext_atto"])
def test_hidden_pixels_do_not_matter(name: str) -> None:
    net = sparsify(build(name).eval(), 32)
    visible, x = uneven_mask(), images()
    hidden = ~CellLayout(visible, 32).mask(1)
    changed = torch.where(hidden, torch.full_like(x, 1e3), x)
    assert torch.equal(net(x, visible=visible).to_dense(), net(changed, visible=visible).to_dense())


def test_hidden_pixels_get_no_gradient() -> None:
    net = sparsify(build("resnet18").train(), 32)
    x = images().requires_grad_()
    net(x, visible=uneven_mask()).to_dense().square().sum().backward()
    hidden = (~CellLayout(uneven_mask(), 32).mask(1)).expand_as(x)
    assert not x.grad[hidden].any()
    assert x.grad[~hidden].any()


@pytest.mark.parametrize("name", ["resnet18", "seresnet18", "convnextv2_atto"])
def test_batch_equals_its_images_one_by_one(name: str) -> None:
    net = sparsify(build(name).eval(), 32)
    x, visible = images(), uneven_mask()
    together = net(x, visible=visible).to_dense()
    for i in range(3):
        alone = net(x[i : i + 1], visible=visible[i : i + 1]).to_dense()
        assert difference(together[i : i + 1], alone) < 1e-10


def test_two_networks_with_two_masks_interleaved() -> None:
    first, second = (sparsify(build(n).train(), 32) for n in ("test_resnet", "test_convnext"))
    x, mask_a, mask_b = images(), uneven_mask(), uneven_mask().flip(0)
    expected = []
    for net, mask in ((first, mask_a), (second, mask_b)):
        net.zero_grad()
        net(x, visible=mask).to_dense().square().sum().backward()
        expected.append([p.grad.clone() for p in net.parameters()])
        net.zero_grad()
    out_a = first(x, visible=mask_a)  # both forwards before either backward
    out_b = second(x, visible=mask_b)
    out_b.to_dense().square().sum().backward()
    out_a.to_dense().square().sum().backward()
    for net, grads in zip((first, second), expected, strict=True):
        for parameter, grad in zip(net.parameters(), grads, strict=True):
            assert difference(parameter.grad, grad) < 1e-12


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("name", ["test_resnet", "convnext_atto"])
def test_activation_checkpointing(name: str, reentrant: bool) -> None:
    model = build(name).eval()  # eval: recomputation would update running statistics twice, in a dense network too
    plain = run(model, "gather", images(), uneven_mask())
    net = sparsify(model, 32)
    x = images().requires_grad_()

    def features(packed: Tensor) -> Tensor:
        return net(packed)

    out = checkpoint(features, net.pack(x, uneven_mask()), use_reentrant=reentrant).to_dense()
    weights = torch.randn(out.shape, dtype=out.dtype, generator=torch.Generator().manual_seed(3))
    (out * weights).sum().backward()
    assert difference(x.grad, plain["images.grad"]) < 1e-12
    for key, parameter in net.named_parameters():
        assert difference(parameter.grad, plain[f"{key}.grad"]) < 1e-12, key


def test_timm_checkpointing_switch() -> None:
    model = build("resnet18").train()
    expected = run(model, "gather", images(), uneven_mask())
    model.set_grad_checkpointing(True)
    found = run(model, "gather", images(), uneven_mask())
    for key in expected:
        if "running" not in key and "num_batches" not in key:  # recomputation counts batches twice, dense too
            assert difference(found[key], expected[key]) < 1e-12, key


@pytest.mark.parametrize("renormalize", [False, True])
@pytest.mark.parametrize("backend", ["gather", "masked"])
@pytest.mark.parametrize("made_inside", [False, True])
def test_a_layout_used_in_inference_mode_trains_later(made_inside: bool, backend: str, renormalize: bool) -> None:
    net = sparsify(build("test_resnet"), 32, backend, renormalize)
    with torch.inference_mode(made_inside):
        layout = CellLayout(uneven_mask(), 32, renormalize)
    with torch.inference_mode():
        net.eval()(images(), visible=layout)
    out = net.train()(images().requires_grad_(), visible=layout).to_dense()
    out.square().sum().backward()
    assert all(bool(parameter.grad.isfinite().all()) for parameter in net.parameters())


@pytest.mark.parametrize("backend", ["gather", "masked"])
def test_full_backward_hooks(backend: str) -> None:
    net, seen = sparsify(build("test_resnet"), 32, backend), []
    layers = [layer for layer in net.modules() if isinstance(layer, nn.Conv2d)]

    def gradients() -> list[Tensor]:
        x = images().requires_grad_()
        out = net(x, visible=uneven_mask()).to_dense()
        return list(torch.autograd.grad(out.square().sum(), [x, *net.parameters()]))

    expected = gradients()
    for layer in layers:
        layer.register_full_backward_hook(lambda layer, inputs, outputs: seen.append((layer, outputs[0].shape[1])))
    assert all(torch.equal(a, b) for a, b in zip(gradients(), expected, strict=True))
    assert seen == [(layer, layer.out_channels) for layer, _ in seen]
    assert {id(layer) for layer, _ in seen} == {id(layer) for layer in layers}


def test_lent_network_is_left_alone() -> None:
    model = build("test_resnet")
    kinds = [type(m) for m in model.modules()]
    keys = list(model.state_dict())
    net = sparsify(model, 32)
    net(images(), visible=uneven_mask()).to_dense().sum().backward()
    assert [type(m) for m in model.modules()] == kinds
    assert all(p.grad is None for p in model.parameters())
    assert list(net.state_dict()) == keys


@pytest.mark.parametrize("through", ["pickle", "torch.save", "deepcopy"])
@pytest.mark.parametrize("name", ["test_resnet", "ecaresnet26t"])  # the second has layers with rules
def test_a_sparse_network_comes_back_from_a_pickle(name: str, through: str) -> None:
    net = sparsify(build(name), 32).eval()
    if through == "torch.save":
        torch.save(net, file := io.BytesIO())
        file.seek(0)
        again = torch.load(file, weights_only=False)
    else:
        again = copy.deepcopy(net) if through == "deepcopy" else pickle.loads(pickle.dumps(net))
    assert [type(m) for m in again.modules()] == [type(m) for m in net.modules()]
    assert (again.sparse_cell, again.sparse_backend) == (32, "gather")
    found, expected = (n(images(), visible=uneven_mask()).to_dense() for n in (again, net))
    assert torch.equal(found, expected)
    assert torch.equal(again(images()), net(images()))


def test_a_pickled_layer_needs_its_rule() -> None:
    class_of_others = timm.layers.EcaModule
    pickled, rule = pickle.dumps(sparsify(build("ecaresnet26t"), 32)), LAYER_RULES.pop(class_of_others)
    try:
        with refused(NoSparseRuleError, "sparse-rule-not-registered", "EcaModule", "hgkd.sparse.layer_rule"):
            pickle.loads(pickled)
    finally:
        LAYER_RULES[class_of_others] = rule


def test_a_sparse_network_is_not_converted_again() -> None:
    with refused(ValueError, "sparsified-twice", "8", "'gather'", "cell=16"):
        sparsify(sparsify(nn.Conv2d(3, 4, 1), 8), 16)


def test_drop_path_drops_whole_images() -> None:
    model = timm.create_model("resnet18", num_classes=0, global_pool="", drop_path_rate=0.5).double().train()
    net = sparsify(model, 32)
    seen = []
    for module in net.modules():
        if type(module).__name__ == "SparseDropPath":
            module.register_forward_hook(lambda m, args, out: seen.append((args[0].plain, out.plain)))
    visible = torch.ones(3, *GRID, dtype=torch.bool)
    visible[1, 0] = False
    layout = CellLayout(visible, 32)
    net(images(), visible=layout)
    assert seen
    for before, after in seen:
        per_cell = [bool(b.abs().sum() > 0 and a.abs().sum() == 0) for b, a in zip(before, after, strict=True)]
        for image in range(3):
            members = {d for d, i in zip(per_cell, layout.image_of_cell.tolist(), strict=True) if i == image}
            assert len(members) == 1, "cells of one image were dropped apart"


def test_autocast_bf16_follows_the_reference() -> None:
    model = build("resnet18").float().eval()
    with torch.autocast("cpu", torch.bfloat16):
        found = sparsify(model, 32)(images().float(), visible=uneven_mask())
    expected = sparsify(model, 32, "masked")(images().float(), visible=uneven_mask())
    assert found.dtype == torch.bfloat16
    assert difference(found.to_dense().float(), expected.to_dense()) < 0.05


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("affine", [True, False])
def test_a_network_of_half_precision_trains_in_both_backends(dtype: torch.dtype, affine: bool) -> None:
    torch.manual_seed(0)
    first = nn.Conv2d(3, 8, 3, padding=1, bias=False)  # of a bias before the norm the gradient is 0, and all noise
    model = nn.Sequential(first, nn.BatchNorm2d(8, affine=affine), nn.ReLU(), nn.Conv2d(8, 4, 3, padding=1))
    model, results = model.to(dtype).train(), []
    x = torch.randn(3, 3, 12, 8, generator=torch.Generator().manual_seed(0)).to(dtype)
    visible = torch.rand(3, 3, 2, generator=torch.Generator().manual_seed(1)) < 0.5
    visible[:, 0, 0] = True
    for backend in ("gather", "masked"):
        net = sparsify(model, 4, backend)
        out = net(x, visible=visible).to_dense()
        out.float().square().mean().backward()
        gradients = [parameter.grad for parameter in net.parameters()]
        assert all(gradient.dtype == dtype for gradient in gradients)
        results.append([out, *gradients, *net.buffers()])
    for found, expected in zip(*results, strict=True):
        assert difference(found.detach().double(), expected.detach().double()) < 0.05


@pytest.mark.parametrize("convert", [nn.SyncBatchNorm.convert_sync_batchnorm, timm.layers.convert_sync_batchnorm])
def test_layers_put_in_after_sparsify_get_their_rules(convert, monkeypatch) -> None:
    """``convert_sync_batchnorm`` makes new layers; torch's own forward must see rows of visible positions only."""
    model = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), timm.layers.BatchNormAct2d(4), nn.BatchNorm2d(4)).double().train()
    expected = run(model, "gather", images(), uneven_mask())
    kinds = []
    forward = nn.SyncBatchNorm.forward
    monkeypatch.setattr(nn.SyncBatchNorm, "forward", lambda layer, x: kinds.append(type(x)) or forward(layer, x))
    for backend in ("gather", "masked"):
        net = convert(sparsify(model, 32, backend))
        assert sum(isinstance(layer, nn.SyncBatchNorm) for layer in net.modules()) == 2
        x = images().requires_grad_()
        out = net(x, visible=uneven_mask()).to_dense()
        probe = torch.randn(out.shape, dtype=out.dtype, generator=torch.Generator().manual_seed(3))
        (out * probe).sum().backward()
        if convert is timm.layers.convert_sync_batchnorm:  # torch's drops the activation of timm's layer
            assert difference(out.detach(), expected["output"]) < 1e-12
            assert difference(x.grad, expected["images.grad"]) < 1e-12
            assert difference(net[1].running_mean, expected["1.running_mean"]) < 1e-12
    assert kinds == [Tensor] * 4
