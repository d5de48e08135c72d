"""Files from elsewhere run no code, and nothing goes to the network."""

import json
import os
import pickle
import re
import socket
from pathlib import Path

import pytest
import torch
import yaml
from refusals import refused
from tiny_runs import SPARK, load_tool, tiny, write_images

from hgkd.api import train as train_tool
from hgkd.cli import train as train_command
from hgkd.config import read_config
from hgkd.registry import build_runner


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return write_images(tmp_path_factory.mktemp("images"))


class Payload:
    """What a pickle of it would do when it is loaded: leave a file."""

    def __init__(self, marker):
        self.marker = str(marker)

    def __reduce__(self):
        return os.mkdir, (self.marker,)


def evil_files(tmp_path, marker):
    torch.save({"meta": {}, "state_dict": {}, "message_hub": Payload(marker)}, tmp_path / "zip.pth")
    torch.save({"state_dict": Payload(marker)}, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    (tmp_path / "bare.pth").write_bytes(pickle.dumps(Payload(marker)))
    foreign = r"holds more than tensors and plain data, namely posix\.mkdir, .* could run foreign code"
    return {"zip.pth": foreign, "old.pth": foreign, "bare.pth": "is not what torch.save writes"}


def test_the_payload_would_run(tmp_path):
    pickle.loads(pickle.dumps(Payload(tmp_path / "marker")))
    assert (tmp_path / "marker").exists()


@pytest.mark.parametrize("use", ["resume", "teacher"])
def test_malicious_pickles_are_refused_and_do_nothing(images, tmp_path, use, capsys):
    marker = tmp_path / "marker"
    for name, reason in evil_files(tmp_path, marker).items():
        options = [f"{k}={v}" for k, v in tiny(images).items()]
        arguments = [str(SPARK), "--resume", name]
        if use == "teacher":
            arguments = [str(SPARK.parents[1] / "hgkd/hgkd_vit-s14_resnet18_10e_cifar128.py")]
            options += ["teacher=vit_tiny_patch16_224", f"teacher_checkpoint={name}"]
        assert train_command.main([*arguments, "--work-dir", "run", "--cfg-options", *options]) == 2
        assert re.search(f"error: {name} .*{reason}", capsys.readouterr().err)
        assert not marker.exists()


@pytest.mark.parametrize("suffix", ["yaml", "json"])
def test_a_config_of_plain_data_is_the_config_in_python(images, tmp_path, suffix):
    python = train_tool.load_config(SPARK, "run", options=tiny(images))
    plain = json.loads(json.dumps(read_config(SPARK).to_dict()))
    path = tmp_path / f"recipe.{suffix}"
    path.write_text(json.dumps(plain) if suffix == "json" else yaml.safe_dump(plain))
    data = train_tool.load_config(path, "run", options=tiny(images))
    assert json.dumps(data.to_dict(), sort_keys=True) == json.dumps(python.to_dict(), sort_keys=True)
    build_runner(data)


@pytest.mark.parametrize(
    ("name", "text", "refusal"),
    [
        ("x.yaml", "a: !!python/object/apply:os.mkdir [marker]", ("config-not-readable", "yaml")),
        ("x.yml", "model: {type: os.mkdir, path: marker}", ("plain-config-import-path", "type='os.mkdir")),
        ("x.json", '{"model": {"type": "subprocess.Popen", "args": ["mkdir", "marker"]}}', ("plain-config-import-path",)),
        ("x.json", '{"custom_hooks": [{"type": "hgkd.training.hooks.alarms.os.mkdir"}]}', ("plain-config-import-path",)),
        ("x.json", '{"optim_wrapper": {"constructor": "os.mkdir"}}', ("plain-config-import-path", "constructor='os.mkdir")),
        ("x.json", '{"model": {"type": ["os"]}}', ("plain-config-import-path",)),
        ("x.json", '{"_base_": "evil.py"}', ("plain-config-runs-code", "_base_")),
        ("x.json", '{"model": {"_scope_": "evil"}}', ("plain-config-runs-code", "_scope_")),
        ("x.json", '{"custom_imports": {"imports": ["evil"]}}', ("plain-config-runs-code", "custom_imports")),
        ("x.json", "[1]", ("config-not-a-mapping", "list")),
        ("x.json", "{", ("config-not-readable", "json")),
        ("x.toml", "", ("config-suffix",)),
    ],
)
def test_a_config_of_plain_data_runs_nothing(tmp_path, name, text, refusal):
    (tmp_path / name).write_text(text)
    (tmp_path / "evil.py").write_text("import os; os.mkdir('marker')")
    with refused(ValueError, *refusal):
        read_config(name)
    assert not Path("marker").exists()


def test_a_dump_from_elsewhere_runs_nothing(tmp_path, capsys):
    dump = {"seed": 0, "rank": 0, "max_iters": 1, "steps": [], "checkpoint": "x.pth"}
    dump["config"] = {"model": {"type": "os.mkdir", "path": "marker"}}
    (tmp_path / "dump.json").write_text(json.dumps(dump))
    assert load_tool("replay").main(["dump.json"]) == 2
    assert "is no name of a registry" in capsys.readouterr().err
    assert not Path("marker").exists()


def test_a_training_asks_the_network_for_nothing(images, monkeypatch):
    asked = []

    def refuse(*arguments, **options):
        asked.append(arguments)
        raise OSError("no network in this test")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    with pytest.raises(OSError, match="no network"):
        socket.create_connection(("example.com", 80))
    asked.clear()
    train_tool.train(SPARK, "run", options=tiny(images, epochs=1, warmup_epochs=0))
    assert not asked
