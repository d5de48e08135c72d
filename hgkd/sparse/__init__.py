"""The sparse engine: exact masked convolution at the cost of the visible part.

Useful without the rest of hgkd: masked inference on partial views, or on images that are empty in large parts.

>>> net = sparsify(timm.create_model("resnet18", num_classes=0, global_pool=""), cell=32)
>>> features = net(images, visible=visible)      # visible: bool (B, H/32, W/32), True = visible
>>> dense = features.to_dense()                  # (B, 512, H/32, W/32), 0 at hidden positions
"""

from hgkd.sparse import norm_act as _norm_act  # noqa: F401  (fills the tables)
from hgkd.sparse import rules as _rules  # noqa: F401
from hgkd.sparse.convert import BACKENDS, SparseModule, layer_rule, sparsify
from hgkd.sparse.files import load_sparse, save_sparse
from hgkd.sparse.layout import CellLayout
from hgkd.sparse.masked import MaskedTensor
from hgkd.sparse.packed import PackedTensor
from hgkd.sparse.parity import Parity, measure_parity
from hgkd.sparse.tensor import SparseTensor, function_rule

__all__ = [
    "BACKENDS",
    "CellLayout",
    "MaskedTensor",
    "PackedTensor",
    "Parity",
    "SparseModule",
    "SparseTensor",
    "function_rule",
    "layer_rule",
    "load_sparse",
    "measure_parity",
    "save_sparse",
    "sparsify",
]
