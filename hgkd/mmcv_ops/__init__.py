"""mmcv's compiled operators without a compiler: ``mmcv._ext`` backed by torch and torchvision.

mmcv's Python layers (``mmcv/ops/*.py``, 2.1, Apache-2.0) call functions of a compiled module by name, with buffers to fill in
place. :mod:`~hgkd.mmcv_ops.finder` provides that module when no compiled one is installed, and
:mod:`~hgkd.mmcv_ops.table` lists the functions in it. Arguments mean what mmcv's calls make them mean; the computation is
torchvision's compiled one where there is one. No code is copied.

It depends on nothing else of hgkd, and importing it imports neither torch nor mmcv.

>>> from hgkd.mmcv_ops import register_ops
>>> register_ops()  # doctest: +SKIP
'torchvision'
"""

from hgkd.mmcv_ops.finder import register_ops

__all__ = ["register_ops"]
