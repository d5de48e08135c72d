"""Students as ordinary dense weights, with the proof that they are the same network."""

from hgkd.export.backbone import TARGETS, ExportError, ExportReport, export_backbone, load_backbone, read_spec
from hgkd.export.source import EncoderSpec, StudentCheckpoint, read_student

__all__ = [
    "TARGETS",
    "EncoderSpec",
    "ExportError",
    "ExportReport",
    "StudentCheckpoint",
    "export_backbone",
    "load_backbone",
    "read_spec",
    "read_student",
]
