"""tools/demo.py: the whole chain once at toy size, and what it refuses."""

import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from hgkd.data.shapes import CLASSES, render_scene
from hgkd.export import load_backbone

sys.path.insert(0, str(Path(__file__).parents[2]))
from tools import demo as demo_tool

TOY = demo_tool.Plan(train=64, test=32, teacher_epochs=2, student_epochs=2, probe=8)


@pytest.mark.slow
def test_chain_at_toy_size(tmp_path, capsys):
    out = tmp_path / "a <b> & c"
    summary = demo_tool.demo(out, seed=3, plan=TOY)

    assert list(summary["results"]) == ["random ResNet-18", "pixels (SparK)", "H-GKD", "teacher (MAE)"]
    for found in summary["results"].values():
        for method in ("knn", "linear"):
            assert (found[method]["train_images"], found[method]["test_images"]) == (64, 32)
            assert 0 <= found[method]["top1"] <= 100
    assert load_backbone(summary["export"]).num_features == 512

    page = summary["report"].read_text(encoding="utf-8")
    assert page.count("data:image/png;base64,") == 5  # two pictures, three diagrams
    assert "<b>" not in page
    assert "a &lt;b&gt; &amp; c" in page
    for row in demo_tool._rows(summary["results"], {}):
        assert all(f"<td>{cell}</td>" in page for cell in row[:3]), row

    printed = capsys.readouterr().out
    assert all(f"[{n}/7]" in printed for n in range(1, 8))
    assert str(summary["report"]) in printed


def test_folder_that_is_not_empty_is_left_alone(tmp_path, capsys):
    (tmp_path / "thesis.txt").write_text("three years")
    assert demo_tool.main(["--out", str(tmp_path)]) == 2
    assert "is not empty" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


@pytest.mark.parametrize("seed", range(6))
def test_objects_are_cut_out_whole(seed):
    scene = render_scene(seed, demo_tool.SCENE_SIZE)
    marked = np.repeat((scene.instances == 1)[..., None].astype(np.uint8) * 255, 3, axis=2)
    cut = demo_tool.cut_object(SimpleNamespace(image=marked, boxes=scene.boxes), 64)
    x1, y1, x2, y2 = map(int, scene.boxes[0])
    side = min(max(x2 - x1, y2 - y1) * (1 + 2 * demo_tool.MARGIN), demo_tool.SCENE_SIZE)
    shown = (np.asarray(cut)[..., 0] / 255).sum() * (side / 64) ** 2
    assert shown == pytest.approx((scene.instances == 1).sum(), rel=0.05)


def test_images_follow_the_seed(tmp_path):
    for folder, seed in (("a", 0), ("b", 0), ("c", 1)):
        demo_tool.write_objects(tmp_path / folder, train=8, test=8, drawn_size=16, seed=seed)
    files = {name: sorted(p.relative_to(tmp_path / name) for p in (tmp_path / name).rglob("*.png")) for name in "abc"}
    assert files["a"] == files["b"] == files["c"]
    assert {path.parts[:2] for path in files["a"]} == {(split, name) for split in ("train", "test") for name in CLASSES}
    contents = {name: [(tmp_path / name / path).read_bytes() for path in files[name]] for name in "abc"}
    assert contents["a"] == contents["b"]
    assert all(x != y for x, y in zip(contents["a"], contents["c"], strict=True))
    assert len(set(contents["a"])) == 16, "train and test share no image"
