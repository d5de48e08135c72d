"""The run card says what is known, and says that the rest is not."""

import hashlib
import json
import os
import re
from pathlib import Path

import pytest
import timm
import torch
import yaml
from PIL import Image
from student_checkpoints import write_student

from hgkd.export import card as card_module
from hgkd.export import export
from hgkd.weights.run_file import literal_config


def card_of(tmp_path: Path, cfg: str | None = None, **export_arguments: object) -> dict:
    write_student(tmp_path / "a.pth")
    checkpoint = torch.load(tmp_path / "a.pth", weights_only=False)
    if cfg is not None:
        checkpoint["meta"].update(cfg=cfg, seed=17, mmengine_version="0.10.7" + "ab12" * 10)
        torch.save(checkpoint, tmp_path / "a.pth")
    export(tmp_path / "a.pth", tmp_path / "out", **export_arguments)
    return json.loads((tmp_path / "out/run_card.json").read_text())


def sha256(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


def test_what_is_known(tmp_path: Path) -> None:
    data = tmp_path / "data"
    for i in range(2):
        (data / "sub").mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (4 + i, 4)).save(data / f"sub/{i}.png")
    (tmp_path / "teacher.pth").write_bytes(b"weights of a teacher")
    cfg = (
        f"model = dict(teacher=dict(type='TimmTeacher', name='vit', checkpoint='{tmp_path}/teacher.pth'))\n"
        f"train_dataloader = dict(dataset=dict(data_root='{data}'), batch_size=2)\n"
    )
    card = card_of(tmp_path, cfg, licences={"weights": "Apache-2.0", "data": "my own photographs"})
    assert card["source"]["sha256"] == sha256(tmp_path / "a.pth")
    assert (card["source"]["epoch"], card["source"]["seed"]) == (3, 17)
    assert card["source"]["commit"].startswith("ab12" * 10)
    assert card["teacher"]["name"] == "vit"
    assert card["teacher"]["sha256"] == hashlib.sha256(b"weights of a teacher").hexdigest()
    assert card["data"]["images"] == 2
    sizes = [(data / f"sub/{i}.png").stat().st_size for i in range(2)]
    expected = hashlib.sha256(f"sub/0.png\0{sizes[0]}\0sub/1.png\0{sizes[1]}\0".encode()).hexdigest()
    assert card["data"]["fingerprint"] == expected
    assert card["network"] == {"name": "test_resnet", "stem": "default", "kwargs": {}}
    assert card["config"] == cfg
    assert card["metrics"] == {"knn/top1": 42.5}
    assert card["versions"]["timm"] == timm.__version__
    assert card["files"]["model.safetensors"]["sha256"] == sha256(tmp_path / "out/model.safetensors")
    assert card["export"]["proven_with"] == f"timm {timm.__version__}"
    assert card["licences"]["weights"] == "Apache-2.0"
    assert card["licences"]["teacher"].startswith("unknown: not stated")

    page = (tmp_path / "out/run_card.md").read_text()
    assert card["source"]["sha256"] in page
    assert cfg.strip() in page
    readme = (tmp_path / "out/README.md").read_text()
    assert readme.startswith("---\nlibrary_name: timm\n")
    assert "license: apache-2.0\n" in readme
    assert str(tmp_path) not in readme


def photographs(folder: Path, count: int) -> str:
    """A config that trains on so many pictures."""
    folder.mkdir()
    for i in range(count):
        Image.new("RGB", (4 + i, 4)).save(folder / f"{i}.png")
    return f"train_dataloader = dict(dataset=dict(type='UnlabelledImages', data_root='{folder}', %s), batch_size=2)\n"


def test_what_training_tolerates_does_not_stop_an_export(tmp_path: Path) -> None:
    """A dead link, a name that is no UTF-8: both are skipped or read in training."""
    cfg = photographs(tmp_path / "data", 3) % ""
    (tmp_path / "data/gone.png").symlink_to(tmp_path / "nowhere.png")
    os.rename(os.fsencode(tmp_path / "data/2.png"), os.fsencode(tmp_path / "data") + b"/caf\xe9.png")
    card = card_of(tmp_path, cfg)
    assert (card["data"]["images"], card["data"]["not_readable"]) == (4, 1)
    assert re.fullmatch("[0-9a-f]{64}", card["data"]["fingerprint"])


def test_paths_that_are_no_utf8_reach_the_card(tmp_path: Path) -> None:
    folder = os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9")
    os.mkdir(folder)
    write_student(Path(folder) / "a.pth")
    export(Path(folder) / "a.pth", tmp_path / "out", "sparse")
    assert "caf" in json.loads((tmp_path / "out/run_card.json").read_text())["source"]["checkpoint"]
    assert (tmp_path / "out/run_card.md").read_text(encoding="utf-8")


def test_the_run_is_counted_and_not_its_folder(tmp_path: Path) -> None:
    cfg = photographs(tmp_path / "data", 5)
    (tmp_path / "list.txt").write_text("0.png\n3.png\n")
    assert card_of(tmp_path, cfg % "limit=2")["data"]["images"] == 2
    (tmp_path / "listed").mkdir()
    listed = card_of(tmp_path / "listed", cfg % f"list_file='{tmp_path}/list.txt'")["data"]
    sizes = [(tmp_path / f"data/{i}.png").stat().st_size for i in (0, 3)]
    assert listed["fingerprint"] == hashlib.sha256(f"0.png\0{sizes[0]}\x003.png\0{sizes[1]}\0".encode()).hexdigest()
    (tmp_path / "other").mkdir()
    other = card_of(tmp_path / "other", (cfg % "ann_file='a.json'").replace("UnlabelledImages", "CocoDataset"))["data"]
    assert other["images_in_the_folder"] == 5


def test_what_cannot_be_looked_up_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cfg = photographs(tmp_path / "data", 2)
    assert "TypeError: " in card_of(tmp_path, cfg % "option_of_tomorrow=1")["data"]["unknown"]
    (tmp_path / "teacher.pth").write_bytes(b"weights")
    (tmp_path / "b").mkdir()
    digest = card_module.file_digest

    def denied(path: Path) -> str:
        if Path(path).name == "teacher.pth":
            raise PermissionError(13, "Permission denied")
        return digest(path)

    monkeypatch.setattr(card_module, "file_digest", denied)
    card = card_of(tmp_path / "b", f"model = dict(teacher=dict(checkpoint='{tmp_path}/teacher.pth'))\n")
    assert "Permission denied" in card["teacher"]["unknown"]


@pytest.mark.parametrize(
    ("text", "kept"),
    [
        ("data_root='/home/ada/photos'", "data_root='~/photos'"),
        ("/Users/Ada L/x C:\\Users\\ada\\x", "~ L/x ~\\x"),
        ("/root/x /root", "~/x ~"),
        ("/data/home/ada/x /data/root/x /rootfs/x", "/data/home/ada/x /data/root/x /rootfs/x"),
    ],
)
def test_home_folders_are_left_out(text: str, kept: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Path, "home", lambda: Path("/srv/people/ada"))
    assert card_module.without_homes(text) == kept
    assert card_module.without_homes("a /srv/people/ada/x /srv/people/adamant") == "a ~/x /srv/people/adamant"


def test_no_home_leaves_with_an_export(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Path, "home", lambda: tmp_path)
    torch.save(timm.create_model("test_resnet").state_dict(), tmp_path / "a.pth")
    export(tmp_path / "a.pth", tmp_path / "out", encoder="test_resnet")
    write_student(tmp_path / "b.pth")
    export(tmp_path / "b.pth", tmp_path / "onnx", "torchscript")
    for file in (*(tmp_path / "out").iterdir(), *(tmp_path / "onnx").iterdir()):
        assert str(tmp_path).encode() not in file.read_bytes(), file


@pytest.mark.parametrize(
    ("name", "logger", "expected"),
    [
        ("epoch_3.pth", {}, 43.0),
        ("iter_9.pth", {"log_metric_by_epoch": False}, 44.0),
        ("epoch_3_step_2.pth", {}, 42.5),  # its weights were never validated; those in the file do not say of what they are
        ("best_knn_top1_epoch_3.pth", {}, 42.5),  # written after its validation, so that the file itself has them
    ],
)
def test_scores_are_those_of_the_checkpoint(name: str, logger: dict, expected: float, tmp_path: Path) -> None:
    write_student(tmp_path / name)
    checkpoint = torch.load(tmp_path / name, weights_only=False)
    checkpoint["meta"] |= dict(epoch=3, iter=9, cfg=f"default_hooks = dict(logger={logger})")
    torch.save(checkpoint, tmp_path / name)
    (tmp_path / "20261201/vis_data").mkdir(parents=True)
    lines = ['{"knn/top1": 41.0, "step": 2}', '{"knn/top1": 43.0, "time": 1.0, "step": 3}', '{"knn/top1": 44.0, "step": 9}']
    (tmp_path / "20261201/vis_data/scalars.json").write_text("\n".join(['{"lr": 0.1, "loss": 1.0, "step": 3}', *lines]))
    export(tmp_path / name, tmp_path / "out")
    assert json.loads((tmp_path / "out/run_card.json").read_text())["metrics"] == {"knn/top1": expected}


def test_metrics_that_json_cannot_hold(tmp_path: Path) -> None:
    write_student(tmp_path / "a.pth")
    checkpoint = torch.load(tmp_path / "a.pth", weights_only=False)
    checkpoint["meta"]["seed"] = float("nan")
    torch.save(checkpoint, tmp_path / "a.pth")
    export(tmp_path / "a.pth", tmp_path / "out")
    text = (tmp_path / "out/run_card.json").read_text()
    assert json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))["source"]["seed"] == "nan"


@pytest.mark.parametrize("text", ["CC-BY 4.0: see page", 'my "own" # licence\nsecond: line', "- a", "{}"])
def test_any_licence_gives_a_readable_front_matter(tmp_path: Path, text: str) -> None:
    """The hub refuses invalid metadata after the upload: github.com/huggingface/huggingface_hub/issues/1927."""
    card_of(tmp_path, licences={"weights": text})
    front = (tmp_path / "out/README.md").read_text().split("---\n")[1]
    found = yaml.safe_load(front)
    assert (found["license"], found["license_name"], found["library_name"]) == ("other", text, "timm")


def test_what_is_unknown_is_said_to_be(tmp_path: Path) -> None:
    card = card_of(tmp_path)
    absent = "unknown: the checkpoint does not say"
    assert {card["source"][key] for key in ("seed", "commit", "time")} == {absent}
    assert card["teacher"] == {"name": absent, "file": absent, "sha256": absent}
    assert card["data"] == {"root": absent, "fingerprint": absent}
    assert "license:" not in (tmp_path / "out/README.md").read_text()


def test_files_that_are_gone(tmp_path: Path) -> None:
    cfg = "data_root = '/gone/data'\nmodel = dict(teacher=dict(type='MAETeacher', checkpoint='/gone/teacher.pth'))\n"
    card = card_of(tmp_path, cfg)
    assert card["data"]["fingerprint"] == "unknown: no such folder on this machine any more"
    assert card["teacher"]["sha256"] == "unknown: no such file on this machine any more"
    assert card["teacher"]["name"] == "MAETeacher"


def test_trained_without_a_teacher(tmp_path: Path) -> None:
    assert card_of(tmp_path, "model = dict(teacher=None)\n")["teacher"]["name"] == "none: trained without a teacher"


def test_a_file_of_others_has_no_run(tmp_path: Path) -> None:
    torch.save(timm.create_model("test_resnet").state_dict(), tmp_path / "a.pth")
    export(tmp_path / "a.pth", tmp_path / "out", encoder="test_resnet")
    card = json.loads((tmp_path / "out/run_card.json").read_text())
    absent = "unknown: the file was read as one of another project"
    assert (card["source"]["epoch"], card["metrics"], card["config"]) == (absent, absent, absent)


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ("a = 1\nb = dict(c=[1, (2.5, -3)], d='x', e=None)", {"a": 1, "b": {"c": [1, (2.5, -3)], "d": "x", "e": None}}),
        ("a = {'b': dict(c=True)}", {"a": {"b": {"c": True}}}),
        ("a = __import__('os').getcwd()\nb = 2\nc = dict(d=open('x'))\nimport os", {"b": 2}),
        ("a = (", {}),
        (None, {}),
    ],
)  # fmt: skip
def test_config_is_read_without_running_it(text: str | None, values: dict) -> None:
    assert literal_config(text) == values


def test_page_nests_lists(tmp_path: Path) -> None:
    card_of(tmp_path, "model = dict(teacher=None)\n")
    page = (tmp_path / "out/run_card.md").read_text()
    assert re.search(r"- model.safetensors:\n  - sha256: [0-9a-f]{64}\n  - bytes: \d+\n", page)
