"""Frozen teachers behind one protocol: ``teacher(images, visible, needs) -> TeacherOutput``."""

from hgkd.teachers.base import Teacher
from hgkd.teachers.cache import FeatureCache
from hgkd.teachers.mae import MAETeacher, MaskedAutoencoder
from hgkd.teachers.vit import TimmTeacher

__all__ = ["FeatureCache", "MAETeacher", "MaskedAutoencoder", "Teacher", "TimmTeacher"]
