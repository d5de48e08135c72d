"""``mmcv._ext``: found only when there is no compiled one, loaded late, announced once, and honest about what is missing."""

import importlib
import importlib.util
import logging
import subprocess
import sys
import warnings

import pytest
from refusals import refused

from hgkd.mmcv_ops import finder
from hgkd.openmmlab import register_ops


@pytest.fixture
def other_mmcv(tmp_path, monkeypatch):
    """Folder of an empty package that takes the place of mmcv during a test."""
    own = {name: sys.modules.pop(name) for name in list(sys.modules) if name.partition(".")[0] == "mmcv"}
    package = tmp_path / "mmcv"
    package.mkdir()
    (package / "__init__.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    yield package
    for name in [name for name in sys.modules if name.partition(".")[0] == "mmcv"]:
        del sys.modules[name]
    sys.modules.update(own)


def test_registering_imports_no_mmcv(ops):
    code = "import sys; from hgkd.openmmlab import register_ops; print(register_ops()); print('mmcv' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["torchvision", "False"]


def test_the_proof_of_an_export_registers_before_it_imports(ops):
    pytest.importorskip("mmdet")
    code = "from hgkd.export.job import optional; print(optional('mmdet.models')[1])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split()[-2] == "mmdet"  # and its version; else why it does not import


@pytest.mark.parametrize("import_first", [True, False])
def test_a_compiled_module_is_preferred(other_mmcv, import_first):
    (other_mmcv / "_ext.py").touch()
    if import_first:
        importlib.import_module("mmcv._ext")
    assert register_ops() == "compiled"
    assert importlib.import_module("mmcv._ext").__file__ == str(other_mmcv / "_ext.py")
    assert register_ops() == "compiled"


def test_a_compiled_module_that_appears_later_is_preferred(other_mmcv):
    assert register_ops() == "torchvision"
    (other_mmcv / "_ext.py").touch()
    importlib.invalidate_caches()
    assert importlib.import_module("mmcv._ext").__file__ == str(other_mmcv / "_ext.py")
    assert register_ops() == "compiled"


def test_without_mmcv_the_remedy_is_named(monkeypatch):
    monkeypatch.delitem(sys.modules, "mmcv._ext", raising=False)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with refused(ModuleNotFoundError, "mmcv-missing", "hgkd[downstream]"):
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
    assert module.__spec__.origin == "hgkd.mmcv_ops"


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
    assert "mmcv._ext: no compiled module installed, using hgkd.mmcv_ops" in lines[0]


def test_rotated_nms_is_refused_by_name(ops):
    import torch

    with refused(NotImplementedError, "mmcv-operator-missing", "nms_rotated"):
        ops.nms_rotated(torch.zeros(1, 5), torch.zeros(1), 0.5)


def test_other_operators_are_refused_by_name(ops):
    import torch

    boxes = torch.tensor([[0.0, 0.0, 4.0, 4.0]])
    with refused(NotImplementedError, "mmcv-operator-missing", "bbox_overlaps"):
        ops.bbox_overlaps(boxes, boxes)


def test_attributes_of_python_are_not_invented(ops):
    assert not hasattr(sys.modules["mmcv._ext"], "__path__")


def test_environment_report(ops):
    assert ops.get_compiler_version() == ops.get_compiling_cuda_version() == "none (hgkd.mmcv_ops)"


def test_what_torch_says_about_mmdets_own_lines_is_silent():
    said = "`torch.cuda.amp.autocast(args...)` is deprecated. Please use `torch.amp.autocast('cuda', args...)` instead."
    with warnings.catch_warnings(record=True) as heard:
        warnings.resetwarnings()
        register_ops()
        for module in ("mmdet.models.layers.se_layer", "my_own_layers"):
            warnings.warn_explicit(said, FutureWarning, "file.py", 1, module)
    assert len(heard) == 1  # about one's own lines it is told
