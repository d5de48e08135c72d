"""Networks: timm's encoders and classifiers, the masked autoencoder, and how files become them."""

from hgkd.networks.backbones import load_backbone, read_source, read_student
from hgkd.networks.classifier import ClassifierOutput, ImageClassifier, load_classifier
from hgkd.networks.encoder import Level, build_encoder, encoder_levels
from hgkd.networks.mae import MaskedAutoencoder

__all__ = [
    "ClassifierOutput",
    "ImageClassifier",
    "Level",
    "MaskedAutoencoder",
    "build_encoder",
    "encoder_levels",
    "load_backbone",
    "load_classifier",
    "read_source",
    "read_student",
]
