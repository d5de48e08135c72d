"""Short options, and keys that nobody reads."""

import pytest
from mmengine.config import Config
from refusals import refused

import hgkd.config.checking as config_module
from hgkd.config import SHORT_OPTIONS, apply_short_options, check_config, use_mixed_precision
from hgkd.openmmlab.config import merge_options


def recipe(**changes):
    """A small but complete config in the form of the shipped ones."""
    cfg = Config(
        dict(
            default_scope="hgkd",
            runner_type="DistillRunner",
            data_root="photos",
            val_train_root="known",
            val_test_root="asked",
            image_size=64,
            epochs=4,
            warmup_epochs=1,
            batch_size=8,
            workers=0,
            lr=1e-3,
            mask_ratio=0.5,
            model=dict(
                type="MaskedDistiller",
                student=dict(type="SparseUNet", encoder="resnet10t"),
                mask=dict(type="RandomMask"),
                objectives=dict(pixels=dict(type="PixelReconstruction", weight=2.0)),
            ),
            train_dataloader=dict(
                dataset=dict(type="UnlabelledImages", transform=dict(hflip=0.5)),
                sampler=dict(type="DefaultSampler", shuffle=True),
                collate_fn=dict(type="default_collate"),
            ),
            val_dataloader=dict(
                batch_size=8,
                dataset=dict(type="BankAndQuery", bank=dict(type="LabelledImages"), query=dict(type="LabelledImages")),
                sampler=dict(type="DefaultSampler", shuffle=False),
            ),
            val_cfg=dict(),
            val_evaluator=[dict(type="KNNMetric", prefix="knn")],
            train_cfg=dict(by_epoch=True),
            optim_wrapper=dict(type="OptimWrapper", optimizer=dict(type="AdamW", weight_decay=0.05)),
            param_scheduler=[
                dict(type="LinearLR", start_factor=0.1, begin=0, by_epoch=True),
                dict(type="CosineAnnealingLR", by_epoch=True),
            ],
            default_hooks=dict(logger=dict(type="LoggerHook", interval=1)),
            custom_hooks=[dict(type="VisualizationHook", interval=1, priority="LOW")],
        )
    )
    cfg.merge_from_dict(changes)
    return cfg


def test_short_options_reach_their_places():
    cfg = recipe()
    apply_short_options(cfg)
    assert cfg.train_dataloader.dataset.data_root == "photos"
    assert cfg.val_dataloader.dataset.bank.data_root == "known"
    assert cfg.val_dataloader.dataset.query.data_root == "asked"
    assert cfg.model.image_size == cfg.train_dataloader.dataset.image_size == 64
    assert cfg.val_dataloader.dataset.bank.image_size == cfg.val_dataloader.dataset.query.image_size == 64
    assert cfg.train_cfg.max_epochs == cfg.param_scheduler[1].end == 4
    assert cfg.param_scheduler[0].end == cfg.param_scheduler[1].begin == 1
    assert cfg.train_dataloader.batch_size == 8
    assert cfg.train_dataloader.num_workers == cfg.val_dataloader.num_workers == 0
    assert cfg.optim_wrapper.optimizer.lr == 1e-3
    assert cfg.model.mask.mask_ratio == 0.5
    check_config(cfg)


def test_every_short_option_is_documented():
    readme = config_module.__file__.replace("hgkd/config/checking.py", "configs/README.md")
    with open(readme) as file:
        text = file.read()
    for name in SHORT_OPTIONS:
        assert f"| `{name}` |" in text, name


def test_no_labelled_folders_means_no_validation():
    cfg = recipe(val_train_root=None, val_test_root=None)
    apply_short_options(cfg)
    assert cfg.val_dataloader is None
    assert cfg.val_cfg is None
    assert cfg.val_evaluator is None
    check_config(cfg)


def test_one_labelled_folder_is_refused():
    with refused(ValueError, "validation-half-set", "val_test_root", "val_train_root"):
        apply_short_options(recipe(val_train_root=None))


@pytest.mark.parametrize(
    ("path", "value"),
    [("param_scheduler.0", None), ("param_scheduler.0", 3), ("param_scheduler.LinearLR.end", 3), ("seeds.1", 3)],
)
@pytest.mark.parametrize("put", [apply_short_options, merge_options])
def test_an_entry_of_a_list_is_not_replaced_by_its_number(put, path, value):
    schedule = [{"type": "LinearLR", "end": 1}, {"type": "CosineAnnealingLR", "begin": 1}]
    cfg = Config({"param_scheduler": schedule, "custom_hooks": [{"seeds": [1, 2]}]})
    path = path.replace("seeds", "custom_hooks.0.seeds")
    code = "list-index-out-of-range" if put is merge_options and "LinearLR" in path else "list-entry-not-replaced"
    with refused(ValueError, code, path):
        put(cfg, {path: value})
    put(cfg, {"param_scheduler.0.end": 2, "param_scheduler.1": {"begin": 2}})
    assert [cfg.param_scheduler[0].end, cfg.param_scheduler[1].begin] == [2, 2]


@pytest.mark.parametrize("key", ["custom_hooks", "param_scheduler"])
def test_what_is_no_part_is_refused_in_a_list_of_parts(key):
    for put in (apply_short_options, lambda cfg: merge_options(cfg, {})):
        with refused(ValueError, "list-entry-no-part", f"{key}.1=None"):
            put(Config({key: [{"type": "EMAHook"}, None]}))


def test_option_without_a_place_is_refused():
    with refused(ValueError, "option-without-place", "teacher_checkpoint='x.pth'", "model.teacher.checkpoint"):
        apply_short_options(recipe(teacher_checkpoint="x.pth"))


def test_warmup():
    cfg = recipe(warmup_epochs=0)
    apply_short_options(cfg)
    assert [entry.type for entry in cfg.param_scheduler] == ["CosineAnnealingLR"]
    with refused(ValueError, "warmup-too-long", "warmup_epochs=4", "epochs=4"):
        apply_short_options(recipe(warmup_epochs=4))
    with refused(ValueError, "warmup-negative", "warmup_epochs=-1", "warmup_epochs=0"):
        apply_short_options(recipe(warmup_epochs=-1))


@pytest.mark.parametrize(
    ("changes", "refusal"),
    [
        ({"data_rot": "x"}, ("config-key-unknown", "data_rot='x'", "top-level", "data_rot", "data_root")),
        ({"model.student.encodr": "resnet18"}, ("argument-refused", "model.student.encodr='resnet18'", "encoder")),
        (
            {"model.objectives.pixels.supervize": "all"},
            ("argument-refused", "model.objectives.pixels.supervize='all'", "supervise"),
        ),
        ({"model.mask.ratio": 0.5}, ("argument-refused", "model.mask.ratio=0.5", "mask_ratio")),
        (
            {"train_dataloader.dataset.data_rot": "x"},
            ("argument-refused", "train_dataloader.dataset.data_rot='x'", "data_root"),
        ),
        ({"val_evaluator.0.neighbours": 3}, ("argument-refused", "val_evaluator.0.neighbours=3")),
        ({"custom_hooks.0.intervall": 3}, ("argument-refused", "custom_hooks.0.intervall=3", "interval")),
        ({"env_cfg.cudnn_bench": True}, ("part-key-unknown", "env_cfg.cudnn_bench=True", "cudnn_benchmark")),
        ({"optim_wrapper.paramwise_cfg.norm_decay": 0}, ("part-key-unknown", "paramwise_cfg.norm_decay=0", "norm_decay_mult")),
        ({"model.type": "MaskDistiller"}, ("type-not-found", "model.type='MaskDistiller'", "MaskedDistiller")),
        ({"model.objectives.pixels.type": "PixelReconstrution"}, ("type-not-found", "pixels.type", "PixelReconstruction")),
        ({"optim_wrapper.optimizer.type": "AdmaW"}, ("type-not-found", "optim_wrapper.optimizer.type='AdmaW'", "AdamW")),
        ({"param_scheduler.1.type": "CosineLR"}, ("type-not-found", "param_scheduler.1.type='CosineLR'", "CosineAnnealingLR")),
        (
            {"train_dataloader.sampler.type": "Sampler"},
            ("type-not-found", "train_dataloader.sampler.type='Sampler'", "DefaultSampler"),
        ),
        ({"runner_type": "DistilRunner"}, ("type-not-found", "runner_type='DistilRunner'", "DistillRunner")),
        ({"model": None}, ("value-of-another-kind", "model=None", "a dict")),
        ({"model.student": "resnet18"}, ("value-of-another-kind", "model.student='resnet18'", "a dict")),
        ({"model.student.encoder": 5}, ("value-of-another-kind", "model.student.encoder=5", "a text")),
        ({"model.objectives.pixels": 5}, ("value-of-another-kind", "model.objectives.pixels=5", "a dict")),
        ({"model.objectives.pixels.weight": "2e-5"}, ("value-of-another-kind", "pixels.weight='2e-5'", "a number")),
        ({"model.mask.mask_ratio": ["a", 0.5]}, ("value-of-another-kind", "model.mask.mask_ratio.0='a'", "a number")),
        ({"model.mask.type": 5}, ("type-not-a-name", "model.mask.type=5")),
        ({"train_dataloader.dataset.data_root": ["a", "b"]}, ("value-of-another-kind", "data_root=['a', 'b']", "a text")),
        ({"train_dataloader.dataset.transform": "train"}, ("value-of-another-kind", "transform='train'", "a dict or None")),
        ({"train_dataloader.sampler": "EpochSampler"}, ("value-of-another-kind", "train_dataloader.sampler='EpochSampler'")),
        ({"train_dataloader.batch_size": 0}, ("value-too-small", "train_dataloader.batch_size=0", "1 or more")),
        ({"train_dataloader.num_workers": -1}, ("value-too-small", "train_dataloader.num_workers=-1", "0 or more")),
        ({"randomness.seed": -1}, ("value-too-small", "randomness.seed=-1", "0 or more")),
        ({"randomness": 5}, ("value-of-another-kind", "randomness=5", "a dict")),
        ({"default_hooks.logger": 5}, ("value-of-another-kind", "default_hooks.logger=5", "a dict or None")),
        ({"custom_hooks.0.interval": "often"}, ("value-of-another-kind", "custom_hooks.0.interval='often'", "a whole number")),
        ({"optim_wrapper.clip_grad": 5}, ("value-of-another-kind", "optim_wrapper.clip_grad=5", "a dict or None")),
        ({"optim_wrapper": None}, ("training-part-missing", "optim_wrapper is absent or None")),
        ({"train_cfg.max_epochs": None}, ("value-of-another-kind", "train_cfg.max_epochs=None", "a whole number")),
        ({"activation_checkpointing": "student"}, ("value-of-another-kind", "activation_checkpointing='student'", "a list")),
        ({"kernels": "fast"}, ("value-of-another-kind", "kernels='fast'", "'measure' or 'rule' or 'torch' or 'fused'")),
    ],
)
def test_unknown_keys_types_and_values_of_another_kind_are_named_with_their_path(changes, refusal):
    cfg = recipe()
    apply_short_options(cfg)
    cfg.merge_from_dict(changes)
    with refused(ValueError, *refusal):
        check_config(cfg)


def test_a_training_without_a_length_is_refused():
    cfg = recipe(epochs=None)
    apply_short_options(cfg)
    with refused(ValueError, "argument-missing", "train_cfg.max_epochs", "epochs=..."):
        check_config(cfg)


def test_none_takes_an_objective_away():
    cfg = recipe()
    apply_short_options(cfg, {"model.objectives.hgkd": {"type": "HGKD"}, "model.objectives.pixels": None})
    assert list(cfg.model.objectives) == ["hgkd"]


@pytest.mark.parametrize(
    ("options", "refusal"),
    [
        ({"custom_hooks": {"type": "EMAHook"}}, ("list-replaced-by-dict", "custom_hooks is a list of 1", "[dict(...)]")),
        ({"custom_hooks": "EMAHook"}, ("parts-not-a-list", "custom_hooks='EMAHook'", "[dict(type='EMAHook')]")),
        ({"param_scheduler": 5}, ("parts-not-a-list", "param_scheduler=5")),
    ],
)
def test_what_stands_for_a_list_of_parts_and_is_none_is_refused(options, refusal):
    with refused(ValueError, *refusal):
        apply_short_options(recipe(), options)


def test_missing_folder_names_the_short_option():
    cfg = recipe(data_root=None)
    apply_short_options(cfg)
    with refused(ValueError, "argument-missing", "train_dataloader.dataset.data_root", "--cfg-options", "data_root"):
        check_config(cfg)


def test_mixed_precision_replaces_the_wrapper():
    cfg = recipe()
    use_mixed_precision(cfg)
    assert cfg.optim_wrapper.type in ("hgkd.BFloat16OptimWrapper", "AmpOptimWrapper")
    check_amp = recipe(**{"optim_wrapper.type": "ApexOptimWrapper"})
    with refused(ValueError, "amp-wrapper-replaced", "optim_wrapper.type", "ApexOptimWrapper"):
        use_mixed_precision(check_amp)
