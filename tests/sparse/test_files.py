"""A sparse backbone written and read back, and every way in which that is refused."""

import json

import pytest
import timm
import torch
from refusals import refused
from safetensors.torch import load_file, save_file
from torch import nn

from hgkd.errors import WeightsError
from hgkd.sparse import load_sparse, save_sparse, sparsify

PLAIN = {"num_classes": 0, "global_pool": ""}


def backbone(**kwargs) -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model("test_resnet", **PLAIN, **kwargs)


def half() -> torch.Tensor:
    return torch.eye(2, dtype=torch.bool)[None]


def test_a_file_is_enough(tmp_path) -> None:
    net = sparsify(backbone(), 32, "masked").train()
    save_sparse(net, tmp_path / "a.safetensors", timm_model="test_resnet", timm_kwargs=PLAIN)
    assert net.training
    assert [p.name for p in tmp_path.iterdir()] == ["a.safetensors"]
    found = load_sparse(tmp_path / "a.safetensors")
    assert (found.sparse_cell, found.sparse_backend, found.training) == (32, "masked", False)
    images = torch.randn(1, 3, 64, 64)
    expected = net.eval()(images, visible=half()).to_dense()
    assert torch.equal(found(images, visible=half()).to_dense(), expected)
    gather = load_sparse(tmp_path / "a.safetensors", backend="gather")
    torch.testing.assert_close(gather(images, visible=half()).to_dense(), expected, rtol=1e-4, atol=1e-5)


def test_it_is_an_ordinary_checkpoint_for_others(tmp_path) -> None:
    net = backbone()
    save_sparse(sparsify(net, 32), tmp_path / "a.safetensors")
    timm.create_model("test_resnet", **PLAIN).load_state_dict(load_file(tmp_path / "a.safetensors"))


def test_a_network_of_ones_own(tmp_path) -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1))
    save_sparse(sparsify(net, 4), tmp_path / "own.safetensors")
    with refused(ValueError, "network-not-in-file"):
        load_sparse(tmp_path / "own.safetensors")
    other = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1))
    found = load_sparse(tmp_path / "own.safetensors", other)
    assert torch.equal(found[0].weight, net[0].weight)
    assert not torch.equal(other[0].weight, net[0].weight)
    with refused(WeightsError, "weights-do-not-fit", "Sequential"):
        load_sparse(tmp_path / "own.safetensors", nn.Sequential(nn.Conv2d(3, 5, 3)))


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"timm_model": "test_resnet"}, "(?s)is not this network.*pass the timm_kwargs"),  # a classifier more
        ({"timm_model": "test_convnext", "timm_kwargs": PLAIN}, "is not this network"),
        ({"timm_model": "test_resnet", "timm_kwargs": {**PLAIN, "act_layer": "silu"}}, "computes other features"),
        ({"timm_model": "test_resnot"}, "unknown timm model 'test_resnot'; did you mean 'test_resnet'"),
    ],
)
def test_a_name_that_is_not_this_network(tmp_path, kwargs, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        save_sparse(sparsify(backbone(), 32), tmp_path / "a.safetensors", **kwargs)
    assert not list(tmp_path.iterdir())


def test_what_is_not_written(tmp_path) -> None:
    with refused(TypeError, "network-not-sparsified", "hgkd.sparse.sparsify", "ResNet"):
        save_sparse(backbone(), tmp_path / "a.safetensors")
    (tmp_path / "a.safetensors").write_text("mine")
    with refused(FileExistsError, "file-exists", "overwrite=True"):
        save_sparse(sparsify(backbone(), 32), tmp_path / "a.safetensors")
    save_sparse(sparsify(backbone(), 32), tmp_path / "a.safetensors", overwrite=True)
    load_sparse(tmp_path / "a.safetensors", backbone())


def test_what_is_not_read(tmp_path) -> None:
    with refused(FileNotFoundError, "sparse-file-missing", "none.safetensors"):
        load_sparse(tmp_path / "none.safetensors")
    (tmp_path / "text").write_text("mine")
    with refused(WeightsError, "file-not-safetensors"):
        load_sparse(tmp_path / "text")
    save_file({"a": torch.zeros(1)}, tmp_path / "plain")
    with refused(WeightsError, "sparse-facts-missing"):
        load_sparse(tmp_path / "plain")
    facts = {"cell": 32, "backend": "gatherer", "timm_model": None, "timm_kwargs": {}}
    save_file({"a": torch.zeros(1)}, tmp_path / "future", {"hgkd_sparse": json.dumps(facts)})
    with refused(WeightsError, "file-backend-unknown", "gatherer", "gather"):
        load_sparse(tmp_path / "future")
