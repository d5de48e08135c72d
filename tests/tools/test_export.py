"""tools/export.py: what it prints, what it refuses."""

import hashlib
from pathlib import Path

import pytest
import timm
import torch
from student_checkpoints import write_student

from hgkd.cli import export


def test_export_then_refuse_then_force(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[str] = []
    monkeypatch.setattr("hgkd.export.exporter.print_log", lambda text, logger: told.append(text))
    source = write_student(tmp_path / "a.pth")
    command = [f"{tmp_path}/a.pth", "--to", "timm", "--out", f"{tmp_path}/out"]
    assert export.main(command) == 0
    printed = "".join(capsys.readouterr().out.split())
    assert "timm.create_model('local-dir:" in printed
    assert f"{sum(p.numel() for p in source.parameters()):,}parameters" in printed
    digest = hashlib.sha256((tmp_path / "a.pth").read_bytes()).hexdigest()
    assert f"sourcesha256{digest}" in printed.replace("│", ""), "longer than the terminal is wide, and not cut"
    assert "…" not in printed
    assert told[0] == "1 of 2: writing the backbone for timm"
    assert told[1].startswith("2 of 2: reading it back with timm ")
    (tmp_path / "plain").touch()
    modes = {file.stat().st_mode for file in (tmp_path / "out").iterdir()}
    assert modes == {(tmp_path / "plain").stat().st_mode}, "whoever may read other files may read these"
    again = timm.create_model(f"local-dir:{tmp_path}/out", pretrained=True)
    assert all(torch.equal(v, again.state_dict()[k]) for k, v in source.state_dict().items())

    assert export.main(command) == 2
    assert "--force to replace an export" in capsys.readouterr().err
    assert export.main([*command, "--force"]) == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["gone.pth"], "checkpoint gone.pth does not exist"),
        (["gone.pth", "--to", "tensorflow"], "unknown export target 'tensorflow'"),
        (["gone.pth", "--cell", "32"], "target 'timm' has no option 'cell' for the backbone; it takes: none"),
        (["gone.pth", "--latency", "64"], "and timm is none; leave it out"),
        (["gone.pth", "--to", "onnx", "--latency", "0"], "latency takes the side of an image in pixels, e.g. 224, got 0"),
        (["gone.pth", "--licence", "mit"], "--licence takes FIELD=TEXT, e.g. weights=apache-2.0, got 'mit'"),
    ],
)
def test_mistakes_end_with_a_line(
    tmp_path: Path, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert export.main([*arguments, "--out", f"{tmp_path}/out"]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_file_of_others(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    spark = {f"sparse_encoder.sp_cnn.{key}": value for key, value in timm.create_model("test_resnet").state_dict().items()}
    torch.save({"module": spark}, tmp_path / "spark.pth")
    command = [f"{tmp_path}/spark.pth", "--encoder", "test_resnet", "--to", "spconv", "--out", f"{tmp_path}/out"]
    assert export.main([*command, "--licence", "weights=MIT", "data=unknown"]) == 0
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "spark.pth: " in line]
    assert "key style timm" in line
    page = (tmp_path / "out/run_card.md").read_text()
    assert "weights: MIT" in page
    assert "key style timm under 'sparse_encoder.sp_cnn.'; not part of the encoder: 2 of fc" in page


def test_a_whole_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    state = {"student.backbone.weight": torch.ones(3), "generators.0.weight": torch.ones(1)}
    torch.save({"meta": {}, "state_dict": state}, tmp_path / "a.pth")
    assert export.main([f"{tmp_path}/a.pth", "--part", "model", "--to", "mmseg", "--out", f"{tmp_path}/out"]) == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert "1 tensors, 3 parameters" in printed
    assert "outputs on" not in printed
    assert torch.load(tmp_path / "out/model.pth")["state_dict"].keys() == {"backbone.weight"}


def test_help_lists_every_target(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        export.main(["--help"])
    printed = capsys.readouterr().out
    assert all(name in printed for name in export.TARGETS)
