"""Students leave as what the user's stack already loads, each with the proof that it is the same network; and the way in."""

from hgkd.export.exporter import PARTS, export
from hgkd.export.importing import ImportReport, import_weights, load_backbone, read_source, read_spec
from hgkd.export.job import ExportError, ExportReport, MissingLibraryError
from hgkd.export.plans import UnsupportedLayerError
from hgkd.export.source import EncoderSpec, Source, StudentCheckpoint, read_student
from hgkd.export.targets import TARGETS
from hgkd.export.targets.sparse import load_sparse, load_student

__all__ = [
    "PARTS",
    "TARGETS",
    "EncoderSpec",
    "ExportError",
    "ExportReport",
    "ImportReport",
    "MissingLibraryError",
    "Source",
    "StudentCheckpoint",
    "UnsupportedLayerError",
    "export",
    "import_weights",
    "load_backbone",
    "load_sparse",
    "load_student",
    "read_source",
    "read_spec",
    "read_student",
]
