"""Students: masked networks with a sparse encoder and a light decoder."""

from hgkd.students.encoder import Level, build_encoder, encoder_levels
from hgkd.students.unet import SparseUNet

__all__ = ["Level", "SparseUNet", "build_encoder", "encoder_levels"]
