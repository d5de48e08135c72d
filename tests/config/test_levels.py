"""What wins: the command line over a child's file, that over what it is based on; a short option is as good as its place.

Reports of the kind: https://github.com/open-mmlab/mmengine/issues/1073 (options of the command line and variables of a file).
"""

import copy
import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from mmengine.config import Config
from refusals import refused
from tiny_runs import HGKD, ROOT, SPARK

from hgkd.api import train as train_tool
from hgkd.cli import train as train_command
from hgkd.config import apply_short_options, read_config

FINETUNE = ROOT / "downstream/classification/resnet18_10e_cifar128.py"


def child(tmp_path, text, base=HGKD, name="child.py"):
    path = tmp_path / name
    path.write_text(f"_base_ = [{str(base)!r}]\n{text}\n")
    return path


def load(path, typed=None):
    cfg = read_config(path)
    cfg.remarks = apply_short_options(cfg, typed)
    return cfg


def of(cfg, place):
    for step in place.split("."):
        cfg = cfg[int(step)] if step.isdigit() else cfg[step]
    return cfg


# place -> its value in the H-GKD recipe and in fine-tuning, another value, and the short option
PLACES = {
    "train_dataloader.batch_size": (32, 4, "batch_size"),
    "train_dataloader.num_workers": (2, 0, "workers"),
    "optim_wrapper.optimizer.lr": (None, 5e-5, "lr"),
    "train_cfg.max_epochs": (10, 3, "epochs"),
    "randomness.seed": (0, 7, "seed"),
    "model.image_size": (128, 64, "image_size"),
}


@pytest.mark.parametrize("recipe", [HGKD, FINETUNE], ids=["pretraining", "finetuning"])
@pytest.mark.parametrize("place", PLACES)
def test_a_typed_place_wins_over_the_recipes_short_option(recipe, place):
    before, after, _ = PLACES[place]
    assert before in (None, of(load(recipe), place))
    assert of(load(recipe, {place: after}), place) == after


@pytest.mark.parametrize("recipe", [HGKD, FINETUNE], ids=["pretraining", "finetuning"])
@pytest.mark.parametrize("place", PLACES)
def test_a_childs_place_wins_over_the_recipe_and_the_command_line_over_both(recipe, place, tmp_path):
    _, after, short = PLACES[place]
    head, *steps = place.split(".")
    inner = after
    for step in reversed(steps):
        inner = {step: inner}
    path = child(tmp_path, f"{head} = {inner!r}", recipe)
    cfg = load(path)
    assert of(cfg, place) == after
    grandchild = child(tmp_path, f"{short} = {2 * after + 1}", path, "grandchild.py")  # the short option, set last
    assert of(load(grandchild), place) == 2 * after + 1
    for typed in (short, place):
        assert of(load(grandchild, {typed: 3 * after + 1}), place) == 3 * after + 1


def test_the_places_of_one_setting_follow_the_first():
    cfg = load(HGKD, {"train_cfg.max_epochs": 3})
    assert cfg.epochs == cfg.train_cfg.max_epochs == cfg.param_scheduler[1].end == 3
    cfg = load(HGKD, {"train_cfg.max_epochs": 3, "param_scheduler.1.end": 2})
    assert (cfg.train_cfg.max_epochs, cfg.param_scheduler[1].end, cfg.epochs) == (3, 2, None)
    cfg = load(HGKD, {"train_cfg.max_epochs": 10, "param_scheduler.1.end": 8})  # the recipe's own number, typed
    assert (cfg.train_cfg.max_epochs, cfg.param_scheduler[1].end) == (10, 8)
    cfg = load(HGKD, {"model.image_size": 64})
    assert cfg.train_dataloader.dataset.image_size == cfg.val_dataloader.dataset.bank.image_size == 64
    cfg = load(HGKD, {"param_scheduler.0.end": 2})
    assert cfg.param_scheduler[1].begin == cfg.warmup_epochs == 2
    cfg = load(HGKD, {"train_dataloader.num_workers": 0})  # two settings that happen to share a short option
    assert (cfg.train_dataloader.num_workers, cfg.val_dataloader.num_workers, cfg.workers) == (0, 2, None)


@pytest.mark.parametrize(
    ("typed", "refusal"),
    [
        (
            {"lr": 1e-3, "optim_wrapper.optimizer.lr": 2e-3},
            ("option-disagrees", "lr=0.001", "optim_wrapper.optimizer.lr=0.002"),
        ),
        ({"epochs": 5, "param_scheduler.1.end": 4}, ("option-disagrees", "epochs=5", "param_scheduler.1.end=4")),
        ({"workers": 2, "val_dataloader.num_workers": 0}, ("option-disagrees", "workers=2", "val_dataloader.num_workers=0")),
    ],
)
def test_two_values_on_one_level_are_refused(typed, refusal, tmp_path, capsys):
    with refused(ValueError, *refusal):
        load(HGKD, typed)
    # taking either out, as the message says, works
    for key in typed:
        load(HGKD, {key: typed[key]})
    arguments = [f"{key}={value}" for key, value in typed.items()]
    assert train_command.main([str(HGKD), "--work-dir", str(tmp_path), "--cfg-options", *arguments]) == 2
    assert "take one of them out" in capsys.readouterr().err


def test_two_values_in_one_file_are_refused_with_its_name(tmp_path):
    path = child(tmp_path, "batch_size = 8\ntrain_dataloader = dict(batch_size=16)")
    with refused(ValueError, "option-disagrees", "batch_size=8", "train_dataloader.batch_size=16", "child.py"):
        load(path)
    assert load(path, {"batch_size": 4}).train_dataloader.batch_size == 4
    assert load(child(tmp_path, "batch_size = 8\ntrain_dataloader = dict(batch_size=8)")).batch_size == 8


def test_two_files_of_which_neither_is_based_on_the_other_are_refused(tmp_path):
    (tmp_path / "a.py").write_text("batch_size = 8\n")
    (tmp_path / "b.py").write_text("train_dataloader = dict(batch_size=16)\n")
    path = tmp_path / "c.py"
    path.write_text('_base_ = ["./a.py", "./b.py"]\n')
    with refused(ValueError, "option-disagrees", "batch_size=8", "a.py", "train_dataloader.batch_size=16", "b.py"):
        load(path)
    path.write_text('_base_ = ["./a.py", "./b.py"]\nbatch_size = 16\n')  # what the message says
    assert load(path).train_dataloader.batch_size == 16


def test_a_restated_value_counts_as_set(tmp_path):
    first = child(tmp_path, "train_dataloader = dict(batch_size=16)", name="first.py")
    second = child(tmp_path, "batch_size = 32", first, "second.py")  # the recipe's own number, said again
    third = child(tmp_path, "train_dataloader = dict(batch_size=16)", second, "third.py")
    assert [load(path).train_dataloader.batch_size for path in (first, second, third)] == [16, 32, 16]


def test_references_to_bases_and_deleted_parts(tmp_path):
    text = "batch_size = _base_.batch_size // 2\noptim_wrapper = dict(optimizer=dict(_delete_=True, type='SGD', lr=0.1))"
    cfg = load(child(tmp_path, text))
    assert cfg.train_dataloader.batch_size == 16
    assert cfg.optim_wrapper.optimizer == dict(type="SGD", lr=0.1)
    # without a rate of its own the new optimiser takes the recipe's
    cfg = load(child(tmp_path, "optim_wrapper = dict(optimizer=dict(_delete_=True, type='SGD'))"))
    assert cfg.optim_wrapper.optimizer == dict(type="SGD", lr=2e-3)
    cfg = load(child(tmp_path, "lr = 1e-2\ntrain_dataloader = dict(num_workers={{_base_.workers}})"))
    assert (cfg.optim_wrapper.optimizer.lr, cfg.train_dataloader.num_workers) == (1e-2, 2)


def test_a_schedule_of_the_childs_own_needs_no_warmup(tmp_path):
    text = "param_scheduler = [dict(type='MultiStepLR', milestones=[5], by_epoch=True)]"
    cfg = load(child(tmp_path, text))
    assert cfg.param_scheduler == [dict(type="MultiStepLR", milestones=[5], by_epoch=True)]
    assert load(child(tmp_path, text), {"warmup_epochs": 0}).param_scheduler == cfg.param_scheduler
    with refused(ValueError, "option-without-place", "warmup_epochs=2"):
        load(child(tmp_path, text), {"warmup_epochs": 2})


def test_a_shorter_training_shortens_the_warmup_and_says_so(tmp_path):
    for typed in ({"epochs": 1}, {"train_cfg.max_epochs": 1}):
        cfg = load(HGKD, typed)
        assert cfg.param_scheduler[0].end == cfg.param_scheduler[1].begin == cfg.warmup_epochs == 0.1
        assert cfg.param_scheduler[1].end == 1
        assert cfg.remarks == [
            "the warm-up of 1 epochs is not shorter than epochs=1: it takes 0.1 now (warmup_epochs=... sets it)"
        ]
    assert load(HGKD, {"epochs": 2}).param_scheduler[0].end == 1  # still shorter
    assert load(HGKD, {"epochs": 2}).remarks == []
    for typed in ({"epochs": 3, "warmup_epochs": 3}, {"warmup_epochs": 10}):
        with refused(ValueError, "warmup-too-long", "warmup_epochs"):
            load(HGKD, typed)


def test_labelled_folders_are_found_by_their_places(tmp_path):
    text = "val_train_root = val_test_root = None"
    assert load(child(tmp_path, text)).val_dataloader is None
    typed = {"val_dataloader.dataset.bank.data_root": "known", "val_dataloader.dataset.query.data_root": "asked"}
    cfg = load(child(tmp_path, text), typed)
    assert cfg.val_dataloader.dataset.bank.data_root == cfg.val_train_root == "known"
    with refused(ValueError, "validation-half-set", "val_test_root", "val_train_root"):
        load(child(tmp_path, text), {"val_dataloader.dataset.query.data_root": "asked"})
    cfg = load(child(tmp_path, "val_root = None", FINETUNE), {"val_dataloader.dataset.data_root": "asked"})
    assert cfg.val_root == "asked"


def test_no_folder_for_features_means_no_store():
    kinds = [hook.type for hook in load(HGKD, {"teacher_features": None}).custom_hooks]
    assert kinds == [hook.type for hook in load(HGKD).custom_hooks if hook.type != "TeacherCacheHook"]
    assert load(HGKD).custom_hooks[-1] == dict(type="TeacherCacheHook", folder="work_dirs/teacher_features")
    number = len(kinds)
    assert load(HGKD, {f"custom_hooks.{number}.folder": "mine"}).custom_hooks[-1].folder == "mine"


@pytest.mark.parametrize(
    ("typed", "refusal"),
    [
        ({"mask_ratio": "60%"}, ("option-not-a-number", "mask_ratio='60%'", "mask_ratio=0.6")),
        ({"model.mask.mask_ratio": "60%"}, ("option-not-a-number", "model.mask.mask_ratio='60%'")),
        ({"epochs": "ten"}, ("option-not-a-number", "epochs='ten'")),
        ({"batch_size": 2.5}, ("option-not-a-number", "batch_size=2.5")),
        ({"lr": True}, ("option-not-a-number", "lr=True", "number")),
    ],
)
def test_what_is_no_number_is_refused(typed, refusal):
    with refused(ValueError, *refusal):
        load(HGKD, typed)


OPTIONS = {
    "batch_size": st.integers(1, 64),
    "lr": st.floats(1e-5, 1.0),
    "epochs": st.integers(1, 50),
    "warmup_epochs": st.sampled_from([0, 0.5, 1]),
    "workers": st.integers(0, 8),
    "image_size": st.sampled_from([64, [64, 96], (96, 128)]),
    "mask_ratio": st.floats(0.0, 0.9),
    "teacher_features": st.sampled_from([None, "here"]),
    "train_dataloader.num_workers": st.integers(0, 8),
    "param_scheduler.1.eta_min": st.floats(0.0, 1e-5),
}
READ = {path: read_config(path) for path in (HGKD, SPARK, FINETUNE)}


@given(st.sampled_from(sorted(READ)), st.dictionaries(st.sampled_from(sorted(OPTIONS)), st.none()), st.data())
def test_a_dumped_config_is_the_same_run(path, keys, data):
    typed = {key: data.draw(OPTIONS[key], label=key) for key in keys}
    if path == FINETUNE:
        typed = {k: v for k, v in typed.items() if k not in ("mask_ratio", "teacher_features")}
    elif path == SPARK:
        typed.pop("teacher_features", None)
    if "workers" in typed:
        typed.pop("train_dataloader.num_workers", None)
    if typed.get("warmup_epochs", 0) >= typed.get("epochs", READ[path].epochs):
        typed.pop("warmup_epochs")
    cfg = copy.deepcopy(READ[path])
    apply_short_options(cfg, typed)
    again = Config(json.loads(json.dumps(cfg.to_dict())))
    assert apply_short_options(again) == []
    assert json.dumps(again.to_dict(), sort_keys=True) == json.dumps(cfg.to_dict(), sort_keys=True)


def test_a_dumped_config_can_be_changed(tmp_path):
    cfg = read_config(HGKD)
    apply_short_options(cfg, {"warmup_epochs": 0, "train_dataloader.num_workers": 0})
    cfg.dump(tmp_path / "dumped.py")
    again = load(tmp_path / "dumped.py", {"epochs": 5, "lr": 1.0})
    assert [entry.end for entry in again.param_scheduler] == [5]
    assert again.train_cfg.max_epochs == 5
    assert again.optim_wrapper.optimizer.lr == 1.0
    assert (again.train_dataloader.num_workers, again.val_dataloader.num_workers) == (0, 2)


def test_a_config_that_a_program_has_changed():
    cfg = read_config(HGKD)
    cfg.train_dataloader.batch_size = 5
    changed = train_tool.load_config(cfg, "run", options={"teacher_checkpoint": "x", "workers": 0})
    assert changed.train_dataloader.batch_size == 5
    assert "num_workers" not in cfg.train_dataloader  # the caller's own stays as it was
    assert train_tool.load_config(cfg, "run", options={"batch_size": 6}).train_dataloader.batch_size == 6


def test_a_config_that_mmengine_has_read(tmp_path):
    path = child(tmp_path, "train_dataloader = dict(batch_size=16)")
    assert train_tool.load_config(Config.fromfile(path), options={"teacher_checkpoint": "x"}).train_dataloader.batch_size == 16


def test_other_readers_of_configs_are_left_alone(tmp_path):
    before = Config.__dict__["_file2dict"], Config.__dict__["_merge_a_into_b"]
    with pytest.raises(FileNotFoundError):
        read_config(child(tmp_path, "", Path("nowhere.py")))
    read_config(HGKD)
    assert (Config._file2dict, Config._merge_a_into_b) == (before[0].__func__, before[1].__func__)


@pytest.mark.parametrize(
    ("package", "wanted"), [("mmdet", "'hgkd[downstream]'"), ("mmseg", "'hgkd[downstream]'"), ("mmpose", "mmpose")]
)
def test_a_base_of_a_package_that_is_not_installed_is_refused_with_what_installs_it(tmp_path, monkeypatch, package, wanted):
    monkeypatch.setattr("mmengine.config.config.is_installed", lambda name: False)
    path = child(tmp_path, "", base=f"{package}::_base_/default_runtime.py")
    with refused(ModuleNotFoundError, "base-package-missing", str(path), f"pip install {wanted}"):
        read_config(path)


def test_an_import_of_a_config_that_fails_is_shown_as_it_is(tmp_path):
    with pytest.raises(ModuleNotFoundError, match="no_such_module") as caught:
        read_config(child(tmp_path, "import no_such_module"))
    assert caught.value.name == "no_such_module"
