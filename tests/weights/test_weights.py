"""Weight files: what is read, what is refused and why, and that nothing loads partly in silence."""

import argparse
import json
import os
import pickle
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from mmengine.hooks import EMAHook
from mmengine.logging import HistoryBuffer, MessageHub
from mmengine.model import ExponentialMovingAverage
from mmengine.runner import BaseLoop
from refusals import refused
from safetensors.torch import save_file
from torch import nn

from hgkd.errors import WeightsError
from hgkd.training.runner import DistillRunner
from hgkd.weights.files import (
    average_entry,
    part_of_several,
    read_checkpoint,
    read_metadata,
    read_weights,
    safe_globals_for_mmengine,
    trained_weights,
)
from hgkd.weights.loading import load_strict
from hgkd.weights.run_file import run_metrics


class _Trained(BaseLoop):
    iter = 20

    def run(self) -> None: ...


def test_scores_of_other_weights_are_not_those_of_a_checkpoint() -> None:
    runner = DistillRunner.__new__(DistillRunner)
    runner._hooks, runner._train_loop = [], _Trained.__new__(_Trained)
    runner.message_hub = MessageHub("scores_of_other_weights")
    runner.message_hub.update_scalar("val/knn/top1", 42.5)

    def found(step: int) -> dict[str, Any]:
        return run_metrics({"meta": {"iter": step}, "message_hub": runner.message_hub.state_dict()})

    assert found(10) == {"knn/top1": 42.5}  # of a version that does not say
    runner.call_hook("after_val_epoch", metrics={"knn/top1": 42.5})
    assert found(20) == {"knn/top1": 42.5}
    assert found(30) == {}  # written before its own validation


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
    torch.save({"backbone.a": torch.ones(1), "b": torch.ones(1)}, tmp_path / "w.pth")
    assert set(read_weights(tmp_path / "w.pth")) == {"backbone.a", "b"}


def test_what_compiling_and_data_parallel_training_add_is_removed_wherever_it_stands(tmp_path: Path) -> None:
    names = ("_orig_mod.a", "backbone._orig_mod.b", "module.c", "blocks.0._orig_mod.module.d", "my_module.e", "f")
    torch.save({name: torch.ones(1) for name in names}, tmp_path / "w.pth")
    assert set(read_weights(tmp_path / "w.pth")) == {"a", "backbone.b", "c", "blocks.0.d", "my_module.e", "f"}
    torch.save({"module.a": torch.ones(1), "a": torch.zeros(1)}, tmp_path / "w.pth")  # two of one name: nothing is dropped
    assert set(read_weights(tmp_path / "w.pth")) == {"module.a", "a"}


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
    with refused(WeightsError, "weight-file-runs-code", "posix.getcwd"):
        read_weights(tmp_path / "a.pth")
    torch.save({"model": _net()}, tmp_path / "net.pth")
    with refused(WeightsError, "weight-file-runs-code", "torch.nn.modules", "state_dict"):
        read_weights(tmp_path / "net.pth")


def test_the_stand_in_for_getattr_reaches_nothing_but_statistics(tmp_path: Path) -> None:
    torch.save({"a": _ReachesOut()}, tmp_path / "a.pth")
    with refused(WeightsError, "weight-file-runs-code"):
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
    with refused(FileNotFoundError, "weight-file-missing"):
        read_weights(tmp_path / "none.pth")
    with refused(WeightsError, "weight-file-is-a-folder"):
        read_weights(tmp_path)
    (tmp_path / "empty.pth").touch()
    with refused(WeightsError, "weight-file-empty", "empty"):
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
    with refused(WeightsError, "weights-not-named-tensors", "list"):
        read_weights(tmp_path / "list.pth")
    torch.save({"epoch": 1}, tmp_path / "none.pth")
    with refused(WeightsError, "no-tensors", "epoch"):
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


def save(path: Path, content: Any) -> Path:
    torch.save(content, path)
    return path


def test_of_two_sets_of_weights_the_usual_one_is_taken_and_the_other_named(tmp_path: Path, monkeypatch: Any) -> None:
    """As training scripts with a moving average write them, timm's among others."""
    optimiser = {"state": {0: {"exp_avg": torch.ones(2)}}}
    file = save(
        tmp_path / "w.pth",
        {"state_dict": {"a": torch.zeros(1)}, "state_dict_ema": {"a": torch.ones(1)}, "optimizer": optimiser},
    )
    logged: list[str] = []
    monkeypatch.setattr("hgkd.weights.files.print_log", lambda text, *_: logged.append(text))
    assert read_weights(file)["a"] == 0
    said = "".join(logged)
    assert "taken from its entry 'state_dict'; it also holds 'state_dict_ema', not taken by default" in said
    assert f"hgkd doctor extract {file} state_dict_ema OUT.safetensors" in said
    assert "optimizer" not in said
    assert read_weights(file, "state_dict_ema")["a"] == 1
    assert "model.teacher.ema=True takes the average" in said
    assert average_entry(read_checkpoint(file), "f") == "state_dict_ema"
    with refused(WeightsError, "entry-missing", "ema", "state_dict", "state_dict_ema"):
        read_weights(file, "ema")
    with pytest.raises(WeightsError, match=r"f holds no moving average .* in it: 'model'\. Leave ema=True out"):
        average_entry({"model": {"a": torch.ones(1)}, "schema": 1}, "f")


def test_mmengine_keeps_the_average_where_others_keep_the_weights(tmp_path: Path, monkeypatch: Any) -> None:
    """Written by its own hook."""
    model = nn.Linear(1, 1, bias=False)
    hook = EMAHook(momentum=0.5)
    hook.src_model, hook.ema_model = model, ExponentialMovingAverage(model, momentum=0.5)
    nn.init.constant_(hook.ema_model.module.weight, 0.0)
    nn.init.constant_(model.weight, 1.0)
    checkpoint: dict[str, Any] = {"state_dict": model.state_dict()}
    hook.before_save_checkpoint(None, checkpoint)
    file = save(tmp_path / "epoch_1.pth", checkpoint)
    logged: list[str] = []
    monkeypatch.setattr("hgkd.weights.files.print_log", lambda text, *_: logged.append(text))
    content = read_checkpoint(file)
    assert average_entry(content, "f") == "state_dict"
    assert read_weights(file)["weight"] == read_weights(file, "state_dict")["weight"] == 0
    said = "".join(logged)
    assert "it also holds 'ema_state_dict', not taken by default: 'state_dict' is their moving average" in said
    assert "ema=True" not in said
    trained = trained_weights(content)
    assert trained is not None
    assert trained.keys() == {"weight"}
    assert trained["weight"] == read_weights(file, "ema_state_dict")["weight"] == 1
    assert trained_weights({"state_dict": {}, "ema_state_dict": {"weight": torch.ones(1)}}) is None  # another program's


def test_the_only_set_of_weights_is_taken_wherever_it_is(tmp_path: Path) -> None:
    content = {"epoch": 3, "averaged": {"weights": {"a": torch.ones(1)}}, "optimizer": {"state": {0: {"m": torch.ones(1)}}}}
    assert set(read_weights(save(tmp_path / "w.pth", content))) == {"a"}
    content["second"] = {"b": torch.ones(1)}
    with refused(WeightsError, "several-sets-of-weights", "2", "averaged.weights", "second"):
        read_weights(save(tmp_path / "w.pth", content))
    assert set(read_weights(tmp_path / "w.pth", "second")) == {"b"}


def test_entries_that_are_not_finite_are_named_when_they_are_loaded() -> None:
    net, state = _net(), {key: value.clone() for key, value in _net().state_dict().items()}
    before = {key: value.clone() for key, value in net.state_dict().items()}
    state["0.weight"][0, 0] = float("nan")
    state["1.running_var"][1] = float("inf")
    with refused(WeightsError, "weights-not-finite", "w.pth", "2", "0.weight", "1.running_var"):
        load_strict(net, state, source="w.pth")
    assert all(torch.equal(value, before[key]) for key, value in net.state_dict().items())
    load_strict(net, state, source="w.pth", finite=False)
    assert net[0].weight.isnan().any()


def test_what_is_left_out_may_hold_nan() -> None:
    """DINOv3's files have NaN in a mask that is no weight."""
    net = _net()
    load_strict(net, {**_net().state_dict(), "mask": torch.tensor(float("nan"))}, source="w", ignore_unexpected=("mask",))


def test_a_model_in_several_files_is_read_from_its_index(tmp_path: Path) -> None:
    state = _net().state_dict()
    names = list(state)
    parts = {"m-00001-of-00002.safetensors": names[:3], "m-00002-of-00002.safetensors": names[3:]}
    for part, keys in parts.items():
        save_file({key: state[key] for key in keys}, tmp_path / part)
    index = tmp_path / "m.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {key: part for part, keys in parts.items() for key in keys}}))
    found = read_weights(index)
    assert all(torch.equal(found[key], state[key]) for key in state)
    with refused(WeightsError, "weight-file-is-a-folder", index):
        read_weights(tmp_path)
    assert part_of_several(str(tmp_path / "m-00001-of-00002.safetensors")).startswith(
        "this is part 1 of 2; give the index file"
    )
    assert part_of_several(str(index)) is None
    alone = rf"m-00001-of-00002\.safetensors holds a part of a model only: this is part 1 of 2; give .*: {index}$"
    with pytest.raises(WeightsError, match=alone):
        read_weights(tmp_path / "m-00001-of-00002.safetensors")
    of_another = {key: part for key, part in json.loads(index.read_text())["weight_map"].items()}
    index.write_text(json.dumps({"weight_map": {**of_another, "blocks.9.x": "m-00001-of-00002.safetensors"}}))
    with pytest.raises(WeightsError, match=r"names 1 weights that are in none of its 2 files, e\.g\. blocks\.9\.x"):
        read_weights(index)
    (tmp_path / "m-00002-of-00002.safetensors").unlink()
    with refused(FileNotFoundError, "weight-file-missing", "m-00002-of-00002"):
        read_weights(index)
    index.write_text("{}")
    with refused(WeightsError, "weight-index-damaged"):
        read_weights(index)


def test_a_folder_s_only_file_is_named(tmp_path: Path) -> None:
    with refused(WeightsError, "weight-file-is-a-folder"):
        read_weights(tmp_path)
    save_file({"a": torch.ones(1)}, tmp_path / "model.safetensors")
    with refused(WeightsError, "weight-file-is-a-folder", tmp_path, "/model.safetensors"):
        read_weights(tmp_path)


@pytest.mark.parametrize("protocol", [2, 4])
def test_a_plain_pickle_is_refused_with_a_command_that_converts_it(tmp_path: Path, protocol: int) -> None:
    """As the models of detectron2 are."""
    file = tmp_path / "model.pkl"
    file.write_bytes(pickle.dumps({"model": {"a.b": np.arange(3.0, dtype=np.float32)}, "__author__": "x"}, protocol))
    with refused(WeightsError, "weight-file-is-a-pickle", "detectron2") as caught:
        read_weights(file)
    command = re.search(r'python -c "(.*)"$', str(caught.value))
    assert command is not None
    subprocess.run([sys.executable, "-c", command[1]], check=True)
    assert read_weights(tmp_path / "model.pth")["a.b"].tolist() == [0.0, 1.0, 2.0]


def test_an_old_file_of_torch_save_is_no_plain_pickle(tmp_path: Path) -> None:
    torch.save({"a": torch.ones(1)}, tmp_path / "w.pth", _use_new_zipfile_serialization=False)
    assert set(read_weights(tmp_path / "w.pth")) == {"a"}
    whole = (tmp_path / "w.pth").read_bytes()
    (tmp_path / "w.pth").write_bytes(whole[:-2])
    with refused(WeightsError, "weight-file-damaged"):
        read_weights(tmp_path / "w.pth")
