"""tools/export.py: what it prints, what it refuses."""

import sys
from pathlib import Path

import pytest
import timm
import torch
from student_checkpoints import write_student

sys.path.insert(0, str(Path(__file__).parents[2] / "tools"))
import export


def test_export_then_refuse_then_force(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = write_student(tmp_path / "a.pth")
    command = [f"{tmp_path}/a.pth", "--to", "timm", "--out", f"{tmp_path}/out"]
    assert export.main(command) == 0
    printed = "".join(capsys.readouterr().out.split())
    assert "timm.create_model('local-dir:" in printed
    assert f"{sum(p.numel() for p in source.parameters()):,}parameters" in printed
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
    ],
)
def test_mistakes_end_with_a_line(
    tmp_path: Path, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert export.main([*arguments, "--out", f"{tmp_path}/out"]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
