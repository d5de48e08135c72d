"""Weight files: read safely, named as timm names them, loaded strictly."""

from hgkd.weights.export_folder import read_spec
from hgkd.weights.files import read_checkpoint, read_weights, tensors_of
from hgkd.weights.identify import Kind, WeightFile, identify
from hgkd.weights.importing import ImportReport, import_weights
from hgkd.weights.loading import LoadReport, load_strict
from hgkd.weights.run_file import ClassifierSpec, EncoderSpec
from hgkd.weights.run_folder import checkpoint_file, find_last_checkpoint

__all__ = [
    "ClassifierSpec",
    "EncoderSpec",
    "ImportReport",
    "Kind",
    "LoadReport",
    "WeightFile",
    "checkpoint_file",
    "find_last_checkpoint",
    "identify",
    "import_weights",
    "load_strict",
    "read_checkpoint",
    "read_spec",
    "read_weights",
    "tensors_of",
]
