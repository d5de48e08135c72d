"""Classifiers: a timm network with its heads, started from a distilled backbone, and the same one frozen as a teacher."""

from hgkd.classifiers.network import ClassifierOutput, ClassifierSpec, ImageClassifier, load_classifier
from hgkd.classifiers.teacher import ClassifierTeacher

__all__ = ["ClassifierOutput", "ClassifierSpec", "ClassifierTeacher", "ImageClassifier", "load_classifier"]
