"""Students leave as what the user's stack already loads, each with the proof that it is the same network; and the way in."""

import sys
import types
from typing import Any

from hgkd.export.exporter import PARTS, export
from hgkd.export.job import ExportError, ExportReport, Job, MissingLibraryError, Target, Written
from hgkd.export.plans import UnsupportedLayerError
from hgkd.export.preprocessing import PREPROCESSINGS
from hgkd.export.targets import TARGETS, register_target
from hgkd.networks.backbones import Source, StudentCheckpoint, load_backbone, read_source, read_student
from hgkd.students.exported import load_sparse, load_student
from hgkd.weights.export_folder import read_graph, read_spec
from hgkd.weights.importing import ImportReport, import_weights
from hgkd.weights.run_file import EncoderSpec

__all__ = [
    "PARTS",
    "PREPROCESSINGS",
    "TARGETS",
    "EncoderSpec",
    "ExportError",
    "ExportReport",
    "ImportReport",
    "Job",
    "MissingLibraryError",
    "Source",
    "StudentCheckpoint",
    "Target",
    "UnsupportedLayerError",
    "Written",
    "export",
    "import_weights",
    "load_backbone",
    "load_sparse",
    "load_student",
    "read_graph",
    "read_source",
    "read_spec",
    "read_student",
    "register_target",
]


class _Callable(types.ModuleType):
    """Lets the package be called: ``hgkd.export(checkpoint, out, to="timm")`` is :func:`hgkd.export.export`."""

    def __call__(self, *args: Any, **kwargs: Any) -> ExportReport:
        return export(*args, **kwargs)


sys.modules[__name__].__class__ = _Callable
