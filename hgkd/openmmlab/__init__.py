"""What hgkd adds to OpenMMLab's detectors and segmentors (mmdet, mmsegmentation, or the OneDL forks of the same names).

Importing this package imports neither mmcv, mmdet nor mmseg: the parts that need them do.

>>> from hgkd.openmmlab import register_ops
>>> register_ops()  # doctest: +SKIP
'torchvision'
"""

from hgkd.mmcv_ops.finder import register_ops
from hgkd.openmmlab.backbone import TimmBackbone
from hgkd.openmmlab.config import drop_teacher, is_downstream, merge_options
from hgkd.openmmlab.distiller import FeatureDistiller
from hgkd.openmmlab.drawing import draw_predictions
from hgkd.openmmlab.forks import find_fork_configs
from hgkd.openmmlab.images import LoadReadableImage, UnreadableImagesHook
from hgkd.openmmlab.runner import DownstreamRunner, dry_run_downstream
from hgkd.openmmlab.weights import load_backbone_file

__all__ = [
    "DownstreamRunner",
    "FeatureDistiller",
    "LoadReadableImage",
    "TimmBackbone",
    "UnreadableImagesHook",
    "draw_predictions",
    "drop_teacher",
    "is_downstream",
    "load_backbone_file",
    "merge_options",
    "register_ops",
    "dry_run_downstream",
]

find_fork_configs()
