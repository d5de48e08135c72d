"""Weight files: what is read, what is refused and why, and that nothing loads partly in silence."""

import argparse
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from mmengine.logging import HistoryBuffer, MessageHub
from safetensors.torch import save_file
from torch import nn

from hgkd.engine.weights import load_strict, read_checkpoint, read_metadata, read_weights, safe_globals_for_mmengine
from hgkd.errors import WeightsError


class _Foreign:
    def __reduce__(self) -> Any:
        return os.getcwd, ()


class _ReachesOut:
    def __reduce__(self) -> Any:
        return getattr, (HistoryBuffer, "__init__")


def _net() -> nn.Sequential:
    return nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))


def test_safetensors_and_pickles_give_the_same_weights(tmp_path: Path) -> None:
    state = _net().state_dict()
    save_file(state, tmp_path / "w.safetensors", metadata={"note": "hello"})
    for name in ("w.pth", "w.pt", "w.bin"):
        torch.save(state, tmp_path / name)
    for name in ("w.safetensors", "w.pth", "w.pt", "w.bin"):
        found = read_weights(tmp_path / name)
        assert set(found) == set(state)
        assert all(torch.equal(found[key], state[key]) for key in state)
    assert read_metadata(tmp_path / "w.safetensors") == {"note": "hello"}
    assert read_metadata(tmp_path / "w.pth") == {}


@pytest.mark.parametrize("wrap", ["model", "state_dict"])
def test_containers_and_a_common_prefix_are_removed_and_told(tmp_path: Path, wrap: str, caplog: Any) -> None:
    state = {f"module.{key}": value for key, value in _net().state_dict().items()}
    torch.save({wrap: state, "epoch": 3, "args": argparse.Namespace(lr=0.1)}, tmp_path / "w.pth")
    with caplog.at_level("INFO"):
        assert set(read_weights(tmp_path / "w.pth")) == set(_net().state_dict())


def test_a_prefix_that_only_some_names_have_stays(tmp_path: Path) -> None:
    torch.save({"module.a": torch.ones(1), "b": torch.ones(1)}, tmp_path / "w.pth")
    assert set(read_weights(tmp_path / "w.pth")) == {"module.a", "b"}


def test_a_checkpoint_of_mmengine_with_its_log_is_read(tmp_path: Path) -> None:
    hub = MessageHub.get_instance("test_weights")
    hub.update_scalar("loss", 1.5)
    hub.update_scalar("loss", np.float32(2.5))
    checkpoint = {"message_hub": hub.state_dict(), "meta": {"seed": np.int64(3), "best": np.float64(0.5)}, "state_dict": {}}
    torch.save(checkpoint, tmp_path / "epoch_1.pth")
    found = read_checkpoint(tmp_path / "epoch_1.pth")
    history = found["message_hub"]["log_scalars"]["loss"]
    assert isinstance(history, HistoryBuffer)
    assert history.data[0].tolist() == [1.5, 2.5]
    assert history.mean() == 2.0
    assert found["meta"] == {"seed": 3, "best": 0.5}


def test_numpy_1_names_are_read(tmp_path: Path) -> None:
    torch.save({"x": np.float64(0.25)}, tmp_path / "w.pth")
    import zipfile

    with zipfile.ZipFile(tmp_path / "w.pth") as old, zipfile.ZipFile(tmp_path / "one.pth", "w") as new:
        for entry in old.namelist():
            new.writestr(entry, old.read(entry).replace(b"cnumpy._core.multiarray", b"cnumpy.core.multiarray"))
    assert read_checkpoint(tmp_path / "one.pth") == {"x": 0.25}


def test_foreign_types_are_refused_by_name_and_never_run(tmp_path: Path) -> None:
    torch.save({"a": _Foreign()}, tmp_path / "a.pth")
    with pytest.raises(WeightsError, match=r"posix\.getcwd.*could run foreign code"):
        read_weights(tmp_path / "a.pth")
    torch.save({"model": _net()}, tmp_path / "net.pth")
    with pytest.raises(WeightsError, match=r"torch\.nn\.modules.*state_dict alone"):
        read_weights(tmp_path / "net.pth")


def test_the_stand_in_for_getattr_reaches_nothing_but_statistics(tmp_path: Path) -> None:
    torch.save({"a": _ReachesOut()}, tmp_path / "a.pth")
    with pytest.raises(WeightsError, match="foreign code"):
        read_checkpoint(tmp_path / "a.pth")


def test_what_was_allowed_before_is_allowed_after() -> None:
    class Own:
        pass

    torch.serialization.add_safe_globals([Own, HistoryBuffer])
    try:
        before = set(torch.serialization.get_safe_globals())
        with safe_globals_for_mmengine():
            assert argparse.Namespace in torch.serialization.get_safe_globals()
        assert set(torch.serialization.get_safe_globals()) == before
    finally:
        torch.serialization.clear_safe_globals()


def test_absent_and_damaged_files(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="does not exist; give a local"):
        read_weights(tmp_path / "none.pth")
    with pytest.raises(WeightsError, match="is a folder"):
        read_weights(tmp_path)
    (tmp_path / "empty.pth").touch()
    with pytest.raises(WeightsError, match="empty"):
        read_weights(tmp_path / "empty.pth")
    torch.save({"a": torch.randn(500)}, tmp_path / "whole.pth")
    (tmp_path / "half.pth").write_bytes((tmp_path / "whole.pth").read_bytes()[:1000])
    save_file({"a": torch.randn(500)}, tmp_path / "whole.safetensors")
    (tmp_path / "half.safetensors").write_bytes((tmp_path / "whole.safetensors").read_bytes()[:1000])
    (tmp_path / "page.pth").write_text("<!DOCTYPE html><html>not found</html>")
    for name in ("half.pth", "half.safetensors", "page.pth"):
        with pytest.raises(WeightsError, match=r"damaged|no intact") as caught:
            read_weights(tmp_path / name)
        assert "weights_only" not in str(caught.value)  # torch advises what must not be done
    torch.save([torch.ones(1)], tmp_path / "list.pth")
    with pytest.raises(WeightsError, match="holds a list, expected named tensors"):
        read_weights(tmp_path / "list.pth")
    torch.save({"epoch": 1}, tmp_path / "none.pth")
    with pytest.raises(WeightsError, match="holds no tensors; its entries are epoch"):
        read_weights(tmp_path / "none.pth")


def test_fp16_weights_take_the_precision_of_the_network() -> None:
    source, target = _net(), _net()
    half = {key: value.half() if value.is_floating_point() else value for key, value in source.state_dict().items()}
    report = load_strict(target, half, source="half.pth")
    assert report.complete
    assert (report.matched, report.total) == (7, 7)
    assert target[0].weight.dtype == torch.float32
    torch.testing.assert_close(target[0].weight, source[0].weight, rtol=1e-3, atol=1e-3)


def test_anything_that_does_not_fit_is_reported_at_once_and_changes_nothing() -> None:
    target = _net()
    before = {key: value.clone() for key, value in target.state_dict().items()}
    state = dict(_net().state_dict())
    del state["1.running_var"]
    state["0.weight"] = torch.zeros(4, 2)
    state["head.bias"] = torch.zeros(1)
    with pytest.raises(WeightsError) as caught:
        load_strict(target, state, source="odd.pth")
    for part in (
        "odd.pth: 5 of 7",
        "1 missing: 1.running_var",
        "1 unexpected: head.bias",
        "0.weight: (4, 2), expected (3, 2)",
    ):
        assert part in str(caught.value)
    assert all(torch.equal(value, before[key]) for key, value in target.state_dict().items())


def test_only_names_declared_irrelevant_are_passed_over_and_they_are_listed() -> None:
    state = dict(_net().state_dict())
    del state["1.weight"]
    state["head.bias"] = torch.zeros(1)
    report = load_strict(_net(), state, source="x", ignore_missing=("1.weight",), ignore_unexpected=("head.",))
    assert report.ignored == ("1.weight", "head.bias")
    assert "2 ignored: 1.weight, head.bias" in str(report)
    assert report.matched == 6
