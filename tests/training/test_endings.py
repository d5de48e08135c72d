"""Trainings that cannot go on, or must not count as trained: one sentence, the right exit code, and nothing lost."""

import errno
import multiprocessing
import os
import signal
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import timm
import torch
from mmengine.hooks import Hook
from mmengine.logging import MessageHub
from mmengine.optim import build_optim_wrapper
from refusals import refused
from tiny_runs import HGKD as HGKD_RECIPE
from tiny_runs import SPARK, load_tool, tiny, tiny_hgkd, write_images
from torch import nn

from hgkd.api import train as train_tool
from hgkd.cli import train as train_command
from hgkd.errors import DivergedError, StoppedError, configured
from hgkd.export.folder import new_folder
from hgkd.registry import build_runner
from hgkd.training.checkpoint_hook import CheckpointWriteError, RunCheckpointHook
from hgkd.training.hooks.alarms import SteadyTimerHook
from hgkd.training.loop import told_signals
from hgkd.training.runner import DistillRunner, _later_than_any, _stamp
from hgkd.training.work_folder import release_folder
from hgkd.training.wrapping import plain_model
from hgkd.weights import find_last_checkpoint
from hgkd.weights.run_folder import tell_system_errors
from hgkd.writing import write_bytes

ALONE = {"val_train_root": None, "val_test_root": None}


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return write_images(tmp_path_factory.mktemp("images"))


def build(images, work_dir, *hooks, resume=False, recipe=SPARK, make=tiny, **options):
    options = make(images, **{"batch_size": 4, "default_hooks.checkpoint.every_minutes": None, **options})
    runner = build_runner(train_tool.load_config(recipe, work_dir, resume=resume, options=options))
    for hook in hooks:
        runner.register_hook(hook)
    return runner


def log_of(work_dir):
    return "".join(file.read_text() for file in sorted(Path(work_dir).glob("*/*.log")))


class At(Hook):
    """Does something at a point of a run."""

    priority = "VERY_HIGH"

    def __init__(self, point, do, when=lambda runner: True):
        setattr(self, point, lambda runner, **options: do(runner, **options) if when(runner) else None)


# updates that are left out


def spoil(runner, data_batch=None, **options):
    data_batch["inputs"] = torch.full(data_batch["inputs"].shape, float("nan"))


def test_a_training_without_a_single_update_is_a_failure_and_leaves_no_checkpoint(images, tmp_path):
    run = build(images, tmp_path / "run", At("before_train_iter", spoil), epochs=1, warmup_epochs=0, **ALONE)
    with refused(DivergedError, "nothing-trained", "4"):
        run.train()
    assert not list((tmp_path / "run").glob("*.pth"))
    assert "epoch_1.pth is not written: every update so far was left out" in log_of(tmp_path / "run")
    assert find_last_checkpoint(tmp_path / "run") is None


def test_one_update_makes_it_a_training(images, tmp_path):
    last = At("before_train_iter", spoil, when=lambda runner: runner.iter > 0)
    build(images, tmp_path / "run", last, epochs=1, warmup_epochs=0, **ALONE).train()
    assert (tmp_path / "run/epoch_1.pth").is_file()


def test_the_last_line_says_where_things_are(images, tmp_path):
    options = dict(epochs=1, warmup_epochs=0, **ALONE)
    build(images, tmp_path / "run", **options).train()
    last = log_of("run").splitlines()[-1]
    assert f"trained to the end; the weights are in {tmp_path / 'run/epoch_1.pth'}" in last
    assert last.endswith(f", pictures in {tmp_path / 'run/pictures'}") == (tmp_path / "run/pictures").is_dir()

    stop = At(
        "after_train_iter",
        lambda runner, **options: os.kill(os.getpid(), signal.SIGTERM),
        when=lambda runner: runner.iter == 0,  # a second one would end the tests
    )
    build(images, tmp_path / "stopped", stop, **options).train()
    assert "stopped by a signal (SIGTERM)" in log_of("stopped")
    assert "trained to the end" not in log_of("stopped")

    build(images, tmp_path / "unsaved", **{**options, "default_hooks.checkpoint": None}).train()
    assert "trained to the end; no checkpoint hook, so no weights were saved" in log_of("unsaved")


def test_a_teacher_that_is_not_finite_is_named_instead_of_the_students_settings(images, tmp_path):
    cfg = train_tool.load_config(HGKD_RECIPE, tmp_path / "run", options=tiny_hgkd(images, batch_size=4, **ALONE))
    cfg.custom_hooks = [dict(type="FiniteLossHook", patience=1)]
    run = build_runner(cfg)
    before = {}

    def break_teacher(runner, **options):  # not at once: the first images are looked at by the teacher itself
        with torch.no_grad():
            next(iter(plain_model(run).teacher.parameters())).fill_(float("nan"))
        before.update({name: value.clone() for name, value in plain_model(run).state_dict().items()})

    run.register_hook(At("before_train_iter", break_teacher, when=lambda runner: runner.iter == 1))
    with pytest.raises(DivergedError) as caught:
        run.train()
    assert "what the teacher says (the target) is not finite" in str(caught.value)
    assert "model.teacher.dtype" in str(caught.value)
    assert "Lower lr" not in str(caught.value)
    # what was found out has changed nothing
    after = plain_model(run).state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before if before[name].is_floating_point())


def test_parameters_that_no_loss_reaches_are_said(images, tmp_path):
    run = build(images, tmp_path / "run", epochs=1, warmup_epochs=0, **ALONE)
    plain_model(run).spare = torch.nn.Parameter(torch.zeros(3))
    run.train()
    assert "1 parameters got no gradient and are not trained, because no loss depends on them: spare. Leave out" in log_of(
        "run"
    )


# what the system does


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS, errno.EACCES, errno.EDQUOT, errno.EIO])
def test_errors_of_the_system_are_one_sentence(tmp_path, number):
    message = rf"refuses .*x.json: {os.strerror(number)}; \d+ MB are free .* continue with --resume"
    with pytest.raises(StoppedError, match=message), tell_system_errors(tmp_path / "not/there"):
        raise OSError(number, os.strerror(number), str(tmp_path / "x.json"))


def test_errors_of_other_kinds_go_on_as_they_are(tmp_path):
    for kind in (FileNotFoundError, FileExistsError, ConnectionError, EOFError, RuntimeError):
        with pytest.raises(kind), tell_system_errors(tmp_path):
            raise kind("Caught RuntimeError in DataLoader worker process 0")


def test_a_work_folder_that_cannot_be_made(images, tmp_path, capsys):
    (tmp_path / "file").touch()
    options = [f"{key}={value}" for key, value in tiny(images).items()]
    assert train_command.main([str(SPARK), "--work-dir", str(tmp_path / "file/below"), "--cfg-options", *options]) == 2
    error = capsys.readouterr().err
    assert "the system refuses" in error
    assert "Not a directory" in error
    assert "Traceback" not in error


def test_logs_that_cannot_be_written_end_the_run_and_the_checkpoint_before_is_whole(images, tmp_path):
    resource = pytest.importorskip("resource")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)

    def fill(runner, **options):  # nothing can be appended to a file from now on: a real error of the system
        resource.setrlimit(resource.RLIMIT_FSIZE, (100, limits[1]))

    run = build(images, tmp_path / "run", At("after_train_iter", fill, lambda runner: runner.iter == 5), **ALONE)
    try:
        with refused(StoppedError, "system-refuses", "--resume"):
            run.train()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert find_last_checkpoint(tmp_path / "run") == str(tmp_path / "run/epoch_1.pth")
    again = build(images, tmp_path / "run", resume=True, **ALONE)
    again.train()
    assert again.iter == 8


def test_a_file_that_cannot_be_written_leaves_nothing_half_done(tmp_path, monkeypatch):
    (tmp_path / "student.pth").write_bytes(b"before")

    def full(self, content):
        with open(self, "wb") as file:
            file.write(content[:3])
        raise OSError(errno.ENOSPC, "No space left on device", str(self))

    monkeypatch.setattr("hgkd.writing.Path.write_bytes", full)
    with pytest.raises(OSError, match="No space left"):
        write_bytes(tmp_path / "student.pth", b"after")
    assert [path.name for path in tmp_path.iterdir()] == ["student.pth"]
    assert (tmp_path / "student.pth").read_bytes() == b"before"


def test_the_log_names_files_whose_names_are_no_utf8(images, tmp_path):
    build(images, tmp_path).logger.info(f"{os.fsdecode(bytes([233]))}.png cannot be read")
    assert "\\udce9.png cannot be read" in log_of(tmp_path)


def best(tmp_path, scores, full=(), **info):
    """The hook's best checkpoint after validations with these scores; the disk is full at some of them.

    ``info``: what the hub of a resumed run knows.
    """
    hook = RunCheckpointHook(save_best="top1", rule="greater")
    hub = SimpleNamespace(runtime_info=info, update_info=info.__setitem__, get_info=info.__getitem__)
    run = SimpleNamespace(work_dir=str(tmp_path), message_hub=hub, iter=0, epoch=0, logger=SimpleNamespace(info=print))

    def save(folder, filename, *args, **options):
        if run.epoch in full:
            raise CheckpointWriteError("full")
        (Path(folder) / filename).touch()

    run.save_checkpoint = save
    hook.before_train(run)
    for run.epoch, score in enumerate(scores, start=1):
        try:
            hook._save_best_checkpoint(run, {"top1": score})
        except CheckpointWriteError:
            break
    return sorted(path.name for path in tmp_path.glob("best*")), info.get("best_score")


def test_the_best_checkpoint_goes_only_when_a_better_one_is_there(tmp_path):
    assert best(tmp_path, [1.0, 3.0, 2.0]) == (["best_top1_epoch_2.pth"], 3.0)


def test_a_run_that_goes_on_in_another_folder_leaves_the_best_checkpoint_of_the_first(tmp_path):
    first, second = tmp_path / "first", tmp_path / "second"
    for folder in (first, second):
        folder.mkdir()
    (first / "best_top1_epoch_1.pth").touch()
    runner = DistillRunner.__new__(DistillRunner)
    runner._work_dir, runner.message_hub = str(second), MessageHub("goes_on_elsewhere")
    runner.message_hub.update_info_dict({"best_ckpt": str(first / "best_top1_epoch_1.pth"), "best_score": 2.0})
    runner._take_best_checkpoints()
    assert best(second, [1.0, 3.0], **runner.message_hub.runtime_info) == (["best_top1_epoch_2.pth"], 3.0)
    assert (first / "best_top1_epoch_1.pth").is_file()


def test_a_full_disk_leaves_the_best_checkpoint(tmp_path):
    assert best(tmp_path, [1.0, 3.0], full=[2])[0] == ["best_top1_epoch_1.pth"]


@pytest.mark.parametrize("score", [float("nan"), float("inf")])
def test_a_score_that_is_not_finite_is_never_the_best(tmp_path, score):
    assert best(tmp_path, [score, 1.0, score]) == (["best_top1_epoch_2.pth"], 1.0)


def kill_readers(runner, **options):
    for reader in multiprocessing.active_children():
        os.kill(reader.pid, signal.SIGKILL)


def test_a_reading_process_that_is_killed_in_a_validation(images, tmp_path):
    options = {"val_dataloader.batch_size": 1, "workers": 1}
    run = build(images, tmp_path / "run", At("before_val_iter", kill_readers), **options)
    with refused(StoppedError, "reading-process-killed", "--resume"):
        run.train()
    assert find_last_checkpoint(tmp_path / "run") == str(tmp_path / "run/epoch_1.pth")


def test_a_clock_that_is_set_back(images, tmp_path, monkeypatch):
    build(images, tmp_path / "run", epochs=1, warmup_epochs=0, **ALONE).train()
    real = time.time
    monkeypatch.setattr("time.time", lambda: real() - 86_400)
    run = build(images, tmp_path / "run", resume=True, epochs=2, warmup_epochs=0, **ALONE)
    run.train()
    first, second = sorted(path.name for path in (tmp_path / "run").glob("2*_*"))
    assert run.timestamp == second  # whoever reads the logs takes the later run for the later one
    assert any(type(hook) is SteadyTimerHook for hook in run.hooks)
    assert first != second
    assert "those of this start are in force now: lr schedule" in log_of(tmp_path / "run")


def test_times_of_steps_do_not_depend_on_the_clock(monkeypatch):
    ticks = iter([0.0, 1.0, 3.0, 3.5, 7.0])
    monkeypatch.setattr("time.perf_counter", lambda: next(ticks))
    monkeypatch.setattr("time.time", lambda: pytest.fail("the clock may be set"))
    found = {}
    hub = SimpleNamespace(update_scalar=found.__setitem__, update_info=found.__setitem__)
    run, hook = SimpleNamespace(message_hub=hub, iter=0, max_iters=10), SteadyTimerHook()
    hook._before_epoch(run)
    for run.iter in range(2):
        hook._before_iter(run, run.iter)
        hook._after_iter(run, run.iter)
    assert found == {"train/data_time": 0.5, "train/time": 4.0, "eta": 8 * 3.5}


def test_names_of_logs_are_in_the_order_of_their_runs(tmp_path):
    now = 1_700_000_000.25
    assert _later_than_any(str(tmp_path), now) == now
    (tmp_path / _stamp(now + 5)).mkdir()
    (tmp_path / "99999999_999999_999").mkdir()
    assert _later_than_any(str(tmp_path), now) == now  # no time
    (tmp_path / "99999999_999999_999").rmdir()
    assert _stamp(now + 5) < _stamp(_later_than_any(str(tmp_path), now)) < _stamp(now + 6)


def test_lines_about_which_nobody_can_do_anything_are_not_in_the_log(images, tmp_path):
    run = build(images, tmp_path / "log")
    shared = nn.Linear(2, 2)  # as the levels of RTMDet share their layers
    model = nn.ModuleList([shared, nn.Sequential(shared), nn.BatchNorm1d(2)])
    rates = dict(norm_decay_mult=0.0, bypass_duplicate=True)
    build_optim_wrapper(model, dict(optimizer=dict(type="SGD", lr=0.1, weight_decay=0.1), paramwise_cfg=rates))
    model[0].requires_grad_(False)
    build_optim_wrapper(
        model, dict(optimizer=dict(type="SGD", lr=0.1, weight_decay=0.1), paramwise_cfg=dict(norm_decay_mult=0.0))
    )
    text = log_of(tmp_path / "log")
    assert "paramwise_options" not in text
    assert "bypass_duplicate" not in text
    assert "0.weight is skipped since its requires_grad=False" in text
    release_folder(run.work_dir)


# signals, phase by phase; in the steps: test_resume.py


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_while_the_run_is_built(monkeypatch, capsys, number):
    before = signal.getsignal(number)
    monkeypatch.setattr(train_command, "train", lambda *arguments: os.kill(os.getpid(), number))
    with pytest.raises(SystemExit) as caught:
        train_command.main(["x.py"])
    assert caught.value.code == 128 + number
    error = capsys.readouterr().err
    assert error.startswith(f"stopped by {number.name} outside of the training steps")
    assert error.count("\n") == 1
    assert signal.getsignal(number) is before


@pytest.mark.parametrize("command", ["test", "evaluate"])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_while_it_is_measured(monkeypatch, capsys, command, number):
    module, name = load_tool(command), {"test": "run_test", "evaluate": "evaluate"}[command]
    monkeypatch.setattr(module, name, lambda *given, **options: os.kill(os.getpid(), number))
    given = {"test": ["x.py", "x.pth"], "evaluate": ["knn", "--backbone", "a", "--train", "a", "--test", "b"]}[command]
    with pytest.raises(SystemExit) as caught:
        module.main(given)
    assert caught.value.code == 128 + number
    assert capsys.readouterr().err == f"stopped by {number.name}: no result is written\n"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_while_it_is_exported_leaves_no_hidden_folder(tmp_path, monkeypatch, capsys, number):
    module, out = load_tool("export"), tmp_path / "exported/detector"

    def export(checkpoint, out, **options):
        with new_folder(Path(out)) as work:
            (work / "model.onnx").write_bytes(b"half")
            os.kill(os.getpid(), number)

    monkeypatch.setattr(module, "export", export)
    with pytest.raises(SystemExit) as caught:
        module.main(["x.pth", "--out", str(out)])
    assert caught.value.code == 128 + number
    assert capsys.readouterr().err == f"stopped by {number.name}: no folder is written\n"
    assert not list(out.parent.iterdir())


def test_processes_that_read_images_leave_signals_to_the_program(capfd):
    with told_signals():
        for number, code in ((signal.SIGINT, 0), (signal.SIGTERM, 143)):
            child = os.fork()
            if not child:
                os.kill(os.getpid(), number)
                os._exit(0)
            assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == code
    assert capfd.readouterr().err == ""


def test_signals_in_a_checkpoint_and_at_the_end_change_nothing_that_is_written(images, tmp_path, monkeypatch):
    def strike(runner, **options):
        os.kill(os.getpid(), signal.SIGTERM)

    run = build(images, tmp_path / "end", At("after_train", strike), epochs=1, warmup_epochs=0, **ALONE)
    run.train()
    assert not run.train_loop.interrupted
    # in the middle of a write
    real = os.replace

    def replace(source, target):
        if str(target).endswith("epoch_0_step_2.pth"):
            strike(None)  # a second one would end the process
        real(source, target)

    run = build(images, tmp_path / "write", **{"default_hooks.checkpoint.every_steps": 2}, **ALONE)
    monkeypatch.setattr("hgkd.training.runner.os.replace", replace)
    run.train()
    assert run.train_loop.interrupted
    assert run.iter == 3  # the step after the write
    assert find_last_checkpoint(tmp_path / "write") == str(tmp_path / "write/epoch_0_step_3.pth")


# what other packages say of a config


def test_complaints_of_other_packages_are_the_users_and_our_own_are_not():
    with refused(ValueError, "config-not-buildable", "torch"), configured():
        torch.nn.Identity().nothing  # noqa: B018
    with refused(ValueError, "config-not-buildable", "timm"), configured():
        timm.create_model("vit_tiny_patch16_224", depth=1, mlp_layer="SwiGLUPacked")
    with pytest.raises(TypeError, match="unexpected keyword"), configured():
        timm.create_model("vit_tiny_patch16_224", depth=1, nothing=1)
    with pytest.raises(ZeroDivisionError), configured():
        1 / 0  # noqa: B018


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(visualizer=dict(type="Visualizer", vis_backends=[dict(type="ClearMLVisBackend")])), "clearml"),
        (dict(custom_hooks=[dict(type="EMAHook", ema_type="ExponentialMovingAvg")]), "ExponentialMovingAvg is not in"),
        (dict(custom_hooks=[dict(type="EMAHook", begin_iter=-1)]), "begin_iter"),
    ],
)
def test_config_faults_that_others_find(images, tmp_path, change, message):
    cfg = train_tool.load_config(SPARK, tmp_path / "run", options=tiny(images, **ALONE))
    cfg.update(change)
    with pytest.raises(ValueError, match=rf"the config cannot be built, says \w+: .*{message}"):
        build_runner(cfg).train()
    assert not (tmp_path / "run/run.lock").exists()


# memory


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError(
            "CUDA out of memory. Tried to allocate 2.00 GiB. If reserved but unallocated memory is large try"
        ),
        RuntimeError("[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to"),
        MemoryError(),
    ],
    ids=lambda error: type(error).__name__,
)
def test_memory_that_does_not_suffice_is_told_with_the_ways_out(error):
    with refused(StoppedError, "memory-full", "batch_size", "activation_checkpointing") as caught, tell_system_errors("run"):
        raise error
    assert "If reserved" not in str(caught.value)
    with pytest.raises(RuntimeError, match=r"^another$"), tell_system_errors("run"):
        raise RuntimeError("another")
