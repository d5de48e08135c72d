"""What hgkd adds to OpenMMLab's detectors and segmentors (mmdet, mmsegmentation, or the OneDL forks of the same names).

Importing this package imports neither mmcv, mmdet nor mmseg: the parts that need them do.

>>> from hgkd.openmmlab import register_ops
>>> register_ops()  # doctest: +SKIP
'torchvision'
"""

from hgkd.openmmlab.forks import find_fork_configs
from hgkd.openmmlab.ops.finder import register_ops

__all__ = ["register_ops"]

find_fork_configs()
