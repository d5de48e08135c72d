"""Fine-tuning from backbone to score, with tiny networks: train, resume, test, and G2SD in two stages."""

import json
import re
import shutil

import pytest
import torch
from mmengine.hooks import Hook
from refusals import refused
from tiny_runs import ROOT, SPARK, load_tool, same, tiny, write_images

from hgkd.api import test as test_api
from hgkd.api import train as train_tool
from hgkd.api.evaluate import fine_tune
from hgkd.cli import test as test_tool
from hgkd.cli import train as train_command
from hgkd.errors import WeightsError
from hgkd.evaluation import load_extractor
from hgkd.export import load_backbone, read_student
from hgkd.networks import ImageClassifier, load_classifier
from hgkd.networks.mae import MaskedAutoencoder, make_arch, save_mae
from hgkd.registry import build_runner
from hgkd.weights.files import read_checkpoint

FOLDER = ROOT / "downstream/classification"
BASELINE, AUGMENTED = FOLDER / "resnet18_10e_cifar128.py", FOLDER / "resnet18_30e_image-folder.py"
VIT = {"embed_dim": 32, "depth": 2, "num_heads": 2}


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return write_images(tmp_path_factory.mktemp("images"))


def small(images, **options):
    return {
        "student": "test_resnet",
        "data_root": str(images),
        "val_root": str(images),
        "num_classes": 2,
        "image_size": 64,
        "batch_size": 4,
        "workers": 0,
        "epochs": 2,
        "warmup_epochs": 1,
        "default_hooks.logger.interval": 1,
        **options,
    }


@pytest.fixture(scope="module")
def backbone(images, tmp_path_factory):
    """Work folder of an epoch of the pixel control."""
    work_dir = tmp_path_factory.mktemp("spark")
    options = tiny(images, epochs=1, warmup_epochs=0, val_train_root=None, val_test_root=None)
    train_tool.train(SPARK, work_dir, options=options)
    return work_dir


@pytest.fixture(scope="module")
def finetuned(images, backbone, tmp_path_factory):
    """A run from that backbone with everything that is random switched on, and its folder."""
    work_dir = tmp_path_factory.mktemp("finetuned")
    options = small(images, backbone=str(backbone))
    return train_tool.train(AUGMENTED, work_dir, options=options), work_dir


def test_a_run_leaves_scores_reports_and_a_checkpoint_that_describes_itself(finetuned, images):
    runner, work_dir = finetuned
    assert runner.iter == 8
    best = next(iter(work_dir.glob("best_accuracy_top1_epoch_*.pth")))
    lines = [json.loads(line) for line in next(iter(work_dir.glob("*/vis_data/scalars.json"))).read_text().splitlines()]
    scores = [line for line in lines if "accuracy/top1" in line]
    assert len(scores) == 2
    assert {"accuracy/top5", "accuracy/mean_class", "accuracy/ci95_low", "accuracy/ci95_high"} <= set(scores[0])
    per_class = json.loads((work_dir / "per_class.json").read_text())
    assert {name: entry["images"] for name, entry in per_class.items()} == {"a": 8, "b": 8}
    assert (work_dir / "confusion.png").read_bytes().startswith(b"\x89PNG")
    spec = read_checkpoint(best)["meta"]["hgkd"]["classifier"]
    assert (spec["name"], spec["num_classes"], tuple(spec["classes"])) == ("test_resnet", 2, ("a", "b"))
    # the same answers from the file alone, from hgkd test, and a backbone for every other tool
    model = load_classifier(best)
    metrics = test_api.run_test(AUGMENTED, best, options=small(images))
    assert metrics["accuracy/top1"] == pytest.approx(max(line["accuracy/top1"] for line in scores))
    encoder = load_backbone(best)
    inputs = torch.rand(2, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(encoder.forward_features(inputs), model(inputs).feature)
    assert "fc.weight" not in read_student(best).state


def test_the_backbone_is_where_training_starts(images, backbone):
    cfg = train_tool.load_config(BASELINE, "work", options=small(images, backbone=str(backbone)))
    runner = build_runner(cfg)
    expected = load_backbone(backbone / "epoch_1.pth").state_dict()
    own = runner.model.classifier.network.state_dict()
    assert same({key: own[key] for key in expected}, dict(expected))
    assert set(own) - set(expected) == {"fc.weight", "fc.bias"}


def test_tested_runs_take_the_paired_test(finetuned, images, tmp_path, capsys):
    checkpoint = str(finetuned[1] / "epoch_2.pth")
    evaluate_tool = load_tool("evaluate")
    options = ["--cfg-options", *(f"{key}={value}" for key, value in small(images).items())]
    for name in ("a", "b"):
        files = ["--json", str(tmp_path / f"{name}.json"), "--csv", str(tmp_path / "all.csv")]
        assert test_tool.main([str(AUGMENTED), checkpoint, *files, *options]) == 0
    found = json.loads((tmp_path / "a.json").read_text())
    assert found["method"] == "finetune"
    assert found["top1"] == found["metrics"]["accuracy/top1"] == 100 * sum(found["scores"]["classifier"]["correct"]) / 16
    assert found["top1"] == pytest.approx(sum(found["per_class"].values()) / 2)
    assert (found["settings"]["epochs"], found["settings"]["extractor"]["weights"]) == (2, checkpoint)
    assert len((tmp_path / "all.csv").read_text().splitlines()) == 3
    assert evaluate_tool.main(["compare", str(tmp_path / "a.json"), str(tmp_path / "b.json")]) == 0
    assert "+0.0" in capsys.readouterr().out


def test_other_classes_than_the_checkpoints_are_refused(finetuned, images, tmp_path):
    other = tmp_path / "images"
    shutil.copytree(images, other)
    (other / "a").rename(other / "z")
    checkpoint = finetuned[1] / "epoch_2.pth"
    with refused(ValueError, "report-classes-differ", "(2)"):
        test_api.run_test(AUGMENTED, checkpoint, options=small(images, val_root=str(other)))
    shutil.rmtree(other / "z")
    with refused(ValueError, "report-classes-differ", "(1)", "(2)"):
        test_api.run_test(AUGMENTED, checkpoint, options=small(images, val_root=str(other)))


def test_a_distilled_classifier_is_tested_without_its_teacher(finetuned, images, tmp_path):
    taught = small(images, epochs=1, warmup_epochs=0, teacher_checkpoint=str(finetuned[1]))
    taught |= {"model.teacher": dict(type="ClassifierTeacher"), "model.objectives": dict(mgd=dict(type="FeatureMapMGD"))}
    taught["model.teacher"]["checkpoint"] = taught.pop("teacher_checkpoint")
    runner = train_tool.train(BASELINE, tmp_path / "taught", options=taught)
    assert any(key.startswith("objectives.") for key in runner.model.state_dict())
    recipe = FOLDER / "resnet18_mgd_10e_cifar128.py"  # which has a teacher without weights
    metrics = test_api.run_test(recipe, tmp_path / "taught/epoch_1.pth", options=small(images))
    assert 0.0 <= metrics["accuracy/top1"] <= 100.0


def test_pixels_of_the_backbone_count_in_the_test_too(images, tmp_path):
    arch = {**VIT, "decoder_embed_dim": 16, "decoder_depth": 1, "decoder_num_heads": 2}
    pixels = {"mean": [0.1, 0.2, 0.3], "std": [0.9, 0.9, 0.9], "norm_pix": True}
    mae = save_mae(MaskedAutoencoder(make_arch(arch)), tmp_path / "mae.safetensors", pixels)
    options = small(images, epochs=1, warmup_epochs=0, **{f"model.classifier.{key}": value for key, value in VIT.items()})
    options.pop("student")
    recipe = FOLDER / "vit-ti16_10e_cifar128.py"
    runner = train_tool.train(recipe, tmp_path / "run", options={**options, "backbone": str(mae)})
    file = tmp_path / "tested.json"
    test_api.run_test(recipe, tmp_path / "run", options=options, json_file=file)  # without the backbone
    model = load_classifier(tmp_path / "run")
    assert model.spec.mean == runner.model.classifier.spec.mean == pytest.approx(pixels["mean"])
    dataset = runner.val_dataloader.dataset
    inputs = torch.stack([dataset[i]["inputs"] for i in range(len(dataset))]).float() / 255
    with torch.no_grad():
        expected = model.predict(model.normalise(inputs)).argmax(1).tolist()
    assert json.loads(file.read_text())["predicted"] == expected
    # the same by --resume, and as a subject of evaluate.py, its own fine-tuning and its attention included
    again = train_tool.train(recipe, tmp_path / "run", resume=str(tmp_path / "run"), options={**options, "epochs": 2})
    assert again.model.classifier.spec.mean == model.spec.mean
    extractor = load_extractor(tmp_path / "run")
    more = {"epochs": 1, "warmup_epochs": 0, "data_root": str(images), "image_size": 64, "batch_size": 4, "workers": 0}
    tuned = fine_tune(extractor, 2, more)
    assert tuned.classifier.network.norm is not None
    inputs = torch.rand(2, 3, 64, 64)
    maps = extractor.attention(inputs)
    assert maps.shape == (2, 4, 4)
    assert maps.min() >= 0
    assert maps.sum((1, 2)).max() <= 1.0 + 1e-5  # shares of one distribution, the class token has the rest


def test_an_average_of_the_weights_is_tested_with_the_pixels_it_was_trained_with(images, tmp_path, monkeypatch):
    """EMAHook has copied the model, with what timm notes of the pixels, before the checkpoint is read."""
    pixels = [[0.2] * 3, [0.7] * 3]
    options = tiny(images, epochs=1, warmup_epochs=0, val_train_root=None, val_test_root=None)
    train_tool.train(SPARK, tmp_path / "spark", options={**options, "model.student.normalize": pixels})
    options = small(images, epochs=1, warmup_epochs=0)
    train_tool.train(AUGMENTED, tmp_path / "run", options={**options, "backbone": str(tmp_path / "spark")})
    seen = []
    normalise = ImageClassifier.normalise

    def noting(self, inputs):
        seen.append((self.mean.flatten().tolist(), self.std.flatten().tolist()))
        return normalise(self, inputs)

    monkeypatch.setattr(ImageClassifier, "normalise", noting)
    test_api.run_test(AUGMENTED, tmp_path / "run/epoch_1.pth", options=options)
    again = train_tool.train(AUGMENTED, tmp_path / "run", resume=True, options={**options, "epochs": 2})
    assert again.iter == 8
    assert all(values == (pytest.approx(pixels[0]), pytest.approx(pixels[1])) for values in seen), seen[0]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_classes": 3}, "set num_classes=2"),
        ({"val_root": "nowhere"}, "nowhere"),
        ({"model.classifier.two_heads": True}, "nothing trains the second one"),
        ({"epochs": 0}, r"epochs \(train_cfg\.max_epochs\) is 0; it must be 1 or more"),
    ],
)
def test_a_dry_run_refuses_what_a_training_would(changes, message, images, tmp_path, capsys):
    arguments = [f"{key}={value}" for key, value in small(images, **{"warmup_epochs": 0, **changes}).items()]
    assert train_command.main([str(BASELINE), "--dry-run", "--cfg-options", *arguments]) == 2
    assert re.search(message, capsys.readouterr().err)


def test_a_resumed_run_must_have_the_same_classes(finetuned, images, backbone, tmp_path):
    shutil.copytree(finetuned[1], tmp_path / "run")
    options = small(images, epochs=3, backbone=str(backbone))
    with refused(WeightsError, "checkpoint-of-another-model", "2", "run", "3"):
        train_tool.train(AUGMENTED, tmp_path / "run", resume=True, options={**options, "num_classes": 3})
    shutil.copytree(images, tmp_path / "images")
    (tmp_path / "images/a").rename(tmp_path / "images/z")
    options |= {"data_root": str(tmp_path / "images"), "val_root": str(tmp_path / "images")}
    with refused(ValueError, "report-classes-differ", "(2)"):
        train_tool.train(AUGMENTED, tmp_path / "run", resume=True, options=options)


@pytest.mark.parametrize("student", ["test_efficientnet", "test_vit", "test_convnext"])
def test_the_recipe_for_folders_takes_other_networks(student, images, tmp_path):
    options = small(images, student=student, image_size=160 if student == "test_vit" else 64)
    runner = build_runner(train_tool.load_config(AUGMENTED, tmp_path, options=options))
    wrapper = runner.build_optim_wrapper(runner.optim_wrapper)
    rates = [group["lr"] for group in wrapper.param_groups]
    assert rates[0] == max(rates) > min(rates)


class Killed(BaseException):
    """Stands for kill -9."""


class KillAt(Hook):
    priority = "LOWEST"

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
        if runner.iter + 1 == 3:
            raise Killed


def test_a_killed_run_goes_on_to_the_same_weights(finetuned, images, backbone, tmp_path):
    options = small(images, backbone=str(backbone))
    options |= {"default_hooks.checkpoint.every_steps": 1, "default_hooks.checkpoint.every_minutes": None}
    runner = build_runner(train_tool.load_config(AUGMENTED, tmp_path, options=options))
    runner.register_hook(KillAt())
    with pytest.raises(Killed):
        runner.train()
    torch.manual_seed(123)
    train_tool.train(AUGMENTED, tmp_path, resume=True, options=options)
    found, expected = (read_checkpoint(folder / "epoch_2.pth") for folder in (tmp_path, finetuned[1]))
    for part in ("state_dict", "ema_state_dict", "optimizer"):
        assert same(found[part], expected[part]), part


def test_g2sd_in_two_stages(images, finetuned, tmp_path):
    arch = {**VIT, "decoder_embed_dim": 16, "decoder_depth": 4, "decoder_num_heads": 2}
    mae = save_mae(MaskedAutoencoder(make_arch(arch)), tmp_path / "mae.safetensors")
    generic = tiny(images, epochs=1, warmup_epochs=0, val_train_root=None, val_test_root=None, teacher_checkpoint=str(mae))
    for key in ("student", "model.student.decoder_width"):
        generic.pop(key)
    generic |= {"model.teacher.allow_random": True, "model.student.arch": arch}
    train_tool.train(ROOT / "configs/g2sd/g2sd_mae-ti16_vit-ti16_10e_cifar128.py", tmp_path / "generic", options=generic)
    specific = small(images, epochs=1, warmup_epochs=0, backbone=str(tmp_path / "generic"))
    specific.pop("student")
    specific |= {"teacher_checkpoint": str(finetuned[1]), "model.teacher.allow_random": True}
    specific |= {f"model.classifier.{key}": value for key, value in VIT.items()}
    runner = train_tool.train(FOLDER / "vit-ti16_g2sd_10e_cifar128.py", tmp_path / "specific", options=specific)
    assert runner.iter == 4
    logged = (tmp_path / "specific").glob("*/vis_data/scalars.json")
    first = json.loads(next(iter(logged)).read_text().splitlines()[0])
    assert first["loss"] == pytest.approx(first["label_loss"] + first["hard_logits_loss"], rel=1e-4)
    state = read_checkpoint(tmp_path / "specific/epoch_1.pth")["state_dict"]
    assert all(key.startswith("classifier.network.") for key in state)  # and no teacher
    assert {"classifier.network.dist_token", "classifier.network.head_dist.weight"} <= set(state)
    assert load_classifier(tmp_path / "specific").predict(torch.rand(1, 3, 64, 64)).shape == (1, 2)


@pytest.mark.parametrize(
    ("config", "changes", "message"),
    [
        (BASELINE, {"num_classes": 3}, r"images are of 2 classes \(a, b \.\.\.\), the model has 3 outputs; set num_classes=2"),
        (BASELINE, {"student": "resnet_eighteen"}, "unknown classifier 'resnet_eighteen'; did you mean"),
        (
            BASELINE,
            {"student": "resnet10t", "backbone": "BACKBONE"},
            r"holds a 'test_resnet', but a 'resnet10t' is to be trained",
        ),
        (BASELINE, {"backbone": "nowhere.pth"}, "nowhere.pth"),
        (
            BASELINE,
            {"model.classifier.stem": "cifar", "backbone": "BACKBONE"},
            r"a 'test_resnet' with stem 'default'; set model\.classifier\.stem=default",
        ),
        (BASELINE, {"label_fraction": 0.0}, r"label_fraction is the share .* in \(0, 1\], got 0"),
        (BASELINE, {"model.labels.mixup": 0.8, "batch_size": 5}, r"mixup and cutmix pair the images of a batch, which has 5"),
        (BASELINE, {"model.labels.mixupp": 0.8}, "mixupp"),
        (FOLDER / "resnet18_g2sd_10e_cifar128.py", {}, "the teacher has no weights: set model.teacher.checkpoint"),
        (
            FOLDER / "resnet18_g2sd_10e_cifar128.py",
            {"num_classes": 3, "teacher_checkpoint": "FINETUNED"},
            r"\(test_resnet, 2 classes\) must be fine-tuned on the 3 classes .*objective 'hard'",
        ),
        (BASELINE, {"val_root": "OTHER"}, r"validation images \(2\) are not those of the training images \(2\), e\.g\. b, c"),
    ],
)
def test_user_errors_are_one_message(config, changes, message, images, backbone, finetuned, tmp_path, capsys):
    places = {"BACKBONE": str(backbone), "FINETUNED": str(finetuned[1])}
    if "OTHER" in changes.values():
        places["OTHER"] = str(write_images(tmp_path / "other", ("a", "c"), each=1))
    options = small(images, **{key: places.get(value, value) for key, value in changes.items()})
    if "teacher_checkpoint" in options:
        options["model.teacher.allow_random"] = True
    arguments = [f"{key}={value}" for key, value in options.items()]
    assert train_command.main([str(config), "--work-dir", str(tmp_path / "run"), "--cfg-options", *arguments]) == 2
    printed = capsys.readouterr().err
    assert "Traceback" not in printed
    assert re.search(message, printed), printed


def test_an_empty_class_folder_is_told(images, tmp_path, capsys):
    root = write_images(tmp_path / "images", each=2)
    (root / "empty").mkdir()
    arguments = [f"{key}={value}" for key, value in small(root, val_root=str(images)).items()]
    assert train_command.main([str(BASELINE), "--work-dir", str(tmp_path / "run"), "--cfg-options", *arguments]) == 2
    assert re.search(r"class folder .*empty holds no images", capsys.readouterr().err)


def test_a_test_of_another_model_is_refused_and_says_what_the_file_is(finetuned, images, capsys):
    best = next(iter(finetuned[1].glob("best_accuracy_top1_epoch_*.pth")))
    with refused(WeightsError, "checkpoint-of-another-model", "test_resnet", "2", "resnet10t"):
        test_api.run_test(BASELINE, best, options=small(images, student="resnet10t"))
    arguments = [f"{key}={value}" for key, value in small(images).items()]
    assert test_tool.main([str(BASELINE), str(best), "--json", "out.json", "--cfg-options", *arguments]) == 0
    with open("out.json") as file:
        assert json.load(file)["metrics"]["accuracy/top5"] == 100.0
    with refused(ValueError, "no-test-evaluator"):
        test_api.run_test(BASELINE, best, options=small(images, val_root=None))
