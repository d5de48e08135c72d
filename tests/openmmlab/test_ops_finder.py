"""``mmcv._ext``: found only when there is no compiled one, loaded late, announced once, and honest about what is missing."""

import importlib
import importlib.util
import logging
import subprocess
import sys

import pytest

from hgkd.openmmlab import register_ops
from hgkd.openmmlab.ops import finder


def run(code: str, *paths: str) -> str:
    """Output of ``code`` in a fresh interpreter that looks into ``paths`` first."""
    code = f"import sys; sys.path[:0] = {list(paths)!r}\n{code}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return done.stdout.strip()


def test_registering_imports_nothing_heavy(ops):
    code = "from hgkd.openmmlab import register_ops; register_ops(); print({'torch', 'mmcv', 'mmengine'} & set(sys.modules))"
    assert run(code) == "set()"


@pytest.mark.parametrize("order", ["register_ops(); import mmcv._ext", "import mmcv._ext; register_ops()"])
def test_a_compiled_module_is_preferred(tmp_path, order):
    (tmp_path / "mmcv").mkdir()
    (tmp_path / "mmcv/__init__.py").touch()
    (tmp_path / "mmcv/_ext.py").write_text("origin = 'compiled here'")
    code = f"from hgkd.openmmlab import register_ops; {order}; print(mmcv._ext.origin, '|', register_ops())"
    assert run(code, str(tmp_path)) == "compiled here | compiled"


def test_a_compiled_module_that_appears_later_is_preferred(tmp_path):
    (tmp_path / "mmcv").mkdir()
    (tmp_path / "mmcv/__init__.py").touch()
    code = "from hgkd.openmmlab import register_ops; print(register_ops()); import pathlib, importlib, mmcv\n"
    code += "pathlib.Path(mmcv.__file__).with_name('_ext.py').touch(); importlib.invalidate_caches()\n"
    code += "import mmcv._ext; print(mmcv._ext.__spec__.origin)"
    assert run(code, str(tmp_path)).splitlines() == ["torchvision", str(tmp_path / "mmcv/_ext.py")]


def test_without_mmcv_the_remedy_is_named(monkeypatch):
    monkeypatch.delitem(sys.modules, "mmcv._ext", raising=False)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match=r"mmcv is not installed; pip install 'hgkd\[downstream\]'"):
        register_ops()


def test_registering_twice_adds_one_finder(ops):
    assert register_ops() == register_ops() == "torchvision"
    assert sys.meta_path.count(finder._FINDER) == 1


def test_no_other_module_is_answered_for():
    assert finder._FINDER.find_spec("mmcv._extra") is None
    assert finder._FINDER.find_spec("mmcv") is None


def test_the_module_has_a_spec(ops):
    module = sys.modules["mmcv._ext"]
    assert importlib.util.find_spec("mmcv._ext") is module.__spec__
    assert module.__spec__.origin == "hgkd.openmmlab.ops"


def test_one_log_line_says_that_it_is_in_use(ops):
    from mmengine.logging import MMLogger

    lines: list[str] = []
    handler, logger = logging.Handler(), MMLogger.get_current_instance()
    handler.emit = lambda record: lines.append(record.getMessage())
    logger.addHandler(handler)
    try:
        spec = finder._FINDER.find_spec("mmcv._ext")
        spec.loader.exec_module(importlib.util.module_from_spec(spec))
        register_ops()
        importlib.import_module("mmcv._ext")
    finally:
        logger.removeHandler(handler)
    assert len(lines) == 1
    assert "mmcv._ext: no compiled module installed, using hgkd.openmmlab.ops" in lines[0]


def test_rotated_nms_is_refused_by_name(ops):
    import torch

    with pytest.raises(NotImplementedError, match=r"'nms_rotated' has no replacement .* or use a model without it"):
        ops.nms_rotated(torch.zeros(1, 5), torch.zeros(1), 0.5)


def test_other_operators_are_refused_by_name(ops):
    import torch

    boxes = torch.tensor([[0.0, 0.0, 4.0, 4.0]])
    with pytest.raises(NotImplementedError, match="'bbox_overlaps' has no replacement"):
        ops.bbox_overlaps(boxes, boxes)


def test_attributes_of_python_are_not_invented(ops):
    assert not hasattr(sys.modules["mmcv._ext"], "__path__")


def test_environment_report(ops):
    assert ops.get_compiler_version() == ops.get_compiling_cuda_version() == "none (hgkd.openmmlab.ops)"
