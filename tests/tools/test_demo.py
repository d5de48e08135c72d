"""hgkd demo: the whole chain once at toy size, equal terms for both students, and what it refuses."""

import os
import signal

import pytest

from hgkd.api import demo as demo_api
from hgkd.cli import demo as demo_tool
from hgkd.export import load_backbone
from hgkd.weights.files import read_checkpoint
from hgkd.weights.run_folder import find_last_checkpoint

TOY = demo_api.Plan(train=64, test=32, teacher_epochs=2, student_epochs=2, probe=8)


@pytest.mark.slow
def test_chain_at_toy_size(tmp_path, capsys):
    out = tmp_path / "a <b> & c"
    summary = demo_api.demo(out, quick=True, seed=3, plan=TOY)

    assert list(summary["results"]) == ["random ResNet-18", "pixels (SparK)", "H-GKD", "teacher (MAE)"]
    for found in summary["results"].values():
        for method in ("knn", "linear"):
            assert (found[method]["train_images"], found[method]["test_images"]) == (64, 32)
            assert 0 <= found[method]["top1"] <= 100
    assert load_backbone(summary["export"]).num_features == 512

    last = [read_checkpoint(find_last_checkpoint(out / "runs" / run)) for run in ("hgkd", "pixels")]
    assert [saved["meta"]["iter"] for saved in last] == [2 * 64 // 16] * 2  # the control learns for as many steps as H-GKD

    page = summary["report"].read_text(encoding="utf-8")
    assert page.count("data:image/png;base64,") == 5  # two pictures, three diagrams
    assert "<b>" not in page
    assert "a &lt;b&gt; &amp; c" in page
    for row in demo_api._rows(summary["results"], {}):
        assert all(f"<td>{cell}</td>" in page for cell in row[:3]), row

    printed = capsys.readouterr().out
    assert all(f"[{n}/7]" in printed for n in range(1, 8))
    assert str(summary["report"]) in printed
    told = "too short for its numbers to mean anything"
    assert told in printed[printed.index("frozen features") :]
    assert told in page


def test_folder_that_is_not_empty_is_left_alone(tmp_path, capsys):
    (tmp_path / "thesis.txt").write_text("three years")
    assert demo_tool.main(["--out", str(tmp_path)]) == 2
    assert "is not empty" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_demo_and_not_only_the_training_at_hand(number, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(demo_api, "QUICK", demo_api.Plan(train=32, test=16, teacher_epochs=2, student_epochs=1, probe=2))

    def interrupt(hook, runner, batch_idx, **_):
        if batch_idx == 0:
            os.kill(os.getpid(), number)

    monkeypatch.setattr(demo_api._Progress, "after_train_iter", interrupt)
    assert demo_tool.main(["--quick", "--out", str(tmp_path / "out")]) == 2
    printed = capsys.readouterr()
    assert "a signal ended the demo in the training 'teacher', so there is no table" in printed.err
    assert "stopped by a signal" in printed.out + printed.err
    assert "--resume" not in printed.out + printed.err
    assert not (tmp_path / "out/teacher.safetensors").exists()
    assert [path.name for path in (tmp_path / "out/runs").iterdir()] == ["teacher"]


def test_a_signal_before_the_training_ends_it_too(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(demo_api, "write_imagefolder", lambda *_, **__: os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(SystemExit) as ended:
        demo_tool.main(["--out", str(tmp_path / "out")])
    assert ended.value.code == 128 + signal.SIGTERM
    assert "stopped by SIGTERM: no report is written" in capsys.readouterr().err
