"""What hgkd adds to OpenMMLab's detectors and segmentors (mmdet, mmsegmentation, or the OneDL forks of the same names).

Importing this package is light: mmcv, mmdet and mmseg are imported only by the parts that need them.

>>> from hgkd.openmmlab import register_ops
>>> register_ops()  # doctest: +SKIP
'torchvision'
"""

from hgkd.openmmlab.ops.finder import register_ops

__all__ = ["register_ops"]
