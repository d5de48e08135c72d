"""Weights & Biases and MLflow: one run a training, whatever its library is. A stand-in for wandb shows ids and messages
everywhere; the libraries themselves are used where they are installed."""

import json
import struct
import sys
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
from downstream_runs import SEGMENTOR, need, shapes_ade20k, tiny_segmentor
from refusals import refused
from tiny_runs import HGKD, ROOT, load_tool, tiny_hgkd, write_images

from hgkd.api.train import load_config, train
from hgkd.diagnosis.dry_run import dry_run
from hgkd.training.trackers import ID_FILE, check_tracker

CLASSIFIER = ROOT / "downstream/classification/resnet18_10e_cifar128.py"


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return write_images(tmp_path_factory.mktemp("images"))


@pytest.fixture(autouse=True)
def _environment(monkeypatch):
    for name in ("WANDB_MODE", "WANDB_PROJECT", "WANDB_NAME", "WANDB_API_KEY", "MLFLOW_TRACKING_URI", "MLFLOW_EXPERIMENT_NAME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")  # taken back after the test


class FakeRun:
    """What wandb.init gives, as far as hgkd asks."""

    def __init__(self, options):
        self.id = options.get("id", f"new{len(FakeRun.all)}")
        self.options, self.logged, self.held, self.exit_code = options, [], {}, None
        self.url, self.dir = None, options["dir"]
        self.config = SimpleNamespace(update=lambda values, allow_val_change: self.held.update(values))
        self.define_metric = lambda *names, **how: None
        FakeRun.all.append(self)

    def log(self, values):
        if FakeRun.refuse and "loss" in values:
            raise OSError("no server")
        self.logged.append(values)

    def finish(self, exit_code):
        self.exit_code = exit_code


@pytest.fixture
def fake(monkeypatch):
    """A module ``wandb`` that notes what it is given."""
    module = ModuleType("wandb")
    module.__spec__ = ModuleSpec("wandb", None, origin="a stand-in")
    module.Error = type("Error", (Exception,), {})
    module.Settings = lambda **values: values
    module.Image = lambda pixels: np.array(pixels)
    module.init = lambda **options: FakeRun(options)
    monkeypatch.setitem(sys.modules, "wandb", module)
    monkeypatch.setattr(FakeRun, "all", [], raising=False)
    monkeypatch.setattr(FakeRun, "refuse", False, raising=False)
    return module


def test_a_training_goes_on_in_its_run_with_every_term_score_and_picture(images, tmp_path, fake):
    options = tiny_hgkd(images, tracker="wandb", teacher_features=None)
    runner = train(HGKD, tmp_path / "run", options=options)
    assert any("Tensorboard" in type(backend).__name__ for backend in runner.visualizer._vis_backends.values())
    (first,) = FakeRun.all
    assert first.options["mode"] == "offline"
    assert first.options["dir"] == str(tmp_path / "run")
    assert first.exit_code == 0
    assert first.held["train_cfg"]["max_epochs"] == 2
    losses = {row["iter"]: row for row in first.logged if "loss" in row}
    assert list(losses) == [1, 2, 3, 4]
    terms = [name for name in runner.message_hub.log_scalars if name.startswith("train/") and name.endswith("_loss")]
    assert len(terms) == 2
    assert all(name.removeprefix("train/") in losses[4] for name in terms)
    assert [row["iter"] for row in first.logged if "knn/top1" in row] == [2, 4]
    pictures = [row for row in first.logged if "pictures" in row]
    assert [row["iter"] for row in pictures] == [4]  # at the end
    assert pictures[0]["pictures"].ndim == 3
    train(HGKD, tmp_path / "run", resume=True, options={**options, "epochs": 3})
    second = FakeRun.all[1]
    assert second.id == first.id == json.loads((tmp_path / "run" / ID_FILE).read_text())["id"]
    assert second.held["train_cfg"]["max_epochs"] == 3
    assert [row["iter"] for row in second.logged if "loss" in row] == [5, 6]
    # another work folder is another training
    train(HGKD, tmp_path / "other", resume=tmp_path / "run", options={**options, "epochs": 4})
    assert FakeRun.all[2].id != first.id


def test_a_tracker_that_fails_costs_its_records_alone(images, tmp_path, fake, monkeypatch):
    monkeypatch.setattr(FakeRun, "refuse", True)
    runner = train(HGKD, tmp_path / "run", options=tiny_hgkd(images, tracker="wandb", epochs=1, warmup_epochs=0))
    assert runner.iter == 2
    log = "".join(file.read_text() for file in (tmp_path / "run").glob("*/*.log"))
    assert log.count("OSError: no server") == 1
    assert "tracker=wandb: 2 records were not taken" in log
    assert any("knn/top1" in row for row in FakeRun.all[0].logged)


def test_a_training_that_fails_is_a_failed_run(images, tmp_path, fake):
    options = tiny_hgkd(images, tracker="wandb", **{"optim_wrapper.optimizer.lr": 1e18})
    with pytest.raises(ValueError, match="the network has diverged"):
        train(HGKD, tmp_path, options=options)
    assert FakeRun.all[0].exit_code == 1


def test_a_dry_run_begins_no_run(images, tmp_path, fake):
    dry_run(load_config(HGKD, tmp_path, options=tiny_hgkd(images, tracker="wandb")))
    assert FakeRun.all == []


def test_what_a_library_says_at_the_start_is_told_before_a_step(images, tmp_path, fake, monkeypatch):
    def refuse(**options):
        assert options["mode"] == "online"
        raise fake.Error("No API key configured")

    monkeypatch.setenv("WANDB_MODE", "online")
    fake.init = refuse
    with refused(ValueError, "tracker-not-started", "No API key configured", "WANDB_MODE=online", "wandb login"):
        train(HGKD, tmp_path, options=tiny_hgkd(images, tracker="wandb"))
    assert not list(tmp_path.glob("*.pth"))


@pytest.mark.parametrize("name", ["wandb", "mlflow"])
def test_a_missing_library_is_told_before_training(images, tmp_path, monkeypatch, name, capsys):
    (tmp_path / "empty" / name).mkdir(parents=True)  # as wandb leaves one where a training was started
    monkeypatch.setattr(sys, "path", [str(tmp_path / "empty"), *(p for p in sys.path if not installs(p, name))])
    for module in [found for found in sys.modules if found.partition(".")[0] == name]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.chdir(tmp_path)
    with refused(ModuleNotFoundError, "tracker-not-installed", f"pip install 'hgkd[{name}]'"):
        train(HGKD, tmp_path / "run", options=tiny_hgkd(images, tracker=name))
    assert not (tmp_path / "run").exists()
    options = [f"{key}={value}" for key, value in tiny_hgkd(images, tracker=name).items()]
    command = [str(HGKD), "--work-dir", str(tmp_path / "run"), "--dry-run", "--cfg-options", *options]
    assert load_tool("train").main(command) == 2
    assert "tracker-not-installed" in capsys.readouterr().err


def installs(folder, name):
    return (Path(folder) / name / "__init__.py").is_file()


@pytest.mark.parametrize("name", ["tensorboard", "wanb", 3, ["wandb", "mlflow"]])
def test_other_names_are_refused(name):
    with refused(ValueError, "tracker-unknown", f"tracker={name!r}"):
        check_tracker(name)
    check_tracker(None)


# --- with the libraries themselves ---------------------------------------------------------------------------------------


@pytest.fixture
def mlflow(monkeypatch):
    pytest.importorskip("mlflow")
    from mlflow import MlflowClient

    def read(folder):
        """The only run of a folder's store."""
        client = MlflowClient(tracking_uri=(folder / "mlruns").as_uri())
        experiment = client.get_experiment_by_name("hgkd")
        (run,) = client.search_runs([experiment.experiment_id])
        steps = {name: [m.step for m in client.get_metric_history(run.info.run_id, name)] for name in run.data.metrics}
        return run, steps, client

    return read


def test_mlflow_has_one_run_of_a_training_that_was_resumed(images, tmp_path, mlflow):
    options = tiny_hgkd(images, tracker="mlflow", teacher_features=None)
    train(HGKD, tmp_path, options=options)
    before, _, _ = mlflow(tmp_path)
    assert before.info.status == "FINISHED"
    train(HGKD, tmp_path, resume=True, options={**options, "epochs": 3, "lr": 1e-5})
    run, steps, client = mlflow(tmp_path)
    assert run.info.run_id == before.info.run_id == json.loads((tmp_path / ID_FILE).read_text())["id"]
    assert steps["loss"] == steps["hgkd_distill_loss"] == [1, 2, 3, 4, 5, 6]
    assert steps["knn/top1"] == [2, 4, 4, 6]  # a resumed run validates first
    assert run.data.params["train_cfg.max_epochs"] == "2"  # MLflow keeps the first value
    text = (tmp_path / "mlruns" / run.info.experiment_id / run.info.run_id / "artifacts/config.py").read_text()
    assert "max_epochs=3" in text
    assert [file.path for file in client.list_artifacts(run.info.run_id, "pictures")] == [
        f"pictures/step_{done}.png" for done in (4, 6)
    ]
    # a run of a store that is not this one is not gone on in
    (tmp_path / ID_FILE).write_text(json.dumps({"tracker": "mlflow", "id": "0" * 32}))
    train(HGKD, tmp_path, resume=True, options={**options, "epochs": 4})
    assert json.loads((tmp_path / ID_FILE).read_text())["id"] not in ("0" * 32, run.info.run_id)


def test_mlflow_follows_a_classifier(images, tmp_path, mlflow):
    options = {"data_root": str(images), "val_root": str(images), "num_classes": 2, "image_size": 64, "student": "test_resnet"}
    options |= {"batch_size": 8, "workers": 0, "epochs": 1, "warmup_epochs": 0, "default_hooks.logger.interval": 1}
    train(CLASSIFIER, tmp_path, options={**options, "tracker": "mlflow", "backbone": None})
    run, steps, _ = mlflow(tmp_path)
    assert steps["loss"] == [1, 2]
    assert any("top1" in name for name in steps)
    assert run.data.params["model.num_classes"] == "2"


def test_mlflow_follows_a_segmentor(tmp_path, mlflow):
    need("mmseg")
    root = shapes_ade20k(tmp_path / "data")
    train(SEGMENTOR, tmp_path / "run", options=tiny_segmentor(root, tracker="mlflow", workers=0))
    _, steps, _ = mlflow(tmp_path / "run")
    assert steps["decode.loss_ce"] == [1, 2]
    assert steps["mIoU"] == [2]


def records(file):
    """Records of W&B's offline file, which is a log of LevelDB: 7 bytes of heading, blocks of 32 KiB."""
    from wandb.proto.wandb_internal_pb2 import Record

    content, place, parts = file.read_bytes(), 7, b""
    while place + 7 <= len(content):
        if 32768 - place % 32768 < 7:
            place += 32768 - place % 32768
            continue
        _, length, kind = struct.unpack("<IHB", content[place : place + 7])
        parts += content[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # whole, or the last part
            record = Record()
            record.ParseFromString(parts)
            yield record
            parts = b""


def test_wandb_records_offline_into_one_run(images, tmp_path):
    pytest.importorskip("wandb")
    options = tiny_hgkd(images, tracker="wandb", teacher_features=None)
    train(HGKD, tmp_path, options=options)
    train(HGKD, tmp_path, resume=True, options={**options, "epochs": 3})
    files = sorted(tmp_path.glob("wandb/offline-run-*/run-*.wandb"))
    number = json.loads((tmp_path / ID_FILE).read_text())["id"]
    assert [file.name for file in files] == [f"run-{number}.wandb"] * 2
    steps = {"hgkd_distill_loss": [], "knn/top1": [], "pictures": []}
    ends = []
    for file in files:
        for record in records(file):
            row = {"/".join(item.nested_key) or item.key: item.value_json for item in record.history.item}
            for name, found in steps.items():
                if any(key == name or key.startswith(f"{name}/") for key in row):
                    found.append(int(float(row["iter"])))
            ends += [record.exit.exit_code] if record.WhichOneof("record_type") == "exit" else []
    assert steps == {"hgkd_distill_loss": [1, 2, 3, 4, 5, 6], "knn/top1": [2, 4, 4, 6], "pictures": [4, 6]}
    assert ends == [0, 0]


def test_wandb_online_without_a_login_ends_at_once(images, tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "online")
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    with refused(ValueError, "tracker-not-started", "WANDB_MODE=online"):
        train(HGKD, tmp_path / "run", options=tiny_hgkd(images, tracker="wandb"))
