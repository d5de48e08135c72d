"""``--cfg-options``: what is typed is what arrives."""

import argparse

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from hgkd.cli.common import device_name
from hgkd.config.options import OptionsAction, option_text, option_value


def parse(*pairs):
    parser = argparse.ArgumentParser()
    parser.add_argument("--cfg-options", nargs="+", action=OptionsAction, default={})
    return parser.parse_args(["--cfg-options", *pairs]).cfg_options


@pytest.mark.parametrize(
    ("pair", "value"),
    [
        ("data_root=/my pics/train", "/my pics/train"),
        ("train_dataloader.dataset.ann_file=a,b.json", "a,b.json"),
        ("data_root=2024", "2024"),
        ("teacher_features=2024", "2024"),
        ("backbone=None", None),
        ("epochs=3", 3),
        ("lr=1e-3", 1e-3),
        ("amp=true", True),
        ("image_size=64,96", [64, 96]),
        ("scale=(0.2, 1.0)", (0.2, 1.0)),
        ("names=[a, b]", ["a", "b"]),
        ("metainfo.classes=('red cell', 'white cell')", ("red cell", "white cell")),
        ("name='007'", "007"),
        ("note=two words", "two words"),
        ("a=b=c", "b=c"),
        ("names=[red cell, ~/white cell]", ["red cell", "~/white cell"]),
        ("names=[a/b, (c, d-e)]", ["a/b", ("c", "d-e")]),
        ("names=one,", ["one"]),
        ("names=(a-1),(b-2)", [("a-1",), ("b-2",)]),
        ("note=f(a,b)", "f(a,b)"),
        ("names=[f(a,b), c]", ["f(a,b)", "c"]),
        ("hook=dict(type='EMAHook', momentum=1e-3)", {"type": "EMAHook", "momentum": 1e-3}),
        ("hook={type: EMAHook, update_buffers: true}", {"type": "EMAHook", "update_buffers": True}),
        ("hooks=[dict(type=EMAHook, at=[1, (2,)]), dict()]", [{"type": "EMAHook", "at": [1, (2,)]}, {}]),
    ],
)
def test_values_by_hand(pair, value):
    (found,) = parse(pair).values()
    assert found == value
    assert type(found) is type(value)


@pytest.mark.parametrize(
    ("pairs", "message"),
    [
        (["epochs"], "takes KEY=VALUE, got 'epochs'"),
        (["a=[1,(2]"], r"the brackets of 'a=[1,(2]' do not close"),
        (["a=1),(2"], r"the brackets of 'a=1),(2' do not close"),
        (["a=[{type: res-net}]"], "the dict of 'a=[{type: res-net}]' is not written as Python reads it"),
        (["a=dict(b, c=1)"], "the dict of 'a=dict(b, c=1)' is not written as Python reads it"),
        (["a=1", "b=2", "a=3"], "sets a twice, to 1 and to 3; take one of them out"),
        (["a.b=1", "a={'c': 2}"], "a comes after a.b, which is a part of it and would be lost"),
    ],
)
def test_slips_are_refused(pairs, message, capsys):
    with pytest.raises(SystemExit) as ended:
        parse(*pairs)
    assert ended.value.code == 2
    assert message in capsys.readouterr().err


def test_what_contradicts_nothing_is_taken():
    assert parse("a=1", "b=2", "a=1") == {"a": 1, "b": 2}
    assert parse("a={'c': 2}", "a.b=1", "ab=3") == {"a": {"c": 2}, "a.b": 1, "ab": 3}


LEAVES = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text()


@example("epochs", ",)")  # brackets that do not close are refused
@example("epochs", "dict(a,b)")
@example("epochs", "f(a,b)")
@given(st.sampled_from(["data_root", "epochs", "model.mean"]), LEAVES | st.lists(LEAVES | st.lists(LEAVES)))
def test_what_is_written_is_read(key, value):
    if key == "data_root" and not isinstance(value, (str, type(None), list)):
        value = str(value)  # a path is a text
    assert option_value(key, option_text(key, value)) == value


def test_a_device_that_is_not_here_is_refused():
    assert [device_name(name) for name in ("auto", "cpu")] == ["auto", "cpu"]
    for absent in ("cuda:99", "gpu"):
        with pytest.raises(argparse.ArgumentTypeError, match=rf"'{absent}' is no device of this machine \(.*\); take cpu"):
            device_name(absent)
