"""Students: masked networks, CNN or ViT, with an encoder that sees the visible part and a light decoder."""

from hgkd.networks.encoder import Level, build_encoder, encoder_levels
from hgkd.students.unet import SparseUNet
from hgkd.students.vit import MaskedViT

__all__ = ["Level", "MaskedViT", "SparseUNet", "build_encoder", "encoder_levels"]
