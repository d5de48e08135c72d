"""The command hgkd: every command answers, mistakes end with 2 and one sentence, nothing heavy is imported for help."""

import subprocess
import sys

import pytest

from hgkd import __version__
from hgkd.cli import main as entry
from hgkd.cli.common import command
from hgkd.cli.main import COMMANDS, main


def test_help_lists_every_command(capsys):
    assert main(["--help"]) == 0
    out = capsys.readouterr().out
    assert all(f"  {name}" in out for name in COMMANDS)


def test_without_a_command_the_help_is_shown_and_the_code_is_that_of_a_mistake(capsys):
    assert main([]) == 2
    assert "usage: hgkd" in capsys.readouterr().out


def test_version(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"hgkd {__version__}\n"


def test_unknown_command_is_told_with_the_nearest(capsys):
    assert main(["trian"]) == 2
    assert "unknown command 'trian'; did you mean 'train'" in capsys.readouterr().err


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_a_help_with_its_purpose_and_debug(name, capsys):
    with pytest.raises(SystemExit) as ended:
        main([name, "--help"])
    assert ended.value.code == 0
    out = capsys.readouterr().out
    assert f"hgkd {name}" in out
    assert "--debug" in out
    assert len(out.splitlines()) > 8


def test_help_imports_no_torch():
    code = "import sys; from hgkd.cli.main import main; main(['--help']); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False, capture_output=True).returncode == 0


def test_a_mistake_is_one_sentence_and_debug_shows_where_it_comes_from(capsys):
    @command
    def refuse(argv):
        raise ValueError(f"{argv} is wrong; write it otherwise")

    assert refuse(["a"]) == 2
    assert capsys.readouterr().err == "error: ['a'] is wrong; write it otherwise\n(--debug shows where it comes from)\n"
    with pytest.raises(ValueError, match="wrong"):
        refuse(["--debug", "a"])


def test_a_fault_of_ours_is_not_hidden():
    @command
    def fail(argv):
        raise KeyError("ours")

    with pytest.raises(KeyError):
        fail([])


def test_the_exit_code_of_a_command_is_its_own(monkeypatch):
    monkeypatch.setattr(
        entry.importlib, "import_module", lambda name: type("module", (), {"main": staticmethod(lambda argv: 1)})
    )
    assert main(["doctor"]) == 1
