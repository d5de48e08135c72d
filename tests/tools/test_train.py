"""hgkd train from config to checkpoint, with tiny networks and generated images."""

import json
import os
import re
import subprocess
import sys

import pytest
import torch
from mmengine.config import Config
from refusals import refused
from tiny_runs import HGKD, ROOT, SPARK, load_tool, same, tiny, tiny_hgkd, write_images

from hgkd.api import train as train_tool
from hgkd.cli import train as train_command
from hgkd.errors import WeightsError
from hgkd.registry import build_runner
from hgkd.weights.files import read_checkpoint


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # recipes keep teacher features in work_dirs/


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return write_images(tmp_path_factory.mktemp("images"))


@pytest.fixture(scope="module")
def spark_run(images, tmp_path_factory):
    """Two epochs of the pixel control without interruption."""
    work_dir = tmp_path_factory.mktemp("spark")
    return train_tool.train(SPARK, work_dir, options=tiny(images)), work_dir


def test_run_leaves_checkpoints_logs_and_pictures(spark_run):
    runner, work_dir = spark_run
    assert runner.epoch == 2
    assert runner.iter == 4
    assert (work_dir / "epoch_2.pth").is_file()
    assert (work_dir / "checkpoints.txt").read_text().split() == ["epoch_2.pth", "epoch_1.pth"]
    assert len(list(work_dir.glob("best_knn_top1_epoch_*.pth"))) == 1
    assert not list(work_dir.glob("*.partial"))
    assert (work_dir / "pictures/epoch_2.png").is_file()
    assert list(work_dir.glob("*/vis_data/events.out.tfevents*"))
    lines = [json.loads(line) for line in next(iter(work_dir.glob("*/vis_data/scalars.json"))).read_text().splitlines()]
    steps = [line for line in lines if "loss" in line]
    assert {"loss", "pixels_reconstruction_loss", "images_per_s", "grad_norm", "lr"} <= set(steps[0])
    assert len(steps) == 4
    validations = [line for line in lines if "knn/top1" in line]
    assert {"health/feature_std", "health/effective_rank"} <= set(validations[0])
    assert len(validations) == 2


def test_paths_from_python_are_pathlibs_or_begin_with_a_tilde(images, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    options = tiny(images) | {"data_root": images, "train_dataloader.dataset": {"list_file": images / "list.txt"}}
    options["visualizer.vis_backends"] = [{"type": "LocalVisBackend", "save_dir": images}]
    cfg = train_tool.load_config(SPARK, "~/mine", options=options)
    assert cfg.work_dir == str(tmp_path / "home/mine")
    assert cfg.train_dataloader.dataset.data_root == str(images)
    assert cfg.train_dataloader.dataset.list_file == str(images / "list.txt")
    assert cfg.visualizer.vis_backends[0].save_dir == str(images)
    assert Config.fromstring(cfg.pretty_text, ".py").data_root == str(images)


def test_checkpoint_says_what_it_holds(spark_run):
    checkpoint = read_checkpoint(spark_run[1] / "epoch_2.pth")
    assert checkpoint["meta"]["hgkd"] == {"encoder": {"name": "test_resnet", "stem": "default", "kwargs": {}}, "format": 1}
    assert all(key.startswith(("student.", "objectives.")) for key in checkpoint["state_dict"])


def test_checkpoint_of_another_student_is_refused_before_anything_changes(spark_run, images, tmp_path):
    cfg = train_tool.load_config(
        SPARK, tmp_path, resume=spark_run[1] / "epoch_2.pth", options=tiny(images, student="resnet10t")
    )
    runner = build_runner(cfg)
    before = {k: v.clone() for k, v in runner.model.state_dict().items()}
    with refused(WeightsError, "checkpoint-of-another-model", "test_resnet", "resnet10t"):
        runner.train()
    assert same(before, dict(runner.model.state_dict()))
    assert runner.iter == 0


def test_hgkd_trains_and_keeps_its_teacher_out_of_the_checkpoint(images, tmp_path):
    options = tiny_hgkd(images, epochs=1, warmup_epochs=0, val_train_root=None, val_test_root=None)
    runner = train_tool.train(HGKD, tmp_path, options=options)
    assert runner.iter == 2
    assert runner.model.teacher is not None
    state = read_checkpoint(tmp_path / "epoch_1.pth")["state_dict"]
    assert not [key for key in state if "teacher" in key]
    assert (tmp_path / "pictures/epoch_1.png").is_file()


@pytest.mark.parametrize(
    "teacher",
    [
        {"teacher": "vit_small_patch16_dinov3", "model.teacher.embed_dim": 32, "model.teacher.num_heads": 2},
        {
            "teacher": "convnext_tiny.dinov3_lvd1689m",
            "model.teacher.depths": (1, 1, 1, 1),
            "model.teacher.dims": (8, 8, 16, 16),
            "model.teacher.level": 2,
            "model.objectives.hgkd.block": -1,
            "model.objectives.pooled.block": -1,
        },
    ],
    ids=lambda teacher: teacher["teacher"],
)
def test_a_teacher_of_dinov3_trains_a_student(teacher, images, tmp_path):
    options = tiny_hgkd(images, epochs=1, warmup_epochs=0, val_train_root=None, val_test_root=None)
    options = {key: value for key, value in options.items() if not key.startswith(("teacher", "model.teacher"))}
    options |= {"teacher_features": None, "model.teacher.allow_random": True, **teacher}
    given = [f"{key}={value}" for key, value in options.items()]
    assert train_command.main([str(HGKD), "--work-dir", str(tmp_path), "--cfg-options", *given]) == 0
    checkpoint = read_checkpoint(tmp_path / "epoch_1.pth")
    assert checkpoint["meta"]["iter"] == 2
    assert not [key for key in checkpoint["state_dict"] if "teacher" in key]


def test_mae_pretraining_makes_the_teacher_of_the_shapes_recipe(images, tmp_path):
    common = {"data_root": str(images), "val_train_root": str(images), "val_test_root": str(images)}
    common |= {"image_size": 64, "batch_size": 8, "workers": 0, "epochs": 1, "warmup_epochs": 0}
    mae = train_tool.train(ROOT / "configs/mae/mae_tiny_shapes.py", tmp_path / "mae", options={**common, "model.arch.depth": 4})
    assert mae.iter == 2
    options = tiny(images, **common, teacher_checkpoint=str(tmp_path / "mae/epoch_1.pth"))
    with refused(WeightsError, "teacher-looks-random"):  # after two steps it is
        train_tool.train(ROOT / "configs/hgkd/hgkd_mae-tiny_resnet18_shapes.py", tmp_path / "refused", options=options)
    options["model.teacher.allow_random"] = True
    runner = train_tool.train(ROOT / "configs/hgkd/hgkd_mae-tiny_resnet18_shapes.py", tmp_path / "hgkd", options=options)
    assert runner.model.teacher.info.depth == 4
    expected = {name: value for name, value in mae.model.network.state_dict().items() if name.startswith("blocks.")}
    assert same(expected, {k: v for k, v in runner.model.teacher.network.state_dict().items() if k.startswith("blocks.")})


def test_mixed_precision_trains(images, tmp_path):
    options = tiny_hgkd(images, epochs=1, warmup_epochs=0, val_train_root=None, val_test_root=None)
    runner = train_tool.train(HGKD, tmp_path, amp=True, options=options)
    assert type(runner.optim_wrapper).__name__ in ("BFloat16OptimWrapper", "AmpOptimWrapper")
    assert all(p.dtype == torch.float32 for p in runner.model.parameters())


def test_nothing_to_resume_starts_from_the_beginning(images, tmp_path):
    options = tiny(images, epochs=1, warmup_epochs=0, val_train_root=None, val_test_root=None)
    assert train_tool.train(SPARK, tmp_path, resume=True, options=options).iter == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["no_such_config.py"], "no_such_config.py"),
        ([str(SPARK), "--cfg-options", "data_rot=x"], "did you mean 'data_root'"),
        ([str(SPARK), "--cfg-options", "data_root=/no/such/folder"], "/no/such/folder does not exist"),
        ([str(SPARK), "--cfg-options", "student=resnet81", "data_root=IMAGES"], "unknown .*resnet81"),
        ([str(SPARK), "--cfg-options", "image_size=70", "data_root=IMAGES"], "nearest sizes that are: 64 x 64 or 96 x 96"),
        ([str(SPARK), "--resume", "no.pth"], "checkpoint to resume from does not exist: no.pth"),
        ([str(HGKD), "--cfg-options", "teacher=test_vit", "data_root=IMAGES"], "checkpoint"),
        ([str(SPARK), "--cfg-options", "batch_size=64", "data_root=IMAGES"], "16 images do not fill one batch of 64"),
    ],
)
def test_user_errors_are_one_message_and_exit_code_2(arguments, message, images, tmp_path, capsys):
    arguments = [a.replace("IMAGES", str(images)) for a in arguments]
    if "--cfg-options" in arguments:
        arguments += ["val_train_root=None", "val_test_root=None", "workers=0"]
    assert train_command.main([*arguments, "--work-dir", str(tmp_path)]) == 2
    printed = capsys.readouterr().err
    assert "Traceback" not in printed
    assert re.search(message, printed), printed


def test_dry_run_says_what_a_training_needs_and_writes_nothing(images, tmp_path, capsys):
    options = [f"{k}={v}" for k, v in tiny_hgkd(images).items()]
    assert train_command.main([str(HGKD), "--dry-run", "--work-dir", str(tmp_path / "run"), "--cfg-options", *options]) == 0
    printed = capsys.readouterr().out
    for line in (
        r"plan +16 images; 8 a step and process x 1 processes x 1 accumulated = 8 an update; "
        r"lr 0\.00025 \(0\.002 x 8/64 by the batch\);",
        r"batch +inputs \(8, 3, 64, 64\) uint8, index \(8,\) int64",
        r"student +test_resnet: \d+\.\d\d M parameters in the encoder, mask grid 2 x 2, features .* at stride 32",
        r"teacher +\d+\.\d\d M parameters, TeacherInfo\(kind='timm', width=32, depth=2",
        r"losses +loss \d",
        r"finite +yes",
        r"a step +\d+\.\d\d s to compute \(measured with 8 images\)",
        r"whole run +about \d+ s for 4 steps",
        r"checkpoints +\d+ MB each, up to 4 at a time; \d+ MB free",
    ):
        assert re.search(line, printed), line
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("tool", ["train", "test"])
def test_help_tells_short_options_examples_and_exit_codes(tool, capsys):
    from hgkd.config import SHORT_OPTIONS
    from hgkd.openmmlab.config import SHORT_OPTIONS as DOWNSTREAM

    with pytest.raises(SystemExit) as ended:
        load_tool(tool).main(["--help"])
    assert ended.value.code == 0
    printed = capsys.readouterr().out
    for name, text in [(name, option.help) for name, option in SHORT_OPTIONS.items()] + list(DOWNSTREAM.items()):
        assert re.search(rf"^  {name} +{re.escape(text)}$", printed, re.MULTILINE), name
    examples = re.findall(r"hgkd (?:train|test) (\S+\.py)", printed)
    assert len(examples) >= 2
    assert all((ROOT / example).is_file() for example in examples)
    assert re.findall(r"^  (\d)  ", printed, re.MULTILINE) == ["0", "1", "2"]


def test_debug_shows_the_traceback(tmp_path):
    with refused(ValueError, "config-key-unknown", "data_root"):
        train_command.main([str(SPARK), "--debug", "--work-dir", str(tmp_path), "--cfg-options", "data_rot=x"])


@pytest.mark.slow
def test_two_processes_without_cuda(images, tmp_path):
    options = tiny_hgkd(images, epochs=1, warmup_epochs=0, batch_size=4)
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--master_port=29617"]
    command += [str(ROOT / "tools/train.py"), str(HGKD), "--launcher", "pytorch", "--work-dir", str(tmp_path)]
    command += ["--cfg-options", *[f"{k}={v}" for k, v in options.items()]]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, env=env, cwd=tmp_path, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert (tmp_path / "epoch_1.pth").is_file()
