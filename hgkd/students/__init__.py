"""Students: masked networks, CNN or ViT, with an encoder that sees the visible part and a light decoder."""

from hgkd.networks.encoder import Level, build_encoder, encoder_levels
from hgkd.students.base import Student
from hgkd.students.unet import SparseUNet
from hgkd.students.vit import MaskedViT

__all__ = ["Level", "MaskedViT", "SparseUNet", "Student", "build_encoder", "encoder_levels"]
