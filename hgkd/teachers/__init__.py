"""Frozen teachers behind one protocol: ``teacher(images, visible, needs) -> TeacherOutput``."""

from hgkd.networks.mae import MaskedAutoencoder
from hgkd.teachers.base import Teacher
from hgkd.teachers.cache import FeatureCache
from hgkd.teachers.classifier import ClassifierTeacher
from hgkd.teachers.mae import MAETeacher
from hgkd.teachers.vit import TimmTeacher

__all__ = [
    "ClassifierTeacher",
    "FeatureCache",
    "MAETeacher",
    "MaskedAutoencoder",
    "Teacher",
    "TimmTeacher",
]
