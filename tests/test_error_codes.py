"""Codes of errors: every error that a user can meet has one, one cause keeps one code, docs/reference/errors.md lists them."""

import ast
import pickle
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from refusals import refused
from torch.utils.data import DataLoader, Dataset

import hgkd.export
import hgkd.training
from hgkd.cli.doctor import main as doctor
from hgkd.diagnosis.error_codes import CODE, code_given, coded_errors, made_errors, page, template
from hgkd.errors import DataError, InvalidValueError, MissingFileError, Refusal, code_of

ROOT = Path(__file__).parents[1]

READ = "an image that is not read: the data set counts it, or a coded error tells its text"
METHOD = "a method that a subclass gives, or a protocol of Python's"
ORDER = "a call in the wrong order, which only code of this package can make"
SIGNAL = "no error: it carries a signal, or an error that another process has met, to where it is told"

# function -> (what it raises, why that has no code)
UNCODED = {
    "hgkd.__getattr__": ("AttributeError", METHOD),
    "hgkd.api.compare.compare": ("failed[0]", SIGNAL),
    "hgkd.cli.common.device_name": ("ArgumentTypeError", "argparse tells it, in its own form"),
    "hgkd.data.images._load": ("IndexError", METHOD),
    "hgkd.data.channels.known_range": ("BandsError", READ),
    "hgkd.data.channels.channel_values": ("BandsError", READ),
    "hgkd.data.channels._array_values": ("BandsError", READ),
    "hgkd.data.channels._tiff_values": ("BandsError", READ),
    "hgkd.data.channels._by_tifffile": ("BandsError OSError", READ),
    "hgkd.data.pixels._refuse_array": ("BandsError", READ),
    "hgkd.data.pixels.open_image": ("OSError", READ),
    "hgkd.data.pixels.decode": ("Image.DecompressionBombError", READ),
    "hgkd.data.pixels._cv2_values": ("OSError", READ),
    "hgkd.data.pixels._check_bands": ("BandsError", READ),
    "hgkd.data.pixels._foreign_values": ("Image.DecompressionBombError OSError", READ),
    "hgkd.data.shards.shard_members": ("tarfile.ReadError", READ),
    "hgkd.data.stores.read_part": ("OSError", READ),
    "hgkd.data.tables.open": ("OSError", READ),
    "hgkd.distillers.masked._told_of": ("type(error)", "the error that was caught, whose code it has as its cause"),
    "hgkd.evaluation.records.read_json": ("KeyError", "what follows tells it with a code"),
    "hgkd.mmcv_ops.finder.missing": ("AttributeError", METHOD),
    "hgkd.objectives.base.require_prepared": ("RuntimeError", ORDER),
    "hgkd.teachers.base.forward": ("RuntimeError", ORDER),
    "hgkd.training.loop.told_signals": ("SystemExit", SIGNAL),
    "hgkd.training.loop.update_params": ("RuntimeError", ORDER),
    "hgkd.training.loop.settle": ("RuntimeError", ORDER),
    "hgkd.training.runner._raise_current": ("error", SIGNAL),
    "hgkd.weights.files._statistic_of_history": ("pickle.UnpicklingError", "what pickle asks of its readers"),
}
MADE_ELSEWHERE = {"_diverged", "self._refusal"}  # functions whose result is raised and that give the code themselves


def raises(node: ast.AST, inside: str) -> Iterator[tuple[str, ast.expr]]:
    """The innermost function and the error of every ``raise`` below a node."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Raise) and child.exc is not None:
            yield inside, child.exc
        yield from raises(child, child.name if isinstance(child, (ast.FunctionDef, ast.ClassDef)) else inside)


def uncoded() -> dict[str, set[str]]:
    """Function -> what it raises without a code; methods that a subclass may define are left out (NotImplementedError)."""
    found: dict[str, set[str]] = {}
    for file in sorted((ROOT / "hgkd").rglob("*.py")):
        module = ".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        for function, error in raises(ast.parse(file.read_text(encoding="utf-8")), ""):
            name = ast.unparse(error.func if isinstance(error, ast.Call) else error)
            coded = isinstance(error, ast.Call) and code_given(error) is not None
            private = re.match("_[A-Z]", name)  # a signal within a module, which no user sees
            if not coded and not private and name not in MADE_ELSEWHERE and name != "NotImplementedError":
                found.setdefault(f"{module}.{function}", set()).add(name)
    return found


def test_every_error_that_a_user_can_meet_has_a_code():
    assert uncoded() == {function: set(names.split()) for function, (names, _) in UNCODED.items()}


def test_an_error_that_is_made_and_raised_later_has_a_code_too():
    own = {kind.__name__ for kind in subclasses(Refusal)}
    for file in sorted((ROOT / "hgkd").rglob("*.py")):
        for call in made_errors(ast.parse(file.read_text(encoding="utf-8"))):
            if ast.unparse(call.func) in own and ast.unparse(call.args[0]) != "code":
                assert code_given(call) is not None, f"{file}:{call.lineno} {ast.unparse(call)}"


def subclasses(kind: type[Refusal]) -> set[type[Refusal]]:
    direct = set(kind.__subclasses__())
    return direct.union(*map(subclasses, direct))


def test_a_code_stands_for_one_cause():
    """Where places share a code, users catch one kind of error for it."""
    kinds: dict[str, set[type]] = {}
    own = {kind.__name__: kind for kind in subclasses(Refusal)}
    for error in coded_errors():
        assert CODE.fullmatch(error.code)
        kinds.setdefault(error.code, set()).add(next(k for k in own[error.kind].__mro__ if k.__module__ == "builtins"))
    assert len(kinds) > 500
    assert {code: found for code, found in kinds.items() if len(found) > 1} == {}


def test_the_page_of_codes_is_up_to_date(tmp_path, capsys):
    assert (ROOT / "docs/reference/errors.md").read_text(encoding="utf-8") == page(), (
        "run hgkd doctor errors --out docs/reference/errors.md"
    )
    assert doctor(["errors", "--out", str(tmp_path / "errors.md")]) == 0
    assert (tmp_path / "errors.md").read_text(encoding="utf-8") == page()
    assert "codes written to" in capsys.readouterr().out


def test_the_page_shows_messages_with_their_values():
    text = page()
    assert "| `mask-ratio-too-high` | InvalidValueError | `cells` | mask\\_ratio {mask\\_ratio} leaves no visible cell" in text
    assert "| `layout-unknown` | InvalidValueError | `cli.make_shapes` | unknown layout {layout}; did you mean {...}? |" in text


def test_codes_can_be_searched(capsys):
    assert doctor(["errors", "mask-ratio-too-high"]) == 0
    assert capsys.readouterr().out.startswith(
        "mask-ratio-too-high (InvalidValueError, hgkd.cells)\n    mask_ratio {mask_ratio}"
    )
    assert doctor(["errors", "no such word"]) == 2
    assert "'no such word'" in (said := capsys.readouterr().err)
    assert "[no-code-matches]\n" in said


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("'a'", "a"),
        ("f'{self.path!r} is {x + 1}'", "{path} is {...}"),
        ("f'a' + (f'b {c}' if c else '')", "a{...}"),
        ("unknown_name_message('dish', name, known)", "unknown dish {name}; did you mean {...}?"),
    ],
)
def test_templates(text, expected):
    assert template(ast.parse(text, mode="eval").body) == expected


def test_errors_are_those_that_python_asks_for_and_keep_their_code():
    for kind, builtin in (
        ("InvalidValueError", ValueError),
        ("MissingFileError", FileNotFoundError),
        ("StoppedError", RuntimeError),
    ):
        error = getattr(hgkd.errors, kind)("some-cause", "a text")
        assert isinstance(error, builtin)
        assert (str(error), code_of(error)) == ("a text", "some-cause")
        again = pickle.loads(pickle.dumps(error))
        assert (type(again), str(again), code_of(again)) == (type(error), "a text", "some-cause")


def test_the_code_of_an_error_is_that_of_its_cause_where_it_has_none():
    def wrap():
        try:
            raise MissingFileError("some-cause", "x")
        except FileNotFoundError as error:
            raise KeyError("y") from error

    with pytest.raises(KeyError) as caught:
        wrap()
    assert code_of(caught.value) == "some-cause"
    assert code_of(KeyError("y")) is None


class Broken(Dataset):
    def __len__(self):
        return 1

    def __getitem__(self, index):
        raise DataError("some-cause", f"image {index} is cut off")


def test_an_error_of_a_reading_process_keeps_its_type_and_words():
    with pytest.raises(DataError, match="image 0 is cut off"):
        next(iter(DataLoader(Broken(), num_workers=1)))


def test_the_check_of_refusals_cannot_pass_for_another_one():
    def held(check, *raised):
        try:
            with check:
                for error in raised:
                    raise error
        except (AssertionError, pytest.fail.Exception):
            return False
        return True

    error = InvalidValueError("too-high", "use 0.75, not 10.5, for `ratio` in /tmp/a.pth")
    for values in ((), ("0.75",), ("10.5", "`ratio`"), ("/tmp/a.pth", 10.5)):
        assert held(refused(ValueError, "too-high", *values), error)
    assert not held(refused(ValueError, "too-high"))
    assert not held(refused(ValueError, "too-low"), error)
    assert not held(refused(ValueError, "too-high", "0.7"), error)
    assert not held(refused(ValueError, "too-high", "10"), error)
    assert not held(refused(ValueError, "too-high"), ValueError("too-high"))
    with pytest.raises(InvalidValueError), refused(TypeError, "too-high"):
        raise error
